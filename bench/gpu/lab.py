"""What every measurement works with: inputs on the device, a clock, the best dense kernel, rows."""

from __future__ import annotations

import functools
import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from skiparse.bench import rows
from skiparse.bench.op import baselines, run
from skiparse.bench.op.baselines import Contender
from skiparse.bench.op.cases import BATCHES, CASES, HEADLINE, REHEARSAL, Case
from skiparse.bench.timing import Timing, Work, peak_extra_bytes
from skiparse.testing import Problem

SAMPLE_MS = 20.0  # shorter work is repeated within a sample
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


@dataclass(frozen=True)
class Setting:
    """Where and on what: the headline shape on a GPU, or the smallest one on a CPU."""

    device: str
    dtype: torch.dtype
    shape: str  # the beginning of the names of the cases
    rounds: int
    square: int  # rows of the matrix product
    copied: int  # bytes of the copy

    def case(self, kind: str, k: int = 1, *, backward: bool = False, batch: int = 1) -> Case:
        """A case by its pattern: "dense", "single", "group", or "group.skip" for skip order."""
        shape = self.shape if batch == 1 else f"{self.shape}-b{batch}"
        pattern = "dense" if kind == "dense" else f"k{k}.{kind}"
        return CASES[f"{shape}.{pattern}.{'fwdbwd' if backward else 'fwd'}"]

    def backend(self, name: str) -> str:
        """The backend to run: on a CPU one that stands in for the kernels."""
        if self.device == "cpu" and name.startswith("triton"):
            return "sdpa"
        return name

    @property
    def small(self) -> Case:
        """The smallest case with text, dense."""
        return CASES[f"{REHEARSAL}.dense.fwd"]

    @property
    def batch(self) -> int:
        """The larger of the two batch sizes."""
        (size,) = BATCHES[self.shape]
        return size


GPU = Setting("cuda", torch.bfloat16, HEADLINE, rounds=7, square=8192, copied=2**31)
DRY_RUN = Setting("cpu", torch.float32, REHEARSAL, rounds=1, square=64, copied=2**20)


