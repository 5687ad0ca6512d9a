// Rows of a sub-sequence, moved between global memory and the chip by the DMA itself.
//
// What is called for every tile is `__inline__`: bisheng then inlines it for sure, and calls may be
// nested four deep at most.
#pragma once

#include "tiling.h"

namespace skiparse {

constexpr int64_t BLOCK_BYTES = 32;     // the unit of on-chip memory
constexpr int64_t C0 = 16;              // 16-bit elements of a block
constexpr int64_t FRACTAL_ROWS = 16;    // of C0 elements each
constexpr int64_t MOST_STRIDE = 65535;  // of a field of an ND2NZ copy, in elements
constexpr int64_t MOST_GAP = 0xffffffff;  // of a copy to UB, in bytes

// One head of the tokens of one sub-sequence.
template <class T>
struct Rows {
    AscendC::GlobalTensor<T> base;
    int64_t stride;  // from token to token, elements
    Deal deal;
};

// Of all tokens, one after another.
__aicore__ __inline__ Deal Undealt() { return {0, 1, INT64_MAX, 0}; }

template <class T>
__aicore__ __inline__ AscendC::GlobalTensor<T> At(GM_ADDR address, int64_t elements) {
    AscendC::GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address) + elements);
    return tensor;
}

template <class T>
__aicore__ __inline__ Rows<T> VideoRows(GM_ADDR address, const Strides& strides,
                                        const Tiling& tiling, const Sequence& sequence) {
    const int64_t first = sequence.batch * strides.batch + sequence.head * strides.head;
    return {At<T>(address, first), strides.token,
            deal_of(sequence.sub, tiling.sparsity, tiling.run)};
}

template <class T>
__aicore__ __inline__ Rows<T> TextRows(GM_ADDR address, const Strides& strides,
                                       const Sequence& sequence) {
    const int64_t first = sequence.batch * strides.batch + sequence.head * strides.head;
    return {At<T>(address, first), strides.token, Undealt()};
}

// All rows of a sub-sequence: `length` of video, then text.
template <class T>
struct JointRows {
    Rows<T> video, text;
    int64_t length;
};

// Of both sources of a tensor; `text_sub` is from sub-sequence to sub-sequence of its text, where
// each has its own. It divides, so it is made once for a sequence.
template <class T>
__aicore__ __inline__ JointRows<T> Joint(GM_ADDR video, const Strides& video_strides, GM_ADDR text,
                                         const Strides& text_strides, const Tiling& tiling,
                                         const Sequence& sequence, int64_t text_sub = 0) {
    Rows<T> of_text = TextRows<T>(text, text_strides, sequence);
    of_text.base = of_text.base[sequence.sub * text_sub];
    return {VideoRows<T>(video, video_strides, tiling, sequence), of_text,
            length_of(tiling, sequence.sub)};
}

// How many of `count` positions from `first` on are video.
__aicore__ __inline__ int64_t VideoCount(int64_t length, int64_t first, int64_t count) {
    const int64_t of_video = least(count, length - first);
    return of_video < 0 ? 0 : of_video;
}

// L1 in columns of blocks, `pitch` rows each: matrices of rows of U, in one instruction.
template <class U>
__aicore__ __inline__ void CopyMatrices(const AscendC::LocalTensor<U>& to, int64_t pitch,
                                        const AscendC::GlobalTensor<U>& from, int64_t matrices,
                                        int64_t apart, int64_t rows, int64_t stride, int64_t dim) {
    AscendC::Nd2NzParams p;
    p.ndNum = matrices;
    p.nValue = rows;
    p.dValue = dim;
    p.srcNdMatrixStride = apart;
    p.srcDValue = stride;
    p.dstNzC0Stride = pitch;
    p.dstNzNStride = 1;
    p.dstNzMatrixStride = matrices > 1 ? rows * BLOCK_BYTES / sizeof(U) : 0;
    AscendC::DataCopy(to, from, p);
}

