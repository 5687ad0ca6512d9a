"""The command behind ``bench/gpu.sh``: one of the two runs on a GPU, or both rehearsed on a CPU."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from skiparse.bench import rows
from skiparse.bench.gpu import kept, model, plan, table
from skiparse.bench.gpu.driver import Driver, Job, pool, work
from skiparse.bench.gpu.lab import DRY_RUN, GPU, Lab, is_lost, ptxas_version
from skiparse.bench.gpu.steps import CHECKOUT, TESTS

LOCAL = CHECKOUT / "bench" / "local"  # not in the repository; see CONTRIBUTING.md
FILES = ("results.jsonl", "passes.jsonl", "steps.jsonl", "errors.txt", "clocks.csv")
REHEARSED = 120.0  # seconds that a step may take on a CPU
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do a run, or rehearse; the exit status, 1 if a step failed or a run would not fit."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("run", nargs="?", choices=plan.RUNS, help="which of the two runs")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and the log")
    parser.add_argument("--dry-run", action="store_true", help="both, on a CPU, with tiny shapes")
    parser.add_argument(
        "--local", type=Path, default=LOCAL, help="folder with ptxas and compiled kernels"
    )
    parser.add_argument("--work", nargs="+", metavar="STEP", help="only these, in this process")
    options = parser.parse_args(arguments)
    if options.work:
        return work_here(options.work, options.out, DRY_RUN if options.dry_run else GPU)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (options.out / name).unlink(missing_ok=True)
    if options.dry_run:
        return rehearse(options.out, options.local)
    if not torch.cuda.is_available():
        print("bench/gpu.sh: torch finds no GPU here; --dry-run needs none", file=sys.stderr)
        return 2
    if options.run is None:
        print("bench/gpu.sh: which run, 1 or 2?", file=sys.stderr)
        return 2
    return measure(options.run, options.out, options.local)


def measure(run: str, out: Path, local: Path) -> int:
    """One run on the GPU of this machine."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        driver = Driver(out, plan.LIMITS[run] - model.START - model.END)
        driver.say(about(local))
        clocks = log_clocks(out)
        driver.say("compiled before:", kept.unpack(local / kept.NAME, Path(cache)))
        driver.say("compiling:", pool(compilers(run, Path(cache), local), out, model.POOL_LIMIT))
        jobs = [Job(s.name, s.process, s.seconds, s.limit) for s in plan.RUNS[run]()]
        faults = driver.run(jobs, functools.partial(start, out, Path(cache), local, "cuda"))
        if clocks is not None:
            clocks.terminate()
        driver.say("compiled kernels, for the next run:", kept.pack(Path(cache), out / kept.NAME))
        local.mkdir(exist_ok=True)
        shutil.copy(out / kept.NAME, local)  # for one on this machine
    return end(out, faults)


def rehearse(out: Path, local: Path) -> int:
    """Every step of both runs but ping-pong on a CPU; then whether each run fits its limit."""
    counting = count_kernels()
    with tempfile.TemporaryDirectory() as cache:
        driver = Driver(out, 10 * REHEARSED)
        driver.say(about(local))
        jobs = [
            Job(step.name, step.process, 0.0, REHEARSED)
            for steps in plan.RUNS.values()
            for step in steps()
            if not step.name.startswith("triton.pingpong")
        ]
        faults = driver.run(jobs, functools.partial(start, out, Path(cache), local, "cpu"))
    status = end(out, faults)
    for run, kernels in counting().items():
        print("\n" + plan.table(run, kernels), flush=True)
        for fault in plan.faults(run, kernels):
            print(f"FAILED run {run}: {fault}", flush=True)
            status = 1
    return status


def end(out: Path, faults: dict[str, str]) -> int:
    """Print the table and what went wrong; the exit status."""
    print(table.summary(rows.read(out / "results.jsonl"), rows.read(out / "passes.jsonl")))
    print(*(f"FAILED {name}: {fault}" for name, fault in faults.items()), sep="\n", flush=True)
    return 1 if faults else 0


# Processes, each with its ptxas and Triton's cache.


