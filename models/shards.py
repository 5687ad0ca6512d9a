"""How weights become a folder of files that is complete and checkable, or is not there at all.

The folder is as diffusers writes it: safetensors in pieces and an index. A manifest adds the size
and SHA-256 of every file, because safetensors itself keeps no checksum: a flipped bit would load as
a wrong weight. Tensors are made and written one at a time, so memory does not grow with the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
MANIFEST = "manifest.json"

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
HEAD = 512  # bytes that tell what a file is
_CHUNK = 2**24  # bytes written, hashed and reported at once


@dataclass(frozen=True)
class Lazy:
    """A tensor of known shape and dtype that is made when it is needed, and not kept."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """One that is there already, in memory or in a mapped file."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> Lazy:
        """One whose numbers are cast when it is made."""
        return Lazy(self.shape, dtype, lambda: self.make().to(dtype))


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, which appears at ``path`` if the block ends well, and else not at all.

    Until then it lies in a hidden folder beside ``path``. Everything is on disk before the rename.

    Raises:
        ValueError: if ``path`` exists, or its parent does not.
    """
    path = Path(os.path.abspath(path))
    refuse_existing(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as around:
        folder = Path(around) / path.name
        folder.mkdir()
        yield folder
        for file in (*folder.iterdir(), folder):
            sync(file)
        refuse_existing(path)
        os.rename(folder, path)
        sync(path.parent)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless a folder can be made at ``path``, by trying it under another name."""
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; give a new name, or remove it first")
    parent, name = Path(os.path.abspath(path)).parent, Path(os.path.abspath(path)).name
    if not parent.is_dir():
        raise ValueError(f"{parent} is no folder, so {path} cannot be made; make it first")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be made: {error.strerror}; choose another place, or see that it may be "
            "written to"
        ) from error


def write(
    folder: Path,
    tensors: Mapping[str, Lazy],
    *,
    max_shard_bytes: int,
    about: Mapping[str, Any],
    progress: Callable[[int], object],
) -> None:
    """Fill ``folder`` with ``tensors``, their index, and a manifest of every file in it.

    Args:
        folder: exists; what lies in it already, such as a config, goes into the manifest too.
        tensors: by name, in the order in which they are to lie in the files.
        max_shard_bytes: of tensor data in one file; a larger tensor gets a file of its own.
        about: what the manifest should say besides, in terms of JSON.
        progress: called with the number of bytes written since the last call.

    Raises:
        ValueError: for a dtype that safetensors has no name for, a ``max_shard_bytes`` below 1,
            or less space than the tensors take; before anything is written.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which cannot be written; convert it first")
    total = sum(tensor.nbytes for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if free < total:
        raise ValueError(f"{total:,} bytes are to be written but only {free:,} are free; make room")
    shards = _split(tensors, max_shard_bytes)
    place: dict[str, str] = {}
    digests: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {name: tensors[name] for name in names}
        digests[file] = _write_shard(folder / file, shard, progress)
        place |= dict.fromkeys(names, file)
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
    files = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": digests.get(file.name) or sha256(file),
        }
        for file in sorted(folder.iterdir())
    }
    _write_json(folder / MANIFEST, {**about, "files": files})


def verify(folder: str | os.PathLike[str]) -> None:
    """Read every file that the manifest of ``folder`` names, and compare size and SHA-256.

    Raises:
        ValueError: naming the first file that is missing, differs or lies outside the folder; also
            if the manifest is missing or no such manifest, or leaves out a file of the index.
    """
    files = _table(_read_json(inside(folder, MANIFEST)), "files", Path(folder) / MANIFEST)
    for name, entry in files.items():
        file = inside(folder, name)
        if not file.is_file():
            raise ValueError(f"{file} is missing; {MANIFEST} names it. Copy the folder again")
        size = file.stat().st_size
        if not isinstance(entry, dict) or size != entry.get("bytes"):
            raise ValueError(f"{file} has {size} bytes, not those of {MANIFEST}. Copy it again")
        if sha256(file) != entry.get("sha256"):
            raise ValueError(f"{file} does not have the SHA-256 of {MANIFEST}. Copy it again")
    index = _index(folder)
    named = _weight_map(folder, index).values() if index else ()
    left_out = sorted({*named} - set(files))
    if left_out:
        raise ValueError(f"{MANIFEST} of {folder} leaves out {left_out}, which {index} names")


def read(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors that the index of ``folder`` names, mapped from their files, not yet read.

    A folder with one safetensors file needs no index. The tensors are as trustworthy as the files:
    :func:`verify` first where there is a manifest.

    Raises:
        ValueError: if there is neither or there are several; if the index is damaged or leads out
            of the folder; or if a file does not hold exactly what the index expects in it.
    """
    files = sorted(file.name for file in Path(folder).glob("*.safetensors"))
    index = _index(folder)
    if index is None:
        if len(files) == 1:
            return read_file(inside(folder, files[0]))
        raise ValueError(
            f"{folder} holds {len(files)} safetensors files and no index, {INDEX}; name the file"
        )
    place = _weight_map(folder, index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(place.values())):
        held = read_file(inside(folder, name))
        expected = {tensor for tensor, file in place.items() if file == name}
        if held.keys() != expected:
            wrong = sorted(held.keys() ^ expected)[:10]
            raise ValueError(f"{index} and {name} of {folder} disagree about {wrong}")
        tensors |= held
    return tensors


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped, not yet read; ValueError if it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing or no file")
    try:
        return load_file(file)
    except SafetensorError as error:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
        what = "" if is_safetensors(head) else f", but {described(head)}"
        raise ValueError(f"{file} is no safetensors file, or damaged{what}: {error}") from error


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with ``head`` has a header as safetensors has."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27


