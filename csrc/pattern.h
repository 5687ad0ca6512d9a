// Which tokens attend to each other: the index formulas of skiparse/pattern.py, for kernels.
//
// `n` interleaved sub-sequences are dealt out in runs of `w` consecutive tokens. A test compares
// these functions with the Python ones exhaustively. No other C++ file contains an index formula.
#pragma once

#include <cstdint>

// The host calls these functions as well as the accelerator, and CANN's compiler must be told so: by
// what kernel_operator.h defines, or by what that stands for where it is older.
#if defined(__host_aicore__)
#define SKIPARSE_BOTH __host_aicore__
#elif defined(__CCE__)
#define SKIPARSE_BOTH [host, aicore]
#else
#define SKIPARSE_BOTH
#endif

namespace skiparse {

// The sub-sequence, in [0, n), that owns token t.
SKIPARSE_BOTH constexpr int64_t sub_of(int64_t t, int64_t n, int64_t w) { return t / w % n; }

// The position of token t inside its sub-sequence.
SKIPARSE_BOTH constexpr int64_t pos_of(int64_t t, int64_t n, int64_t w) {
    return t / (w * n) * w + t % w;
}

// The token at position j of sub-sequence s.
SKIPARSE_BOTH constexpr int64_t token_of(int64_t s, int64_t j, int64_t n, int64_t w) {
    return j / w * (w * n) + s * w + j % w;
}

// How many of N tokens sub-sequence s owns.
SKIPARSE_BOTH constexpr int64_t length_of(int64_t s, int64_t N, int64_t n, int64_t w) {
    int64_t rest = N % (n * w) - s * w;
    rest = rest < 0 ? 0 : rest;
    return N / (n * w) * w + (rest < w ? rest : w);
}

// `runs` runs of `length` consecutive tokens; the first begins at `token`, each `apart` tokens after
// the one before. What one strided copy can address.
struct Runs {
    int64_t token;
    int64_t runs;
    int64_t length;
    int64_t apart;
};

// The most positions from `j` on, and before `end`, of sub-sequence s that are equal runs: the rest
// of a run, as many whole runs as there are, or the beginning of one.
SKIPARSE_BOTH constexpr Runs runs_at(int64_t s, int64_t j, int64_t end, int64_t n, int64_t w) {
    const int64_t left_in_run = w - j % w;
    const int64_t left = end - j;
    const bool whole = left_in_run == w && left >= w;
    const int64_t part = left_in_run < left ? left_in_run : left;
    return {token_of(s, j, n, w), whole ? left / w : 1, whole ? w : part, n * w};
}

// Positions that kernels move at once are a multiple of this many, but for the last of all.
constexpr int64_t TILE = 64;

// A sub-sequence, and what of its tiles takes a division: made once, for positions by the thousand.
struct Deal {
    int64_t s, n, w;
    int64_t runs_of_tile;  // 0 unless a tile is whole runs
};
SKIPARSE_BOTH constexpr Deal deal_of(int64_t s, int64_t n, int64_t w) {
    return {s, n, w, TILE % w == 0 ? TILE / w : 0};
}

// The same as above. It divides by w at the end of a sub-sequence alone, or where tiles cut runs.
SKIPARSE_BOTH constexpr Runs runs_at(const Deal& d, int64_t j, int64_t end) {
    const int64_t left = end - j, apart = d.n * d.w;
    if (end <= d.w) return {d.s * d.w + j, 1, left, apart};  // of the first run
    if (d.runs_of_tile == 0 || j % TILE != 0 || left < d.w) {
        return runs_at(d.s, j, end, d.n, d.w);
    }
    const int64_t whole = d.w == 1           ? left
                          : left % TILE == 0 ? left / TILE * d.runs_of_tile
                                             : left / d.w;
    return {j / TILE * d.runs_of_tile * apart + d.s * d.w, whole, d.w, apart};
}

}  // namespace skiparse
