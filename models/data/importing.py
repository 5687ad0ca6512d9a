"""How public data sets, as people have them on disk, become annotations that a manifest is made of.

First every file is looked at, where it is: in a shard, by its offset, or in a folder. Then rows are
made, of shards by themselves or of a list whose rows find their files, and what comes twice goes.
Both are kept in parts, so that a run that was stopped goes on. Nothing is unpacked. In memory are a
part for each process, the names in a folder, and 16 bytes of each row, its hash.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from skiparse.models.data import lookup
from skiparse.models.data.atomic import check_writable, replacing
from skiparse.models.data.folder import walk
from skiparse.models.data.image import IMAGES, probe_image
from skiparse.models.data.limits import Limits
from skiparse.models.data.lists import (
    KINDS,
    TXT,
    Columns,
    Piece,
    check_columns,
    fields_of,
    filled,
    listed,
    lists,
    pieces,
    rows,
    seconds,
)
from skiparse.models.data.manifest import FASTEST, VIDEOS, DataError, leads_out
from skiparse.models.data.plain import MARK, printable
from skiparse.models.data.report import NAMED, Dropped, Report
from skiparse.models.data.video import VideoError, plain_file, probe
from skiparse.models.data.webdataset import samples, why_damaged

ANNOTATIONS, SOURCE, SCAN, PARTS, LOCK = "clips.jsonl", "data.txt", "import.json", "parts", "lock"

_FORMAT = 1  # of the parts; another number makes new ones
_FILES = 4096  # of a folder, looked at for one part; so many on average, four times as many at most
_AHEAD = 2  # parts for each process that wait for it
_ROWS = 2**14  # written at once
_INDEX = pa.schema(
    [
        pa.field("path", pa.string()),  # of the file, or the address of it in its shard
        pa.field("key", pa.string()),  # by which a list finds it, if not by its address
        pa.field("url", pa.string()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        pa.field("frames", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("hash", pa.string()),
    ]
)
_LINES = pa.schema(
    [
        pa.field("line", pa.string()),  # of the annotations
        pa.field("high", pa.uint64()),  # of the hash; both 0 where there is none
        pa.field("low", pa.uint64()),
    ]
)
_Check = Literal["files", "listed"]
_Duplicates = Literal["listed", "content", "keep"]


@dataclass(frozen=True)
class _Look:
    """How files are looked at."""

    root: Path
    columns: Columns  # of the metadata in shards
    check: _Check
    duplicates: _Duplicates
    limits: Limits
    skip_damaged: bool

    def told(self) -> list[Any]:
        """What changes if it does."""
        where = [str(self.root), self.check, self.duplicates, self.skip_damaged]
        return [_FORMAT, *where, astuple(self.columns), astuple(self.limits)]


def bring(
    kind: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    files: str | os.PathLike[str] | None = None,
    name: str | None = None,
    columns: Sequence[str] = (),
    check: _Check = "files",
    duplicates: _Duplicates = "listed",
    min_side: int = 1,
    skip_damaged: bool = False,
    workers: int = 0,
    limits: Limits | None = None,
) -> Report:
    """Write annotations of a data set to ``out``; if that was stopped before, go on.

    ``out`` gets ``clips.jsonl``, a ``data.txt`` that leads to it and to the files, which is a
    source of :meth:`Manifest.open <skiparse.models.data.manifest.Manifest.open>`, the counts in
    ``import.json``, and ``parts``, from which the next import takes what has not changed.

    Args:
        kind: ``webdataset`` for shards alone, or whose list it is: ``recap``, ``coyo``, ``laion``,
            ``panda``.
        source: of ``webdataset`` a shard or a folder of them; else a list in parquet, CSV or JSON
            lines, or a folder of them.
        out: a folder.
        files: where the files of a list are: a folder of shards, or of files.
        name: how a list names its files, such as ``{videoID}.mp4``; in shards, their keys. None:
            they are found in shards by the addresses that their metadata have as ``url``.
        columns: what is called otherwise than in :data:`~skiparse.models.data.lists.KINDS`, as
            ``role=column``; captions may be given several times.
        check: "files" opens each file for its size, frames and rate; "listed" believes the
            metadata of shards, which have that for images only.
        duplicates: "listed" leaves out what has the hash of another row, by the list or else by
            the metadata of shards, "content" what has the same bytes, "keep" nothing. Of a video
            with cuts, the same cut of it. Rows without a hash are counted, and stay.
        min_side: pixels that the shorter side must have.
        skip_damaged: whether shards that are cut off are left out, and counted.
        workers: processes that look at files; 0 looks in this one.
        limits: as for reading.

    Raises:
        DataError: before any work, for shards that are cut off, columns that a list does not have,
            and settings that do not go together; if no clip is left, with what there was.
    """
    if kind not in KINDS:
        raise DataError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if min_side < 1 or workers < 0:
        raise DataError(f"min_side must be from 1 and workers from 0, got {min_side}, {workers}")
    source, out = Path(os.path.abspath(source)), Path(out)
    if not source.exists():
        raise DataError(f"{source} does not exist; give shards or a list")
    found = KINDS[kind].mapped(columns)
    if not found.captions:
        raise DataError("columns: no captions; give --columns captions=NAME")
    for setting, value, known in (
        ("check", check, get_args(_Check)),
        ("duplicates", duplicates, get_args(_Duplicates)),
    ):
        if value not in known:
            raise DataError(f"{setting} must be one of {', '.join(known)}, got {value!r}")
    if name is not None:
        found = replace(found, url="")
    tables: list[Path] = []
    if kind == "webdataset":
        if files is not None or name is not None:
            raise DataError("files and name are of a list; shards have their rows themselves")
        if found.url or found.times:
            raise DataError("columns: url and times are of a list; leave them out for webdataset")
        media = source
    else:
        if files is None:
            raise DataError(f"a list of {kind} needs the files that it lists; give --files FOLDER")
        media, tables = Path(os.path.abspath(files)), lists(source)
        if not media.is_dir():
            raise DataError(f"files={media} is no folder; give that of the shards, or of the files")
        for table in tables:
            check_columns(table, found, name)
    root = media if media.is_dir() else media.parent
    dropped = Dropped()
    there = walk(media, dropped) if media.is_dir() else [media]
    shards = [path for path in there if path.suffix.lower() == ".tar"]
    if not shards and kind == "webdataset":
        raise DataError(f"{media} is no shard, nor a folder of .tar; give one")
    if not shards and name is None:
        raise DataError(f"{media} has no shards; give --name, how the list names its files")
    if not shards and check == "listed":
        raise DataError("check=listed is of shards; files in folders are looked at")
    if duplicates == "listed" and not shards and not found.hash and not found.times:
        raise DataError(
            f"duplicates: {kind} has no column of hashes; give --columns hash=NAME, or "
            "--duplicates content, which reads all files, or keep"
        )
    if shards and name is None and kind != "webdataset" and not found.url:
        raise DataError("columns: no url, by which shards have their files; give it, or --name")
    shards = _sound(shards, dropped, skip_damaged)
    check_root(root)
    check_writable(out / ANNOTATIONS)
    (out / PARTS).mkdir(exist_ok=True)
    with _locked(out):
        own = found if kind == "webdataset" else Columns((), "url", "width", "height", "sha256")
        look = _Look(root, own, check, duplicates, limits or Limits(), skip_damaged)
        indexed = _indexed(shards, look, out / PARTS, workers)
        make = _Rows(found, name, duplicates, min_side)
        lines = _lined(tables, indexed, make, out / PARTS, workers)
        unique = duplicates != "keep"
        report = _merged(source, root, out, indexed if tables else [], lines, dropped, unique)
        kept = {part.stem for part in (*indexed, *lines)}
        for part in (out / PARTS).iterdir():
            if part.stem not in kept:
                part.unlink()
        return report


def check_root(root: Path) -> None:
    """DataError if ``data.txt`` cannot lead there: its lines are text, and blanks at ends go."""
    name = str(root)
    if "\n" in name or "\r" in name or name.strip() != name or not _is_text(name):
        raise DataError(f"{name!r} cannot be a line of {SOURCE}; rename the folder of the files")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Nobody else imports to ``out`` meanwhile; the system takes the lock from the dead."""
    lock = FileLock(out / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise DataError(f"another process imports to {out}; wait, or take another") from error
    try:
        yield
    finally:
        lock.release()


def _sound(shards: list[Path], dropped: Dropped, skip: bool) -> list[Path]:
    """Those that are whole by their ends; DataError if others are not to be skipped."""
    reasons = {path: reason for path in shards if (reason := why_damaged(path)) is not None}
    if reasons and not skip:
        first = "; ".join(f"{path} {reason}" for path, reason in list(reasons.items())[:3])
        raise DataError(
            f"{len(reasons)} of {len(shards)} shards are damaged: {first}. Mend them, or leave "
            "them out with --skip-damaged"
        )
    for path, reason in reasons.items():
        dropped.add(_DAMAGED, f"{path} {reason}")
    if shards and len(reasons) == len(shards):
        raise DataError(f"all {len(shards)} shards are damaged; download them again")
    return [path for path in shards if path not in reasons]


_DAMAGED = "a shard that is damaged, with all in it"


# Looking at files.


def _indexed(shards: list[Path], look: _Look, folder: Path, workers: int) -> list[Path]:
    """Parts of what there is to see in the files of shards, or of a folder without any."""
    made: list[Path] = []

    def jobs() -> Iterator[tuple[list[Path], Path]]:
        for piece in [[shard] for shard in shards] or _pieces(look.root):
            states = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in piece]
            made.append(folder / f"files-{_digest(look.told(), states)[:32]}.arrow")
            if not made[-1].exists():
                yield piece, made[-1]

    todo = list(jobs()) if shards else jobs()  # of a folder not all at once
    _each(partial(_index, look=look), todo, workers, "looking at files")
    return made


