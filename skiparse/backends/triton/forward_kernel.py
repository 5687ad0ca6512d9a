"""The forward kernels: online softmax over a sub-sequence's video keys, then over the text.

One finds every row by a pointer and takes anything. The other has whole tiles of keys and values
copied by the tensor memory accelerator of Hopper and later, which needs regular strides and lengths
(:mod:`skiparse.backends.triton.tiles`); it computes the same.

Source: Dao et al. 2022, "FlashAttention", algorithm 1; Milakov and Gimelshein 2018, "Online
normalizer calculation for softmax".
"""

# Triton has no type stubs, and kernels no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from skiparse.backends import Inputs, Outputs
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
    load_tile,
    lse_pair,
    mask_pair,
    own,
    pair_pointers,
    rows_of,
    rows_of_program,
    shared,
    store_tile,
    tensors_of,
)
from skiparse.backends.triton.plans import planned
from skiparse.backends.triton.tiles import Describe, text_tile, video_tile
from skiparse.pattern import Pattern

# Chosen to compile without spills; tests/test_aot.py has the registers and shared memory.
CONFIGS: Configs = {
    "sm_80": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 32, 8, 2)},
    "sm_90": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3), 256: Config(64, 64, 8, 2)},
    "gfx942": {64: Config(128, 64, 4, 1), 128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    "fp32": {64: Config(32, 32, 8, 2), 128: Config(32, 32, 8, 1), 256: Config(32, 16, 8, 1)},
    "interpreter": {256: Config(32, 16, 1, 1)},
}
# The devices with a tensor memory accelerator; for 16-bit types. Not yet run on a GPU.
TMA_CONFIGS: Configs = {
    "sm_90": {64: Config(128, 128, 8, 2), 128: Config(128, 128, 8, 2)},
    "sm_100": {64: Config(128, 64, 8, 3), 128: Config(128, 64, 8, 3)},
}


