"""Plans launch what Triton itself would launch, and are kept by all that decides it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import built
import pytest
import torch

from skiparse.backends.triton import plans

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def found():
    """What ``python launches.py`` says, without the interpreter."""
    built.require_tools(modules=False)

    def run(what):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        command = [sys.executable, str(FOLDER / "launches.py"), what]
        done = subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True)
        assert done.returncode == 0, f"{what}\n{done.stdout}\n{done.stderr}"
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_every_launch_is_tritons_own_and_no_part_of_the_key_is_idle(found):
    rows = found("check")
    launches = rows["launches"]
    assert launches >= 35
    assert rows["kernels"] >= 20
    assert rows["whole key"] == [
        {"wrong": [], "through_triton": launches},
        {"wrong": [], "through_triton": 0},
    ]
    some = {
        "shape": "sliced",
        "strides": "packed",
        "dtype": "fp32",
        "residue": "q-moved",
        "scale": "negative-scale",
        "pattern": "group",
        "config": "pointers",
    }
    for part, call in some.items():
        for row in rows[part]:
            assert call in row["wrong"], f"{call} does not need the {part} in the key"


def test_threads(found):
    assert found("threads") == {"launches": 200, "mixed": 0}


def test_hooks_into_triton_still_see_launches_and_debug_compiles_another_kernel(found):
    assert found("hooks") == {"seen": ["skiparse_forward", "7 args"], "compiled": [1, 0, 0]}


def allocates(tensors, size):
    return [tensors[0].new_empty(size, 2, dtype=torch.int32)]


def test_plans_are_counted():
    """Other shapes for ever take no more memory than so many plans."""
    plans._plan.cache_clear()
    for size in range(plans.PLANS + 10):
        (made,) = plans.planned(allocates, [torch.ones(1)], size)
        assert made.shape == (size, 2)
        assert made.dtype == torch.int32
    assert plans._plan.cache_info().currsize == plans.PLANS
    assert plans._plan.cache_info().misses == plans.PLANS + 10
