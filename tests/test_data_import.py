"""What an import promises: clips read where they lie, and every row used, counted or refused."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")

from pyarrow import parquet  # noqa: E402  # after the checks

from skiparse.cli import main  # noqa: E402
from skiparse.models.data import importing, lists, lookup  # noqa: E402
from skiparse.models.data.buckets import Rule, assign  # noqa: E402
from skiparse.models.data.content import Content  # noqa: E402
from skiparse.models.data.dataset import Clips  # noqa: E402
from skiparse.models.data.draws import Place  # noqa: E402
from skiparse.models.data.importing import bring  # noqa: E402
from skiparse.models.data.limits import Limits  # noqa: E402
from skiparse.models.data.manifest import DataError, Manifest  # noqa: E402
from skiparse.models.data.span import Span, address, parted  # noqa: E402
from skiparse.models.data.video import VideoError, probe, read_video  # noqa: E402

SIZE = (48, 64)


def video(frames: int = 20, size: tuple[int, int] = SIZE) -> bytes:
    """A clip whose frame ``i`` has the grey level ``4 * i``."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for i in range(frames):
            picture = np.full((*size, 3), 4 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def image(level: int = 0, size: tuple[int, int] = SIZE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size[1], size[0]), (level,) * 3).save(file, "png")
    return file.getvalue()


def about(number: int, **more: Any) -> bytes:
    """Metadata as img2dataset writes them."""
    told = {"url": f"http://host/{number}", "key": str(number), "width": 64, "height": 48}
    return json.dumps({**told, "sha256": f"hash {number}", **more}).encode()


def shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def images(path: Path, numbers: Any, **more: Any) -> Path:
    """A shard of images with captions and metadata; image ``n`` is of the grey level ``n``."""
    files = {}
    for n in numbers:
        files |= {f"{n:09}.png": image(n), f"{n:09}.txt": f"caption {n}".encode()}
        files[f"{n:09}.json"] = about(n, **more)
    return shard(path, files)


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]


# Parts of files.


def test_a_part_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Whatever is asked of it, against the same bytes in memory."""
    draw = random.Random(0)
    whole = draw.randbytes(50_000)
    (tmp_path / "a.tar").write_bytes(whole)
    span = Span.of(tmp_path / address("a.tar", 1234, 20_000, "b/c.mp4"))
    assert (span.offset, span.size) == (1234, 20_000)
    with span.open() as file:
        wanted = io.BytesIO(whole[1234:21_234])
        for _ in range(300):
            if draw.random() < 0.5:
                to = draw.choice([(draw.randrange(25_000), 0), (-draw.randrange(20_000), 2)])
                assert file.seek(*to) == wanted.seek(*to)
            count = draw.choice([-1, 0, 1, 100, 9000, 30_000])
            assert file.read(count) == wanted.read(count)
            assert file.tell() == wanted.tell()
        with pytest.raises(ValueError, match="before the beginning"):
            file.seek(-1)


def test_addresses_come_back() -> None:
    assert parted(address("in/a.TAR", 5, 7, "x/y.mp4")) == ("in/a.TAR", 5, 7)
    for name in ("a.mp4", "a.tar", "a.tar!b.mp4", "a.tar!1+!b.mp4", "a.zip!1+2!b.mp4"):
        assert parted(name) is None


# Shards.


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard of a video and an image, as tar and webdataset name their members."""
    files = {
        "./0001.mkv": video(),
        "./0001.txt": b" a film\n",
        "./0001.json": about(1, width=1920, height=1080),  # of its source
        "in/0002.png": image(7),
        "in/0002.txt": b"a picture",
        "in/0002.json": about(2),
    }
    return shard(tmp_path_factory.mktemp("shards") / "00000.tar", files).parent


