"""What clips promise: the frames asked for, the same for any worker, and no harm from bad files."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

av = pytest.importorskip("av")
pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")
ImageOps = pytest.importorskip("PIL.ImageOps")

from skiparse.models.data import image, video  # noqa: E402  # after the checks
from skiparse.models.data.buckets import Buckets, Rule, assign  # noqa: E402
from skiparse.models.data.dataset import Clip, Clips  # noqa: E402
from skiparse.models.data.draws import Place  # noqa: E402
from skiparse.models.data.limits import Limits  # noqa: E402
from skiparse.models.data.manifest import DataError, Manifest  # noqa: E402
from skiparse.models.data.sampler import BucketBatchSampler  # noqa: E402
from skiparse.models.data.video import VideoError  # noqa: E402

SIZE = (48, 64)
RULE = Rule(frames=9, fps=25, size=SIZE, longest=100)


def write(path: Path, frames: int = 30, fps: int = 25, codec: str = "ffv1", **more: Any) -> Path:
    """A clip whose frame ``i`` has the grey level ``4 * i``; lossless by default."""
    size = more.get("size", SIZE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = {"ffv1": "bgr0"}.get(codec, "yuv420p")
        for i in range(frames):
            picture = np.full((*size, 3), 4 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def record(path: str, frames: int = 30, fps: float = 25, **more: Any) -> dict[str, Any]:
    size = more.pop("size", SIZE)
    resolution = {"height": size[0], "width": size[1]}
    return {
        "path": path,
        "cap": path,
        "resolution": resolution,
        "num_frames": frames,
        "fps": fps,
        **more,
    }


def open_rows(root: Path, records: list[dict[str, Any]]) -> Manifest:
    root.mkdir(exist_ok=True)
    source = root / "annotations.jsonl"
    source.write_text("\n".join(map(json.dumps, records)))
    return Manifest.open(source)


def clips(root: Path, records: list[dict[str, Any]], rule: Rule = RULE, **more: Any) -> Clips:
    manifest = open_rows(root, records)
    return Clips(manifest, assign(manifest, rule, 0), rule, **more)


def numbers(clip: Clip) -> list[int]:
    """Which frames of ``write`` they are."""
    return [round(float(frame.float().mean()) / 4) for frame in clip.frames]


def first_of(clip: Clip) -> int:
    return int(clip.key.rpartition(":")[2].split("+")[0])


# Frames.


def test_a_clip(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv")
    data = clips(tmp_path, [record("a.mkv", cap=["one", "two"])])
    assert len(data) == 1
    clip = data[Place(5, 2, 0)]
    assert clip.frames.shape == (9, *SIZE, 3)
    assert clip.frames.dtype == torch.uint8
    assert clip.captions == ("one", "two")
    assert clip.place == Place(5, 2, 0)
    first = numbers(clip)[0]
    assert numbers(clip) == list(range(first, first + 9))
    assert clip.key == f"{tmp_path.name}/a.mkv[0:{first}+9]"


def test_windows_are_anywhere_in_the_clip_and_no_further(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", frames=30)
    data = clips(tmp_path, [record("a.mkv", frames=14, cut=[10, 24])])
    seen = {first_of(data[Place(step, 0, 0)]) for step in range(60)}
    assert seen == set(range(10, 16))  # the last has frames 15 to 23


def test_fixed_windows_follow_from_seed_and_row(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv")
    records = [record("a.mkv")] * 8
    data = clips(tmp_path, records, windows="fixed", seed=1)
    keys = [data[Place(0, 0, row)].key for row in range(8)]
    assert keys == [data[Place(9, 3, row)].key for row in range(8)]
    assert len(set(keys)) == 8
    assert len({key.rpartition(":")[2] for key in keys}) > 2
    other = clips(tmp_path, records, windows="fixed", seed=2)
    assert keys != [other[Place(0, 0, row)].key for row in range(8)]
    moving = clips(tmp_path, records, seed=1)
    assert len({moving[Place(step, 0, 0)].key for step in range(8)}) > 2


@pytest.mark.parametrize(
    ("fps", "frames", "expected"),
    [
        (50, 17, range(0, 17, 2)),
        (40, 14, [0, 1, 3, 4, 6, 8, 9, 11, 12]),  # every 1.6
        (25, 9, range(9)),
    ],
)
def test_the_training_rate(tmp_path: Path, fps: int, frames: int, expected: Any) -> None:
    """The frames that are there are just enough for one window, up to the very last."""
    write(tmp_path / "a.mkv", frames, fps)
    data = clips(tmp_path, [record("a.mkv", frames, fps)])
    assert numbers(data[Place(0, 0, 0)]) == list(expected)


def test_windows_of_faster_files(tmp_path: Path) -> None:
    """They begin where the key says, in frames of the file, and reach to its last."""
    write(tmp_path / "a.mkv", 60, 50)
    write(tmp_path / "b.mkv", 14, 40)
    data = clips(tmp_path, [record("a.mkv", 60, 50), record("b.mkv", 14, 40)])
    for step in range(5):
        clip = data[Place(step, 0, 0)]
        assert numbers(clip) == list(range(first_of(clip), first_of(clip) + 17, 2))
    assert {first_of(data[Place(step, 0, 1)]) for step in range(10)} == {0, 1}  # 0 to 12, 1 to 13


def test_a_rate_that_is_nearly_the_training_rate_is_taken_as_it_is(tmp_path: Path) -> None:
    """Frames at 24.08 a second from 24 would repeat one now and then."""
    write(tmp_path / "a.mkv", 60, 24)
    rule = Rule(frames=57, fps=24.08, size=SIZE)
    data = clips(tmp_path, [record("a.mkv", 60, 24)], rule)
    clip = data[Place(0, 0, 0)]
    assert numbers(clip) == list(range(first_of(clip), first_of(clip) + 57))


def test_crops_and_buckets_of_other_shapes(tmp_path: Path) -> None:
    """Each quarter of the picture has a level of its own."""
    picture = np.zeros((96, 128, 3), np.uint8)
    picture[48:, 64:] = 200
    Image.fromarray(picture).save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "bgr0"
        for _ in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    crop = {"size": (96, 128), "crop": [64, 128, 48, 96]}
    data = clips(tmp_path, [record("a.mkv", 9, **crop), record("a.png", **crop)])
    assert [data[Place(0, 0, row)].frames.unique().tolist() for row in (0, 1)] == [[200], [200]]
    assert [len(data[Place(0, 0, row)].frames) for row in (0, 1)] == [9, 1]


def test_a_clip_is_scaled_and_never_enlarged(tmp_path: Path) -> None:
    write(tmp_path / "a.mkv", size=(112, 144))
    rule = Rule(frames=9, fps=25, max_pixels=3072, min_pixels=1, longest=100)
    data = clips(tmp_path, [record("a.mkv", size=(112, 144))], rule)
    assert data[Place(0, 0, 0)].frames.shape == (9, 48, 64, 3)


def test_workers_read_the_same(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.mkv")
    (tmp_path / "c.mkv").write_bytes(b"no video")
    records = [record(f"{name}.mkv") for name in "abcd"] * 60
    data = clips(tmp_path, records[:2] + records[3:])
    sampler = BucketBatchSampler(data.buckets.bucket, 3, seed=4, stop=6)
    runs = []
    for workers in (0, 2):
        data._tried, data.reasons = 1000, {}
        loader = DataLoader(data, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        runs.append([clip for batch in loader for clip in batch])
    assert [clip.key for clip in runs[0]] == [clip.key for clip in runs[1]]
    assert [clip.place for clip in runs[0]] == [clip.place for clip in runs[1]]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(*runs, strict=True))


# Images.


def test_an_image(tmp_path: Path) -> None:
    """Turned upright by its EXIF orientation, and cut about the centre."""
    picture = np.zeros((64, 48, 3), np.uint8)
    picture[:32] = 255  # the upper half; turned, the right one
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "a.png", exif=turned)
    assert image.probe_image("a.png", root=tmp_path) == (48, 64)
    data = clips(tmp_path, [record("a.png"), record("missing.png")])
    clip = data.read(Place(0, 0, 0))
    assert clip.key == f"{tmp_path.name}/a.png[0]"
    assert clip.frames.shape == (1, 48, 64, 3)
    assert clip.frames[0, :, :32].unique().tolist() == [0]
    assert clip.frames[0, :, 32:].unique().tolist() == [255]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_other_kinds_of_pixels(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (64, 48), (255, 255, 255)).convert(mode).save(tmp_path / "a.png")
    read = image.read_image(tmp_path / "a.png", size=SIZE)
    assert read.unique().tolist() == [255]


def _header_bomb(path: Path) -> None:
    """A PNG that says that it has 60000 x 60000 pixels, in a few bytes."""
    Image.new("RGB", (64, 48)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)


def test_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, message: str, **more: Any) -> None:
        with pytest.raises(VideoError, match=rf"'{name}'.*{message}"):
            image.read_image(name, size=SIZE, root=tmp_path, **more)

    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    for name in ("a.png", "a.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"cut{name}").write_bytes(data[: len(data) // 2])
        refused(f"cut{name}", "no image that can be read")
    (tmp_path / "text.png").write_text("hello")
    refused("text.png", "no image that can be read")
    Image.fromarray(noise).save(tmp_path / "gif.png", format="gif")
    refused("gif.png", "no image that can be read")
    Image.fromarray(noise[:47]).save(tmp_path / "small.png")
    refused("small.png", "fewer than the 64x48")
    Image.new("I;16", (128, 96)).save(tmp_path / "deep.png")
    refused("deep.png", "I;16, not of 8 bits")
    refused("gone.png", "no such file")
    refused("a.png", "is not inside its 128x96", crop=(0, 65, 96, 64))
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "x.png")
    Image.fromarray(noise).save(tmp_path.parent / "x.png")
    refused("link.png", "leads out of root")

    def load(*_: Any) -> None:
        pytest.fail("an image was decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    refused("a.png", "max_pixels=12,287", limits=Limits(max_pixels=128 * 96 - 1))
    _header_bomb(tmp_path / "bomb.png")
    refused("bomb.png", "")


# Bad files.


def many(tmp_path: Path, bad: set[int], count: int = 300, **more: Any) -> Clips:
    """Rows that are all of two files, a good one and one that is no video."""
    write(tmp_path / "good.mkv")
    (tmp_path / "bad.mkv").write_bytes(b"no video")
    records = [record("bad.mkv" if row in bad else "good.mkv") for row in range(count)]
    return clips(tmp_path, records, bad=tmp_path / "bad.jsonl", **more)


def read(data: Clips, rows: range) -> None:
    for row in rows:
        data[Place(0, 0, row)]


def test_a_bad_file_is_replaced_and_written_down(tmp_path: Path) -> None:
    data = many(tmp_path, {7})
    data._tried = 1000
    clip = data[Place(0, 0, 7)]
    assert clip.place.row != 7
    assert clip.key.startswith(f"{tmp_path.name}/good.mkv[{clip.place.row}:")
    assert clip.place[:2] == (0, 0)
    again = data[Place(0, 0, 7)]
    assert again.key == clip.key
    assert len({data[Place(step, 0, 7)].place.row for step in range(5)}) > 1
    assert len({data[Place(0, index, 7)].place.row for index in range(5)}) > 1
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()  # once, however often it is met
    entry = json.loads(line)
    assert entry["path"] == str(tmp_path / "bad.mkv")
    assert "not a video that can be read" in entry["reason"]
    with pytest.raises(VideoError, match="not a video"):
        data.read(Place(0, 0, 7))


def test_what_is_good_in_a_bad_file_is_read(tmp_path: Path) -> None:
    """Or else a clip would depend on what the same worker has read before."""
    write(tmp_path / "a.mkv", 20)
    write(tmp_path / "b.mkv", 40)
    records = [record("a.mkv", 40), record("b.mkv", 40)]
    data = clips(tmp_path, records)
    data._tried = 1000
    rows = [data[Place(step, 0, 0)].place.row for step in range(20)]
    assert set(rows) == {0, 1}
    fresh = clips(tmp_path, records)
    fresh._tried = 1000
    assert [fresh[Place(step, 0, 0)].place.row for step in reversed(range(20))] == rows[::-1]


def test_rows_are_counted_once_however_often_they_are_read(tmp_path: Path) -> None:
    data = many(tmp_path, {100, 101}, count=150)
    for _ in range(3):
        read(data, range(101))
    with pytest.raises(DataError, match=r"(1\.9|2\.0)% of the files tried are bad"):
        data[Place(0, 0, 101)]


def test_the_replacement_is_of_the_same_bucket(tmp_path: Path) -> None:
    write(tmp_path / "long.mkv", 30)
    write(tmp_path / "short.mkv", 9)
    files = (("gone.mkv", 9), ("long.mkv", 30), ("long.mkv", 30), ("short.mkv", 9))
    records = [record(*file) for file in files]
    rule = Rule(frames=17, fps=25, size=SIZE, drop_short=0.0)
    data = clips(tmp_path, records, rule)
    data._tried = 1000
    assert {data[Place(step, 0, 0)].place.row for step in range(10)} == {3}


def test_more_than_one_per_cent_bad(tmp_path: Path) -> None:
    data = many(tmp_path, {5, 210, 211})
    read(data, range(211))  # 2 bad are less than 1 %
    with pytest.raises(
        DataError, match=r"^1\.4% of the files tried are bad.*'bad\.mkv'.*bad\.jsonl"
    ):
        data[Place(0, 0, 211)]


def test_one_per_cent_is_asked_only_once_there_is_something_to_go_by(tmp_path: Path) -> None:
    data = many(tmp_path, {0, 1})
    read(data, range(90))
    with pytest.raises(DataError, match=r"2\.0% of the files tried are bad"):
        read(data, range(90, 120))


def test_a_small_data_set_is_judged_when_all_of_it_was_tried(tmp_path: Path) -> None:
    data = many(tmp_path, {3}, count=6)
    with pytest.raises(DataError, match=r"1\d\.\d% of the files tried are bad"):
        read(data, range(6))


def test_all_bad_does_not_go_on_for_ever(tmp_path: Path) -> None:
    data = many(tmp_path, set(range(300)))
    with pytest.raises(DataError, match=r"no clip could be read in 20 tries.*not a video"):
        data[Place(0, 0, 0)]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) <= 20


def _write_lines(data: Clips, first: int) -> None:
    for row in range(first, first + 100):
        data._note(row, "x" * (row + 1))


def test_many_processes_write_whole_lines(tmp_path: Path) -> None:
    data = many(tmp_path, set(), count=400)
    with ProcessPoolExecutor(4) as pool:
        for future in [pool.submit(_write_lines, data, first) for first in range(0, 400, 100)]:
            future.result()
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(len(line["reason"]) for line in lines) == list(range(1, 401))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("fewer", r"ends after 0\.6\d+ s, enough for"),
        ("middle", "damaged after"),
        ("smaller", "fewer than the 64x48 asked for"),
        ("crop", "the crop .* is not inside its 64x48 pixels"),
        ("link", "leads out of root"),
        ("bomb", "max_pixels=3,071"),
        ("missing", "no such file"),
    ],
)
def test_faults_are_quarantined_with_their_reason(tmp_path: Path, fault: str, message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path, limits, more = root / "a.mkv", None, {}
    if fault == "fewer":
        write(path, 16)
        more["cut"] = [12, 30]
    elif fault == "middle":
        data = bytearray(write(path, 30).read_bytes())
        middle = len(data) // 2
        data[middle : middle + 500] = bytes(x ^ 0xFF for x in data[middle : middle + 500])
        path.write_bytes(data)
        more["frames"] = 9 * 3
    elif fault == "smaller":
        write(path, size=(32, 48))
    elif fault == "crop":
        write(path)
        more |= {"crop": [64, 128, 0, 48], "size": (48, 128)}
    elif fault == "link":
        path.symlink_to(write(tmp_path / "secret.mkv"))
    elif fault == "bomb":
        write(path)
        limits = Limits(max_pixels=48 * 64 - 1)
    rule = Rule(frames=17 if fault == "middle" else 9, fps=25, size=SIZE, longest=100)
    data = clips(root, [record("a.mkv", **more)], rule, limits=limits, bad=tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match=message):
        data[Place(0, 0, 0)]
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(root / "a.mkv")


# Arguments.


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    manifest = open_rows(tmp_path, [record("a.mkv"), record("b.mkv", size=(16, 16))])
    buckets = assign(manifest, RULE, 0)
    with pytest.raises(ValueError, match="windows must be random or fixed, got 'any'"):
        Clips(manifest, buckets, RULE, windows="any")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="buckets are of 1 rows and the manifest has 2"):
        Clips(manifest, Buckets(((9, 48, 64),), np.zeros(1, np.int16)), RULE)
    with pytest.raises(ValueError, match="row 1 has no bucket"):
        Clips(manifest, buckets, RULE)[Place(0, 0, 1)]


# Lengths that are estimates.


def test_an_estimate_is_counted_when_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that lies, too large to be looked through."""
    monkeypatch.setattr(video, "SCAN_BYTES", 10)
    data = write(tmp_path / "a.mkv", 30).read_bytes()
    (tmp_path / "a.txt").write_text("x")
    mark = b"\x44\x89\x88"  # Duration, a double in milliseconds
    at = data.index(mark) + 3
    (tmp_path / "a.mkv").write_bytes(data[:at] + struct.pack(">d", 40_000.0) + data[at + 8 :])
    manifest = Manifest.open(tmp_path)
    assert manifest.frames.tolist() == [1000]
    rule = Rule(frames=9, fps=25, size=SIZE, longest=1000)
    opened = Clips(manifest, assign(manifest, rule, 0), rule)
    seen = {first_of(opened[Place(step, 0, 0)]) for step in range(80)}
    assert seen == set(range(22))
    fresh = Clips(manifest, assign(manifest, rule, 0), rule)
    assert fresh[Place(7, 0, 0)].key == opened[Place(7, 0, 0)].key
    fast = Rule(frames=9, fps=25, size=SIZE, longest=1000)
    wrong = Clips(manifest, assign(manifest, fast, 0), replace(fast, fps=30.0))
    with pytest.raises(VideoError, match=r"25\.000 frames a second when counted"):
        wrong.read(Place(0, 0, 0))


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_orientation(tmp_path: Path, value: int, suffix: str) -> None:
    """As Pillow's own function turns it."""
    generator = np.random.default_rng(0)
    picture = np.kron(
        generator.integers(0, 256, (4, 6, 3), np.uint8), np.ones((16, 16, 1), np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(picture).save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    with Image.open(tmp_path / f"a.{suffix}") as stored:
        expected = np.array(ImageOps.exif_transpose(stored).convert("RGB"))
    assert image.probe_image(tmp_path / f"a.{suffix}") == expected.shape[:2]
    read = image.read_image(tmp_path / f"a.{suffix}", size=expected.shape[:2])
    assert np.array_equal(read[0].numpy(), expected)


ODD = {
    "text": (2, b"in\0\0", 3),
    "bytes": (7, b"abcd", 4),
    "fraction": (5, struct.pack("<I", 8), 1),
    "signed fraction": (10, struct.pack("<I", 8), 1),
    "directory": (13, struct.pack("<I", 8), 1),
    "no Unicode": (2, b"\xff\xfe\0\0", 3),
    "double": (12, struct.pack("<I", 8), 1),
    "no such type": (99, b"abcd", 1),
    "far too many": (3, struct.pack("<I", 8), 2**32 - 1),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("tag", [0x100, 0x103, 0x10F, 0x11A, 0x11B, 0x132, 0x213, 0x8769, 0x8825])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_odd_tags_cost_nothing(tmp_path: Path, kind: str, tag: int) -> None:
    """Programs write them; the picture is turned all the same."""
    number, value, count = ODD[kind]
    entries = [
        struct.pack("<HHII", 0x112, 3, 1, 6),
        struct.pack("<HHI", tag, number, count) + value,
    ]
    tiff = b"II*\0\x08\0\0\0" + struct.pack("<H", 2) + b"".join(sorted(entries)) + bytes(4)
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + tiff)
    assert image.probe_image(tmp_path / "a.jpg") == (64, 48)
    assert image.read_image(tmp_path / "a.jpg", size=(64, 48)).shape == (1, 64, 48, 3)


@pytest.mark.parametrize(
    "exif",
    [b"", b"II", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 5],
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_exif_that_is_cut_short_turns_nothing(tmp_path: Path, exif: bytes) -> None:
    Image.new("RGB", (64, 48), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif)
    assert image.probe_image(tmp_path / "a.jpg") == (48, 64)
    assert image.read_image(tmp_path / "a.jpg", size=(48, 64)).shape == (1, 48, 64, 3)


def test_a_picture_that_moves_is_no_image(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (64, 48), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "a.webp", save_all=True, append_images=pages[1:])
    with pytest.raises(VideoError, match="moves; convert it to a video"):
        image.probe_image(tmp_path / "a.webp")