def _pieces(root: Path) -> Iterator[list[Path]]:
    """The files of a folder for one part after the other.

    A part ends behind a file by the hash of its name, so that one more does not move all others.
    """
    piece: list[Path] = []
    for path in walk(root, Dropped()):
        if path.suffix.lower() in VIDEOS | IMAGES:
            piece.append(path)
            ends = zlib.crc32(os.fsencode(path.name)) % _FILES == 0
            if ends or len(piece) == 4 * _FILES:
                yield piece
                piece = []
    if piece:
        yield piece


_Job = TypeVar("_Job")


def _each(work: Callable[[_Job], None], jobs: Iterable[_Job], workers: int, what: str) -> None:
    """Do all jobs, here or in so many processes; few are made ahead, as they may be large."""
    total = len(jobs) if isinstance(jobs, list) else None
    with tqdm(None, what, total, unit="part", disable=None) as bar:
        if not workers:
            for job in jobs:
                work(job)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            waiting: deque[Future[None]] = deque()
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > _AHEAD * workers:
                    waiting.popleft().result()
                    bar.update()
            for future in waiting:
                future.result()
                bar.update()


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _index(job: tuple[list[Path], Path], look: _Look) -> None:
    """Write one part."""
    piece, part = job
    dropped = Dropped()
    shard = piece[0].suffix.lower() == ".tar"
    found = _of_shard(piece[0], look, dropped) if shard else _of_files(piece, look, dropped)
    try:
        _write(part, _INDEX, found, dropped)
    except DataError as error:
        if not look.skip_damaged:
            raise DataError(f"{error}, or leave it out with --skip-damaged") from error
        dropped = Dropped()
        dropped.add(_DAMAGED, str(error))
        _write(part, _INDEX, [], dropped)


