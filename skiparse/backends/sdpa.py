"""Skiparse attention through PyTorch's own kernels, copying only where no view exists.

A sub-sequence is an ordinary attention problem; the work is to show all of them to one library
call. They become either extra *heads* or extra *batch* entries of it:

==========================  ==========================================================
tokens                      what the library kernel gets
==========================  ==========================================================
single-skip (``w = 1``)     a view: sub-sequences as heads, or as batch entries
blocks (``w = N / n``)      a view: sub-sequences as batch entries
other runs, or any text     one packed buffer per tensor
==========================  ==========================================================

Strides that allow neither view (a batch of slices of a packed qkv, say) cost one call for each
batch entry, still without a copy. A length that does not divide leaves at most three groups of
equally long sub-sequences, one call each: no padding, and no mask unless the caller gave one. On a
CPU packed buffers are small, for a few sub-sequences at a time: fresh memory costs more than the
copy into it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs
from skiparse.pattern import Box, Segment

aten = torch.ops.aten


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
    return None


def forward(inputs: Inputs) -> Outputs:
    """Library calls over groups of equally long sub-sequences."""
    q, n = inputs.q, inputs.pattern.sparsity
    (B, N, H, D), T = q.shape, inputs.text_q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    out: Tensor | None = None
    text_out = q.new_empty(B, n, T, H, D)
    lse = q.new_empty(B, H, N, dtype=wide)
    text_lse = q.new_empty(B, H, n, T, dtype=wide)

    for call in _calls(inputs, tile=256, per_thread=16):
        here, subs, L = call.batch, call.subs, call.segment.length
        bias, dead = call.key_masks(inputs, q.dtype)
        folded, folded_lse = _attend(*call.operands(inputs, q.dtype), bias, inputs.scale)
        rows, row_lse = call.unfold(folded), call.unfold(folded_lse.unsqueeze(-1))
        if dead is not None:
            rows = rows.masked_fill(dead, 0)
            row_lse = row_lse.masked_fill(dead, -torch.inf)
        whole = call.natural_order(rows, q.shape)
        if whole is not None:
            out = whole
        else:
            out = q.new_empty(q.shape) if out is None else out
            call.write(rows, out)
        call.write(row_lse, lse.transpose(1, 2).unsqueeze(-1))
        text_out[here, subs] = rows[:, :, L:]
        text_lse[here, :, subs] = row_lse[:, :, L:].squeeze(-1).permute(0, 3, 1, 2)
    return Outputs(q.new_empty(q.shape) if out is None else out, text_out, lse, text_lse)


def backward(
    inputs: Inputs, outputs: Outputs, grad_out: Tensor, grad_text_out: Tensor
) -> Gradients:
    """The library's backward over the same calls; text gradients summed over sub-sequences.

    On a CPU half precision is computed in fp32: the native half backward is 5 to 10 times slower.
    """
    q, n = inputs.q, inputs.pattern.sparsity
    (B, _, H, D), T = q.shape, inputs.text_q.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    dtype = wide if q.device.type == "cpu" else q.dtype
    video = [q.new_empty(q.shape) for _ in range(3)]
    text = [q.new_empty(B, n, T, H, D, dtype=dtype) for _ in range(3)]

    for call in _calls(inputs, tile=None, per_thread=4):
        here, subs, L = call.batch, call.subs, call.segment.length
        query, key, value = call.operands(inputs, dtype)
        bias, dead = call.key_masks(inputs, dtype)
        folded_out = call.fold(outputs.out, outputs.text_out[here, subs], dtype)
        folded_grad = call.fold(grad_out, grad_text_out[here, subs], dtype)
        folded_lse = call.fold(
            outputs.lse.transpose(1, 2).unsqueeze(-1),
            outputs.text_lse[here, :, subs].permute(0, 2, 3, 1).unsqueeze(-1),
            wide,
        )
        if dead is not None:  # exp(-inf - 0) is 0, no gradient; exp(-inf + inf) would be NaN
            folded_lse = folded_lse.masked_fill(folded_lse == -torch.inf, 0)
        grads = _attend_backward(
            folded_grad, query, key, value, bias, folded_out, folded_lse.squeeze(-1), inputs.scale
        )
        for whole, parts, folded in zip(video, text, grads, strict=True):
            rows = call.unfold(folded)
            call.write(rows, whole)
            parts[here, subs] = rows[:, :, L:]
    return Gradients(*video, *(x.sum(1, dtype=wide).to(q.dtype) for x in text))


# From sub-sequences to the [batch, heads, rows, D] of a library kernel, and back. The "rows" of a
# sub-sequence are its L video tokens, then the T text tokens: [B, S, L + T, H, D] for S of them.


@dataclass(frozen=True)
class _Call:
    """One library call: some batch entries, and neighbouring sub-sequences of equal length."""

    batch: slice
    segment: Segment
    as_heads: bool  # sub-sequences become heads, else batch entries
    is_whole: bool  # there is no other call

    @property
    def subs(self) -> slice:
        return slice(self.segment.first, self.segment.first + self.segment.number)

    def operands(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each ``[batch, heads, rows, D]``."""

        def operand(video: Tensor, text: Tensor) -> Tensor:
            copies = text[self.batch, None].expand(-1, self.segment.number, -1, -1, -1)
            return self.fold(video, copies, dtype)

        return (
            operand(inputs.q, inputs.text_q),
            operand(inputs.k, inputs.text_k),
            operand(inputs.v, inputs.text_v),
        )

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
            _tokens(video[self.batch], box).copy_(_rows_of(rows, box))

    def natural_order(self, rows: Tensor, shape: torch.Size) -> Tensor | None:
        """The video part of ``[B, S, rows, H, D]`` as ``[B, N, H, D]`` if it lies in that order."""
        boxes, L = self.segment.boxes, self.segment.length
        if not self.is_whole or len(boxes) != 1:
            return None
        _, runs, width = boxes[0].shape
        if width == 1:  # the sub-sequences' first tokens, their second tokens, ...
            tokens = rows[:, :, :L].transpose(1, 2)
        elif runs == 1:  # the first sub-sequence, the second one, ...
            tokens = rows[:, :, :L]
        else:
            return None
        return tokens.view(shape) if tokens.is_contiguous() else None

    def key_masks(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The key masks as 0 or -inf, ``[batch, heads or 1, 1, rows]``, and who has no key left.

        That is a bool ``[B, S, 1, 1, 1]``. Both are None if the caller gave no mask.
        """
        if inputs.mask is None and inputs.text_mask is None:
            return None, None
        (B, N, H, _), T = inputs.q.shape, inputs.text_q.shape[1]
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
        (_, S, L, boxes), T = self.segment, text.shape[2]
        if T == 0 and dtype == video.dtype and _one_stride(self.segment):
            return _tokens(video, boxes[0]).flatten(2, 3)
        B, _, H, D = video.shape
        if self.as_heads:
            rows = video.new_empty(B, L + T, S, H, D, dtype=dtype).transpose(1, 2)
        else:
            rows = video.new_empty(B, S, L + T, H, D, dtype=dtype)
        for box in boxes:
            _rows_of(rows, box).copy_(_tokens(video, box))
        rows[:, :, L:] = text
        return rows


def _calls(inputs: Inputs, *, tile: int | None, per_thread: int) -> Iterator[_Call]:
    """The library calls that make up one problem; none for rows that do not exist.

    On a CPU the kernel gives a thread ``tile`` rows of a head at a time, or all if None; a call
    should have ``per_thread`` such tasks for every thread, so that they end together.
    """
    B, N, H, _ = inputs.q.shape
    T, pattern = inputs.text_q.shape[1], inputs.pattern
    if B * H == 0:
        return
    for segment in pattern.segments(N):
        if segment.length + T == 0:
            continue
        is_whole = segment.number == pattern.sparsity
        if T > 0 or not _one_stride(segment):
            if inputs.q.device.type == "cpu":
                tasks = -(-(segment.length + T) // tile) if tile else 1  # of one head
                parts = segment.split(-(-per_thread * torch.get_num_threads() // (B * H * tasks)))
                for part in parts:
                    yield _Call(slice(None), part, False, is_whole and len(parts) == 1)
            else:
                yield _Call(slice(None), segment, pattern.run == 1, is_whole)
            continue
        views = [_tokens(x, segment.boxes[0]) for x in (inputs.q, inputs.k, inputs.v)]
        if all(_merges(x, 1, 4) for x in views) and pattern.run == 1:
            yield _Call(slice(None), segment, True, is_whole)
        elif all(_merges(x, 0, 1) for x in views):
            yield _Call(slice(None), segment, False, is_whole)
        else:
            for b in range(B):
                yield _Call(slice(b, b + 1), segment, False, is_whole and B == 1)


def _one_stride(segment: Segment) -> bool:
    """Whether the tokens of each sub-sequence are evenly spaced."""
    return len(segment.boxes) == 1 and 1 in segment.boxes[0].shape[1:]


def _merges(x: Tensor, outer: int, inner: int) -> bool:
    """Whether dimensions ``outer`` and ``inner`` can be viewed as one."""
    return (
        x.shape[outer] == 1
        or x.shape[inner] == 1
        or x.stride(outer) == x.shape[inner] * x.stride(inner)
    )


def _tokens(video: Tensor, box: Box) -> Tensor:
    """The tokens of a box: the view ``[B, S, runs, tokens, H, D]`` of ``[B, N, H, D]``."""
    step = video.stride(1)
    return video.as_strided(
        (video.shape[0], *box.shape, *video.shape[2:]),
        (video.stride(0), *(step * stride for stride in box.strides), *video.stride()[2:]),
        video.storage_offset() + step * box.start,
    )


def _rows_of(rows: Tensor, box: Box) -> Tensor:
    """The same tokens of ``[B, S, rows, H, D]``, viewed as :func:`_tokens` does."""
    _, runs, width = box.shape
    return rows[:, :, box.first : box.first + runs * width].unflatten(2, (runs, width))


# The library kernels: [batch, heads, rows, D] in, the same and its log-sum-exp [batch, heads, rows]
# out. The operators under torch's SDPA are called directly, for the log-sum-exp.


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    if _cudnn_takes(query, key, value):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, scale=scale
        )
        return out, lse.reshape(out.shape[:3])
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return out, lse


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.contiguous()
    if query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    rows, keys = query.shape[2], key.shape[2]
    no_seed = torch.empty(0, dtype=torch.uint64, device=query.device)  # there is no dropout
    # cuDNN's backward is faster and not deterministic; flash's follows torch's own switch.
    deterministic = torch.are_deterministic_algorithms_enabled()
    if _cudnn_takes(query, key, value) and not deterministic:
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, lse.unsqueeze(-1), no_seed, no_seed,
            None, None, None, rows, keys, 0.0, False, scale=scale,
        )  # fmt: skip
    return aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, None, None, rows, keys, 0.0, False, no_seed, no_seed,
        scale=scale,
    )  # fmt: skip


def _cudnn_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """cuDNN comes first: torch's own order prefers flash, which is about half as fast on Hopper."""
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)
