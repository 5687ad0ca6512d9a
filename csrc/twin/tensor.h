// Tensors and the buffers they are cut from: where data lies, and whether it may lie there.
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
        twin::Operation operation(twin::S, "GetValue", twin::machine->costs.scalar(), where);
        if (!operation.executes()) return T{};
        operation.read(memory(where), place(i, where), sizeof(T));
        return data()[i];
    }
    void SetValue(uint32_t i, T value, Where where = Where::here()) const {
        twin::Operation operation(twin::S, "SetValue", twin::machine->costs.scalar(), where);
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
    const T* GetPhyAddr() const { return address_; }
    T* target() const { return address_; }  // the twin's own, to write to
    T GetValue(uint64_t i, Where where = Where::here()) const {
        twin::Operation operation(twin::S, "GetValue", twin::machine->costs.scalar(), where);
        if (!operation.executes()) return T{};
        operation.read_global(address_ + i, sizeof(T));
        return address_[i];
    }

private:
    T* address_ = nullptr;
};

// The memories from which a kernel cuts its buffers.
enum class Hardware { UB, L1, L0A, L0B, L0C };

// Cuts buffers from a memory of the sub-core, one after another; a memory has one. The framework's
// TPipe is not in the twin: beside flags that a kernel numbers itself its use is not defined.
template <Hardware HARDWARE>
class LocalMemAllocator {
    static constexpr twin::Space SPACE = HARDWARE == Hardware::UB    ? twin::UB
                                         : HARDWARE == Hardware::L1  ? twin::L1
                                         : HARDWARE == Hardware::L0A ? twin::L0A
                                         : HARDWARE == Hardware::L0B ? twin::L0B
                                                                     : twin::L0C;

public:
    explicit LocalMemAllocator(Where where = Where::here())
        : chip_(twin::machine->self->chips[SPACE].get()) {
        twin::require(chip_ != nullptr, where, "this sub-core has no such memory");
        twin::require(!chip_->cut, where, "a second allocator for " + chip_->memory.name);
        chip_->cut = true;
    }

    template <TPosition POSITION, class T>
    LocalTensor<T> Alloc(uint32_t elements, Where where = Where::here()) {
        static_assert(twin::space_of(POSITION) == SPACE, "the position is in another memory");
        const size_t first = used_;
        used_ += elements * sizeof(T);
        twin::require(used_ <= chip_->memory.bytes, where,
                      chip_->memory.name + " has " + std::to_string(chip_->memory.bytes) +
                          " bytes, and the buffers need " + std::to_string(used_));
        return {chip_, SPACE, first, used_};
    }

private:
    twin::Chip* chip_;
    size_t used_ = 0;
};

}  // namespace AscendC
