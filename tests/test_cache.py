"""A cache gives what the encoders would, outlives a killed build, and hides no damage."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("av")

from PIL import Image  # after the checks for the extra
from processes import PROCESSES
from pyarrow import parquet
from test_features import VAE, feature, same, tiny_vae
from test_text import tiny_encoders
from torch.utils.data import DataLoader

from skiparse import cli
from skiparse.models.data import atomic, cache
from skiparse.models.data.buckets import Rule, assign
from skiparse.models.data.cache import Cache, CacheError, build, verify
from skiparse.models.data.dataset import Clips
from skiparse.models.data.draws import Place
from skiparse.models.data.features import collate
from skiparse.models.data.manifest import DataError, Manifest
from skiparse.models.data.sampler import BucketBatchSampler
from skiparse.models.suv.encoders import Encoders
from skiparse.models.text import TextEncoders
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.writer import write_video

RULE = Rule(frames=9, max_pixels=1024, min_pixels=256, minority=0)
SEED = 3
SHARD = 9000  # bytes: two clips or three, see test_the_folder
HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""
SIZES = [(32, 32, 17), (32, 32, 12), (24, 48, 9), (32, 32, 0), (32, 32, 13), (32, 32, 0),
         (24, 48, 14)]  # fmt: skip


def picture(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (*shape, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Annotations of videos and images, with one caption to three."""
    folder = tmp_path_factory.mktemp("clips")
    records = []
    for row, (height, width, frames) in enumerate(SIZES):
        name = f"{row}.mp4" if frames else f"{row}.png"
        captions = [f"clip {row}, said {again} times" for again in range(1 + row // 3)]
        record = {"path": name, "cap": captions}
        record["resolution"] = {"height": height, "width": width}
        if frames:
            write_video(folder / name, picture(row, frames, height, width))
            record |= {"num_frames": frames, "fps": 24}
        else:
            Image.fromarray(picture(row, height, width).numpy()).save(folder / name)
        records.append(record)
    (folder / "clips.json").write_text(json.dumps(records))
    return folder / "clips.json"


@pytest.fixture(scope="module")
def manifest(source):
    return Manifest.open(source)


def tiny():
    return Encoders(tiny_vae(), TextEncoders(*tiny_encoders()))


@pytest.fixture(scope="module")
def encoders():
    return tiny()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, manifest, encoders):
    """A complete cache, to look at only."""
    return make(tmp_path_factory.mktemp("whole") / "cache", manifest, encoders)


@pytest.fixture
def folder(tmp_path, manifest, encoders):
    """Another one, to damage."""
    return make(tmp_path / "cache", manifest, encoders)


def make(folder, manifest, encoders, **how):
    return build(folder, manifest, RULE, encoders, **{"seed": SEED, "shard_bytes": SHARD, **how})


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != cache.LOCK)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def index_of(folder):
    """Entries of the index, by shard."""
    parts = sorted((folder / "index").iterdir())
    return {path.stem: parquet.read_table(path).to_pylist() for path in parts}


def online(manifest, encoders):
    """What :class:`Cache` stands for."""
    clips = Clips(manifest, assign(manifest, RULE, SEED), RULE, seed=SEED, windows="fixed")
    return lambda place: encoders.features(clips[place])


def read_all(folder):
    made = Cache(folder)
    return [made[Place(0, 0, row)] for row in range(len(SIZES))]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def encoded(monkeypatch):
    """The keys of the clips that are encoded from now on."""
    keys, features = [], Encoders.features
    monkeypatch.setattr(
        Encoders, "features", lambda self, clip: (keys.append(clip.key), features(self, clip))[1]
    )
    return keys


# What is in it.


def test_the_folder(whole, manifest, encoders):
    about = json.loads((whole / "cache.json").read_text())
    assert about["clips"] == about["taken"] == about["rows"] == len(SIZES)
    assert about["encoders"] == encoders.fingerprints()
    assert about["data"] == manifest.fingerprint
    assert Rule(**about["rule"]) == RULE
    shards = index_of(whole)
    assert len(shards) >= 3
    assert sorted(path.stem for path in (whole / "shards").iterdir()) == list(shards)
    entries = [entry for part in shards.values() for entry in part]
    assert [entry["row"] for entry in entries] == list(range(len(SIZES)))
    assert [entry["captions"] for entry in entries] == [1, 1, 1, 2, 2, 2, 3]
    assert (whole / "bad.jsonl").read_text() == ""
    names = set(contents(whole))
    assert names == {"cache.json", "null.safetensors", "bad.jsonl", "scan.json"} | {
        f"{kind}/{name}.{suffix}"
        for name in shards
        for kind, suffix in (("shards", "safetensors"), ("index", "parquet"))
    }


