"""A whole model's layers of attention, executed: dense, by views in skip order, or by a backend.

Each layer attends from the output of the one before it; keys and values are the same for all, as
nothing that would make others belongs to attention. What an order of tokens costs is paid: where
``k`` changes the hidden state is put in another order, and every layer by views copies its text
into its sub-sequences (a model has that done by ``norm_rope_pack``, in a pass it needs anyway).

Source: the released Open-Sora Plan v1.5, 32 layers, single-skip and group-skip in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import skiparse
from skiparse.pattern import SkipPattern, inverse_order, skip_order
from skiparse.testing import Problem

LAYERS = (2, 4, 6, 8, 6, 4, 2)
SPARSITY = (1, 2, 4, 8, 4, 2, 1)


@dataclass(frozen=True)
class Layer:
    """One layer: its sparsity, and whether it is single-skip or group-skip (the same for 1)."""

    k: int
    single: bool

    @property
    def pattern(self) -> SkipPattern:
        return SkipPattern.single(self.k) if self.single else SkipPattern.group(self.k)


def layers() -> list[Layer]:
    """All of them, in the order in which they run."""
    return [
        Layer(k, i % 2 == 0)
        for count, k in zip(LAYERS, SPARSITY, strict=True)
        for i in range(count)
    ]


class Hidden(NamedTuple):
    """What goes from layer to layer: video ``[B, N, H, D]`` and text ``[B, T, H, D]``."""

    video: Tensor
    text: Tensor


def by_backend(problem: Problem, backend: str) -> Hidden:
    """Layer by layer through the public call, in natural order."""
    x = Hidden(problem.q, problem.text_q)
    keys = problem.k, problem.v
    texts = problem.text_k, problem.text_v
    for layer in layers():
        x = Hidden(
            *skiparse.joint_attention(
                x.video, *keys, x.text, *texts, layer.pattern, backend=backend
            )
        )
    return x


class Views:
    """The same by a library's kernel, on views of buffers in skip order with the text inside.

    Inputs are put in order beforehand, keys and values once for each ``k``. Dense layers do not
    care for order and stay in that of their neighbours.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        N, device = problem.q.shape[1], problem.q.device
        self.orders = (SPARSITY[1], *SPARSITY[1:-1], SPARSITY[-2])  # of the stages

        def order(k: int) -> Tensor:
            return torch.from_numpy(skip_order(N, k)).to(device)

        def inverse(k: int) -> Tensor:
            return torch.from_numpy(inverse_order(N, k)).to(device)

        self.keys = {k: [x[:, order(k)] for x in (problem.k, problem.v)] for k in set(self.orders)}
        self.first = problem.q[:, order(self.orders[0])]
        steps = zip(self.orders, self.orders[1:], strict=False)
        self.moves = {(old, new): inverse(old)[order(new)] for old, new in steps if old != new}
        self.back = inverse(self.orders[-1])

    def attend(self) -> Hidden:
        """All layers; the video comes out in the last stage's order."""
        x, order = Hidden(self.first, self.problem.text_q), self.orders[0]
        todo = iter(layers())
        for count, here in zip(LAYERS, self.orders, strict=True):
            if here != order:
                x, order = x._replace(video=x.video[:, self.moves[order, here]]), here
            for layer in itertools.islice(todo, count):
                x = self.attend_once(x, layer, self.keys[order])
        return x

    def attend_once(self, x: Hidden, layer: Layer, keys: Sequence[Tensor]) -> Hidden:
        """One layer."""
        p, blocks = self.problem, not layer.single
        (N, T), k = (x.video.shape[1], x.text.shape[1]), layer.k
        videos, texts = (x.video, *keys), (x.text, p.text_k, p.text_v)
        q, k_rows, v = (
            text_inside(*pair, k, blocks=blocks) for pair in zip(videos, texts, strict=True)
        )
        pattern = packed_pattern(k, N, T, blocks=blocks)
        rows = skiparse.attention(q, k_rows, v, pattern, backend="sdpa")
        return text_outside(rows, k, T, blocks=blocks)

    def natural(self, x: Hidden) -> Hidden:
        """What ``attend`` gave, with the video in natural order."""
        return x._replace(video=x.video[:, self.back])


def dense(problem: Problem, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Hidden:
    """As many layers of dense attention; ``attend`` takes ``[B, H, N + T, D]``."""
    pairs = zip(problem.inputs[:3], problem.inputs[3:], strict=True)
    x, k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in pairs)
    for _ in layers():
        x = attend(x, k, v)
    return Hidden(*x.transpose(1, 2).split([problem.q.shape[1], problem.text_q.shape[1]], 1))


# Text inside the buffer: joint attention as plain attention, by a pattern of the same family.


def text_inside(video: Tensor, text: Tensor, k: int, *, blocks: bool) -> Tensor:
    """One buffer ``[B, N + k*T, H, D]``: text behind every block, or interleaved at the end."""
    if not blocks:
        return torch.cat([video, text.repeat_interleave(k, 1)], 1)
    copies = text[:, None].expand(-1, k, -1, -1, -1)
    return torch.cat([video.unflatten(1, (k, -1)), copies], 2).flatten(1, 2)


def text_outside(rows: Tensor, k: int, T: int, *, blocks: bool) -> Hidden:
    """Video and text of such a buffer of outputs; the text is the mean of its copies."""
    if blocks:
        parts = rows.unflatten(1, (k, -1))
        cut = parts.shape[2] - T
        return Hidden(parts[:, :, :cut].flatten(1, 2), parts[:, :, cut:].mean(1))
    cut = rows.shape[1] - k * T
    return Hidden(rows[:, :cut], rows[:, cut:].unflatten(1, (T, k)).mean(2))


def packed_pattern(k: int, N: int, T: int, *, blocks: bool) -> SkipPattern:
    """The pattern of the buffer, for tokens in skip order if ``blocks``."""
    return SkipPattern(k, N // k + T) if blocks else SkipPattern.single(k)
