"""Skiparse attention when several processes share the tokens of one sequence: for anybody's model.

A process owns some tokens, by a :class:`skiparse.layout.Layout`, and everything that is done token
by token needs nothing else. Two calls are all that does::

    rows = Layout.of(SkipPattern.single(k), N, processes)
    columns = Layout.of(SkipPattern.group(k), N, processes)
    x = x[:, rows.owned(rank)]                              # once, at the beginning
    x = skip_exchange(x, rows, columns, group)              # between layers of the two kinds
    out = ulysses_attention(q, k, v, pattern, columns, group)

All processes of the group make the same calls in the same order, also one that owns no tokens, in
the backward pass too: so what comes out of a call must reach the loss in every process. The loss of
a process is over the tokens that it owns, the whole loss is their sum, and so is the gradient of a
parameter: sum it over the processes. That holds for the text as well, which all of them have whole.

Everything runs on torch.distributed, in fp64, fp32, bf16 or fp16, on gloo and on NCCL. Not yet run
on GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from skiparse import functional, ops
from skiparse.layout import Layout, Meeting, Shared, moved
from skiparse.pattern import GridPattern, SkipPattern

Group = dist.ProcessGroup | DeviceMesh | None


def rank_of(group: Group) -> int:
    """Which process of the group this one is: of ``layout.owned(rank)``.

    Raises:
        ValueError: as :func:`skip_exchange`, of a group.
    """
    return dist.get_rank(_group_of(group))


@torch.compiler.disable  # tables of numbers, and collectives
def skip_exchange(
    x: Tensor, before: Layout, after: Layout, group: Group = None, *, dim: int = 1
) -> Tensor:
    """Tokens from one layout to another: one all-to-all of what changes its process.

    Move the residual stream, one vector for each token, and not q, k, v and the output. The
    backward pass moves the gradients back. A compiled model has a break in its graph here.

    Args:
        x: this process's tokens along ``dim``, in the order of ``before.owned(rank)``; any dtype.
        before, after: layouts of the same tokens, for as many processes as the group has.
        group: a process group, or a mesh of one dimension; None: all processes.
        dim: where the tokens are.

    Returns:
        A tensor like ``x`` with the tokens ``after.owned(rank)`` along ``dim``.

    Raises:
        ValueError: for a tensor, a layout or a group that do not fit, before any communication.

    Source: OSP-Next, arXiv 2605.28691, "sparse sequence parallelism".
    """
    return begin_exchange(x, before, after, group, dim=dim).end()


@dataclass(frozen=True, eq=False)
class Exchange:
    """Tokens on their way from one layout to another; :meth:`end` gives them."""

    coming: Tensor
    shape: tuple[int, ...]
    dim: int
    unpack: Tensor | None

    @torch.compiler.disable  # as above
    def end(self) -> Tensor:
        """What :func:`skip_exchange` returns; the device waits for it from here on."""
        x = self.coming.view(self.shape).transpose(0, self.dim)
        return _taken(x, self.dim, self.unpack)


@torch.compiler.disable  # as above
def begin_exchange(
    x: Tensor, before: Layout, after: Layout, group: Group = None, *, dim: int = 1
) -> Exchange:
    """:func:`skip_exchange` in two halves: what does not need the tokens is computed between them.

    On NCCL the tokens travel on a stream of its own, while the device computes on. In the backward
    pass they travel in one piece.

    Args:
        x, before, after, group, dim: as of :func:`skip_exchange`.

    Returns:
        The exchange, to be ended once, in the order in which exchanges were begun.

    Raises:
        ValueError: as :func:`skip_exchange`.
    """
    rank, group = _joined(before, group)
    switch = before.switch(after, rank)
    _check_tokens("x", x, dim, before, rank)
    pack, unpack = _index(before, after, rank, x.device)
    rows = x.transpose(0, dim)
    if moved(before, after) == 0:  # a local permutation, in every process
        return Exchange(rows, tuple(rows.shape), dim, unpack)
    rows = _taken(rows, 0, pack)
    width = rows.shape[1:].numel()
    flat = _all_to_all(
        rows.reshape(-1),
        [width * n for n in switch.sent],
        [width * n for n in switch.received],
        group,
    )
    return Exchange(flat, (sum(switch.received), *rows.shape[1:]), dim, unpack)


@torch.compiler.disable  # as above
def gather_tokens(x: Tensor, layout: Layout, group: Group = None, *, dim: int = 1) -> Tensor:
    """All tokens in natural order, in every process: what a model returns.

    If every process computes the same loss of it, the loss counts once for each process: average
    the gradients over the processes then, instead of summing them.

    Args:
        x: this process's tokens along ``dim``, in the order of ``layout.owned(rank)``; any dtype.
        layout, group: as of :func:`skip_exchange`.
        dim: where the tokens are.

    Returns:
        A tensor like ``x`` with ``layout.tokens`` tokens along ``dim``.

    Raises:
        ValueError: as :func:`skip_exchange`.
    """
    rank, group = _joined(layout, group)
    _check_tokens("x", x, dim, layout, rank)
    rows = x.transpose(0, dim)
    width = rows.shape[1:].numel()
    flat = _all_to_all(
        rows.reshape(1, -1).expand(layout.processes, -1).reshape(-1),
        [width * layout.sizes[rank]] * layout.processes,
        [width * size for size in layout.sizes],
        group,
    )
    came = flat.view(layout.tokens, *rows.shape[1:])
    return _taken(came.transpose(0, dim), dim, _natural(layout, x.device))


def total(x: Tensor, group: Group = None) -> Tensor:
    """What the processes of ``group`` hold, summed, in each of them; the same shape and dtype.

    Of sums over tokens that are shared out it makes the sum over all tokens. Its gradient is the
    sum of theirs.

    Raises:
        ValueError: if this process is not in the group.
    """
    found: Tensor = _Sum.apply(x, _group_of(group))
    return found


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Shared,
    layout: Layout,
    group: Group = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`skiparse.attention` of tokens that several processes share, in any layout.

    Where a process has its sub-sequences whole, that is a local call. Where processes share some,
    each gets all their tokens for a part of the heads, and gives the other heads of its own tokens:
    two all-to-alls. Heads need not divide evenly; a process may get none.

    Args:
        q, k, v: ``[B, n, H, D]``, this process's tokens in the order of ``layout.owned(rank)``.
        pattern: of all tokens in natural order.
        layout: whose they are.
        group: as of :func:`skip_exchange`.
        mask: ``[B, N]`` key mask of *all* tokens in natural order, the same in every process.
        scale, backend: as of :func:`skiparse.attention`.

    Returns:
        ``[B, n, H, D]``, in the order of ``q``.

    Raises:
        ValueError: for arguments that do not fit, before any communication.
        RuntimeError: if the backend cannot do this, with its reason.

    Source: DeepSpeed-Ulysses, arXiv 2309.14509.
    """
    return _attend((q, k, v), None, pattern, layout, group, mask, None, scale, backend)[0]


