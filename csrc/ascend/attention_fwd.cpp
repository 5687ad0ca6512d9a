// Skiparse attention forward for Atlas A2 (dav-2201). Has never run on an NPU.
//
// A task is 256 queries of one head and sub-sequence, and all its keys in stacks of 1,024. The cube
// core computes scores = q k^T two stacks ahead of values = weights v; between the two, each vector
// core turns the scores of its 128 queries into weights, and adds up the values of the stack before
// the last. They exchange these through a ring of three stacks in the workspace of the core.
#include "kernel_operator.h"

#include "products.h"
#include "rowwise.h"

namespace skiparse {

using namespace AscendC;

// Cross-core flags, one for each exchange of a stack. The way back needs none: weights of stack i
// mean that its scores were read, and the next scores in that place wait for them; likewise values.
constexpr uint16_t SCORES_READY = 0, WEIGHTS_READY = 1, VALUES_READY = 2;

struct ForwardArguments {
    GM_ADDR q;
    GM_ADDR k;
    GM_ADDR v;
    GM_ADDR text_q;
    GM_ADDR text_k;
    GM_ADDR text_v;
    GM_ADDR bias;  // of skiparse_key_bias
    GM_ADDR out;
    GM_ADDR text_out;
    GM_ADDR lse;
    GM_ADDR text_lse;
    GM_ADDR workspace;
};

// Where stack `i` of this core lies in the workspace.
struct Ring {
    GM_ADDR base;

    // [STACK_TILES][QUERY_ROWS][KEY_ROWS]
    template <class S>
    __aicore__ __inline__ GlobalTensor<S> Scores(int64_t i) const {
        return At<S>(base + i % RING * SCORES_BYTES, 0);
    }
    // [STACK_TILES / 2][QUERY_ROWS][2 * KEY_ROWS]: the longer a row, the faster it is gathered
    template <class T>
    __aicore__ __inline__ GlobalTensor<T> Weights(int64_t i) const {
        return At<T>(base + RING * SCORES_BYTES + i % RING * WEIGHTS_BYTES, 0);
    }
    // [QUERY_ROWS][head_dim]
    __aicore__ __inline__ GlobalTensor<float> Values(int64_t i) const {
        return At<float>(base + RING * (SCORES_BYTES + WEIGHTS_BYTES) + i % RING * VALUES_BYTES, 0);
    }
};

// The rows of a task, in whole fractals: what lies between its last query and the end of that
// fractal is a copy of the query, and its results go nowhere.
__aicore__ __inline__ int64_t WholeRows(const Task& task) {
    return RoundUp(task.rows, FRACTAL_ROWS);
}

// Of `rows` rows, those that belong to half 0 or 1.
__aicore__ __inline__ int64_t OfHalf(int64_t rows, int64_t half) {
    const int64_t left = rows - half * HALF_ROWS;
    return left < 0 ? 0 : least(left, HALF_ROWS);
}

template <class T, class S>
class CubeSide {
public:
    __aicore__ __inline__ CubeSide(const Tiling& tiling, const ForwardArguments& arguments,
                                   Ring ring)
        : t_(tiling), a_(arguments), ring_(ring), dim_(tiling.head_dim) {
        LocalMemAllocator<Hardware::L1> l1;
        query_ = l1.Alloc<TPosition::A1, T>(2 * QUERY_ROWS * dim_);
        key_ = l1.Alloc<TPosition::B1, T>(2 * KEY_ROWS * dim_);
        value_ = l1.Alloc<TPosition::B1, T>(2 * PAIR_KEYS * dim_);
        weight_ = l1.Alloc<TPosition::A1, T>(2 * HALF_ROWS * PAIR_KEYS);
        products_.Init();
    }

