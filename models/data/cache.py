"""Features computed once and kept in a folder: built, checked, and trained from.

The folder holds

- ``cache.json``: what it was made from and with (data, rule, seed, encoders), and how many clips it
  has once it is complete;
- ``null.safetensors``: the embeddings of no caption;
- ``shards/00000.safetensors`` and so on: posteriors and text embeddings of many clips each;
- ``index/00000.parquet`` and so on: the clips of each shard, with a SHA-256 of their tensors, and
  what their files were (:mod:`skiparse.models.data.content`);
- ``scan.json``: how many clips of the data set are in it, and why others are not;
- ``bad.jsonl``: the clips that could not be read, with the reason; they are left out;
- ``manifest``, where it was kept here: the index of the data set.

A shard counts once its part of the index is there, which is written after it. So a build may be
killed at any time, and the next one goes on behind the last shard that counts. The window of a long
clip is fixed in a cache, and nothing else that is random: noise, choice of caption and dropout come
when a batch is put together, by :func:`skiparse.models.data.features.collate`.

Source: Open-Sora Plan v1.5 report, feature caching, which is its future work.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock, Timeout
from pyarrow import parquet
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skiparse.models.data.atomic import replacing, seal, write_json
from skiparse.models.data.buckets import Buckets, Rule, assign
from skiparse.models.data.content import Content
from skiparse.models.data.dataset import Clip, Clips
from skiparse.models.data.draws import Place
from skiparse.models.data.features import LAST, Coder, Features, Text, digest
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import DataError, Manifest
from skiparse.models.data.plain import printable
from skiparse.models.data.report import NAMED, Report
from skiparse.models.data.video import VideoError, plain_file
from skiparse.models.shards import inside

ABOUT, NULL, SHARDS, INDEX, BAD = "cache.json", "null.safetensors", "shards", "index", "bad.jsonl"
LOCK, MANIFEST, SCAN, SOURCE = "lock", "manifest", "scan.json", "clips"
SCHEMA = 3  # of the folder and of all that its fingerprints do not tell, such as text cleaning
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ORIGIN = ("schema", "data", "rule", "seed", "encoders", "dtype")  # what must not change
_KEYS = {*_ORIGIN, "rows", "shapes", "dropped", "taken", "clips"}
_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("bucket", pa.int16(), nullable=False),
        pa.field("captions", pa.int32(), nullable=False),  # how many
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),  # of the clip, when it was read
        pa.field("size", pa.int64(), nullable=False),  # this and the rest as in Content
        pa.field("mtime", pa.int64(), nullable=False),
        pa.field("ends", pa.string(), nullable=False),
        pa.field("whole", pa.string(), nullable=False),
    ]
)
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
_LOST = "cannot be read"
_BAD_SHARE = 0.01  # of the clips, above which a build stops; as in Clips


class CacheError(ValueError):
    """A cache that cannot be used as asked: what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Damage:
    """A file of a cache that is not as it was written."""

    file: str  # in the folder of the cache
    reason: str
    keys: tuple[str, ...] = ()  # of the clips in it that are lost, where that is known


