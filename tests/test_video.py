"""What read_video promises: the right frames, at the right times, all of them, or a refusal."""

from __future__ import annotations

import gc
import itertools
import json
import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from skiparse.models.data import video  # noqa: E402  # after the check that av is there
from skiparse.models.data.h264 import FrameNumbers  # noqa: E402
from skiparse.models.data.limits import Limits  # noqa: E402
from skiparse.models.data.video import VideoError, probe, read_video  # noqa: E402

X265 = "log-level=none:pools=1:keyint=12:min-keyint=12:bframes=4:scenecut=0:b-pyramid=1"


def make(
    path: Path,
    frames: list[np.ndarray] | int = 12,
    *,
    size: tuple[int, int] = (48, 64),
    times: list[int] | None = None,
    tick: Fraction | None = None,
    fps: int = 25,
    codec: str = "ffv1",
    pixels: str = "bgr0",
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    before: Any = None,
) -> Path:
    """Write a clip, by default lossless frames of one grey level each: 0, 10, 20, ..."""
    if isinstance(frames, int):
        frames = [np.full((*size, 3), 10 * i, np.uint8) for i in range(frames)]
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = options or {}
        if tick:
            stream.time_base = stream.codec_context.time_base = tick
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if before is not None:
            before(stream)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = i if times is None else times[i]
            frame.time_base = tick or Fraction(1, fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def make_apart(path: Path, frames: list[np.ndarray], codec: str, options: dict[str, str]) -> Path:
    """The same by a process of its own, for SVT-AV1.

    It makes the process that calls it real-time if that is root's, with its threads and all it
    starts, for good: two of them that wait for each other then stop the machine.
    """
    code = """if True:
        import json, sys, av, numpy
        frames, path, codec, options = sys.argv[1:]
        with av.open(path, "w") as file:
            stream = file.add_stream(codec, rate=25, options=json.loads(options))
            frames = numpy.load(frames)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for array in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
            file.mux(stream.encode())
    """
    rows = path.with_suffix(".npy")
    np.save(rows, np.stack(frames))
    command = [sys.executable, "-c", code, rows, path, codec, json.dumps(options)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def copied(
    source: Path,
    path: Path,
    *,
    first: int = 0,
    without: Any = (),
    filters: str = "",
) -> Path:
    """The packets of a clip at 25 frames per second in another file, not encoded anew.

    Args:
        first: number of the frame at time 0. In mp4 those before it are hidden by an edit list, as
            ``ffmpeg -ss`` leaves them.
        without: numbers of packets to leave out.
        filters: a bitstream filter.
    """
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        made = new.add_stream_from_template(stream)
        change = av.bitstream.BitStreamFilterContext(filters or "null", stream, made)
        packets = [packet for packet in old.demux(stream) if packet.size]
        for i, packet in enumerate(packets):
            if i not in without:
                for changed in change.filter(packet):
                    if first:
                        back = round(first / 25 / changed.time_base)
                        changed.pts, changed.dts = changed.pts - back, changed.dts - back
                    changed.stream = made
                    new.mux(changed)
    return path


def levels(clip: torch.Tensor) -> list[int]:
    """Which frame of ``make`` each frame is, by its grey level."""
    return [round(float(frame.float().mean()) / 10) for frame in clip]


def read(path: Path | str, frames: int = 12, fps: float = 25, **more: Any) -> torch.Tensor:
    return read_video(path, frames=frames, fps=fps, size=more.pop("size", (48, 64)), **more)


def noise(count: int, height: int, width: int) -> list[np.ndarray]:
    """Frames that do not compress, so that damage anywhere in the file hits a picture."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def smooth(count: int) -> list[np.ndarray]:
    """Soft moving colours of 320 x 240: pictures such as codecs are made for."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, count // 4 + 2, 30, 40, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, (count, 240, 320), mode="trilinear")[0]
    return list((fine * 255).byte().permute(1, 2, 3, 0).contiguous().numpy())


# The right frames.


def test_every_frame_comes_back_exactly(tmp_path: Path) -> None:
    frames = noise(7, 20, 30)
    clip = read(make(tmp_path / "a.mkv", frames), 7, size=(20, 30))
    assert clip.dtype == torch.uint8
    assert clip.shape == (7, 20, 30, 3)
    assert np.array_equal(clip.numpy(), np.stack(frames))


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (10, [0, 2, 5, 7, 10]),  # 2.5 frames each: the one on screen, not the nearest to come
        (50, [0, 0, 1, 1, 2, 2, 3, 3]),
        (Fraction(25_000, 1001), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_resampling_takes_the_frame_on_screen(
    tmp_path: Path, fps: float, expected: list[int]
) -> None:
    assert levels(read(make(tmp_path / "a.mkv"), len(expected), fps)) == expected


def test_variable_frame_rate_goes_by_time_stamps(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", 5, times=[0, 40, 400, 440, 480], tick=Fraction(1, 1000))
    assert levels(read(path, 13)) == [0] + [1] * 9 + [2, 3, 4]


def test_stamps_rounded_to_milliseconds_lose_and_double_no_frame(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.mkv",
        20,
        times=[round(1000 * i / 30) for i in range(20)],
        tick=Fraction(1, 1000),
        fps=30,
    )
    assert levels(read(path, 20, 30)) == list(range(20))


def test_time_counts_from_the_first_frame(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.mkv", 5, times=[1000 + 40 * i for i in range(5)], tick=Fraction(1, 1000)
    )
    assert levels(read(path, 5)) == [0, 1, 2, 3, 4]


def test_frames_reordered_by_the_codec_come_in_order(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.mp4", 20, codec="libx264", pixels="yuv444p", options={"bf": "3", "crf": "1"}
    )
    assert levels(read(path, 20)) == list(range(20))


def test_crop_is_central_and_scaling_keeps_the_aspect(tmp_path: Path) -> None:
    frame = np.zeros((40, 100, 3), np.uint8)
    frame[:, 30:50, 0] = 255  # the cut to 1:1 keeps columns 30 to 70
    frame[:, 50:70, 2] = 255
    path = make(tmp_path / "a.mkv", [frame])
    (clip,) = read(path, 1, size=(20, 20))
    assert clip[:, :9].reshape(-1, 3).unique(dim=0).tolist() == [[255, 0, 0]]
    assert clip[:, 11:].reshape(-1, 3).unique(dim=0).tolist() == [[0, 0, 255]]


def test_scaling_is_antialiased(tmp_path: Path) -> None:
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::8] = 200  # one pixel in eight, and the scale is an eighth
    (clip,) = read(make(tmp_path / "a.mkv", [lines]), 1, size=(8, 8))
    assert (clip[:, 1:-1].int() - 25).abs().max() <= 8


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotation_is_undone(tmp_path: Path, rotation: int) -> None:
    upright = np.zeros((64, 32, 3), np.uint8)
    upright[:32, :16] = 240  # a bright corner, top left
    stored = np.ascontiguousarray(np.rot90(upright, -rotation // 90))
    path = make(tmp_path / "a.mp4", [stored], rotation=rotation, codec="libx264", pixels="yuv444p")
    assert probe(path).rotation % 360 == rotation % 360
    (clip,) = read(path, 1, size=(64, 32))
    assert (clip[..., 1].int() - torch.tensor(upright[..., 1]).int()).abs().float().mean() < 10


def test_a_mirrored_picture_is_undone(tmp_path: Path) -> None:
    stored = np.zeros((32, 32, 3), np.uint8)
    stored[:, 16:] = 240
    path = make(
        tmp_path / "a.mp4",
        [stored],
        codec="libx264",
        pixels="yuv444p",
        before=lambda stream: stream.set_display_rotation(0, hflip=True),
    )
    (clip,) = read(path, 1, size=(32, 32))
    assert clip[:, :12].min() > 200
    assert clip[:, 20:].max() < 40


def test_wide_pixels_are_shown_wide(tmp_path: Path) -> None:
    frame = np.zeros((40, 40, 3), np.uint8)
    frame[10:30] = 200  # at 2:1 pixels, a 2:1 picture; a square cut keeps the middle 20 columns

    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)

    frame[:, :10] = frame[:, 30:] = 255
    path = make(tmp_path / "a.mp4", [frame], codec="libx264", pixels="yuv444p", before=wide)
    (clip,) = read(path, 1, size=(20, 20))
    assert clip[0].max() < 60  # no white from the sides


@pytest.mark.parametrize(
    ("codec", "pixels", "size"),
    [
        ("ffv1", "yuv420p10le", (48, 64)),
        ("ffv1", "gray", (33, 47)),
        ("libx264", "yuv444p", (33, 47)),
        ("libvpx-vp9", "yuv420p", (33, 47)),
    ],
)
def test_ten_bits_grey_and_odd_sizes(
    tmp_path: Path, codec: str, pixels: str, size: tuple[int, int]
) -> None:
    path = make(tmp_path / "a.mkv", size=size, codec=codec, pixels=pixels)
    assert levels(read(path, size=size)) == list(range(12))


def test_untagged_high_definition_is_bt709(tmp_path: Path) -> None:
    green = np.zeros((720, 64, 3), np.uint8)
    green[..., 1] = 200
    frame = av.VideoFrame.from_ndarray(green, format="rgb24")
    yuv = frame.reformat(format="yuv444p", dst_colorspace="ITU709", dst_color_range="MPEG")
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 720, "yuv444p"
        plain = av.VideoFrame.from_ndarray(yuv.to_ndarray(), format="yuv444p")
        plain.pts = 0
        container.mux(stream.encode(plain))
        container.mux(stream.encode())
    (clip,) = read(path, 1, size=(720, 64))
    assert (clip.int() - torch.tensor([0, 200, 0])).abs().max() <= 2


def test_upscaling_must_be_asked_for(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match=r"64x48 .* fewer than the 128x96 .*allow_upscale=True"):
        read(path, size=(96, 128))
    with pytest.raises(VideoError, match="48x48 pixels after the cut"):
        read(path, size=(49, 49))
    assert levels(read(path, size=(96, 128), allow_upscale=True)) == list(range(12))


def test_progress_counts_the_frames(tmp_path: Path) -> None:
    seen: list[int] = []
    read(make(tmp_path / "a.mkv"), 24, 50, progress=seen.append)
    assert seen == [1] * 24


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"fps": 0},
        {"fps": -1},
        {"size": (0, 8)},
        {"start": -0.1},
        {"start": float("inf")},
        {"start": float("nan")},
        {"crop": (-1, 0, 8, 8)},
        {"crop": (0, 0, 0, 8)},
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))) as caught:
        read(make(tmp_path / "a.mkv"), **wrong)
    assert not isinstance(caught.value, VideoError)