    __aicore__ __inline__ void Run(int64_t core, int64_t cores) {
        for (int32_t slot = 0; slot < 2; ++slot) {
            SetFlag<HardEvent::MTE1_MTE2>(KEY + slot);
            SetFlag<HardEvent::MTE1_MTE2>(VALUE + slot);
            SetFlag<HardEvent::MTE1_MTE2>(WEIGHT + slot);
        }
        products_.Open();
        Walk scores(t_, core, cores), values(t_, core, cores);
        for (int64_t i = 0; !values.done; ++i) {
            if (!scores.done) {
                Scores(scores, i);
                scores.step();
            }
            if (i >= LOOKAHEAD) {
                Values(values, i - LOOKAHEAD);
                values.step();
            }
        }
        for (int32_t slot = 0; slot < 2; ++slot) {
            WaitFlag<HardEvent::MTE1_MTE2>(KEY + slot);
            WaitFlag<HardEvent::MTE1_MTE2>(VALUE + slot);
            WaitFlag<HardEvent::MTE1_MTE2>(WEIGHT + slot);
        }
        products_.Close();
    }

private:
    static constexpr int32_t KEY = 0, VALUE = 2, WEIGHT = 4;  // flags of two slots each in L1
    static constexpr int64_t PAIR_KEYS = 2 * KEY_ROWS;

    // scores[rows, KEY_ROWS * tiles] = q k^T
    __aicore__ __inline__ void Scores(const Walk& walk, int64_t i) {
        const Task& task = walk.task;
        const int64_t whole_rows = WholeRows(task);
        if (walk.stack == 0) keys_ = Joint<T>(a_.k, t_.k, a_.text_k, t_.text_k, t_, task);
        const LocalTensor<T> query = query_[walk.number % 2 * QUERY_ROWS * dim_];
        for (int64_t tile = 0; tile < walk.key_tiles(); ++tile) {
            const int32_t slot = key_count_++ % 2;
            const LocalTensor<T> key = key_[slot * KEY_ROWS * dim_];
            // Once the key tile before the last was used, so were the queries of the task before
            // the last, in whose place these come.
            WaitFlag<HardEvent::MTE1_MTE2>(KEY + slot);
            if (walk.stack == 0 && tile == 0) LoadQuery(task, query);
            GatherKeys(key, keys_, task, walk.stack * STACK_KEYS + tile * KEY_ROWS);
            SetFlag<HardEvent::MTE2_MTE1>(KEY + slot);
            WaitFlag<HardEvent::MTE2_MTE1>(KEY + slot);
            products_.LoadTransposedRight(key, KEY_ROWS, dim_);
            for (int32_t half = 0; OfHalf(whole_rows, half) > 0; ++half) {
                const int64_t rows = OfHalf(whole_rows, half);
                products_.LoadLeft(query, whole_rows, half * HALF_ROWS, rows, 0, dim_);
                products_.Multiply(half, rows, KEY_ROWS, dim_, true);
                products_.GiveLeft();
                const int64_t row = tile * QUERY_ROWS + half * HALF_ROWS;
                products_.Write(ring_.template Scores<S>(i)[row * KEY_ROWS], half, rows, KEY_ROWS,
                                KEY_ROWS);
            }
            SetFlag<HardEvent::MTE1_MTE2>(KEY + slot);
            products_.GiveRight();
        }
        CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);
    }

