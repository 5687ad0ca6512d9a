"""The Triton kernels give the exact answer, and gradients, in any pattern, length and layout.

On a CUDA device if there is one, else in Triton's interpreter, which is slow: a few tiny cases by
default, the matrix with ``-m full``.
"""

import importlib.util
import itertools
import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from skiparse import SkipPattern
from skiparse.backends import Inputs, Outputs, reference, sdpa
from skiparse.backends import triton as backend
from skiparse.testing import Answer, check, make_problem, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)

# Blocks are 32 or 16 rows in the interpreter, so these have several, and some only partly filled.
CASES = {
    "single": (SkipPattern.single(2), {"N": 77, "T": 5}),
    "group": (SkipPattern.group(4), {"N": 96, "T": 0}),
    "block": (SkipPattern.block(2, 64), {"N": 64, "T": 19}),  # runs of whole blocks
    "long-runs": (SkipPattern.block(2, 72), {"N": 72, "T": 0}),
    "dense": (SkipPattern.dense(), {"N": 41, "T": 3}),
    "odd": (SkipPattern(3, 2), {"N": 50, "T": 7}),
    "short": (SkipPattern(3, 2), {"N": 3, "T": 2}),  # N < n*w
    "one-token": (SkipPattern.single(2), {"N": 1, "T": 0}),
    "text-alone": (SkipPattern.single(2), {"N": 0, "T": 5}),
    "nothing": (SkipPattern.single(2), {"N": 0, "T": 0}),
    "masked": (SkipPattern.group(2), {"N": 45, "T": 20, "masked": True}),
    "masked-alone": (SkipPattern.single(3), {"N": 40, "T": 0, "masked": True}),
    "packed": (SkipPattern.group(2), {"B": 2, "N": 20, "T": 3, "H": 2, "layout": "packed"}),
    "expanded": (SkipPattern.single(2), {"B": 2, "N": 20, "T": 3, "layout": "expanded"}),
    "heads-first": (SkipPattern.single(2), {"N": 20, "T": 3, "H": 2, "layout": "heads_first"}),
    "D8": (SkipPattern.single(2), {"N": 20, "T": 3, "D": 8}),
    "D40": (SkipPattern.group(2), {"N": 40, "T": 3, "D": 40}),
    "D64": (SkipPattern.single(2), {"N": 40, "T": 3, "D": 64}),
    "negative-scale": (SkipPattern.single(2), {"N": 20, "T": 3, "scale": -0.3}),
    "no-batch": (SkipPattern.single(2), {"B": 0, "N": 20, "T": 3}),
}


def problem_of(case, dtype=torch.float32):
    p, arguments = CASES[case]
    return make_problem(p, device=DEVICE, dtype=dtype, **{"H": 1, **arguments})


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case):
    problem = problem_of(case)
    check(run(problem, "triton"), problem)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", ["odd", "masked", "packed", "D64"])
def test_half_precision(case, dtype):
    problem = problem_of(case, dtype)
    check(run(problem, "triton"), problem)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "packed", "heads_first", "expanded"])
@pytest.mark.parametrize("masked", [False, True])
def test_full_matrix(dtype, layout, masked):
    patterns = (
        SkipPattern.dense(),
        SkipPattern.single(4),
        SkipPattern.group(4),
        SkipPattern(3, 2),
        SkipPattern(2, 36),
        SkipPattern(2, 64),
        SkipPattern.group(8),
        SkipPattern(5, 3),
    )
    sizes = ((72, 7), (64, 0), (97, 40), (31, 1), (8, 33))
    for p, (N, T) in itertools.product(patterns, sizes):
        problem = make_problem(
            p, B=2, N=N, T=T, H=1, dtype=dtype, device=DEVICE, layout=layout, masked=masked
        )
        check(run(problem, "triton"), problem)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("D", [1, 16, 24, 40, 64, 80, 96, 128, 192, 256])
def test_any_head_dimension(D, dtype):
    problem = make_problem(
        SkipPattern.group(2), N=80, T=20, D=D, dtype=dtype, device=DEVICE, masked=True
    )
    check(run(problem, "triton"), problem)


def _inputs(problem):
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, scale)


def _grad_text(problem):
    """The gradient of the mean over sub-sequences, an expanded ``[B, n, T, H, D]``."""
    n = problem.pattern.sparsity
    return (problem.grad_text_out / n)[:, None].expand(-1, n, -1, -1, -1)


def _dead_problem():
    """Sub-sequence 1 of the first batch entry has no key left, the second entry none at all."""
    problem = make_problem(SkipPattern(2, 2), B=2, N=20, T=3, H=1, masked=True, device=DEVICE)
    problem.mask[0].view(-1, 2)[1::2] = False
    problem.text_mask[0] = False
    problem.mask[1] = False
    problem.text_mask[1] = False
    return problem


def test_rows_without_a_key_give_nothing_and_take_no_gradient():
    problem = _dead_problem()
    answer = run(problem, "triton")
    assert answer.lse[1].isneginf().all()
    assert answer.text_lse[0, :, 1].isneginf().all()
    assert all((x[1] == 0).all() for x in (answer.out, *answer[4:]))
    check(answer, problem)


