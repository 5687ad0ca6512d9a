"""Which tokens attend to each other: the index maths of Skiparse attention, and what it saves.

One family of patterns: ``n`` interleaved sub-sequences dealt out in runs of ``w`` consecutive
tokens. ``w = 1`` is single-skip, ``w = n`` group-skip, ``n = 1`` dense attention, and
``w = N / n`` cuts the sequence into ``n`` contiguous blocks::

    token    0 1 2 3 4 5 6 7 8 9 ...
    n=2 w=1  0 1 0 1 0 1 0 1 0 1        the sub-sequence that owns each token
    n=2 w=2  0 0 1 1 0 0 1 1 0 0

A video is a grid of frames, rows and columns. :class:`GridPattern` deals out its rows and its
columns in this way, and leaves time whole; :class:`SkipPattern` deals out the tokens as they come.

Everything is exact for every ``N >= 0`` and every grid: what does not divide evenly leaves
sub-sequences of different lengths, never padding. No other file contains an index formula.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

LARGEST = 2**31 - 1  # a sparsity or a run, so that their product is a 64-bit number
KINDS = ("single", "group")  # of patterns of a grid
ORDERS = ("natural", "tile", "skip", *KINDS)  # of its tokens

Index = Any  # a Python int, or an array, tensor or Triton value of integers

# The formulas. All arithmetic is on non-negative integers, so they mean the same for Python ints,
# numpy, torch and Triton (`triton.jit(token_of)`). First those of a sequence.


def sub_of(t: Index, n: int, w: int) -> Index:
    """The sub-sequence, in ``[0, n)``, that owns token ``t``."""
    return t // w % n


def pos_of(t: Index, n: int, w: int) -> Index:
    """The position of token ``t`` inside its sub-sequence."""
    return t // (w * n) * w + t % w


def token_of(s: Index, j: Index, n: int, w: int) -> Index:
    """The token at position ``j`` of sub-sequence ``s``; inverse of (``sub_of``, ``pos_of``)."""
    return j // w * (w * n) + s * w + j % w


def length_of(s: int, N: int, n: int, w: int) -> int:
    """How many of ``N`` tokens sub-sequence ``s`` owns."""
    return N // (n * w) * w + min(max(N % (n * w) - s * w, 0), w)


# Those of a grid, whose tokens are counted column by column, row by row, frame by frame. Rows are
# dealt out to ``p`` owners in runs of ``w``, and columns; ``p * (owner of row) + (of column)``.


def grid_sub_of(t: Index, height: int, width: int, p: int, w: int) -> Index:
    """The sub-sequence, in ``[0, p * p)``, that owns token ``t`` of a grid."""
    return sub_of(t // width % height, p, w) * p + sub_of(t % width, p, w)


def grid_token_of(s: Index, j: Index, height: int, width: int, p: int, w: int) -> Index:
    """The token at position ``j`` of sub-sequence ``s`` of a grid."""
    rows = max(length_of(s // p, height, p, w), 1)  # where there are none, there is no position
    columns = max(length_of(s % p, width, p, w), 1)
    row = token_of(s // p, j // columns % rows, p, w)
    column = token_of(s % p, j % columns, p, w)
    return (j // (rows * columns) * height + row) * width + column


def grid_length_of(s: int, frames: int, height: int, width: int, p: int, w: int) -> int:
    """How many tokens of a grid sub-sequence ``s`` owns."""
    return frames * length_of(s // p, height, p, w) * length_of(s % p, width, p, w)


def tiles_runs(block: int, w: int) -> bool:
    """Whether blocks of that many positions, counted from 0, each lie inside one run.

    Then ``token_of`` of a block's first position, plus 0, 1, 2, ..., are the tokens of the block.
    """
    return w % block == 0


class Box(NamedTuple):
    """What one strided view can address: tokens ``start + index . strides``.

    ``shape`` counts sub-sequences, and then what the tokens of each are: (runs, tokens in a run),
    or of a grid (frames, runs of rows, rows in a run, runs of columns, columns in a run). They lie
    in this order, beginning at position ``first`` of the sub-sequence. The sub-sequences are
    neighbours among those of a :class:`Segment`, from number ``at`` on.
    """

    first: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    at: int = 0

    @property
    def tokens(self) -> int:
        """How many tokens of each sub-sequence are in it."""
        return math.prod(self.shape[1:])

    def within(self, first: int, number: int) -> Box | None:
        """The part of it in those ``number`` sub-sequences of the segment, which are one then."""
        begin, end = max(self.at, first), min(self.at + self.shape[0], first + number)
        if begin >= end:
            return None
        start = self.start + (begin - self.at) * self.strides[0]
        return Box(self.first, start, (end - begin, *self.shape[1:]), self.strides, begin - first)


class Segment(NamedTuple):
    """Sub-sequences of one ``length``; of a :class:`SkipPattern` they are neighbours.

    ``boxes`` cover their tokens, in any order of the tokens of a sub-sequence: attention does not
    see it. Of a :class:`SkipPattern` that is the order of positions, in one box, or in two where
    the last run is cut short by the end of the sequence; in none if ``length`` is 0.
    """

    subs: Sequence[int]
    length: int
    boxes: tuple[Box, ...]

    @property
    def number(self) -> int:
        """How many sub-sequences."""
        return len(self.subs)

    @property
    def slices(self) -> list[slice]:
        """``subs`` as slices of all sub-sequences."""
        if isinstance(self.subs, range):
            return [slice(self.subs.start, self.subs.stop)]
        found: list[slice] = []
        for s in self.subs:
            if found and found[-1].stop == s:
                found[-1] = slice(found[-1].start, s + 1)
            else:
                found.append(slice(s, s + 1))
        return found

    def split(self, most: int) -> list[Segment]:
        """The same sub-sequences in segments of ``most`` at a time."""
        return [
            Segment(
                self.subs[skip : skip + most],
                self.length,
                tuple(part for box in self.boxes if (part := box.within(skip, most)) is not None),
            )
            for skip in range(0, self.number, most)
        ]


@dataclass(frozen=True)
class SkipPattern:
    """``sparsity`` interleaved sub-sequences of tokens, dealt out in runs of ``run`` tokens.

    Args:
        sparsity: number of sub-sequences, an int in [1, 2**31) (``k`` or ``sparse_n`` in the
            reports).
        run: consecutive tokens that stay together, likewise.

    Raises:
        ValueError: if either is not such an int.

    Source: Open-Sora Plan v1.3 report, "Skiparse attention"; v1.5 report, "SUV".
    """

    sparsity: int
    run: int = 1

    def __post_init__(self) -> None:
        for name, value in (("sparsity", self.sparsity), ("run", self.run)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise ValueError(f"{name} must be an int >= 1, got {value!r}; 1 means dense")
            if not 1 <= value <= LARGEST:
                raise ValueError(f"{name} must be in [1, 2**31), got {value}; 1 means dense")
            object.__setattr__(self, name, int(value))  # numpy's overflow, and do not compile

    @classmethod
    def single(cls, k: int) -> SkipPattern:
        """Single-skip: token ``t`` attends to every ``k``-th token, those congruent to it."""
        return cls(k, 1)

    @classmethod
    def group(cls, k: int) -> SkipPattern:
        """Group-skip: runs of ``k`` tokens; a run attends to every ``k``-th run."""
        return cls(k, k)

    @classmethod
    def dense(cls) -> SkipPattern:
        """Every token attends to every token."""
        return cls(1, 1)

    @classmethod
    def block(cls, k: int, N: int) -> SkipPattern:
        """``k`` contiguous blocks of ``N / k`` tokens: group-skip, for tokens in skip order.

        Raises:
            ValueError: if ``k`` does not divide ``N``.
        """
        cls(k)
        if N % k:
            raise ValueError(f"block(k={k}, N={N}): k must divide N; use group(k) for any N")
        return cls(k, max(N // k, 1))

    def owner(self, t: Index) -> Index:
        """The sub-sequence that owns token ``t``; an array or tensor of such likewise."""
        return sub_of(t, self.sparsity, self.run)

    def token(self, s: int, j: Index) -> Index:
        """The token at position ``j`` of sub-sequence ``s``."""
        return token_of(s, j, self.sparsity, self.run)

    def length(self, s: int, N: int) -> int:
        """How many of ``N`` tokens sub-sequence ``s`` owns."""
        return length_of(s, N, self.sparsity, self.run)

    @property
    def step(self) -> int:
        """Tokens from one row of a sub-sequence to the next, within a run."""
        return self.sparsity if self.run == 1 else 1

    def can_pack(self, N: int) -> bool:
        """Whether ``N`` video tokens can be in a buffer with the text inside: :meth:`packed`."""
        return self.sparsity == 1 or self.run == 1 or N % (self.sparsity * self.run) == 0

    def packed(self, N: int, T: int) -> SkipPattern:
        """The pattern of a buffer of ``N + sparsity * T`` rows that has the text inside.

        Sub-sequence ``s`` keeps its tokens in their order and gets the ``T`` text rows behind
        them: its position ``j`` is row ``token_of(s, j, sparsity, run)`` with the run returned. So
        single-skip leaves the video where it is, with copy ``g`` of text row ``t`` at
        ``N + t*sparsity + g``, and any other pattern becomes one block for each sub-sequence.

        Raises:
            ValueError: if ``run`` is not 1 and the sub-sequences differ in length.
        """
        n, w = self.sparsity, self.run
        if not self.can_pack(N):
            raise ValueError(
                f"packed(N={N}) of {self}: sparsity * run must divide N; "
                "use joint_attention, or single(k), which takes any N"
            )
        if n == 1 or w == 1:
            return SkipPattern(n, 1)
        return SkipPattern(n, max(N // n + T, 1))

    def lengths(self, N: int) -> list[int]:
        """The length of every sub-sequence of ``N`` tokens."""
        return [self.length(s, N) for s in range(self.sparsity)]

    def pairs(self, N: int, T: int = 0, queries: int | None = None) -> int:
        """Query-key pairs of joint attention over ``N`` video and ``T`` text tokens.

        Each sub-sequence attends over itself and all the text, text queries included, so this is
        the sum of ``(length + T)**2``; ``sparsity * (N / sparsity + T)**2`` if it divides ``N``.
        ``queries`` is how many text tokens query, ``T`` if None: ``(length + queries) * ...``.
        """
        return _pairs(self.segments(N), T, queries)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What the operator is told of it; :func:`pattern_of` is the way back."""
        return self.sparsity, self.run

    def segments(self, N: int) -> list[Segment]:
        """All sub-sequences of ``N`` tokens, as at most three groups of equal length.

        Source: ``length_of``; of the last, incomplete period of ``sparsity * run`` tokens the
        first sub-sequences own a full run, at most one a part of a run, the others none.
        """
        return list(_segments(self, N))

    def _segments(self, N: int) -> list[Segment]:
        n, w = self.sparsity, self.run
        full = N % (n * w) // w
        cut = full + (1 if N % w and full < n else 0)
        return [
            self._segment(first, end - first, length_of(first, N, n, w))
            for first, end in ((0, full), (full, cut), (cut, n))
            if first < end
        ]

    def _segment(self, first: int, number: int, length: int) -> Segment:
        n, w = self.sparsity, self.run
        runs, rest = divmod(length, w)
        boxes = []
        if runs:
            boxes.append(Box(0, first * w, (number, runs, w), (w, n * w, 1)))
        if rest:
            start = token_of(first, runs * w, n, w)
            boxes.append(Box(runs * w, start, (number, 1, rest), (w, n * w, 1)))
        return Segment(range(first, first + number), length, tuple(boxes))


