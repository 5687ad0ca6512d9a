"""The operator every backend sits under: one schema, one fake, one gradient, one flop formula.

``skiparse::attention`` and ``skiparse::attention_backward`` are what autograd, ``torch.compile``,
autocast and the flop counter see. The choice of backend happens inside them, on real tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from skiparse.after_import import after_import
from skiparse.backends import Gradients, Inputs, Outputs
from skiparse.derivatives import (
    LIBRARY,
    below_autograd,
    differentiate,
    differentiate_once,
    operator,
    refuse_nested_forward_mode,
    tensors,
)
from skiparse.forward_mode import tangents
from skiparse.pattern import attention_flops, pattern_of
from skiparse.registry import select

# The arguments that the three operators share.
_FLOATING = Gradients._fields
_INPUTS = f"{tensors(_FLOATING)}, Tensor? mask, Tensor? text_mask"
_SETTINGS = "SymInt sparsity, SymInt run, float scale"
_GRID = "SymInt[]? grid=None"  # a pattern's numbers behind the first two, if any


@operator("attention", _INPUTS, _SETTINGS, "str backend", _GRID, returns=4)
def attention(*args: Any) -> tuple[Tensor, ...]:
    """``(out [B,N,H,D], text_out [B,n,Q,H,D], lse [B,H,N], text_lse [B,H,n,Q])``.

    The contract is that of ``skiparse.backends.Outputs``; arguments are checked by the caller
    (``skiparse.functional``).
    """
    backend, *grid = args[11:]
    inputs = _inputs(*args[:11], *grid)
    return tuple(select(backend, inputs).forward(inputs))


@operator(
    "attention_backward",
    "Tensor grad_out, Tensor grad_text_out",
    _INPUTS,
    tensors(Outputs._fields),
    _SETTINGS,
    "str backend",
    "Tensor? grad_lse=None, Tensor? grad_text_lse=None",
    _GRID,
    returns=6,
)
def attention_backward(grad_out: Tensor, grad_text_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of the six floating inputs of :func:`attention`.

    The gradients of the two log-sum-exps are both there or both None, which is cheaper.
    """
    inputs = _inputs(*args[:8], *args[12:15], *args[18:])
    chosen = select(args[15], inputs, backward=True)
    grads = (_unit(grad_out), _unit(grad_text_out), *args[16:18])  # left out where they are None
    return tuple(chosen.backward(inputs, Outputs(*args[8:12]), *grads))


@operator("attention_jvp", tensors(_FLOATING, "tangent_"), _INPUTS, _SETTINGS, _GRID, returns=4)
def attention_jvp(*args: Any) -> tuple[Tensor, ...]:
    """Tangents of the four outputs of :func:`attention`; the same way for every backend."""
    return tuple(tangents(_inputs(*args[6:]), args[:6]))