    // values[rows, dim] = weights v, added up over the stack, two tiles of keys at a time
    __aicore__ __inline__ void Values(const Walk& walk, int64_t i) {
        const Task& task = walk.task;
        const int64_t whole_rows = WholeRows(task), tiles = walk.key_tiles();
        if (walk.stack == 0) values_ = Joint<T>(a_.v, t_.v, a_.text_v, t_.text_v, t_, task);
        CrossCoreWaitFlag(WEIGHTS_READY);
        for (int64_t first = 0; first < tiles; first += 2) {
            const int64_t count = least(tiles - first, 2);
            const int32_t slot = value_count_++ % 2;
            const LocalTensor<T> value = value_[slot * PAIR_KEYS * dim_];
            WaitFlag<HardEvent::MTE1_MTE2>(VALUE + slot);
            for (int64_t tile = 0; tile < count; ++tile) {
                GatherKeys(value[tile * KEY_ROWS * dim_], values_, task,
                           walk.stack * STACK_KEYS + (first + tile) * KEY_ROWS);
            }
            SetFlag<HardEvent::MTE2_MTE1>(VALUE + slot);
            WaitFlag<HardEvent::MTE2_MTE1>(VALUE + slot);
            for (int32_t half = 0; OfHalf(whole_rows, half) > 0; ++half) {
                const int64_t rows = OfHalf(whole_rows, half);
                const int64_t row = first / 2 * QUERY_ROWS + half * HALF_ROWS;
                const int32_t weight_slot = weight_count_++ % 2;
                const LocalTensor<T> weight = weight_[weight_slot * HALF_ROWS * PAIR_KEYS];
                WaitFlag<HardEvent::MTE1_MTE2>(WEIGHT + weight_slot);
                CopyRows(weight, rows, ring_.template Weights<T>(i)[row * PAIR_KEYS], rows,
                         PAIR_KEYS, count * KEY_ROWS);
                SetFlag<HardEvent::MTE2_MTE1>(WEIGHT + weight_slot);
                WaitFlag<HardEvent::MTE2_MTE1>(WEIGHT + weight_slot);
                for (int64_t tile = 0; tile < count; ++tile) {
                    products_.LoadRight(value[tile * KEY_ROWS * dim_], KEY_ROWS, dim_);
                    products_.LoadLeft(weight, rows, 0, rows, tile * KEY_ROWS, KEY_ROWS);
                    products_.Multiply(half, rows, dim_, KEY_ROWS, first + tile == 0);
                    products_.GiveLeft();
                    products_.GiveRight();
                }
                SetFlag<HardEvent::MTE1_MTE2>(WEIGHT + weight_slot);
                if (first + count == tiles) {
                    products_.Write(ring_.Values(i)[half * HALF_ROWS * dim_], half, rows, dim_,
                                    dim_);
                }
            }
            SetFlag<HardEvent::MTE1_MTE2>(VALUE + slot);
        }
        CrossCoreSetFlag<2, PIPE_FIX>(VALUES_READY);
    }

    __aicore__ __inline__ void LoadQuery(const Task& task, const LocalTensor<T>& query) {
        const Rows<T> rows = task.text ? TextRows<T>(a_.text_q, t_.text_q, task)
                                       : VideoRows<T>(a_.q, t_.q, t_, task);
        const int64_t pitch = WholeRows(task);
        GatherRows(query, pitch, rows, task.first, task.rows, dim_);
        FillRows(query[task.rows * C0], pitch, RowAt(rows, task.first + task.rows - 1),
                 pitch - task.rows, dim_);
    }

    __aicore__ __inline__ void GatherKeys(const LocalTensor<T>& to, const JointRows<T>& from,
                                          const Task& task, int64_t first) {
        GatherTile(to, KEY_ROWS, from, first, least(KEY_ROWS, task.keys - first), dim_);
    }

    const Tiling& t_;
    const ForwardArguments& a_;
    Ring ring_;
    int64_t dim_;
    int64_t key_count_ = 0, value_count_ = 0, weight_count_ = 0;  // slots filled so far
    JointRows<T> keys_{}, values_{};  // of the task whose scores are made, and of that of values
    // Two slots each in L1: of a task, of a tile of keys, of two tiles, of two tiles and a half.
    LocalTensor<T> query_, key_, value_, weight_;
    Products<T> products_;
};

