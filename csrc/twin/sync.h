// Flags, barriers, cross-core flags, and who am I.
#pragma once

#include <type_traits>

#include "machine.h"

enum pipe_t {
    PIPE_S = twin::S,
    PIPE_V = twin::V,
    PIPE_M = twin::M,
    PIPE_MTE1 = twin::MTE1,
    PIPE_MTE2 = twin::MTE2,
    PIPE_MTE3 = twin::MTE3,
    PIPE_FIX = twin::FIX,
    PIPE_ALL = twin::PIPES,
};

namespace AscendC {

using twin::Where;

// From one pipe to another: 16 * from + to.
enum class HardEvent {
    MTE1_MTE2 = 16 * twin::MTE1 + twin::MTE2,
    MTE1_M = 16 * twin::MTE1 + twin::M,
    MTE2_MTE1 = 16 * twin::MTE2 + twin::MTE1,
    MTE2_V = 16 * twin::MTE2 + twin::V,
    MTE3_V = 16 * twin::MTE3 + twin::V,
    M_MTE1 = 16 * twin::M + twin::MTE1,
    M_FIX = 16 * twin::M + twin::FIX,
    FIX_M = 16 * twin::FIX + twin::M,
    S_MTE3 = 16 * twin::S + twin::MTE3,
    V_S = 16 * twin::V + twin::S,
    V_MTE2 = 16 * twin::V + twin::MTE2,
    V_MTE3 = 16 * twin::V + twin::MTE3,
};

template <HardEvent EVENT>
void SetFlag(int32_t id, Where where = Where::here()) {
    twin::set_flag(static_cast<int>(EVENT) / 16, static_cast<int>(EVENT) % 16, id, where);
}

template <HardEvent EVENT>
void WaitFlag(int32_t id, Where where = Where::here()) {
    twin::wait_flag(static_cast<int>(EVENT) / 16, static_cast<int>(EVENT) % 16, id, where);
}

template <pipe_t PIPE>
void PipeBarrier() {
    static_assert(PIPE != PIPE_S, "the scalar unit has no barrier");
    if constexpr (PIPE == PIPE_ALL) {
        twin::barrier_all();
    } else {
        twin::barrier(PIPE);
    }
}

// Undoes what kernels before left in force; the first of a kernel.
inline void InitSocState() { twin::machine->self->initialised = true; }

// Mode 2: from a cube core to both of its vector cores, or from both of them to it.
template <uint8_t MODE, pipe_t PIPE>
void CrossCoreSetFlag(uint16_t id, Where where = Where::here()) {
    static_assert(MODE == 2, "the twin knows mode 2 alone");
    static_assert(PIPE != PIPE_S && PIPE != PIPE_ALL, "the flag must follow a pipe of data");
    twin::set_cross_flag(id, PIPE, where);
}

inline void CrossCoreWaitFlag(uint16_t id, Where where = Where::here()) {
    twin::wait_cross_flag(id, where);
}

// Of all vector cores, or of all cores. The kernel must run on no more cores than there are.
template <bool VECTORS_ONLY = true>
void SyncAll(Where where = Where::here()) {
    twin::sync_all(VECTORS_ONLY, where);
}

// From here on copies to global memory add to what is there. Two sums of one place must be ordered
// like any two writes, since the order decides how they are rounded.
template <class T>
void SetAtomicAdd(Where where = Where::here()) {
    static_assert(std::is_same_v<T, float>, "the twin adds float alone");
    twin::machine->self->adds = true;
    twin::machine->self->adds_since = where;
}

inline void SetAtomicNone() { twin::machine->self->adds = false; }

inline int64_t GetBlockNum() { return twin::machine->cores; }
inline int64_t GetSubBlockIdx() { return twin::cube() ? 0 : twin::machine->self->lane - 1; }
inline int64_t GetTaskRation() { return twin::machine->mixed && !twin::cube() ? 2 : 1; }
inline int64_t GetBlockIdx() {
    return twin::machine->core * GetTaskRation() + GetSubBlockIdx();
}

}  // namespace AscendC
