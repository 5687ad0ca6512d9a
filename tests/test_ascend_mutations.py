"""Every fault planted in a copy of the forward kernels is found by the host twin, at its line.

But for a few that break no rule of the hardware, and only make the answer wrong: those do.
"""

from dataclasses import replace
from functools import cache

import built
import pytest
import torch
from mutations import Mutation, Sources, handshake

from csrc.twin import launch
from csrc.twin.fault import TwinFault
from skiparse import SkipPattern
from skiparse.backends import Inputs
from skiparse.testing import WAYS, make_problem, oracle, within_budget

built.require_tools(allow_module_level=True)

SOURCES = Sources("rows.h", "products.h", "rowwise.h", "attention_fwd.cpp", "key_bias.cpp")

LOAD_KEY = "p.srcStride = 1; AscendC::LoadData(to, from, p);"
LOAD_KEYS = "products_.LoadTransposedRight(key, KEY_ROWS, dim_);"
GIVE_KEYS = "SetFlag<HardEvent::MTE1_MTE2>(KEY + slot);"
SCORES_OF_TILE = """products_.LoadTransposedRight(key, KEY_ROWS, dim_);
            for (int32_t half = 0; OfHalf(whole_rows, half) > 0; ++half) {
                const int64_t rows = OfHalf(whole_rows, half);
                products_.LoadLeft(query, whole_rows, half * HALF_ROWS, rows, 0, dim_);
                products_.Multiply(half, rows, KEY_ROWS, dim_, true);
                products_.GiveLeft();
                const int64_t row = tile * QUERY_ROWS + half * HALF_ROWS;
                products_.Write(ring_.template Scores<S>(i)[row * KEY_ROWS], half, rows, KEY_ROWS,
                                KEY_ROWS);
            }
"""
STORE_WEIGHTS = "DataCopy(ring_.template Weights<T>(i)[(2 * row + panel % 2) * PANEL], weights, p);"
LOAD_SCORES = "DataCopy(scores, ring_.template Scores<S>(i)[first * PANEL], in);"
LOAD_VALUES = "DataCopy(values, ring_.Values(i)[(half_ * HALF_ROWS + row) * dim_], count);"
COPY_ROWS = "p.srcDValue = stride; AscendC::DataCopy(to, from, p);"
FILL_ROWS = "AscendC::DataCopy(to, row, p);"
SCATTER = "AscendC::DataCopyPad(to.base"
FIXPIPE = "AscendC::Fixpipe<U, float, AscendC::CFG_ROW_MAJOR>(to"
GIVE_PRODUCT = "p); AscendC::SetFlag<HardEvent::FIX_M>(slot);"
MMAD = "AscendC::Mmad(product_"
LOAD_LEFT = "AscendC::LoadData(to[i * columns], from, p);"

