// Vector arithmetic on matrices of fp32 in UB, a row or a column of them at a time.
#pragma once

#include <cstdint>

namespace skiparse {

constexpr int64_t LANES = 64, BLOCK = 8;  // fp32 of an instruction's repeat, of 32 bytes

// Every one of `count` values fills a block, so that an instruction can use it for a whole row.
__aicore__ inline void Spread(const AscendC::LocalTensor<float>& to,
                              const AscendC::LocalTensor<float>& from, int64_t count) {
    AscendC::Brcb(to, from, count / BLOCK, AscendC::BrcbRepeatParams(1, BLOCK));
    AscendC::PipeBarrier<PIPE_V>();
}

// x[rows, width] += row[width], the same for all rows
__aicore__ inline void AddToRows(const AscendC::LocalTensor<float>& x,
                                 const AscendC::LocalTensor<float>& row, int64_t rows,
                                 int64_t width) {
    const AscendC::BinaryRepeatParams p(1, 1, 1, width / BLOCK, width / BLOCK, 0);
    for (int64_t column = 0; column < width; column += LANES) {
        AscendC::Add(x[column], x[column], row[column], LANES, rows, p);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

// x[rows, width] -= wide[rows, BLOCK], of which every row is one value
__aicore__ inline void SubtractFromRows(const AscendC::LocalTensor<float>& x,
                                        const AscendC::LocalTensor<float>& wide, int64_t rows,
                                        int64_t width) {
    const AscendC::BinaryRepeatParams p(1, 1, 0, width / BLOCK, width / BLOCK, 1);
    for (int64_t column = 0; column < width; column += LANES) {
        AscendC::Sub(x[column], x[column], wide, LANES, rows, p);
    }
    AscendC::PipeBarrier<PIPE_V>();
}

}  // namespace skiparse
