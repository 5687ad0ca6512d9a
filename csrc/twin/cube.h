// The cube sub-core: L1 to L0, the matrix product, and L0C to global memory.
//
// A fractal is 16 x 16 elements. Layouts of 16-bit matrices, as the order of their fractals and of
// the elements inside: NZ (L1) columns of fractals, rows inside; ZZ (L0A) rows, rows; ZN (L0B) rows
// of fractals, columns inside. L0C holds fp32 in NZ.
#pragma once

#include "tensor.h"

// How results are rounded on their way out: not at all, or to half. The compiler's, so outside of
// the namespace.
enum class QuantMode_t { NoQuant, F322F16 };

namespace AscendC {

constexpr uint64_t FRACTAL_SIDE = 16;

// Fractals `startIndex + i * srcStride` of the source, one after another with gaps of `dstGap`.
struct LoadData2DParams {
    twin::Field<0, 65535> startIndex = 0;
    twin::Field<0, 255> repeatTimes = 0;
    twin::Field<0, 65535> srcStride = 0, dstGap = 0;
    bool ifTranspose = false;
};

// `unitFlag` 2 or 3: every 512 bytes of the result wait until Fixpipe has taken what they held;
// with 3 they are then ready to be taken.
struct MmadParams {
    twin::Field<0, 4095> m = 0, n = 0, k = 0;
    bool cmatrixInitVal = true;  // start from zero rather than add
    twin::Field<0, 3> unitFlag = 0;
};

enum class CO2Layout { NZ, ROW_MAJOR };

struct FixpipeConfig {
    CO2Layout format;
};
constexpr FixpipeConfig CFG_ROW_MAJOR{CO2Layout::ROW_MAJOR};

// `srcStride` between columns of fractals, in rows of 16; `dstStride` between rows, in elements.
// `unitFlag` 3: every 512 bytes wait until they are ready.
struct FixpipeParamsV220 {
    twin::Field<0, 4095> nSize = 0;
    twin::Field<0, 8192> mSize = 0;
    twin::Field<0, 65535> srcStride = 0;
    twin::Field<0, 0xffffffff> dstStride = 0;
    QuantMode_t quantPre = QuantMode_t::NoQuant;
    twin::Field<0, 3> unitFlag = 0;
};

template <class T>
void LoadData(const LocalTensor<T>& to, const LocalTensor<T>& from, const LoadData2DParams& p,
              Where where = Where::here()) {
    static_assert(sizeof(T) == 2, "the twin loads 16-bit types alone");
    constexpr uint64_t ELEMENTS = FRACTAL_SIDE * FRACTAL_SIDE;
    twin::require(to.space == twin::L0A || to.space == twin::L0B, where,
                  "LoadData fills L0A or L0B, not " + to.memory(where).name);
    to.expect(to.space, twin::FRACTAL, where);
    from.expect(twin::L1, twin::BLOCK, where);
    const twin::Cost cost =
        twin::machine->costs.load(p.repeatTimes * twin::FRACTAL, to.space == twin::L0A);
    twin::Operation operation(twin::MTE1, "LoadData", cost, where);
    if (!operation.executes()) return;
    for (uint64_t i = 0; i < p.repeatTimes; ++i) {
        const uint64_t first = (p.startIndex + i * p.srcStride) * ELEMENTS;
        const uint64_t target = i * (1 + p.dstGap) * ELEMENTS;
        operation.read(from.memory(where), from.bytes(first * 2, twin::FRACTAL, where),
                       twin::FRACTAL);
        operation.write(to.memory(where), to.bytes(target * 2, twin::FRACTAL, where),
                        twin::FRACTAL);
        for (uint64_t e = 0; e < ELEMENTS; ++e) {
            const uint64_t turned = e % FRACTAL_SIDE * FRACTAL_SIDE + e / FRACTAL_SIDE;
            to.data()[target + e] = from.data()[first + (p.ifTranspose ? turned : e)];
        }
    }
}

// The order in which the cube finishes the fractals of a product.
inline void SetMMRowMajor() { twin::machine->self->by_rows = true; }
inline void SetMMColumnMajor() { twin::machine->self->by_rows = false; }

inline uint64_t fractals(uint64_t size) { return (size + FRACTAL_SIDE - 1) / FRACTAL_SIDE; }

// C[m, n] (+)= A[m, k] B[k, n], on whole fractals.
template <class C, class T>
void Mmad(const LocalTensor<C>& c, const LocalTensor<T>& a, const LocalTensor<T>& b,
          const MmadParams& p, Where where = Where::here()) {
    static_assert(std::is_same_v<C, float>, "the cube adds up in float");
    static_assert(std::is_same_v<T, half> || std::is_same_v<T, bfloat16_t>,
                  "the twin multiplies half and bfloat16_t");
    c.expect(twin::L0C, 1024, where);
    a.expect(twin::L0A, twin::FRACTAL, where);
    b.expect(twin::L0B, twin::FRACTAL, where);
    twin::require(p.m != 1, where, "m = 1 takes the operand as a vector; give 16 rows");
    const uint64_t mf = fractals(p.m), nf = fractals(p.n), kf = fractals(p.k);
    const size_t c_bytes = mf * nf * 2 * twin::FRACTAL;

    const size_t place = c.bytes(0, c_bytes, where);
    twin::require(p.unitFlag != 1, where, "unitFlag is 0, 2 or 3");
    if (p.unitFlag != 0) twin::wait_for_free_units(place, c_bytes, where);
    twin::Operation operation(twin::M, "Mmad", twin::machine->costs.mmad(mf * nf * kf), where);
    if (p.unitFlag == 3) twin::set_units(twin::M, place, c_bytes, where);
    if (!operation.executes()) return;
    operation.read(a.memory(where), a.bytes(0, mf * kf * twin::FRACTAL, where),
                   mf * kf * twin::FRACTAL);
    operation.read(b.memory(where), b.bytes(0, kf * nf * twin::FRACTAL, where),
                   kf * nf * twin::FRACTAL);
    if (!p.cmatrixInitVal) {
        if (mf * nf >= 10) operation.follow_own_pipe();  // else only a barrier orders two products
        operation.read(c.memory(where), place, c_bytes);
    }
    operation.write(c.memory(where), place, c_bytes);

    const uint64_t n = nf * FRACTAL_SIDE, k = kf * FRACTAL_SIDE, m = mf * FRACTAL_SIDE;
    std::vector<float> right(k * n), row(n);
    for (uint64_t i = 0; i < k; ++i) {
        for (uint64_t j = 0; j < n; ++j) {
            const uint64_t fractal = i / FRACTAL_SIDE * nf + j / FRACTAL_SIDE;
            right[i * n + j] = static_cast<float>(
                b.data()[(fractal * FRACTAL_SIDE + j % FRACTAL_SIDE) * FRACTAL_SIDE +
                         i % FRACTAL_SIDE]);
        }
    }
    for (uint64_t r = 0; r < m; ++r) {
        auto result = [&](uint64_t j) -> float& {
            return c.data()[(j / FRACTAL_SIDE * m + r) * FRACTAL_SIDE + j % FRACTAL_SIDE];
        };
        for (uint64_t j = 0; j < n; ++j) row[j] = p.cmatrixInitVal ? 0.0f : result(j);
        for (uint64_t i = 0; i < k; ++i) {
            const uint64_t fractal = r / FRACTAL_SIDE * kf + i / FRACTAL_SIDE;
            const float left = static_cast<float>(
                a.data()[(fractal * FRACTAL_SIDE + r % FRACTAL_SIDE) * FRACTAL_SIDE +
                         i % FRACTAL_SIDE]);
            const float* from = right.data() + i * n;
            float* into = row.data();
            for (uint64_t j = 0; j < n; ++j) into[j] += left * from[j];
        }
        for (uint64_t j = 0; j < n; ++j) result(j) = row[j];
    }
}

template <class T, class U, const FixpipeConfig& CONFIG>
void Fixpipe(const GlobalTensor<T>& to, const LocalTensor<U>& from, const FixpipeParamsV220& p,
             Where where = Where::here()) {
    constexpr bool narrows = std::is_same_v<T, half>;
    static_assert((std::is_same_v<T, float> || narrows) && std::is_same_v<U, float>,
                  "the twin writes fp32 results as they are, or as half");
    twin::require((p.quantPre == QuantMode_t::F322F16) == narrows, where,
                  "quantPre is F322F16 to half, and NoQuant to float");
    static_assert(CONFIG.format == CO2Layout::ROW_MAJOR, "the twin writes rows");
    from.expect(twin::L0C, 64, where);
    twin::require(p.nSize % FRACTAL_SIDE == 0, where, "nSize must be a multiple of 16");
    twin::require(p.unitFlag == 0 || p.unitFlag == 3, where, "unitFlag is 0 or 3");
    twin::require(p.unitFlag == 0 || twin::machine->self->by_rows, where,
                  "rows with unitFlag need products by rows: SetMMRowMajor()");
    const uint64_t column_bytes = fractals(p.mSize) * 2 * twin::FRACTAL;
    std::vector<size_t> columns;  // of fractals, where products are waited for
    for (uint64_t j = 0; p.unitFlag == 3 && j < p.nSize; j += FRACTAL_SIDE) {
        columns.push_back(from.bytes(j * p.srcStride * sizeof(float), column_bytes, where));
        twin::wait_for_ready_units(columns.back(), column_bytes, where);
    }
    const uint64_t elements = p.mSize * p.nSize;
    const twin::Cost cost = twin::machine->costs.fixpipe(elements, elements * sizeof(T));
    const bool adds = twin::machine->self->adds;
    const double read = adds ? twin::machine->costs.of(twin::figure::ADD_READS) : 0;
    const size_t extent =
        p.mSize == 0 ? 0 : ((p.mSize - 1) * p.dstStride + p.nSize) * sizeof(T);
    twin::machine->count_moved("Fixpipe", to.GetPhyAddr(), extent, read * elements * sizeof(T),
                               elements * sizeof(T), where);
    twin::Operation operation(twin::FIX, "Fixpipe", cost, where);
    for (size_t column : columns) twin::set_units(twin::FIX, column, column_bytes, where);
    if (!operation.executes()) return;
    for (uint64_t r = 0; r < p.mSize; ++r) {
        T* row = to.target() + r * p.dstStride;
        if (adds) operation.read_global(row, p.nSize * sizeof(T));
        operation.write_global(row, p.nSize * sizeof(T));
        for (uint64_t j = 0; j < p.nSize; j += FRACTAL_SIDE) {
            const uint64_t first = (j / FRACTAL_SIDE * p.srcStride + r) * FRACTAL_SIDE;
            const size_t size = FRACTAL_SIDE * sizeof(float);
            operation.read(from.memory(where), from.bytes(first * sizeof(float), size, where),
                           size);
            for (uint64_t e = 0; e < FRACTAL_SIDE; ++e) {
                row[j + e] = twin::rounded<T>(from.data()[first + e] +
                                        (adds ? static_cast<float>(row[j + e]) : 0.0f));
            }
        }
    }
}

}  // namespace AscendC
