"""How the tensors of a ``.pt`` file are read while nothing in it is run, imported or believed.

``torch.save`` writes a zip archive: a pickle, and beside it the bytes of every storage. A pickle is
a program, so it is not given to an unpickler. Its operations are played here on plain values alone:
the few names that stand for a tensor are known by their spelling, every other name and whatever is
made of it becomes an :class:`Inert` object. Every byte of the archive is held against its checksum,
and what the pickle says of a storage against the archive, before anything is taken from it.
"""

from __future__ import annotations

import errno
import math
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**24  # bytes read and checked at once
_LOCAL = struct.Struct("<4s5H3I2H")  # a member's own header in a zip archive
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of a member
_DIMENSIONS = 64  # torch's own limit
_OPERATIONS = 2**24  # of a pickle; one of 8.5B parameters and its optimiser has 200,000

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "Untyped": torch.uint8,
}
_STORAGE = re.compile(r"torch(?:_npu)?(?:\.\w+)? (\w+)Storage")  # "torch.cuda FloatStorage"
_DTYPES = {
    str(dtype).replace(".", " "): dtype
    for dtype in (
        *_STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz, torch.uint16, torch.uint32, torch.uint64,
    )
}  # fmt: skip
_MAPPINGS = ("collections OrderedDict", "collections defaultdict", "builtins dict")
_PLAIN_TENSORS = ("torch Tensor", "torch._tensor Tensor", "torch.nn.parameter Parameter")


@dataclass(frozen=True, eq=False)
class Inert:
    """What stands in the place of an object that is not read; it can do nothing."""

    what: str  # of which kind the object was, such as "argparse.Namespace"


class _Global(Inert):
    """A name in a pickle, ``what`` its module and itself with a space between; never looked up."""


@dataclass(frozen=True)
class _Storage:
    """Where the pickle says that the numbers of a tensor lie."""

    key: str
    dtype: torch.dtype
    numel: int


_Maker = Callable[[_Storage, int, tuple[int, ...], tuple[int, ...]], Tensor]


def read(path: Path, progress: Callable[[int], object] = int) -> Any:
    """What ``torch.save`` wrote into a file: tensors, mapped rather than read, and plain values.

    Args:
        path: a zip archive, as every torch since 1.6 writes it.
        progress: called with the number of bytes checked since the last call.

    Returns:
        Dicts, lists, tuples, text, bytes and numbers as they were, ordered and default dicts as
        dicts, parameters as tensors, all on the CPU; :class:`Inert` for everything else.

    Raises:
        ValueError: if the archive is damaged, compressed, encrypted or without checksums; or if
            the pickle is damaged or lies about the archive.
    """
    with path.open("rb") as file:
        try:
            members, root = _members(file)
            _check(file, members.values(), progress)
            data = _bytes_of(file, members[f"{root}/data.pkl"])
            if members.keys() & {f"{root}/constants.pkl"}:
                raise ValueError("it is a TorchScript archive, a program; save its state_dict()")
            order = members.get(f"{root}/byteorder")
            if order is not None and _bytes_of(file, order) != b"little":
                raise ValueError("its bytes are in big-endian order; save it on another machine")
            storages = _Storages(path, file, members, f"{root}/data/")
            return _Machine(storages.tensor).run(data)
        except Exception as error:  # a file made to do harm can go wrong anywhere
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk
                raise
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"{path} is refused: {reason}. It must be what torch.save (since torch 1.6) "
                "writes, whole and not compressed; fetch it again, or save the weights anew"
            ) from error


@dataclass(frozen=True)
class _Member:
    """A file in the archive, uncompressed: where its bytes lie, and their checksum."""

    name: str
    start: int
    size: int
    crc: int

    @property
    def end(self) -> int:
        return self.start + self.size


