// Gradients of the text: the sum over the sub-sequences, in their order, rounded once. Vector cores
// alone.
#include "kernel_operator.h"

#include "rows.h"
#include "tiling_bwd.h"

namespace skiparse {

using namespace AscendC;

struct TextGradientArguments {
    GM_ADDR parts;  // fp32 [3, batch, heads, sparsity, text, head_dim], of the backward kernel
    GM_ADDR sums[3];  // of q, k, v: [batch, text, heads, head_dim]
};

template <class T>
class TextGradients {
public:
    __aicore__ __inline__ TextGradients(const Tiling& tiling,
                                        const TextGradientArguments& arguments)
        : t_(tiling), a_(arguments), dim_(tiling.head_dim) {
        LocalMemAllocator<Hardware::UB> ub;
        part_ = ub.Alloc<TPosition::VECCALC, float>(2 * CHUNK_ROWS * dim_);
        sum_ = ub.Alloc<TPosition::VECCALC, float>(CHUNK_ROWS * dim_);
        rounded_ = ub.Alloc<TPosition::VECCALC, T>(CHUNK_ROWS * dim_);
    }

    __aicore__ __inline__ void Run(int64_t core, int64_t cores) {
        const int64_t chunks = ceil_div(t_.text, CHUNK_ROWS), heads = t_.batch * t_.heads;
        for (int32_t slot = 0; slot < 2; ++slot) SetFlag<HardEvent::V_MTE2>(slot);
        SetFlag<HardEvent::MTE3_V>(0);
        for (int64_t i = core; i < 3 * heads * chunks; i += cores) {
            const int64_t row = i % chunks * CHUNK_ROWS;
            Sum(i / chunks, row, least(t_.text - row, CHUNK_ROWS));
        }
        for (int32_t slot = 0; slot < 2; ++slot) WaitFlag<HardEvent::V_MTE2>(slot);
        WaitFlag<HardEvent::MTE3_V>(0);
    }

private:
    static constexpr int64_t CHUNK_ROWS = 64;

    // `which` counts the heads of the batch of one of the three after another.
    __aicore__ __inline__ void Sum(int64_t which, int64_t row, int64_t rows) {
        Duplicate(sum_, 0.0f, rows * dim_);
        PipeBarrier<PIPE_V>();
        for (int64_t sub = 0; sub < t_.sparsity; ++sub) {
            const int32_t slot = count_++ % 2;
            const LocalTensor<float> part = part_[slot * CHUNK_ROWS * dim_];
            const int64_t place = ((which * t_.sparsity + sub) * t_.text + row) * dim_;
            WaitFlag<HardEvent::V_MTE2>(slot);
            DataCopy(part, At<float>(a_.parts, place), rows * dim_);
            SetFlag<HardEvent::MTE2_V>(slot);
            WaitFlag<HardEvent::MTE2_V>(slot);
            Add(sum_, sum_, part, rows * dim_);
            PipeBarrier<PIPE_V>();
            SetFlag<HardEvent::V_MTE2>(slot);
        }
        WaitFlag<HardEvent::MTE3_V>(0);
        Cast(rounded_, sum_, RoundMode::CAST_RINT, rows * dim_);
        PipeBarrier<PIPE_V>();
        SetFlag<HardEvent::V_MTE3>(0);
        WaitFlag<HardEvent::V_MTE3>(0);
        const int64_t heads = t_.batch * t_.heads, batch = which % heads / t_.heads;
        const Strides strides{t_.text * t_.heads * dim_, t_.heads * dim_, dim_};
        const Rows<T> to =
            TextRows<T>(a_.sums[which / heads], strides, {batch, which % t_.heads, 0});
        ScatterRows(to, rounded_, dim_, dim_, row, rows);
        SetFlag<HardEvent::MTE3_V>(0);
    }

    const Tiling& t_;
    const TextGradientArguments& a_;
    int64_t dim_;
    int64_t count_ = 0;           // slots filled so far
    LocalTensor<float> part_;     // [2][CHUNK_ROWS, dim]
    LocalTensor<float> sum_;      // [CHUNK_ROWS, dim]
    LocalTensor<T> rounded_;      // [CHUNK_ROWS, dim]
};

template <class T>
__aicore__ __inline__ void SumTextGradients(const TextGradientArguments& arguments,
                                            const Tiling& tiling) {
    InitSocState();
    TextGradients<T>(tiling, arguments).Run(GetBlockIdx(), GetBlockNum());
    PipeBarrier<PIPE_ALL>();
}

}  // namespace skiparse

extern "C" __global__ __vector__ void skiparse_text_gradients_fp16(GM_ADDR parts, GM_ADDR text_q,
                                                                   GM_ADDR text_k, GM_ADDR text_v,
                                                                   skiparse::Tiling tiling) {
    skiparse::SumTextGradients<half>({parts, {text_q, text_k, text_v}}, tiling);
}

extern "C" __global__ __vector__ void skiparse_text_gradients_bf16(GM_ADDR parts, GM_ADDR text_q,
                                                                   GM_ADDR text_k, GM_ADDR text_v,
                                                                   skiparse::Tiling tiling) {
    skiparse::SumTextGradients<bfloat16_t>({parts, {text_q, text_k, text_v}}, tiling);
}
