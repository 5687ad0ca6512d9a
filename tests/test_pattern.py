"""The index maths agrees with itself, token by token, for every small N, n and w."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skiparse import SkipPattern, pattern
from skiparse.pattern import length_of, pos_of, sub_of, token_of

SMALL = list(itertools.product(range(30), range(1, 6), range(1, 6)))


def test_every_token_is_at_its_place():
    for N, n, w in SMALL:
        owned = [[t for t in range(N) if sub_of(t, n, w) == s] for s in range(n)]
        for s, tokens in enumerate(owned):
            assert length_of(s, N, n, w) == len(tokens)
            assert [token_of(s, j, n, w) for j in range(len(tokens))] == tokens
            assert [pos_of(t, n, w) for t in tokens] == list(range(len(tokens)))


@given(st.integers(0, 10**12), st.integers(1, 1000), st.integers(1, 1000))
def test_position_and_token_are_inverse(t, n, w):
    assert token_of(sub_of(t, n, w), pos_of(t, n, w), n, w) == t


def test_the_formulas_mean_the_same_for_tensors():
    t = list(range(200))
    for n, w in ((1, 1), (3, 1), (4, 4), (2, 5)):
        for function in (sub_of, pos_of):
            expected = [function(x, n, w) for x in t]
            assert function(torch.tensor(t), n, w).tolist() == expected
            assert function(np.array(t), n, w).tolist() == expected
        assert token_of(1, torch.tensor(t), n, w).tolist() == [token_of(1, j, n, w) for j in t]


def test_single_group_dense_and_block_are_what_their_names_say():
    N = 16
    owners = {
        SkipPattern.single(4): [t % 4 for t in range(N)],
        SkipPattern.group(4): [t // 4 % 4 for t in range(N)],
        SkipPattern.group(2): [t // 2 % 2 for t in range(N)],
        SkipPattern.dense(): [0] * N,
        SkipPattern.block(4, N): [t // 4 for t in range(N)],
    }
    for p, expected in owners.items():
        assert [sub_of(t, p.sparsity, p.run) for t in range(N)] == expected


def test_blocks_inside_runs_are_consecutive_tokens():
    for block, n, w in itertools.product(range(1, 7), range(1, 4), range(1, 13)):
        starts = range(0, 6 * block, block)
        inside = all(
            token_of(1, first + i, n, w) == token_of(1, first, n, w) + i
            for first in starts
            for i in range(block)
        )
        if pattern.tiles_runs(block, w):
            assert inside
        elif n > 1:
            assert not inside


def test_segments_and_boxes_cover_every_token_once():
    for N, n, w in SMALL:
        p = SkipPattern(n, w)
        segments = p.segments(N)
        assert len(segments) <= 3
        assert [s for g in segments for s in g.subs] == list(range(n))
        for g in segments:
            for s in range(g.number):
                tokens = [
                    (box.first + r * box.shape[2] + i,
                     box.start + s * box.strides[0] + r * box.strides[1] + i * box.strides[2])
                    for box in g.boxes
                    for r in range(box.shape[1])
                    for i in range(box.shape[2])
                ]  # fmt: skip
                expected = [token_of(g.subs[s], j, n, w) for j in range(g.length)]
                assert tokens == list(enumerate(expected)), (N, n, w, g)
            assert all(box.shape[0] == g.number for box in g.boxes)


@pytest.mark.parametrize(("N", "k"), [(16, 2), (64, 4), (72, 3), (128, 8), (9, 3), (0, 2), (5, 1)])
def test_skip_order_makes_both_patterns_regular(N, k):
    order, inverse = pattern.skip_order(N, k), pattern.inverse_order(N, k)
    assert order.dtype == inverse.dtype == np.int64
    assert (order[inverse] == np.arange(N)).all()
    assert (inverse[order] == np.arange(N)).all()
    for i in range(N):
        a, m, j = i // (k * k), i // k % k, i % k
        assert inverse[i] == m * (N // k) + a * k + j
    single, group = SkipPattern.single(k), SkipPattern.group(k)
    places = np.arange(N)
    for natural, skip in ((single, single), (group, SkipPattern.block(k, N))):
        same = sub_of(order, natural.sparsity, natural.run)
        assert (same == sub_of(places, skip.sparsity, skip.run)).all()


def test_skip_order_refuses_what_it_cannot_order():
    with pytest.raises(ValueError, match=r"k\*k to divide N, got N=18, k=4.*natural order"):
        pattern.skip_order(18, 4)
    assert [N for N in range(40) if pattern.has_skip_order(N, 4)] == [0, 16, 32]
    with pytest.raises(ValueError, match=r"sparsity must be in \[1, 2\*\*31\), got 0"):
        pattern.inverse_order(18, 0)


def test_average_distance_is_the_published_table():
    """Open-Sora Plan v1.3 report: k = 2, 4, 6, 8 on 24x32x32 tokens."""
    N = 24 * 32 * 32
    for k, published in ((2, 1.250), (4, 1.563), (6, 1.694), (8, 1.766)):
        both = [SkipPattern.single(k), SkipPattern.group(k)]
        walked = pattern.average_distance(both, N)
        assert abs(walked - published) <= 0.0005  # they print three decimals
        if N % (k * k) == 0:
            assert walked == pytest.approx(pattern.average_distance_closed_form(k), rel=1e-12)


@pytest.mark.parametrize(("N", "k"), [(16, 2), (17, 2), (40, 3), (5, 4), (7, 3), (1, 2)])
def test_average_distance_by_walking_every_token(N, k):
    both = [SkipPattern.single(k), SkipPattern.group(k)]
    near = [
        [any(sub_of(a, p.sparsity, p.run) == sub_of(b, p.sparsity, p.run) for p in both)
         for b in range(N)]
        for a in range(N)
    ]  # fmt: skip
    total = 0
    for start in range(N):
        distance = {b: 1 for b in range(N) if near[start][b]}
        step = 1
        while len(distance) < N:
            frontier = [b for b, d in distance.items() if d == step]
            reached = {c for b in frontier for c in range(N) if near[b][c]} - set(distance)
            assert reached
            step += 1
            distance |= dict.fromkeys(reached, step)
        total += sum(distance.values())
    assert pattern.average_distance(both, N) == pytest.approx(total / N**2, rel=1e-12)


def test_unreachable_tokens_are_infinitely_far():
    assert pattern.average_distance([SkipPattern.single(2)], 10) == float("inf")


def test_pairs_count_every_pair():
    for N, n, w in SMALL:
        for T in (0, 3):
            lengths = [length_of(s, N, n, w) for s in range(n)]
            assert SkipPattern(n, w).pairs(N, T) == sum((length + T) ** 2 for length in lengths)


def test_flops_and_ceilings_of_the_headline_shape():
    """The figures of the study: 17.17 TFLOP dense forward, 0.3926 of the pairs for the schedule."""
    N, T = 36864, 512
    dense = pattern.attention_flops(SkipPattern.dense(), N, T, 1, 24, 128)
    assert f"{dense / 1e12:.2f}" == "17.17"
    assert pattern.attention_flops(SkipPattern.dense(), N, T, 1, 24, 128, backward=True) == (
        dense * 5 // 2
    )
    layers, k = [2, 4, 6, 8, 6, 4, 2], [1, 2, 4, 8, 4, 2, 1]
    assert f"{pattern.ceiling(layers, k, N, T):.3f}" == "2.547"
    assert f"{pattern.ceiling(layers, k, N):.3f}" == "2.667"
    for one, expected in ((2, "1.95"), (4, "3.69"), (8, "6.66")):
        assert f"{pattern.ceiling([1], [one], N, T):.2f}" == expected


def test_ceiling_refuses_lists_that_do_not_match():
    with pytest.raises(ValueError, match="num_layers has 2 stages and sparsity 1"):
        pattern.ceiling([1, 2], [1], 8)
    with pytest.raises(ValueError, match="at least one layer"):
        pattern.ceiling([0], [1], 8)
    with pytest.raises(ValueError, match="at least 1 token"):
        pattern.ceiling([1], [1], 0)


@pytest.mark.parametrize("bad", [0, -1, True, False, 2.0, "4", None])
def test_pattern_refuses_bad_numbers(bad):
    with pytest.raises(ValueError, match="sparsity must be"):
        SkipPattern(bad)
    with pytest.raises(ValueError, match="run must be"):
        SkipPattern(2, bad)
    for make in (SkipPattern.single, SkipPattern.group):
        with pytest.raises(ValueError, match="sparsity must be"):
            make(bad)


def test_block_needs_k_to_divide():
    with pytest.raises(ValueError, match=r"block\(k=3, N=10\): k must divide N"):
        SkipPattern.block(3, 10)
    assert SkipPattern.block(3, 0) == SkipPattern(3, 1)


def test_pattern_needs_no_torch():
    """pattern.py is numpy at most: run it alone, with torch barred."""
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        f"source = open({pattern.__file__!r}).read()\n"
        "import types; m = types.ModuleType('pattern'); sys.modules['pattern'] = m\n"
        "exec(compile(source, 'pattern.py', 'exec'), m.__dict__)\n"
        "print(json.dumps(m.SkipPattern.group(4).pairs(64)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == SkipPattern.group(4).pairs(64)


def test_a_segment_splits_into_the_same_sub_sequences():
    for N, n, w in SMALL:
        for segment in SkipPattern(n, w).segments(N):
            for most in (1, 2, 3):
                parts = segment.split(most)
                assert all(part.number <= most for part in parts)
                starts = [
                    (part.subs[s], box.first, box.start + s * box.strides[0], box.shape[1:])
                    for part in parts
                    for s in range(part.number)
                    for box in part.boxes
                ]
                whole = [
                    (segment.subs[s], box.first, box.start + s * box.strides[0], box.shape[1:])
                    for s in range(segment.number)
                    for box in segment.boxes
                ]
                assert starts == whole


@pytest.mark.parametrize(
    ("p", "N"),
    [
        (SkipPattern.single(4), 24), (SkipPattern.single(3), 25), (SkipPattern.group(2), 24),
        (SkipPattern.block(4, 24), 24), (SkipPattern(3, 4), 24), (SkipPattern(1, 7), 24),
        (SkipPattern.group(2), 0), (SkipPattern.single(2), 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("T", [0, 1, 5])
def test_packed_sub_sequences_are_the_old_ones_with_the_text_behind(p, N, T):
    """The rows of a buffer are dealt to sub-sequences, each as long as its tokens and the text."""
    n, packed = p.sparsity, p.packed(N, T)
    assert p.can_pack(N)
    assert packed.sparsity == n
    assert packed.lengths(N + n * T) == [length + T for length in p.lengths(N)]


def test_packed_text_is_where_the_docstring_says():
    single, group = SkipPattern.single(4), SkipPattern.group(2).packed(24, 5)
    for g in range(4):
        for t in range(5):
            assert token_of(g, 24 // 4 + t, 4, single.packed(24, 5).run) == 24 + t * 4 + g
    assert [token_of(s, 12, 2, group.run) for s in range(2)] == [12, 29]  # behind 12 video rows


def test_packed_needs_sub_sequences_of_one_length():
    assert not SkipPattern.group(2).can_pack(25)
    with pytest.raises(ValueError, match=r"packed\(N=25\).*must divide N"):
        SkipPattern.group(2).packed(25, 5)
