"""Attention over grids is exact on every one of them, in every order, whichever backend runs it."""

import itertools

import pytest

from skiparse import GridPattern
from skiparse.pattern import KINDS, ORDERS, has_grid_order
from skiparse.testing import check, make_problem, run

# Even and ragged, a period of ratio**2 or a part of it; the last have empty sub-sequences.
GRIDS = (
    ((2, 4, 8), 2), ((1, 6, 10), 2), ((2, 5, 7), 2), ((1, 9, 9), 3), ((1, 7, 5), 3),
    ((1, 6, 9), 4), ((2, 1, 3), 2), ((1, 1, 1), 3),
)  # fmt: skip


def patterns(grid, ratio):
    for kind, order in itertools.product(KINDS, ORDERS):
        if has_grid_order(grid, ratio, order) and (order not in KINDS or order == kind):
            yield GridPattern(grid, ratio, kind, order)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("grid", "ratio"), GRIDS, ids=str)
def test_every_grid_in_every_order(grid, ratio, backend):
    for p in patterns(grid, ratio):
        for T, masked, text_queries in ((0, False, True), (3, True, True), (3, True, False)):
            problem = make_problem(
                p, B=2, N=p.tokens, T=T, D=32, masked=masked, text_queries=text_queries,
                lse_grads=masked,
            )  # fmt: skip
            check(run(problem, backend), problem)