@device_function
def online_softmax(scores, attend, log2_scale, top, POSITIVE: tl.constexpr):
    """Weights of one more block of keys, the new ``top``, and by what the old sums decay.

    ``attend`` is None where every key is attended to. A scale that is :func:`positive` leaves the
    largest score the largest, so it can wait for the exponents: one instruction with their shift.
    """
    if not POSITIVE:
        scores = scores * log2_scale  # [M, N]
        log2_scale = 1.0
    if attend is not None:
        scores = tl.where(attend[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)  # [M]
    shift = new_top
    if attend is not None:
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # no key yet: inf - inf is NaN
    p = tl.exp2(scores * log2_scale - shift[:, None])  # [M, N]
    decay = tl.exp2(top - shift)  # [M]
    return p, new_top, decay


@device_function
def no_sums(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """What is kept of the keys, before the first."""
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # [M], the largest score so far
    total = tl.zeros([BLOCK_M], tl.float32)  # [M], sum of 2**(score - top)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [M, D]
    return top, total, acc


@device_function
def store_results(
    out, lse, is_video, b, s, row, h, exists, sums, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write a block of the output and of the log-sum-exp, after the last key."""
    top, total, acc = sums
    total = tl.where(total == 0.0, 1.0, total)  # [M]; without a key acc is 0 and top -inf
    store_tile(out, is_video, b, s, row, h, exists, acc / total[:, None], HEAD_DIM, BLOCK_D)
    row_lse = (top + tl.log2(total)) / LOG2E  # [M]
    tl.store(pair_pointers(lse, is_video, b, s, row, h), row_lse, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def skiparse_forward(
    q,
    k,
    v,
    mask,
    out,
    lse,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    POSITIVE: tl.constexpr,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of query rows of one sub-sequence, against all of its keys.

    Without ``TEXT_QUERIES`` no text token queries.
    """
    b, h, s, _, _, sizes, rows = rows_of_program(
        T if TEXT_QUERIES else 0, N, T, H, longest, n, w, WHOLE_RUNS, BLOCK_M
    )
    is_video, row, exists = rows
    q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    log2_scale = scale * LOG2E

    top, total, acc = no_sums(BLOCK_M, BLOCK_D)

    video_key_blocks = tl.cdiv(sizes[0], BLOCK_N)
    for key_block in range(video_key_blocks + tl.cdiv(T, BLOCK_N)):
        key_is_video, key, key_exists = rows_of(
            key_block, video_key_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
        )
        attend = attended(mask, key_is_video, b, s, key, h, key_exists)  # [N]
        k_tile = load_tile(k, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [M, N]
        p, top, decay = online_softmax(scores, attend, log2_scale, top, POSITIVE)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_tile(v, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")

    sums = (top, total, acc)
    store_results(out, lse, is_video, b, s, row, h, exists, sums, HEAD_DIM, BLOCK_D)


@device_function
def key_tile(
    tiles, key_block, place, TEXT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A block of keys or values ``[BLOCK_N, HEAD_DIM]``, of the video or of the text."""
    b, h, s, w = place
    batch, head = b.to(tl.int32), h.to(tl.int32)
    if TEXT:
        tile = text_tile(tiles, batch, key_block, 0, head, BLOCK_N, HEAD_DIM)
    else:
        tile = video_tile(tiles, batch, key_block, s, w, head, BLOCK_N, HEAD_DIM)
    return tile


@device_function
def attend_tile(
    key_block,
    tiles,
    place,
    q_tile,
    attend,
    log2_scale,
    sums,
    TEXT: tl.constexpr,
    POSITIVE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums after one more block of keys."""
    top, total, acc = sums
    k, v = tiles
    k_tile = key_tile(k, key_block, place, TEXT, HEAD_DIM, BLOCK_N)  # [N, D]
    scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [M, N]
    p, top, decay = online_softmax(scores, attend, log2_scale, top, POSITIVE)
    total = total * decay + tl.sum(p, 1)
    v_tile = key_tile(v, key_block, place, TEXT, HEAD_DIM, BLOCK_N)  # [N, D]
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision="ieee")
    return top, total, acc


@device_function
def attend_tiles(
    rows,
    before,
    tiles,
    place,
    sizes,
    mask,
    q_tile,
    log2_scale,
    sums,
    TEXT: tl.constexpr,
    POSITIVE: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums after so many rows of the video, or of the text, whose blocks come ``before``.

    Without key masks, whole blocks have a loop of their own, which asks for no key.
    """
    b, h, s, _ = place
    top, total, acc = sums
    whole = 0
    if mask is None:
        whole = rows // BLOCK_N
        for key_block in range(whole):
            top, total, acc = attend_tile(
                key_block, tiles, place, q_tile, None, log2_scale, (top, total, acc),
                TEXT, POSITIVE, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
    video_blocks = tl.cdiv(sizes[0], BLOCK_N)
    for key_block in range(whole, tl.cdiv(rows, BLOCK_N)):
        is_video, key, exists = rows_of(
            before + key_block, video_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
        )
        attend = attended(mask, is_video, b, s, key, h, exists)  # [N]
        top, total, acc = attend_tile(
            key_block, tiles, place, q_tile, attend, log2_scale, (top, total, acc),
            TEXT, POSITIVE, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
    return top, total, acc


@triton.jit(do_not_specialize=SIZES)
def skiparse_forward_tma(
    q,
    k,
    v,
    text_k,
    text_v,
    mask,
    out,
    lse,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    POSITIVE: tl.constexpr,
    TEXT_QUERIES: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same, keys and values as tiles: first those of the video, then those of the text."""
    b, h, s, _, _, sizes, rows = rows_of_program(
        T if TEXT_QUERIES else 0, N, T, H, longest, n, w, WHOLE_RUNS, BLOCK_M
    )
    is_video, row, exists = rows
    q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    log2_scale = scale * LOG2E

    top, total, acc = no_sums(BLOCK_M, BLOCK_D)
    place = (b, h, s, w)
    top, total, acc = attend_tiles(
        sizes[0], 0, (k, v), place, sizes, mask, q_tile, log2_scale, (top, total, acc),
        False, POSITIVE, WHOLE_RUNS, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    top, total, acc = attend_tiles(
        T, tl.cdiv(sizes[0], BLOCK_N), (text_k, text_v), place, sizes, mask, q_tile, log2_scale,
        (top, total, acc), True, POSITIVE, WHOLE_RUNS, HEAD_DIM, BLOCK_N,
    )  # fmt: skip

    sums = (top, total, acc)
    store_results(out, lse, is_video, b, s, row, h, exists, sums, HEAD_DIM, BLOCK_D)


def positive(scale: float) -> bool:
    """Whether kernels may let the scale wait for the exponents: above 0, in fp32 too."""
    return scale >= torch.finfo(torch.float32).tiny


def can_be_tiled(inputs: Inputs, block: int) -> bool:
    """Whether every ``block`` rows of the keys and values of a head are a box."""
    return tiles.can_be_tiled(inputs, block, (inputs.k, inputs.v, inputs.text_k, inputs.text_v))


def tile_views(
    inputs: Inputs, block: int, describe: Describe = TensorDescriptor
) -> tuple[Any, ...]:
    """k, v, text_k and text_v, read ``block`` rows of a head at a time, if they can be tiled so."""
    video, text = (inputs.k, inputs.v), (inputs.text_k, inputs.text_v)
    return tuple(tiles.tile_views(inputs, block, video, text, describe))


def _tma(inputs: Inputs) -> Config | None:
    """How the kernel with tiles would run this, if it can."""
    config = choose_if_any(TMA_CONFIGS, inputs.q)
    return config if config is not None and _takes(inputs, config) else None


def _takes(inputs: Inputs, config: Config) -> bool:
    return inputs.q.element_size() <= 2 and can_be_tiled(inputs, config.BLOCK_N)


def allocate(inputs: Inputs) -> Outputs:
    """What a forward kernel writes."""
    q, n = inputs.q, inputs.pattern.sparsity
    (B, N, H, D), Q = q.shape, inputs.text_q.shape[1]
    return Outputs(
        out=q.new_empty(B, N, H, D),
        text_out=q.new_empty(B, n, Q, H, D),
        lse=q.new_empty(B, H, N, dtype=torch.float32),
        text_lse=q.new_empty(B, H, n, Q, dtype=torch.float32),
    )


def forward(inputs: Inputs) -> Outputs:
    """Allocate, and launch over the blocks of query rows."""
    q = inputs.q
    configs = choose_if_any(TMA_CONFIGS, q), choose(CONFIGS, q)
    return Outputs(*planned(_launches, tensors_of(inputs), inputs.pattern, inputs.scale, *configs))


def _launches(
    tensors: Sequence[Any], pattern: Pattern, scale: float, tma: Config | None, config: Config
) -> Outputs:
    inputs = inputs_of(tensors, pattern, scale)
    q, outputs = inputs.q, allocate(inputs)
    query = (shared(q), shared(inputs.text_q))
    static = {
        "POSITIVE": positive(scale),
        "TEXT_QUERIES": inputs.text_q.shape[1] == inputs.text_k.shape[1],
    }
    results = (
        mask_pair(inputs),
        (shared(outputs.out), own(outputs.text_out)),
        lse_pair(outputs.lse, outputs.text_lse),
        scale,
    )
    if tma is not None and _takes(inputs, tma):
        launch(
            skiparse_forward_tma, inputs, tma.BLOCK_M,
            query, *tile_views(inputs, tma.BLOCK_N), *results, **static, **tma._asdict(),
        )  # fmt: skip
        return outputs
    keys = (shared(inputs.k), shared(inputs.text_k))
    values = (shared(inputs.v), shared(inputs.text_v))
    launch(
        skiparse_forward, inputs, config.BLOCK_M, query, keys, values, *results,
        **static, **config._asdict(),
    )  # fmt: skip
    return outputs
