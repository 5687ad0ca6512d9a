// What instructions cost, in cycles of a core: a MODEL. Nothing here was measured by this project.
//
// Figures are documented by CANN's public samples, or derived from their published timings; those
// marked [?] are nowhere documented, and span what seemed possible. Each has the value that makes a
// kernel fast, the one to expect, and the one that makes it slow.
#pragma once

#include <algorithm>
#include <cstdint>

namespace twin {

enum Guess { FAST, TYPICAL, SLOW };

struct Figure {
    constexpr Figure(double value) : Figure(value, value, value) {}
    constexpr Figure(double fast, double typical, double slow) : of{fast, typical, slow} {}
    double of[3];
};

namespace figure {

// Instructions. A start-up takes the pipe itself (8 products of a block: 4156 cycles for 4096; DMA
// of 128 bytes: 548 us), or may overlap the instruction before; which share does is [?] where only
// the first instruction was timed.
constexpr Figure SHARE_OF_START{0, 0.5, 1};
constexpr Figure MMAD_START = 8;             // UnitFlag.md
constexpr Figure LOAD_START = 28;            // load_data_perf
constexpr Figure LOAD_LEFT = 256;            // bytes a cycle, L1 to L0A; load_data_perf
constexpr Figure LOAD_RIGHT = 128;           // bytes a cycle, L1 to L0B; load_data_perf
constexpr Figure FIX_START = 20;             // fixpipe_perf
constexpr Figure FIX_ELEMENTS = 64;          // a cycle, out of L0C; fixpipe_perf
constexpr Figure FIX_BYTES{256, 111, 69};    // a cycle, to global memory [?]
constexpr Figure ADD_READS{0.25, 0.5, 1};    // share of an atomic sum that is read as well [?]
constexpr Figure DMA_START = 20;             // timings of data_copy: 128 bytes an instruction
constexpr Figure DMA_ROW{5, 6, 8};           // cycles a row at least; same, rows of 128 bytes
constexpr Figure DMA_LATENCY{100, 300, 700};  // until the bytes are there [?]
constexpr Figure CUBE_DMA = 111;             // bytes a cycle of a cube core; same
constexpr Figure VECTOR_DMA = 69;            // bytes a cycle of a vector core; same
constexpr Figure VECTOR_START{20, 25, 30};   // until dependent ones may start
constexpr Figure PLAIN = 1;                  // cycles a repeat of 256 bytes; 2201.md
constexpr Figure FUNCTION{1, 2, 4};          // the same of Exp, Ln and Div [?]
constexpr Figure REDUCE{1, 2, 4};            // the same of WholeReduce [?]

// The scalar unit works out, fills in and issues instructions and flags one by one, up to 32 ahead
// of a pipe.
constexpr Figure ISSUE{2, 8, 20};            // [?]
constexpr Figure SCALAR{5, 20, 50};          // a number that it reads or writes itself [?]
constexpr int QUEUE = 32;                    // of MTE1 and M; taken for all pipes
constexpr Figure FLAG{0, 10, 30};            // from pipe to pipe [?]
constexpr Figure CROSS_FLAG{400, 600, 1000};  // from core to core [?]

// The device, shared by all cores: bytes a second, read or written, and bytes.
constexpr Figure L2{5.2e12, 4.0e12, 3.0e12};   // data_copy got the first by reading; both [?]
constexpr Figure HBM{1.8e12, 1.6e12, 1.4e12};  // architecture 2201; the last as data_copy got
constexpr Figure L2_BYTES{192e6, 192e6, 192e6};

}  // namespace figure

// Cycles for which an instruction takes its pipe, and those more until its result is there.
struct Cost {
    double busy, latency;
};

// The costs of a launch, for one guess at what is uncertain.
struct Costs {
    Guess guess = TYPICAL;

    double of(const Figure& figure) const { return figure.of[guess]; }

    Cost load(uint64_t bytes, bool left) const {
        return after(figure::LOAD_START, bytes / of(left ? figure::LOAD_LEFT : figure::LOAD_RIGHT));
    }
    // Of 16 x 16 x 16 multiply-adds each.
    Cost mmad(uint64_t fractals) const { return {of(figure::MMAD_START) + fractals, 0}; }
    Cost fixpipe(uint64_t elements, uint64_t bytes) const {
        return after(figure::FIX_START,
                     std::max(elements / of(figure::FIX_ELEMENTS), bytes / of(figure::FIX_BYTES)));
    }
    Cost copy(uint64_t rows, uint64_t bytes, bool cube) const {
        const double rate = of(cube ? figure::CUBE_DMA : figure::VECTOR_DMA);
        return {of(figure::DMA_START) + std::max(bytes / rate, rows * of(figure::DMA_ROW)),
                of(figure::DMA_LATENCY)};
    }
    Cost vector(uint64_t repeats, const Figure& cycles) const {
        return after(figure::VECTOR_START, repeats * of(cycles));
    }

    Cost scalar() const { return {of(figure::SCALAR), 0}; }

private:
    Cost after(const Figure& start, double cycles) const {
        const double taken = of(figure::SHARE_OF_START) * of(start);
        return {taken + cycles, of(start) - taken};
    }
};

}  // namespace twin