template <class T, class S>
class VectorSide {
public:
    __aicore__ __inline__ VectorSide(const Tiling& tiling, const ForwardArguments& arguments,
                                     Ring ring)
        : t_(tiling), a_(arguments), ring_(ring), dim_(tiling.head_dim), half_(GetSubBlockIdx()) {
        LocalMemAllocator<Hardware::UB> ub;
        scores_ = ub.Alloc<TPosition::VECCALC, S>(2 * CHUNK);
        if constexpr (HALF_SCORES) wide_scores_ = ub.Alloc<TPosition::VECCALC, float>(CHUNK);
        weights_ = ub.Alloc<TPosition::VECCALC, T>(2 * CHUNK);
        out_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * dim_);
        bias_ = ub.Alloc<TPosition::VECCALC, float>(2 * STACK_KEYS);
        wide_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * BLOCK);
        wide_lse_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * BLOCK);
        maximum_ = ub.Alloc<TPosition::VECCALC, float>(RING * HALF_ROWS);
        total_ = ub.Alloc<TPosition::VECCALC, float>(RING * HALF_ROWS);
        decay_ = ub.Alloc<TPosition::VECCALC, float>(RING * HALF_ROWS);
        next_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS);
        sum_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS);
        small_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS);
    }

    __aicore__ __inline__ void Run(int64_t core, int64_t cores) {
        for (int32_t slot = 0; slot < 2; ++slot) {
            SetFlag<HardEvent::V_MTE2>(SCORE + slot);
            SetFlag<HardEvent::V_MTE2>(BIAS + slot);
            SetFlag<HardEvent::MTE3_V>(WEIGHT + slot);
        }
        SetFlag<HardEvent::MTE3_V>(LSE);
        Duplicate(decay_, 0.0f, RING * HALF_ROWS);
        PipeBarrier<PIPE_V>();
        Walk weights(t_, core, cores), values(t_, core, cores);
        for (int64_t i = 0; !values.done; ++i) {
            if (!weights.done) {
                Weights(weights, i);
                weights.step();
            }
            if (i >= LOOKAHEAD) {
                AddValues(values, i - LOOKAHEAD);
                values.step();
            }
        }
        for (int32_t slot = 0; slot < 2; ++slot) {
            WaitFlag<HardEvent::V_MTE2>(SCORE + slot);
            WaitFlag<HardEvent::V_MTE2>(BIAS + slot);
            WaitFlag<HardEvent::MTE3_V>(WEIGHT + slot);
        }
        WaitFlag<HardEvent::MTE3_V>(LSE);
    }

