"""Every backend is in a matrix of tests: the ones here, or one of its own."""

from pathlib import Path

import pytest
import torch
from backends import MATRIX, NAMES, OWN_MATRIX, SMALL, skip_unless

from skiparse import SkipPattern, registry
from skiparse.testing import make_problem


@pytest.mark.parametrize("name", NAMES)
def test_every_backend_is_in_a_matrix(name):
    """With none of its own it has to run here, and then does in all of those here."""
    if name in OWN_MATRIX:
        text = (Path(__file__).parent / OWN_MATRIX[name]).read_text()
        assert name.rpartition(".")[2] in text, f"{OWN_MATRIX[name]} does not test {name}"
    else:
        reason = registry.load(name).why_not()
        assert reason is None, f"{name} has no tests: {reason}; give it a file in OWN_MATRIX"
        assert name in MATRIX
        assert name in SMALL


def test_the_table_has_no_backends_that_are_gone():
    assert set(OWN_MATRIX) <= set(NAMES)


def test_a_backend_for_cpus_may_refuse_nothing(monkeypatch):
    """Or a wrong refusal would be a skipped test; others say why they cannot."""
    monkeypatch.setattr("skiparse.backends.sdpa.why_not", lambda *_, **__: "no library today")
    either = (AssertionError, pytest.skip.Exception)
    with pytest.raises(either, match="sdpa is for CPUs, but no library today"):
        skip_unless("sdpa", make_problem(SkipPattern.single(2), N=4))
    monkeypatch.setattr("skiparse.backends.triton.why_not", lambda *_, **__: "no interpreter")
    with pytest.raises(pytest.skip.Exception, match="triton: no interpreter"):
        skip_unless("triton", make_problem(SkipPattern.single(2), N=4, dtype=torch.float16))
