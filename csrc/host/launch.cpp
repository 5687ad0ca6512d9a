// The kernels and their launches in one library, compiled by bisheng. Has never run on an NPU.
#include "kernel_operator.h"

#include "../ascend/attention_bwd.cpp"
#include "../ascend/attention_fwd.cpp"
#include "../ascend/key_bias.cpp"
#include "../ascend/row_values.cpp"
#include "../ascend/text_gradients.cpp"
#include "passes.h"

#include "acl/acl.h"

// The language extension of bisheng; a compiler without it defines its own.
#ifndef SKIPARSE_LAUNCH
#define SKIPARSE_LAUNCH(kernel, blocks, stream) kernel<<<blocks, nullptr, stream>>>
#endif

namespace {

// Kernels of vector cores alone get one block for each, others one for each cube core, which brings
// two vector cores. The problem is a parameter, by value.
struct Device {
    void* stream;
    uint32_t cube, vector;
    bool half_scores = false;

    template <class... Pointers>
    void key_bias(const skiparse::Tiling& t, Pointers... p) const {
        SKIPARSE_LAUNCH(skiparse_key_bias, vector, stream)(static_cast<uint8_t*>(p)..., t);
    }
    template <class... Pointers>
    void forward(const skiparse::Tiling& t, bool bf16, Pointers... p) const {
        if (bf16 && half_scores) {
            SKIPARSE_LAUNCH(skiparse_attention_fwd_bf16_half_scores, cube, stream)
            (static_cast<uint8_t*>(p)..., t);
        } else if (half_scores) {
            SKIPARSE_LAUNCH(skiparse_attention_fwd_fp16_half_scores, cube, stream)
            (static_cast<uint8_t*>(p)..., t);
        } else if (bf16) {
            SKIPARSE_LAUNCH(skiparse_attention_fwd_bf16, cube, stream)
            (static_cast<uint8_t*>(p)..., t);
        } else {
            SKIPARSE_LAUNCH(skiparse_attention_fwd_fp16, cube, stream)
            (static_cast<uint8_t*>(p)..., t);
        }
    }
    template <class... Pointers>
    void row_values(const skiparse::BackwardTiling& b, bool bf16, Pointers... p) const {
        if (bf16) {
            SKIPARSE_LAUNCH(skiparse_row_values_bf16, vector, stream)
            (static_cast<uint8_t*>(p)..., b);
        } else {
            SKIPARSE_LAUNCH(skiparse_row_values_fp16, vector, stream)
            (static_cast<uint8_t*>(p)..., b);
        }
    }
    template <class... Pointers>
    void backward(const skiparse::BackwardTiling& b, bool bf16, Pointers... p) const {
        if (bf16) {
            SKIPARSE_LAUNCH(skiparse_attention_bwd_bf16, cube, stream)
            (static_cast<uint8_t*>(p)..., b);
        } else {
            SKIPARSE_LAUNCH(skiparse_attention_bwd_fp16, cube, stream)
            (static_cast<uint8_t*>(p)..., b);
        }
    }
    template <class... Pointers>
    void text_gradients(const skiparse::Tiling& t, bool bf16, Pointers... p) const {
        if (bf16) {
            SKIPARSE_LAUNCH(skiparse_text_gradients_bf16, vector, stream)
            (static_cast<uint8_t*>(p)..., t);
        } else {
            SKIPARSE_LAUNCH(skiparse_text_gradients_fp16, vector, stream)
            (static_cast<uint8_t*>(p)..., t);
        }
    }
};

Device device_of(void* stream, const SkiparseCores& cores, bool half_scores = false) {
    return {stream, static_cast<uint32_t>(cores.cube), static_cast<uint32_t>(cores.vector),
            half_scores};
}

// Of the launches just made. It stays for others to see.
int launch_error() { return aclrtPeekAtLastError(ACL_RT_THREAD_LEVEL); }

}  // namespace

extern "C" int skiparse_ascend_cores(void* stream, SkiparseCores* cores) {
    uint32_t cube = 0, vector = 0;
    aclError error = aclrtGetStreamResLimit(stream, ACL_RT_DEV_RES_CUBE_CORE, &cube);
    if (error == ACL_SUCCESS) {
        error = aclrtGetStreamResLimit(stream, ACL_RT_DEV_RES_VECTOR_CORE, &vector);
    }
    // A block of a mixed kernel waits for its vector cores: it must get both.
    *cores = {vector / 2 < cube ? vector / 2 : cube, vector};
    return error;
}

extern "C" int skiparse_attention_fwd(void* stream, const SkiparseCores* cores,
                                      const skiparse::Tiling* tiling, int32_t bf16,
                                      int32_t half_scores,
                                      const skiparse::ForwardPointers* pointers,
                                      const skiparse::ForwardScratch* scratch) {
    if (skiparse::tasks(*tiling) == 0) return 0;
    const Device device = device_of(stream, *cores, half_scores != 0);
    skiparse::run_forward(device, *tiling, bf16 != 0, *pointers, *scratch);
    return launch_error();
}

extern "C" int skiparse_attention_bwd(void* stream, const SkiparseCores* cores,
                                      const skiparse::BackwardTiling* tiling, int32_t bf16,
                                      const skiparse::BackwardPointers* pointers,
                                      const skiparse::BackwardScratch* scratch) {
    if (skiparse::sequences(tiling->forward) == 0) return 0;
    skiparse::run_backward(device_of(stream, *cores), *tiling, bf16 != 0, *pointers, *scratch);
    return launch_error();
}
