"""A `.pt` file gives its tensors bit for bit or is refused, and nothing in it is ever run."""

import argparse
import collections
import contextlib
import functools
import io
import itertools
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from skiparse.models import archive, checkpoints
from skiparse.models.archive import Inert

PLAIN = {
    "weights": {"a.weight": torch.randn(3, 4), "b": torch.randn(5).bfloat16()},
    "turned": torch.randn(4, 3).T,
    "part": torch.arange(10.0)[3:7],
    "every dtype": [
        torch.arange(4).to(dtype)
        for dtype in (
            torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
            torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16,
        )
    ],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "numbers": (1, -1, 2**70, 1.5, True, False, None, 300, 70000),
    "text": ["ä", "", "x" * 300],
    3: "three",
}  # fmt: skip


def alike(left, right):
    if isinstance(left, torch.Tensor):
        if not isinstance(right, torch.Tensor) or left.dtype != right.dtype:
            return False
        both = (left.contiguous().view(-1), right.contiguous().view(-1))
        left_bytes, right_bytes = (x.view(torch.uint8) for x in both)
        return left.shape == right.shape and torch.equal(left_bytes, right_bytes)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        pairs = zip(left, right, strict=True)
        return type(left) is type(right) and all(alike(x, y) for x, y in pairs)
    return left == right


@pytest.fixture
def file(tmp_path):
    return tmp_path / "in.pt"


def refused(file, match):
    with pytest.raises(ValueError, match=match) as caught:
        archive.read(file)
    assert str(file) in str(caught.value)


def repacked(file, members=(), *, drop=(), method=zipfile.ZIP_STORED, extra=b""):
    """The archive written anew by another program, some members changed, added or left out."""
    with zipfile.ZipFile(file) as old:
        held = {info.filename: old.read(info) for info in old.infolist()}
    held |= dict(members)
    with zipfile.ZipFile(file, "w", method) as new:
        for name, data in held.items():
            if name not in drop:
                info = zipfile.ZipInfo(name)
                info.compress_type, info.extra = method, extra
                new.writestr(info, data)


def made_of(file, program, storages=()):
    """An archive whose pickle is `program`."""
    with zipfile.ZipFile(file, "w") as new:
        new.writestr("x/data.pkl", program)
        new.writestr("x/byteorder", b"little")
        for key, data in dict(storages).items():
            new.writestr(f"x/data/{key}", data)
    return file


# What is read.


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_all_that_is_plain_is_read_as_it_was(file, protocol):
    torch.save(PLAIN, file, pickle_protocol=protocol)
    assert alike(archive.read(file), PLAIN)


def test_tensors_in_every_wrapping_are_read(file):
    weight = torch.randn(4, 3)
    marked = torch.randn(2)
    marked.tensor_model_parallel = True  # as Megatron does
    parameter = torch.nn.Parameter(torch.randn(3))
    attributed = torch.nn.Parameter(torch.randn(3))
    attributed.partition_dim = 0
    ordered = collections.OrderedDict(a=weight)
    ordered._metadata = {"": {"version": 1}}
    default = collections.defaultdict(list, a=weight)
    torch.save([weight, marked, parameter, attributed, ordered, default], file)
    read = archive.read(file)
    for one, other in zip(read, (weight, marked, parameter.data, attributed.data), strict=False):
        assert type(one) is torch.Tensor
        assert torch.equal(one, other)
        assert not one.requires_grad
    assert alike(read[4], {"a": weight})
    assert alike(read[5], {"a": weight})


def test_tensors_that_share_memory_share_it(file):
    base = torch.arange(12.0)
    torch.save({"all": base, "row": base.view(3, 4)[1], "again": base}, file)
    read = archive.read(file)
    assert torch.equal(read["row"], base[4:8])
    assert read["all"].data_ptr() == read["again"].data_ptr()
    assert read["row"].data_ptr() == read["all"].data_ptr() + 16


