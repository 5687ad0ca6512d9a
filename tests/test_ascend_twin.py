"""The host twin computes what the accelerator would, and rejects what the hardware does not allow.

Small kernels, each with its one fault: it must be found although the numbers may come out right.
"""

import re

import built
import pytest
import torch

from csrc import build
from csrc.twin.fault import TwinFault

built.require_tools(allow_module_level=True)

# Sound kernels; `UNLESS(i)` leaves its line out where i is the fault that is asked for.
KERNELS = """
#include "kernel_operator.h"
#include "python.h"
using namespace AscendC;
static int omitted;
#define UNLESS(line) if (omitted != line)

static uint8_t* A; static uint8_t* B; static uint8_t* C;  // of float or half
constexpr int N = 1024, M = 32, K = 48, COLUMNS = 80;

template <class T> GlobalTensor<T> global(uint8_t* address) {
    GlobalTensor<T> tensor;
    tensor.SetGlobalBuffer(reinterpret_cast<T*>(address));
    return tensor;
}
using UB = LocalMemAllocator<Hardware::UB>;
using L1 = LocalMemAllocator<Hardware::L1>;
template <TPosition P, class T> LocalTensor<T> cut(UB& ub, uint32_t elements) {
    return ub.template Alloc<P, T>(elements);
}

// C = exp(A + B), by one vector core
void sum() {
    UB ub;
    auto a = cut<TPosition::VECIN, float>(ub, N), b = cut<TPosition::VECIN, float>(ub, N);
    DataCopy(a, global<float>(A), N);
    DataCopy(b, global<float>(B), N);
    UNLESS(1) SetFlag<HardEvent::MTE2_V>(0);
    UNLESS(1) WaitFlag<HardEvent::MTE2_V>(0);
    Add(a, a, b, N);
    UNLESS(2) PipeBarrier<PIPE_V>();
    Exp(a, a, N);
    SetFlag<HardEvent::V_MTE3>(0);
    UNLESS(3) WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(global<float>(C), a, N);
}

enum Maths { ADD, SUB, MUL, DIV, MAX, MIN, MIN_REPEATED, EXP, LN, ABS, SQRT, RSQRT, RECIPROCAL,
             ADDS, MULS, MAXS, MINS, CAST };

// C = f(A, B) in T, where `omitted` says which f
template <class T> void maths() {
    UB ub;
    auto a = cut<TPosition::VECIN, T>(ub, N), b = cut<TPosition::VECIN, T>(ub, N);
    auto c = cut<TPosition::VECOUT, T>(ub, N);
    auto f = cut<TPosition::VECCALC, float>(ub, N);
    DataCopy(a, global<T>(A), N);
    DataCopy(b, global<T>(B), N);
    PipeBarrier<PIPE_ALL>();
    const T half_ = twin::rounded<T>(0.5f);
    switch (omitted) {
        case ADD: Add(c, a, b, N); break;
        case SUB: Sub(c, a, b, N); break;
        case MUL: Mul(c, a, b, N); break;
        case DIV: Div(c, a, b, N); break;
        case MAX: Max(c, a, b, N); break;
        case MIN: Min(c, a, b, N); break;
        case EXP: Exp(c, a, N); break;
        case LN: Ln(c, a, N); break;
        case ABS: Abs(c, a, N); break;
        case SQRT: Sqrt(c, a, N); break;
        case RSQRT: Rsqrt(c, a, N); break;
        case RECIPROCAL: Reciprocal(c, a, N); break;
        case ADDS: Adds(c, a, half_, N); break;
        case MULS: Muls(c, a, half_, N); break;
        case MAXS: Maxs(c, a, half_, N); break;
        case MINS: Mins(c, a, half_, N); break;
        case MIN_REPEATED: {
            constexpr int LANES = 256 / sizeof(T);
            Min(c, a, b, LANES, N / LANES, BinaryRepeatParams(1, 1, 1, 8, 8, 8));
        } break;
        case CAST:
            if constexpr (std::is_same_v<T, half>) {
                Cast(f, a, RoundMode::CAST_NONE, N);
                PipeBarrier<PIPE_V>();
                Cast(c, f, RoundMode::CAST_RINT, N);
            }
    }
    PipeBarrier<PIPE_ALL>();
    DataCopy(global<T>(C), c, N);
}

// Every core doubles its part of A; then all read what all wrote, and the first overwrites it.
void everyone() {
    constexpr int PART = 32;
    const int cores = GetBlockNum(), mine = GetBlockIdx() * PART;
    UB ub;
    auto x = cut<TPosition::VECCALC, float>(ub, N);
    DataCopy(x, global<float>(A)[mine], PART);
    PipeBarrier<PIPE_ALL>();
    Add(x, x, x, PART);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global<float>(C)[mine], x, PART);
    if (omitted == 2 && mine == 0) return;
    UNLESS(1) SyncAll();
    DataCopy(x[PART], global<float>(C), cores * PART);
    UNLESS(3) SyncAll();
    if (mine == 0) DataCopy(global<float>(C), x, PART);
}

// What a vector core writes is read by the cube of another core.
void all() {
    if (ASCEND_IS_AIV && GetBlockIdx() == 0) {
        UB ub;
        auto x = cut<TPosition::VECCALC, float>(ub, 8);
        Duplicate(x, 1.0f, 8);
        PipeBarrier<PIPE_ALL>();
        DataCopy(global<float>(C), x, 8);
    }
    UNLESS(1) SyncAll<false>();
    if (omitted == 2) SyncAll();
    if (ASCEND_IS_AIC && GetBlockIdx() == 1) {
        auto x = L1().Alloc<TPosition::A1, half>(16);
        Nd2NzParams nd;
        nd.ndNum = 1; nd.nValue = 1; nd.dValue = 16; nd.srcDValue = 16;
        nd.dstNzC0Stride = 1; nd.dstNzNStride = 1;
        DataCopy(x, global<half>(C), nd);
    }
}

struct Operands {
    LocalTensor<half> a, b;
    LocalTensor<float> c;
};

// A in L0A and B in L0B, ready to be multiplied, and place for C; copied in pairs or as elements
Operands load(bool pairs = false) {
    L1 l1;
    auto a1 = l1.Alloc<TPosition::A1, half>(M * K), b1 = l1.Alloc<TPosition::B1, half>(K * COLUMNS);
    auto a2 = LocalMemAllocator<Hardware::L0A>().Alloc<TPosition::A2, half>(M * K);
    auto b2 = LocalMemAllocator<Hardware::L0B>().Alloc<TPosition::B2, half>(K * COLUMNS);
    auto c = LocalMemAllocator<Hardware::L0C>().Alloc<TPosition::CO1, float>(M * COLUMNS);
    Nd2NzParams nd;
    const int unit = pairs ? 2 : 1;
    nd.ndNum = 1; nd.nValue = M; nd.dValue = K / unit; nd.srcDValue = K / unit;
    nd.dstNzC0Stride = M; nd.dstNzNStride = 1;
    if (pairs) DataCopy(a1.ReinterpretCast<uint32_t>(), global<uint32_t>(A), nd);
    if (!pairs) DataCopy(a1, global<half>(A), nd);
    nd.nValue = K; nd.dValue = COLUMNS; nd.srcDValue = COLUMNS; nd.dstNzC0Stride = K;
    DataCopy(b1, global<half>(B), nd);
    UNLESS(1) SetFlag<HardEvent::MTE2_MTE1>(0);
    UNLESS(1) WaitFlag<HardEvent::MTE2_MTE1>(0);
    LoadData2DParams load;
    load.repeatTimes = K / 16; load.srcStride = M / 16;
    for (int row = 0; row < M - (omitted == 2 ? 16 : 0); row += 16) {
        load.startIndex = row / 16;
        LoadData(a2[row * K], a1, load);
    }
    load.repeatTimes = COLUMNS / 16; load.srcStride = K / 16; load.ifTranspose = true;
    for (int row = 0; row < K; row += 16) {
        load.startIndex = row / 16;
        LoadData(b2[row * COLUMNS], b1, load);
    }
    SetFlag<HardEvent::MTE1_M>(0);
    WaitFlag<HardEvent::MTE1_M>(0);
    return {a2, b2, c};
}

// C[M, COLUMNS] = A[M, K] B[K, COLUMNS] in half, by the cube; vector cores do nothing
template <bool PAIRS> void product() {
    if ASCEND_IS_AIV return;
    const auto [a, b, c] = load(PAIRS);
    MmadParams mm;
    mm.m = M; mm.n = COLUMNS; mm.k = K;
    Mmad(c, a, b, mm);  // product
    UNLESS(3) SetFlag<HardEvent::M_FIX>(0);
    UNLESS(3) WaitFlag<HardEvent::M_FIX>(0);
    FixpipeParamsV220 fix;
    fix.nSize = COLUMNS; fix.mSize = M; fix.srcStride = M; fix.dstStride = COLUMNS;
    Fixpipe<float, float, CFG_ROW_MAJOR>(global<float>(C), c, fix);
}

// The same, twice, where the products themselves are the flags
void units() {
    if ASCEND_IS_AIV return;
    const auto [a, b, c] = load();
    const auto units_to = global<float>(C);
    UNLESS(4) SetMMRowMajor();
    for (int turn = 0; turn < 2; ++turn) {
        MmadParams mm;
        mm.m = M; mm.n = COLUMNS; mm.k = K;
        mm.unitFlag = omitted == 5 ? 2 : omitted == 6 && turn == 1 ? 0 : 3;
        Mmad(c, a, b, mm);  // unit
        FixpipeParamsV220 fix;
        fix.nSize = COLUMNS; fix.mSize = M; fix.srcStride = M; fix.dstStride = COLUMNS;
        fix.unitFlag = omitted == 7 ? 0 : 3;
        if (omitted == 8 && turn == 0) continue;
        if (omitted == 9 && turn == 1) continue;
        PipeBarrier<PIPE_FIX>();  // both write C
        Fixpipe<float, float, CFG_ROW_MAJOR>(units_to, c, fix);
    }
}

// Short products need a barrier to add up; long ones do not
void accumulate() {
    if ASCEND_IS_AIV return;
    const auto [a, b, c] = load();
    MmadParams mm;
    mm.m = M; mm.n = COLUMNS; mm.k = K;
    Mmad(c, a, b, mm);
    mm.cmatrixInitVal = false;
    Mmad(c, a, b, mm);
    PipeBarrier<PIPE_M>();
    mm.n = 16;
    Mmad(c, a, b, mm);
    UNLESS(4) PipeBarrier<PIPE_M>();
    Mmad(c, a, b, mm);  // second
}

// C = A B, then A B more, added in global memory
void sums() {
    if ASCEND_IS_AIV return;
    const auto [a, b, c] = load();
    MmadParams mm;
    mm.m = M; mm.n = COLUMNS; mm.k = K;
    Mmad(c, a, b, mm);
    SetFlag<HardEvent::M_FIX>(0);
    WaitFlag<HardEvent::M_FIX>(0);
    const auto sum = global<float>(C);
    FixpipeParamsV220 fix;
    fix.nSize = COLUMNS; fix.mSize = M; fix.srcStride = M; fix.dstStride = COLUMNS;
    UNLESS(4) Fixpipe<float, float, CFG_ROW_MAJOR>(sum, c, fix);
    UNLESS(5) PipeBarrier<PIPE_FIX>();
    SetAtomicAdd<float>();  // sums
    Fixpipe<float, float, CFG_ROW_MAJOR>(sum, c, fix);
    UNLESS(6) SetAtomicNone();
}

// C[i] = A[2 i], every element from a block of its own
void collect() {
    UB ub;
    auto wide = cut<TPosition::VECIN, float>(ub, 64 * 8);
    auto packed = cut<TPosition::VECOUT, float>(ub, 64);
    DataCopyExtParams p;
    p.blockCount = 64; p.blockLen = 4; p.srcStride = 4;
    DataCopyPad(wide, global<float>(A), p, DataCopyPadExtParams<float>());
    SetFlag<HardEvent::MTE2_V>(0);
    WaitFlag<HardEvent::MTE2_V>(0);
    const int first = omitted == 1 ? 2 : 1;
    WholeReduceMax(packed, wide, first, 64, 1, 1, 1, ReduceOrder::ORDER_ONLY_VALUE);
    SetFlag<HardEvent::V_MTE3>(0);
    WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(global<float>(C), packed, 64);
}

// The two vector cores double A and the cube copies nothing: it waits for both, then tells them.
void exchange() {
    if ASCEND_IS_AIC {
        UNLESS(1) CrossCoreWaitFlag(0);
        UNLESS(2) CrossCoreSetFlag<2, PIPE_FIX>(1);
        return;
    }
    UB ub;
    const int part = N / 2, mine = GetSubBlockIdx() * part, other = part - mine;
    auto a = cut<TPosition::VECCALC, float>(ub, part);
    DataCopy(a, global<float>(A)[mine], part);
    SetFlag<HardEvent::MTE2_V>(0);
    WaitFlag<HardEvent::MTE2_V>(0);
    Muls(a, a, 2.0f, part);
    SetFlag<HardEvent::V_MTE3>(0);
    WaitFlag<HardEvent::V_MTE3>(0);
    DataCopy(global<float>(C)[mine], a, part);
    if (omitted == 3) CrossCoreSetFlag<2, PIPE_V>(0); else CrossCoreSetFlag<2, PIPE_MTE3>(0);
    UNLESS(4) CrossCoreWaitFlag(1);
    UNLESS(4) PipeBarrier<PIPE_ALL>();
    DataCopy(a, global<float>(C)[other], part);
}

// One rule broken in each.
void rule() {
    if ASCEND_IS_AIC return;
    UB ub;
    auto x = cut<TPosition::VECCALC, float>(ub, N), y = cut<TPosition::VECCALC, float>(ub, 64);
    switch (omitted) {
        case 0: Duplicate(x, 0.0f, N + 1); break;
        case 1: ub.Alloc<TPosition::VECCALC, float>(190 * 256); break;
        case 2: L1(); break;
        case 3: Duplicate(x[1], 0.0f, 8); break;
        case 4: Exp(y, x, 64); break;
        case 5: Duplicate(x, 0.0f, N); PipeBarrier<PIPE_V>(); Exp(x[8], x, 64); break;
        case 6: Duplicate(x, 0.0f, N);
                Add(x, x, x, 64, 256, BinaryRepeatParams(1, 1, 1, 8, 8, 8)); break;
        case 7: Add(x, x, x, 64, 1, BinaryRepeatParams(1, 1, 1, 256, 8, 8)); break;
        case 8: SetFlag<HardEvent::V_MTE3>(6); break;
        case 9: SetFlag<HardEvent::V_MTE3>(0); SetFlag<HardEvent::V_MTE3>(0); break;
        case 10: WaitFlag<HardEvent::V_MTE3>(0); break;
        case 11: DataCopy(x, global<float>(A)[8], N); break;
        case 12: DataCopy(x, global<float>(C), N); break;
        case 13: Duplicate(y, 0.0f, 64); SetFlag<HardEvent::V_MTE3>(0);
                 WaitFlag<HardEvent::V_MTE3>(0); DataCopy(global<float>(A), y, 64); break;
        case 14: DataCopy(x, global<float>(A), 12); break;
        case 15: { Nd2NzParams nd; nd.srcDValue = 65536; } break;
        case 16: { DataCopyExtParams p; p.blockCount = 4096; } break;
        case 17: for (int i = 0; i < 16; ++i) CrossCoreSetFlag<2, PIPE_V>(0); break;
        case 18: CrossCoreSetFlag<2, PIPE_V>(11); break;
        case 19: x.SetValue(0, 1.0f); Exp(x, x, 1); break;
        case 20: DataCopy(x, global<float>(A), N); DataCopy(x, global<float>(B), N); break;
        case 21: UB(); break;
        case 22: Duplicate(x, 1.0f, N); SetFlag<HardEvent::V_MTE3>(0);
                 WaitFlag<HardEvent::V_MTE3>(0); DataCopy(global<float>(C), x, N);
                 PipeBarrier<PIPE_ALL>(); global<float>(C).GetValue(8); break;
        case 23: Duplicate(x, 0.0f, N); PipeBarrier<PIPE_V>(); Ln(x, x, N); break;
        case 24: DataCopy(x, global<float>(A)[N - 8], 16); break;
        case 25: Compares(x.ReinterpretCast<uint8_t>(), y, 0.0f, CMPMODE::GT, 32); break;
        case 26: Compares(x.ReinterpretCast<uint8_t>(), y, 0.0f, CMPMODE::LT, 64); break;
        case 27: Select(x, y.ReinterpretCast<uint8_t>(), x, 0.0f, SELMODE::VSEL_CMPMASK_SPR, 64);
                 break;
        case 28: { LocalTensor<half> z; Cast(z, x, RoundMode::CAST_NONE, N); } break;
        case 29: { MmadParams mm; mm.unitFlag = 4; } break;
        case 30: SetAtomicAdd<float>(); DataCopy(global<float>(C), y, 64); break;
        case 31: Brcb(x, y, 256, BrcbRepeatParams(1, 8)); break;
    }
}

// The same on the cube core.
void cube_rule() {
    if ASCEND_IS_AIV return;
    auto l1 = L1().Alloc<TPosition::A1, half>(1024);
    auto l0a = LocalMemAllocator<Hardware::L0A>().Alloc<TPosition::A2, half>(1024);
    auto l0b = LocalMemAllocator<Hardware::L0B>().Alloc<TPosition::B2, half>(1024);
    auto l0c = LocalMemAllocator<Hardware::L0C>().Alloc<TPosition::CO1, float>(1024);
    Nd2NzParams nd;
    nd.ndNum = 1; nd.nValue = 16; nd.dValue = 16; nd.srcDValue = 16; nd.dstNzC0Stride = 16;
    nd.dstNzNStride = 1;
    LoadData2DParams load;
    load.repeatTimes = 1;
    MmadParams mm;
    mm.m = 16; mm.n = 16; mm.k = 16;
    FixpipeParamsV220 fix;
    fix.nSize = 16; fix.mSize = 16; fix.srcStride = 16; fix.dstStride = 16;
    const auto c = global<float>(C);
    switch (omitted) {
        case 100: DataCopy(l0a, global<half>(A), nd); break;
        case 101: DataCopy(l1, global<half>(A), 16); break;
        case 102: LoadData(l1, l1, load); break;
        case 103: LoadData(l0a, l0b, load); break;
        case 104: Mmad(l0c, l0b, l0a, mm); break;
        case 105: Mmad(l1.ReinterpretCast<float>(), l0a, l0b, mm); break;
        case 106: Fixpipe<float, float, CFG_ROW_MAJOR>(c, l1.ReinterpretCast<float>(), fix); break;
        case 107: Duplicate(l0c, 0.0f, 16); break;
        case 108: l1.SetValue(0, twin::rounded<half>(0.0f)); break;
        case 109: LoadData(l0a[16], l1, load); break;
        case 110: load.repeatTimes = 256; break;
        case 111: mm.m = 1; Mmad(l0c, l0a, l0b, mm); break;
        case 112: fix.nSize = 8; Fixpipe<float, float, CFG_ROW_MAJOR>(c, l0c, fix); break;
        case 113: nd.dstNzC0Stride = 16385; break;
        case 114: UB(); break;
        case 115: { Nd2NzParams unset; DataCopy(l1, global<half>(A), unset); } break;
    }
}

// C = A where A > 0, else -1
void select() {
    UB ub;
    auto a = cut<TPosition::VECCALC, float>(ub, 64), c = cut<TPosition::VECCALC, float>(ub, 64);
    auto mask = cut<TPosition::VECCALC, uint8_t>(ub, 32);
    DataCopy(a, global<float>(A), 64);
    PipeBarrier<PIPE_ALL>();
    Compares(mask, a, 0.0f, CMPMODE::GT, 64);
    UNLESS(1) PipeBarrier<PIPE_V>();
    Select(c, mask, a, -1.0f, SELMODE::VSEL_TENSOR_SCALAR_MODE, 64);
    PipeBarrier<PIPE_ALL>();
    DataCopy(global<float>(C), c, 64);
}

// A kernel's first and last
void ends() {
    UNLESS(1) InitSocState();
    SetFlag<HardEvent::V_MTE3>(0);  // first
    UNLESS(2) PipeBarrier<PIPE_ALL>();
    WaitFlag<HardEvent::V_MTE3>(0);  // last
    UNLESS(2) UNLESS(3) PipeBarrier<PIPE_ALL>();
}

void run(const std::string& name, int omit, uintptr_t a, uintptr_t b, uintptr_t c) {
    omitted = omit;
    A = reinterpret_cast<uint8_t*>(a);
    B = reinterpret_cast<uint8_t*>(b);
    C = reinterpret_cast<uint8_t*>(c);
    twin::Machine machine;
    auto add = [&](const char* n, uint8_t* p, size_t bytes, bool output) {
        machine.global.emplace_back(n, p, bytes, twin::GLOBAL_CELL, !output, output);
    };
    struct Launch {
        void (*kernel)();
        int cores;
        bool mixed;
        int a = N * 4, b = N * 4, c = N * 4;  // bytes
    };
    constexpr int A_BYTES = M * K * 2, B_BYTES = K * COLUMNS * 2, C_BYTES = M * COLUMNS * 4;
    const std::map<std::string, Launch> launches = {
        {"sum", {sum, 1, false}},
        {"maths float", {maths<float>, 1, false}},
        {"maths half", {maths<half>, 1, false, N * 2, N * 2, N * 2}},
        {"everyone", {everyone, 4, false}},
        {"all", {all, 2, true}},
        {"product", {product<false>, 1, true, A_BYTES, B_BYTES, C_BYTES}},
        {"units", {units, 1, true, A_BYTES, B_BYTES, C_BYTES}},
        {"sums", {sums, 1, true, A_BYTES, B_BYTES, C_BYTES}},
        {"collect", {collect, 1, false}},
        {"accumulate", {accumulate, 1, true, A_BYTES, B_BYTES, C_BYTES}},
        {"exchange", {exchange, 1, true}},
        {"rule", {rule, 1, true}},
        {"cube rule", {cube_rule, 1, true}},
        {"ends", {ends, 1, true}},
        {"select", {select, 1, false}},
        {"pairs", {product<true>, 1, true, A_BYTES, B_BYTES, C_BYTES}},
    };
    const Launch& launch = launches.at(name);
    add("A", A, launch.a, false);
    add("B", B, launch.b, false);
    add("C", C, launch.c, true);
    twin::launch(machine, launch.cores, launch.mixed, [&launch] {
        if (launch.kernel == ends) return ends();
        InitSocState();
        launch.kernel();
        PipeBarrier<PIPE_ALL>();
    });
}

template <class T> void round(uintptr_t x, uintptr_t y, int n) {
    for (int i = 0; i < n; ++i) {
        reinterpret_cast<T*>(y)[i] = T::round(reinterpret_cast<const float*>(x)[i]);
    }
}
template <class T> void widen(uintptr_t x, uintptr_t y, int n) {
    for (int i = 0; i < n; ++i) {
        reinterpret_cast<float*>(y)[i] = static_cast<float>(reinterpret_cast<const T*>(x)[i]);
    }
}

PYBIND11_MODULE(rules, m) {
    twin::raise_faults();
    m.def("run", run);
    m.def("round_half", round<half>);
    m.def("round_bfloat16", round<bfloat16_t>);
    m.def("widen_half", widen<half>);
    m.def("widen_bfloat16", widen<bfloat16_t>);
}
"""


