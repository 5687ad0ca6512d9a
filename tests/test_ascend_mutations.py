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
COPY = "AscendC::DataCopy(to, from, p);"
COPY_BIAS = "DataCopy(At<float>(bias, i * STACK_KEYS), row_, STACK_KEYS);"
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
        COPY_BIAS,
        case="nothing",
    ),
    Mutation(
        "dropped flag V_S",
        handshake("V_S", "0"),
        "SetValue overwrites UB, written by Duplicate at key_bias.cpp",
        "if (mask_.GetValue(token + i) == 0) row_.SetValue(j, HIDDEN);",
        case="nothing",
    ),
    Mutation(
        "dropped flag V_MTE3 of biases",
        handshake("V_MTE3", "0"),
        "DataCopy reads UB, written by Duplicate at key_bias.cpp",
        COPY_BIAS,
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
        COPY,
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
        "} WaitFlag<HardEvent::MTE3_V>(0); }",
        "MTE3_V flag 0 is left set at the end",
        f"{COPY_BIAS} SetFlag<HardEvent::MTE3_V>(0);",
        new="} }",
    ),
    # The beginning and the end of a kernel.
    Mutation(
        "state of the kernel before in force",
        "InitSocState(); const int64_t cores",
        "before InitSocState()",
        "Run(int64_t core, int64_t cores) { for (int32_t slot = 0; slot < 2; ++slot) {"
        " SetFlag<HardEvent::MTE1_MTE2>(KEY + slot);",
        new="const int64_t cores",
    ),
    Mutation(
        "no barrier at the end",
        "PipeBarrier<PIPE_ALL>(); } }",
        "is the last of this core, and a PipeBarrier<PIPE_ALL> must be",
        "(RIGHT + slot); AscendC::WaitFlag<HardEvent::FIX_M>(slot);",
        new="} }",
    ),
    Mutation(
        "no barrier at the end of the biases",
        "AscendC::PipeBarrier<PIPE_ALL>();",
        "is the last of this core, and a PipeBarrier<PIPE_ALL> must be",
        "} WaitFlag<HardEvent::MTE3_V>(0);",
    ),
    Mutation(
        "two allocators for one memory",
        "LocalMemAllocator<Hardware::L1> l1;",
        "a second allocator for L1",
        new="LocalMemAllocator<Hardware::L1> l1; LocalMemAllocator<Hardware::L1> another;",
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
        COPY,
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
        COPY,
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
        "i < t_.batch * t_.sparsity * stacks; i += cores",
        "DataCopy overwrites bias, written by DataCopy at key_bias.cpp",
        COPY_BIAS,
        new="i < t_.batch * t_.sparsity * stacks; i += 1",
        case="cores",
    ),
    # Slots and rings.
    Mutation(
        "key tile in a slot still being read",
        "key_[slot * KEY_ROWS * dim_]",
        "DataCopy overwrites L1, read by LoadData at products.h",
        COPY,
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
        COPY,
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
        "scores_ = ub.Alloc<TPosition::VECCALC, S>(2 * CHUNK);",
        "UB has 188160 bytes, and the buffers need",
        "out_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * dim_);",
        new="scores_ = ub.Alloc<TPosition::VECCALC, S>(4 * CHUNK);",
    ),
    Mutation(
        "too many buffers for L0B",
        "l0b.Alloc<AscendC::TPosition::B2, T>(2 * SLOT);",
        "L0B has 65536 bytes, and the buffers need 98304",
        new="l0b.Alloc<AscendC::TPosition::B2, T>(3 * SLOT);",
    ),
    Mutation(
        "overflown buffer in UB",
        "wide_lse_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * BLOCK);",
        "runs past the end of its buffer in UB by 32 bytes",
        "AscendC::Brcb(to, from, count / BLOCK",
        new="wide_lse_ = ub.Alloc<TPosition::VECCALC, float>(HALF_ROWS * BLOCK / 2);",
    ),
    Mutation(
        "overflown buffer in L0C",
        "l0c.Alloc<AscendC::TPosition::CO1, float>(2 * SLOT);",
        "runs past the end of its buffer in L0C",
        MMAD,
        new="l0c.Alloc<AscendC::TPosition::CO1, float>(SLOT);",
    ),
    Mutation(
        "overflown buffer of the scalar unit",
        "row_.SetValue(j, HIDDEN); } } } }",
        "runs past the end of its buffer in UB by 4 bytes",
        "if (mask_.GetValue(token + i) == 0) row_.SetValue(j,",
        new="row_.SetValue(STACK_KEYS + j, HIDDEN);\n}\n}\n}\n}",
        case="nothing",
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
        COPY,
        new="FillRows(to[count * C0], rows, last[C0],",
        case="one stack",
    ),
    # Fields of instructions.
    Mutation(
        "overflown 16-bit stride between rows",
        "if (stride <= MOST_STRIDE && apart <= MOST_STRIDE) {",
        "70000 does not fit a field of 0 to 65535",
        "p.srcDValue = stride;",
        new="if (apart <= MOST_STRIDE) {",
        case="far rows",
    ),
    Mutation(
        "overflown 16-bit stride between runs",
        "if (stride <= MOST_STRIDE && apart <= MOST_STRIDE) {",
        "120000 does not fit a field of 0 to 65535",
        "p.srcNdMatrixStride = apart;",
        new="if (stride <= MOST_STRIDE) {",
        case="far runs",
    ),
    Mutation(
        "overflown 16-bit stride of pairs between rows",
        "if (stride > 2 * MOST_STRIDE || apart",
        "70000 does not fit a field of 0 to 65535",
        "p.srcDValue = stride;",
        new="if (apart",
        case="farther rows",
    ),
    Mutation(
        "pairs at an odd distance",
        "|| stride % 2 + apart % 2 > 0) {",
        new=") {",
        case="odd rows",
    ),
    Mutation(
        "half as many pairs",
        "stride / 2, dim / 2);",
        new="stride / 2, dim / 4);",
        fault="LoadData reads L1 where nothing was written",
        at=LOAD_KEY,
        case="far rows",
    ),
    # Offsets of more than 32 bits; the memory that they skip does not exist.
    Mutation(
        "elements counted in 32 bits",
        "from.base[runs.token * from.stride]; if (runs.runs == 1)",
        "outside every allocation of global memory",
        COPY,
        new="from.base[static_cast<int32_t>(runs.token * from.stride)];\nif (runs.runs == 1)",
        case="last of many",
    ),
    Mutation(
        "outputs counted in 32 bits",
        "(place * t_.heads + task.head) * dim_);",
        "outside every allocation of global memory",
        SCATTER,
        new="static_cast<int32_t>((place * t_.heads + task.head) * dim_));",
        case="last of many",
    ),
    Mutation(
        "bytes of the workspace counted in 32 bits",
        "arguments.workspace + core * WORKSPACE_BYTES",
        "outside every allocation of global memory",
        FIXPIPE,
        new="arguments.workspace + static_cast<uint32_t>(core * WORKSPACE_BYTES)",
        case="last of many",
    ),
    # What the hardware does not define.
    Mutation(
        "values read by the scalar unit",
        "SetFlag<HardEvent::V_MTE2>(SCORE + slot); } PipeBarrier<PIPE_V>(); const int64_t queries",
        "GetValue reads workspace through the cache of the scalar unit, which does not see what "
        "Fixpipe at products.h",
        "SetFlag<HardEvent::V_MTE2>(SCORE + slot); }",
        new="SetFlag<HardEvent::V_MTE2>(SCORE + slot);\n} "
        "ring_.Values(i).GetValue(0);\nPipeBarrier<PIPE_V>();\nconst int64_t queries",
    ),
    Mutation(
        "logarithm of a row without keys",
        "Ln(lse, lse, HALF_ROWS);",
        "Ln of 0, which has two answers",
        new="Ln(lse, total, HALF_ROWS);",
        case="nothing",
    ),
    Mutation(
        "rows without keys with a log-sum-exp",
        "Select(lse, attends, lse, OF_NOTHING, SELMODE::VSEL_TENSOR_SCALAR_MODE, HALF_ROWS);",
        case="nothing",
    ),
    Mutation(
        "a mask that hides nothing",
        "if (masked_) HideVideo(batch, sub, first, of_video);",
        case="nothing",
    ),
    Mutation(
        "places after the keys not hidden",
        "if (keys > 0) Duplicate(row_, 0.0f, keys);",
        new="Duplicate(row_, 0.0f, STACK_KEYS);",
    ),
    Mutation(
        "keys of the task before",
        "if (walk.stack == 0) keys_ = Joint",
        new="if (walk.number == 0 && walk.stack == 0) keys_ = Joint",
        case="text",
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
        "p.dstNzC0Stride = pitch;",
        "DataCopy overwrites L1, written by DataCopy at rows.h",
        COPY,
        new="p.dstNzC0Stride = rows;",
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

# What is slower, not wrong: places in memory that are no multiple of 512 bytes.
SLOW = (
    Mutation(
        "scores beside the places that are fast",
        "At<S>(base + i % RING * SCORES_BYTES, 0)",
        "Fixpipe",
        FIXPIPE,
        new="At<S>(base + i % RING * SCORES_BYTES, 8)",
    ),
    Mutation(
        "values beside the places that are fast",
        "i % RING * VALUES_BYTES, 0);",
        "DataCopy",
        LOAD_VALUES,
        new="i % RING * VALUES_BYTES, 16);",
        case="one stack",
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
    "odd rows": (SkipPattern.dense(), {"N": 20}),
    "farther rows": (SkipPattern.dense(), {"N": 20}),
    "nothing": (SkipPattern.single(2), {"N": 64}),  # rows of one sub-sequence attend to none
    "last of many": (SkipPattern.dense(), {"N": 128, "T": 128, "D": 128}),
}
CORES = {"cores": 2}
TOKEN_STRIDES = {
    "far rows": 70000,
    "far runs": 30000,
    "odd rows": 70001,
    "farther rows": 140000,
}
PARTS = 140000  # of "last of many", whose elements are more than 2^31, and their bytes than 2^32


@cache
def problem_of(case):
    pattern, sizes = CASES[case]
    problem = make_problem(pattern, H=1, dtype=torch.float16, **({"D": 64} | sizes))
    if case in TOKEN_STRIDES:
        stride = TOKEN_STRIDES[case]
        room = torch.empty(3, sizes["N"] * stride, dtype=torch.float16)
        q, k, v = (
            row.as_strided(x.shape, (0, stride, 64, 1), row.storage_offset()).copy_(x)
            for row, x in zip(room, (problem.q, problem.k, problem.v), strict=True)
        )
        problem = replace(problem, q=q, k=k, v=v)
    if case == "nothing":
        problem = replace(problem, mask=torch.arange(sizes["N"])[None] % 2 == 1)
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
    kernels = ("skiparse_key_bias", "skiparse_attention_fwd_fp16", None)
    return SOURCES.build("altered_forward", (*MUTATIONS, *SLOW), kernels)


def inputs_of(case):
    p = problem_of(case)
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, p.q.shape[-1] ** -0.5)


def forward(library, case, variant):
    inputs = inputs_of(case)
    if case == "last of many":
        outputs = launch.forward_of_last(library, inputs, PARTS, variant=variant)
    else:
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


@pytest.mark.parametrize(
    ("variant", "mutation"), [*enumerate(SLOW, 1 + len(MUTATIONS))], ids=[m.name for m in SLOW]
)
def test_the_twin_counts_what_is_not_aligned(library, variant, mutation):
    """In scratch memory, whose layout is the kernels' own; every place is, but for odd panels."""
    sound, slow = (
        launch.forward_costs(library, inputs_of(mutation.case), cores=1, variant=v).unaligned
        for v in (0, variant)
    )
    place = SOURCES.place_of(mutation.at).removesuffix(": ")
    seen = [(x.line, x.instruction) for x in slow if x.buffer == "workspace"]
    assert (place, mutation.fault) in seen
    panels = SOURCES.place_of(STORE_WEIGHTS).removesuffix(": ")
    assert {x.line for x in sound if x.buffer == "workspace"} <= {panels}
