"""Which backends a test runs: the one table. A new row of the registry is in it by itself.

What a backend cannot do is not said here: its ``why_not`` says it, and the test then skips with the
reason.
"""

import pytest

from skiparse import registry
from skiparse.backends import Inputs
from skiparse.testing import run

NAMES = tuple(row.name for row in registry.BACKENDS)

# Backends that a CPU runs slowly, or only with a fake in place of their library or device: the file
# of tests that has their matrix. Those that run here at all are in the small matrices too.
OWN_MATRIX = {
    "triton": "test_triton.py",  # interpreted
    "triton.pingpong": "test_pingpong.py",  # its PTX executed, and a model of its schedule
    "npu_fusion": "test_npu_fusion.py",  # a fake of torch_npu
    "ascendc": "test_ascend_host.py",  # the kernels on a twin
    "ascendc.half_scores": "test_ascend_host.py",
}

MATRIX = tuple(name for name in NAMES if name not in OWN_MATRIX)
SMALL = tuple(
    name for name in NAMES if name in MATRIX or registry.load(name).why_not() is None
)  # of few and small problems


def skip_unless(backend, problem):
    """Skip the test, with the reason, if the backend cannot do this problem.

    One that is chosen by itself on a CPU may refuse nothing that is in a matrix here.
    """
    (row,) = (row for row in registry.BACKENDS if row.name == backend)
    scale = 1.0 if problem.scale is None else problem.scale
    inputs = Inputs(
        *problem.inputs, problem.mask, problem.text_mask, problem.pattern, scale
    )  # fmt: skip
    backend = registry.load(row.name)
    reason = backend.why_not(inputs) or backend.why_not(inputs, backward=True)
    if reason is not None:
        assert "cpu" not in row.auto, f"{row.name} is for CPUs, but {reason}"
        pytest.skip(f"{row.name}: {reason}")


def run_if_it_can(problem, backend):
    """``skiparse.testing.run`` by a backend of the table."""
    skip_unless(backend, problem)
    return run(problem, backend)
