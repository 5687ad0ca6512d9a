"""`bench/gpu.sh` on a machine with nothing installed: whatever a step does costs that step only."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from skiparse.bench import cases
from skiparse.bench.gpu import driver, lab, plan, steps

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "gpu.sh"


def run_script(out, *options, **environment):
    return subprocess.run(
        [SCRIPT, *options],
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_dry_run(tmp_path):
    """From another folder, without the installed package: every step that a CPU can do."""
    done = run_script(tmp_path / "out", "--dry-run", PYTHONNOUSERSITE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    ended = {e["step"]: e["state"] for e in lines(tmp_path / "out/steps.jsonl")}
    wanted = [s.name for make in plan.RUNS.values() for s in make()]
    assert set(ended) == {name for name in wanted if not name.startswith("triton.pingpong")}
    assert set(ended.values()) == {"ok"}
    rows = lines(tmp_path / "out/results.jsonl")
    for row in rows:
        assert row["ceiling"] == round(cases.CASES[row["case"]].ceiling, 4)
        assert row["spread_ms"][0] <= row["median_ms"] <= row["spread_ms"][1]
    found = {(row["case"], row["backend"]) for row in rows}
    for end in ("fwd", "fwdbwd"):
        assert (f"1x128x128.dense.{end}", "dense.flash") in found
        assert (f"1x128x128.k2.group.skip.{end}", "views.cpu") in found
        assert (f"1x128x128.k8.group.{end}", "skiparse.sdpa") in found
    passes = {row["what"] for row in lines(tmp_path / "out/passes.jsonl")}
    assert {"copy", "32 layers, views", "32 layers, sdpa"} <= passes
    assert "pack, backward, 1x128x128.k8.single" in passes
    for run in plan.RUNS:
        assert f"run {run}, MODEL of a GPU" in done.stdout
    assert "FAILED" not in done.stdout


def test_needs_a_gpu_otherwise(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_script(tmp_path, "1")
    assert done.returncode == 2
    assert "--dry-run" in done.stderr


# The driver, with workers that are short scripts around the real `work`.

WORKER = """
import os, sys, time
sys.path.insert(0, {package!r})
from pathlib import Path
from {module} import driver
def hangs(): time.sleep(60)
def fails(): raise ValueError("why\\nand more")
def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def crashes(): os.abort()
def works(): print("done by", os.getpid(), flush=True)
todo = {{name: globals()[name.rstrip("0123456789")] for name in sys.argv[1:]}}
sys.exit(driver.work(todo, Path({out!r}), lambda error: "CUDA error" in str(error)))
"""


@pytest.fixture
def work(tmp_path):
    """Run steps by name, `fails`, `hangs` and so on; faults, and the driver."""
    (tmp_path / "worker.py").write_text(
        WORKER.format(package=str(ROOT / "bench"), module="gpu", out=str(tmp_path))
    )
    code = (ROOT / "bench/gpu/driver.py").read_text()
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu/__init__.py").touch()
    (tmp_path / "gpu/driver.py").write_text(code)
    started = []

    def start(process, names):
        started.append((process, list(names)))
        with (tmp_path / "log.txt").open("a") as log:
            return subprocess.Popen(
                [sys.executable, tmp_path / "worker.py", *names],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def run(*names, seconds=60.0, limit=20.0, start=start, grace=15.0, **later):
        drive = driver.Driver(tmp_path, seconds, grace)
        jobs = [driver.Job(name, "timings", 0.1, limit) for name in names]
        jobs += [driver.Job(name, "pingpong", s, limit) for name, s in later.items()]
        return drive.run(jobs, start)

    run.started = started
    run.start = start
    run.log = lambda: (tmp_path / "log.txt").read_text()
    run.states = lambda: [(e["step"], e["state"]) for e in lines(tmp_path / "steps.jsonl")]
    return run


def test_a_step_that_fails_costs_itself_only(work, tmp_path):
    assert work("fails", "works") == {"fails": "ValueError: why"}
    assert len(work.started) == 1
    assert "done by" in work.log()
    assert "FAILED fails" in work.log()
    assert 'raise ValueError("why' in (tmp_path / "errors.txt").read_text()


def test_a_step_that_hangs_is_stopped_and_the_rest_goes_on(work):
    begin = time.monotonic()
    faults = work("works1", "hangs", "works2", limit=3.0)
    assert time.monotonic() - begin < 30
    assert list(faults) == ["hangs"]
    assert faults["hangs"].startswith("stopped after ")
    assert work.started == [
        ("timings", ["works1", "hangs", "works2"]),
        ("timings", ["works2"]),
    ]
    assert work.states()[-1] == ("works2", "ok")


def test_a_process_that_does_not_die_ends_the_run(work, capsys):
    """As one that waits for a GPU which does not answer: SIGKILL does nothing to it."""

    class Immortal:
        def __init__(self, process):
            self.process, self.pid, self.returncode = process, process.pid, None

        def poll(self):
            return None

        def wait(self, timeout):
            raise subprocess.TimeoutExpired("worker", timeout)

    def start(process, names):
        return Immortal(work.start(process, names))

    begin = time.monotonic()
    faults = work("hangs", "works", start=start, limit=3.0, grace=0.1, later=0.1)
    assert time.monotonic() - begin < 20
    assert set(faults) == {"hangs", "works", "later"}
    assert faults["works"] == faults["later"] == "not begun: the device hangs"
    assert "does not even die" in capsys.readouterr().out
    assert len(work.started) == 1


def test_a_lost_context_ends_the_process_and_another_goes_on(work, capsys):
    faults = work("works1", "lost", "works2")
    assert list(faults) == ["lost"]
    assert [names for _, names in work.started] == [["works1", "lost", "works2"], ["works2"]]
    pids = {line.split()[-1] for line in work.log().splitlines() if line.startswith("done by")}
    assert len(pids) == 2
    assert "the CUDA context is lost" in work.log()
    assert "a new one goes on with works2" in capsys.readouterr().out


def test_a_step_that_crashes_its_process(work):
    assert work("crashes", "works") == {"crashes": "its process ended with -6"}
    assert work.states()[-1] == ("works", "ok")


def test_a_process_that_dies_before_its_first_step_is_not_started_again(work, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(5)")
    assert work("works1", "works2") == dict.fromkeys(("works1", "works2"), "its process ended with 5")
    assert len(work.started) == 1


def test_time_is_kept_for_later_processes(work):
    faults = work("works1", "hangs", "works2", seconds=8.0, limit=60.0, pingpong1=5.0)
    assert faults["hangs"].startswith("stopped after ")
    faults = work("works1", seconds=3.0, pingpong1=5.0)
    assert faults == {"works1": "no time left", "pingpong1": "no time left"}


def test_rows_are_there_at_once(tmp_path):
    """When the second step begins, what the first measured is in the file."""
    here = lab.Lab(lab.DRY_RUN, tmp_path)
    seen = []
    todo = {
        "first": lambda: steps.dense(backward=False)(here),
        "second": lambda: seen.append(lines(tmp_path / "results.jsonl")),
    }
    assert driver.work(todo, tmp_path, lab.is_lost) == 0
    ((row,),) = seen
    assert row["backend"] == "dense.flash"
    assert "ptxas" in row


def test_a_wrong_backend_is_not_timed(tmp_path, monkeypatch):
    from skiparse.backends import sdpa

    right = sdpa._attend
    monkeypatch.setattr(
        sdpa, "_attend", lambda q, k, v, bias, scale: right(q, k, v, bias, scale * 1.01)
    )
    here = lab.Lab(lab.DRY_RUN, tmp_path)
    monkeypatch.setattr(here, "take_turns", lambda *_: pytest.fail("timed"))
    for measure in (
        steps.views("cudnn", "single", 2, backward=False),
        steps.backend("triton", "group", 2),
        steps.backend("triton", "group", 2, batch=True),
        steps.layers,
    ):
        with pytest.raises(AssertionError, match=r"off by|is wrong"):
            measure(here)
    assert not (tmp_path / "results.jsonl").exists()
