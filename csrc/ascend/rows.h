// Rows of a sub-sequence, moved between global memory and the chip by the DMA itself.
#pragma once

#include "tiling.h"

namespace skiparse {

constexpr int64_t C0 = 16;              // 16-bit elements of a block of 32 bytes
constexpr int64_t FRACTAL_ROWS = 16;    // of C0 elements each
constexpr int64_t MOST_STRIDE = 65535;  // of an ND2NZ copy, in elements
constexpr int64_t MOST_GAP = 0xffffffff;  // of a copy to UB, in bytes

// One head of the tokens of one sub-sequence: of `n` in runs of `w`, the s-th. Text is n = w = 1.
template <class T>
struct Rows {
    AscendC::GlobalTensor<T> base;
    int64_t stride;  // from token to token, elements
    int64_t s, n, w;
};

template <class T>
__aicore__ inline AscendC::GlobalTensor<T> At(GM_ADDR address, int64_t elements) {
    AscendC::GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(address) + elements);
    return tensor;
}

// A buffer of its own in the memory of that position.
template <AscendC::TPosition POSITION, class T>
__aicore__ inline AscendC::LocalTensor<T> Cut(AscendC::TPipe& pipe, int64_t elements) {
    AscendC::TBuf<POSITION> buffer;
    pipe.InitBuffer(buffer, elements * sizeof(T));
    return buffer.template Get<T>();
}

template <class T>
__aicore__ inline Rows<T> VideoRows(GM_ADDR address, const Strides& strides, const Tiling& tiling,
                                    const Sequence& sequence) {
    const int64_t first = sequence.batch * strides.batch + sequence.head * strides.head;
    return {At<T>(address, first), strides.token, sequence.sub, tiling.sparsity, tiling.run};
}

template <class T>
__aicore__ inline Rows<T> TextRows(GM_ADDR address, const Strides& strides,
                                   const Sequence& sequence) {
    const int64_t first = sequence.batch * strides.batch + sequence.head * strides.head;
    return {At<T>(address, first), strides.token, 0, 1, 1};
}

// All rows of a sub-sequence: `length` of video, then text.
template <class T>
struct JointRows {
    Rows<T> video, text;
    int64_t length;
};

// Of both sources of a tensor; `text_sub` is from sub-sequence to sub-sequence of its text, where
// each has its own.
template <class T>
__aicore__ inline JointRows<T> Joint(GM_ADDR video, const Strides& video_strides, GM_ADDR text,
                                     const Strides& text_strides, const Tiling& tiling,
                                     const Sequence& sequence, int64_t text_sub = 0) {
    Rows<T> of_text = TextRows<T>(text, text_strides, sequence);
    of_text.base = of_text.base[sequence.sub * text_sub];
    return {VideoRows<T>(video, video_strides, tiling, sequence), of_text,
            length_of(tiling, sequence.sub)};
}

// How many of `count` positions from `first` on are video.
__aicore__ inline int64_t VideoCount(int64_t length, int64_t first, int64_t count) {
    const int64_t of_video = least(count, length - first);
    return of_video < 0 ? 0 : of_video;
}

__aicore__ inline bool FitsStride(int64_t stride) { return stride >= 1 && stride <= MOST_STRIDE; }

// L1 in columns of blocks, `pitch` rows each: rows equally far apart, in one instruction if their
// distance fits its 16 bits.
template <class T>
__aicore__ inline void CopyRows(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                const AscendC::GlobalTensor<T>& from, int64_t rows, int64_t stride,
                                int64_t dim) {
    AscendC::Nd2NzParams p;
    p.ndNum = 1;
    p.dValue = dim;
    p.srcNdMatrixStride = 0;
    p.dstNzC0Stride = pitch;
    p.dstNzNStride = 1;
    p.dstNzMatrixStride = 0;
    if (FitsStride(stride)) {
        p.nValue = rows;
        p.srcDValue = stride;
        AscendC::DataCopy(to, from, p);
        return;
    }
    p.nValue = 1;
    p.srcDValue = 1;
    for (int64_t row = 0; row < rows; ++row) {
        AscendC::DataCopy(to[row * C0], from[row * stride], p);
    }
}

// Runs of consecutive tokens: one instruction on two levels if both distances fit, else one a run.
template <class T>
__aicore__ inline void CopyRuns(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                const Rows<T>& from, const Runs& runs, int64_t dim) {
    const AscendC::GlobalTensor<T> first = from.base[runs.token * from.stride];
    const int64_t apart = runs.apart * from.stride;
    if (runs.length == 1) {
        CopyRows(to, pitch, first, runs.runs, apart, dim);
        return;
    }
    if (FitsStride(apart) && FitsStride(from.stride)) {
        AscendC::Nd2NzParams p;
        p.ndNum = runs.runs;
        p.nValue = runs.length;
        p.dValue = dim;
        p.srcNdMatrixStride = apart;
        p.srcDValue = from.stride;
        p.dstNzC0Stride = pitch;
        p.dstNzNStride = 1;
        p.dstNzMatrixStride = runs.length * C0;
        AscendC::DataCopy(to, first, p);
        return;
    }
    for (int64_t run = 0; run < runs.runs; ++run) {
        CopyRows(to[run * runs.length * C0], pitch, first[run * apart], runs.length, from.stride,
                 dim);
    }
}

