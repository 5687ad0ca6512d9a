"""The index maths of grids agrees with its definition, token by token, and with the original's."""

import dataclasses
import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from skiparse import GridPattern, SkipPattern, pattern
from skiparse.pattern import KINDS, ORDERS, BlockPattern, grid_order, has_grid_order

RECORDED = Path(__file__).parent / "data" / "osp_next_index.safetensors"
GRIDS = list(itertools.product((1, 2), (1, 2, 3, 5, 8, 9), (1, 4, 7, 8), (1, 2, 3, 4)))
WAN = {"480P": (21, 30, 52), "720P": (21, 45, 80), "576": (21, 36, 64), "768P": (21, 48, 84)}


def owners(grid, p, kind):
    """The definition, in three loops."""
    w = 1 if kind == "single" else p
    return [
        (y // w % p) * p + x // w % p
        for _, y, x in itertools.product(*map(range, grid))
    ]  # fmt: skip


def patterns():
    for *grid, p in GRIDS:
        for kind, order in itertools.product(KINDS, ORDERS):
            if has_grid_order(grid, p, order) and (order not in KINDS or order == kind):
                yield GridPattern(tuple(grid), p, kind, order)


def test_every_token_is_at_its_place():
    for p in patterns():
        places = np.arange(p.tokens)
        found = p.owner(places)
        for s in range(p.sparsity):
            tokens = np.flatnonzero(found == s)
            assert p.length(s, p.tokens) == p.lengths(p.tokens)[s] == len(tokens)
            assert (np.sort(p.token(s, np.arange(len(tokens)))) == tokens).all()
            if p.order == "natural":
                assert [p.token(s, j) for j in range(len(tokens))] == tokens.tolist()
                assert [p.owner(int(t)) for t in tokens] == [s] * len(tokens)
        if p.order == "natural":
            assert found.tolist() == owners(p.grid, p.ratio, p.kind)
        assert p.owner(torch.from_numpy(places)).tolist() == found.tolist()


def test_the_index_maps_of_the_original():
    """Token by token in its order; what it pads is not there."""
    recorded = load_file(RECORDED)
    assert len(recorded) == 14
    for name, places in recorded.items():
        (ratio, sides), kind = name.split("/")[0].split("."), name.split("/")[1]
        grid = tuple(int(side) for side in sides.split("x"))
        p = GridPattern(grid, int(ratio[1:]), "single" if kind == "token" else "group")
        for s, row in enumerate(places.tolist()):
            tokens = [t for t in row if t >= 0]
            assert p.length(s, p.tokens) == len(tokens), name
            assert p.token(s, np.arange(len(tokens))).tolist() == tokens, name


def test_segments_and_boxes_cover_every_token_once():
    for p in patterns():
        found = p.owner(np.arange(p.tokens))
        segments = p.segments(p.tokens)
        lengths = [segment.length for segment in segments]
        assert lengths == sorted(set(lengths), reverse=True) or isinstance(p.resolved, SkipPattern)
        assert sorted(s for segment in segments for s in segment.subs) == list(range(p.sparsity))
        for segment in segments:
            cut = [s for part in segment.slices for s in range(part.start, part.stop)]
            assert cut == list(segment.subs)
            for i, s in enumerate(segment.subs):
                tokens = list(boxed(segment, i))
                assert [position for position, _ in tokens] == list(range(segment.length))
                assert {t for _, t in tokens} == set(np.flatnonzero(found == s))


def boxed(segment, i):
    """Position and token of everything that the boxes hold of a segment's ``i``-th."""
    for box in segment.boxes:
        if box.at <= i < box.at + box.shape[0]:
            start = box.start + (i - box.at) * box.strides[0]
            for place, index in enumerate(itertools.product(*map(range, box.shape[1:]))):
                steps = zip(index, box.strides[1:], strict=True)
                yield box.first + place, start + sum(a * b for a, b in steps)


def test_a_segment_splits_into_the_same_sub_sequences():
    for grid, p, kind in (
        ((2, 9, 7), 3, "group"),
        ((1, 30, 52), 4, "group"),
        ((1, 5, 3), 4, "single"),
    ):
        for segment in GridPattern(grid, p, kind).segments(np.prod(grid)):
            whole = [list(boxed(segment, i)) for i in range(segment.number)]
            for most in (1, 2, 3):
                parts = segment.split(most)
                assert [s for part in parts for s in part.subs] == list(segment.subs)
                assert all(part.number <= most for part in parts)
                found = [list(boxed(part, i)) for part in parts for i in range(part.number)]
                assert found == whole


def test_orders_put_sub_sequences_together():
    """What the table in `grid_order` promises, for every order of every grid."""
    seen = set()
    for *grid, p in GRIDS:
        natural = {kind: GridPattern(tuple(grid), p, kind) for kind in KINDS}
        for order in ORDERS:
            if not has_grid_order(grid, p, order):
                continue
            places = grid_order(grid, p, order)
            assert places.dtype == np.int64
            inverse = pattern.inverse_grid_order(grid, p, order)
            assert (places[inverse] == np.arange(len(places))).all()
            for kind in KINDS:
                if order in KINDS and order != kind:
                    continue
                there = GridPattern(tuple(grid), p, kind, order)
                a, b = natural[kind].owner(places), there.owner(np.arange(len(places)))
                pairs = set(zip(a.tolist(), b.tolist(), strict=True))
                assert len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))
                seen.add((order, kind, type(there.resolved).__name__))
    dense = {(order, kind, "SkipPattern") for order in ORDERS for kind in KINDS}
    assert {x for x in seen if x[2] != "SkipPattern"} == {
        ("natural", "single", "GridPattern"), ("natural", "group", "GridPattern"),
        ("skip", "group", "BlockPattern"),
        ("single", "single", "BlockPattern"), ("group", "group", "BlockPattern"),
    }  # fmt: skip
    assert seen - {x for x in seen if x[2] != "SkipPattern"} <= dense


