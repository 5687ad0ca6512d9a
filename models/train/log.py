"""What a run writes down as it goes: a line of JSON for every step, and curves for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from skiparse.models.data.report import Report
from skiparse.models.train.parallel import World

LOG, CURVES = "log.jsonl", "tensorboard"


class Log:
    """One line for each step, in ``log.jsonl``; its numbers as curves, in ``tensorboard/``.

    A full disk ends neither the run nor the log: lines wait in memory until there is room. Curves
    go on at a later checkpoint, without the steps between.

    Args:
        file: unbuffered, its position where the next line goes; None writes nothing.
        curves: folder of the curves.
        steps: how many have been logged.
    """

    def __init__(self, file: FileIO | None, curves: Path, steps: int) -> None:
        self._file, self._folder = file, curves
        self._whole = file.tell() if file is not None else 0  # bytes of whole lines
        self._waiting: list[str] = []
        self._told: set[str] = set()
        self._curves: SummaryWriter | None = None
        if file is not None:
            self._begin_curves(steps)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """The row of a step; it must be the next one."""
        if self._file is None:
            return
        self._waiting.append(json.dumps({"step": step, **row}) + "\n")
        self._write_waiting(self._file)
        if self._curves is None:
            return
        try:
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._curves.add_scalar(name, value, step)
        except OSError as error:
            self._end_curves(error)

    def sync(self, step: int) -> None:
        """Flush to the disk, before a checkpoint says that ``step`` steps were done."""
        if self._file is None:
            return
        self._write_waiting(self._file)
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._tell(LOG, error)
        if self._curves is None:
            self._begin_curves(step)
        try:
            if self._curves is not None:
                self._curves.flush()
        except OSError as error:
            self._end_curves(error)

    def close(self) -> None:
        """Write what waits, and let go of the files."""
        if self._file is None:
            return
        self._write_waiting(self._file)
        if self._waiting:
            tqdm.write(f"{LOG} lacks its last {len(self._waiting)} steps: there was no room")
        self._end_curves(None)

    def _write_waiting(self, file: FileIO) -> None:
        """All lines that wait, or none: a line cut short would end the log for its readers."""
        data = memoryview("".join(self._waiting).encode())
        try:
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        except OSError as error:
            self._tell(LOG, error)
            with suppress(OSError):
                file.truncate(self._whole)
            file.seek(self._whole)
            return
        self._whole += len(data)
        self._waiting.clear()

    def _begin_curves(self, step: int) -> None:
        try:
            self._curves = SummaryWriter(str(self._folder), purge_step=step)
        except OSError as error:
            self._tell(CURVES, error)

    def _end_curves(self, error: OSError | None) -> None:
        curves, self._curves = self._curves, None
        if error is not None:
            self._tell(CURVES, error)
        if curves is not None:
            with suppress(OSError):  # it tries to write what was in its way before
                curves.close()

    def _tell(self, what: str, error: OSError) -> None:
        """Once for each file."""
        if what not in self._told:
            self._told.add(what)
            tqdm.write(f"{what} cannot be written: {error}; training goes on, and will try again")


def tell(out: Path, stage: str, report: Report, world: World) -> None:
    """How many clips a stage uses, in a line and in ``data/STAGE.json``."""
    if world.rank == 0:
        tqdm.write(f"stage {stage}: {report.line}")
        (out / "data").mkdir(parents=True, exist_ok=True)
        report.write(out / "data" / f"{stage}.json")


@contextmanager
def opened(out: Path | None, steps: int) -> Iterator[Log]:
    """The log of the run in ``out`` after its first ``steps`` steps; what was logged later goes.

    Without ``out`` nothing is written, as in all processes but the first.
    """
    if out is None:
        yield Log(None, Path(), 0)
        return
    (out / LOG).touch()
    with (out / LOG).open("rb+", buffering=0) as file:
        file.seek(_end(out / LOG, steps))
        file.truncate()
        log = Log(file, out / CURVES, steps)
        try:
            yield log
        finally:
            log.close()


def _end(path: Path, steps: int) -> int:
    """Where the lines of the first ``steps`` steps end; also where a line is cut short."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                break
            if step >= steps or not line.endswith(b"\n"):
                break
            end += len(line)
    return end