def build(
    folder: str | os.PathLike[str],
    manifest: Manifest,
    rule: Rule,
    encoders: Coder,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_bytes: int = 2**28,
    limits: Limits | None = None,
    workers: int = 0,
) -> Path:
    """Compute the features of every clip that ``rule`` takes, or go on where a build has stopped.

    Clips that could not be read are tried again by each build, and those whose files were replaced
    since, as size, time and ends tell, are computed again.

    Args:
        folder: of the cache; made if need be.
        manifest, rule, seed: which clips, and which window of each. With the seed of a run they are
            those of :class:`~skiparse.models.data.dataset.Clips` with fixed windows.
        encoders: what computes the features.
        dtype: to keep them in: "float32", where they are those of the encoders bit for bit,
            "bfloat16" or "float16".
        shard_bytes: of features, after which a shard is closed. One shard is held in memory, and is
            what is lost if the build is killed.
        limits: the largest source to decode.
        workers: processes that read clips ahead; 0 reads them in between.

    Returns:
        The folder.

    Raises:
        CacheError: if another process builds there, the folder holds something else than a cache of
            just this, or features do not fit into ``dtype``.
        DataError: if no clip is taken, or more than 1 % of those taken cannot be read.
        ValueError: for a dtype or size out of range, or clips that the autoencoder cannot take.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    folder, buckets = Path(folder), assign(manifest, rule, seed)
    about = {
        "schema": SCHEMA,
        "data": manifest.fingerprint,
        "rule": rule.table(),
        "seed": seed,
        "encoders": encoders.fingerprints(),
        "dtype": dtype,
        "rows": len(manifest),
        "shapes": buckets.shapes,
        "dropped": buckets.dropped,
        "taken": int(buckets.counts.sum()),
        "clips": None,  # not known before the end
    }
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _begin(folder, json.loads(json.dumps(about)))
        _write_null(folder, encoders.null, DTYPES[dtype])
        replaced, _ = _replaced(folder, full=False, now=manifest)
        if replaced:
            _forget(folder, replaced)
            tqdm.write(f"{len(replaced)} clips were replaced since; they are computed again")
        clips = Clips(manifest, buckets, rule, seed=seed, windows="fixed", limits=limits)
        shards = _Shards(folder, manifest, DTYPES[dtype], shard_bytes)
        reasons: dict[str, str] = {}
        missing = _missing(folder, buckets)
        for row, clip, was in _readable(clips, missing, workers, folder / BAD, reasons):
            shards.add(encoders.features(clip), int(buckets.bucket[row]), was)
        shards.close()
        _write_about(folder, {**about, "clips": len(_index(folder))})
        _tell(folder, manifest.report(buckets), reasons)
    return folder


def _tell(folder: Path, report: Report, reasons: Mapping[str, str]) -> None:
    """In a line and a file, what a cache holds; ``reasons`` are of clips that cannot be read."""
    if reasons:
        report = replace(
            report,
            used=report.used - len(reasons),
            dropped={**report.dropped, _LOST: len(reasons)},
            examples={
                **report.examples,
                _LOST: [printable(reason) for reason in list(reasons.values())[:NAMED]],
            },
        )
    tqdm.write(report.line)
    report.write(folder / SCAN)


def verify(
    folder: str | os.PathLike[str], *, repair: bool = False, full: bool = False
) -> list[Damage]:
    """Read all of a cache and compare it with its checksums, and with its clips if they are there.

    Args:
        repair: remove the shards that are damaged and the clips that were replaced, so that the
            next :func:`build` makes these again and no others.
        full: compare all of each clip. If not, a file of the same size and time is believed.

    Returns:
        What is damaged; nothing if all is well. A clip that was replaced is damage of ``clips``.

    Raises:
        CacheError: if the folder holds no cache; to repair it, if another process builds there.
    """
    folder = Path(folder)
    about = _about(folder)
    with _locked(folder) if repair else nullcontext():
        found = _damages(folder, about)
        broken = {Path(damage.file).stem for damage in found}
        replaced, absent = _replaced(folder, full=full, without=broken)
        if absent:
            tqdm.write(f"{absent} clips are not where they were read, and are not compared")
        if replaced:
            found.append(Damage(SOURCE, "replaced since they were read", tuple(replaced.values())))
        if repair and found:
            _write_about(folder, {**about, "clips": None})
            _forget(folder, replaced)
            for damage in found:
                name = Path(damage.file).stem
                if damage.file == NULL:
                    (folder / NULL).unlink(missing_ok=True)
                elif damage.file not in (INDEX, SOURCE):
                    _part(folder, name).unlink()  # first: without it the shard does not count
                    _shard(folder, name).unlink(missing_ok=True)
    return found


class Cache(Dataset[Features]):
    """The features of a data set from the folder of a cache: ``cache[place]``.

    Shards are mapped, by each worker for itself. A clip that a worker reads for the first time is
    compared with its checksum.

    Args:
        folder: of a complete cache.
        fingerprints: of the encoders it has to be of, from :meth:`Coder.fingerprints`; None
            takes any.

    Attributes:
        rule, seed, dtype, fingerprints: what it was built with.
        data: fingerprint of the manifest.
        buckets: the rows it has, and their shapes.
        null: the embeddings of no caption.

    Raises:
        CacheError: if it is no cache, not complete, damaged, or of other encoders.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprints: Mapping[str, str] | None = None
    ) -> None:
        self.folder = Path(folder)
        about = _about(self.folder)
        if fingerprints is not None:
            held = dict(about["encoders"])
            if LAST not in fingerprints:  # it may have more than is asked for
                held.pop(LAST, None)
            _refuse_others(self.folder, held, dict(fingerprints))
        self._index = _index(self.folder)
        if len(self._index) != about["clips"]:
            raise CacheError(
                f"{folder} is not complete: {len(self._index)} of {about['taken']} clips are in "
                "it; build it again, which goes on where it stopped"
            )
        self.rule = Rule(**about["rule"])
        self.seed: int = about["seed"]
        self.dtype: str = about["dtype"]
        self.fingerprints: dict[str, str] = about["encoders"]
        self.data: str = about["data"]
        self.null = _read_null(self.folder)
        rows = self._index["row"].to_numpy()
        self._where = np.full(about["rows"], -1)  # of each row in the index
        self._where[rows] = np.arange(len(rows))
        bucket = np.full(about["rows"], -1, np.int16)
        bucket[rows] = self._index["bucket"].to_numpy()
        lost = about["taken"] - len(rows)
        dropped = about["dropped"] | ({_LOST: lost} if lost else {})
        self.buckets = Buckets(tuple(map(tuple, about["shapes"])), bucket, dropped)
        self._shards: dict[str, Any] = {}
        self._checked: set[int] = set()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def has_last(self) -> bool:
        """Whether it has the last frames of its clips, coded by themselves."""
        return LAST in self.fingerprints

    def report(self) -> Report:
        """How many clips are used, of those that it was built from."""
        return Report(str(self.folder), int(self.buckets.counts.sum()), self.buckets.dropped, {})

    def __getitem__(self, place: Place) -> Features:
        """The features of ``place.row``, in fp32.

        Raises:
            CacheError: if the row is not in the cache, or its shard is missing or damaged.
        """
        at = int(self._where[place.row])
        if at < 0:
            raise CacheError(f"row {place.row} is not in {self.folder}; take rows of its buckets")
        entry = self._index.slice(at, 1).to_pylist()[0]
        tensors = self._tensors(entry)
        texts = tuple(
            {name: tensors[f"{name}/{i}"].float() for name in self.null}
            for i in range(entry["captions"])
        )
        mean, std = tensors["mean"].float(), tensors["std"].float()
        last = tensors[LAST].float() if self.has_last else None
        return Features(mean, std, texts, self.null, entry["key"], place, last)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is started anew, which maps the shards for itself."""
        return {**self.__dict__, "_shards": {}}

    def _tensors(self, entry: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of one clip, compared with their checksum the first time."""
        path = _shard(self.folder, entry["shard"])
        try:
            if entry["shard"] not in self._shards:
                self._shards[entry["shard"]] = _opened(path)
            tensors = _sample(self._shards[entry["shard"]], entry, self.null, self.has_last)
        except (OSError, SafetensorError) as error:
            raise _damaged(self.folder, path, error) from error
        if entry["row"] not in self._checked:
            if digest(tensors) != entry["sha256"]:
                raise _damaged(self.folder, path, f"{entry['key']} is not as it was written")
            self._checked.add(entry["row"])
        return tensors


