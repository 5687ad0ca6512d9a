"""A row of measurements: what its names mean, in which units, who fills them in, how it is kept.

Every file of rows (``results.jsonl``, ``block.jsonl``, ``vae.jsonl``, ``cache.jsonl``, and those of
a run on a GPU) has these names and no others, so that the same name is the same quantity wherever
it stands.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from skiparse.models.data.atomic import replacing

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results.jsonl"  # of the operator; those of others lie beside it

ALWAYS = {
    "case": "what was measured, by name",
    "backend": "by whom: a backend, a contender, a way of doing it",
    "kind": "hardware (measured) or model (computed)",
    "device": "the processor's own name for itself",
    "driver": "of a GPU; null on a CPU",
    "threads": "of a CPU; null on a GPU",
    "dtype": "of inputs and weights",
    "versions": "of what the figures depend on",
    "commit": "of the checkout, with + if it had changes; null outside one",
    "date": "when, in UTC",
}
TIMES = {
    "median_ms": "milliseconds of one call: the median over the rounds",
    "spread_ms": "milliseconds of the fastest and the slowest round",
    "rounds": "how often it was timed, in turns with the others",
}
FIGURES = {
    "shape": "in words, where the case does not name it",
    "parameters": "of the model",
    "tflop": "10^12 floating-point operations of one call, counted",
    "published_tflop": "the same as somebody published it",
    "tflops": "10^12 floating-point operations a second, of what was asked for",
    "gb_s": "10^9 bytes a second, read and written",
    "peak_extra_mib": "2^20 bytes at the peak, beyond what was held before",
    "kept_mib": "2^20 bytes that autograd holds between forward and backward, weights not counted",
    "parts_ms": "milliseconds of each part of a step: medians",
    "predicted_gain": "share of a step that is saved, by the parts",
    "measured_gain": "share of a step that is saved: the median over the rounds",
    "speedup": "how many times faster than the first contender: the median over the rounds",
    "ceiling": "the most the speedup can be: the ratio of query-key pairs",
    "reached": "speedup over ceiling",
    "dense": "the dense kernel that the speedup is over",
    "dense_ms": "milliseconds of that",
    "ptxas": "the version of the program that made machine code for Triton",
}
VOCABULARY = ALWAYS | TIMES | FIGURES


def row(
    case: str,
    backend: str,
    *,
    device: str,
    dtype: torch.dtype,
    seconds: Sequence[float] = (),
    **figures: Any,
) -> Row:
    """What was measured just now on this machine.

    Args:
        case, backend, device, dtype: see ``VOCABULARY``.
        seconds: of one call in each round; none where only other things were measured.
        figures: by names of ``FIGURES``, in their units.

    Raises:
        ValueError: for a name that is not in the vocabulary.
    """
    unknown = figures.keys() - FIGURES.keys()
    if unknown:
        raise ValueError(f"rows know no {', '.join(sorted(unknown))}; take a name of FIGURES")
    found: Row = {
        "case": case,
        "backend": backend,
        "kind": "hardware",
        "device": device_name(device),
        "driver": driver(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if seconds:
        milliseconds = [1e3 * each for each in seconds]
        found |= {
            "median_ms": round(statistics.median(milliseconds), 4),
            "spread_ms": [round(min(milliseconds), 4), round(max(milliseconds), 4)],
            "rounds": len(seconds),
        }
    return found | figures | made_by()


def made_by() -> dict[str, Any]:
    """With what, from which checkout, and when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": versions(), "commit": commit(), "date": now}


def mib(size: int | None) -> float | None:
    """Bytes in MiB, as they stand in a row."""
    return None if size is None else round(size / 2**20, 1)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a JSON-lines file: the whole new file is written aside, synced, and renamed."""
    old = path.read_text() if path.exists() else ""
    with replacing(path) as aside:
        aside.write_text(old + "".join(json.dumps(r) + "\n" for r in rows))


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@functools.cache
def device_name(device: str) -> str:
    """The processor's own name for itself."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The CPU's own name for itself."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def driver(device: str) -> str | None:
    """The GPU driver's version, None on a CPU."""
    if not device.startswith("cuda"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return output(query).splitlines()[0] if output(query) else None


@functools.cache
def versions() -> dict[str, str | None]:
    """Of what the figures depend on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("skiparse", "torch", "triton"):
        there = importlib.util.find_spec(name) is not None
        found[name] = importlib.import_module(name).__version__ if there else None
    return found


@functools.cache
def commit() -> str | None:
    """The checkout's commit, with ``+`` if it had changes; None outside a checkout."""
    here = ["git", "-C", str(Path(__file__).parent)]
    head = output([*here, "rev-parse", "--short=12", "HEAD"])
    code = ("../skiparse", "../models", "*.py")
    changed = output([*here, "status", "--porcelain", "--untracked-files=no", "--", *code])
    return (head + ("+" if changed else "")) or None


def output(command: list[str]) -> str:
    """What a program prints, nothing if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