def _unit(x: Tensor) -> Tensor:
    """``x``, copied only if its last stride is not 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _inputs(*args: Any) -> Inputs:
    """The problem, from what ``_INPUTS``, ``_SETTINGS`` and ``_GRID`` name."""
    sparsity, run, scale, *grid = args[8:]
    pattern = pattern_of((sparsity, run, *_grid(grid)))
    q, k, v, text_q, text_k, text_v = map(_unit, args[:6])
    return Inputs(q, k, v, text_q, text_k, text_v, args[6], args[7], pattern, scale)


def _grid(left: Sequence[Any]) -> Sequence[int]:
    """``_GRID`` of what is left of the arguments."""
    return (left[0] if left else None) or ()


# What they return, in shapes.


def _like_outputs(q: Tensor, text_q: Tensor, sparsity: int) -> tuple[Tensor, ...]:
    B, N, H, D = q.shape
    Q = text_q.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(B, N, H, D),
        q.new_empty(B, sparsity, Q, H, D),
        q.new_empty(B, H, N, dtype=wide),
        q.new_empty(B, H, sparsity, Q, dtype=wide),
    )


@torch.library.register_fake(attention, lib=LIBRARY)
def _attention_fake(*args: Any) -> tuple[Tensor, ...]:
    return _like_outputs(args[0], args[3], args[8])


@torch.library.register_fake(attention_backward, lib=LIBRARY)
def _attention_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[2:8])


@torch.library.register_fake(attention_jvp, lib=LIBRARY)
def _attention_jvp_fake(*args: Any) -> tuple[Tensor, ...]:
    return _like_outputs(args[6], args[9], args[14])


# How they are differentiated, and batched by `torch.vmap`: the new dimension joins the batch.


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd(attention, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors, ctx.settings = inputs[:8], inputs[8:]
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # Zeros where no gradient comes; of the log-sum-exps only if one comes to either.
        needed = (True, True, *(grads[2] is not None or grads[3] is not None,) * 2)
        given = [
            torch.zeros_like(x) if grad is None and need else grad
            for grad, x, need in zip(grads, saved[8:], needed, strict=True)
        ]
        settings, grid = ctx.settings[:4], ctx.settings[4:]
        found = attention_backward(*given[:2], *saved, *settings, *given[2:], *grid)
        return (*found, None, None, *(None for _ in ctx.settings))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        refuse_nested_forward_mode("attention")
        tensors = ctx.saved_tensors[:8]
        given = [
            torch.zeros_like(x) if tangent is None else tangent
            for tangent, x in zip(tangents[:6], tensors[:6], strict=True)
        ]
        (sparsity, run, scale, _, *grid) = ctx.settings
        found: tuple[Tensor, ...] = attention_jvp(*given, *tensors, sparsity, run, scale, *grid)
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return _in_batch(call, info, in_dims, *args)


call = differentiate(attention, _Attention)
differentiate_once(attention_backward, "the gradient of attention")
differentiate_once(attention_jvp, "the forward-mode derivative of attention")


def _in_batch(op: Any, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """``torch.vmap`` over ``op``, all of whose tensors begin with the batch."""

    def fold(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        many = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        return many.flatten(0, 1)

    found = op(*map(fold, args, in_dims))
    return tuple(x.unflatten(0, (info.batch_size, x.shape[0] // info.batch_size)) for x in found), (
        0,
    ) * len(found)


for _op in (attention, attention_backward, attention_jvp):
    torch.library.register_vmap(_op, functools.partial(_in_batch, _op), lib=LIBRARY)


# Autocast: the six floating inputs go to the device's autocast dtype, as for torch's own SDPA.
# `register_autocast` would fix the dtype at registration, so the rule is written out.


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype ``x`` has inside an attention operator: that of autocast, if on and eligible."""
    device = x.device.type
    if (
        device != "meta"  # has no autocast; `torch.amp.is_autocast_available` breaks graphs to 2.11
        and torch.is_autocast_enabled(device)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _register_autocast(key: str) -> None:
    dispatch_key = getattr(torch._C.DispatchKey, key)

    @attention.py_impl(dispatch_key)
    def cast_and_call(*args: Any) -> Any:
        # All of them before the guard, under which autocast counts as off.
        cast = [x.to(autocast_dtype(x)) if isinstance(x, Tensor) else x for x in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(dispatch_key)):
            return attention(*cast)

    def kernel(_: torch._C.DispatchKeySet, *args: Any) -> Any:
        return cast_and_call(*args)

    LIBRARY.impl("attention", kernel, key, with_keyset=True)


for _key in ("AutocastCPU", "AutocastCUDA", "AutocastPrivateUse1"):  # the last one: NPUs
    _register_autocast(_key)


# Flop count. `torch.utils.flop_counter` imports Triton, which `import skiparse` must not, so the
# formulas are handed over when somebody imports it.


def _flops(inputs: Sequence[Any], settings: Sequence[Any], *, backward: bool) -> int:
    """From the shapes of the first eight arguments, and from ``_SETTINGS``, then ``_GRID``."""
    q, _, _, text_q, text_k, *_ = inputs
    sparsity, run, _, *grid = settings
    pattern = pattern_of((sparsity, run, *_grid(grid)))
    B, N, H, D = q
    return attention_flops(pattern, N, text_k[1], B, H, D, queries=text_q[1], backward=backward)


def _forward_flops(*args: Any, **_: Any) -> int:
    return _flops(args[:8], (*args[8:11], *args[12:]), backward=False)


def _backward_flops(*args: Any, **_: Any) -> int:
    return _flops(args[2:10], (*args[14:17], *args[20:]), backward=True)


def _register_flops(flop_counter: ModuleType) -> None:
    register = flop_counter.register_flop_formula
    register(torch.ops.skiparse.attention)(_forward_flops)
    register(torch.ops.skiparse.attention_backward)(_backward_flops)


after_import("torch.utils.flop_counter", _register_flops)


# Sharded tensors: the batch or the heads may be cut, tokens may not.


def _register_shardings(_: ModuleType) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    batch, whole = Shard(0), Replicate()
    # Where heads are: of the outputs and of the tensors that go in, masks without any last.
    outputs = [Shard(2), Shard(3), Shard(1), Shard(1)]
    inputs = [Shard(2)] * 6 + [whole] * 2

    def register(op: Any, results: list[Any], tensors: list[Any]) -> None:
        def shardings(*args: Any) -> list[Any]:
            heads = iter(tensors)
            of_heads = [
                next(heads) if "Tensor" in str(x.type) else None for x in op._schema.arguments
            ]

            def taken(place: Any) -> list[Any]:
                there = zip(of_heads, args, strict=False)  # arguments left out are None
                return [None if x is None or head is None else place or head for head, x in there]

            return [
                ([place or result for result in results], taken(place))
                for place in (whole, batch, None)
            ]

        register_sharding(op)(shardings)

    register(attention, outputs, inputs)
    register(attention_backward, inputs[:6], [*outputs[:2], *inputs, *outputs, *outputs[2:]])
    register(attention_jvp, outputs, inputs[:6] + inputs)


after_import("torch.distributed.tensor", _register_shardings)
