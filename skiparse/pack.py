"""q, k and v normalised, rotated and packed with the text inside: for models with such buffers.

Joint attention of video and text is plain attention if every sub-sequence has the text among its
own rows. :func:`norm_rope_pack` writes such buffers in the pass that normalises and rotates q and
k, so that no later copy is needed; :func:`unpack` takes the output apart::

    packed = skiparse.norm_rope_pack(q, k, v, cos, sin, norm_q, norm_k, pattern, text_q=..., ...)
    out, text_out = skiparse.unpack(skiparse.attention(*packed), pattern, q.shape[1])

It is one operator with one gradient, ``skiparse::norm_rope_pack``, in two spellings: ``"eager"``,
here, in plain PyTorch; and ``"triton"``, one kernel that reads and writes everything once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from skiparse import functional, ops, registry
from skiparse.backends import Gradients, Inputs
from skiparse.derivatives import (
    LIBRARY,
    below_autograd,
    differentiate,
    differentiate_once,
    one_by_one,
    operator,
    refuse_nested_forward_mode,
    tensors,
)
from skiparse.pattern import GridPattern, SkipPattern

PACKERS = {row.name: row for row in registry.BACKENDS if row.pack_kernels}
BACKENDS = ("auto", "eager", *PACKERS)


class Packed(NamedTuple):
    """What ``skiparse.attention(*packed)`` takes; q, k and v are ``[B, N + n*T, H, D]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: SkipPattern


def norm_rope_pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    pattern: SkipPattern,
    *,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    text_norm_q: Tensor,
    text_norm_k: Tensor,
    axes: Sequence[int],
    eps: float = 1e-6,
    backend: str = "auto",
) -> Packed:
    """RMSNorm of every head of q and k, rotary embedding of the video, and text rows put inside.

    Computed in fp32 (fp64 for fp64) and rounded once. There are no key masks: with one, call
    :func:`skiparse.joint_attention`.

    Args:
        q, k, v: ``[B, N, H, D]``, the video; fp64, fp32, bf16 or fp16, any strides.
        cos, sin: ``[N, D / 2]`` of the angle of every pair of dimensions at every token, in any
            floating dtype. Constants: they get no gradient.
        norm_q, norm_k: ``[D]``, weights of the norms, in any floating dtype.
        pattern: who attends to whom. Single-skip takes any ``N``; for others
            ``sparsity * run`` must divide it.
        text_q, text_k, text_v: ``[B, T, H, D]``, any ``T``, 0 included; not rotated.
        text_norm_q, text_norm_k: ``[D]``, weights of the norms of the text.
        axes: even numbers of dimensions that tell one coordinate each, ``D`` together; inside
            each the first half is rotated with the second. ``(D,)`` is ordinary NeoX rotary.
        eps: added to the mean square, > 0.
        backend: ``"triton"``, ``"eager"``, or ``"auto"``: triton on a CUDA or HIP device where it
            can, else eager. The Triton kernels have not yet run on a GPU.

    Returns:
        :class:`Packed`: contiguous buffers of ``N + n*T`` rows in the dtype of ``q`` (under
        autocast in its dtype), and ``pattern.packed(N, T)``, which says which row is where.

    Raises:
        ValueError: for arguments that do not fit together, before any work.
        RuntimeError: if the backend cannot do this, with its reason.

    Source: Zhang and Sennrich 2019, "RMSNorm"; Su et al. 2021, "RoFormer"; Open-Sora Plan v1.5
    report, "SUV".
    """
    video = {"q": q, "k": k, "v": v}
    text = {"text_q": text_q, "text_k": text_k, "text_v": text_v}
    if isinstance(pattern, GridPattern):
        raise ValueError(
            f"pattern must be a SkipPattern, got {pattern!r}; a grid is not packed, call "
            "skiparse.joint_attention"
        )
    functional._check(video, text, pattern, None, "auto")
    norms = {
        "norm_q": norm_q, "norm_k": norm_k, "text_norm_q": text_norm_q, "text_norm_k": text_norm_k,
    }  # fmt: skip
    _check(q, {"cos": cos, "sin": sin}, norms, axes, eps, backend)
    packed = pattern.packed(q.shape[1], text_q.shape[1])
    run = 1 if packed.run == 1 else pattern.run
    rows = (x.to(ops.autocast_dtype(x)) for x in (*video.values(), *text.values()))
    packed_q, packed_k, packed_v = call(
        *rows, *norms.values(), cos, sin, list(axes), float(eps), pattern.sparsity, run, backend
    )
    return Packed(packed_q, packed_k, packed_v, packed)