def _of_shard(path: Path, look: _Look, dropped: Dropped) -> Iterator[dict[str, Any]]:
    shard = _named(path, look.root)
    for sample in samples(path, dropped):
        where = sample.address(shard)
        size = _listed_size(sample.about, look.columns)
        seen = _seen(where, look, dropped, size)
        if seen is None:
            continue
        texts = [
            sample.caption if name == TXT else sample.about.get(name)
            for name in look.columns.captions
        ]
        yield {
            **seen,
            "key": sample.key,
            "url": _text(sample.about.get(look.columns.url)),
            "captions": _plain(texts),
            "hash": seen["hash"] or _text(sample.about.get(look.columns.hash)),
        }


def _of_files(paths: list[Path], look: _Look, dropped: Dropped) -> Iterator[dict[str, Any]]:
    for path in paths:
        seen = _seen(_named(path, look.root), look, dropped, None)
        if seen is not None:
            key = path.relative_to(look.root).as_posix()
            yield {**seen, "key": key, "url": "", "captions": []}


def _named(path: Path, root: Path) -> str:
    """Its path in ``root``, such that it does not look like a URL."""
    name = path.relative_to(root).as_posix()
    return f"./{name}" if ":" in name else name


def _text(value: Any) -> str:
    """What is told as text or a number; "" if it is neither."""
    found = str(value) if isinstance(value, str | int) else ""
    return found if _is_text(found) else ""


