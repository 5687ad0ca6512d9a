// Skiparse attention backward for Atlas A2 (dav-2201). Has never run on an NPU.
//
// The rows of one head of a sub-sequence, video and then text, are queries and keys. A step is a
// block of 256 of either. The cube core computes scores = q k^T and the gradients of the weights,
// dout v^T, one step ahead; each vector core turns those of its 128 queries into weights and
// gradients of the scores; from these the cube core computes what the step adds to the gradients of
// q, k and v. They exchange all of it through the workspace of the core.
//
// One core owns a whole sequence and adds in program order, so the sums do not depend on how the
// cores are timed, nor on how many there are. Of a long sequence the queries are taken in parts, so
// that the sums of their gradients stay in the L2; those of the keys are then kept from part to part,
// which moves them seldom. A block of 512 queries would need half the additions
// to the gradients of k and v, but its tiles do not fit in L1 beside two blocks of k and v.
#include "kernel_operator.h"

#include "products.h"
#include "rowwise.h"
#include "tiling_bwd.h"

namespace skiparse {

using namespace AscendC;

// Cross-core flags. The first two are set in every step; the third where a step completes a block
// of gradients. The way back needs none: whatever the cube core overwrites, the vector cores had
// read before they set a FACTORS_READY that it has waited for, and they overwrite what it read
// before a PRODUCTS_READY.
constexpr uint16_t PRODUCTS_READY = 0, FACTORS_READY = 1, GRADIENTS_READY = 2;

struct BackwardArguments {
    GM_ADDR q;
    GM_ADDR k;
    GM_ADDR v;
    GM_ADDR text_q;
    GM_ADDR text_k;
    GM_ADDR text_v;
    GM_ADDR grad_out;
    GM_ADDR grad_text_out;
    GM_ADDR bias;    // of skiparse_key_bias
    GM_ADDR values;  // of skiparse_row_values
    GM_ADDR grad_q;
    GM_ADDR grad_k;
    GM_ADDR grad_v;
    GM_ADDR text_parts;  // for skiparse_text_gradients
    GM_ADDR workspace;
    GM_ADDR key_sums;
};

// The workspace of this core: matrices of a step, and gradients.
struct StepRing {
    GM_ADDR base;
    GM_ADDR key_sums;
    int64_t queries;  // blocks of gradients of q

    __aicore__ __inline__ GlobalTensor<float> Scores(int64_t i) const {
        return At<float>(base + i % STEP_RING * STEP_BYTES, 0);
    }
    __aicore__ __inline__ GlobalTensor<float> WeightGradients(int64_t i) const {
        return At<float>(base + i % STEP_RING * STEP_BYTES + WIDE_BYTES, 0);
    }
    template <class T>
    __aicore__ __inline__ GlobalTensor<T> Weights(int64_t i) const {
        return At<T>(base + i % STEP_RING * STEP_BYTES + 2 * WIDE_BYTES, 0);
    }
    template <class T>
    __aicore__ __inline__ GlobalTensor<T> ScoreGradients(int64_t i) const {
        return At<T>(base + i % STEP_RING * STEP_BYTES + 2 * WIDE_BYTES + NARROW_BYTES, 0);
    }
    __aicore__ __inline__ GlobalTensor<float> KeyGradients(const Steps& at) const {
        return KeyBlock(at);
    }
    __aicore__ __inline__ GlobalTensor<float> ValueGradients(const Steps& at) const {
        return KeyBlock(at)[BLOCK_ROWS * 128];
    }
    __aicore__ __inline__ GlobalTensor<float> QueryGradients(const Steps& at) const {
        const int64_t block = (at.query_count + at.query) % queries;
        return At<float>(base + STEP_RING * STEP_BYTES + block * ROWS_BYTES, 0);
    }

private:
    __aicore__ __inline__ GlobalTensor<float> KeyBlock(const Steps& at) const {
        if (at.parts() > 1) return At<float>(key_sums + 2 * at.key * ROWS_BYTES, 0);
        const int64_t block = at.key_count % STEP_RING;
        return At<float>(base + block * STEP_BYTES + 2 * WIDE_BYTES + 2 * NARROW_BYTES, 0);
    }
};

// The rows of a sequence, by tensor.
template <class T>
struct Sources {
    JointRows<T> q, k, v, grad_out;
};

template <class T>
class BackwardCube {
public:
    __aicore__ __inline__ BackwardCube(const BackwardTiling& tiling,
                                       const BackwardArguments& arguments, StepRing ring)
        : b_(tiling), t_(tiling.forward), a_(arguments), ring_(ring), dim_(t_.head_dim) {
        LocalMemAllocator<Hardware::L1> l1;
        key_ = l1.Alloc<TPosition::B1, T>(2 * BLOCK_ROWS * dim_);
        value_ = l1.Alloc<TPosition::B1, T>(2 * BLOCK_ROWS * dim_);
        rows_ = l1.Alloc<TPosition::A1, T>(2 * HALF_ROWS * dim_);
        weight_ = l1.Alloc<TPosition::A1, T>(2 * HALF_ROWS * BLOCK_ROWS);
        products_.Init();
    }