def test_where_the_square_of_the_ratio_divides_it_is_the_pattern_of_a_sequence():
    for grid, p in (((2, 8, 12), 2), ((1, 4, 4), 2), ((2, 9, 18), 3), ((1, 16, 16), 4)):
        N, k = int(np.prod(grid)), p * p
        tile, skip = grid_order(grid, p, "tile"), grid_order(grid, p, "skip")
        assert (skip == tile[pattern.skip_order(N, k)]).all()
        for order, group in (("tile", SkipPattern.group(k)), ("skip", SkipPattern.block(k, N))):
            assert GridPattern.single(grid, p, order=order).resolved == SkipPattern.single(k)
            assert GridPattern.group(grid, p, order=order).resolved == group


def test_lengths_of_the_grids_that_people_train():
    """Length / frames and how many, as the study found them; token-wise, then group-wise."""
    expected = {
        ("480P", 2): ([(390, 4)], [(416, 2), (364, 2)]),
        ("480P", 4): ([(104, 8), (91, 8)], [(128, 3), (96, 10), (72, 3)]),
        ("720P", 2): ([(920, 2), (880, 2)], [(920, 2), (880, 2)]),
        ("720P", 4): ([(240, 4), (220, 12)], [(240, 12), (180, 4)]),
        ("576", 2): ([(576, 4)], [(576, 4)]),
        ("576", 4): ([(144, 16)], [(192, 4), (128, 12)]),
        ("768P", 2): ([(1008, 4)], [(1008, 4)]),
        ("768P", 4): ([(252, 16)], [(288, 4), (240, 12)]),
    }
    for (name, p), kinds in expected.items():
        for kind, lengths in zip(KINDS, kinds, strict=True):
            grid = GridPattern(WAN[name], p, kind)
            found = [(s.length / 21, s.number) for s in grid.segments(grid.tokens)]
            assert found == lengths, (name, p, kind)