MUTATIONS = (
    # Flags between the pipes of a core.
    Mutation(
        "dropped flag MTE2_MTE1",
        handshake("MTE2_MTE1", "KEY + slot"),
        "LoadData reads L1, written by DataCopy at rows.h",
        LOAD_KEY,
    ),
    Mutation(
        "dropped flag MTE1_M",
        handshake("MTE1_M", "LEFT + left_slot_", "AscendC::"),
        "Mmad reads L0A, written by LoadData at products.h",
        MMAD,
    ),
    Mutation(
        "dropped flag M_FIX",
        handshake("M_FIX", "slot", "AscendC::"),
        "Fixpipe reads L0C, written by Mmad at products.h",
        FIXPIPE,
    ),
    Mutation(
        "dropped flag MTE2_V",
        LOAD_SCORES + handshake("MTE2_V", "SCORE + slot"),
        "Muls reads UB, written by DataCopy at attention_fwd.cpp",
        "Muls(x, x, t_.scale",
        new=LOAD_SCORES,
    ),
    Mutation(
        "dropped flag V_MTE3",
        handshake("V_MTE3", "WEIGHT + slot"),
        "DataCopy reads UB, written by Cast at attention_fwd.cpp",
        STORE_WEIGHTS,
    ),
    Mutation(
        "dropped flag V_MTE3 before a scatter",
        handshake("V_MTE3", "LSE"),
        "DataCopyPad reads UB, written by Brcb at rowwise.h",
        SCATTER,
    ),
    Mutation(
        "dropped flag S_MTE3",
        handshake("S_MTE3", "0"),
        "DataCopy reads UB, written by SetValue at key_bias.cpp",
        "DataCopy(At<float>(bias",
    ),
    Mutation(
        "flag from the wrong pipe",
        handshake("V_MTE3", "WEIGHT"),
        "DataCopyPad reads UB, written by Cast at attention_fwd.cpp",
        SCATTER,
        new=handshake("S_MTE3", "WEIGHT"),
    ),
    Mutation(
        "flag set before the load that it follows",
        f"{SCORES_OF_TILE} {GIVE_KEYS}",
        "DataCopy overwrites L1, read by LoadData at products.h",
        COPY_ROWS,
        new=f"{GIVE_KEYS} {SCORES_OF_TILE}",
        case="stacks",
    ),
    Mutation(
        "flag set before the cast that it follows",
        "Cast(weights, x, RoundMode::CAST_RINT, size);"
        " if constexpr (!HALF_SCORES) SetFlag<HardEvent::V_MTE2>(SCORE + slot);",
        "DataCopy overwrites UB, read by Cast at attention_fwd.cpp",
        LOAD_SCORES,
        new="SetFlag<HardEvent::V_MTE2>(SCORE + slot);"
        " Cast(weights, x, RoundMode::CAST_RINT, size);",
    ),
    Mutation(
        "double set",
        "dim_); } } SetFlag<HardEvent::MTE1_MTE2>(VALUE + slot);",
        "MTE1_MTE2 flag 2 is set again; nothing waited since attention_fwd.cpp",
        new="dim_);\n}\n}\n" + 2 * "SetFlag<HardEvent::MTE1_MTE2>(VALUE + slot);",
    ),
    Mutation(
        "dropped wait",
        "if (from_zero) AscendC::WaitFlag<HardEvent::FIX_M>(slot);",
        "FIX_M flag 0 is set again",
        GIVE_PRODUCT,
    ),
    Mutation(
        "dropped set",
        "SetFlag<HardEvent::MTE3_V>(LSE); Duplicate(",
        "MTE3_V flag 2 is waited for, and nothing has set it",
        "PipeBarrier<PIPE_V>(); WaitFlag<HardEvent::MTE3_V>(LSE);",
        new="Duplicate(",
    ),
    Mutation(
        "leaked flag of the cube",
        "(RIGHT + slot); AscendC::WaitFlag<HardEvent::FIX_M>(slot);",
        "FIX_M flag 0 is left set at the end",
        GIVE_PRODUCT,
        new="(RIGHT + slot);",
    ),
    Mutation(
        "leaked flag of a vector core",
        "WaitFlag<HardEvent::MTE3_V>(LSE); } private:",
        "MTE3_V flag 2 is left set at the end",
        "rows); SetFlag<HardEvent::MTE3_V>(LSE);",
        new="} private:",
    ),
    Mutation(
        "leaked flag of the bias kernel",
        "} WaitFlag<HardEvent::MTE3_S>(0); }",
        "MTE3_S flag 0 is left set at the end",
        "DataCopy(At<float>(bias, i * STACK_KEYS), row, STACK_KEYS);"
        " SetFlag<HardEvent::MTE3_S>(0);",
        new="} }",
    ),
    Mutation(
        "pipe of the whole kernel, missing Destroy()",
        "const Ring ring{arguments.workspace + core * WORKSPACE_BYTES};",
        "M_MTE1 flag 0 is set again; nothing waited since attention_fwd.cpp",
        "dim_(tiling.head_dim) { TPipe pipe;",
        new="const Ring ring{arguments.workspace + core * WORKSPACE_BYTES}; TPipe pipe;",
    ),
    Mutation(
        "flag of the framework",
        "SCORE = 0, BIAS = 2, WEIGHT = 0, LSE = 2;",
        "MTE3_V flag 6: a kernel has 0 to 5",
        "} SetFlag<HardEvent::MTE3_V>(LSE);",
        new="SCORE = 0, BIAS = 2, WEIGHT = 0, LSE = 6;",
    ),
    # Barriers within a pipe.
    Mutation(
        "dropped PIPE_V before a reduction",
        "PipeBarrier<PIPE_V>(); ReducePanels<Reduction::SUM>(",
        "Add reads UB, written by Exp at attention_fwd.cpp",
        "AscendC::Add(to, a, b, count);",
        new="ReducePanels<Reduction::SUM>(",
    ),
    Mutation(
        "dropped PIPE_V before a broadcast",
        "AscendC::BrcbRepeatParams(1, BLOCK)); AscendC::PipeBarrier<PIPE_V>();",
        "Sub reads UB, written by Brcb at rowwise.h",
        "AscendC::Sub(part",
        new="AscendC::BrcbRepeatParams(1, BLOCK));",
    ),
    Mutation(
        "dropped PIPE_M before a short product",
        "if (!from_zero && p.m / 16 * (p.n / 16) < 10) AscendC::PipeBarrier<PIPE_M>();",
        "Mmad reads L0C, written by Mmad at products.h",
        MMAD,
        case="text",
    ),
    # The cores with each other.
    Mutation(
        "dropped wait for scores",
        "CrossCoreWaitFlag(SCORES_READY);",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_SCORES,
    ),
    Mutation(
        "dropped wait for weights",
        "CrossCoreWaitFlag(WEIGHTS_READY);",
        "DataCopy reads workspace where nothing was written",
        COPY_ROWS,
    ),
    Mutation(
        "dropped wait for values",
        "CrossCoreWaitFlag(VALUES_READY);",
        "DataCopy reads workspace where nothing was written",
        LOAD_VALUES,
    ),
    Mutation(
        "dropped cross-core set",
        "CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);",
        "vector 0 waits for cross-core flag 0",
        "CrossCoreWaitFlag(SCORES_READY);",
    ),
    Mutation(
        "cross-core set by one of two vector cores",
        "CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);",
        "cube waits for cross-core flag 1",
        "CrossCoreWaitFlag(WEIGHTS_READY);",
        new="if (rows > 0) CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);",
        case="text",
    ),
    Mutation(
        "double cross-core set",
        "CrossCoreSetFlag<2, PIPE_FIX>(VALUES_READY);",
        "cross-core flag 2 is left set at the end",
        new=2 * "CrossCoreSetFlag<2, PIPE_FIX>(VALUES_READY);",
        case="one stack",
    ),
    Mutation(
        "cross-core flag ahead of its data",
        "CrossCoreSetFlag<2, PIPE_FIX>(VALUES_READY);",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_VALUES,
        new=2 * "CrossCoreSetFlag<2, PIPE_FIX>(VALUES_READY);",
    ),
    Mutation(
        "overflown cross-core counter",
        "CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);",
        "cross-core flag 0 is set more than 15 times ahead",
        new="for (int i = 0; i < 16; ++i) CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);",
    ),
    Mutation(
        "cross-core flag of SyncAll",
        "SCORES_READY = 0, WEIGHTS_READY = 1, VALUES_READY = 2;",
        "cross-core flag 11: a kernel has 0 to 10",
        "CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);",
        new="SCORES_READY = 11, WEIGHTS_READY = 1, VALUES_READY = 2;",
    ),
    Mutation(
        "cross-core flag from the wrong pipe of a vector core",
        "CrossCoreSetFlag<2, PIPE_MTE3>(WEIGHTS_READY);",
        "DataCopy reads workspace, written by DataCopy at attention_fwd.cpp",
        COPY_ROWS,
        new="CrossCoreSetFlag<2, PIPE_V>(WEIGHTS_READY);",
    ),
    Mutation(
        "cross-core flag from the wrong pipe of the cube",
        "CrossCoreSetFlag<2, PIPE_FIX>(SCORES_READY);",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_SCORES,
        new="CrossCoreSetFlag<2, PIPE_M>(SCORES_READY);",
    ),
    Mutation(
        "workspace shared by the cores",
        "arguments.workspace + core * WORKSPACE_BYTES",
        "Fixpipe overwrites workspace, read by DataCopy at attention_fwd.cpp",
        FIXPIPE,
        new="arguments.workspace",
        case="cores",
    ),
    Mutation(
        "bias rows shared by the cores",
        "i += GetBlockNum()",
        "DataCopy overwrites bias, written by DataCopy at key_bias.cpp",
        "DataCopy(At<float>(bias",
        new="i += 1",
        case="cores",
    ),
    # Slots and rings.
    Mutation(
        "key tile in a slot still being read",
        "key_[slot * KEY_ROWS * dim_]",
        "DataCopy overwrites L1, read by LoadData at products.h",
        COPY_ROWS,
        new="key_[0]",
    ),
    Mutation(
        "right operand in a slot still being read",
        "return right_[right_slot_ * SLOT];",
        "LoadData overwrites L0B, read by Mmad at products.h",
        LOAD_KEY,
        new="return right_[0];",
    ),
    Mutation(
        "left operand in a slot still being read",
        "return left_[left_slot_ * SLOT];",
        "LoadData overwrites L0A, read by Mmad at products.h",
        LOAD_LEFT,
        new="return left_[0];",
    ),
    Mutation(
        "accumulator in a slot still being read",
        "Mmad(product_[slot * SLOT],",
        "Mmad overwrites L0C, read by Fixpipe at products.h",
        MMAD,
        new="Mmad(product_[0],",
    ),
    Mutation(
        "weights in a slot still being written",
        "const LocalTensor<T> weights = weights_[slot * CHUNK];",
        "Max overwrites UB, read by DataCopy at attention_fwd.cpp",
        "AscendC::Max(to, a, b, count);",
        new="const LocalTensor<T> weights = weights_;",
    ),
    Mutation(
        "ring of two stacks, with scores two ahead",
        "At<S>(base + i % RING * SCORES_BYTES, 0)",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_SCORES,
        new="At<S>(base + i % 2 * SCORES_BYTES, 0)",
        case="stacks",
    ),
    Mutation(
        "ring reversed for the reader",
        "DataCopy(scores, ring_.template Scores<S>(i)[first * PANEL], in);",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_SCORES,
        new="DataCopy(scores, ring_.template Scores<S>(RING - i % RING)[first * PANEL], in);",
        case="stacks",
    ),
    Mutation(
        "ring of one task for the totals",
        "const int64_t ring = walk.number % RING * HALF_ROWS; WriteOut(",
        new="const int64_t ring = 0; WriteOut(",
        case="stacks",
    ),
    # Places and sizes.
    Mutation(
        "misaligned UB",
        "const LocalTensor<S> scores = scores_[slot * CHUNK];",
        "starts in UB at byte 16, not a multiple of 32",
        LOAD_SCORES,
        new="const LocalTensor<S> scores = scores_[slot * CHUNK + 4];",
    ),
    Mutation(
        "misaligned L1",
        "query_[walk.number % 2 * QUERY_ROWS * dim_]",
        "starts in L1 at byte 16, not a multiple of 32",
        COPY_ROWS,
        new="query_[walk.number % 2 * QUERY_ROWS * dim_ + 8]",
    ),
    Mutation(
        "misaligned L0A",
        "return left_[left_slot_ * SLOT];",
        "starts in L0A at byte 32, not a multiple of 512",
        LOAD_LEFT,
        new="return left_[left_slot_ * SLOT + 16];",
    ),
    Mutation(
        "misaligned L0C",
        "Mmad(product_[slot * SLOT],",
        "starts in L0C at byte 512, not a multiple of 1024",
        new="Mmad(product_[slot * SLOT + 128],",
    ),
    Mutation(
        "too many buffers for UB",
        "scores_ = Cut<TPosition::VECCALC, S>(pipe, 2 * CHUNK);",
        "UB has 188160 bytes, and the buffers need",
        "pipe.InitBuffer(buffer, elements * sizeof(T));",
        new="scores_ = Cut<TPosition::VECCALC, S>(pipe, 4 * CHUNK);",
    ),
    Mutation(
        "too many buffers for L0B",
        "Cut<AscendC::TPosition::B2, T>(pipe, 2 * SLOT);",
        "L0B has 65536 bytes, and the buffers need 98304",
        "pipe.InitBuffer(buffer, elements * sizeof(T));",
        new="Cut<AscendC::TPosition::B2, T>(pipe, 3 * SLOT);",
    ),
    Mutation(
        "overflown buffer in UB",
        "wide_lse_ = Cut<TPosition::VECCALC, float>(pipe, HALF_ROWS * BLOCK);",
        "runs past the end of its buffer in UB by 32 bytes",
        "AscendC::Brcb(to, from, count / BLOCK",
        new="wide_lse_ = Cut<TPosition::VECCALC, float>(pipe, HALF_ROWS * BLOCK / 2);",
    ),
    Mutation(
        "overflown buffer in L0C",
        "Cut<AscendC::TPosition::CO1, float>(pipe, 2 * SLOT);",
        "runs past the end of its buffer in L0C",
        MMAD,
        new="Cut<AscendC::TPosition::CO1, float>(pipe, SLOT);",
    ),
    Mutation(
        "overflown buffer of the scalar unit",
        "STACK_KEYS * sizeof(float)",
        "runs past the end of its buffer in UB by 4 bytes",
        "row.SetValue(key",
        new="STACK_KEYS",
    ),
    Mutation(
        "past the end of the workspace",
        "arguments.workspace + core * WORKSPACE_BYTES",
        "outside every allocation of global memory",
        FIXPIPE,
        new="arguments.workspace + (core + 1) * WORKSPACE_BYTES",
    ),
    Mutation(
        "past the end of an input",
        "FillRows(to[count * C0], rows, last,",
        "runs past the end of k",
        FILL_ROWS,
        new="FillRows(to[count * C0], rows, last[C0],",
        case="one stack",
    ),
    # Fields of instructions.
    Mutation(
        "overflown 16-bit stride between rows",
        "return stride >= 1 && stride <= MOST_STRIDE;",
        "70000 does not fit a field of 0 to 65535",
        "p.srcDValue = stride;",
        new="return stride >= 1;",
        case="far rows",
    ),
    Mutation(
        "overflown 16-bit stride between runs",
        "if (FitsStride(apart) && FitsStride(from.stride))",
        "120000 does not fit a field of 0 to 65535",
        "p.srcNdMatrixStride = apart;",
        new="if (FitsStride(from.stride))",
        case="far runs",
    ),
    Mutation(
        "overflown 8-bit stride",
        "p(1, 1, 0, PANEL / BLOCK, PANEL / BLOCK, 1);",
        "256 does not fit a field of 0 to 255",
        new="p(1, 1, 0, 2 * PANEL, 2 * PANEL, 1);",
    ),
    Mutation(
        "product of one row",
        "p.m = RoundUp(rows, 16);",
        "m = 1 takes the operand as a vector",
        MMAD,
        new="p.m = rows / 16;",
        case="one row",
    ),
    Mutation(
        "blocks of 32 bytes taken for bytes",
        "p.dstStride = PANEL / C0;",
        "DataCopy overwrites workspace, written by DataCopy at attention_fwd.cpp",
        STORE_WEIGHTS,
        new="p.dstStride = PANEL * sizeof(T);",
    ),
    # Fractals.
    Mutation(
        "value fractals not transposed",
        "p.ifTranspose = true; for",
        new="p.ifTranspose = false; for",
    ),
    Mutation(
        "key fractals transposed",
        LOAD_KEY,
        new="p.srcStride = 1; p.ifTranspose = true; AscendC::LoadData(to, from, p);",
    ),
    Mutation(
        "value fractals row by row",
        "p.srcStride = rows / 16;",
        new="p.srcStride = 1;",
    ),
    Mutation(
        "left fractals row by row",
        "p.srcStride = pitch / 16;",
        new="p.srcStride = 1;",
    ),
    Mutation(
        "left fractals one upon the other",
        LOAD_LEFT,
        "LoadData overwrites L0A, written by LoadData at products.h",
        LOAD_LEFT,
        new="AscendC::LoadData(to[i * 16], from, p);",
    ),
    Mutation(
        "too small a pitch",
        "p.srcNdMatrixStride = 0; p.dstNzC0Stride = pitch; p.dstNzNStride = 1;"
        " p.dstNzMatrixStride = 0;",
        "DataCopy overwrites L1, written by DataCopy at rows.h",
        FILL_ROWS,
        new="p.srcNdMatrixStride = 0; p.dstNzC0Stride = rows; p.dstNzNStride = 1;"
        " p.dstNzMatrixStride = 0;",
    ),
    # Read before write.
    Mutation(
        "maximum read before it was written",
        "Duplicate(maximum, FLOOR, HALF_ROWS);",
        "Max reads UB where nothing was written",
        "Max(next_[row], maximum, small_, CHUNK_ROWS);",
    ),
    Mutation(
        "accumulator read before it was written",
        "Multiply(half, rows, KEY_ROWS, dim_, true);",
        "Mmad reads L0C where nothing was written",
        MMAD,
        new="Multiply(half, rows, KEY_ROWS, dim_, false);",
    ),
    Mutation(
        "accumulator not started from zero",
        "Multiply(half, rows, dim_, KEY_ROWS, first + tile == 0);",
        "Mmad overwrites L0C, read by Fixpipe at products.h",
        MMAD,
        new="Multiply(half, rows, dim_, KEY_ROWS, false);",
    ),
    Mutation(
        "rows below the last key not filled",
        "FillRows(to[count * C0], rows, last, rows - count, dim);",
        "LoadData reads L1 where nothing was written",
        LOAD_KEY,
    ),
    Mutation(
        "decay read before it was written",
        "Duplicate(decay_, 0.0f, RING * HALF_ROWS);",
        "Brcb reads UB where nothing was written",
        "AscendC::Brcb(to, from, count / BLOCK",
        case="few rows",
    ),
    Mutation(
        "output left unwritten",
        "const Rows<T>& to, const AscendC::LocalTensor<T>& from, int64_t pitch, int64_t width,"
        " int64_t first, int64_t count) {",
        "the kernel leaves a part of out unwritten",
        None,
        new="const Rows<T>& to, const AscendC::LocalTensor<T>& from, int64_t pitch, int64_t width,"
        " int64_t first, int64_t count) { --count;",
    ),
)

