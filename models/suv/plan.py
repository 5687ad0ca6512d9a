"""How the tokens of one forward are laid out, stage by stage; blocks see tokens and a pattern.

In skip order both patterns of a sparsity are views for the attention kernels, so a stage keeps its
tokens in the skip order of its own sparsity and they are permuted only where that changes. Dense
stages take any order, so they keep their neighbour's. Where ``k*k`` does not divide the number of
tokens, a stage keeps them in natural order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from skiparse import SkipPattern
from skiparse.layout import Layout, Route, route
from skiparse.parallel import (
    Exchange,
    begin_exchange,
    gather_tokens,
    rank_of,
    skip_exchange,
    total,
    ulysses_joint_attention,
)
from skiparse.pattern import has_skip_order, inverse_order, skip_order

NATURAL = 1  # an order is named by the sparsity it serves


@dataclass(frozen=True)
class Plan:
    """The order of ``tokens`` in every stage, and the pattern of every layer.

    Make one with :meth:`of`; ``orders[i]`` is ``NATURAL`` or the sparsity whose skip order the
    tokens of stage ``i`` are in.
    """

    tokens: int
    sparsity: tuple[int, ...]
    orders: tuple[int, ...]

    @classmethod
    def of(cls, tokens: int, sparsity: Sequence[int], *, reorder: bool = True) -> Plan:
        """The plan with the fewest permutations; all in natural order if not ``reorder``."""
        wanted = [
            None if k == 1 else k if reorder and has_skip_order(tokens, k) else NATURAL
            for k in sparsity
        ]  # None: dense, any order will do
        orders: list[int] = []
        for i, order in enumerate(wanted):
            if order is None:
                rest = (k for k in wanted[i:] if k is not None)
                order = orders[-1] if orders else next(rest, NATURAL)
            orders.append(order)
        return cls(tokens, tuple(sparsity), tuple(orders))

    def pattern(self, stage: int, layer: int) -> SkipPattern:
        """The pattern of a layer in its stage's order: single-skip for even layers, group for odd.

        Source: Open-Sora Plan v1.5 report, "SUV".
        """
        k = self.sparsity[stage]
        if k == 1:
            return SkipPattern.dense()
        if layer % 2 == 0:
            return SkipPattern.single(k)
        natural = self.orders[stage] == NATURAL
        return SkipPattern.group(k) if natural else SkipPattern.block(k, self.tokens)

    @property
    def ends(self) -> tuple[int, ...]:
        """The order in which each stage leaves the tokens: its own."""
        return self.orders

    kept = ends  # and in which a long skip keeps them

    def permutation(self, before: int, after: int) -> np.ndarray | None:
        """Takes tokens from one order to another by ``x[:, index]``: int64 ``[N]``, or None."""
        if before == after:
            return None
        natural = np.arange(self.tokens, dtype=np.int64)
        back = natural if before == NATURAL else inverse_order(self.tokens, before)
        return back if after == NATURAL else back[skip_order(self.tokens, after)]


@dataclass(frozen=True)
class SharedPlan:
    """The plan where the processes of ``group`` share the tokens: layouts in the place of orders.

    Tokens move between layers too. The first layer of a stage finds them in ``orders[stage]``, the
    last one leaves them in ``ends[stage]``, and long skips keep them in ``kept[stage]``. Make one
    with :meth:`of`.
    """

    route: Route
    firsts: tuple[int, ...]  # layers with which the stages begin, and the number of all
    group: Any

    @classmethod
    def of(
        cls,
        tokens: int,
        num_layers: tuple[int, ...],
        sparsity: tuple[int, ...],
        heads: int,
        skips: bool,
        group: Any,
    ) -> SharedPlan:
        """The one for which the least is sent."""
        processes = dist.get_world_size(group)
        made = route_of(tokens, num_layers, sparsity, heads, skips, processes)
        return cls(made, _firsts(num_layers), group)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return rank_of(self.group)

    @property
    def orders(self) -> tuple[Layout, ...]:
        """The layout of the first layer of each stage."""
        return tuple(self.route.layouts[i] for i in self.firsts[:-1])

    @property
    def ends(self) -> tuple[Layout, ...]:
        """That of its last layer."""
        return tuple(self.route.layouts[i - 1] for i in self.firsts[1:])

    @property
    def kept(self) -> tuple[Layout, ...]:
        """That in which the stage's output is kept: its own, or of a long skip the next stage's."""
        where = {skip[0]: self.route.kept(skip) for skip in self.route.skips}
        return tuple(self.route.layouts[where.get(i - 1, i - 1)] for i in self.firsts[1:])

    def pattern(self, stage: int, layer: int, rotary: tuple[Tensor, Tensor]) -> SharedLayer:
        """A layer of a stage; ``rotary`` are the tables of its layout's own tokens."""
        i = self.firsts[stage] + layer
        after = self.route.layouts[i + (i + 1 < self.firsts[stage + 1])]
        pattern = self.route.patterns[i]
        assert isinstance(pattern, SkipPattern)
        return SharedLayer(pattern, self.route.layouts[i], after, rotary, self.group)

    def layout(self, stage: int, layer: int) -> Layout:
        """Where a layer of a stage finds its tokens."""
        return self.route.layouts[self.firsts[stage] + layer]

    def permutation(self, before: int, after: Layout) -> np.ndarray:
        """This process's tokens, of all in natural order."""
        return after.owned(self.rank)

    def moved(self, x: Tensor, before: Layout, after: Layout | int) -> Tensor:
        """Tokens ``[B, n, ...]`` to another layout, or all of them in natural order."""
        if isinstance(after, Layout):
            return skip_exchange(x, before, after, self.group)
        return gather_tokens(x, before, self.group)


