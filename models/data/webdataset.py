"""What is in a WebDataset shard: a sample for every key, with the addresses of its files.

img2dataset and video2dataset write such shards: a tar with ``000000012.jpg`` or ``.mp4``, its
caption in ``000000012.txt`` and what is known of it in ``000000012.json``, one behind the other.
Only headers, captions and metadata are read. <https://github.com/webdataset/webdataset>
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from skiparse.models.data.image import IMAGES
from skiparse.models.data.manifest import VIDEOS, DataError, leads_out
from skiparse.models.data.report import Dropped
from skiparse.models.data.span import address

_END = 2 * tarfile.BLOCKSIZE  # zeros, with which a tar ends
_MOST_TEXT = 2**20  # bytes of a caption, or of metadata


@dataclass
class Sample:
    """The files of one key.

    Attributes:
        key: the name before its first point, with its folder.
        media: name, offset and size of each video or image.
        caption: of its ``.txt``; None if there is none.
        about: of its ``.json``.
    """

    key: str
    media: list[tuple[str, int, int]] = field(default_factory=list)
    caption: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def address(self, shard: str) -> str:
        """Of its one clip, in a shard of this name."""
        ((name, offset, size),) = self.media
        return address(shard, offset, size, name)


def why_damaged(path: Path) -> str | None:
    """What is wrong with a shard by its first and last bytes, or None; reads two blocks of it."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _END:
                return f"has {size} bytes, fewer than an empty tar"
            head = file.read(tarfile.BLOCKSIZE)
            file.seek(size - _END)
            tail = file.read(_END)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if any(head) and head[257:262] != b"ustar":
        return "is no plain tar; unpack it if it is compressed (gunzip)"
    if any(tail):
        return f"is cut off after {size} bytes: a tar ends with {_END} zeros; download it again"
    return None


def samples(path: Path, dropped: Dropped) -> Iterator[Sample]:
    """The samples of a shard with one clip or image each, in its order.

    Members of one key stand together, as writers of shards put them. What cannot be used is
    dropped.

    Raises:
        DataError: if the shard is damaged.
    """
    current: Sample | None = None
    for name, offset, size, text in _members(path, dropped):
        key, suffix = _split(name)
        if current is None or key != current.key:
            if current is not None and _whole(current, path, dropped):
                yield current
            current = Sample(key)
        if text is None:
            current.media.append((name, offset, size))
        elif suffix == ".txt":
            current.caption = text
        else:
            current.about = _table(text, f"{path}: {name}", dropped)
    if current is not None and _whole(current, path, dropped):
        yield current


def _split(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, _, _ = last.partition(".")
    return f"{folder}{slash}{stem}", PurePosixPath(last).suffix.lower()


def _whole(sample: Sample, path: Path, dropped: Dropped) -> bool:
    if len(sample.media) == 1:
        return True
    reason = "several clips of one key" if sample.media else "a key without a clip"
    dropped.add(reason, f"{path}: {sample.key}")
    return False


def _members(path: Path, dropped: Dropped) -> Iterator[tuple[str, int, int, str | None]]:
    """Name, offset and size of every file, and what stands in it if it is text."""
    try:
        with tarfile.open(path, "r:") as archive, path.open("rb") as file:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # or it would keep them all
                if member.isdir():
                    continue
                name = member.name.removeprefix("./")
                where = f"{path}: {name}"
                suffix = PurePosixPath(name).suffix.lower()
                if suffix not in VIDEOS | IMAGES | {".txt", ".json"}:
                    continue
                if not member.isreg() or member.issparse():
                    dropped.add("a member that is no plain file", where)
                elif leads_out(name) or "\0" in name:
                    dropped.add("a name that leads out of its shard", where)
                elif suffix in VIDEOS | IMAGES:
                    yield name, member.offset_data, member.size, None
                elif member.size > _MOST_TEXT:
                    dropped.add("a text that is too long", where)
                else:
                    file.seek(member.offset_data)
                    try:
                        text = file.read(member.size).decode()
                    except UnicodeDecodeError:
                        dropped.add("a text that cannot be read", where)
                        continue
                    yield name, member.offset_data, member.size, text
            file.seek(archive.offset)  # where tarfile has found no header, and said nothing
            if file.read(_END) != bytes(_END):
                raise DataError(
                    f"{path} is damaged: no header and no end at byte {archive.offset}; download "
                    "it again"
                )
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} is damaged ({error}); download it again") from error


def _table(text: str, where: str, dropped: Dropped) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    dropped.add("metadata that cannot be read", where)
    return {}