# Building.


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Nobody else builds in ``folder`` meanwhile; the system takes the lock from the dead."""
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CacheError(
            f"another process builds in {folder}; wait for it, or take another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder ready: what is in it must be of this very cache, or be leftovers."""
    if (folder / ABOUT).exists():
        was = _about(folder)
        _refuse_others(folder, *({name: x[name] for name in _ORIGIN} for x in (was, about)))
    elif any(
        path.name not in (LOCK, MANIFEST) and path.suffix != ".tmp" for path in folder.iterdir()
    ):
        raise CacheError(f"{folder} holds something else than a cache; take a new folder")
    _write_about(folder, about)
    for place in (folder, folder / SHARDS, folder / INDEX):
        place.mkdir(exist_ok=True)
        for leftover in place.glob(".*.tmp"):
            leftover.unlink()


def _missing(folder: Path, buckets: Buckets) -> list[int]:
    """Rows that are taken and not yet in the index."""
    missing = buckets.bucket >= 0
    missing[_index(folder)["row"].to_numpy()] = False
    return np.flatnonzero(missing).tolist()


def _replaced(
    folder: Path, *, full: bool, now: Manifest | None = None, without: Collection[str] = ()
) -> tuple[dict[int, str], int]:
    """Keys of clips that are not what was read any more, by row; and how many are not there.

    Args:
        now: where the clips are; None looks where they were read.
        without: names of shards that are not asked about.
    """
    found: dict[int, str] = {}
    absent = 0
    for path in sorted((folder / INDEX).glob("*.parquet")):
        for entry in [] if path.stem in without else _part_of(folder, path).to_pylist():
            clip = Path(entry["path"])
            if now is not None:
                record = now.record(entry["row"])
                clip = record.root / record.path
            was = Content(entry["size"], entry["mtime"], entry["ends"], entry["whole"])
            try:
                if not was.is_of(clip, full=full):
                    found[entry["row"]] = entry["key"]
            except OSError:
                absent += 1
    return found, absent


