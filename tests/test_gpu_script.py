"""`bench/gpu.sh` on a machine with nothing installed: whatever a step does costs that step only."""

import importlib
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import skiparse
from skiparse import SkipPattern, pattern
from skiparse.bench.gpu import driver, lab, plan, schedule, steps, table
from skiparse.bench.op import cases
from skiparse.bench.rows import VOCABULARY
from skiparse.testing import make_problem

command = importlib.import_module("skiparse.bench.gpu.__main__")
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
    passes = {(row["case"], row["backend"]) for row in lines(tmp_path / "out/passes.jsonl")}
    layers = {("32 layers, 1x128x128", way) for way in ("views", "skiparse.sdpa")}
    assert {("copy", "torch"), *layers} <= passes
    assert ("pack, backward, 1x128x128.k8.single", "eager") in passes
    for name in ("results", "passes"):
        assert all(row.keys() <= VOCABULARY.keys() for row in lines(tmp_path / f"out/{name}.jsonl"))
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
        jobs += [driver.Job(name, "later", s, limit) for name, s in later.items()]
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
            time.sleep(timeout)
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
    names = ("works1", "works2")
    assert work(*names) == dict.fromkeys(names, "its process ended with 5")
    assert len(work.started) == 1


def test_time_is_kept_for_later_processes(work):
    begin = time.monotonic()
    faults = work("hangs", seconds=driver.AGAIN + 6.0, limit=60.0, works1=1.0)
    assert list(faults) == ["hangs"]
    assert time.monotonic() - begin < driver.AGAIN + 6.0
    assert work.states()[-1] == ("works1", "ok")
    faults = work("works2", seconds=3.0, works3=5.0)
    assert faults == {"works2": "no time left", "works3": "no time left"}


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


# The plan.

COUNTS = {"timings": 30, "bundled": 4, "tests": 351}


def test_both_runs_fit_their_limits():
    assert plan.LIMITS == {"1": 360.0, "2": 420.0}
    for run in plan.RUNS:
        assert plan.faults(run, COUNTS) == []
        names = [step.name for step in plan.RUNS[run]()]
        assert len(set(names)) == len(names)
    assert all((ROOT / name).exists() for name in steps.TESTS)


def test_a_step_that_is_too_long_is_seen(monkeypatch):
    def longer():
        first, *rest = plan.first_run()
        return [replace(first, seconds=first.seconds + 200), *rest]

    monkeypatch.setitem(plan.RUNS, "1", longer)
    (fault,) = plan.faults("1", COUNTS)
    assert fault.endswith("its limit is 360 s")
    assert "TOO LONG" in plan.table("1", COUNTS)


def test_more_compilations_are_seen():
    many = plan.faults("2", COUNTS | {"timings": 240})
    assert many
    assert "its limit is 420 s" in many[0]
    (fault,) = plan.faults("1", COUNTS | {"tests": plan.TEST_KERNELS + 1})
    assert "the tests compile 361 kernels" in fault


def test_the_order_of_the_first_run():
    """The most telling first; ping-pong last, and in a process of its own."""
    todo = plan.first_run()
    names = [step.name for step in todo]
    assert names[:3] == ["ceilings", "dense.fwd", "views.cudnn k8.single.fwd"]
    processes = [step.process for step in todo]
    alone = [name.startswith("triton.pingpong") for name in names]
    assert alone == [process == "pingpong" for process in processes]
    assert alone == sorted(alone)
    for k in (8, 4, 2):
        for end in ("fwd", "fwdbwd"):
            assert {
                f"views.cudnn k{k}.single.{end}", f"views.cudnn k{k}.group.skip.{end}",
                f"triton k{k}.single.{end}", f"triton k{k}.group.{end}",
            } <= set(names)  # fmt: skip


def test_both_runs_together_time_every_backward():
    names = {step.name for run in plan.RUNS.values() for step in run()}
    for k in (8, 4, 2):
        assert {
            f"{library} k{k}.{kind}.fwdbwd"
            for library in ("views.cudnn", "views.flash")
            for kind in ("single", "group.skip")
        } | {f"triton k{k}.{kind}.fwdbwd" for kind in ("single", "group", "group.skip")} <= names
        assert f"sdpa k{k}.group.fwdbwd" in names or (k == plan.steps.TUNED and "tune" in names)


# Kernels: counted, compiled beforehand, by which ptxas, and kept. In a process without interpreter.


