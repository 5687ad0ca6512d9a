"""Whether a file is still the one that was read: its size and time, a hash of its ends, or of all.

A clip that was replaced by another of the same shape changes no row of a manifest, and what was
computed from it is that of the old one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_END = 2**16  # bytes of its head and of its tail


@dataclass(frozen=True)
class Content:
    """What a file was when it was read."""

    size: int  # bytes
    mtime: int  # nanoseconds
    ends: str  # SHA-256 of head and tail
    whole: str  # SHA-256

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Content:
        """Of a file as it is now; OSError if it cannot be read."""
        with Path(path).open("rb") as file:
            stat = os.stat(file.fileno())
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(stat.st_size, stat.st_mtime_ns, _ends(path, stat.st_size), whole)

    def is_of(self, path: str | os.PathLike[str], *, full: bool = False) -> bool:
        """Whether ``path`` is still this; OSError if it cannot be read.

        Args:
            full: compare all of it. If not, a file of this size and time is believed, and of
                another time, as after a copy, its ends are compared.
        """
        stat = os.stat(path)
        if stat.st_size != self.size:
            return False
        if full:
            with Path(path).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.whole
        return stat.st_mtime_ns == self.mtime or _ends(path, stat.st_size) == self.ends


def _ends(path: str | os.PathLike[str], size: int) -> str:
    with Path(path).open("rb") as file:
        found = hashlib.sha256(file.read(_END))
        file.seek(max(size - _END, 0))
        found.update(file.read(_END))
    return found.hexdigest()