def _forget(folder: Path, rows: Collection[int]) -> None:
    """Take rows out of the index; a shard whose rows are all gone goes too."""
    for path in sorted((folder / INDEX).glob("*.parquet")):
        entries = _part_of(folder, path).to_pylist() if rows else []
        kept = [entry for entry in entries if entry["row"] not in rows]
        if len(kept) == len(entries):
            continue
        if kept:
            _write_part(path, kept)
        else:
            path.unlink()  # first: without it the shard does not count
            _shard(folder, path.stem).unlink(missing_ok=True)


class _Tried(Dataset[tuple[Clip, Content] | str]):
    """Clips by row and what their files are, or why they cannot be read."""

    def __init__(self, clips: Clips) -> None:
        self.clips = clips

    def __getitem__(self, row: int) -> tuple[Clip, Content] | str:
        record = self.clips.manifest.record(row)
        try:
            was = Content.of(plain_file(record.path, record.root))
            return self.clips.read(Place(0, 0, row)), was
        except VideoError as error:
            return str(error)
        except OSError as error:
            return f"{record.path!r}: cannot be read ({error.strerror})"


def _readable(
    clips: Clips, rows: list[int], workers: int, bad: Path, reasons: dict[str, str]
) -> Iterator[tuple[int, Clip, Content]]:
    """The clips of ``rows`` in order; those that cannot be read go to the file ``bad``.

    ``reasons`` is filled with theirs, by path.

    Raises:
        DataError: once they are more than 1 % of all clips.
    """
    loader = DataLoader(_Tried(clips), None, sampler=rows, num_workers=workers)
    with bad.open("w", encoding="utf-8") as file:
        bar = tqdm(loader, "clips", len(rows), unit="clip", disable=None)
        for row, found in zip(rows, bar, strict=True):
            if not isinstance(found, str):
                yield row, *found
                continue
            record = clips.manifest.record(row)
            line = {"path": str(record.root / record.path), "reason": found}
            print(json.dumps(line), file=file, flush=True)
            reasons[f"{row} {record.path}"] = found
            if len(reasons) > _BAD_SHARE * len(clips):
                raise DataError(
                    f"{len(reasons)} of {len(clips)} clips cannot be read, more than "
                    f"{_BAD_SHARE:.0%}; the first: {'; '.join(list(reasons.values())[:3])}. See "
                    f"{bad}; mend or remove these files"
                )