private:
    static constexpr bool HALF_SCORES = sizeof(S) == sizeof(half);
    static constexpr int64_t CHUNK = 8192, CHUNK_ROWS = CHUNK / STACK_KEYS;  // of a stack
    static_assert(KEY_ROWS == PANEL, "a tile of keys is a panel of the scores");
    // Flags of two slots each, except the last.
    static constexpr int32_t SCORE = 0, BIAS = 2, WEIGHT = 0, LSE = 2;
    // A row that attends to nothing has total 0 and values 0; its output is 0 divided by this.
    static constexpr float LEAST_TOTAL = 1.0e-30f;

    // weights[rows, keys] = exp(scores * scale + bias - maximum), a chunk of rows at a time; then
    // decay = exp(old maximum - new maximum), total = total * decay + sums of the weights
    __aicore__ __inline__ void Weights(const Walk& walk, int64_t i) {
        const int64_t rows = OfHalf(WholeRows(walk.task), half_);
        const int32_t bias_slot = i % 2;
        const bool biased = rows > 0 && walk.hides_keys();
        const int64_t ring = walk.number % RING * HALF_ROWS;
        const LocalTensor<float> maximum = maximum_[ring], total = total_[ring];
        if (walk.stack == 0) {
            Duplicate(maximum, FLOOR, HALF_ROWS);
            Duplicate(total, 0.0f, HALF_ROWS);
            PipeBarrier<PIPE_V>();
        }
        if (biased) LoadBias(walk, bias_slot);
        CrossCoreWaitFlag(SCORES_READY);
        for (int64_t row = 0; row < rows; row += CHUNK_ROWS) {
            WeightsOfChunk(walk, i, row, biased);
        }
        if (biased) SetFlag<HardEvent::V_MTE2>(BIAS + bias_slot);
        CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);
        if (rows == 0) return;
        const LocalTensor<float> decay = decay_[i % RING * HALF_ROWS];
        Sub(decay, maximum, next_, rows);
        PipeBarrier<PIPE_V>();
        Exp(decay, decay, rows);
        Max(maximum, maximum, next_, rows);
        PipeBarrier<PIPE_V>();
        Mul(total, total, decay, rows);
        PipeBarrier<PIPE_V>();
        Add(total, total, sum_, rows);
        PipeBarrier<PIPE_V>();
    }

    __aicore__ __inline__ void LoadBias(const Walk& walk, int32_t slot) {
        const Task& task = walk.task;
        const int64_t row = (task.batch * t_.sparsity + task.sub) * most_stacks(t_) + walk.stack;
        WaitFlag<HardEvent::V_MTE2>(BIAS + slot);
        DataCopy(bias_[slot * STACK_KEYS], At<float>(a_.bias, row * STACK_KEYS),
                 STACK_KEYS);
        SetFlag<HardEvent::MTE2_V>(BIAS + slot);
        WaitFlag<HardEvent::MTE2_V>(BIAS + slot);
    }

    // The weights of CHUNK_ROWS rows, their sums, and in `next_` the maximum with these scores.
    __aicore__ __inline__ void WeightsOfChunk(const Walk& walk, int64_t i, int64_t row,
                                              bool biased) {
        const int32_t slot = chunk_count_++ % 2;
        const int64_t panels = walk.key_tiles(), size = panels * CHUNK_ROWS * PANEL;
        const int64_t first = half_ * HALF_ROWS + row;
        const LocalTensor<S> scores = scores_[slot * CHUNK];
        const LocalTensor<T> weights = weights_[slot * CHUNK];

        DataCopyParams in;
        in.blockCount = panels;
        in.blockLen = CHUNK_ROWS * PANEL * sizeof(S) / BLOCK_BYTES;
        in.srcStride = (QUERY_ROWS - CHUNK_ROWS) * PANEL * sizeof(S) / BLOCK_BYTES;
        WaitFlag<HardEvent::V_MTE2>(SCORE + slot);
        DataCopy(scores, ring_.template Scores<S>(i)[first * PANEL], in);
        SetFlag<HardEvent::MTE2_V>(SCORE + slot);
        WaitFlag<HardEvent::MTE2_V>(SCORE + slot);

        const LocalTensor<float> scratch = weights.template ReinterpretCast<float>();
        const LocalTensor<float> x = InFloat(scores, size);
        WaitFlag<HardEvent::MTE3_V>(WEIGHT + slot);
        if (HALF_SCORES && !biased) {
            ScaledMaxima(scores, weights.template ReinterpretCast<half>(), panels);
        } else if (HALF_SCORES) {
            PipeBarrier<PIPE_V>();
        }
        if constexpr (HALF_SCORES) SetFlag<HardEvent::V_MTE2>(SCORE + slot);
        Muls(x, x, t_.scale, size);
        PipeBarrier<PIPE_V>();
        if (biased) AddToPanels(x, bias_[i % 2 * STACK_KEYS], CHUNK_ROWS, panels);
        if (!HALF_SCORES || biased) {
            ReducePanels<Reduction::MAXIMUM>(small_, x, scratch, CHUNK_ROWS, panels);
        }
        const LocalTensor<float> maximum = maximum_[walk.number % RING * HALF_ROWS + row];
        Max(next_[row], maximum, small_, CHUNK_ROWS);
        PipeBarrier<PIPE_V>();
        Spread(wide_, next_[row], CHUNK_ROWS);
        SubtractFromPanels(x, wide_, CHUNK_ROWS, panels);
        Exp(x, x, size);
        PipeBarrier<PIPE_V>();
        ReducePanels<Reduction::SUM>(sum_[row], x, scratch, CHUNK_ROWS, panels);
        Cast(weights, x, RoundMode::CAST_RINT, size);
        if constexpr (!HALF_SCORES) SetFlag<HardEvent::V_MTE2>(SCORE + slot);
        SetFlag<HardEvent::V_MTE3>(WEIGHT + slot);
        WaitFlag<HardEvent::V_MTE3>(WEIGHT + slot);
        for (int64_t panel = 0; panel < panels; ++panel) {
            StoreWeights(i, first, panel, weights[panel * CHUNK_ROWS * PANEL]);
        }
        SetFlag<HardEvent::MTE3_V>(WEIGHT + slot);
    }

    __aicore__ __inline__ LocalTensor<float> InFloat(const LocalTensor<float>& scores,
                                                     int64_t) const {
        return scores;
    }
    __aicore__ __inline__ LocalTensor<float> InFloat(const LocalTensor<half>& scores,
                                                     int64_t size) const {
        PipeBarrier<PIPE_V>();  // the weights before were rounded from it
        Cast(wide_scores_, scores, RoundMode::CAST_NONE, size);
        return wide_scores_;
    }

    // small_ = maxima * scale, where no key is hidden; the scale is positive
    __aicore__ __inline__ void ScaledMaxima(const LocalTensor<half>& scores,
                                            const LocalTensor<half>& scratch,
                                            int64_t panels) const {
        const LocalTensor<half> maxima = small_[HALF_ROWS / 2].template ReinterpretCast<half>();
        MaximaOfPanels(maxima, scores, scratch, CHUNK_ROWS, panels);
        Cast(small_, maxima, RoundMode::CAST_NONE, CHUNK_ROWS);
        PipeBarrier<PIPE_V>();
        Muls(small_, small_, t_.scale, CHUNK_ROWS);
        PipeBarrier<PIPE_V>();
    }
    __aicore__ __inline__ void ScaledMaxima(const LocalTensor<float>&, const LocalTensor<half>&,
                                            int64_t) const {}

    __aicore__ __inline__ void StoreWeights(int64_t i, int64_t first, int64_t panel,
                                            const LocalTensor<T>& weights) {
        const int64_t row = panel / 2 * QUERY_ROWS + first;
        DataCopyParams p;
        p.blockCount = CHUNK_ROWS;
        p.blockLen = PANEL / C0;
        p.dstStride = PANEL / C0;
        DataCopy(ring_.template Weights<T>(i)[(2 * row + panel % 2) * PANEL], weights, p);
    }

    // out = out * decay + values of the stack, and the end of the task after its last stack
    __aicore__ __inline__ void AddValues(const Walk& walk, int64_t i) {
        const int64_t rows = OfHalf(WholeRows(walk.task), half_);
        CrossCoreWaitFlag(VALUES_READY);
        if (rows == 0) return;
        if (walk.stack == 0) {
            Duplicate(out_, 0.0f, HALF_ROWS * dim_);
        } else {
            Spread(wide_, decay_[i % RING * HALF_ROWS], HALF_ROWS);
            for (int64_t column = 0; column < dim_; column += LANES) {
                Mul(out_[column], out_[column], wide_, LANES, rows, ByRow());
            }
        }
        PipeBarrier<PIPE_V>();
        const int64_t most = CHUNK * sizeof(S) / sizeof(float) / dim_;  // rows in a slot of scores
        for (int64_t row = 0; row < rows; row += most) {
            const int32_t slot = chunk_count_++ % 2;
            const int64_t count = least(rows - row, most) * dim_;
            const LocalTensor<float> values =
                scores_[slot * CHUNK].template ReinterpretCast<float>();
            WaitFlag<HardEvent::V_MTE2>(SCORE + slot);
            DataCopy(values, ring_.Values(i)[(half_ * HALF_ROWS + row) * dim_], count);
            SetFlag<HardEvent::MTE2_V>(SCORE + slot);
            WaitFlag<HardEvent::MTE2_V>(SCORE + slot);
            Add(out_[row * dim_], out_[row * dim_], values, count);
            SetFlag<HardEvent::V_MTE2>(SCORE + slot);
        }
        PipeBarrier<PIPE_V>();
        const int64_t queries = OfHalf(walk.task.rows, half_);
        if (walk.last_stack() && queries > 0) {
            const int64_t ring = walk.number % RING * HALF_ROWS;
            WriteOut(walk.task, queries, total_[ring]);
            WriteLse(walk.task, queries, maximum_[ring], total_[ring]);
        }
    }

    __aicore__ __inline__ BinaryRepeatParams ByRow() const {
        return BinaryRepeatParams(1, 1, 0, dim_ / BLOCK, dim_ / BLOCK, 1);
    }

    __aicore__ __inline__ void WriteOut(const Task& task, int64_t rows,
                                        const LocalTensor<float>& total) {
        const LocalTensor<float> safe = small_;
        const LocalTensor<T> rounded = weights_;
        Maxs(safe, total, LEAST_TOTAL, HALF_ROWS);
        PipeBarrier<PIPE_V>();
        Spread(wide_, safe, HALF_ROWS);
        for (int64_t column = 0; column < dim_; column += LANES) {
            Div(out_[column], out_[column], wide_, LANES, rows, ByRow());
        }
        PipeBarrier<PIPE_V>();
        WaitFlag<HardEvent::MTE3_V>(WEIGHT);
        WaitFlag<HardEvent::MTE3_V>(WEIGHT + 1);
        Cast(rounded, out_, RoundMode::CAST_RINT, rows * dim_);
        PipeBarrier<PIPE_V>();
        SetFlag<HardEvent::V_MTE3>(WEIGHT);
        WaitFlag<HardEvent::V_MTE3>(WEIGHT);
        const int64_t place = task.text ? (task.batch * t_.sparsity + task.sub) * t_.text
                                        : task.batch * t_.tokens;
        GM_ADDR base = task.text ? a_.text_out : a_.out;
        const GlobalTensor<T> first = At<T>(base, (place * t_.heads + task.head) * dim_);
        ScatterRows(OutRows(first, t_.heads * dim_, task), rounded, dim_, dim_,
                    task.first + half_ * HALF_ROWS, rows);
        SetFlag<HardEvent::MTE3_V>(WEIGHT);
        SetFlag<HardEvent::MTE3_V>(WEIGHT + 1);
    }

    // lse = maximum + ln(total), and -inf where the total is 0, of which ln has two answers
    __aicore__ __inline__ void WriteLse(const Task& task, int64_t rows,
                                        const LocalTensor<float>& maximum,
                                        const LocalTensor<float>& total) {
        const LocalTensor<float> lse = small_;
        const LocalTensor<uint8_t> attends = next_.template ReinterpretCast<uint8_t>();
        Compares(attends, total, 0.0f, CMPMODE::GT, HALF_ROWS);
        Maxs(lse, total, LEAST_TOTAL, HALF_ROWS);
        PipeBarrier<PIPE_V>();
        Ln(lse, lse, HALF_ROWS);
        PipeBarrier<PIPE_V>();
        Add(lse, lse, maximum, HALF_ROWS);
        PipeBarrier<PIPE_V>();
        Select(lse, attends, lse, OF_NOTHING, SELMODE::VSEL_TENSOR_SCALAR_MODE, HALF_ROWS);
        PipeBarrier<PIPE_V>();
        WaitFlag<HardEvent::MTE3_V>(LSE);
        Spread(wide_lse_, lse, HALF_ROWS);
        SetFlag<HardEvent::V_MTE3>(LSE);
        WaitFlag<HardEvent::V_MTE3>(LSE);
        const int64_t head = task.batch * t_.heads + task.head;
        const GlobalTensor<float> first =
            task.text ? At<float>(a_.text_lse, (head * t_.sparsity + task.sub) * t_.text)
                      : At<float>(a_.lse, head * t_.tokens);
        ScatterRows(OutRows(first, 1, task), wide_lse_, BLOCK, 1, task.first + half_ * HALF_ROWS,
                    rows);
        SetFlag<HardEvent::MTE3_V>(LSE);
    }

    template <class U>
    __aicore__ __inline__ Rows<U> OutRows(const GlobalTensor<U>& base, int64_t stride,
                                       const Task& task) {
        if (task.text) return {base, stride, Undealt()};
        return {base, stride, deal_of(task.sub, t_.sparsity, t_.run)};
    }

    const Tiling& t_;
    const ForwardArguments& a_;
    Ring ring_;
    int64_t dim_;
    int64_t half_;
    int64_t chunk_count_ = 0;  // slots of the scores filled so far
    LocalTensor<S> scores_;      // [2][STACK_TILES][CHUNK_ROWS][PANEL]; values pass through too
    LocalTensor<float> wide_scores_;  // of one slot, if they come in half
    LocalTensor<T> weights_;     // the same in 16 bits; scratch before, at the end the output
    LocalTensor<float> out_;     // [HALF_ROWS, dim], not yet divided
    LocalTensor<float> bias_;    // [2][STACK_KEYS]
    LocalTensor<float> wide_, wide_lse_;   // [HALF_ROWS, BLOCK], a value of each row
    LocalTensor<float> maximum_, total_;   // [RING][HALF_ROWS] of the last tasks
    LocalTensor<float> decay_;             // [RING][HALF_ROWS] of the last stacks
    LocalTensor<float> next_, sum_;        // [HALF_ROWS] of this stack
    LocalTensor<float> small_;             // [HALF_ROWS]
};