def test_clips_are_read_out_of_a_shard(clips: Path, tmp_path: Path) -> None:
    """Not unpacked, by everything that reads clips, and as they are when unpacked."""
    report = bring("webdataset", clips, tmp_path / "out")
    assert report.line == f"{clips}: used 2 of 2; nothing dropped"
    manifest = Manifest.open(tmp_path / "out" / "data.txt", index=tmp_path / "index")
    film, picture = manifest.record(0), manifest.record(1)
    assert (film.captions, film.frames, film.fps) == (("a film",), 20, 25.0)
    assert (film.height, film.width, film.is_video, film.root) == (*SIZE, True, clips)
    assert (picture.captions, picture.is_video) == (("a picture",), False)
    rule = Rule(frames=9, fps=25, size=SIZE, longest=100)
    data = Clips(manifest, assign(manifest, rule, 0), rule, windows="fixed")
    clip = data.read(Place(0, 0, 0))
    (tmp_path / "film.mkv").write_bytes(video())
    first = int(clip.key.rpartition(":")[2].split("+")[0])
    asked = {"frames": 9, "fps": 25, "size": SIZE, "start": first / 25}
    assert clip.frames.equal(read_video(tmp_path / "film.mkv", **asked))
    assert probe(film.path, root=clips) == probe(tmp_path / "film.mkv")
    assert data.read(Place(0, 0, 1)).frames.unique().tolist() == [7]
    assert sorted(path.name for path in clips.iterdir()) == ["00000.tar"]