def ulysses_joint_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    pattern: Shared,
    layout: Layout,
    group: Group = None,
    *,
    mask: Tensor | None = None,
    text_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`skiparse.joint_attention` of tokens that several processes share.

    As :func:`ulysses_attention`. Every process has the whole text, attends with it in its own
    sub-sequences, and gets the mean over all of them by an all-reduce.

    Args:
        text_q, text_k, text_v: ``[B, T, H, D]``, the same in every process.
        text_mask: ``[B, T]`` key mask of the text, likewise.

    Returns:
        ``out [B, n, H, D]`` and ``text_out [B, T, H, D]``, the latter the same in every process.

    Raises:
        ValueError, RuntimeError: as :func:`ulysses_attention`.
    """
    text = (text_q, text_k, text_v)
    return _attend((q, k, v), text, pattern, layout, group, mask, text_mask, scale, backend)


@torch.compiler.disable  # as above
def _attend(
    video: tuple[Tensor, Tensor, Tensor],
    text: tuple[Tensor, Tensor, Tensor] | None,
    pattern: Shared,
    layout: Layout,
    group: Group,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rank, group = _joined(layout, group)
    meeting = layout.meetings(pattern)[rank]
    _check(video, text, pattern, layout, rank, mask, text_mask, scale, backend)
    q, k, v = (x.to(ops.autocast_dtype(x)) for x in video)
    B, n, H, D = q.shape
    empty = q.new_empty(B, 0, H, D)
    alone = layout.alone(pattern)
    heads = meeting.heads(rank, H) if meeting.blocks else range(0)
    own = slice(heads.start, heads.stop)
    text_q, text_k, text_v = (x[:, :, own].to(q.dtype) for x in text or (empty, empty, empty))
    tokens, gather, scatter = _orders(layout, pattern, rank, empty.device)
    if not alone:
        q, k, v = _to_heads((q, k, v), meeting, layout.processes, rank, group)
    q, k, v = (_taken(x, 1, gather) for x in (q, k, v))

    outs, text_outs = [], []
    if not meeting.blocks:  # it stays in the graph, or the backward pass of others would wait
        text_outs.append(text_q + text_k + text_v)  # of no heads
        outs.append(q + k + v + text_outs[0].sum())
    start = 0
    for number, length in meeting.blocks:
        here = slice(start, start + number * length)
        start = here.stop
        out, text_out = functional.joint_attention(
            q[:, here],
            k[:, here],
            v[:, here],
            text_q,
            text_k,
            text_v,
            SkipPattern.block(number, number * length),
            mask=None if mask is None else mask[:, tokens[here]],
            text_mask=text_mask,
            scale=scale,
            backend=backend,
        )
        outs.append(out)
        text_outs.append(text_out * (number / pattern.sparsity))
    out = _taken(torch.cat(outs, 1), 1, scatter)
    text_out = torch.stack(text_outs).sum(0)
    if not alone:
        out = _to_tokens(out, meeting, layout.processes, rank, group, n, H)
    if text is not None and text_out.shape[1]:
        text_out = _Sum.apply(F.pad(text_out, (0, 0, own.start, H - own.stop)), group)
    return out, text_out


# Heads against tokens. A chunk is [tokens, 3 (q, k, v), B, heads, D], or without the 3.


def _to_heads(
    video: tuple[Tensor, Tensor, Tensor],
    meeting: Meeting,
    processes: int,
    rank: int,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, n, H, D]`` to all tokens of the meeting and a share of the heads, members in turn."""
    B, n, H, D = video[0].shape
    rows = torch.stack(video).permute(2, 0, 1, 3, 4)  # [n, 3, B, H, D]
    shares = [meeting.heads(member, H) for member in meeting.members]
    own = len(meeting.heads(rank, H))
    sent = [3 * B * D * n * len(share) for share in shares]
    received = [3 * B * D * size * own for size in meeting.sizes]
    flat = _all_to_all(
        torch.cat([rows[:, :, :, share.start : share.stop].reshape(-1) for share in shares]),
        _among(sent, meeting, processes),
        _among(received, meeting, processes),
        group,
    )
    came = flat.view(sum(meeting.sizes), 3, B, own, D).permute(1, 2, 0, 3, 4)
    q, k, v = came.unbind(0)
    return q, k, v