def test_probe_reads_the_container(tmp_path: Path) -> None:
    info = probe(make(tmp_path / "a.mp4", 10, codec="libx264", pixels="yuv420p"))
    assert (info.width, info.height, info.frames, info.rotation) == (64, 48, 10, 0)
    assert (info.fps, info.duration) == (25, Fraction(2, 5))
    matroska = probe(make(tmp_path / "a.mkv", 10))  # counts no frames
    assert matroska.frames == 10


# All of them, or none.


def test_fewer_frames_than_asked_for(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", 12)
    with pytest.raises(VideoError, match=r"a\.mkv.*enough for 12 of the 13 frames.* 0\.480 s"):
        read(path, 13)
    with pytest.raises(VideoError, match="enough for 24 of the 25"):
        read(path, 25, 50)


def test_a_file_cut_short(tmp_path: Path) -> None:
    whole = make(tmp_path / "a.mkv", noise(12, 48, 64))
    read(whole)
    data = whole.read_bytes()
    for share in (0.3, 0.6, 0.95):
        cut = tmp_path / "cut.mkv"
        cut.write_bytes(data[: int(share * len(data))])
        with pytest.raises(VideoError, match=r"cut\.mkv.*of (the )?12 frames"):
            read(cut)


@pytest.mark.parametrize("front", [False, True], ids=["moov last", "moov first"])
def test_an_mp4_cut_short(tmp_path: Path, front: bool) -> None:
    options = {"movflags": "faststart"} if front else {}
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for array in noise(30, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    read(path, 30)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(VideoError, match=r"of (the )?30 frames" if front else "not a video"):
        read(path, 30)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mpeg2video"])
def test_flipped_bytes_in_the_middle(tmp_path: Path, codec: str) -> None:
    # On one thread, which writes the same file every time: H.264 has no checksums, so in some of
    # the files that several threads write such damage may happen to be a valid picture.
    one = {"threads": "1"}
    path = make(tmp_path / "a.mkv", smooth(24), codec=codec, pixels="yuv420p", options=one)
    read(path, 24)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 500] = bytes(x ^ 0xFF for x in data[middle : middle + 500])
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"a\.mkv.*of (the )?24 frames"):
        read(path, 24)