def described(head: bytes) -> str:
    """What a file that begins with ``head``, and holds no weights, may be."""
    text = head.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for start, what in (
        (b"version https://git-lfs", "a pointer of Git LFS and not the file; run `git lfs pull`"),
        (b"<", "a web page or XML, such as a site shows in place of the file"),
        (b"{", "JSON, such as a site answers in place of the file"),
        (b"pk\x03\x04", "a zip archive"),
        (b"\x1f\x8b", "packed by gzip; unpack it"),
        (b"7z\xbc\xaf", "packed by 7-Zip; unpack it"),
        (b"rar!", "packed by RAR; unpack it"),
        (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it"),
        (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", "by a torch before 1.6"),
        (b"\x80", "a bare pickle"),
    ):
        if text.startswith(start.lower()):
            return what
    return "of an unknown kind" if head.strip(b"\0") else "empty, or begins with zeros alone"


def inside(root: str | os.PathLike[str], name: object) -> Path:
    """The file ``name`` of the folder ``root``, where ``name`` was read from a file.

    Raises:
        ValueError: if it leads out of ``root``, by itself or by a link, or is no name at all.
    """
    if isinstance(name, str) and name and "\0" not in name:
        path = Path(root, name)
        if path.resolve().is_relative_to(Path(root).resolve()):
            return path
    raise ValueError(f"{name!r} is no file inside {root}; names must stay in their folder")


def _split(tensors: Mapping[str, Lazy], most: int) -> list[list[str]]:
    """Names, file by file, in order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Mapping[str, Lazy], progress: Callable[[int], object]) -> str:
    """One safetensors file, tensor by tensor; its SHA-256, taken from what was to be written.

    Layout: length of the header as eight bytes, header as JSON padded to eight, data. Wide dtypes
    come first, so that every tensor starts at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    order = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    end = 0
    for name, tensor in order:
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for head in (len(text).to_bytes(8, "little"), text):
            digest.update(head)
            file.write(head)
        for name, promised in order:
            made = promised.make().detach()
            if tuple(made.shape) != promised.shape or made.dtype != promised.dtype:
                raise ValueError(f"{name} came out as {list(made.shape)} {made.dtype}")
            data = made.contiguous().flatten().view(torch.uint8).numpy().data
            for at in range(0, len(data), _CHUNK):
                chunk = data[at : at + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                progress(len(chunk))
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def _table(content: object, key: str, path: Path) -> dict[str, Any]:
    """The JSON object under ``key``."""
    table = content.get(key) if isinstance(content, dict) else None
    if not isinstance(table, dict):
        raise ValueError(f"{path} has no table {key!r}; it is damaged, or another kind of file")
    return table


def _index(folder: str | os.PathLike[str]) -> str | None:
    """The name of the index in ``folder``, None if there is none."""
    found = sorted(file.name for file in Path(folder).glob("*.safetensors.index.json"))
    if len(found) > 1:
        raise ValueError(f"{folder} has several indexes, {found}; leave one, or name a file")
    return found[0] if found else None


def _weight_map(folder: str | os.PathLike[str], index: str) -> dict[str, str]:
    """The file that holds each tensor, by the ``index`` of ``folder``."""
    path = inside(folder, index)
    place = _table(_read_json(path), "weight_map", path)
    if not all(isinstance(file, str) for file in place.values()):
        raise ValueError(f"{path} names files by something else than text; it is damaged")
    return place