def _to_tokens(
    out: Tensor,
    meeting: Meeting,
    processes: int,
    rank: int,
    group: dist.ProcessGroup,
    n: int,
    H: int,
) -> Tensor:
    """The way back: ``[B, n, H, D]`` of this process's own tokens."""
    B, _, own, D = out.shape
    shares = [meeting.heads(member, H) for member in meeting.members]
    sent = [B * D * size * own for size in meeting.sizes]
    received = [B * D * n * len(share) for share in shares]
    flat = _all_to_all(
        out.transpose(0, 1).reshape(-1),
        _among(sent, meeting, processes),
        _among(received, meeting, processes),
        group,
    )
    parts = [
        part.view(n, B, len(share), D)
        for part, share in zip(flat.split(received), shares, strict=True)
    ]
    return torch.cat(parts, 2).transpose(0, 1)


def _among(sizes: Sequence[int], meeting: Meeting, processes: int) -> list[int]:
    """Sizes by member as sizes by process: nothing for those of other meetings."""
    found = [0] * processes
    for member, size in zip(meeting.members, sizes, strict=True):
        found[member] = size
    return found


# Communication, and what is remembered of a layout on a device.


def _all_to_all(
    flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Elements to other processes: contiguous ``[sum(sent)]`` to ``[sum(received)]``."""
    return collectives.all_to_all_single_autograd(flat.contiguous(), received, sent, group)


class _Sum(torch.autograd.Function):
    """A sum over all processes, in each. What all of them do with it has a gradient: the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _summed(gradients[0], ctx.group), None


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    found: Tensor = collectives.wait_tensor(collectives.all_reduce(x.contiguous(), "sum", group))
    return found


@functools.lru_cache(1024)
def _index(
    before: Layout, after: Layout, rank: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """The two orders of a switch."""
    switch = before.switch(after, rank)
    return _tensor(switch.pack, device), _tensor(switch.unpack, device)


@functools.lru_cache(1024)
def _orders(
    layout: Layout, pattern: Shared, rank: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tokens of a meeting, the order that puts them sub-sequence by sub-sequence, and back."""
    meeting = layout.meetings(pattern)[rank]
    tokens, gather = (_tensor(x, device) for x in (meeting.tokens, meeting.gather))
    assert tokens is not None
    return tokens, gather, None if gather is None else gather.argsort()


@functools.lru_cache(256)
def _natural(layout: Layout, device: torch.device) -> Tensor | None:
    """Where each token is when the processes' own lie one behind the other."""
    return _tensor(layout.natural, device)


def _tensor(order: Any, device: torch.device) -> Tensor | None:
    with torch.inference_mode(False):  # or no backward pass could keep it
        return None if order is None else torch.from_numpy(order).to(device)


def _taken(x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(dim, index)


# What is refused.


def _joined(layout: Layout, group: Group) -> tuple[int, dist.ProcessGroup]:
    """This process's rank in the group, and the group; ValueError unless the layout is for it."""
    if not isinstance(layout, Layout):
        raise ValueError(f"a layout must be a skiparse.layout.Layout, got {layout!r}")
    group = _group_of(group)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size != layout.processes:
        raise ValueError(
            f"the layout is for {layout.processes} processes, but the group has {size}; make it "
            f"with Layout.of(pattern, tokens, {size})"
        )
    return rank, group


def _group_of(group: Group) -> dist.ProcessGroup:
    """The process group that is meant; ValueError unless this process is in one."""
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "no processes to share tokens with; call torch.distributed.init_process_group, under "
            "torchrun"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of {group.ndim} dimensions; give the one along which the tokens "
                'are shared, such as mesh["context"]'
            )
        group = group.get_group()
    elif group is None:
        group = dist.distributed_c10d._get_default_group()
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group; call with the group that it is in")
    return group


def _check_tokens(name: str, x: Tensor, dim: int, layout: Layout, rank: int) -> None:
    if not isinstance(x, Tensor) or not -x.ndim <= dim < x.ndim:
        got = list(x.shape) if isinstance(x, Tensor) else repr(x)
        raise ValueError(f"{name} must be a tensor with tokens along dim={dim}, got {got}")
    if x.shape[dim] != layout.sizes[rank]:
        raise ValueError(
            f"{name} has {x.shape[dim]} tokens along dim={dim}, but process {rank} owns "
            f"{layout.sizes[rank]} of {layout.tokens}; give x[:, layout.owned({rank})]"
        )


def _check(
    video: tuple[Tensor, ...],
    text: tuple[Tensor, ...] | None,
    pattern: Shared,
    layout: Layout,
    rank: int,
    mask: Tensor | None,
    text_mask: Tensor | None,
    scale: float | None,
    backend: str,
) -> None:
    """What the operator itself would find out after the communication."""
    named = dict(zip(("q", "k", "v"), video, strict=True))
    texts = dict(zip(("text_q", "text_k", "text_v"), text or (), strict=False))
    # A grid has other tokens than a process; that the pattern fits has been seen by the layout.
    local = SkipPattern.dense() if isinstance(pattern, GridPattern) else pattern
    functional._check(named, texts, local, scale, backend)
    for name, x in named.items():
        _check_tokens(name, x, 1, layout, rank)
    B = video[0].shape[0]
    functional._check_mask("mask", mask, (B, layout.tokens), video[0])
    length = texts["text_k"].shape[1] if texts else 0
    functional._check_mask("text_mask", text_mask, (B, length), video[0])
