"""Commands are dataclasses in one table: each tells its options, units and defaults."""

import ast
import re
import subprocess
import sys
from dataclasses import MISSING, is_dataclass
from pathlib import Path
from typing import get_origin

import pytest
from books import BOOKS, blocks, quoted

from skiparse import cli, command, shell
from skiparse.command import Positional

ROOT = Path(__file__).parents[1]


def declared():
    """Every class with an ``extra`` and a ``run``, as "module:Class", from the files alone."""
    found = set()
    for path in (
        p for folder in ("skiparse", "models", "bench") for p in (ROOT / folder).rglob("*.py")
    ):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and path.name in ("commands.py", "info.py"):
                inside = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                if "run" in inside:
                    parts = path.relative_to(ROOT).with_suffix("").parts
                    parts = parts if parts[0] == "skiparse" else ("skiparse", *parts)
                    found.add(f"{'.'.join(parts)}:{node.name}")
    return found


def test_the_table_has_every_command_once():
    assert sorted(cli.COMMANDS.values()) == sorted(declared())
    for where in cli.COMMANDS.values():
        kind = shell.command(where)
        assert is_dataclass(kind)
        assert isinstance(kind.extra, str)


def test_every_extra_is_there():
    project = (ROOT / "pyproject.toml").read_text()
    for where in cli.COMMANDS.values():
        for extra in shell.command(where).extra.split(","):
            assert f"\n{extra} = [" in project