@functools.lru_cache(1024)  # a call asks several times, and a model has few patterns
def _segments(pattern: Pattern, N: int) -> tuple[Segment, ...]:
    return tuple(pattern._segments(N))


def _pairs(segments: Iterable[Segment], T: int, queries: int | None) -> int:
    Q = T if queries is None else queries
    return sum(s.number * (s.length + Q) * (s.length + T) for s in segments)


# Patterns of a grid.

Grid = tuple[int, int, int]  # frames, rows and columns of tokens


@dataclass(frozen=True)
class GridPattern:
    """Rows and columns of a grid of tokens, each dealt out to ``ratio`` owners; time stays whole.

    So there are ``ratio * ratio`` sub-sequences, each with tokens of all frames. ``"single"`` deals
    out one row, and one column, at a time: the token in row y and column x goes to the owners
    y mod p and x mod p, for a ratio of p. ``"group"`` deals out p at a time: to y // p mod p and
    x // p mod p. Exact for every grid, without padding or masks: the sub-sequences may differ in
    length, and some may be empty.

    Args:
        grid: ``(frames, rows, columns)`` of tokens, ints in [1, 2**31).
        ratio: owners along either side, an int >= 1 (``sparse_ratio`` in the original).
        kind: ``"single"`` (token-wise in the original) or ``"group"`` (group-wise).
        order: how the tokens lie in the tensors, one of :func:`grid_order`. A model that puts
            them in another than the natural one, once, saves copies in every layer.

    Raises:
        ValueError: for other values, and for an order that the grid or the kind does not have.

    Source: OSP-Next, arXiv 2605.28691, "Skiparse-2D".
    """

    grid: Grid
    ratio: int
    kind: str = "single"
    order: str = "natural"
    # What the operator is told of it; `pattern_of` is the way back. A field, so that all that
    # torch.compile sees is numbers: then other grids, and the other kind, make no new graph.
    numbers: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grid, ratio = _checked_grid(self.grid, self.ratio)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "ratio", ratio)
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
        _check_grid_order(grid, ratio, self.order)
        if self.order in KINDS and self.order != self.kind:
            raise ValueError(
                f'order="{self.order}" scatters the sub-sequences of kind="{self.kind}"; for it '
                f'put the tokens in order "{self.kind}", or keep "natural" or "skip", for both'
            )
        object.__setattr__(self, "numbers", self._numbers())

    @classmethod
    def single(cls, grid: Sequence[int], ratio: int, *, order: str = "natural") -> GridPattern:
        """A token attends to every ``ratio``-th row and column, counted from its own."""
        return cls(grid, ratio, "single", order)  # type: ignore[arg-type]  # it becomes a tuple

    @classmethod
    def group(cls, grid: Sequence[int], ratio: int, *, order: str = "natural") -> GridPattern:
        """Cells of ``ratio * ratio`` tokens; a cell attends to every ``ratio``-th, likewise."""
        return cls(grid, ratio, "group", order)  # type: ignore[arg-type]  # it becomes a tuple

    @property
    def sparsity(self) -> int:
        """How many sub-sequences."""
        return self.ratio * self.ratio

    @property
    def run(self) -> int:
        """Rows, and columns, that are dealt out together."""
        return 1 if self.kind == "single" else self.ratio

    @property
    def tokens(self) -> int:
        """How many tokens the grid has."""
        frames, height, width = self.grid
        return frames * height * width

    def _numbers(self) -> tuple[int, ...]:
        if self.order in ("tile", "skip") and self.kind == "single":
            return self.sparsity, 1
        if self.order == "tile":
            return self.sparsity, self.sparsity
        return self.sparsity, self.run, *self.grid, int(self.order != "natural")

    @property
    def resolved(self) -> Pattern:
        """The same in the fewest words, which is what a backend gets.

        :class:`SkipPattern` if it is one of the tokens as they lie; :class:`BlockPattern` if each
        sub-sequence is in one piece; else this pattern itself, in natural order.
        """
        return pattern_of(self.numbers)

    def owner(self, t: Index) -> Index:
        """The sub-sequence that owns the token at place ``t``; an array or tensor of such likewise.

        In natural order it is ``ratio * (owner of the row) + (owner of the column)``.
        """
        if self.order != "natural":
            return self.resolved.owner(t)
        return grid_sub_of(t, *self.grid[1:], self.ratio, self.run)

    def token(self, s: int, j: Index) -> Index:
        """The place of the token at position ``j`` of sub-sequence ``s``."""
        if self.order != "natural":
            return self.resolved.token(s, j)
        return grid_token_of(s, j, *self.grid[1:], self.ratio, self.run)

    def length(self, s: int, N: int) -> int:
        """How many tokens sub-sequence ``s`` owns; ``N`` is :attr:`tokens`."""
        self.check_tokens(N)
        if self.order != "natural":
            return self.resolved.length(s, N)
        return grid_length_of(s, *self.grid, self.ratio, self.run)

    def lengths(self, N: int) -> list[int]:
        """The length of every sub-sequence; ``N`` is :attr:`tokens`."""
        return [self.length(s, N) for s in range(self.sparsity)]

    def pairs(self, N: int, T: int = 0, queries: int | None = None) -> int:
        """Query-key pairs, as of :meth:`SkipPattern.pairs`; ``N`` is :attr:`tokens`."""
        return _pairs(self.segments(N), T, queries)

    def segments(self, N: int) -> list[Segment]:
        """All sub-sequences, grouped by length, the longest first; ``N`` is :attr:`tokens`."""
        self.check_tokens(N)
        return self.resolved.segments(N) if self.order != "natural" else list(_segments(self, N))

    def check_tokens(self, N: int) -> None:
        """Raise ValueError unless ``N`` is the number of tokens of the grid."""
        if self.tokens != N:
            raise ValueError(
                f"grid={self.grid} has {self.tokens} tokens, not {N}; "
                "give (frames, rows, columns) of tokens, after the model has made patches"
            )

    def _segments(self, N: int) -> list[Segment]:
        frames, height, width = self.grid
        axis = SkipPattern(self.ratio, self.run)
        blocks: dict[int, list[tuple[int, Segment]]] = {}
        for a in range(self.ratio):
            for columns in axis.segments(width):
                length = frames * axis.length(a, height) * columns.length
                blocks.setdefault(length, []).append((a, columns))
        return [self._segment(length, blocks[length]) for length in sorted(blocks, reverse=True)]

    def _segment(self, length: int, blocks: Sequence[tuple[int, Segment]]) -> Segment:
        """Of an owner of rows and some neighbouring owners of as many columns, several times."""
        frames, height, width = self.grid
        axis = SkipPattern(self.ratio, self.run)
        subs: list[int] = []
        boxes: list[Box] = []
        for a, columns in blocks:
            first = 0
            for y in axis._segment(a, 1, axis.length(a, height)).boxes:
                for x in columns.boxes:
                    below = [width * stride for stride in y.strides[1:]]
                    box = Box(
                        first,
                        y.start * width + x.start,
                        (columns.number, frames, *y.shape[1:], *x.shape[1:]),
                        (x.strides[0], height * width, *below, *x.strides[1:]),
                        len(subs),
                    )
                    boxes.append(box)
                    first += box.tokens
            subs += [a * self.ratio + b for b in columns.subs]
        return Segment(tuple(subs), length, tuple(boxes))


