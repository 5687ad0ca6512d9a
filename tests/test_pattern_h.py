"""The kernels' index maths is Python's, for every small N, n and w."""

import itertools

import built
import pytest

from skiparse import pattern

built.require_tools(allow_module_level=True)

MODULE = """
#include "../pattern.h"
#include <pybind11/pybind11.h>

PYBIND11_MODULE(pattern, m) {
    m.def("sub_of", skiparse::sub_of);
    m.def("pos_of", skiparse::pos_of);
    m.def("token_of", skiparse::token_of);
    m.def("length_of", skiparse::length_of);
    using Runs = skiparse::Runs;
    m.def("runs_at", [](int64_t s, int64_t j, int64_t end, int64_t n, int64_t w) -> Runs {
        return skiparse::runs_at(s, j, end, n, w);
    });
    m.def("runs_of", [](int64_t s, int64_t j, int64_t end, int64_t n, int64_t w) -> Runs {
        return skiparse::runs_at(skiparse::deal_of(s, n, w), j, end);
    });
    pybind11::class_<skiparse::Runs>(m, "Runs")
        .def_readonly("token", &skiparse::Runs::token)
        .def_readonly("runs", &skiparse::Runs::runs)
        .def_readonly("length", &skiparse::Runs::length)
        .def_readonly("apart", &skiparse::Runs::apart);
}
"""
FAMILY = list(itertools.product(range(1, 6), range(1, 6)))
LARGEST = 24  # tokens, so that the last period is cut at every place


@pytest.fixture(scope="module")
def compiled():
    return built.module("pattern", {"pattern.cpp": MODULE})


@pytest.mark.parametrize("name", ["sub_of", "pos_of"])
def test_tokens(compiled, name):
    for t, (n, w) in itertools.product(range(LARGEST * 4), FAMILY):
        assert getattr(compiled, name)(t, n, w) == getattr(pattern, name)(t, n, w)


def test_places_and_lengths(compiled):
    for (n, w), N in itertools.product(FAMILY, range(LARGEST)):
        for s in range(n):
            assert compiled.length_of(s, N, n, w) == pattern.length_of(s, N, n, w)
            assert compiled.token_of(s, N, n, w) == pattern.token_of(s, N, n, w)


def test_numbers_beyond_32_bits(compiled):
    t, n, w = 10**12 + 7, 1000, 999
    assert compiled.token_of(compiled.sub_of(t, n, w), compiled.pos_of(t, n, w), n, w) == t


def test_runs_cover_any_positions_in_order_with_at_most_three_copies(compiled):
    for (n, w), first, end in itertools.product(FAMILY, range(LARGEST), range(LARGEST)):
        for s in range(n):
            tokens, copies, j = [], 0, first
            while j < end:
                runs = compiled.runs_at(s, j, end, n, w)
                starts = (runs.token + run * runs.apart for run in range(runs.runs))
                tokens += [start + i for start in starts for i in range(runs.length)]
                copies, j = copies + 1, j + runs.runs * runs.length
            assert tokens == [pattern.token_of(s, j, n, w) for j in range(first, end)]
            assert copies <= 3


@pytest.mark.parametrize("w", [1, 2, 3, 8, 48, 64, 65, 100, 128, 1000])
def test_runs_with_divisions_made_beforehand_are_the_same(compiled, w):
    """Of tiles of 64 positions, and of any others."""
    firsts = (0, 1, 63, 64, 65, 128, 192, 1024)
    for n, first, count in itertools.product((1, 2, 8), firsts, (1, 2, 63, 64, 65, 127, 128, 256)):
        for s in {0, n - 1}:
            expected, found = (
                (x.token, x.runs, x.length, x.apart)
                for x in (
                    compiled.runs_at(s, first, first + count, n, w),
                    compiled.runs_of(s, first, first + count, n, w),
                )
            )
            assert found == expected, (n, s, first, count)
