"""The minute of `pytest -m smoke` has something of every part, and names no test that is gone."""

import ast
from pathlib import Path

import pytest
from smoke import SMOKE, named

HERE = Path(__file__).parent


@pytest.mark.parametrize("part", SMOKE)
def test_every_part_has_tests(part):
    assert SMOKE[part], f"nothing of {part}"
    for name in SMOKE[part]:
        file, _, test = name.partition("::")
        tree = ast.parse((HERE / file).read_text())
        there = {x.name for x in tree.body if isinstance(x, ast.FunctionDef)}
        if test:
            assert test.partition("[")[0] in there, f"{name} is gone; name another for {part}"
        else:
            assert any(x.startswith("test_") for x in there)


def test_tests_are_found_by_file_function_and_parameter(monkeypatch):
    here, names = (
        Path("tests/test_x.py"),
        {"test_x.py::test_a", "test_x.py::test_b[1]", "test_y.py"},
    )
    monkeypatch.setattr("smoke.NAMES", names)
    found = [x for x in ("test_a", "test_a[3]", "test_b[1]", "test_b[2]") if named(here, x)]
    assert found == ["test_a", "test_a[3]", "test_b[1]"]
    assert named(Path("tests/test_y.py"), "test_b[2]")
    assert not named(Path("tests/test_z.py"), "test_a")