def test_tensors_of_an_npu_are_read(file, monkeypatch):
    """torch_npu before torch 2.1 had a function of its own in the place of torch's."""
    program = tensor_program().replace(
        b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
    ).replace(b"ctorch\nFloatStorage\n", b"ctorch_npu.npu\nFloatStorage\n")  # fmt: skip
    program = program.replace(b"tR.", b"K\x02tR.")
    made_of(file, program, {"0": bytes(16)})
    assert torch.equal(archive.read(file), torch.zeros(4))


@pytest.mark.parametrize("of", [b"torch\nTensor", b"torch.nn.parameter\nParameter", b"other\nInt4"])
def test_tensors_of_a_type_of_their_own_are_inert(file, of):
    """What their numbers mean is up to the type."""
    inner = tensor_program()[2:-2].replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"", 1)
    program = b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\n"
    made_of(file, program + b"c" + of + b"\n" + inner + b"}tR.", {"0": bytes(16)})
    assert isinstance(archive.read(file), Inert if of.startswith(b"other") else torch.Tensor)


class Evil:
    """Whatever is unpickled of it runs a function."""

    def __init__(self, function, *arguments):
        self.made = function, arguments

    def __reduce__(self):
        return self.made


class Opaque:
    """Of a program that is not here."""

    def __init__(self):
        self.held = {"lr": 1, "inner": [np.arange(3)]}


def test_what_is_no_tensor_is_inert(file):
    stream = io.BytesIO(b"state")
    torch.save(
        {
            "args": argparse.Namespace(lr=1e-4, inner=Opaque()),
            "rng_state": [{"np": ("MT19937", np.arange(6), 3), "set": {1, 2}}],
            "extra": stream,
            "partial": functools.partial(os.getcwd),
            "class": Opaque,
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "bytes": b"1",
            "w": torch.ones(2),
        },
        file,
    )
    read = archive.read(file)
    assert torch.equal(read.pop("w"), torch.ones(2))
    (rng,) = read.pop("rng_state")
    assert isinstance(rng["np"][1], Inert)
    assert rng["np"][::2] == ("MT19937", 3)
    assert isinstance(rng["set"], Inert)
    kinds = {name: value.what for name, value in read.items()}
    assert kinds["args"] == "argparse.Namespace"
    assert kinds["extra"] == "_io.BytesIO"
    assert kinds["partial"] == "functools.partial"
    assert all(type(value).__mro__[-2] is Inert for value in read.values())


