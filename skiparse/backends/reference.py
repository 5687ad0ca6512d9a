"""Skiparse attention written to be read: one dense softmax per sub-sequence, in fp64.

This is the definition in code. It gathers each sub-sequence, puts the text behind it, and forms
the whole score matrix, so its memory grows with ``(N/n + T)**2``. Whatever the dtype that comes
in, it computes in fp64 and rounds once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """It can wherever there is fp64."""
    if inputs is not None and inputs.q.device.type == "mps":
        return 'it computes in fp64, which "mps" has not'
    return None


def forward(inputs: Inputs) -> Outputs:
    """``softmax(scale * q k^T) v`` over the keys of each sub-sequence and all the text."""
    q, text_q, n = inputs.q, inputs.text_q, inputs.pattern.sparsity
    (B, N, H, D), Q = q.shape, text_q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = Outputs(
        out=q.new_empty(B, N, H, D),
        text_out=q.new_empty(B, n, Q, H, D),
        lse=q.new_empty(B, H, N, dtype=wide),
        text_lse=q.new_empty(B, H, n, Q, dtype=wide),
    )
    for s, tokens in _sub_sequences(inputs):
        L = len(tokens)
        scores = _scores(inputs, _rows(q, text_q, tokens), tokens)
        lse = scores.logsumexp(-1)
        out = _probabilities(scores, lse) @ _rows(inputs.v, inputs.text_v, tokens)
        out = rearrange(out, "b h rows d -> b rows h d").to(q.dtype)
        outputs.out[:, tokens], outputs.text_out[:, s] = out[:, :L], out[:, L:]
        lse = lse.to(wide)
        outputs.lse[:, :, tokens], outputs.text_lse[:, :, s] = lse[..., :L], lse[..., L:]
    return outputs


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """The gradient of softmax attention from its log-sum-exp, sub-sequence by sub-sequence.

    With ``p = exp(scores - lse)``: ``dv = p^T do``, ``ds = p * (do v^T - rowsum(do * o) + dlse)``,
    ``dq = scale ds k``, ``dk = scale ds^T q``.

    Source: Dao et al. 2022, "FlashAttention", appendix B.
    """
    sources = (inputs.q, inputs.k, inputs.v, inputs.text_q, inputs.text_k, inputs.text_v)
    dq, dk, dv, text_dq, text_dk, text_dv = (
        torch.zeros(x.shape, dtype=torch.float64, device=x.device) for x in sources
    )
    for s, tokens in _sub_sequences(inputs):
        L = len(tokens)
        q = _rows(inputs.q, inputs.text_q, tokens)
        k = _rows(inputs.k, inputs.text_k, tokens)
        v = _rows(inputs.v, inputs.text_v, tokens)
        out = _rows(outputs.out, outputs.text_out[:, s], tokens)
        grad = _rows(grad_out, grad_text_out[:, s], tokens)
        lse = torch.cat([outputs.lse[:, :, tokens], outputs.text_lse[:, :, s]], -1).double()

        p = _probabilities(_scores(inputs, q, tokens), lse)
        delta = (grad * out).sum(-1, keepdim=True)
        if grad_lse is not None and grad_text_lse is not None:
            grad_of_lse = torch.cat([grad_lse[:, :, tokens], grad_text_lse[:, :, s]], -1)
            delta = delta - grad_of_lse.unsqueeze(-1)
        ds = p * (grad @ v.mT - delta) * inputs.scale
        for video, text, rows in (
            (dq, text_dq, ds @ k),
            (dk, text_dk, ds.mT @ q),
            (dv, text_dv, p.mT @ grad),
        ):
            rows = rearrange(rows, "b h rows d -> b rows h d")
            video[:, tokens] = rows[:, :L]
            text += rows[:, L:]
    return Gradients(*(x.to(inputs.q.dtype) for x in (dq, dk, dv, text_dq, text_dk, text_dv)))


def _sub_sequences(inputs: Inputs) -> Iterator[tuple[int, Tensor]]:
    """Every sub-sequence with the tokens it owns."""
    pattern, N = inputs.pattern, inputs.q.shape[1]
    for s in range(pattern.sparsity):
        positions = torch.arange(pattern.length(s, N), device=inputs.q.device)
        yield s, pattern.token(s, positions)


def _rows(video: Tensor, text: Tensor, tokens: Tensor) -> Tensor:
    """The sub-sequence's video rows, then some text rows: ``[B, H, L + T, D]`` in fp64."""
    rows = torch.cat([video[:, tokens], text], 1)
    return rearrange(rows, "b rows h d -> b h rows d").double()


def _scores(inputs: Inputs, queries: Tensor, tokens: Tensor) -> Tensor:
    """Scaled scores ``[B, H, L + Q, L + T]``, -inf at masked keys."""
    scores = queries @ _rows(inputs.k, inputs.text_k, tokens).mT * inputs.scale
    B, L, T = inputs.q.shape[0], len(tokens), inputs.text_k.shape[1]
    device = inputs.q.device
    attend = torch.ones(B, L + T, dtype=torch.bool, device=device)
    if inputs.mask is not None:
        attend[:, :L] = inputs.mask[:, tokens]
    if inputs.text_mask is not None:
        attend[:, L:] = inputs.text_mask
    return scores.masked_fill(~rearrange(attend, "b keys -> b 1 1 keys"), -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """``exp(scores - lse)``, 0 in rows without a key, whose log-sum-exp is -inf."""
    return (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
