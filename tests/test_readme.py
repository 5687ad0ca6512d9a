"""Every code block of the README runs, its tables are fresh, and its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from skiparse.bench.op import cases, tables
from skiparse.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def test_every_block_is_of_a_kind_that_is_tested():
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "text"}
    assert len(PYTHON) >= 3


def test_the_python_blocks_run_one_after_another(capsys):
    names = {}
    for code in PYTHON:
        exec(compile(code, "README.md", "exec"), names)
    assert names["out"].shape == names["q"].shape
    assert names["text_out"].shape == names["text_q"].shape
    assert names["q"].grad.isfinite().all()
    assert capsys.readouterr().out.startswith("2.547")


def test_the_shell_lines_are_commands_we_have():
    lines = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:2] == ["skiparse", "bench"] and "--list" not in words:
            assert cases.select(words[2])
        elif words[0] == "skiparse":
            assert main(words[1:]) == 0
        else:
            assert words[:2] == ["pip", "install"]
            extra = re.fullmatch(r"\.(\[(\w+)\])?", words[2])
            assert extra
            assert extra[2] is None or f"\n{extra[2]} = [" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_are_in_the_makefile(target):
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_ci_runs_the_readme_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


def test_the_generated_tables_are_fresh():
    assert tables.render(README) == README, "run `make readme`"
