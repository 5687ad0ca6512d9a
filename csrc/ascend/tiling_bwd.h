// The backward problem as the kernels see it, and how it is cut into steps. Host and device.
#pragma once

#include "tiling.h"

namespace skiparse {

constexpr int64_t BLOCK_ROWS = 256;  // queries of a step, and keys
constexpr int64_t STEP_RING = 2;  // steps whose matrices are in the workspace at a time

// Query blocks whose gradients are summed at a time: 5 MiB of them for each core stay in the L2.
constexpr int64_t MOST_IN_PART = 40;

// Plain data, as `Tiling`.
struct BackwardTiling {
    Tiling forward;
    Strides grad_out, grad_text_out;
    int64_t grad_text_sub;  // from sub-sequence to sub-sequence of grad_text_out
    int64_t most_in_part;   // query blocks; MOST_IN_PART unless a test wants less
};

SKIPARSE_BOTH constexpr int64_t sequences(const Tiling& t) {
    return t.batch * t.heads * t.sparsity;
}
SKIPARSE_BOTH constexpr Sequence sequence_of(const Tiling& t, int64_t index) {
    const int64_t head = index / t.sparsity;
    return {head / t.heads, head % t.heads, index % t.sparsity};
}
SKIPARSE_BOTH constexpr int64_t index_of(const Tiling& t, const Sequence& s) {
    return (s.batch * t.heads + s.head) * t.sparsity + s.sub;
}

// Blocks of rows of the longest sub-sequence, which is the first.
SKIPARSE_BOTH constexpr int64_t most_blocks(const Tiling& t) {
    return ceil_div(length_of(t, 0) + t.text, BLOCK_ROWS);
}

// What the rows of a sequence need as queries: their log-sum-exps, then their deltas, each fp32
// [most_blocks * BLOCK_ROWS].
SKIPARSE_BOTH constexpr int64_t row_values(const Tiling& t) {
    return 2 * most_blocks(t) * BLOCK_ROWS;
}

// The steps of the sequences of one core: a part of the queries after the other; for each of them
// key block after key block; and for each of these all query blocks of the part. Parts are equal but
// for the last. Empty sequences are passed over.
class Steps {
public:
    SKIPARSE_BOTH constexpr Steps(const BackwardTiling& tiling, int64_t core, int64_t cores)
        : tiling_(tiling.forward), most_in_part_(tiling.most_in_part),
          next_(sequences(tiling_) * core / cores), end_(sequences(tiling_) * (core + 1) / cores) {
        next_sequence();
    }

    SKIPARSE_BOTH constexpr void step() {
        if (++query < part_end()) return;
        ++key_count;
        if (++key < blocks_) {
            query = part_begin_;
            return;
        }
        key = 0;
        part_begin_ = query;
        if (query < blocks_) return;
        query = part_begin_ = 0;
        query_count += blocks_;
        next_sequence();
    }

    SKIPARSE_BOTH constexpr int64_t parts() const { return parts_; }
    SKIPARSE_BOTH constexpr int64_t part_end() const {
        return least(part_begin_ + part_length_, blocks_);
    }
    SKIPARSE_BOTH constexpr bool begins() const { return key == 0 && query == 0; }
    SKIPARSE_BOTH constexpr bool first_of_part() const { return query == part_begin_; }
    SKIPARSE_BOTH constexpr bool last_of_part() const { return query + 1 == part_end(); }
    SKIPARSE_BOTH constexpr bool last_query() const { return query + 1 == blocks_; }
    SKIPARSE_BOTH constexpr bool last_key() const { return key + 1 == blocks_; }

    // The rows that half 0 or 1 of a block has.
    SKIPARSE_BOTH constexpr int64_t rows_of_half(int64_t block, int64_t half) const {
        const int64_t left = rows - block * BLOCK_ROWS - half * HALF_ROWS;
        return left < 0 ? 0 : least(left, HALF_ROWS);
    }
    SKIPARSE_BOTH constexpr int64_t query_halves() const {
        return rows_of_half(query, 1) > 0 ? 2 : 1;
    }
    SKIPARSE_BOTH constexpr int64_t key_tiles() const {
        return rows_of_half(key, 1) > 0 ? 2 : 1;
    }
    // Whether some place among the keys of the step must not be attended to.
    SKIPARSE_BOTH constexpr bool hides_keys() const {
        return tiling_.masked || (last_key() && rows % KEY_ROWS != 0);
    }

    Sequence sequence{};
    int64_t length = 0, rows = 0;  // of video, and with text
    int64_t key = 0, query = 0;    // blocks
    int64_t key_count = 0;         // key blocks before, on this core
    int64_t query_count = 0;       // query blocks of the sequences before, on this core
    bool done = false;

private:
    SKIPARSE_BOTH constexpr void next_sequence() {
        rows = 0;
        while (rows == 0 && next_ < end_) {
            sequence = sequence_of(tiling_, next_++);
            length = length_of(tiling_, sequence.sub);
            rows = length + tiling_.text;
        }
        done = rows == 0;
        if (done) return;
        blocks_ = ceil_div(rows, BLOCK_ROWS);
        parts_ = ceil_div(blocks_, most_in_part_);
        part_length_ = ceil_div(blocks_, parts_);
    }

    const Tiling& tiling_;
    int64_t most_in_part_;
    int64_t next_, end_;
    int64_t blocks_ = 0, parts_ = 1, part_length_ = 0;  // of the sequence
    int64_t part_begin_ = 0;
};

// The workspace of one core, in bytes. Matrices of a step: scores and gradients of the weights in
// fp32, weights and gradients of the scores in 16 bits. Then gradients of keys and values of a
// block, and those of the queries of a part, in fp32.
constexpr int64_t WIDE_BYTES = BLOCK_ROWS * BLOCK_ROWS * 4;
constexpr int64_t NARROW_BYTES = BLOCK_ROWS * BLOCK_ROWS * 2;
constexpr int64_t ROWS_BYTES = BLOCK_ROWS * 128 * 4;
constexpr int64_t STEP_BYTES = 2 * WIDE_BYTES + 2 * NARROW_BYTES + 2 * ROWS_BYTES;

// One block more than a part has: the next may begin while the vector cores still read the last
// block of this one.
SKIPARSE_BOTH constexpr int64_t query_ring(const BackwardTiling& b) {
    return least(most_blocks(b.forward), b.most_in_part) + 1;
}
SKIPARSE_BOTH constexpr int64_t backward_workspace_bytes(const BackwardTiling& b) {
    return STEP_RING * STEP_BYTES + query_ring(b) * ROWS_BYTES;
}

// Gradients of keys and values between the parts of a sequence, of one core, in bytes.
SKIPARSE_BOTH constexpr int64_t key_sums_bytes(const BackwardTiling& b) {
    const int64_t blocks = most_blocks(b.forward);
    return blocks > b.most_in_part ? 2 * blocks * ROWS_BYTES : 0;
}

}  // namespace skiparse
