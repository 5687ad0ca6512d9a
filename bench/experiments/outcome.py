"""What an experiment leaves: a picture, and beside it every number in it, by the same names.

Every report has ``method`` (how it was made, in words), ``credit`` (whose the clip is), ``torch``,
``recipe`` (the settings that decide it), and ``runs``: by name, what was trained. A run has its
``curve``, a list of points with ``step`` and what was found there.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skiparse.bench.clip import CREDIT
from skiparse.models.data.atomic import replacing, write_json

Report = dict[str, Any]


def report(
    methods: Sequence[str | None], recipe: Mapping[str, Any], runs: Mapping[str, Report]
) -> Report:
    """What all reports have; the method is told by the docstrings of the modules that did it."""
    return {
        "method": "\n".join(method or "" for method in methods),
        "credit": CREDIT,
        "torch": torch.__version__,
        "recipe": dict(recipe),
        "runs": dict(runs),
    }


def write(folder: Path, name: str, found: Report, picture: bytes) -> Path:
    """Write ``<name>.json`` and ``<name>.png``, each whole or not at all; returns the latter."""
    path = folder / f"{name}.png"
    write_json(folder / f"{name}.json", found)
    with replacing(path) as aside:
        aside.write_bytes(picture)
    return path


def plot(
    axes: Axes, curve: Sequence[Mapping[str, float]], x: str, y: str, *, label: str, colour: str
) -> None:
    """A curve, by the names of what is told of its points."""
    across, along = ([point[name] for point in curve] for name in (x, y))
    axes.plot(across, along, color=colour, lw=1.8, marker="o", ms=3, label=label)


def finish(axes: Axes, across: str, along: str = "") -> None:
    """Names of the axes and a quiet frame; a legend where there is something to name."""
    axes.set_xlabel(across)
    axes.set_ylabel(along)
    axes.grid(which="both", color="#ddd", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def png(figure: Figure) -> bytes:
    """The figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