// The same of 16-bit elements, if the distances fit their 16 bits, in elements or pairs of them.
template <class T>
__aicore__ __inline__ bool CopyAtOnce(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                      const AscendC::GlobalTensor<T>& from, int64_t matrices,
                                      int64_t apart, int64_t rows, int64_t stride, int64_t dim) {
    if (stride < 1 || apart < 0) return false;
    if (stride <= MOST_STRIDE && apart <= MOST_STRIDE) {
        CopyMatrices(to, pitch, from, matrices, apart, rows, stride, dim);
        return true;
    }
    if (stride > 2 * MOST_STRIDE || apart > 2 * MOST_STRIDE || stride % 2 + apart % 2 > 0) {
        return false;
    }
    AscendC::GlobalTensor<uint32_t> pairs;
    pairs.SetGlobalBuffer(
        reinterpret_cast<__gm__ uint32_t*>(const_cast<__gm__ T*>(from.GetPhyAddr())));
    CopyMatrices(to.template ReinterpretCast<uint32_t>(), pitch, pairs, matrices, apart / 2, rows,
                 stride / 2, dim / 2);
    return true;
}

// `count` copies of one row.
template <class T>
__aicore__ __inline__ void FillRows(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                    const AscendC::GlobalTensor<T>& row, int64_t count,
                                    int64_t dim) {
    if (count > 0) CopyMatrices(to, pitch, row, count, 0, 1, 1, dim);
}

// Rows equally far apart: in one instruction if they are at most 131,070 elements apart. The caller
// on the host sees to it that they are; else one by one.
template <class T>
__aicore__ __inline__ void CopyRows(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                    const AscendC::GlobalTensor<T>& from, int64_t rows,
                                    int64_t stride, int64_t dim) {
    if (stride == 0) {
        FillRows(to, pitch, from, rows, dim);
        return;
    }
    if (CopyAtOnce(to, pitch, from, 1, 0, rows, stride, dim)) return;
    for (int64_t row = 0; row < rows; ++row) {
        CopyMatrices(to[row * C0], pitch, from[row * stride], 1, 0, 1, 1, dim);
    }
}

// Runs of consecutive tokens: one instruction on two levels if both distances fit, else one a run.
template <class T>
__aicore__ __inline__ void CopyRuns(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                    const Rows<T>& from, const Runs& runs, int64_t dim) {
    const AscendC::GlobalTensor<T> first = from.base[runs.token * from.stride];
    if (runs.runs == 1) {
        CopyRows(to, pitch, first, runs.length, from.stride, dim);
        return;
    }
    const int64_t apart = runs.apart * from.stride;
    if (runs.length == 1) {
        CopyRows(to, pitch, first, runs.runs, apart, dim);
    } else if (!CopyAtOnce(to, pitch, first, runs.runs, apart, runs.length, from.stride, dim)) {
        for (int64_t run = 0; run < runs.runs; ++run) {
            CopyRows(to[run * runs.length * C0], pitch, first[run * apart], runs.length,
                     from.stride, dim);
        }
    }
}

// Positions [first, first + count) of a sub-sequence into L1.
template <class T>
__aicore__ __inline__ void GatherRows(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                      const Rows<T>& from, int64_t first, int64_t count,
                                      int64_t dim) {
    const int64_t end = first + count;
    for (int64_t j = first; j < end;) {
        const Runs runs = runs_at(from.deal, j, end);
        CopyRuns(to[(j - first) * C0], pitch, from, runs, dim);
        j += runs.runs * runs.length;
    }
}

template <class T>
__aicore__ __inline__ AscendC::GlobalTensor<T> RowAt(const Rows<T>& rows, int64_t j) {
    const Runs runs = runs_at(rows.deal, j, j + 1);
    return rows.base[runs.token * rows.stride];
}

