"""The backward kernels that copy whole tiles are as exact as those that find rows by pointers.

In Triton's interpreter, or on a GPU that has the tensor memory accelerator.
"""

import os
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from skiparse import SkipPattern
from skiparse.backends import Inputs, Outputs
from skiparse.backends import triton as backend
from skiparse.backends.triton import backward_kernel
from skiparse.backends.triton.device import Config
from skiparse.testing import Answer, check, make_problem, run

HAS_GPU = torch.cuda.is_available()
if HAS_GPU and torch.cuda.get_device_capability() not in ((9, 0), (10, 0)):
    pytest.skip("no configuration for this GPU", allow_module_level=True)
DEVICE = "cuda" if HAS_GPU else "cpu"
HALVES = (torch.float16, torch.bfloat16) if HAS_GPU else (torch.float16,)

# Blocks are of 16 rows where they are tiles in the interpreter, and of 32 where they are not.
CASES = {
    "single": (SkipPattern.single(2), {"N": 74, "T": 5}),
    "group": (SkipPattern.group(4), {"N": 96, "T": 37}),
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
