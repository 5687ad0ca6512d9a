"""What a manifest promises: every record is a row, a counted loss, or an error that names it."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")

from skiparse.models.data import manifest  # noqa: E402  # after the checks
from skiparse.models.data.atomic import write_json  # noqa: E402
from skiparse.models.data.limits import Limits  # noqa: E402
from skiparse.models.data.manifest import DataError, Manifest, Record  # noqa: E402
from skiparse.models.data.video import read_video  # noqa: E402

VIDEO = {
    "path": "a/b.mp4",
    "cap": "a cat",
    "resolution": {"height": 720, "width": 1280},
    "num_frames": 100,
    "fps": 30,
}
IMAGE = {"path": "c.jpg", "cap": ["a dog", "a hound"], "resolution": {"height": 64, "width": 48}}


def without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}


def write(path: Path, records: Any) -> Path:
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def clip(path: Path, frames: int = 9, size: tuple[int, int] = (48, 64), fps: int = 25) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            picture = np.full((*size, 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


# Annotations.


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("indexed", [True, False])
def test_records_become_rows(tmp_path: Path, suffix: str, indexed: bool) -> None:
    second = {**VIDEO, "cut": [20, 60], "crop": [16, 640, 0, 360], "aesthetic": 5.5}
    third = {**without(VIDEO, "fps"), "num_frames": 7.0, "path": "./x:y.MKV", "cut": [3, 999]}
    source = write(tmp_path / f"a{suffix}", [VIDEO, IMAGE, second, third])
    read = Manifest.open(source, index=tmp_path / "index" if indexed else None)
    first = Record(tmp_path, "a/b.mp4", ("a cat",), 720, 1280, 100, 30.0, 0, None, True)
    assert [read.record(row) for row in range(len(read))] == [
        first,
        Record(tmp_path, "c.jpg", ("a dog", "a hound"), 64, 48, 1, 0.0, 0, None, False),
        replace(first, height=360, width=624, frames=40, start=20, crop=(0, 16, 360, 624)),
        replace(first, path="./x:y.MKV", frames=7, fps=24.0, start=3),
    ]
    assert read.height.tolist() == [720, 64, 360, 720]
    assert read.width.tolist() == [1280, 48, 624, 1280]
    assert read.frames.tolist() == [100, 1, 40, 7]
    assert read.fps.tolist() == [30.0, 0.0, 30.0, 24.0]
    assert read.is_video.tolist() == [1, 0, 1, 1]
    assert read.dropped == {}
    for row in (-1, 4):
        with pytest.raises(IndexError, match="of a manifest of 4 rows"):
            read.record(row)


def test_data_txt(tmp_path: Path) -> None:
    """Lines of a root and its annotations, relative to the file or absolute."""
    for name in ("one", "two, too"):
        (tmp_path / "media" / name).mkdir(parents=True)
    write(tmp_path / "one.json", [VIDEO])
    write(tmp_path / "two.jsonl", [IMAGE, VIDEO])
    source = tmp_path / "data.txt"
    source.write_text(f"media/one,one.json\n\n{tmp_path}/media/two, too , two.jsonl\n")
    read = Manifest.open(source)
    assert [read.record(row).root for row in range(3)] == [
        tmp_path / "media" / "one",
        *[tmp_path / "media" / "two, too"] * 2,
    ]
    assert [read.record(row).path for row in range(3)] == ["a/b.mp4", "c.jpg", "a/b.mp4"]


def test_what_has_no_caption_or_size_is_counted(tmp_path: Path) -> None:
    records = [
        without(VIDEO, "cap"),
        {**VIDEO, "cap": ""},
        {**VIDEO, "cap": [" ", "\n"]},
        {**VIDEO, "cap": []},
        {**VIDEO, "cap": ["", " kept "]},
        without(VIDEO, "resolution"),
    ]
    read = Manifest.open(write(tmp_path / "a.jsonl", records))
    assert len(read) == 1
    assert read.record(0).captions == ("kept",)
    assert read.dropped == {"no caption": 4, "no resolution": 1}
    with pytest.raises(DataError, match=r"no clip in .*: 4 no caption$"):
        Manifest.open(write(tmp_path / "a.json", records[:4]))
    with pytest.raises(DataError, match=r"no clip in .*: no records$"):
        Manifest.open(write(tmp_path / "a.json", []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": 5}, "path must be text, got 5"),
        ({"path": ""}, "path must be the name of a file, got ''"),
        ({"path": "a.gif"}, r"'a\.gif' is neither a video \(\.3gp, .*\) nor an image \(\.jfif, "),
        ({"path": "a\ud800.mp4"}, "path is no Unicode text"),
        ({"cap": 5}, "cap must be text, got 5"),
        ({"cap": ["a", None]}, "cap must be text, got None"),
        ({"cap": "\udfff"}, "cap is no Unicode text"),
        ({"resolution": [720, 1280]}, "resolution must hold height and width"),
        ({"resolution": {"height": 720}}, r"resolution\.width must be a whole number from 1"),
        ({"resolution": {"height": 0, "width": 1}}, r"resolution\.height .* got 0"),
        (
            {"resolution": {"height": 2**31, "width": 1}},
            r"resolution\.height .* to 2147483647",
        ),
        ({"num_frames": None}, "num_frames must be a whole number"),
        ({"num_frames": 1.5}, r"num_frames .* got 1\.5"),
        ({"num_frames": True}, "num_frames .* got True"),
        ({"num_frames": float("nan")}, "num_frames .* got nan"),
        ({"num_frames": 10**400}, "num_frames must be"),
        ({"fps": 0}, "fps must be above 0 and at most 1000, got 0"),
        ({"fps": float("nan")}, "fps must be above 0"),
        ({"fps": "24"}, "fps must be above 0 and at most 1000, got '24'"),
        ({"cut": [5]}, r"cut must be a list of 2 numbers, got \[5\]"),
        ({"cut": [5, 5]}, r"cut must be \[first, end\] with first < end, got \[5, 5\]"),
        ({"cut": [-1, 5]}, "cut must be a whole number from 0"),
        ({"crop": [0, 1281, 0, 720]}, r"crop must be \[x0, x1, y0, y1\] inside 1280x720 pixels"),
        ({"crop": [8, 8, 0, 720]}, "crop must be"),
    ],
)
def test_a_record_that_makes_no_sense_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    for name, where in (("a.jsonl", ":2"), ("a.json", r"\[1\]")):
        source = write(tmp_path / name, [VIDEO, {**VIDEO, **change}])
        with pytest.raises(DataError, match=f"{re.escape(str(source))}{where}: {message}"):
            Manifest.open(source)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("../x.mp4", "leads out of its root"),
        ("a/../../x.mp4", "leads out of its root"),
        ("a/..\\x.mp4", "leads out of its root"),
        ("/etc/x.mp4", "leads out of its root"),
        ("C:/x.mp4", "leads out of its root"),
        ("\\\\host\\x.mp4", "leads out of its root"),
        ("x\0.mp4", "only plain local files"),
        ("file:///x.mp4", "only plain local files"),
        ("http://host/x.mp4", "only plain local files"),
        ("concat:a.mp4|b.mp4", "only plain local files"),
    ],
)
def test_paths_stay_in_their_root(tmp_path: Path, path: str, message: str) -> None:
    source = write(tmp_path / "a.jsonl", [{**VIDEO, "path": path}])
    with pytest.raises(DataError, match=rf"a\.jsonl:1: path .*{message}"):
        Manifest.open(source)


def test_sources_that_make_no_sense(tmp_path: Path) -> None:
    def check(content: str | bytes, name: str, message: str) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            Manifest.open(tmp_path / name)

    write(tmp_path / "good.json", [VIDEO])
    (tmp_path / "a.pkl").write_bytes(b"")
    pickled = r"a\.pkl is a pickle, which may run code .*convert it to \.jsonl"
    check(b"", "b.pkl", pickled.replace("a", "b", 1))
    check("\n.,good.json\n.,a.pkl\n", "data.txt", rf"data\.txt:3: .*{pickled}")
    check("nothing", "data.txt", r"data\.txt:1: expected `root,annotations`, got 'nothing'")
    check("gone,good.json", "data.txt", r"data\.txt:1: the root .*gone is no folder")
    check(".,gone.json", "data.txt", r"data\.txt:1: .*gone\.json does not exist")
    check(f".,{'x' * 300}.json", "data.txt", r"data\.txt:1: .*x\.json does not exist")
    check(f"{'x' * 300},good.json", "data.txt", r"data\.txt:1: the root .*x is no folder")
    check(".,data.txt", "data.txt", r"data\.txt:1: annotations must be \.json or \.jsonl")
    check("\n", "data.txt", r"data\.txt is empty")
    check(b"\xff", "data.txt", r"data\.txt:1 is not utf-8")
    check("{}", "a.json", r"a\.json must hold an array of records, got dict")
    check("[", "a.json", r"a\.json: no JSON")
    check("[" * 10**5, "a.json", r"a\.json: no JSON")
    check("\n{}x", "a.jsonl", r"a\.jsonl:2: no JSON")
    check("5", "a.jsonl", r"a\.jsonl:1: expected a record, got int")
    check("[]", "a.json", r"no clip in .*/a\.json: no records$")
    check("\n", "a.jsonl", r"no clip in .*/a\.jsonl: no records$")
    check(b"\xff", "a.jsonl", r"a\.jsonl:1 is not utf-8")
    check("", "a.csv", r"annotations must be \.json or \.jsonl")
    with pytest.raises(DataError, match=r"gone does not exist"):
        Manifest.open(tmp_path / "gone")
    with pytest.raises(DataError, match=r"source is empty"):  # and not where one happens to be
        Manifest.open("")


# A folder.


def test_a_folder_of_clips(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    clip(tmp_path / "b.mp4")
    clip(tmp_path / "in" / "a.MKV", frames=12, size=(32, 48), fps=30)
    Image.new("RGB", (40, 20)).save(tmp_path / "c.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "d.jpg", exif=turned)
    for name in ("b", "in/a", "c", "d"):
        (tmp_path / f"{name}.txt").write_text(f" the caption\nof {name}\n")
    (tmp_path / ".hidden.mp4").write_bytes(b"x")
    (tmp_path / "notes.md").write_text("x")
    read = Manifest.open(tmp_path)
    assert [read.record(row) for row in range(len(read))] == [
        Record(tmp_path, "b.mp4", ("the caption\nof b",), 48, 64, 9, 25.0, 0, None, True),
        Record(tmp_path, "c.png", ("the caption\nof c",), 20, 40, 1, 0.0, 0, None, False),
        Record(tmp_path, "d.jpg", ("the caption\nof d",), 40, 20, 1, 0.0, 0, None, False),
        Record(tmp_path, "in/a.MKV", ("the caption\nof in/a",), 32, 48, 12, 30.0, 0, None, True),
    ]


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_sound_that_is_longer_than_the_picture_adds_no_frames(tmp_path: Path, suffix: str) -> None:
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        sound = container.add_stream("aac", rate=8000)
        picture = np.zeros((48, 64, 3), np.uint8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        silence = np.zeros((1, 8000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(), *sound.encode(frame), *sound.encode()])
    (tmp_path / "a.txt").write_text("x")
    assert Manifest.open(tmp_path).frames.tolist() == [10]


def test_captions_that_are_missing_in_a_folder(tmp_path: Path) -> None:
    """They cost their clip, and nothing else."""
    for name in "abc":
        clip(tmp_path / f"{name}.mp4")
    with pytest.raises(DataError, match=r"no clip in .*: 3 no caption in a \.txt of its name$"):
        Manifest.open(tmp_path)
    (tmp_path / "b.txt").write_text("b")
    read = Manifest.open(tmp_path)
    assert read.dropped == {"no caption in a .txt of its name": 2}
    assert read.examples == {
        "no caption in a .txt of its name": [str(tmp_path / f"{name}.mp4") for name in "ac"]
    }
    for name in "ac":
        (tmp_path / f"{name}.txt").write_text("\n")
    assert Manifest.open(tmp_path).dropped == {"no caption": 2}


@pytest.mark.parametrize("indexed", [True, False])
def test_a_bad_entry_of_a_folder_costs_itself_only(tmp_path: Path, indexed: bool) -> None:
    folder = tmp_path / "clips"
    (folder / "closed").mkdir(parents=True)
    good = clip(folder / "good.mp4").read_bytes()
    (folder / "dangling.mp4").symlink_to("/nowhere.mp4")
    (folder / "circle.mp4").symlink_to(folder / "other.mp4")
    (folder / "other.mp4").symlink_to(folder / "circle.mp4")
    (folder / "self").symlink_to(folder)
    (folder / "folder.mp4").mkdir()
    (folder / "b.mp4").write_bytes(good)
    (folder / "b.txt").mkdir()
    (folder / "c.mp4").write_bytes(good)
    (folder / "c.txt").symlink_to("/nowhere.txt")
    (folder / "d.mp4").write_bytes(good)
    (folder / "d.txt").write_bytes(b"\xff\xfe\xfd")
    (folder / "e.mp4").write_bytes(good)
    (folder / "e.txt").write_bytes("a cat".encode("utf-16-le"))
    odd = ["Re: y", "X: the film", "-i", "two\nlines", "a\\b", "100%d", "http:", "C:"]
    for name in (*odd, "nämlich", "name.with.dots"):
        (folder / f"{name}.mp4").write_bytes(good)
        (folder / f"{name}.txt").write_text(name)
    latin = os.fsdecode("n\xe4mlich".encode("latin-1"))
    (folder / f"{latin}.mp4").write_bytes(good)
    for name in ("good", "dangling", "circle", "other", latin):
        (folder / f"{name}.txt").write_text(ascii(name))
    with pytest.warns(UserWarning, match="3 of .* cannot be opened"):
        read = Manifest.open(folder, index=tmp_path / "index" if indexed else None)
    records = [read.record(row) for row in range(len(read))]
    captions = {caption for record in records for caption in record.captions}
    assert captions == {*odd, "nämlich", "name.with.dots", "'good'"}
    for record in records:
        clipped = read_video(record.path, root=record.root, frames=9, fps=25, size=(48, 64))
        assert len(clipped) == 9
    assert read.dropped == {
        "a link to a folder, not followed": 1,
        "cannot be opened": 3,
        "a caption that cannot be read": 3,
        "no caption in a .txt of its name": 1,
        "a name that cannot be used": 1,
    }
    write_json(tmp_path / "names.json", read.examples)  # all can be written


def test_a_closed_folder_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be allowed to open it."""
    clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    read = Manifest.open(tmp_path)
    assert read.dropped == {"a folder that cannot be opened": 1}
    assert read.examples["a folder that cannot be opened"][0].endswith("closed: Permission denied")


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("a.gif", "b.GIF", "c.psd", "d.gif"):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / name).with_suffix(".txt").write_text("x")
    (tmp_path / "d.txt").unlink()  # without a caption it is no clip
    with pytest.raises(DataError, match=r"2 of a kind .* \(\.gif\), 1 of .*\(\.psd\)$"):
        Manifest.open(tmp_path)
    clip(tmp_path / "e.mp4")
    (tmp_path / "e.txt").write_text("x")
    read = Manifest.open(tmp_path)
    assert read.dropped == {
        "of a kind that is not read (.gif)": 2,
        "of a kind that is not read (.psd)": 1,
    }
    assert read.report().line == (
        f"{tmp_path}: used 1 of 4; dropped 3: 2 of a kind that is not read (.gif), 1 of a kind "
        "that is not read (.psd)"
    )


