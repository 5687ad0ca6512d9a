"""What the kernels share: how a program finds its rows, and which block sizes it gets.

The rows of a sub-sequence are cut into blocks, first the blocks of its video tokens, then those of
the text; no block holds both. A block is described by its video/text flag, its row numbers (token
numbers of the video or of the text) and which of them exist.

A kernel argument that exists for video and text is a *pair* of *sources*; a source is a tensor
and its strides ``(pointer, batch, sub-sequence, row, head)``, the last dimension being dense.
Which of the two a block reads is a scalar selection, so one loop runs over both.
"""

# Triton has no type stubs, and device functions no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skiparse import pattern
from skiparse.backends import Inputs
from skiparse.backends.triton.plans import Launch, start
from skiparse.pattern import GridPattern, Pattern, SkipPattern

LOG2E = tl.constexpr(1.4426950408889634)
SIZES = ["N", "T", "H", "longest", "n", "w"]  # not worth a kernel of their own

_SHIFTS = (1, 2, 4, 8, 16, 32, 64)  # usual run widths, compiled in: they divide by a shift


def device_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrapped for kernels to call; left as the Python it is for Triton's interpreter.

    The interpreter calls plain functions as well, and several times faster.
    """
    if triton.knobs.runtime.interpret:
        return function
    wrapped: Callable[..., Any] = triton.jit(function)
    return wrapped


def _formula(function: Callable[..., Any], **called: Any) -> Callable[..., Any]:
    """A function of ``skiparse.pattern``, for kernels; ``called``, those that it calls.

    Triton looks up the names in annotations and admits only its own, so ``Index`` becomes one.
    """
    names = {**function.__globals__, "Index": tl.tensor, **called}
    return device_function(FunctionType(function.__code__, names, function.__name__))


token_of = _formula(pattern.token_of)
length_of = _formula(pattern.length_of)
grid_token_of = _formula(pattern.grid_token_of, token_of=token_of, length_of=length_of)
grid_length_of = _formula(pattern.grid_length_of, length_of=length_of)


# The runs of a pattern, `w` in the kernels, are a number, or of a grid (run, rows, columns, ratio).
TUPLE = tuple if triton.knobs.runtime.interpret else tl.tuple


@device_function
def token_in(s, j, n, w):
    """The token at position ``j`` of sub-sequence ``s``."""
    if isinstance(w, TUPLE):
        run, height, width, p = w
        token = grid_token_of(s, j, height, width, p, run)
    else:
        token = token_of(s, j, n, w)
    return token


@device_function
def length_in(s, N, n, w):
    """How many of ``N`` tokens sub-sequence ``s`` owns."""
    if isinstance(w, TUPLE):
        run, height, width, p = w
        length = grid_length_of(s, N // (height * width), height, width, p, run)
    else:
        length = length_of(s, N, n, w)
    return length


@device_function
def program(blocks, n, H):
    """Batch, head, sub-sequence and block of this program.

    Everything is on grid axis 0: CUDA ends the other two at 65535.
    """
    return task_at(tl.program_id(0), blocks, n, H)


@device_function
def task_at(i, blocks, n, H):
    """Batch, head, sub-sequence and block of a task; those of one sub-sequence adjoin."""
    block = i % blocks
    s = i // blocks % n
    head = i // (blocks * n)
    return (head // H).to(tl.int64), (head % H).to(tl.int64), s, block


@device_function
def rows_of(block, video_blocks, s, sizes, WHOLE_RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a block is video, its row numbers and which of them exist."""
    return rows_at(block, tl.arange(0, BLOCK), video_blocks, s, sizes, WHOLE_RUNS, BLOCK)


