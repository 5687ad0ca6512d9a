"""A retrofitted transformer whose tokens several processes share: layouts in the place of orders.

Tokens move in front of a block, where its layout is another than that of the block before; dense
layers exchange heads wherever the tokens are. What is done token by token needs nothing of others.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skiparse import GridPattern, SkipPattern
from skiparse.layout import Layout, Route, Shared, route
from skiparse.parallel import gather_tokens, rank_of, skip_exchange, ulysses_attention

Grid = tuple[int, int, int]


@dataclass(eq=False)
class Sharing:
    """Whose tokens the processes of ``group`` share; ``route`` is that of the forward that runs."""

    group: Any
    route: Route | None = None

    def __deepcopy__(self, memo: Any) -> Sharing:
        """Of a copy of the model: with the same processes."""
        return Sharing(self.group)

    def enter(
        self, grid: Grid, pattern: str, ratio: int, kinds: tuple[str, ...], heads: int
    ) -> None:
        """Take the cheapest layouts for this grid, for all that follows."""
        self.route = _route(grid, pattern, ratio, kinds, heads, self.group.size())

    def layout(self, depth: int) -> Layout:
        """Where the tokens are in a layer; from -1, the last one's."""
        assert self.route is not None
        return self.route.layouts[depth]

    def own(self, x: Tensor, dim: int, depth: int) -> Tensor:
        """Of all tokens in natural order those that are this process's own in a layer."""
        index = torch.from_numpy(self.layout(depth).owned(rank_of(self.group))).to(x.device)
        return x.index_select(dim, index)

    def attention(self, depth: int, *video: Tensor, scale: float | None) -> Tensor:
        """That of a layer: ``[B, n, H, D]``."""
        assert self.route is not None
        q, k, v = video
        return ulysses_attention(
            q, k, v, self.route.patterns[depth], self.layout(depth), self.group, scale=scale
        )


@functools.lru_cache(64)
def _route(
    grid: Grid, pattern: str, ratio: int, kinds: tuple[str, ...], heads: int, processes: int
) -> Route:
    layers = [natural_pattern(grid, pattern, ratio, kind) for kind in kinds]
    return route(layers, grid[0] * grid[1] * grid[2], processes, heads)


def natural_pattern(grid: Grid, pattern: str, ratio: int, kind: str) -> Shared:
    """The pattern of a kind of layer, for tokens in natural order."""
    if kind == "dense":
        return SkipPattern.dense()
    if pattern == "2d":
        return GridPattern(grid, ratio, kind)
    return SkipPattern.single(ratio) if kind == "single" else SkipPattern.group(ratio)


# Hooks, as those of an order.


class OwnPatches:
    """Of the patches ``[B, C, frames, rows, columns]`` those that this process begins with."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return self.sharing.own(out.flatten(2), 2, 0)[..., None, None]  # [B, C, n, 1, 1]


class BeforeBlock:
    """Brings the tokens to where a block wants them, and the rotary tables of these tokens."""

    def __init__(self, sharing: Sharing, depth: int) -> None:
        self.sharing, self.depth = sharing, depth

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names = ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")
        given = dict(zip(names, args, strict=False)) | kwargs
        sharing, depth = self.sharing, self.depth
        before, after = sharing.layout(max(depth - 1, 0)), sharing.layout(depth)
        if before != after:
            given["hidden_states"] = skip_exchange(
                given["hidden_states"], before, after, sharing.group
            )
        given["rotary_emb"] = tuple(sharing.own(x, 1, depth) for x in given["rotary_emb"])
        return (), given


class AllTokens:
    """After the last layer: all tokens, in every process."""

    def __init__(self, sharing: Sharing) -> None:
        self.sharing = sharing

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return gather_tokens(out, self.sharing.layout(-1), self.sharing.group)