def packing_pays(q: Tensor, pattern: SkipPattern, backend: str = "auto") -> bool:
    """Whether a model should pack q, k and v with the text inside, if it has no masks.

    It should where library kernels attend on a GPU in half precision, which would copy all rows
    into such buffers anyway. By the count of bytes; not yet measured on a GPU. On a CPU it gains
    nothing.

    Args:
        q: ``[B, N, H, D]``, the video.
        pattern, backend: of the attention to come.
    """
    copies = any(row.copies_text and backend in ("auto", row.name) for row in registry.BACKENDS)
    halves = (torch.float16, torch.bfloat16)
    library = copies and q.device.type == "cuda" and q.dtype in halves
    return library and pattern.can_pack(q.shape[1])


def unpack(out: Tensor, pattern: SkipPattern, tokens: int) -> tuple[Tensor, Tensor]:
    """The video rows of a packed buffer in the order of the tokens, and the mean of the text rows.

    Args:
        out: ``[B, N + n*T, H, D]``, of :func:`skiparse.attention` over packed q, k and v.
        pattern: the one given to :func:`norm_rope_pack`.
        tokens: ``N``, how many rows are video.

    Returns:
        ``[B, N, H, D]``, of single-skip a view, and ``[B, T, H, D]``.

    Raises:
        ValueError: if no number of text rows gives that buffer.
    """
    n = pattern.sparsity
    T = (out.shape[1] - tokens) // n if out.ndim == 4 else -1
    if tokens < 0 or T < 0 or tokens + n * T != out.shape[1]:
        raise ValueError(
            f"out has shape {list(out.shape)}, which is not [B, N + {n} * T, H, D] with N = "
            f"{tokens}; give the pattern and the N that were packed"
        )
    run = 1 if pattern.packed(tokens, T).run == 1 else pattern.run
    video, copies = _views(out, tokens, n, run)
    return video.reshape(out.shape[0], tokens, *out.shape[2:]), copies.mean(1)