# The smallest that show them: sizes, the number of cores, and how far apart tokens are.
CASES = {
    "tiles": (SkipPattern.single(2), {"N": 300}),  # two halves of queries, two tiles of keys
    "one stack": (SkipPattern.dense(), {"N": 64}),
    "text": (SkipPattern.single(2), {"N": 300, "T": 16}),
    "stacks": (SkipPattern.dense(), {"N": 1100}),  # two stacks, five tasks
    "few rows": (SkipPattern.dense(), {"N": 20, "T": 1100}),  # of the first task, and two stacks
    "cores": (SkipPattern.single(2), {"N": 64}),
    "one row": (SkipPattern.single(2), {"N": 3}),
    "far rows": (SkipPattern.dense(), {"N": 20}),
    "far runs": (SkipPattern.group(2), {"N": 20}),
}
CORES = {"cores": 2}
TOKEN_STRIDES = {"far rows": 70000, "far runs": 30000}


@cache
def problem_of(case):
    pattern, sizes = CASES[case]
    problem = make_problem(pattern, H=1, D=64, dtype=torch.float16, **sizes)
    if case in TOKEN_STRIDES:
        stride = TOKEN_STRIDES[case]
        room = torch.empty(3, sizes["N"] * stride, dtype=torch.float16)
        q, k, v = (
            row.as_strided(x.shape, (0, stride, 64, 1), row.storage_offset()).copy_(x)
            for row, x in zip(room, (problem.q, problem.k, problem.v), strict=True)
        )
        problem = replace(problem, q=q, k=k, v=v)
    return problem


