"""Skiparse attention through PyTorch's own kernels, copying only where no view exists.

A sub-sequence is an ordinary attention problem; the work is to show all of them to one library
call. They become either extra *heads* or extra *batch* entries of it:

=============================  =======================================================
tokens                         what the library kernel gets
=============================  =======================================================
single-skip (``w = 1``)        a view: sub-sequences as heads, or as batch entries
blocks (``w = N / n``)         a view: sub-sequences as batch entries
blocks of several lengths      a view for each length
other runs, grids, any text    one packed buffer per tensor
=============================  =======================================================

Strides that allow neither view (a batch of slices of a packed qkv, say) cost one call for each
batch entry, still without a copy. Strides that the library can't read cost a copy: those that are
no multiples of 16 bytes, and 0, of an expanded tensor, for all CUDA libraries but FlashAttention 2.
A length that does not divide leaves a few groups of equally long sub-sequences, one call
each: no padding, and no mask unless the caller gave one. What is more than a CUDA library can count
(``GRID``, ``PADDED``) goes to it in several calls. On a CPU packed buffers are small, for a few
sub-sequences at a time: fresh memory costs more than the copy into it.

Which library runs a call is the first of ``LIBRARIES`` that takes it. The order is ours, not that
of torch, whose own prefers a kernel half as fast on Hopper; torch's switches (``sdpa_kernel``,
``torch.backends.cuda.enable_cudnn_sdp``, ``enable_flash_sdp``) are obeyed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs, rows_of, tokens_of, with_lse_gradients
from skiparse.pattern import Pattern, Segment, SkipPattern

aten = torch.ops.aten

# Where library kernels end. Ours are smaller calls before that, and a reason where one can't be.
GRID = 65_535  # heads, or batch entries, of a call: a CUDA grid's y and z (pytorch#146704, #181235)
PADDED = 2**31 - 1  # numbers in FlashAttention 2's gradient of q, which it counts in 32 bits


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """It takes a CPU, or a CUDA device in half precision without key masks; head_dim to 256."""
    if inputs is None:
        return None
    q, D = inputs.q, inputs.q.shape[-1]
    if q.device.type not in ("cpu", "cuda"):
        return f'library kernels are known for "cpu" and "cuda" tensors, not "{q.device.type}"'
    if D > 256:
        return f"the library kernels take a head dimension up to 256, not {D}"
    if q.device.type == "cpu":
        return None
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA library kernels take fp16 and bf16, not {q.dtype}"
    if inputs.mask is not None or inputs.text_mask is not None:
        return "the CUDA library kernels take no key masks"
    if D % 8:
        return f"the CUDA library kernels take a head dimension that is a multiple of 8, not {D}"
    row = q.new_empty(D)
    for shapes in {call.shapes(inputs) for call in _calls(inputs, backward=backward)}:
        query, key = (row.expand(*shape, D) for shape in shapes)  # no memory: the shape is asked
        library, reasons = _choose((query, key, key), backward)
        if library is None:
            return f"no library takes rows {list(key.shape)}: {reasons}"
    return None


def forward(inputs: Inputs) -> Outputs:
    """Library calls over groups of equally long sub-sequences."""
    q, n = inputs.q, inputs.pattern.sparsity
    (B, N, H, D), Q = q.shape, inputs.text_q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out: Tensor | None = None
    text_out = q.new_empty(B, n, Q, H, D)
    lse = q.new_empty(B, H, N, dtype=wide)
    text_lse = q.new_empty(B, H, n, Q, dtype=wide)

    for call in _calls(inputs, backward=False):
        bias, dead = call.key_masks(inputs, q.dtype)
        query, key, value = call.operands(inputs, q.dtype, bias)
        folded, folded_lse = _attend(query, key, value, bias, inputs.scale)
        rows, row_lse = call.unfold(folded), call.unfold(folded_lse.unsqueeze(-1))
        if dead is not None:
            rows = rows.masked_fill(dead, 0)
            row_lse = row_lse.masked_fill(dead, -torch.inf)
        out = call.into(out, rows, q)
        call.write(row_lse, lse.transpose(1, 2).unsqueeze(-1))
        call.write_text(rows, text_out)
        call.write_text(row_lse, text_lse.permute(0, 2, 3, 1).unsqueeze(-1))
    return Outputs(q.new_empty(q.shape) if out is None else out, text_out, lse, text_lse)


def backward(
    inputs: Inputs,
    outputs: Outputs,
    grad_out: Tensor,
    grad_text_out: Tensor,
    grad_lse: Tensor | None = None,
    grad_text_lse: Tensor | None = None,
) -> Gradients:
    """The library's backward, and two more calls if the log-sum-exps have gradients."""
    grads = _backward(inputs, outputs, grad_out, grad_text_out)
    return with_lse_gradients(forward, _backward, inputs, outputs, grads, grad_lse, grad_text_lse)


