"""How much of a gradient to believe: a threshold on its norm that follows the run, not fixed at 1.

Two averages run along, the mean and the variance of the gradient norms seen so far. A norm above
``mean + 3 sigma`` is unusual. What happens then is the mode's:

===================  ================  ================  =============  =============
norm                 "safe"            "report"          "osp15"        "osp_next"
===================  ================  ================  =============  =============
up to the threshold  step, fed         step, fed         step, fed      step, fed
above it             clip, thr. fed    clip, not fed     clip, not fed  clip, not fed
above the extreme    skip, thr. fed    clip, not fed     stop           clip, not fed
not finite           skip; 50th: stop  skip; 50th: stop  stop           stop
the first            clip at 1         step              step           as any other
===================  ================  ================  =============  =============

"Fed" means taken into the averages; the extreme is ``max(mean + 5 sigma, 5)``. Not feeding what is
clipped has a price: after the level of the norms has grown by more than the threshold allows, every
step is clipped to the old level, for ever. "safe" feeds the threshold instead, and keeps sigma at a
tenth of the mean or more, so it climbs to any new level in a known number of steps.

"report" is the rule of the report, which is silent about norms that are not finite and about the
first. "osp15" is the rule of the released code, with three differences where that code is wrong:
on "stop" nothing was applied (it made the step, then ended the run); a first norm that is not
finite stops too (it turned clipping off for ever, without a word); and a norm of 0 is not fed, in
any mode (a first one made the threshold 0, to which every gradient was then clipped).

"osp_next" is the rule of OSP-Next's code. It differs from "osp15" in four things: nothing is
extreme; a norm that is not finite always stopped its run; the first norm is held against the
threshold and fed like any other, after it has set the mean; and the scale is
``threshold / (norm + 1e-6)``.

Source: Open-Sora Plan v1.5 report, "Adaptive Gradient Clipping", and its released code; the code of
OSP-Next.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

Action = Literal["step", "clip", "skip", "stop"]
Mode = Literal["safe", "report", "osp15", "osp_next"]

FIRST_SLACK, FIRST_CAP = 3.0, 1.0  # the mean starts at min(3 norm, 1)
EXTREME_SIGMAS, EXTREME_LEAST = 5.0, 5.0
LEAST_SIGMA = 0.1  # of the mean, in "safe"
PATIENCE = 50  # norms in a row that are not finite
EPS = 1e-6  # in the scales of "osp15" and "osp_next"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with one gradient.

    Attributes:
        action: "step" takes the gradient whole, "clip" times ``scale``; on "skip" leave out the
            optimiser's step; on "stop" leave it out and end the run with an error.
        norm: of the gradient before all this.
        threshold: what the norm was compared with.
        scale: below 1 if action is "clip", else 1.
    """

    action: Action
    norm: float
    threshold: float
    scale: float