def _plain(texts: Iterable[Any]) -> list[str]:
    """Captions that are not empty."""
    found = [text.strip().strip(MARK).strip() for text in texts if isinstance(text, str)]
    return [text for text in found if text and _is_text(text)]


def _listed_size(row: dict[str, Any], columns: Columns) -> tuple[int, int] | None:
    """Height and width that a row tells; None if it does not."""
    try:
        height, width = int(row[columns.height]), int(row[columns.width])
    except (KeyError, TypeError, ValueError):
        return None
    return (height, width) if min(height, width) > 0 else None


def _seen(
    where: str, look: _Look, dropped: Dropped, size: tuple[int, int] | None
) -> dict[str, Any] | None:
    """What there is to see in a file, or what it is said to be; None if it cannot be used.

    An image must have the size that its metadata say. Of a video they may tell that of its source.
    """
    image = Path(where).suffix.lower() in IMAGES
    frames, fps, height, width, digest = 1, 0.0, 0, 0, ""
    if not _is_text(where) or leads_out(where):
        dropped.add("a name that cannot be used", where)
        return None
    try:
        if look.check == "files" and image:
            height, width = probe_image(where, root=look.root, limits=look.limits)
        elif look.check == "files":
            info = probe(where, root=look.root, limits=look.limits, whole=True)
            (height, width), rate = info.upright(), info.fps
            held = look.limits.why_held(info.hold)
            if held or not info.frames or not rate or rate > FASTEST:
                raise VideoError(f"{where!r}: {held or f'{info.frames} frames, {rate} a second'}")
            frames, fps = info.frames, float(rate)
        elif size is None or not image:
            dropped.add("size, or frames, not listed", where)
            return None
        if look.duplicates == "content":
            with plain_file(where, look.root).open() as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (VideoError, OSError) as error:
        dropped.add("cannot be opened", f"{where}: {error}")
        return None
    if size is not None and not height:
        height, width = size
    if image and size is not None and size != (height, width):
        dropped.add("of another size than its metadata says", f"{where}: {width}x{height}")
        return None
    numbers = {"height": height, "width": width, "frames": frames, "fps": fps}
    return {"path": where, **numbers, "hash": digest}


def _write(
    part: Path,
    schema: pa.Schema,
    found: Iterable[dict[str, Any]],
    dropped: Dropped,
    more: Counter[str] | None = None,
) -> None:
    """A part, and beside it what was dropped, first: a part that is there has its counts."""
    with replacing(part) as temporary, pa.OSFile(str(temporary), "wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            rest: list[dict[str, Any]] = []
            for row in found:
                rest.append(row)
                if len(rest) == _ROWS:
                    writer.write_batch(pa.RecordBatch.from_pylist(rest, schema=schema))
                    rest = []
            writer.write_batch(pa.RecordBatch.from_pylist(rest, schema=schema))
        told = {"counts": dropped.counts, "examples": dropped.examples, "more": more or {}}
        with replacing(part.with_suffix(".json")) as counts:
            counts.write_text(json.dumps(told))


def _batches(part: Path) -> Iterator[pa.RecordBatch]:
    with pa.OSFile(str(part)) as file, pa.ipc.open_file(file) as reader:  # mapped, all would stay
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


# From files to rows.


@dataclass(frozen=True)
class _Rows:
    """How rows are made."""

    columns: Columns
    name: str | None
    duplicates: _Duplicates
    min_side: int

    def line(
        self,
        file: dict[str, Any],
        captions: list[str],
        told: str,
        dropped: Dropped,
        cut: list[int] | None = None,
    ) -> dict[str, Any] | None:
        """One row, or None; ``told`` is the hash that goes for it where files were not read."""
        where = file["path"]
        if not captions:
            dropped.add("no caption", where)
            return None
        if min(file["height"], file["width"]) < self.min_side:
            dropped.add("smaller than --min-side", f"{where}: {file['width']}x{file['height']}")
            return None
        row: dict[str, Any] = {"path": where, "cap": captions}
        row["resolution"] = {"height": file["height"], "width": file["width"]}
        if file["fps"]:
            row |= {"num_frames": file["frames"], "fps": file["fps"]}
        if cut is not None:
            row["cut"] = cut
        digest = {"keep": "", "content": file["hash"], "listed": told}[self.duplicates]
        if digest and cut is not None:
            digest = f"{digest} {cut}"
        high, low = _halves(digest) if digest else (0, 0)
        return {"line": json.dumps(row, ensure_ascii=True), "high": high, "low": low}


def _halves(text: str) -> tuple[int, int]:
    """128 bits of a hash of it, in two numbers."""
    found = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:], "little")


