"""Models that learn side by side: the same noise in the same order, judged at the same steps.

Noise levels are logit-normal, the optimiser is AdamW without weight decay. Judged they are on noise
and noise levels that are set aside and stay the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from skiparse.bench.experiments.toy import Scenes
from skiparse.models import flow

LEVELS = 8  # noise levels that a model is judged at

Point = dict[str, float]  # "step", "loss", and what else there is to say at that step


class Learner:
    """A model on its way: what it learns from, its optimiser, and its curve."""

    def __init__(self, model: Any, scenes: Scenes) -> None:
        self.scenes = scenes
        self.curve: list[Point] = []
        self.seconds: list[float] = []  # of each step
        self.go_on_as(model)

    def go_on_as(self, model: Any) -> None:
        """From here on this is the model, with a new optimiser."""
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)

    def before(self, step: int) -> None:
        """What is to be done before a step."""

    def step(self, step: int, rate: float, sigmas: Tensor, noise: Tensor) -> None:
        """Learn from all scenes: noise ``[.., B, C, t, h, w]`` at levels ``[B]``."""
        started = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        noisy, velocity = self.problem(step, sigmas, noise)
        self.loss(sigmas, noisy, velocity).backward()
        self.update()
        self.seconds.append(time.perf_counter() - started)

    def problem(self, step: int, sigmas: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents, and the velocity to learn."""
        latents = self.scenes.latents
        return flow.add_noise(latents, noise[0], sigmas), flow.velocity(latents, noise[0])

    def loss(self, sigmas: Tensor, noisy: Tensor, velocity: Tensor) -> Tensor:
        """What a step makes smaller."""
        return loss_of(self.model, self.scenes, sigmas, noisy, velocity)

    def update(self) -> None:
        """Use the gradients."""
        self.optimizer.step()

    def judge(self, step: int) -> None:
        """Add a point to the curve."""
        self.curve.append({"step": step, "loss": evaluate(self.model, self.scenes)})


def side_by_side(
    learners: Mapping[str, Learner],
    steps: int,
    *,
    rate: Callable[[int], float],
    every: int,
    seed: int = 1,
    noises: int = 1,
) -> None:
    """Have all learn at once, step by step, so that whatever the machine does falls on all of them.

    Args:
        rate: the learning rate of a step, from 1.
        every: steps from one judgement to the next; there is one before the first and after the
            last.
        seed: of the noise.
        noises: drawn for each step; the second is for those who want another.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = next(iter(learners.values())).scenes.latents.shape
    for learner in learners.values():
        learner.judge(0)
    with tqdm(total=steps, desc=", ".join(learners), unit="step", disable=None) as bar:
        for step in range(1, steps + 1):
            sigmas = flow.sample_sigmas(shape[0], density="logit_normal", generator=generator)
            noise = torch.randn((noises, *shape), generator=generator)
            for learner in learners.values():
                learner.before(step)
                learner.step(step, rate(step), sigmas, noise)
            if step % every == 0 or step == steps:
                for learner in learners.values():
                    learner.judge(step)
                bar.set_postfix({n: f"{x.curve[-1]['loss']:.3f}" for n, x in learners.items()})
            bar.update()


def rising(step: int, *, top: float, over: int) -> float:
    """A learning rate that rises evenly to ``top`` and stays there; steps count from 1."""
    return top * min(step / over, 1.0)


def rising_and_falling(step: int, steps: int, *, top: float, over: int) -> float:
    """The same, falling evenly to a tenth of it all the while."""
    return rising(step, top=top, over=over) * (1 - 0.9 * step / steps)


def loss_of(
    model: nn.Module, scenes: Scenes, sigmas: Tensor, noisy: Tensor, velocity: Tensor
) -> Tensor:
    """The flow-matching loss of all scenes."""
    return flow.loss(scenes.asked(model, noisy, flow.timesteps(sigmas)), velocity)


@torch.no_grad()
def evaluate(model: nn.Module, scenes: Scenes) -> float:
    """The mean loss over ``LEVELS`` evenly spaced noise levels, each with noise of its own."""
    generator = torch.Generator().manual_seed(2)
    latents, total = scenes.latents, 0.0
    for level in (torch.arange(LEVELS) + 0.5) / LEVELS:
        noise = torch.randn(latents.shape, generator=generator)
        sigmas = level.expand(len(noise))
        noisy = flow.add_noise(latents, noise, sigmas)
        total += loss_of(model, scenes, sigmas, noisy, flow.velocity(latents, noise)).item()
    return total / LEVELS