def test_a_part_of_the_file_lost(tmp_path: Path) -> None:
    """Matroska goes on at the next cluster and says nothing, so the clip would stand still."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", options={"cluster_time_limit": "200"}) as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for array in noise(40, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    limits = Limits(max_hold=0.1)
    read(path, 40, limits=limits)
    data = bytearray(path.read_bytes())
    cluster = b"\x1f\x43\xb6\x75"
    start = data.index(cluster, len(data) // 2)
    end = data.index(cluster, start + 4)
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"nothing for 0\.\d+ s, longer than max_hold=0\.1"):
        read(path, 40, limits=limits)


def test_an_mp4_cut_short_in_its_last_frame(tmp_path: Path) -> None:
    """A JPEG decoder fills what is missing with grey, and does not complain."""
    path = tmp_path / "a.mov"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuvj420p"
        for array in smooth(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    read(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(VideoError, match="damaged after 11 frames: a packet is cut short"):
        read(path)


def test_damage_behind_the_clip_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged frame spoils frames that are shown before it, and those carry no mark."""
    path = make(tmp_path / "a.mkv", [np.full((48, 64, 3), i, np.uint8) for i in range(60)])
    straight = video._frames

    def damaged(at: int) -> Any:
        def frames(*args: Any) -> Any:
            yield from itertools.islice(straight(*args), at)
            raise VideoError("damaged")

        return frames

    monkeypatch.setattr(video, "_frames", damaged(25))
    with pytest.raises(VideoError, match=r"damaged \(with 10 of 10 frames done\)"):
        read(path, 10)
    monkeypatch.setattr(video, "_frames", damaged(40))
    assert read(path, 10)[:, 0, 0, 0].tolist() == list(range(10))