def test_features_are_those_of_the_encoders(whole, manifest, encoders):
    made, computed = Cache(whole), online(manifest, encoders)
    assert len(made) == len(SIZES)
    for row in range(len(SIZES)):
        place = Place(5, 2 * row, row)
        for _ in range(2):  # the second time without a look at the checksum
            assert same(made[place], computed(place))


@pytest.mark.parametrize("mode", ["mean", "sample"])
def test_batches_are_those_of_the_encoders(whole, manifest, encoders, mode):
    made, computed = Cache(whole, encoders.fingerprints()), online(manifest, encoders)
    buckets = assign(manifest, RULE, SEED)
    assert (made.rule, made.seed, made.dtype) == (RULE, SEED, "float32")
    assert made.data == manifest.fingerprint
    assert made.buckets.shapes == buckets.shapes
    assert np.array_equal(made.buckets.bucket, buckets.bucket)
    assert made.buckets.dropped == buckets.dropped

    def put(features):
        return collate(features, seed=1, drop=0.3, mode=mode)

    loader = DataLoader(
        made,
        batch_sampler=BucketBatchSampler(made.buckets.bucket, 2, seed=1, stop=12),
        num_workers=2,
        collate_fn=put,
    )
    asked = BucketBatchSampler(buckets.bucket, 2, seed=1, stop=12)
    count = 0
    for batch, places in zip(loader, asked, strict=True):
        expected = put([computed(place) for place in places])
        assert torch.equal(batch.latents, expected.latents)
        assert batch.captions.keys() == expected.captions.keys()
        for name, x in batch.captions.items():
            assert torch.equal(x, expected.captions[name]), name
        assert (batch.places, batch.keys) == (expected.places, expected.keys)
        count += len(places)
    assert count == 24


def test_it_goes_to_another_process_after_use(whole):
    made = Cache(whole)
    first = made[Place(0, 0, 0)]
    assert same(pickle.loads(pickle.dumps(made))[Place(0, 0, 0)], first)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fewer_bits(tmp_path, whole, manifest, encoders, dtype):
    made, exact = Cache(make(tmp_path / "half", manifest, encoders, dtype=dtype)), Cache(whole)
    for row in range(len(SIZES)):
        half, full = (one[Place(0, 0, row)] for one in (made, exact))
        for x, y in (
            (half.mean, full.mean),
            (half.std, full.std),
            (half.texts[0]["states"], full.texts[0]["states"]),
            (half.null["pooled"], full.null["pooled"]),
        ):
            assert x.dtype == torch.float32
            assert torch.equal(x, y.to(cache.DTYPES[dtype]).float())


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path, manifest, encoders):
    torch.manual_seed(0)
    far = Encoders(WFVAE(**{**VAE, "shift": (1e6,) * 4}), encoders.text)
    with pytest.raises(CacheError, match=r"0.mp4.*does not fit into torch.float16; build with bf"):
        make(tmp_path / "half", manifest, far, dtype="float16")


def test_workers_change_nothing(tmp_path, whole, manifest, encoders):
    made = make(tmp_path / "cache", manifest, encoders, workers=2)
    assert contents(made) == contents(whole)


def test_the_index_of_the_data_may_lie_in_the_folder(tmp_path, whole, source, encoders):
    index = tmp_path / "cache" / "manifest"
    made = make(tmp_path / "cache", Manifest.open(source, index=index), encoders)
    assert contents(whole).items() <= contents(made).items()
    assert Manifest.open(source, index=index).fingerprint == Manifest.open(source).fingerprint


# Killed.


def die_at(number):
    """Just before the ``number``-th file is given its name."""
    calls, replace = [], atomic.Path.replace

    def last(self, target):
        calls.append(target)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    atomic.Path.replace = last


def die_after(seconds):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def build_alone(folder, source, prepare, *how):
    """What another process does."""
    torch.set_num_threads(1)
    encoders = tiny()
    prepare(*how)
    make(folder, Manifest.open(source), encoders)


