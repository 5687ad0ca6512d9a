"""Measures which backend is fastest on a device, and writes the order for ``backend="auto"``.

The file goes where ``skiparse.registry`` looks for it. It holds the times it came from, so that
whoever reads it can judge; a pass (forward or backward) is ordered by itself, as its backend is
chosen by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from skiparse import registry
from skiparse.backends import Inputs
from skiparse.bench import rows
from skiparse.bench.op import run
from skiparse.bench.op.cases import CASES, HEADLINE, SPARSITY, Case
from skiparse.models.data.atomic import replacing

PATTERNS = ("single", "group", "group.skip")


def tune(
    *,
    device: str,
    dtype: torch.dtype,
    shape: str = HEADLINE,
    sparsity: Sequence[int] = SPARSITY,
    rounds: int = 7,
    text: Sequence[bool] = (True, False),
    folder: Path | None = None,
) -> Path:
    """Time every backend that may be chosen by itself, forward and backward, with text and without.

    Args:
        shape: how names of cases begin, such as ``"121x576x1024"``.
        sparsity: of 2, 4 and 8.
        text: whether there is any, each way by itself.
        folder: for the file; where ``"auto"`` looks for it if None.

    Returns:
        The file written, ``<folder>/<device>.json``; the next process goes by it.
    """
    on = torch.device(device).type
    backends = [row.name for row in registry.BACKENDS if on in row.auto + row.if_measured]
    rules = []
    for T in (CASES[f"{shape}.dense.fwd"].T if with_text else 0 for with_text in text):
        forward, both = (
            [
                replace(CASES[f"{shape}.k{k}.{kind}.{end}"], T=T)
                for k in sparsity
                for kind in PATTERNS
            ]
            for end in ("fwd", "fwdbwd")
        )
        rules += _rules(forward, both, device, dtype, rounds, backends)
    here = torch.empty(0, device=device)
    path = registry.orders_file(registry.device_name(here))
    path = path if folder is None else folder / path.name
    path.parent.mkdir(exist_ok=True)
    about = {
        "device": registry.device_name(here),
        "driver": rows.driver(device),
        **rows.made_by(),
    }
    with replacing(path) as aside:
        lines = ",\n".join(json.dumps(rule) for rule in rules)
        aside.write_text(f'{json.dumps(about)[:-1]}, "rules": [\n{lines}\n]}}\n')
    registry.measured.cache_clear()
    return path


def _rules(
    forward: Sequence[Case],
    both: Sequence[Case],
    device: str,
    dtype: torch.dtype,
    rounds: int,
    backends: Sequence[str],
) -> list[dict[str, Any]]:
    """The orders for the forward passes, and for the backward passes by the difference."""
    once, twice = (_times(cases, device, dtype, rounds, backends) for cases in (forward, both))
    rules = []
    for case, full in zip(forward, both, strict=True):
        first, all_of_it = once[case], twice[full]
        difference = {name: all_of_it[name] - first[name] for name in all_of_it if name in first}
        x, text = (
            torch.empty(1, rows, 1, case.D, dtype=dtype, device="meta") for rows in (case.N, case.T)
        )
        inputs = Inputs(x, x, x, text, text, text, None, None, case.pattern, 1.0)
        rules += [
            registry.problem_like(inputs, backward=backward)
            | {
                "order": sorted(milliseconds, key=milliseconds.__getitem__),
                "ms": {name: round(value, 3) for name, value in milliseconds.items()},
                "case": case.name,
            }
            for backward, milliseconds in ((False, first), (True, difference))
        ]
    return rules


def _times(
    cases: Sequence[Case], device: str, dtype: torch.dtype, rounds: int, backends: Sequence[str]
) -> dict[Case, dict[str, float]]:
    """Milliseconds by case and backend, of those that take the case."""
    found = run.measure(cases, device, dtype, rounds, backends, [])
    times = {}
    for case, timings in found.items():
        print(run.table(case, timings), flush=True)
        times[case] = {
            timing.name.removeprefix("skiparse."): timing.median * 1e3
            for timing in timings
            if timing.seconds and timing.name.startswith("skiparse.")
        }
    return times
