"""Where a training run's random numbers come from: who needs one says for what, and gets its own.

A number depends on the seed, the step, the sample's place in the global batch, and what it is for.
So it does not depend on how many processes, workers or micro-batches share the work, nor on what
was drawn before: a run that continues draws what the uninterrupted one would have.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import numpy as np
import torch


class Use(IntEnum):
    """What a random number is for; numbers for different uses never meet."""

    ORDER = 0  # of samples in an epoch
    WINDOW = 1  # which frames of a longer clip
    CAPTION = 2  # which of a sample's captions
    DROP = 3  # whether the caption is dropped, for guidance without a classifier
    POSTERIOR = 4  # the sample of the autoencoder's posterior
    SIGMA = 5  # the noise level
    NOISE = 6
    STAGE = 7  # the seed of a stage of a run
    REPLACE = 8  # which sample stands in for one that cannot be read
    SHORT = 9  # which clips shorter than asked for stay
    IMAGES = 10  # which frames are known


class Place(NamedTuple):
    """One sample of a run: ``row`` of the data, at ``index`` of the global batch of ``step``."""

    step: int
    index: int  # type: ignore[assignment]  # hides the method of tuples, which nobody needs
    row: int


def numbers(seed: int, step: int, index: int, use: Use) -> np.random.Generator:
    """A generator of its own for one use of one sample."""
    return np.random.default_rng((seed, step, index, use))


def torch_numbers(seed: int, step: int, index: int, use: Use) -> torch.Generator:
    """The same as a torch generator, on the CPU: so the numbers are those of every device."""
    value = int(numbers(seed, step, index, use).integers(2**63))
    return torch.Generator().manual_seed(value)


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage of a run, by its number in the chain."""
    return int(numbers(seed, stage, 0, Use.STAGE).integers(2**63))