// Positions [first, first + count) of a sub-sequence into L1.
template <class T>
__aicore__ inline void GatherRows(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                  const Rows<T>& from, int64_t first, int64_t count, int64_t dim) {
    const int64_t end = first + count;
    for (int64_t j = first; j < end;) {
        const Runs runs = runs_at(from.s, j, end, from.n, from.w);
        CopyRuns(to[(j - first) * C0], pitch, from, runs, dim);
        j += runs.runs * runs.length;
    }
}

// `count` copies of one row, so that what the cube reads beyond the last row is finite.
template <class T>
__aicore__ inline void FillRows(const AscendC::LocalTensor<T>& to, int64_t pitch,
                                const AscendC::GlobalTensor<T>& row, int64_t count, int64_t dim) {
    if (count == 0) return;
    AscendC::Nd2NzParams p;
    p.ndNum = count;
    p.nValue = 1;
    p.dValue = dim;
    p.srcNdMatrixStride = 0;
    p.srcDValue = 1;
    p.dstNzC0Stride = pitch;
    p.dstNzNStride = 1;
    p.dstNzMatrixStride = C0;
    AscendC::DataCopy(to, row, p);
}

template <class T>
__aicore__ inline AscendC::GlobalTensor<T> RowAt(const Rows<T>& rows, int64_t j) {
    return rows.base[token_of(rows.s, j, rows.n, rows.w) * rows.stride];
}

// `count` positions from `first` on, then copies of the last up to `rows`, the pitch as well.
template <class T>
__aicore__ inline void GatherTile(const AscendC::LocalTensor<T>& to, int64_t rows,
                                  const JointRows<T>& from, int64_t first, int64_t count,
                                  int64_t dim) {
    const int64_t video_count = VideoCount(from.length, first, count);
    const int64_t text_first = first + video_count - from.length;
    const int64_t text_count = count - video_count;
    if (video_count > 0) GatherRows(to, rows, from.video, first, video_count, dim);
    if (text_count > 0) {
        GatherRows(to[video_count * C0], rows, from.text, text_first, text_count, dim);
    }
    const AscendC::GlobalTensor<T> last = text_count > 0
                                              ? RowAt(from.text, text_first + text_count - 1)
                                              : RowAt(from.video, first + video_count - 1);
    FillRows(to[count * C0], rows, last, rows - count, dim);
}

// Positions [first, first + count) of a sub-sequence into UB, every row from a block of its own on.
template <class T>
__aicore__ inline void CollectRows(const AscendC::LocalTensor<T>& to, const Rows<T>& from,
                                   int64_t width, int64_t first, int64_t count) {
    const int64_t pitch = ceil_div(width * sizeof(T), 32) * 32 / sizeof(T);
    const int64_t end = first + count;
    AscendC::DataCopyExtParams p;
    p.blockLen = width * sizeof(T);
    for (int64_t j = first; j < end;) {
        const Runs runs = runs_at(from.s, j, end, from.n, from.w);
        const bool single = runs.length == 1;  // then all runs are rows equally far apart
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
__aicore__ inline void CollectRows(const AscendC::LocalTensor<T>& to, const JointRows<T>& from,
                                   int64_t width, int64_t first, int64_t count) {
    const int64_t pitch = ceil_div(width * sizeof(T), 32) * 32 / sizeof(T);
    const int64_t video_count = VideoCount(from.length, first, count);
    if (video_count > 0) CollectRows(to, from.video, width, first, video_count);
    if (count > video_count) {
        CollectRows(to[video_count * pitch], from.text, width, first + video_count - from.length,
                    count - video_count);
    }
}

// Rows of `width` elements in UB, `pitch` apart, to their tokens in global memory.
template <class T>
__aicore__ inline void ScatterRows(const Rows<T>& to, const AscendC::LocalTensor<T>& from,
                                   int64_t pitch, int64_t width, int64_t first, int64_t count) {
    const int64_t end = first + count;
    for (int64_t j = first; j < end;) {
        const Runs runs = runs_at(to.s, j, end, to.n, to.w);
        const bool single = runs.length == 1;  // then all runs are rows equally far apart
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

template <class TILING>
__aicore__ inline void ReadTiling(TILING& tiling, GM_ADDR address) {
    auto* to = reinterpret_cast<uint64_t*>(&tiling);
    auto* from = reinterpret_cast<__gm__ uint64_t*>(address);
    for (uint32_t i = 0; i < sizeof(TILING) / sizeof(uint64_t); ++i) to[i] = from[i];
}

}  // namespace skiparse
