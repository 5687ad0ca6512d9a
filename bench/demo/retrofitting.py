"""The report's part on a Wan made sparse: what :mod:`skiparse.bench.experiments.retrofit` found."""

from __future__ import annotations

import json
from pathlib import Path

from skiparse.bench.demo import report
from skiparse.bench.experiments import outcome
from skiparse.bench.experiments.retrofit import ARMS, above_dense


def section(picture: Path) -> str:
    """The part of the report that shows it, as HTML that loads nothing."""
    found = json.loads(picture.with_suffix(".json").read_text("utf-8"))
    recipe, runs = found["recipe"], found["runs"]
    losses = " ".join(f"{name} {runs[name]['last']:.3f}" for name in ARMS)
    alt = f"Loss over steps; at the end {losses}"
    return f"""<section>
<h2>A Wan made sparse</h2>
<p>Diffusers&rsquo; Wan, in tiny ({runs["dense"]["trained"] / 1e6:.2f} million random weights),
learns {found["tokens"]:,} tokens of one scene for {recipe["steps"]} steps, dense. Then all of its
layers are made sparse, and it goes on for {recipe["tuned"]} steps, in full and with a LoRA of rank
{recipe["lora"]["rank"]}, beside the dense one that goes on too. {verdict(found)}</p>
<figure class="plot">{report.image(picture.read_bytes(), "png", alt)}
<figcaption>{report.esc(found["credit"])}</figcaption></figure>
{_losses(found)}
<h3>What the real ones can gain</h3>
<p>2-D, ratio 2, a tenth of the layers dense at each end; 1-D with ratio 4 has the same figures.
They are counts of operations: the most that a model can become faster, not times.</p>
{_costs(found)}
<h3>How it was made</h3>
{report.prose(found["method"].partition(chr(10) * 2)[2])}
<h3>What is not shown</h3>
<ul>
<li>What a model regains that has learnt all it can: a minute of training is far from its end, so
the dense one falls as well, and the losses of all say little by themselves.</li>
<li>That 1-D or 2-D is the better one, or how many layers to keep dense: one clip of five seconds,
one seed, {found["tokens"]:,} tokens where real ones have 32,760 and more.</li>
<li>Videos: latents are a fixed transform of the pixels, and there is no text.</li>
<li>Speed on a GPU. The steps here are of a CPU, and of a model with little but attention.</li>
</ul>
</section>
"""


def verdict(found: outcome.Report) -> str:
    """What came of it, in a sentence or two that follow from the numbers."""
    gaps = {name: above_dense(found, name) for name in ARMS if name != "dense"}
    reached = [name for name, (_, last) in gaps.items() if last <= 0]
    if reached:
        return f"As low as the dense one at the same step ended: {', '.join(reached)}."
    closer = [name for name, (first, last) in gaps.items() if last < first]
    return (
        "<strong>None ends as low as the dense one at the same step</strong>; closer to it than "
        f"as they came from the retrofit: {', '.join(closer) or 'none'}."
    )


def _losses(found: outcome.Report) -> str:
    rows = []
    for name in ARMS:
        one, (first, last) = found["runs"][name], above_dense(found, name)
        rows.append(
            f"<tr><th>{report.esc(name)}</th><td>{one['curve'][0]['loss']:.4f}</td>"
            f"<td>{one['last']:.4f}</td><td>{first:+.4f}</td><td>{last:+.4f}</td>"
            f"<td>{one['trained']:,}</td><td>{1000 * one['median_step']:.0f}</td></tr>"
        )
    heads = ("as it comes", "at the end", "above dense, first", "at the end", "weights trained",
             "ms a step")  # fmt: skip
    return _table(("loss of the other scene", *heads), rows)


def _costs(found: outcome.Report) -> str:
    rows = [
        f"<tr><th>Wan {one['model_of']}, {one['clip']}</th><td>{one['tokens']:,}</td>"
        f"<td>{one['share']:.0%}</td><td>{one['attention']:.2f}&times;</td>"
        f"<td>{one['model']:.2f}&times;</td></tr>"
        for one in found["costs"]
    ]
    heads = ("", "tokens", "of dense is attention", "attention, fewer", "whole model, fewer")
    return _table(heads, rows)


def _table(heads: tuple[str, ...], rows: list[str]) -> str:
    told = "".join(f"<th>{head}</th>" for head in heads)
    return (
        f'<div class="wide"><table><thead><tr>{told}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )
