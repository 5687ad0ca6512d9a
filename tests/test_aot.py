"""The Triton kernels compile for GPUs that are not here, without spills and within their limits.

``tests/data/aot.json`` has their registers, spills (bytes on NVIDIA, registers on AMD), shared
memory and what their main loops are made of, by release of Triton. After a change that is meant, or
for another release, ``python tests/aot_compile.py all --write tests/data/aot.json`` writes it anew.
"""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

from skiparse import registry

SHARED_LIMIT = {  # bytes a block may have
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}
ARCHITECTURES = ("sm_90", "sm_80", "gfx942")  # those with configurations of their own
KERNELS = {"skiparse_forward", "skiparse_delta", "skiparse_dkdv", "skiparse_dq"}
TILED = {"skiparse_forward_tma", "skiparse_dkdv_tma", "skiparse_dq_tma"}
PINGPONG = "skiparse_forward_pingpong"
TABLE = json.loads((Path(__file__).parent / "data/aot.json").read_text())
RELEASE = triton.__version__
NAMED = {  # the kernels that spill: (release, architecture, kernel, D, masked) -> bytes
    ("3.6.0", "sm_80", "skiparse_forward", 128, True): 8,
    ("3.6.0", "sm_89", "skiparse_dq", 128, True): 8,
    ("3.6.0", "sm_90", "skiparse_dkdv", 256, True): 8,
    ("3.7.1", "sm_89", "skiparse_dq", 128, True): 8,
    ("3.7.1", "sm_100", "skiparse_dkdv", 64, True): 8,
}
# The most that is spilled for some of the shapes that are not in the table, with masks or without:
# bytes of a thread on NVIDIA, registers on AMD. In the main loop only where that is said.
NAMED_ELSEWHERE = {
    ("3.6.0", "sm_80", "skiparse_forward", 128, True): 8,  # runs of 3, tokens left over, fp16
    ("3.6.0", "sm_80", "skiparse_dkdv", 64, True): 8,  # runs of 3 or very long
    ("3.6.0", "sm_80", "skiparse_dq", 32, True): 8,  # single-skip
    ("3.6.0", "sm_90", "skiparse_forward_pingpong", 128, True): 8,  # very long runs
    ("3.6.0", "sm_90", "skiparse_dkdv", 256, False): 8,  # runs of 3
    ("3.6.0", "sm_90", "skiparse_dkdv", 256, True): 16,
    ("3.6.0", "gfx942", "skiparse_dq", 256, False): 10,  # fp32
    ("3.6.0", "gfx942", "skiparse_dq", 256, True): 11,
    ("3.7.1", "sm_90", "skiparse_forward_pingpong", 128, True): 8,  # very long runs
    ("3.7.1", "sm_90", "skiparse_dkdv", 256, True): 8,  # runs of 3
    ("3.7.1", "gfx942", "skiparse_dq", 256, False): 1,  # fp32
    ("3.7.1", "gfx942", "skiparse_dq", 256, True): 3,
}
NAMED_IN_THE_LOOP = {("3.6.0", "gfx942", "skiparse_dq", 256, masked) for masked in (False, True)}
LOCAL_MEMORY = {"LDL", "STL", "scratch_"}


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
                names = KERNELS | (TILED | {PINGPONG} if arch == "sm_90" else set())
                assert sorted(row["kernel"] for row in rows) == sorted(names)


def test_nothing_spills_but_what_is_named(compiled):
    for row in compiled:
        key = (RELEASE, row["arch"], row["kernel"], row["D"], row["masked"])
        assert row["spills"] == NAMED.get(key, 0), row


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared"] > SHARED_LIMIT[row["arch"]]] == []


def test_offsets_are_64_bit(compiled):
    """A tensor may have more than 2**31 elements."""
    assert [row for row in compiled if row["offsets"] != ["i64"]] == []


def of_table(row):
    """The row of the table for the same kernel, or None for a release that it does not have."""
    if RELEASE not in TABLE:
        pytest.skip(f"the table has no Triton {RELEASE}; write it with tests/aot_compile.py")
    keys = ("kernel", "arch", "D", "masked")
    (found,) = (r for r in TABLE[RELEASE] if all(r[k] == row[k] for k in keys))
    return found


def test_the_table_is_up_to_date(compiled):
    for row in compiled:
        assert row == of_table(row)


def test_what_spills_is_named():
    """In the whole table, every architecture and release."""
    found = {
        (release, row["arch"], row["kernel"], row["D"], row["masked"]): row["spills"]
        for release, rows in TABLE.items()
        for row in rows
        if row["spills"]
    }
    assert found == NAMED


