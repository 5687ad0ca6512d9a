"""What a data set consists of: one row a clip, with its file, captions, size and length.

Read from the annotation files of Open-Sora Plan, or from a folder of clips with captions beside
them, and kept as columns that are mapped from disk: ten million rows cost no Python objects.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm import tqdm

from skiparse.models.data.atomic import replacing, seal, write_json
from skiparse.models.data.folder import walk
from skiparse.models.data.image import IMAGES, probe_image
from skiparse.models.data.limits import Limits
from skiparse.models.data.plain import MARK, encoding_of, printable, read_text
from skiparse.models.data.report import Dropped, Report
from skiparse.models.data.video import SCAN_BYTES, VideoError, check_name, probe
from skiparse.models.shards import sha256

if TYPE_CHECKING:
    from skiparse.models.data.buckets import Buckets

VIDEOS = frozenset(
    {
        *(".mp4", ".m4v", ".mp4v", ".mov", ".qt", ".3gp", ".mkv", ".webm", ".avi", ".divx"),
        *(".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".flv", ".wmv", ".asf", ".ogv"),
        *(".nut", ".ivf", ".y4m"),
    }
)
_CAPTION = ".txt"
_MOST_TEXT = 2**20  # bytes of a caption
FASTEST = 1000  # frames per second
_SPECIAL = re.compile(
    r"[A-Za-z][A-Za-z0-9+.-]*:"
)  # may look like a drive or a URL; here it is none
_DRIVE = re.compile(r"[A-Za-z]:\s")  # no drive of Windows, but a title

_FORMAT = 3  # of the index; another number makes a new one
_NUMBERS, _TEXTS, _ABOUT, _LOCK = "numbers.arrow", "texts.arrow", "about.json", "lock"
_ROWS = 2**16  # written at once
_MOST = 2**31 - 1  # of the numbers in the index
_TYPES = {
    "height": np.int32,
    "width": np.int32,
    "frames": np.int32,
    "fps": np.float64,
    "is_video": np.uint8,  # 2: its length is an estimate
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
    captions: tuple[str, ...]  # at least one, none empty; none in a manifest without captions
    height: int  # pixels of the upright picture; of the crop if there is one
    width: int
    frames: int  # from start on; 1 for an image
    fps: float  # 0 for an image
    start: int  # number of the first frame in the file
    crop: tuple[int, int, int, int] | None  # top, left, height, width in the upright picture
    is_video: bool
    exact: bool = True  # False: frames and fps are an estimate, to be counted when it is read


class Manifest:
    """The rows of a data set, as columns; make one with :meth:`open`.

    Attributes:
        height, width, frames: int32 ``[N]``, as in :class:`Record`.
        fps: float64 ``[N]``, frames per second of the file; 0 for an image.
        is_video: uint8 ``[N]``, 0 for an image; 2 for a video whose frames were not counted.
        roots: the folders that paths are in.
        dropped: how many records are no rows, by reason.
        examples: the first of them by name, for each reason.
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
        self.examples: dict[str, list[str]] = about.get("examples", {})
        self.fingerprint: str = about["fingerprint"]

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        index: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        captions: bool = True,
    ) -> Manifest:
        """Read a data set's annotations, or its index if that is still of the same files.

        Unlike in Open-Sora Plan, relative roots in ``data.txt`` are taken from its folder, a crop
        must lie inside the picture, and there are no pickled annotations.

        Args:
            source: one of

                - a text file with lines ``root,annotations``, such as ``data.txt``;
                - annotations, a ``.json`` array or ``.jsonl`` lines, of clips in the same folder.
                  Keys: ``path`` (or an address in a shard, see :mod:`skiparse.models.data.span`),
                  ``cap`` (text or a list), ``resolution`` (``height``, ``width``),
                  ``crop`` (``[x0, x1, y0, y1]``, or none), and for videos ``num_frames``, ``fps``
                  (24 if there is none), ``cut`` (``[first, end]`` in frames, or none);
                - a folder of clips and images, each with its caption in a ``.txt`` of its name.
                  What is in it but cannot be used costs itself only. Frames and rates are those
                  that can be seen (:func:`~skiparse.models.data.video.probe`); of files too large
                  to be read through they are estimates, which
                  :class:`~skiparse.models.data.dataset.Clips` replaces when it reads one.

            index: folder to keep the rows in, for large data sets and many processes; made anew
                if a file was added, removed or changed, by size and time, and if it is damaged
                itself, of which there is a warning. None: in memory.
            limits: as for reading; files that exceed them are left out of a folder.
            captions: whether there are any, without which a clip is no row; if not, none is
                looked for, and clips have none.

        Raises:
            DataError: naming the file, the line or record and the key that will not do, or if no
                row is left, with what there was; or if ``index`` cannot be written. Records without
                caption or resolution are counted in ``dropped`` instead, and so is what cannot be
                used of a folder; for files that cannot be opened there is a warning.
        """
        if not os.fspath(source):
            raise DataError("source is empty; give annotations or a folder of clips")
        found = _source(Path(source), limits or Limits(), captions)
        if index is None:
            numbers, texts = pa.BufferOutputStream(), pa.BufferOutputStream()
            about = _write(found, numbers, texts)
            return cls(
                pa.ipc.open_file(numbers.getvalue()).read_all(),
                pa.ipc.open_file(texts.getvalue()).read_all(),
                about,
            )
        index = Path(index)
        stamp = found.stamp()
        with _held(index):
            if not _is_current(index, stamp):
                for name in (_ABOUT, _NUMBERS, _TEXTS):
                    _make_way(index / name)
                (index / _ABOUT).unlink(missing_ok=True)
                with (
                    replacing(index / _NUMBERS) as numbers_file,
                    replacing(index / _TEXTS) as texts_file,
                    pa.OSFile(str(numbers_file), "wb") as numbers,
                    pa.OSFile(str(texts_file), "wb") as texts,
                ):
                    about = _write(found, numbers, texts)
                files = {name: sha256(index / name) for name in (_NUMBERS, _TEXTS)}
                about |= {"stamp": stamp, "files": files}
                write_json(index / _ABOUT, {**about, "seal": seal(about)})
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
            exact=self.is_video[row] < 2,
        )

    def report(self, buckets: Buckets | None = None) -> Report:
        """How many clips are used, by the manifest alone or by the rule of ``buckets`` as well."""
        dropped, examples, used = dict(self.dropped), dict(self.examples), len(self)
        if buckets is not None:
            used = int(buckets.counts.sum())
            dropped |= buckets.dropped
            examples |= {
                reason: [printable(self._texts["path"][row].as_py()) for row in rows]
                for reason, rows in buckets.examples.items()
            }
        more = {"estimated": int(np.count_nonzero(self.is_video == 2))}
        return Report(", ".join(map(str, self.roots)), used, dropped, examples, more)