def help_of(name, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*name.split(), "--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_units_and_defaults(name, capsys):
    kind = shell.command(cli.COMMANDS[name])
    shown = help_of(name, capsys)
    assert " ".join(command.told(kind).split()) in shown
    for option in command.options(kind):
        assert option.help
        assert " ".join(option.help.split()) in shown
        if isinstance(option.shown, Positional):
            assert option.shown.shown in shown
            continue
        assert option.flag in shown
        if option.kind is bool:
            assert option.default in (False, None)  # None: as the model has it
            continue
        unit = option.shown
        if get_origin(option.kind) is not None and unit is None:  # the words to choose from
            unit = "{" + ",".join(option.kind.__args__) + "}"
        assert unit, f"{name} {option.flag} has no unit"
        assert f"{option.flag} {unit}" in shown
        if option.kind in (int, float):
            assert unit.isupper()
            assert len(unit) > 1
        if option.default is None:
            assert "default: " in option.help.lower(), f"{option.flag} tells no default"
        elif option.default is not MISSING:
            value = option.default
            value = ",".join(value) if isinstance(value, tuple) else value
            assert f"(default: {value})" in shown


@pytest.mark.parametrize("words", [[], ["convert"], ["experiment"], ["data"], ["cache"]])
def test_the_overview_names_them(words, capsys):
    assert cli.main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, where in cli.COMMANDS.items():
        wanted = name.split()[: len(words)] == words
        line = command.told(shell.command(where)).splitlines()[0].removesuffix(".")
        assert any(each.split() == [*name.split(), *line.split()] for each in lines) == wanted


HEAVY = ("torch", "numpy", "av", "diffusers", "jsonargparse")


def test_help_needs_no_torch_and_no_time():
    """Of everything, and of each command; in a process where nothing is imported yet."""
    asked = [name.split() for name in cli.COMMANDS]
    code = (
        "import sys, time\n"
        "from skiparse import cli\n"
        "cli.main(['--help'])\n"
        "print('took', time.process_time())\n"
        f"for words in {asked!r}:\n"
        "    try: cli.main([*words, '--help'])\n"
        "    except SystemExit: pass\n"
        f"print('has', *[m for m in {HEAVY} if m in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, last = out.stdout.splitlines()
    assert last == "has"
    (took,) = re.findall(r"^took (.*)$", out.stdout, re.MULTILINE)
    assert float(took) < 0.5  # of a core, Python's own start with it: 0.2 on ours


def test_the_module_brings_no_torch_either():
    line = [sys.executable, "-X", "importtime", "-m", "skiparse.cli", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "skiparse.models.data.limits" in done.stderr  # of the commands that are told of
    assert not re.search(rf"\| +({'|'.join(HEAVY)})\b", done.stderr)


def spellings():
    """Every ``skiparse ...`` of the books: a line of a block, or what stands between backticks."""
    found = {}
    for book in BOOKS:
        lines = "\n".join(code for _, code in blocks(book)).splitlines()
        for said in (*lines, *quoted(book)):
            words = said.partition("  #")[0].split()
            if words[:1] == ["skiparse"] and words[1:2] and re.fullmatch("[a-z][a-z-]*", words[1]):
                found.setdefault(" ".join(words[1:]), book)
    return found


@pytest.mark.parametrize("said", spellings())
def test_what_the_books_say_is_understood(said):
    """A command, in words of any time, with options that it has."""
    name, rest = shell.split(cli.COMMANDS, cli.renewed(said.split()))
    if name not in cli.COMMANDS:
        assert name  # a group of commands, as it is told of
        assert not rest
        return
    every = list(command.options(shell.command(cli.COMMANDS[name])))
    if not any(isinstance(option.shown, command.Rest) for option in every):
        flags = {option.flag for option in every}
        assert {word for word in rest if word.startswith("--")} <= flags


OLD = {
    "overfit --steps 3 --out x": "experiment overfit --steps 3 --out x",
    "overfit --out overfit": "experiment overfit --out overfit",
    "bench --block": "bench block",
    "bench --device cpu --block --rounds 2": "bench block --device cpu --rounds 2",
    "bench --vae --results x": "bench vae --results x",
    "bench --cache --device cpu": "bench cache --device cpu",
    "bench --list": "bench --list",
    "experiment clipping": "experiment clipping",
    "train-vae CLIPS --out runs/I": "train-vae CLIPS --out runs/I",
}


@pytest.mark.parametrize("old", OLD)
def test_old_spellings_keep_working(old):
    assert cli.renewed(old.split()) == OLD[old].split()
    assert set(cli.MOVED.values()) <= {" ".join(new.split()[:2]) for new in OLD.values()}


def test_values_come_as_they_were_given():
    from skiparse.bench.op.commands import Bench
    from skiparse.models.data.commands import Build, Check
    from skiparse.models.suv.commands import Convert
    from skiparse.models.train.commands import Export

    made = command.parse(Bench, "bench", ["a", "b*", "--against", "dense,flex", "--rounds", "2"])
    assert made == Bench(cases=("a", "b*"), against=("dense", "flex"), rounds=2)
    assert command.parse(Bench, "bench", []) == Bench()
    made = command.parse(Convert, "convert suv", ["x", "y", "z", "--sparsity", "1,2"])
    assert made == Convert(src=("x", "y"), dst="z", sparsity=("1", "2"))
    given = ["mini", "longer", "out", "--seed", "1", "--limits.max_hold=3"]
    made = command.parse(Build, "cache build", ["--store", "bfloat16", *given])
    assert made.settings == ("--seed", "1", "--limits.max_hold=3")
    assert (made.config, made.stage, made.out, made.store) == ("mini", "longer", "out", "bfloat16")
    made = command.parse(
        Check, "data check", ["c", "--limits.max_hold", "5", "--limits.max_pixels=9"]
    )
    assert (made.limits.max_hold, made.limits.max_pixels, made.limits.max_frames) == (5.0, 9, 18000)
    made = command.parse(Export, "export", ["r", "o", "--other-encoders", "--weights", "model"])
    assert (made.other_encoders, made.weights, made.vae) == (True, "model", None)


def test_torch_brings_the_operator_in_whatever_order():
    """``import skiparse`` alone brings no torch; with it, before or behind, all is there."""
    for first, second in (("skiparse", "torch"), ("torch", "skiparse")):
        code = (
            f"import sys, {first}\n"
            f"assert 'torch' not in sys.modules or {first!r} == 'torch'\n"
            f"import {second}\n"
            "torch.ops.skiparse.attention\n"
            "assert {'attention', 'SkipPattern', 'unpack'} <= set(vars(skiparse))\n"
            "skiparse.ops, skiparse.registry, skiparse.pattern"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module",
    ["backends.sdpa", "derivatives", "forward_mode", "functional", "ops", "pack", "registry",
     "testing", "pattern", "models.flow"],
)  # fmt: skip
def test_any_module_may_be_the_first(module):
    code = (
        f"import skiparse.{module}\n"
        "import skiparse, torch\n"
        "x = torch.ones(1, 8, 1, 16)\n"
        "assert skiparse.attention(x, x, x, skiparse.SkipPattern.single(2)).sum() == 128\n"
        "torch.ops.skiparse.attention"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_behind_a_config_tells_of_every_setting(capsys):
    pytest.importorskip("jsonargparse")
    shown = help_of("train wfvae", capsys)
    for said in ("--save_every", "--limits.max_hold", "(type: int, default: 1000)", "seconds from"):
        assert said in shown
