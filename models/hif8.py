"""HiF8 simulated: what a transformer computes if its products have operands of eight bits.

::

    from skiparse.models import hif8

    made = hif8.apply(pipe.transformer)      # after retrofit(), if the model is to be sparse
    print(made)                              # 400 linear layers and 80 attentions
    made.undo()

HiF8 is a number format of Ascend NPUs. A sign stands before an exponent whose width a prefix tells,
and the mantissa gets the bits that are left: three for exponents from -3 to 3, then two, one and
none. So there is most precision around 1, and a range of 2^-22 to 2^15. Every tensor is scaled to
where there is precision, by its own largest entry.

Nothing becomes faster or smaller by this. It computes in the model's own numbers, rounded to what
HiF8 has, forward and backward, to find out what that does to a model or to train one for it.
Weights stay as they are, and gradients pass the rounding as if it were none.

Source: arXiv 2409.16626 (the format); OSP-Next, arXiv 2605.28691, and its code (what is rounded,
the scales).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from skiparse.models.retrofit.layers import Layer, rebound_to, told

FORWARD, BACKWARD = 15.0, 224.0  # what the largest entry of an operand, or a gradient, becomes
LEAST = 1e-8  # of a largest entry
INFINITE = 40960.0  # from here on there is infinity, 1.25 * 2^15
SMALLEST = 2.0**-22

_MANTISSA, _BIAS = 23, 127  # of float32: bits, and what is added to an exponent
KNOWN = "WanTransformer3DModel"
_MARK = "_skiparse_hif8"  # the attribute of a model that it is applied to


@torch.no_grad()
def quantise(x: Tensor) -> Tensor:
    """Each entry as the nearest value of HiF8; of two that are as near, the one farther from 0.

    Below 2^-23 that is 0, which has no sign, from 40960 on infinity; infinities and NaN stay.

    Args:
        x: of any floating dtype and shape, which come back; computed in float32.

    Raises:
        TypeError: for integers.

    Source: arXiv 2409.16626.
    """
    _refuse_integers(x)
    exact = x.float().abs()
    size = exact.view(torch.int32)
    exponent = ((size >> _MANTISSA) - _BIAS).abs()
    kept = 3 - (exponent > 3).int() - (exponent > 7).int() - (exponent > 15).int()
    dropped = _MANTISSA - kept
    half = torch.ones_like(size) << (dropped - 1)
    rounded = (((size + half) >> dropped) << dropped).view(torch.float32)
    rounded = torch.where(exact < SMALLEST, SMALLEST, rounded)
    rounded = torch.where(exact >= INFINITE, torch.inf, rounded)
    rounded = torch.where(exact.isnan(), exact, rounded).copysign(x.float())
    return torch.where(exact < SMALLEST / 2, 0.0, rounded).to(x.dtype)  # there is one zero


@torch.no_grad()
def scaled(x: Tensor, top: float) -> Tensor:
    """``x`` in HiF8, after it was scaled so that its largest entry is ``top``, and scaled back.

    One entry that is not finite makes all of it NaN: the scale is that of the whole tensor.

    Args:
        x: of any floating dtype and shape.
        top: :data:`FORWARD` or :data:`BACKWARD`.

    Raises:
        TypeError: for integers.
    """
    _refuse_integers(x)
    if not x.numel():
        return x
    wide = x.float()
    scale = top / wide.abs().amax().clamp(min=LEAST)
    return (quantise(wide * scale) / scale).to(x.dtype)


class _Operand(torch.autograd.Function):
    """Rounded forward; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return scaled(x, FORWARD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class _Result(torch.autograd.Function):
    """Passes forward; the gradient is rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return scaled(gradients[0], BACKWARD)


def operand(x: Tensor) -> Tensor:
    """``x`` as HiF8 has it; the gradient passes as if it were ``x``."""
    found: Tensor = _Operand.apply(x)
    return found


def result(x: Tensor) -> Tensor:
    """``x`` itself, whose gradient is as HiF8 has it."""
    found: Tensor = _Result.apply(x)
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of operands in HiF8, whose gradients are products of such, too.

    Under autocast operands are cast first, so that nothing is cast after it was rounded.

    Raises:
        TypeError: for integers.
    """
    return result(F.linear(operand(_cast(x)), operand(_cast(weight)), bias))


class HiF8Linear(nn.Linear):
    """An ``nn.Linear`` with all that it has, which computes by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return linear(input, self.weight, self.bias)


@dataclass(eq=False)
class Rounded:
    """The attention of a layer, with queries, keys and values in HiF8, and so their gradients."""

    inner: Layer | None  # of a retrofit; None for the model's own attention

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float | None = None,
        backend: Any = None,
        parallel: Any = None,
    ) -> Tensor:
        """As of :class:`~skiparse.models.retrofit.layers.Layer`."""
        q, k, v = (operand(result(_cast(x))) for x in (query, key, value))
        if self.inner is None:
            return dispatch_attention_fn(
                q, k, v, attn_mask, scale=scale, backend=backend, parallel_config=parallel
            )
        return self.inner.dispatch(
            q, k, v, attn_mask, scale=scale, backend=backend, parallel=parallel
        )


class HiF8:
    """What :func:`apply` made: print it, or undo it."""

    def __init__(self, model: Any, linears: bool, attention: bool) -> None:
        self.model = model
        self.linears: list[nn.Linear] = []
        self.sparse: list[Any] = []  # processors that a retrofit made
        self.dense: list[tuple[Any, Any, Any]] = []  # attention, its own processor, ours
        for name, module in model.blocks.named_modules(prefix="blocks"):
            if linears and isinstance(module, nn.Linear) and "lora_" not in name:
                if type(module) is not nn.Linear:
                    raise TypeError(
                        f"{name} is a {type(module).__name__}, whose product has no HiF8 here; "
                        "apply it to a model of plain nn.Linear, before what replaces them"
                    )
                self.linears.append(module)
            if getattr(module, "fused_projections", False):
                raise ValueError(f"{name} has fused projections; unfuse_qkv_projections() first")
            if attention and hasattr(module, "set_processor"):
                own: Any = module.processor
                if isinstance(getattr(own, "skiparse_layer", None), Layer):
                    self.sparse.append(own)
                else:
                    made = rebound_to(own, Rounded(None), "dispatch_attention_fn")
                    self.dense.append((module, own, made))

    @classmethod
    def of(cls, model: Any) -> HiF8:
        """That of a model which it is applied to; as of a deep copy of one.

        Raises:
            ValueError: if it is not.
        """
        if not hasattr(model, _MARK):
            raise ValueError(f"hif8 is not applied to this {type(model).__name__}")
        found: HiF8 = getattr(model, _MARK)
        return found

    def undo(self) -> None:
        """Make the model as it was: no attribute and no class of ours is left.

        Raises:
            ValueError: if it is undone already.
        """
        if getattr(self.model, _MARK, None) is not self:
            raise ValueError(f"hif8 is undone already in this {type(self.model).__name__}")
        for module in self.linears:
            module.__class__ = nn.Linear
        for processor in self.sparse:
            processor.skiparse_layer = processor.skiparse_layer.inner
        for attention, own, made in self.dense:
            vars(own).update(told(made))  # as the backend that was set meanwhile
            attention.set_processor(own)
        delattr(self.model, _MARK)

    def __str__(self) -> str:
        attentions = len(self.sparse) + len(self.dense)
        return (
            f"{type(self.model).__name__}: {len(self.linears)} linear layers and {attentions} "
            "attentions with operands in HiF8, simulated"
        )


def apply(model: Any, *, linears: bool = True, attention: bool = True) -> HiF8:
    """Let the products in a transformer's blocks have operands in HiF8, in place.

    Those are of all linear layers in the blocks, but for LoRA's, and of self-attention and
    cross-attention: queries and keys after norms and rotary encoding, and values. What is before
    and behind the blocks, norms, scores and softmax stay as they are. Parameters keep their names
    and values.

    Args:
        model: a WanTransformer3DModel, dense or retrofitted; ``retrofit`` comes before.
        linears, attention: which of the two; OSP-Next was trained with both.

    Returns:
        What was made; keep it for ``undo()``.

    Raises:
        TypeError: for a model that is not known, or layers of other classes.
        ValueError: for a second time, fused projections, or neither of the two. In every case
            nothing was changed.

    Source: OSP-Next, arXiv 2605.28691, and its code.
    """
    if not any(cls.__name__ == KNOWN for cls in type(model).__mro__):
        raise TypeError(f"hif8 knows blocks of a {KNOWN}, got a {type(model).__name__}")
    if hasattr(model, _MARK):
        raise ValueError(
            f"hif8 is applied to this {type(model).__name__} already; undo() that first, which "
            "HiF8.of(model) finds"
        )
    if not (linears or attention):
        raise ValueError("give linears=True, attention=True, or both")
    made = HiF8(model, linears, attention)
    for module in made.linears:
        module.__class__ = HiF8Linear
    for processor in made.sparse:
        processor.skiparse_layer = Rounded(processor.skiparse_layer)
    for module, _, processor in made.dense:
        module.set_processor(processor)
    setattr(model, _MARK, made)
    return made


def _cast(x: Tensor) -> Tensor:
    """``x`` as autocast would give it to a product; float64 it leaves alone."""
    device = x.device.type
    if device == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _refuse_integers(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x must be of a floating dtype, got {x.dtype}; HiF8 has no integers")
