"""The forward-mode derivative of attention, the same for every backend: plain PyTorch, in blocks.

Libraries have no kernel for it. A block is some query rows of one sub-sequence: six matrix
products in fp32 (fp64 for fp64), where the attention itself has two, and no more than a few blocks
of the score matrix in memory.

Source: the product rule; for its use in training, Lu and Song 2025, "Simplifying, Stabilizing and
Scaling Continuous-Time Consistency Models".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skiparse.backends import Inputs, Outputs

SCORES = 2**25  # of a block, over all heads and batch entries


def tangents(inputs: Inputs, given: Sequence[Tensor]) -> Outputs:
    """Tangents of the outputs from those of ``q, k, v, text_q, text_k, text_v``.

    With ``p = exp(scores - lse)`` and ``ds = scale * (dq k^T + q dk^T)``: ``dlse = rowsum(p * ds)``
    and ``do = (p * ds) v - dlse * o + p dv``. Where every key is masked they are zero.
    """
    q, n = inputs.q, inputs.pattern.sparsity
    (B, N, H, D), Q = q.shape, inputs.text_q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    found = Outputs(
        out=q.new_empty(B, N, H, D),
        text_out=q.new_empty(B, n, Q, H, D),
        lse=q.new_empty(B, H, N, dtype=wide),
        text_lse=q.new_empty(B, H, n, Q, dtype=wide),
    )
    pairs = [(inputs.q, inputs.text_q), (inputs.k, inputs.text_k), (inputs.v, inputs.text_v)]
    pairs += zip(given[:3], given[3:], strict=True)
    for s in range(n):
        L = inputs.pattern.length(s, N)
        tokens = inputs.pattern.token(s, torch.arange(L, device=q.device))
        rows = [torch.cat([x[:, tokens], y], 1).transpose(1, 2).to(wide) for x, y in pairs]
        attend = _attended(inputs, tokens)
        if attend is not None:  # what is hidden may be large enough to overflow
            hidden = ~attend[:, None, :, None]
            rows[1:3], rows[4:6] = (
                [x.masked_fill(hidden, 0) for x in part] for part in (rows[1:3], rows[4:6])
            )
        out, lse = _attend(rows, attend, inputs.scale)
        out = out.transpose(1, 2).to(q.dtype)
        found.out[:, tokens], found.text_out[:, s] = out[:, :L], out[:, L:]
        found.lse[:, :, tokens], found.text_lse[:, :, s] = lse[..., :L], lse[..., L:]
    return found


def _attended(inputs: Inputs, tokens: Tensor) -> Tensor | None:
    """Which keys ``[B, L + T]`` of a sub-sequence are not masked; None without masks."""
    if inputs.mask is None and inputs.text_mask is None:
        return None
    everything = inputs.q.new_ones(inputs.q.shape[0], inputs.q.shape[1], dtype=torch.bool)
    mask = everything if inputs.mask is None else inputs.mask
    text = inputs.text_mask
    if text is None:
        text = inputs.q.new_ones(inputs.text_k.shape[:2], dtype=torch.bool)
    return torch.cat([mask[:, tokens], text], 1)


def _attend(rows: Sequence[Tensor], attend: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Tangents ``[B, H, rows, D]`` and ``[B, H, rows]`` of attention and its log-sum-exp."""
    q, k, v, dq, dk, dv = rows  # [B, H, rows, D]
    B, H, number, _ = q.shape
    block = max(SCORES // max(B * H * number, 1), 1)
    parts = []
    for first in range(0, number, block):
        here = slice(first, first + block)
        scores = q[:, :, here] @ k.mT * scale  # [B, H, block, rows]
        if attend is not None:
            scores = scores.masked_fill(~attend[:, None, None], -torch.inf)
            scores = scores.masked_fill(~attend.any(1)[:, None, None, None], 0)
        p = scores.softmax(-1)
        weighted = p * (dq[:, :, here] @ k.mT + q[:, :, here] @ dk.mT) * scale
        dlse = weighted.sum(-1, keepdim=True)
        parts.append((weighted @ v - dlse * (p @ v) + p @ dv, dlse.squeeze(-1)))
    out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True)) if parts else (dq, q[..., 0])
    return out, lse
