"""The demo's report: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from skiparse.bench.experiments import outcome
from skiparse.models.data.atomic import replacing
from skiparse.pattern import SkipPattern

_PANEL = 448  # width in pixels of a picture with tokens marked on it
_STRIP = 256  # width of a picture in the strip at the top
_HEAT = 1000.0  # attention weights are coloured from the mean of dense attention to this times it
_COLOURS = "inferno"
_QUIET = 1.3  # slowest over fastest of one pattern, up to which a machine counts as quiet


@dataclass(frozen=True)
class Row:
    """One pattern measured: its times in seconds, its relative error against the fp64 oracle."""

    pattern: SkipPattern
    seconds: tuple[float, ...]
    ceiling: float  # pairs of dense attention over pairs of this
    error: float
    allowed: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class View:
    """What one query attends to: which video tokens ``[t, h, w]`` bool, and with what weights."""

    name: str
    attended: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Result:
    """Everything the report shows. The first row is dense attention."""

    rows: Sequence[Row]
    views: Sequence[View]  # dense, single-skip, group-skip, the pair
    query: tuple[int, int, int]
    k: int  # of the views
    frames: Tensor  # uint8 [frames, H, W, 3]
    frame_of_step: Sequence[int]  # the frame that stands for each step in time
    patch: int  # pixels along the side of a token
    text: int
    effective_keys: float
    method: str  # how q, k, v were made: paragraphs, numbered items, ``code``
    credit: str
    note: str  # shown above everything; may be empty
    facts: dict[str, str]
    sections: Sequence[str] = ()  # further parts of the demo, as HTML


def name_of(pattern: SkipPattern) -> str:
    """``dense``, ``single k=4`` or ``group k=4``."""
    if pattern.sparsity == 1:
        return "dense"
    return f"{'single' if pattern.run == 1 else 'group'} k={pattern.sparsity}"


def speed_up(row: Row, rows: Sequence[Row]) -> float:
    """How many times faster than dense attention, the first row: the ratio of medians."""
    return rows[0].median / row.median


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = [f"{'':12} {'seconds':>9} {'speed-up':>9} {'ceiling':>8} {'reached':>8}"]
    for row in rows:
        gain = speed_up(row, rows)
        lines.append(
            f"{name_of(row.pattern):12} {row.median:9.3f} {gain:8.2f}x {row.ceiling:7.2f}x "
            f"{gain / row.ceiling:8.0%}"
        )
    return "\n".join(lines)


def _noise(rows: Sequence[Row]) -> str:
    """A warning if the times of some pattern differ among themselves too much to rely on."""
    spread = max(max(row.seconds) / min(row.seconds) for row in rows)
    if spread < _QUIET:
        return ""
    return (
        f"Something else kept this machine busy: times of one and the same pattern differ by up to "
        f"{spread:.1f} times. The ratios below carry that noise; run again on a quiet machine."
    )


def write(path: Path, result: Result) -> Path:
    """Write the report, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(render(result), encoding="utf-8")
    return path