def test_a_shard_may_be_a_link_to_a_file_of_any_name(clips: Path, tmp_path: Path) -> None:
    """As those that a hub's client leaves; but not out of the root."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "blob").write_bytes((clips / "00000.tar").read_bytes())
    (tmp_path / "in" / "0.tar").symlink_to("blob")
    bring("webdataset", tmp_path / "in", tmp_path / "out")
    path = lines(tmp_path / "out")[0]["path"]
    assert probe(path, root=tmp_path / "in").frames == 20
    (tmp_path / "in" / "0.tar").unlink()
    (tmp_path / "in" / "0.tar").symlink_to(clips / "00000.tar")
    with pytest.raises(VideoError, match="leads out of root"):
        probe(path, root=tmp_path / "in")


def test_a_clip_that_was_replaced_in_a_shard_is_noticed(clips: Path, tmp_path: Path) -> None:
    bring("webdataset", clips, tmp_path / "out")
    path = lines(tmp_path / "out")[1]["path"]
    copy = tmp_path / "00000.tar"
    data = bytearray((clips / "00000.tar").read_bytes())
    copy.write_bytes(data)
    was = Content.of(Span.of(tmp_path / path))
    assert was.size == len(image(7))
    assert was.is_of(tmp_path / path, full=True)
    data[Span.of(tmp_path / path).offset + 3] ^= 1
    copy.write_bytes(data)
    os.utime(copy, (1, 1))  # or it might be the same tick of the clock
    assert not was.is_of(tmp_path / path)
    assert not was.is_of(tmp_path / path, full=True)


def test_of_a_long_clip_both_ends_are_compared(tmp_path: Path) -> None:
    """Of the clip, not of its shard; what lies between them only if all is asked for."""
    path = tmp_path / "0.tar"
    data = bytearray(random.Random(0).randbytes(500_000))
    where = tmp_path / address("0.tar", 100_000, 300_000, "a.mp4")
    path.write_bytes(data)
    was = Content.of(Span.of(where))
    for time, (at, seen, full) in enumerate(
        (
            (99_999, False, False),
            (100_000, True, True),
            (250_000, False, True),
            (399_999, True, True),
            (400_000, False, False),
        )
    ):
        data[at] ^= 1
        path.write_bytes(data)
        data[at] ^= 1
        os.utime(path, (time, time))
        assert was.is_of(where) != seen
        assert was.is_of(where, full=True) != full


def test_shards_that_are_cut_off_are_refused_before_work(tmp_path: Path) -> None:
    for n in range(3):
        images(tmp_path / "in" / f"{n}.tar", [n])
    whole = (tmp_path / "in" / "1.tar").read_bytes()
    out = tmp_path / "out"
    for cut, reason in (
        (whole[:700], r"1\.tar has 700 bytes, fewer than an empty tar"),
        (whole[:2000], r"1\.tar is cut off after 2000 bytes"),
        (b"\x1f\x8b" + whole, r"1\.tar is no plain tar; unpack it"),
    ):
        (tmp_path / "in" / "1.tar").write_bytes(cut)
        with pytest.raises(DataError, match=f"1 of 3 shards are damaged: .*{reason}.*--skip-damag"):
            bring("webdataset", tmp_path / "in", out)
        assert not out.exists()
    report = bring("webdataset", tmp_path / "in", out, skip_damaged=True)
    assert report.used == 2
    assert report.dropped == {"a shard that is damaged, with all in it": 1}
    with pytest.raises(DataError, match="all 1 shards are damaged"):
        bring("webdataset", tmp_path / "in" / "1.tar", out, skip_damaged=True)


def test_damage_inside_of_a_shard_is_seen(tmp_path: Path) -> None:
    """tarfile takes a header that is none for the end, and says nothing."""
    path = images(tmp_path / "in" / "0.tar", range(4))
    images(tmp_path / "in" / "1.tar", [9])
    with tarfile.open(path) as archive:
        at = archive.getmembers()[5].offset
    data = path.read_bytes()
    path.write_bytes(data[:at] + b"\x55" * 512 + data[at + 512 :])
    with pytest.raises(DataError, match=rf"0\.tar is damaged: no header and no end at byte {at}"):
        bring("webdataset", tmp_path / "in", tmp_path / "out")
    path.write_bytes(data[:at] + bytes(1024))  # as if it had been made so: two samples
    assert bring("webdataset", tmp_path / "in", tmp_path / "out").used == 3
    path.write_bytes(data[: at - 700] + bytes(1024))  # in the middle of a member
    report = bring("webdataset", tmp_path / "in", tmp_path / "out", skip_damaged=True)
    assert (report.used, report.dropped) == (1, {"a shard that is damaged, with all in it": 1})


def test_a_shard_that_is_cut_off_later_is_told_of(clips: Path, tmp_path: Path) -> None:
    bring("webdataset", clips, tmp_path / "out")
    path = lines(tmp_path / "out")[0]["path"]
    (tmp_path / "00000.tar").write_bytes((clips / "00000.tar").read_bytes()[:2000])
    with pytest.raises(VideoError, match=r"the shard .*00000\.tar is cut off: it has 2000 bytes"):
        probe(path, root=tmp_path)


def test_what_cannot_be_used_of_a_shard_is_counted(tmp_path: Path) -> None:
    good = image()
    files = {
        "ok.png": good, "ok.txt": b"fine", "ok.json": about(1),
        "../up.png": good, "../up.txt": b"x",
        "/root.png": good,
        "two.png": good, "two.jpg": good, "two.txt": b"x",
        "none.txt": b"x",
        "bad.png": b"no image", "bad.txt": b"x",
        "empty.png": good, "empty.txt": b" \n",
        "text.png": good, "text.txt": b"\xff\xfe",
        "size.png": good, "size.txt": b"x", "size.json": about(2, width=63),
        "meta.png": good, "meta.txt": b"kept", "meta.json": b"[",
        "notes.md": b"x",
    }  # fmt: skip
    path = shard(tmp_path / "in" / "0.tar", files)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    report = bring("webdataset", path, tmp_path / "out", min_side=48)
    assert [row["cap"] for row in lines(tmp_path / "out")] == [["fine"], ["kept"]]
    assert report.dropped == {
        "a name that leads out of its shard": 3,
        "several clips of one key": 1,
        "a key without a clip": 1,
        "cannot be opened": 1,
        "a text that cannot be read": 1,
        "of another size than its metadata says": 1,
        "metadata that cannot be read": 1,
        "a member that is no plain file": 1,
        "no caption": 2,
    }
    assert report.more["without a hash"] == 1
    with pytest.raises(DataError, match=r"no clip in .*: .*2 smaller than --min-side"):
        bring("webdataset", path, tmp_path / "out", min_side=49)


def test_sizes_that_are_listed_are_believed_of_images_only(tmp_path: Path) -> None:
    files = {
        "a.png": b"no image", "a.txt": b"a", "a.json": about(1),
        "b.mkv": video(2), "b.txt": b"b", "b.json": about(2),
        "c.png": image(), "c.txt": b"c",
    }  # fmt: skip
    path = shard(tmp_path / "0.tar", files)
    report = bring("webdataset", path, tmp_path / "out", check="listed")
    assert [row["resolution"] for row in lines(tmp_path / "out")] == [{"height": 48, "width": 64}]
    assert report.dropped == {"size, or frames, not listed": 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_import_that_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """To the same bytes as one that was not; what is done is not looked at again."""
    for n in range(4):
        images(tmp_path / "in" / f"{n}.tar", range(10 * n, 10 * n + 3))
    whole = tmp_path / "whole"
    bring("webdataset", tmp_path / "in", whole, workers=workers)
    seen: list[str] = []
    real = importing.samples

    def stopped(path: Path, dropped: Any) -> Any:
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(path, dropped)

    monkeypatch.setattr(importing, "samples", stopped)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        bring("webdataset", tmp_path / "in", out)
    assert not (out / "clips.jsonl").exists()
    assert not list(out.rglob(".*.tmp"))
    bring("webdataset", tmp_path / "in", out)
    assert seen == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"]
    assert (out / "clips.jsonl").read_bytes() == (whole / "clips.jsonl").read_bytes()
    images(tmp_path / "in" / "1.tar", [77])
    assert bring("webdataset", tmp_path / "in", out).used == 10
    assert seen[5:] == ["1.tar"]
    assert len(list((out / "parts").glob("*.arrow"))) == 8  # those of the old shard went


def test_duplicates(tmp_path: Path) -> None:
    files = {}
    for key, level, told in (("a", 1, "x"), ("b", 2, "x"), ("c", 1, "y"), ("d", 2, "y")):
        files |= {f"{key}.png": image(level), f"{key}.txt": key.encode()}
        files[f"{key}.json"] = about(0, sha256=told)
    shard(tmp_path / "in" / "0.tar", {k: v for k, v in files.items() if k[0] in "ab"})
    shard(tmp_path / "in" / "1.tar", {k: v for k, v in files.items() if k[0] in "cd"})
    for how, kept in (("listed", "ac"), ("content", "ab"), ("keep", "abcd")):
        report = bring("webdataset", tmp_path / "in", tmp_path / "out", duplicates=how)
        assert "".join(row["cap"][0] for row in lines(tmp_path / "out")) == kept
        assert report.dropped == ({} if how == "keep" else {"a duplicate": 2})
        assert report.more == ({} if how == "keep" else {"without a hash": 0})


def test_the_first_of_its_hash_stays(tmp_path: Path) -> None:
    """Of several parts; both halves count, and what has none is never the same."""
    halves = [(1, 1), (1, 2), (0, 0), (2, 2), (0, 0)], [(1, 1), (0, 5), (0, 0), (2, 2)]
    parts = []
    for number, some in enumerate(halves):
        parts.append(tmp_path / f"rows-{number}.arrow")
        rows = ({"line": "", "high": high, "low": low} for high, low in some)
        importing._write(parts[-1], importing._LINES, rows, importing.Dropped())
    first, none = importing._first(parts)
    assert first.tolist() == [True] * 5 + [False, True, True, False]
    assert none == 3


def test_of_each_reason_twenty_are_named(tmp_path: Path) -> None:
    """However many shards have some."""
    dropped = importing.Dropped()
    for n in range(25):
        dropped.add("lost", str(n))
    assert dropped.examples["lost"] == [str(n) for n in range(20)]
    for n, count in enumerate((15, 12)):
        files = {f"{n}-{i}.txt": b"x" for i in range(count)}
        shard(tmp_path / "in" / f"{n}.tar", files | {f"{n}.png": image(n), f"{n}.txt": b"x"})
    report = bring("webdataset", tmp_path / "in", tmp_path / "out")
    assert report.dropped == {"a key without a clip": 27}
    assert len(report.examples["a key without a clip"]) == 20


def test_what_is_asked_otherwise_is_made_anew(tmp_path: Path) -> None:
    """From the same parts, and to the same folder: of shards, and of a list."""
    images(tmp_path / "in" / "0.tar", [1, 2], caption="other")
    out = tmp_path / "shards"
    for columns, caption in (((), "caption 1"), (["captions=caption"], "other")):
        bring("webdataset", tmp_path / "in", out, columns=columns)
        assert lines(out)[0]["cap"] == [caption]
    path = shard(tmp_path / "film" / "0.tar", {"a.mkv": video(2), "a.txt": b"a", "b.png": image(),
                                               "b.txt": b"b", "b.json": about(1)})  # fmt: skip
    for how, used in (({}, 2), ({"check": "listed"}, 1)):
        assert bring("webdataset", path, tmp_path / "film", **how).used == used
    assert bring("webdataset", path, tmp_path / "film").used == 2
    with pytest.raises(DataError, match="2 cannot be opened"):
        bring("webdataset", path, tmp_path / "film", limits=Limits(max_pixels=47 * 64))

    out, source = tmp_path / "out", tmp_path / "list.parquet"
    row = {"url": "http://host/1", "text": "a", "alt": "b", "id": "000000001", "to": "000000002"}
    table(source, [row])
    given: dict[str, Any] = {"files": tmp_path / "in", "duplicates": "keep"}
    columns = ["width=", "height="]
    for more, name, caption, key in (
        ([], None, "a", 1), (["captions=alt"], None, "b", 1), ([], "{id}", "a", 1),
        ([], "{to}", "a", 2),
    ):  # fmt: skip
        bring("coyo", source, out, columns=[*columns, *more], name=name, **given)
        (line,) = lines(out)
        assert line["cap"] == [caption]
        assert line["path"].endswith(f"{key:09}.png")
    with pytest.raises(DataError, match="smaller than --min-side"):
        bring("coyo", source, out, columns=columns, name="{to}", min_side=49, **given)
    table(source, [{**row, "text": "c"}])
    bring("coyo", source, out, columns=columns, name="{to}", **given)
    assert lines(out)[0]["cap"] == ["c"]


def test_of_two_files_of_one_address_a_list_gets_the_first(tmp_path: Path) -> None:
    for n in (1, 2):
        images(tmp_path / "in" / f"{n}.tar", [n], url="http://host/1")
    source = table(tmp_path / "list.parquet", [{"url": "http://host/1", "text": "x"}])
    columns = ["width=", "height="]
    bring("coyo", source, tmp_path / "out", files=tmp_path / "in", columns=columns)
    assert [row["path"].partition("!")[0] for row in lines(tmp_path / "out")] == ["1.tar"]


def test_a_text_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    files = {"a.png": image(), "a.txt": b"x" * (2**20 + 1), "b.png": image(), "b.txt": b"x" * 2**20}
    report = bring("webdataset", shard(tmp_path / "0.tar", files), tmp_path / "out")
    assert report.dropped == {"a text that is too long": 1, "no caption": 1}


# Lists.


def test_a_list_over_shards(tmp_path: Path) -> None:
    """Rows find their files by url, in whatever order; both captions are kept."""
    images(tmp_path / "in" / "0.tar", [1, 2])
    images(tmp_path / "in" / "1.tar", [3, 4])
    listed = [
        {"url": f"http://host/{n}", "re_caption": f"new {n}", "org_caption": old, "sha256": told}
        for n, old, told in (
            (4, "old 4", "h4"), (9, "", "h9"), (1, "", "h1"), (3, "old 3", "h1"), (2, None, None)
        )
    ]  # fmt: skip
    source = table(tmp_path / "list.parquet", listed)
    report = bring("recap", source, tmp_path / "out", files=tmp_path / "in")
    rows = lines(tmp_path / "out")
    assert [row["cap"] for row in rows] == [["new 4", "old 4"], ["new 1"], ["new 2"]]
    assert report.dropped == {"a row without a file": 1, "a duplicate": 1}
    assert report.examples["a row without a file"] == [f"{source}[1]: http://host/9"]
    read = Manifest.open(tmp_path / "out" / "data.txt")
    rule = Rule(frames=9, fps=25, size=SIZE, longest=100)
    data = Clips(read, assign(read, rule, 0), rule)
    assert [int(data.read(Place(0, 0, n)).frames.unique()) for n in range(3)] == [4, 1, 2]
    how = {"files": tmp_path / "in", "duplicates": "content"}
    report = bring("recap", source, tmp_path / "content", **how)  # whatever the list says of hashes
    assert (report.used, report.dropped) == (4, {"a row without a file": 1})


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_rows_of_a_list_are_made_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """By its row groups, to the same annotations; what is done is not made again."""
    images(tmp_path / "in" / "0.tar", range(7))
    numbers = (6, 9, 1, 2, 0, 8, 3)
    rows = [{"url": f"http://host/{n}", "text": f"caption {n}"} for n in numbers]
    (tmp_path / "lists").mkdir()
    table(tmp_path / "lists" / "b.parquet", [{"url": "http://host/5", "text": "caption 5"}])
    source = tmp_path / "lists" / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), source, row_group_size=2)
    given: dict[str, Any] = {"files": tmp_path / "in", "columns": ["width=", "height="]}
    whole = bring("coyo", source.parent, tmp_path / "whole", **given)
    found = ["6", "1", "2", "0", "3", "5"]
    assert [row["cap"][0].split()[1] for row in lines(tmp_path / "whole")] == found
    monkeypatch.setattr(lists, "_PIECE", 3)
    out, seen, real = tmp_path / "out", [], importing._of_list

    def stopped(piece: Any, *rest: Any) -> Any:
        seen.append((piece.path.name, piece.first, piece.groups))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(piece, *rest)

    with monkeypatch.context() as stopping:
        stopping.setattr(importing, "_of_list", stopped)
        with pytest.raises(KeyboardInterrupt):
            bring("coyo", source.parent, out, **given)
    monkeypatch.setattr(lookup, "build", None)  # the index is there
    report = bring("coyo", source.parent, out, workers=workers, **given)
    assert seen == [("a.parquet", 0, (0, 1)), ("a.parquet", 4, (2, 3))]
    assert (out / "clips.jsonl").read_bytes() == (tmp_path / "whole" / "clips.jsonl").read_bytes()
    assert report.dropped == whole.dropped == {"a row without a file": 2}
    named = [f"{source}[1]: http://host/9", f"{source}[5]: http://host/8"]
    assert report.examples == whole.examples == {"a row without a file": named}
    assert len(list((out / "parts").glob("rows-*.arrow"))) == 3
    assert not list((out / "parts").glob("*.sqlite"))


def test_one_more_file_in_a_folder_is_looked_at_with_few_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a folder end where names say so, not where a number is reached."""
    monkeypatch.setattr(importing, "_FILES", 4)
    for n in range(40):
        path = tmp_path / "in" / f"{n % 3}" / f"{n:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(n))
    rows = [{"id": f"{n % 3}/{n:03}", "text": f"caption {n}"} for n in range(41)]
    source = table(tmp_path / "list.parquet", rows)
    given = {"files": tmp_path / "in", "name": "{id}.png", "duplicates": "content"}
    columns = ["width=", "height=", "url="]
    seen, real = [], importing._of_files

    def seeing(paths: list[Path], *rest: Any) -> Any:
        seen.append(len(paths))
        return real(paths, *rest)

    monkeypatch.setattr(importing, "_of_files", seeing)
    assert bring("coyo", source, tmp_path / "out", columns=columns, **given).used == 40
    assert sum(seen) == 40
    assert max(seen) <= 16
    assert len(seen) >= 3
    seen.clear()
    (tmp_path / "in" / "1" / "000b.png").write_bytes(image(99))
    (tmp_path / "in" / "1" / "040.png").write_bytes(image(98))
    assert bring("coyo", source, tmp_path / "out", columns=columns, **given).used == 41
    assert sum(seen) < 30


