"""The command line tells what is here, and turns bad arguments into one clear line."""

import importlib.metadata
import subprocess
import sys

import pytest
import triton

import skiparse
from skiparse import registry
from skiparse.bench import rows
from skiparse.cli import main


def test_info_lists_every_backend(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for row in registry.BACKENDS:
        assert row.name in out
        assert row.verified in out
    assert "torch 2." in out
    assert "cpu:" in out


def test_versions_are_what_the_modules_say(capsys, monkeypatch):
    """A nightly of Triton is a distribution of another name, a bare checkout none at all."""

    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(triton, "__version__", "3.9.0+git1234567")
    assert main(["info"]) == 0
    assert "triton 3.9.0+git1234567" in capsys.readouterr().out
    found = rows.versions.__wrapped__()  # of the process it is asked once
    assert (found["triton"], found["skiparse"]) == ("3.9.0+git1234567", skiparse.__version__)


def test_bench_lists_its_cases(capsys):
    assert main(["bench", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert "121x576x1024.k8.group.skip.fwdbwd" in names
    assert "121x576x1024-1h.dense.fwd" in names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "no-such-case"], "no case matches 'no-such-case'"),
        (["bench", "--dtype", "int8"], "--dtype int8: give float32"),
        (["bench", "--rounds", "0"], "--rounds 0: give at least 1"),
        (["bench", "--backends", "fast"], "backend must be one of"),
        (["bench", "--against", "magic"], "--against ['magic']: choose from dense"),
        (["demo", "--clip", "/no/such/file.mp4"], "/no/such/file.mp4"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_interruption_is_no_error_of_the_program(capsys, monkeypatch):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("skiparse.info.Info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "skiparse: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "fly is no command; give one of info, bench, "),
        (["data", "fly"], "data fly is no command; give one of data check, data import"),
        (["convert"], "convert is no whole command; give one of convert suv, convert vae"),
        ([], "nothing is no whole command; give one of info, "),
        (["data", "check"], "data check: the following arguments are required: SOURCE; see "),
        (["bench", "--round", "2"], "bench: unrecognized arguments: --round; see skiparse bench"),
        (["bench", "--rounds", "two"], "bench: argument --rounds: invalid int value: 'two'"),
        (["export", "a", "b", "--weights", "c"], "--weights: invalid choice: 'c' (choose from"),
        (["sample", "--model", "m"], "give --prompt TEXT or --prompts FILE"),
        (["sample", "--model", "m", "--prompt", "a", "--prompts", "b"], "one of them only"),
        (["train-vae", "c", "--out", "o", "--model", "S", "--init", "d"], "give one of them"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("skiparse: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("command", "module"), [("bench", "tqdm"), ("demo", "av")])
def test_a_missing_extra_is_named(command, module):
    """In a process of its own: modules imported anew would be others than those of other tests."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from skiparse.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{module} is not installed; pip install 'skiparse[{command}]'" in done.stderr