def killed(folder, source, prepare, *how):
    """Whether a build in a process of its own was killed by what ``prepare`` does there first."""
    process = PROCESSES.Process(target=build_alone, args=(folder, source, prepare, *how))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.full)])
def test_killed_at_every_kind_of_write(tmp_path, whole, source, manifest, encoders, every):
    expected = contents(whole)
    writes = 2 * len(index_of(whole)) + 3  # cache.json, no caption, shards and index, cache.json
    for number in range(1, writes + 1) if every else (1, 2, 5, 6, writes):
        folder = tmp_path / str(number)
        assert killed(folder, source, die_at, number)
        with pytest.raises(CacheError, match=r"not complete|is no cache"):
            Cache(folder)
        make(folder, manifest, encoders)
        assert contents(folder) == expected


@pytest.mark.parametrize("times", [5, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_any_time(tmp_path, whole, source, manifest, encoders, times):
    expected, chance = contents(whole), random.Random(times)
    start = time.monotonic()
    make(tmp_path / "whole", manifest, encoders)
    lasts = time.monotonic() - start
    dead = 0
    for number in range(times):
        folder = tmp_path / str(number)
        dead += killed(folder, source, die_after, chance.uniform(0.05, 0.9) * lasts)
        make(folder, manifest, encoders)
        assert contents(folder) == expected
    assert dead


def test_a_build_goes_on_where_it_stopped(tmp_path, whole, manifest, encoders, monkeypatch):
    keys, save = encoded(monkeypatch), cache.save_file

    def full(tensors, path, *metadata):
        if any(name.startswith("5/") for name in tensors):
            raise OSError(28, "No space left on device")
        save(tensors, path, *metadata)

    monkeypatch.setattr(cache, "save_file", full)
    folder = tmp_path / "cache"
    with pytest.raises(OSError, match="No space left"):
        make(folder, manifest, encoders)
    done = [entry["key"] for part in index_of(folder).values() for entry in part]
    assert 0 < len(done) < len(SIZES)
    monkeypatch.setattr(cache, "save_file", save)
    keys.clear()
    make(folder, manifest, encoders)
    assert len(keys) == len(SIZES) - len(done)
    assert not set(keys) & set(done)
    assert contents(folder) == contents(whole)
    keys.clear()
    make(folder, manifest, encoders)
    assert not keys
    assert contents(folder) == contents(whole)


def test_a_second_builder_is_refused(folder, manifest, encoders):
    before = contents(folder)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder / cache.LOCK], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        for use in (
            lambda: make(folder, manifest, encoders),
            lambda: verify(folder, repair=True),
        ):
            with pytest.raises(CacheError, match=f"another process builds in {folder}; wait for"):
                use()
        assert verify(folder) == []
        assert contents(folder) == before
    finally:
        holder.kill()
        holder.communicate()
    make(folder, manifest, encoders)  # the lock went with the process


# Damaged.


def spots(folder):
    """A byte of the data in each file."""
    shards = index_of(folder)
    for name, data in contents(folder).items():
        if name.endswith(".safetensors"):
            yield name, 8 + int.from_bytes(data[:8], "little") + 5
        elif name.endswith(".parquet"):
            (first, *_) = shards[name.partition("/")[2].partition(".")[0]]
            yield name, data.index(first["sha256"].encode())


def test_a_flipped_bit_is_found_and_mended(folder, manifest, encoders, monkeypatch):
    expected, shards, keys = contents(folder), index_of(folder), encoded(monkeypatch)
    assert verify(folder) == []
    for name, at in spots(folder):
        flip(folder / name, at)
        (damage,) = verify(folder)
        assert damage.file == name
        with pytest.raises(CacheError, match=f"{name} is missing or damaged.*--repair"):
            read_all(folder)
        assert contents(folder).keys() == expected.keys()  # looking changes nothing
        assert verify(folder, repair=True) == [damage]
        keys.clear()
        with pytest.raises(CacheError, match="not complete"):
            Cache(folder)
        make(folder, manifest, encoders)
        lost = shards.get(name.partition("/")[2].partition(".")[0], [])
        assert keys == [entry["key"] for entry in lost]
        if "shards" in name:
            assert len(damage.keys) == 1
            assert damage.keys[0] in keys
        assert contents(folder) == expected


def test_several_lost_shards_come_back_in_their_places(folder, manifest, encoders):
    expected = contents(folder)
    lost = sorted(index_of(folder))[::2]
    for name in lost:
        (folder / "shards" / f"{name}.safetensors").unlink()
    damages = verify(folder, repair=True)
    assert [damage.file for damage in damages] == [f"shards/{name}.safetensors" for name in lost]
    assert all(damage.keys for damage in damages)
    make(folder, manifest, encoders)
    assert contents(folder) == expected


def test_a_missing_or_short_shard_is_named(folder):
    path = folder / "shards" / "00001.safetensors"
    row = index_of(folder)["00001"][0]["row"]
    made = Cache(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheError, match=r"00001.safetensors is missing or damaged.*--repair"):
        made[Place(0, 0, row)]
    path.unlink()
    with pytest.raises(CacheError, match=r"00001.safetensors is missing or damaged: No such file"):
        made[Place(0, 0, row)]
    (damage,) = verify(folder)
    assert damage.keys == tuple(entry["key"] for entry in index_of(folder)["00001"])


def test_a_flipped_bit_in_a_name_is_damage(folder):
    path = folder / "shards" / "00000.safetensors"
    flip(path, path.read_bytes().index(b"0/mean") + 2)
    with pytest.raises(CacheError, match=r"00000.safetensors is missing or damaged"):
        Cache(folder)[Place(0, 0, 0)]
    (damage,) = verify(folder)
    assert damage.keys == (index_of(folder)["00000"][0]["key"],)


def test_a_flipped_bit_never_gives_another_index(folder):
    path = folder / "index" / "00000.parquet"
    data, table = path.read_bytes(), cache._read_part(path)
    refused = 0
    for at in range(0, len(data), 9):
        flip(path, at)
        try:
            assert cache._read_part(path).equals(table)  # in a byte that says nothing
        except cache._UNREADABLE:
            refused += 1
        path.write_bytes(data)
    assert refused > len(data) / 9 / 3


def test_a_lost_part_of_the_index(folder, manifest, encoders):
    expected = contents(folder)
    (folder / "index" / "00001.parquet").unlink()
    with pytest.raises(CacheError, match=r"not complete: \d of 7 clips"):
        Cache(folder)
    (damage,) = verify(folder, repair=True)
    assert damage.file == "index"
    make(folder, manifest, encoders)
    assert contents(folder) == expected


def test_which_short_clips_are_in_it_follows_from_the_seed(tmp_path, manifest, encoders):
    rule = replace(RULE, frames=17, min_frames=9, drop_short=0.5)
    build(tmp_path, manifest, rule, encoders, seed=SEED)
    right, other = (assign(manifest, rule, seed).bucket for seed in (SEED, 0))
    assert not np.array_equal(right, other)
    assert np.array_equal(Cache(tmp_path).buckets.bucket, right)


def sealed(about):
    rest = {name: value for name, value in about.items() if name != "seal"}
    return {**rest, "seal": atomic.seal(rest)}


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about | {"schema": 0},
        lambda about: {"schema": about["schema"]},
        lambda about: [about],
        lambda about: about | {"rows": 3},
        lambda about: about | {"shapes": about["shapes"][1:]},
        lambda about: about | {"seal": "0" * 64},
        lambda about: sealed(about | {"schema": 2}),
        lambda about: sealed(about | {"more": 1}),
    ],
)
def test_what_is_no_cache(folder, manifest, encoders, change):
    path = folder / "cache.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for use in (
        lambda: Cache(folder),
        lambda: verify(folder),
        lambda: make(folder, manifest, encoders),
    ):
        with pytest.raises(CacheError, match=r"cache.json is damaged, or not of schema 3"):
            use()


