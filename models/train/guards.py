"""What holds around a run: nobody else works in its folder, and who stops it is heard."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from skiparse.models.train.parallel import World


@contextmanager
def alone(out: Path, world: World) -> Iterator[None]:
    """Nobody else trains in ``out`` meanwhile."""
    if world.rank > 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"out={out}: another run is at work there; wait for it, or choose another out"
        ) from error


@contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came; the second Ctrl-C is not held up."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals go to the main thread
        return

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for kind in (signal.SIGTERM, signal.SIGINT):
        before[kind] = signal.signal(kind, note)
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
