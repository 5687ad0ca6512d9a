"""How text that people wrote is read: by the mark that its encoding leaves, and without it."""

from __future__ import annotations

import codecs
import os
from pathlib import Path

MARK = "\ufeff"  # U+FEFF, the byte order mark, which editors put in front

_ENCODINGS = (  # the longer mark first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a mark; marks at lines' ends go.

    Line ends stay as they are. A mark may stand in front of a later line, where files were joined.

    Raises:
        UnicodeDecodeError: if it is none of these, or holds NUL, as UTF-16 without a mark does.
        OSError: if it cannot be read.
    """
    data = Path(path).read_bytes()
    encoding = encoding_of(data)
    text = data.decode(encoding)
    if "\0" in text:
        raise UnicodeDecodeError(encoding, data, 0, len(data), "NUL in it; is it UTF-16?")
    return "".join(unmarked(line) for line in text.splitlines(keepends=True))


def encoding_of(head: bytes) -> str:
    """The encoding of text that begins with these bytes, at least four if there are so many."""
    return next((name for mark, name in _ENCODINGS if head.startswith(mark)), "utf-8")


def unmarked(text: str) -> str:
    """``text`` without the marks around it."""
    return text.strip(MARK)


def printable(name: str) -> str:
    """A file name as it can be printed and written anywhere, whatever bytes it has."""
    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
