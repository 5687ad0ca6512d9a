"""What the writer promises: the frames that were given, for any player, in a whole file or none."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from skiparse.models import writer  # noqa: E402  # after the check that av is there
from skiparse.models.data import atomic  # noqa: E402
from skiparse.models.data.video import probe, read_video  # noqa: E402

COLOURS = [[200, 40, 60], [30, 180, 90], [20, 60, 220], [128, 128, 128], [0, 0, 0], [255, 255, 255]]


def clip(height=48, width=64):
    """One plain colour a frame."""
    frames = torch.tensor(COLOURS, dtype=torch.uint8)
    return frames[:, None, None].expand(-1, height, width, 3)


@pytest.mark.parametrize("height", [48, 720])  # where untagged files change their colour matrix
def test_colours_and_order_survive(tmp_path, height):
    path = tmp_path / "x.mp4"
    writer.write_video(path, clip(height), fps=24, crf=0)
    back = read_video(path, frames=len(COLOURS), fps=24, size=(height, 64))
    # Half a step of luma and one of chroma, in RGB's blue, where chroma counts most; and rounding.
    bound = 0.5 * 255 / 219 + 0.5 * 255 / 224 * 1.8556 + 0.5
    worst = (back.int() - clip(height).int()).abs().max().item()
    assert worst <= math.ceil(bound)


def test_pieces_are_written_one_by_one(tmp_path):
    taken = []

    def pieces():
        for piece in clip().split([1, 3, 2]):
            taken.append(len(piece))
            yield piece

    writer.write_video(tmp_path / "a.mp4", pieces())
    writer.write_video(tmp_path / "b.mp4", clip())
    assert taken == [1, 3, 2]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    sizes = iter([clip(), clip(96)])
    with pytest.raises(ValueError, match=r"is \[6, 96, 64, 3\] and the first \[6, 48, 64, 3\]"):
        writer.write_video(tmp_path / "c.mp4", sizes)
    with pytest.raises(ValueError, match=r"pixels must be uint8 .* got torch\.float32"):
        writer.write_video(tmp_path / "c.mp4", iter([clip(), clip().float()]))
    with pytest.raises(ValueError, match="path must end in"):
        writer.write_video(tmp_path / "c.avi", sizes)
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


def test_players_are_told_everything(tmp_path):
    path = tmp_path / "x.mp4"
    writer.write_video(path, clip(), fps=12)
    info = probe(path)
    assert (info.width, info.height, info.frames, info.fps) == (64, 48, len(COLOURS), 12)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert context.name == "h264"
        assert context.pix_fmt == "yuv420p"
        tags = (context.colorspace, context.color_range)
        assert tags == (1, 1)  # BT.709, limited
        assert (context.color_primaries, context.color_trc) == (1, 1)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def test_quality_follows_crf(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 48, 64, 3), generator=generator).to(torch.uint8)
    sizes = []
    for crf in (0, 23, 51):
        writer.write_video(tmp_path / "x.mp4", noise, crf=crf)
        sizes.append((tmp_path / "x.mp4").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_same_frames_give_the_same_file(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        writer.write_video(tmp_path / name, clip())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_name_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c:d").mkdir()
    for name in ("a:b.mp4", "c:d/x.mp4", "100 %d, -x.mp4", "ü" * 120 + ".mp4"):
        writer.write_video(name, clip())
        assert (tmp_path / name).stat().st_size
    assert len(list(tmp_path.iterdir())) == 4


def test_a_picture_is_exact(tmp_path):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (31, 47, 3), generator=generator).to(torch.uint8)
    writer.write_image(tmp_path / "x.png", picture.transpose(0, 1).contiguous().transpose(0, 1))
    with av.open(str(tmp_path / "x.png")) as container:
        back = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(back, picture.numpy())


def test_json_is_readable(tmp_path):
    atomic.write_json(tmp_path / "x.json", {"prompt": "ünder 'the' sea", "seed": 3})
    text = (tmp_path / "x.json").read_text("utf-8")
    assert json.loads(text) == {"prompt": "ünder 'the' sea", "seed": 3}
    assert "ünder" in text
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "y.json", {"shift": float("nan")})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")

    def write():
        with atomic.replacing(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("half of the ne")
            raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError, match="unplugged"):
        write()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_is_written_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = atomic.os.fsync, atomic.Path.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        atomic.Path, "replace", lambda self, to: (calls.append("rename"), replace(self, to))
    )
    writer.write_video(tmp_path / "x.mp4", clip())
    assert calls == ["fsync", "rename"]


def test_a_frame_that_fails_leaves_nothing(tmp_path, monkeypatch):
    real = writer.VideoFrame.from_ndarray
    done = []

    class Failing:
        @staticmethod
        def from_ndarray(array, **arguments):
            if len(done) == 3:
                raise RuntimeError("out of memory")
            done.append(array)
            return real(array, **arguments)

    monkeypatch.setattr(writer, "VideoFrame", Failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        writer.write_video(tmp_path / "x.mp4", clip())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "x.avi"}, "path must end in .mp4, got 'x.avi'"),
        ({"frames": torch.zeros(2, 48, 64, 3)}, "uint8 \\[T, height, width, 3\\], got torch.float"),
        ({"frames": clip()[0]}, "got torch.uint8 \\[48, 64, 3\\]"),
        ({"frames": clip().permute(0, 3, 1, 2)}, "got torch.uint8 \\[6, 3, 48, 64\\]"),
        ({"frames": clip()[:0]}, "no pixels to write"),
        ({"frames": iter([])}, "no pixels to write"),
        ({"frames": clip(47)}, "even height and width for 4:2:0, got 47x64"),
        ({"fps": 0}, "fps must be above 0 and at most 1000, got 0"),
        ({"fps": math.nan}, "fps must be above 0"),
        ({"fps": math.inf}, "fps must be above 0 and at most 1000, got inf"),
        ({"crf": 52}, "crf must be from 0 to 51, got 52"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"path": "x.mp4", "frames": clip()} | change
    with pytest.raises(ValueError, match=message):
        writer.write_video(arguments.pop("path"), arguments.pop("frames"), **arguments)
    assert not list(tmp_path.iterdir())
