"""AdamW whose state is there from the start, by name: what a checkpoint holds of an optimiser."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

Named = Iterable[tuple[str, nn.Parameter]]


def adamw(named: Named, **settings: Any) -> AdamW:
    """With a state of zeros, from which it would start: so checkpoints always hold the same.

    Args:
        named: parameters and their names.
        settings: AdamW's own.
    """
    parameters = [parameter for _, parameter in named]
    optimizer = AdamW(parameters, **settings)
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def state_of(optimizer: Optimizer, named: Named, prefix: str) -> dict[str, Tensor]:
    """Its tensors as ``prefix.NAME.KIND``, NAME that of the parameter; to be saved, or filled."""
    return {
        f"{prefix}.{name}.{kind}": x
        for name, parameter in named
        for kind, x in optimizer.state[parameter].items()
    }
