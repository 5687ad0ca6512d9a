"""What a data set consists of: one row a clip, with its file, captions, size and length.

Read from the annotation files of Open-Sora Plan, or from a folder of clips with captions beside
them, and kept as columns that are mapped from disk: ten million rows cost no Python objects.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from skiparse.models.data.atomic import replacing, write_json
from skiparse.models.data.image import IMAGES, probe_image
from skiparse.models.data.video import VideoError, check_name, count_frames, probe

VIDEOS = frozenset({".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi"})
_UNCOUNTED = frozenset({".mkv", ".webm"})  # they only say how long picture and sound are together

_FORMAT = 1  # of the index; another number makes a new one
_NUMBERS, _TEXTS, _ABOUT = "numbers.arrow", "texts.arrow", "about.json"
_ROWS = 2**16  # written at once
_MOST = 2**31 - 1  # of the numbers in the index
_TYPES = {
    "height": np.int32,
    "width": np.int32,
    "frames": np.int32,
    "fps": np.float64,
    "is_video": np.uint8,
    "start": np.int32,
    "top": np.int32,
    "left": np.int32,
    "root": np.int32,
}
_TEXT = pa.schema([("path", pa.string()), ("captions", pa.list_(pa.string()))])


class DataError(ValueError):
    """Data that cannot be trained on: where it is, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Record:
    """One row: a clip, or an image as a clip of one frame."""

    root: Path
    path: str  # inside root
    captions: tuple[str, ...]  # at least one, none empty
    height: int  # pixels of the upright picture; of the crop if there is one
    width: int
    frames: int  # from start on; 1 for an image
    fps: float  # 0 for an image
    start: int  # number of the first frame in the file
    crop: tuple[int, int, int, int] | None  # top, left, height, width in the upright picture
    is_video: bool


class Manifest:
    """The rows of a data set, as columns; make one with :meth:`open`.

    Attributes:
        height, width, frames: int32 ``[N]``, as in :class:`Record`.
        fps: float64 ``[N]``, frames per second of the file; 0 for an image.
        is_video: uint8 ``[N]``, 0 for an image.
        roots: the folders that paths are in.
        dropped: how many records are no rows, by reason.
        fingerprint: SHA-256 of all rows with the names of their roots, not of the clips themselves.
    """

    height: np.ndarray
    width: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    is_video: np.ndarray

    def __init__(
        self, numbers: pa.Table, texts: pa.Table, about: dict[str, Any], index: Path | None = None
    ) -> None:
        self._numbers, self._texts, self._about, self._index = numbers, texts, about, index
        for name in ("height", "width", "frames", "fps", "is_video"):
            setattr(self, name, _column(numbers, name))
        self._rest = {name: _column(numbers, name) for name in ("start", "top", "left", "root")}
        self.roots = tuple(Path(root) for root in about["roots"])
        self.dropped: dict[str, int] = about["dropped"]
        self.fingerprint: str = about["fingerprint"]

    @classmethod
    def open(
        cls, source: str | os.PathLike[str], *, index: str | os.PathLike[str] | None = None
    ) -> Manifest:
        """Read a data set's annotations, or its index if that is still of the same files.

        Unlike in Open-Sora Plan, relative roots in ``data.txt`` are taken from its folder, a crop
        must lie inside the picture, and there are no pickled annotations.

        Args:
            source: one of

                - a text file with lines ``root,annotations``, such as ``data.txt``;
                - annotations, a ``.json`` array or ``.jsonl`` lines, of clips in the same folder.
                  Keys: ``path``, ``cap`` (text or a list), ``resolution`` (``height``, ``width``),
                  ``crop`` (``[x0, x1, y0, y1]``, or none), and for videos ``num_frames``, ``fps``
                  (24 if there is none), ``cut`` (``[first, end]`` in frames, or none);
                - a folder of clips and images, each with its caption in a ``.txt`` of its name.

            index: folder to keep the rows in, for large data sets and many processes; made anew
                if a file was added, removed or changed, by size and time. None: in memory.

        Raises:
            DataError: naming the file, the record and the key that will not do, or if no row is
                left. Records without caption or resolution are counted in ``dropped`` instead,
                and so are clips of a folder that cannot be opened, with a warning.
        """
        found = _source(Path(source))
        if index is None:
            numbers, texts = pa.BufferOutputStream(), pa.BufferOutputStream()
            about = _write(found, numbers, texts)
            return cls(
                pa.ipc.open_file(numbers.getvalue()).read_all(),
                pa.ipc.open_file(texts.getvalue()).read_all(),
                about,
            )
        index = Path(index)
        index.mkdir(parents=True, exist_ok=True)
        stamp = found.stamp()
        with FileLock(index / "lock"):
            if not _is_current(index / _ABOUT, stamp):
                (index / _ABOUT).unlink(missing_ok=True)
                with (
                    replacing(index / _NUMBERS) as numbers_file,
                    replacing(index / _TEXTS) as texts_file,
                    pa.OSFile(str(numbers_file), "wb") as numbers,
                    pa.OSFile(str(texts_file), "wb") as texts,
                ):
                    about = _write(found, numbers, texts)
                write_json(index / _ABOUT, {**about, "stamp": stamp})
            return cls._of_index(index)

    @classmethod
    def _of_index(cls, index: Path) -> Manifest:
        numbers, texts = (
            pa.ipc.open_file(pa.memory_map(str(index / name))).read_all()
            for name in (_NUMBERS, _TEXTS)
        )
        return cls(numbers, texts, json.loads((index / _ABOUT).read_bytes()), index)

    def __reduce__(self) -> tuple[Any, ...]:
        """To a process that is started anew goes the name of the index, not the rows."""
        if self._index is not None:
            return Manifest._of_index, (self._index,)
        return Manifest, (self._numbers, self._texts, self._about)

    def __len__(self) -> int:
        return len(self.height)

    def record(self, row: int) -> Record:
        """Row ``row``, from 0; IndexError if there is none."""
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a manifest of {len(self)} rows")
        start, top, left, root = (int(column[row]) for column in self._rest.values())
        height, width = int(self.height[row]), int(self.width[row])
        return Record(
            root=self.roots[root],
            path=self._texts["path"][row].as_py(),
            captions=tuple(self._texts["captions"][row].as_py()),
            height=height,
            width=width,
            frames=int(self.frames[row]),
            fps=float(self.fps[row]),
            start=start,
            crop=None if top < 0 else (top, left, height, width),
            is_video=bool(self.is_video[row]),
        )


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].chunk(0).to_numpy(zero_copy_only=True)


