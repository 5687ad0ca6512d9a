"""The backward kernels, on the host twin, give exact gradients within the computed error budget.

And break no rule of the hardware on the way: the twin raises where they do. The outputs that the
gradients start from are the reference's, so that nothing here depends on the forward kernel.
"""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import built
import pytest
import torch
from safetensors.torch import load_file

from csrc.twin import launch
from skiparse import SkipPattern
from skiparse.backends import Inputs, reference, sdpa
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
NAMES = tuple(f"grad_{name}" for name in ("q", "k", "v", "text_q", "text_k", "text_v"))


@pytest.fixture(scope="module")
def library():
    return built.twin()


def inputs_of(problem):
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, scale)


def backward(library, problem, cores=2, outputs=None):
    inputs, n = inputs_of(problem), problem.pattern.sparsity
    if outputs is None:
        outputs = reference.forward(inputs)
    of_each = (problem.grad_text_out / n).unsqueeze(1).expand(-1, n, -1, -1, -1)
    gradients = launch.backward(library, inputs, outputs, problem.grad_out, of_each, cores=cores)
    return dict(zip(NAMES, gradients, strict=True))


def check(library, problem, cores=2, outputs=None):
    exact = oracle(problem)._asdict()
    eagers = (oracle(problem, problem.q.dtype, way)._asdict() for way in WAYS)
    right = {name: exact[name] for name in NAMES}
    found = backward(library, problem, cores, outputs)
    within_budget(found, right, eagers, problem.q.dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_gradients(library, p, D, dtype):
    check(library, make_problem(p, B=2, N=301, T=20, D=D, dtype=dtype, masked=True))


@pytest.mark.parametrize("T", [0, 77, 300])
def test_more_rows_than_a_block(library, T):
    p = SkipPattern.group(2)
    check(library, make_problem(p, N=1100, T=T, H=1, D=64, dtype=torch.bfloat16), cores=3)


@pytest.mark.parametrize("most_in_part", [1, 2, 3])
def test_queries_in_parts(library, most_in_part):
    """Bit for bit the same, for sums are made in the same order: of 3, 2 and 2 blocks."""
    p = SkipPattern(3, 300)
    problem = make_problem(p, N=1250, T=77, H=1, D=64, dtype=torch.bfloat16, masked=True)
    inputs, n = inputs_of(problem), 3
    given = (inputs, reference.forward(inputs), problem.grad_out)
    of_each = problem.grad_text_out.unsqueeze(1).expand(-1, n, -1, -1, -1)
    whole, parts = (
        launch.backward(library, *given, of_each, cores=2, most_in_part=most)
        for most in (launch.MOST_IN_PART, most_in_part)
    )
    for name, x, y in zip(NAMES, whole, parts, strict=True):
        assert torch.equal(x, y), name


def test_after_the_forward_kernel(library):
    p = SkipPattern.single(2)
    problem = make_problem(p, N=301, T=20, D=64, dtype=torch.bfloat16, masked=True)
    check(library, problem, outputs=launch.forward(library, inputs_of(problem)))


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
def test_layouts(library, layout):
    p = SkipPattern.group(4)
    problem = make_problem(p, B=2, N=72, T=7, D=64, dtype=torch.float16, layout=layout)
    check(library, problem)


@pytest.mark.parametrize("p", [SkipPattern.group(4), SkipPattern.single(4)], ids=str)
def test_upstream_gradients_of_any_strides(library, p):
    """One row for all tokens and heads, as of a sum; or every second row of a tensor."""
    problem = make_problem(p, B=2, N=72, T=7, D=64, dtype=torch.float16)
    grads = (problem.grad_out, problem.grad_text_out)
    same, text_same = (x[:, :1, :1].expand_as(x) for x in grads)
    check(library, replace(problem, grad_out=same, grad_text_out=text_same))
    apart, text_apart = (x.repeat_interleave(2, 1)[:, ::2] for x in grads)
    check(library, replace(problem, grad_out=apart, grad_text_out=text_apart))


def test_every_sub_sequence_has_upstream_gradients_of_its_own(library):
    p = SkipPattern.group(2)
    problem = make_problem(p, B=2, N=72, T=20, D=64, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    grad_out = torch.zeros_like(problem.grad_out)
    of_each = torch.randn(2, 2, 20, 2, 64, generator=generator).to(torch.bfloat16)

    def gradients(problem, backward):
        inputs = inputs_of(problem)
        dtype, outputs = problem.q.dtype, reference.forward(inputs)
        found = backward(inputs, outputs, grad_out.to(dtype), of_each.to(dtype))
        return dict(zip(NAMES, found, strict=True))

    exact = gradients(problem.to(torch.float64), reference.backward)
    found = gradients(problem, partial(launch.backward, library))
    within_budget(found, exact, [gradients(problem, sdpa.backward)], torch.bfloat16)


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
        names = ("q", "k", "v", "grad_out")
        spread = {name: torch.empty(30 * token_stride, dtype=torch.float16) for name in names}
        for name, room in spread.items():
            x = getattr(problem, name)
            spread[name] = room.as_strided(x.shape, (0, token_stride, 64, 1)).copy_(x)
        check(library, replace(problem, **spread))


def test_hidden_keys_and_rows_that_attend_to_nothing_have_no_gradient(library):
    problem = make_problem(SkipPattern.single(2), N=1200, T=0, H=1, D=64, dtype=torch.float16)
    mask = torch.zeros(1, 1200, dtype=torch.bool)
    mask[:, 1101::2] = True  # of sub-sequence 1, the last 50 keys, in its third block
    found = check(library, replace(problem, mask=mask))
    assert not found["grad_q"][:, ::2].any()
    for name in ("grad_k", "grad_v"):
        assert not found[name][~mask].any()
        assert found[name][mask].any()


def test_scale_and_large_scores(library):
    problem = make_problem(SkipPattern.single(2), N=300, T=5, D=64, dtype=torch.bfloat16, scale=3.0)
    check(library, problem)


def test_gradients_do_not_depend_on_the_number_of_cores(library):
    problem = make_problem(SkipPattern.group(3), B=2, N=900, T=40, D=64, dtype=torch.float16)
    one, three, four = (backward(library, problem, cores) for cores in (1, 3, 4))
    assert all(torch.equal(one[name], three[name]) for name in NAMES)
    assert all(torch.equal(one[name], four[name]) for name in NAMES)


GOLDEN = load_file(Path(__file__).parent / "data" / "skiparse_attention.safetensors")
CASES = sorted({name.split(".", 1)[1].rsplit(".", 1)[0] for name in GOLDEN if name[:4] == "out."})
HEADS = 3


@pytest.mark.parametrize("case", CASES)
def test_golden(library, case):
    """The original's fp32 gradients, within the budget of eager 16-bit attention on its inputs."""
    N, k, kind, *masked = case.split(".")

    def bnhd(x):
        return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)

    given = (bnhd(GOLDEN[f"in.{N}.{n}"]).half() for n in ("q", "k", "v", "tq", "tk", "tv"))
    pattern = getattr(SkipPattern, kind)(int(k[1:]))
    small = make_problem(pattern, N=1, T=1, H=HEADS, D=16, dtype=torch.float16)
    problem = replace(
        small.with_inputs(list(given)),
        grad_out=bnhd(GOLDEN[f"in.{N}.gv"]).half(),
        grad_text_out=bnhd(GOLDEN[f"in.{N}.gt"]).half(),
        mask=GOLDEN[f"in.{N}.video_mask_partial"].bool() if masked else None,
        text_mask=GOLDEN["in.text_mask"].bool(),
    )
    recorded = ("dq", "dk", "dv", "dtq", "dtk", "dtv")
    golden = {
        name: bnhd(GOLDEN[f"out.{case}.{n}"]) for name, n in zip(NAMES, recorded, strict=True)
    }
    found = backward(library, problem)
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
