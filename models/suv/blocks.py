"""The layers of SUV: two streams, video and text, that meet in one attention.

A block sees tokens, a pattern and a rotary table, whatever order the tokens are in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint

import skiparse
from skiparse import SkipPattern
from skiparse.models.suv.experts import Experts, GroupedLinear, imbalance
from skiparse.models.suv.parts import (
    Fp32Linear,
    clamp_fp16,
    gated_residual,
    head_norm,
    head_norm_rotate,
    linear_attention,
    linear_state,
    modulated_norm,
    norm,
    recomputed,
)
from skiparse.models.suv.plan import SharedLayer
from skiparse.models.suv.rope import axis_dims

INIT_STD = 0.02  # of every matrix inside the blocks


class Norm(nn.Module):
    """A LayerNorm (``"layer_norm"``) or an RMSNorm (``"rms_norm"``), optionally modulated."""

    def __init__(self, width: int, kind: str, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if kind == "layer_norm" else None
        self.eps = eps

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """``[B, N, width]``, computed in fp32, in the dtype of ``x``.

        With ``shift`` and ``scale``, fp32 ``[B, width]``: ``norm(x) * (1 + scale) + shift``.
        """
        if shift is None:
            return recomputed(_plain_norm, x, self.weight, self.bias, self.eps)
        return recomputed(modulated_norm, x, shift, scale, self.weight, self.bias, self.eps)


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return norm(x.float(), weight, bias, eps).to(x.dtype)


class AdaptiveNorm(nn.Module):
    """Norms of both streams, shifted, scaled and later gated by the condition ("AdaLN").

    Source: Peebles and Xie 2022, "DiT"; one linear layer for both streams as in SUV.
    """

    def __init__(self, width: int, condition: int, kind: str, eps: float, *, text: bool) -> None:
        super().__init__()
        self.linear = Fp32Linear(condition, 6 * width)
        self.norm = Norm(width, kind, eps)
        self.text_norm = Norm(width, kind, eps) if text else None

    def forward(
        self, video: Tensor, text: Tensor, condition: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both streams ``[B, N, C]``, ``[B, T, C]``, and their gates ``[B, C]`` fp32.

        Without a norm of its own, the text comes back as it is.
        """
        parts = self.linear(F.silu(condition)).chunk(6, -1)
        shift, scale, gate, text_shift, text_scale, text_gate = parts
        video = self.norm(video, shift, scale)
        if self.text_norm is not None:
            text = self.text_norm(text, text_shift, text_scale)
        return video, text, gate, text_gate