// T of the tensors, S of the scores on their way to the vector cores: float, or half, which is
// faster and less exact. Then scores are to be smaller than 65,504 before they are scaled, and the
// scale positive.
template <class T, class S>
__aicore__ __inline__ void Forward(const ForwardArguments& arguments, const Tiling& tiling) {
    InitSocState();
    const int64_t cores = GetBlockNum(), core = GetBlockIdx() / GetTaskRation();
    const Ring ring{arguments.workspace + core * WORKSPACE_BYTES};
    if ASCEND_IS_AIC {
        CubeSide<T, S>(tiling, arguments, ring).Run(core, cores);
    }
    if ASCEND_IS_AIV {
        VectorSide<T, S>(tiling, arguments, ring).Run(core, cores);
    }
    PipeBarrier<PIPE_ALL>();
}

}  // namespace skiparse

extern "C" __global__ __mix__(1, 2) void skiparse_attention_fwd_fp16(
    GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR text_q, GM_ADDR text_k, GM_ADDR text_v, GM_ADDR bias,
    GM_ADDR out, GM_ADDR text_out, GM_ADDR lse, GM_ADDR text_lse, GM_ADDR workspace,
    skiparse::Tiling tiling) {
    skiparse::Forward<half, float>({q, k, v, text_q, text_k, text_v, bias, out, text_out, lse,
                                  text_lse, workspace},
                                 tiling);
}

