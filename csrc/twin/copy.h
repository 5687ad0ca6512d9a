// Copies between global memory and L1 or UB.
#pragma once

#include "tensor.h"

namespace twin {

// A copy of `rows` rows of `bytes` each between a place in global memory and the chip; the last row
// begins `last` bytes after the first.
inline Operation copy(int pipe, const char* name, const void* global, uint64_t rows,
                      uint64_t bytes, uint64_t last, Where where) {
    const bool reads = pipe == MTE2;
    machine->count_moved(name, global, last + bytes, reads ? rows * bytes : 0,
                         reads ? 0 : rows * bytes, where);
    return {pipe, name, machine->costs.copy(rows, rows * bytes, cube()), where};
}

// Where the last of `count` things begins that are `apart`.
inline uint64_t last_of(uint64_t count, uint64_t apart) { return count == 0 ? 0 : (count - 1) * apart; }

}  // namespace twin

namespace AscendC {

// Blocks of `blockLen` units of 32 bytes, with gaps from the end of one to the start of the next.
struct DataCopyParams {
    twin::Field<0, 4095> blockCount = 1;
    twin::Field<0, 65535> blockLen = 0, srcStride = 0, dstStride = 0;
};

// Blocks of `blockLen` bytes; gaps in bytes in global memory, and in units of 32 bytes in UB.
struct DataCopyExtParams {
    twin::Field<0, 4095> blockCount = 1;
    twin::Field<0, 2097151> blockLen = 0;
    twin::Field<0, 0xffffffff> srcStride = 0, dstStride = 0;
};

// `ndNum` matrices of `nValue` rows of `dValue` elements become columns of 32-byte blocks. Strides:
// source in elements, C0 (from column to column) and N (row to row) in blocks of 32 bytes.
struct Nd2NzParams {
    twin::Field<0, 4095> ndNum = 0;
    twin::Field<0, 16384> nValue = 0;
    twin::Field<0, 65535> dValue = 0, srcNdMatrixStride = 0, srcDValue = 0;
    twin::Field<0, 16384> dstNzC0Stride = 0, dstNzNStride = 0, dstNzMatrixStride = 0;
};

template <class T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, const Nd2NzParams& p,
              Where where = Where::here()) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4, "the twin converts types of 16 or 32 bits");
    constexpr size_t C0 = twin::BLOCK / sizeof(T);
    twin::require(p.srcDValue >= 1 && p.dstNzC0Stride >= 1 && p.dstNzNStride >= 1, where,
                  "srcDValue, dstNzC0Stride and dstNzNStride are 1 at least, and 0 unless set");
    to.expect(twin::L1, twin::BLOCK, where);
    const uint64_t last = (twin::last_of(p.ndNum, p.srcNdMatrixStride) +
                           twin::last_of(p.nValue, p.srcDValue)) * sizeof(T);
    twin::Operation operation = twin::copy(twin::MTE2, "DataCopy", from.GetPhyAddr(),
                                           p.ndNum * p.nValue, p.dValue * sizeof(T), last, where);
    if (!operation.executes()) return;
    for (uint64_t matrix = 0; matrix < p.ndNum; ++matrix) {
        for (uint64_t row = 0; row < p.nValue; ++row) {
            const T* source =
                from.GetPhyAddr() + matrix * p.srcNdMatrixStride + row * p.srcDValue;
            operation.read_global(source, p.dValue * sizeof(T));
            for (uint64_t column = 0; column < p.dValue; column += C0) {
                const uint64_t target = matrix * p.dstNzMatrixStride +
                                        (column / C0 * p.dstNzC0Stride + row * p.dstNzNStride) * C0;
                const size_t size = std::min<uint64_t>(C0, p.dValue - column) * sizeof(T);
                operation.write(to.memory(where), to.bytes(target * sizeof(T), size, where), size);
                std::memcpy(to.data() + target, source + column, size);
            }
        }
    }
}

template <class T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyParams& p,
              Where where = Where::here()) {
    to.expect(twin::UB, twin::BLOCK, where);
    const size_t size = p.blockLen * twin::BLOCK;
    const uint64_t last = twin::last_of(p.blockCount, p.blockLen + p.srcStride) * twin::BLOCK;
    twin::Operation operation =
        twin::copy(twin::MTE2, "DataCopy", from.GetPhyAddr(), p.blockCount, size, last, where);
    if (!operation.executes()) return;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const auto* source = reinterpret_cast<const uint8_t*>(from.GetPhyAddr()) +
                             i * (p.blockLen + p.srcStride) * twin::BLOCK;
        const size_t target =
            to.bytes(i * (p.blockLen + p.dstStride) * twin::BLOCK, size, where);
        operation.read_global(source, size);
        operation.write(to.memory(where), target, size);
        std::memcpy(to.memory(where).data + target, source, size);
    }
}