class HeadNorm(nn.Module):
    """RMSNorm over the dimensions of a head, one weight for all heads; optionally rotated."""

    def __init__(self, head_dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))
        self.eps = eps

    def forward(self, x: Tensor | None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``[B, N, H, D]``; ``rotary`` is cos and sin, fp32 ``[N, D / 2]``.

        Without ``x`` its weight ``[D]``, for a kernel that normalises among other things: asked
        for here, because where weights are brought to the device and taken away again, they are
        there while their module runs.
        """
        weight = _of_some_heads(self.weight)
        if x is None:
            return weight.view_as(weight)
        if rotary is None:
            return recomputed(head_norm, x, weight, self.eps)
        return recomputed(head_norm_rotate, x, weight, *rotary, self.eps)


def _of_some_heads(weight: Tensor) -> Tensor:
    """A weight of all heads; where they are dealt out, each process has a part of its gradient."""
    return weight.to_local(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


class JointAttention(nn.Module):
    """Skiparse attention of video and text, with projections of their own.

    With ``linear`` a second branch beside it: every video token attends to all of them, by linear
    attention (:func:`~skiparse.models.suv.parts.linear_state` says which) of the same q, k and v.
    Its projection begins as 0, and is added to the first branch's.
    """

    def __init__(
        self, heads: int, head_dim: int, eps: float, *, last: bool, linear: bool = False
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.text_to_q, self.text_to_k, self.text_to_v = (nn.Linear(width, width) for _ in range(3))
        self.text_to_out = None if last else nn.Linear(width, width)
        self.linear_to_out = nn.Linear(width, width, bias=False) if linear else None
        self.norm_q, self.norm_k, self.text_norm_q, self.text_norm_k = (
            HeadNorm(head_dim, eps) for _ in range(4)
        )
        self.packs: bool | None = None  # the text goes inside q, k and v; None: where that pays

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        rotary: tuple[Tensor, Tensor],
        pattern: SkipPattern | SharedLayer,
        mask: Tensor | None,
        text_mask: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """``[B, N, C]`` and ``[B, T, C]`` to the same; of the last block the video alone."""
        q, k, v = (self._split(linear(video)) for linear in (self.to_q, self.to_k, self.to_v))
        text_q, text_k, text_v = (
            self._split(linear(text)) for linear in (self.text_to_q, self.text_to_k, self.text_to_v)
        )
        if isinstance(pattern, SharedLayer):
            q, k = self.norm_q(q, rotary), self.norm_k(k, rotary)
            out, text_out = pattern.joint_attention(
                q, k, v, self.text_norm_q(text_q), self.text_norm_k(text_k), text_v,
                mask=mask, text_mask=text_mask, backend=backend,
            )  # fmt: skip
        elif self._packs(q, pattern, backend) and mask is None and text_mask is None:
            packed = skiparse.norm_rope_pack(
                q, k, v, *rotary, self.norm_q(None), self.norm_k(None), pattern,
                text_q=text_q, text_k=text_k, text_v=text_v,
                text_norm_q=self.text_norm_q(None), text_norm_k=self.text_norm_k(None),
                axes=axis_dims(q.shape[-1]), eps=self.norm_q.eps,
            )  # fmt: skip
            attended = skiparse.attention(*packed, backend=backend)
            out, text_out = skiparse.unpack(attended, pattern, q.shape[1])
            if self.linear_to_out is not None:
                q, k = self.norm_q(q, rotary), self.norm_k(k, rotary)
        else:
            q, k = self.norm_q(q, rotary), self.norm_k(k, rotary)
            out, text_out = skiparse.joint_attention(
                q, k, v, self.text_norm_q(text_q), self.text_norm_k(text_k), text_v,
                pattern, mask=mask, text_mask=text_mask, backend=backend,
            )  # fmt: skip
        video = self.to_out(out.flatten(2))
        if self.linear_to_out is not None:
            found = self._linear(q, k, v, pattern, mask)
            video = video + self.linear_to_out(found.flatten(2))
        return video if self.text_to_out is None else (video, self.text_to_out(text_out.flatten(2)))

    @staticmethod
    def _linear(
        q: Tensor, k: Tensor, v: Tensor, pattern: SkipPattern | SharedLayer, mask: Tensor | None
    ) -> Tensor:
        """``[B, N, H, D]`` of all video tokens, also where processes share them."""
        if not isinstance(pattern, SharedLayer):
            return recomputed(linear_attention, q, recomputed(linear_state, k, v, mask))
        state = recomputed(linear_state, k, v, pattern.own(mask))
        return recomputed(linear_attention, q, pattern.total(state))

    def _packs(self, q: Tensor, pattern: SkipPattern, backend: str) -> bool:
        return skiparse.packing_pays(q, pattern, backend) if self.packs is None else self.packs

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class FeedForward(nn.Module):
    """Four times as wide, tanh-GELU, back; no biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width, bias=False)
        self.linear_2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the same."""
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))


class SUVBlock(nn.Module):
    """Attention, then feed-forward, each adaptively normalised and gated.

    Args:
        heads, head_dim: the width is their product.
        condition: width of the condition vector.
        double_ff: the text has a feed-forward of its own, else it shares the video's.
        last: nothing reads the text after this block, so it has no parameters for that.
        linear: attention has a linear branch over all video tokens beside it.
        experts: in the place of the feed-forward; 1 for that itself. Text that has none of its own
            goes through them too.
        taken: experts of a token.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        condition: int,
        *,
        double_ff: bool,
        last: bool,
        norm: str,
        eps: float,
        linear: bool = False,
        experts: int = 1,
        taken: int = 1,
    ) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm1 = AdaptiveNorm(width, condition, norm, eps, text=True)
        self.attn = JointAttention(heads, head_dim, eps, last=last, linear=linear)
        self.norm2 = AdaptiveNorm(width, condition, norm, eps, text=not last)
        self.ff = Experts(width, experts, taken) if experts > 1 else FeedForward(width)
        self.text_ff = FeedForward(width) if double_ff and not last else None
        self.last = last
        self._init_weights()

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        condition: Tensor,
        rotary: tuple[Tensor, Tensor],
        pattern: SkipPattern | SharedLayer,
        mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        checkpoint_ff: bool = False,
        backend: str = "auto",
    ) -> tuple[Tensor, ...]:
        """One block.

        Args:
            video: ``[B, N, C]``, in the order that ``pattern`` and ``rotary`` are for.
            text: ``[B, T, C]``.
            condition: ``[B, condition]`` fp32.
            rotary: cos and sin, fp32 ``[N, head_dim / 2]``.
            mask, text_mask: key masks ``[B, N]`` and ``[B, T]``, bool, True = attend.
            checkpoint_ff: compute the feed-forward again in the backward pass.

        Returns:
            ``[B, N, C]`` and ``[B, T, C]`` in their dtype; of a block with experts besides how
            unevenly the video uses them, ``[B]`` fp32, by
            :func:`~skiparse.models.suv.experts.imbalance`.
        """
        video, text = self._finite(video), self._finite(text)
        inner, inner_text, gate, text_gate = self.norm1(video, text, condition)
        found = self.attn(inner, inner_text, rotary, pattern, mask, text_mask, backend)
        video = gated_residual(video, gate, found if self.last else found[0])
        if not self.last:
            text = gated_residual(text, text_gate, found[1])

        video, text = self._finite(video), self._finite(text)
        inner, inner_text, gate, text_gate = self.norm2(video, text, condition)
        update, *loads = self._feed(self.ff, inner, checkpoint_ff)
        video = gated_residual(video, gate, update)
        told = [self._imbalance(load, inner.shape[1], pattern) for load in loads]
        leaving = pattern.leave(video) if isinstance(pattern, SharedLayer) else None
        if not self.last:  # the text does not need what is on its way
            text_ff = self.ff if self.text_ff is None else self.text_ff
            update, *_ = self._feed(text_ff, inner_text, checkpoint_ff)
            text = gated_residual(text, text_gate, update)
        return video if leaving is None else leaving.end(), text, *told

    def _imbalance(self, load: Tensor, tokens: int, pattern: SkipPattern | SharedLayer) -> Tensor:
        """Of all tokens, also where processes share them."""
        assert isinstance(self.ff, Experts)
        if isinstance(pattern, SharedLayer):
            load, tokens = pattern.total(load), pattern.layout.tokens
        return imbalance(load, tokens, self.ff.taken)

    def _finite(self, x: Tensor) -> Tensor:
        return x if self.training or x.dtype != torch.float16 else clamp_fp16(x)

    @staticmethod
    def _feed(
        ff: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]], x: Tensor, again: bool
    ) -> tuple[Tensor, ...]:
        """What comes of ``x``, and of experts their load."""
        found = checkpoint(ff, x, use_reentrant=False) if again else ff(x)
        return found if isinstance(found, tuple) else (found,)

    def _init_weights(self) -> None:
        """Every matrix from N(0, 0.02), biases 0, as the release was initialised.

        The projection of a linear branch is 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | GroupedLinear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.attn.linear_to_out is not None:
            nn.init.zeros_(self.attn.linear_to_out.weight)


class Stage(nn.ModuleList):
    """Blocks of one sparsity, one after the other.

    ``gradient_checkpointing`` and the function for it are set by diffusers'
    ``enable_gradient_checkpointing``; each block then goes through that function.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., tuple[Tensor, ...]]

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        condition: Tensor,
        rotary: tuple[Tensor, Tensor],
        patterns: Sequence[SkipPattern | SharedLayer],
        mask: Tensor | None,
        text_mask: Tensor | None,
        again: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """As :class:`SUVBlock`, with a pattern for each.

        Args:
            again: what is computed again in the backward pass: ``"none"``, ``"feed_forward"`` or
                ``"block"``.

        Returns:
            Video and text, and what the blocks with experts told of them.
        """
        again, told = again if torch.is_grad_enabled() else "none", []
        for block, pattern in zip(self, patterns, strict=True):
            shared = pattern if isinstance(pattern, SharedLayer) else None
            whole = again == "block" or (self.gradient_checkpointing and torch.is_grad_enabled())
            if shared is not None:
                rotary = shared.rotary
                pattern = shared.staying() if whole else shared
            if _is_compiled(block):
                _mark_lengths(video, text, rotary, mask, text_mask)
            arguments = (video, text, condition, rotary, pattern, mask, text_mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                found = self._gradient_checkpointing_func(block, *arguments, False, backend)
            elif again == "block":
                found = checkpoint(block, *arguments, False, backend, use_reentrant=False)
            else:
                found = block(*arguments, again == "feed_forward", backend)
            video, text, *more = found
            told += more
            leaving = shared.leave(video) if shared is not None and whole else None
            if leaving is not None:
                video = leaving.end()
        return video, text, told


def _is_compiled(block: nn.Module) -> bool:
    return block._compiled_call_impl is not None and not torch.compiler.is_compiling()


def _mark_lengths(
    video: Tensor,
    text: Tensor,
    rotary: tuple[Tensor, Tensor],
    mask: Tensor | None,
    text_mask: Tensor | None,
) -> None:
    """Tell ``torch.compile`` that lengths change, so that it need not find out by a recompile."""
    for x, dim in (
        (video, 1),
        (text, 1),
        (rotary[0], 0),
        (rotary[1], 0),
        (mask, 1),
        (text_mask, 1),
    ):
        if x is not None:
            torch._dynamo.maybe_mark_dynamic(x, dim)