def environment(process: str, cache: Path, local: Path) -> dict[str, str]:
    """All variables of a process; in "bundled" Triton has its own ptxas, else the one beside us."""
    found = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    found.pop("TRITON_PTXAS_PATH", None)
    other = other_ptxas(local)
    if other is not None and process != "bundled":
        found["TRITON_PTXAS_PATH"] = str(other)
    return found


def other_ptxas(local: Path) -> Path | None:
    """The ptxas beside the script, None if there is none.

    Raises:
        RuntimeError: if it does not run. Triton would silently take its own.
    """
    path = local / "ptxas"
    if not path.exists():
        return None
    try:
        ptxas_version(path)
    except OSError as error:
        raise RuntimeError(f"{path} does not run, chmod +x it or take it away: {error}") from error
    return path


def start(
    out: Path, cache: Path, local: Path, device: str, process: str, names: Sequence[str]
) -> subprocess.Popen[Any]:
    """A worker for some steps."""
    command = [sys.executable, "-m", "skiparse.bench.gpu", "--out", str(out)]
    variables = environment(process, cache, local)
    if device == "cpu":
        command.append("--dry-run")
        variables["OMP_NUM_THREADS"] = "1"  # the problems are tiny; more threads only wait
    with (out / "errors.txt").open("a") as errors:
        return subprocess.Popen(
            [*command, "--work", *names], env=variables, stderr=errors,
            start_new_session=True,
        )  # fmt: skip


def work_here(names: Sequence[str], out: Path, setting: Any) -> int:
    """Do some steps in this process; the exit status."""
    steps = {step.name: step for make in plan.RUNS.values() for step in make()}
    lab = Lab(setting, out)
    todo = {name: functools.partial(steps[name].measure, lab) for name in names}
    return work(todo, out, is_lost)


def compilers(run: str, cache: Path, local: Path) -> list[tuple[list[str], dict[str, str]]]:
    """Commands that compile what a run needs, side by side, and their environments."""
    command = [sys.executable, "-m", "skiparse.bench.gpu.kernels", "--compile", run]
    return [
        ([*command, process, str(i), str(count)], environment(process, cache, local))
        for process, count in model.POOLS.items()
        for i in range(count)
    ]


def count_kernels() -> Callable[[], dict[str, dict[str, int]]]:
    """Begin to count how many kernels each run compiles, and by whom; the rest gives the answer.

    By processes of their own, which have no interpreter.
    """
    plain = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    commands = (["kernels"], ["counted", *(str(CHECKOUT / name) for name in TESTS)])
    counting = [
        subprocess.Popen(
            [sys.executable, "-m", f"skiparse.bench.gpu.{module}", *rest],
            env=plain, stdout=subprocess.PIPE, text=True,
        )
        for module, *rest in commands
    ]  # fmt: skip

    def counts() -> dict[str, dict[str, int]]:
        runs, tests = (json.loads(p.communicate()[0].splitlines()[-1]) for p in counting)
        return {run: {**kernels, "tests": tests} for run, kernels in runs.items()}

    return counts


# What there is to say of the machine, once.


def about(local: Path) -> str:
    """Versions of all that the figures depend on, and the state of the GPU."""
    other = other_ptxas(local)
    versions = rows.versions()
    used = "its own" if other is None else f"{ptxas_version(other)}, {other}"
    asked = f"--query-gpu=name,driver_version,power.limit,{CLOCKS}"
    cudnn = torch.backends.cudnn.version()
    lines = (
        f"Python {versions['python']}, torch {torch.__version__}, cuDNN {cudnn}",
        f"Triton {versions['triton']}, its own ptxas {bundled_ptxas()}; used: {used}",
        f"commit {rows.commit()}",
        rows.output(["nvidia-smi", asked, "--format=csv"]),
    )
    return "\n".join(line for line in lines if line)


def bundled_ptxas() -> str:
    """The version of the ptxas in Triton's package."""
    import triton

    return ptxas_version(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")


def log_clocks(out: Path) -> subprocess.Popen[Any] | None:
    """Clocks, power and temperature twice a second, into ``clocks.csv``."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv", "-lms", "500"]
    if shutil.which(command[0]) is None:
        return None
    with (out / "clocks.csv").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