    __aicore__ __inline__ void Run(int64_t core, int64_t cores) {
        for (int32_t slot = 0; slot < 2; ++slot) {
            SetFlag<HardEvent::MTE1_MTE2>(KEYS + slot);
            SetFlag<HardEvent::MTE1_MTE2>(ROWS + slot);
            SetFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slot);
        }
        products_.Open();
        Steps scores(b_, core, cores), gradients(b_, core, cores);
        for (int64_t i = 0; !gradients.done; ++i) {
            if (!scores.done) {
                Scores(scores, i);
                scores.step();
            }
            if (i > 0) {
                Gradients(gradients, i - 1);
                gradients.step();
            }
        }
        for (int32_t slot = 0; slot < 2; ++slot) {
            WaitFlag<HardEvent::MTE1_MTE2>(KEYS + slot);
            WaitFlag<HardEvent::MTE1_MTE2>(ROWS + slot);
            WaitFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slot);
        }
        products_.Close();
    }

private:
    static constexpr int32_t KEYS = 0, ROWS = 2, WEIGHTS = 4;  // flags of two slots each in L1

    // scores = q k^T, weight gradients = dout v^T
    __aicore__ __inline__ void Scores(const Steps& at, int64_t i) {
        const int64_t slot = at.key_count % 2 * BLOCK_ROWS * dim_;
        if (at.begins()) of_scores_ = SourcesOf(at.sequence);
        if (at.first_of_part()) LoadKeys(at);
        for (int64_t half = 0; half < at.query_halves(); ++half) {
            const int64_t first = half * HALF_ROWS * BLOCK_ROWS;
            TimesKeys(at, half, of_scores_.q, key_[slot], ring_.Scores(i)[first]);
            TimesKeys(at, half, of_scores_.grad_out, value_[slot],
                      ring_.WeightGradients(i)[first]);
        }
        CrossCoreSetFlag<2, PIPE_FIX>(PRODUCTS_READY);
    }

    // Both the keys and the values of the block.
    __aicore__ __inline__ void LoadKeys(const Steps& at) {
        const int32_t slot = at.key_count % 2;
        WaitFlag<HardEvent::MTE1_MTE2>(KEYS + slot);
        for (int64_t tile = 0; tile < at.key_tiles(); ++tile) {
            const int64_t to = slot * BLOCK_ROWS * dim_ + tile * KEY_ROWS * dim_;
            const int64_t first = at.key * BLOCK_ROWS + tile * KEY_ROWS;
            const int64_t count = at.rows_of_half(at.key, tile);
            GatherTile(key_[to], KEY_ROWS, of_scores_.k, first, count, dim_);
            GatherTile(value_[to], KEY_ROWS, of_scores_.v, first, count, dim_);
        }
        SetFlag<HardEvent::MTE2_MTE1>(KEYS + slot);
        WaitFlag<HardEvent::MTE2_MTE1>(KEYS + slot);
    }

    // to[rows of the half, keys] = x keys^T
    __aicore__ __inline__ void TimesKeys(const Steps& at, int64_t half, const JointRows<T>& x,
                                         const LocalTensor<T>& keys,
                                         const GlobalTensor<float>& to) {
        const int64_t rows = PaddedRows(at, half);
        const int32_t slot = LoadRows(at, half, x);
        products_.LoadLeft(rows_[slot * HALF_ROWS * dim_], rows, 0, rows, 0, dim_);
        SetFlag<HardEvent::MTE1_MTE2>(ROWS + slot);
        for (int32_t tile = 0; tile < at.key_tiles(); ++tile) {
            products_.LoadTransposedRight(keys[tile * KEY_ROWS * dim_], KEY_ROWS, dim_);
            products_.Multiply(tile, rows, KEY_ROWS, dim_, true);
            products_.GiveRight();
            products_.Write(to[tile * KEY_ROWS], tile, rows, KEY_ROWS, BLOCK_ROWS);
        }
        products_.GiveLeft();
    }

    // What the step adds to the gradients of v, k and q.
    __aicore__ __inline__ void Gradients(const Steps& at, int64_t i) {
        if (at.begins()) of_gradients_ = SourcesOf(at.sequence);
        CrossCoreWaitFlag(FACTORS_READY);
        for (int64_t half = 0; half < at.query_halves(); ++half) {
            const int32_t slot = LoadWeights(at, half, ring_.template Weights<T>(i));
            TransposedTimes(at, half, weight_[slot * HALF_ROWS * BLOCK_ROWS],
                            of_gradients_.grad_out, ring_.ValueGradients(at));
            SetFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slot);
        }
        int32_t slots[2] = {0, 0};
        for (int64_t half = 0; half < at.query_halves(); ++half) {
            slots[half] = LoadWeights(at, half, ring_.template ScoreGradients<T>(i));
            TransposedTimes(at, half, weight_[slots[half] * HALF_ROWS * BLOCK_ROWS],
                            of_gradients_.q, ring_.KeyGradients(at));
        }
        AddQueryGradients(at, slots);
        if (at.last_of_part()) SetFlag<HardEvent::MTE1_MTE2>(KEYS + at.key_count % 2);
        if (at.last_query() || at.last_key()) CrossCoreSetFlag<2, PIPE_FIX>(GRADIENTS_READY);
    }

    // to[keys, dim] += weights^T x, after the second half of the queries
    __aicore__ __inline__ void TransposedTimes(const Steps& at, int64_t half,
                                               const LocalTensor<T>& weights, const JointRows<T>& x,
                                               const GlobalTensor<float>& to) {
        const int64_t rows = PaddedRows(at, half);
        const bool last = half + 1 == at.query_halves();
        const int32_t slot = LoadRows(at, half, x);
        products_.LoadRight(rows_[slot * HALF_ROWS * dim_], rows, dim_);
        SetFlag<HardEvent::MTE1_MTE2>(ROWS + slot);
        for (int32_t tile = 0; tile < at.key_tiles(); ++tile) {
            products_.LoadTransposedLeft(weights, rows, tile * KEY_ROWS, KEY_ROWS);
            products_.Multiply(tile, KEY_ROWS, dim_, rows, half == 0);
            products_.GiveLeft();
            if (last) Accumulate(to[tile * KEY_ROWS * dim_], tile, KEY_ROWS, at.query == 0);
        }
        products_.GiveRight();
    }

    // Gradients of q += score gradients k; those of each half of the queries are in `slots`.
    __aicore__ __inline__ void AddQueryGradients(const Steps& at, const int32_t (&slots)[2]) {
        const LocalTensor<T> keys = key_[at.key_count % 2 * BLOCK_ROWS * dim_];
        const int64_t tiles = at.key_tiles();
        for (int64_t tile = 0; tile < tiles; ++tile) {
            products_.LoadRight(keys[tile * KEY_ROWS * dim_], KEY_ROWS, dim_);
            for (int32_t half = 0; half < at.query_halves(); ++half) {
                const int64_t rows = PaddedRows(at, half);
                products_.LoadLeft(weight_[slots[half] * HALF_ROWS * BLOCK_ROWS], rows, 0, rows,
                                   tile * KEY_ROWS, KEY_ROWS);
                products_.Multiply(half, rows, dim_, KEY_ROWS, tile == 0);
                products_.GiveLeft();
                if (tile + 1 == tiles) {
                    SetFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slots[half]);
                    Accumulate(ring_.QueryGradients(at)[half * HALF_ROWS * dim_], half, rows,
                               at.key == 0);
                }
            }
            products_.GiveRight();
        }
    }

    // to[rows, dim] += L0C[slot], or = if this is the first. Sums of one place come from one slot,
    // whose next product waits until the last is copied; so they are made in order.
    __aicore__ __inline__ void Accumulate(const GlobalTensor<float>& to, int32_t slot, int64_t rows,
                                          bool first) {
        if (!first) SetAtomicAdd<float>();
        products_.Write(to, slot, rows, dim_, dim_);
        SetAtomicNone();
    }

    // Whole fractals: further rows are copies of the last, with weights of 0.
    __aicore__ __inline__ int64_t PaddedRows(const Steps& at, int64_t half) const {
        return RoundUp(at.rows_of_half(at.query, half), 16);
    }

    __aicore__ __inline__ int32_t LoadRows(const Steps& at, int64_t half,
                                           const JointRows<T>& from) {
        const int32_t slot = rows_count_++ % 2;
        WaitFlag<HardEvent::MTE1_MTE2>(ROWS + slot);
        GatherTile(rows_[slot * HALF_ROWS * dim_], PaddedRows(at, half), from,
                   at.query * BLOCK_ROWS + half * HALF_ROWS, at.rows_of_half(at.query, half), dim_);
        SetFlag<HardEvent::MTE2_MTE1>(ROWS + slot);
        WaitFlag<HardEvent::MTE2_MTE1>(ROWS + slot);
        return slot;
    }

    // They are there as soon as the rows that are loaded next are.
    __aicore__ __inline__ int32_t LoadWeights(const Steps& at, int64_t half,
                                              const GlobalTensor<T>& from) {
        const int32_t slot = weights_count_++ % 2;
        const int64_t rows = PaddedRows(at, half);
        WaitFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slot);
        CopyRows(weight_[slot * HALF_ROWS * BLOCK_ROWS], rows, from[half * HALF_ROWS * BLOCK_ROWS],
                 rows, BLOCK_ROWS, at.key_tiles() * KEY_ROWS);
        return slot;
    }

    __aicore__ __inline__ Sources<T> SourcesOf(const Sequence& sequence) const {
        return {Joint<T>(a_.q, t_.q, a_.text_q, t_.text_q, t_, sequence),
                Joint<T>(a_.k, t_.k, a_.text_k, t_.text_k, t_, sequence),
                Joint<T>(a_.v, t_.v, a_.text_v, t_.text_v, t_, sequence),
                Joint<T>(a_.grad_out, b_.grad_out, a_.grad_text_out, b_.grad_text_out, t_,
                         sequence, b_.grad_text_sub)};
    }

    const BackwardTiling& b_;
    const Tiling& t_;
    const BackwardArguments& a_;
    StepRing ring_;
    int64_t dim_;
    int64_t rows_count_ = 0, weights_count_ = 0;  // slots filled so far
    Sources<T> of_scores_{}, of_gradients_{};     // of the sequences of the two
    // Two slots each in L1.
    LocalTensor<T> key_, value_;  // of a block, in tiles of KEY_ROWS
    LocalTensor<T> rows_;         // q or dout of half a block
    LocalTensor<T> weight_;       // weights or gradients of scores of half a block
    Products<T> products_;
};

