"""Pictures as patches, and the low frequencies of a patch: a fixed transform, with no weights.

The demo's tokens and the experiments' latents are made of these. The way back is the transpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 8  # frames in one step in time, after the first, as of a causal video autoencoder
PATCH = 16  # pixels along each side


def dct_basis(order: int) -> tuple[Tensor, Tensor]:
    """2-D DCT-II vectors with ``u + v < order``: ``[256, count]``; and ``1 / (1 + u + v)``."""
    place = torch.arange(PATCH, dtype=torch.float64)
    wave = torch.cos(math.pi / PATCH * (place[None] + 0.5) * place[:, None])  # [u, pixel]
    wave *= math.sqrt(2 / PATCH)
    wave[0] /= math.sqrt(2)
    kept = [(u, v) for u in range(order) for v in range(order) if u + v < order]
    basis = torch.stack([torch.outer(wave[u], wave[v]).flatten() for u, v in kept], 1)
    return basis.float(), torch.tensor([1 / (1 + u + v) for u, v in kept])


def patches(picture: Tensor) -> Tensor:
    """``[H, W, 3]`` to ``[H/16 * W/16, 3, 256]``."""
    height, width, colours = picture.shape
    cells = picture.reshape(height // PATCH, PATCH, width // PATCH, PATCH, colours)
    return cells.permute(0, 2, 4, 1, 3).reshape(-1, colours, PATCH * PATCH)
