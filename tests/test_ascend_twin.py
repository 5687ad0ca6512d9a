"""The host twin computes what the accelerator would, and rejects what the hardware does not allow.

Small kernels, each with its one fault: it must be found although the numbers may come out right.
"""

import ctypes
import shutil
import subprocess

import pytest
import torch

from csrc.twin.launch import FLAGS, TWIN

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)

# Sound kernels; `UNLESS(i)` leaves its line out where i is the fault that is asked for.
KERNELS = """
#include "kernel_operator.h"
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
template <TPosition P, class T> LocalTensor<T> cut(TPipe& pipe, uint32_t elements) {
    TBuf<P> buffer;
    pipe.InitBuffer(buffer, elements * sizeof(T));
    return buffer.template Get<T>();
}

// C = exp(A + B), by one vector core
void sum() {
    TPipe pipe;
    auto a = cut<TPosition::VECIN, float>(pipe, N), b = cut<TPosition::VECIN, float>(pipe, N);
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

// C[M, COLUMNS] = A[M, K] B[K, COLUMNS] in half, by the cube; vector cores do nothing
void product() {
    if ASCEND_IS_AIV return;
    TPipe pipe;
    auto a1 = cut<TPosition::A1, half>(pipe, M * K), a2 = cut<TPosition::A2, half>(pipe, M * K);
    auto b1 = cut<TPosition::B1, half>(pipe, K * COLUMNS);
    auto b2 = cut<TPosition::B2, half>(pipe, K * COLUMNS);
    auto c = cut<TPosition::CO1, float>(pipe, M * COLUMNS);
    pipe.Destroy();
    Nd2NzParams nd;
    nd.ndNum = 1; nd.nValue = M; nd.dValue = K; nd.srcDValue = K;
    nd.dstNzC0Stride = M; nd.dstNzNStride = 1;
    DataCopy(a1, global<half>(A), nd);
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
    MmadParams mm;
    mm.m = M; mm.n = COLUMNS; mm.k = K;
    Mmad(c, a2, b2, mm);
    UNLESS(3) SetFlag<HardEvent::M_FIX>(0);
    UNLESS(3) WaitFlag<HardEvent::M_FIX>(0);
    FixpipeParamsV220 fix;
    fix.nSize = COLUMNS; fix.mSize = M; fix.srcStride = M; fix.dstStride = COLUMNS;
    Fixpipe<float, float, CFG_ROW_MAJOR>(global<float>(C), c, fix);
}

// The two vector cores double A and the cube copies nothing: it waits for both, then tells them.
void exchange() {
    if ASCEND_IS_AIC {
        UNLESS(1) CrossCoreWaitFlag(0);
        UNLESS(2) CrossCoreSetFlag<2, PIPE_FIX>(1);
        return;
    }
    TPipe pipe;
    const int part = N / 2, mine = GetSubBlockIdx() * part, other = part - mine;
    auto a = cut<TPosition::VECCALC, float>(pipe, part);
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
    TPipe pipe;
    auto x = cut<TPosition::VECCALC, float>(pipe, N), y = cut<TPosition::VECCALC, float>(pipe, 64);
    switch (omitted) {
        case 0: Duplicate(x, 0.0f, N + 1); break;
        case 1: { TBuf<TPosition::VECCALC> large; pipe.InitBuffer(large, 190 * 1024); } break;
        case 2: { TBuf<TPosition::A1> l1; pipe.InitBuffer(l1, 32); } break;
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
    }
}

void trap() {  // flag 0 of M_MTE1 is the pipe's until Destroy()
    TPipe pipe;
    if ASCEND_IS_AIC SetFlag<HardEvent::M_MTE1>(0);
}

extern "C" int run(const char* name, int omit, uint8_t* a, uint8_t* b, uint8_t* c, char* report) {
    omitted = omit; A = a; B = b; C = c;
    const std::string kernel = name;
    twin::Machine machine;
    auto add = [&](const char* n, uint8_t* p, size_t bytes, bool output) {
        machine.global.emplace_back(n, p, bytes, twin::GLOBAL_CELL, !output, output);
    };
    add("A", a, kernel == "product" ? M * K * 2 : N * 4, false);
    add("B", b, kernel == "product" ? K * COLUMNS * 2 : N * 4, false);
    add("C", c, kernel == "product" ? M * COLUMNS * 4 : N * 4, true);
    try {
        const bool alone = kernel == "sum";
        twin::launch(machine, 1, !alone, kernel == "sum" ? sum : kernel == "product" ? product
                     : kernel == "exchange" ? exchange : kernel == "rule" ? rule : trap);
        return 0;
    } catch (const twin::Fault& fault) {
        std::snprintf(report, 1000, "%s", fault.what());
        return 1;
    }
}

extern "C" void round_half(const float* x, half* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = half::round(x[i]);
}
extern "C" void round_bfloat16(const float* x, bfloat16_t* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = bfloat16_t::round(x[i]);
}
extern "C" void widen_half(const half* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = static_cast<float>(x[i]);
}
extern "C" void widen_bfloat16(const bfloat16_t* x, float* y, int n) {
    for (int i = 0; i < n; ++i) y[i] = static_cast<float>(x[i]);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    (folder / "kernels.cpp").write_text(KERNELS)
    command = ["g++", *FLAGS, "-O1", f"-I{TWIN}", "-shared", "kernels.cpp", "-o", "kernels.so"]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "kernels.so"))


def pointer(x):
    return ctypes.c_void_p(x.data_ptr())


def run(library, name, omit=0, tensors=None):
    """The fault, or None."""
    a, b, c = tensors or (torch.ones(4096) / 4, torch.ones(4096) / 2, torch.empty(4096))
    report = ctypes.create_string_buffer(1000)
    failed = library.run(name.encode(), omit, pointer(a), pointer(b), pointer(c), report)
    return report.value.decode() if failed else None


def test_vector_arithmetic(library):
    a, b, c = torch.randn(1024), torch.randn(1024), torch.empty(1024)
    assert run(library, "sum", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, (a + b).exp())


def test_matrix_product_through_all_layouts(library):
    a, b, c = torch.randn(32, 48).half(), torch.randn(48, 80).half(), torch.empty(32, 80)
    assert run(library, "product", tensors=(a, b, c)) is None
    torch.testing.assert_close(c, a.float() @ b.float())


def test_cores_exchange(library):
    a, c = torch.randn(1024), torch.empty(1024)
    assert run(library, "exchange", tensors=(a, a, c)) is None
    assert torch.equal(c, 2 * a)


def line_of(text):
    """The only line of the kernels that begins with this, as a fault names it."""
    lines = [i for i, x in enumerate(KERNELS.splitlines(), 1) if x.strip().startswith(text)]
    assert len(lines) == 1
    return f"kernels.cpp:{lines[0]}"


@pytest.mark.parametrize(
    ("name", "omit", "line", "fault"),
    [
        ("sum", 1, "Add(a, a, b, N)", "reads UB, written by DataCopy at kernels.cpp"),
        ("sum", 2, "Exp(a, a, N)", "reads UB, written by Add at kernels.cpp"),
        ("sum", 3, "DataCopy(global<float>(C), a, N)", "reads UB, written by Exp"),
        ("product", 1, "LoadData(a2[row * K]", "reads L1, written by DataCopy"),
        ("product", 2, "Mmad(c, a2, b2, mm)", "reads L0A where nothing was written"),
        ("product", 3, "Fixpipe<float, float", "reads L0C, written by Mmad"),
        ("exchange", 1, "DataCopy(a, global<float>(C)[other]", "reads C where nothing was written"),
        ("exchange", 2, "UNLESS(4) CrossCoreWaitFlag(1)", "deadlock"),
        ("exchange", 3, "DataCopy(a, global<float>(C)[other]", "reads C, written by DataCopy"),
        ("exchange", 4, "DataCopy(a, global<float>(C)[other]", "reads C"),
        ("trap", 0, "if ASCEND_IS_AIC SetFlag", "M_MTE1 flag 0 is set again"),
    ],
)
def test_missing_synchronisation(library, name, omit, line, fault):
    found = run(library, name, omit)
    assert found is not None
    assert line_of(line) in found
    assert fault in found


@pytest.mark.parametrize(
    ("omit", "fault"),
    list(
        enumerate(
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
                "65536 does not fit a field of 1 to 65535",
                "4096 does not fit a field of 0 to 4095",
                "set more than 15 times ahead",
                "cross-core flag 11: a kernel has 0 to 10",
                "reads UB, written by SetValue",
                "overwrites UB, written by DataCopy",
            ]
        ),
    ),
)
def test_rules(library, omit, fault):
    found = run(library, "rule", omit)
    assert found is not None
    assert fault in found
    line = int(line_of(f"case {omit}:").split(":")[1])
    assert any(f"kernels.cpp:{at}:" in found for at in (line, line + 1))


@pytest.mark.parametrize(
    "statement",
    [
        "LocalTensor<bfloat16_t> x; Exp(x, x, 16);",
        "LocalTensor<bfloat16_t> x; Add(x, x, x, 16);",
        "LocalTensor<half> x; Mmad(x, x, x, MmadParams{});",
        "CrossCoreSetFlag<2, PIPE_S>(0);",
        "PipeBarrier<PIPE_S>();",
    ],
)
def test_types_reject_what_the_hardware_lacks(tmp_path, statement):
    source = tmp_path / "kernel.cpp"
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{TWIN}", str(source)]
    for text, compiles in (("", True), (statement, False)):
        source.write_text(
            f'#include "kernel_operator.h"\nusing namespace AscendC;\nvoid kernel() {{ {text} }}'
        )
        assert (subprocess.run(command, capture_output=True).returncode == 0) == compiles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_numbers_round_as_torch(library, dtype):
    name = {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    narrow = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**16)
    getattr(library, f"widen_{name}")(pointer(narrow), pointer(wide), 2**16)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)

    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    between = (wide[:-1] + wide[1:]) / 2  # ties
    x = torch.cat([bits.to(torch.int32).view(torch.float32), between, wide]).contiguous()
    rounded = torch.empty(len(x), dtype=dtype)
    getattr(library, f"round_{name}")(pointer(x), pointer(rounded), len(x))
    torch.testing.assert_close(rounded, x.to(dtype), rtol=0, atol=0, equal_nan=True)
