"""The backward kernels that copy whole tiles are as exact as those that find rows by pointers.

In Triton's interpreter, or on a GPU that has the tensor memory accelerator.
"""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from skiparse import GridPattern, SkipPattern
from skiparse.backends import Inputs, Outputs
from skiparse.backends import triton as backend
from skiparse.backends.triton import backward_kernel, plans
from skiparse.backends.triton.device import Config
from skiparse.testing import Answer, check, make_problem

HAS_GPU = torch.cuda.is_available()
if HAS_GPU and torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
    pytest.skip("no configuration for this GPU", allow_module_level=True)
DEVICE = "cuda" if HAS_GPU else "cpu"
HALVES = (torch.float16, torch.bfloat16) if HAS_GPU else (torch.float16,)

# Blocks are of 16 rows where they are tiles in the interpreter, and of 32 where they are not.
CASES = {
    "single": (SkipPattern.single(2), {"N": 74, "T": 5}),
    "group": (SkipPattern.group(4), {"N": 96, "T": 37}),
    "no-queries": (SkipPattern.group(4), {"N": 96, "T": 37, "text_queries": False}),
    "group-alone": (SkipPattern.group(2), {"N": 72, "T": 0}),
    "one-text": (SkipPattern.single(3), {"N": 51, "T": 1}),
    "block": (SkipPattern.block(2, 64), {"N": 64, "T": 19}),
    "long-runs": (SkipPattern(2, 32), {"N": 128, "T": 3}),  # several blocks in a run, two runs
    "dense": (SkipPattern.dense(), {"N": 41, "T": 3}),
    "short": (SkipPattern.single(2), {"N": 4, "T": 70}),
    "masked": (SkipPattern.group(2), {"N": 44, "T": 20, "masked": True}),
    "packed": (SkipPattern.group(2), {"B": 2, "N": 24, "T": 3, "H": 2, "layout": "packed"}),
    "two-heads": (SkipPattern.single(2), {"B": 2, "N": 20, "T": 3, "H": 2, "D": 32}),
    "negative-scale": (SkipPattern.single(2), {"N": 20, "T": 3, "scale": -0.3}),
}
REFUSED = {
    "not-divided": (SkipPattern.single(2), {"N": 77}),
    "grid": (GridPattern.group((1, 4, 10), 2), {"N": 40, "T": 3}),
    "runs-of-3": (SkipPattern(2, 3), {"N": 60}),
    "cut-run": (SkipPattern(1, 8), {"N": 12}),
    "none": (SkipPattern.single(2), {"N": 0, "T": 5}),
    "heads-first": (SkipPattern.single(2), {"N": 20, "T": 3, "H": 2, "layout": "heads_first"}),
    "expanded": (SkipPattern.single(2), {"B": 2, "N": 20, "T": 3, "layout": "expanded"}),
    "no-batch": (SkipPattern.single(2), {"B": 0, "N": 20, "T": 3}),
    "D40": (SkipPattern.single(2), {"N": 20, "T": 3, "D": 40}),
}
TILES = ("skiparse_dkdv_tma", "skiparse_dq_tma")
POINTERS = ("skiparse_dkdv", "skiparse_dq")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if not HAS_GPU:
        for name, config in (("DKDV", Config(16, 32, 1, 1)), ("DQ", Config(32, 16, 1, 1))):
            configs = {"interpreter": {256: config}}
            monkeypatch.setattr(backward_kernel, f"{name}_TMA_CONFIGS", configs)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names = []

    def launch(kernel, *args, **options):
        names.append(kernel.__name__)
        original(kernel, *args, **options)

    original = backward_kernel.launch
    monkeypatch.setattr(backward_kernel, "launch", launch)
    plans._plan.cache_clear()  # with a plan nothing is launched this way
    return names


def problem_of(p, arguments, dtype=torch.float16):
    return make_problem(p, device=DEVICE, dtype=dtype, **{"H": 1, **arguments})


def inputs_of(problem):
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, scale)


def of_each(problem):
    """The gradient of the text rows of each sub-sequence, shared by all: ``[B, n, T, H, D]``."""
    n = problem.pattern.sparsity
    return (problem.grad_text_out / n)[:, None].expand(-1, n, -1, -1, -1)


def gradients(problem, grad_out=None, grad_text_out=None):
    """Those of the kernels, with outputs of the reference; and the answer to be checked."""
    inputs = inputs_of(problem)
    outputs = Outputs(*backend.forward(inputs))
    grad_out = problem.grad_out if grad_out is None else grad_out
    grad_text_out = of_each(problem) if grad_text_out is None else grad_text_out
    grads = backward_kernel.backward(inputs, outputs, grad_out, grad_text_out)
    return Answer(outputs.out, outputs.text_out.mean(1), *outputs[2:], *grads)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, dtype, launched):
    problem = problem_of(*CASES[case], dtype)
    check(gradients(problem), problem)
    assert launched == ["skiparse_delta", *TILES]


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_left_to_the_other_kernels(case, launched):
    problem = problem_of(*REFUSED[case])
    check(gradients(problem), problem)
    names = [name for name in launched if name != "skiparse_delta"]
    assert names == list(POINTERS)


def test_wide_types_are_left_to_them_too(launched):
    problem = problem_of(*CASES["dense"], torch.float32)
    check(gradients(problem), problem)
    assert launched[1:] == list(POINTERS)


