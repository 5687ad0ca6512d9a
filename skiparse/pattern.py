"""Which tokens attend to each other: the index maths of Skiparse attention, and what it saves.

One family of patterns: ``n`` interleaved sub-sequences dealt out in runs of ``w`` consecutive
tokens. ``w = 1`` is single-skip, ``w = n`` group-skip, ``n = 1`` dense attention, and
``w = N / n`` cuts the sequence into ``n`` contiguous blocks::

    token    0 1 2 3 4 5 6 7 8 9 ...
    n=2 w=1  0 1 0 1 0 1 0 1 0 1        the sub-sequence that owns each token
    n=2 w=2  0 0 1 1 0 0 1 1 0 0

Everything is exact for every ``N >= 0``: a sequence that does not divide evenly leaves
sub-sequences of different lengths, never padding. No other file contains an index formula.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LARGEST = 2**31 - 1  # a sparsity or a run, so that their product is a 64-bit number

Index = Any  # a Python int, or an array, tensor or Triton value of integers

# The four formulas. All arithmetic is on non-negative integers, so they mean the same for Python
# ints, numpy, torch and Triton (`triton.jit(token_of)`).


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


def tiles_runs(block: int, w: int) -> bool:
    """Whether blocks of that many positions, counted from 0, each lie inside one run.

    Then ``token_of`` of a block's first position, plus 0, 1, 2, ..., are the tokens of the block.
    """
    return w % block == 0


class Box(NamedTuple):
    """What one strided view can address: tokens ``start + (s, r, i) . strides``.

    ``shape`` counts (sub-sequences, runs, tokens in a run). The tokens of one sub-sequence lie in
    order of (r, i), beginning at position ``first`` of the sub-sequence.
    """

    first: int
    start: int
    shape: tuple[int, int, int]
    strides: tuple[int, int, int]


class Segment(NamedTuple):
    """Neighbouring sub-sequences ``[first, first + number)`` that have the same ``length``.

    ``boxes`` cover their tokens: one box, or two where the last run is cut short by the end of
    the sequence, or none if ``length`` is 0.
    """

    first: int
    number: int
    length: int
    boxes: tuple[Box, ...]

    def split(self, most: int) -> list[Segment]:
        """The same sub-sequences in segments of ``most`` at a time."""
        return [
            Segment(
                self.first + skip,
                min(most, self.number - skip),
                self.length,
                tuple(
                    box._replace(
                        start=box.start + skip * box.strides[0],
                        shape=(min(most, self.number - skip), *box.shape[1:]),
                    )
                    for box in self.boxes
                ),
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
        return [length_of(s, N, self.sparsity, self.run) for s in range(self.sparsity)]

    def pairs(self, N: int, T: int = 0) -> int:
        """Query-key pairs of joint attention over ``N`` video and ``T`` text tokens.

        Each sub-sequence attends over itself and all the text, text queries included, so this is
        the sum of ``(length + T)**2``; ``sparsity * (N / sparsity + T)**2`` if it divides ``N``.
        """
        return sum(s.number * (s.length + T) ** 2 for s in self.segments(N))

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
        return Segment(first, number, length, tuple(boxes))


@functools.lru_cache(1024)  # a call asks several times, and a model has few patterns
def _segments(pattern: SkipPattern, N: int) -> tuple[Segment, ...]:
    return tuple(pattern._segments(N))


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
    pattern: SkipPattern, N: int, T: int, B: int, H: int, D: int, *, backward: bool = False
) -> int:
    """Floating-point operations of the matrix products, a multiply-add counting as two.

    Two products forward (``q k^T``, ``p v``), five backward (the scores again, ``dv``, ``dp``,
    ``dq``, ``dk``); softmax and rearrangement are not counted, as is usual for attention.
    """
    return (5 if backward else 2) * 2 * B * H * D * pattern.pairs(N, T)


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
    if N + T < 1:
        raise ValueError(f"N + T must be at least 1 token, got N={N}, T={T}")
    spent = sum(
        (layers + 1) // 2 * SkipPattern.single(k).pairs(N, T)
        + layers // 2 * SkipPattern.group(k).pairs(N, T)
        for layers, k in zip(num_layers, sparsity, strict=True)
    )
    return sum(num_layers) * SkipPattern.dense().pairs(N, T) / spent


# How far attention reaches.


def average_distance(patterns: Sequence[SkipPattern], N: int) -> float:
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
    owners = np.stack([sub_of(token, p.sparsity, p.run) for p in patterns])
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
