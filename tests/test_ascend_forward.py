"""The forward kernel, on the host twin, gives the exact answer within the computed error budget.

And breaks no rule of the hardware on the way: the twin raises where it does.
"""

import itertools
from dataclasses import replace
from pathlib import Path

import built
import pytest
import torch
from safetensors.torch import load_file

from csrc.twin import launch
from skiparse import SkipPattern
from skiparse.backends import Inputs
from skiparse.testing import WAYS, budget, make_problem, oracle, within_budget

built.require_tools(allow_module_level=True)

DTYPES = (torch.bfloat16, torch.float16)
PATTERNS = (
    SkipPattern.dense(),
    SkipPattern.single(4),
    SkipPattern.group(4),
    SkipPattern(3, 2),
    SkipPattern(2, 36),
)
NAMES = ("out", "text_out", "lse", "text_lse")


@pytest.fixture(scope="module")
def library():
    return built.twin()


def forward(library, problem, cores=2, half_scores=False):
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    inputs = Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, scale)
    outputs = launch.forward(library, inputs, cores=cores, half_scores=half_scores)
    return outputs._replace(text_out=outputs.text_out.mean(1))._asdict()


def check(library, problem, cores=2, half_scores=False):
    exact = oracle(problem)._asdict()
    eagers = (oracle(problem, problem.q.dtype, way)._asdict() for way in WAYS)
    right = {name: exact[name] for name in NAMES}
    found = forward(library, problem, cores, half_scores)
    within_budget(found, right, eagers, problem.q.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_attention(library, p, D, dtype):
    check(library, make_problem(p, B=2, N=301, T=20, D=D, dtype=dtype, masked=True))


@pytest.mark.parametrize("T", [0, 77, 300])
def test_more_queries_than_a_tile_and_more_keys_than_a_stack(library, T):
    p = SkipPattern.group(2)
    check(library, make_problem(p, N=2200, T=T, H=1, D=64, dtype=torch.bfloat16), cores=3)


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
def test_layouts(library, layout):
    p = SkipPattern.group(4)
    problem = make_problem(p, B=2, N=72, T=7, D=64, dtype=torch.float16, layout=layout)
    check(library, problem)


@pytest.mark.parametrize("k", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["single", "group"])
def test_any_length(library, kind, k):
    for N in {1, k - 1, k, k * k - 1, k * k, k * k + 1, 31}:
        p = getattr(SkipPattern, kind)(k)
        check(library, make_problem(p, N=N, T=3, H=1, D=64, dtype=torch.float16, masked=True))


@pytest.mark.parametrize("token_stride", [9000, 30000, 70000, 70001, 140000])
def test_strides_beyond_16_bits(library, token_stride):
    """The distance between runs, then between runs of one token, then between tokens.

    The last two are beyond pairs of elements too, or no multiple of a pair.
    """
    for p in (SkipPattern.group(8), SkipPattern.single(8), SkipPattern(2, 3)):
        problem = make_problem(p, N=30, T=5, H=1, D=64, dtype=torch.float16)
        spread = []
        for x in (problem.q, problem.k, problem.v):
            room = torch.empty(30 * token_stride, dtype=x.dtype)
            spread.append(room.as_strided(x.shape, (0, token_stride, 64, 1)).copy_(x))
        check(library, replace(problem, q=spread[0], k=spread[1], v=spread[2]))


def test_rows_that_attend_to_nothing(library):
    """Zero, with log-sum-exp -inf; whole stacks of hidden keys before others change nothing."""
    problem = make_problem(SkipPattern.single(2), N=2400, T=0, H=1, D=64, dtype=torch.float16)
    mask = torch.zeros(1, 2400, dtype=torch.bool)
    mask[:, 2301::2] = True  # of sub-sequence 1, the last 50 keys, in its second stack
    check(library, replace(problem, mask=mask))


def test_scale_and_large_scores(library):
    problem = make_problem(SkipPattern.single(2), N=300, T=5, D=64, dtype=torch.bfloat16, scale=3.0)
    check(library, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.5], ids=["usual", "large"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_half_scores(library, masked, scale, dtype):
    """Within the same budget: eager attention in 16 bits rounds its scores as well."""
    sizes = {"N": 1300, "T": 77, "H": 1, "D": 128}
    p = make_problem(SkipPattern.group(2), **sizes, dtype=dtype, masked=masked, scale=scale)
    check(library, p, half_scores=True)


def test_half_scores_change_the_answer_and_need_a_positive_scale(library):
    p = make_problem(SkipPattern.single(2), N=300, T=5, H=1, D=64, dtype=torch.float16)
    exact, rounded = (forward(library, p, half_scores=half) for half in (False, True))
    assert not torch.equal(exact["lse"], rounded["lse"])
    with pytest.raises(ValueError, match="half_scores needs a positive scale, got -1"):
        forward(library, replace(p, scale=-1.0), half_scores=True)


def test_the_result_does_not_depend_on_the_number_of_cores(library):
    problem = make_problem(SkipPattern.group(2), B=2, N=300, T=20, D=64, dtype=torch.bfloat16)
    one, four = (forward(library, problem, cores) for cores in (1, 4))
    assert all(torch.equal(one[name], four[name]) for name in NAMES)


GOLDEN = load_file(Path(__file__).parent / "data" / "skiparse_attention.safetensors")
CASES = sorted({name.split(".", 1)[1].rsplit(".", 1)[0] for name in GOLDEN if name[:4] == "out."})
HEADS = 3


@pytest.mark.parametrize("case", CASES)
def test_golden(library, case):
    """The original's fp32 outputs, within the budget of eager 16-bit attention on its inputs."""
    N, k, kind, *masked = case.split(".")

    def bnhd(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    inputs = [bnhd(GOLDEN[f"in.{N}.{n}"]).half() for n in ("q", "k", "v", "tq", "tk", "tv")]
    pattern = getattr(SkipPattern, kind)(int(k[1:]))
    small = make_problem(pattern, N=1, T=1, H=HEADS, D=16, dtype=torch.float16)
    problem = replace(
        small.with_inputs(inputs),
        grad_out=torch.zeros_like(inputs[0]),
        grad_text_out=torch.zeros_like(inputs[3]),
        mask=GOLDEN[f"in.{N}.video_mask_partial"].bool() if masked else None,
        text_mask=GOLDEN["in.text_mask"].bool(),
    )
    golden = {"out": bnhd(GOLDEN[f"out.{case}.ov"]), "text_out": bnhd(GOLDEN[f"out.{case}.ot"])}
    found = forward(library, problem)
    eagers = [oracle(problem, torch.float16, way)._asdict() for way in WAYS]
    allowed = budget({n: x.double() for n, x in golden.items()}, eagers, torch.float16)
    for name, right in golden.items():
        error = (found[name].float() - right).abs().max() / right.abs().max()
        assert error <= allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("kind", ["single", "group"])
def test_full_matrix(library, kind, k, dtype):
    for N, T, D in itertools.product((2048, 1999), (0, 77), (64, 128)):
        p = getattr(SkipPattern, kind)(k)
        check(library, make_problem(p, N=N, T=T, H=1, D=D, dtype=dtype), cores=3)