def test_no_cache_at_all(tmp_path, manifest, encoders):
    for text in (None, "", "[" * 10**5, "\0"):
        if text is not None:
            (tmp_path / "cache.json").write_text(text)
        for use in (Cache, verify):
            with pytest.raises(CacheError, match="is no cache"):
                use(tmp_path)
    (tmp_path / "cache.json").unlink()
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / ".thesis.tmp").write_text("hours of work")
    with pytest.raises(CacheError, match="holds something else than a cache"):
        make(tmp_path, manifest, encoders)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", ".thesis.tmp", "lock"}


def test_a_link_out_of_the_folder_is_refused(folder, tmp_path):
    path = folder / "shards" / "00000.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="names must stay in their folder"):
        Cache(folder)[Place(0, 0, 0)]
    with pytest.raises(ValueError, match="names must stay in their folder"):
        verify(folder)


# Of another origin.


def test_other_encoders_are_refused(whole, manifest, encoders):
    other = Encoders(tiny_vae(seed=1), encoders.text)
    before = contents(whole)
    with pytest.raises(CacheError, match=r"of another origin: vae is \w{16}, not \w{16}; build in"):
        Cache(whole, other.fingerprints())
    with pytest.raises(CacheError, match=r"of another origin: encoders.vae is \w{16}, not"):
        make(whole, manifest, other)
    assert contents(whole) == before


