"""The backward kernels: one owns a block of keys (dk, dv), one a block of queries (dq).

With ``p = exp(scores - lse)`` and ``delta = rowsum(do * out)``: ``dv = p^T do``,
``ds = p * (do v^T - delta)``, ``dq = scale ds k``, ``dk = scale ds^T q``. Each result is summed by
one program in a fixed order, so there are no atomics and every run gives the same bits. The text
takes part in every sub-sequence; its gradients are kept apart in fp32 and summed at the end.

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
from skiparse.backends.triton.device import (
    LOG2E,
    SIZES,
    Config,
    Configs,
    attended,
    choose,
    device_function,
    inputs_of,
    launch,
    length_of,
    load_tile,
    lse_pair,
    mask_pair,
    own,
    pair_pointers,
    program,
    rows_of,
    shared,
    store_tile,
    tensors_of,
)
from skiparse.backends.triton.plans import planned
from skiparse.pattern import SkipPattern

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


@device_function
def load_row(pair, is_video, b, s, row, h, exists, other):
    """One fp32 number of each row, ``[BLOCK]``, and ``other`` where there is none."""
    return tl.load(pair_pointers(pair, is_video, b, s, row, h), mask=exists, other=other)


@triton.jit(do_not_specialize=SIZES)
def skiparse_delta(
    out,
    grad,
    delta,
    N,
    T,
    H,
    longest,
    n,
    w,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """``rowsum(grad * out)`` of one block of query rows."""
    video_blocks = tl.cdiv(longest, BLOCK_M)
    b, h, s, block = program(video_blocks + tl.cdiv(T, BLOCK_M), n, H)
    L = length_of(s, N, n, w)
    sizes = (L, T, n, w)
    is_video, row, exists = rows_of(block, video_blocks, s, sizes, WHOLE_RUNS, BLOCK_M)
    out_tile = load_tile(out, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    row_delta = tl.sum(out_tile.to(tl.float32) * grad_tile.to(tl.float32), 1)  # [M]
    tl.store(pair_pointers(delta, is_video, b, s, row, h), row_delta, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def skiparse_dkdv(
    q,
    k,
    v,
    mask,
    grad,
    lse,
    delta,
    dk,
    dv,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of one block of keys of one sub-sequence, from all of its query rows.

    Scores are transposed, keys by queries. Masked keys need no care before the end: a key's
    scores reach no gradient but its own, and that is dropped. So neither do rows without a key,
    whose lse is -inf: all the keys they meet are masked.
    """
    video_key_blocks = tl.cdiv(longest, BLOCK_N)
    b, h, s, key_block = program(video_key_blocks + tl.cdiv(T, BLOCK_N), n, H)
    L = length_of(s, N, n, w)
    sizes = (L, T, n, w)
    key_is_video, key, key_exists = rows_of(
        key_block, video_key_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
    )
    k_tile = load_tile(k, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
    v_tile = load_tile(v, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
    log2_scale = scale * LOG2E

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [N, D]
    video_blocks = tl.cdiv(L, BLOCK_M)
    for block in range(video_blocks + tl.cdiv(T, BLOCK_M)):
        is_video, row, exists = rows_of(block, video_blocks, s, sizes, WHOLE_RUNS, BLOCK_M)
        q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
        row_lse = load_row(lse, is_video, b, s, row, h, exists, float("inf"))  # [M], so p is 0
        scores = tl.dot(k_tile, q_tile.T, input_precision="ieee") * log2_scale  # [N, M]
        p = tl.exp2(scores - row_lse[None, :] * LOG2E)  # [N, M]
        grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
        dv_acc = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_acc, input_precision="ieee")
        row_delta = load_row(delta, is_video, b, s, row, h, exists, 0.0)  # [M]
        dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")  # [N, M]
        ds = p * (dp - row_delta[None, :])  # [N, M]
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

    attend = attended(mask, key_is_video, b, s, key, h, key_exists)[:, None]  # [N, 1]
    dk_acc = tl.where(attend, dk_acc * scale, 0.0)
    dv_acc = tl.where(attend, dv_acc, 0.0)
    store_tile(dk, key_is_video, b, s, key, h, key_exists, dk_acc, HEAD_DIM, BLOCK_D)
    store_tile(dv, key_is_video, b, s, key, h, key_exists, dv_acc, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def skiparse_dq(
    q,
    k,
    v,
    mask,
    grad,
    lse,
    delta,
    dq,
    scale,
    N,
    T,
    H,
    longest,
    n,
    w,
    WHOLE_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of one block of query rows of one sub-sequence, from all of its keys."""
    video_blocks = tl.cdiv(longest, BLOCK_M)
    b, h, s, block = program(video_blocks + tl.cdiv(T, BLOCK_M), n, H)
    L = length_of(s, N, n, w)
    sizes = (L, T, n, w)
    is_video, row, exists = rows_of(block, video_blocks, s, sizes, WHOLE_RUNS, BLOCK_M)
    q_tile = load_tile(q, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    grad_tile = load_tile(grad, is_video, b, s, row, h, exists, HEAD_DIM, BLOCK_D)  # [M, D]
    row_lse = load_row(lse, is_video, b, s, row, h, exists, float("inf"))  # [M]
    row_delta = load_row(delta, is_video, b, s, row, h, exists, 0.0)  # [M]
    log2_scale = scale * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # [M, D]
    video_key_blocks = tl.cdiv(L, BLOCK_N)
    for key_block in range(video_key_blocks + tl.cdiv(T, BLOCK_N)):
        key_is_video, key, key_exists = rows_of(
            key_block, video_key_blocks, s, sizes, WHOLE_RUNS, BLOCK_N
        )
        attend = attended(mask, key_is_video, b, s, key, h, key_exists)  # [N]
        k_tile = load_tile(k, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * log2_scale  # [M, N]
        p = tl.exp2(scores - row_lse[:, None] * LOG2E)  # [M, N]
        v_tile = load_tile(v, key_is_video, b, s, key, h, key_exists, HEAD_DIM, BLOCK_D)  # [N, D]
        dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")  # [M, N]
        ds = tl.where(attend[None, :], p * (dp - row_delta[:, None]), 0.0)  # [M, N]
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    store_tile(dq, is_video, b, s, row, h, exists, acc * scale, HEAD_DIM, BLOCK_D)


def backward(
    inputs: Inputs, outputs: Outputs, grad_out: Tensor, grad_text_out: Tensor
) -> Gradients:
    """Launch delta, then dk and dv, then dq; sum the text gradients over sub-sequences."""
    q = inputs.q
    tensors = (*tensors_of(inputs), *outputs, grad_out, grad_text_out)
    configs = choose(DKDV_CONFIGS, q), choose(DQ_CONFIGS, q)
    results = planned(_launches, tensors, inputs.pattern, inputs.scale, *configs)
    return Gradients(*results[:3], *(x.sum(1).to(q.dtype) for x in results[3:]))


def _launches(
    tensors: Sequence[Any],
    pattern: SkipPattern,
    scale: float,
    dkdv_config: Config,
    dq_config: Config,
) -> Sequence[Tensor]:
    """dq, dk and dv of the video, and of the text by sub-sequence, fp32."""
    inputs = inputs_of(tensors[:8], pattern, scale)
    outputs = Outputs(*tensors[8:12])
    grad_out, grad_text_out = tensors[12:]
    q, n = inputs.q, pattern.sparsity
    (B, N, H, D), T = q.shape, inputs.text_q.shape[1]
    video = [q.new_empty(B, N, H, D) for _ in range(3)]
    text = [q.new_empty(B, n, T, H, D, dtype=torch.float32) for _ in range(3)]
    dq, dk, dv = ((shared(x), own(y)) for x, y in zip(video, text, strict=True))
    grad = (shared(grad_out), own(grad_text_out))
    delta = lse_pair(*(q.new_empty(*x.shape, dtype=x.dtype) for x in outputs[2:]))
    operands = (
        (shared(q), shared(inputs.text_q)),
        (shared(inputs.k), shared(inputs.text_k)),
        (shared(inputs.v), shared(inputs.text_v)),
        mask_pair(inputs),
        grad,
        lse_pair(outputs.lse, outputs.text_lse),
        delta,
    )
    launch(
        skiparse_delta,
        inputs,
        DELTA_ROWS,
        (shared(outputs.out), own(outputs.text_out)),
        grad,
        delta,
        BLOCK_M=DELTA_ROWS,
    )
    launch(
        skiparse_dkdv,
        inputs,
        dkdv_config.BLOCK_N,
        *operands,
        dk,
        dv,
        scale,
        **dkdv_config._asdict(),
    )
    launch(skiparse_dq, inputs, dq_config.BLOCK_M, *operands, dq, scale, **dq_config._asdict())
    return *video, *text
