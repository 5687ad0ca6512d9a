"""The backward kernels: one owns a block of keys (dk, dv), one a block of queries (dq).

With ``p = exp(scores - lse)`` and ``delta = rowsum(do * out) - dlse``: ``dv = p^T do``,
``ds = p * (do v^T - delta)``, ``dq = scale ds k``, ``dk = scale ds^T q``. Each result is summed by
one program in a fixed order, so there are no atomics and every run gives the same bits. The text
takes part in every sub-sequence; its gradients are kept apart in fp32 and summed at the end.

Both exist twice: one finds every row by a pointer and takes anything; the other has whole tiles
copied by the tensor memory accelerator of Hopper, queries and their gradients for dk and dv, keys
and values for dq, where strides and lengths are regular (:mod:`skiparse.backends.triton.tiles`).
They compute the same.

Source: Dao et al. 2022, "FlashAttention", appendix B; Dao 2023, "FlashAttention-2", algorithm 2.
"""

# Triton has no type stubs, and kernels no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs
from skiparse.backends.triton import tiles
from skiparse.backends.triton.device import (
    LOG2E,
    SIZES,
    Config,
    Configs,
    attended,
    choose,
    choose_if_any,
    device_function,
    inputs_of,
    launch,
    length_in,
    load_tile,
    lse_pair,
    mask_pair,
    own,
    pair_pointers,
    program,
    rows_of,
    rows_of_program,
    shared,
    store_tile,
    tensors_of,
)
from skiparse.backends.triton.plans import planned
from skiparse.backends.triton.tiles import (
    store_text_tile,
    store_video_tile,
    text_tile,
    video_tile,
)
from skiparse.pattern import Pattern

# Chosen to compile without spills; tests/test_aot.py has the registers and shared memory.
DELTA_ROWS = 32
DKDV_CONFIGS: Configs = {
    "sm_80": {64: Config(32, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    "sm_90": {64: Config(64, 128, 8, 2), 128: Config(32, 128, 8, 3), 256: Config(32, 64, 8, 2)},
    "gfx942": {64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(16, 32, 4, 1)},
    "fp32": {64: Config(32, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 4, 1)},
    "interpreter": {256: Config(16, 32, 1, 1)},
}
DQ_CONFIGS: Configs = {
    "sm_80": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
    "sm_90": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 8, 2)},
    "gfx942": {64: Config(64, 64, 4, 1), 128: Config(64, 32, 4, 1), 256: Config(32, 16, 4, 1)},
    "fp32": {64: Config(32, 32, 8, 1), 128: Config(32, 16, 8, 2), 256: Config(16, 16, 8, 2)},
    "interpreter": {256: Config(32, 16, 1, 1)},
}
# The devices with a tensor memory accelerator; for 16-bit types. Not yet run on a GPU.
DKDV_TMA_CONFIGS: Configs = {
    "sm_90": {64: Config(64, 128, 8, 2), 128: Config(64, 128, 8, 2)},
}
DQ_TMA_CONFIGS: Configs = {
    "sm_90": {64: Config(128, 64, 8, 2), 128: Config(128, 64, 8, 2)},
}


@device_function
def stats_at(stats, b, h, s, H, n, longest, Q, ROWS: tl.constexpr):
    """What is kept of each query row of a sub-sequence of a head: log-sum-exp and ``delta``.

    They lie in the order of its blocks, video and text each padded to ``ROWS``: those of a block
    are one piece, which needs no mask. Returned with the place of the first text row.
    """
    log2_lse, delta = stats
    text = tl.cdiv(longest, ROWS) * ROWS
    first = ((b * H + h) * n + s) * (text + tl.cdiv(Q, ROWS) * ROWS)
    return (log2_lse + first, delta + first), text