def _check(
    q: Tensor,
    tables: dict[str, Tensor],
    norms: dict[str, Tensor],
    axes: Sequence[int],
    eps: float,
    backend: str,
) -> None:
    """Raise ValueError for tables, weights and settings that do not fit ``q``."""
    N, D = q.shape[1], q.shape[3]
    if sum(axes) != D or any(size < 2 or size & 1 for size in axes):
        raise ValueError(f"axes must be even, positive and {D} together, got {tuple(axes)}")
    shapes = dict.fromkeys(tables, (N, D // 2)) | dict.fromkeys(norms, (D,))
    for name, x in (tables | norms).items():
        if not isinstance(x, Tensor) or x.shape != shapes[name] or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)
            raise ValueError(f"{name} must be floating {list(shapes[name])}, got {got}")
        functional._check_device(name, x, q)
    for name, x in tables.items():
        if x.requires_grad:
            raise ValueError(f"{name} requires a gradient, but tables are constants; detach it")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")


# The arguments that the three operators share. Gradients need no values of v.
_NORMS = ("norm_q", "norm_k", "text_norm_q", "text_norm_k")
_FLOATING = (*Gradients._fields, *_NORMS)
_TABLES = "Tensor cos, Tensor sin"
_KEPT = f"{tensors(('q', 'k', 'text_q', 'text_k', *_NORMS))}, {_TABLES}"
_SETTINGS = "SymInt[] axes, float eps, SymInt sparsity, SymInt run"


@operator("norm_rope_pack", tensors(_FLOATING), _TABLES, _SETTINGS, "str backend", returns=3)
def pack(*args: Any) -> tuple[Tensor, ...]:
    """Packed q, k and v, ``[B, N + sparsity * T, H, D]``; arguments are checked by the caller."""
    *settings, backend = args[10:]
    kernels = _kernels(backend, args[0], args[3], *settings[-2:])
    forward = kernels.forward if kernels else _forward
    return tuple(forward(args[:3], args[3:6], args[6:8], args[8:10], *settings))


@operator(
    "norm_rope_pack_backward",
    "Tensor grad_q, Tensor grad_k, Tensor grad_v",
    _KEPT,
    _SETTINGS,
    "str backend",
    returns=10,
)
def pack_backward(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, of the text, and of the four weights, from those of the buffers."""
    *settings, backend = args[11:]
    kernels = _kernels(backend, args[3], args[5], *settings[-2:])
    backward = kernels.backward if kernels else _backward
    return tuple(backward(args[:3], args[3:5], args[5:7], args[7:9], args[9:11], *settings))


@operator("norm_rope_pack_jvp", tensors(_FLOATING, "tangent_"), _KEPT, _SETTINGS, returns=3)
def pack_jvp(*args: Any) -> tuple[Tensor, ...]:
    """Tangents of the packed buffers; in plain PyTorch, whatever the backend."""
    d_video, d_text, d_norms = args[:3], args[3:6], (args[6:8], args[8:10])
    video, text, norms = args[10:12], args[12:14], (args[14:16], args[16:18])
    cos, sin, axes, eps, sparsity, run = args[18:]
    dtype = video[0].dtype
    packed = []
    for x, dx, y, dy, norm, d_norm, text_norm, d_text_norm in zip(
        video, d_video[:2], text, d_text[:2], norms[0], d_norms[0], norms[1], d_norms[1],
        strict=True,
    ):  # fmt: skip
        rows = _rotate(_norm_jvp(x, norm, dx, d_norm, eps), cos, sin, axes)
        texts = _norm_jvp(y, text_norm, dy, d_text_norm, eps)
        packed.append(_place(rows, texts, sparsity, run, dtype))
    return *packed, _place(d_video[2], d_text[2], sparsity, run, dtype)


def _kernels(name: str, q: Tensor, text_q: Tensor, sparsity: int, run: int) -> Any:
    """The module of kernels that do it, or None; RuntimeError if they are named and cannot."""
    for row in PACKERS.values():
        if name == row.name or (name == "auto" and q.device.type in row.auto):
            (B, N, H, D), T = q.shape, text_q.shape[1]
            buffer = q.new_empty(1).expand(B, N + sparsity * T, H, D)  # whose rows are counted too
            packed = SkipPattern(sparsity, run).packed(N, T)
            inputs = Inputs(
                buffer, buffer, buffer, text_q, text_q, text_q, None, None, packed, 1.0
            )  # fmt: skip
            reason = registry.load(row.name).why_not(inputs)
            if reason is None:
                assert row.pack_kernels is not None
                return importlib.import_module(row.pack_kernels)
            if name == row.name:
                raise RuntimeError(f'backend "{name}" cannot run this: {reason}')
    return None


def _like_packed(q: Tensor, text_q: Tensor, sparsity: int) -> tuple[Tensor, Tensor, Tensor]:
    B, N, H, D = q.shape
    made = [q.new_empty(B, N + sparsity * text_q.shape[1], H, D) for _ in range(3)]
    return made[0], made[1], made[2]


@torch.library.register_fake(pack, lib=LIBRARY)
def _pack_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_packed(args[0], args[3], args[-3])


@torch.library.register_fake(pack_jvp, lib=LIBRARY)
def _pack_jvp_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _like_packed(args[10], args[12], args[-2])


@torch.library.register_fake(pack_backward, lib=LIBRARY)
def _pack_backward_fake(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    q, k, text_q, text_k, *norms = args[:8]
    like = (q, k, q, text_q, text_k, text_q, *norms)
    return tuple(x.new_empty(x.shape) for x in like)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd(pack, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, _, text_q, text_k, _, *rest = inputs
        kept = (q, k, text_q, text_k, *rest[:6])
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.likes = [(x.shape, x.dtype, x.device) for x in inputs[:10]]
        ctx.settings = rest[6:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = pack_backward(*grads, *ctx.saved_tensors, *ctx.settings)
        return (*found, None, None, *(None for _ in ctx.settings))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        refuse_nested_forward_mode("norm_rope_pack")
        given = [
            torch.zeros(shape, dtype=dtype, device=device) if x is None else x
            for x, (shape, dtype, device) in zip(tangents[:10], ctx.likes, strict=True)
        ]
        found: tuple[Tensor, ...] = pack_jvp(*given, *ctx.saved_tensors, *ctx.settings[:-1])
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return one_by_one(call, info, in_dims, *args)


call = differentiate(pack, _Pack)
differentiate_once(pack_backward, "the gradient of norm_rope_pack")
differentiate_once(pack_jvp, "the forward-mode derivative of norm_rope_pack")
for _op in (pack, pack_backward, pack_jvp):
    torch.library.register_vmap(_op, functools.partial(one_by_one, _op), lib=LIBRARY)


# The eager spelling.

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


def _forward(
    video: Three, text: Three, norms: Two, text_norms: Two, cos: Tensor, sin: Tensor,
    axes: Sequence[int], eps: float, n: int, w: int,
) -> Three:  # fmt: skip
    """Norm, rotation and placement, one after the other."""
    packed = []
    for x, y, norm, text_norm in zip(video[:2], text[:2], norms, text_norms, strict=True):
        rows = _rotate(_norm(x, norm, eps), cos, sin, axes)
        packed.append(_place(rows, _norm(y, text_norm, eps), n, w, x.dtype))
    v, text_v = video[2], text[2]
    return packed[0], packed[1], _place(v, text_v, n, w, v.dtype)


def _backward(
    grads: Three, video: Two, text: Two, norms: Two, text_norms: Two, cos: Tensor, sin: Tensor,
    axes: Sequence[int], eps: float, n: int, w: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, backwards; text gradients are summed over sub-sequences."""
    N = video[0].shape[1]

    def one(
        grad: Tensor, x: Tensor, y: Tensor, norm: Tensor, text_norm: Tensor
    ) -> tuple[Tensor, ...]:
        rows, texts = _collect(grad, N, n, w, _wide(x).dtype)
        rows = _rotate(rows, cos, -sin, axes)
        return *_norm_backward(rows, x, norm, eps), *_norm_backward(texts, y, text_norm, eps)

    (q, norm_q, text_q, text_norm_q), (k, norm_k, text_k, text_norm_k) = map(
        one, grads[:2], video, text, norms, text_norms
    )
    v, text_v = _collect(grads[2], N, n, w, grads[2].dtype)
    return q, k, v, text_q, text_k, text_v, norm_q, norm_k, text_norm_q, text_norm_k


def _wide(x: Tensor) -> Tensor:
    """``x`` in the dtype that is computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, wide."""
    x = _wide(x)
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Two:
    """Gradients of ``x`` and ``weight`` of :func:`_norm`, in their dtypes.

    With ``r = 1 / rms(x)`` and ``g = grad * weight``: ``r * (g - x r mean(g x r))``.
    """
    wide = _wide(x)
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = wide * r
    g = grad * weight.to(wide.dtype)
    dx = r * (g - normal * (g * normal).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normal).sum((0, 1, 2)).to(weight.dtype)


def _norm_jvp(x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor, eps: float) -> Tensor:
    """The tangent of :func:`_norm`: ``r * (dx - x r mean(dx x r)) * weight + x r dweight``."""
    wide, dwide = _wide(x), _wide(dx)
    r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = wide * r
    turned = r * (dwide - normal * (normal * dwide).mean(-1, keepdim=True))
    return turned * weight.to(wide.dtype) + normal * dweight.to(wide.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, axes: Sequence[int]) -> Tensor:
    """Every pair of dimensions of ``[B, N, H, D]`` turned by its angle."""
    pairs = [size // 2 for size in axes]
    turned = []
    tables = (table.to(x.dtype)[:, None].split(pairs, -1) for table in (cos, sin))  # [N, 1, pairs]
    for part, c, s in zip(x.split(list(axes), -1), *tables, strict=True):
        first, second = part.chunk(2, -1)
        turned += [first * c - second * s, second * c + first * s]
    return torch.cat(turned, -1)


def _place(video: Tensor, text: Tensor, n: int, w: int, dtype: torch.dtype) -> Tensor:
    """``[B, N, H, D]`` and ``n`` copies of ``[B, T, H, D]`` in one buffer."""
    B, N, H, D = video.shape
    packed = video.new_empty(B, N + n * text.shape[1], H, D, dtype=dtype)
    rows, copies = _views(packed, N, n, w)
    rows.copy_(video.reshape(rows.shape))
    copies.copy_(text[:, None])
    return packed


def _collect(packed: Tensor, N: int, n: int, w: int, dtype: torch.dtype) -> Two:
    """The transpose of :func:`_place`: the video rows, and the copies of the text summed."""
    rows, copies = _views(packed, N, n, w)
    video = packed.new_empty(packed.shape[0], N, *packed.shape[2:], dtype=dtype)
    video.view(rows.shape).copy_(rows)
    return video, _wide(copies).sum(1).to(dtype)


def _views(packed: Tensor, N: int, n: int, w: int) -> Two:
    """The rows of a buffer ``[B, N + n*T, H, D]``, as views: see ``SkipPattern.packed``.

    Video ``[B, N, H, D]`` or, where the buffer is cut into blocks, ``[B, runs, n, w, H, D]``,
    which is the same order; and text ``[B, n, T, H, D]``.
    """
    T = (packed.shape[1] - N) // n
    if w == 1:
        video, text = packed.split([N, n * T], 1)
        return video, text.unflatten(1, (T, n)).transpose(1, 2)
    L = N // n
    video, text = packed.unflatten(1, (n, L + T)).split([L, T], 2)
    return video.unflatten(2, (L // w, w)).transpose(1, 2), text
