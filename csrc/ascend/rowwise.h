// Vector arithmetic on matrices of fp32 in UB, a row or a column of them at a time.
#pragma once

#include "rows.h"

namespace skiparse {

constexpr int64_t LANES = 64, BLOCK = 8;  // fp32 of an instruction's repeat, of 32 bytes

// Every one of `count` values fills a block, so that an instruction can use it for a whole row.
__aicore__ __inline__ void Spread(const AscendC::LocalTensor<float>& to,
                                  const AscendC::LocalTensor<float>& from, int64_t count) {
    AscendC::Brcb(to, from, count / BLOCK, AscendC::BrcbRepeatParams(1, BLOCK));
    AscendC::PipeBarrier<PIPE_V>();
}

// x[rows, width] += row[width], the same for all rows
__aicore__ __inline__ void AddToRows(const AscendC::LocalTensor<float>& x,
                                     const AscendC::LocalTensor<float>& row, int64_t rows,
                                     int64_t width) {
    const AscendC::BinaryRepeatParams p(1, 1, 1, width / BLOCK, width / BLOCK, 0);
    for (int64_t column = 0; column < width; column += LANES) {
        AscendC::Add(x[column], x[column], row[column], LANES, rows, p);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

// x[rows, width] -= wide[rows, BLOCK], of which every row is one value
__aicore__ __inline__ void SubtractFromRows(const AscendC::LocalTensor<float>& x,
                                            const AscendC::LocalTensor<float>& wide, int64_t rows,
                                            int64_t width) {
    const AscendC::BinaryRepeatParams p(1, 1, 0, width / BLOCK, width / BLOCK, 1);
    for (int64_t column = 0; column < width; column += LANES) {
        AscendC::Sub(x[column], x[column], wide, LANES, rows, p);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

// Wide matrices lie in panels of 128 columns, x[panels][rows][PANEL], so that an instruction can
// fold many of them at once.
constexpr int64_t PANEL = 128;

// x += row[panels * PANEL], the same for all rows
__aicore__ __inline__ void AddToPanels(const AscendC::LocalTensor<float>& x,
                                       const AscendC::LocalTensor<float>& row, int64_t rows,
                                       int64_t panels) {
    const AscendC::BinaryRepeatParams p(1, 1, 1, PANEL / BLOCK, PANEL / BLOCK, 0);
    for (int64_t column = 0; column < panels * PANEL; column += LANES) {
        const auto part = x[column / PANEL * rows * PANEL + column % PANEL];
        AscendC::Add(part, part, row[column], LANES, rows, p);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

// x -= wide[rows, BLOCK], of which every row is one value
__aicore__ __inline__ void SubtractFromPanels(const AscendC::LocalTensor<float>& x,
                                              const AscendC::LocalTensor<float>& wide, int64_t rows,
                                              int64_t panels) {
    const AscendC::BinaryRepeatParams p(1, 1, 0, PANEL / BLOCK, PANEL / BLOCK, 1);
    for (int64_t column = 0; column < panels * PANEL; column += LANES) {
        const auto part = x[column / PANEL * rows * PANEL + column % PANEL];
        AscendC::Sub(part, part, wide, LANES, rows, p);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

enum class Reduction { MAXIMUM, SUM };

template <Reduction REDUCTION, class S>
__aicore__ __inline__ void Fold(const AscendC::LocalTensor<S>& to, const AscendC::LocalTensor<S>& a,
                                const AscendC::LocalTensor<S>& b, int64_t count) {
    if constexpr (REDUCTION == Reduction::MAXIMUM) {
        AscendC::Max(to, a, b, count);
    } else {
        AscendC::Add(to, a, b, count);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

// scratch[rows][PANEL], or x itself if it is one panel = all panels of x folded into one;
// scratch[panels / 2][rows][PANEL]
template <Reduction REDUCTION, class S>
__aicore__ __inline__ AscendC::LocalTensor<S> FoldPanels(const AscendC::LocalTensor<S>& x,
                                                         const AscendC::LocalTensor<S>& scratch,
                                                         int64_t rows, int64_t panels) {
    const int64_t size = rows * PANEL;
    auto from = x;
    for (int64_t left = panels; left > 1; left /= 2) {
        Fold<REDUCTION>(scratch, from, from[left / 2 * size], left / 2 * size);
        if (left % 2 == 1) Fold<REDUCTION>(scratch, scratch, from[(left - 1) * size], size);
        from = scratch;
    }
    return from;
}

// to[rows] = every row reduced; scratch[panels / 2, but at least 1][rows][PANEL]
template <Reduction REDUCTION>
__aicore__ __inline__ void ReducePanels(const AscendC::LocalTensor<float>& to,
                                        const AscendC::LocalTensor<float>& x,
                                        const AscendC::LocalTensor<float>& scratch, int64_t rows,
                                        int64_t panels) {
    const auto from = FoldPanels<REDUCTION>(x, scratch, rows, panels);
    const AscendC::BinaryRepeatParams p(1, 1, 1, PANEL / BLOCK, PANEL / BLOCK, PANEL / BLOCK);
    if constexpr (REDUCTION == Reduction::MAXIMUM) {
        AscendC::Max(scratch, from, from[LANES], LANES, rows, p);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::WholeReduceMax(to, scratch, LANES, rows, 1, 1, PANEL / BLOCK,
                                AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    } else {
        AscendC::Add(scratch, from, from[LANES], LANES, rows, p);
        AscendC::PipeBarrier<PIPE_V>();
        AscendC::WholeReduceSum(to, scratch, LANES, rows, 1, 1, PANEL / BLOCK);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

// The maxima of half, of which a panel is as wide as an instruction's repeat.
__aicore__ __inline__ void MaximaOfPanels(const AscendC::LocalTensor<half>& to,
                                          const AscendC::LocalTensor<half>& x,
                                          const AscendC::LocalTensor<half>& scratch, int64_t rows,
                                          int64_t panels) {
    const auto from = FoldPanels<Reduction::MAXIMUM>(x, scratch, rows, panels);
    AscendC::WholeReduceMax(to, from, PANEL, rows, 1, 1, PANEL / C0,
                            AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    AscendC::PipeBarrier<PIPE_V>();
}

}  // namespace skiparse