template <class T>
class BackwardVector {
public:
    __aicore__ __inline__ BackwardVector(const BackwardTiling& tiling,
                                         const BackwardArguments& arguments, StepRing ring)
        : b_(tiling), t_(tiling.forward), a_(arguments), ring_(ring), dim_(t_.head_dim),
          half_(GetSubBlockIdx()) {
        LocalMemAllocator<Hardware::UB> ub;
        wide_ = ub.Alloc<TPosition::VECCALC, float>(2 * 2 * CHUNK);
        weights_ = ub.Alloc<TPosition::VECCALC, T>(CHUNK);
        gradients_ = ub.Alloc<TPosition::VECCALC, T>(CHUNK);
        bias_ = ub.Alloc<TPosition::VECCALC, float>(2 * BLOCK_ROWS);
        values_ = ub.Alloc<TPosition::VECCALC, float>(2 * 2 * HALF_ROWS);
        lse_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * BLOCK);
        delta_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * BLOCK);
    }

    __aicore__ __inline__ void Run(int64_t core, int64_t cores) {
        for (int32_t slot = 0; slot < 2; ++slot) {
            SetFlag<HardEvent::V_MTE2>(WIDE + slot);
            SetFlag<HardEvent::V_MTE2>(VALUES + slot);
        }
        SetFlag<HardEvent::MTE3_V>(WEIGHTS);
        SetFlag<HardEvent::MTE3_V>(GRADIENTS);
        Steps weights(b_, core, cores), gradients(b_, core, cores);
        for (int64_t i = 0; !gradients.done; ++i) {
            if (!weights.done) {
                Weights(weights, i);
                weights.step();
            }
            if (i > 0) {
                WriteGradients(gradients);
                gradients.step();
            }
        }
        for (int32_t slot = 0; slot < 2; ++slot) {
            WaitFlag<HardEvent::V_MTE2>(WIDE + slot);
            WaitFlag<HardEvent::V_MTE2>(VALUES + slot);
        }
        WaitFlag<HardEvent::MTE3_V>(WEIGHTS);
        WaitFlag<HardEvent::MTE3_V>(GRADIENTS);
    }