class Lab:
    """One process's measurements. Inputs and dense kernels are made when they are first needed."""

    def __init__(self, setting: Setting, out: Path) -> None:
        self.setting, self.out = setting, out
        self.problem = functools.lru_cache(1)(self._problem)  # one shape's at a time
        self.best_dense = functools.cache(self._best_dense)

    def _problem(self, video: str, heads: int, batch: int) -> Problem:
        kind = {"video": video, "heads": heads, "B": batch}
        case = next(c for c in CASES.values() if {n: getattr(c, n) for n in kind} == kind)
        return run.draw(case, self.setting.dtype, self.setting.device)

    def inputs(self, case: Case) -> Problem:
        """The case's problem; cases that differ in the pattern only share their tensors."""
        return replace(self.problem(case.video, case.heads, case.B), pattern=case.pattern)

    def _best_dense(self, case: Case) -> Contender:
        """The fastest of torch's dense kernels that run here."""
        times = {}
        for contender in self.dense(case):
            assert contender.work is not None
            try:
                contender.work()
                times[contender] = self.milliseconds(contender.work)
            except RuntimeError as error:  # this kernel does not take this
                if is_lost(error):
                    raise
                print(contender.name, error, flush=True)
        return min(times, key=times.__getitem__)

    def dense(self, case: Case) -> list[Contender]:
        """Torch's dense kernels, less the one that is never the fastest on a GPU."""
        found = baselines.dense(case, self.inputs(case))
        return [c for c in found if c.name.removeprefix("dense.") in DENSE]

    def compare_dense(self, case: Case) -> None:
        """Time torch's dense kernels in turn; one that cannot run here says why."""
        works = []
        for contender in self.dense(case):
            try:
                assert contender.work is not None
                contender.work()
                works.append(contender)
            except RuntimeError as error:
                if is_lost(error):
                    raise
                print(contender.name, error, flush=True)
        self.report(case, sorted(self.take_turns(works), key=lambda t: t.median), beside=0)

    def compare(self, case: Case, make: Callable[[Case, Problem], Contender]) -> None:
        """Time a contender in turn with the best dense kernel; print the table, append its row.

        ``make`` must raise unless what it makes is right on this very case.
        """
        contender = make(case, self.inputs(case))
        dense = self.best_dense(replace(case, k=1, kind="dense", skip_order=False))
        self.report(case, self.take_turns([dense, contender]), beside=1)

    def report(self, case: Case, timings: Sequence[Timing], *, beside: int) -> None:
        """Print the timings, the best dense one first, and append the rows from ``beside`` on."""
        print(run.table(case, timings), flush=True)
        device, dtype = self.setting.device, self.setting.dtype
        dense = {"dense": timings[0].name, "dense_ms": round(timings[0].median * 1e3, 3)}
        self.append([run.row(case, t, timings[0], device, dtype) | dense for t in timings[beside:]])

    def take_turns(self, entered: Sequence[Contender], rounds: int | None = None) -> list[Timing]:
        """Seconds of each contender, round after round, and its memory: that of a first call."""
        seconds: dict[str, list[float]] = {c.name: [] for c in entered}
        peaks = {}
        for contender in entered:
            assert contender.work is not None
            peaks[contender.name] = peak_extra_bytes(contender.work, self.setting.device)
        for _ in range(rounds or self.setting.rounds):
            for contender in entered:
                assert contender.work is not None
                seconds[contender.name].append(self.milliseconds(contender.work) / 1e3)
        return [Timing(name, tuple(s), peaks[name]) for name, s in seconds.items()]

    def milliseconds(self, work: Work) -> float:
        """Of one call, by the device's own clock, averaged over ``SAMPLE_MS`` or more."""
        if self.setting.device == "cpu":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample(repeats: int) -> float:
            begin.record()
            for _ in range(repeats):
                work()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / repeats

        once = sample(1)
        return once if once >= SAMPLE_MS else sample(round(SAMPLE_MS / once) + 1)

    def record(
        self,
        case: str,
        work: Callable[[], object],
        *,
        backend: str = "torch",
        **figures: Callable[[float], float],
    ) -> None:
        """Time something that is no attention; ``figures`` follow from its milliseconds."""
        work()
        times = [self.milliseconds(work) for _ in range(self.setting.rounds)]
        median = statistics.median(times)
        self.passed(
            case,
            backend,
            [each / 1e3 for each in times],
            **{name: round(of(median), 4) for name, of in figures.items()},
        )

    def passed(self, case: str, backend: str, seconds: Sequence[float], **figures: float) -> None:
        """Print a row of what is no single attention, and append it."""
        device, dtype = self.setting.device, self.setting.dtype
        row = rows.row(case, backend, device=device, dtype=dtype, seconds=seconds, **figures)
        print(row, flush=True)
        self.append([row], "passes.jsonl")

    def passes(
        self, what: str, case: Case, work: Callable[[], Sequence[Tensor]], backend: str = "torch"
    ) -> None:
        """Time a pass over memory; GB/s counts what it makes twice, as read and as written."""
        moved = 2 * sum(made.nbytes for made in work())
        name = f"{what}, {case.name.rsplit('.', 1)[0]}"
        self.record(name, work, backend=backend, gb_s=lambda ms: moved / ms / 1e6)

    def append(self, made: Sequence[rows.Row], name: str = "results.jsonl") -> None:
        """Add rows to a file of ours, each with the program that made machine code for Triton."""
        rows.append(self.out / name, [{**row, "ptxas": ptxas()} for row in made])


LOST = ("CUDA error", "Triton Error [CUDA]", "CUDNN_STATUS_EXECUTION_FAILED")


def is_lost(error: BaseException) -> bool:
    """Whether an error has taken the CUDA context with it, so that nothing after it can work."""
    return any(sign in str(error) for sign in LOST)


@functools.cache
def ptxas() -> str | None:
    """The version of the ptxas that Triton uses, such as "12.8.93"; None without Triton.

    The key of a compiled kernel holds it, so it is also that of kernels found in the cache.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from triton import knobs

    return ptxas_version(knobs.nvidia.ptxas.path)


def ptxas_version(program: str | Path) -> str:
    """What the program says of itself."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split(", V")[1].split()[0]
