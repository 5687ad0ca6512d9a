"""The figures of a run, and what they mean for a whole schedule of layers."""

from __future__ import annotations

from collections.abc import Sequence

from skiparse.bench.gpu import schedule
from skiparse.bench.op.cases import CASES, SPARSITY
from skiparse.bench.rows import Row
from skiparse.pattern import ceiling


def summary(results: Sequence[Row], passes: Sequence[Row]) -> str:
    """A line for each row; the gain over 32 layers that the layers' own ratios amount to."""
    lines = ["", f"{'case':34}{'what':18}{'ms':>9}{'TFLOP/s':>9}{'x dense':>9}{'reached':>9}"]
    for row in results:
        lines.append(
            f"{row['case']:34}{row['backend']:18}{row['median_ms']:9.2f}{row['tflops']:9.1f}"
            f"{row['speedup']:9.2f}{row['reached']:9.2f}"
        )
    for row in passes:
        more = [f"{row[key]:9.1f} {unit}" for key, unit in UNITS.items() if key in row]
        what = f"{row['case']}, {row['backend']}"
        lines.append(f"{what:60}{row['median_ms']:9.2f}{''.join(more)}")
    for backend in dict.fromkeys(row["backend"] for row in results):
        for end in ("fwd", "fwdbwd"):
            gain, limit = schedule_gain(results, backend, end)
            if gain:
                lines.append(f"32 layers, {backend}, {end}: {gain:.2f}x dense, of {limit:.2f}x")
    return "\n".join(lines)


UNITS = {"tflops": "TFLOP/s", "gb_s": "GB/s", "speedup": "x dense"}


def schedule_gain(results: Sequence[Row], backend: str, end: str) -> tuple[float, float]:
    """How much faster than dense the released schedule of layers is, and the most there could be.

    From the layers' own ratios to dense attention, single-skip and group-skip in turn; 0 if a
    layer was not measured. Group-skip is taken in the order in which it is faster.
    """
    gains: dict[tuple[int, str], float] = {}
    shapes = set()
    for row in results:
        case = CASES[row["case"]]
        if row["backend"] == backend and row["case"].endswith(f".{end}") and case.B == 1:
            if case.kind == "dense":
                continue
            key = case.k, case.kind
            gains[key] = max(gains.get(key, 0.0), row["speedup"])
            shapes.add((case.N, case.T))
    if len(gains) < 2 * len(SPARSITY) or len(shapes) != 1:
        return 0.0, 0.0
    counts = schedule.LAYERS, schedule.SPARSITY
    spent = sum(
        layers if k == 1 else layers / 2 * sum(1 / gains[k, kind] for kind in ("single", "group"))
        for layers, k in zip(*counts, strict=True)
    )
    return sum(schedule.LAYERS) / spent, ceiling(*counts, *shapes.pop())
