"""Files that were looked at, found by a key from the disk, so that ten million take no memory.

SQLite keeps them: many processes read one file of it, each with a few megabytes of pages.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from skiparse.models.data.atomic import replacing

FIELDS = ("path", "height", "width", "frames", "fps", "hash")  # what is kept of a file

_PAGES = 2**16  # KiB of them in memory, for each who reads


def build(path: Path, files: Iterable[Iterable[Sequence[Any]]]) -> None:
    """Write ``path``, whole or not at all.

    Args:
        path: of SQLite's file.
        files: some at a time, each its key and then what it has of :data:`FIELDS`.
    """
    with (
        replacing(path) as temporary,
        closing(sqlite3.connect(temporary, isolation_level=None)) as base,
    ):
        # a file that is not whole is not there, so nothing has to be taken back
        for said in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF", "BEGIN"):
            base.execute(said)
        base.execute(f"CREATE TABLE files (digest INTEGER, key, {', '.join(FIELDS)})")
        row = f"INSERT INTO files VALUES ({', '.join('?' * (2 + len(FIELDS)))})"
        for some in files:
            base.executemany(row, ((_digest(each[0]), *each) for each in some))
        for said in ("CREATE INDEX by_digest ON files (digest)", "COMMIT"):
            base.execute(said)


class Lookup:
    """What :func:`build` wrote, for reading; make one with :func:`opened`."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self._base = base

    def find(self, key: str) -> dict[str, Any] | None:
        """The first file of this key, by the names of :data:`FIELDS`."""
        found = self._base.execute(
            f"SELECT {', '.join(FIELDS)} FROM files WHERE digest = ? AND key = ? "
            "ORDER BY rowid LIMIT 1",
            (_digest(key), key),
        ).fetchone()
        return None if found is None else dict(zip(FIELDS, found, strict=True))


@contextmanager
def opened(path: Path) -> Iterator[Lookup]:
    """A file that :func:`build` wrote."""
    where = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    with closing(sqlite3.connect(where, uri=True)) as base:
        base.execute(f"PRAGMA cache_size=-{_PAGES}")
        yield Lookup(base)


def _digest(key: str) -> int:
    """64 bits of a hash of it, which stand in the index in its place."""
    found = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)
