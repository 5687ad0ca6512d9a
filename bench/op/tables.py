"""Writes the generated tables of the books: backends from the registry, figures from results.jsonl.

``python -m skiparse.bench.op.tables FILE ...`` replaces what stands between the markers
``<!-- name -->`` and ``<!-- end name -->``; a test fails when a file is behind.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from skiparse.bench import rows
from skiparse.bench.op.cases import CASES, HEADLINE, SPARSITY, Case
from skiparse.models.data.atomic import replacing
from skiparse.registry import BACKENDS

HOW = {
    "skiparse.sdpa": "skiparse (sdpa)",
    "skiparse.triton": "skiparse (triton)",
    "skiparse.triton.pingpong": "skiparse (triton, ping-pong)",
    "original": "the original way",
    "flex": "FlexAttention",
    "natten": "NATTEN",
}


def backends() -> str:
    """The backends, in the order in which a call without a name tries them."""
    rows = [
        f"| `{row.name}` | {row.what} | {', '.join(row.chosen_on)} | {row.verified} |"
        for row in BACKENDS
    ]
    head = "| backend | what it is | chosen by itself on | verified on |\n|---|---|---|---|"
    return "\n".join([head, *rows])


def in_short(case: Case) -> bool:
    """Is it told in the README? The headline's video in natural order, at the largest k, if fair.

    With one head, torch's dense backward has a single thread on a CPU, which flatters the others.
    """
    fair = case.heads > 1 or not case.backward
    return case.video == HEADLINE and case.k == max(SPARSITY) and fair and not case.skip_order


def benchmark(
    results: Path = rows.RESULTS, *, wanted: Callable[[Case], bool] = lambda _: True
) -> str:
    """The latest row of every case and contender on each device, speed-up beside its ceiling."""
    latest: dict[tuple[str, str, str], rows.Row] = {}
    for row in rows.read(results):
        if row["case"] in CASES and row["backend"] in HOW and wanted(CASES[row["case"]]):
            latest[row["device"], row["case"], row["backend"]] = row
    parts = []
    for device in sorted({key[0] for key in latest}):
        found = [row for key, row in latest.items() if key[0] == device]
        found.sort(
            key=lambda row: (list(CASES).index(row["case"]), list(HOW).index(row["backend"]))
        )
        parts += [
            f"On {device}, {found[0]['dtype']}:",
            "",
            "| case | attention | median | over dense | ceiling | reached | extra memory |",
            "|---|---|---:|---:|---:|---:|---:|",
            *(
                f"| `{row['case']}` | {HOW[row['backend']]} | {row['median_ms']:,.0f} ms "
                f"| {row['speedup']:.2f}x | {row['ceiling']:.2f}x | {row['reached']:.2f} "
                f"| {'?' if row['peak_extra_mib'] is None else round(row['peak_extra_mib'])} MiB |"
                for row in found
            ),
            "",
        ]
    return "\n".join(parts).rstrip()


TABLES: dict[str, Callable[[], str]] = {
    "backends": backends,
    "benchmark": benchmark,
    "benchmark in short": lambda: benchmark(wanted=in_short),
}


def render(text: str) -> str:
    """The text with its generated parts made anew.

    Raises:
        ValueError: if it has none, or one without an end.
    """
    begun = {f"<!-- {name} -->\n": name for name in TABLES if f"<!-- {name} -->\n" in text}
    if not begun:
        raise ValueError(
            f"none of {', '.join(TABLES)} is marked in the text; add <!-- backends -->"
        )
    for start, name in begun.items():
        end = f"<!-- end {name} -->"
        if end not in text:
            raise ValueError(f"no {end} in the text; add it")
        before, _, rest = text.partition(start)
        text = before + start + TABLES[name]() + "\n" + end + rest.partition(end)[2]
    return text


def main(paths: list[Path]) -> None:
    """Render the files in place: written aside, synced, renamed."""
    for path in paths:
        made = render(path.read_text())
        with replacing(path) as aside:
            aside.write_text(made)


if __name__ == "__main__":
    main([Path(path) for path in sys.argv[1:]])