def test_gradients_in_odd_strides_leave_the_tiles_to_dq(launched):
    """That of a sum, stride 0 everywhere; and rows that do not begin at 16 bytes."""
    p = problem_of(SkipPattern.group(2), {"B": 2, "N": 24, "T": 3, "H": 2})
    summed = p.grad_out[:, :1, :1].expand(-1, 24, 2, -1)
    moved = torch.zeros(p.grad_out.numel() + 4, dtype=p.grad_out.dtype, device=DEVICE)[4:]
    for grad_out in (summed, moved.view(p.grad_out.shape).copy_(p.grad_out)):
        bent = replace(p, grad_out=grad_out)
        check(gradients(bent), bent)
        assert launched[-2:] == ["skiparse_dkdv", "skiparse_dq_tma"]


def test_a_dimension_of_one_may_have_any_stride(launched):
    """A batch of one, and one row of text."""
    problem = problem_of(SkipPattern.single(2), {"N": 20, "T": 1})
    odd = {name: getattr(problem, name) for name in ("q", "k", "v", "text_q", "text_k", "text_v")}
    for name, x in odd.items():
        row = 5 if name.startswith("text") else x.stride(1)
        odd[name] = x.as_strided(x.shape, (7, row, *x.stride()[2:]))
    problem = replace(problem, **odd)
    check(gradients(problem), problem)
    assert launched[-2:] == list(TILES)


def test_runs_that_only_the_blocks_of_dq_fit(launched):
    """Runs of 48: blocks of 16 lie inside one, blocks of 32 do not."""
    problem = problem_of(SkipPattern(2, 48), {"N": 96, "T": 5})
    check(gradients(problem), problem)
    assert launched[-2:] == (["skiparse_dkdv", "skiparse_dq_tma"] if not HAS_GPU else POINTERS)


def test_each_sub_sequence_its_own_gradient_of_the_text(launched):
    """Not that of a mean; the pointers' kernels are held to the oracle, these to them."""
    p = problem_of(SkipPattern.group(4), {"B": 2, "N": 32, "T": 21, "H": 2})
    inputs = inputs_of(p)
    outputs = backend.forward(inputs)
    own = torch.randn(2, 4, 21, 2, 16, generator=torch.Generator().manual_seed(5))
    own = own.to(DEVICE, p.q.dtype)
    found = backward_kernel.backward(inputs, outputs, p.grad_out, own)
    assert launched[-2:] == list(TILES)
    wide = Inputs(*(x.float() for x in p.inputs), None, None, p.pattern, inputs.scale)
    outputs = backend.forward(wide)
    right = backward_kernel.backward(wide, outputs, p.grad_out.float(), own.float())
    assert launched[-2:] == list(POINTERS)
    for x, y in zip(found, right, strict=True):
        assert (x - y).abs().max() < 2**-8 * y.abs().max()


def test_rows_without_a_key_take_no_gradient(launched):
    """Sub-sequence 1 of the first batch entry has no key left, the second entry none at all."""
    problem = problem_of(SkipPattern(2, 2), {"B": 2, "N": 20, "T": 3, "masked": True})
    problem.mask[0].view(-1, 2)[1::2] = False
    problem.text_mask[0] = False
    problem.mask[1] = False
    problem.text_mask[1] = False
    answer = gradients(problem)
    assert launched[-2:] == list(TILES)
    assert all((x[1] == 0).all() for x in answer[4:])
    check(answer, problem)


def test_weights_that_overflow_are_dropped_with_their_keys(launched):
    """Keys behind the end score 0, and 2**-lse of very low scores is inf."""
    problem = problem_of(SkipPattern.single(2), {"N": 20, "T": 3, "scale": -8.0})
    low = replace(problem, q=problem.q.abs() + 1, k=problem.k.abs() + 1)
    low = replace(low, text_q=low.text_q.abs() + 1, text_k=low.text_k.abs() + 1)
    answer = gradients(low)
    assert launched[-2:] == list(TILES)
    assert answer.lse.max() < -128
    check(answer, low)


def test_every_run_gives_the_same_bits(launched):
    torch.use_deterministic_algorithms(False)  # by itself, without torch's help
    arguments = {"N": 4096, "T": 77, "H": 8, "D": 64} if HAS_GPU else {"N": 16, "T": 3}
    problem = problem_of(SkipPattern.single(4), arguments)
    first = gradients(problem)
    for _ in range(29 if HAS_GPU else 4):
        assert all(map(torch.equal, gradients(problem), first))
    assert launched[-2:] == list(TILES)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "p",
    [
        SkipPattern.dense(),
        SkipPattern.single(4),
        SkipPattern.group(4),
        SkipPattern(2, 32),
        SkipPattern(3, 2),
        SkipPattern.group(8),
    ],
    ids=str,
)
def test_many(layout, masked, p, launched):
    period = p.sparsity * p.run
    for N, T in ((period, 0), (3 * period, 1), (2 * period, 33), (4 * period, 70)):
        for D in (16, 32, 64):
            arguments = {"B": 2, "N": N, "T": T, "H": 2, "D": D, "layout": layout}
            problem = problem_of(p, arguments | {"masked": masked})
            check(gradients(problem), problem)
            assert launched[-2:] == list(TILES)
