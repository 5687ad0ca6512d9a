"""What the public data sets call their columns, and how their lists are read, a batch at a time.

Recap-DataComp-1B, COYO-700M, LAION-Aesthetics and Panda-70M are lists of addresses with captions.
What their columns are called was taken from their cards, not from their files; a mapping that is
given takes their place.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from pyarrow import parquet

from skiparse.models.data.manifest import DataError

_BATCH = 2**14  # rows
_PIECE = 2**18  # at least, of a list that can be read from the middle
_BUFFER = 2**20  # bytes of a column
_LISTS = {".parquet", ".csv", ".jsonl"}
TXT = ".txt"  # in place of a column: what stands in the file of this name


@dataclass(frozen=True)
class Columns:
    """Which columns of a list, or keys of a shard's metadata, say what.

    Attributes:
        captions: texts, or lists of texts where a row has several cuts.
        url: where a file came from, by which it is found again in shards.
        width, height: pixels of the picture.
        hash: equal for what is the same.
        times: ``[start, end]`` of each cut, in seconds or as ``h:mm:ss.mmm``.
    """

    captions: tuple[str, ...] = ()
    url: str = ""
    width: str = ""
    height: str = ""
    hash: str = ""
    times: str = ""

    def mapped(self, given: Sequence[str]) -> Columns:
        """With ``role=column`` in place of what there is; ``role=`` takes it out.

        Raises:
            DataError: for a role that there is not.
        """
        found: dict[str, list[str]] = {}
        for item in given:
            role, equals, column = item.partition("=")
            if role not in self.__dataclass_fields__ or not equals:
                roles = ", ".join(self.__dataclass_fields__)
                raise DataError(f"columns: {item!r} is no ROLE=COLUMN; the roles are {roles}")
            found.setdefault(role, []).extend([column] if column else [])
        for role, names in found.items():
            if role != "captions" and len(names) > 1:
                raise DataError(f"columns: {role} is given {len(names)} times; give it once")
        changed: dict[str, Any] = {
            role: tuple(names) if role == "captions" else "".join(names)
            for role, names in found.items()
        }
        return replace(self, **changed)

    def all(self) -> list[tuple[str, str]]:
        """Every role and its column."""
        roles = ("url", "width", "height", "hash", "times")
        single = [(role, getattr(self, role)) for role in roles if getattr(self, role)]
        return [*(("captions", name) for name in self.captions), *single]


KINDS = {
    "webdataset": Columns((TXT,), "", "width", "height", "sha256"),
    "recap": Columns(("re_caption", "org_caption"), "url", hash="sha256"),
    "coyo": Columns(("text",), "url", "width", "height"),
    "laion": Columns(("TEXT",), "URL", "WIDTH", "HEIGHT", "hash"),
    "panda": Columns(("caption",), "url", times="timestamp"),
}


def lists(source: Path) -> list[Path]:
    """The lists that are meant: a file, or all of a folder by name; DataError if there is none."""
    found = sorted(source.iterdir()) if source.is_dir() else [source]
    kinds = (path for path in found if path.suffix.lower() in _LISTS and path.is_file())
    found = [path for path in kinds if not path.name.startswith(".")]
    if not found:
        raise DataError(f"{source} is no list, nor a folder of them: {', '.join(sorted(_LISTS))}")
    return found


def check_columns(path: Path, columns: Columns, name: str | None) -> None:
    """Raises DataError unless a list has every column that is asked for.

    Args:
        name: of files, with ``{column}`` in it.
    """
    there = _names(path)
    wanted = [*columns.all(), *(("name", column) for column in fields_of(name or ""))]
    for role, column in wanted:
        if column not in there:
            remedy = "--name" if role == "name" else f"--columns {role}=NAME"
            out = "" if role in ("name", "captions") else f", or {role}= to go without"
            raise DataError(
                f"{path} has no column {column!r} ({role}); it has {', '.join(there)}. Give "
                f"{remedy}{out}"
            )


def fields_of(name: str) -> list[str]:
    """The columns that ``name`` asks for, as ``{column}``."""
    return re.findall(r"\{([^{}]+)\}", name)


def filled(name: str, row: Mapping[str, Any]) -> str:
    """``name`` with the values of a row in place of its columns."""
    return re.sub(r"\{([^{}]+)\}", lambda field: str(row[field[1]]), name)


@dataclass(frozen=True)
class Piece:
    """Some rows of a list, one behind the other.

    Attributes:
        path: the list.
        first: number of the first of them.
        groups: which row groups they are; None for all rows of a list that has no such groups.
    """

    path: Path
    first: int = 0
    groups: tuple[int, ...] | None = None

    def told(self) -> list[Any]:
        """What it is called, for JSON."""
        return [str(self.path), self.first, self.groups]


def pieces(path: Path) -> Iterator[Piece]:
    """The pieces of a list: of parquet some row groups each, else all of it."""
    if path.suffix.lower() != ".parquet":
        yield Piece(path)
        return
    with _read(path), parquet.ParquetFile(path) as file:
        first, end, groups = 0, 0, []
        for group in range(file.num_row_groups):
            groups.append(group)
            end += file.metadata.row_group(group).num_rows
            if end - first >= _PIECE or group + 1 == file.num_row_groups:
                yield Piece(path, first, tuple(groups))
                first, groups = end, []


def rows(piece: Piece, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a piece, each a table of the columns wanted; DataError if it is damaged."""
    with _read(piece.path):
        for batch in _batches(piece, list(dict.fromkeys(wanted))):
            yield from batch.to_pylist()


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """DataError if a list is damaged."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; download it again") from error


def _batches(piece: Piece, wanted: list[str]) -> Iterator[pa.RecordBatch]:
    path, suffix = piece.path, piece.path.suffix.lower()
    if suffix == ".parquet":
        with parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
            yield from file.iter_batches(_BATCH, row_groups=piece.groups, columns=wanted)
    elif suffix == ".csv":
        texts = dict.fromkeys(wanted, pa.string())
        with pyarrow.csv.open_csv(
            path,
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=texts, include_columns=wanted),
        ) as reader:
            yield from reader
    else:
        with pyarrow.json.open_json(path) as reader:
            for batch in reader:
                yield batch.select(wanted)


def _names(path: Path) -> list[str]:
    with _read(path):
        if path.suffix.lower() == ".parquet":
            return list(parquet.read_schema(path).names)
        if path.suffix.lower() == ".csv":
            with pyarrow.csv.open_csv(path) as reader:
                return list(reader.schema.names)
        with pyarrow.json.open_json(path) as reader:
            return list(reader.schema.names)


def listed(value: Any) -> list[Any]:
    """A list, which CSV spells as text; a value that is none alone in one, None as none at all."""
    if value is None:
        return []
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.lstrip().startswith("["):
        readers: tuple[Callable[[str], Any], ...] = (json.loads, ast.literal_eval)
        for read in readers:
            try:
                found = read(value)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(found, list):
                return found
    return [value]


def seconds(value: Any) -> float:
    """Of a number, or of ``h:mm:ss.mmm``; ValueError for anything else."""
    if isinstance(value, str):
        total = 0.0
        for part in value.split(":"):
            total = 60 * total + float(part)
        return total
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no time")
    return float(value)