def render(result: Result) -> str:
    """The report as one HTML document that loads nothing."""
    steps, height, width = result.views[0].attended.shape
    N = steps * height * width
    best = max(result.rows[1:], key=lambda row: speed_up(row, result.rows))
    gain = speed_up(best, result.rows)
    k, (t, h, w) = result.k, result.query
    dense, single, group, pair = result.views
    notes = "".join(
        f'<p class="note">{esc(note)}</p>' for note in (result.note, _noise(result.rows)) if note
    )
    upright = f"Stripes stand upright because k&sup2; divides the {width} columns. "
    upright = "" if width % (k * k) else upright
    one, run = f"1 token in {k}", f"1 run of {k} tokens in {k}"
    attended = _grid(
        result, "attended", ((single, one), (group, run), (pair, "what two layers reach"))
    )
    product = "the product of both layers&rsquo; weights"
    weights = _grid(
        result, "weights", ((dense, "all"), (single, one), (group, run), (pair, product))
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Skiparse attention on a real clip</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>Skiparse attention on a real clip</h1>
<p class="lead">{N:,} video tokens and {result.text} text rows, one head, fp32, forward:
<strong>{gain:.2f}&times; faster than dense attention</strong> with
{esc(name_of(best.pattern))}, {gain / best.ceiling:.0%} of what the number of query-key pairs
allows.</p>
{notes}
</header>
{_strip(result)}
<section>
<h2>Speed</h2>
{_table(result)}
<p class="small">Seconds: median of {len(result.rows[0].seconds)}, fastest and slowest beside it;
all patterns take turns, so drift of the machine meets each alike. Ceiling: query-key pairs of dense
attention over those of the pattern, text included: {result.text} text rows go into every
sub-sequence, so it is below k. Error: largest difference from the fp64
oracle on sampled queries, relative to the largest output; the run stops if it exceeds what is
allowed, twice the error of eager PyTorch plus one rounding.</p>
<figure class="plot">{_plot(result)}</figure>
</section>
<section>
<h2>What one query attends to</h2>
<p>The query is the token marked in <span class="query">cyan</span>: step {t}, row {h}, column {w}
of {steps} &times; {height} &times; {width}. Each token is a patch of {result.patch} &times;
{result.patch} pixels. Here k = {k}. Tokens that are not attended to are darkened.</p>
{attended}
<p>{upright}Each layer reads one token in {k}. After the two of them the query has heard from
<strong>{int(pair.attended.sum()):,} of {N:,}</strong> tokens, even if text is not counted as a
go-between.</p>
<h3>And how strongly</h3>
<p>Softmax weights of the same query, in multiples of the mean weight of dense attention,
1&nbsp;/&nbsp;{N + result.text:,}.</p>
<div class="scale"><span>&le; 1&times;</span><i style="background:{_gradient()}"></i>
<span>&ge; {_HEAT:,.0f}&times;</span></div>
{weights}
<p class="small">In dense attention a query here spreads its weight over about
{result.effective_keys:,.0f} of {N + result.text:,} keys (exp of the entropy, median of sampled
queries). The pictures show one frame of those in a step.</p>
</section>
<section>
<h2>How this part was made</h2>
{prose(result.method)}
<dl>{"".join(f"<dt>{esc(a)}</dt><dd>{esc(b)}</dd>" for a, b in result.facts.items())}</dl>
<h3>What is not shown</h3>
<ul>
<li>No learned weights: q, k, v come from the fixed transform above, the text rows are stand-ins.
The time of attention does not depend on them; what the pictures mean does.</li>
<li>One head, fp32, the forward pass, on a CPU. The benchmark, <code>skiparse bench</code>, has
the other cases, the backward pass and the other ways to do it.</li>
<li>One attention layer, not a model: a model gains less, as attention is only a part of it.</li>
</ul>
</section>
{"".join(result.sections)}
{f"<footer>{esc(result.credit)}</footer>" if result.credit else ""}
</main>
</body>
</html>
"""


def esc(text: object) -> str:
    """Text as it may stand in HTML."""
    return html.escape(str(text))


def prose(text: str) -> str:
    """Paragraphs, numbered items and ``code`` as HTML."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        items = re.split(r"(?:^|\n)\d+\. ", block)
        coded = [re.sub(r"``(.+?)``", r"<code>\1</code>", esc(item)) for item in items]
        if len(coded) > 1:
            parts.append("<ol>" + "".join(f"<li>{item}</li>" for item in coded[1:]) + "</ol>")
        else:
            parts.append(f"<p>{coded[0]}</p>")
    return "\n".join(parts)


def _table(result: Result) -> str:
    body = []
    for row in result.rows:
        n, lengths = (
            row.pattern.sparsity,
            set(row.pattern.lengths(result.views[0].attended.numel())),
        )
        gain = speed_up(row, result.rows)
        length = " or ".join(f"{x:,}" for x in sorted(lengths))
        body.append(
            f'<tr class="{name_of(row.pattern).split()[0]}"><th>{esc(name_of(row.pattern))}</th>'
            f"<td>{n} &times; {length}</td>"
            f"<td>{row.median:.3f}</td><td>{min(row.seconds):.3f}&ndash;{max(row.seconds):.3f}</td>"
            f"<td><strong>{gain:.2f}&times;</strong></td><td>{row.ceiling:.2f}&times;</td>"
            f"<td>{gain / row.ceiling:.0%}</td>"
            f"<td>{row.error:.1e} <span>of {row.allowed:.1e}</span></td></tr>"
        )
    return (
        '<div class="wide"><table><thead><tr><th>pattern</th><th>sub-sequences</th><th>seconds</th>'
        "<th>range</th><th>speed-up</th><th>ceiling</th><th>reached</th><th>error</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _plot(result: Result) -> str:
    rows = result.rows[1:]
    gains = [speed_up(row, result.rows) for row in rows]
    figure = Figure(figsize=(8, 3.4), dpi=160)
    axes = figure.subplots()
    for place, (row, gain) in enumerate(zip(rows, gains, strict=True)):
        colour = "#3b6ea5" if row.pattern.run == 1 else "#d1803a"
        axes.bar(place, gain, 0.62, color=colour, zorder=2)
        axes.hlines(row.ceiling, place - 0.41, place + 0.41, color="#222", lw=2.2, zorder=3)
        axes.text(
            place,
            max(gain, row.ceiling) + 0.1,
            f"{gain:.2f}x of {row.ceiling:.2f}x",
            ha="center",
            va="bottom",
            fontsize=9,
        )
    axes.axhline(1, color="#888", lw=1, ls=(0, (4, 3)), zorder=1)
    axes.set_xticks(range(len(rows)), [name_of(row.pattern) for row in rows])
    axes.set_ylabel("times faster than dense")
    axes.set_xlim(-0.55, len(rows) - 0.45)
    axes.set_ylim(0, 1.12 * max(*gains, *(row.ceiling for row in rows)))
    axes.grid(axis="y", color="#ddd", lw=0.6, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    figure.tight_layout()
    text = "; ".join(
        f"{name_of(row.pattern)} {gain:.2f} of {row.ceiling:.2f}"
        for row, gain in zip(rows, gains, strict=True)
    )
    return image(
        outcome.png(figure), "png", f"Speed-up over dense attention and ceiling: {text}"
    ) + ("<figcaption>Bars: measured. Black: the ceiling. Dashed: dense attention.</figcaption>")


# Pictures.


def _strip(result: Result) -> str:
    frames = result.frames
    chosen = np.linspace(0, len(frames) - 1, 6).round().astype(int).tolist()
    pictures = []
    for index in chosen:
        picture = _scaled(frames[index], _STRIP)
        pictures.append(_jpeg(picture, f"Frame {index} of the clip"))
    caption = f"<figcaption>{esc(result.credit)}</figcaption>" if result.credit else ""
    return f'<figure class="strip"><div>{"".join(pictures)}</div>{caption}</figure>'


def _steps_shown(steps: int, query: int) -> list[int]:
    """The query's step and up to three others before and after it."""
    wanted = (query - steps // 4, query, query + steps // 8, query + steps * 5 // 16)
    return sorted({min(max(step, 0), steps - 1) for step in wanted})


def _grid(result: Result, kind: str, views: Sequence[tuple[View, str]]) -> str:
    """A row of pictures for each view, a column for each step in time."""
    shown = _steps_shown(len(result.frame_of_step), result.query[0])
    heads = "".join(
        f"<span>step {step}{' (the query&rsquo;s)' if step == result.query[0] else ''}</span>"
        for step in shown
    )
    rows = []
    for view, caption in views:
        pictures = "".join(
            _jpeg(
                _marked(result, view, step, kind),
                f"{view.name}, {kind} at step {step}: "
                f"{int(view.attended[step].sum())} tokens attended to",
            )
            for step in shown
        )
        rows.append(
            f'<figure class="row"><figcaption><b>{esc(view.name)}</b> {caption}</figcaption>'
            f"<div>{pictures}</div></figure>"
        )
    return (
        f'<div class="grid" style="--columns:{len(shown)}"><div class="heads">{heads}</div>'
        f"{''.join(rows)}</div>"
    )


def _marked(result: Result, view: View, step: int, kind: str) -> Image.Image:
    picture = _scaled(result.frames[result.frame_of_step[step]], _PANEL)
    grid = view.attended.shape[1:]
    attended = _spread(view.attended[step].float(), picture)
    if kind == "attended":
        pixels = np.asarray(picture) * (0.16 + 0.84 * attended)
    else:
        mean = 1 / (view.attended.numel() + result.text)
        times_mean = (view.weights[step] / mean).clamp(1, _HEAT)
        heat = _spread(times_mean.log() / math.log(_HEAT), picture)
        grey = np.asarray(picture.convert("L").convert("RGB")) * (0.18 + 0.37 * attended)
        colour = matplotlib.colormaps[_COLOURS](heat[..., 0])[..., :3] * 255
        cover = np.minimum(1, 2.5 * heat) * 0.9
        pixels = grey * (1 - cover) + colour * cover
    marked = Image.fromarray(pixels.astype(np.uint8))
    if step == result.query[0]:
        _, h, w = result.query
        x, y = w * marked.width / grid[1], h * marked.height / grid[0]
        right, bottom = (w + 1) * marked.width / grid[1], (h + 1) * marked.height / grid[0]
        draw = ImageDraw.Draw(marked)
        draw.rectangle((x - 5, y - 5, right + 4, bottom + 4), outline="black", width=1)
        draw.rectangle((x - 4, y - 4, right + 3, bottom + 3), outline="cyan", width=2)
    return marked


def _spread(cells: Tensor, picture: Image.Image) -> np.ndarray:
    """Values of cells ``[h, w]`` over the pixels under them: ``[H, W, 1]``."""
    size = (picture.height, picture.width)
    return torch.nn.functional.interpolate(cells[None, None], size)[0, 0, :, :, None].numpy()


def _scaled(frame: Tensor, width: int) -> Image.Image:
    picture = Image.fromarray(frame.numpy())
    return picture.resize(
        (width, round(width * picture.height / picture.width)), Image.Resampling.LANCZOS
    )


def _jpeg(picture: Image.Image, alt: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=84, optimize=True)
    return image(buffer.getvalue(), "jpeg", alt)


def image(data: bytes, kind: str, alt: str) -> str:
    """A picture inside the page, and what it shows in words."""
    encoded = base64.b64encode(data).decode()
    return f'<img src="data:image/{kind};base64,{encoded}" alt="{esc(alt)}">'


def _gradient() -> str:
    colours = matplotlib.colormaps[_COLOURS](np.linspace(0, 1, 9))
    return f"linear-gradient(90deg,{','.join(matplotlib.colors.to_hex(c) for c in colours)})"


_STYLE = """
:root { --ink: #1c2024; --soft: #626a73; --line: #dfe3e7; --page: #fbfbfa; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e8; --soft: #98a0a8; --line: #32383e; --page: #15181b; --card: #1d2125; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; }
p, ul, ol, dl { max-width: 46rem; }
.lead { font-size: 1.12rem; margin: 0 0 1.5rem; }
.note { border-left: 3px solid #d1803a; padding-left: .75rem; margin: 0 0 1.25rem; }
.small, figcaption, footer { color: var(--soft); font-size: .86rem; }
img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure { margin: 0; }
.strip div { display: grid; grid-template-columns: repeat(6, 1fr); gap: 4px; }
.strip figcaption { margin-top: .4rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 500; font-size: .86rem; }
td span { color: var(--soft); }
tbody th { font-weight: 600; }
tr.single th { box-shadow: inset 3px 0 #3b6ea5; }
tr.group th { box-shadow: inset 3px 0 #d1803a; }
.plot { margin: 1.5rem 0 0; max-width: 50rem; }
.plot img { background: #fff; border: 1px solid var(--line); border-radius: 6px; }
.plot figcaption { margin-top: .35rem; }
.query { background: #12343a; color: #3ff; padding: 0 .35em; border-radius: 3px; }
.grid { margin: 1rem 0 1.5rem; }
.heads, .row div { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 5px; }
.heads { color: var(--soft); font-size: .86rem; }
.row figcaption { margin: .55rem 0 .25rem; }
.row b { color: var(--ink); margin-right: .4em; }
.scale { display: flex; align-items: center; gap: .6rem; color: var(--soft); font-size: .86rem; }
.scale i { width: 14rem; height: .7rem; border-radius: 3px; }
.videos { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1rem; }
.videos video { width: calc(50% - 3px); border-radius: 3px; }
.videos video + video { margin-left: 6px; }
code { font-size: .9em; background: var(--card); border: 1px solid var(--line); padding: 0 .25em;
  border-radius: 3px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; }
dt { color: var(--soft); }
dd { margin: 0; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: .75rem; }
@media (max-width: 40rem) {
  .heads { display: none; }
  .row div { grid-template-columns: repeat(2, 1fr); }
  .strip div { grid-template-columns: repeat(3, 1fr); }
}
"""