def test_parts_are_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of what was read before stays, mapped or not."""
    monkeypatch.setattr(importing, "_ROWS", 1000)
    part, empty = tmp_path / "rows-0.arrow", importing.Dropped()
    row = {"line": "x" * 1000, "high": 0, "low": 0}
    importing._write(part, importing._LINES, (row for _ in range(20_000)), empty)
    before, most = pa.total_allocated_bytes(), 0
    for batch in importing._batches(part):
        most = max(most, pa.total_allocated_bytes() - before)
        assert batch.num_rows <= 1000
    assert 900_000 < most < 4_000_000  # of 20 MB; of a file that is mapped nothing is told
    assert [len(x) for x in importing._first([part])[:1]] == [20_000]


def test_addresses_of_one_hash_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "in" / "0.tar", [1, 2, 3])
    rows = [{"url": f"http://host/{n}", "text": f"{n}"} for n in (3, 9, 1, 2)]
    source = table(tmp_path / "list.parquet", rows)
    monkeypatch.setattr(lookup, "_digest", lambda key: 7)
    given = {"files": tmp_path / "in", "columns": ["width=", "height="]}
    assert bring("coyo", source, tmp_path / "out", **given).used == 3
    found = [(row["cap"][0], row["path"].rpartition("!")[2]) for row in lines(tmp_path / "out")]
    assert found == [(f"{n}", f"{n:09}.png") for n in (3, 1, 2)]


def test_a_list_without_the_column_is_refused_before_work(tmp_path: Path) -> None:
    images(tmp_path / "in" / "0.tar", [1])
    out, rows = tmp_path / "out", [{"URL": "http://host/1", "caption": "x"}]
    source = table(tmp_path / "list.parquet", rows)
    files = tmp_path / "in"
    with pytest.raises(DataError, match=r"no column 'TEXT' \(captions\); it has URL, caption\."):
        bring("laion", source, out, files=files)
    with pytest.raises(DataError, match=r"no column 'WIDTH' \(width\).* or width= to go without"):
        bring("laion", source, out, files=files, columns=["captions=caption"])
    source.write_bytes(source.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"list\.parquet cannot be read: .*download it again"):
        bring("laion", source, out, files=files)
    assert not out.exists()
    table(source, rows)
    given = ["captions=caption", "width=", "height=", "hash="]
    assert bring("laion", source, out, files=files, columns=given).used == 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_cuts_with_their_captions(tmp_path: Path, suffix: str) -> None:
    """As in Panda-70M: each cut of a video is a clip, with the caption in its place."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "abc.mkv").write_bytes(video(25))
    times = [["0:00:00.000", "0:00:00.400"], ["0:00:00.400", "0:00:09.000"], ["0:00:02", "0:00:03"]]
    rows = [
        {"videoID": "abc", "timestamp": [*times, times[0]], "caption": ["one", "it's 2", "3", "1"]},
        {"videoID": "abc", "timestamp": times[:1], "caption": ["one", "two"]},
        {"videoID": "gone", "timestamp": times[:1], "caption": ["one"]},
    ]
    source = tmp_path / f"list.{suffix}"
    if suffix == "parquet":
        table(source, rows)
    elif suffix == "jsonl":
        source.write_text("\n".join(map(json.dumps, rows)))
    else:
        texts = [[str(value).replace('"', '""') for value in row.values()] for row in rows]
        source.write_text(
            "videoID,timestamp,caption\n" + "".join(f'{a},"{b}","{c}"\n' for a, b, c in texts)
        )
    films = tmp_path / "films"
    report = bring("panda", source, tmp_path / "out", files=films, name="{videoID}.mkv")
    assert [(row["cut"], row["cap"]) for row in lines(tmp_path / "out")] == [
        ([0, 10], ["one"]),
        ([10, 25], ["it's 2"]),
    ]
    assert report.dropped == {
        "a cut outside of its video": 1,
        "as many captions as cuts are needed": 1,
        "a row without a file": 1,
        "a duplicate": 1,
    }
    read = Manifest.open(tmp_path / "out" / "data.txt")
    assert [(read.record(n).start, read.record(n).frames) for n in range(2)] == [(0, 10), (10, 15)]


