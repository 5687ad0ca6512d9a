"""Where a video token is, told to attention: rotary embedding over time, height and width.

A head's dimensions are cut into 4/16 for time, 6/16 for height and 6/16 for width; inside each
part the first half is rotated with the second (the NeoX convention).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BASE = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dimensions tell time, height and width.

    Raises:
        ValueError: unless ``head_dim`` is a multiple of 16.
    """
    if head_dim % 16 or head_dim < 16:
        raise ValueError(f"head_dim must be a multiple of 16 for 3D RoPE, got {head_dim}")
    return head_dim // 16 * 4, head_dim // 16 * 6, head_dim // 16 * 6


def rotary_angles(grid: tuple[int, int, int], head_dim: int) -> Tensor:
    """The angle of every pair of dimensions at every token: fp32 ``[N, head_dim / 2]``, on the CPU.

    Tokens are in order of (t, h, w); positions are integers from 0. The pairs of an axis adjoin,
    time first. Pair ``i`` of an axis of ``n`` dimensions turns by ``10000**(-2i/n)`` a position.

    Source: Su et al. 2021, "RoFormer"; Open-Sora Plan v1.3 report, "3D RoPE".
    """
    parts = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        frequency = 1.0 / BASE ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
        place = torch.arange(grid[axis], dtype=torch.float32, device="cpu")
        shape = [1, 1, 1, dim // 2]
        shape[axis] = grid[axis]
        angle = (place[:, None] * torch.from_numpy(frequency)).view(shape)
        parts.append(angle.expand(*grid, dim // 2))
    return torch.cat(parts, -1).flatten(0, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair of dimensions by its angle.

    Args:
        x: ``[B, N, H, D]``.
        cos, sin: ``[N, D / 2]`` of :func:`rotary_angles`, in the dtype of ``x``.

    Returns:
        ``[B, N, H, D]``.
    """
    dims = axis_dims(x.shape[-1])
    turned = []
    angles = (part.split([dim // 2 for dim in dims], -1) for part in (cos, sin))
    for part, c, s in zip(x.split(dims, -1), *angles, strict=True):
        first, second = part.chunk(2, -1)
        c, s = c[:, None], s[:, None]  # [N, 1, pairs]
        turned += [first * c - second * s, second * c + first * s]
    return torch.cat(turned, -1)