def test_pairs_flops_and_ceilings():
    for p in patterns():
        lengths = np.bincount(owners(p.grid, p.ratio, p.kind), minlength=p.sparsity)
        for T in (0, 3):
            assert p.pairs(p.tokens, T) == sum((int(length) + T) ** 2 for length in lengths)
    p = GridPattern.group(WAN["720P"], 2)
    assert pattern.attention_flops(p, 75_600, 0, 1, 40, 128) == 4 * 40 * 128 * p.pairs(75_600)
    # 40 layers of which 8 are dense: the table of the study.
    for name, ceiling in (("480P", 2.497), ("576", 2.500), ("720P", 2.499), ("768P", 2.500)):
        sparse = [GridPattern(WAN[name], 2, KINDS[i % 2]) for i in range(32)]
        layers = [*sparse, *[SkipPattern.dense()] * 8]
        assert round(pattern.ceiling_of(layers, sparse[0].tokens), 3) == ceiling
    with pytest.raises(ValueError, match="patterns must hold at least one layer's"):
        pattern.ceiling_of([], 8)


def test_average_distance():
    """The closed form of a sequence with k = ratio**2; infinite where a chunk is empty."""
    for grid, p in (((2, 8, 8), 2), ((1, 9, 18), 3)):
        both = [GridPattern(grid, p, kind) for kind in KINDS]
        found = pattern.average_distance(both, both[0].tokens)
        assert found == pytest.approx(pattern.average_distance_closed_form(p * p), rel=1e-12)
    ragged = [GridPattern((1, 5, 7), 2, kind) for kind in KINDS]
    assert 1.5 < pattern.average_distance(ragged, 35) < 1.6
    tiny = [GridPattern((1, 1, 2), 2, kind) for kind in KINDS]
    assert pattern.average_distance(tiny, 2) == 1  # both are of the same group


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 8), 2), r"grid must be \(frames, rows, columns\) of tokens, got \(2, 8\)"),
        ((8, 2), "grid must be .* got 8"),
        (((2, 0, 8), 2), r"rows must be in \[1, 2\*\*31\), got 0"),
        (((2.0, 8, 8), 2), "frames must be an int >= 1, got 2.0"),
        (((2, 8, True), 2), "columns must be an int >= 1, got True"),
        (((2, 8, 8), 0), r"ratio must be in \[1, 2\*\*31\), got 0"),
        (((2, 8, 8), "2"), "ratio must be an int >= 1, got '2'"),
        (((2, 8, 8), 2**16), r"ratio \* ratio must be below 2\*\*31, got ratio=65536"),
        (((2, 8, 8), 2, "token"), r"kind must be one of \('single', 'group'\), got 'token'"),
        (((2, 8, 8), 2, "single", "rows"), r"order must be one of \('natural', .*got 'rows'"),
        (((2, 6, 8), 2, "single", "tile"), r'order="tile" needs 4 .*\(2, 6, 8\) and ratio=2; keep'),
        (((2, 5, 8), 2, "group", "skip"), 'order="skip" needs 2 to divide rows and columns'),
        (((2, 8, 8), 2, "single", "group"), 'order="group" scatters .*kind="single"; for it put'),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        GridPattern(*arguments)


def test_another_number_of_tokens_is_refused():
    p = GridPattern.single((2, 3, 4), 2)
    for call in (p.pairs, p.segments, p.lengths, lambda N: p.length(0, N)):
        with pytest.raises(ValueError, match=r"grid=\(2, 3, 4\) has 24 tokens, not 25; give"):
            call(25)


def test_a_pattern_is_a_value():
    p = GridPattern.group(np.array([2, 3, 4]), np.int64(2))
    assert p == GridPattern([2, 3, 4], 2, "group") == pickle.loads(pickle.dumps(p))
    assert len({p, GridPattern((2, 3, 4), 2, "group"), dataclasses.replace(p, kind="single")}) == 2
    assert all(type(number) is int for number in (*p.grid, p.ratio, *p.numbers))
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.ratio = 3


def test_numbers_tell_the_operator_everything():
    for p in patterns():
        resolved = pattern.pattern_of(p.numbers)
        assert resolved == p.resolved
        N = p.tokens
        assert resolved.owner(np.arange(N)) is not None
        assert sorted(resolved.lengths(N)) == sorted(p.lengths(N))
        if isinstance(resolved, BlockPattern):
            assert resolved.lengths(N) == sorted(p.lengths(N), reverse=True)
