"""How every training run goes: one loop around a task, which says what a step is.

The loop joins the processes, keeps others out of the folder, hears signals, counts and logs steps,
and saves: every so many steps, where the task says so, at the end, and when it is told to stop. A
checkpoint is complete or not there (:mod:`skiparse.models.train.checkpoint`). What a step does,
what there is to save and what must not change when a run goes on is the task's.

In the folder of a run: ``checkpoints/``, ``log.jsonl`` with a line for every step, ``tensorboard/``
with the same as curves, and what the task puts there.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from skiparse.models.train.checkpoint import FOLDER, Checkpoint, CheckpointError, Checkpoints
from skiparse.models.train.config import Run
from skiparse.models.train.guards import alone, told_to_stop
from skiparse.models.train.log import opened
from skiparse.models.train.parallel import TIMEOUT, World
from skiparse.models.train.recipe import recipe_of

Steps = Generator[Mapping[str, Any]]


class Task(Protocol):
    """What is trained, step by step."""

    @property
    def total(self) -> int:
        """Steps in all."""

    @property
    def hold(self) -> int | None:
        """Steps after which nothing was learned; see :meth:`Checkpoints.save`."""

    def begin(self, last: Checkpoint | None, world: World) -> None:
        """Check everything, and be as ``last`` has it, or new.

        Raises:
            ValueError: for settings that do not fit the data, the model, the processes or ``last``.
        """

    def steps(self, done: int) -> Steps:
        """Do one step after the other, from the one after ``done`` on, and give each one's row.

        Tensors in a row are numbers of this process; what is logged is their mean over all.
        """

    def ends(self, done: int) -> bool:
        """Whether a part of the run ends with step ``done``, which is saved then."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What a checkpoint holds, to be saved, and to be filled."""

    def about(self) -> Mapping[str, Any]:
        """The rest of it, ready for JSON."""

    def saved(self, done: int) -> None:
        """Step ``done`` is in a checkpoint."""

    def after(self, done: int) -> None:
        """What else is due after step ``done``."""


def train(config: Run) -> Path:
    """Train from the last checkpoint in ``config.out``, or from the start, to the end of the chain.

    On SIGTERM or Ctrl-C, in whichever process, it saves after the step and returns; called again,
    it goes on. A checkpoint or a line of the log that cannot be written, say on a full disk, is
    reported and tried again later.

    While the clipper skips steps, the checkpoints from before stay, and beside them the last one
    since. Once it gave up, the run may continue with other learning rates of the stage and other
    samples; ``changes`` in ``about.json`` of what it saves then tells of it.

    Args:
        config: of a recipe, see :class:`~skiparse.models.train.config.Config`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: for a config that does not fit the data, the model or the checkpoint, and if
            another run works in the folder; before any work.
        DataError: if more than one in a hundred files cannot be read.
        FloatingPointError: if the clipper gives up. Nothing of that step was applied or saved;
            ``stopped.json`` names its samples.
        CheckpointError: if the last checkpoint cannot be written.
        LostError: if other processes died or did not answer in time, with their ranks.
    """
    return run(
        recipe_of(config.recipe).task(config),
        Path(config.out),
        device=config.device,
        save_every=config.save_every,
        keep=config.keep,
        asynchronous=config.asynchronous,
        timeout=config.timeout,
    )


def run(
    task: Task,
    out: Path,
    *,
    device: str | None,
    save_every: int,
    keep: int,
    asynchronous: bool = False,
    timeout: float = TIMEOUT,
) -> Path:
    """Do the steps of ``task`` that are left, from the last checkpoint in ``out`` if there is one.

    On SIGTERM or Ctrl-C, in whichever process, it saves after the step and returns; called again,
    it goes on. A checkpoint or a line of the log that cannot be written, say on a full disk, is
    reported and tried again later. The caller's random state is left alone.

    Args:
        task: see :class:`Task`.
        out: the folder of the run, made if need be.
        device: cpu or cuda; None takes a GPU if there is one.
        save_every: steps from one checkpoint to the next.
        keep: checkpoints that stay.
        asynchronous: write checkpoints while training goes on.
        timeout: seconds to wait for another process.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: as :meth:`Task.begin`, and if another run works in the folder.
        CheckpointError: if the last checkpoint is damaged, or a last one cannot be written.
        LostError: if other processes died or hang, with their ranks.
    """
    with (
        World.joined(device, timeout) as world,
        alone(out, world),
        told_to_stop(world) as told,
        Checkpoints(out / FOLDER, keep=keep, timeout=timeout) as checkpoints,
        torch.random.fork_rng([world.device] if world.device.type == "cuda" else []),
    ):
        last = checkpoints.latest()
        done = last.step if last else 0
        task.begin(last, world)
        progress = tqdm(total=task.total, initial=done, unit="step", disable=world.rank > 0)
        with (
            progress,
            opened(out if world.rank == 0 else None, done) as log,
            closing(task.steps(done)) as steps,
        ):
            started = time.perf_counter()
            for row in steps:
                done += 1
                mine = {name: x for name, x in row.items() if isinstance(x, Tensor)}
                *means, stopping = world.mean(*mine.values(), float(told()))
                row = {**row, **dict(zip(mine, means, strict=True))}
                log.write(done - 1, {**row, "seconds": time.perf_counter() - started})
                progress.set_postfix_str(_shown(row), refresh=False)
                progress.update()
                ending = done == task.total or stopping > 0
                if ending or task.ends(done) or done % save_every == 0:
                    log.sync(done)
                    if _save(checkpoints, done, task, asynchronous, at_last=ending):
                        task.saved(done)
                task.after(done)
                if ending:
                    break
                started = time.perf_counter()
        found = checkpoints.latest()
        assert found is not None
        return found.path


def _save(
    checkpoints: Checkpoints, step: int, task: Task, asynchronous: bool, *, at_last: bool
) -> bool:
    """A checkpoint; if it fails, training goes on without, but not past the last one.

    Returns whether it is there by now.
    """
    write = partial(checkpoints.save, step, task.tensors(), task.about(), hold=task.hold)
    written = True
    for act in (checkpoints.wait, partial(write, asynchronous=asynchronous and not at_last)):
        try:
            act()
        except CheckpointError as error:
            if at_last and isinstance(act, partial):
                raise
            tqdm.write(f"step {step}: {error}; training goes on, and will try again")
            written = False
    return written and (at_last or not asynchronous)


def _shown(row: Mapping[str, Any]) -> str:
    """What of a row goes beside the bar: its words, and its loss."""
    return " ".join([*(x for x in row.values() if isinstance(x, str)), f"{row['loss']:.4g}"])
