"""Skiparse attention through torch_npu's ``npu_fusion_attention``, for Ascend NPUs.

Written to its public documentation (torch_npu 2.13), and tested on a CPU against a fake of it. Has
never run on an NPU.

A sub-sequence is an ordinary attention problem, and equally long ones are one library call, of
which there are at most three:

=============================  =======================================================
tokens                         what the library gets
=============================  =======================================================
single-skip (``w = 1``)        layout BSND: a view, sub-sequences as heads
blocks (``w = N / n``)         layout BSND: a view, sub-sequences as batch entries
grids in natural order         none: put the tokens in another order
other runs, lengths, or text   layout BSND: one packed copy of each tensor
key masks                      layout TND: packed, hidden keys left out, with lengths
=============================  =======================================================

The library's own masks are rows x rows of booleans, the more the longer the sequence; lengths are a
few numbers, but the host has to wait for them. Its maximum and sum of the softmax give the
log-sum-exp, and back: maximum = log-sum-exp with sum = 1 says the same.

Where torch_npu has it, its third variant is taken: all that it returns are tensors, and it leaves
other streams alone while a graph is captured. It takes lengths as tensors too, but of the CPU
(op-plugin refuses others), so with key masks the host waits as before, and no graph is captured.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from skiparse.backends import Gradients, Inputs, Outputs, rows_of, tokens_of, with_lse_gradients
from skiparse.pattern import GridPattern, Segment

# Limits of the library. Its documentation says 1K and 1M; the smaller reading is taken.
_HEADS, _DIM, _ROWS, _SEQUENCES = 256, 768, 1_000_000, 1000
_STATISTICS = 8  # copies of each row's maximum and sum
_CANN = (8, 3)  # from which on the statistics of packed rows come in their order


def why_not(inputs: Inputs | None = None, *, backward: bool = False) -> str | None:
    """It takes NPU tensors in fp16, bf16 or fp32; up to 256 heads and a head_dim of 768.

    Key masks need CANN 8.3.RC1 or later; where torch_npu does not say which it is, nobody checks.
    """
    if inputs is None:
        return _why_no_npu()
    q, T, n = inputs.q, inputs.text_k.shape[1], inputs.pattern.sparsity
    B, N, H, D = q.shape
    if q.device.type != "npu":
        return f'npu_fusion_attention takes "npu" tensors, not "{q.device.type}"'
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"npu_fusion_attention takes fp16, bf16 and fp32, not {q.dtype}"
    if H > _HEADS:
        return f"npu_fusion_attention takes up to {_HEADS} heads, not {H}"
    if D > _DIM:
        return f"npu_fusion_attention takes a head dimension up to {_DIM}, not {D}"
    if isinstance(inputs.pattern, GridPattern):
        return (
            "sub-sequences of a grid in natural order are more dimensions than an NPU copies; put "
            'the tokens in order "skip", or in that of the kind: skiparse.pattern.grid_order'
        )
    masked = inputs.mask is not None or inputs.text_mask is not None
    rows = max(s.length + T for s in inputs.pattern.segments(N))
    if masked:
        rows *= B * n
        if B * n > _SEQUENCES:
            return f"with key masks, up to {_SEQUENCES} sub-sequences are taken, not {B * n}"
        cann = _cann_version()
        if cann is not None and tuple(map(int, cann.split(".")[:2])) < _CANN:
            return f"key masks need CANN 8.3.RC1 or later, not {cann}"
    if rows > _ROWS:
        at_once = " in all, with key masks" if masked else ""
        return f"npu_fusion_attention takes up to {_ROWS} rows{at_once}, not {rows}"
    return None


def _why_no_npu() -> str | None:
    if not hasattr(torch, "npu"):
        if importlib.util.find_spec("torch_npu") is None:
            release = torch.__version__.split("+")[0]
            return (
                "torch_npu is not installed; on a machine with an Ascend NPU and CANN, "
                f"pip install torch_npu=={release}"
            )
        return "torch_npu is installed but not loaded; import torch_npu first"
    if not torch.npu.is_available():
        return "torch_npu finds no NPU; see `npu-smi info`, and source CANN's set_env.sh"
    return None


def _cann_version() -> str | None:
    """As torch_npu reads it where CANN is installed; None where it cannot."""
    read = getattr(getattr(_device_module(), "utils", None), "get_cann_version", None)
    found = re.match(r"\d+\.\d+.*", read() or "") if read is not None else None
    return found[0] if found else None


def _device_module() -> Any:
    """What torch_npu makes of torch when it is imported; None before."""
    return getattr(torch, "npu", None)


def forward(inputs: Inputs) -> Outputs:
    """One call of the library for each group of equally long sub-sequences."""
    q, n = inputs.q, inputs.pattern.sparsity
    (B, N, H, D), Q = q.shape, inputs.text_q.shape[1]
    out: Tensor | None = None
    text_out = q.new_empty(B, n, Q, H, D)
    lse = q.new_empty(B, H, N, dtype=torch.float32)
    text_lse = q.new_empty(B, H, n, Q, dtype=torch.float32)
    for call in _calls(inputs):
        keys = call.keys(inputs)
        folded, folded_lse = _attend(*call.operands(inputs), keys, inputs.scale)
        rows, row_lse = call.unfold(folded), call.unfold(folded_lse.unsqueeze(-1))
        if keys is not None:
            rows = rows.masked_fill(keys.none, 0)
            row_lse = row_lse.masked_fill(keys.none, -torch.inf)
        if call.is_view:
            out = folded.view(q.shape)
        else:
            out = q.new_empty(q.shape) if out is None else out
            call.write(rows, out, text_out)
        call.write(row_lse, lse.transpose(1, 2)[..., None], text_lse.permute(0, 2, 3, 1)[..., None])
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

    As reproducible as ``npu_fusion_attention_grad`` is, for which
    ``torch.use_deterministic_algorithms`` is torch_npu's switch.
    """
    q, n = inputs.q, inputs.pattern.sparsity
    B, _, H, D = q.shape
    video: list[Tensor | None] = [None, None, None]
    texts = (inputs.text_q, inputs.text_k, inputs.text_v)
    queries = inputs.text_q.shape[1] == inputs.text_k.shape[1]
    new = q.new_empty if queries else q.new_zeros  # for keys in a sub-sequence without any query
    text = [new(B, n, x.shape[1], H, D) for x in texts]
    lse, text_lse = outputs.lse.transpose(1, 2)[..., None], outputs.text_lse.permute(0, 2, 3, 1)
    for call in _calls(inputs):
        grads = _attend_backward(
            call.fold(grad_out, grad_text_out[:, call.subs]),
            *call.operands(inputs),
            call.fold(outputs.out, outputs.text_out[:, call.subs]),
            call.fold(lse, text_lse[:, call.subs, ..., None]).squeeze(-1),
            call.keys(inputs),
            inputs.scale,
        )
        for i, folded in enumerate(grads):
            if call.is_view:
                video[i] = folded.view(q.shape)
            else:
                into = video[i]
                video[i] = into = q.new_empty(q.shape) if into is None else into
                call.write(call.unfold(folded), into, text[i])
    return Gradients(
        *(q.new_empty(q.shape) if x is None else x for x in video),
        *(x.sum(1, dtype=torch.float32).to(q.dtype) for x in text),
    )