def test_what_is_no_plain_tensor_is_inert(file):
    sparse = torch.eye(3).to_sparse()
    negated = torch.ones(2, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    meta = torch.empty(2, device="meta")
    odd = {"sparse": sparse, "neg": negated, "meta": meta}
    torch.save(odd, file)
    read = archive.read(file)
    assert all(isinstance(value, Inert) for value in read.values())
    assert "meta device" in read["meta"].what


# What is never run.


def tensor_program(
    storage=b"ctorch\nFloatStorage\n", key=b"0", numel=4, offset=0, size=(4,), stride=(1,)
):
    """The pickle of one tensor, as torch writes it."""

    def number(n):
        return b"I%d\n" % n

    def tupled(numbers):
        return b"(" + b"".join(map(number, numbers)) + b"t"

    return (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage" + storage
        + b"X" + struct.pack("<I", len(key)) + key + b"X\x03\0\0\0cpu" + number(numel) + b"tQ"
        + number(offset) + tupled(size) + tupled(stride) + b"\x89NtR."
    )  # fmt: skip


ATTACKS = {
    "reduce": b"cos\nmkdir\n(X{ran}tR.",
    "reduce of posix": b"cposix\nmkdir\n(X{ran}tR.",
    "reduce by two names": b"\x80\x04X{os}X{mkdir}\x93(X{ran}tR.",
    "a nested name": b"\x80\x04X{os}X{path.os.mkdir}\x93(X{ran}tR.",
    "inst": b"(X{ran}ios\nmkdir\n.",
    "obj": b"(cos\nmkdir\nX{ran}o.",
    "newobj": b"cpathlib\nPath\n(X{ran}t\x81.",
    "newobj_ex": b"\x80\x04cos\nmkdir\n(X{ran}t}\x92.",
    "eval": b"cbuiltins\neval\n(X{__import__('os').mkdir('ran')}tR.",
    "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\nX{mkdir}tR(X{ran}tR.",
    "build of a function": b"cos\nmkdir\n}X{__call__}X{ran}sb(X{ran}tR.",
    "build of a dict": b"}(X{a}cos\nmkdir\n(X{ran}tRu}X{__class__}X{ran}sb.",
    "items of a function": b"cos\nmkdir\nX{a}X{ran}s(X{ran}tR.",
    "appended to a function": b"cos\nmkdir\nX{ran}a(X{ran}tR.",
    "state with a setter": b"cos\nmkdir\n)\x81}X{__setstate__}cos\nmkdir\nsb.",
    "a default factory": b"ccollections\ndefaultdict\n(cos\ngetcwd\ntRX{a}Ns.",
    "a rebuilt type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nctorch\nTensor\n"
    b"(X{ran}tNtR.",
    "a rebuilt type of another": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._tensor\n"
    b"_rebuild_from_type_v2\nctorch\nTensor\n(cos\nmkdir\nctorch\nTensor\n(X{ran}tNtNtR.",
    "hooks": b"ctorch._utils\n_rebuild_parameter\n(N\x88cos\nmkdir\n(X{ran}tRtR.",
    "a hidden loader": b"ctorch\nload\n(X{ran}tR.",
    "a module": b"ctorch.hub\nload\n(X{ran}tR.",
    "codecs": b"c_codecs\ndecode\n(X{ran}X{zlib}tR.",
}  # fmt: skip


def spelt(program):
    """`X{text}` as a pickled text."""
    parts = program.split(b"X{")
    done = parts[0]
    for part in parts[1:]:
        text, _, rest = part.partition(b"}")
        done += b"X" + struct.pack("<I", len(text)) + text + rest
    return done


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_run(attack, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = spelt(ATTACKS[attack])
    made_of(file, program)
    before, modules = sorted(os.listdir(tmp_path)), set(sys.modules)
    with contextlib.suppress(ValueError):
        read = archive.read(file)
        assert type(read) in (dict, *Inert.__subclasses__(), Inert)
    assert sorted(os.listdir(tmp_path)) == before
    assert set(sys.modules) == modules


def test_the_attacks_would_work_elsewhere(tmp_path, monkeypatch):
    """Else the test above could not fail."""
    monkeypatch.chdir(tmp_path)
    for attack in ("reduce", "reduce of posix", "inst", "obj", "reduce by two names", "eval"):
        pickle.loads(spelt(ATTACKS[attack]))
        (tmp_path / "ran").rmdir()


def test_no_global_is_looked_up(file, tmp_path, monkeypatch):
    """Not even one that would be harmless: importing runs a module."""
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for program in (b"cplanted\nf\n.", b"cplanted\nf\n(tR.", spelt(b"\x80\x04X{planted}X{f}\x93.")):
        assert isinstance(archive.read(made_of(file, program)), Inert)
    torch.save({"w": torch.ones(2), "x": Evil(os.mkdir, str(tmp_path / "ran"))}, file)
    assert archive.read(file)["x"].what == "posix.mkdir"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("program", "match"),
    [
        (b"", "pickle exhausted"),
        (b".", "is refused"),
        (b"N", "pickle exhausted"),
        (b"\xff.", "opcode"),
        (b"h\x05.", "5"),
        (b"0.", "is refused"),
        (b"t.", "is refused"),
        (b"NN.", "is refused"),
        (b"}Nb.", None),
        (b"]Nb.", "gives attributes to a list"),
        (b"K\x01Na.", "appends to a int"),
        (b"]NNs.", "puts items into a list"),
        (b"}(Nu.", "is refused"),
        (b"NtR.", "is refused"),
        (b"N)R.", "calls a NoneType"),
        (b"K\x01)\x81.", "calls a int"),
        (b"cos\nmkdir\nNR.", "calls a os mkdir"),
        (b"\x80\x04NN\x93.", "takes a NoneType for a name"),
        (b"Pabc\n.", "does PERSID"),
        (b"NQ.", "no storage"),
        (b")Q.", "no storage"),
        (b"\x82\x01.", "does EXT1"),
        (b"\x80\x05\x97.", "does NEXT_BUFFER"),
        (b"X\xff\xff\xff\x7fabc.", "is refused"),
        (b"\x8d" + b"\xff" * 8 + b"abc.", "is refused"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f.", "is refused"),
        (b"\x8b\xff\xff\xff\x7f.", "is refused"),
        (b"L" + b"9" * 10**6 + b"L\n.", "is refused"),
    ],
)
def test_pickles_that_make_no_sense(file, program, match):
    made_of(file, program)
    if match is None:
        assert archive.read(file) == {}
    else:
        refused(file, match)


def test_a_pickle_that_would_not_end(file, monkeypatch):
    monkeypatch.setattr(archive, "_OPERATIONS", 1000)
    made_of(file, b"N" + b"20" * 600 + b".")
    refused(file, "more than 1,000 operations")


@pytest.mark.parametrize(
    "program",
    [
        b"]" * 10**5 + b"a" * (10**5 - 1) + b".",  # lists in lists
        b"N" + b"\x85" * 10**5 + b".",  # tuples in tuples
        b"]q\0h\0a.",  # a list in itself
        b"}q\0K\x01h\0s.",  # a dict in itself
        b"N" + b"2\x86" * 60 + b".",  # a tuple of 2**60
        b"}N" + b"2\x86" * 60 + b"Ns.",  # which would take forever to hash
    ],
    ids=["lists", "tuples", "own list", "own dict", "doubled", "doubled key"],
)
def test_deep_and_endless_values_are_no_trouble(file, program, tmp_path):
    read = archive.read(made_of(file, program))
    with pytest.raises(ValueError, match=r"not weights by name|holds no tensors by name"):
        checkpoints.find(read, None, file, frozenset({"a"}))


def test_a_shared_value_is_walked_once(file):
    """Dicts whose every level names the one below twice."""
    program = b"}" + b"".join(
        spelt(b"q" + bytes([i]) + b"0}(X{a}h" + bytes([i]) + b"X{ema}h" + bytes([i]) + b"u")
        for i in range(100)
    )
    read = archive.read(made_of(file, program + b"."))
    with pytest.raises(ValueError, match="holds no tensors by name"):
        checkpoints.find(read, None, file, frozenset({"a"}))


# What the pickle says of the archive.


def test_a_tensor_is_held_against_its_storage(file):
    def of(**change):
        return made_of(file, tensor_program(**change), {"0": bytes(16), "../0": bytes(16)})

    of()
    assert torch.equal(archive.read(file), torch.zeros(4))
    for inside in (
        {"size": (2,), "offset": 2}, {"size": (2, 2), "stride": (2, 1)}, {"size": (2,), "stride":
        (3,)}, {"size": (0,), "offset": 0}, {"size": ()}, {"size": (2, 2), "stride": (1, 2)},
        {"size": (0, 2**40), "stride": (2**40, 1)},
    ):  # fmt: skip
        change = {"stride": (1,) * len(inside["size"])} | inside
        of(**change)
        assert tuple(archive.read(file).shape) == change["size"]
    for outside in (
        {"size": (5,)}, {"offset": 1}, {"stride": (2,)}, {"size": (2, 2), "stride": (3, 1)},
        {"size": (4,), "offset": 2**62}, {"size": (2,), "stride": (2**62,)},
        {"size": (2,) * 40, "stride": (0,) * 40}, {"size": (2**62, 2), "stride": (0, 0)},
    ):  # fmt: skip
        of(**outside)
        refused(file, "a tensor of storage '0' reaches beyond it")
    for odd in ({"size": (-1,)}, {"offset": -1}, {"stride": (-1,)}, {"size": (2**63,)}):
        of(**odd)
        refused(file, "has a size that is none")
    of(size=(1,) * 65, stride=(1,) * 65)
    refused(file, "has 65 dimensions")
    of(size=(2, 2))
    refused(file, "has 2 dimensions")
    for numel in (3, 5, 2**62, 10**30):
        of(numel=numel, size=(1,))
        refused(file, "storage '0' has 16 bytes, not")
    of(numel=-1)
    refused(file, "no storage")
    of(storage=b"ctorch\nDoubleStorage\n")
    refused(file, "has 16 bytes, not 4 x 8")
    of(storage=b"ctorch\nHalfStorage\n")
    refused(file, "has 16 bytes, not 4 x 2")
    of(key=b"1")
    refused(file, "asks for storage '1', which is not there")
    of(key=b"../byteorder")
    refused(file, "asks for storage '../byteorder', which is not there")
    of(storage=b"cos\nmkdir\n")
    assert isinstance(archive.read(file), Inert)
    of(storage=b"cos.torch\nFloatStorage\n")
    assert isinstance(archive.read(file), Inert)


# The archive.


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives_are_refused(file, method):
    torch.save(PLAIN, file)
    repacked(file, method=method)
    refused(file, "is compressed")
    refused(file, "zip -0 -r")


def test_archives_packed_anew_are_read(file):
    torch.save(PLAIN, file)
    repacked(file)
    assert alike(archive.read(file), PLAIN)
    for odd in range(8):  # so that storages lie at every kind of place
        torch.save(PLAIN, file)
        repacked(file, {"__MACOSX/x": b"x" * odd, "in/": b"", "in/data/.DS_Store": b""})
        assert alike(archive.read(file), PLAIN)


def test_large_and_commented_archives_are_read(file):
    torch.save(PLAIN, file)
    with zipfile.ZipFile(file) as old:
        held = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(file, "w") as new:
        new.comment = b"downloaded"
        for name, data in held.items():
            with new.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                member.write(data)
    assert alike(archive.read(file), PLAIN)


def test_one_flipped_bit_is_seen(file):
    """In any byte: the file is refused, or what it gives is what was saved."""
    kept = {"w": torch.arange(40.0), "v": torch.ones(3).bfloat16()}
    torch.save(kept, file)
    whole = file.read_bytes()
    choose, seen = random.Random(0), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << choose.randrange(8)
        file.write_bytes(damaged)
        try:
            read = checkpoints.read(file)
        except ValueError:
            seen += 1
        else:
            assert alike(read, kept), place
    assert seen > 0.5 * len(whole)  # the rest are gaps between members, dates and the like


def test_a_file_cut_off_is_refused(file):
    torch.save(PLAIN, file)
    whole = file.read_bytes()
    for size in itertools.chain(range(4, 100, 7), range(100, len(whole), 97), [len(whole) - 1]):
        file.write_bytes(whole[:size])
        refused(file, "is refused")
    file.write_bytes(whole[:500] + whole[600:])
    refused(file, "is refused")


def test_archives_made_to_deceive_are_refused(file):
    torch.save(PLAIN, file)
    whole = file.read_bytes()

    def spoilt(change, match):
        data = bytearray(whole)
        change(data)
        file.write_bytes(data)
        refused(file, match)

    local = whole.index(b"in/data/0") - 30
    central = whole.rindex(b"in/data/0") - 46

    def flag(bit):
        def change(data):
            data[local + 6] |= bit
            data[central + 8] |= bit

        return change

    spoilt(flag(1), "is encrypted")
    spoilt(flag(64), "is encrypted")
    spoilt(lambda data: data.__setitem__(local + 6, data[local + 6] | 1), "is encrypted")
    spoilt(lambda data: data.__setitem__(local + 8, 8), "is compressed")
    spoilt(lambda data: data.__setitem__(central + 10, 8), "is compressed")
    spoilt(lambda data: data.__setitem__(local + 30, ord("x")), "another name in its own header")
    spoilt(lambda data: data.__setitem__(central + 24, 1), "two different sizes|is refused")

    def elsewhere(data):
        struct.pack_into("<I", data, central + 42, local + 4)

    spoilt(elsewhere, "not where the table of contents says")

    def onto_another(data):  # its bytes are those of the member before
        first = whole.index(b"in/data.pkl") - 30
        struct.pack_into("<I", data, central + 42, first)

    spoilt(onto_another, "another name in its own header")

    def longer(data):  # and with a checksum that fits what it would cover
        size = struct.unpack_from("<I", data, central + 24)[0] + 200
        start = local + 30 + sum(struct.unpack_from("<HH", data, local + 26))
        struct.pack_into("<II", data, central + 20, size, size)
        struct.pack_into("<I", data, central + 16, zlib.crc32(data[start : start + size]))

    spoilt(longer, "overlaps what lies after it")


def test_members_twice_and_roots_without_or_with_another_are_refused(file):
    torch.save(PLAIN, file)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(file, "a") as more:
        more.writestr("in/data/0", b"x" * 8)
    refused(file, "'in/data/0' is in it twice")
    torch.save(PLAIN, file)
    repacked(file, {"other/data.pkl": b"N."})
    refused(file, "2 files named data.pkl in a folder")
    torch.save(PLAIN, file)
    repacked(file, drop=("in/data.pkl",))
    refused(file, "0 files named data.pkl in a folder")
    with zipfile.ZipFile(file, "w"):
        pass
    with pytest.raises(ValueError, match=r"of an unknown kind|is refused"):
        checkpoints.read(file)


def test_paths_that_lead_out_lead_nowhere(file, tmp_path):
    torch.save(PLAIN, file)
    names = ("../out", "/tmp/out", "in/../../out", "in/data/../../../out", "C:\\out")
    repacked(file, dict.fromkeys(names, b"x"))
    assert alike(archive.read(file), PLAIN)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_other_archives_are_refused(file):
    torch.serialization.set_crc32_options(False)
    torch.save(PLAIN, file)
    torch.serialization.set_crc32_options(True)
    refused(file, "has no checksums")
    torch.save(PLAIN, file)
    repacked(file, {"in/byteorder": b"big"})
    refused(file, "big-endian")
    torch.save(PLAIN, file)
    repacked(file, {"in/constants.pkl": b"N."})
    refused(file, "TorchScript")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n  <html>", "a web page"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><Error>', "a web page or XML"),
        (b'{"error": "Access denied"}', "JSON"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"", "empty"),
        (bytes(5000), "begins with zeros"),
        (pickle.dumps({"a": 1}), "a bare pickle"),
        (b"no weights", "of an unknown kind"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_files_of_another_kind_are_named(tmp_path, content, match, suffix):
    file = tmp_path / f"in{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        checkpoints.read(file)
    assert str(file) in str(caught.value)


def test_memory_is_that_of_pages_read(tmp_path):
    """Reading a file checks all of it and holds nothing of it."""
    torch.save({"w": torch.ones(50_000_000)}, tmp_path / "in.pt")
    program = (
        "import sys; from pathlib import Path; from skiparse.models import archive\n"
        "def now(f): return next(int(x.split()[1]) for x in open('/proc/self/status') "
        "if x.startswith(f))\n"
        "before = now('VmRSS'); archive.read(Path(sys.argv[1])); print(now('VmHWM') - before)"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("reads Linux's accounts")
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "in.pt"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 50_000  # kB, of a file of 200,000