private:
    static constexpr int64_t CHUNK_ROWS = 32, CHUNK = CHUNK_ROWS * BLOCK_ROWS;
    static constexpr int32_t WIDE = 0, VALUES = 2;                 // flags of two slots each
    static constexpr int32_t WEIGHTS = 0, GRADIENTS = 1, TEXT = 2;  // flags of one

    // weights = exp(scores * scale + bias - lse), score gradients = weights * (their own - delta)
    __aicore__ __inline__ void Weights(const Steps& at, int64_t i) {
        const int64_t rows = RoundUp(at.rows_of_half(at.query, half_), 16);
        const int32_t slot = i % 2;
        if (rows > 0) LoadValues(at, slot);
        CrossCoreWaitFlag(PRODUCTS_READY);
        if (rows > 0) {
            const LocalTensor<float> values = values_[slot * 2 * HALF_ROWS];
            Spread(lse_, values, HALF_ROWS);
            Spread(delta_, values[HALF_ROWS], HALF_ROWS);
            for (int64_t row = 0; row < rows; row += CHUNK_ROWS) {
                WeightsOfChunk(at, i, row, least(rows - row, CHUNK_ROWS));
            }
            SetFlag<HardEvent::V_MTE2>(VALUES + slot);
        }
        CrossCoreSetFlag<2, PIPE_MTE3>(FACTORS_READY);
    }

    // What the rows and the keys of the step are known by.
    __aicore__ __inline__ void LoadValues(const Steps& at, int32_t slot) {
        const LocalTensor<float> values = values_[slot * 2 * HALF_ROWS];
        const int64_t first = index_of(t_, at.sequence) * row_values(t_) + at.query * BLOCK_ROWS +
                              half_ * HALF_ROWS;
        const int64_t bias =
            (at.sequence.batch * t_.sparsity + at.sequence.sub) * most_stacks(t_) * STACK_KEYS;
        WaitFlag<HardEvent::V_MTE2>(VALUES + slot);
        DataCopy(values, At<float>(a_.values, first), HALF_ROWS);
        DataCopy(values[HALF_ROWS], At<float>(a_.values, first + row_values(t_) / 2), HALF_ROWS);
        if (at.hides_keys()) {
            DataCopy(bias_[slot * BLOCK_ROWS], At<float>(a_.bias, bias + at.key * BLOCK_ROWS),
                     BLOCK_ROWS);
        }
        SetFlag<HardEvent::MTE2_V>(VALUES + slot);
        WaitFlag<HardEvent::MTE2_V>(VALUES + slot);
    }

    __aicore__ __inline__ void WeightsOfChunk(const Steps& at, int64_t i, int64_t row,
                                              int64_t rows) {
        const int32_t slot = chunk_count_++ % 2;
        const int64_t width = at.key_tiles() * KEY_ROWS, skipped = BLOCK_ROWS - width;
        const int64_t first = (half_ * HALF_ROWS + row) * BLOCK_ROWS;
        const LocalTensor<float> weights = wide_[slot * 2 * CHUNK], gradients = weights[CHUNK];

        DataCopyParams in;
        in.blockCount = rows;
        in.blockLen = width / BLOCK;
        in.srcStride = skipped / BLOCK;
        WaitFlag<HardEvent::V_MTE2>(WIDE + slot);
        DataCopy(weights, ring_.Scores(i)[first], in);
        DataCopy(gradients, ring_.WeightGradients(i)[first], in);
        SetFlag<HardEvent::MTE2_V>(WIDE + slot);
        WaitFlag<HardEvent::MTE2_V>(WIDE + slot);

        Muls(weights, weights, t_.scale, rows * width);
        PipeBarrier<PIPE_V>();
        if (at.hides_keys()) AddToRows(weights, bias_[i % 2 * BLOCK_ROWS], rows, width);
        SubtractFromRows(weights, lse_[row * BLOCK], rows, width);
        Exp(weights, weights, rows * width);
        SubtractFromRows(gradients, delta_[row * BLOCK], rows, width);
        Store(ring_.template Weights<T>(i)[first], weights_, WEIGHTS, weights, rows, width);
        Mul(gradients, gradients, weights, rows * width);
        PipeBarrier<PIPE_V>();
        Store(ring_.template ScoreGradients<T>(i)[first], gradients_, GRADIENTS, gradients, rows,
              width);
        SetFlag<HardEvent::V_MTE2>(WIDE + slot);
    }

    // to[rows, width] = from, rounded, through a buffer with a flag of its own
    __aicore__ __inline__ void Store(const GlobalTensor<T>& to, const LocalTensor<T>& rounded,
                                     int32_t flag, const LocalTensor<float>& from, int64_t rows,
                                     int64_t width) {
        DataCopyParams out;
        out.blockCount = rows;
        out.blockLen = width / (2 * BLOCK);
        out.dstStride = (BLOCK_ROWS - width) / (2 * BLOCK);
        WaitFlag<HardEvent::MTE3_V>(flag);
        Cast(rounded, from, RoundMode::CAST_RINT, rows * width);
        SetFlag<HardEvent::V_MTE3>(flag);
        WaitFlag<HardEvent::V_MTE3>(flag);
        DataCopy(to, rounded, out);
        SetFlag<HardEvent::MTE3_V>(flag);
    }

    // The blocks of gradients that are complete after the step, to where they belong.
    __aicore__ __inline__ void WriteGradients(const Steps& at) {
        if (!at.last_query() && !at.last_key()) return;
        CrossCoreWaitFlag(GRADIENTS_READY);
        if (at.last_query()) {
            WriteBlock(at, at.key, ring_.KeyGradients(at), a_.grad_k, 1, t_.scale);
            WriteBlock(at, at.key, ring_.ValueGradients(at), a_.grad_v, 2, 1.0f);
        }
        if (at.last_key()) {
            WriteBlock(at, at.query, ring_.QueryGradients(at), a_.grad_q, 0, t_.scale);
        }
    }

    // This half of a block, times `factor`: video rows to their tokens, rounded, and text rows to
    // the parts of tensor 0, 1 or 2.
    __aicore__ __inline__ void WriteBlock(const Steps& at, int64_t block,
                                          const GlobalTensor<float>& from, GM_ADDR video,
                                          int64_t tensor, float factor) {
        const int64_t rows = at.rows_of_half(block, half_), most = CHUNK / dim_;
        for (int64_t row = 0; row < rows; row += most) {
            const int64_t count = least(rows - row, most), in_block = half_ * HALF_ROWS + row;
            const int64_t first = block * BLOCK_ROWS + in_block;
            const int64_t video_count = VideoCount(at.length, first, count);
            const int32_t slot = chunk_count_++ % 2;
            const LocalTensor<float> in = wide_[slot * 2 * CHUNK], scaled = in[CHUNK];
            WaitFlag<HardEvent::V_MTE2>(WIDE + slot);
            DataCopy(in, from[in_block * dim_], count * dim_);
            SetFlag<HardEvent::MTE2_V>(WIDE + slot);
            WaitFlag<HardEvent::MTE2_V>(WIDE + slot);
            Muls(scaled, in, factor, count * dim_);
            PipeBarrier<PIPE_V>();
            if (video_count > 0) WriteVideo(at, video, scaled, first, video_count);
            if (count > video_count) {
                WriteText(at, tensor, scaled[video_count * dim_], first + video_count - at.length,
                          count - video_count);
            }
            SetFlag<HardEvent::V_MTE2>(WIDE + slot);
        }
    }

    __aicore__ __inline__ void WriteVideo(const Steps& at, GM_ADDR to, const LocalTensor<float>& from,
                                          int64_t first, int64_t count) {
        const Strides strides{t_.tokens * t_.heads * dim_, t_.heads * dim_, dim_};
        WaitFlag<HardEvent::MTE3_V>(WEIGHTS);
        Cast(weights_, from, RoundMode::CAST_RINT, count * dim_);
        SetFlag<HardEvent::V_MTE3>(WEIGHTS);
        WaitFlag<HardEvent::V_MTE3>(WEIGHTS);
        ScatterRows(VideoRows<T>(to, strides, t_, at.sequence), weights_, dim_, dim_, first, count);
        SetFlag<HardEvent::MTE3_V>(WEIGHTS);
    }

    __aicore__ __inline__ void WriteText(const Steps& at, int64_t tensor,
                                         const LocalTensor<float>& from, int64_t first,
                                         int64_t count) {
        const int64_t part = tensor * sequences(t_) + index_of(t_, at.sequence);
        SetFlag<HardEvent::V_MTE3>(TEXT);
        WaitFlag<HardEvent::V_MTE3>(TEXT);
        DataCopy(At<float>(a_.text_parts, (part * t_.text + first) * dim_), from, count * dim_);
        SetFlag<HardEvent::MTE3_V>(TEXT);  // the buffer is not for the next copy before
        WaitFlag<HardEvent::MTE3_V>(TEXT);
    }

    const BackwardTiling& b_;
    const Tiling& t_;
    const BackwardArguments& a_;
    StepRing ring_;
    int64_t dim_;
    int64_t half_;
    int64_t chunk_count_ = 0;          // slots of `wide_` filled so far
    LocalTensor<float> wide_;          // [2][2][CHUNK_ROWS, BLOCK_ROWS]: scores, weight gradients
    LocalTensor<T> weights_, gradients_;  // [CHUNK_ROWS, BLOCK_ROWS] rounded
    LocalTensor<float> bias_;          // [2][BLOCK_ROWS]
    LocalTensor<float> values_;        // [2][2][HALF_ROWS]: log-sum-exps, deltas
    LocalTensor<float> lse_, delta_;   // [HALF_ROWS, BLOCK], a value of each row
};

