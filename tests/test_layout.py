"""Which process owns which token: nothing is lost, what should be local is, and the volumes."""

import itertools

import numpy as np
import pytest

from skiparse import GridPattern, SkipPattern
from skiparse.layout import Layout, chunk_sizes, moved, route
from skiparse.pattern import counterpart

DENSE = SkipPattern.dense()
LENGTHS = (0, 1, 7, 16, 53, 64, 130)
GRIDS = ((1, 2, 3), (2, 5, 7), (2, 8, 8), (1, 9, 16))


def patterns():
    for k in (1, 2, 3, 4, 8):
        for N in LENGTHS:
            yield from ((SkipPattern.single(k), N), (SkipPattern.group(k), N))
    for grid, p in itertools.product(GRIDS, (1, 2, 3, 4)):
        for kind in ("single", "group"):
            yield GridPattern(grid, p, kind), int(np.prod(grid))


def layouts():
    for pattern, N in patterns():
        for P in (1, 2, 3, 4, 6, 8, 12):
            for teams in range(1, min(P, pattern.sparsity) + 1):
                if P % teams == 0:
                    yield Layout(pattern, N, P, teams)


def test_every_token_has_one_owner_and_lies_by_sub_sequence():
    for layout in layouts():
        owned = [layout.owned(r) for r in range(layout.processes)]
        assert [len(x) for x in owned] == list(layout.sizes)
        assert sorted(np.concatenate(owned).tolist()) == list(range(layout.tokens))
        for rank, tokens in enumerate(owned):
            assert (layout.ranks[tokens] == rank).all()
            subs = [s for s, _ in itertools.groupby(layout.pattern.owner(tokens).tolist())]
            assert len(subs) == len(set(subs))  # each in one piece


def test_a_sub_sequence_has_one_team():
    for layout in layouts():
        sub = layout.pattern.owner(np.arange(layout.tokens))
        assert (layout.ranks % layout.teams == sub % layout.teams).all()


def test_one_team_is_even():
    for layout in layouts():
        if layout.teams == 1 and layout.pattern.sparsity == 1:
            assert max(layout.sizes) - min(layout.sizes) <= 1


@pytest.mark.parametrize("P", [2, 4, 8])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_single_skip_of_any_sparsity_has_one_layout(P, k):
    for N in LENGTHS:
        layout = Layout(SkipPattern.single(k), N, P, min(P, k))
        assert (layout.ranks == np.arange(N) % P).all()


def exchanged(before, after):
    """Do a switch with arrays in the place of messages."""
    P = before.processes
    boxes = [[None] * P for _ in range(P)]
    for rank in range(P):
        switch, mine = before.switch(after, rank), before.owned(rank)
        mine = mine if switch.pack is None else mine[switch.pack]
        assert sum(switch.sent) == len(mine)
        for other, part in enumerate(np.split(mine, np.cumsum(switch.sent)[:-1])):
            boxes[other][rank] = part
    for rank in range(P):
        switch = before.switch(after, rank)
        assert [len(part) for part in boxes[rank]] == list(switch.received)
        came = np.concatenate(boxes[rank])
        yield came if switch.unpack is None else came[switch.unpack]


def test_a_switch_brings_every_token_to_its_place():
    for pattern, N in patterns():
        other = counterpart(pattern)
        for P in (1, 2, 3, 4, 8):
            for a, b in itertools.product(
                (DENSE, pattern, other), (DENSE, SkipPattern.group(2), pattern, other)
            ):
                before, after = Layout.of(a, N, P), Layout.of(b, N, P, most=P)
                for rank, tokens in enumerate(exchanged(before, after)):
                    assert (tokens == after.owned(rank)).all()
                chunks = chunk_sizes(before, after)
                assert chunks.sum() - chunks.trace() == moved(before, after)


def test_those_who_meet_have_whole_sub_sequences():
    for layout in layouts():
        for pattern in (DENSE, layout.pattern, counterpart(layout.pattern), SkipPattern.group(3)):
            meetings = layout.meetings(pattern)
            seen = {}
            for rank, meeting in enumerate(meetings):
                assert rank in meeting.members
                assert meetings[meeting.members[0]] is meeting
                seen[meeting.members] = meeting
            owner = pattern.owner(np.arange(layout.tokens))
            lengths = np.bincount(owner, minlength=pattern.sparsity)
            blocks = sum((m.blocks for m in seen.values()), ())
            assert sorted(length for n, length in blocks for _ in range(n)) == sorted(lengths)
            for meeting in seen.values():
                come = np.concatenate([layout.owned(r) for r in meeting.members])
                tokens = come if meeting.gather is None else come[meeting.gather]
                assert (tokens == meeting.tokens).all()
                at = 0
                for number, length in meeting.blocks:
                    for _ in range(number * (length > 0)):
                        (sub,) = set(owner[tokens[at : at + length]].tolist())
                        assert lengths[sub] == length
                        at += length
                assert at == len(tokens)
                heads = [meeting.heads(r, 5) for r in meeting.members]
                assert [h for share in heads for h in share] == list(range(5))


def test_nobody_meets_in_a_layer_of_the_layout():
    for layout in layouts():
        if layout.teams == layout.processes:
            assert layout.alone(layout.pattern)
            assert layout.sent(layout.pattern, 4) == 0