extern "C" __global__ __mix__(1, 2) void skiparse_attention_fwd_fp16_half_scores(
    GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR text_q, GM_ADDR text_k, GM_ADDR text_v, GM_ADDR bias,
    GM_ADDR out, GM_ADDR text_out, GM_ADDR lse, GM_ADDR text_lse, GM_ADDR workspace,
    skiparse::Tiling tiling) {
    skiparse::Forward<half, half>({q, k, v, text_q, text_k, text_v, bias, out, text_out, lse,
                                  text_lse, workspace},
                                 tiling);
}

extern "C" __global__ __mix__(1, 2) void skiparse_attention_fwd_bf16(
    GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR text_q, GM_ADDR text_k, GM_ADDR text_v, GM_ADDR bias,
    GM_ADDR out, GM_ADDR text_out, GM_ADDR lse, GM_ADDR text_lse, GM_ADDR workspace,
    skiparse::Tiling tiling) {
    skiparse::Forward<bfloat16_t, float>({q, k, v, text_q, text_k, text_v, bias, out, text_out, lse,
                                  text_lse, workspace},
                                 tiling);
}

extern "C" __global__ __mix__(1, 2) void skiparse_attention_fwd_bf16_half_scores(
    GM_ADDR q, GM_ADDR k, GM_ADDR v, GM_ADDR text_q, GM_ADDR text_k, GM_ADDR text_v, GM_ADDR bias,
    GM_ADDR out, GM_ADDR text_out, GM_ADDR lse, GM_ADDR text_lse, GM_ADDR workspace,
    skiparse::Tiling tiling) {
    skiparse::Forward<bfloat16_t, half>({q, k, v, text_q, text_k, text_v, bias, out, text_out, lse,
                                  text_lse, workspace},
                                 tiling);
}