template <class T>
__aicore__ __inline__ void Backward(const BackwardArguments& arguments,
                                    const BackwardTiling& tiling) {
    InitSocState();
    const int64_t cores = GetBlockNum(), core = GetBlockIdx() / GetTaskRation();
    const StepRing ring{arguments.workspace + core * backward_workspace_bytes(tiling),
                        arguments.key_sums + core * key_sums_bytes(tiling), query_ring(tiling)};
    if ASCEND_IS_AIC {
        BackwardCube<T>(tiling, arguments, ring).Run(core, cores);
    }
    if ASCEND_IS_AIV {
        BackwardVector<T>(tiling, arguments, ring).Run(core, cores);
    }
    PipeBarrier<PIPE_ALL>();
}

}  // namespace skiparse

extern "C" __global__ __mix__(1, 2) void skiparse_attention_bwd_fp16(
    GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR text_q, GM_ADDR text_k, GM_ADDR text_v,
    GM_ADDR grad_out, GM_ADDR grad_text_out, GM_ADDR bias, GM_ADDR values, GM_ADDR grad_q,
    GM_ADDR grad_k, GM_ADDR grad_v, GM_ADDR text_parts, GM_ADDR workspace, GM_ADDR key_sums,
    skiparse::BackwardTiling tiling) {
    skiparse::Backward<half>({q, k, v, text_q, text_k, text_v, grad_out, grad_text_out, bias,
                              values, grad_q, grad_k, grad_v, text_parts, workspace, key_sums},
                             tiling);
}

extern "C" __global__ __mix__(1, 2) void skiparse_attention_bwd_bf16(
    GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR text_q, GM_ADDR text_k, GM_ADDR text_v,
    GM_ADDR grad_out, GM_ADDR grad_text_out, GM_ADDR bias, GM_ADDR values, GM_ADDR grad_q,
    GM_ADDR grad_k, GM_ADDR grad_v, GM_ADDR text_parts, GM_ADDR workspace, GM_ADDR key_sums,
    skiparse::BackwardTiling tiling) {
    skiparse::Backward<bfloat16_t>({q, k, v, text_q, text_k, text_v, grad_out, grad_text_out, bias,
                                    values, grad_q, grad_k, grad_v, text_parts, workspace,
                                    key_sums},
                                   tiling);
}