def _column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].chunk(0).to_numpy(zero_copy_only=True)


def _is_current(index: Path, stamp: list[Any]) -> bool:
    """Whether an index is whole and has this stamp; if it is damaged, there is a warning."""
    try:
        about = _about_of(index / _ABOUT)
        if about is None or about["stamp"] != stamp:
            return False
        for name, digest in about["files"].items():
            _check_whole(index / name, digest)
    except _Damaged as error:
        warnings.warn(f"{error}: the index is damaged, and made anew", stacklevel=3)
        return False
    return True


class _Damaged(Exception):
    """A file of the index that is not as it was written, and how."""


def _about_of(path: Path) -> dict[str, Any] | None:
    """What there is to know of an index; None if there is none, or only one as they once were."""
    try:
        about = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _Damaged(f"{path} is no JSON ({error})") from error
    if not isinstance(about, dict):
        raise _Damaged(f"{path} is no table")
    written, stamp = about.pop("seal", None), about.get("stamp")
    if written is None and stamp is not None and stamp[:1] in ([1], [2]):  # which had none
        return None
    if written != seal(about):
        raise _Damaged(f"{path} is not as it was written")
    return about


def _check_whole(path: Path, digest: str) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise _Damaged(f"{path} cannot be read ({error.strerror})") from error
    if found != digest:
        raise _Damaged(f"{path} is not as it was written")