@cache
def answers_of(case):
    """The exact answer and those of eager PyTorch, by name."""
    problem = problem_of(case)
    names = ("out", "text_out", "lse", "text_lse")
    exact = oracle(problem)._asdict()
    eagers = [oracle(problem, problem.q.dtype, way)._asdict() for way in WAYS]
    return {name: exact[name] for name in names}, eagers


@pytest.fixture(scope="module")
def library():
    """The sound kernels, then the altered ones in order, in one library."""
    kernels = ("skiparse_key_bias", "skiparse_attention_fwd_fp16", "skiparse_attention_fwd_bf16")
    return SOURCES.build("altered_forward", MUTATIONS, kernels)


def forward(library, case, variant):
    problem = problem_of(case)
    inputs = Inputs(
        *problem.inputs,
        problem.mask,
        problem.text_mask,
        problem.pattern,
        problem.q.shape[-1] ** -0.5,
    )
    outputs = launch.forward(library, inputs, cores=CORES.get(case, 1), variant=variant)
    return outputs._replace(text_out=outputs.text_out.mean(1))._asdict()


def check(case, found):
    exact, eagers = answers_of(case)
    within_budget(found, exact, iter(eagers), torch.float16)


@pytest.mark.parametrize("case", CASES)
def test_the_sound_kernels_pass(library, case):
    check(case, forward(library, case, 0))


FAULTY = [(i, m) for i, m in enumerate(MUTATIONS, 1) if m.fault]
WRONG = [(i, m) for i, m in enumerate(MUTATIONS, 1) if not m.fault]


@pytest.mark.parametrize(("variant", "mutation"), FAULTY, ids=[m.name for _, m in FAULTY])
def test_the_twin_names_the_line(library, variant, mutation):
    with pytest.raises(TwinFault) as raised:
        forward(library, mutation.case, variant)
    assert mutation.fault in str(raised.value)
    if mutation.at is not None:
        assert SOURCES.place_of(mutation.at or mutation.old) in str(raised.value)


@pytest.mark.parametrize(("variant", "mutation"), WRONG, ids=[m.name for _, m in WRONG])
def test_the_answer_is_wrong(library, variant, mutation):
    found = forward(library, mutation.case, variant)
    with pytest.raises(AssertionError):
        check(mutation.case, found)
