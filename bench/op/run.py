"""Times Skiparse attention beside what people use today, and prints the ceiling next to it.

For every case: the backend must first be right on that very case (``check_sample``), or it is not
timed. Then all contenders run in turn, round after round, so that a machine that slows down
slows all of them; figures are medians over the rounds, a speed-up is the median of the rounds'
own ratios to dense attention.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from skiparse import registry
from skiparse.bench import rows
from skiparse.bench.op import baselines
from skiparse.bench.op.baselines import Contender
from skiparse.bench.op.cases import Case
from skiparse.bench.timing import Timing, peak_extra_bytes, repeats_of, speedup, time_of
from skiparse.pattern import SkipPattern, attention_flops
from skiparse.testing import Problem, check_sample

BASELINES = ("dense", "original", "flex", "natten")


def run(
    cases: Sequence[Case],
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 5,
    backends: Iterable[str] = ("sdpa", "triton"),
    others: Iterable[str] = BASELINES,
    results: Path | None = None,
) -> list[rows.Row]:
    """Measure the cases, print a table each, and append the rows to ``results``.

    Args:
        cases: from :mod:`skiparse.bench.op.cases`.
        rounds: interleaved repetitions; medians are over these.
        backends: of skiparse, by name; those that refuse are listed with their reason.
        others: of ``BASELINES``; ``"dense"`` always runs, it is what the rest is compared with.
        results: a JSON-lines file, or None to keep nothing.

    Returns:
        One row per contender that ran.

    Raises:
        AssertionError: if a backend is wrong on a case. Nothing of that case is timed then.
    """
    found: list[rows.Row] = []
    ordered = sorted(cases, key=_shared)
    for _, group in itertools.groupby(ordered, _shared):
        for case, timings in measure(list(group), device, dtype, rounds, backends, others).items():
            print(table(case, timings), flush=True)
            ran = [timing for timing in timings if timing.seconds]
            new = [row(case, timing, timings[0], device, dtype) for timing in ran]
            if results is not None:
                rows.append(results, new)
            found += new
    return found


def _shared(case: Case) -> tuple[str, int, int, bool]:
    """Cases for which dense attention is the same work; they take turns with one run of it."""
    return case.video, case.heads, case.B, case.backward


def draw(case: Case, dtype: torch.dtype, device: str) -> Problem:
    """Random normal inputs of a case, drawn on the device: a GPU is a thousand times faster."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int) -> Tensor:
        shape = case.B, rows, case.heads, case.D
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    q, k, v = (normal(case.N) for _ in range(3))
    text_q, text_k, text_v = (normal(case.T) for _ in range(3))
    grads = normal(case.N), normal(case.T)
    return Problem(q, k, v, text_q, text_k, text_v, *grads, case.pattern)


def measure(
    cases: Sequence[Case],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    backends: Iterable[str],
    others: Iterable[str],
) -> dict[Case, list[Timing]]:
    """Gate and time cases that differ in the pattern only; dense attention leads each list."""
    one = cases[0]
    problem = draw(one, dtype, device)
    dense = _best(baselines.dense(one, problem), device)
    contenders: dict[Case, list[Contender]] = {}
    for case in tqdm(cases, desc="checking", unit="case", disable=None, leave=False):
        own = replace(problem, pattern=case.pattern)
        checked = [_gated(case, own, name) for name in backends]
        rest = [getattr(baselines, name)(case, own) for name in others if name != "dense"]
        contenders[case] = [dense, *checked, *rest]

    turns = {id(c): c for entered in contenders.values() for c in entered}
    seconds: dict[int, list[float]] = {key: [] for key in turns}
    repeats: dict[int, int] = {}
    peaks: dict[int, int | None] = {}
    for key, contender in tqdm(turns.items(), desc="warming up", disable=None, leave=False):
        if contender.work is not None:
            contender.work()  # the first call compiles and fills workspaces
            start = time.perf_counter()
            peaks[key] = peak_extra_bytes(contender.work, device)
            repeats[key] = repeats_of(time.perf_counter() - start)
    for _ in tqdm(range(rounds), desc="rounds", unit="round", disable=None, leave=False):
        for key, contender in turns.items():
            if contender.work is not None:
                seconds[key].append(time_of(contender.work, repeats[key], device))
    return {
        case: [Timing(c.name, tuple(seconds[id(c)]), peaks.get(id(c)), c.why_not) for c in entered]
        for case, entered in contenders.items()
    }