// `count` positions from `first` on, then copies of the last up to `rows`, the pitch as well, so
// that what the cube reads there is finite.
template <class T>
__aicore__ __inline__ void GatherTile(const AscendC::LocalTensor<T>& to, int64_t rows,
                                      const JointRows<T>& from, int64_t first, int64_t count,
                                      int64_t dim) {
    const int64_t video_count = VideoCount(from.length, first, count);
    const int64_t text_first = first + video_count - from.length;
    const int64_t text_count = count - video_count;
    if (video_count > 0) GatherRows(to, rows, from.video, first, video_count, dim);
    if (text_count > 0) {
        GatherRows(to[video_count * C0], rows, from.text, text_first, text_count, dim);
    }
    if (count == rows) return;
    const AscendC::GlobalTensor<T> last = text_count > 0
                                              ? RowAt(from.text, text_first + text_count - 1)
                                              : RowAt(from.video, first + video_count - 1);
    FillRows(to[count * C0], rows, last, rows - count, dim);
}

// Positions [first, first + count) of a sub-sequence into UB, every row from a block of its own on.
template <class T>
__aicore__ __inline__ void CollectRows(const AscendC::LocalTensor<T>& to, const Rows<T>& from,
                                       int64_t width, int64_t first, int64_t count) {
    const int64_t pitch = ceil_div(width * sizeof(T), BLOCK_BYTES) * BLOCK_BYTES / sizeof(T);
    const int64_t end = first + count;
    AscendC::DataCopyExtParams p;
    p.blockLen = width * sizeof(T);
    for (int64_t j = first; j < end;) {
        const Runs runs = runs_at(from.deal, j, end);
        const bool single = runs.length == 1 && runs.runs > 1;  // rows equally far apart
        const int64_t apart = (single ? runs.apart : 1) * from.stride;
        const int64_t gap = (apart - width) * static_cast<int64_t>(sizeof(T));
        const int64_t rows = single ? runs.runs : runs.length;
        const int64_t together = gap >= 0 && gap <= MOST_GAP ? rows : 1;
        p.blockCount = together;
        p.srcStride = together > 1 ? gap : 0;
        for (int64_t run = 0; run < (single ? 1 : runs.runs); ++run) {
            const int64_t token = runs.token + run * runs.apart;
            for (int64_t row = 0; row < rows; row += together) {
                AscendC::DataCopyPad(to[(j - first + run * runs.length + row) * pitch],
                                     from.base[token * from.stride + row * apart], p,
                                     AscendC::DataCopyPadExtParams<T>());
            }
        }
        j += runs.runs * runs.length;
    }
}

template <class T>
__aicore__ __inline__ void CollectRows(const AscendC::LocalTensor<T>& to, const JointRows<T>& from,
                                       int64_t width, int64_t first, int64_t count) {
    const int64_t pitch = ceil_div(width * sizeof(T), BLOCK_BYTES) * BLOCK_BYTES / sizeof(T);
    const int64_t video_count = VideoCount(from.length, first, count);
    if (video_count > 0) CollectRows(to, from.video, width, first, video_count);
    if (count > video_count) {
        CollectRows(to[video_count * pitch], from.text, width, first + video_count - from.length,
                    count - video_count);
    }
}

// Rows of `width` elements in UB, `pitch` apart, to their tokens in global memory.
template <class T>
__aicore__ __inline__ void ScatterRows(const Rows<T>& to, const AscendC::LocalTensor<T>& from,
                                       int64_t pitch, int64_t width, int64_t first, int64_t count) {
    const int64_t end = first + count;
    for (int64_t j = first; j < end;) {
        const Runs runs = runs_at(to.deal, j, end);
        const bool single = runs.length == 1 && runs.runs > 1;  // rows equally far apart
        AscendC::DataCopyExtParams p;
        p.blockCount = single ? runs.runs : runs.length;
        p.blockLen = width * sizeof(T);
        p.srcStride = 0;
        p.dstStride = ((single ? runs.apart : 1) * to.stride - width) * sizeof(T);
        for (int64_t run = 0; run < (single ? 1 : runs.runs); ++run) {
            const int64_t token = runs.token + run * runs.apart;
            const int64_t row = j - first + run * runs.length;
            AscendC::DataCopyPad(to.base[token * to.stride], from[row * pitch], p);
        }
        j += runs.runs * runs.length;
    }
}

}  // namespace skiparse
