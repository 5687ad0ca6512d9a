"""The part of the demo's report about what a tiny WF-VAE gives back."""

from __future__ import annotations

from skiparse.bench.clip import CREDIT
from skiparse.bench.demo import report
from skiparse.bench.experiments.reconstruct import GOAL, Result, rows_of


def section(result: Result) -> str:
    """The part of the demo's report about this: a picture and a table, as a piece of HTML."""
    found = result.found
    scene = found["recipe"]["size"]
    reached = found["goal_step"]
    verdict = (
        f"Within {scene['steps']} steps it did not reach {GOAL:.0f} dB."
        if reached is None
        else f"It passed {GOAL:.0f} dB PSNR at step {reached} of {scene['steps']}."
    )
    body = "".join(
        f"<tr><th>{report.esc(name)}</th><td>{psnr:.2f}</td><td>{ssim:.4f}</td></tr>"
        for name, psnr, ssim in rows_of(found)
    )
    alt = f"PSNR by step up to {found['psnr']:.2f} dB; frames above what the model made of them"
    picture = report.image(result.picture.read_bytes(), "png", alt)
    return f"""<section>
<h2>What a tiny WF-VAE gives back</h2>
<p>A model of {found["parameters"] / 1e6:.2f} million parameters learnt
{len(scene["starts"])} scene{"s" * (len(scene["starts"]) > 1)} of the clip by heart,
{scene["frames"]} frames of {scene["width"]} &times; {scene["height"]}. {verdict}</p>
<figure class="plot">{picture}
<figcaption>{report.esc(CREDIT)}</figcaption></figure>
<div class="wide"><table><thead><tr><th></th><th>PSNR, dB</th><th>SSIM</th></tr></thead>
<tbody>{body}</tbody></table></div>
<h3>How it was made</h3>
{report.prose(found["method"].partition(chr(10) * 2)[2])}
</section>
"""
