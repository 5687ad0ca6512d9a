"""How the tokens of one forward are laid out, stage by stage; blocks see tokens and a pattern.

In skip order both patterns of a sparsity are views for the attention kernels, so a stage keeps its
tokens in the skip order of its own sparsity and they are permuted only where that changes. Dense
stages take any order, so they keep their neighbour's. Where ``k*k`` does not divide the number of
tokens, a stage keeps them in natural order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skiparse import SkipPattern
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

    def permutation(self, before: int, after: int) -> np.ndarray | None:
        """Takes tokens from one order to another by ``x[:, index]``: int64 ``[N]``, or None."""
        if before == after:
            return None
        natural = np.arange(self.tokens, dtype=np.int64)
        back = natural if before == NATURAL else inverse_order(self.tokens, before)
        return back if after == NATURAL else back[skip_order(self.tokens, after)]