def _lined(
    tables: list[Path], indexed: list[Path], make: _Rows, folder: Path, workers: int
) -> list[Path]:
    """Parts of rows: one for each part of the files, or for each piece of a list."""
    about = [_FORMAT, astuple(make.columns), make.name, make.duplicates, make.min_side]
    every = _digest(_FORMAT, make.name is None, [path.stem for path in indexed])
    jobs: list[tuple[Path | Piece, Path]] = []
    for item in indexed if not tables else itertools.chain.from_iterable(map(pieces, tables)):
        if isinstance(item, Piece):
            state = item.path.stat()
            told = [*item.told(), state.st_size, state.st_mtime_ns, every]
        else:
            told = [item.stem]
        jobs.append((item, folder / f"rows-{_digest(about, told)[:32]}.arrow"))
    missing = [job for job in jobs if not job[1].exists()]
    files = folder / f"index-{every[:32]}.sqlite"
    if tables and missing and not files.exists():
        by = "url" if make.name is None else "key"
        lookup.build(files, _keyed(indexed, (by, *lookup.FIELDS)))
    _each(partial(_line, make=make, files=files), missing, workers, "making rows")
    return [part for _, part in jobs]


def _keyed(parts: list[Path], names: Sequence[str]) -> Iterator[Iterable[Sequence[Any]]]:
    """All that was looked at, by these names."""
    for part in tqdm(parts, "an index of the files", unit="part", disable=None):
        for batch in _batches(part):
            yield zip(*(batch[name].to_pylist() for name in names), strict=True)


def _line(job: tuple[Path | Piece, Path], make: _Rows, files: Path) -> None:
    """Write one part."""
    item, part = job
    if not isinstance(item, Piece):
        dropped = _dropped(item)
        _write(part, _LINES, _of_index(item, make, dropped), dropped)
        return
    dropped, more = Dropped(), Counter[str]()
    with lookup.opened(files) as there:
        _write(part, _LINES, _of_list(item, there, make, dropped, more), dropped, more)


def _of_index(part: Path, make: _Rows, dropped: Dropped) -> Iterator[dict[str, Any]]:
    for batch in _batches(part):
        for file in batch.to_pylist():
            row = make.line(file, file["captions"], file["hash"], dropped)
            if row is not None:
                yield row


def _of_list(
    piece: Piece, files: lookup.Lookup, make: _Rows, dropped: Dropped, more: Counter[str]
) -> Iterator[dict[str, Any]]:
    columns = make.columns
    wanted = [column for _, column in columns.all()] + fields_of(make.name or "")
    for number, row in enumerate(rows(piece, wanted), piece.first):
        where = f"{piece.path}[{number}]"
        key = str(row[columns.url] or "") if make.name is None else filled(make.name, row)
        file = files.find(key) if key else None
        if file is None:
            dropped.add("a row without a file", f"{where}: {key}")
            continue
        size = _listed_size(row, columns)
        if size is not None and size != (file["height"], file["width"]):
            more["of another size than listed"] += 1
        told = _text(row[columns.hash]) if columns.hash else file["hash"]
        if not columns.times:
            values = (row[name] for name in columns.captions)
            several = (value if isinstance(value, list) else [value] for value in values)
            captions = _plain(itertools.chain.from_iterable(several))
            made = make.line(file, captions, told, dropped)
            if made is not None:
                yield made
            continue
        yield from _cuts(row, file, make, told or key, where, dropped)