def _is_current(about: Path, stamp: list[Any]) -> bool:
    return about.is_file() and json.loads(about.read_bytes()).get("stamp") == stamp


# Writing the index.


@dataclass(frozen=True)
class _Source:
    """Where records come from: pairs of a root and an annotation file, or a folder (None)."""

    parts: tuple[tuple[Path, Path | None], ...]

    def files(self) -> Iterator[Path]:
        for root, listed in self.parts:
            if listed is not None:
                yield listed
            else:
                yield from _files(root)

    def stamp(self) -> list[Any]:
        """What changes if any file does that the rows come from."""
        seen = [(path, path.stat()) for path in self.files()]
        files = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in seen]
        digest = hashlib.sha256(json.dumps([files, self.roots()]).encode()).hexdigest()
        return [_FORMAT, digest]

    def roots(self) -> list[str]:
        return [str(root) for root, _ in self.parts]

    def records(self, dropped: Counter[str]) -> Iterator[tuple[int, str, Any]]:
        """Number of the root, where the record stands, and the record, not yet checked."""
        for number, (root, listed) in enumerate(self.parts):
            if listed is None:
                found: Iterable[tuple[str, Any]] = _folder_records(root, dropped)
            else:
                found = _annotations(listed)
            for where, record in found:
                yield number, where, record


def _source(path: Path) -> _Source:
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return _Source(((path, None),))
    if not path.is_file():
        raise DataError(f"{path} does not exist; give annotations or a folder of clips")
    if path.suffix != ".txt":
        _check_annotations(path, str(path))
        return _Source(((path.parent, path),))
    parts = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        root, comma, annotations = line.rpartition(",")
        if not comma:
            raise DataError(f"{where}: expected `root,annotations`, got {line!r}")
        pair = path.parent / root.strip(), path.parent / annotations.strip()
        if not pair[0].is_dir():
            raise DataError(f"{where}: the root {pair[0]} is no folder; correct the line")
        _check_annotations(pair[1], where)
        parts.append(pair)
    if not parts:
        raise DataError(f"{path} is empty; it needs lines `root,annotations`")
    return _Source(tuple(parts))