@triton.jit(do_not_specialize=SIZES)
def skiparse_delta(
    out,
    grad,
    grad_lse,
    lse,
    stats,
    N,
    T,
    H,
    longest,
    n,
    w,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``delta = rowsum(grad * out) - grad_lse`` and log-sum-exp, of base 2, of ``ROWS`` query rows.

    The latter is inf where there is no row or no key for it, so that every ``p`` of it is 0.
    """
    parts = ROWS // BLOCK_M
    video_chunks = tl.cdiv(longest, ROWS)
    Q = T if TEXT_QUERIES else 0
    b, h, s, chunk = program(video_chunks + tl.cdiv(Q, ROWS), n, H)
    L = length_in(s, N, n, w)
    sizes = (L, T, n, w)
    stats, _ = stats_at(stats, b, h, s, H, n, longest, Q, ROWS)
    log2_lse, delta = stats
    for block in range(chunk * parts, (chunk + 1) * parts):
        is_video, row, exists = rows_of(block, video_chunks * parts, s, sizes, WHOLE_RUNS, BLOCK_M)
        out_tile = load_tile(out, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
        grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
        pointers = pair_pointers(lse, is_video, b, s, row, h)  # [M]
        row_lse = tl.load(pointers, mask=exists, other=-float("inf")) * LOG2E  # [M]
        row_lse = tl.where(row_lse == -float("inf"), float("inf"), row_lse)
        place = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        tl.store(log2_lse + place, row_lse)
        row_delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)  # [M]
        if grad_lse is not None:
            pointers = pair_pointers(grad_lse, is_video, b, s, row, h)  # [M]
            row_delta -= tl.load(pointers, mask=exists, other=0.0)
        tl.store(delta + place, row_delta)


@device_function
def add_queries(q_tile, grad_tile, stats, row, k_tile, v_tile, dk_acc, dv_acc, log2_scale):
    """dk and dv with what a block of queries adds to them; its scores are keys by queries."""
    log2_lse, delta = stats
    scores = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # [N, M]
    p = tl.exp2(scores * log2_scale - tl.load(log2_lse + row)[None, :])  # [N, M]
    dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")  # [N, M]
    ds = p * (dp - tl.load(delta + row)[None, :])  # [N, M]
    dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    dv_acc = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_acc, input_precision="ieee")
    return dk_acc, dv_acc


@device_function
def add_keys(q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, attend, acc, log2_scale):
    """dq with what a block of keys adds to it, all of its keys if ``attend`` is None."""
    scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [M, N]
    p = tl.exp2(scores * log2_scale - row_lse[:, None])  # [M, N]
    dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")  # [M, N]
    ds = p * (dp - row_delta[:, None])  # [M, N]
    if attend is not None:
        ds = tl.where(attend[None, :], ds, 0.0)
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")


@device_function
def stats_rows(is_video, block, video_blocks, text, BLOCK_M: tl.constexpr):
    """Where in :func:`stats_at` the rows of a block are, whose text begins at ``text``."""
    first = tl.where(is_video, block * BLOCK_M, text + (block - video_blocks) * BLOCK_M)
    return (first + tl.arange(0, BLOCK_M)).to(tl.int64)


@device_function
def own_keys(k, v, mask, b, h, s, keys, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The keys and values ``[N, D]`` that a program gives gradients, and which are attended to."""
    is_video, key, exists = keys
    k_tile = load_tile(k, is_video, b, s, key, h, exists, HEAD_DIM, BLOCK_D)  # [N, D]
    v_tile = load_tile(v, is_video, b, s, key, h, exists, HEAD_DIM, BLOCK_D)  # [N, D]
    return k_tile, v_tile, attended(mask, is_video, b, s, key, h, exists)


@device_function
def of_attended_keys(dk_acc, dv_acc, mask, attend, scale):
    """dk and dv, after the last query: 0 for keys that are masked."""
    if mask is not None:
        dk_acc = tl.where(attend[:, None], dk_acc, 0.0)
        dv_acc = tl.where(attend[:, None], dv_acc, 0.0)
    return dk_acc * scale, dv_acc


@triton.jit(do_not_specialize=SIZES)
def skiparse_dkdv(
    q,
    k,
    v,
    mask,
    grad,
    stats,
    dk,
    dv,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dk and dv of one block of keys of one sub-sequence, from all of its query rows.

    Masked keys need no care before the end: a key's scores reach no gradient but its own, and that
    is dropped.
    """
    Q = T if TEXT_QUERIES else 0
    b, h, s, _, _, sizes, keys = rows_of_program(T, N, T, H, longest, n, w, WHOLE_RUNS, BLOCK_N)
    k_tile, v_tile, attend = own_keys(k, v, mask, b, h, s, keys, HEAD_DIM, BLOCK_D)  # [N, D], [N]
    log2_scale = scale * LOG2E

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    stats, text = stats_at(stats, b, h, s, H, n, longest, Q, ROWS)
    video_blocks = tl.cdiv(sizes[0], BLOCK_M)
    for block in range(video_blocks + tl.cdiv(Q, BLOCK_M)):
        is_video, row, exists = rows_of(block, video_blocks, s, sizes, WHOLE_RUNS, BLOCK_M)
        q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
        grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
        row = stats_rows(is_video, block, video_blocks, text, BLOCK_M)  # [M]
        dk_acc, dv_acc = add_queries(
            q_tile, grad_tile, stats, row, k_tile, v_tile, dk_acc, dv_acc, log2_scale
        )

    dk_acc, dv_acc = of_attended_keys(dk_acc, dv_acc, mask, attend, scale)
    key_is_video, key, key_exists = keys
    store_tile(dk, key_is_video, b, s, key, h, key_exists, dk_acc, HEAD_DIM, BLOCK_D)
    store_tile(dv, key_is_video, b, s, key, h, key_exists, dv_acc, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def skiparse_dkdv_tma(
    q,
    grad,
    text_q,
    text_grad,
    dk,
    dv,
    text_dk,
    text_dv,
    k,
    v,
    mask,
    stats,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_GRADS: tl.constexpr,
):
    """The same, queries and their gradients as tiles, and what they give keys and values too.

    ``SHARED_GRADS``: all sub-sequences have the same gradients of their text rows, as of a mean.
    """
    Q = T if TEXT_QUERIES else 0
    b, h, s, key_block, video_key_blocks, sizes, keys = rows_of_program(
        T, N, T, H, longest, n, w, WHOLE_RUNS, BLOCK_N
    )
    k_tile, v_tile, attend = own_keys(k, v, mask, b, h, s, keys, HEAD_DIM, BLOCK_D)  # [N, D], [N]
    log2_scale = scale * LOG2E
    batch, head = b.to(tl.int32), h.to(tl.int32)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    stats, text = stats_at(stats, b, h, s, H, n, longest, Q, ROWS)
    text_s = 0 if SHARED_GRADS else s
    for block in range(tl.cdiv(sizes[0], BLOCK_M)):
        q_tile = video_tile(q, batch, block, s, w, head, BLOCK_M, HEAD_DIM)  # [M, D]
        grad_tile = video_tile(grad, batch, block, s, w, head, BLOCK_M, HEAD_DIM)  # [M, D]
        row = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dk_acc, dv_acc = add_queries(
            q_tile, grad_tile, stats, row, k_tile, v_tile, dk_acc, dv_acc, log2_scale
        )
    for block in range(tl.cdiv(Q, BLOCK_M)):
        q_tile = text_tile(text_q, batch, block, 0, head, BLOCK_M, HEAD_DIM)  # [M, D]
        grad_tile = text_tile(text_grad, batch, block, text_s, head, BLOCK_M, HEAD_DIM)
        row = (text + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        dk_acc, dv_acc = add_queries(
            q_tile, grad_tile, stats, row, k_tile, v_tile, dk_acc, dv_acc, log2_scale
        )

    dk_acc, dv_acc = of_attended_keys(dk_acc, dv_acc, mask, attend, scale)
    if key_block < video_key_blocks:
        store_video_tile(dk, batch, key_block, s, w, head, dk_acc, BLOCK_N, HEAD_DIM)
        store_video_tile(dv, batch, key_block, s, w, head, dv_acc, BLOCK_N, HEAD_DIM)
    else:
        store_text_tile(
            text_dk, batch, key_block - video_key_blocks, s, head, dk_acc, BLOCK_N, HEAD_DIM
        )
        store_text_tile(
            text_dv, batch, key_block - video_key_blocks, s, head, dv_acc, BLOCK_N, HEAD_DIM
        )


@triton.jit(do_not_specialize=SIZES)
def skiparse_dq(
    q,
    k,
    v,
    mask,
    grad,
    stats,
    dq,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dq of one block of query rows of one sub-sequence, from all of its keys."""
    Q = T if TEXT_QUERIES else 0
    b, h, s, block, video_blocks, sizes, rows = rows_of_program(
        Q, N, T, H, longest, n, w, WHOLE_RUNS, BLOCK_M
    )
    is_video, row, exists = rows
    q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    stats, text = stats_at(stats, b, h, s, H, n, longest, Q, ROWS)
    stats_row = stats_rows(is_video, block, video_blocks, text, BLOCK_M)  # [M]
    row_lse, row_delta = tl.load(stats[0] + stats_row), tl.load(stats[1] + stats_row)  # [M]
    log2_scale = scale * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [M, D]
    video_key_blocks = tl.cdiv(sizes[0], BLOCK_N)
    for key_block in range(video_key_blocks + tl.cdiv(T, BLOCK_N)):
        key_is_video, key, key_exists = rows_of(
            key_block, video_key_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
        )
        attend = attended(mask, key_is_video, b, s, key, h, key_exists)  # [N]
        k_tile = load_tile(k, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
        v_tile = load_tile(v, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
        acc = add_keys(
            q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, attend, acc, log2_scale
        )

    store_tile(dq, is_video, b, s, row, h, exists, acc * scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def skiparse_dq_tma(
    q,
    k,
    v,
    text_k,
    text_v,
    mask,
    grad,
    stats,
    dq,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The same, keys and values as tiles.

    Blocks of video keys that all exist go without a mask, if there is none.
    """
    Q = T if TEXT_QUERIES else 0
    b, h, s, block, video_blocks, sizes, rows = rows_of_program(
        Q, N, T, H, longest, n, w, WHOLE_RUNS, BLOCK_M
    )
    is_video, row, exists = rows
    q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    stats, text = stats_at(stats, b, h, s, H, n, longest, Q, ROWS)
    stats_row = stats_rows(is_video, block, video_blocks, text, BLOCK_M)  # [M]
    row_lse, row_delta = tl.load(stats[0] + stats_row), tl.load(stats[1] + stats_row)  # [M]
    log2_scale = scale * LOG2E
    batch, head = b.to(tl.int32), h.to(tl.int32)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [M, D]
    video_key_blocks = tl.cdiv(sizes[0], BLOCK_N)
    whole = sizes[0] // BLOCK_N if mask is None else 0
    for key_block in range(whole):
        k_tile = video_tile(k, batch, key_block, s, w, head, BLOCK_N, HEAD_DIM)  # [N, D]
        v_tile = video_tile(v, batch, key_block, s, w, head, BLOCK_N, HEAD_DIM)  # [N, D]
        acc = add_keys(q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, None, acc, log2_scale)
    for key_block in range(whole, video_key_blocks):
        key_is_video, key, key_exists = rows_of(
            key_block, video_key_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
        )
        attend = attended(mask, key_is_video, b, s, key, h, key_exists)  # [N]
        k_tile = video_tile(k, batch, key_block, s, w, head, BLOCK_N, HEAD_DIM)  # [N, D]
        v_tile = video_tile(v, batch, key_block, s, w, head, BLOCK_N, HEAD_DIM)  # [N, D]
        acc = add_keys(
            q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, attend, acc, log2_scale
        )
    for key_block in range(tl.cdiv(T, BLOCK_N)):
        key_is_video, key, key_exists = rows_of(
            video_key_blocks + key_block, video_key_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
        )
        attend = attended(mask, key_is_video, b, s, key, h, key_exists)  # [N]
        k_tile = text_tile(text_k, batch, key_block, 0, head, BLOCK_N, HEAD_DIM)  # [N, D]
        v_tile = text_tile(text_v, batch, key_block, 0, head, BLOCK_N, HEAD_DIM)  # [N, D]
        acc = add_keys(
            q_tile, grad_tile, row_lse, row_delta, k_tile, v_tile, attend, acc, log2_scale
        )

    store_tile(dq, is_video, b, s, row, h, exists, acc * scale, HEAD_DIM, BLOCK_D)


def _tiles(configs: Configs, q: Tensor) -> Config | None:
    """How a kernel with tiles would run on the device of ``q``, if it can."""
    return choose_if_any(configs, q) if q.element_size() == 2 else None


def _dkdv_tiles(
    inputs: Inputs,
    config: Config | None,
    grads: tuple[Any, Any],
    video: list[Any],
    text: list[Any],
) -> list[Any] | None:
    """The tensors of :func:`skiparse_dkdv_tma` as it takes them, if it can.

    ``grads`` are of the output, ``video`` and ``text`` what dk and dv are written to.
    """
    if config is None:
        return None
    read = (inputs.q, grads[0]), (inputs.text_q, grads[1])
    if not (
        tiles.can_be_tiled(inputs, config.BLOCK_M, (*read[0], *read[1]))
        and tiles.can_be_tiled(inputs, config.BLOCK_N, (*video, *text))
    ):
        return None
    views = tiles.tile_views(inputs, config.BLOCK_M, *read)
    return views + tiles.tile_views(inputs, config.BLOCK_N, video, text)


def _dq_tiles(inputs: Inputs, config: Config | None) -> list[Any] | None:
    """The same of :func:`skiparse_dq_tma`."""
    video, text = (inputs.k, inputs.v), (inputs.text_k, inputs.text_v)
    if config is None or not tiles.can_be_tiled(inputs, config.BLOCK_N, (*video, *text)):
        return None
    return tiles.tile_views(inputs, config.BLOCK_N, video, text)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """Launch delta, then dk and dv, then dq; sum the text gradients over sub-sequences.

    The two with tiles are chosen each by itself: a gradient with odd strides leaves dq its tiles.
    """
    q = inputs.q
    grads = (grad_out, grad_text_out, grad_lse, grad_text_lse)
    tensors = (*tensors_of(inputs), *outputs, *grads)
    configs = (
        _tiles(DKDV_TMA_CONFIGS, q), choose(DKDV_CONFIGS, q),
        _tiles(DQ_TMA_CONFIGS, q), choose(DQ_CONFIGS, q),
    )  # fmt: skip
    results = planned(_launches, tensors, inputs.pattern, inputs.scale, *configs)
    return Gradients(*results[:3], *(x.sum(1).to(q.dtype) for x in results[3:]))


def _launches(
    tensors: Sequence[Any],
    pattern: Pattern,
    scale: float,
    dkdv_tma: Config | None,
    dkdv: Config,
    dq_tma: Config | None,
    dq: Config,
) -> Sequence[Tensor]:
    """dq, dk and dv of the video, and of the text by sub-sequence, fp32."""
    inputs = inputs_of(tensors[:8], pattern, scale)
    outputs = Outputs(*tensors[8:12])
    grad_out, grad_text_out, grad_lse, grad_text_lse = tensors[12:]
    q, n = inputs.q, pattern.sparsity
    (B, N, H, D), Q, T = q.shape, inputs.text_q.shape[1], inputs.text_k.shape[1]
    video = [q.new_empty(B, N, H, D) for _ in range(3)]
    text = [q.new_empty(B, n, rows, H, D, dtype=torch.float32) for rows in (Q, T, T)]
    query = (shared(q), shared(inputs.text_q))
    keys = ((shared(inputs.k), shared(inputs.text_k)), (shared(inputs.v), shared(inputs.text_v)))
    mask = mask_pair(inputs)
    grad = (shared(grad_out), own(grad_text_out))
    into_q, into_k, into_v = ((shared(x), own(y)) for x, y in zip(video, text, strict=True))

    same_grads = grad_text_out.stride(1) == 0  # those of a mean, for every sub-sequence
    if same_grads:
        strides = [grad_text_out.stride(i) for i in range(5)]
        grad_text_out = grad_text_out.as_strided((B, 1, Q, H, D), strides)
    dkdv_views = _dkdv_tiles(inputs, dkdv_tma, (grad_out, grad_text_out), video[1:], text[1:])
    dq_views = _dq_tiles(inputs, dq_tma)
    if dkdv_tma is not None and dkdv_views is not None:
        dkdv = dkdv_tma
    if dq_tma is not None and dq_views is not None:
        dq = dq_tma
    padded = max(DELTA_ROWS, dkdv.BLOCK_M, dq.BLOCK_M)
    longest = pattern.length(0, N)
    rows = (triton.cdiv(longest, padded) + triton.cdiv(Q, padded)) * padded
    stats = tuple(q.new_empty(B, H, n, rows, dtype=torch.float32) for _ in range(2))
    static: dict[str, Any] = {"ROWS": padded, "TEXT_QUERIES": Q == T}

    launch(
        skiparse_delta, inputs, padded,
        (shared(outputs.out), own(outputs.text_out)), grad,
        None if grad_lse is None else lse_pair(grad_lse, grad_text_lse),
        lse_pair(outputs.lse, outputs.text_lse), stats,
        BLOCK_M=DELTA_ROWS, **static,
    )  # fmt: skip
    options = {**dkdv._asdict(), **static}
    if dkdv_views is None:
        launch(
            skiparse_dkdv, inputs, dkdv.BLOCK_N,
            query, *keys, mask, grad, stats, into_k, into_v, scale, keys=True, **options,
        )  # fmt: skip
    else:
        launch(
            skiparse_dkdv_tma, inputs, dkdv.BLOCK_N,
            *dkdv_views, *keys, mask, stats, scale,
            keys=True, **options, SHARED_GRADS=same_grads,
        )  # fmt: skip
    options = {**dq._asdict(), **static}
    if dq_views is None:
        launch(
            skiparse_dq, inputs, dq.BLOCK_M,
            query, *keys, mask, grad, stats, into_q, scale, **options,
        )  # fmt: skip
    else:
        launch(
            skiparse_dq_tma, inputs, dq.BLOCK_M,
            query, *dq_views, mask, grad, stats, into_q, scale, **options,
        )  # fmt: skip
    return *video, *text
