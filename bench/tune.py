"""Measures which backend is fastest on a device, and writes the order for ``backend="auto"``.

The file goes where ``skiparse.registry`` looks for it. It holds the times it came from, so that
whoever reads it can judge; a pass (forward or backward) is ordered by itself, as its backend is
chosen by itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from skiparse import registry
from skiparse.backends import Inputs
from skiparse.bench import run
from skiparse.bench.cases import CASES, HEADLINE, SPARSITY, Case
from skiparse.models.data.atomic import replacing
from skiparse.testing import make_problem

PATTERNS = ("single", "group", "group.skip")


def tune(
    *,
    device: str,
    dtype: torch.dtype,
    shape: str = HEADLINE,
    sparsity: Sequence[int] = SPARSITY,
    rounds: int = 7,
) -> Path:
    """Time every backend that may be chosen by itself, forward and backward, with text and without.

    Args:
        shape: how names of cases begin, such as ``"121x576x1024"``.
        sparsity: of 2, 4 and 8.

    Returns:
        The file written, ``skiparse/orders/<device>.json``; the next process goes by it.
    """
    on = torch.device(device).type
    backends = [row.name for row in registry.BACKENDS if on in row.auto + row.if_measured]
    rules = []
    for k in sparsity:
        for kind in PATTERNS:
            for T in (CASES[f"{shape}.dense.fwd"].T, 0):
                forward, both = (
                    replace(CASES[f"{shape}.k{k}.{kind}.{end}"], T=T) for end in ("fwd", "fwdbwd")
                )
                rules += _rules(forward, both, device, dtype, rounds, backends)
    here = torch.empty(0, device=device)
    path = registry.orders_file(registry.device_name(here))
    path.parent.mkdir(exist_ok=True)
    about = {
        "device": registry.device_name(here),
        "driver": run.driver(device),
        "versions": run.versions(),
        "commit": run.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with replacing(path) as aside:
        lines = ",\n".join(json.dumps(rule) for rule in rules)
        aside.write_text(f'{json.dumps(about)[:-1]}, "rules": [\n{lines}\n]}}\n')
    registry.measured.cache_clear()
    return path


def _rules(
    forward: Case,
    both: Case,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    backends: Sequence[str],
) -> list[dict[str, Any]]:
    """The order for the forward pass, and for the backward pass by the difference."""
    once, twice = (_times(case, device, dtype, rounds, backends) for case in (forward, both))
    difference = {name: twice[name] - once[name] for name in twice if name in once}
    p = make_problem(forward.pattern, N=forward.N, T=forward.T, H=1, D=forward.D, dtype=dtype)
    inputs = Inputs(p.q, p.k, p.v, p.text_q, p.text_k, p.text_v, None, None, p.pattern, 1.0)
    return [
        registry.problem_like(inputs, backward=backward)
        | {
            "order": sorted(milliseconds, key=milliseconds.__getitem__),
            "ms": {name: round(value, 3) for name, value in milliseconds.items()},
            "case": forward.name,
        }
        for backward, milliseconds in ((False, once), (True, difference))
    ]


def _times(
    case: Case, device: str, dtype: torch.dtype, rounds: int, backends: Sequence[str]
) -> dict[str, float]:
    """Milliseconds by backend, of those that take the case."""
    found = run.measure([case], device, dtype, rounds, backends, [])[case]
    print(run.table(case, found), flush=True)
    return {
        timing.name.removeprefix("skiparse."): timing.median * 1e3
        for timing in found
        if timing.seconds and timing.name.startswith("skiparse.")
    }
