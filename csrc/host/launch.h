// The C interface of libskiparse_ascend.so, and what the twin shares with it. No torch, no CANN.
#pragma once

#include "../ascend/tiling.h"

namespace skiparse {

// Of tensors on the device, null where one is empty. Inputs have any strides, outputs are
// contiguous.
struct ForwardPointers {
    void *q, *k, *v, *text_q, *text_k, *text_v;
    void *mask, *text_mask;  // bytes, or null
    void *out, *text_out, *lse, *text_lse;
};

// Device memory that the caller lends to a pass, 512-byte aligned.
struct ForwardScratch {
    void* tiling;     // a copy of the Tiling
    void* bias;       // bias_bytes
    void* workspace;  // WORKSPACE_BYTES for each cube core
};

constexpr int64_t bias_bytes(const Tiling& t) {
    return t.batch * t.sparsity * most_stacks(t) * STACK_KEYS * static_cast<int64_t>(sizeof(float));
}

}  // namespace skiparse

extern "C" {

struct SkiparseCores {
    int64_t cube, vector;
};

// How many cores the device has; 0, or CANN's error.
int skiparse_ascend_cores(int32_t device, SkiparseCores* cores);

// Enqueue a pass on a stream (an aclrtStream) and return.
void skiparse_attention_fwd(void* stream, const SkiparseCores* cores,
                            const skiparse::Tiling* tiling, int32_t bf16,
                            const skiparse::ForwardPointers* pointers,
                            const skiparse::ForwardScratch* scratch);
}
