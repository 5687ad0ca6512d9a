"""The kernels' index maths is Python's, for every small N, n and w."""

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from skiparse import pattern

HEADER = Path(__file__).parents[1] / "csrc" / "pattern.h"
SHIM = """
#include "pattern.h"
extern "C" {
int64_t sub_of(int64_t t, int64_t n, int64_t w) { return skiparse::sub_of(t, n, w); }
int64_t pos_of(int64_t t, int64_t n, int64_t w) { return skiparse::pos_of(t, n, w); }
int64_t token_of(int64_t s, int64_t j, int64_t n, int64_t w) {
    return skiparse::token_of(s, j, n, w);
}
int64_t length_of(int64_t s, int64_t N, int64_t n, int64_t w) {
    return skiparse::length_of(s, N, n, w);
}
void runs_at(int64_t s, int64_t j, int64_t end, int64_t n, int64_t w, skiparse::Runs* runs) {
    *runs = skiparse::runs_at(s, j, end, n, w);
}
void runs_of(int64_t s, int64_t j, int64_t end, int64_t n, int64_t w, skiparse::Runs* runs) {
    *runs = skiparse::runs_at(skiparse::deal_of(s, n, w), j, end);
}
}
"""
FAMILY = list(itertools.product(range(1, 6), range(1, 6)))
LARGEST = 24  # tokens, so that the last period is cut at every place


class Runs(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("token", "runs", "length", "apart"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("pattern")
    source, library = folder / "shim.cpp", folder / "shim.so"
    source.write_text(SHIM)
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{HEADER.parent}")
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name, arguments in (("sub_of", 3), ("pos_of", 3), ("token_of", 4), ("length_of", 4)):
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * arguments
    for function in (loaded.runs_at, loaded.runs_of):
        function.restype = None
        function.argtypes = [ctypes.c_int64] * 5 + [ctypes.POINTER(Runs)]
    return loaded


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
    runs = Runs()
    for (n, w), first, end in itertools.product(FAMILY, range(LARGEST), range(LARGEST)):
        for s in range(n):
            tokens, copies, j = [], 0, first
            while j < end:
                compiled.runs_at(s, j, end, n, w, runs)
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
            expected, found = Runs(), Runs()
            compiled.runs_at(s, first, first + count, n, w, expected)
            compiled.runs_of(s, first, first + count, n, w, found)
            assert bytes(found) == bytes(expected), (n, s, first, count)
