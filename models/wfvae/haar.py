"""The Haar wavelet transform of video, in halves of each axis: eight bands of a cube of pixels.

Bands are numbered ``4 * [t high] + 2 * [h high] + [w high]``; low is the sum of a pair, high the
first less the second. Channels are band-major, colour-minor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from skiparse.models.wfvae.stream import Stream

EXACT_3D = 1 / math.sqrt(8)  # of orthonormal filters; the released code has 0.3536 instead
EXACT_2D = 1 / 2


def analyse(x: Tensor, axes: Sequence[int], gain: float) -> Tensor:
    """``[B, C, ...]`` to ``[B, 2**len(axes) * C, ...]``, each of ``axes`` (first is most
    significant) half as long; every coefficient is ``gain`` times a signed sum."""
    bands = [x]
    for axis in axes:
        pairs = [(_every(y, axis, 0), _every(y, axis, 1)) for y in bands]
        bands = [band for a, b in pairs for band in (a + b, a - b)]
    return torch.cat(bands, 1) * gain


def synthesise(x: Tensor, axes: Sequence[int], gain: float) -> Tensor:
    """The way back from :func:`analyse`; exact if ``gain**2 * 2**len(axes)`` is 1."""
    bands = list(x.chunk(2 ** len(axes), 1))
    for axis in reversed(axes):
        pairs = zip(bands[::2], bands[1::2], strict=True)
        bands = [
            torch.stack((low + high, low - high), axis + 1).flatten(axis, axis + 1)
            for low, high in pairs
        ]
    return bands[0] * gain


def _every(x: Tensor, axis: int, start: int) -> Tensor:
    """Every second entry of an axis."""
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, None, 2)
    return x[tuple(index)]


class Haar:
    """Analysis and synthesis of a stream of frames ``[B, C, T, H, W]``.

    Over time, height and width, ``T = 1 + 2n`` frames become ``1 + n``: the first frame is
    doubled, so that an image has coefficients too. Or over height and width alone.

    Args:
        gain: of every coefficient over three axes, in both directions; None for that of orthonormal
            filters, which over two axes it always is.
        temporal: whether time is halved.

    Source: Li et al. 2024, "WF-VAE", section 3.1.
    """

    def __init__(self, gain: float | None, *, temporal: bool = True) -> None:
        exact = EXACT_3D if temporal else EXACT_2D
        self.axes = (2, 3, 4) if temporal else (3, 4)
        self.gain = exact if gain is None or not temporal else gain
        self.temporal = temporal

    @property
    def bands(self) -> int:
        return 2 ** len(self.axes)

    def analyse(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, bands * C, ...]``."""
        if self.temporal and stream.first:
            x = torch.cat([x[:, :, :1], x], 2)
        return analyse(x, self.axes, self.gain)

    def synthesise(self, x: Tensor, stream: Stream) -> Tensor:
        """The way back; the frame that was doubled is dropped."""
        video = synthesise(x, self.axes, self.gain)
        return video[:, :, 1:] if self.temporal and stream.first else video
