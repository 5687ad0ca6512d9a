// What the backward kernel needs of every row besides its vectors: log-sum-exp, and delta, the sum
// of out * grad_out. Vector cores alone.
//
// Rows lie in the order of their sub-sequence: video, then text. In rows beyond the last the
// log-sum-exp is so large that all weights are 0, and delta is 0. Rows that attend to nothing have
// log-sum-exp FLOOR: all their keys are hidden, and HIDDEN - FLOOR still makes the weights 0.
#include "kernel_operator.h"

#include "rows.h"
#include "rowwise.h"
#include "tiling_bwd.h"

namespace skiparse {

using namespace AscendC;

constexpr float BEYOND = 1.0e30f;

struct RowValueArguments {
    GM_ADDR out;
    GM_ADDR text_out;
    GM_ADDR lse;
    GM_ADDR text_lse;
    GM_ADDR grad_out;
    GM_ADDR grad_text_out;
    GM_ADDR values;
};

template <class T>
class RowValues {
public:
    __aicore__ __inline__ RowValues(const BackwardTiling& tiling,
                                    const RowValueArguments& arguments)
        : b_(tiling), t_(tiling.forward), a_(arguments), dim_(t_.head_dim) {
        LocalMemAllocator<Hardware::UB> ub;
        out_ = ub.Alloc<TPosition::VECCALC, T>(2 * CHUNK_ROWS * dim_);
        grad_ = ub.Alloc<TPosition::VECCALC, T>(2 * CHUNK_ROWS * dim_);
        wide_lse_ = ub.Alloc<TPosition::VECCALC, float>(2 * CHUNK_ROWS * BLOCK);
        product_ = ub.Alloc<TPosition::VECCALC, float>(CHUNK_ROWS * dim_);
        factor_ = ub.Alloc<TPosition::VECCALC, float>(CHUNK_ROWS * dim_);
        lse_ = ub.Alloc<TPosition::VECCALC, float>(CHUNK_ROWS);
        delta_ = ub.Alloc<TPosition::VECCALC, float>(CHUNK_ROWS);
    }

    __aicore__ __inline__ void Run(int64_t core, int64_t cores) {
        const int64_t chunks = most_blocks(t_) * BLOCK_ROWS / CHUNK_ROWS;
        for (int32_t slot = 0; slot < 2; ++slot) SetFlag<HardEvent::V_MTE2>(slot);
        SetFlag<HardEvent::MTE3_V>(0);
        for (int64_t i = core; i < sequences(t_) * chunks; i += cores) {
            const Sequence sequence = sequence_of(t_, i / chunks);
            const int64_t first = i % chunks * CHUNK_ROWS;
            const int64_t left = length_of(t_, sequence.sub) + t_.text - first;
            WaitFlag<HardEvent::MTE3_V>(0);
            Duplicate(lse_, BEYOND, CHUNK_ROWS);
            Duplicate(delta_, 0.0f, CHUNK_ROWS);
            PipeBarrier<PIPE_V>();
            if (left > 0) OfRows(sequence, first, least(left, CHUNK_ROWS));
            SetFlag<HardEvent::V_MTE3>(0);
            WaitFlag<HardEvent::V_MTE3>(0);
            const int64_t place = index_of(t_, sequence) * row_values(t_) + first;
            DataCopy(At<float>(a_.values, place), lse_, CHUNK_ROWS);
            DataCopy(At<float>(a_.values, place + row_values(t_) / 2), delta_, CHUNK_ROWS);
            SetFlag<HardEvent::MTE3_V>(0);
        }
        for (int32_t slot = 0; slot < 2; ++slot) WaitFlag<HardEvent::V_MTE2>(slot);
        WaitFlag<HardEvent::MTE3_V>(0);
    }

private:
    static constexpr int64_t CHUNK_ROWS = 64;