def _backward(
    inputs: Inputs, outputs: Outputs, grad_out: Tensor, grad_text_out: Tensor
) -> Gradients:
    """The library's backward over the same calls; text gradients summed over sub-sequences.

    On a CPU half precision is computed in fp32: the native half backward is 5 to 10 times slower.
    """
    q, n = inputs.q, inputs.pattern.sparsity
    B, _, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = wide if q.device.type == "cpu" else q.dtype
    video: list[Tensor | None] = [None, None, None]
    texts = (inputs.text_q, inputs.text_k, inputs.text_v)
    queries = inputs.text_q.shape[1] == inputs.text_k.shape[1]
    new = q.new_empty if queries else q.new_zeros  # for keys in a sub-sequence without any query
    text = [new(B, n, x.shape[1], H, D, dtype=dtype) for x in texts]

    for call in _calls(inputs, backward=True):
        bias, dead = call.key_masks(inputs, dtype)
        query, key, value = call.operands(inputs, dtype, bias)
        folded_out = call.fold(outputs.out, call.read_text(outputs.text_out), dtype)
        folded_grad = call.fold(grad_out, call.read_text(grad_text_out), dtype)
        folded_lse = call.fold(
            outputs.lse.transpose(1, 2).unsqueeze(-1),
            call.read_text(outputs.text_lse.permute(0, 2, 3, 1)).unsqueeze(-1),
            wide,
        )
        if dead is not None:  # exp(-inf - 0) is 0, no gradient; exp(-inf + inf) would be NaN
            folded_lse = folded_lse.masked_fill(folded_lse == -torch.inf, 0)
        grads = _attend_backward(
            folded_grad, query, key, value, bias, folded_out, folded_lse.squeeze(-1), inputs.scale
        )
        for i, (parts, folded) in enumerate(zip(text, grads, strict=True)):
            rows = call.unfold(folded)
            video[i] = call.into(video[i], rows, q)
            call.write_text(rows, parts)
    return Gradients(
        *(q.new_empty(q.shape) if x is None else x for x in video),
        *(x.sum(1, dtype=wide).to(q.dtype) for x in text),
    )


# From sub-sequences to the [batch, heads, rows, D] of a library kernel, and back. The "rows" of a
# sub-sequence are its L video tokens, then the text tokens: [B, S, L + T, H, D] for S of them.