def _members(file: BufferedReader) -> tuple[dict[str, _Member], str]:
    """The files of the archive by name, and the folder in it which all is in."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError("it is no whole zip archive, cut off or of another kind") from error
    found: dict[str, _Member] = {}
    for info in archive.infolist():
        if info.filename in found:
            raise ValueError(f"{info.filename!r} is in it twice")
        found[info.filename] = _member(file, info)
    end = 0
    for member in sorted(found.values(), key=lambda member: member.start):
        if member.start < end or member.end > archive.start_dir:
            raise ValueError(f"{member.name!r} overlaps what lies after it")
        end = member.end
    roots = [name.partition("/")[0] for name in found if re.fullmatch("[^/]+/data.pkl", name)]
    if len(roots) != 1:
        raise ValueError(f"it has {len(roots)} files named data.pkl in a folder, not one")
    return found, roots[0]


def _member(file: BufferedReader, info: zipfile.ZipInfo) -> _Member:
    """Where a file's bytes lie, by its own header, which must agree with the table of contents."""
    file.seek(max(info.header_offset, 0))
    head = file.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\x03\x04":
        raise ValueError(f"{info.filename!r} is not where the table of contents says")
    _, _, flags, method, _, _, _, _, _, name, extra = _LOCAL.unpack(head)
    if (flags | info.flag_bits) & _ENCRYPTED:
        raise ValueError(f"{info.filename!r} is encrypted")
    if method or info.compress_type:
        raise ValueError(
            f"{info.filename!r} is compressed, as by packing the archive anew; unpack it and pack "
            "it with `zip -0 -r`"
        )
    if info.file_size != info.compress_size:
        raise ValueError(f"{info.filename!r} has two different sizes")
    named = file.read(name).decode("utf-8" if flags & 0x800 else "cp437")
    if named != info.orig_filename:
        raise ValueError(f"{info.filename!r} has another name in its own header")
    start = info.header_offset + _LOCAL.size + name + extra
    return _Member(info.filename, start, info.file_size, info.CRC)


def _check(
    file: BufferedReader, members: Iterable[_Member], progress: Callable[[int], object]
) -> None:
    """Every byte of every member against its CRC-32; read, not mapped, so that memory stays low."""
    filled = [member for member in members if member.size]
    if not any(member.crc for member in filled):
        raise ValueError(
            "it has no checksums, as saved under torch.serialization.set_crc32_options(False), so "
            "damage would not show"
        )
    buffer = memoryview(bytearray(_CHUNK))
    for member in sorted(filled, key=lambda member: member.start):
        file.seek(member.start)
        left, crc = member.size, 0
        while left:
            got = file.readinto(buffer[: min(left, _CHUNK)])
            if not got:
                raise ValueError(f"{member.name!r} is cut off")
            crc = zlib.crc32(buffer[:got], crc)
            left -= got
            progress(got)
        if crc != member.crc:
            raise ValueError(f"{member.name!r} does not have its CRC-32, so the file is damaged")


def _bytes_of(file: BufferedReader, member: _Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


@dataclass
class _Storages:
    """The storages of an archive, each a part of one mapping of the file."""

    path: Path
    file: BufferedReader
    members: Mapping[str, _Member]
    folder: str
    mapped: Tensor = field(init=False)  # uint8, the whole file
    copies: dict[str, Tensor] = field(default_factory=dict)  # uint8, by name of a member

    def __post_init__(self) -> None:
        size = self.path.stat().st_size
        self.mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)

    def tensor(
        self, of: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
    ) -> Tensor:
        """A view of the storage, of numbers from 0; ValueError unless all of it lies inside."""
        member = self.members.get(self.folder + of.key)
        if member is None:
            raise ValueError(f"the pickle asks for storage {of.key[:40]!r}, which is not there")
        item = of.dtype.itemsize
        if not 0 <= member.size - of.numel * item < item:
            raise ValueError(f"storage {of.key!r} has {member.size} bytes, not {of.numel} x {item}")
        numel = math.prod(size)
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if numel > of.numel or (numel and last >= of.numel):
            raise ValueError(f"a tensor of storage {of.key!r} reaches beyond it")
        held, start = self.mapped, member.start
        if start % item:  # as in an archive that was packed anew
            held, start = self._copy(member), 0
        where = start // item + offset if numel else 0
        return torch.empty(0, dtype=of.dtype).set_(held.untyped_storage(), where, size, stride)

    def _copy(self, member: _Member) -> Tensor:
        if member.name not in self.copies:
            copy = self.copies[member.name] = torch.empty(member.size, dtype=torch.uint8)
            self.file.seek(member.start)
            self.file.readinto(copy.numpy().data)
        return self.copies[member.name]