def test_no_main_loop_spills():
    for rows in TABLE.values():
        assert [row for row in rows if LOCAL_MEMORY & set(row["loop"])] == []


def test_the_registry_names_every_architecture():
    (row,) = (row for row in registry.BACKENDS if row.name == "triton")
    compiled = {row["arch"] for rows in TABLE.values() for row in rows}
    assert set(re.findall(r"sm_\d+|gfx\d+", row.verified)) == compiled == set(SHARED_LIMIT)


def test_hopper_reads_tiles_by_descriptor():
    """Two copies and the products; nothing is moved between registers and shared memory."""
    for rows in TABLE.values():
        for row in rows:
            if row["kernel"] == "skiparse_forward_tma" and row["arch"] == "sm_90":
                counts = dict(row["loop"])
                assert counts.pop("UTMALDG") == 2, row
                assert counts.pop("HGMMA") in (12, 16), row  # at D = 64 and 128, blocks of 128
                assert set(counts) <= ({"LDG"} if row["masked"] else set()), row


def hopper_rows(kernel):
    """Of every release: ``{(D, masked): row}``."""
    for rows in TABLE.values():
        found = {(r["D"], r["masked"]): r for r in rows if (r["kernel"], r["arch"]) == kernel}
        yield {key: row for key, row in found.items() if key[0] <= 128}


@pytest.mark.parametrize("kernel", ["skiparse_dkdv", "skiparse_dq"])
def test_hopper_turns_the_backward_by_descriptor(kernel):
    """Two copies a turn; the products under way together; fewer instructions for the same rows."""
    by_tiles, by_pointers = (list(hopper_rows((f"{kernel}{x}", "sm_90"))) for x in ("_tma", ""))
    for tiled, pointed in zip(by_tiles, by_pointers, strict=True):
        assert set(tiled) == {(64, False), (64, True), (128, False), (128, True)}
        for key, row in tiled.items():
            assert row["loop"]["UTMALDG"] == 2, row
            assert "HMMA" not in row["loop"], row  # all products are of a warpgroup
            if "dkdv" in kernel:
                assert "LDG" not in row["loop"], row
            turn, before = row["turn"], pointed[key]["turn"]
            assert turn["waits"] <= 3, row
            size, size_before = (x["rows"][0] * x["rows"][1] for x in (turn, before))
            assert turn["instructions"] * size_before <= 0.9 * before["instructions"] * size, row


def test_the_roles_of_pingpong():
    """Copies of k, of v and twice of q, of video or text, of 64 columns; both consumers multiply.

    With key masks each thread loads one byte and hands it round.
    """
    for found in hopper_rows((PINGPONG, "sm_90")):
        assert set(found) == {(64, False), (64, True), (128, False), (128, True)}
        for (D, masked), row in found.items():
            in_loop = (D + 128) // 16
            handed = {"LDG": 1, "STS": 1, "LDS": 2} if masked else {}
            assert row["loop"] == {"HGMMA": in_loop} | handed
            assert row["spills"] == 0
            roles = row["roles"]
            assert roles["HGMMA"] == 4 * in_loop  # before the loop, in it and behind it
            assert roles["UTMALDG"] == 8 * D // 64
            assert roles["USETMAXREG"] > 3
            assert roles["MUFU.EX2"] >= 64  # of a thread, the whole block of keys


def test_the_other_kernels_copy_tiles_past_the_registers():
    """On NVIDIA: no tile goes through registers into shared memory in a forward."""
    products = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    for rows in TABLE.values():
        for row in rows:
            if row["kernel"] == "skiparse_forward" and row["arch"].startswith("sm_"):
                assert row["loop"][products.get(row["arch"], "HMMA")], row
                assert row["loop"]["LDGSTS"], row


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
        ["--dims", "64", "128", "--grid", "21", "45", "80", "2"],
        ["--dims", "64", "128", "256", "--dtype", "float16"],
        ["--dims", "64", "128", "256", "--dtype", "float32"],
    ],
    ids=" ".join,
)
def test_other_shapes(arch, options):
    rows = aot_compile(arch, *options)
    fits(rows)
    for row in rows:
        key = (RELEASE, arch, row["kernel"], row["D"], row["masked"])
        assert row["spills"] <= NAMED_ELSEWHERE.get(key, 0), row
        assert key in NAMED_IN_THE_LOOP or not LOCAL_MEMORY & set(row["loop"]), row


@pytest.mark.full
@pytest.mark.parametrize("arch", sorted(SHARED_LIMIT))
def test_the_whole_table_is_up_to_date(arch):
    rows = aot_compile(arch)
    fits(rows)
    for row in rows:
        assert row == of_table(row)