# From sub-sequences to the [batch, rows, heads, D] of a library call, and back. The "rows" of a
# sub-sequence are its L video tokens, then the text tokens.


class _Keys(NamedTuple):
    """Which of the packed rows are attended to. A sub-sequence without any keeps its first."""

    rows: Tensor  # int64, in order
    ends: list[int]  # how many of them come before the end of each sub-sequence
    none: Tensor  # [B, S, 1, 1, 1] bool: sub-sequences without a key


@dataclass(frozen=True)
class _Call:
    """One library call: neighbouring sub-sequences of equal length, of all batch entries."""

    segment: Segment
    is_view: bool  # of all tokens, without text
    as_heads: bool  # sub-sequences are heads, else batch entries

    @property
    def subs(self) -> slice:
        (subs,) = self.segment.slices
        return subs

    def operands(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, each ``[batch, rows, heads, D]``, contiguous."""

        def operand(video: Tensor, text: Tensor) -> Tensor:
            return self.fold(video, text[:, None].expand(-1, self.segment.number, -1, -1, -1))

        return (
            operand(inputs.q, inputs.text_q),
            operand(inputs.k, inputs.text_k),
            operand(inputs.v, inputs.text_v),
        )

    def fold(self, video: Tensor, text: Tensor) -> Tensor:
        """``[B, N, H, D]`` and ``[B, S, T, H, D]`` as ``[batch, rows, heads, D]``, contiguous."""
        (_, L, boxes), S = self.segment, self.segment.number
        B, _, H, D = video.shape
        if self.is_view:
            shape = (B, L, S * H, D) if self.as_heads else (B * S, L, H, D)
            return video.contiguous().view(shape)
        rows = video.new_empty(B, S, L + text.shape[2], H, D)
        for box in boxes:
            rows_of(rows, box).copy_(tokens_of(video, box))
        rows[:, :, L:] = text
        return rows.flatten(0, 1)

    def unfold(self, folded: Tensor) -> Tensor:
        """``[batch, rows, heads, D]`` as the view ``[B, S, rows, H, D]``."""
        S = self.segment.number
        if self.as_heads:
            return folded.unflatten(2, (S, folded.shape[2] // S)).movedim(2, 1)
        return folded.unflatten(0, (folded.shape[0] // S, S))

    def write(self, rows: Tensor, video: Tensor, text: Tensor) -> None:
        """Put ``[B, S, rows, H, D]`` into ``[B, N, H, D]`` and ``[B, n, T, H, D]``."""
        for box in self.segment.boxes:
            tokens_of(video, box).copy_(rows_of(rows, box))
        text[:, self.subs] = rows[:, :, self.segment.length :]

    def keys(self, inputs: Inputs) -> _Keys | None:
        """The keys that the masks leave; None if there are no masks. The host waits for it."""
        if inputs.mask is None and inputs.text_mask is None:
            return None
        (B, N, *_), T, S = inputs.q.shape, inputs.text_k.shape[1], self.segment.number
        everything = inputs.q.new_ones(1, dtype=torch.bool)
        mask = everything.expand(B, N) if inputs.mask is None else inputs.mask
        text_mask = everything.expand(B, T) if inputs.text_mask is None else inputs.text_mask
        text = text_mask[:, None, :, None, None].expand(-1, S, -1, -1, -1)
        seen = self.fold(mask[..., None, None], text).flatten(1)  # [B * S, rows]
        none = ~seen.any(1)
        seen[:, 0] |= none
        ends: list[int] = seen.sum(1).cumsum(0).tolist()
        return _Keys(seen.flatten().nonzero().squeeze(1), ends, none.view(B, S, 1, 1, 1))


def _calls(inputs: Inputs) -> Iterator[_Call]:
    """The library calls that make up one problem; none for rows that do not exist."""
    B, N, H, _ = inputs.q.shape
    T, n = inputs.text_k.shape[1], inputs.pattern.sparsity
    masked = inputs.mask is not None or inputs.text_mask is not None
    for segment in inputs.pattern.segments(N) if B * H else []:
        if segment.length + inputs.text_q.shape[1] == 0:
            continue
        whole = segment.number == n and T == 0 and not masked and len(segment.boxes) == 1
        _, runs, width = segment.boxes[0].shape if whole else (0, 0, 0)
        as_heads = whole and width == 1 and runs > 1 and n * H <= _HEADS
        yield _Call(segment, as_heads or (whole and runs == 1), as_heads)


# The library: [batch, rows, heads, D], or the same with all rows behind each other and lengths.


class _Library(NamedTuple):
    """The two operators of torch_npu, and how they take the ends of sequences."""

    attention: Any
    attention_grad: Any
    ends: Callable[[list[int]], list[int] | Tensor]


def _library() -> _Library:
    """The third variant where torch_npu has it, but on Ascend 950, which it refuses."""
    npu = torch.ops.npu
    if not hasattr(npu, "npu_fusion_attention_v3") or "950" in _device_module().get_device_name():
        return _Library(npu.npu_fusion_attention, npu.npu_fusion_attention_grad, list)
    return _Library(npu.npu_fusion_attention_v3, npu.npu_fusion_attention_grad_v3, torch.tensor)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, keys: _Keys | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output, and log-sum-exp ``[batch, rows, heads]``."""
    attention, _, ends = _library()
    batch, rows, heads, _ = query.shape
    if keys is None:
        out, largest, total, *_ = attention(query, key, value, heads, "BSND", scale=scale)
        return out, _log_sum_exp(largest, total).transpose(1, 2)
    kept = (x.flatten(0, 1)[keys.rows] for x in (key, value))
    out, largest, total, *_ = attention(
        query.flatten(0, 1), *kept, heads, "TND", scale=scale,
        actual_seq_qlen=ends(_equal_ends(batch, rows)), actual_seq_kvlen=ends(keys.ends),
        softmax_layout="TND",
    )  # fmt: skip
    lse = _log_sum_exp(largest, total).unflatten(0, (batch, rows))
    return out.unflatten(0, (batch, rows)), lse


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    keys: _Keys | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in their shapes."""
    _, attention_grad, ends = _library()
    batch, rows, heads, _ = query.shape
    # Where there was no key, exp(score - the largest number) = 0: no gradient, and no NaN.
    lse = lse.masked_fill(lse == -torch.inf, torch.finfo(lse.dtype).max)
    lse = lse.transpose(1, 2) if keys is None else lse.flatten(0, 1)
    largest = lse.unsqueeze(-1).expand(*lse.shape, _STATISTICS).contiguous()
    total = torch.ones_like(largest)
    if keys is None:
        dq, dk, dv, *_ = attention_grad(
            query, key, value, grad, heads, "BSND", scale_value=scale,
            softmax_max=largest, softmax_sum=total, attention_in=out,
        )  # fmt: skip
        return dq, dk, dv
    flat = [x.flatten(0, 1) for x in (query, key, value, grad, out)]
    dq, dk, dv, *_ = attention_grad(
        flat[0], flat[1][keys.rows], flat[2][keys.rows], flat[3], heads, "TND", scale_value=scale,
        softmax_max=largest, softmax_sum=total, attention_in=flat[4],
        actual_seq_qlen=ends(_equal_ends(batch, rows)), actual_seq_kvlen=ends(keys.ends),
        softmax_layout="TND",
    )  # fmt: skip
    dk, dv = (torch.zeros_like(flat[1]).index_copy_(0, keys.rows, x) for x in (dk, dv))
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


def _log_sum_exp(largest: Tensor, total: Tensor) -> Tensor:
    return largest[..., 0] + total[..., 0].log()


def _equal_ends(batch: int, rows: int) -> list[int]:
    return [rows * (i + 1) for i in range(batch)]