@dataclass(frozen=True)
class BlockPattern:
    """Sub-sequences of given lengths, one behind the other: a grid's, with the tokens in order.

    Backends get it; ask :class:`GridPattern` for it. Those of one length are neighbours.
    """

    sizes: tuple[int, ...]

    @property
    def sparsity(self) -> int:
        """How many sub-sequences."""
        return len(self.sizes)

    def owner(self, t: Index) -> Index:
        """The sub-sequence that owns the token at place ``t``."""
        return sum(1 * (t >= end) for end in itertools.accumulate(self.sizes[:-1]))

    def token(self, s: int, j: Index) -> Index:
        """The place of the token at position ``j`` of sub-sequence ``s``."""
        return sum(self.sizes[:s]) + j

    def length(self, s: int, N: int) -> int:
        """How many tokens sub-sequence ``s`` owns."""
        return self.sizes[s]

    def lengths(self, N: int) -> list[int]:
        """The length of every sub-sequence."""
        return list(self.sizes)

    def pairs(self, N: int, T: int = 0, queries: int | None = None) -> int:
        """Query-key pairs, as of :meth:`SkipPattern.pairs`."""
        return _pairs(self.segments(N), T, queries)

    def segments(self, N: int) -> list[Segment]:
        """All sub-sequences, grouped by length: a view each."""
        return list(_segments(self, N))

    def _segments(self, N: int) -> list[Segment]:
        found, first, start = [], 0, 0
        for length, alike in itertools.groupby(self.sizes):
            number = len(list(alike))
            box = Box(0, start, (number, 1, length), (length, length, 1))
            subs = range(first, first + number)
            found.append(Segment(subs, length, (box,) if length else ()))
            first, start = first + number, start + number * length
        return found


