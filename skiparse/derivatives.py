"""How our operators are differentiated: in reverse, in forward mode, and under ``torch.func``.

``torch.library.custom_op`` knows the reverse mode alone: it drops tangents without a word, and
``torch.func`` cannot see through it. So the operators are declared here with a kernel for autograd
of their own, which applies an ordinary ``torch.autograd.Function``: its ``backward`` then holds in
eager mode, under ``torch.func`` and in compiled graphs alike, its ``jvp`` in the first two.

This is the one file that takes private names of torch for it; its tests passed
with torch 2.10, 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("skiparse", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


def tensors(names: Iterable[str], prefix: str = "") -> str:
    """The part of an operator's schema that has a tensor for every name."""
    return ", ".join(f"Tensor {prefix}{name}" for name in names)


def operator(name: str, *arguments: str, returns: int) -> Callable[[Callable[..., Any]], Any]:
    """Declare the function below as ``skiparse::name``; it is the operator then.

    It allocates what it returns, and writes to none of its arguments, which come by position. They
    are said in the language of schemas and not as Python's, so that operators share parts of
    theirs. Saved graphs name them: what is there keeps its name and place.

    Args:
        name: within ``skiparse``.
        arguments: parts of the schema.
        returns: how many tensors.
    """
    schema = f"{name}({', '.join(arguments)}) -> ({', '.join(['Tensor'] * returns)})"

    def declare(implementation: Callable[..., Any]) -> Any:
        LIBRARY.define(schema, tags=_TAGS)
        LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        return getattr(torch.ops.skiparse, name).default

    return declare


def differentiate(op: Any, rule: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Have autograd apply ``rule`` to ``op``; how to call it.

    What is returned is ``op``, but that ``torch.func`` meets the rule first: its forward mode
    cannot be entered again from inside an operator. Compiled graphs call the operator itself.
    """
    name = op._schema.name.partition("::")[2]

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if _is_recorded(args):
            if torch._C._are_functorch_transforms_active():
                return _inside_functorch(name, rule, args)
            return rule.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return rule.apply(*args)
        return op(*args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    return call


def below_autograd(op: Any, *args: Any) -> Any:
    """Call ``op`` as the ``forward`` of its rule does: what is there to record is recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _inside_functorch(name: str, rule: type[torch.autograd.Function], args: Any) -> Any:
    """Apply ``rule`` where a transform has already begun to dispatch the operator."""
    if retrieve_current_functorch_interpreter().key() == TransformType.Jvp:
        raise RuntimeError(
            f"there is no forward-mode derivative of skiparse::{name} here: torch.func.jvp has to "
            "stand outside torch.compile, and second derivatives are not written"
        )
    # The snapshot is for a compiled graph's fake tensors: torch 2.10 and 2.11 miss it there.
    front = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode)
    front = front | torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
    with torch._C._ForceDispatchKeyGuard(
        torch._C._dispatch_tls_local_include_set() | front,
        torch._C._dispatch_tls_local_exclude_set() - front,
    ):
        return rule.apply(*args)


def _is_recorded(args: tuple[Any, ...]) -> bool:
    """Whether somebody differentiates here: there is a level of tangents, or a graph to build."""
    if forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def differentiate_once(op: Any, what: str) -> None:
    """Let ``op``, which computes ``what``, raise where somebody differentiates it.

    Without a rule its outputs would be constants to autograd, and second derivatives zero.
    """

    def refuse() -> NoReturn:
        raise RuntimeError(
            f"{what} cannot be differentiated again: no formula for it is written; "
            "compute the attention with plain PyTorch operations for second derivatives"
        )

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            """Nothing is kept."""

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            refuse()

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            refuse()

    differentiate(op, Once)


def refuse_nested_forward_mode(what: str) -> None:
    """RuntimeError inside a forward mode inside another, whose tangents a rule does not see."""
    levels = [level.key() for level in get_interpreter_stack() or ()]
    if levels.count(TransformType.Jvp) > 1:
        raise RuntimeError(
            f"forward mode of {what} inside another forward mode: second derivatives are not "
            "written; compute the attention with plain PyTorch operations for them"
        )


def one_by_one(op: Any, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """``torch.vmap`` over ``op`` as a loop, for operators that have no batch to join."""

    def of(i: int, x: Any, dim: Any) -> Any:
        return x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x

    found = [
        op(*(of(i, *pair) for pair in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])
