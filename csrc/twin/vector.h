// The vector sub-cores: arithmetic on UB.
//
// An instruction repeats up to 255 times over 8 blocks of 32 bytes; strides are in blocks. The
// other form takes a count of consecutive elements.
#pragma once

#include <array>
#include <cmath>
#include <iterator>

#include "tensor.h"

namespace twin {

constexpr size_t REPEAT_BYTES = 256;

struct Steps {
    uint64_t block, repeat;
};

// The operands of one vector instruction, checked: in UB, aligned, and each pair of source and
// destination either in the same place or apart.
template <class T>
struct Operand {
    AscendC::LocalTensor<T> tensor;
    Steps steps;

    size_t at(uint64_t repeat, uint64_t block) const {
        return (repeat * steps.repeat + block * steps.block) * BLOCK;
    }
    T* data(uint64_t repeat, uint64_t block) const {
        return tensor.data() + at(repeat, block) / sizeof(T);
    }
};

inline bool apart(size_t first, size_t first_bytes, size_t second, size_t second_bytes) {
    return first + first_bytes <= second || second + second_bytes <= first;
}

template <class T>
bool share_a_block(const Operand<T>& to, const Operand<T>& from, uint64_t repeats,
                   uint64_t blocks) {
    std::vector<size_t> places[2];
    for (uint64_t r = 0; r < repeats; ++r) {
        for (uint64_t b = 0; b < blocks; ++b) {
            places[0].push_back(to.tensor.at + to.at(r, b));
            places[1].push_back(from.tensor.at + from.at(r, b));
        }
    }
    for (auto& of : places) std::sort(of.begin(), of.end());
    std::vector<size_t> both;
    std::set_intersection(places[0].begin(), places[0].end(), places[1].begin(), places[1].end(),
                          std::back_inserter(both));
    return !both.empty();
}

template <class T>
void expect_apart_or_same(const Operand<T>& to, const Operand<T>& from, uint64_t repeats,
                          uint64_t blocks, Where where) {
    const bool same = to.tensor.at == from.tensor.at && to.steps.block == from.steps.block &&
                      to.steps.repeat == from.steps.repeat;
    require(same ||
                apart(to.tensor.at, to.at(repeats - 1, blocks - 1) + BLOCK, from.tensor.at,
                      from.at(repeats - 1, blocks - 1) + BLOCK) ||
                !share_a_block(to, from, repeats, blocks),
            where, "source and destination overlap in part");
}

// dst = f(sources), element by element, where every source has the type of the destination.
template <class T, size_t SOURCES, class F>
void repeated(const char* name, const Figure& cycles, Where where, const Operand<T>& to,
              const std::array<Operand<T>, SOURCES>& from, uint64_t mask, uint64_t repeats, F f) {
    constexpr uint64_t PER_BLOCK = BLOCK / sizeof(T);
    require(mask >= 1 && mask <= REPEAT_BYTES / sizeof(T), where,
            std::string(name) + ": mask must be 1 to " +
                std::to_string(REPEAT_BYTES / sizeof(T)));
    require(repeats >= 1 && repeats <= 255, where, std::string(name) + ": repeats 1 to 255 times");
    const uint64_t blocks = (mask + PER_BLOCK - 1) / PER_BLOCK;
    Operation operation(V, name, machine->costs.vector(repeats, cycles), where);
    to.tensor.expect(UB, BLOCK, where);
    for (const auto& source : from) {
        source.tensor.expect(UB, BLOCK, where);
        expect_apart_or_same(to, source, repeats, blocks, where);
    }
    if (!operation.executes()) return;
    for (uint64_t r = 0; r < repeats; ++r) {
        for (uint64_t b = 0; b < blocks; ++b) {
            const uint64_t count = std::min(PER_BLOCK, mask - b * PER_BLOCK);
            const size_t size = count * sizeof(T);
            for (const auto& source : from) {
                operation.read(source.tensor.memory(where),
                               source.tensor.bytes(source.at(r, b), size, where), size);
            }
            operation.write(to.tensor.memory(where), to.tensor.bytes(to.at(r, b), size, where),
                            size);
            for (uint64_t i = 0; i < count; ++i) {
                std::array<T, SOURCES> values;
                for (size_t s = 0; s < SOURCES; ++s) values[s] = from[s].data(r, b)[i];
                to.data(r, b)[i] = f(values);
            }
        }
    }
}

// The same on `count` consecutive elements; the types may differ.
template <class D, class T, size_t SOURCES, class F>
void counted(const char* name, const Figure& cycles, Where where,
             const AscendC::LocalTensor<D>& to,
             const std::array<AscendC::LocalTensor<T>, SOURCES>& from, uint64_t count, F f) {
    require(count >= 1, where, std::string(name) + ": of no elements");
    const uint64_t repeats =
        (count * std::max(sizeof(D), sizeof(T)) + REPEAT_BYTES - 1) / REPEAT_BYTES;
    Operation operation(V, name, machine->costs.vector(repeats, cycles), where);
    if (!operation.executes()) return;
    to.expect(UB, BLOCK, where);
    for (const auto& source : from) {
        source.expect(UB, BLOCK, where);
        require((to.at == source.at && sizeof(D) == sizeof(T)) ||
                    apart(to.at, count * sizeof(D), source.at, count * sizeof(T)),
                where, "source and destination overlap in part");
        operation.read(source.memory(where), source.bytes(0, count * sizeof(T), where),
                       count * sizeof(T));
    }
    operation.write(to.memory(where), to.bytes(0, count * sizeof(D), where), count * sizeof(D));
    for (uint64_t i = 0; i < count; ++i) {
        std::array<T, SOURCES> values;
        for (size_t s = 0; s < SOURCES; ++s) values[s] = from[s].data()[i];
        to.data()[i] = f(values);
    }
}

// f, which is of floats, as a function of T.
template <class T, size_t SOURCES, class F>
auto in_float(F f) {
    return [f](const std::array<T, SOURCES>& values) {
        std::array<float, SOURCES> x;
        for (size_t s = 0; s < SOURCES; ++s) x[s] = static_cast<float>(values[s]);
        return rounded<T>(f(x));
    };
}

}  // namespace twin