def _cuts(
    row: dict[str, Any], file: dict[str, Any], make: _Rows, told: str, where: str, dropped: Dropped
) -> Iterator[dict[str, Any]]:
    """A row for each cut of a video, with the caption in the same place of its list."""
    times = listed(row[make.columns.times])
    texts = [listed(row[name]) for name in make.columns.captions]
    if any(len(each) != len(times) for each in texts):
        lengths = ", ".join(str(len(each)) for each in texts)
        dropped.add("as many captions as cuts are needed", f"{where}: {lengths} of {len(times)}")
        return
    for number, time in enumerate(times):
        try:
            begin, end = (seconds(value) for value in time)
            fps, frames = file["fps"], file["frames"]
            first, last = round(begin * fps), min(round(end * fps), frames)
        except (TypeError, ValueError, OverflowError) as error:
            dropped.add("a cut that is no pair of times", f"{where}: {error}")
            continue
        if not 0 <= first < last:
            dropped.add("a cut outside of its video", f"{where}: {time} of {frames} frames")
            continue
        captions = _plain(each[number] for each in texts)
        made = make.line(file, captions, told, dropped, [first, last])
        if made is not None:
            yield made


# From rows to annotations.


def _dropped(part: Path) -> Dropped:
    table = json.loads(part.with_suffix(".json").read_bytes())
    return Dropped(Counter(table["counts"]), table["examples"])


def _merged(
    source: Path,
    root: Path,
    out: Path,
    indexed: list[Path],
    parts: list[Path],
    dropped: Dropped,
    unique: bool,
) -> Report:
    """The annotations, ``unique`` without what comes twice; ``indexed`` are the files of a list."""
    more, files = Counter[str](), Dropped()
    for part in indexed:
        _add(files, _dropped(part))
    for part in parts:
        _add(dropped, _dropped(part))
        more.update(json.loads(part.with_suffix(".json").read_bytes())["more"])
    first, none = _first(parts)
    if unique:  # else nobody asked for hashes, and no row has one
        more["without a hash"] = none
    used = int(first.sum())
    if not used:
        found = ", ".join(f"{count} {reason}" for reason, count in dropped.counts.items())
        raise DataError(f"no clip in {printable(str(source))}: {found or 'no rows'}")
    with replacing(out / ANNOTATIONS) as temporary, temporary.open("w", encoding="utf-8") as file:
        at = 0
        for part in parts:
            for batch in _batches(part):
                for line in batch["line"].to_pylist():
                    if first[at]:
                        file.write(line + "\n")
                    else:
                        dropped.add("a duplicate", json.loads(line)["path"])
                    at += 1
    with replacing(out / SOURCE) as temporary:
        temporary.write_text(f"{root},{ANNOTATIONS}\n", encoding="utf-8")
    told: dict[str, Any] = dict(more)
    if indexed:
        told["files"] = {"dropped": dict(files.counts), "examples": files.examples}
    report = Report(str(source), used, dropped.counts, dropped.examples, told)
    report.write(out / SCAN)
    return report


def _add(dropped: Dropped, other: Dropped) -> None:
    dropped.counts.update(other.counts)
    for reason, names in other.examples.items():
        known = dropped.examples.setdefault(reason, [])
        known.extend(names[: NAMED - len(known)])


def _first(parts: list[Path]) -> tuple[np.ndarray, int]:
    """Which rows are the first of their hash or have none, bool ``[N]``; how many have none."""
    high, low = (
        np.concatenate(
            [np.zeros(0, np.uint64)]
            + [batch[name].to_numpy().copy() for part in parts for batch in _batches(part)]
        )
        for name in ("high", "low")
    )
    order = np.lexsort((low, high))  # which is stable
    same = np.zeros(len(order), bool)
    same[1:] = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    first = np.ones(len(order), bool)
    first[order] = ~same
    none = (high == 0) & (low == 0)
    first[none] = True
    return first, int(none.sum())
