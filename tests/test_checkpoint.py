"""A run's state comes back bit for bit, and no accident costs the last complete checkpoint."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import threading
import time
import zlib

import pytest
import torch
import torch.distributed as dist
from processes import PROCESSES
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from skiparse.models.train import checkpoint as module
from skiparse.models.train.checkpoint import CheckpointError, Checkpoints

SHARD = "shard-00001-model-00001-of-00001.safetensors"
SECOND = "shard-00002-model-00001-of-00001.safetensors"
FLUSHES = 5  # tensors, about.json, COMPLETE, the folder, the folder around it
ABOUT = {"step": 3, "clipper": {"mean": 0.1, "variance": None}, "sparsity": [1, 2], "name": "ü"}


def tensors(seed=0):
    """Of every kind that a run may hold."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(4, 6, generator=generator)
    return {
        "model.weight": normal,
        "model.transposed": normal.t().clone().t(),  # not contiguous
        "ema.weight": normal / 3,
        "half": normal.bfloat16(),
        "optimizer.weight.step": torch.tensor(1234.0 + seed),
        "double": normal.double() / 7,
        "indices": torch.arange(seed, seed + 5),
        "count": torch.tensor(2**40 + seed),
        "mask": normal > 0,
        "empty": torch.empty(0, 3),
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(
            memory_format=torch.channels_last
        ),
    }