template <class T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, const DataCopyParams& p,
              Where where = Where::here()) {
    from.expect(twin::UB, twin::BLOCK, where);
    twin::require(!twin::machine->self->adds, where, "the twin adds out of L0C alone");
    const size_t size = p.blockLen * twin::BLOCK;
    const uint64_t last = twin::last_of(p.blockCount, p.blockLen + p.dstStride) * twin::BLOCK;
    twin::Operation operation =
        twin::copy(twin::MTE3, "DataCopy", to.GetPhyAddr(), p.blockCount, size, last, where);
    if (!operation.executes()) return;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const size_t source =
            from.bytes(i * (p.blockLen + p.srcStride) * twin::BLOCK, size, where);
        auto* target = reinterpret_cast<uint8_t*>(to.target()) +
                       i * (p.blockLen + p.dstStride) * twin::BLOCK;
        operation.read(from.memory(where), source, size);
        operation.write_global(target, size);
        std::memcpy(target, from.memory(where).data + source, size);
    }
}

template <class T>
DataCopyParams blocks_of(uint32_t count, Where where) {
    twin::require(count * sizeof(T) % twin::BLOCK == 0, where,
                  std::to_string(count * sizeof(T)) + " bytes are not whole blocks of 32");
    DataCopyParams p;
    p.blockLen = {count * sizeof(T) / twin::BLOCK, where};
    return p;
}

template <class T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count,
              Where where = Where::here()) {
    DataCopy(to, from, blocks_of<T>(count, where), where);
}

template <class T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, uint32_t count,
              Where where = Where::here()) {
    DataCopy(to, from, blocks_of<T>(count, where), where);
}

// What lies beside blocks that are not whole units of 32 bytes, once they are in UB.
template <class T>
struct DataCopyPadExtParams {
    bool isPad = false;
};

template <class T>
void DataCopyPad(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad, Where where = Where::here()) {
    to.expect(twin::UB, twin::BLOCK, where);
    twin::require(!pad.isPad, where, "the twin pads with nothing in particular");
    const uint64_t last = twin::last_of(p.blockCount, p.blockLen + p.srcStride);
    twin::Operation operation = twin::copy(twin::MTE2, "DataCopyPad", from.GetPhyAddr(),
                                           p.blockCount, p.blockLen, last, where);
    if (!operation.executes()) return;
    const size_t whole = (p.blockLen + twin::BLOCK - 1) / twin::BLOCK * twin::BLOCK;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const auto* source =
            reinterpret_cast<const uint8_t*>(from.GetPhyAddr()) + i * (p.blockLen + p.srcStride);
        const size_t target = to.bytes(i * (whole + p.dstStride * twin::BLOCK), whole, where);
        operation.read_global(source, p.blockLen);
        operation.spoil(to.memory(where), target, whole);
        operation.write(to.memory(where), target, p.blockLen);
        std::memcpy(to.memory(where).data + target, source, p.blockLen);
    }
}

template <class T>
void DataCopyPad(const GlobalTensor<T>& to, const LocalTensor<T>& from, const DataCopyExtParams& p,
                 Where where = Where::here()) {
    from.expect(twin::UB, twin::BLOCK, where);
    twin::require(!twin::machine->self->adds, where, "the twin adds out of L0C alone");
    const uint64_t last = twin::last_of(p.blockCount, p.blockLen + p.dstStride);
    twin::Operation operation = twin::copy(twin::MTE3, "DataCopyPad", to.GetPhyAddr(),
                                           p.blockCount, p.blockLen, last, where);
    if (!operation.executes()) return;
    const size_t pitch =
        ((p.blockLen + twin::BLOCK - 1) / twin::BLOCK + p.srcStride) * twin::BLOCK;
    for (uint64_t i = 0; i < p.blockCount; ++i) {
        const size_t source = from.bytes(i * pitch, p.blockLen, where);
        auto* target =
            reinterpret_cast<uint8_t*>(to.target()) + i * (p.blockLen + p.dstStride);
        operation.read(from.memory(where), source, p.blockLen);
        operation.write_global(target, p.blockLen);
        std::memcpy(target, from.memory(where).data + source, p.blockLen);
    }
}

}  // namespace AscendC
