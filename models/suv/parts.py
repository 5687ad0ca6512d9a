"""The arithmetic between SUV's matrix products, in fp32 and without keeping fp32 copies.

Each is a plain function of tensors, which ``torch.compile`` fuses into one pass. Run eagerly
under autograd, its intermediates would stay alive for the backward pass, at several times the size
of the activation; :func:`recomputed` keeps the inputs only and computes the rest again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from skiparse.models.suv.rope import rotate

FP16_MAX = 65504.0


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, in fp32, returned in the dtype of ``x``.

    Args:
        x: ``[B, N, C]``.
        shift, scale: ``[B, C]``, fp32.
        weight, bias: ``[C]``; LayerNorm, or RMSNorm if there is no bias.
    """
    normal = norm(x.float(), weight, bias, eps)
    return torch.addcmul(shift[:, None], normal, 1 + scale[:, None]).to(x.dtype)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension, or RMSNorm if there is no bias; parameters as fp32."""
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``x + gate * update``, in fp32, in the dtype of ``x``; autograd keeps ``gate``, ``update``.

    Args:
        x, update: ``[B, N, C]``.
        gate: ``[B, C]``, fp32.
    """
    with _without_autocast(x.device.type):
        if _keeps_inputs(x, gate, update):
            return _GatedResidual.apply(x, gate, update)
        return _add_gated(x, gate, update)


def _add_gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    return torch.addcmul(x.float(), gate[:, None], update.float()).to(x.dtype)


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(gate, update)
        return _add_gated(x, gate, update)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, update = ctx.saved_tensors
        wants_gate, wants_update = ctx.needs_input_grad[1:]
        wide = grad.float()
        return (
            grad,
            (wide * update).sum(1) if wants_gate else None,
            (wide * gate[:, None]).to(update.dtype) if wants_update else None,
        )


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of every head, ``[B, N, H, D]``: in fp32, cast back, then times ``weight [D]``."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * weight


def head_norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """:func:`head_norm`, then the rotary embedding in fp32; ``cos``, ``sin`` fp32 ``[N, D/2]``."""
    return rotate(head_norm(x, weight, eps).float(), cos, sin).to(x.dtype)


def fp32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A small linear layer, ``[..., C_in]`` to ``[..., C_out]``, in fp32 whatever comes in."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


def linear_state(k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What linear attention reads, once for all queries: ``phi(k)^T [v, 1]`` of every head.

    ``phi`` is the softmax over the dimensions of a head, which is positive, so that weights are.

    Args:
        k, v: ``[B, N, H, D]``.
        mask: of keys, ``[B, N]``, bool; None for all.

    Returns:
        ``[B, H, D, D + 1]`` fp32, a sum over tokens: their order says nothing.

    Source: Katharopoulos et al., arXiv 2006.16236 (linear attention); softmax as its feature map
    and beside a sparse attention: Zhang et al., SLA, arXiv 2509.24006.
    """
    features = k.float().softmax(-1)
    if mask is not None:
        features = features * mask[:, :, None, None]
    return torch.einsum("bnhd,bnhe->bhde", features, F.pad(v.float(), (0, 1), value=1.0))


def linear_attention(q: Tensor, state: Tensor) -> Tensor:
    """What queries ``[B, N, H, D]`` find in :func:`linear_state`: a mean of values, weighed.

    Token ``j`` weighs ``phi(q) . phi(k_j)``. Where no key counts it is 0.
    """
    found = torch.einsum("bnhd,bhde->bnhe", q.float().softmax(-1), state)
    tiny = torch.finfo(found.dtype).tiny
    return (found[..., :-1] / found[..., -1:].clamp_min(tiny)).to(q.dtype)


def clamp_fp16(x: Tensor) -> Tensor:
    """NaN to 0 and infinities to the largest fp16 number, as the release does in fp16 inference."""
    return x.nan_to_num(0.0, FP16_MAX, -FP16_MAX)


def recomputed(function: Callable[..., Tensor], *inputs: Tensor | float | None) -> Tensor:
    """``function(*inputs)``, outside autocast; autograd keeps ``inputs`` and nothing else.

    Under ``torch.compile`` it is the bare call: the compiler makes that choice itself.
    """
    with _without_autocast(_device_type(inputs)):
        if _keeps_inputs(*inputs):
            return _Recomputed.apply(function, *inputs)
        return function(*inputs)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """In the dtypes that are given; tensors without memory know no autocast.

    None is turned off where none is on: each costs time, and in ``torch.export`` very much of it.
    """
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _keeps_inputs(*inputs: Any) -> bool:
    """Whether a graph for an ordinary backward is built here, of which memory is to be saved.

    Compilers choose by themselves what they keep; forward mode and ``torch.func`` differentiate
    the plain operations.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def _device_type(inputs: tuple[Any, ...]) -> str:
    return next(x.device.type for x in inputs if isinstance(x, Tensor))


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever the dtype of its weights and its input."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., C_in]`` to fp32 ``[..., C_out]``."""
        return recomputed(fp32_linear, input, self.weight, self.bias)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        ctx.function = function
        ctx.is_tensor = [isinstance(x, Tensor) for x in inputs]
        ctx.others = [x for x in inputs if not isinstance(x, Tensor)]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        return function(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, others = iter(ctx.saved_tensors), iter(ctx.others)
        needs = ctx.needs_input_grad[1:]
        inputs = [
            next(saved).detach().requires_grad_(needed) if is_tensor else next(others)
            for is_tensor, needed in zip(ctx.is_tensor, needs, strict=True)
        ]
        wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
        device = _device_type(tuple(inputs))
        with torch.enable_grad(), _without_autocast(device):
            out = ctx.function(*inputs)
        found = iter(torch.autograd.grad(out, wanted, grad))
        return (None, *(next(found) if needed else None for needed in needs))
