"""What holds around a run: nobody else works in its folder, and who stops it is heard."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skiparse.models.data.atomic import check_writable
from skiparse.models.train.parallel import World

GRACE = 10.0  # seconds in which signals count as one request


@contextmanager
def alone(out: Path, world: World) -> Iterator[None]:
    """Nobody else trains in ``out`` meanwhile."""
    if world.rank > 0:
        yield
        return
    check_writable(out / ".lock")
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"out={out}: another run is at work there; wait for it, or choose another out"
        ) from error


@contextmanager
def told_to_stop(world: World) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came, to this process.

    SLURM and systemd send SIGTERM to every process of a job, and torchrun hands on what it got: the
    same request comes twice and more. So what comes within :data:`GRACE` seconds after the first is
    no other one; after that, a signal does what it did before. A second Ctrl-C of somebody who sits
    before a single process is not held up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals go to the main thread
        return
    came: list[float] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        now = time.monotonic()
        came.append(now)
        late, impatient = now - came[0] > GRACE, number == signal.SIGINT and world.size == 1
        if len(came) > 1 and (late or impatient):
            signal.signal(number, before[number])
            signal.raise_signal(signal.Signals(number))

    for kind in (signal.SIGTERM, signal.SIGINT):
        before[kind] = signal.signal(kind, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does: the block ends by KeyboardInterrupt, and cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return

    def interrupt(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # sent twice, it must not disturb the cleaning up
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def undisturbed(worker: int) -> None:
    """For processes that read: their parent decides when they end, and not who signals them all."""
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, signal.SIG_IGN)
