"""Which process owns which token when several share a sequence, and what they send each other.

Every token belongs to a sub-sequence of the single pattern and to one of the group pattern. A
:class:`Layout` deals out the sub-sequences of one of the two, so attention by it needs nothing of
other processes. For a layer of another pattern either the tokens move to another layout
(:class:`Switch`), or processes whose tokens meet in a sub-sequence exchange heads for tokens
(:class:`Meeting`); in a dense layer all of them meet. :func:`route` finds what is cheapest for a
stack of layers. Nothing is padded: lengths that do not divide leave chunks of different sizes, and
some may be empty. :mod:`skiparse.parallel` sends what is computed here.

Source: DeepSpeed-Ulysses, arXiv 2309.14509, for heads against tokens; OSP-Next, arXiv 2605.28691,
for moving tokens between the owners of two patterns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from skiparse.pattern import GridPattern, SkipPattern, counterpart

Shared = SkipPattern | GridPattern
UNEVEN = 1.25  # times its even share: the most that a process owns where there is a choice


@dataclass(frozen=True)
class Layout:
    """``tokens`` dealt out to ``processes``, so that sub-sequences of ``pattern`` stay together.

    The processes are ``teams`` of equal size; process ``r`` is of team ``r mod teams``.
    Sub-sequence ``s`` goes to team ``s mod teams``. Where that is more than one process, they take
    the tokens of each chunk, those of one sub-sequence of either pattern, in turn. So for
    single-skip of ``k`` token ``t`` belongs to process ``t mod processes`` whenever one of ``k``
    and ``processes`` divides the other: layers of all such sparsities share one layout. Make one
    with :meth:`of`.

    Args:
        pattern: of tokens in natural order.
        tokens: how many there are, >= 0; of a grid all of it.
        processes: how many share them, >= 1.
        teams: a divisor of ``processes``, and no more than there are sub-sequences.

    Raises:
        ValueError: for other values.
    """

    pattern: Shared
    tokens: int
    processes: int
    teams: int

    def __post_init__(self) -> None:
        _check_pattern(self.pattern, self.tokens)
        if self.tokens < 0 or self.processes < 1:
            raise ValueError(
                f"a layout needs tokens >= 0 and processes >= 1, got {self.tokens} and "
                f"{self.processes}"
            )
        if self.teams not in _team_numbers(self.pattern, self.processes):
            raise ValueError(
                f"teams must divide processes={self.processes}, and be at most the "
                f"{self.pattern.sparsity} sub-sequences of the pattern; got {self.teams}"
            )

    @classmethod
    def of(cls, pattern: Shared, tokens: int, processes: int, *, most: float = UNEVEN) -> Layout:
        """With the most teams that leave no process more than ``most`` times its even share.

        More teams mean fewer processes that meet in a layer of this pattern. One team, that of all
        processes, is always even.

        Raises:
            ValueError: as :class:`Layout`.
        """
        for teams in reversed(_team_numbers(pattern, processes)):
            layout = cls(pattern, tokens, processes, teams)
            if teams == 1 or max(layout.sizes) * processes <= most * tokens:
                break
        return layout

    @cached_property
    def ranks(self) -> np.ndarray:
        """The process of every token, by its natural place: int64 ``[N]``."""
        own, other = _owners(self.pattern, self.tokens)
        chunk = own * self.pattern.sparsity + other
        by_chunk = np.argsort(chunk, kind="stable")
        begins = np.searchsorted(chunk[by_chunk], chunk[by_chunk])
        inside = np.empty_like(chunk)
        inside[by_chunk] = np.arange(len(chunk)) - begins
        turn = other + inside * self.pattern.sparsity
        return own % self.teams + self.teams * (turn % (self.processes // self.teams))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many tokens each process owns."""
        return tuple(np.bincount(self.ranks, minlength=self.processes).tolist())

    @functools.lru_cache(1024)  # noqa: B019  # layouts are values, and few
    def owned(self, rank: int) -> np.ndarray:
        """The tokens of a process, by their natural places, in the order in which it keeps them.

        One sub-sequence behind the other, the longest first: a view for any attention kernel.
        """
        order = _by_sub(self.pattern, self.tokens)
        found: np.ndarray = order[self.ranks[order] == rank]
        return found

    @cached_property
    def natural(self) -> np.ndarray | None:
        """Takes the tokens of all processes, one behind the other, into natural order."""
        owned = np.concatenate([self.owned(rank) for rank in range(self.processes)])
        return _unless_same(np.argsort(owned))

    @functools.lru_cache(1024)  # noqa: B019
    def switch(self, after: Layout, rank: int) -> Switch:
        """What process ``rank`` does so that all tokens come from this layout to another."""
        self._check_same(after)
        mine, wanted = self.owned(rank), after.owned(rank)
        receivers = after.ranks[mine]
        pack = np.argsort(receivers, kind="stable")
        chunks = chunk_sizes(self, after)
        come = np.concatenate(
            [its[after.ranks[its] == rank] for its in map(self.owned, range(self.processes))]
        )
        unpack = _places(come, wanted, self.tokens)
        sent, received = chunks[rank].tolist(), chunks[:, rank].tolist()
        return Switch(_unless_same(pack), tuple(sent), tuple(received), _unless_same(unpack))

    @functools.lru_cache(1024)  # noqa: B019
    def meetings(self, pattern: Shared) -> tuple[Meeting, ...]:
        """For attention by ``pattern`` in this layout: whom each process has to meet."""
        _check_pattern(pattern, self.tokens)
        if pattern.sparsity == 1:
            pattern = SkipPattern.dense()  # which all dense patterns mean
        owner, _ = _owners(pattern, self.tokens)
        tokens_of = np.zeros((pattern.sparsity, self.processes), np.int64)
        np.add.at(tokens_of, (owner, self.ranks), 1)
        first = _first_met(tokens_of)
        lengths = tokens_of.sum(1)
        # A sub-sequence without tokens is one of text alone, which any process can do.
        empty = np.arange(pattern.sparsity) % self.processes
        place_of = np.where(lengths > 0, first[tokens_of.argmax(1)], first[empty])
        order = _by_sub(pattern, self.tokens)
        found = {}
        for leader in np.unique(first).tolist():
            members = np.flatnonzero(first == leader).tolist()
            own = sorted(lengths[place_of == leader].tolist(), reverse=True)
            blocks = [(len(list(alike)), length) for length, alike in itertools.groupby(own)]
            tokens = order[first[self.ranks[order]] == leader]
            come = np.concatenate([self.owned(rank) for rank in members])
            gather = _places(come, tokens, self.tokens)
            found[leader] = Meeting(
                tuple(members),
                tuple(self.sizes[rank] for rank in members),
                tokens,
                _unless_same(gather),
                tuple(blocks),
            )
        return tuple(found[leader] for leader in first.tolist())

    def alone(self, pattern: Shared) -> bool:
        """Whether attention by ``pattern`` needs nothing of other processes."""
        return all(len(meeting.members) == 1 for meeting in self.meetings(pattern))

    def sent(self, pattern: Shared, heads: int) -> int:
        """How many heads of tokens all processes send for attention by ``pattern``, forward.

        Queries, keys and values go out and the output comes back: each process keeps its own heads
        of its own tokens, and sends the rest. A token that moves as a whole is ``heads`` of them.
        """
        return sum(
            4 * meeting.sizes[meeting.place(rank)] * (heads - len(meeting.heads(rank, heads)))
            for rank, meeting in enumerate(self.meetings(pattern))
        )

    def _check_same(self, other: Layout) -> None:
        if (self.tokens, self.processes) != (other.tokens, other.processes):
            raise ValueError(
                f"layouts of one sequence have as many tokens and processes; got {self.tokens} and "
                f"{other.tokens} tokens, {self.processes} and {other.processes} processes"
            )