class AdaptiveGradClipper:
    """Clips gradients to the usual size of the run's own; for any model and optimiser.

    In a training loop it stands where ``clip_grad_norm_`` does, once per optimiser step, on the
    accumulated and unscaled gradient:

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> clipper = AdaptiveGradClipper()
    >>> for x in torch.ones(10, 2):
    ...     model(x).square().mean().backward()
    ...     decision = clipper.clip_(model.parameters())
    ...     if decision.action == "stop":
    ...         raise FloatingPointError(f"stopped: {decision}")
    ...     if decision.action != "skip":
    ...         optimizer.step()
    ...     optimizer.zero_grad()

    In "safe" mode, if the norm jumps to a multiple of its mean and stays there, the steps are taken
    whole again after at most 39 clipped or skipped ones for x2, 67 for x4 and 96 for x10, at the
    default decay and sigmas, and 64 more for each further x10. Those are the bounds for norms that
    hardly varied before; the more they did, the sooner it is.

    The first ``1 / (1 - decay)`` norms are the warm-up of "safe": the averages are plain ones, so
    that each norm counts as much as the others, and no step is skipped as extreme. A run whose
    norms begin at 10, 100 or 1000 is clipped for 13, 29 or 57 steps.

    Args:
        decay: of the averages, from 0 to below 1.
        sigmas: from the mean to the threshold, above 0.
        mode: see the table of the module.

    Attributes:
        mean, variance: the averages; None and 0 until the first norm above 0.
        counts: how many decisions there were of each action, and how many norms "nonfinite".

    Raises:
        ValueError: for an unknown mode, or a number out of range.
    """

    def __init__(self, *, decay: float = 0.99, sigmas: float = 3.0, mode: Mode = "safe") -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        if not 0 < sigmas < math.inf:
            raise ValueError(f"sigmas must be a finite number above 0, got {sigmas}")
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
        self.decay, self.sigmas, self.mode = decay, sigmas, mode
        self.counts = dict.fromkeys((*get_args(Action), "nonfinite"), 0)
        self.reset()

    def reset(self) -> None:
        """Forget the averages, as at the start of a stage whose norms are others; counts stay."""
        self.mean: float | None = None
        self.variance = 0.0
        self._fed = 0
        self._nonfinite_in_a_row = 0

    @property
    def threshold(self) -> float:
        """What the next norm is compared with."""
        return self._above_mean(self.sigmas)

    def decide(self, norm: float) -> Decision:
        """Take notice of one gradient norm, and say what to do with its gradient.

        Raises:
            ValueError: if norm is negative.
        """
        if norm < 0:
            raise ValueError(f"norm must not be negative, got {norm}")
        if self.mode == "osp_next" and self.mean is None and norm > 0 and _usable(norm):
            self.mean = _first_mean(norm)
        threshold = self.threshold
        action = self._act(norm)
        scale = 1.0
        if action == "clip":
            if self.mode == "osp15":
                scale = 1 / (norm / threshold + EPS)
            elif self.mode == "osp_next":
                scale = threshold / (norm + EPS)
            else:
                scale = threshold / norm
        self.counts[action] += 1
        return Decision(action=action, norm=norm, threshold=threshold, scale=scale)

    @torch.no_grad()
    def clip_(self, parameters: Iterable[Tensor]) -> Decision:
        """Decide on the gradients of ``parameters`` by their norm, and scale them in place.

        Every rank calls it alike. A parameter that is a DTensor counts with all its shards, once
        however many ranks hold copies; any other counts as this rank has it, so it must be the same
        on all. The norm is as precise as the gradients' dtype, like that of ``clip_grad_norm_``.
        The host waits for the device once, to read it.

        Args:
            parameters: those without a gradient are passed over.

        Returns:
            The decision. On "skip" and "stop" the gradients are as they were.

        Raises:
            ValueError: if no parameter has a gradient.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise ValueError("no parameter has a gradient; call backward() before clip_()")
        decision = self.decide(_total_norm(gradients).item())
        if decision.action == "clip":
            torch._foreach_mul_([_local(x) for x in gradients], decision.scale)
        return decision

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step: numbers, None and dicts, ready for JSON."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "fed": self._fed,
            "nonfinite_in_a_row": self._nonfinite_in_a_row,
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state``, from :meth:`state_dict`, was taken.

        Raises:
            ValueError: if an entry is missing or unknown.
        """
        for what, known, given in (
            ("state", self.state_dict(), state),
            ("counts", self.counts, state.get("counts", self.counts)),
        ):
            if known.keys() != given.keys():
                raise ValueError(
                    f"{what} must have the entries {sorted(known)}, got {sorted(given)}; "
                    "it is not of an AdaptiveGradClipper"
                )
        self.mean, self.variance = state["mean"], state["variance"]
        self._fed = state["fed"]
        self._nonfinite_in_a_row = state["nonfinite_in_a_row"]
        self.counts = dict(state["counts"])

    def _act(self, norm: float) -> Action:
        """The table of the module."""
        if not _usable(norm):
            self.counts["nonfinite"] += 1
            self._nonfinite_in_a_row += 1
            patient = self.mode in ("safe", "report") and self._nonfinite_in_a_row < PATIENCE
            return "skip" if patient else "stop"
        self._nonfinite_in_a_row = 0
        if norm == 0:
            return "step"
        safe, threshold = self.mode == "safe", self.threshold
        if self.mean is None:
            self._feed(norm)
            return "clip" if safe and norm > threshold else "step"
        if norm <= threshold:
            self._feed(norm)
            return "step"
        extreme = norm > max(self._above_mean(EXTREME_SIGMAS), EXTREME_LEAST)
        action: Action = "clip"
        if extreme and self.mode == "osp15":
            action = "stop"
        elif extreme and safe and not self._warming_up:
            action = "skip"
        if safe:
            self._feed(threshold)
        return action

    @property
    def _warming_up(self) -> bool:
        return self.mode == "safe" and self._fed < round(1 / (1 - self.decay))

    def _above_mean(self, sigmas: float) -> float:
        if self.mean is None:
            return FIRST_CAP
        sigma = math.sqrt(self.variance)
        if self.mode == "safe":
            sigma = max(sigma, LEAST_SIGMA * self.mean)
        return self.mean + sigmas * sigma

    def _feed(self, norm: float) -> None:
        if self.mean is None:
            self.mean = _first_mean(norm)
        else:
            weight = 1 / (self._fed + 1) if self._warming_up else 1 - self.decay
            self.mean = (1 - weight) * self.mean + weight * norm
            self.variance = (1 - weight) * self.variance + weight * (self.mean - norm) ** 2
        self._fed += 1


def _usable(norm: float) -> bool:
    """Whether it is finite, and its square, which the variance takes."""
    return math.isfinite(norm * norm)


def _first_mean(norm: float) -> float:
    return min(FIRST_SLACK * norm, FIRST_CAP)


def _total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Of all of them as one vector, the same on all ranks; one reduction for each mesh."""
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [get_total_norm(alike) for alike in by_mesh.values()]
    return get_total_norm([x.full_tensor() if isinstance(x, DTensor) else x for x in norms])


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
