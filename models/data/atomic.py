"""Files that are there whole or not at all, whatever interrupts the writing of them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path``; what is written there takes the place of ``path``.

    The file is flushed to the disk and renamed when the block ends, and removed if the block
    raises: whoever looks at ``path`` sees the old file or the whole new one.
    """
    target = Path(path).absolute()
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(*paths: str | os.PathLike[str]) -> None:
    """Find out whether :func:`replacing` could write ``paths``, for callers with long work before.

    Makes their folders, and writes a megabyte in each that is removed again.

    Raises:
        ValueError: if it cannot, with the reason.
    """
    tried = set()
    for path in paths:
        target = Path(path).absolute()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                if stat.S_ISDIR(os.stat(target).st_mode):
                    raise IsADirectoryError(errno.EISDIR, "it is a folder")
            if target.parent not in tried:
                tried.add(target.parent)
                with tempfile.TemporaryFile(dir=target.parent) as file:
                    file.write(bytes(2**20))
                    file.flush()
        except OSError as error:
            what = error.strerror or str(error)
            if isinstance(error, FileExistsError):
                what = f"{target.parent} is a file"
            raise ValueError(
                f"{target} cannot be written: {what}; choose another place, or see that there is "
                "room and that it may be written to"
            ) from error


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON in UTF-8; an older file of that name is replaced.

    Names of files that are no text, as Python has them, are escaped, and come back as they were.

    Raises:
        ValueError: if a number in it is not finite, before anything is written.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_table(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds.

    Raises:
        ValueError: if it holds none.
        OSError: if it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no table")
    return found


def seal(table: Mapping[str, Any]) -> str:
    """A checksum of what JSON keeps of ``table``, to be written with it: SHA-256."""
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


@contextmanager
def truncated(path: Path, lines: int) -> Iterator[TextIO]:
    """A text file, open for writing after its first ``lines`` lines; later ones go."""
    path.touch()
    with path.open("r+", encoding="utf-8") as file:
        for _ in range(lines):
            file.readline()
        file.truncate(file.tell())
        file.seek(0, os.SEEK_END)
        yield file
