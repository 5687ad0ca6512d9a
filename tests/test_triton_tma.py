"""The forward kernel that copies whole tiles is as exact as the one that finds rows by pointers.

In Triton's interpreter, or on a GPU that has the tensor memory accelerator.
"""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from ran import recorded

from skiparse import GridPattern, SkipPattern
from skiparse.backends import Inputs
from skiparse.backends.triton import forward_kernel
from skiparse.backends.triton.device import Config
from skiparse.testing import Answer, check, make_problem, run

HAS_GPU = torch.cuda.is_available()
if HAS_GPU and torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
    pytest.skip("no configuration for this GPU", allow_module_level=True)
DEVICE = "cuda" if HAS_GPU else "cpu"
HALVES = (torch.float16, torch.bfloat16) if HAS_GPU else (torch.float16,)

# Blocks of keys are 16 rows in the interpreter.
CASES = {
    "single": (SkipPattern.single(2), {"N": 74, "T": 5}),
    "group": (SkipPattern.group(4), {"N": 96, "T": 21}),
    "no-queries": (SkipPattern.group(4), {"N": 96, "T": 21, "text_queries": False}),
    "group-alone": (SkipPattern.group(2), {"N": 72, "T": 0}),
    "block": (SkipPattern.block(2, 64), {"N": 64, "T": 19}),
    "long-runs": (SkipPattern(2, 32), {"N": 128, "T": 3}),  # several blocks in a run, two runs
    "whole-blocks": (SkipPattern.single(2), {"N": 64, "T": 32}),
    "dense": (SkipPattern.dense(), {"N": 41, "T": 3}),
    "masked": (SkipPattern.group(2), {"N": 44, "T": 20, "masked": True}),
    "packed": (SkipPattern.group(2), {"B": 2, "N": 24, "T": 3, "H": 2, "layout": "packed"}),
    "two-heads": (SkipPattern.single(2), {"B": 2, "N": 20, "T": 3, "H": 2, "D": 32}),
}
REFUSED = {
    "not-divided": (SkipPattern.single(2), {"N": 77}),
    "grid": (GridPattern.group((1, 4, 10), 2), {"N": 40, "T": 3}),
    "runs-of-3": (SkipPattern(2, 3), {"N": 60}),
    "runs-of-24": (SkipPattern(2, 24), {"N": 96}),
    "cut-run": (SkipPattern(1, 8), {"N": 12}),
    "short": (SkipPattern(1, 8), {"N": 5}),
    "none": (SkipPattern.single(2), {"N": 0, "T": 5}),
    "heads-first": (SkipPattern.single(2), {"N": 20, "T": 3, "H": 2, "layout": "heads_first"}),
    "expanded": (SkipPattern.single(2), {"B": 2, "N": 20, "T": 3, "layout": "expanded"}),
    "no-batch": (SkipPattern.single(2), {"B": 0, "N": 20, "T": 3}),
    "no-heads": (SkipPattern.single(2), {"N": 20, "T": 3, "H": 0}),
    "D40": (SkipPattern.single(2), {"N": 20, "T": 3, "D": 40}),
    "D8": (SkipPattern.single(2), {"N": 20, "T": 3, "D": 8}),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if not HAS_GPU:
        configs = {"interpreter": {256: Config(32, 16, 1, 1)}}
        monkeypatch.setattr(forward_kernel, "TMA_CONFIGS", configs)


def problem_of(p, arguments, dtype=torch.float16):
    return make_problem(p, device=DEVICE, dtype=dtype, **{"H": 1, **arguments})


def inputs_of(problem):
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, scale)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs(case, dtype):
    problem = problem_of(*CASES[case], dtype)
    assert forward_kernel._tma(inputs_of(problem)) is not None
    with recorded() as ran:
        outputs = forward_kernel.forward(inputs_of(problem))
    if HAS_GPU:  # the interpreter launches nothing
        ran.only("skiparse_forward_tma")
    right = run(problem, "reference")
    answer = Answer(outputs.out, outputs.text_out.mean(1), *outputs[2:], *right[4:])
    check(answer, problem)


@pytest.mark.parametrize("case", ["single", "masked", "not-divided"])
@pytest.mark.parametrize("scale", [2.0, -0.3, 0.0])
def test_any_scale(case, scale):
    problem = problem_of(*(CASES | REFUSED)[case])
    problem = replace(problem, scale=scale)
    assert (forward_kernel._tma(inputs_of(problem)) is None) == (case in REFUSED)
    outputs = forward_kernel.forward(inputs_of(problem))
    right = run(problem, "reference")
    check(Answer(outputs.out, outputs.text_out.mean(1), *outputs[2:], *right[4:]), problem)


def test_a_positive_scale_is_so_in_fp32():
    assert [forward_kernel.positive(x) for x in (0.1, 1e-50, 0.0, -0.1)] == [True] + 3 * [False]


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_left_to_the_other_kernel(case):
    problem = problem_of(*REFUSED[case])
    assert forward_kernel._tma(inputs_of(problem)) is None
    assert forward_kernel.forward(inputs_of(problem)).out.isfinite().all()


def test_misaligned_rows_and_wide_types_are_left_to_it_too():
    problem = problem_of(*CASES["dense"])
    odd = torch.zeros(problem.k.numel() + 4, dtype=problem.k.dtype, device=DEVICE)[4:]
    k = odd.view(problem.k.shape).copy_(problem.k)
    moved = problem.__class__(**(problem.__dict__ | {"k": k}))
    assert forward_kernel._tma(inputs_of(moved)) is None
    wide = problem_of(*CASES["dense"], torch.float32)
    assert forward_kernel._tma(inputs_of(wide)) is None


def test_rows_without_a_key():
    problem = problem_of(SkipPattern(2, 2), {"B": 2, "N": 20, "T": 3, "masked": True})
    problem.mask[1] = False
    problem.text_mask[1] = False
    assert forward_kernel._tma(inputs_of(problem)) is not None
    outputs = forward_kernel.forward(inputs_of(problem))
    assert (outputs.out[1] == 0).all()
    assert outputs.lse[1].isneginf().all()
    assert outputs.lse[0].isfinite().all()