def test_other_settings_are_refused(whole, manifest, encoders):
    before = contents(whole)
    rule = Rule(frames=1, max_pixels=1024, min_pixels=256, minority=0)
    with pytest.raises(CacheError, match=r"rule\.frames is 9, not 1; build in another folder"):
        build(whole, manifest, rule, encoders, seed=SEED)
    for how, message in (
        ({"seed": 4}, "seed is 3, not 4"),
        ({"dtype": "bfloat16"}, "dtype is float32, not bfloat16"),
    ):
        with pytest.raises(CacheError, match=message):
            make(whole, manifest, encoders, **how)
    assert contents(whole) == before


def test_arguments_are_checked_first(tmp_path, manifest, encoders):
    for how, message in (
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"shard_bytes": 0}, "shard_bytes must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "cache", manifest, encoders, **how)
    assert not any(tmp_path.iterdir())


def test_rows_that_are_not_in_it(tmp_path, manifest, encoders):
    rule = Rule(frames=1, size=(32, 32), minority=0)
    made = Cache(build(tmp_path / "images", manifest, rule, encoders))
    rows = [row for row, (height, _, _) in enumerate(SIZES) if height == 32]
    rows = [row for row in rows if made.buckets.bucket[row] >= 0]
    assert 0 < len(rows) == len(made) < len(SIZES)
    with pytest.raises(CacheError, match="row 2 is not in"):
        made[Place(0, 0, 2)]


# Clips that cannot be read.