def _check_annotations(path: Path, where: str) -> None:
    if path.suffix in {".pkl", ".pickle"}:
        raise DataError(
            f"{where}: {path} is a pickle, which may run code when it is read; if you trust it, "
            "convert it to .jsonl, one record a line"
        )
    if path.suffix not in {".json", ".jsonl"}:
        raise DataError(f"{where}: annotations must be .json or .jsonl, got {path}")
    if not path.is_file():
        raise DataError(f"{where}: {path} does not exist; correct the name")


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}; convert it") from error


def _annotations(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".json":
        items = _json(path.read_bytes(), str(path))
        if not isinstance(items, list):
            raise DataError(f"{path} must hold an array of records, got {type(items).__name__}")
        yield from ((f"{path}[{number}]", item) for number, item in enumerate(items))
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json(line, where)


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON: {error}") from error


def _files(folder: Path) -> list[Path]:
    """Clips, images and captions in a folder and below, hidden ones left out."""
    kinds = VIDEOS | IMAGES | {".txt"}
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in kinds
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _folder_records(folder: Path, dropped: Counter[str]) -> Iterator[tuple[str, Any]]:
    """A record for each clip, as in annotations, from what its container says."""
    clips = [path for path in _files(folder) if path.suffix.lower() != ".txt"]
    without = [str(path) for path in clips if not path.with_suffix(".txt").is_file()]
    if without:
        raise DataError(
            f"{len(without)} of {len(clips)} clips have no caption in a .txt of their name, such "
            f"as {', '.join(without[:3])}; write them, or move the clips"
        )
    unreadable = []
    with ThreadPoolExecutor() as pool:
        looked = pool.map(lambda path: _look(folder, path), clips)
        bar = tqdm(looked, "looking at clips", len(clips), unit="file", leave=False)
        for path, found in zip(clips, bar, strict=True):
            if isinstance(found, str):
                unreadable.append(found)
            else:
                yield str(path), {**found, "cap": _text(path.with_suffix(".txt"))}
    if unreadable:
        dropped["cannot be opened"] = len(unreadable)
        warnings.warn(
            f"{len(unreadable)} of {len(clips)} clips in {folder} cannot be opened and are left "
            f"out: {'; '.join(unreadable[:3])}",
            stacklevel=2,
        )


def _look(folder: Path, path: Path) -> dict[str, Any] | str:
    """The record of a file without its caption, or why it will not do."""
    name = path.relative_to(folder).as_posix()
    try:
        if path.suffix.lower() in IMAGES:
            height, width = probe_image(name, root=folder)
            return {"path": name, "resolution": {"height": height, "width": width}}
        info = probe(name, root=folder)
        counted = path.suffix.lower() not in _UNCOUNTED
        frames = info.frames if counted else count_frames(name, root=folder)
    except VideoError as error:
        return str(error)
    if not frames or not info.fps:
        return f"{name!r}: does not say how many frames it has, or how many a second"
    height, width = info.upright()
    return {
        "path": name,
        "resolution": {"height": height, "width": width},
        "num_frames": frames,
        "fps": float(info.fps),
    }


@dataclass(frozen=True)
class _Row:
    """As :class:`Record`; no crop is -1."""

    root: int
    path: str
    captions: list[str]
    height: int
    width: int
    frames: int = 1
    fps: float = 0.0
    is_video: int = 0
    start: int = 0
    top: int = -1
    left: int = -1


def _row(root: int, where: str, record: Any) -> _Row | str:
    """The row of a record, or why there is none; DataError if the record makes no sense."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a record, got {type(record).__name__}")
    path = _path(record, where)
    captions = _captions(record.get("cap"), where)
    if not captions:
        return "no caption"
    if record.get("resolution") is None:
        return "no resolution"
    height, width, top, left = _picture(record, where)
    row = _Row(root, path, captions, height, width, top=top, left=left)
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in IMAGES:
        return row
    if suffix in VIDEOS:
        start, frames = _part(record, where)
        return replace(row, is_video=1, frames=frames, fps=_fps(record, where), start=start)
    raise DataError(
        f"{where}: {path!r} is neither a video ({', '.join(sorted(VIDEOS))}) nor an image "
        f"({', '.join(sorted(IMAGES))}); convert it, or remove the record"
    )


def _path(record: dict[str, Any], where: str) -> str:
    """The path of a record, refused unless it is a plain one that stays in its root."""
    path = record.get("path")
    if not path:
        raise DataError(f"{where}: path must be the name of a file, got {path!r}")
    _check_text(path, "path", where)
    try:
        check_name(path)
    except VideoError as error:
        raise DataError(f"{where}: path {path!r}: {error}") from error
    parsed = PureWindowsPath(path)  # which knows both kinds of slashes
    if parsed.anchor or ".." in parsed.parts:
        raise DataError(f"{where}: path {path!r} leads out of its root; it must lie inside")
    return path


def _captions(value: Any, where: str) -> list[str]:
    """Those that are not empty."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    for text in texts:
        _check_text(text, "cap", where)
    return [text.strip() for text in texts if text.strip()]


def _picture(record: dict[str, Any], where: str) -> tuple[int, int, int, int]:
    """Height, width, top and left of the part of the picture to use; -1 where that is all."""
    size = record["resolution"]
    if not isinstance(size, dict):
        raise DataError(f"{where}: resolution must hold height and width, got {size!r}")
    height = _whole(size.get("height"), "resolution.height", where, 1)
    width = _whole(size.get("width"), "resolution.width", where, 1)
    if record.get("crop") is None:
        return height, width, -1, -1
    left, right, top, bottom = _numbers(record["crop"], "crop", 4, where)
    if not (left < right <= width and top < bottom <= height):
        raise DataError(
            f"{where}: crop must be [x0, x1, y0, y1] inside {width}x{height} pixels, got "
            f"{record['crop']}"
        )
    return bottom - top, right - left, top, left


def _part(record: dict[str, Any], where: str) -> tuple[int, int]:
    """The first frame to use, and how many there are."""
    frames = _whole(record.get("num_frames"), "num_frames", where, 1)
    if record.get("cut") is None:
        return 0, frames
    start, end = _numbers(record["cut"], "cut", 2, where)
    if start >= end:
        raise DataError(f"{where}: cut must be [first, end] with first < end, got {[start, end]}")
    return start, min(frames, end - start)


def _fps(record: dict[str, Any], where: str) -> float:
    fps = 24 if record.get("fps") is None else record["fps"]
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise DataError(f"{where}: fps must be above 0 and at most 1000, got {fps!r}")
    return float(fps)


def _numbers(value: Any, name: str, length: int, where: str) -> list[int]:
    if not isinstance(value, list) or len(value) != length:
        raise DataError(f"{where}: {name} must be a list of {length} numbers, got {value!r}")
    return [_whole(item, name, where, 0) for item in value]


def _whole(value: Any, name: str, where: str, least: int) -> int:
    """A whole number from ``least`` on, which JSON may spell with a point."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(whole) is not int or not least <= whole <= _MOST:
        raise DataError(
            f"{where}: {name} must be a whole number from {least} to {_MOST}, got {value!r}"
        )
    return whole


def _check_text(value: Any, name: str, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {name} is no Unicode text, {value!r}; correct it") from error


def _rows(source: _Source, dropped: Counter[str]) -> Iterator[_Row]:
    for root, where, record in source.records(dropped):
        row = _row(root, where, record)
        if isinstance(row, str):
            dropped[row] += 1
        else:
            yield row


def _write(source: _Source, numbers: Any, texts: Any) -> dict[str, Any]:
    """Write the rows of ``source`` as two Arrow files; returns what else is to be known of them.

    The numbers are one batch, so that a column is one piece of the file; the texts are many, so
    that they need not be in memory together.
    """
    dropped: Counter[str] = Counter()
    digest = hashlib.sha256(json.dumps([root.name for root, _ in source.parts]).encode())
    done = []
    rows = _rows(source, dropped)
    with pa.ipc.new_file(texts, _TEXT) as writer:
        while part := list(itertools.islice(rows, _ROWS)):
            columns = {
                name: np.array([getattr(row, name) for row in part], dtype)
                for name, dtype in _TYPES.items()
            }
            paths, captions = [row.path for row in part], [row.captions for row in part]
            writer.write_batch(pa.record_batch([pa.array(paths), pa.array(captions)], schema=_TEXT))
            for column in columns.values():
                digest.update(column.tobytes())
            digest.update(json.dumps([paths, captions]).encode())
            done.append(columns)
    if not done:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise DataError(f"no clip in {', '.join(source.roots())}: {reasons or 'no records'}")
    table = pa.table({name: np.concatenate([part[name] for part in done]) for name in _TYPES})
    with pa.ipc.new_file(numbers, table.schema) as writer:
        writer.write_table(table)
    return {"roots": source.roots(), "dropped": dict(dropped), "fingerprint": digest.hexdigest()}