def python(code, *arguments, **environment):
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**plain, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNTING = """
import torch
from skiparse.bench.op.cases import CASES
from skiparse.bench.gpu.kernels import call_of, kernels_of
def names(*cases, backend="triton"):
    calls = [call_of(CASES[f"121x576x1024.{name}"], backend, torch.bfloat16) for name in cases]
    print(*(kernel.name.removeprefix("skiparse_") for kernel in kernels_of(calls)))
names("k8.group.fwd")
names("k8.group.fwd", "k8.group.fwd")
names("k8.group.fwdbwd", "k8.group.fwd")
names("k8.single.fwd", "k4.single.fwd", "k2.single.fwd")  # n is no constant of a kernel
names("k8.group.fwd", "k4.group.fwd")                     # w is, if it is a usual one
names("k8.group.skip.fwd", "k4.group.skip.fwd")
names("k8.group.fwd", backend="triton.pingpong")
names("k8.group.fwd", backend="triton.pointers")
names("k8.group.fwd", backend="pack")
"""


def test_compilations_are_counted():
    backward = "delta dkdv_tma dq_tma"
    assert python(COUNTING).splitlines() == [
        "forward_tma",
        "forward_tma",
        f"forward_tma {backward}",
        "forward_tma",
        "forward_tma forward_tma",
        "forward_tma",
        "forward_pingpong",
        "forward",
        "pack pack_backward",
    ]


def test_the_kernels_of_tests_are_counted(tmp_path):
    """A file of tests for a GPU, without one: each kernel once, also of tests that fail."""
    (tmp_path / "test_small.py").write_text(
        "import pytest, torch\n"
        "from skiparse import SkipPattern\n"
        "from skiparse.testing import check, make_problem, run\n"
        "pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')\n"
        "@pytest.mark.parametrize('k', [2, 2, 4])\n"
        "def test_one(k):\n"
        "    p = make_problem(SkipPattern.group(k), N=64, T=8, D=64, device='cuda')\n"
        "    check(run(p, 'triton'), p)\n"
        "    assert torch.ones(1, device='cuda').item() == 1\n"
    )
    done = python(
        f"from skiparse.bench.gpu.counted import main; main([{str(tmp_path / 'test_small.py')!r}])"
    )
    assert done.splitlines()[-1] == "8"  # four kernels for each of two run widths


COMPILING = """
import sys, torch
from pathlib import Path
from triton import knobs
from skiparse.bench.op.cases import CASES
from skiparse.bench.gpu import kept
from skiparse.bench.gpu.kernels import call_of, compile_kernel, kernels_of
from skiparse.bench.gpu.lab import ptxas
cache, out = map(Path, sys.argv[1:])
hits = []
knobs.compilation.listener = lambda **about: hits.append(about["cache_hit"])
kernel = kernels_of([call_of(CASES["121x576x1024.k8.group.fwdbwd"], "triton", torch.bfloat16)])[1]
print(kept.unpack(out / kept.NAME, cache))
compile_kernel(kernel)
print(hits, ptxas())
print(kept.pack(cache, out / kept.NAME))
"""


def test_compiled_kernels_are_carried_to_the_next_run(tmp_path):
    (tmp_path / "out").mkdir()
    first, second = (
        python(
            COMPILING, tmp_path / cache, tmp_path / "out", TRITON_CACHE_DIR=str(tmp_path / cache)
        ).splitlines()
        for cache in ("one", "two")
    )
    assert first[0].startswith("none, ")
    assert first[1].startswith("[False]")
    assert first[2].startswith("1 in compiled.tar.gz")
    assert second[0].startswith("1 kernels of ")
    assert second[1].startswith("[True]")


@pytest.fixture
def other(tmp_path):
    """A folder with a ptxas of another release: the real one, under another name for itself."""
    real = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/ptxas"
    local = tmp_path / "local"
    local.mkdir()
    (local / "ptxas").write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "release 13.1, V13.1.115"; exit; fi\n'
        f"echo used >> {local}/used\n"
        f'exec {real} "$@"\n'
    )
    (local / "ptxas").chmod(0o755)
    return local


