"""Norm, rotation and placement of q, k and v in one pass, and its gradient in another.

A program has a block of tokens, of the video or of the text, and goes through their heads: it
reads each row once and writes it to its place, the text to one place for each sub-sequence. A row
is held as two tiles, the first and the second dimension of every rotated pair.
"""

# Triton has no type stubs, and kernels no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skiparse import pattern
from skiparse.backends.triton.device import (
    _formula,
    architecture,
    device_function,
    length_of,
    token_of,
)
from skiparse.backends.triton.plans import Launch, planned, start

sub_of = _formula(pattern.sub_of)
pos_of = _formula(pattern.pos_of)

SIZES = ["N", "T", "H", "n", "w", "W"]  # not worth a kernel of their own


class Config(NamedTuple):
    """Pairs of dimensions in a tile, for a head dimension that is a multiple of 64, and warps.

    Other head dimensions have shorter stretches, so more addresses, and a quarter of the pairs.
    """

    pairs: int
    num_warps: int


# A thread has 8 pairs: accesses of 16 bytes in half precision, two of them in fp32. Chosen to
# compile without spills; tests/data/pack_aot.json has the registers.
CONFIGS = {
    "sm_80": Config(1024, 4),
    "sm_90": Config(1024, 4),
    "gfx942": Config(2048, 4),
    "interpreter": Config(512, 1),
}


