"""`bench/gpu.sh` runs on a machine with nothing installed, whatever one of its parts does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import skiparse
from skiparse import SkipPattern, pattern
from skiparse.bench import cases, gpu
from skiparse.testing import make_problem

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu.sh"


def run_script(out, *options, **environment):
    return subprocess.run(
        [SCRIPT, *options],
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_dry_run(tmp_path):
    """From another folder, without the installed package: every part that a CPU can do."""
    done = run_script(tmp_path / "out", "--dry-run", PYTHONNOUSERSITE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "copies.jsonl", "log.txt",
    }  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    for row in rows:
        assert row["ceiling"] == round(cases.CASES[row["case"]].ceiling, 4)
    found = {(row["case"], row["backend"]) for row in rows}
    for end in ("fwd", "fwdbwd"):
        assert ("1x288x512-1h.dense." + end, "dense.flash") in found
        assert ("1x288x512-1h.k2.group.skip." + end, "views.cpu") in found
        assert ("1x288x512-1h.k2.group." + end, "skiparse.sdpa") in found
    passes = {
        json.loads(x)["what"] for x in (tmp_path / "out/copies.jsonl").read_text().splitlines()
    }
    assert {"copy", "pack, single", "pack, group, backward"} <= passes
    *_, table = done.stdout.partition("\n\n")
    assert "views.cpu" in table
    assert "GB/s" in table
    assert "FAILED" not in table


def test_needs_a_gpu_otherwise(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_script(tmp_path)
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


def part(name, code, seconds=20.0):
    return gpu.Part(name, (sys.executable, "-c", code), seconds)


def test_a_part_that_fails_or_hangs_costs_itself_only(tmp_path):
    hangs = "import subprocess; subprocess.run(['sleep', '60'])"
    todo = [
        part("fails", "print('why'); raise SystemExit(3)"),
        part("crashes", "import os; os.abort()"),
        part("hangs", hangs, 1.0),
        part("works", "print('still here')"),
    ]
    ended = gpu.run_parts(todo, tmp_path)
    assert [e.fault for e in ended] == ["exit status 3", "exit status -6", "stopped after 1 s", ""]
    assert sum(e.seconds for e in ended) < 20
    log = (tmp_path / "log.txt").read_text()
    assert "why" in log
    assert "still here" in log


def test_parts_end_when_the_time_is_up(tmp_path):
    todo = [part("long", "import time; time.sleep(60)"), part("late", "print('never')")]
    ended = gpu.run_parts(todo, tmp_path, seconds=1.0)
    assert ended[0].fault == "stopped after 1 s"
    assert ended[1].fault == "no time left"


def test_the_whole_takes_less_than_nine_minutes(tmp_path):
    assert gpu.SECONDS < 9 * 60 - 15
    names = [p.name for p in gpu.parts(tmp_path, dry_run=False)]
    assert names == ["tests", *gpu.WORK]
    assert all((gpu.CHECKOUT / name).exists() for name in gpu.TESTS)


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, capsys):
    """And a wrong backend is not timed."""

    def wrong_once(case, problem):
        assert case.k != 2, "off by much"
        return gpu.baselines.skiparse_backend(case, replace(problem, pattern=case.pattern), "sdpa")

    setting = replace(gpu.DRY_RUN, sparsity=(2, 4))
    todo = [c for c in setting.cases(backward=False) if c.kind == "single"]
    with pytest.raises(RuntimeError, match=r"no figures of 1x288x512-1h\.k2\.single\.fwd$"):
        gpu._each(setting, todo, [wrong_once], tmp_path)
    assert "off by much" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"1x288x512-1h.k4.single.fwd"}


@pytest.mark.parametrize("kind", ["single", "group"])
def test_text_inside_is_the_same_attention(kind):
    case = cases.Case("1x288x512", 2, 4, kind, kind == "group", True, N=64, T=6, D=16)
    problem = make_problem(case.pattern, B=2, N=64, T=6, dtype=torch.float64)
    packed = gpu.text_inside(case, problem)
    out, text_out = skiparse.joint_attention(*problem.inputs, case.pattern)
    rows = skiparse.attention(*packed.inputs[:3], packed.pattern)
    if kind == "single":
        video, text = rows.split([64, 24], 1)
        text = text.unflatten(1, (6, 4)).mean(2)
    else:
        video, text = rows.unflatten(1, (4, 22)).split([16, 6], 2)
        video, text = video.flatten(1, 2), text.mean(1)
    torch.testing.assert_close(video, out)
    torch.testing.assert_close(text, text_out)


def test_the_gain_of_a_schedule_is_that_of_its_layers():
    todo = [c for c in gpu.GPU.cases(backward=False) if not (c.kind == "group" and c.skip_order)]
    rows = [{"case": c.name, "backend": "x", "speedup": c.ceiling} for c in todo]
    gain, limit = gpu.schedule_gain(rows, "x", "fwd")
    assert gain == pytest.approx(limit)
    assert f"{limit:.3f}" == "2.547"
    assert limit == pattern.ceiling(*gpu.SCHEDULE, 36864, 512)
    assert gpu.schedule_gain(rows[:-1], "x", "fwd") == (0.0, 0.0)
    assert gpu.schedule_gain(rows, "x", "fwdbwd") == (0.0, 0.0)
    assert SkipPattern.group(8) in {c.pattern for c in todo}
