// The C interface of libskiparse_ascend.so, and what the twin shares with it. No torch, no CANN.
#pragma once

#include "../ascend/tiling_bwd.h"

namespace skiparse {

// Of tensors on the device, null where one is empty. Inputs have any strides, outputs are
// contiguous.
struct ForwardPointers {
    void *q, *k, *v, *text_q, *text_k, *text_v;
    void *mask, *text_mask;  // bytes, or null
    void *out, *text_out, *lse, *text_lse;
};

struct BackwardPointers {
    void *q, *k, *v, *text_q, *text_k, *text_v;
    void *mask, *text_mask;
    void *out, *text_out, *lse, *text_lse;  // contiguous
    void *grad_out, *grad_text_out;         // any strides
    void *grad_q, *grad_k, *grad_v, *grad_text_q, *grad_text_k, *grad_text_v;
};

// Device memory that the caller lends to a pass, 512-byte aligned, and how much it takes.
struct ForwardScratch {
    void* bias;       // bias_bytes
    void* workspace;  // WORKSPACE_BYTES for each cube core
};
struct BackwardScratch {
    void* bias;        // bias_bytes
    void* values;      // row_values_bytes
    void* text_parts;  // text_parts_bytes
    void* workspace;   // backward_workspace_bytes for each cube core
    void* key_sums;    // key_sums_bytes for each cube core
};

constexpr int64_t FLOAT_BYTES = sizeof(float);

constexpr int64_t bias_bytes(const Tiling& t) {
    return t.batch * t.sparsity * most_stacks(t) * STACK_KEYS * FLOAT_BYTES;
}
constexpr int64_t row_values_bytes(const Tiling& t) {
    return sequences(t) * row_values(t) * FLOAT_BYTES;
}
constexpr int64_t text_parts_bytes(const Tiling& t) {
    return 3 * sequences(t) * t.text * t.head_dim * FLOAT_BYTES;
}

}  // namespace skiparse

extern "C" {

struct SkiparseCores {
    int64_t cube, vector;
};

// How many cores a stream (an aclrtStream) may use: those of the device, unless the stream or the
// process was given less. 0, or CANN's error.
int skiparse_ascend_cores(void* stream, SkiparseCores* cores);

// Enqueue a pass on a stream and return: 0, or CANN's error of a launch. With `half_scores` scores
// pass through memory in half: they must be below 65,504 before they are scaled, and the scale
// positive.
int skiparse_attention_fwd(void* stream, const SkiparseCores* cores,
                           const skiparse::Tiling* tiling, int32_t bf16, int32_t half_scores,
                           const skiparse::ForwardPointers* pointers,
                           const skiparse::ForwardScratch* scratch);
int skiparse_attention_bwd(void* stream, const SkiparseCores* cores,
                           const skiparse::BackwardTiling* tiling, int32_t bf16,
                           const skiparse::BackwardPointers* pointers,
                           const skiparse::BackwardScratch* scratch);
}