@pytest.fixture(scope="module")
def library():
    return built.module("rules", {"rules.cpp": KERNELS})


def run(library, name, omit=0, tensors=None):
    """The fault, or None."""
    a, b, c = tensors or (torch.ones(4096) / 4, torch.ones(4096) / 2, torch.empty(4096))
    try:
        library.run(name, omit, a.data_ptr(), b.data_ptr(), c.data_ptr())
    except TwinFault as fault:
        return str(fault)
    return None


def test_vector_arithmetic(library):
    a, b, c = torch.randn(1024), torch.randn(1024), torch.empty(1024)
    assert run(library, "sum", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, (a + b).exp())


def test_matrix_product_through_all_layouts(library):
    a, b, c = torch.randn(32, 48).half(), torch.randn(48, 80).half(), torch.empty(32, 80)
    assert run(library, "product", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, a.float() @ b.float())


def test_products_with_unit_flags(library):
    a, b, c = torch.randn(32, 48).half(), torch.randn(48, 80).half(), torch.empty(32, 80)
    assert run(library, "units", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, a.float() @ b.float())
    assert run(library, "accumulate") is None


def test_selection(library):
    a, c = torch.randn(1024), torch.empty(1024)
    assert run(library, "select", tensors=(a, a, c)) is None
    assert torch.equal(c[:64], torch.where(a > 0, a, -1)[:64])


