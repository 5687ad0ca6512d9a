"""Whether a file is still the one that was read: its size and time, a hash of its ends, or of all.

A clip that was replaced by another of the same shape changes no row of a manifest, and what was
computed from it is that of the old one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from skiparse.models.data.span import Span

_END = 2**16  # bytes of its head and of its tail


@dataclass(frozen=True)
class Content:
    """What a file was when it was read."""

    size: int  # bytes
    mtime: int  # nanoseconds
    ends: str  # SHA-256 of head and tail
    whole: str  # SHA-256

    @classmethod
    def of(cls, span: Span) -> Content:
        """Of a file, or of a clip in a shard, as it is now; OSError if it cannot be read."""
        return cls(span.size, span.mtime, _ends(span), _whole(span))

    def is_of(self, path: str | os.PathLike[str], *, full: bool = False) -> bool:
        """Whether ``path`` is still this; OSError if it cannot be read.

        Args:
            path: of a file, or an address (:mod:`skiparse.models.data.span`).
            full: compare all of it. If not, a file of this size and time is believed, and of
                another time, as after a copy, its ends are compared.
        """
        span = Span.of(path)
        if span.size != self.size:
            return False
        if full:
            return _whole(span) == self.whole
        return span.mtime == self.mtime or _ends(span) == self.ends


def _whole(span: Span) -> str:
    with span.open() as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _ends(span: Span) -> str:
    with span.open() as file:
        found = hashlib.sha256(file.read(_END))
        file.seek(max(span.size - _END, 0))
        found.update(file.read(_END))
    return found.hexdigest()
