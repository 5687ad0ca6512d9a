"""What the kernels share: how a program finds its rows, and which block sizes it gets.

The rows of a sub-sequence are cut into blocks, first the blocks of its video tokens, then those of
the text; no block holds both. A block is described by its video/text flag, its row numbers (token
numbers of the video or of the text) and which of them exist.

A kernel argument that exists for video and text is a *pair* of *sources*; a source is a tensor
and its strides ``(pointer, batch, sub-sequence, row, head)``, the last dimension being dense.
Which of the two a block reads is a scalar selection, so one loop runs over both.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# (device functions have no Python types; Triton types them)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skiparse import pattern
from skiparse.backends import Inputs

LOG2E = tl.constexpr(1.4426950408889634)

# The interpreter calls functions it did not wrap as the Python they are.
token_of = pattern.token_of if triton.knobs.runtime.interpret else triton.jit(pattern.token_of)


@triton.jit
def program(blocks, n, H):
    """Batch, head, sub-sequence and block of this program; blocks of one sub-sequence adjoin.

    Everything is on grid axis 0: CUDA ends the other two at 65535.
    """
    i = tl.program_id(0)
    block = i % blocks
    s = i // blocks % n
    head = i // (blocks * n)
    return (head // H).to(tl.int64), (head % H).to(tl.int64), s, block


@triton.jit
def rows_of(block, video_blocks, s, N, T, n, w, BLOCK: tl.constexpr):
    """Whether a block is video, its row numbers and which of them exist."""
    is_video = block < video_blocks
    place = tl.where(is_video, block, block - video_blocks) * BLOCK + tl.arange(0, BLOCK)
    row = tl.where(is_video, token_of(s, place, n, w), place)  # [BLOCK]
    exists = row < tl.where(is_video, N, T)  # [BLOCK]
    return is_video, row.to(tl.int64), exists


@triton.jit
def source_pointers(source, b, s, row, h):
    """Pointers ``[BLOCK]`` to the rows of one source."""
    pointer, batch_stride, sub_stride, row_stride, head_stride = source
    return pointer + (b * batch_stride + s.to(tl.int64) * sub_stride + h * head_stride) + (
        row * row_stride
    )


@triton.jit
def pair_pointers(pair, is_video, b, s, row, h):
    """Pointers ``[BLOCK]`` to the rows of the video or the text."""
    video, text = pair
    source = (
        tl.where(is_video, video[0], text[0]),
        tl.where(is_video, video[1], text[1]),
        tl.where(is_video, video[2], text[2]),
        tl.where(is_video, video[3], text[3]),
        tl.where(is_video, video[4], text[4]),
    )
    return source_pointers(source, b, s, row, h)


@triton.jit
def tile_mask(exists, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK, BLOCK_D]``, or ``[BLOCK, 1]`` if the head dimension is not padded."""
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return mask


@triton.jit
def load_tile(
    pair, is_video, b, s, row, h, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of the video or the text, ``[BLOCK, BLOCK_D]``, 0 where there is nothing."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = pair_pointers(pair, is_video, b, s, row, h)[:, None] + d[None, :]
    return tl.load(pointers, mask=tile_mask(exists, d, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_tile(
    pair, is_video, b, s, row, h, exists, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write ``[BLOCK, BLOCK_D]`` to rows of the video or the text, whose dtypes may differ."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = tile_mask(exists, d, HEAD_DIM, BLOCK_D)
    video, text = pair
    if is_video:
        pointers = source_pointers(video, b, s, row, h)[:, None] + d[None, :]
        tl.store(pointers, tile.to(video[0].dtype.element_ty), mask=mask)
    else:
        pointers = source_pointers(text, b, s, row, h)[:, None] + d[None, :]
        tl.store(pointers, tile.to(text[0].dtype.element_ty), mask=mask)


@triton.jit
def attended(mask, is_video, b, s, row, h, exists):
    """Which keys ``[BLOCK]`` exist and are not masked; ``mask`` is a pair or None."""
    if mask is None:
        return exists
    return tl.load(pair_pointers(mask, is_video, b, s, row, h), mask=exists, other=0) != 0


Source = tuple[Tensor, int, int, int, int]
Pair = tuple[Source, Source]


def shared(x: Tensor) -> Source:
    """``[B, rows, H, ...]`` that every sub-sequence sees."""
    return x, x.stride(0), 0, x.stride(1), x.stride(2)


def own(x: Tensor) -> Source:
    """``[B, n, rows, H, ...]``: each sub-sequence has its own."""
    return x, x.stride(0), x.stride(1), x.stride(2), x.stride(3)


def lse_pair(lse: Tensor, text_lse: Tensor) -> Pair:
    """The argument for ``[B, H, N]`` and ``[B, H, n, T]``."""
    return shared(lse.transpose(1, 2)), own(text_lse.permute(0, 2, 3, 1))


def mask_pair(inputs: Inputs) -> Pair | None:
    """The argument for the key masks; if one is missing, it is all True."""
    if inputs.mask is None and inputs.text_mask is None:
        return None
    (B, N, H, _), T = inputs.q.shape, inputs.text_q.shape[1]
    everything = inputs.q.new_ones(1, dtype=torch.bool)
    mask = everything.expand(B, N) if inputs.mask is None else inputs.mask
    text_mask = everything.expand(B, T) if inputs.text_mask is None else inputs.text_mask
    return (
        shared(mask.unsqueeze(-1).expand(-1, -1, H)),
        shared(text_mask.unsqueeze(-1).expand(-1, -1, H)),
    )


class Config(NamedTuple):
    """Rows of queries and of keys in a block, and how Triton is to compile the kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


Configs = dict[str, dict[int, Config]]  # by architecture, or "fp32" for any; then by BLOCK_D


def architecture(q: Tensor) -> str:
    """The row of a table of configurations that suits the device of ``q``."""
    if q.device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if torch.cuda.get_device_capability(q.device)[0] in (9, 10) else "sm_80"


def block_d(D: int) -> int:
    """The head dimension as a kernel holds it: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(D))


def choose(configs: Configs, q: Tensor) -> Config:
    """The configuration for the device, dtype and head dimension of ``q``."""
    row = architecture(q)
    if q.dtype == torch.float32 and row != "interpreter":
        row = "fp32"
    return next(c for size, c in configs[row].items() if q.shape[-1] <= size)
