"""Every fault planted in a copy of the backward kernels is found by the host twin, at its line.

But for those that break no rule of the hardware, and only make the gradients wrong: they do.
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
from skiparse.backends import Inputs, Outputs, reference
from skiparse.testing import WAYS, make_problem, oracle, within_budget

built.require_tools(allow_module_level=True)

SOURCES = Sources(
    "rows.h",
    "products.h",
    "rowwise.h",
    "key_bias.cpp",
    "row_values.cpp",
    "attention_bwd.cpp",
    "text_gradients.cpp",
)
KERNELS = (
    "skiparse_key_bias",
    None,
    None,
    "skiparse_row_values_fp16",
    None,
    "skiparse_attention_bwd_fp16",
    None,
    "skiparse_text_gradients_fp16",
    None,
)

FIXPIPE = "AscendC::Fixpipe<U, float, AscendC::CFG_ROW_MAJOR>(to"
COPY = "AscendC::DataCopy(to, from, p);"
LOAD_SCORES = "DataCopy(weights, ring_.Scores(i)[first], in);"
LOAD_GRADIENTS = "DataCopy(gradients, ring_.WeightGradients(i)[first], in);"
LOAD_BLOCK = "DataCopy(in, from[in_block * dim_], count * dim_);"
STORE = "DataCopy(to, rounded, out);"
SCATTER = "AscendC::DataCopyPad(to.base"

MUTATIONS = (
    # Sums in global memory.
    Mutation(
        "the first added to nothing",
        "if (!first) SetAtomicAdd<float>();",
        "Fixpipe reads workspace where nothing was written",
        FIXPIPE,
        new="SetAtomicAdd<float>();",
    ),
    Mutation(
        "everything added from then on",
        "SetAtomicNone();",
        "Fixpipe reads workspace where nothing was written",
        FIXPIPE,
        new="",
        case="blocks",
    ),
    Mutation("nothing added", "if (!first) SetAtomicAdd<float>();", case="blocks"),
    # Between the cube and the vector cores.
    Mutation(
        "dropped wait for scores",
        "CrossCoreWaitFlag(PRODUCTS_READY);",
        "DataCopy reads workspace",
        LOAD_SCORES,
    ),
    Mutation(
        "scores said to be ready by the wrong pipe",
        "CrossCoreSetFlag<2, PIPE_FIX>(PRODUCTS_READY);",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_GRADIENTS,
        new="CrossCoreSetFlag<2, PIPE_M>(PRODUCTS_READY);",
    ),
    Mutation(
        "dropped wait for weights",
        "CrossCoreWaitFlag(FACTORS_READY);",
        "DataCopy reads workspace",
        COPY,
    ),
    Mutation(
        "dropped wait for gradients",
        "CrossCoreWaitFlag(GRADIENTS_READY);",
        "DataCopy reads workspace",
        LOAD_BLOCK,
    ),
    Mutation(
        "one waits for weights that the other does not announce",
        "CrossCoreSetFlag<2, PIPE_MTE3>(FACTORS_READY);",
        "waits for cross-core flag 1; ",
        None,
    ),
    Mutation(
        "one step in the ring of scores",
        "At<float>(base + i % STEP_RING * STEP_BYTES, 0)",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_SCORES,
        new="At<float>(base, 0)",
        case="blocks",
    ),
    Mutation(
        "one block in the ring of key gradients",
        "at.key_count % STEP_RING;",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_BLOCK,
        new="0;",
        case="sequences",
    ),
    Mutation(
        "one block too few in the ring of query gradients",
        "(at.query_count + at.query) % queries;",
        "DataCopy reads workspace, written by Fixpipe at products.h",
        LOAD_BLOCK,
        new="(at.query_count + at.query) % (queries - 1);",
        case="sequences",
    ),
    Mutation(
        "keys loaded for the first part alone",
        "if (at.first_of_part()) LoadKeys(at);",
        "MTE1_MTE2 flag 1 is set again",
        "if (at.last_of_part()) SetFlag<HardEvent::MTE1_MTE2>(KEYS + at.key_count % 2);",
        new="if (at.query == 0) LoadKeys(at);",
        case="parts",
    ),
    Mutation(
        "one block for the sums of all keys",
        "key_sums + 2 * at.key * ROWS_BYTES",
        "DataCopy reads key sums, written by Fixpipe at products.h",
        LOAD_BLOCK,
        new="key_sums",
        case="parts",
    ),
    # Between the pipes of a core.
    Mutation(
        "dropped flag MTE2_MTE1",
        handshake("MTE2_MTE1", "ROWS + slot"),
        "LoadData reads L1, written by DataCopy at rows.h",
        "AscendC::LoadData(to[i * columns], from, p);",
    ),
    Mutation(
        "weights given back before their last use",
        "SetFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slots[half]);",
        "MTE1_MTE2 flag 4 is set again",
        new="SetFlag<HardEvent::MTE1_MTE2>(WEIGHTS + slots[0]);",
    ),
    Mutation(
        "keys given back too early",
        "if (at.last_of_part()) SetFlag<HardEvent::MTE1_MTE2>(KEYS + at.key_count % 2);",
        "MTE1_MTE2 flag 0 is set again",
        new="SetFlag<HardEvent::MTE1_MTE2>(KEYS + at.key_count % 2);",
        case="blocks",
    ),
    Mutation(
        "dropped flag MTE2_V of scores",
        LOAD_GRADIENTS + handshake("MTE2_V", "WIDE + slot"),
        "Muls reads UB, written by DataCopy at attention_bwd.cpp",
        "Muls(weights, weights",
        new=LOAD_GRADIENTS,
    ),
    Mutation(
        "dropped flag V_MTE3 of weights",
        handshake("V_MTE3", "flag"),
        "DataCopy reads UB, written by Cast at attention_bwd.cpp",
        STORE,
    ),
    Mutation(
        "dropped flag V_MTE3 of gradients",
        handshake("V_MTE3", "WEIGHTS"),
        "DataCopyPad reads UB, written by Cast at attention_bwd.cpp",
        SCATTER,
    ),
    Mutation(
        "dropped wait for text to leave its buffer",
        "WaitFlag<HardEvent::MTE3_V>(TEXT); }",
        "MTE3_V flag 2 is set again",
        "SetFlag<HardEvent::MTE3_V>(TEXT);",
        new="}",
        case="text",
    ),
    Mutation(
        "dropped flag MTE2_V of text",
        handshake("MTE2_V", "slot") + " Add(sum_",
        "Add reads UB, written by DataCopy at text_gradients.cpp",
        "Add(sum_",
        new="\n\nAdd(sum_",
        case="text",
    ),
    Mutation(
        "dropped barrier before a product of vectors",
        "PipeBarrier<PIPE_V>(); Store(ring_.template ScoreGradients<T>(i)",
        "Cast reads UB, written by Mul at attention_bwd.cpp",
        "Cast(rounded, from, RoundMode::CAST_RINT",
        new="Store(ring_.template ScoreGradients<T>(i)",
    ),
    # The beginning and the end of a kernel.
    *(
        Mutation(
            f"no barrier at the end of {name}",
            f"{run} PipeBarrier<PIPE_ALL>();",
            "is the last of this core, and a PipeBarrier<PIPE_ALL> must be",
            None,
            new=run,
        )
        for name, run in (
            ("row values", "RowValues<T>(tiling, arguments).Run(GetBlockIdx(), GetBlockNum());"),
            ("text", "TextGradients<T>(tiling, arguments).Run(GetBlockIdx(), GetBlockNum());"),
            ("the gradients", "BackwardVector<T>(tiling, arguments, ring).Run(core, cores); }"),
        )
    ),
    Mutation(
        "row values in the state that the kernel before left",
        "InitSocState(); RowValues",
        "before InitSocState()",
        "const int64_t chunks = most_blocks(t_) * BLOCK_ROWS / CHUNK_ROWS;"
        " for (int32_t slot = 0; slot < 2; ++slot) SetFlag<HardEvent::V_MTE2>(slot);",
        new="RowValues",
    ),
    Mutation(
        "rows of the sequence before",
        "if (at.begins()) of_gradients_ = SourcesOf(at.sequence);",
        new="if (i == 0) of_gradients_ = SourcesOf(at.sequence);",
        case="sequences",
    ),
    # Offsets of more than 31 bits, in elements.
    Mutation(
        "elements counted in 32 bits",
        "from.base[runs.token * from.stride]; if (runs.runs == 1)",
        "outside every allocation of global memory",
        COPY,
        new="from.base[static_cast<int32_t>(runs.token * from.stride)];\nif (runs.runs == 1)",
        case="last of many",
    ),
    Mutation(
        "parts of the text counted in 32 bits",
        "(part * t_.text + first) * dim_), from, count * dim_);",
        "outside every allocation of global memory",
        new="static_cast<int32_t>((part * t_.text + first) * dim_)), from, count * dim_);",
        case="last of many",
    ),
    # Values that are nobody's.
    Mutation(
        "what lies beside single numbers in their blocks",
        "WholeReduceMax(lse_, wide_lse, 1,",
        "WholeReduceMax reads UB where nothing was written",
        new="WholeReduceMax(lse_, wide_lse, 8,",
    ),
    Mutation(
        "rows beyond the last without a delta",
        "Duplicate(delta_, 0.0f, CHUNK_ROWS);",
        "DataCopy reads UB where nothing was written",
        "DataCopy(At<float>(a_.values, place + row_values(t_) / 2), delta_, CHUNK_ROWS);",
        case="sequences",
    ),
    Mutation(
        "a negative gap between rows",
        "gap >= 0 && gap <= MOST_GAP ? rows : 1;",
        "does not fit a field of 0 to 4294967295",
        "p.srcStride = together > 1 ? gap : 0;",
        new="rows;",
        case="one row for all",
    ),
    # Wrong answers.
    Mutation(
        "rows beyond the last with weights", "Duplicate(lse_, BEYOND", new="Duplicate(lse_, FLOOR"
    ),
    Mutation(
        "rows that attend to nothing with weights",
        "Maxs(lse_, lse_, FLOOR, CHUNK_ROWS);",
        case="nothing",
    ),
    Mutation(
        "keys beyond the last not hidden",
        "if (at.hides_keys()) AddToRows",
        new="if (false) AddToRows",
    ),
    Mutation(
        "fractals of the weights not transposed",
        "p.ifTranspose = true; AscendC::LoadData(to, from, p);",
        new="AscendC::LoadData(to, from, p);",
    ),
    Mutation(
        "gradients of k without the scale", "a_.grad_k, 1, t_.scale);", new="a_.grad_k, 1, 1.0f);"
    ),
    Mutation(
        "text of the first sub-sequence in place of its own",
        "of_text.base = of_text.base[sequence.sub * text_sub];",
        case="text",
    ),
)

# The smallest that show them.
CASES = {
    "tiles": (SkipPattern.dense(), {"N": 250}),  # two halves of queries, two tiles of keys
    "blocks": (SkipPattern.dense(), {"N": 300}),  # two of each
    "parts": (SkipPattern.dense(), {"N": 520}),  # three of each, a block of queries at a time
    "sequences": (SkipPattern.single(4), {"N": 80}),  # four, of one block
    "text": (SkipPattern.single(2), {"N": 60, "T": 20}),
    "one row for all": (SkipPattern.single(2), {"N": 60}),
    "nothing": (SkipPattern.single(2), {"N": 60}),
}
PARTS = 140000  # sub-sequences of "last of many", of which the last alone runs


@cache
def problem_of(case):
    pattern, sizes = CASES[case]
    problem = make_problem(pattern, H=1, D=64, dtype=torch.float16, **sizes)
    if case == "one row for all":
        problem = replace(problem, grad_out=problem.grad_out[:, :1].expand_as(problem.grad_out))
    if case == "nothing":
        problem = replace(problem, mask=torch.arange(sizes["N"])[None] % 2 == 1)
    return problem


@cache
def answers_of(case):
    """The exact gradients and those of eager PyTorch, by name."""
    problem = problem_of(case)
    exact = {n: x for n, x in oracle(problem)._asdict().items() if n.startswith("grad_")}
    return exact, [oracle(problem, torch.float16, way)._asdict() for way in WAYS]


@pytest.fixture(scope="module")
def library():
    return SOURCES.build("altered_backward", MUTATIONS, KERNELS)


def backward_of_last(library, variant):
    """No data and no memory, addresses alone; the tensors have more than 2^31 elements."""
    pattern, rows, text = SkipPattern(PARTS, 128), PARTS * 128, 128
    video, prompt = (
        torch.empty(1, n, 1, 128, dtype=torch.float16, device="meta") for n in (rows, text)
    )
    inputs = Inputs(video, video, video, prompt, prompt, prompt, None, None, pattern, 1.0)
    outputs = Outputs(
        video,
        torch.empty(1, PARTS, text, 1, 128, dtype=torch.float16, device="meta"),
        torch.empty(1, 1, rows, device="meta"),
        torch.empty(1, 1, PARTS, text, device="meta"),
    )
    assert video.numel() > 2**31
    return launch.backward_costs(
        library, inputs, outputs, cores=PARTS, core=PARTS - 1, variant=variant
    )


def test_the_sound_kernels_count_in_64_bits(library):
    costs = backward_of_last(library, 0)
    assert costs.buffers["grad_q"].written == 128 * 128 * 2


def backward(library, case, variant):
    if case == "last of many":
        return backward_of_last(library, variant)
    p = problem_of(case)
    inputs = Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, p.q.shape[-1] ** -0.5)
    n = p.pattern.sparsity
    of_each = (p.grad_text_out / n).unsqueeze(1).expand(-1, n, -1, -1, -1)
    outputs = reference.forward(inputs)
    most = 1 if case == "parts" else launch.MOST_IN_PART
    given = (inputs, outputs, p.grad_out, of_each)
    found = launch.backward(library, *given, cores=1, most_in_part=most, variant=variant)
    return {f"grad_{name}": x for name, x in found._asdict().items()}


def check(case, found):
    exact, eagers = answers_of(case)
    within_budget(found, exact, iter(eagers), torch.float16)


@pytest.mark.parametrize("case", CASES)
def test_the_sound_kernels_pass(library, case):
    check(case, backward(library, case, 0))


FAULTY = [(i, m) for i, m in enumerate(MUTATIONS, 1) if m.fault]
WRONG = [(i, m) for i, m in enumerate(MUTATIONS, 1) if not m.fault]


@pytest.mark.parametrize(("variant", "mutation"), FAULTY, ids=[m.name for _, m in FAULTY])
def test_the_twin_names_the_line(library, variant, mutation):
    with pytest.raises(TwinFault) as raised:
        backward(library, mutation.case, variant)
    assert mutation.fault in str(raised.value)
    if mutation.at is not None:
        assert SOURCES.place_of(mutation.at or mutation.old) in str(raised.value)


@pytest.mark.parametrize(("variant", "mutation"), WRONG, ids=[m.name for _, m in WRONG])
def test_the_gradients_are_wrong(library, variant, mutation):
    found = backward(library, mutation.case, variant)
    with pytest.raises(AssertionError):
        check(mutation.case, found)
