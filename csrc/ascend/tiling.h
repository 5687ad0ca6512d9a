// One attention problem as the kernels see it, and how it is cut into tasks. Host and device.
#pragma once

#include "../pattern.h"

namespace skiparse {

constexpr int64_t QUERY_ROWS = 256;   // of a task
constexpr int64_t HALF_ROWS = 128;    // of a vector core, and of a matrix product
constexpr int64_t KEY_ROWS = 128;     // of a matrix product
constexpr int64_t STACK_KEYS = 1024;  // between two exchanges of the cube and the vector cores
constexpr int64_t STACK_TILES = STACK_KEYS / KEY_ROWS;
constexpr int64_t RING = 3;       // stacks whose scores are in the workspace at a time
constexpr int64_t LOOKAHEAD = 2;  // stacks by which scores run ahead of values

struct Strides {  // elements; the last one is 1
    int64_t batch, token, head;
};

// Plain data, a parameter of the kernels.
struct Tiling {
    int64_t batch, tokens, text, heads, head_dim;  // head_dim is 64 or 128
    int64_t sparsity, run;
    Strides q, k, v, text_q, text_k, text_v;
    int32_t masked;  // whether some key is hidden by a mask
    float scale;
};

SKIPARSE_BOTH constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SKIPARSE_BOTH constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

SKIPARSE_BOTH constexpr int64_t length_of(const Tiling& t, int64_t s) {
    return length_of(s, t.tokens, t.sparsity, t.run);
}

// Query tiles of the longest sub-sequence, which is the first, and of the text.
SKIPARSE_BOTH constexpr int64_t video_tiles(const Tiling& t) {
    return ceil_div(length_of(t, 0), QUERY_ROWS);
}
SKIPARSE_BOTH constexpr int64_t tiles(const Tiling& t) {
    return video_tiles(t) + ceil_div(t.text, QUERY_ROWS);
}
SKIPARSE_BOTH constexpr int64_t tasks(const Tiling& t) {
    return t.batch * t.heads * t.sparsity * tiles(t);
}

// Stacks of keys of the longest sub-sequence; the row of key biases of each has as many places.
SKIPARSE_BOTH constexpr int64_t most_stacks(const Tiling& t) {
    return ceil_div(length_of(t, 0) + t.text, STACK_KEYS);
}

// One head of one sub-sequence.
struct Sequence {
    int64_t batch, head, sub;
};

// A tile of its queries, and all its keys: video first, then text.
struct Task : Sequence {
    bool text;            // whether the queries are text
    int64_t first, rows;  // positions of the queries
    int64_t video_keys, keys;
};

SKIPARSE_BOTH constexpr Task task_of(const Tiling& t, int64_t index) {
    const int64_t tile = index % tiles(t), sub = index / tiles(t) % t.sparsity;
    const int64_t row = index / tiles(t) / t.sparsity;
    const bool text = tile >= video_tiles(t);
    const int64_t first = (text ? tile - video_tiles(t) : tile) * QUERY_ROWS;
    const int64_t length = length_of(t, sub), queries = (text ? t.text : length) - first;
    return {{row / t.heads, row % t.heads, sub},
            text,
            first,
            queries < 0 ? 0 : least(queries, QUERY_ROWS),
            length,
            length + t.text};
}

// The stacks of the tasks of one core, one after another. Tasks without queries are passed over.
class Walk {
public:
    SKIPARSE_BOTH constexpr Walk(const Tiling& tiling, int64_t core, int64_t cores)
        : tiling_(tiling), next_(tasks(tiling) * core / cores),
          end_(tasks(tiling) * (core + 1) / cores) {
        next_task();
    }

    SKIPARSE_BOTH constexpr void step() {
        if (++stack == ceil_div(task.keys, STACK_KEYS)) {
            ++number;
            next_task();
        }
    }
    SKIPARSE_BOTH constexpr bool last_stack() const {
        return (stack + 1) * STACK_KEYS >= task.keys;
    }
    SKIPARSE_BOTH constexpr int64_t key_tiles() const {
        return least(ceil_div(task.keys, KEY_ROWS) - stack * STACK_TILES, STACK_TILES);
    }
    // Whether some place among the keys of the stack must not be attended to.
    SKIPARSE_BOTH constexpr bool hides_keys() const {
        return tiling_.masked || (last_stack() && task.keys % KEY_ROWS != 0);
    }

    Task task{};
    int64_t stack = 0;
    int64_t number = 0;  // of the task, among those of this core
    bool done = false;

private:
    SKIPARSE_BOTH constexpr void next_task() {
        stack = 0;
        task.rows = 0;
        while (task.rows == 0 && next_ < end_) task = task_of(tiling_, next_++);
        done = task.rows == 0;
    }

    const Tiling& tiling_;
    int64_t next_, end_;
};

// The workspace of one core, in bytes: a ring of scores (fp32), weights (16 bits), values (fp32).
constexpr int64_t SCORES_BYTES = QUERY_ROWS * STACK_KEYS * 4;
constexpr int64_t WEIGHTS_BYTES = QUERY_ROWS * STACK_KEYS * 2;
constexpr int64_t VALUES_BYTES = QUERY_ROWS * 128 * 4;
constexpr int64_t WORKSPACE_BYTES = RING * (SCORES_BYTES + WEIGHTS_BYTES + VALUES_BYTES);

// Added to the score of a key that must not be attended to; and where the maximum starts, far above
// it, so that the weight of such a key is exactly 0 even where there are no others.
constexpr float HIDDEN = -3.0e38f, FLOOR = -1.0e30f;

// The log-sum-exp of a row without keys.
constexpr float OF_NOTHING = -__builtin_inff();

}  // namespace skiparse
