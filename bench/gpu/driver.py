"""Starts the processes of a run, watches each step, stops what hangs, and goes on with the rest.

A worker does its steps one after another and notes when each begins and ends, in ``steps.jsonl``.
The driver reads those notes; it knows no torch. A step that is over its limit, or that takes the
process with it, is noted as failed, and a new worker goes on behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOST = 3  # exit status of a worker whose CUDA context is gone
GRACE = 15.0  # seconds that a killed process has to go
AGAIN = 8.0  # that a worker takes to begin (MODEL)
START_LIMIT = 90.0  # seconds of a worker until its first step, and between two
HANGS = "not begun: the device hangs"
POLL = 0.1


@dataclass(frozen=True)
class Job:
    """One step for the driver: its process, the seconds it should take, and its limit."""

    name: str
    process: str
    seconds: float
    limit: float


Start = Callable[[str, Sequence[str]], "subprocess.Popen[Any]"]


@dataclass
class Driver:
    """One run, and the time it has."""

    out: Path
    seconds: float  # of the whole run, from now
    grace: float = GRACE
    began: float = field(default_factory=time.monotonic)
    faults: dict[str, str] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def say(self, *words: object) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s]", *words, flush=True)

    def run(self, jobs: Sequence[Job], start: Start) -> dict[str, str]:
        """Do the jobs in order; what went wrong, by name. Nothing that fails stops the others.

        ``start`` begins a worker for a process and the names of its steps. But a process that
        cannot be killed ends the run: the device hangs, and there is no more to be had from it.
        """
        todo = list(jobs)
        while todo:
            process = todo[0].process
            group, others = ([job for job in todo if (job.process == process) is own]
                             for own in (True, False))  # fmt: skip
            begins = len({job.process for job in others}) * AGAIN
            later = begins + sum(job.seconds for job in others)
            rest, alive = self._work(self._in_time(group, later), later, start)
            todo = rest + others
            if not alive:
                self.faults |= dict.fromkeys((job.name for job in todo), HANGS)
                break
        return self.faults

    def _in_time(self, group: Sequence[Job], later: float) -> list[Job]:
        """The jobs for which there is time, less what other processes after them should take."""
        left, fitting = self.left - later, []
        for job in group:
            if job.seconds <= left:
                fitting.append(job)
                left -= job.seconds
            else:
                self.faults[job.name] = "no time left"
                self.say("SKIPPED", job.name, "no time left")
        return fitting

    def _work(self, group: Sequence[Job], later: float, start: Start) -> tuple[list[Job], bool]:
        """One worker: the jobs it leaves undone, and whether its process could be ended."""
        if not group:
            return [], True
        notes = self.out / "steps.jsonl"
        seen = len(_notes(notes))
        worker = start(group[0].process, [job.name for job in group])
        todo = list(group)
        current: Job | None = None
        since = time.monotonic()
        while True:
            ended = worker.poll() is not None  # before its last notes are read
            for note in _notes(notes)[seen:]:
                seen += 1
                since = time.monotonic()
                if note["state"] == "began":
                    current = next(job for job in todo if job.name == note["step"])
                    continue
                todo = [job for job in todo if job.name != note["step"]]
                current = None
                if note["state"] == "failed":
                    self.faults[note["step"]] = note["fault"]
            if ended:
                break
            limit = current.limit if current else START_LIMIT
            if time.monotonic() - since > limit or self.left < later:
                fault = f"stopped after {time.monotonic() - since:.0f} s"
                if not self.kill(worker):
                    return self._undone(todo, current, fault), False
                return self._undone(todo, current, fault), True
            time.sleep(POLL)
        if not todo:
            return [], True
        status = worker.returncode
        why = "the CUDA context is lost" if status == LOST else f"its process ended with {status}"
        if status == LOST and current is None:
            self.say(f"process {group[0].process}: {why}; a new one goes on with {todo[0].name}")
            return todo, True
        return self._undone(todo, current, why), True

    def _undone(self, todo: Sequence[Job], current: Job | None, fault: str) -> list[Job]:
        """Note what the current job died of; all of them, if the process died before the first."""
        lost = [current] if current else list(todo)
        for job in lost:
            self.faults[job.name] = fault
            self.say("FAILED", job.name, fault)
        return [job for job in todo if job not in lost]

    def kill(self, worker: subprocess.Popen[Any]) -> bool:
        """End a process and what it has started; whether it is gone."""
        os.killpg(worker.pid, signal.SIGKILL)
        try:
            worker.wait(self.grace)
        except subprocess.TimeoutExpired:
            self.say("it does not even die: the device hangs, and this run ends here")
            return False
        return True


def _notes(path: Path) -> list[dict[str, Any]]:
    """The notes so far; a line that is still being written is not one yet."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def work(
    todo: Mapping[str, Callable[[], None]], out: Path, is_lost: Callable[[BaseException], bool]
) -> int:
    """What a worker does: its steps, each told and noted; the exit status.

    What a step raises costs that step. Only a lost CUDA context ends the process, as nothing after
    it could work.
    """
    for name, measure in todo.items():
        start = time.monotonic()
        note(out, {"step": name, "state": "began"})
        try:
            measure()
        except Exception as error:  # whatever a kernel or a library may do: told, and a failure
            seconds = time.monotonic() - start
            lines = str(error).strip().splitlines()
            fault = f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
            print(f"FAILED {name}: {seconds:.1f} s, {fault}", flush=True)
            with (out / "errors.txt").open("a") as errors:
                errors.write(f"\n== {name}\n{traceback.format_exc()}")
            note(out, {"step": name, "state": "failed", "seconds": seconds, "fault": fault})
            if is_lost(error):
                print("the CUDA context is lost; this process ends", flush=True)
                return LOST
            continue
        seconds = time.monotonic() - start
        print(f"ok     {name}: {seconds:.1f} s", flush=True)
        note(out, {"step": name, "state": "ok", "seconds": seconds})
    return 0


def note(out: Path, entry: dict[str, Any]) -> None:
    """Append a line, whole and at once."""
    with (out / "steps.jsonl").open("a") as notes:
        notes.write(json.dumps(entry) + "\n")


def pool(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], out: Path, seconds: float
) -> str:
    """Run commands side by side, at most so long; in words, how they ended."""
    with (out / "errors.txt").open("a") as log:
        running = [
            subprocess.Popen(
                command, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )
            for command, environment in commands
        ]  # fmt: skip
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(p.poll() is None for p in running):
            time.sleep(POLL)
        late = [p for p in running if p.poll() is None]
        for process in late:
            os.killpg(process.pid, signal.SIGKILL)
    failed = [p for p in running if p not in late and p.returncode]
    return f"{len(running)} processes, {len(late)} stopped, {len(failed)} failed"
