"""The packing kernels compile for GPUs that are not here: no spills, 16-byte accesses, a table.

``tests/data/pack_aot.json`` has what they use with the Triton named there. After a change that is
meant, or with another Triton, ``python tests/test_pack_aot.py`` writes it anew.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TABLE = Path(__file__).parent / "data/pack_aot.json"
ARCHITECTURES = ("sm_90", "sm_80", "gfx942")  # those with configurations of their own
CASES = [(128, "bfloat16"), (64, "bfloat16")]
MORE = [(D, dtype) for D in (16, 32, 48, 96, 256) for dtype in ("bfloat16", "float16", "float32")]
MORE += [(D, dtype) for D in (64, 128) for dtype in ("float16", "float32")]
KERNELS = {"skiparse_pack", "skiparse_pack_backward"}


def rows_of(arch, cases):
    """Compiled in a process of its own, without the interpreter; one row a kernel and case."""
    command = [sys.executable, __file__, arch, json.dumps(cases)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def rows_of_all(cases):
    with ThreadPoolExecutor(2) as pool:
        return [
            row for rows in pool.map(lambda a: rows_of(a, cases), ARCHITECTURES) for row in rows
        ]


def key(row):
    return row["kernel"], row["arch"], row["D"], row["dtype"]


@pytest.fixture(scope="module")
def compiled():
    return rows_of_all(CASES)


def test_every_kernel_is_there(compiled):
    wanted = {(k, arch, *case) for k in KERNELS for arch in ARCHITECTURES for case in CASES}
    assert {key(row) for row in compiled} == wanted


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["spills"]] == []


def test_offsets_are_64_bit(compiled):
    """A tensor may have more than 2**31 elements."""
    assert [row for row in compiled if row["offsets"] != ["i64"]] == []


def test_rows_are_read_and_written_once_16_bytes_at_a_time(compiled):
    """At the head dimension of SUV. Three tensors in and three out, as two halves each.

    Each access is there once, as nothing is unrolled; what is read besides are the tables and
    weights, and what is written four sums for the gradients of the weights.
    """
    for row in compiled:
        if row["D"] == 128:
            loads, stores = (
                {size: n for size, n in row["accesses"].items() if size.startswith(kind)}
                for kind in ("ld", "st")
            )
            assert set(loads) == {"ld16"}, row
            sums = {"st4": 4} if "backward" in row["kernel"] else {}
            assert stores == {"st16": 6} | sums, row


def test_resources_are_those_of_the_table(compiled):
    """Registers and bytes of shared memory, if this is the Triton the table was written with."""
    import triton

    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {table['triton']}, this is {triton.__version__}")
    assert {key(row): row for row in table["rows"]} == {key(row): row for row in compiled}


@pytest.mark.full
def test_other_head_dimensions_and_dtypes_do_not_spill_either():
    rows = rows_of_all(MORE)
    assert len(rows) == 2 * len(ARCHITECTURES) * len(MORE)
    assert [row for row in rows if row["spills"] or row["offsets"] != ["i64"]] == []


def launches(arch, D, dtype):
    """What forward and backward would launch at the headline shape: (kernel, args, kwargs) each."""
    import aot_compile
    import torch

    from skiparse.backends.triton import pack_kernel

    B, N, T, H, n = 2, 36864, 512, 24, 8

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    video, text, packed = ([empty(B, L, H, D) for _ in range(3)] for L in (N, T, N + n * T))
    norms, cos = [empty(D)] * 2, empty(N, D // 2, dtype=torch.float32)
    shared = (norms, norms, cos, cos, [D // 16 * x for x in (4, 6, 6)], 1e-6, n, n)
    recorded = []
    aot_compile.JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: recorded.append(
        (kernel, args, kwargs)
    )
    pack_kernel.architecture = lambda q: arch
    pack_kernel.forward(video, text, *shared)
    pack_kernel.backward(packed, video[:2], text[:2], *shared)
    return recorded


def accesses(compiled):
    """How many accesses to global memory there are of each number of bytes."""
    found = Counter()
    nvidia = r"\b(ld|st)\.global\S*?\.(?:v(\d)\.)?b(\d+)"
    for kind, count, bits in re.findall(nvidia, compiled.asm.get("ptx", "")):
        found[f"{kind}{int(count or 1) * int(bits) // 8}"] += 1
    amd = r"\b(?:global|buffer)_(load|store)_(?:dword(?:x(\d))?|u?(short|byte))\b"
    for kind, count, small in re.findall(amd, compiled.asm.get("amdgcn", "")):
        size = {"": 4 * int(count or 1), "short": 2, "byte": 1}[small]
        found[f"{'ld' if kind == 'load' else 'st'}{size}"] += 1
    return {"accesses": dict(sorted(found.items()))}


def main(arch, cases):
    import aot_compile
    import torch

    target = aot_compile.TARGETS[arch]
    for D, dtype in json.loads(cases):
        for kernel, args, kwargs in launches(arch, D, getattr(torch, dtype)):
            compiled = aot_compile.compile_launch(kernel, args, kwargs, target)
            row = {"kernel": kernel.__name__, "arch": arch, "D": D, "dtype": dtype}
            row |= aot_compile.resources(compiled, target) | accesses(compiled)
            print(json.dumps(row | {"offsets": aot_compile.offset_types(compiled)}), flush=True)


def write_table():
    import triton

    lines = ",\n".join(json.dumps(row) for row in rows_of_all(CASES))
    TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 3 else write_table()