namespace AscendC {

enum class RoundMode { CAST_NONE, CAST_RINT };
enum class ReduceOrder { ORDER_ONLY_VALUE };

struct BinaryRepeatParams {
    BinaryRepeatParams(uint64_t dst_block, uint64_t first_block, uint64_t second_block,
                       uint64_t dst_repeat, uint64_t first_repeat, uint64_t second_repeat,
                       Where where = Where::here())
        : dstBlkStride(dst_block, where), src0BlkStride(first_block, where),
          src1BlkStride(second_block, where), dstRepStride(dst_repeat, where),
          src0RepStride(first_repeat, where), src1RepStride(second_repeat, where) {}

    twin::Field<0, 255> dstBlkStride, src0BlkStride, src1BlkStride;
    twin::Field<0, 255> dstRepStride, src0RepStride, src1RepStride;
};

struct BrcbRepeatParams {
    BrcbRepeatParams(uint64_t dst_block, uint64_t dst_repeat, Where where = Where::here())
        : dstBlkStride(dst_block, where), dstRepStride(dst_repeat, where) {}

    twin::Field<0, 65535> dstBlkStride, dstRepStride;
};

// Arithmetic exists for float and half, and not for bfloat16_t; the twin computes both in float.
#define TWIN_COMPUTES(NAME) \
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, half>, \
                  #NAME " computes in float and half alone")

#define TWIN_BINARY(NAME, CYCLES, RESULT) \
    template <class T> \
    void NAME(const LocalTensor<T>& to, const LocalTensor<T>& first, \
              const LocalTensor<T>& second, int32_t count, Where where = Where::here()) { \
        TWIN_COMPUTES(NAME); \
        twin::counted<T, T, 2>(#NAME, twin::figure::CYCLES, where, to, {first, second}, count, \
                               twin::in_float<T, 2>([](auto x) { return RESULT; })); \
    } \
    template <class T> \
    void NAME(const LocalTensor<T>& to, const LocalTensor<T>& first, \
              const LocalTensor<T>& second, uint64_t mask, uint64_t repeats, \
              const BinaryRepeatParams& p, Where where = Where::here()) { \
        TWIN_COMPUTES(NAME); \
        const twin::Operand<T> target{to, {p.dstBlkStride, p.dstRepStride}}; \
        twin::repeated<T, 2>(#NAME, twin::figure::CYCLES, where, target, \
                             {{{first, {p.src0BlkStride, p.src0RepStride}}, \
                               {second, {p.src1BlkStride, p.src1RepStride}}}}, \
                             mask, repeats, twin::in_float<T, 2>([](auto x) { return RESULT; })); \
    }
TWIN_BINARY(Add, PLAIN, x[0] + x[1])
TWIN_BINARY(Sub, PLAIN, x[0] - x[1])
TWIN_BINARY(Mul, PLAIN, x[0] * x[1])
TWIN_BINARY(Div, FUNCTION, x[0] / x[1])
TWIN_BINARY(Max, PLAIN, x[0] > x[1] ? x[0] : x[1])
TWIN_BINARY(Min, PLAIN, x[0] < x[1] ? x[0] : x[1])
#undef TWIN_BINARY

#define TWIN_UNARY(NAME, CYCLES, RESULT) \
    template <class T> \
    void NAME(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t count, \
              Where where = Where::here()) { \
        TWIN_COMPUTES(NAME); \
        twin::counted<T, T, 1>(#NAME, twin::figure::CYCLES, where, to, {from}, count, \
                               twin::in_float<T, 1>([](auto x) { return RESULT; })); \
    }
TWIN_UNARY(Exp, FUNCTION, std::exp(x[0]))
TWIN_UNARY(Abs, PLAIN, std::fabs(x[0]))
TWIN_UNARY(Sqrt, FUNCTION, std::sqrt(x[0]))
TWIN_UNARY(Rsqrt, FUNCTION, 1.0f / std::sqrt(x[0]))
TWIN_UNARY(Reciprocal, FUNCTION, 1.0f / x[0])
#undef TWIN_UNARY

// Of numbers greater than 0: what ln 0 is depends on a mode of the core, -inf or the least number.
template <class T>
void Ln(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t count,
        Where where = Where::here()) {
    TWIN_COMPUTES(Ln);
    twin::counted<T, T, 1>("Ln", twin::figure::FUNCTION, where, to, {from}, count,
                           twin::in_float<T, 1>([where](auto x) {
                               twin::require(x[0] != 0.0f, where, "Ln of 0, which has two answers");
                               return std::log(x[0]);
                           }));
}

#define TWIN_SCALAR(NAME, CYCLES, RESULT) \
    template <class T> \
    void NAME(const LocalTensor<T>& to, const LocalTensor<T>& from, T value, int32_t count, \
              Where where = Where::here()) { \
        TWIN_COMPUTES(NAME); \
        const float y = static_cast<float>(value); \
        twin::counted<T, T, 1>(#NAME, twin::figure::CYCLES, where, to, {from}, count, \
                               twin::in_float<T, 1>([y](auto x) { return RESULT; })); \
    }
TWIN_SCALAR(Adds, PLAIN, x[0] + y)
TWIN_SCALAR(Muls, PLAIN, x[0] * y)
TWIN_SCALAR(Maxs, PLAIN, x[0] > y ? x[0] : y)
TWIN_SCALAR(Mins, PLAIN, x[0] < y ? x[0] : y)
#undef TWIN_SCALAR
#undef TWIN_COMPUTES

enum class CMPMODE { LT, GT, EQ, LE, GE, NE };
enum class SELMODE { VSEL_CMPMASK_SPR, VSEL_TENSOR_SCALAR_MODE, VSEL_TENSOR_TENSOR_MODE };

// A bit for every number, from the lowest bit of the first byte on: whether it is greater.
template <class T>
void Compares(const LocalTensor<uint8_t>& to, const LocalTensor<T>& from, T value, CMPMODE mode,
              uint32_t count, Where where = Where::here()) {
    static_assert(std::is_same_v<T, float>, "the twin compares float alone");
    twin::require(mode == CMPMODE::GT, where, "the twin knows CMPMODE::GT alone");
    twin::require(count >= 1 && count * sizeof(T) % twin::REPEAT_BYTES == 0, where,
                  "Compares: " + std::to_string(count) + " numbers are not whole repeats");
    const twin::Cost cost = twin::machine->costs.vector(
        count * sizeof(T) / twin::REPEAT_BYTES, twin::figure::PLAIN);
    twin::Operation operation(twin::V, "Compares", cost, where);
    to.expect(twin::UB, twin::BLOCK, where);
    from.expect(twin::UB, twin::BLOCK, where);
    if (!operation.executes()) return;
    operation.read(from.memory(where), from.bytes(0, count * sizeof(T), where), count * sizeof(T));
    operation.write(to.memory(where), to.bytes(0, count / 8, where), count / 8);
    std::fill_n(to.data(), count / 8, uint8_t{0});
    for (uint32_t i = 0; i < count; ++i) {
        if (from.data()[i] > value) to.data()[i / 8] |= 1 << i % 8;
    }
}

// Where the bit is set the number, elsewhere the scalar. It uses the 8 KB of UB that are reserved.
template <class T>
void Select(const LocalTensor<T>& to, const LocalTensor<uint8_t>& mask, const LocalTensor<T>& from,
            T other, SELMODE mode, uint32_t count, Where where = Where::here()) {
    static_assert(std::is_same_v<T, float>, "the twin selects float alone");
    twin::require(mode == SELMODE::VSEL_TENSOR_SCALAR_MODE, where,
                  "the twin selects between a tensor and a scalar");
    const uint64_t repeats = (count * sizeof(T) + twin::REPEAT_BYTES - 1) / twin::REPEAT_BYTES;
    twin::Operation operation(twin::V, "Select",
                              twin::machine->costs.vector(repeats, twin::figure::PLAIN), where);
    for (size_t at : {to.at, from.at, mask.at}) {
        twin::require(at % twin::BLOCK == 0, where, "Select: operands begin on 32 bytes");
    }
    if (!operation.executes()) return;
    operation.read(mask.memory(where), mask.bytes(0, (count + 7) / 8, where), (count + 7) / 8);
    operation.read(from.memory(where), from.bytes(0, count * sizeof(T), where), count * sizeof(T));
    operation.write(to.memory(where), to.bytes(0, count * sizeof(T), where), count * sizeof(T));
    for (uint32_t i = 0; i < count; ++i) {
        to.data()[i] = mask.data()[i / 8] >> i % 8 & 1 ? from.data()[i] : other;
    }
}

template <class T>
void Duplicate(const LocalTensor<T>& to, T value, int32_t count, Where where = Where::here()) {
    twin::counted<T, T, 0>("Duplicate", twin::figure::PLAIN, where, to, {}, count,
                           [value](const std::array<T, 0>&) { return value; });
}

// From or to float. Widening is exact, so it takes no rounding.
template <class D, class T>
void Cast(const LocalTensor<D>& to, const LocalTensor<T>& from, RoundMode mode, uint32_t count,
          Where where = Where::here()) {
    static_assert(std::is_same_v<D, float> != std::is_same_v<T, float>,
                  "Cast is from or to float alone");
    constexpr bool widens = std::is_same_v<D, float>;
    twin::require((mode == RoundMode::CAST_NONE) == widens, where,
                  "Cast rounds with CAST_RINT, and widens with CAST_NONE");
    twin::counted<D, T, 1>("Cast", twin::figure::PLAIN, where, to, {from}, count,
                           [](const std::array<T, 1>& x) {
                               return twin::rounded<D>(static_cast<float>(x[0]));
                           });
}

// Each of 8 elements per repeat fills a block of 32 bytes.
template <class T>
void Brcb(const LocalTensor<T>& to, const LocalTensor<T>& from, uint64_t repeats,
          const BrcbRepeatParams& p, Where where = Where::here()) {
    constexpr uint64_t PER_BLOCK = twin::BLOCK / sizeof(T), EACH = 8;
    twin::require(repeats >= 1 && repeats <= 255, where, "Brcb: repeats 1 to 255 times");
    const twin::Cost cost = twin::machine->costs.vector(repeats, twin::figure::PLAIN);
    twin::Operation operation(twin::V, "Brcb", cost, where);
    to.expect(twin::UB, twin::BLOCK, where);
    from.expect(twin::UB, twin::BLOCK, where);
    if (!operation.executes()) return;
    for (uint64_t i = 0; i < repeats * EACH; ++i) {
        const size_t size = sizeof(T);
        operation.read(from.memory(where), from.bytes(i * size, size, where), size);
        const uint64_t block = i / EACH * p.dstRepStride + i % EACH * p.dstBlkStride;
        operation.write(to.memory(where), to.bytes(block * twin::BLOCK, twin::BLOCK, where),
                        twin::BLOCK);
        std::fill_n(to.data() + block * PER_BLOCK, PER_BLOCK, from.data()[i]);
    }
}

// One value of every repeat; the destination's stride is in elements.
template <class T, class F>
void reduce_repeats(const char* name, const LocalTensor<T>& to, const LocalTensor<T>& from,
                    uint64_t mask, uint64_t repeats, uint64_t to_step, uint64_t block_step,
                    uint64_t repeat_step, Where where, F f) {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, half>,
                  "the twin reduces float and half alone");
    constexpr uint64_t PER_BLOCK = twin::BLOCK / sizeof(T);
    twin::require(mask >= 1 && mask <= twin::REPEAT_BYTES / sizeof(T) && repeats <= 255, where,
                  std::string(name) + ": mask or repeats out of range");
    const twin::Cost cost = twin::machine->costs.vector(repeats, twin::figure::REDUCE);
    twin::Operation operation(twin::V, name, cost, where);
    to.expect(twin::UB, sizeof(T), where);
    from.expect(twin::UB, twin::BLOCK, where);
    if (!operation.executes()) return;
    const twin::Operand<T> source{from, {block_step, repeat_step}};
    for (uint64_t r = 0; r < repeats; ++r) {
        T result{};
        for (uint64_t i = 0; i < mask; ++i) {
            const size_t at = source.at(r, i / PER_BLOCK) + i % PER_BLOCK * sizeof(T);
            operation.read(from.memory(where), from.bytes(at, sizeof(T), where), sizeof(T));
            const T value = from.data()[at / sizeof(T)];
            result = i == 0 ? value : f(result, value);
        }
        operation.write(to.memory(where), to.bytes(r * to_step * sizeof(T), sizeof(T), where),
                        sizeof(T));
        to.data()[r * to_step] = result;
    }
}

template <class T>
void WholeReduceMax(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t mask,
                    int32_t repeats, int32_t to_step, int32_t block_step, int32_t repeat_step,
                    ReduceOrder, Where where = Where::here()) {
    reduce_repeats("WholeReduceMax", to, from, mask, repeats, to_step, block_step, repeat_step,
                   where, [](T a, T b) {
                       return static_cast<float>(a) > static_cast<float>(b) ? a : b;
                   });
}

template <class T>
void WholeReduceSum(const LocalTensor<T>& to, const LocalTensor<T>& from, int32_t mask,
                    int32_t repeats, int32_t to_step, int32_t block_step, int32_t repeat_step,
                    Where where = Where::here()) {
    static_assert(std::is_same_v<T, float>, "the twin adds up float alone");
    reduce_repeats("WholeReduceSum", to, from, mask, repeats, to_step, block_step, repeat_step,
                   where, [](T a, T b) { return a + b; });
}

}  // namespace AscendC