@pytest.mark.parametrize(
    ("P", "k", "single", "group"),
    [(2, 2, 0, 2), (4, 4, 0, 3), (8, 8, 0, 3.5), (4, 2, 2, 2), (8, 4, 2, 3), (8, 2, 3, 3)],
)
def test_volumes_where_tokens_stay(P, k, single, group):
    """Times every token's vector; where one divides the other, 4 (1 - 1/G) for teams of G."""
    N, heads = 512, 8
    layout = Layout.of(SkipPattern.single(k), N, P)
    assert layout.sent(SkipPattern.single(k), heads) == single * N * heads
    assert layout.sent(SkipPattern.group(k), heads) == group * N * heads
    assert layout.sent(DENSE, heads) == 4 * (1 - 1 / P) * N * heads


def test_volumes_of_a_switch():
    for P, k in ((2, 2), (2, 8), (4, 4), (4, 8), (8, 8)):
        pair = (Layout.of(p, 512, P) for p in (SkipPattern.single(k), SkipPattern.group(k)))
        assert moved(*pair) == 512 * (1 - 1 / P)
    for p in (2, 4):
        pair = (Layout.of(GridPattern((2, 16, 16), p, x), 512, 4) for x in ("single", "group"))
        assert moved(*pair) == 512 * 3 / 4


def test_uneven_layouts_are_avoided():
    """Four sub-sequences for three processes: one would have twice as much as the others."""
    single = SkipPattern.single(4)
    assert Layout.of(single, 64, 3).teams == 1
    assert Layout.of(single, 64, 3, most=1.5).teams == 3
    assert Layout.of(SkipPattern.single(8), 64, 3).teams == 3  # 3, 3 and 2 of eight: 1.125
    assert Layout.of(single, 64, 6).teams == 2
    assert Layout.of(single, 64, 8).teams == 4


def everything(patterns, choices, heads, skips):
    """The least that is sent, by trying all."""
    N = choices[0].tokens
    least = 4 * len(patterns) * heads * N
    for path in itertools.product(choices, repeat=len(patterns)):
        sent = sum(layout.sent(p, heads) for layout, p in zip(path, patterns, strict=True))
        sent += heads * sum(moved(a, b) for a, b in itertools.pairwise(path))
        for i, j in skips:
            sent += heads * min(moved(path[i], path[j]), moved(path[i + 1], path[j]))
        least = min(least, sent)
    return least


@pytest.mark.parametrize("P", [2, 3, 4, 8])
@pytest.mark.parametrize("skips", [(), ((0, 5),), ((1, 4),), ((0, 5), (1, 4)), ((0, 1), (2, 3))])
def test_the_route_is_the_cheapest(P, skips):
    single, group, other = SkipPattern.single(4), SkipPattern.group(4), SkipPattern.group(2)
    layers = (DENSE, single, group, other, group, DENSE)
    choices = list(dict.fromkeys(Layout.of(p, 61, P) for p in layers))
    made = route(layers, 61, P, 4, skips=skips)
    assert made.sent == everything(layers, choices, 4, skips)
    assert made.sent == 4 * sum(made.moves) + sum(
        layout.sent(p, 4) for layout, p in zip(made.layouts, layers, strict=True)
    )


def suv(N, P):
    stages = ((2, 1), (4, 2), (6, 4), (8, 8), (6, 4), (4, 2), (2, 1))
    layers = [
        (SkipPattern.single(k), SkipPattern.group(k))[i % 2] for n, k in stages for i in range(n)
    ]
    return route(layers, N, P, 24, skips=((1, 30), (5, 26), (11, 20)))


@pytest.mark.parametrize(("P", "units", "ulysses"), [(2, 22, 64), (4, 43, 96), (8, 75, 112)])
def test_volumes_of_the_released_model(P, units, ulysses):
    """Times every token's vector; by hand, with layers of k < P where the tokens are."""
    made = suv(36864, P)
    assert made.sent == units * 24 * 36864
    assert made.ulysses == ulysses * 24 * 36864


def test_volumes_of_a_14b_in_2d():
    """Four dense layers, 32 in turn, four dense: 8 of 4 and 31 switches of 1, by (1 - 1/P)."""
    grid = (21, 36, 64)
    single, group = GridPattern.single(grid, 2), GridPattern.group(grid, 2)
    made = route([DENSE] * 4 + [single, group] * 16 + [DENSE] * 4, 48384, 4, 40)
    unit = 48384 * 40 * 3 // 4
    assert made.sent == 63 * unit
    assert made.ulysses == 160 * unit


def test_what_makes_no_layout_is_refused():
    for arguments, words in (
        ((SkipPattern(4), -1, 2, 1), "tokens >= 0 and processes >= 1, got -1 and 2"),
        ((SkipPattern(4), 8, 0, 1), "tokens >= 0 and processes >= 1, got 8 and 0"),
        ((SkipPattern(2), 8, 4, 4), "teams must divide processes=4, .* the 2 sub-sequences"),
        ((SkipPattern(4), 8, 4, 3), "teams must divide processes=4"),
        ((GridPattern.single((2, 2, 2), 2), 9, 2, 1), "has 8 tokens, not 9"),
        (
            (GridPattern.single((2, 2, 2), 2, order="skip"), 8, 2, 1),
            'in order "natural", not "skip"',
        ),
        (("single", 8, 2, 1), "pattern must be a SkipPattern or a GridPattern"),
    ):
        with pytest.raises(ValueError, match=words):
            Layout(*arguments)
    layout = Layout.of(SkipPattern(4), 8, 2)
    with pytest.raises(
        ValueError, match="as many tokens and processes; got 8 and 9 tokens, 2 and 2"
    ):
        layout.switch(Layout.of(SkipPattern(4), 9, 2), 0)
    with pytest.raises(ValueError, match="needs a layer and a head, got 0 and 4"):
        route([], 8, 2, 4)