def test_another_ptxas_is_taken_where_there_is_one(other, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/somebody/elses")
    taken = command.environment("timings", tmp_path, other)
    assert taken["TRITON_PTXAS_PATH"] == str(other / "ptxas")
    assert "TRITON_PTXAS_PATH" not in command.environment("bundled", tmp_path, other)
    assert "TRITON_PTXAS_PATH" not in command.environment("timings", tmp_path, tmp_path)
    assert "used: 13.1.115, " in command.about(other)
    assert f"its own ptxas {command.bundled_ptxas()}; used: its own" in command.about(tmp_path)
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    ask = "from skiparse.bench.gpu.lab import ptxas; print(ptxas())"
    assert python(ask, **taken).strip() == "13.1.115"
    assert python(ask).strip() == command.bundled_ptxas()


def test_a_ptxas_that_does_not_run_is_no_reason_to_take_another(other, tmp_path):
    (other / "ptxas").chmod(stat.S_IRUSR)
    with pytest.raises(RuntimeError, match=r"ptxas does not run, chmod \+x it"):
        command.environment("timings", tmp_path, other)


def test_a_run_as_far_as_a_cpu_goes(tmp_path, monkeypatch, capsys):
    """All that `bench/gpu.sh 1` does around the steps; few steps, and nothing to compile."""

    def few():
        return [step for step in plan.first_run() if step.name in ("ceilings", "dense.fwd")]

    begin = command.start
    monkeypatch.setitem(plan.RUNS, "1", few)
    monkeypatch.setattr(command, "start", lambda *a: begin(*a[:3], "cpu", *a[4:]))
    monkeypatch.setattr(command, "compilers", lambda *_: [([sys.executable, "-c", ""], {})])
    out, local = tmp_path / "out", tmp_path / "local"
    out.mkdir()
    assert command.measure("1", out, local) == 0
    said = capsys.readouterr().out
    assert "compiling: 1 processes, 0 stopped, 0 failed" in said
    assert "compiled before: none" in said
    assert "0 in compiled.tar.gz" in said
    assert "matrix product of 64" in said
    assert (local / "compiled.tar.gz").exists()
    assert len(list(out.iterdir())) <= 8


def test_a_pool_that_does_not_end_is_stopped(tmp_path):
    begin = time.monotonic()
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    fails = [sys.executable, "-c", "raise SystemExit(1)"]
    said = driver.pool([(sleeps, dict(os.environ)), (fails, dict(os.environ))], tmp_path, 3.0)
    assert said == "2 processes, 1 stopped, 1 failed"
    assert time.monotonic() - begin < 20


# What is measured.


def test_the_executed_schedule_is_layer_by_layer_attention():
    problem = make_problem(SkipPattern.dense(), B=2, N=64, T=3, H=2, D=8, dtype=torch.float64)
    x, text = problem.q, problem.text_q
    ran = []
    for layers, k in zip((2, 4, 6, 8, 6, 4, 2), (1, 2, 4, 8, 4, 2, 1), strict=True):
        for i in range(layers):
            p = SkipPattern.group(k) if i % 2 else SkipPattern.single(k)
            ran.append(p)
            x, text = skiparse.joint_attention(
                x, problem.k, problem.v, text, problem.text_k, problem.text_v, p,
                backend="reference",
            )  # fmt: skip
    assert [layer.pattern for layer in schedule.layers()] == ran
    views = schedule.Views(problem)
    for made in (views.natural(views.attend()), schedule.by_backend(problem, "sdpa")):
        torch.testing.assert_close(made.video, x)
        torch.testing.assert_close(made.text, text)


def test_dense_layers_are_dense_attention():
    problem = make_problem(SkipPattern.dense(), N=12, T=3, H=2, D=8, dtype=torch.float64)
    x, text = problem.q, problem.text_q
    for _ in range(32):
        x, text = skiparse.joint_attention(
            x, problem.k, problem.v, text, problem.text_k, problem.text_v, SkipPattern.dense()
        )
    made = schedule.dense(problem, torch.nn.functional.scaled_dot_product_attention)
    torch.testing.assert_close(made.video, x)
    torch.testing.assert_close(made.text, text)


@pytest.mark.parametrize("kind", ["single", "group"])
def test_text_inside_is_the_same_attention(kind):
    case = cases.Case("1x288x512", 2, 4, kind, kind == "group", True, N=64, T=6, D=16)
    problem = make_problem(case.pattern, B=2, N=64, T=6, dtype=torch.float64)
    packed = steps.packed_problem(case, problem)
    out, text_out = skiparse.joint_attention(*problem.inputs, case.pattern)
    rows = skiparse.attention(*packed.inputs[:3], packed.pattern)
    video, text = schedule.text_outside(rows, 4, 6, blocks=kind == "group")
    torch.testing.assert_close(video, out)
    torch.testing.assert_close(text, text_out)


def test_the_gain_of_a_schedule_is_that_of_its_layers():
    todo = [lab.GPU.case(kind, k) for k in (2, 4, 8) for kind in ("single", "group")]
    rows = [{"case": c.name, "backend": "x", "speedup": c.ceiling} for c in todo]
    gain, limit = table.schedule_gain(rows, "x", "fwd")
    assert gain == pytest.approx(limit)
    assert f"{limit:.3f}" == "2.547"
    assert limit == pattern.ceiling(schedule.LAYERS, schedule.SPARSITY, 36864, 512)
    assert table.schedule_gain(rows[:-1], "x", "fwd") == (0.0, 0.0)
    assert table.schedule_gain(rows, "x", "fwdbwd") == (0.0, 0.0)


def test_a_failing_test_is_told_when_it_fails(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_fails(): assert 1 == 2\ndef test_dies(): os._exit(7)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skiparse.bench.gpu.telling", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7
    assert "FAILED test_two.py::test_fails (call)" in done.stdout
    assert "assert 1 == 2" in done.stdout
