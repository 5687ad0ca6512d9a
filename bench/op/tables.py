"""Writes the README's generated tables: backends from the registry, figures from results.jsonl.

``python -m skiparse.bench.op.tables README.md`` replaces what stands between the markers
``<!-- name -->`` and ``<!-- end name -->``; a test fails when the README is behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

from skiparse.bench import rows
from skiparse.bench.op.cases import CASES
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


def benchmark(results: Path = rows.RESULTS) -> str:
    """The latest row of every case and contender on each device, speed-up beside its ceiling."""
    latest: dict[tuple[str, str, str], rows.Row] = {}
    for row in rows.read(results):
        if row["case"] in CASES and row["backend"] in HOW:
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


def render(text: str) -> str:
    """The README with its generated parts made anew.

    Raises:
        ValueError: if a pair of markers is missing.
    """
    for name, made in (("backends", backends()), ("benchmark", benchmark())):
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        if start not in text or end not in text:
            raise ValueError(f"no {start.strip()} ... {end} in the text; add them")
        before, _, rest = text.partition(start)
        text = before + start + made + "\n" + end + rest.partition(end)[2]
    return text


def main(path: Path) -> None:
    """Render the file in place: written aside, synced, renamed."""
    made = render(path.read_text())
    with replacing(path) as aside:
        aside.write_text(made)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