@device_function
def rows_at(block, lane, video_blocks, s, sizes, WHOLE_RUNS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of some rows of a block only, those at ``lane`` in it.

    32-bit while tokens are counted, 64-bit before a stride is near.
    """
    L, T, n, w = sizes
    is_video = block < video_blocks
    first = tl.where(is_video, block, block - video_blocks) * BLOCK
    exists = lane < tl.where(is_video, L, T) - first  # [lanes]
    # A block that lies inside one run needs one division, not one for each row.
    token = token_in(s, first, n, w) + lane if WHOLE_RUNS else token_in(s, first + lane, n, w)
    row = tl.where(is_video, token, first + lane)  # [lanes]
    return is_video, row.to(tl.int64), exists


@device_function
def rows_of_program(
    text_rows, N, T, H, longest, n, w, WHOLE_RUNS: tl.constexpr, BLOCK: tl.constexpr
):
    """The block of rows that is a program's own, where ``text_rows`` come after the video's.

    Returned are batch, head, sub-sequence, block, how many blocks the video has, ``sizes``, and
    what :func:`rows_of` says of the block.
    """
    video_blocks = tl.cdiv(longest, BLOCK)
    b, h, s, block = program(video_blocks + tl.cdiv(text_rows, BLOCK), n, H)
    sizes = (length_in(s, N, n, w), T, n, w)
    rows = rows_of(block, video_blocks, s, sizes, WHOLE_RUNS, BLOCK)
    return b, h, s, block, video_blocks, sizes, rows


@device_function
def source_pointers(source, b, s, row, h):
    """Pointers ``[BLOCK]`` to the rows of one source."""
    pointer, batch_stride, sub_stride, row_stride, head_stride = source
    base = pointer + (b * batch_stride + s.to(tl.int64) * sub_stride + h * head_stride)
    return base + row * row_stride


@device_function
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


@device_function
def tile_mask(exists, d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK, BLOCK_D]``, or ``[BLOCK, 1]`` if the head dimension is not padded."""
    mask = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return mask


@device_function
def load_tile(pair, is_video, b, s, row, h, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of the video or the text, ``[BLOCK, BLOCK_D]``, 0 where there is nothing."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = pair_pointers(pair, is_video, b, s, row, h)[:, None] + d[None, :]
    return tl.load(pointers, mask=tile_mask(exists, d, HEAD_DIM, BLOCK_D), other=0.0)


@device_function
def store_source(source, b, s, row, h, exists, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``[BLOCK, BLOCK_D]`` to rows of one source, in its dtype."""
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = source_pointers(source, b, s, row, h)[:, None] + d[None, :]
    mask = tile_mask(exists, d, HEAD_DIM, BLOCK_D)
    tl.store(pointers, tile.to(source[0].dtype.element_ty), mask=mask)


@device_function
def store_tile(
    pair, is_video, b, s, row, h, exists, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write ``[BLOCK, BLOCK_D]`` to rows of the video or the text, whose dtypes may differ."""
    if is_video:
        store_source(pair[0], b, s, row, h, exists, tile, HEAD_DIM, BLOCK_D)
    else:
        store_source(pair[1], b, s, row, h, exists, tile, HEAD_DIM, BLOCK_D)


@device_function
def attended(mask, is_video, b, s, row, h, exists):
    """Which keys ``[BLOCK]`` exist and are not masked; ``mask`` is a pair or None."""
    attend = exists
    if mask is not None:
        attend = tl.load(pair_pointers(mask, is_video, b, s, row, h), mask=exists, other=0) != 0
    return attend


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
    batch, head, row = (lse.stride(i) for i in range(3))
    text_batch, text_head, sub, text_row = (text_lse.stride(i) for i in range(4))
    return (lse, batch, 0, row, head), (text_lse, text_batch, sub, text_row, text_head)


def mask_pair(inputs: Inputs) -> Pair | None:
    """The argument for the key masks, both there or both missing."""
    if inputs.mask is None or inputs.text_mask is None:
        return None
    video, text = inputs.mask, inputs.text_mask
    return (
        (video, video.stride(0), 0, video.stride(1), 0),
        (text, text.stride(0), 0, text.stride(1), 0),
    )


def tensors_of(inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The first eight of ``Inputs``; a mask that is missing beside the other one is all True."""
    mask, text_mask = inputs.mask, inputs.text_mask
    if mask is None and text_mask is not None:
        mask = text_mask.new_ones(1).expand(inputs.q.shape[:2])
    elif text_mask is None and mask is not None:
        rows = inputs.text_k.shape[:2]
        text_mask = mask.new_ones(1).expand(rows) if rows.numel() else mask[:, :0]
    q, k, v = inputs.q, inputs.k, inputs.v
    return q, k, v, inputs.text_q, inputs.text_k, inputs.text_v, mask, text_mask


def inputs_of(tensors: Sequence[Any], pattern: Pattern, scale: float) -> Inputs:
    """The way back from :func:`tensors_of`."""
    q, k, v, text_q, text_k, text_v, mask, text_mask = tensors
    return Inputs(q, k, v, text_q, text_k, text_v, mask, text_mask, pattern, scale)


class Config(NamedTuple):
    """Rows of queries and of keys in a block, and how Triton is to compile the kernel."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


Configs = dict[
    str, dict[int, Config]
]  # by architecture, or "fp32" for any; then by the largest head_dim


def architecture(q: Tensor) -> str:
    """The row of a table of configurations that suits the device of ``q``."""
    if q.device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return "sm_90" if _capability(q.device)[0] in (9, 10) else "sm_80"


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Asked of the driver once; every launch needs it."""
    return torch.cuda.get_device_capability(device)


def choose(configs: Configs, q: Tensor) -> Config:
    """The configuration for the device, dtype and head dimension of ``q``."""
    row = architecture(q)
    if q.dtype == torch.float32 and row != "interpreter":
        row = "fp32"
    return next(config for D, config in configs[row].items() if q.shape[-1] <= D)


def exact_architecture(q: Tensor) -> str:
    """The device of ``q`` itself, not its family: for tables that hold for some devices only."""
    if q.device.type == "cpu" or torch.version.hip is not None:
        return architecture(q)
    major, minor = _capability(q.device)
    return f"sm_{major}{minor}"


def choose_if_any(configs: Configs, q: Tensor) -> Config | None:
    """The configuration if the table has this device and so large a head dimension."""
    row = configs.get(exact_architecture(q), {})
    return next((config for D, config in row.items() if q.shape[-1] <= D), None)


def multiprocessors(q: Tensor) -> int:
    """How many the device of ``q`` has."""
    return int(torch.cuda.get_device_properties(q.device).multi_processor_count)


def launch(
    kernel: Any,
    inputs: Inputs,
    rows: int,
    *args: Any,
    keys: bool = False,
    persistent: bool = False,
    **options: Any,
) -> None:
    """One program for each ``rows`` rows of each sub-sequence, head and batch entry.

    They are queries, or ``keys``: of the text there may be none of the former. Or, ``persistent``,
    there is at most one program for each multiprocessor; these share the tasks.
    ``args`` are the kernel's own, ``options`` its block sizes and how to compile it; the sizes of
    the problem, which every kernel takes, are put between them.
    """
    n = inputs.pattern.sparsity
    (B, N, H, D), T = inputs.q.shape, inputs.text_k.shape[1]
    longest = inputs.pattern.length(0, N)
    text = T if keys else inputs.text_q.shape[1]
    programs = (triton.cdiv(longest, rows) + triton.cdiv(text, rows)) * n * H * B
    if programs == 0:
        return
    if persistent:
        programs = min(programs, multiprocessors(inputs.q))
    largest = max(size for name, size in options.items() if name.startswith("BLOCK"))
    w, whole_runs = _runs(inputs.pattern, largest)
    sizes = {
        "N": N,
        "T": T,
        "H": H,
        "longest": longest,
        "n": n,
        "w": w,
        "WHOLE_RUNS": whole_runs,
        "HEAD_DIM": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
    }
    start(inputs.q, Launch(kernel, programs, args, sizes | options))


def _runs(of: Pattern, block: int) -> tuple[Any, bool]:
    """``w`` as the kernels take it, and whether blocks of so many rows each lie inside one run."""
    if isinstance(of, GridPattern):
        _, height, width = of.grid
        return (of.run, height, width, of.ratio), False
    assert isinstance(of, SkipPattern)  # pieces are taken one by one
    w = of.run
    return tl.constexpr(w) if w in _SHIFTS else w, pattern.tiles_runs(block, w)
