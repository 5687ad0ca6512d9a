"""The operator every backend sits under: one schema, one fake, one gradient, one flop formula.

``skiparse::attention`` and ``skiparse::attention_backward`` are what autograd, ``torch.compile``,
autocast and the flop counter see. The choice of backend happens inside them, on real tensors.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from skiparse.backends import Inputs, Outputs
from skiparse.pattern import SkipPattern, attention_flops
from skiparse.registry import select


@torch.library.custom_op("skiparse::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: int,
    run: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out [B,N,H,D], text_out [B,n,T,H,D], lse [B,H,N], text_lse [B,H,n,T])``.

    The contract is that of ``skiparse.backends.Outputs``; arguments are checked by the caller
    (``skiparse.functional``). ``lse`` and ``text_lse`` are not differentiable.
    """
    inputs = _inputs(q, k, v, text_q, text_k, text_v, mask, text_mask, sparsity, run, scale)
    return tuple(select(backend, inputs).forward(inputs))  # type: ignore[return-value]  # a tuple of four


@torch.library.custom_op("skiparse::attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    grad_text_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    mask: Tensor | None,
    text_mask: Tensor | None,
    out: Tensor,
    text_out: Tensor,
    lse: Tensor,
    text_lse: Tensor,
    sparsity: int,
    run: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six floating inputs of :func:`attention`."""
    inputs = _inputs(q, k, v, text_q, text_k, text_v, mask, text_mask, sparsity, run, scale)
    outputs = Outputs(out, text_out, lse, text_lse)
    chosen = select(backend, inputs, backward=True)
    return tuple(  # type: ignore[return-value]  # a tuple of six
        chosen.backward(inputs, outputs, _unit(grad_out), _unit(grad_text_out))
    )


def _unit(x: Tensor) -> Tensor:
    """``x``, copied only if its last stride is not 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: int,
    run: int,
    scale: float,
) -> Inputs:
    q, k, v, text_q, text_k, text_v = (_unit(x) for x in (q, k, v, text_q, text_k, text_v))
    pattern = SkipPattern(sparsity, run)
    return Inputs(q, k, v, text_q, text_k, text_v, mask, text_mask, pattern, scale)


@attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    mask: Tensor | None,
    text_mask: Tensor | None,
    sparsity: int,
    run: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, H, D = q.shape
    T = text_q.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(B, N, H, D),
        q.new_empty(B, sparsity, T, H, D),
        q.new_empty(B, H, N, dtype=wide),
        q.new_empty(B, H, sparsity, T, dtype=wide),
    )


@attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor, grad_text_out: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, text_q, text_k, text_v = args[:6]
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        text_q.new_empty(text_q.shape),
        text_k.new_empty(text_k.shape),
        text_v.new_empty(text_v.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, sparsity, run, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = (sparsity, run, scale, backend)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, grad_out: Tensor, grad_text_out: Tensor, *_: None) -> tuple[Any, ...]:
    grads = attention_backward(grad_out, grad_text_out, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, None, None, None, None, None)


attention.register_autograd(_backward, setup_context=_setup_context)


# Autocast: the six floating inputs go to the device's autocast dtype, as for torch's own SDPA.
# `register_autocast` would fix the dtype at registration, so the rule is written out.

_LIBRARY = torch.library.Library("skiparse", "FRAGMENT")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype ``x`` has inside an attention operator: that of autocast, if on and eligible."""
    device = x.device.type
    if (
        torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and x.is_floating_point()
        and x.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _register_autocast(key: str) -> None:
    op = torch.ops.skiparse.attention.default
    dispatch_key = getattr(torch._C.DispatchKey, key)

    @op.py_impl(dispatch_key)
    def cast_and_call(*args: Any) -> Any:
        # All of them before the guard, under which autocast counts as off.
        cast = [x.to(autocast_dtype(x)) if isinstance(x, Tensor) else x for x in args]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(dispatch_key)):
            return op(*cast)

    def kernel(_: torch._C.DispatchKeySet, *args: Any) -> Any:
        return cast_and_call(*args)

    _LIBRARY.impl("attention", kernel, key, with_keyset=True)


for _key in ("AutocastCPU", "AutocastCUDA", "AutocastPrivateUse1"):  # the last one: NPUs
    _register_autocast(_key)


# Flop count. `torch.utils.flop_counter` imports Triton, which `import skiparse` must not, so the
# formulas are handed over when somebody imports it.


def _forward_flops(
    q: Sequence[int], k: Any, v: Any, text_q: Sequence[int], *args: Any, **_: Any
) -> int:
    B, N, H, D = q
    sparsity, run = args[4:6]
    return attention_flops(SkipPattern(sparsity, run), N, text_q[1], B, H, D)


def _backward_flops(
    grad_out: Any, grad_text_out: Any, q: Sequence[int], k: Any, v: Any, text_q: Sequence[int],
    *args: Any, **_: Any,
) -> int:  # fmt: skip
    B, N, H, D = q
    sparsity, run = args[8:10]
    return attention_flops(SkipPattern(sparsity, run), N, text_q[1], B, H, D, backward=True)


def _register_flops(flop_counter: ModuleType) -> None:
    register = flop_counter.register_flop_formula
    register(torch.ops.skiparse.attention)(_forward_flops)
    register(torch.ops.skiparse.attention_backward)(_backward_flops)


class _AfterImport:
    """A finder that calls ``then(module)`` once ``name`` has been imported by somebody else."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # only this spec's
        return spec


_FLOP_COUNTER = "torch.utils.flop_counter"
if _FLOP_COUNTER in sys.modules:
    _register_flops(sys.modules[_FLOP_COUNTER])
else:
    sys.meta_path.insert(0, _AfterImport(_FLOP_COUNTER, _register_flops))
