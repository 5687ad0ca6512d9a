"""The compiled kernels compute attention: their PTX is executed on a CPU by the machine in ptx/.

Every problem is run in several ways (asynchrony early, late and at random, warps in any order),
which must give the same bits, held to the error budget. Faults are planted in the PTX, and caught.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import built
import pytest

from skiparse import registry

built.require_tools(modules=False, allow_module_level=True)

HOPPER = {"skiparse_forward_tma", "skiparse_forward_pingpong", "skiparse_pack"}
HOPPER |= {"skiparse_dkdv_tma", "skiparse_dq_tma"}
EVERYWHERE = {"skiparse_forward", "skiparse_delta", "skiparse_dkdv", "skiparse_dq"}
HOPPER_PARTS = (
    "attention",
    "fp32",
    "pingpong",
    "pingpong_masked",
    "pack",
    "planted_more",
    "headline",
)
AMPERE_PARTS = ("attention", "fp32", "pack", "planted_on_ampere")
QUICK = (("sm_90", "quick", "planted", "refused"), ("sm_80", "quick_on_ampere"))


def execute(arch, *parts):
    """The rows of ``python -m ptx``, run without the interpreter."""
    command = [sys.executable, "-m", "ptx", arch, *parts]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = Path(__file__).parent
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows:
        print("  ".join(map(str, row.values())))
    return rows


@pytest.fixture(scope="module")
def rows():
    """One process for each architecture: start-up and compilation are most of the time."""
    with ThreadPoolExecutor(len(QUICK)) as pool:
        return [row for part in pool.map(lambda x: execute(*x), QUICK) for row in part]


def executed(rows, arch):
    found = [row["counts"] for row in rows if row["arch"] == arch and "counts" in row]
    return {name for counts in found for name in counts if name.startswith("skiparse_")}


def test_every_kernel_is_executed(rows):
    """In ways that all give the same bits, within the budget; else there were no rows."""
    assert executed(rows, "sm_90") == HOPPER | EVERYWHERE | {"skiparse_pack_backward"}
    assert executed(rows, "sm_80") == EVERYWHERE
    modes = {(row["arch"], row["way"][0]) for row in rows if "counts" in row}
    assert modes >= {("sm_90", "early"), ("sm_90", "late"), ("sm_90", "random"), ("sm_80", "late")}


def test_planted_faults_are_caught(rows):
    caught = [row for row in rows if "caught" in row]
    assert len({(row["kernel"], row["fault"]) for row in caught}) == 9
    assert {row["kernel"] for row in caught} == HOPPER
    deadlocks = [row["caught"] for row in caught if "deadlock" in row["caught"]]
    assert deadlocks
    for text in deadlocks:  # told with warp, line and text
        assert re.search(r"warp \d+ at PTX line \d+: mbarrier\.try_wait", text)


def test_illegal_tensor_maps_are_refused(rows):
    (text,) = (row["refused"] for row in rows if "refused" in row)
    assert "strides (136,), not positive multiples of 16" in text


def test_the_registry_says_what_was_executed(rows):
    """The architectures in the table of the README are those of the rows."""
    for name, kernels in (
        ("triton", EVERYWHERE | HOPPER - {"skiparse_forward_pingpong"}),
        ("triton.pingpong", {"skiparse_forward_pingpong"}),
    ):
        (row,) = (row for row in registry.BACKENDS if row.name == name)
        said = re.search(r"([^:;]*): the compiled PTX executed on a CPU", row.verified)[1]
        archs = {arch for arch in ("sm_80", "sm_90") if executed(rows, arch) & kernels}
        assert set(re.findall(r"sm_\d+", said)) == archs
        assert "ot yet run on a GPU" in row.verified


@pytest.mark.full
@pytest.mark.parametrize(
    ("arch", "part"),
    [
        *(("sm_90", part) for part in HOPPER_PARTS),
        *(("sm_80", part) for part in AMPERE_PARTS),
    ],
)
def test_all_of_it(arch, part):
    """All patterns, dtypes and head dimensions, early, late and with three seeds; all faults."""
    assert execute(arch, part)