class _Shards:
    """Features on their way to the disk, one shard at a time."""

    def __init__(self, folder: Path, clips: Manifest, dtype: torch.dtype, most: int) -> None:
        self.folder, self.clips, self.dtype, self.most = folder, clips, dtype, most
        names = (f"{number:05d}" for number in itertools.count())
        # A shard without its part of the index is a leftover, and written over.
        self.free = (name for name in names if not _part(folder, name).exists())
        self._clear()

    def _clear(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.entries: list[dict[str, Any]] = []
        self.size = 0  # bytes

    def add(self, features: Features, bucket: int, was: Content) -> None:
        """One more clip; the shard is closed if that fills it."""
        sample = {"mean": features.mean, "std": features.std}
        if features.last is not None:
            sample[LAST] = features.last
        for i, text in enumerate(features.texts):
            sample |= {f"{name}/{i}": x for name, x in text.items()}
        sample = {name: _stored(features.key, x, self.dtype) for name, x in sample.items()}
        row = features.place.row
        entry = {
            "row": row,
            "key": features.key,
            "bucket": bucket,
            "captions": len(features.texts),
            "sha256": digest(sample),
            "path": str(self.clips.record(row).root / self.clips.record(row).path),
            **asdict(was),
        }
        self.entries.append(entry)
        self.tensors |= {f"{row}/{name}": x for name, x in sample.items()}
        self.size += sum(x.nbytes for x in sample.values())
        if self.size >= self.most:
            self.close()

    def close(self) -> None:
        """Write what there is, the shard first and then its part of the index."""
        if not self.entries:
            return
        name = next(self.free)
        with replacing(_shard(self.folder, name)) as temporary:
            save_file(self.tensors, temporary)
        _write_part(_part(self.folder, name), self.entries)
        self._clear()


def _write_part(path: Path, entries: list[dict[str, Any]]) -> None:
    with replacing(path) as temporary:
        table = pa.Table.from_pylist(entries, _COLUMNS)
        parquet.write_table(table, temporary, write_page_checksum=True)


def _stored(key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype).contiguous()
    if not x.isfinite().all():
        raise CacheError(f"{key}: a feature does not fit into {dtype}; build with bfloat16")
    return x


def _write_null(folder: Path, null: Text, dtype: torch.dtype) -> None:
    if not (folder / NULL).exists():
        tensors = {name: _stored("no caption", x, dtype) for name, x in null.items()}
        with replacing(folder / NULL) as temporary:
            save_file(tensors, temporary, {"sha256": digest(tensors)})


# Reading.


def _shard(folder: Path, name: str) -> Path:
    return inside(folder, f"{SHARDS}/{name}.safetensors")


def _part(folder: Path, name: str) -> Path:
    """The part of the index that tells what is in a shard."""
    return inside(folder, f"{INDEX}/{name}.parquet")


def _write_about(folder: Path, about: Mapping[str, Any]) -> None:
    write_json(folder / ABOUT, {**about, "seal": seal(about)})


def _about(folder: Path) -> dict[str, Any]:
    path = folder / ABOUT
    try:
        about = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{folder} is no cache: {path}: {error}; build one") from error
    sealed = isinstance(about, dict) and about.pop("seal", None) == seal(about)
    if not sealed or about.keys() != _KEYS or about["schema"] != SCHEMA:
        raise CacheError(
            f"{path} is damaged, or not of schema {SCHEMA}, which is read here; build it anew in "
            "another folder"
        )
    return about


def _refuse_others(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """CacheError unless the two agree, naming what does not."""
    differences = list(_differences(was, now))
    if differences:
        raise CacheError(
            f"{folder} is of another origin: {', '.join(differences)}; build in another folder, or "
            "use what it was built with"
        )


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], of: str = "") -> Iterator[str]:
    for name in sorted({*was, *now}):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{of}{name}.")
        elif old != new:
            yield f"{of}{name} is {str(old)[:16]}, not {str(new)[:16]}"


