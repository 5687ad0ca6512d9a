"""How rows become boxes, which the tensor memory accelerator of Hopper and later copies whole.

A tensor of rows is seen as ``[B, runs, n, w, H*D]``: the video ``[B, N, H, D]`` as it is dealt out,
text ``[B, T, H, D]`` as one run of ``T`` rows, and text that each sub-sequence has of its own
(``[B, n, T, H, D]``) as ``n`` such runs. A block of rows of one head is a box of it; rows behind
the last one read as 0, and are not written. That needs regular strides and lengths:
:func:`can_be_tiled`.
"""

# Triton has no type stubs, and device functions no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from skiparse import pattern
from skiparse.backends import Inputs
from skiparse.backends.triton.device import device_function
from skiparse.pattern import SkipPattern

Box = list[int]
Describe = Callable[[Tensor, list[int], list[int], Box], Any]  # tensor, shape, strides, box


@device_function
def tile_at(tiles, b, run, s, offset, h, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The block of rows ``[BLOCK, HEAD_DIM]`` that begins ``offset`` rows into a run."""
    return tiles.load([b, run, s, offset, h * HEAD_DIM]).reshape(BLOCK, HEAD_DIM)


@device_function
def video_tile(tiles, b, block, s, w, h, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A block of rows ``[BLOCK, HEAD_DIM]`` of the video tokens of a sub-sequence."""
    run = block * BLOCK // w
    return tile_at(tiles, b, run, s, block * BLOCK - run * w, h, BLOCK, HEAD_DIM)


@device_function
def text_tile(tiles, b, block, s, h, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A block of rows ``[BLOCK, HEAD_DIM]`` of the text; ``s`` is 0 if it is shared."""
    return tile_at(tiles, b, 0, s, block * BLOCK, h, BLOCK, HEAD_DIM)


@device_function
def store_video_tile(tiles, b, block, s, w, h, tile, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write ``[BLOCK, HEAD_DIM]`` where :func:`video_tile` reads, in the dtype of ``tiles``."""
    run = block * BLOCK // w
    at = [b, run, s, block * BLOCK - run * w, h * HEAD_DIM]
    tiles.store(at, tile.to(tiles.dtype).reshape(tiles.block_shape))


@device_function
def store_text_tile(tiles, b, block, s, h, tile, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The same for the text, where :func:`text_tile` reads."""
    at = [b, 0, s, block * BLOCK, h * HEAD_DIM]
    tiles.store(at, tile.to(tiles.dtype).reshape(tiles.block_shape))


def can_be_tiled(inputs: Inputs, block: int, sources: Sequence[Tensor]) -> bool:
    """Whether every ``block`` rows of a head of the ``sources``, video and text, are a box.

    They are not if the pattern is a grid's, the last period is not whole, a block is neither whole
    runs nor a part of one, or heads are not side by side.
    """
    if not isinstance(inputs.pattern, SkipPattern):
        return False
    w = inputs.pattern.run
    segments = inputs.pattern.segments(inputs.q.shape[1])
    regular = len(segments) == 1 and [box.shape[2] for box in segments[0].boxes] == [w]
    short, long = sorted((w, block))
    return regular and pattern.tiles_runs(short, long) and all(map(_has_tiles, sources))


def _has_tiles(x: Tensor) -> bool:
    """Heads side by side; all else apart by multiples of 16 bytes, and beginning at one."""
    H, D = x.shape[-2:]
    steps = _steps(x)
    return (
        x.shape[0] * H > 0
        and D >= 16
        and D & (D - 1) == 0
        and (H == 1 or x.stride(-2) == D)
        and 0 not in steps
        and all(elements * x.element_size() % 16 == 0 for elements in (*steps, x.storage_offset()))
    )


def _steps(x: Tensor) -> list[int]:
    """The strides of all but heads; a dimension of 1, whose own may be anything, as if dense."""
    H, D = x.shape[-2:]
    steps, dense = [], H * D
    for i in reversed(range(x.ndim - 2)):
        steps.append(x.stride(i) if x.shape[i] > 1 else dense)
        dense = steps[-1] * max(x.shape[i], 1)
    return steps[::-1]


def tile_views(
    inputs: Inputs,
    block: int,
    video: Sequence[Tensor],
    text: Sequence[Tensor],
    describe: Describe = TensorDescriptor,
) -> list[Any]:
    """Each of ``video``, then of ``text``, ``block`` rows of a head at a time, if tiled so."""
    views = [_video_view(inputs, x, block, describe) for x in video]
    # Text without rows is never touched, but there must be something.
    return views + [
        _text_view(x, block, describe) if x.shape[-3] else view
        for x, view in zip(text, views, strict=True)
    ]


def _video_view(inputs: Inputs, x: Tensor, block: int, describe: Describe) -> Any:
    assert isinstance(inputs.pattern, SkipPattern)
    n, w = inputs.pattern.sparsity, inputs.pattern.run
    (B, N, H, D), (batch, step), width = x.shape, _steps(x), min(w, block)
    return describe(
        x,
        [B, N // (n * w), n, w, H * D],
        [batch, n * w * step, w * step, step, 1],
        [1, block // width, 1, width, D],
    )


def _text_view(x: Tensor, block: int, describe: Describe) -> Any:
    (B, *own, T, H, D), (batch, *sub, step) = x.shape, _steps(x)
    n, sub_step = (own[0], sub[0]) if own else (1, T * step)
    return describe(x, [B, 1, n, T, H * D], [batch, batch, sub_step, step, 1], [1, 1, 1, block, D])