Pattern = SkipPattern | GridPattern | BlockPattern


@functools.lru_cache(1024)
def pattern_of(numbers: tuple[int, ...]) -> Pattern:
    """The pattern that has these ``numbers``, :attr:`GridPattern.resolved`."""
    n, w, *grid = numbers
    if n == 1:
        return SkipPattern.dense()  # runs of the only one: nothing
    if not grid:
        return SkipPattern(n, w)
    *sides, in_pieces = grid
    kind = KINDS[w > 1]
    natural = GridPattern((sides[0], sides[1], sides[2]), math.isqrt(n), kind)
    if not in_pieces:
        return natural
    lengths = sorted(natural.lengths(natural.tokens), reverse=True)
    even = lengths[0] == lengths[-1]
    return SkipPattern.block(n, natural.tokens) if even else BlockPattern(tuple(lengths))


# Orders of the tokens of a grid, for models that permute them once.


def counterpart(pattern: SkipPattern | GridPattern) -> SkipPattern | GridPattern:
    """The group pattern of a single-skip one, and the single-skip pattern of any other.

    Tokens are in natural order in both, whatever the order of ``pattern``.
    """
    if isinstance(pattern, GridPattern):
        kind = "group" if pattern.kind == "single" else "single"
        return GridPattern(pattern.grid, pattern.ratio, kind)
    k = pattern.sparsity
    return SkipPattern.group(k) if pattern.run == 1 else SkipPattern.single(k)