def test_no_records_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r": no records$"):
        Manifest.open(tmp_path)
    for name in ("a.json", "b.json", "c"):
        (tmp_path / name).write_text("x")
    message = r": no records; in it are files of 2 \.json, 1 no suffix$"
    with pytest.raises(DataError, match=message):
        Manifest.open(tmp_path)


@pytest.mark.parametrize("suffix", ["ts", "m2ts", "mpg", "flv", "wmv", "ogv", "mkv", "y4m", "3gp"])
def test_every_container_is_looked_into(tmp_path: Path, suffix: str) -> None:
    codec, pixels = {
        "ts": ("libx264", "yuv420p"),
        "m2ts": ("libx264", "yuv420p"),
        "mpg": ("mpeg2video", "yuv420p"),
        "flv": ("libx264", "yuv420p"),
        "wmv": ("wmv2", "yuv420p"),
        "ogv": ("libvpx", "yuv420p"),
        "y4m": ("wrapped_avframe", "yuv420p"),
    }.get(suffix, ("mpeg4", "yuv420p"))
    with av.open(str(tmp_path / f"a.{suffix.upper()}"), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 96, 128, pixels
        for i in range(12):
            picture = np.full((96, 128, 3), 10 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    (tmp_path / "a.txt").write_text("x")
    read = Manifest.open(tmp_path)
    assert read.frames.tolist() == [12]
    assert read.fps.tolist() == [25]
    assert read.is_video.tolist() == [1]


@pytest.mark.parametrize("suffix", ["jfif", "jpg", "webp", "png"])
def test_every_kind_of_image_is_looked_into(tmp_path: Path, suffix: str) -> None:
    kind = {"jfif": "jpeg", "jpg": "jpeg"}.get(suffix, suffix)
    Image.new("RGB", (40, 20)).save(tmp_path / f"a.{suffix}", format=kind)
    (tmp_path / "a.txt").write_text("x")
    assert Manifest.open(tmp_path).height.tolist() == [20]


def test_what_stands_still_is_left_out(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for time in (0, 1, 2, 90, 91):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "a.txt").write_text("x")
    with (
        pytest.warns(UserWarning, match=r"nothing for 3\.520 s, longer than max_hold=2\.0"),
        pytest.raises(DataError, match="1 cannot be opened"),
    ):
        Manifest.open(tmp_path, index=tmp_path / "index")
    read = Manifest.open(tmp_path, index=tmp_path / "index", limits=Limits(max_hold=4))
    assert read.frames.tolist() == [5]
    clip(tmp_path / "b.mkv")
    (tmp_path / "b.txt").write_text("y")
    for limits, names in ((None, ["b.mkv"]), (Limits(max_hold=4), ["a.mkv", "b.mkv"])):
        read = Manifest.open(tmp_path, index=tmp_path / "index", limits=limits)
        assert [read.record(row).path for row in range(len(read))] == names  # made anew


def test_a_large_file_has_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip(tmp_path / "a.mkv")
    (tmp_path / "a.txt").write_text("x")
    assert Manifest.open(tmp_path).record(0).exact
    monkeypatch.setattr("skiparse.models.data.video.SCAN_BYTES", 10)
    read = Manifest.open(tmp_path)
    assert not read.record(0).exact
    assert read.is_video.tolist() == [2]
    assert read.report().more == {"estimated": 1}


# Marks of encodings.

ENCODINGS = ["utf-8-sig", "utf-16", "utf-32", "utf-8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mark_is_no_part_of_a_caption(tmp_path: Path, encoding: str) -> None:
    clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes("ein Kätzchen\r\n".encode(encoding))
    assert Manifest.open(tmp_path).record(0).captions == ("ein Kätzchen",)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_mark_is_no_part_of_annotations(tmp_path: Path, encoding: str, suffix: str) -> None:
    (tmp_path / "media").mkdir()
    marked = {**VIDEO, "cap": ["\ufeffa cat", " \ufeff ", "a dog"]}
    write(tmp_path / f"a{suffix}", [marked, VIDEO])
    text = (tmp_path / f"a{suffix}").read_text()
    (tmp_path / f"a{suffix}").write_bytes(text.encode(encoding))
    (tmp_path / "data.txt").write_bytes(f"media,a{suffix}\r\n".encode(encoding))
    read = Manifest.open(tmp_path / "data.txt")
    assert [read.record(row).captions for row in (0, 1)] == [("a cat", "a dog"), ("a cat",)]


def test_titles_are_names_in_annotations_too(tmp_path: Path) -> None:
    names = ("Re: y.mp4", "X: the film.mp4", "a/Re: z.mp4")
    read = Manifest.open(write(tmp_path / "a.jsonl", [{**VIDEO, "path": name} for name in names]))
    assert tuple(read.record(row).path for row in range(3)) == names


def test_clips_that_cannot_be_opened_are_left_out_with_a_warning(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    (tmp_path / "c.png").write_bytes(b"no image")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("x")
    with pytest.warns(UserWarning, match=r"2 of 3 clips .*'b\.mp4': not a video.*'c\.png': no ima"):
        read = Manifest.open(tmp_path)
    assert len(read) == 1
    assert read.dropped == {"cannot be opened": 2}


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    clip(tmp_path / "secret.mp4")
    (folder / "a.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "a.txt").write_text("x")
    with (
        pytest.warns(UserWarning, match="leads out of root"),
        pytest.raises(DataError, match=r"no clip in .*: 1 cannot be opened"),
    ):
        Manifest.open(folder)


def test_captions_that_never_end_cost_themselves_only(tmp_path: Path) -> None:
    for name in "abcd":
        clip(tmp_path / f"{name}.mp4")
    (tmp_path / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").touch()
    os.truncate(tmp_path / "d.txt", 2**40)
    read = Manifest.open(tmp_path)
    assert (len(read), read.dropped) == (1, {"a caption that cannot be read": 3})
    assert [example.rpartition("] ")[2] for example in next(iter(read.examples.values()))] == [
        "it is no plain file",
        "it is no plain file",
        "it has 1099511627776 bytes, more than 1048576",
    ]


@pytest.mark.parametrize("indexed", [True, False])
def test_a_folder_whose_name_is_no_text(tmp_path: Path, indexed: bool) -> None:
    folder = tmp_path / os.fsdecode(b"clips\xff")
    folder.mkdir()
    clip(folder / "a.mp4")
    (folder / "a.txt").write_text("x")
    for _ in range(2):
        read = Manifest.open(folder, index=tmp_path / "index" if indexed else None)
        assert read.record(0).root == folder
    read.report().write(tmp_path / "report.json")
    assert "clips\\xff" in read.report().line


# The index.


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every time that records were read."""
    times: list[int] = []
    write = manifest._write

    def counted(*args: Any) -> Any:
        times.append(len(times))
        return write(*args)

    monkeypatch.setattr(manifest, "_write", counted)
    return times


def test_an_index_is_read_again_until_something_changes(tmp_path: Path, built: list[int]) -> None:
    (tmp_path / "clips").mkdir()
    index = tmp_path / "index"
    write(tmp_path / "a.jsonl", [VIDEO])
    (tmp_path / "data.txt").write_text("clips,a.jsonl\n")
    first = Manifest.open(tmp_path / "data.txt", index=index)
    again = Manifest.open(tmp_path / "data.txt", index=index)
    assert len(built) == 1
    assert again.record(0) == first.record(0)
    assert again.fingerprint == first.fingerprint
    write(tmp_path / "a.jsonl", [VIDEO, IMAGE])
    assert len(Manifest.open(tmp_path / "data.txt", index=index)) == 2
    assert len(built) == 2
    assert first.record(0).path == "a/b.mp4"  # whoever has the old one open can go on with it
    write(tmp_path / "a.jsonl", [{**VIDEO, "cap": "a dog"}, IMAGE])  # of the same size
    os.utime(tmp_path / "a.jsonl", (1, 1))
    assert Manifest.open(tmp_path / "data.txt", index=index).record(0).captions == ("a dog",)
    assert len(built) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "data.txt").write_text("other,a.jsonl\n")
    assert Manifest.open(tmp_path / "data.txt", index=index).record(0).root.name == "other"
    assert len(built) == 4
    assert {path.name for path in index.iterdir()} == {
        "about.json",
        "lock",
        "numbers.arrow",
        "texts.arrow",
    }


def test_the_index_of_a_folder_follows_its_files(tmp_path: Path, built: list[int]) -> None:
    folder, index = tmp_path / "clips", tmp_path / "index"
    folder.mkdir()
    clip(folder / "a.mp4")
    (folder / "a.txt").write_text("a")
    for _ in range(2):
        Manifest.open(folder, index=index)
    assert len(built) == 1
    (folder / "a.txt").write_text("another")
    assert Manifest.open(folder, index=index).record(0).captions == ("another",)
    clip(folder / "b.mp4")
    (folder / "b.txt").write_text("b")
    assert len(Manifest.open(folder, index=index)) == 2


def test_an_index_whose_making_was_interrupted_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [VIDEO])
    index = tmp_path / "index"
    Manifest.open(source, index=index)
    write(source, [VIDEO, VIDEO, {}])
    with pytest.raises(DataError, match=r"a\.jsonl:3"):
        Manifest.open(source, index=index)
    assert not (index / "about.json").exists()
    assert not list(index.glob(".*"))
    write(source, [VIDEO, VIDEO])
    assert len(Manifest.open(source, index=index)) == 2


def _flipped(path: Path, at: float) -> None:
    """One bit of it, that far into it."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine").write_text("kept")


def _loop(path: Path) -> None:
    """What cannot be opened by anybody."""
    path.unlink()
    path.symlink_to(path.name)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
    "its last bytes": lambda path: os.truncate(path, path.stat().st_size - 2),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    **{f"a bit at {at}": partial(_flipped, at=at) for at in (0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)},
    "no text": lambda path: path.write_bytes(b"\xff" * 9),
    "other JSON": lambda path: path.write_text("5"),
    "an empty table": lambda path: path.write_text("{}"),
    "too deep": lambda path: path.write_text("[" * 10**5),
    "a folder": _folder,
    "nothing to open": _loop,
}


@pytest.mark.parametrize("name", ["about.json", "numbers.arrow", "texts.arrow"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_named_and_made_anew(
    tmp_path: Path, built: list[int], name: str, damage: str
) -> None:
    source, index = write(tmp_path / "a.jsonl", [VIDEO, IMAGE]), tmp_path / "index"
    sound = Manifest.open(source, index=index)
    right, print_ = [sound.record(row) for row in range(2)], sound.fingerprint
    DAMAGE[damage](index / name)
    with pytest.warns(UserWarning, match=rf"^{re.escape(str(index / name))} .* made anew$") as told:
        again = Manifest.open(source, index=index)
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    assert ([again.record(row) for row in range(2)], again.fingerprint) == (right, print_)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Manifest.open(source, index=index)) == 2
    assert len(built) == 2
    kept = [path.read_text() for path in index.glob(f"{name}.*.aside/mine")]
    assert kept == (["kept"] if damage == "a folder" else [])


def test_what_an_index_lacks_is_made_anew(tmp_path: Path, built: list[int]) -> None:
    """With a warning where the rest says that it was there; other formats are no damage."""
    source, index = write(tmp_path / "a.jsonl", [VIDEO, IMAGE]), tmp_path / "index"
    for name in ("numbers.arrow", "texts.arrow"):
        Manifest.open(source, index=index)
        (index / name).unlink()
        with pytest.warns(UserWarning, match=rf"{name} cannot be read \(No such file"):
            assert len(Manifest.open(source, index=index)) == 2
    (index / "texts.arrow").write_bytes((index / "numbers.arrow").read_bytes())
    with pytest.warns(UserWarning, match=r"texts\.arrow is not as it was written"):
        assert len(Manifest.open(source, index=index)) == 2
    assert len(built) == 4
    before = {"roots": [], "dropped": {}, "fingerprint": "x", "stamp": [2, "x"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_json(index / "about.json", before)
        assert len(Manifest.open(source, index=index)) == 2
        (index / "about.json").unlink()
        assert len(Manifest.open(source, index=index)) == 2
    (index / "lock").unlink()
    (index / "lock").mkdir()
    assert len(Manifest.open(source, index=index)) == 2
    assert len(built) == 6


def test_an_index_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [VIDEO])
    for index in (source, source / "below"):
        with pytest.raises(DataError, match=rf"index={re.escape(str(index))} cannot be written"):
            Manifest.open(source, index=index)
    assert len(Manifest.open(source)) == 1  # and was not touched


@pytest.mark.parametrize("indexed", [True, False])
def test_damaged_lists_are_errors_with_their_place(tmp_path: Path, indexed: bool) -> None:
    """For nobody can make them anew; and what cannot be opened is one too."""

    def check(data: bytes, name: str, message: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path / name))}{message}"):
            Manifest.open(tmp_path / name, index=tmp_path / "index" if indexed else None)

    row = json.dumps(VIDEO)
    check(f"{row}\n{row[:-5]}\n{row}\n".encode(), "a.jsonl", ":2: no JSON: ")
    check(f"{row}\n{row}\n".encode() + b'{"path": "\xff"}', "a.jsonl", ":3 is not utf-8: ")
    check(f"[{row},\n{row},\n{row[:9]}".encode(), "a.json", ": no JSON: .* line 3 ")
    check(f"[{row},\n{row},\n".encode() + b'"\xff"]', "a.json", ":3 is not utf-8: ")
    check(f"{row}\n{row}\n{row}".encode("utf-16")[:-1], "a.jsonl", ":3 is not utf-16.*: truncated")
    twice = row[:-1] + ', "cap": "another"}'
    check(f"{row}\n{twice}\n".encode(), "a.jsonl", ":2: no JSON: 'cap' is there twice")
    check(f"[{twice}]".encode(), "a.json", ": no JSON: 'cap' is there twice")
    check(b".,a.json\n.,\xff\n", "data.txt", ":2 is not utf-8: ")
    check(b".,a.json\n\n.,a.json\0\n", "data.txt", ":3 is not utf-8: NUL in it")
    for name in ("b.json", "b.jsonl", "b.txt"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # a file of which nobody can read a byte
        with pytest.raises(DataError, match=rf"{name} cannot be read: Input/output error"):
            Manifest.open(tmp_path / name)


def test_columns_are_mapped_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [VIDEO] * 10)
    before = pa.total_allocated_bytes()
    read = Manifest.open(source, index=tmp_path / "index")
    again = Manifest.open(source, index=tmp_path / "index")
    assert pa.total_allocated_bytes() == before
    assert not again.height.flags.writeable
    assert read.height.tolist() == [720] * 10


def test_the_fingerprint_is_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of where they lie or how they are written down."""
    prints = set()
    for place in ("x", "y"):
        folder = tmp_path / place / "clips"
        folder.mkdir(parents=True)
        prints.add(Manifest.open(write(folder / "a.json", [VIDEO, IMAGE])).fingerprint)
        prints.add(Manifest.open(write(folder / "b.jsonl", [VIDEO, IMAGE])).fingerprint)
    assert len(prints) == 1
    others = [
        [IMAGE, VIDEO],
        [VIDEO],
        [{**VIDEO, "cap": "b"}, IMAGE],
        [{**VIDEO, "path": "x.mp4"}, IMAGE],
        [{**VIDEO, "fps": 25}, IMAGE],
        [{**VIDEO, "cut": [1, 101]}, IMAGE],
        [{**VIDEO, "crop": [0, 1280, 0, 720]}, IMAGE],
    ]
    for records in others:
        prints.add(Manifest.open(write(tmp_path / "x/clips/c.json", records)).fingerprint)
    assert len(prints) == 1 + len(others)
    (tmp_path / "x/clips").rename(tmp_path / "x/cuts")
    prints.add(Manifest.open(tmp_path / "x/cuts/a.json").fingerprint)
    assert len(prints) == 2 + len(others)


def test_many_rows_are_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{**VIDEO, "cap": str(i), "num_frames": i + 1} for i in range(25)]
    source = write(tmp_path / "a.jsonl", records)
    monkeypatch.setattr(manifest, "_ROWS", 10)
    read = Manifest.open(source, index=tmp_path / "index")
    assert [read.record(row).captions for row in range(25)] == [(str(i),) for i in range(25)]
    assert read.frames.tolist() == list(range(1, 26))


def _second_caption(read: Manifest) -> tuple[str, ...]:
    return read.record(1).captions


@pytest.mark.parametrize("indexed", [True, False])
def test_it_goes_to_a_process_that_is_started_anew(tmp_path: Path, indexed: bool) -> None:
    source = write(tmp_path / "a.jsonl", [VIDEO, IMAGE])
    read = Manifest.open(source, index=tmp_path / "index" if indexed else None)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_second_caption, (read,)) == ("a dog", "a hound")
    if indexed:
        assert len(pickle.dumps(read)) < 1000


def test_nothing_is_warned_of_where_nothing_is_wrong(tmp_path: Path) -> None:
    clip(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(Manifest.open(tmp_path)) == 1