class Switch(NamedTuple):
    """One process' part in moving all tokens from one layout to another.

    It takes its tokens in order ``pack``, sends ``sent`` of them to each process, gets ``received``
    from each, and takes those in order ``unpack``. An order is int64, or None for as they are.
    """

    pack: np.ndarray | None
    sent: tuple[int, ...]
    received: tuple[int, ...]
    unpack: np.ndarray | None


class Meeting(NamedTuple):
    """Processes that have whole sub-sequences together, and attend for each other.

    Each member gets its share of the heads of all ``tokens``, and gives all other heads of its own.
    ``sizes`` are the tokens that each brings. ``tokens`` are natural places, one sub-sequence
    behind the other; ``gather`` takes what the members bring, one behind the other, into that order
    (None: it is in it). ``blocks`` are ``(number, length)`` of sub-sequences, the longest first;
    those of length 0 are of text alone.
    """

    members: tuple[int, ...]
    sizes: tuple[int, ...]
    tokens: np.ndarray
    gather: np.ndarray | None
    blocks: tuple[tuple[int, int], ...]

    def place(self, rank: int) -> int:
        """Which of the members a process is."""
        return self.members.index(rank)

    def heads(self, rank: int, heads: int) -> range:
        """The share of a member in that many heads: as even as can be, perhaps none."""
        place, size = self.place(rank), len(self.members)
        return range(heads * place // size, heads * (place + 1) // size)


def chunk_sizes(before: Layout, after: Layout) -> np.ndarray:
    """How many tokens each process (a row) sends each other (a column): int64 ``[P, P]``.

    On the diagonal are those that stay.
    """
    number = before.processes
    pair = before.ranks * number + after.ranks
    return np.bincount(pair, minlength=number * number).reshape(number, number)


@functools.lru_cache(1024)
def moved(before: Layout, after: Layout) -> int:
    """How many tokens change their process from one layout to the other."""
    return int(np.count_nonzero(before.ranks != after.ranks))


# A stack of layers.


@dataclass(frozen=True)
class Route:
    """Where the tokens are in every layer of a stack, and what is sent for that.

    Args:
        patterns: of the layers.
        layouts: of the tokens in each layer.
        heads: of attention.
        skips: pairs of layers ``(i, j)``; what leaves layer ``i`` comes back before layer ``j``.
        sent: heads of tokens that all processes send in a forward; as many again in a backward.
    """

    patterns: tuple[Shared, ...]
    layouts: tuple[Layout, ...]
    heads: int
    skips: tuple[tuple[int, int], ...]
    sent: int

    @property
    def ulysses(self) -> int:
        """The same if every layer exchanged heads among all processes, as in dense attention."""
        whole = _everyone(self.layouts[0])
        return len(self.patterns) * whole.sent(SkipPattern.dense(), self.heads)

    def kept(self, skip: tuple[int, int]) -> int:
        """The layer in whose layout a long skip is kept: its own, or the next where that is nearer.

        In the second case the tokens move before they are kept.
        """
        own, back = skip
        costs = [moved(self.layouts[i], self.layouts[back]) for i in (own, own + 1)]
        return own if costs[0] <= costs[1] else own + 1

    @property
    def moves(self) -> tuple[int, ...]:
        """Of each layer: the tokens that move before it, those of a long skip with them."""
        found = [0, *(moved(*pair) for pair in itertools.pairwise(self.layouts))]
        for skip in self.skips:
            found[skip[1]] += moved(self.layouts[self.kept(skip)], self.layouts[skip[1]])
        return tuple(found)


def route(
    patterns: Sequence[Shared],
    tokens: int,
    processes: int,
    heads: int,
    *,
    skips: Sequence[tuple[int, int]] = (),
    most: float = UNEVEN,
) -> Route:
    """The layout of each layer for which the processes send the least.

    Every process has the input of the first layer, so where its tokens begin costs nothing. Among
    equals, the one with the fewest local permutations.

    Args:
        patterns: of each layer, of tokens in natural order.
        tokens, processes: as of :class:`Layout`.
        heads: of attention, >= 1.
        skips: pairs of layers ``(i, j)``, one inside the other or beside it: what leaves layer
            ``i`` comes back before layer ``j``, in its layout.
        most: as of :meth:`Layout.of`.

    Raises:
        ValueError: if there is no layer or no head, and as :class:`Layout`.
    """
    if not patterns or heads < 1:
        raise ValueError(f"a route needs a layer and a head, got {len(patterns)} and {heads}")
    kinds = (SkipPattern.dense(), *dict.fromkeys(patterns))
    choices = list(dict.fromkeys(Layout.of(kind, tokens, processes, most=most) for kind in kinds))
    paths = _Paths(patterns, choices, heads, dict(skips))
    best = min(paths.within(0, len(patterns)).values())
    layouts = tuple(choices[i] for i in best.path)
    return Route(tuple(patterns), layouts, heads, tuple(skips), best.sent)


class _Path(NamedTuple):
    """Compared by what is sent, then by local permutations; choices of some layers in a row."""

    sent: int
    permuted: int
    path: tuple[int, ...]

    def then(self, other: _Path) -> _Path:
        return _Path(self.sent + other.sent, self.permuted + other.permuted, self.path + other.path)


_Table = dict[tuple[int, int], _Path]  # by the layouts of the first and the last of some layers


class _Paths:
    """The cheapest paths through layers, from every layout to every other."""

    def __init__(
        self,
        patterns: Sequence[Shared],
        choices: Sequence[Layout],
        heads: int,
        skips: Mapping[int, int],
    ) -> None:
        numbers = range(len(choices))
        self.skips = skips
        self.moves = {
            (a, b): heads * moved(choices[a], choices[b]) for a in numbers for b in numbers
        }
        costs = {
            (pattern, a): (choices[a].sent(pattern, heads), _permutes(choices[a], pattern))
            for pattern in set(patterns)
            for a in numbers
        }
        self.layers: list[_Table] = [
            {(a, a): _Path(*costs[pattern, a], (a,)) for a in numbers} for pattern in patterns
        ]

    def within(self, first: int, end: int) -> _Table:
        """Through layers ``first`` to ``end - 1``, with the skips among them."""
        layer, table = first, self.layers[first]
        while True:
            if layer in self.skips:
                after = self.skips[layer]
                inner = self.layers[after]
                if after > layer + 1:
                    inner = self._joined(self.within(layer + 1, after), inner)
                table = self._joined(table, inner, again=True)
                layer = after
            elif layer + 1 < end:
                layer += 1
                table = self._joined(table, self.layers[layer])
            else:
                return table

    def _joined(self, one: _Table, other: _Table, *, again: bool = False) -> _Table:
        """One path behind the other; ``again``: what ``one`` leaves goes to the end too.

        From its own layout or from the next, as :meth:`Route.kept` says.
        """
        found: _Table = {}
        for (a, b), before in one.items():
            for (c, d), after in other.items():
                kept = b if self.moves[b, d] <= self.moves[c, d] else c
                sent = self.moves[b, c] + again * self.moves[kept, d]
                step = _Path(sent, (b != c) + again * (kept != d), ())
                path = before.then(step).then(after)
                if (a, d) not in found or path < found[a, d]:
                    found[a, d] = path
        return found


def _permutes(layout: Layout, pattern: Shared) -> int:
    """Whether heads and tokens are permuted for attention: q, k, v and the output."""
    return 4 * any(meeting.gather is not None for meeting in layout.meetings(pattern))


def _everyone(layout: Layout) -> Layout:
    return Layout(SkipPattern.dense(), layout.tokens, layout.processes, 1)


# What layouts are made of.


def _team_numbers(pattern: Shared, processes: int) -> list[int]:
    most = min(pattern.sparsity, processes)
    return [n for n in range(1, most + 1) if processes % n == 0]


@functools.lru_cache(256)
def _owners(pattern: Shared, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The sub-sequence of each token, by a pattern and by its counterpart."""
    places = np.arange(number, dtype=np.int64)
    return pattern.owner(places), counterpart(pattern).owner(places)


@functools.lru_cache(256)
def _by_sub(pattern: Shared, number: int) -> np.ndarray:
    """Tokens one sub-sequence behind the other, the longest first, chunk by chunk."""
    own, other = _owners(pattern, number)
    shortness = -np.bincount(own, minlength=pattern.sparsity)
    return np.lexsort((other, own, shortness[own]))


def _first_met(tokens_of: np.ndarray) -> np.ndarray:
    """For each process the first one that it meets, over any number of sub-sequences."""
    there = (tokens_of > 0).astype(np.float32)  # [sub-sequences, processes]
    meets = (there.T @ there > 0) | np.eye(there.shape[1], dtype=bool)
    while True:
        further = meets.astype(np.float32) @ meets.astype(np.float32) > 0
        if (further == meets).all():
            return meets.argmax(1)
        meets = further


def _places(given: np.ndarray, wanted: np.ndarray, number: int) -> np.ndarray:
    """Where in ``given`` each of ``wanted`` is; both name the same tokens of ``number``."""
    where = np.empty(number, np.int64)
    where[given] = np.arange(len(given))
    found: np.ndarray = where[wanted]
    return found


def _unless_same(order: np.ndarray) -> np.ndarray | None:
    """An order, or None if it changes nothing."""
    return None if (order == np.arange(len(order))).all() else order


def _check_pattern(pattern: Shared, number: int) -> None:
    if isinstance(pattern, GridPattern):
        pattern.check_tokens(number)
        if pattern.order != "natural":
            raise ValueError(
                f'a layout has an order of its own: give the pattern in order "natural", not '
                f'"{pattern.order}"'
            )
    elif not isinstance(pattern, SkipPattern):
        raise ValueError(
            "pattern must be a SkipPattern or a GridPattern of tokens in natural order, "
            f"got {pattern!r}"
        )
