"""A page that shows what a filter did: counts, histograms, and the pieces nearest to thresholds."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from skiparse.models.data.atomic import replacing
from skiparse.models.data.image import read_image
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import Record
from skiparse.models.data.plain import printable
from skiparse.models.data.report import Report
from skiparse.models.data.scoring import Frames, scaled
from skiparse.models.data.video import VideoError
from skiparse.models.writer import write_image

PICTURES = "pictures"

_BINS = 40
_SIDE = 96  # pixels of the shorter side of a frame that is shown
_SHOWN = 4  # frames of a piece
_GAP = 2  # white pixels between frames
_WIDTH, _HEIGHT, _ROW = 640, 160, 18  # of a histogram, and of the text above and below it
_STYLE = (
    "body{font:15px sans-serif;margin:2em;max-width:70em}"
    "table{border-collapse:collapse}td{padding:2px 12px 2px 0}td:first-child{text-align:right}"
    "figure{display:inline-block;margin:0 12px 12px 0}figcaption{font-size:12px}"
    "svg{overflow:visible;font-size:12px}"
)
_CALLED = {"motion_cropped": "motion, once text at the edges is cropped away"}
_SIDES = {  # of a threshold, by name and whether inside
    ("least", True): "kept, nearest above the least, {}",
    ("least", False): "dropped, nearest below the least, {}",
    ("most", True): "kept, nearest below the most, {}",
    ("most", False): "dropped, nearest above the most, {}",
}
_ORDER = (
    "A piece is what lies between two cuts of a clip, or all of it. One that fails several "
    "thresholds is counted for the first of them, in the order of this page."
)
_KEY = "Grey: all {} pieces that have this score. Blue: kept, by all scores together."


@dataclass(frozen=True)
class Chart:
    """How one score lies about its thresholds.

    Attributes:
        score: its name.
        least, most: the thresholds, None where there is none.
        values: float32 ``[n]``, of the pieces that have one.
        kept: bool ``[n]``, by all scores together.
        number: ``[n]``, of each piece among all.
    """

    score: str
    least: float | None
    most: float | None
    values: NDArray[np.float32]
    kept: NDArray[np.bool_]
    number: NDArray[np.int64]

    def told(self) -> dict[str, Any]:
        """As a histogram, with how many of each bin are kept."""
        edges = np.histogram_bin_edges(self.values.astype(np.float64), _BINS)
        every, kept = (np.histogram(x, edges)[0] for x in (self.values, self.values[self.kept]))
        return {
            "score": self.score,
            "least": self.least,
            "most": self.most,
            "edges": edges.tolist(),
            "pieces": every.tolist(),
            "kept": kept.tolist(),
        }

    def borders(self, most: int) -> Iterator[tuple[str, bool, NDArray[np.int64]]]:
        """For each threshold and side of it, which, whether inside, and the nearest pieces.

        Those are places in ``values``. On the inside are pieces that are kept alone.
        """
        for name, limit, sign in (("least", self.least, 1), ("most", self.most, -1)):
            if limit is None:
                continue
            ahead = sign * (self.values - np.float32(limit))
            for inside, fits in ((True, (ahead >= 0) & self.kept), (False, ahead < 0)):
                found = np.flatnonzero(fits)
                yield name, inside, found[np.argsort(np.abs(ahead[found]), kind="stable")[:most]]


Piece = Callable[[int], tuple[Record, Mapping[str, Any]]]  # by its number


def write(
    path: Path, report: Report, charts: Sequence[Chart], piece: Piece, shown: int, limits: Limits
) -> None:
    """Write the page, and the pictures beside it.

    Args:
        path: of the page.
        report: its counts.
        charts: of each score.
        piece: gives the record and the scores of a piece.
        shown: pieces at each side of a threshold.
        limits: as for reading.
    """
    folder = path.parent / PICTURES
    folder.mkdir(exist_ok=True)
    rows = [(reason, count) for reason, count in report.dropped.items()]
    more = [(what, n) for what, n in report.more.items() if isinstance(n, int) and n]
    parts = [f"<p>{html.escape(report.line)}</p><p>{_ORDER}</p>"]
    parts += [
        f"<h2>{title}</h2>{_rows(x)}" for title, x in (("Dropped", rows), ("Also", more)) if x
    ]
    for chart in charts:
        title = html.escape(_CALLED.get(chart.score, chart.score))
        parts.append(f"<h2>{title}: {_range(chart)}</h2>{_histogram(chart.told())}")
        for name, inside, places in chart.borders(shown):
            figures = []
            for rank, place in enumerate(places):
                file = folder / f"{chart.score}-{name}-{'in' if inside else 'out'}-{rank}.png"
                told = _shown(file, *piece(int(chart.number[place])), limits)
                said = f"{chart.values[place]:.4g} {told}"
                figures.append(
                    f'<figure><img src="{PICTURES}/{file.name}" alt="">'
                    f"<figcaption>{html.escape(said)}</figcaption></figure>"
                )
            title = _SIDES[name, inside].format(f"{getattr(chart, name):g}")
            parts.append(f"<h3>{title}</h3>{''.join(figures) or '<p>none</p>'}")
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>What was kept</title>'
        f"<style>{_STYLE}</style>"
        f"<h1>What was kept</h1>{''.join(parts)}\n"
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _rows(pairs: Sequence[tuple[str, int]]) -> str:
    cells = (f"<tr><td>{count}</td><td>{html.escape(name)}</td></tr>" for name, count in pairs)
    return f"<table>{''.join(cells)}</table>"


def _range(chart: Chart) -> str:
    """What is kept, in words."""
    ends = [
        f"{word} {limit:g}"
        for word, limit in (("from", chart.least), ("to", chart.most))
        if limit is not None
    ]
    return " ".join(ends) or "any"


def _histogram(told: Mapping[str, Any]) -> str:
    """Bars as SVG: pale for all pieces, dark for those kept, with lines at the thresholds.

    Below are the ends of the scale, above the thresholds; those beyond an end are told there.
    """
    edges, every, kept = told["edges"], told["pieces"], told["kept"]
    unit, low, high = _WIDTH / len(every), edges[0], edges[-1]
    tall = _HEIGHT / max(1, *every)
    base = _ROW + _HEIGHT
    parts = [
        f'<rect x="{n * unit:.1f}" y="{base - count * tall:.1f}" width="{unit:.1f}" '
        f'height="{count * tall:.1f}" fill="{colour}"/>'
        for counts, colour in ((every, "#bbb"), (kept, "#357"))
        for n, count in enumerate(counts)
    ]
    parts.append(f'<path d="M0 {base}H{_WIDTH}" stroke="#333"/>')
    for name in ("least", "most"):
        limit = told[name]
        if limit is None:
            continue
        x, anchor, said = 0.0, "start", f"\u2190 {limit:g}"
        if limit > high:
            x, anchor, said = float(_WIDTH), "end", f"{limit:g} \u2192"
        elif limit >= low:
            x, anchor, said = (limit - low) / (high - low) * _WIDTH, "middle", f"{limit:g}"
            parts.append(f'<path d="M{x:.1f} {_ROW}V{base}" stroke="#c22"/>')
        parts.append(_label(x, _ROW - 5, anchor, said, "#c22"))
    for x, anchor, value in ((0, "start", low), (_WIDTH, "end", high)):
        parts.append(_label(x, base + _ROW - 4, anchor, f"{value:.4g}", "#333"))
    most = f"{max(every)} in the tallest of {len(every)} bins"
    parts.append(_label(_WIDTH / 2, base + _ROW - 4, "middle", most, "#333"))
    size = f'width="{_WIDTH}" height="{base + _ROW}"'
    return f"<svg {size}>{''.join(parts)}</svg><p>{_KEY.format(sum(every))}</p>"


def _label(x: float, y: float, anchor: str, said: str, colour: str) -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{colour}">{said}</text>'


def _shown(file: Path, record: Record, piece: Mapping[str, Any], limits: Limits) -> str:
    """Write some frames of a piece, one beside the other; returns its name, or why it has none."""
    try:
        frames = _frames(record, piece, limits)
    except VideoError as error:  # gone since it was scored
        file.unlink(missing_ok=True)
        return printable(str(error))
    framed = F.pad(frames, (0, 0, 0, _GAP), value=255)  # at the right of each
    write_image(file, torch.cat(list(framed), dim=1)[:, :-_GAP])
    return f"{printable(record.path)}, from frame {piece['start']}"


def _frames(record: Record, piece: Mapping[str, Any], limits: Limits) -> Tensor:
    top, left, height, width = (piece[name] for name in ("top", "left", "height", "width"))
    crop = None if top < 0 else (top, left, height, width)
    if not record.is_video:
        size = scaled(height, width, _SIDE)
        return read_image(record.path, size=size, crop=crop, root=record.root, limits=limits)
    every = max(1, (piece["frames"] - 1) // (_SHOWN - 1))
    count = min(_SHOWN, (piece["frames"] - 1) // every + 1)
    first = piece["start"] - record.start
    return Frames(record, limits).read(first, count, every, side=_SIDE, crop=crop)