@pytest.fixture
def images(tmp_path):
    """A hundred small ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    for row in range(100):
        Image.fromarray(picture(row, 16, 16).numpy()).save(folder / f"{row:02d}.png")
        (folder / f"{row:02d}.txt").write_text(f"image {row}")
    return folder


def test_what_cannot_be_read_is_left_out_until_it_can(tmp_path, images, encoders, monkeypatch):
    keys = []
    monkeypatch.setattr(
        Encoders, "features", lambda _, clip: (keys.append(clip.key), feature(clip.place))[1]
    )
    manifest = Manifest.open(images)
    rule, good = Rule(size=(16, 16), minority=0), (images / "40.png").read_bytes()
    (images / "40.png").write_bytes(good[:100])
    folder = build(tmp_path / "cache", manifest, rule, encoders)
    (line,) = (folder / "bad.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(images / "40.png")
    assert "40.png" in json.loads(line)["reason"]
    made = Cache(folder)
    assert len(made) == 99
    assert made.buckets.bucket[40] == -1
    assert made.buckets.dropped == {"cannot be read": 1}
    assert verify(folder) == []
    (images / "40.png").write_bytes(good)
    keys.clear()
    build(folder, manifest, rule, encoders)
    assert len(keys) == 1
    assert "40.png" in keys[0]
    assert len(Cache(folder)) == 100
    assert (folder / "bad.jsonl").read_text() == ""


def test_too_many_that_cannot_be_read(tmp_path, images, encoders):
    manifest = Manifest.open(images)
    for row in (3, 5):
        (images / f"{row:02d}.png").write_bytes(b"\x89PNG")
    folder = tmp_path / "cache"
    with pytest.raises(DataError, match=r"2 of 100 clips cannot be read, more than 1%.*03.png"):
        build(folder, manifest, Rule(size=(16, 16), minority=0), encoders)
    assert len((folder / "bad.jsonl").read_text().splitlines()) == 2
    with pytest.raises(CacheError, match="not complete"):
        Cache(folder)


# Clips that are replaced.


def test_a_replaced_clip_is_computed_again(tmp_path, images, encoders, monkeypatch, capsys):
    """By one of the same shape, and the caption stays: no row of the manifest changes."""
    keys = []

    def features(_, clip):
        keys.append(clip.key)
        return replace(feature(clip.place), key=clip.key)

    monkeypatch.setattr(Encoders, "features", features)
    manifest, rule = Manifest.open(images), Rule(size=(16, 16), minority=0)
    folder = build(tmp_path / "cache", manifest, rule, encoders, shard_bytes=2000)
    untouched = contents(folder)
    keys.clear()
    build(folder, manifest, rule, encoders, shard_bytes=2000)
    assert not keys
    Image.fromarray(picture(1000, 16, 16).numpy()).save(images / "40.png")
    os.utime(images / "07.png")  # as after a copy: of another time, but the same
    (damage,) = verify(folder)
    assert (damage.file, damage.reason) == ("clips", "replaced since they were read")
    assert len(damage.keys) == 1
    assert "40.png" in damage.keys[0]
    assert contents(folder) == untouched
    build(folder, manifest, rule, encoders, shard_bytes=2000)
    assert ["40.png" in key for key in keys] == [True]
    assert "1 clips were replaced since" in capsys.readouterr().out
    assert verify(folder) == []
    assert len(Cache(folder)) == 100
    assert {Cache(folder)[Place(0, 0, row)].key for row in range(100)} >= set(keys)


def test_repair_forgets_what_was_replaced(tmp_path, images, encoders, monkeypatch):
    monkeypatch.setattr(Encoders, "features", lambda _, clip: feature(clip.place))
    manifest, rule = Manifest.open(images), Rule(size=(16, 16), minority=0)
    folder = build(tmp_path / "cache", manifest, rule, encoders, shard_bytes=1)
    Image.fromarray(picture(1000, 16, 16).numpy()).save(images / "40.png")
    shards = len(list((folder / "shards").iterdir()))
    assert [damage.file for damage in verify(folder, repair=True)] == ["clips"]
    assert len(list((folder / "shards").iterdir())) == shards - 1
    with pytest.raises(CacheError, match="not complete"):
        Cache(folder)
    build(folder, manifest, rule, encoders, shard_bytes=1)
    assert verify(folder) == []


def test_a_change_in_the_middle_is_seen_by_all_of_it(tmp_path, images, encoders, monkeypatch):
    """The ends and the time of the file are the old ones."""
    monkeypatch.setattr(Encoders, "features", lambda _, clip: feature(clip.place))
    noise = picture(0, 512, 512).numpy()
    Image.fromarray(noise).save(images / "40.png")
    manifest, rule = Manifest.open(images), Rule(size=(16, 16), minority=0)
    folder = build(tmp_path / "cache", manifest, rule, encoders)
    was = (images / "40.png").stat()
    flip(images / "40.png", was.st_size // 2)
    os.utime(images / "40.png", ns=(was.st_atime_ns, was.st_mtime_ns))
    assert verify(folder) == []
    assert [damage.file for damage in verify(folder, full=True)] == ["clips"]
    assert cli.main(["cache", "verify", str(folder)]) == 0
    assert cli.main(["cache", "verify", str(folder), "--full"]) == 2


def test_clips_that_are_gone_are_not_compared(tmp_path, images, encoders, monkeypatch, capsys):
    monkeypatch.setattr(Encoders, "features", lambda _, clip: feature(clip.place))
    manifest, rule = Manifest.open(images), Rule(size=(16, 16), minority=0)
    folder = build(tmp_path / "cache", manifest, rule, encoders)
    images.rename(tmp_path / "elsewhere")
    assert verify(folder, full=True) == []
    assert "100 clips are not where they were read" in capsys.readouterr().out


def test_the_scan_of_a_build(tmp_path, images, encoders, monkeypatch, capsys):
    monkeypatch.setattr(Encoders, "features", lambda _, clip: feature(clip.place))
    monkeypatch.setattr(cache, "_BAD_SHARE", 0.05)
    (images / "00.txt").unlink()
    manifest = Manifest.open(images)
    (images / "40.png").write_bytes(b"no image")
    Image.fromarray(picture(0, 64, 16).numpy()).save(images / "41.png")
    folder = build(tmp_path / "cache", manifest, Rule(size=(16, 16), minority=0), encoders)
    line = "used 98 of 100; dropped 2: 1 no caption in a .txt of its name, 1 cannot be read"
    assert line in capsys.readouterr().out
    about = json.loads((folder / "scan.json").read_text())
    assert (about["used"], about["of"]) == (98, 100)
    assert "40.png" in about["examples"]["cannot be read"][0]