def _gated(case: Case, problem: Problem, backend: str) -> Contender:
    """The backend, if it takes the case; held to the error budget before it may be timed."""
    reason = registry.load(backend).why_not()
    (row,) = (row for row in registry.BACKENDS if row.name == backend)
    device = problem.q.device.type
    if reason is None and device not in row.auto + row.if_measured:
        reason = f'nobody gets it on "{device}" without asking, so it is not timed there'
    if reason is not None:
        return Contender(f"skiparse.{backend}", None, reason)
    try:
        check_sample(problem, backend, backward=case.backward)
    except RuntimeError as error:
        return Contender(f"skiparse.{backend}", None, str(error))
    return baselines.skiparse_backend(case, problem, backend)


def _best(contenders: list[Contender], device: str) -> Contender:
    """The fastest of the dense kernels that run here: the one to be compared with."""
    if len(contenders) == 1:
        return contenders[0]
    timed = {}
    for contender in contenders:
        assert contender.work is not None
        try:
            contender.work()
            timed[contender.name] = time_of(contender.work, 2, device)
        except RuntimeError:  # this kernel does not take this dtype or shape
            continue
    return next(c for c in contenders if c.name == min(timed, key=timed.__getitem__))


def table(case: Case, timings: Sequence[Timing]) -> str:
    """The case's figures, for a terminal."""
    dense = timings[0]
    lines = [
        "",
        f"{case.name}   {case.N:,} video + {case.T} text tokens, {case.heads} heads of {case.D}",
        "".ljust(18) + "    median          spread  TFLOP/s   memory  speed-up  ceiling  reached",
    ]
    for timing in timings:
        if not timing.seconds:
            lines.append(f"{timing.name:18}  not run: {timing.why_not.splitlines()[0]}")
            continue
        low, high = min(timing.seconds) * 1e3, max(timing.seconds) * 1e3
        rate = _flops(case, timing) / timing.median / 1e12
        memory = "?" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**20:.0f} M"
        line = (
            f"{timing.name:18}{timing.median * 1e3:7.1f} ms{low:8.1f}-{high:.1f}".ljust(44)
            + f"{rate:9.3f}{memory:>9}"
        )
        if timing is not dense:
            gain, limit = speedup(timing, dense), case.ceiling
            line += f"{gain:9.2f}x{limit:8.2f}x{gain / limit:8.0%}"
        lines.append(line)
    return "\n".join(lines)


def _flops(case: Case, timing: Timing) -> int:
    """Floating-point operations of what was asked for (a masked-out product counts as none)."""
    pattern = SkipPattern.dense() if timing.name.startswith("dense") else case.pattern
    shape = (case.N, case.T, case.B, case.heads, case.D)
    flops = attention_flops(pattern, *shape)
    return flops + (attention_flops(pattern, *shape, backward=True) if case.backward else 0)


def row(case: Case, timing: Timing, dense: Timing, device: str, dtype: torch.dtype) -> rows.Row:
    """One line of ``results.jsonl``; the speed-up is over dense attention."""
    gain = speedup(timing, dense)
    return rows.row(
        case.name,
        timing.name,
        device=device,
        dtype=dtype,
        seconds=timing.seconds,
        tflops=round(_flops(case, timing) / timing.median / 1e12, 4),
        peak_extra_mib=rows.mib(timing.peak_bytes),
        speedup=round(gain, 4),
        ceiling=round(case.ceiling, 4),
        reached=round(gain / case.ceiling, 4),
    )