class _Machine:
    """Plays the operations of a pickle on plain values; nothing outside is called but ``tensor``.

    Args:
        tensor: makes a tensor of a storage, an offset, a size and strides, or refuses.
    """

    def __init__(self, tensor: _Maker) -> None:
        self.tensor = tensor
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the pickle leaves; ValueError, IndexError or KeyError if it makes no sense."""
        for count, (operation, value, _) in enumerate(pickletools.genops(data)):
            if count > _OPERATIONS:
                raise ValueError(f"its pickle has more than {_OPERATIONS:,} operations")
            if operation.name == "STOP":
                break
            self._do(operation.name, value)
        (result,) = self.stack
        return result

    def _do(self, name: str, value: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                self._popped()
            case "DUP":
                stack.append(stack[-1])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_SET":
                stack.append(Inert("set"))
            case "LIST":
                items = self._popped()
                self.stack.append(items)
            case "TUPLE":
                items = self._popped()
                self.stack.append(tuple(items))
            case "DICT":
                items = self._popped()
                self.stack.append({})
                self._set(items)
            case "FROZENSET":
                self._popped()
                self.stack.append(Inert("frozenset"))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                items = [stack.pop() for _ in range(count)]
                stack.append(tuple(reversed(items)))
            case "APPEND":
                self._append([stack.pop()])
            case "APPENDS":
                self._append(self._popped())
            case "ADDITEMS":
                self._popped()
            case "SETITEM":
                last = stack.pop()
                self._set([stack.pop(), last])
            case "SETITEMS":
                self._set(self._popped())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[value] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "GLOBAL":
                stack.append(_Global(value))
            case "STACK_GLOBAL":
                last = stack.pop()
                stack.append(_Global(f"{_text(stack.pop())} {_text(last)}"))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._made(stack.pop(), arguments))
            case "NEWOBJ_EX":
                stack.pop()
                arguments = stack.pop()
                stack.append(self._made(stack.pop(), arguments))
            case "OBJ":
                kind, *rest = self._popped()
                self.stack.append(self._made(kind, tuple(rest)))
            case "INST":
                items = self._popped()
                self.stack.append(self._made(_Global(value), tuple(items)))
            case "BUILD":
                stack.pop()
                if not isinstance(stack[-1], (Inert, dict, Tensor)):
                    raise ValueError(f"its pickle gives attributes to a {_kind(stack[-1])}")
            case "BINPERSID":
                stack.append(_stored(stack.pop()))
            case "PERSID" | "EXT1" | "EXT2" | "EXT4" | "NEXT_BUFFER" | "READONLY_BUFFER":
                raise ValueError(f"its pickle does {name}, which torch.save does not write")
            case _:  # all that is left are numbers, text and bytes
                stack.append(value)

    def _popped(self) -> list[Any]:
        """What lies above the last mark."""
        above, self.stack = self.stack, self.marked.pop()
        return above

    def _append(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if isinstance(held, list):
            held.extend(items)
        elif not isinstance(held, Inert):
            raise ValueError(f"its pickle appends to a {_kind(held)}")

    def _set(self, items: list[Any]) -> None:
        held = self.stack[-1]
        if isinstance(held, dict):
            held.update(_paired(zip(items[::2], items[1::2], strict=True)))
        elif not isinstance(held, Inert):
            raise ValueError(f"its pickle puts items into a {_kind(held)}")

    def _made(self, kind: Any, arguments: Any) -> Any:
        """What calling ``kind`` would have made: a tensor, a dict, or something inert."""
        if not isinstance(kind, Inert) or not isinstance(arguments, tuple):
            raise ValueError(f"its pickle calls a {_kind(kind)}")
        if not isinstance(kind, _Global):
            return kind
        module, _, name = kind.what.partition(" ")
        inert = Inert(f"{module}.{name}")
        match kind.what, arguments:
            case known, _ if known in _MAPPINGS:
                return _mapping(arguments)
            case "torch Size", ((*size,),):
                return tuple(size)
            case "torch._utils _rebuild_tensor", (_Storage() as of, offset, size, stride):
                return self._tensor(of, offset, size, stride)
            case (
                "torch._utils _rebuild_tensor_v2",
                (_Storage() as of, offset, size, stride, _, _, *more),
            ) if not _is_lazy(more):
                return self._tensor(of, offset, size, stride)
            case (
                "torch_npu.utils.storage _rebuild_npu_tensor",
                (_Storage() as of, offset, size, stride, _, _, _),
            ):  # the last is the format on an NPU; what is saved has the plain one
                return self._tensor(of, offset, size, stride)
            case (
                "torch._utils _rebuild_tensor_v3",
                (_Storage() as of, offset, size, stride, _, _, _Global() as dtype, *more),
            ) if dtype.what in _DTYPES and of.dtype == torch.uint8 and not _is_lazy(more):
                to = _DTYPES[dtype.what]
                typed = _Storage(of.key, to, of.numel // to.itemsize)
                return self._tensor(typed, offset, size, stride)
            case (
                "torch._utils _rebuild_parameter"
                | "torch._utils _rebuild_parameter_with_state"
                | "torch.nn.parameter Parameter"
                | "torch._utils _rebuild_device_tensor_from_cpu_tensor",
                (Tensor() | Inert() as data, *_),
            ):
                return data
            case (
                "torch._tensor _rebuild_from_type_v2",
                (_Global() as rebuild, _Global() as of, tuple(inner), _),
            ) if of.what in _PLAIN_TENSORS:
                return self._made(rebuild, inner)
            case "torch._utils _rebuild_meta_tensor_no_storage", _:
                return Inert("tensor without values, of the meta device")
        return inert

    def _tensor(self, of: _Storage, offset: Any, size: Any, stride: Any) -> Tensor:
        """A tensor, whose numbers are at least numbers."""
        numbers = [offset, *size, *stride]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"a tensor of storage {of.key!r} has a size that is none")
        if len(size) > _DIMENSIONS or len(size) != len(stride):
            raise ValueError(f"a tensor of storage {of.key!r} has {len(size)} dimensions")
        return self.tensor(of, offset, tuple(size), tuple(stride))


def _stored(persistent: Any) -> _Storage | Inert:
    """The storage that a pickle names in place of its bytes."""
    match persistent:
        case ("storage", _Global() as kind, str(key), _, int(numel)) if numel >= 0:
            named = _STORAGE.fullmatch(kind.what)
            if named is None or named[1] not in _STORAGES:
                return Inert(kind.what.replace(" ", "."))
            return _Storage(key, _STORAGES[named[1]], numel)
    raise ValueError("its pickle refers to something that is no storage")


def _mapping(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """A dict of a mapping's arguments: pairs, a dict, or what makes its default values."""
    made: dict[Any, Any] = {}
    for argument in arguments:
        if isinstance(argument, dict):
            made.update(argument)
        elif isinstance(argument, (list, tuple)):
            made.update(_paired(argument))
    return made


def _paired(pairs: Any) -> dict[Any, Any]:
    """A dict; a key that is no plain value, whose hash could take forever, becomes inert."""
    plain = (str, int, float, bytes, type(None))
    return {key if isinstance(key, plain) else Inert(_kind(key)): value for key, value in pairs}


def _is_lazy(metadata: Sequence[Any]) -> bool:
    """Whether a tensor is to be negated or conjugated after it was read."""
    return any(
        not isinstance(entry, (dict, type(None)))
        or (isinstance(entry, dict) and any(entry.get(name) for name in ("neg", "conj")))
        for entry in metadata
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"its pickle takes a {_kind(value)} for a name")
    return value


def _kind(value: Any) -> str:
    return value.what if isinstance(value, Inert) else type(value).__name__
