"""Processors written anew, where a model's own would undo what sparse attention saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor


class HunyuanVideo15Processor:
    """That of HunyuanVideo 1.5, without its mask of all pairs.

    The original masks keys and queries, in a tensor ``[B, 1, S, S]`` a layer. What queries of
    padding give is read by nobody, so a key mask of the text ``[B, T]`` is the same function.

    Source: ``HunyuanVideo15AttnProcessor2_0`` of diffusers 0.42.1.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self.attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Video ``[B, N, C]``, text ``[B, T, C]`` and its key mask ``[B, T]``; both come back."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))  # [B, tokens, H, D]

        q, k, v = (heads(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
        k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (heads(f(encoder_hidden_states)) for f in added)
        text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        q, k, v = (torch.cat(x, 1) for x in ((q, text_q), (k, text_k), (v, text_v)))
        keys = F.pad(attention_mask.bool(), (q.shape[1] - text_q.shape[1], 0), value=True)
        out = self.attend(
            q,
            k,
            v,
            keys[:, None, None],  # [B, 1, 1, N + T]
            backend=self._attention_backend,
            parallel=self._parallel_config,
        )
        video, text = out.flatten(2, 3).to(q.dtype).tensor_split((-text_q.shape[1],), 1)
        return attn.to_out[1](attn.to_out[0](video)), attn.to_add_out(text)