@dataclass(frozen=True)
class Processes:
    """A process group as a model holds it: a copy of the model has the same."""

    group: Any

    def __deepcopy__(self, memo: Any) -> Processes:
        return self


@dataclass(frozen=True, eq=False)
class SharedLayer:
    """What a block is told where processes share the tokens: in the place of a pattern.

    ``after`` is where the next layer of the stage wants them; for the last one, where they are.
    """

    pattern: SkipPattern
    layout: Layout
    after: Layout
    rotary: tuple[Tensor, Tensor]
    group: Any

    @torch.compiler.disable  # comparisons of layouts, and a collective
    def leave(self, video: Tensor) -> Exchange | None:
        """The tokens on their way to the next layer; None if they stay."""
        if self.after == self.layout:
            return None
        return begin_exchange(video, self.layout, self.after, self.group)

    def staying(self) -> SharedLayer:
        """The same, for a block that is computed again, which must not send them again."""
        return replace(self, after=self.layout)

    def own(self, mask: Tensor | None) -> Tensor | None:
        """Of a mask of all tokens ``[B, N]``, in natural order, this process's part."""
        if mask is None:
            return None
        owned = torch.from_numpy(self.layout.owned(rank_of(self.group))).to(mask.device)
        return mask.index_select(1, owned)

    def total(self, x: Tensor) -> Tensor:
        """A sum over tokens: this process's own to that of all."""
        return total(x, self.group)

    def joint_attention(self, *tokens: Tensor, **named: Any) -> tuple[Tensor, Tensor]:
        """As :func:`skiparse.joint_attention`, but ``mask`` is of all tokens in natural order."""
        return ulysses_joint_attention(*tokens, self.pattern, self.layout, self.group, **named)  # type: ignore[arg-type, call-arg]  # six


@functools.lru_cache(64)
def route_of(
    tokens: int,
    num_layers: tuple[int, ...],
    sparsity: tuple[int, ...],
    heads: int,
    skips: bool,
    processes: int,
) -> Route:
    """The cheapest layouts for processes that share the tokens, layer by layer.

    Args:
        tokens: of the video.
        num_layers, sparsity, heads: of the model.
        skips: whether the second half of the stages sees the outputs of the first.
        processes: how many there are.
    """
    natural = Plan.of(tokens, sparsity, reorder=False)
    layers = [natural.pattern(s, i) for s, number in enumerate(num_layers) for i in range(number)]
    firsts = _firsts(num_layers)
    pairs = [(firsts[s + 1] - 1, firsts[-2 - s]) for s in range(len(num_layers) // 2)]
    return route(layers, tokens, processes, heads, skips=pairs if skips else ())


def _firsts(num_layers: Sequence[int]) -> tuple[int, ...]:
    return (0, *itertools.accumulate(num_layers))