def test_16_bit_elements_are_copied_in_pairs(library):
    a, b, c = torch.randn(32, 48).half(), torch.randn(48, 80).half(), torch.empty(32, 80)
    assert run(library, "pairs", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, a.float() @ b.float())


def test_a_kernel_begins_and_ends_as_it_must(library):
    assert run(library, "ends") is None


def test_all_cores_wait_for_all(library):
    a, c = torch.randn(1024), torch.zeros(1024)
    assert run(library, "everyone", tensors=(a, a, c)) is None
    assert torch.equal(c[:128], 2 * a[:128])
    assert run(library, "all") is None


def test_a_fault_says_in_which_sub_core_where_and_what(library):
    a, b, c = (torch.ones(4096) for _ in range(3))
    with pytest.raises(TwinFault) as raised:
        library.run("sum", 1, a.data_ptr(), b.data_ptr(), c.data_ptr())
    fault = raised.value
    assert (fault.lane, fault.file) == ("vector 0", "rules.cpp")
    assert f"{fault.file}:{fault.line}" == line_of("Add(a, a, b, N)")
    assert fault.rule.startswith("Add reads UB, written by DataCopy at rules.cpp")
    assert str(fault) == f"{fault.lane}: {fault.file}:{fault.line}: {fault.rule}"

    with pytest.raises(TwinFault) as raised:  # of all sub-cores
        library.run("exchange", 2, a.data_ptr(), b.data_ptr(), c.data_ptr())
    fault = raised.value
    assert (fault.lane, fault.file, fault.line) == ("", "", 0)
    assert fault.rule == str(fault)
    assert fault.rule.endswith("deadlock")