def _index(folder: Path) -> pa.Table:
    """All parts in one table, with the name of the shard; CacheError if one is damaged."""
    columns = _COLUMNS.append(pa.field("shard", pa.string()))
    tables = [columns.empty_table()]
    for path in sorted((folder / INDEX).glob("*.parquet")):
        table = _part_of(folder, path)
        shards = pa.array([path.stem] * len(table), pa.string())
        tables.append(table.append_column(columns.field("shard"), shards))
    return pa.concat_tables(tables)


def _part_of(folder: Path, path: Path) -> pa.Table:
    """One part; CacheError if it is damaged."""
    try:
        return _read_part(path)
    except _UNREADABLE as error:
        raise _damaged(folder, path, error) from error


def _read_part(path: Path) -> pa.Table:
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
        return file.read().cast(_COLUMNS)


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


def _sample(
    shard: Any, entry: Mapping[str, Any], names: Collection[str], last: bool
) -> dict[str, Tensor]:
    """The tensors of one clip, as they were added; ``names`` are those of a caption."""
    own = ("mean", "std", LAST) if last else ("mean", "std")
    texts = (f"{name}/{i}" for i in range(entry["captions"]) for name in names)
    return {name: shard.get_tensor(f"{entry['row']}/{name}") for name in (*own, *texts)}


def _read_null(folder: Path) -> Text:
    path = folder / NULL
    try:
        file = _opened(path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        checksum = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise _damaged(folder, path, error) from error
    if digest(tensors) != checksum:
        raise _damaged(folder, path, "it is not as it was written")
    return {name: x.float() for name, x in tensors.items()}


def _damaged(folder: Path, path: Path, reason: object) -> CacheError:
    return CacheError(
        f"{path} is missing or damaged: {reason}; run `skiparse cache verify {folder} --repair` "
        "and then the build again, which makes anew what is lost and no more"
    )


def _damages(folder: Path, about: Mapping[str, Any]) -> list[Damage]:
    found: list[Damage] = []
    null: Text | None = None
    try:
        null = _read_null(folder)
    except CacheError:
        found.append(Damage(NULL, "missing, or not as it was written"))
    count = 0
    for path in tqdm(sorted((folder / INDEX).glob("*.parquet")), "shards", disable=None):
        try:
            table = _read_part(path)
        except _UNREADABLE as error:
            found.append(Damage(f"{INDEX}/{path.name}", str(error)))
            continue
        count += len(table)
        last = LAST in about["encoders"]
        damage = _shard_damage(folder, path.stem, table.to_pylist(), null, last)
        if damage is not None:
            found.append(damage)
    if not found and about["clips"] not in (None, count):
        found.append(Damage(INDEX, f"has {count} clips where {about['clips']} were built"))
    return found


def _shard_damage(
    folder: Path, name: str, entries: list[dict[str, Any]], null: Text | None, last: bool
) -> Damage | None:
    file = f"{SHARDS}/{name}.safetensors"
    try:
        shard = _opened(_shard(folder, name))
    except (OSError, SafetensorError) as error:
        return Damage(file, str(error), tuple(entry["key"] for entry in entries))
    # Names as ROW/NAME/CAPTION; without the embeddings of no caption only the shard knows them.
    parts = [key.split("/") for key in shard.keys()]  # noqa: SIM118
    names = {part[1] for part in parts if len(part) == 3} if null is None else set(null)
    lost = tuple(entry["key"] for entry in entries if not _is_whole(shard, entry, names, last))
    return Damage(file, "not as it was written", lost) if lost else None


def _is_whole(shard: Any, entry: Mapping[str, Any], names: Collection[str], last: bool) -> bool:
    try:
        return digest(_sample(shard, entry, names, last)) == entry["sha256"]
    except SafetensorError:  # a flipped bit in a name
        return False
