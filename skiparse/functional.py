"""The public calls: arguments checked and named, then the operator.

Shapes throughout: ``B`` batch, ``N`` video tokens, ``T`` text tokens, ``H`` heads, ``D`` head
dimension, ``n`` sub-sequences. Tensors may have any strides; a last stride other than 1 costs a
copy. All calls are differentiable, once: in reverse, and in forward mode
(:mod:`skiparse.forward_mode`), also under ``torch.func``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from skiparse import ops, registry
from skiparse.pattern import GridPattern, SkipPattern

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SkipPattern | GridPattern,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Skiparse attention over video tokens: each attends within its own sub-sequence.

    Args:
        q, k, v: ``[B, N, H, D]``, fp64, fp32, bf16 or fp16, on one device. Any ``N``.
        pattern: who attends to whom; ``SkipPattern.single(k)`` or ``.group(k)`` of the tokens as
            they come, ``GridPattern.single((frames, rows, columns), ratio)`` or ``.group(...)`` of
            a grid, whose tokens are ``N``. A grid's tokens lie in the order that it names.
        mask: ``[B, N]`` key mask, True = attend: bool, or integers that are only 0 and 1. Masked
            tokens still query, and their values must be finite. A query whose keys are all masked
            gets 0, and passes no gradient.
        scale: factor on the scores; ``1 / sqrt(D)`` if None.
        backend: ``"auto"`` or a name from ``skiparse.list_backends()``.

    Returns:
        ``[B, N, H, D]``, contiguous, in the dtype of ``q``.

    Raises:
        ValueError: for arguments that do not fit together, before any work.
        RuntimeError: if the backend cannot do this, with its reason.

    Source: Open-Sora Plan v1.3 report, "Skiparse attention"; for grids OSP-Next, arXiv 2605.28691.
    """
    return attention_with_lse(q, k, v, pattern, mask=mask, scale=scale, backend=backend)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SkipPattern | GridPattern,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`attention`, and the log-sum-exp of each query's scores.

    Two attentions of the same queries over different keys can be merged by it.

    Returns:
        ``out [B, N, H, D]`` and ``lse [B, H, N]``: natural logarithm, fp32 (fp64 for fp64
        inputs), -inf where every key is masked. Both are differentiable, so what is merged may be
        trained; library backends compute the gradient of ``lse`` by two more calls.

    Raises:
        ValueError, RuntimeError: as :func:`attention`.
    """
    video = {"q": q, "k": k, "v": v}
    out, _, lse, _ = _attend(video, {}, pattern, mask, None, scale, backend)
    return out, lse


def joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor | None,
    text_k: Tensor | None,
    text_v: Tensor | None,
    pattern: SkipPattern | GridPattern,
    *,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Skiparse attention of video and text together, as in an MMDiT block.

    Every sub-sequence of the video also sees all the text. A text token attends once in every
    sub-sequence (over its video and all the text), and its output is the mean of those.

    Args:
        q, k, v: ``[B, N, H, D]``, the video; as for :func:`attention`.
        text_q, text_k, text_v: ``[B, T, H, D]``, any ``T``, 0 included; dtype and device of ``q``.
            With ``text_q`` None the text has keys and values alone: no text rows are computed.
        pattern: as for :func:`attention`.
        mask: ``[B, N]`` key mask of the video, True = attend; as for :func:`attention`.
        text_mask: ``[B, T]`` key mask of the text, likewise.
        scale, backend: as for :func:`attention`.

    Returns:
        ``out [B, N, H, D]`` and ``text_out [B, T, H, D]``; without queries ``[B, 0, H, D]``.

    Raises:
        ValueError, RuntimeError: as :func:`attention`; also if the text is given in part.

    Source: Open-Sora Plan v1.5 report, "SUV".
    """
    if text_k is None or text_v is None:
        given = {"text_q": text_q, "text_k": text_k, "text_v": text_v}
        missing = [name for name, x in given.items() if x is None]
        raise ValueError(
            f"{', '.join(missing)} is None; give text_q, text_k and text_v together, or text_k and "
            "text_v for keys without queries, or call skiparse.attention for video alone"
        )
    video = {"q": q, "k": k, "v": v}
    text = {"text_k": text_k, "text_v": text_v}
    if text_q is not None:
        text = {"text_q": text_q, **text}
    out, text_out, _, _ = _attend(video, text, pattern, mask, text_mask, scale, backend)
    return out, text_out.mean(1)