# In the order of the kernel's cases.
BINARY = (torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.minimum)
UNARY = (
    torch.exp,
    torch.log,
    torch.abs,
    torch.sqrt,
    torch.rsqrt,
    torch.reciprocal,
    lambda x: x + 0.5,
    lambda x: x * 0.5,
    lambda x: x.clamp(min=0.5),
    lambda x: x.clamp(max=0.5),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_vector_maths(library, dtype):
    kernel = {torch.float32: "maths float", torch.float16: "maths half"}[dtype]
    for omit, f in enumerate((*BINARY, *UNARY)):
        x, y, result = (torch.randn(1024).to(dtype) for _ in range(3))
        x = x.abs() if f in (torch.log, torch.sqrt, torch.rsqrt) else x
        assert run(library, kernel, omit, (x, y, result)) is None
        torch.testing.assert_close(result, f(x, y) if omit < len(BINARY) else f(x))


def test_half_widens_to_float_and_back(library):
    x, result = torch.randn(1024).half(), torch.zeros(1024).half()
    assert run(library, "maths half", len(BINARY) + len(UNARY), (x, x, result)) is None
    assert torch.equal(result, x)


def test_cores_exchange(library):
    a, c = torch.randn(1024), torch.empty(1024)
    assert run(library, "exchange", tensors=(a, a, c)) is None
    assert torch.equal(c, 2 * a)


def test_results_are_added_to_global_memory(library):
    a, b, c = torch.randn(32, 48).half(), torch.randn(48, 80).half(), torch.empty(32, 80)
    assert run(library, "sums", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, 2 * (a.float() @ b.float()))


def test_strided_elements_are_copied_into_blocks(library):
    a, c = torch.randn(1024), torch.empty(1024)
    assert run(library, "collect", tensors=(a, a, c)) is None
    assert torch.equal(c[:64], a[:128:2])


def line_of(text):
    """The only line of the kernels that begins with this, as a fault names it."""
    lines = [i for i, x in enumerate(KERNELS.splitlines(), 1) if x.strip().startswith(text)]
    assert len(lines) == 1
    return f"rules.cpp:{lines[0]}"


FIXPIPE_SUM = "Fixpipe<float, float, CFG_ROW_MAJOR>(sum"


@pytest.mark.parametrize(
    ("name", "omit", "line", "fault"),
    [
        ("sum", 1, "Add(a, a, b, N)", "reads UB, written by DataCopy at rules.cpp"),
        ("sum", 2, "Exp(a, a, N)", "reads UB, written by Add at rules.cpp"),
        ("sum", 3, "DataCopy(global<float>(C), a, N)", "reads UB, written by Exp"),
        ("everyone", 1, "DataCopy(x[PART], global", "reads C where nothing was written"),
        ("everyone", 2, "UNLESS(1) SyncAll();", "waits for SyncAll: deadlock"),
        ("everyone", 3, "if (mine == 0) DataCopy", "overwrites C, read by DataCopy"),
        ("all", 1, "DataCopy(x, global<half>(C), nd)", "reads C, written by DataCopy"),
        ("all", 2, "if (omitted == 2) SyncAll", "SyncAll of the vector cores, on a cube core"),
        ("accumulate", 4, "Mmad(c, a, b, mm);  // second", "reads L0C, written by Mmad"),
        ("sums", 4, FIXPIPE_SUM, "reads C where nothing was written"),
        ("sums", 5, FIXPIPE_SUM, "reads C, written by Fixpipe"),
        ("sums", 6, "SetAtomicAdd<float>();  // sums", "is still in force at the end"),
        ("collect", 1, "WholeReduceMax(packed", "reads UB where nothing was written"),
        ("units", 4, "Fixpipe<float, float, CFG_ROW_MAJOR>(u", "SetMMRowMajor()"),
        ("units", 5, "Fixpipe<float, float, CFG_ROW_MAJOR>(u", "for a product with unitFlag 3"),
        ("units", 6, "Mmad(c, a, b, mm);  // unit", "overwrites L0C, read by Fixpipe"),
        ("units", 7, "Fixpipe<float, float, CFG_ROW_MAJOR>(u", "reads L0C, written by Mmad"),
        ("units", 8, "Mmad(c, a, b, mm);  // unit", "waits until a Fixpipe with unitFlag takes"),
        ("units", 9, "Mmad(c, a, b, mm);  // unit", "unitFlag 3 is never taken"),
        ("product", 1, "LoadData(a2[row * K]", "reads L1, written by DataCopy"),
        ("product", 2, "Mmad(c, a, b, mm);  // product", "reads L0A where nothing was written"),
        ("product", 3, "Fixpipe<float, float, CFG_ROW_MAJOR>(g", "reads L0C, written by Mmad"),
        ("exchange", 1, "DataCopy(a, global<float>(C)[other]", "reads C where nothing was written"),
        ("exchange", 2, "UNLESS(4) CrossCoreWaitFlag(1)", "deadlock"),
        ("exchange", 3, "DataCopy(a, global<float>(C)[other]", "reads C, written by DataCopy"),
        ("exchange", 4, "DataCopy(a, global<float>(C)[other]", "reads C"),
        ("ends", 1, "SetFlag<HardEvent::V_MTE3>(0);  // first", "before InitSocState()"),
        ("ends", 2, "WaitFlag<HardEvent::V_MTE3>(0);  // last", "a PipeBarrier<PIPE_ALL> must be"),
        ("ends", 3, "WaitFlag<HardEvent::V_MTE3>(0);  // last", "a PipeBarrier<PIPE_ALL> must be"),
        ("select", 1, "Select(c, mask, a", "reads UB, written by Compares"),
    ],
)
def test_missing_synchronisation(library, name, omit, line, fault):
    found = run(library, name, omit)
    assert found is not None
    assert line_of(line) in found
    assert fault in found


@pytest.mark.parametrize(
    ("omit", "fault"),
    [
        *enumerate(
            [
                "runs past the end of its buffer in UB by 4 bytes",
                "UB has 188160 bytes, and the buffers need",
                "this sub-core has no such memory",
                "starts in UB at byte 4, not a multiple of 32",
                "reads UB where nothing was written",
                "source and destination overlap in part",
                "repeats 1 to 255 times",
                "256 does not fit a field of 0 to 255",
                "V_MTE3 flag 6: a kernel has 0 to 5",
                "V_MTE3 flag 0 is set again",
                "is waited for, and nothing has set it",
                "runs past the end of A",
                "reads C where nothing was written",
                "writes A, an input",
                "48 bytes are not whole blocks of 32",
                "65536 does not fit a field of 0 to 65535",
                "4096 does not fit a field of 0 to 4095",
                "set more than 15 times ahead",
                "cross-core flag 11: a kernel has 0 to 10",
                "reads UB, written by SetValue",
                "overwrites UB, written by DataCopy",
                "a second allocator for UB",
                "through the cache of the scalar unit, which does not see what DataCopy at",
                "Ln of 0, which has two answers",
                "runs past the end of A",
                "Compares: 32 numbers are not whole repeats",
                "the twin knows CMPMODE::GT alone",
                "the twin selects between a tensor and a scalar",
                "Cast rounds with CAST_RINT, and widens with CAST_NONE",
                "4 does not fit a field of 0 to 3",
                "the twin adds out of L0C alone",
                "Brcb: repeats 1 to 255 times",
            ]
        ),
        *enumerate(
            [
                "a tensor in L0A, which this instruction cannot reach",
                "a tensor in L1, which this instruction cannot reach",
                "LoadData fills L0A or L0B, not L1",
                "a tensor in L0B, which this instruction cannot reach",
                "a tensor in L0B, which this instruction cannot reach",
                "a tensor in L1, which this instruction cannot reach",
                "a tensor in L1, which this instruction cannot reach",
                "a tensor in L0C, which this instruction cannot reach",
                "the scalar unit reaches UB alone",
                "starts in L0A at byte 32, not a multiple of 512",
                "256 does not fit a field of 0 to 255",
                "m = 1 takes the operand as a vector",
                "nSize must be a multiple of 16",
                "16385 does not fit a field of 0 to 16384",
                "this sub-core has no such memory",
                "dstNzC0Stride and dstNzNStride are 1 at least, and 0 unless set",
            ],
            100,
        ),
    ],
)
def test_rules(library, omit, fault):
    found = run(library, "rule" if omit < 100 else "cube rule", omit)
    assert found is not None
    assert fault in found
    line = int(line_of(f"case {omit}:").split(":")[1])
    assert any(f"rules.cpp:{at}:" in found for at in (line, line + 1, line + 2))


STATEMENTS = {
    "": None,
    "LocalTensor<bfloat16_t> x; Exp(x, x, 16);": "Exp computes in float and half alone",
    "LocalTensor<bfloat16_t> x; Add(x, x, x, 16);": "Add computes in float and half alone",
    "LocalTensor<int32_t> x; Muls(x, x, 2, 16);": "Muls computes in float and half alone",
    "LocalTensor<half> h; LocalTensor<bfloat16_t> b; Cast(b, h, RoundMode::CAST_RINT, 16);": (
        "Cast is from or to float alone"
    ),
    "LocalTensor<half> x; Mmad(x, x, x, MmadParams{});": "the cube adds up in float",
    "LocalTensor<float> x; Mmad(x, x, x, MmadParams{});": "the twin multiplies half and",
    "CrossCoreSetFlag<2, PIPE_S>(0);": "the flag must follow a pipe of data",
    "CrossCoreSetFlag<2, PIPE_ALL>(0);": "the flag must follow a pipe of data",
    "PipeBarrier<PIPE_S>();": "the scalar unit has no barrier",
    "SetAtomicAdd<half>();": "the twin adds float alone",
    "AscendC::QuantMode_t::F322F16;": "has not been declared",
    "TPipe pipe;": "was not declared",
    "LocalMemAllocator<Hardware::UB> ub; ub.Alloc<TPosition::A1, half>(1);": "another memory",
}
KERNEL = '#include "kernel_operator.h"\nusing namespace AscendC;\nvoid kernel() {{ {} }}\n'


@pytest.fixture(scope="module")
def refused():
    """What the compiler says to each statement that it does not take."""
    sources = {f"refused/{i}.cpp": KERNEL.format(x) for i, x in enumerate(STATEMENTS)}
    built.write({**sources, "refused/interface.cpp": '#include "../host/launch.h"\n'})
    with pytest.raises(build.BuildError) as error:
        built.target("refused")
    found = re.findall(r"^FAILED: .*?/(\w+)\.cpp\.o(.*?)(?=^\[|\Z)", str(error.value), re.M | re.S)
    names = {str(i): statement for i, statement in enumerate(STATEMENTS)}
    return {names.get(name, name): said for name, said in found}


@pytest.mark.parametrize(("statement", "message"), STATEMENTS.items())
def test_types_reject_what_the_hardware_lacks(refused, statement, message):
    assert (statement in refused) == (message is not None)
    assert message is None or message in refused[statement]


def test_the_interface_of_the_kernels_needs_neither_torch_nor_cann(refused):
    assert "interface" not in refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_numbers_round_as_torch(library, dtype):
    name = {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    narrow = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    getattr(library, f"widen_{name}")(narrow.data_ptr(), wide.data_ptr(), 2**16)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)

    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    between = (wide[:-1] + wide[1:]) / 2  # ties
    x = torch.cat([bits.to(torch.int32).view(torch.float32), between, wide]).contiguous()
    rounded = torch.empty(len(x), dtype=dtype)
    getattr(library, f"round_{name}")(x.data_ptr(), rounded.data_ptr(), len(x))
    torch.testing.assert_close(rounded, x.to(dtype), rtol=0, atol=0, equal_nan=True)