def has_grid_order(grid: Sequence[int], ratio: int, order: str) -> bool:
    """Whether the tokens of a grid have that order for a ratio: see :func:`grid_order`."""
    (_, height, width), ratio = _checked_grid(grid, ratio)
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    side = {"tile": ratio * ratio, "skip": ratio}.get(order, 1)
    return height % side == 0 and width % side == 0


def grid_order(grid: Sequence[int], ratio: int, order: str) -> np.ndarray:
    """An order of the tokens of a grid: ``x_in_order = x[grid_order(...)]``.

    With ``k = ratio**2``, the sub-sequences of both kinds of :class:`GridPattern` are, in it:

    =============  =============================  =======================  ===================
    order          grids                          single                   group
    =============  =============================  =======================  ===================
    ``"natural"``  any                            scattered                scattered
    ``"tile"``     k divides rows and columns     ``SkipPattern.single``   ``SkipPattern.group``
    ``"skip"``     ratio divides rows, columns    ``SkipPattern.single``   one piece each
    ``"single"``   any                            one piece each           not to be had
    ``"group"``    any                            not to be had            one piece each
    =============  =============================  =======================  ===================

    Pieces, and ``SkipPattern.single``, are views for library kernels. Pieces lie in order of their
    length, the longest first. Where there is a tile order, ``skip_order(N, k)`` of it is the skip
    order.

    Args:
        grid, ratio: as for :class:`GridPattern`.
        order: a name of the table.

    Returns:
        int64 array ``[N]`` of tokens in natural order, by place.

    Raises:
        ValueError: for an order that the grid does not have.
    """
    grid, ratio = _checked_grid(grid, ratio)
    _check_grid_order(grid, ratio, order)
    tokens = np.arange(math.prod(grid), dtype=np.int64)
    frame, row, column = np.unravel_index(tokens, grid)
    tile = (frame, row // ratio**2, column // ratio**2)
    owners, ranks = {}, {}
    for kind in KINDS:
        natural = GridPattern(grid, ratio, kind)
        by_length = np.argsort([-length for length in natural.lengths(len(tokens))], kind="stable")
        owners[kind] = natural.owner(tokens)
        ranks[kind] = by_length.argsort()[owners[kind]]
    keys = {
        "natural": (tokens,),
        "tile": (*tile, owners["group"], owners["single"]),
        "skip": (ranks["group"], *tile, owners["single"]),
        "single": (ranks["single"], owners["group"], tokens),
        "group": (ranks["group"], owners["single"], tokens),
    }
    return np.lexsort(keys[order][::-1])


def inverse_grid_order(grid: Sequence[int], ratio: int, order: str) -> np.ndarray:
    """The way back from :func:`grid_order`: ``x = x_in_order[inverse]``, int64 ``[N]``."""
    return np.argsort(grid_order(grid, ratio, order))


def _check_grid_order(grid: Grid, ratio: int, order: str) -> None:
    if not has_grid_order(grid, ratio, order):
        side = ratio * ratio if order == "tile" else ratio
        raise ValueError(
            f'order="{order}" needs {side} to divide rows and columns, got grid={grid} and '
            f'ratio={ratio}; keep "natural" order, or put the tokens in that of the kind'
        )


def _checked_grid(grid: Sequence[int], ratio: int) -> tuple[Grid, int]:
    """Both as Python ints."""
    if not isinstance(grid, Sequence | np.ndarray) or len(grid) != 3:
        raise ValueError(f"grid must be (frames, rows, columns) of tokens, got {grid!r}")
    for name, value in (*zip(("frames", "rows", "columns"), grid, strict=True), ("ratio", ratio)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
        if not 1 <= value <= LARGEST:
            raise ValueError(f"{name} must be in [1, 2**31), got {value}")
    if ratio * ratio > LARGEST:
        raise ValueError(f"ratio * ratio must be below 2**31, got ratio={ratio}; 1 means dense")
    frames, height, width = (int(side) for side in grid)
    return (frames, height, width), int(ratio)


# Skip order: one order of the tokens in which single-skip and group-skip of the same k are both
# plain views (single stays w = 1, group becomes block). No order serves two different k.


def has_skip_order(N: int, k: int) -> bool:
    """Whether ``N`` tokens have a skip order for sparsity ``k``: where ``k*k`` divides ``N``."""
    SkipPattern(k)
    return N % (k * k) == 0


def _check_skip_order(N: int, k: int) -> None:
    if not has_skip_order(N, k):
        raise ValueError(
            f"skip order needs k*k to divide N, got N={N}, k={k}; keep the tokens in natural order"
        )


def skip_order(N: int, k: int) -> np.ndarray:
    """The order in which group-skip of ``k`` is contiguous blocks: ``x_skip = x[order]``.

    Returns:
        int64 array ``[N]``. Token ``a*k*k + m*k + j`` goes to place ``m*(N/k) + a*k + j``.

    Raises:
        ValueError: unless ``k*k`` divides ``N``.
    """
    _check_skip_order(N, k)
    tokens = np.arange(N, dtype=np.int64).reshape(N // (k * k), k, k)
    return tokens.transpose(1, 0, 2).reshape(N)


def inverse_order(N: int, k: int) -> np.ndarray:
    """The way back from :func:`skip_order`: ``x = x_skip[inverse]``, int64 ``[N]``."""
    _check_skip_order(N, k)
    places = np.arange(N, dtype=np.int64).reshape(k, N // (k * k), k)
    return places.transpose(1, 0, 2).reshape(N)


# What it costs.


def attention_flops(
    pattern: Pattern, N: int, T: int, B: int, H: int, D: int, *, queries: int | None = None,
    backward: bool = False,
) -> int:  # fmt: skip
    """Floating-point operations of the matrix products, a multiply-add counting as two.

    Two products forward (``q k^T``, ``p v``), five backward (the scores again, ``dv``, ``dp``,
    ``dq``, ``dk``); softmax and rearrangement are not counted, as is usual for attention.
    ``queries``: as of :meth:`SkipPattern.pairs`.
    """
    return (5 if backward else 2) * 2 * B * H * D * pattern.pairs(N, T, queries)


def ceiling(num_layers: Sequence[int], sparsity: Sequence[int], N: int, T: int = 0) -> float:
    """The most a stack of Skiparse layers can gain over dense attention: the ratio of pairs.

    Stage ``i`` has ``num_layers[i]`` layers of ``sparsity[i]``, single-skip and group-skip in
    turn, beginning with single-skip.

    Raises:
        ValueError: if the two lists differ in length or hold no layer.
    """
    if len(num_layers) != len(sparsity):
        raise ValueError(
            f"num_layers has {len(num_layers)} stages and sparsity {len(sparsity)}; give one each"
        )
    if sum(num_layers) < 1:
        raise ValueError(f"num_layers must hold at least one layer, got {list(num_layers)}")
    stages = zip(num_layers, sparsity, strict=True)
    kinds = {k: (SkipPattern.single(k), SkipPattern.group(k)) for k in sparsity}
    return ceiling_of([kinds[k][i % 2] for layers, k in stages for i in range(layers)], N, T)


def ceiling_of(patterns: Sequence[Pattern], N: int, T: int = 0) -> float:
    """The most that layers of these patterns can gain over dense ones: the ratio of pairs.

    Raises:
        ValueError: if there is no layer, or no token.
    """
    if not patterns:
        raise ValueError("patterns must hold at least one layer's, got none")
    if N + T < 1:
        raise ValueError(f"N + T must be at least 1 token, got N={N}, T={T}")
    spent = sum(number * p.pairs(N, T) for p, number in Counter(patterns).items())
    return len(patterns) * SkipPattern.dense().pairs(N, T) / spent


# How far attention reaches.


def average_distance(patterns: Sequence[Pattern], N: int) -> float:
    """Layers of attention from a token to another one, averaged over all ordered pairs.

    Two tokens are at distance 1 if one of the ``patterns`` puts them in the same sub-sequence,
    and at distance d if d such steps are needed; a token is at distance 1 from itself. Found by
    walking the graph, for any ``N``; ``inf`` if some pair is never joined.

    Source: "average attention distance" of the Open-Sora Plan v1.3 report.
    """
    if N < 1 or not patterns:
        raise ValueError(f"average_distance needs a token and a pattern, got N={N}, {patterns!r}")
    # Tokens that share all their sub-sequences are alike, so walk over the kinds of token.
    token = np.arange(N)
    owners = np.stack([p.owner(token) for p in patterns])
    kinds, count = np.unique(owners, axis=1, return_counts=True)
    adjacent = (kinds[:, :, None] == kinds[:, None, :]).any(axis=0)
    distance = np.where(adjacent, 1.0, np.inf)
    reached = adjacent
    for step in range(2, len(count) + 1):
        further = (reached.astype(np.float32) @ adjacent.astype(np.float32)) > 0
        if (further == reached).all():
            break
        distance[further & ~reached] = step
        reached = further
    weight = np.outer(count, count)
    return float((distance * weight).sum() / weight.sum())


def average_distance_closed_form(k: int) -> float:
    """``2 - 2/k + 1/k**2``: :func:`average_distance` of single-skip with group-skip of ``k``.

    Exact where ``k*k`` divides the number of tokens: a pair shares the single-skip sub-sequence
    with probability 1/k, the group-skip one likewise and independently, and is two apart if not.
    """
    SkipPattern(k)
    return 2 - 2 / k + 1 / k**2