@dataclass(frozen=True)
class _Call:
    """One library call: some batch entries, and some sub-sequences of equal length."""

    batch: slice
    segment: Segment
    as_heads: bool  # sub-sequences become heads, else batch entries
    is_whole: bool  # there is no other call

    def shapes(self, inputs: Inputs) -> tuple[tuple[int, int, int], ...]:
        """Batch entries, heads and rows of the query, and of key and value."""
        S, H = self.segment.number, inputs.q.shape[2]
        entries = self.batch.stop - self.batch.start
        batch, heads = (entries, S * H) if self.as_heads else (entries * S, H)
        texts = inputs.text_q, inputs.text_k
        return tuple((batch, heads, self.segment.length + x.shape[1]) for x in texts)

    def operands(
        self, inputs: Inputs, dtype: torch.dtype, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each ``[batch, heads, rows, D]``.

        Keys and values that ``bias`` hides are 0: what lies there may be large, and a kernel that
        adds -inf to an infinite score, or multiplies by a weight of 0, would give NaN.
        """

        def operand(video: Tensor, text: Tensor) -> Tensor:
            copies = text[self.batch, None].expand(-1, self.segment.number, -1, -1, -1)
            return self.fold(video, copies, dtype)

        query = operand(inputs.q, inputs.text_q)
        key, value = operand(inputs.k, inputs.text_k), operand(inputs.v, inputs.text_v)
        if bias is not None:
            hidden = bias.mT == -torch.inf
            key, value = key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
        return query, key, value

    def fold(self, video: Tensor, text: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, N, H, D]`` and ``[B, S, T, H, D]`` as ``[batch, heads, rows, D]``."""
        rows = self._rows(video[self.batch], text, dtype)
        if self.as_heads:
            return rows.transpose(1, 2).flatten(2, 3).transpose(1, 2)
        return rows.flatten(0, 1).transpose(1, 2)

    def unfold(self, folded: Tensor) -> Tensor:
        """``[batch, heads, rows, D]`` as the view ``[B, S, rows, H, D]``."""
        S = self.segment.number
        if self.as_heads:
            return folded.unflatten(1, (S, folded.shape[1] // S)).transpose(2, 3)
        return folded.unflatten(0, (folded.shape[0] // S, S)).transpose(2, 3)

    def write(self, rows: Tensor, video: Tensor) -> None:
        """Put the video part of ``[B, S, rows, H, D]`` back into ``[B, N, H, D]``."""
        for box in self.segment.boxes:
            tokens_of(video[self.batch], box).copy_(rows_of(rows, box))

    def read_text(self, text: Tensor) -> Tensor:
        """The part ``[B, S, T, ...]`` of all sub-sequences' ``[B, n, T, ...]``."""
        parts = [text[self.batch, subs] for subs in self.segment.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def write_text(self, rows: Tensor, text: Tensor) -> None:
        """Put the text part of ``[B, S, rows, H, D]`` into ``[B, n, T, H, D]``."""
        first, L = 0, self.segment.length
        for subs in self.segment.slices:
            number = subs.stop - subs.start
            text[self.batch, subs] = rows[:, first : first + number, L:]
            first += number

    def into(self, video: Tensor | None, rows: Tensor, like: Tensor) -> Tensor:
        """``video`` with the video part of ``rows`` in it; made, like ``like``, if it is None."""
        whole = self.natural_order(rows, like.shape)
        if whole is not None and whole.dtype == like.dtype:
            return whole
        video = like.new_empty(like.shape) if video is None else video
        self.write(rows, video)
        return video

    def natural_order(self, rows: Tensor, shape: torch.Size) -> Tensor | None:
        """The video part of ``[B, S, rows, H, D]`` as ``[B, N, H, D]`` if it lies in that order."""
        boxes, L = self.segment.boxes, self.segment.length
        if not self.is_whole or len(boxes) != 1:
            return None
        subs, *_ = boxes[0].strides
        if not _one_stride(self.segment):
            return None
        tokens = rows[:, :, :L]  # the first sub-sequence, the second one, ...
        if subs == 1:  # the sub-sequences' first tokens, their second tokens, ...
            tokens = tokens.transpose(1, 2)
        return tokens.view(shape) if tokens.is_contiguous() else None

    def key_masks(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The key masks as 0 or -inf, ``[batch, heads or 1, 1, rows]``, and who has no key left.

        That is a bool ``[B, S, 1, 1, 1]``. Both are None if the caller gave no mask.
        """
        if inputs.mask is None and inputs.text_mask is None:
            return None, None
        (B, N, H, _), T = inputs.q.shape, inputs.text_k.shape[1]
        everything = inputs.q.new_ones(1, dtype=torch.bool)
        mask = everything.expand(B, N) if inputs.mask is None else inputs.mask
        text_mask = everything.expand(B, T) if inputs.text_mask is None else inputs.text_mask
        rows = self._rows(
            mask[self.batch, :, None, None],
            text_mask[self.batch, None, :, None, None].expand(-1, self.segment.number, -1, -1, -1),
            torch.bool,
        )  # [B, S, rows, 1, 1]
        bias = torch.zeros_like(rows, dtype=dtype).masked_fill_(~rows, -torch.inf).squeeze(-1)
        if self.as_heads:
            bias = bias.expand(-1, -1, -1, H).transpose(2, 3).flatten(1, 2).unsqueeze(2)
        else:
            bias = bias.flatten(0, 1).permute(0, 2, 1).unsqueeze(1)
        # A kernel that finds the last stride other than 1 would expand it to rows x rows first.
        return bias.contiguous(), ~rows.any(2, keepdim=True)

    def _rows(self, video: Tensor, text: Tensor, dtype: torch.dtype) -> Tensor:
        """``[B, N, H, D]`` and ``[B, S, T, H, D]`` as ``[B, S, rows, H, D]``: view or buffer."""
        (_, L, boxes), S, T = self.segment, self.segment.number, text.shape[2]
        if T == 0 and dtype == video.dtype and _one_stride(self.segment):
            return tokens_of(video, boxes[0]).flatten(2, len(boxes[0].shape))
        B, _, H, D = video.shape
        if self.as_heads:
            rows = video.new_empty(B, L + T, S, H, D, dtype=dtype).transpose(1, 2)
        else:
            rows = video.new_empty(B, S, L + T, H, D, dtype=dtype)
        for box in boxes:
            rows_of(rows, box).copy_(tokens_of(video, box))
        rows[:, :, L:] = text
        return rows


def _calls(inputs: Inputs, *, backward: bool) -> Iterator[_Call]:
    """The library calls that make up one problem; none for rows that do not exist.

    None is larger than ``GRID`` and ``PADDED`` allow, if a sub-sequence of a batch entry is not.
    On a CPU a call has some tasks for every thread, so that they end together: a task is 256 rows
    of a head forward, all rows backward.
    """
    (B, N, H, D), T = inputs.q.shape, inputs.text_k.shape[1]
    if B * H == 0:
        return
    for segment in inputs.pattern.segments(N):
        rows = segment.length + inputs.text_q.shape[1]
        if rows == 0:
            continue
        entries, subs = B, segment.number  # of a call, at most
        as_heads = _interleaved(inputs.pattern)
        if T > 0 or not _one_stride(segment):
            if inputs.q.device.type == "cpu":
                as_heads = False
                tasks, per_thread = (1, 4) if backward else (-(-rows // 256), 16)  # tasks of a head
                subs = -(-per_thread * torch.get_num_threads() // (B * H * tasks))
        else:
            views = [tokens_of(x, segment.boxes[0]) for x in (inputs.q, inputs.k, inputs.v)]
            as_heads = as_heads and all(_merges(x, 1, 4) for x in views)
            if not as_heads and not all(_merges(x, 0, 1) for x in views):
                entries = 1
        pairs = PADDED // _padded(H, rows, D) if backward else B * subs  # sub-sequences of entries
        pairs = max(pairs if as_heads else min(pairs, GRID), 1)
        subs = max(min(subs, segment.number, pairs, GRID // H if as_heads else GRID), 1)
        entries = min(entries, pairs // subs, GRID)
        parts = segment.split(subs)
        is_whole = entries == B and len(parts) == 1 and segment.number == inputs.pattern.sparsity
        for b in range(0, B, entries):
            for part in parts:
                yield _Call(slice(b, min(b + entries, B)), part, as_heads, is_whole)


def _padded(heads: int, rows: int, D: int) -> int:
    """Numbers in the gradient of q that FlashAttention 2 sums up in fp32, or some more."""
    return heads * -(-rows // 128) * 128 * -(-D // 64) * 64


def _interleaved(pattern: Pattern) -> bool:
    """Whether neighbouring tokens are of neighbouring sub-sequences."""
    return isinstance(pattern, SkipPattern) and pattern.run == 1


def _one_stride(segment: Segment) -> bool:
    """Whether the tokens of each sub-sequence are evenly spaced."""
    return len(segment.boxes) == 1 and sum(size > 1 for size in segment.boxes[0].shape[1:]) <= 1


def _merges(x: Tensor, outer: int, inner: int) -> bool:
    """Whether dimensions ``outer`` and ``inner`` can be viewed as one."""
    return (
        x.shape[outer] == 1
        or x.shape[inner] == 1
        or x.stride(outer) == x.shape[inner] * x.stride(inner)
    )


# The libraries: [batch, heads, rows, D] in, the same and its log-sum-exp [batch, heads, rows] out.
# The operators under torch's SDPA are called directly, for the log-sum-exp.


class _Sources(NamedTuple):
    """What a backward pass starts from; ``lse`` is contiguous."""

    grad: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    lse: Tensor


Three = tuple[Tensor, Tensor, Tensor]


class Library(NamedTuple):
    """One library of attention kernels; only the CPU's is given key masks, as ``bias``."""

    name: str
    why_not: Callable[[Three, bool], str | None]  # of query, key, value; True: for the backward
    forward: Callable[[Three, Tensor | None, float], tuple[Tensor, Tensor]]
    backward: Callable[[_Sources, Tensor | None, float], Three]
    reads: Callable[[Tensor], bool]  # whether it can, in these strides; the last one is 1

    def readable(self, x: Tensor) -> Tensor:
        """``x``, copied, with its rows before its heads, only if the library can't read it."""
        if self.reads(x):
            return x
        return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def _any_strides(x: Tensor) -> bool:
    return True


def _aligned(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, which wide loads need."""
    begin = (x.storage_offset(), *_steps(x))
    return all(elements * x.element_size() % 16 == 0 for elements in begin)


def _aligned_apart(x: Tensor) -> bool:
    """Besides, whether no stride is 0, as of an expanded tensor: bulk copies may not know that."""
    return _aligned(x) and 0 not in _steps(x)


def _steps(x: Tensor) -> list[int]:
    """The strides between rows, heads and batch entries, of which there are several."""
    return [x.stride(i) for i in range(3) if x.shape[i] > 1]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    operands = query, key, value
    library = _chosen(operands, False)
    query, key, value = (library.readable(x) for x in operands)
    return library.forward((query, key, value), bias, scale)


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Three:
    library = _chosen((query, key, value), True)
    rows = map(library.readable, (grad, query, key, value, out))
    return library.backward(_Sources._make((*rows, lse.contiguous())), bias, scale)


def _chosen(operands: Three, backward: bool) -> Library:
    library, reasons = _choose(operands, backward)
    if library is None:
        raise RuntimeError(f"no library takes rows {list(operands[0].shape)}: {reasons}")
    return library


def library_for(rows: Tensor, *, backward: bool = False) -> str | None:
    """The name of the library that gets ``[batch, heads, rows, D]`` like these, if one does."""
    library, _ = _choose((rows, rows, rows), backward)
    return None if library is None else library.name


def _choose(operands: Three, backward: bool) -> tuple[Library | None, str]:
    """The first library that takes this, or why none does."""
    reasons = []
    for library in LIBRARIES:
        reason = library.why_not(operands, backward)
        if reason is None:
            return library, ""
        reasons.append(f"{library.name}: {reason}")
    return None, "; ".join(reasons)


def _too_many(operands: Three) -> str | None:
    """Of what the grid of a CUDA kernel has no room for."""
    batch, heads = operands[0].shape[:2]
    if max(batch, heads) > GRID:
        return f"it takes up to {GRID} batch entries, and heads, not {batch} and {heads}"
    return None


# Determinism is what torch's own kernels make of it: under ``use_deterministic_algorithms(True)``
# what is not deterministic is refused, or told to be; with ``warn_only`` it runs, with a warning.

_REFUSE = 2  # of torch.get_deterministic_debug_mode()


def _deterministic(package: str) -> bool:
    """Whether the backward of a package is told to be, which is slower."""
    mode = torch.get_deterministic_debug_mode()
    if 0 < mode < _REFUSE:
        warnings.warn(
            f"{package} defaults to a non-deterministic algorithm. To explicitly enable "
            "determinism call torch.use_deterministic_algorithms(True, warn_only=False).",
            stacklevel=2,
        )
    return mode == _REFUSE


# Torch's own for the CPU.


def _cpu_why_not(operands: Three, backward: bool) -> str | None:
    device = operands[0].device.type
    return None if device == "cpu" else f'it is for "cpu", not "{device}"'


def _cpu(operands: Three, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *operands, attn_mask=bias, scale=scale
    )
    return out, lse


def _cpu_backward(sources: _Sources, bias: Tensor | None, scale: float) -> Three:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *sources, 0.0, False, attn_mask=bias, scale=scale
    )


# cuDNN, through torch.


def _torch_params(operands: Three, backward: bool) -> torch.backends.cuda.SDPAParams:
    """What torch decides by; some kernels have fewer shapes for the backward."""
    with torch.enable_grad():
        query, key, value = (x.detach().requires_grad_(backward) for x in operands)
        return torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)


def _asks_torch(name: str, operands: Three, backward: bool) -> str | None:
    can_use: Callable[..., bool] = getattr(torch.backends.cuda, name)
    with torch.set_grad_enabled(backward):
        if can_use(_torch_params(operands, backward)):
            return None
    return f"torch.backends.cuda.{name} says no"


def _cudnn_why_not(operands: Three, backward: bool) -> str | None:
    if backward and torch.get_deterministic_debug_mode() == _REFUSE:
        return "its backward is not deterministic"  # and has no switch: pytorch#182551
    return _too_many(operands) or _asks_torch("can_use_cudnn_attention", operands, backward)


def _cudnn(operands: Three, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = aten._scaled_dot_product_cudnn_attention(*operands, None, True, scale=scale)
    return out, lse.squeeze(-1)


def _cudnn_backward(sources: _Sources, _: Tensor | None, scale: float) -> Three:
    grad, query, key, value, out, lse = sources
    # Torch keeps plans by the strides of q, k and v alone; in the first call of a plan those of
    # the output and its gradient go in. So let them be what q's strides say, always.
    grad, out = (_laid_out_like(x, query) for x in (grad, out))
    no_seed = query.new_empty(0, dtype=torch.int64)  # there is no dropout
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse.unsqueeze(-1), no_seed, no_seed,
        None, None, None, query.shape[2], key.shape[2], 0.0, False, scale=scale,
    )  # fmt: skip


def _laid_out_like(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with the strides of ``torch.empty_like(like)``, copied only if it has others."""
    shape, stride = like.shape, torch.empty_like(like, device="meta").stride()
    same = all(a == b for a, b, size in zip(x.stride(), stride, shape, strict=True) if size > 1)
    return x if same else torch.empty_like(like).copy_(x)


# FlashAttention 2, through torch.


def _flash_why_not(operands: Three, backward: bool) -> str | None:
    batch, heads, rows, D = operands[0].shape
    numbers = batch * _padded(heads, rows, D)
    if backward and numbers > PADDED:
        return f"its backward counts up to {PADDED} padded numbers of q, not {numbers}"
    return _too_many(operands) or _asks_torch("can_use_flash_attention", operands, backward)


def _flash(operands: Three, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_rest = aten._scaled_dot_product_flash_attention(*operands, scale=scale)
    return out, lse


def _flash_backward(sources: _Sources, _: Tensor | None, scale: float) -> Three:
    query, key = sources.query, sources.key
    seed_type = torch.uint64 if torch.version.hip is None else torch.int64
    seed, offset = (query.new_empty(shape, dtype=seed_type) for shape in ((2,), ()))  # no dropout
    return aten._scaled_dot_product_flash_attention_backward(
        *sources, None, None, query.shape[2], key.shape[2], 0.0, False, seed, offset, scale=scale
    )


# FlashAttention 3 and 4: packages of their own, which take [batch, rows, heads, D]. They are called
# directly: registering them with torch would change the attention of the whole process.


def _package_why_not(
    operands: Three, module: str, head_dims: dict[int, tuple[int, ...]]
) -> str | None:
    """``head_dims`` by the major compute capability: all up to the first one, and the others."""
    query = operands[0]
    if not _is_there(module):
        return f"{module} is not installed"
    if query.device.type != "cuda" or torch.version.hip is not None:
        return "it is for NVIDIA GPUs"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "torch.backends.cuda.flash_sdp_enabled() is False"
    major, minor = torch.cuda.get_device_capability(query.device)
    if major not in head_dims:
        return f"it is for compute capability {tuple(head_dims)}, not {major}.{minor}"
    most, *others = head_dims[major]
    if query.shape[-1] > most and query.shape[-1] not in others:
        known = " or ".join(map(str, (most, *others)))
        return f"it takes a head dimension up to {known}, not {query.shape[-1]}"
    return _too_many(operands)


@functools.cache
def _is_there(module: str) -> bool:
    """Whether a module can be found, without importing the packages it lies in."""
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inner:
        return spec is not None
    places = spec.submodule_search_locations or ()
    return any(Path(place, *inner).with_suffix(".py").exists() for place in places)


def _rows_first(*tensors: Tensor) -> list[Tensor]:
    """From ``[batch, heads, rows, D]`` to ``[batch, rows, heads, D]``, or back."""
    return [x.transpose(1, 2) for x in tensors]


FA3, FA4 = "flash_attn_interface", "flash_attn.cute.interface"


def _fa3_why_not(operands: Three, backward: bool) -> str | None:
    return _package_why_not(operands, FA3, {9: (256,)})


def _fa3(operands: Three, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    # By position, which releases agree on (unlike some names): 20 optional tensors and lengths
    # stand between the operands and (scale, causal).
    out, lse, *_rest = importlib.import_module(FA3)._flash_attn_forward(
        *_rows_first(*operands), *[None] * 20, scale, False
    )
    return out.transpose(1, 2), lse


def _fa3_backward(sources: _Sources, _: Tensor | None, scale: float) -> Three:
    *rows, lse = sources
    grad, query, key, value, out = _rows_first(*rows)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    importlib.import_module(FA3)._flash_attn_backward(
        grad, query, key, value, out, lse, *[None] * 6, *grads, scale, False,
        deterministic=_deterministic("FlashAttention 3"),
    )  # fmt: skip
    dq, dk, dv = _rows_first(*grads)
    return dq, dk, dv


def _fa4_why_not(operands: Three, backward: bool) -> str | None:
    return _package_why_not(operands, FA4, {9: (256,), 10: (128, 256)})


def _fa4(operands: Three, _: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    # The output and its log-sum-exp come first; what follows them grew from release to release.
    out, lse, *_rest = importlib.import_module(FA4)._flash_attn_fwd(
        *_rows_first(*operands), softmax_scale=scale, causal=False, return_lse=True
    )
    return out.transpose(1, 2), lse


def _fa4_backward(sources: _Sources, _: Tensor | None, scale: float) -> Three:
    *rows, lse = sources
    grad, query, key, value, out = _rows_first(*rows)
    grad_q, grad_k, grad_v, *_rest = importlib.import_module(FA4)._flash_attn_bwd(
        query, key, value, out, grad, lse, softmax_scale=scale, causal=False,
        deterministic=_deterministic("FlashAttention 4"),
    )  # fmt: skip
    dq, dk, dv = _rows_first(grad_q, grad_k, grad_v)
    return dq, dk, dv


LIBRARIES = (
    Library("cpu", _cpu_why_not, _cpu, _cpu_backward, _any_strides),
    Library("cudnn", _cudnn_why_not, _cudnn, _cudnn_backward, _aligned_apart),
    Library("fa3", _fa3_why_not, _fa3, _fa3_backward, _aligned_apart),
    Library("fa4", _fa4_why_not, _fa4, _fa4_backward, _aligned_apart),
    Library("flash", _flash_why_not, _flash, _flash_backward, _aligned),
)
