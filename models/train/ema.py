"""The exponential moving average of a model's weights, which is what one uses after training."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A second copy of a model that follows it slowly: ``decay * average + (1 - decay) * now``.

    It starts as the model is, without a correction for the start.

    Args:
        model: its parameters must be float32 or float64: in fewer bits a small step is lost. Those
            that take no gradient may be of any type.
        decay: from 0, which copies, to below 1.
        average: what it starts as instead, which is taken and not copied; it may be in shards.

    Attributes:
        model: the average, a model of the same class; takes no gradients. Parameters of the model
            that take none either are its own: there is one copy of them.

    Raises:
        ValueError: for a decay out of range or parameters of few bits.
    """

    def __init__(self, model: Model, *, decay: float, average: Model | None = None) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, got {decay}")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {parameter.dtype}, too coarse for an average; keep the model in "
                    "float32 and use autocast"
                )
        self.decay = decay
        if average is None:
            shared = {id(x): x for x in model.parameters() if not x.requires_grad}
            average = copy.deepcopy(model, shared)
        self.model = average.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """One step towards ``model``; buffers are copied."""
        averages: list[Tensor] = []
        now: list[Tensor] = []
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            if parameter.requires_grad:
                averages.append(average)
                now.append(parameter)
        torch._foreach_lerp_(averages, now, 1 - self.decay)
        for held, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            held.copy_(buffer)