@pytest.mark.parametrize("first", [reference, sdpa], ids=lambda m: m.__name__.split(".")[-1])
def test_backward_from_another_backends_forward(first):
    if DEVICE == "cuda" and first is sdpa:
        pytest.skip("sdpa takes no key masks on CUDA")
    problem = _dead_problem()
    inputs = _inputs(problem)
    outputs = Outputs(*first.forward(inputs))
    grads = backend.backward(inputs, outputs, problem.grad_out, _grad_text(problem))
    text_out = outputs.text_out.mean(1)
    check(Answer(outputs.out, text_out, outputs.lse, outputs.text_lse, *grads), problem)


def test_one_key_mask_of_two():
    problem = make_problem(SkipPattern.single(2), N=20, T=5, H=1, masked=True, device=DEVICE)
    for name in ("mask", "text_mask"):
        half = problem.__class__(**(problem.__dict__ | {name: None}))
        check(run(half, "triton"), half)


def test_output_gradients_of_any_stride():
    """Stride 0 over tokens and heads, and a transposed one."""
    problem = make_problem(SkipPattern.group(2), B=2, N=10, T=2, device=DEVICE)
    outputs = backend.forward(_inputs(problem))
    for grad_out in (
        problem.grad_out[:, :1, :1].expand(2, 10, 2, 16),
        problem.grad_out.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        bent = problem.__class__(**(problem.__dict__ | {"grad_out": grad_out}))
        grads = backend.backward(_inputs(bent), outputs, grad_out, _grad_text(bent))
        text_out = outputs.text_out.mean(1)
        check(Answer(outputs.out, text_out, outputs.lse, outputs.text_lse, *grads), bent)


def test_every_run_gives_the_same_bits():
    torch.use_deterministic_algorithms(False)  # by itself, without torch's help
    if DEVICE == "cpu":
        problem = make_problem(SkipPattern.dense(), N=2, T=1, H=1)
    else:
        problem = make_problem(SkipPattern.single(4), N=4099, T=77, H=8, device=DEVICE)
    first = run(problem, "triton")
    for _ in range(29):
        assert all(map(torch.equal, run(problem, "triton"), first))


@pytest.mark.parametrize("name", ["q", "k", "v", "grad_out"])
def test_nan_stays_in_its_sub_sequence(name):
    """One NaN token changes no bit of the other sub-sequences, text rows included."""
    problem = make_problem(SkipPattern(2, 2), N=35, T=3, H=1, device=DEVICE)
    clean = backend.forward(_inputs(problem))
    grads = backend.backward(_inputs(problem), clean, problem.grad_out, _grad_text(problem))
    spoilt = getattr(problem, name).clone()
    spoilt[:, 34] = float("nan")  # the last token, beside the rows that do not exist
    bad = problem.__class__(**(problem.__dict__ | {name: spoilt}))
    outputs = backend.forward(_inputs(bad))
    bad_grads = backend.backward(_inputs(bad), outputs, bad.grad_out, _grad_text(bad))

    spread = {"q": (), "k": outputs[:2], "v": outputs[:2], "grad_out": bad_grads[:2]}
    assert all(x.isnan().any() for x in (*spread[name], *bad_grads[:2]))
    other = torch.arange(35) // 2 % 2 == 0  # token 34 is in sub-sequence 1
    assert torch.equal(outputs.text_out[:, 0], clean.text_out[:, 0])
    assert torch.equal(outputs.text_lse[:, :, 0], clean.text_lse[:, :, 0])
    assert torch.equal(outputs.lse[:, :, other], clean.lse[:, :, other])
    for spoilt, whole in zip((outputs.out, *bad_grads[:3]), (clean.out, *grads[:3]), strict=True):
        assert torch.equal(spoilt[:, other], whole[:, other])


def _like(x, p):
    """A problem with every video tensor ``x``, and no text."""
    text = x.new_empty(1, 0, *x.shape[2:])
    return Inputs(x, x, x, text, text, text, None, None, p, 1.0)


def test_reasons(monkeypatch):
    def ones(dtype=torch.float32, D=16, device="cpu"):
        return _like(torch.ones(1, 4, 1, D, dtype=dtype, device=device), SkipPattern(2))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.why_not() is None
    assert backend.why_not(ones()) is None
    assert backend.why_not(ones(D=256), backward=True) is None
    assert "bfloat16 wrongly" in backend.why_not(ones(torch.bfloat16))
    assert "not torch.float64" in backend.why_not(ones(torch.float64))
    assert "up to 256, not 257" in backend.why_not(ones(D=257))
    assert 'not "meta"' in backend.why_not(ones(device="meta"))
    long = torch.ones(1).expand(1, 2**31 - 100, 1, 1)
    assert "not to 2147483548" in backend.why_not(_like(long, SkipPattern(2)))
    few = torch.ones(1, 4, 1, 1)
    assert "not to 2147483648" in backend.why_not(_like(few, SkipPattern(2, 2**30)))

    many = torch.ones(1).expand(2**10, 2**20, 2, 1)  # single tokens: a block for each
    assert "not 2147483648" in backend.why_not(_like(many, SkipPattern(2**20)))
    assert backend.why_not(_like(many[:-1], SkipPattern(2**20))) is None

    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA or HIP device" in backend.why_not()
    assert "only if TRITON_INTERPRET=1" in backend.why_not(ones())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in backend.why_not()


def test_asking_does_not_import_triton():
    """Nor does it need to be there."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from skiparse.backends import triton as backend\n"
        "assert 'not installed' in backend.why_not()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