def _attend(
    video: dict[str, Tensor],
    text: dict[str, Tensor],
    pattern: SkipPattern | GridPattern,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns for these, once they are checked.

    ``text`` may be empty, or keys and values alone.
    """
    scale = _check(video, text, pattern, scale, backend)
    q = video["q"]
    B, N, H, D = q.shape
    empty = q.new_empty(B, 0, H, D)
    texts = [text.get(name, empty) for name in ("text_q", "text_k", "text_v")]
    mask = _check_mask("mask", mask, (B, N), q)
    text_mask = _check_mask("text_mask", text_mask, (B, texts[1].shape[1]), q)
    sparsity, run, *grid = pattern.numbers
    found: tuple[Tensor, Tensor, Tensor, Tensor] = ops.call(
        *video.values(), *texts, mask, text_mask, sparsity, run, scale, backend, grid or None
    )
    return found


def _check(
    video: dict[str, Tensor],
    text: dict[str, Tensor],
    pattern: SkipPattern | GridPattern,
    scale: float | None,
    backend: str,
) -> float:
    """Raise ValueError for what does not fit together; else the scale to use."""
    both = (*video.items(), *text.items())
    for name, x in both:
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor [batch, tokens, heads, dim], got {x!r}")
        if x.is_nested or x.layout != torch.strided:
            kind = "nested" if x.is_nested else str(x.layout)
            raise ValueError(
                f"{name} must be a dense tensor, got a {kind} one; pad it, or call x.to_dense()"
            )
        if x.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [batch, tokens, heads, dim], got {list(x.shape)}"
            )
    if not isinstance(pattern, SkipPattern | GridPattern):
        raise ValueError(
            "pattern must be a SkipPattern or a GridPattern, "
            f"got {pattern!r}; try SkipPattern.single(4)"
        )
    q = video["q"]
    dtype = ops.autocast_dtype(q)
    if dtype not in _DTYPES:
        raise ValueError(f"q must be fp64, fp32, bf16 or fp16, got {q.dtype}; convert it")
    for name, x in both:
        if x.dtype != q.dtype and ops.autocast_dtype(x) != dtype:
            raise ValueError(f"{name} is {x.dtype} but q is {q.dtype}; convert one to the other")
        _check_device(name, x, q)
    shape: Sequence[int] = q.shape
    for name, x in video.items():
        if x.shape != shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)} but q has {list(shape)}; they must be equal"
            )
    B, _, H, D = shape
    if D < 1:
        raise ValueError(f"q has head dimension {D}; it must be at least 1")
    if isinstance(pattern, GridPattern):
        pattern.check_tokens(q.shape[1])
    first = next(iter(text), "")
    expected = (B, text[first].shape[1], H, D) if text else ()
    for name, x in text.items():
        if x.shape != expected:
            raise ValueError(
                f"{name} has shape {list(x.shape)}, expected {list(expected)}: the batch, heads "
                f"and dim of q and the length of {first}"
            )
    registry.check_name(backend)
    if scale is None:
        return D**-0.5
    # Compared, not asked whether it is finite: torch.compile follows that for any number.
    if (
        isinstance(scale, bool)
        or not isinstance(scale, int | float)
        or not -sys.float_info.max <= scale <= sys.float_info.max
    ):
        raise ValueError(f"scale must be a finite number, got {scale!r}; None means 1/sqrt(dim)")
    return float(scale)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move one to the other")


def key_mask(mask: Tensor, name: str = "mask") -> Tensor:
    """A key mask as the kernels take it, from what people have; True = attend.

    Args:
        mask: bool, returned as it is; or integers that are only 0 and 1, as tokenizers give
            them. Their values are looked at, for which the host waits for a GPU.
        name: for the error.

    Returns:
        A bool tensor of the same shape.

    Raises:
        ValueError: for anything else. An additive mask, in which 0 keeps a token, has the
            opposite meaning of a mask of numbers, so neither is guessed.
    """
    what = f"{name} must be bool, or integers that are only 0 and 1 (True or 1 = attend)"
    if not isinstance(mask, Tensor):
        raise ValueError(f"{what}, got {mask!r}")
    if mask.dtype == torch.bool:
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise ValueError(
            f"{what}, got {mask.dtype}; of an additive mask (0 = keep) pass {name} == 0, of one "
            f"with 1 = keep {name} == 1"
        )
    flags = mask == 1
    sound = (flags | (mask == 0)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(sound, f"{what}; of an image of 0 and 255 pass {name} > 0")
    elif not sound:
        raise ValueError(
            f"{what}, got values from {mask.min()} to {mask.max()}; of an image of 0 and 255 pass "
            f"{name} > 0, of an additive mask (0 = keep) {name} == 0"
        )
    return flags


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int], q: Tensor) -> Tensor | None:
    """The mask as bool; ValueError if it is none of these keys."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.shape != shape:
        raise ValueError(
            f"{name} has shape {list(mask.shape)}, expected {list(shape)}: one flag per key token"
        )
    mask = key_mask(mask, name)
    _check_device(name, mask, q)
    return mask
