"""The Triton kernels compile for GPUs that are not here, without spills and within their limits."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SHARED_LIMIT = {  # bytes a block may have
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = ("sm_90", "sm_80", "gfx942")  # those with configurations of their own
KERNELS = {"skiparse_forward", "skiparse_delta", "skiparse_dkdv", "skiparse_dq"}


def aot_compile(arch, *options):
    """The rows of tests/aot_compile.py, run without the interpreter."""
    command = [sys.executable, str(Path(__file__).with_name("aot_compile.py")), arch, *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def show(rows):
    for row in rows:
        print("  ".join(f"{name}={value!s:<16}" for name, value in row.items()))


@pytest.fixture(scope="module")
def compiled():
    """Every kernel for three architectures, at head dimension 64 and 128, in bf16."""
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda arch: aot_compile(arch, "--dims", "64", "128"), ARCHITECTURES)
        rows = [row for part in parts for row in part]
    show(rows)
    return rows


def test_every_kernel_is_there(compiled):
    for arch in ARCHITECTURES:
        for D in (64, 128):
            for masked in (False, True):
                key = (arch, D, masked)
                rows = [r for r in compiled if (r["arch"], r["D"], r["masked"]) == key]
                assert {row["kernel"] for row in rows} == KERNELS


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["spills"]] == []


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]] == []


def test_offsets_are_64_bit(compiled):
    """A tensor may have more than 2**31 elements."""
    assert [row for row in compiled if row["offsets"] != ["i64"]] == []


def fits(rows):
    show(rows)
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["arch"]]] == []
    assert [row for row in rows if row["offsets"] != ["i64"]] == []


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        ["--dims", "16", "32", "64", "96", "128", "256", "--run", "1"],
        ["--dims", "64", "128", "256", "--run", "3"],
        ["--dims", "64", "128", "--run", "4608"],
        ["--dims", "64", "128", "--tokens", "36863"],
        ["--dims", "64", "128", "256", "--dtype", "float16"],
        ["--dims", "64", "128", "256", "--dtype", "float32"],
    ],
    ids=" ".join,
)
def test_other_shapes(arch, options):
    rows = aot_compile(arch, *options)
    fits(rows)
    assert [row for row in rows if row["spills"]] == []


@pytest.mark.full
@pytest.mark.parametrize("arch", sorted(set(SHARED_LIMIT) - set(ARCHITECTURES)))
def test_other_architectures(arch):
    fits(aot_compile(arch, "--dims", "64", "128", "256", "--masked", "1"))