    __aicore__ __inline__ void OfRows(const Sequence& sequence, int64_t first, int64_t count) {
        const int32_t slot = count_++ % 2;
        const LocalTensor<T> out = out_[slot * CHUNK_ROWS * dim_];
        const LocalTensor<T> grad = grad_[slot * CHUNK_ROWS * dim_];
        const LocalTensor<float> wide_lse = wide_lse_[slot * CHUNK_ROWS * BLOCK];
        WaitFlag<HardEvent::V_MTE2>(slot);
        const int64_t token = t_.heads * dim_, tokens = t_.tokens, text = t_.text;
        const int64_t text_heads = t_.heads * t_.sparsity * text;
        CollectRows(out,
                    Joint<T>(a_.out, {tokens * token, token, dim_}, a_.text_out,
                             {t_.sparsity * text * token, token, dim_}, t_, sequence,
                             text * token),
                    dim_, first, count);
        CollectRows(grad,
                    Joint<T>(a_.grad_out, b_.grad_out, a_.grad_text_out, b_.grad_text_out, t_,
                             sequence, b_.grad_text_sub),
                    dim_, first, count);
        CollectRows(wide_lse,
                    Joint<float>(a_.lse, {t_.heads * tokens, 1, tokens}, a_.text_lse,
                                 {text_heads, 1, t_.sparsity * text}, t_, sequence, text),
                    1, first, count);
        SetFlag<HardEvent::MTE2_V>(slot);
        WaitFlag<HardEvent::MTE2_V>(slot);

        Cast(product_, out, RoundMode::CAST_NONE, count * dim_);
        Cast(factor_, grad, RoundMode::CAST_NONE, count * dim_);
        WholeReduceMax(lse_, wide_lse, 1, count, 1, 1, 1, ReduceOrder::ORDER_ONLY_VALUE);
        PipeBarrier<PIPE_V>();
        SetFlag<HardEvent::V_MTE2>(slot);
        Maxs(lse_, lse_, FLOOR, CHUNK_ROWS);
        Mul(product_, product_, factor_, count * dim_);
        PipeBarrier<PIPE_V>();
        // Rows of LANES: as they are, or the two parts of each row added.
        const bool folded = dim_ > LANES;
        if (folded) {
            const int64_t pitch = dim_ / BLOCK;
            Add(factor_, product_, product_[LANES], LANES, count,
                BinaryRepeatParams(1, 1, 1, BLOCK, pitch, pitch));
            PipeBarrier<PIPE_V>();
        }
        WholeReduceSum(delta_, folded ? factor_ : product_, LANES, count, 1, 1, BLOCK);
        PipeBarrier<PIPE_V>();
    }

    const BackwardTiling& b_;
    const Tiling& t_;
    const RowValueArguments& a_;
    int64_t dim_;
    int64_t count_ = 0;  // slots filled so far
    LocalTensor<T> out_, grad_;              // [2][CHUNK_ROWS, dim]
    LocalTensor<float> wide_lse_;            // [2][CHUNK_ROWS, BLOCK], the first of each block
    LocalTensor<float> product_, factor_;    // [CHUNK_ROWS, dim]
    LocalTensor<float> lse_, delta_;         // [CHUNK_ROWS]
};

template <class T>
__aicore__ __inline__ void WriteRowValues(const RowValueArguments& arguments,
                                          const BackwardTiling& tiling) {
    InitSocState();
    RowValues<T>(tiling, arguments).Run(GetBlockIdx(), GetBlockNum());
    PipeBarrier<PIPE_ALL>();
}

}  // namespace skiparse

extern "C" __global__ __vector__ void skiparse_row_values_fp16(
    GM_ADDR out, GM_ADDR text_out, GM_ADDR lse, GM_ADDR text_lse, GM_ADDR grad_out,
    GM_ADDR grad_text_out, GM_ADDR values, skiparse::BackwardTiling tiling) {
    skiparse::WriteRowValues<half>(
        {out, text_out, lse, text_lse, grad_out, grad_text_out, values}, tiling);
}

extern "C" __global__ __vector__ void skiparse_row_values_bf16(
    GM_ADDR out, GM_ADDR text_out, GM_ADDR lse, GM_ADDR text_lse, GM_ADDR grad_out,
    GM_ADDR grad_text_out, GM_ADDR values, skiparse::BackwardTiling tiling) {
    skiparse::WriteRowValues<bfloat16_t>(
        {out, text_out, lse, text_lse, grad_out, grad_text_out, values}, tiling);
}
