"""Counts the kernels that the tests of a GPU make Triton compile, without one: a pytest plugin.

The tests run as on a Hopper GPU, but on meta tensors: what they would launch is recorded, and
nothing is computed or compared. Most of them fail at the first figure they look at; what counts is
what they launched before.

``python -m skiparse.bench.gpu.counted FILE...`` prints the number as its last line.
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from skiparse import testing
from skiparse.backends import Inputs
from skiparse.bench.gpu.kernels import recording, specialised
from skiparse.testing import Answer, Problem, make_problem


def run(problem: Problem, backend: str) -> Answer:
    """What ``skiparse.testing.run`` launches, for backends with kernels of ours."""
    if backend.startswith("triton"):
        from skiparse.backends.triton import backward_kernel, forward_kernel, pingpong_kernel

        p = problem
        scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
        q, k, v, text_q, text_k, text_v = p.inputs
        inputs = Inputs(q, k, v, text_q, text_k, text_v, p.mask, p.text_mask, p.pattern, scale)
        kernel = pingpong_kernel if backend == "triton.pingpong" else forward_kernel
        outputs = kernel.forward(inputs)
        n = p.pattern.sparsity
        grad_text_out = p.grad_text_out[:, None].expand(-1, n, -1, -1, -1)
        backward_kernel.backward(inputs, outputs, p.grad_out, grad_text_out)
    return Answer(*[problem.q] * len(Answer._fields))


def launch(problem: Problem, backend: str, **_: Any) -> None:
    """What ``skiparse.testing.check_sample`` launches."""
    run(problem, backend)


def nothing(*_: Any) -> None:
    """``skiparse.testing.check``: there is nothing to be right or wrong."""


def on_meta(*arguments: Any, device: str = "meta", **rest: Any) -> Problem:
    """``skiparse.testing.make_problem`` without memory, and without drawing numbers."""
    with mock.patch.object(torch, "randn", _undrawn):
        return make_problem(*arguments, device="meta", **rest)


def _undrawn(shape: Sequence[int], *, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


class Counter:
    """The plugin: what stands in for a GPU, and the kernels recorded."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[Any]:
        """Record what a test launches."""
        with recording() as recorded:
            result = yield
        self.keys |= {specialised(*launch).key for launch in recorded}
        return result


def main(files: Sequence[str]) -> int:
    """Run the tests; the exit status is 0 whatever they say."""
    counter = Counter()
    gpu: dict[str, Any] = {"is_available": lambda: True, "get_device_capability": lambda *_: (9, 0)}
    stand_ins: dict[str, Any] = {
        "make_problem": on_meta,
        "run": run,
        "check": nothing,
        "check_sample": launch,
    }
    with mock.patch.multiple(torch.cuda, **gpu), mock.patch.multiple(testing, **stand_ins):
        pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", *files], plugins=[counter])
    print(len(counter.keys))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
