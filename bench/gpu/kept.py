"""Triton's compiled kernels in one file: a second run need not compile them again."""

from __future__ import annotations

import tarfile
from pathlib import Path

NAME = "compiled.tar.gz"
NEEDED = (".json", ".cubin", ".ptx", ".so")  # what a launch reads, and the PTX to look at
LARGEST = 16 * 2**20  # bytes: larger files may not come back from a borrowed machine


def pack(cache: Path, file: Path) -> str:
    """Put the cache into a file; in words, how much."""
    found = [path for path in cache.rglob("*") if path.suffix in NEEDED]
    with tarfile.open(file, "w:gz", compresslevel=6) as archive:
        for path in sorted(found):
            archive.add(path, path.relative_to(cache))
    size = file.stat().st_size
    too_large = (
        f", more than the {LARGEST / 2**20:.0f} that may come back" if size > LARGEST else ""
    )
    count = sum(path.suffix == ".cubin" for path in found)
    return f"{count} in {file.name}, {size / 2**20:.1f} MiB{too_large}"


def unpack(file: Path, cache: Path) -> str:
    """Lay the kernels of an earlier run into the cache; in words, how many."""
    if not file.exists():
        return f"none, there is no {file}"
    with tarfile.open(file) as archive:
        archive.extractall(cache, filter="data")
    return f"{sum(1 for _ in cache.rglob('*.cubin'))} kernels of {file}"