@contextmanager
def _held(index: Path) -> Iterator[None]:
    """Nobody else makes the index, or looks whether it is whole, meanwhile."""
    try:
        index.mkdir(parents=True, exist_ok=True)
        _make_way(index / _LOCK)
        lock = FileLock(index / _LOCK)
        lock.acquire()
    except OSError as error:
        raise DataError(
            f"index={index} cannot be written ({error.strerror or error}); it must be a folder "
            "that may be written to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _make_way(path: Path) -> None:
    """Move a folder aside that stands where a file is to be; it may hold anything."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.{secrets.token_hex(4)}.aside"))


# Writing the index.


@dataclass(frozen=True)
class _Source:
    """Where records come from: pairs of a root and an annotation file, or a folder (None)."""

    parts: tuple[tuple[Path, Path | None], ...]
    limits: Limits
    captions: bool  # whether clips must have them

    def files(self) -> Iterator[Path]:
        for root, listed in self.parts:
            if listed is not None:
                yield listed
            else:
                yield from _files(root, Dropped(), self.captions)

    def stamp(self) -> list[Any]:
        """What changes if any file does that the rows come from."""
        files = [[str(path), *_state(path)] for path in self.files()]
        made = [files, self.roots(), astuple(self.limits), SCAN_BYTES]
        seen = json.dumps(made if self.captions else [*made, "without captions"])
        return [_FORMAT, hashlib.sha256(seen.encode()).hexdigest()]

    def roots(self) -> list[str]:
        return [str(root) for root, _ in self.parts]

    def names(self) -> list[str]:
        """What was looked at: lists, and folders without one."""
        return [str(listed or root) for root, listed in self.parts]

    def rows(self, dropped: Dropped) -> Iterator[_Row]:
        """The rows; DataError for an annotation that makes no sense, with its place."""
        for number, (root, listed) in enumerate(self.parts):
            if listed is None:
                yield from _folder_rows(number, root, self, dropped)
                continue
            for where, record in _annotations(listed):
                row = _row(number, where, record, captions=self.captions)
                if isinstance(row, str):
                    dropped.add(row, where)
                else:
                    yield row

    def there(self) -> str:
        """The kinds of files that are in its folders, for whoever expected others."""
        roots = [root for root, listed in self.parts if listed is None]
        kinds = Counter(
            path.suffix.lower() or "no suffix" for root in roots for path in walk(root, Dropped())
        )
        listed = ", ".join(f"{count} {printable(kind)}" for kind, count in kinds.most_common(10))
        return f"; in it are files of {listed}" if listed else ""


def _state(path: Path) -> tuple[int, int]:
    """Size and time of a file, of a link that leads nowhere its own."""
    try:
        found = path.stat()
    except OSError:
        found = path.lstat()
    return found.st_size, found.st_mtime_ns


def _source(path: Path, limits: Limits, captions: bool) -> _Source:
    path = Path(os.path.abspath(path))
    if path.is_dir():
        return _Source(((path, None),), limits, captions)
    if not path.is_file():
        raise DataError(f"{path} does not exist; give annotations or a folder of clips")
    if path.suffix.lower() != ".txt":
        _check_annotations(path, str(path))
        return _Source(((path.parent, path),), limits, captions)
    parts = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        root, comma, annotations = line.rpartition(",")
        if not comma:
            raise DataError(f"{where}: expected `root,annotations`, got {line!r}")
        pair = path.parent / root.strip(), path.parent / annotations.strip()
        if not os.path.isdir(pair[0]):  # which takes any name
            raise DataError(f"{where}: the root {pair[0]} is no folder; correct the line")
        _check_annotations(pair[1], where)
        parts.append(pair)
    if not parts:
        raise DataError(f"{path} is empty; it needs lines `root,annotations`")
    return _Source(tuple(parts), limits, captions)


def _check_annotations(path: Path, where: str) -> None:
    if path.suffix.lower() in {".pkl", ".pickle"}:
        raise DataError(
            f"{where}: {path} is a pickle, which may run code when it is read; if you trust it, "
            "convert it to .jsonl, one record a line"
        )
    if path.suffix.lower() not in {".json", ".jsonl"}:
        raise DataError(f"{where}: annotations must be .json or .jsonl, got {path}")
    if not os.path.isfile(path):
        raise DataError(f"{where}: {path} does not exist; correct the name")


def _text(path: Path) -> str:
    with _readable(path):
        return read_text(path)


def _annotations(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        with _readable(path):
            items = _json(path.read_bytes(), str(path))
        if not isinstance(items, list):
            raise DataError(f"{path} must hold an array of records, got {type(items).__name__}")
        yield from ((f"{path}[{number}]", item) for number, item in enumerate(items))
        return
    with _readable(path), path.open("rb") as file:
        encoding = encoding_of(file.read(4))
        file.seek(0)
        # JSON knows the encoding of a line, but where lines end is known for UTF-8 alone.
        plain = encoding.startswith("utf-8")
        lines: Iterable[str | bytes] = file if plain else io.TextIOWrapper(file, encoding)
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json(line, where)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """DataError, with the line, where a file is no text, and where it cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        where = f"{path}:{_line_without_text(path)}"
        raise DataError(f"{where} is not {error.encoding}: {error.reason}; convert it") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _line_without_text(path: Path) -> int:
    """The first line that is none in the encoding of its file, or has NUL in it."""
    data = path.read_bytes()
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        return data[: error.start].decode(encoding, "ignore").count("\n") + 1
    return text.partition("\0")[0].count("\n") + 1


def _json(data: str | bytes, where: str) -> Any:
    try:
        return json.loads(data, object_pairs_hook=_once)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: no JSON: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no key is there twice: the last one would win, without a word."""
    table = dict(pairs)
    if len(table) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is there twice in one object; leave one")
    return table


def _files(folder: Path, dropped: Dropped, captions: bool) -> list[Path]:
    """Clips, images and captions in a folder and below.

    What has a caption, where there are any, but is of another kind is dropped, and named.
    """
    every = sorted(walk(folder, dropped))
    captioned = {path.with_suffix("") for path in every if path.suffix.lower() == _CAPTION}
    others = {path.with_suffix("") for path in every if path.suffix.lower() != _CAPTION}
    found = []
    for path in every:
        kind, stem = path.suffix.lower(), path.with_suffix("")
        if kind in VIDEOS | IMAGES or (kind == _CAPTION and (captions or stem in others)):
            found.append(path)
        elif not captions or stem in captioned:
            dropped.add(f"of a kind that is not read ({printable(kind)})", str(path))
    return found


def _folder_rows(number: int, folder: Path, source: _Source, dropped: Dropped) -> Iterator[_Row]:
    """A row for each clip, from what there is to see in it."""
    files = _files(folder, dropped, source.captions)
    clips = [path for path in files if path.suffix.lower() != _CAPTION]
    unreadable = []
    with ThreadPoolExecutor() as pool:
        looked = pool.map(lambda path: _look(folder, path, source), clips)
        bar = tqdm(looked, "looking at clips", len(clips), unit="file", leave=False)
        for path, found in zip(clips, bar, strict=True):
            if isinstance(found, tuple):
                reason, why = found
                dropped.add(reason, f"{path}: {why}" if why else str(path))
                if reason == _UNREADABLE:
                    unreadable.append(printable(why))
                continue
            row: _Row | str
            try:
                exact = found.pop("exact", True)
                row = _row(number, str(path), found, exact=exact, captions=source.captions)
            except DataError as error:
                dropped.add("a name that cannot be used", str(error))
                continue
            if isinstance(row, str):
                dropped.add(row, str(path))
            else:
                yield row
    if unreadable:
        warnings.warn(
            f"{len(unreadable)} of {len(clips)} clips in {printable(str(folder))} cannot be opened "
            f"and are left out: {'; '.join(unreadable[:3])}",
            stacklevel=2,
        )


_UNREADABLE = "cannot be opened"


def _look(folder: Path, path: Path, source: _Source) -> dict[str, Any] | tuple[str, str]:
    """The record of a file, or why it will not do and more about it."""
    captions, caption, limits = path.with_suffix(_CAPTION), None, source.limits
    try:
        if source.captions:
            _check_caption(captions)
            caption = read_text(captions)
    except FileNotFoundError:
        return f"no caption in a {_CAPTION} of its name", ""
    except (OSError, UnicodeDecodeError) as error:
        return "a caption that cannot be read", f"{captions.name}: {error}"
    name = path.relative_to(folder).as_posix()
    if _SPECIAL.match(name):
        name = f"./{name}"
    try:
        if path.suffix.lower() in IMAGES:
            height, width = probe_image(name, root=folder, limits=limits)
            resolution = {"height": height, "width": width}
            return {"path": name, "cap": caption, "resolution": resolution}
        info = probe(name, root=folder, limits=limits)
        held = limits.why_held(info.hold)
        if held:
            raise VideoError(f"{name!r}: {held}")
    except VideoError as error:
        return _UNREADABLE, str(error)
    if not info.frames or not info.fps:
        return _UNREADABLE, f"{name!r}: does not say how many frames it has, or how many a second"
    if not info.fps <= FASTEST:
        return _UNREADABLE, f"{name!r}: {float(info.fps):.0f} frames a second are too many"
    height, width = info.upright()
    return {
        "path": name,
        "cap": caption,
        "resolution": {"height": height, "width": width},
        "num_frames": info.frames,
        "fps": float(info.fps),
        "exact": info.exact,
    }


def _check_caption(path: Path) -> None:
    """OSError for what would never end, such as a pipe, or would fill the memory."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no plain file")
    if found.st_size > _MOST_TEXT:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, more than {_MOST_TEXT}")


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


