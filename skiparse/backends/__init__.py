"""What a backend is: three functions of one problem, and nothing that another backend knows.

To add one, write a module with these three functions and give it a line in
``skiparse/registry.py``. Everything above this line (checks, autograd, compile, flop counts) is
shared and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from skiparse.pattern import Box, SkipPattern


@dataclass(frozen=True)
class Inputs:
    """One attention problem, checked. Floating tensors share dtype and device, last stride 1.

    Text is always there; without any, its length ``T`` is 0. Masks are key masks, True = attend.
    """

    q: Tensor  # [B, N, H, D]
    k: Tensor  # [B, N, H, D]
    v: Tensor  # [B, N, H, D]
    text_q: Tensor  # [B, T, H, D]
    text_k: Tensor  # [B, T, H, D]
    text_v: Tensor  # [B, T, H, D]
    mask: Tensor | None  # [B, N] bool
    text_mask: Tensor | None  # [B, T] bool
    pattern: SkipPattern
    scale: float


class Outputs(NamedTuple):
    """Contiguous, freshly allocated. ``lse`` is the natural log of the sum of exponentials."""

    out: Tensor  # [B, N, H, D]
    text_out: Tensor  # [B, n, T, H, D], one for each sub-sequence, not yet averaged
    lse: Tensor  # [B, H, N], fp32 (fp64 for fp64 inputs), -inf where every key is masked
    text_lse: Tensor  # [B, H, n, T], likewise


class Gradients(NamedTuple):
    """Of the six inputs, in their shapes and dtype, contiguous; text summed over sub-sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    text_q: Tensor
    text_k: Tensor
    text_v: Tensor


class Backend(Protocol):
    """The three functions of a backend module."""

    def why_not(self, inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
        """None if it can do this, else the reason. Without ``inputs``: can it run here at all?"""

    def forward(self, inputs: Inputs) -> Outputs:
        """Attention over every sub-sequence."""

    def backward(
        self, inputs: Inputs, outputs: Outputs, grad_out: Tensor, grad_text_out: Tensor
    ) -> Gradients:
        """Gradients of the six inputs; ``outputs`` may come from another backend's forward.

        ``grad_out`` is ``[B, N, H, D]``, ``grad_text_out`` ``[B, n, T, H, D]``, any strides with
        the last 1. Where ``lse`` is -inf the row's gradients are zero.
        """


# What backends over library kernels share: the tokens of a box, as views.


def tokens_of(video: Tensor, box: Box) -> Tensor:
    """The tokens of a box: the view ``[B, S, runs, tokens, H, D]`` of ``[B, N, H, D]``."""
    step = video.stride(1)
    return video.as_strided(
        (video.shape[0], *box.shape, *video.shape[2:]),
        (video.stride(0), *(step * stride for stride in box.strides), *video.stride()[2:]),
        video.storage_offset() + step * box.start,
    )


def rows_of(rows: Tensor, box: Box) -> Tensor:
    """The same tokens of ``[B, S, rows, H, D]``, viewed as :func:`tokens_of` does."""
    _, runs, width = box.shape
    return rows[:, :, box.first : box.first + runs * width].unflatten(2, (runs, width))
