"""A clock, and a high-water mark of memory, on a CPU and on CUDA."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]

LEAST_SAMPLE = 0.05  # seconds; shorter work is repeated within a sample


@dataclass(frozen=True)
class Timing:
    """What one contender took: seconds per round, peak extra bytes, or why it did not run."""

    name: str
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    why_not: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def speedup(timing: Timing, first: Timing) -> float:
    """How much faster than the first: the median of the rounds' ratios."""
    pairs = zip(first.seconds, timing.seconds, strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def repeats_of(once: float) -> int:
    """How often work that takes ``once`` seconds is done within a sample."""
    return max(1, round(LEAST_SAMPLE / once))


def time_of(work: Work, repeats: int, device: str) -> float:
    """Seconds of one call, averaged over ``repeats``."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    _synchronize(device)
    return (time.perf_counter() - start) / repeats


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_extra_bytes(work: Work, device: str) -> int | None:
    """Memory at its highest during ``work``, beyond what was held before; None if not known here.

    On CUDA from torch's allocator. On Linux from the kernel's high-water mark of resident memory,
    reset just before.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    mark = Path("/proc/self/clear_refs")
    if not os.access(mark, os.W_OK):
        return None
    _return_free_memory()
    mark.write_text("5")  # resets the high-water mark, see proc(5)
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def _return_free_memory() -> None:
    """Give what the allocator keeps back to the system, or its reuse would count as nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