@device_function
def block_of(N, T, BLOCK_M: tl.constexpr):
    """Batch entry, whether the block is video, its rows, which of them exist, copies to make."""
    video_blocks = tl.cdiv(N, BLOCK_M)
    blocks = video_blocks + tl.cdiv(T, BLOCK_M)
    i = tl.program_id(0)
    block = i % blocks
    is_video = block < video_blocks
    first = tl.where(is_video, block, block - video_blocks) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)  # [M]
    return (i // blocks).to(tl.int64), is_video, row, row < tl.where(is_video, N, T)


@device_function
def packed_row(row, copy, is_video, N, n, w, W):
    """Where a row is in the packed buffer ``[M]``: behind the video of its sub-sequence if text."""
    s = tl.where(is_video, sub_of(row, n, w), copy)
    j = tl.where(is_video, pos_of(row, n, w), length_of(copy, N, n, w) + row)
    return token_of(s, j, n, W).to(tl.int64)


@device_function
def pairs_of(AXES: tl.constexpr, BLOCK_P: tl.constexpr):
    """The first and the second dimension of every pair, ``[P]`` each."""
    pair = tl.arange(0, BLOCK_P)
    before = tl.zeros([BLOCK_P], tl.int32)  # pairs of the axes before
    half = tl.zeros([BLOCK_P], tl.int32)  # pairs of its own axis
    start: tl.constexpr = 0
    for axis in tl.static_range(len(AXES)):
        before = tl.where(pair >= start, start, before)
        half = tl.where(pair >= start, AXES[axis] // 2, half)
        start += AXES[axis] // 2
    first = (pair + before).to(tl.int64)
    return first, first + half


@device_function
def either(pair, is_video):
    """The source of the video or of the text: pointer, and strides of batch, row and head."""
    video, text = pair
    return (
        tl.where(is_video, video[0], text[0]),
        tl.where(is_video, video[1], text[1]),
        tl.where(is_video, video[2], text[2]),
        tl.where(is_video, video[3], text[3]),
    )


@device_function
def row_pointers(source, b, row, h):
    """Pointers ``[M, 1]`` to rows of a source."""
    pointer, batch_stride, row_stride, head_stride = source
    return (pointer + (b * batch_stride + h * head_stride) + row * row_stride)[:, None]


@device_function
def load_pairs(source, b, row, h, dims, mask):
    """Both halves of rows, ``[M, P]`` each, fp32, 0 where there is nothing."""
    rows = row_pointers(source, b, row, h)
    return (
        tl.load(rows + dims[0][None, :], mask=mask, other=0.0).to(tl.float32),
        tl.load(rows + dims[1][None, :], mask=mask, other=0.0).to(tl.float32),
    )


@device_function
def store_pairs(source, b, row, h, dims, mask, tiles):
    """Write both halves, ``[M, P]`` each, in the dtype of the source."""
    rows = row_pointers(source, b, row, h)
    dtype = source[0].dtype.element_ty
    tl.store(rows + dims[0][None, :], tiles[0].to(dtype), mask=mask)
    tl.store(rows + dims[1][None, :], tiles[1].to(dtype), mask=mask)


@device_function
def load_weight(pair, is_video, dim, mask):
    """The norm's weight at some dimensions, ``[1, P]`` fp32; the two dtypes may differ."""
    if is_video:
        weight = tl.load(pair[0] + dim, mask=mask, other=0.0).to(tl.float32)
    else:
        weight = tl.load(pair[1] + dim, mask=mask, other=0.0).to(tl.float32)
    return weight[None, :]


@device_function
def load_weights(pair, is_video, dims, mask):
    """The norm's weight for both halves."""
    return (
        load_weight(pair, is_video, dims[0], mask),
        load_weight(pair, is_video, dims[1], mask),
    )


@device_function
def load_angles(cos, sin, row, pair, mask, PAIRS: tl.constexpr):
    """cos and sin of a block, ``[M, P]`` fp32; no rotation where there is none to load."""
    offset = row[:, None] * PAIRS + pair[None, :]
    return (
        tl.load(cos + offset, mask=mask, other=1.0).to(tl.float32),
        tl.load(sin + offset, mask=mask, other=0.0).to(tl.float32),
    )


@device_function
def block_and_tables(
    norm_q,
    norm_k,
    cos,
    sin,
    N,
    T,
    AXES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The block of a program, and what it loads once for all heads: angles and both weights."""
    b, is_video, row, exists = block_of(N, T, BLOCK_M)
    pair = tl.arange(0, BLOCK_P).to(tl.int64)
    dims = pairs_of(AXES, BLOCK_P)
    mask = exists[:, None] & (pair < HEAD_DIM // 2)[None, :]  # [M, P]
    source_row = row.to(tl.int64)
    angles = load_angles(cos, sin, source_row, pair, mask & is_video, HEAD_DIM // 2)
    weight_q = load_weights(norm_q, is_video, dims, pair < HEAD_DIM // 2)
    weight_k = load_weights(norm_k, is_video, dims, pair < HEAD_DIM // 2)
    return b, is_video, row, dims, mask, angles, weight_q, weight_k


@device_function
def inverse_rms(x, eps, HEAD_DIM: tl.constexpr):
    """``[M, 1]`` of both halves of rows."""
    return tl.rsqrt(tl.sum(x[0] * x[0] + x[1] * x[1], 1)[:, None] / HEAD_DIM + eps)


@device_function
def norm_rotate(x, weight, angles, eps, HEAD_DIM: tl.constexpr):
    """Both halves of rows, normalised and rotated."""
    r = inverse_rms(x, eps, HEAD_DIM)
    first = x[0] * r * weight[0]
    second = x[1] * r * weight[1]
    return (
        first * angles[0] - second * angles[1],
        second * angles[0] + first * angles[1],
    )


@device_function
def norm_rotate_backward(grad, x, weight, angles, eps, HEAD_DIM: tl.constexpr):
    """Gradients of both halves of rows, and what each row gives to those of the weight."""
    r = inverse_rms(x, eps, HEAD_DIM)
    first = grad[0] * angles[0] + grad[1] * angles[1]
    second = grad[1] * angles[0] - grad[0] * angles[1]
    weight_first = first * x[0] * r
    weight_second = second * x[1] * r
    mean = tl.sum(weight_first * weight[0] + weight_second * weight[1], 1)[:, None] / HEAD_DIM
    return (
        r * (first * weight[0] - x[0] * r * mean),
        r * (second * weight[1] - x[1] * r * mean),
        weight_first,
        weight_second,
    )


@triton.jit(do_not_specialize=SIZES)
def skiparse_pack(
    q,
    k,
    v,
    norm_q,
    norm_k,
    cos,
    sin,
    packed_q,
    packed_k,
    packed_v,
    eps,
    N,
    T,
    H,
    n,
    w,
    W,
    AXES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of tokens, all heads."""
    b, is_video, row, dims, mask, angles, weight_q, weight_k = block_and_tables(
        norm_q, norm_k, cos, sin, N, T, AXES, HEAD_DIM, BLOCK_P, BLOCK_M
    )
    source_row = row.to(tl.int64)
    q, k, v = either(q, is_video), either(k, is_video), either(v, is_video)

    for head in range(H):
        h = tl.cast(head, tl.int64)
        q_tile = load_pairs(q, b, source_row, h, dims, mask)
        k_tile = load_pairs(k, b, source_row, h, dims, mask)
        v_tile = load_pairs(v, b, source_row, h, dims, mask)
        q_tile = norm_rotate(q_tile, weight_q, angles, eps, HEAD_DIM)
        k_tile = norm_rotate(k_tile, weight_k, angles, eps, HEAD_DIM)
        for copy in range(tl.where(is_video, 1, n)):
            place = packed_row(row, copy, is_video, N, n, w, W)  # [M]
            store_pairs(packed_q, b, place, h, dims, mask, q_tile)
            store_pairs(packed_k, b, place, h, dims, mask, k_tile)
            store_pairs(packed_v, b, place, h, dims, mask, v_tile)


@triton.jit(do_not_specialize=SIZES)
def skiparse_pack_backward(
    grad_q,
    grad_k,
    grad_v,
    q,
    k,
    norm_q,
    norm_k,
    cos,
    sin,
    dq,
    dk,
    dv,
    dnorm,
    eps,
    N,
    T,
    H,
    n,
    w,
    W,
    AXES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A block of tokens, all heads; its share of the weights' gradients to ``dnorm``."""
    b, is_video, row, dims, mask, angles, weight_q, weight_k = block_and_tables(
        norm_q, norm_k, cos, sin, N, T, AXES, HEAD_DIM, BLOCK_P, BLOCK_M
    )
    source_row = row.to(tl.int64)
    q, k = either(q, is_video), either(k, is_video)
    dq, dk, dv = either(dq, is_video), either(dk, is_video), either(dv, is_video)

    zero = tl.zeros([BLOCK_M, BLOCK_P], tl.float32)  # [M, P]
    q_first, q_second, k_first, k_second = zero, zero, zero, zero  # for the weights
    for head in range(H):
        h = tl.cast(head, tl.int64)
        gq_first, gq_second, gk_first, gk_second = zero, zero, zero, zero
        gv_first, gv_second = zero, zero
        for copy in range(tl.where(is_video, 1, n)):
            place = packed_row(row, copy, is_video, N, n, w, W)  # [M]
            first, second = load_pairs(grad_q, b, place, h, dims, mask)
            gq_first, gq_second = gq_first + first, gq_second + second
            first, second = load_pairs(grad_k, b, place, h, dims, mask)
            gk_first, gk_second = gk_first + first, gk_second + second
            first, second = load_pairs(grad_v, b, place, h, dims, mask)
            gv_first, gv_second = gv_first + first, gv_second + second
        store_pairs(dv, b, source_row, h, dims, mask, (gv_first, gv_second))

        x = load_pairs(q, b, source_row, h, dims, mask)
        dx_first, dx_second, first, second = norm_rotate_backward(
            (gq_first, gq_second), x, weight_q, angles, eps, HEAD_DIM
        )
        q_first, q_second = q_first + first, q_second + second
        store_pairs(dq, b, source_row, h, dims, mask, (dx_first, dx_second))

        x = load_pairs(k, b, source_row, h, dims, mask)
        dx_first, dx_second, first, second = norm_rotate_backward(
            (gk_first, gk_second), x, weight_k, angles, eps, HEAD_DIM
        )
        k_first, k_second = k_first + first, k_second + second
        store_pairs(dk, b, source_row, h, dims, mask, (dx_first, dx_second))

    pair = tl.arange(0, BLOCK_P).to(tl.int64)
    share = dnorm + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM)
    exists = pair < HEAD_DIM // 2
    tl.store(share + dims[0], tl.sum(q_first, 0), mask=exists)
    tl.store(share + dims[1], tl.sum(q_second, 0), mask=exists)
    tl.store(share + (dims[0] + HEAD_DIM), tl.sum(k_first, 0), mask=exists)
    tl.store(share + (dims[1] + HEAD_DIM), tl.sum(k_second, 0), mask=exists)


Source = tuple[Tensor, int, int, int]


def _source(x: Tensor) -> Source:
    """``[B, rows, H, D]`` as a kernel argument: the last dimension is dense."""
    return x, x.stride(0), x.stride(1), x.stride(2)


def _pairs(video: Sequence[Tensor], text: Sequence[Tensor]) -> list[tuple[Source, Source]]:
    return [(_source(x), _source(y)) for x, y in zip(video, text, strict=True)]


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(q: Tensor, text_q: Tensor, config: Config) -> tuple[int, int, int]:
    """Tokens in a block, blocks of the video and blocks of the text."""
    pairs = config.pairs // (1 if q.shape[-1] % 64 == 0 else 4)
    rows = max(pairs // _pairs_in_row(q), 1)
    return rows, triton.cdiv(q.shape[1], rows), triton.cdiv(text_q.shape[1], rows)


def _pairs_in_row(q: Tensor) -> int:
    return int(triton.next_power_of_2(q.shape[-1] // 2))


def _launch(
    kernel: Any, q: Tensor, text_q: Tensor, config: Config, axes: Sequence[int], n: int, w: int,
    *args: Any,
) -> None:  # fmt: skip
    """One program for each block of tokens; the sizes are put behind ``args``."""
    (B, N, H, D), T = q.shape, text_q.shape[1]
    rows, *blocks = _blocks(q, text_q, config)
    programs = B * sum(blocks)
    if programs * H == 0:
        return
    options = {
        "N": N,
        "T": T,
        "H": H,
        "n": n,
        "w": w,
        "W": pattern.SkipPattern(n, w).packed(N, T).run,
        "AXES": axes,
        "HEAD_DIM": D,
        "BLOCK_P": _pairs_in_row(q),
        "BLOCK_M": rows,
        "num_warps": config.num_warps,
    }
    start(q, Launch(kernel, programs, args, options))


def forward(
    video: Sequence[Tensor], text: Sequence[Tensor], norms: Sequence[Tensor],
    text_norms: Sequence[Tensor], cos: Tensor, sin: Tensor, axes: Sequence[int], eps: float,
    n: int, w: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Packed q, k and v; arguments as in ``skiparse.pack``."""
    rows = (_unit(x) for x in (*video, *text))
    tables = (x.contiguous() for x in (*norms, *text_norms, cos, sin))
    config = CONFIGS[architecture(video[0])]
    return tuple(planned(_forward, (*rows, *tables), config, tuple(axes), eps, n, w))


def _forward(
    tensors: Sequence[Any], config: Config, axes: Sequence[int], eps: float, n: int, w: int
) -> Sequence[Tensor]:
    video, text, norms, text_norms = tensors[:3], tensors[3:6], tensors[6:8], tensors[8:10]
    B, N, H, D = video[0].shape
    packed = [x.new_empty(B, N + n * text[0].shape[1], H, D) for x in video]
    _launch(
        skiparse_pack, video[0], text[0], config, axes, n, w,
        *_pairs(video, text), *zip(norms, text_norms, strict=True), *tensors[10:],
        *map(_source, packed), eps,
    )  # fmt: skip
    return packed


def backward(
    grads: Sequence[Tensor], video: Sequence[Tensor], text: Sequence[Tensor],
    norms: Sequence[Tensor], text_norms: Sequence[Tensor], cos: Tensor, sin: Tensor,
    axes: Sequence[int], eps: float, n: int, w: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the video and the text, three each, and of the four weights."""
    q, text_q = video[0], text[0]
    rows = (_unit(x) for x in (*video, *text, *grads))
    tables = (x.contiguous() for x in (*norms, *text_norms, cos, sin))
    config = CONFIGS[architecture(q)]
    *results, dnorm = planned(_backward, (*rows, *tables), config, tuple(axes), eps, n, w)
    if q.shape[2] == 0:
        dnorm.zero_()
    _, *blocks = _blocks(q, text_q, config)
    weights = (
        share[:, :, i].sum((0, 1)).to(norm.dtype)
        for share, given in zip(dnorm.split(blocks, 1), (norms, text_norms), strict=True)
        for i, norm in enumerate(given)
    )
    return (*results, *weights)


def _backward(
    tensors: Sequence[Any], config: Config, axes: Sequence[int], eps: float, n: int, w: int
) -> Sequence[Tensor]:
    """Those of the video and the text, and shares ``[B, blocks, 2, D]`` of those of the weights."""
    video, text, grads, tables = tensors[:2], tensors[2:4], tensors[4:7], tensors[7:]
    q, text_q = video[0], text[0]
    video_grads, text_grads = ([x.new_empty(*x.shape) for _ in grads] for x in (q, text_q))
    _, *blocks = _blocks(q, text_q, config)
    dnorm = q.new_empty(q.shape[0], sum(blocks), 2, q.shape[-1], dtype=torch.float32)
    _launch(
        skiparse_pack_backward, q, text_q, config, axes, n, w,
        *map(_source, grads), *_pairs(video, text), *zip(tables[:2], tables[2:4], strict=True),
        *tables[4:], *_pairs(video_grads, text_grads), dnorm, eps,
    )  # fmt: skip
    return *video_grads, *text_grads, dnorm