def test_what_is_listed_of_sizes_is_compared(tmp_path: Path) -> None:
    images(tmp_path / "in" / "0.tar", [1, 2])
    rows = [
        {"url": f"http://host/{n}", "text": "x", "width": width, "height": 48}
        for n, width in ((1, 64), (2, 640))
    ]
    source = table(tmp_path / "list.parquet", rows)
    report = bring("coyo", source, tmp_path / "out", files=tmp_path / "in")
    assert report.more["of another size than listed"] == 1
    assert report.used == 2


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("openvid", {}, "kind must be one of webdataset, recap, coyo, laion, panda, got 'openvid'"),
        ("recap", {}, "needs the files that it lists; give --files"),
        ("recap", {"files": "gone"}, "gone is no folder"),
        ("recap", {"files": "plain"}, "plain has no shards; give --name"),
        ("recap", {"files": "in", "columns": ["size=x"]}, r"columns: 'size=x' is no ROLE=COLUMN"),
        ("recap", {"files": "in", "columns": ["url=a", "url=b"]}, "columns: url is given 2 times"),
        ("recap", {"files": "in", "columns": ["captions="]}, "columns: no captions"),
        ("recap", {"files": "in", "columns": ["url="]}, "columns: no url"),
        ("recap", {"files": "in", "name": "{id}"}, r"no column 'id' \(name\)"),
        ("coyo", {"files": "plain", "name": "x"}, "duplicates: coyo has no column of hashes"),
        ("webdataset", {"name": "x"}, "files and name are of a list"),
        ("webdataset", {"columns": ["times=t"]}, "columns: url and times are of a list"),
        ("webdataset", {}, "is no shard, nor a folder of .tar"),
        ("webdataset", {"min_side": 0}, "min_side must be from 1"),
        ("webdataset", {"check": "no"}, "check must be one of files, listed, got 'no'"),
    ],
)
def test_settings_that_make_no_sense(
    tmp_path: Path, kind: str, more: dict[str, Any], message: str
) -> None:
    images(tmp_path / "in" / "0.tar", [1])
    (tmp_path / "plain").mkdir()
    names = ("url", "re_caption", "org_caption", "sha256", "text", "width", "height")
    source = table(tmp_path / "list.parquet", [dict.fromkeys(names, "1")])
    if "files" in more:
        more = {**more, "files": tmp_path / more["files"]}
    with pytest.raises(DataError, match=message):
        bring(kind, source, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_the_command(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "import", "webdataset", str(clips), str(tmp_path / "out")]
    assert main([*words, "--columns", "captions=caption,captions=.txt", "--min-side", "40"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [
        f"{clips}: used 2 of 2; nothing dropped",
        f"clips: {tmp_path / 'out' / 'data.txt'}",
    ]
    assert main(["data", "check", out[-1].split()[1], "--out", str(tmp_path / "check.json")]) == 0


def test_what_is_lost_of_the_files_of_a_list_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside its rows, and not counted twice."""
    files = {"a.png": image(1), "a.json": about(1), "b.png": b"no image", "b.json": about(2)}
    shard(tmp_path / "in" / "0.tar", files)
    rows = [{"url": f"http://host/{n}", "text": f"caption {n}"} for n in (1, 2)]
    source = table(tmp_path / "list.parquet", rows)
    words = ["data", "import", "coyo", str(source), str(tmp_path / "out")]
    words += ["--files", str(tmp_path / "in"), "--columns", "width=,height="]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"1 a row without a file, the first {source}[1]: http://host/2"
    assert out[1].startswith("of the files 1 cannot be opened, the first 0.tar!")
    assert out[2] == f"{source}: used 1 of 2; dropped 1: 1 a row without a file"
