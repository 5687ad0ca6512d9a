"""What a run writes down as it goes: a line of JSON for every step, and curves for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter

from skiparse.models.data.atomic import truncated

LOG, CURVES = "log.jsonl", "tensorboard"


class Log:
    """One line for each step, in ``log.jsonl``; its numbers as curves, in ``tensorboard/``."""

    def __init__(self, file: TextIO | None, curves: SummaryWriter | None) -> None:
        self._file, self._curves = file, curves

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """The row of a step; it must be the next one."""
        if self._file is None or self._curves is None:
            return
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if isinstance(value, int | float):
                self._curves.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flush to the disk, before a checkpoint says that these steps were done."""
        if self._file is not None and self._curves is not None:
            os.fsync(self._file.fileno())
            self._curves.flush()


@contextmanager
def opened(out: Path | None, steps: int) -> Iterator[Log]:
    """The log of the run in ``out`` after its first ``steps`` steps; what was logged later goes.

    Without ``out`` nothing is written, as in all processes but the first.
    """
    if out is None:
        yield Log(None, None)
        return
    with truncated(out / LOG, steps) as file:
        curves = SummaryWriter(str(out / CURVES), purge_step=steps)
        try:
            yield Log(file, curves)
        finally:
            curves.close()