def test_nothing_is_read_far_behind_the_clip(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", noise(100, 48, 64))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    assert read(path, 10).shape == (10, 48, 64, 3)


def test_time_stamps_that_go_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.mkv")
    straight = video._frames

    def swapped(*args: Any) -> Any:
        frames = list(straight(*args))
        yield from [frames[0], frames[2], frames[1], *frames[3:]]

    monkeypatch.setattr(video, "_frames", swapped)
    with pytest.raises(VideoError, match="time goes backwards, from 2/25 s to 1/25 s"):
        read(path)


# What there is to see, and when.


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("reordered", ["0", "3"])
def test_frames_hidden_by_an_edit_list_do_not_count(
    tmp_path: Path, suffix: str, reordered: str
) -> None:
    """As in clips that were cut without encoding them anew."""
    options = {"g": "60", "bf": reordered}
    whole = make(tmp_path / "a.mp4", smooth(60), codec="libx264", pixels="yuv420p", options=options)
    cut = copied(whole, tmp_path / f"b.{suffix}", first=20)
    with av.open(str(cut)) as file:
        assert file.streams.video[0].frames == 60  # what the container speaks of
    info = probe(cut)
    assert (info.frames, info.fps, info.duration, info.exact) == (40, 25, Fraction(8, 5), True)
    assert video.count_frames(cut) == 40
    guess = probe(cut, whole=False)
    assert (guess.frames, guess.exact) == (40, False)
    assert torch.equal(read(cut, 40, threads=1), read(whole, 60, threads=1)[20:])
    assert torch.equal(read(cut, 4, start=36 / 25, threads=1), read(whole, 60, threads=1)[56:])


def unstated(stream: Any) -> None:
    """No rate, as in recordings by a browser."""
    stream.codec_context.framerate = Fraction(0)


@pytest.mark.parametrize("suffix", ["mkv", "webm", "mp4"])
def test_a_rate_that_changes_is_an_average(tmp_path: Path, suffix: str) -> None:
    """The library guesses it from the first frames: 4 a second, which would be 23 s."""
    times = [*range(0, 5000, 250), *(5000 + round(1000 * i / 30) for i in range(75))]
    path = make(
        tmp_path / f"a.{suffix}",
        [np.full((48, 64, 3), 2 * i, np.uint8) for i in range(95)],
        times=times,
        tick=Fraction(1, 1000),
        fps=1000,
        codec="libvpx" if suffix == "webm" else "libx264",
        pixels="yuv420p",
        options={"deadline": "realtime", "cpu-used": "8"} if suffix == "webm" else {},
        before=unstated,
    )
    info = probe(path)
    hidden = (
        suffix == "mp4"
    )  # the last: its time is not followed by another, and the list ends there
    assert info.frames == 95 - hidden
    assert info.duration is not None
    assert info.fps is not None
    length = Fraction(15, 2) - Fraction(hidden, 30)
    assert abs(info.duration - length) <= Fraction(1, 500)  # the last as long as the one before
    assert abs(info.frames / info.fps - info.duration) < Fraction(1, 100)
    start = (info.frames - 1) / info.fps  # of the last frame, at the average rate
    last = read(path, 1, start=float(start))
    assert abs(float(last.float().mean()) - 2 * (20 + (start - 5) * 30 // 1)) <= 3
    assert info.hold == Fraction(1, 4)


def test_a_rate_with_few_frames_missing_is_that_rate(tmp_path: Path) -> None:
    times = [i for i in range(62) if i not in (7, 30)]
    info = probe(make(tmp_path / "a.mkv", [np.zeros((48, 64, 3), np.uint8)] * 60, times=times))
    assert (info.frames, info.fps, info.duration) == (60, 25, Fraction(62, 25))
    times = [i for i in range(80) if i % 4]
    info = probe(make(tmp_path / "b.mkv", [np.zeros((48, 64, 3), np.uint8)] * 60, times=times))
    assert (info.frames, info.fps, info.duration) == (60, Fraction(1500, 79), Fraction(79, 25))


def test_frames_of_the_same_time_are_one(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", 12, times=[i // 2 * 2 for i in range(12)])
    info = probe(path)
    assert (info.frames, info.fps) == (6, Fraction(25, 2))
    assert levels(read(path, 6, 12.5)) == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "ts"])
def test_the_clock_of_a_file_changes_nothing(tmp_path: Path, suffix: str) -> None:
    """Its tick may be as long as a frame: a frame is shown from its time on, and not from half a
    tick before it."""
    coarse = {"video_track_timescale": "25"} if suffix == "mp4" else {}
    path = make(
        tmp_path / f"a.{suffix}",
        codec="libx264",
        pixels="yuv444p",
        options={"crf": "1", "bf": "0"},
        container=coarse,
    )
    assert levels(read(path, 9, 20)) == [0, 1, 2, 3, 5, 6, 7, 8, 10]
    for start, frame in ((0.0399, 0), (0.04, 1), (0.06, 1), (0.27, 6), (0.2799, 6), (0.2801, 7)):
        assert levels(read(path, 1, start=start)) == [frame], start


@pytest.mark.parametrize(
    ("codec", "reordered"), [("mpeg4", "2"), ("libx264", "3"), ("libx264", "0"), ("mpeg4", "0")]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_avi_keeps_the_times_of_packets_alone(
    tmp_path: Path, codec: str, reordered: str, threads: int
) -> None:
    """Those of frames follow from their order, also of such as are made from later ones."""
    options = {"bf": reordered, "g": "10"}
    whole = make(tmp_path / "a.mp4", smooth(24), codec=codec, pixels="yuv420p", options=options)
    path = copied(whole, tmp_path / "a.avi", filters="h264_mp4toannexb" * (codec == "libx264"))
    info = probe(path)
    assert (info.frames, info.fps, info.duration) == (24, 25, Fraction(24, 25))
    expected = read(whole, 24, threads=1)
    assert torch.equal(read(path, 24, threads=threads), expected)
    assert torch.equal(read(path, 3, start=17 / 25, threads=threads), expected[17:20])


def avi_of(path: Path, source: Path, packets: list[tuple[bytes, bool]]) -> Path:
    """An AVI of the MPEG-4 of ``source`` with these packets, and whether they are key frames."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        codec = old.streams.video[0].codec_context
        stream = new.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = codec.width, codec.height, "yuv420p"
        stream.codec_context.extradata = codec.extradata
        new.start_encoding()
        for i, (data, key) in enumerate(packets):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 25), key
            packet.pts = packet.dts = i
            new.mux(packet)
    return path


def nothing_new(time: int) -> bytes:
    """An MPEG-4 picture that says that the one before stays, at 25 ticks a second."""
    bits = f"0101{time % 25:05b}10" + "01111"
    return b"\0\0\1\xb6" + int(bits, 2).to_bytes(2)


def packets_of(path: Path) -> list[Any]:
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        return [(bytes(p), p.is_keyframe, p.pts, p.dts) for p in file.demux(stream) if p.size]


@pytest.mark.parametrize("threads", [1, 3])
def test_packed_frames_in_avi(tmp_path: Path, threads: int) -> None:
    """As DivX made them: a frame and the one shown before it are one packet, the next is empty."""
    options = {"bf": "1", "g": "12"}
    whole = make(tmp_path / "a.mp4", smooth(40), codec="mpeg4", pixels="yuv420p", options=options)
    packets = packets_of(whole)
    mark, made, i = b"\0\0\1\xb2DivX503b1393p", [], 0
    while i < len(packets):
        data, key, pts, _ = packets[i]
        if i + 1 < len(packets) and packets[i + 1][2] < pts:
            made += [(mark + data + packets[i + 1][0], key), (nothing_new(i), False)]
            i += 2
        else:
            made.append((mark + data, key))
            i += 1
    path = avi_of(tmp_path / "b.avi", whole, made)
    assert len(made) == probe(path).frames == 40
    assert sum(len(data) < 10 for data, _ in made) > 10
    expected = read(whole, 40, threads=1)
    assert torch.equal(read(path, 40, threads=threads), expected)
    assert torch.equal(read(path, 3, start=30 / 25, threads=threads), expected[30:33])


@pytest.mark.parametrize("threads", [1, 3])
def test_a_frame_that_stays_in_avi(tmp_path: Path, threads: int) -> None:
    options = {"bf": "0", "g": "12"}
    whole = make(tmp_path / "a.mp4", smooth(40), codec="mpeg4", pixels="yuv420p", options=options)
    packets = [packet[:2] for packet in packets_of(whole)]
    packets[5:5] = [(nothing_new(5), False), (nothing_new(6), False)]
    path = avi_of(tmp_path / "b.avi", whole, packets)
    expected = read(whole, 40, threads=1)
    held = torch.cat([expected[:5], expected[4:5], expected[4:5], expected[5:]])
    assert probe(path).frames == 42
    assert torch.equal(read(path, 42, threads=threads), held)


def test_a_pause_in_avi_is_a_packet_of_nothing(tmp_path: Path) -> None:
    path = make(tmp_path / "a.avi", 6, times=[0, 1, 2, 5, 6, 7], codec="mpeg4", pixels="yuv420p")
    assert levels(read(path, 8)) == [0, 1, 2, 2, 2, 3, 4, 5]
    assert (probe(path).frames, probe(path).duration) == (6, Fraction(8, 25))


@pytest.mark.parametrize("codec", ["mpeg4", "mpeg2video", "libx264", "libx265", "libvpx"])
def test_a_file_begins_with_its_first_key_frame(tmp_path: Path, codec: str) -> None:
    """Some decoders do not notice that what they begin with is made from others."""
    fixed = "keyint=12:min-keyint=12:bframes=0:scenecut=0"
    options = {
        "libx264": {"x264-params": fixed},
        "libx265": {"x265-params": f"{fixed}:open-gop=0:log-level=none:pools=1"},
    }.get(codec, {"g": "12"})
    whole = make(tmp_path / "a.mkv", smooth(36), codec=codec, pixels="yuv420p", options=options)
    cut = copied(whole, tmp_path / "b.mkv", without=range(5))
    frames = probe(cut).frames
    assert frames == 24
    assert torch.equal(read(cut, frames, threads=1), read(whole, 36, threads=1)[12:])
    none = copied(whole, tmp_path / "c.mkv", without=(0, *range(12, 36)))
    with pytest.raises(VideoError, match=r"c\.mkv.*holds no key frame"):
        probe(none)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("lost", [{10}, {10, 11}, {23}])
def test_a_lost_reference_is_noticed(tmp_path: Path, suffix: str, lost: set[int]) -> None:
    """An H.264 decoder would put another picture in its place."""
    options = {"g": "60", "bf": "0", "x264-params": "keyint=60:scenecut=0"}
    whole = make(
        tmp_path / f"a.{suffix}", smooth(36), codec="libx264", pixels="yuv420p", options=options
    )
    assert read(whole, 36, threads=1).shape[0] == 36
    cut = copied(whole, tmp_path / f"b.{suffix}", without=lost)
    for call in (probe, read):
        with pytest.raises(VideoError, match=rf"damaged after {min(lost)} frames: by its numbers"):
            call(cut)


def test_a_lost_reference_among_frames_that_are_none(tmp_path: Path) -> None:
    """Frames from which no others are made have numbers too, of the reference to come."""
    params = "keyint=60:scenecut=0:bframes=2:b-adapt=0:b-pyramid=0"
    whole = make(
        tmp_path / "a.mp4",
        smooth(36),
        codec="libx264",
        pixels="yuv420p",
        options={"x264-params": params},
    )
    assert probe(whole).frames == 36
    unneeded = copied(whole, tmp_path / "b.mp4", without={5})
    assert probe(unneeded).frames == 35
    with pytest.raises(VideoError, match="damaged after 4 frames: by its numbers"):
        probe(copied(whole, tmp_path / "c.mp4", without={4}))


def test_numbers_begin_anew_at_a_key_frame(tmp_path: Path) -> None:
    """As where parts were put together; and what is no H.264 says nothing."""
    path = make(tmp_path / "a.mp4", 12, codec="libx264", pixels="yuv420p", options={"bf": "0"})
    packets = [packet for packet, *_ in packets_of(path)]
    with av.open(str(path)) as file:
        extradata = file.streams.video[0].codec_context.extradata
    numbers = FrameNumbers(extradata)
    assert not numbers.lost(packets[0], True)
    assert not numbers.lost(packets[5], True)
    assert not numbers.lost(packets[6], False)
    assert numbers.lost(packets[8], False)
    for junk in (b"", b"\1", b"\1" * 9, extradata[:12], b"\0\0\1", b"\0\0\1\x67", b"\xff" * 50):
        assert not FrameNumbers(junk).lost(packets[0], True)
        assert not FrameNumbers(extradata).lost(junk, False)
    assert not FrameNumbers(None).lost(b"", False)


def test_frames_before_the_first_key_frame_are_not_there(tmp_path: Path) -> None:
    """In an open group they are shown before it, made from frames of the group before."""
    options = {"g": "12", "bf": "2", "sc_threshold": "1000000000"}
    whole = make(
        tmp_path / "a.mkv", smooth(60), codec="mpeg2video", pixels="yuv420p", options=options
    )
    packets = packets_of(whole)
    second = [i for i, (_, key, *_) in enumerate(packets) if key][1]
    leading = sum(pts < packets[second][2] for _, _, pts, _ in packets[second:])
    assert leading > 0
    cut = copied(whole, tmp_path / "b.mkv", without=range(second))
    frames = probe(cut).frames
    assert frames == 60 - second - leading
    assert torch.equal(read(cut, frames, threads=1), read(whole, 60, threads=1)[-frames:])


def test_frames_that_are_only_for_others_do_not_count(tmp_path: Path) -> None:
    """Those of VP8 and VP9 that a header says are not shown."""
    realtime = {"deadline": "realtime", "cpu-used": "8", "g": "60"}
    whole = make(tmp_path / "a.webm", codec="libvpx", pixels="yuv420p", options=realtime)
    with av.open(str(whole)) as old, av.open(str(tmp_path / "b.webm"), "w") as new:
        made = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(p for p in old.demux(old.streams.video[0]) if p.size):
            data = bytearray(bytes(packet))
            if i == 5:
                data[0] &= ~16
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts = packet.pts, packet.dts
            changed.time_base, changed.is_keyframe = packet.time_base, packet.is_keyframe
            changed.stream = made
            new.mux(changed)
    assert probe(whole).frames == 12
    assert probe(tmp_path / "b.webm").frames == 11
    hidden = {
        b"\x82\0": False,  # profile 0, shown
        b"\x80\0": True,
        b"\x88\0": False,  # an earlier one is shown
        b"\x80\xc1": False,  # several in one, the last is shown
        b"\xb0\0": False,  # profile 3 has a bit more
    }
    assert {data: video._is_hidden("vp9", data) for data in hidden} == hidden  # type: ignore[arg-type]


def test_a_coarse_clock_at_a_variable_rate(tmp_path: Path) -> None:
    """A tick is 40 ms; half of it is no error of rounding."""
    path = make(
        tmp_path / "a.mp4",
        8,
        times=[0, 1, 3, 4, 6, 9, 10, 11],
        codec="libx264",
        pixels="yuv444p",
        options={"crf": "1", "bf": "0"},
        container={"video_track_timescale": "25"},
    )
    for start, frame in ((0.035, 0), (0.115, 1), (0.125, 2), (0.35, 4), (0.365, 5)):
        assert levels(read(path, 1, start=start)) == [frame], start


@pytest.mark.parametrize(
    "params", ["bframes=3", "open-gop=1:bframes=5:b-pyramid=2", "interlaced=1"]
)
def test_frame_numbers_of_a_sound_file_have_no_gap(tmp_path: Path, params: str) -> None:
    params = f"keyint=12:ref=4:{params}"
    path = make(
        tmp_path / "a.mp4",
        smooth(300),
        codec="libx264",
        pixels="yuv420p",
        options={"x264-params": params, "preset": "fast"},
    )
    assert probe(path).frames == 300
    at = copied(path, tmp_path / "b.ts", filters="h264_mp4toannexb")
    assert probe(at).frames == 300


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_an_orientation_holds_for_all_frames(tmp_path: Path, suffix: str) -> None:
    """H.264 may name it at the first frame alone."""
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:24, :32] = 200  # turned left, it lies at the bottom
    plain = make(
        tmp_path / f"a.{suffix}",
        [picture] * 40,
        codec="libx264",
        pixels="yuv420p",
        options={"g": "12"},
    )
    turned = copied(
        plain,
        tmp_path / f"b.{suffix}",
        filters="h264_metadata=display_orientation=insert:rotate=90",
    )
    assert probe(turned).rotation == 90
    assert probe(turned).upright() == (64, 48)
    for start in (0, 1):
        clip = read(turned, 10, start=start, size=(64, 48))
        assert (clip[:, 36:60, 4:20].float().mean((1, 2, 3)) > 180).all()
        assert (clip[:, 4:28].float().mean((1, 2, 3)) < 20).all()


def test_an_mp4_whose_frames_are_not_all_there(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", noise(30, 48, 64), container={"movflags": "faststart"})
    assert probe(path).frames == 30
    path.write_bytes(path.read_bytes()[:-2000])
    for whole in (True, False):
        with pytest.raises(VideoError, match=r"a\.mp4.*cut short: 29 of its 30 frames are there"):
            probe(path, whole=whole)


def test_a_large_file_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a.mkv")
    monkeypatch.setattr(video, "SCAN_BYTES", path.stat().st_size)
    assert probe(path).exact
    monkeypatch.setattr(video, "SCAN_BYTES", path.stat().st_size - 1)
    assert not probe(path).exact
    assert probe(path, whole=True).exact


def test_a_part_of_a_long_film_is_no_long_clip(tmp_path: Path) -> None:
    """Limits are on what is decoded."""
    options = {"g": "12", "bf": "0"}
    path = make(tmp_path / "a.mp4", smooth(72), codec="mpeg4", pixels="yuv420p", options=options)
    limits = Limits(max_frames=50)
    whole = read(path, 72)
    assert torch.equal(read(path, 3, start=60 / 25, limits=limits), whole[60:63])
    assert torch.equal(read(path, 20, limits=limits), whole[:20])
    with pytest.raises(VideoError, match=r"72 exceeds max_frames=50.*--limits\.max_frames"):
        read(path, 72, limits=limits)
    other = make(tmp_path / "b.avi", smooth(72), codec="mpeg4", pixels="yuv420p", options=options)
    with pytest.raises(VideoError, match="too much to decode: 51 exceeds max_frames=50"):
        read(other, 3, start=45 / 25, limits=limits)


@pytest.mark.parametrize("name", ["max_pixels", "max_frames", "max_pixel_frames", "max_hold"])
def test_limits_are_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Limits(**{name: 0})


# From a start on.


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "jumps"),
    [
        ("mp4", "libx264", {"g": "12", "bf": "3"}, True),
        ("mp4", "libx264", {"x264-params": "keyint=12:open-gop=1:bframes=5:b-pyramid=2"}, True),
        ("mp4", "libx264", {"x264-params": "keyint=12:intra-refresh=1"}, False),
        ("mov", "libx265", {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=1"}, True),
        ("mkv", "libx265", {"preset": "ultrafast", "x265-params": f"{X265}:open-gop=0"}, True),
        ("mkv", "libx264", {"g": "12", "bf": "3"}, True),
        ("webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, True),
        ("mp4", "libsvtav1", {"g": "12", "preset": "12"}, True),
        ("mp4", "mpeg4", {"g": "12", "bf": "2"}, True),
        ("avi", "mpeg4", {"g": "12"}, False),
        ("avi", "libx264", {"g": "12", "bf": "0"}, False),
        ("ts", "libx264", {"g": "12", "bf": "3"}, False),
        ("mkv", "ffv1", {}, True),
    ],
)
def test_a_late_start_gives_what_decoding_from_the_beginning_gives(
    tmp_path: Path,
    suffix: str,
    codec: str,
    options: dict[str, str],
    jumps: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / f"a.{suffix}"
    if codec == "libsvtav1":
        make_apart(path, smooth(72), codec, options)
    else:
        pixels = "bgr0" if codec == "ffv1" else "yuv420p"
        make(path, smooth(72), codec=codec, pixels=pixels, options=options)
    whole = read(path, 72, threads=1)
    decoded = counted(monkeypatch)
    for start in (1, 16, 17, 29, 35, 36, 37, 53, 71):
        length = min(3, 72 - start)
        late = read(path, length, start=start / 25, threads=1)
        assert torch.equal(late, whole[start : start + length]), start
    assert (max(decoded[-3:]) <= 50) == jumps
    with pytest.raises(VideoError, match=r"enough for 1 of the 2 frames asked .* at 2\.880 s"):
        read(path, 2, start=71 / 25)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many frames each call of ``read_video`` decodes, in its second pass if it jumps."""
    counts: list[int] = []
    straight = video._frames

    def frames(*args: Any) -> Any:
        counts.append(0)
        for frame in straight(*args):
            counts[-1] += 1
            yield frame

    monkeypatch.setattr(video, "_frames", frames)
    return counts


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_late_start_at_a_variable_rate(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames come in bursts, and the first of them not at 0."""
    times = [100_000 + 40 * i + 700 * (i // 8) for i in range(64)]
    path = make(
        tmp_path / f"a.{suffix}",
        smooth(64),
        times=times,
        tick=Fraction(1, 1000),
        codec="libx264",
        pixels="yuv420p",
        options={"g": "10", "bf": "3"},
    )
    seconds = (times[-1] - times[0]) / 1000
    whole = read(path, int(seconds * 20), 20)
    decoded = counted(monkeypatch)
    for start in range(0, len(whole) - 2, 7):
        assert torch.equal(read(path, 2, 20, start=start / 20), whole[start : start + 2]), start
    assert decoded[-1] < 50


def test_a_start_between_two_frames_shows_the_first_of_them(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv", 25)
    assert levels(read(path, 3, 25, start=3.9 / 25)) == [3, 4, 5]
    assert levels(read(path, 3, 12.5, start=Fraction(20, 25))) == [20, 22, 24]


def test_a_way_in_that_leads_astray_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the index of a file is wrong, the frames are the same, only slower to come."""
    path = make(tmp_path / "a.mkv", smooth(60))
    whole = read(path, 60)
    after = video._after_jump

    def late(container: Any, stream: Any, limits: Limits, entry: Any) -> Any:
        yield from itertools.islice(after(container, stream, limits, entry), 30, None)

    monkeypatch.setattr(video, "_after_jump", late)
    assert torch.equal(read(path, 3, start=40 / 25), whole[40:43])

    def half_there(*args: Any) -> Any:
        yield SimpleNamespace(key_frame=False, pts=0)
        yield from late(*args)

    monkeypatch.setattr(video, "_after_jump", half_there)
    assert torch.equal(read(path, 3, start=40 / 25), whole[40:43])

    def broken(*_: Any) -> Any:
        raise VideoError("no key frame can be decoded")
        yield

    monkeypatch.setattr(video, "_after_jump", broken)
    assert torch.equal(read(path, 3, start=40 / 25), whole[40:43])


def test_a_crop_is_of_the_upright_picture(tmp_path: Path) -> None:
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :24] = 100  # turned, its top right corner
    path = make(tmp_path / "a.mp4", [picture], codec="libx264", pixels="yuv444p", rotation=-90)
    assert read(path, 1, size=(64, 48))[0, 4:20, 36:44].float().mean() > 90
    cut = read(path, 1, size=(24, 16), crop=(0, 32, 24, 16))
    assert cut[0, 2:-2, 2:-2].float().mean() > 90
    assert read(path, 1, size=(24, 16), crop=(0, 0, 24, 16)).float().mean() < 10
    with pytest.raises(VideoError, match=r"the crop \(0, 33, 24, 16\).* not inside its 48x64"):
        read(path, 1, size=(24, 16), crop=(0, 33, 24, 16))
    with pytest.raises(VideoError, match=r"the crop \(41, 0, 24, 16\).* not inside its 48x64"):
        read(path, 1, size=(24, 16), crop=(41, 0, 24, 16))
    with pytest.raises(VideoError, match="16x23 pixels after the cut, fewer than the 17x24"):
        read(path, 1, size=(24, 17), crop=(0, 0, 24, 16))


def test_the_upright_size_is_of_square_pixels(tmp_path: Path) -> None:
    """And fits into the stored picture, so that reading at that size enlarges nothing."""

    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    path = make(tmp_path / "a.mp4", 2, codec="libx264", pixels="yuv420p", before=wide)
    assert probe(path).pixel_aspect == Fraction(4, 3)
    assert probe(path).upright() == (36, 64)
    assert read(path, 1, size=(36, 64)).shape == (1, 36, 64, 3)
    turned = make(tmp_path / "b.mp4", 2, codec="libx264", pixels="yuv420p", rotation=90)
    assert probe(turned).upright() == (64, 48)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_one_thread_leaves_none_behind(tmp_path: Path) -> None:
    """Left in memory they hang a worker that is forked later, when it frees what they belong to."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    path = make(tmp_path / "a.mp4", smooth(40), codec="libx264", pixels="yuv420p")
    read(path, 1, size=(24, 32), threads=1)
    gc.collect()
    before = threads()
    kept = [probe(path), read(path, 3, threads=1), read(path, 3, start=1, threads=1)]
    assert threads() <= before
    assert len(kept) == 3


# Refused before any harm.


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: Any) -> Any:
        pytest.fail("a frame was decoded")

    monkeypatch.setattr(video, "_frames", decode)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("call", [read, probe])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, call: Any) -> None:
    black = [np.zeros((4096, 4096, 3), np.uint8)] * 2
    path = make(tmp_path / "a.mp4", black, codec="libx264", pixels="yuv420p")
    assert path.stat().st_size < 100_000
    with pytest.raises(VideoError, match=r"a\.mp4.*4096x4096.*max_pixels=9,437,184.*limits"):
        call(path)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(
    "limits",
    [Limits(max_pixels=48 * 64 - 1), Limits(max_frames=11), Limits(max_pixel_frames=36863)],
)
def test_every_limit_counts_before_decoding(tmp_path: Path, limits: Limits) -> None:
    with pytest.raises(VideoError, match="64x48, 12 frames"):
        read(make(tmp_path / "a.mkv"), limits=limits)


def test_limits_are_inclusive(tmp_path: Path) -> None:
    exact = Limits(max_pixels=48 * 64, max_frames=12, max_pixel_frames=48 * 64 * 12)
    assert levels(read(make(tmp_path / "a.mkv"), limits=exact)) == list(range(12))


def test_a_container_that_lies_about_its_length(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mkv")
    data = path.read_bytes()
    mark = b"\x44\x89\x88"  # Duration, a double in milliseconds
    at = data.index(mark) + 3
    assert struct.unpack(">d", data[at : at + 8]) == (480.0,)
    path.write_bytes(data[:at] + struct.pack(">d", 80.0) + data[at + 8 :])
    assert probe(path, whole=False).frames == 2
    assert probe(path).frames == 12
    with pytest.raises(VideoError, match="too much to decode: 5 exceeds max_frames=4"):
        read(path, limits=Limits(max_frames=4))


def test_frames_that_outgrow_their_container(tmp_path: Path) -> None:
    """Transport streams can be joined end to end, so the size may change on the way."""
    joined = b""
    for start, size in ((0, (48, 64)), (12, (480, 640))):
        times = [start + i for i in range(12)]
        part = make(tmp_path / "part.ts", size=size, times=times, codec="libx264", pixels="yuv420p")
        joined += part.read_bytes()
    path = tmp_path / "a.ts"
    path.write_bytes(joined)
    with pytest.raises(VideoError, match="changes from 64x48 to 640x480 after 12 frames"):
        read(path, 24)
    with pytest.raises(VideoError, match=r"damaged after \d+ frames"):  # the decoder's no
        read(path, 24, limits=Limits(max_pixels=48 * 64))


@pytest.mark.parametrize(
    "path",
    [
        "http://localhost/a.mp4",
        "https://localhost/a.mp4",
        "file:///a.mp4",
        "file:a.mkv",
        "concat:a.mkv|b.mkv",
        "pipe:0",
        "data:video/mp4;base64,AAAA",
        "a\0.mkv",
    ],
)
def test_only_local_paths(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.mkv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="only plain local files"):
        read(path)


def test_a_name_that_is_a_title(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("Re: y.mkv", "X: the film.mkv", "-i.mkv", "two\nlines.mkv", "100%d.mkv"):
        make(tmp_path / "a.mkv").rename(tmp_path / name)
        assert levels(read(name)) == list(range(12))


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.mkv").symlink_to(tmp_path / "b.mkv")
    (tmp_path / "b.mkv").symlink_to(tmp_path / "a.mkv")
    with pytest.raises(VideoError, match="no file can be reached by that name"):
        read(tmp_path / "a.mkv")


def test_a_colon_in_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.mkv").rename(tmp_path / "take:1.mkv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="looks like a URL"):
        read("take:1.mkv")
    assert levels(read("./take:1.mkv")) == list(range(12))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.ffconcat", "ffconcat version 1.0\nfile 'a.mkv'\n"),
        ("list.mp4", "ffconcat version 1.0\nfile 'a.mkv'\n"),
        (
            "list.m3u8",
            "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.mkv\n#EXT-X-ENDLIST\n",
        ),
    ],
)
def test_files_that_name_other_files(
    tmp_path: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a.mkv")
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    with pytest.raises(VideoError, match="not in a format that is read"):
        read(name)


def test_what_is_not_a_video(tmp_path: Path) -> None:
    for name, content in (("empty.mp4", b""), ("text.mp4", b"hello " * 100)):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(VideoError, match=r"empty\.mp4.*empty"):
        read(tmp_path / "empty.mp4")
    with pytest.raises(VideoError, match=r"text\.mp4.*not a video"):
        read(tmp_path / "text.mp4")
    with pytest.raises(VideoError, match="no such file"):
        read(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match="not a plain file"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a plain file"):
        read(tmp_path / "pipe.mp4")


@pytest.mark.parametrize("cover", [False, True], ids=["alone", "with a cover"])
def test_sound_is_no_video(tmp_path: Path, cover: bool) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
            black = np.zeros((48, 64, 3), np.uint8)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
            container.mux(picture.encode())
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match=r"only a cover and audio$" if cover else r"only audio$"):
        read(path)


def test_nothing_outside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    make(tmp_path / "secret.mkv")
    make(root / "a.mkv")
    (root / "link.mkv").symlink_to(tmp_path / "secret.mkv")
    (root / "inner" / "fine.mkv").symlink_to(root / "a.mkv")
    (root / "up").symlink_to(tmp_path)
    for path in ("../secret.mkv", tmp_path / "secret.mkv", "link.mkv", "up/secret.mkv"):
        with pytest.raises(VideoError, match="leads out of root"):
            read(path, root=root)
    for path in ("a.mkv", "inner/fine.mkv", "inner/../a.mkv", root / "a.mkv"):
        assert levels(read(path, root=root)) == list(range(12))
