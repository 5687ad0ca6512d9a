"""Coding a video in pieces without loss: what each layer must remember between two pieces.

Every layer works on a piece of consecutive frames and keeps, in a :class:`Stream`, what it needs
of the past. A causal convolution keeps its last frames. An upsampler, whose last output depends on
a frame that has not come yet, holds that output back until it comes or the stream ends; where a
delayed path meets one that is not, the earlier one waits (:meth:`Stream.wait`). So pieces of any
length give exactly what the whole gives, nothing is computed twice, and the whole is just the
stream of one piece: there is no other code for it.

Source: the causal cache of Li et al. 2024, "WF-VAE", section 3.3; holding back instead of decoding
a latent ahead is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class Stream:
    """One video on its way through a network; made for each call, so calls do not share state.

    ``first`` and ``last`` say whether this is the first or the last piece; :meth:`pieces` sets
    them.
    """

    def __init__(self) -> None:
        self.first = True
        self.last = True
        self._kept: dict[object, Tensor] = {}

    def pieces(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pieces one by one, with ``first`` and ``last`` set for each."""
        source = iter(pieces)
        piece = next(source, None)
        while piece is not None:
            following = next(source, None)
            self.last = following is None
            yield piece
            self.first = False
            piece = following

    def remember(self, who: object, frames: Tensor) -> None:
        """Keep ``frames`` ``[B, C, T, H, W]`` for ``who``, until :meth:`recall`."""
        if not self.last:
            self._kept[who] = frames.clone()  # not a view, which would keep the piece alive

    def recall(self, who: object) -> Tensor | None:
        """What ``who`` remembered last."""
        return self._kept.pop(who, None)

    def wait(self, who: object, early: Tensor, frames: int) -> Tensor:
        """The next ``frames`` frames of a path that is ahead of another; the rest waits."""
        held = self.recall(who)
        if held is not None:
            early = torch.cat([held, early], 2)
        if early.shape[2] > frames:
            self.remember(who, early[:, :, frames:])
        return early[:, :, :frames]