def blank(like):
    return {name: torch.zeros_like(x) for name, x in like.items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """Checkpoints with the steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(1, tensors(1), ABOUT)
    checkpoints.save(2, tensors(2), ABOUT)
    return checkpoints


@pytest.mark.parametrize("asynchronous", [False, True])
def test_all_comes_back_bit_for_bit(tmp_path, asynchronous):
    checkpoints = Checkpoints(tmp_path / "new" / "checkpoints")
    assert checkpoints.latest() is None
    given, about = tensors(), {**ABOUT, "clipper": dict(ABOUT["clipper"])}
    checkpoints.save(3, given, about, asynchronous=asynchronous)
    for x in given.values():  # the run goes on
        x.zero_()
    about["clipper"]["mean"] = 7.0
    checkpoints.wait()

    found = checkpoints.latest()
    assert (found.step, found.path.name) == (3, "step-00000003")
    assert found.about == ABOUT
    filled = blank(given)
    places = {name: x.data_ptr() for name, x in filled.items()}
    assert found.load(filled) is None
    assert same(filled, tensors())
    assert {name: x.data_ptr() for name, x in filled.items()} == places
    assert filled["channels_last"].is_contiguous(memory_format=torch.channels_last)
    part = found.read("model.")
    assert same(part, {name: tensors()[f"model.{name}"] for name in ("weight", "transposed")})


def test_parameters_and_tied_tensors(tmp_path):
    layer = nn.Linear(3, 2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"a": layer.weight, "b": layer.weight}, {})
    other = nn.Linear(3, 2)
    checkpoints.latest().load({"a": other.weight, "b": torch.zeros(2, 3)})
    assert torch.equal(other.weight, layer.weight)
    assert other.weight.requires_grad
    assert other.weight.is_leaf


def test_safetensors_and_json_and_nothing_else(saved):
    folder = saved.latest().path
    assert names(folder) == ["COMPLETE", "about.json", SHARD]
    assert json.loads((folder / "about.json").read_text("utf-8")) == ABOUT
    complete = json.loads((folder / "COMPLETE").read_text())
    assert complete["step"] == 2
    assert sorted(complete["files"]) == ["about.json", SHARD]
    assert complete["versions"]["torch"] == torch.__version__
    with safe_open(folder / SHARD, framework="pt") as file:
        assert set(file.keys()) == set(tensors())


def test_the_oldest_go_once_a_new_one_is_there(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (5, 90, 100, 100_000_000, 100_000_001):
        checkpoints.save(step, {"x": torch.tensor(step)}, {})
    assert names(tmp_path) == ["step-00000100", "step-100000000", "step-100000001"]
    assert checkpoints.latest().step == 100_000_001


def test_a_failed_one_costs_no_older_one(saved, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(module, "_entries", fail)
    with pytest.raises(CheckpointError, match="broken"):
        saved.save(3, tensors(3), ABOUT)
    assert names(saved.folder) == ["step-00000001", "step-00000002"]


def test_writing_while_the_run_goes_on(tmp_path, monkeypatch):
    may_end, entries = threading.Event(), module._entries

    def waiting(files):
        assert may_end.wait(20)
        return entries(files)

    monkeypatch.setattr(module, "_entries", waiting)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tensors(1), ABOUT, asynchronous=True)
    assert checkpoints.latest() is None
    threading.Timer(0.2, may_end.set).start()
    checkpoints.save(2, tensors(2), ABOUT, asynchronous=True)  # waits for the first
    assert may_end.is_set()
    assert Checkpoints(tmp_path).latest().step >= 1
    checkpoints.wait()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    again = Checkpoints(tmp_path / "again")
    again.save(2, tensors(2), ABOUT)
    written, expected = (load_file(c.latest().path / SHARD) for c in (checkpoints, again))
    assert same(written, expected)


def test_a_failure_meanwhile_is_told_at_the_next_call(tmp_path):
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(1, tensors(), ABOUT, asynchronous=True)
    with pytest.raises(CheckpointError, match=r"saving step 1 .*Not a directory"):
        checkpoints.wait()
    checkpoints.wait()  # told once
    checkpoints.save(2, tensors(), ABOUT, asynchronous=True)
    with pytest.raises(CheckpointError, match=r"saving step 2 .*Not a directory"):
        checkpoints.save(3, tensors(), ABOUT)
    (tmp_path / "file").unlink()
    checkpoints.save(3, tensors(), ABOUT)
    assert names(checkpoints.folder) == ["step-00000003"]


def test_a_disk_that_is_full(saved):
    """By the kernel's own limit, in the middle of a file."""
    given = {**tensors(3), "large": torch.rand(100_000)}
    before = {name: x.clone() for name, x in given.items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            saved.save(3, given, ABOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for part in ("step 3", str(saved.folder), "File too large", "See that there is room"):
        assert part in str(error.value)
    assert names(saved.folder) == ["step-00000001", "step-00000002"]
    assert same(given, before)
    saved.save(3, given, ABOUT)  # with room again
    assert names(saved.folder) == ["step-00000002", "step-00000003"]


def test_a_disk_that_fails_at_any_flush(saved, monkeypatch):
    """What there was stays, and what there is is complete, whichever flush it is."""
    flush = os.fsync
    for fatal in range(FLUSHES + 1):
        left = iter(range(fatal + 1))

        def failing(handle, left=left, fatal=fatal):
            if next(left, None) == fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(handle)

        monkeypatch.setattr(os, "fsync", failing)
        if fatal == FLUSHES:
            saved.save(3, tensors(3), ABOUT)
            break
        with pytest.raises(CheckpointError, match="No space left on device"):
            saved.save(3, tensors(3), ABOUT)
        kept = names(saved.folder)
        assert kept[:2] == ["step-00000001", "step-00000002"]
        assert kept[2:] in ([], ["step-00000003"])
        filled = blank(tensors())
        found = saved.latest()
        found.load(filled)
        assert same(filled, tensors(found.step))
        shutil.rmtree(saved.folder / "step-00000003", ignore_errors=True)
    assert names(saved.folder) == ["step-00000002", "step-00000003"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"file/checkpoints failed: .*Not a directory"):
        checkpoints.save(1, tensors(), ABOUT)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written_to(saved):
    saved.folder.chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            saved.save(3, tensors(), ABOUT)
    finally:
        saved.folder.chmod(0o755)
    assert names(saved.folder) == ["step-00000001", "step-00000002"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def forged(path):
    """Another file of the same size, whose digest is none."""
    path.write_text(path.read_text().replace('"sha256"', '"sha512"'))


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (flip, SHARD, "does not have the SHA-256"),
        (cut, SHARD, r"has \d+ bytes, not \d+"),
        (os.unlink, SHARD, "is missing"),
        (flip, "about.json", "does not have the SHA-256"),
        (os.unlink, "about.json", "is missing"),
        (cut, "about.json", r"has \d+ bytes, not \d+"),
        (lambda path: path.write_bytes(b"\x80\x04."), ".metadata", "is none of the files"),
        (lambda path: path.write_bytes(b""), "x.safetensors", "is none of the files"),
        (forged, "COMPLETE", "about.json does not have the SHA-256"),
        (lambda path: path.write_text("{"), "COMPLETE", "COMPLETE is no JSON"),
        (lambda path: path.write_text("[]"), "COMPLETE", "is no record of a checkpoint"),
        (lambda path: path.write_text('{"step": 2, "files": {"a": 1}}'), "COMPLETE", "no record"),
    ],
)
def test_damage_is_named_and_nothing_loaded(saved, damage, file, message):
    path = saved.folder / "step-00000002"
    damage(path / file)
    filled = blank(tensors())
    with pytest.raises(CheckpointError, match=message) as error:
        saved.latest().load(filled)  # never the older one
    assert str(path) in str(error.value)
    assert file in str(error.value) or file == "COMPLETE"
    assert same(filled, blank(tensors()))
    if file == SHARD:
        with pytest.raises(CheckpointError, match=message):
            saved.latest().read("model.")


def test_checkpoints_from_before_nothing_was_learned_stay(saved):
    for step, hold, kept in (
        (3, None, [2, 3]),
        (4, 3, [2, 3, 4]),
        (5, 3, [2, 3, 5]),
        (6, 3, [2, 3, 6]),
        (7, None, [6, 7]),
        (8, 8, [7, 8]),
    ):
        saved.save(step, tensors(step), ABOUT, hold=hold)
        assert names(saved.folder) == [f"step-{number:08d}" for number in kept]


@pytest.mark.parametrize("name", [".DS_Store", "notes.txt", ".nfs0001", "about.json~", "folder"])
def test_strays_in_a_checkpoint_are_ignored(saved, name):
    path = saved.folder / "step-00000002" / name
    path.mkdir() if name == "folder" else path.write_text("x")
    with pytest.warns(UserWarning, match=f"{name} is none of the checkpoint's and is ignored"):
        found = saved.latest()
    filled = blank(tensors())
    found.load(filled)
    assert same(filled, tensors(2))


def test_strays_beside_checkpoints_are_ignored(saved):
    for name in (".step-00000002.swp", "step-00000002.bak", "latest", ".DS_Store"):
        (saved.folder / name).write_text("x")
    (saved.folder / ".step-link").symlink_to(saved.folder / "step-00000002")
    (saved.folder / "step-00000003").write_text("x")
    with pytest.warns(UserWarning, match="step-00000003 has no COMPLETE and is ignored"):
        assert saved.latest().step == 2
    saved.save(3, tensors(3), ABOUT)
    assert saved.latest().step == 3
    kept = [".DS_Store", "latest", "step-00000002", "step-00000002.bak", "step-00000003"]
    assert sorted(path.name for path in saved.folder.iterdir()) == kept


def test_what_does_not_fit_is_named_and_nothing_loaded(saved):
    found = saved.latest()
    filled = {
        **blank(tensors()),
        "model.weight": torch.zeros(6, 4),
        "half": torch.zeros(4, 6),
        **{f"new.{i:02d}": torch.zeros(1) for i in range(12)},
    }
    del filled["count"]
    before = {name: x.clone() for name, x in filled.items()}
    with pytest.raises(ValueError, match="step-00000002 does not fit") as error:
        found.load(filled)
    for part in (
        "12 missing in it: new.00, new.01",
        "new.09, ...;",
        "1 unexpected in it: count",
        "model.weight (saved [4, 6] torch.float32, to fill [6, 4] torch.float32)",
        "half (saved [4, 6] torch.bfloat16, to fill [4, 6] torch.float32)",
    ):
        assert part in str(error.value)
    assert same(filled, before)


def test_an_incomplete_one_is_passed_over_and_replaced(saved):
    (saved.folder / "step-00000002" / "COMPLETE").unlink()
    (saved.folder / "step-notes").mkdir()
    with pytest.warns(UserWarning, match="step-00000002 has no COMPLETE and is ignored"):
        assert saved.latest().step == 1
    saved.save(2, tensors(5), ABOUT)
    filled = blank(tensors())
    saved.latest().load(filled)
    assert same(filled, tensors(5))
    assert names(saved.folder) == ["step-00000001", "step-00000002", "step-notes"]


@pytest.mark.parametrize(
    ("step", "about", "message"),
    [
        (-1, {}, "step must be at least 0, got -1"),
        (2, {}, r"step-00000002 is complete already; save another step"),
        (3, {"x": torch.zeros(1)}, "about must be JSON: .*Tensor"),
        (3, {"x": float("nan")}, "about must be JSON: .*Out of range"),
    ],
)
def test_arguments_that_make_no_sense(saved, step, about, message):
    with pytest.raises(ValueError, match=message):
        saved.save(step, tensors(), about)
    assert names(saved.folder) == ["step-00000001", "step-00000002"]
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(saved.folder, keep=0)


def save_until_killed(folder, asynchronous):
    """A dot for every step that is saved, in ``dots``."""
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder / "checkpoints")
    last = checkpoints.latest()
    with (folder / "dots").open("wb", buffering=0) as dots:
        for step in itertools.count(last.step + 1 if last else 1):
            checkpoints.save(step, everywhere(step), {"is": step}, asynchronous=asynchronous)
            if not asynchronous:
                dots.write(b".")


def everywhere(step):
    return {name: torch.full((50, 50), float(step)) for name in "abc"}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_twenty_random_moments(tmp_path, asynchronous):
    """The last complete one is there and whole: the last that was told of, or the next."""
    checkpoints, chance = Checkpoints(tmp_path / "checkpoints"), random.Random(0)
    begun = interrupted = 0
    kept = checkpoints.folder / "step-00000000"
    for _ in range(20):
        process = PROCESSES.Process(target=save_until_killed, args=(tmp_path, asynchronous))
        (tmp_path / "dots").unlink(missing_ok=True)
        process.start()
        deadline = time.monotonic() + 30
        while not any(path > kept for path in checkpoints.folder.glob("step-*")):
            assert time.monotonic() < deadline
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        latest = checkpoints.latest()
        filled = {name: torch.zeros(50, 50) for name in "abc"}
        latest.load(filled)
        assert same(filled, everywhere(latest.step))
        assert latest.about == {"is": latest.step}
        if not asynchronous:
            told = begun + (tmp_path / "dots").stat().st_size
            assert latest.step in (told, told + 1)
        assert latest.step > begun
        hidden = [name for name in names(checkpoints.folder) if name.startswith(".")]
        interrupted += any(name.endswith(".new") for name in hidden)
        begun, kept = latest.step, latest.path
    assert interrupted  # it was hit while writing
    checkpoints.save(begun + 1, everywhere(begun + 1), {})
    assert names(checkpoints.folder) == [f"step-{begun:08d}", f"step-{begun + 1:08d}"]


def known(name, like):
    """The value that the whole tensor ``name`` has, in any process."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator)


def network(mesh=None):
    """Tensors of a model and its AdamW, by name; in shards, some uneven or empty, on a mesh."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1), nn.Linear(1, 7, bias=False))
    if mesh is not None:
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    found = {f"model.{name}": x for name, x in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for kind, x in optimizer.state[parameter].items():
            found[f"optimizer.{name}.{kind}"] = x
    return found


@torch.no_grad()
def fill(found):
    for name, x in found.items():
        value = known(name, x)
        if isinstance(x, DTensor):
            value = distribute_tensor(value, x.device_mesh, x.placements)
        x.copy_(value)


def is_known(found):
    whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}
    return all(torch.equal(x, known(name, x)) for name, x in whole.items())


def two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    sharded = network(mesh)
    assert sharded["model.0.weight"].to_local().shape == ((2, 5), (1, 5))[rank]
    assert sharded["model.1.weight"].to_local().shape == ((1, 3), (0, 3))[rank]

    # One wrote, two read.
    Checkpoints(folder / "one").latest().load(sharded)
    assert is_known(sharded)
    whole = Checkpoints(folder / "one").latest().read("model.")
    assert all(torch.equal(x, known(f"model.{name}", x)) for name, x in whole.items())

    # Two write, for one to read; and meanwhile, for two.
    checkpoints = Checkpoints(folder / "two", keep=3)
    checkpoints.save(1, sharded, {"from": "two"})
    checkpoints.save(2, sharded, {"from": "two"}, asynchronous=True)
    for x in sharded.values():
        x.detach().zero_()
        dist.barrier()  # the run has collectives of its own
    checkpoints.wait()
    assert names(checkpoints.folder) == ["step-00000001", "step-00000002"]
    checkpoints.latest().load(sharded)
    assert is_known(sharded)

    # A failure in either fails both, wherever it is; what there was stays.
    for at, (target, name) in (
        (0, (module, "write_json")),
        *itertools.product((0, 1), ((FileSystem, "create_stream"), (module, "_entries"))),
    ):
        for asynchronous in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if rank == at:
                    patch.setattr(target, name, no_space)
                with pytest.raises(CheckpointError, match=r"step 3 .*No space left"):  # noqa: PT012
                    checkpoints.save(3, sharded, {}, asynchronous=asynchronous)
                    checkpoints.wait()
            dist.barrier()
            assert names(checkpoints.folder) == ["step-00000001", "step-00000002"]
            dist.barrier()
    assert is_known(sharded)

    # So does one at loading, and nothing is loaded in either.
    filled = network(mesh)
    before = {name: x.detach().clone() for name, x in filled.items()}
    if rank == 1:
        filled["optimizer.0.bias.step"] = torch.zeros((), dtype=torch.int64)
    with pytest.raises((ValueError, CheckpointError), match=r"does not fit.*0\.bias\.step"):
        checkpoints.latest().load(filled)
    dist.barrier()
    if rank == 0:
        shutil.copytree(checkpoints.folder / "step-00000002", checkpoints.folder / "step-00000004")
        flip(checkpoints.folder / "step-00000004" / SECOND)
    dist.barrier()
    filled["optimizer.0.bias.step"] = before["optimizer.0.bias.step"].clone()
    with pytest.raises(CheckpointError, match=r"shard-00002.* does not have the SHA-256"):
        checkpoints.latest().load(filled)
    for name, x in filled.items():
        unchanged = x == before[name]
        assert (unchanged.to_local() if isinstance(x, DTensor) else unchanged).all()
    dist.barrier()
    dist.destroy_process_group()


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_two_processes_and_one(tmp_path):
    single = network()
    fill(single)
    Checkpoints(tmp_path / "one").save(1, single, {})
    torch.multiprocessing.start_processes(
        two_processes, (tmp_path,), nprocs=2, start_method="forkserver"
    )
    shutil.rmtree(tmp_path / "two" / "step-00000004")
    for step in (2, 1):
        found = Checkpoints(tmp_path / "two").latest()
        assert (found.step, found.about) == (step, {"from": "two"})
        assert names(found.path) == [
            "COMPLETE", "about.json", SHARD, SECOND
        ]  # fmt: skip
        assert len(load_file(found.path / SHARD)) < len(single)  # each has what is its own
        filled = blank(single)
        found.load(filled)
        assert is_known(filled)
        shutil.rmtree(found.path)
