"""Where the bytes of a clip are: a whole file, or a part of a tar, which is never unpacked.

A member of a tar is named by an address, which stands wherever a path does:
``00000.tar!1536+48211!000000012.mp4``, the shard, where its bytes begin and how many there are, and
its name, by whose suffix it is known as a video or an image.
"""

from __future__ import annotations

import errno
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_ADDRESS = re.compile(r"(.+?\.tar)!(\d{1,18})\+(\d{1,18})!(.+)", re.DOTALL | re.IGNORECASE)


def address(shard: str, offset: int, size: int, name: str) -> str:
    """The address of a member of ``shard``: ``size`` bytes from ``offset`` on."""
    return f"{shard}!{offset}+{size}!{name}"


def parted(path: str) -> tuple[str, int, int] | None:
    """Shard, offset and size of an address; None for the path of a file."""
    found = _ADDRESS.fullmatch(path)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


@dataclass(frozen=True)
class Span:
    """Some bytes of a file, or all.

    Attributes:
        path: the file.
        offset: the first of them.
        size: how many.
        mtime: of the file, in nanoseconds.
    """

    path: Path
    offset: int
    size: int
    mtime: int

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Span:
        """What a path or an address leads to.

        Raises:
            OSError: if there is no such file, or the shard ends before the end of its member.
        """
        part = parted(os.fspath(path))
        return cls.within(Path(path), None) if part is None else cls.within(Path(part[0]), part[1:])

    @classmethod
    def within(cls, file: Path, part: tuple[int, int] | None) -> Span:
        """``part`` of a file, its offset and size, or all of it; OSError as of :meth:`of`."""
        found = file.stat()
        offset, size = part or (0, found.st_size)
        if offset + size > found.st_size:
            raise OSError(
                errno.EIO,
                f"the shard {file} is cut off: it has {found.st_size} bytes, and the clip ends "
                f"at {offset + size}; download it again",
            )
        return cls(file, offset, size, found.st_mtime_ns)

    def open(self) -> io.BufferedReader:
        """The bytes, as a file of their own that ends where they do."""
        file = self.path.open("rb")
        if (self.offset, self.size) == (0, os.fstat(file.fileno()).st_size):
            return file
        return io.BufferedReader(_Part(file, self.offset, self.size))


class _Part(io.RawIOBase):
    """``size`` bytes of a file from ``offset`` on; closing it closes the file."""

    def __init__(self, file: io.BufferedReader, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence] + offset
        if at < 0:
            raise ValueError(f"seek to {at}, before the beginning")
        self._at = at
        return at

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view[: max(self._size - self._at, 0)])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