def _row(root: int, where: str, record: Any, *, exact: bool = True, captions: bool) -> _Row | str:
    """The row of a record, or why there is none; DataError if the record makes no sense.

    ``exact`` is whether frames and rate are more than an estimate, ``captions`` whether it must
    have one.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a record, got {type(record).__name__}")
    path = _path(record, where)
    texts = _captions(record.get("cap"), where) if captions else []
    if captions and not texts:
        return "no caption"
    if record.get("resolution") is None:
        return "no resolution"
    height, width, top, left = _picture(record, where)
    row = _Row(root, path, texts, height, width, top=top, left=left)
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in IMAGES:
        return row
    if suffix in VIDEOS:
        start, frames = _part(record, where)
        kind = 1 if exact else 2
        return replace(row, is_video=kind, frames=frames, fps=_fps(record, where), start=start)
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
    if leads_out(path):
        raise DataError(f"{where}: path {path!r} leads out of its root; it must lie inside")
    return path


def leads_out(path: str) -> bool:
    """Whether a name may lead out of the folder, or the shard, that it is in."""
    parsed = PureWindowsPath(path)  # which knows both kinds of slashes
    return bool(parsed.anchor and not _DRIVE.match(path)) or ".." in parsed.parts


def _captions(value: Any, where: str) -> list[str]:
    """Those that are not empty."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    for text in texts:
        _check_text(text, "cap", where)
    plain = (text.strip().strip(MARK).strip() for text in texts)
    return [text for text in plain if text]


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
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= FASTEST:
        raise DataError(f"{where}: fps must be above 0 and at most {FASTEST}, got {fps!r}")
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


def _write(source: _Source, numbers: Any, texts: Any) -> dict[str, Any]:
    """Write the rows of ``source`` as two Arrow files; returns what else is to be known of them.

    The numbers are one batch, so that a column is one piece of the file; the texts are many, so
    that they need not be in memory together.
    """
    dropped = Dropped()
    digest = hashlib.sha256(json.dumps([root.name for root, _ in source.parts]).encode())
    done = []
    rows = source.rows(dropped)
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
        found = ", ".join(f"{count} {reason}" for reason, count in dropped.counts.items())
        raise DataError(
            f"no clip in {printable(', '.join(source.names()))}: "
            f"{found or 'no records' + source.there()}"
        )
    table = pa.table({name: np.concatenate([part[name] for part in done]) for name in _TYPES})
    with pa.ipc.new_file(numbers, table.schema) as writer:
        writer.write_table(table)
    return {
        "roots": source.roots(),
        "dropped": dict(dropped.counts),
        "examples": dropped.examples,
        "fingerprint": digest.hexdigest(),
    }
