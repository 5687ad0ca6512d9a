// Tensors, buffers and the pipe object: where data lies, and whether it may lie there.
#pragma once

#include <cstdint>
#include <string>

#include "machine.h"
#include "number.h"

namespace AscendC {

using twin::Where;

enum class TPosition { A1, A2, B1, B2, CO1, VECIN, VECCALC, VECOUT };

}  // namespace AscendC

namespace twin {

using AscendC::TPosition;

enum Space { L1, L0A, L0B, L0C, UB };
constexpr size_t BLOCK = 32, FRACTAL = 512;  // bytes

constexpr Space space_of(TPosition position) {
    switch (position) {
        case TPosition::A1:
        case TPosition::B1: return L1;
        case TPosition::A2: return L0A;
        case TPosition::B2: return L0B;
        case TPosition::CO1: return L0C;
        default: return UB;
    }
}

// An unsigned field of an instruction: a value that does not fit is a fault, not cut off.
template <uint64_t LEAST, uint64_t MOST>
class Field {
public:
    Field(uint64_t value, Where where = Where::here()) : value_(value) {
        require(value >= LEAST && value <= MOST, where,
                std::to_string(static_cast<int64_t>(value)) + " does not fit a field of " +
                    std::to_string(LEAST) + " to " + std::to_string(MOST));
    }
    operator uint64_t() const { return value_; }

private:
    uint64_t value_;
};

}  // namespace twin

namespace AscendC {

// Part of an on-chip memory. It knows the end of the buffer it was cut from.
template <class T>
class LocalTensor {
public:
    LocalTensor() = default;
    LocalTensor(twin::Chip* chip, twin::Space space, size_t at, size_t end)
        : chip(chip), space(space), at(at), end(end) {}

    LocalTensor operator[](uint64_t elements) const {
        return {chip, space, at + elements * sizeof(T), end};
    }
    template <class U>
    LocalTensor<U> ReinterpretCast() const {
        return {chip, space, at, end};
    }
    T GetValue(uint32_t i, Where where = Where::here()) const {
        twin::Operation operation(twin::S, "GetValue", twin::Cost{}, where);
        if (!operation.executes()) return T{};
        operation.read(memory(where), place(i, where), sizeof(T));
        return data()[i];
    }
    void SetValue(uint32_t i, T value, Where where = Where::here()) const {
        twin::Operation operation(twin::S, "SetValue", twin::Cost{}, where);
        if (!operation.executes()) return;
        operation.write(memory(where), place(i, where), sizeof(T));
        data()[i] = value;
    }

    T* data() const { return reinterpret_cast<T*>(chip->memory.data + at); }
    twin::Memory& memory(Where where) const {
        twin::require(chip != nullptr, where, "a tensor of no buffer");
        return chip->memory;
    }
    // The place in its memory of `size` bytes, `from` bytes after the beginning.
    size_t bytes(size_t from, size_t size, Where where) const {
        twin::require(at + from + size <= end, where,
                      "runs past the end of its buffer in " + memory(where).name + " by " +
                          std::to_string(at + from + size - end) + " bytes");
        return at + from;
    }
    void expect(twin::Space right, size_t alignment, Where where) const {
        twin::require(space == right, where, "a tensor in " + memory(where).name +
                                                 ", which this instruction cannot reach");
        twin::require(at % alignment == 0, where,
                      "starts in " + memory(where).name + " at byte " + std::to_string(at) +
                          ", not a multiple of " + std::to_string(alignment));
    }

    twin::Chip* chip = nullptr;
    twin::Space space = twin::UB;
    size_t at = 0, end = 0;  // bytes

private:
    size_t place(uint32_t i, Where where) const {
        twin::require(space == twin::UB, where, "the scalar unit reaches UB alone");
        return bytes(i * sizeof(T), sizeof(T), where);
    }
};

template <class T>
class GlobalTensor {
public:
    void SetGlobalBuffer(T* address) { address_ = address; }
    GlobalTensor operator[](uint64_t elements) const {
        GlobalTensor part;
        part.address_ = address_ + elements;
        return part;
    }
    T* GetPhyAddr() const { return address_; }
    T GetValue(uint64_t i, Where where = Where::here()) const {
        twin::Operation operation(twin::S, "GetValue", twin::Cost{}, where);
        if (!operation.executes()) return T{};
        operation.read_global(address_ + i, sizeof(T));
        return address_[i];
    }

private:
    T* address_ = nullptr;
};

template <TPosition POSITION>
class TBuf {
public:
    template <class T>
    LocalTensor<T> Get() const {
        return whole_.template ReinterpretCast<T>();
    }

private:
    friend class TPipe;
    LocalTensor<uint8_t> whole_;
};

template <TPosition POSITION, int32_t DEPTH>
class TQue;

// Cuts buffers from the memories of the sub-core. On a cube core it keeps three M_MTE1 flags for
// itself, set from its construction until Destroy(); a kernel that uses flags must call that first.
class TPipe {
public:
    explicit TPipe(Where where = Where::here()) : where_(where) {
        for (int id = 0; twin::cube() && id < OWN; ++id) {
            twin::set_flag(twin::M, twin::MTE1, id, where);
        }
    }
    TPipe(const TPipe&) = delete;
    TPipe& operator=(const TPipe&) = delete;
    ~TPipe() noexcept(false) {
        if (!destroyed_ && !std::uncaught_exceptions()) Destroy(where_);
    }

    template <TPosition POSITION>
    bool InitBuffer(TBuf<POSITION>& buffer, uint32_t bytes, Where where = Where::here()) {
        buffer.whole_ = cut(twin::space_of(POSITION), bytes, where);
        return true;
    }
    template <TPosition POSITION, int32_t DEPTH>
    bool InitBuffer(TQue<POSITION, DEPTH>& queue, uint8_t number, uint32_t bytes,
                    Where where = Where::here()) {
        for (int i = 0; i < number; ++i) {
            queue.buffers_.push_back({cut(twin::space_of(POSITION), bytes, where)});
        }
        return true;
    }
    void Destroy(Where where = Where::here()) {
        destroyed_ = true;
        for (int id = 0; twin::cube() && id < OWN; ++id) {
            twin::wait_flag(twin::M, twin::MTE1, id, where);
        }
    }

private:
    LocalTensor<uint8_t> cut(twin::Space space, uint32_t bytes, Where where) {
        twin::Chip* chip = twin::machine->self->chips[space].get();
        twin::require(chip != nullptr, where, "this sub-core has no such memory");
        const size_t first = chip->used;
        chip->used += (bytes + twin::BLOCK - 1) / twin::BLOCK * twin::BLOCK;
        twin::require(chip->used <= chip->memory.bytes, where,
                      chip->memory.name + " has " + std::to_string(chip->memory.bytes) +
                          " bytes, and the buffers need " + std::to_string(chip->used));
        return {chip, space, first, first + bytes};
    }

    static constexpr int OWN = 3;
    Where where_;
    bool destroyed_ = false;
};

}  // namespace AscendC
