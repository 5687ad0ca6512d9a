"""Scores of every clip of a data set, in parts that are made once, by any number of processes.

In the order of v1.3: where a clip jumps it is cut, and each piece is scored by itself. What is
written at the edges of a piece is cropped away, and all that follows is of what is left: how it
looks, how good the picture is, and its motion once more, for text moves too. Images get their
brightness alone: of them only the resolution was asked.

Source: Open-Sora Plan v1.3 report, data. The order, the measures and the crop are published; what
makes a jump an outlier, how many frames lie between two that are compared, how pictures are scaled
for a scorer, and brightness are ours.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from pyarrow import parquet
from torch import Tensor
from tqdm import tqdm

from skiparse.models.data.atomic import check_writable, read_table, replacing, write_json
from skiparse.models.data.image import read_image
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import DataError, Manifest, Record
from skiparse.models.data.plain import printable
from skiparse.models.data.scorers import Pairs, Scorers
from skiparse.models.data.tools import Tools
from skiparse.models.data.video import VideoError, probe, read_video

ABOUT, PARTS, INDEX, LOCK = "scores.json", "parts", "manifest", "lock"
SCORES = ("motion", "motion_cropped", "aesthetic", "technical", "brightness")
SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64()),  # of the manifest
        pa.field("start", pa.int32()),  # first frame, in the file
        pa.field("frames", pa.int32()),
        pa.field("fps", pa.float64()),
        pa.field("cropped", pa.bool_()),  # whether text at an edge was cropped away
        pa.field("top", pa.int32()),  # of the part of the picture to use; -1 where that is all
        pa.field("left", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("width", pa.int32()),
        *(pa.field(name, pa.float32()) for name in SCORES),  # null where there is none
        pa.field("error", pa.string()),  # why it cannot be read; then nothing else is told
    ]
)
MOST_CROP = 0.2  # of the height or the width, that text at an edge may cost; published

_FORMAT = 1
_PART = 128  # rows of the manifest
_CHUNK = 64  # frames in memory at once
_SPREAD = 8.0  # deviations from the median, by which a jump stands out
_TEXT_SIDE = 720  # pixels of the shorter side, in which text is looked for
_JUDGED, _EVERY = 32, 2  # frames that are judged for quality, and from one to the next
_ROUNDED = 1e-6  # pixels, of a share that was a whole number of them
_LUMA = (0.2126, 0.7152, 0.0722)  # of BT.709


def score(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tools: Tools,
    *,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    device: str = "cpu",
    limits: Limits | None = None,
) -> tuple[int, int]:
    """Score what has no scores yet.

    ``out`` gets ``parts`` of :data:`SCHEMA`, a row for each piece of a clip, and ``scores.json``,
    what they are of. Scores depend on the clips, the tools and the versions named there, and not
    on who computes them: each process computes on one thread.

    Args:
        source: as of :meth:`Manifest.open <skiparse.models.data.manifest.Manifest.open>`.
        out: a folder; with scores of something else it is refused.
        tools: by which to score.
        share: number and count: of so many runs, on one machine or several that share ``out``, this
            one has every ``count``-th part.
        workers: processes; 0 computes in this one.
        device: of the networks.
        limits: as for reading.

    Returns:
        How many parts are there, and how many there are to be.

    Raises:
        DataError: before any work, for arguments that make no sense and an ``out`` of other scores.
        FileNotFoundError, ValueError: as :meth:`Scorers.of`.
    """
    number, count = share
    if not 0 <= number < count or workers < 0:
        raise DataError(
            f"share must be I/N with I from 0 and below N, and workers from 0, got {number}/{count}"
            f" and {workers}"
        )
    out, limits = Path(out), limits or Limits()
    scorers = Scorers.of(tools, device)
    check_writable(out / ABOUT)
    (out / PARTS).mkdir(exist_ok=True)
    manifest = Manifest.open(source, index=out / INDEX, limits=limits)
    about = {
        "format": _FORMAT,
        "source": os.path.abspath(source),
        "rows": len(manifest),
        "fingerprint": manifest.fingerprint,
        "part": _PART,
        "limits": list(astuple(limits)),
        "scorers": json.loads(json.dumps({**scorers.about, "device": torch.device(device).type})),
    }
    _agree(out, about)
    every = part_files(out, about)
    job = _Job(manifest, tools, device, limits, _PART, digest(about))
    jobs = [each for each in list(enumerate(every))[number::count] if not each[1].exists()]
    with ExitStack() as stack:
        do: Callable[..., Iterable[None]] = map
        work = partial(_part, job=job, scorers=scorers)
        if workers:  # where each loads them by itself
            work = partial(_part, job=job, scorers=None)
            context = multiprocessing.get_context("spawn")
            do = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context)).map
        bar = stack.enter_context(tqdm(None, "scoring", len(jobs), unit="part", disable=None))
        for _ in do(work, jobs):
            bar.update()
    return sum(file.exists() for file in every), len(every)


def part_files(out: Path, about: dict[str, Any]) -> list[Path]:
    """Where the parts are, or are to be."""
    count = -(-about["rows"] // about["part"])
    return [out / PARTS / f"{number:06}.parquet" for number in range(count)]


def digest(about: dict[str, Any]) -> str:
    """Names what a part is of; it is written in each."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _agree(out: Path, about: dict[str, Any]) -> None:
    """Write what the scores of ``out`` are of, or DataError if it has others."""
    with FileLock(out / LOCK):
        if not (out / ABOUT).exists():
            write_json(out / ABOUT, about)
            return
        there = read_table(out / ABOUT)
    other = sorted(name for name in about if there.get(name) != about[name])
    if other:
        told = "; ".join(f"{name} {there.get(name)}, now {about[name]}" for name in other)
        raise DataError(f"{out} has scores of something else: {told}. Take another folder")


@dataclass(frozen=True)
class _Job:
    """What is the same for all parts."""

    manifest: Manifest
    tools: Tools
    device: str
    limits: Limits
    rows: int  # of the manifest, in a part
    digest: str


@functools.cache  # a process of a pool loads them once
def _scorers(tools: Tools, device: str) -> Scorers:
    return Scorers.of(tools, device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is computed does not depend on how many cores there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _part(part: tuple[int, Path], job: _Job, scorers: Scorers | None) -> None:
    """Score one part, and write it."""
    number, path = part
    scorers = scorers or _scorers(job.tools, job.device)
    rows = range(number * job.rows, min((number + 1) * job.rows, len(job.manifest)))
    with _one_thread():
        found = [
            {"row": row, **piece}
            for row in rows
            for piece in scored(job.manifest.record(row), scorers, job.tools, job.limits)
        ]
    table = pa.Table.from_pylist(found, schema=SCHEMA.with_metadata({"of": job.digest}))
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


# One clip.


def scored(record: Record, scorers: Scorers, tools: Tools, limits: Limits) -> list[dict[str, Any]]:
    """The scores of each piece of a clip, by the names of :data:`SCHEMA`."""
    try:
        if not record.is_video:
            return [_image(record, tools.side, limits)]
        clip = Frames(_counted(record, limits), limits)
        return [_piece(clip, scorers, tools, *piece) for piece in _pieces(clip, scorers, tools)]
    except VideoError as error:
        return [{"error": printable(str(error))}]


def _image(record: Record, side: int, limits: Limits) -> dict[str, Any]:
    picture = read_image(
        record.path,
        size=scaled(record.height, record.width, side),
        crop=record.crop,
        root=record.root,
        limits=limits,
    )
    whole = {"start": 0, "frames": 1, "fps": 0.0, "cropped": False}
    return {**whole, **_crop(record.crop, record), "brightness": _brightness([_mean(picture)])}


def _crop(crop: tuple[int, int, int, int] | None, record: Record) -> dict[str, int]:
    top, left, height, width = crop or (-1, -1, record.height, record.width)
    return {"top": top, "left": left, "height": height, "width": width}


def scaled(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width, scaled down until the shorter side is ``side``."""
    scale = min(1.0, side / min(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _counted(record: Record, limits: Limits) -> Record:
    """With its frames counted, where the manifest has an estimate."""
    if record.exact:
        return record
    info = probe(record.path, root=record.root, limits=limits, whole=True)
    if not info.frames or not info.fps:
        raise VideoError(f"{record.path!r}: {info.frames} frames, {info.fps} a second")
    return replace(record, frames=info.frames, fps=float(info.fps), exact=True)


@dataclass(frozen=True)
class Frames:
    """Frames of a record, by their number in it, at the size in which they are scored."""

    record: Record
    limits: Limits

    def read(
        self,
        first: int,
        count: int,
        every: int = 1,
        *,
        side: int,
        crop: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """``count`` of them, uint8 ``[count, H, W, 3]``; VideoError as for reading.

        Args:
            first, every: number of the first, and from one to the next.
            side: of the shorter side, at most.
            crop: top, left, height, width in the file's picture; default: that of the record.
        """
        record = self.record
        crop = crop or record.crop
        height, width = crop[2:] if crop else (record.height, record.width)
        return read_video(
            record.path,
            frames=count,
            fps=record.fps / every,
            size=scaled(height, width, side),
            start=(record.start + first) / record.fps,
            crop=crop,
            root=record.root,
            limits=self.limits,
            threads=1,
        )

    def chunks(
        self,
        first: int,
        count: int,
        every: int = 1,
        *,
        side: int,
        crop: tuple[int, int, int, int] | None = None,
        shared: int = 0,
    ) -> Iterator[Tensor]:
        """The same, some frames at a time, ``shared`` of which are in the next as well."""
        at = 0
        while True:
            take = min(_CHUNK, count - at)
            yield self.read(first + at * every, take, every, side=side, crop=crop)
            at += take
            if at >= count:
                return
            at -= shared


def _compared(
    clip: Frames,
    pairs: Pairs,
    first: int,
    frames: int,
    tools: Tools,
    crop: tuple[int, int, int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Motion and jump from every ``apart``-th of ``frames`` frames to the next: ``[n]`` twice."""
    count = (frames - 1) // tools.apart + 1
    chunks = clip.chunks(first, count, tools.apart, side=tools.side, crop=crop, shared=1)
    found = [pairs(chunk) for chunk in chunks]
    motion, jump = (torch.cat(each).numpy() for each in zip(*found, strict=True))
    return motion, jump


def _pieces(clip: Frames, scorers: Scorers, tools: Tools) -> list[tuple[int, int, float | None]]:
    """First frame, number of frames and motion of what lies between two cuts.

    A jump is a cut if it stands out of those of the clip: by more than ``_SPREAD`` deviations from
    the median (1.4826 x the median of the deviations, which for a Gaussian is sigma), and is not
    small. The frame is that before which the jump is largest. The motion is the mean of the pairs
    inside; None if there is no pair.
    """
    pairs, apart, frames = scorers.pairs, tools.apart, clip.record.frames
    motion, jump = _compared(clip, pairs, 0, frames, tools)
    begins = list(range(0, len(motion) * apart, apart))
    rest = (frames - 1) % apart  # frames behind the last that was compared
    ends = [begin + apart for begin in begins]
    if rest:
        ends.append(frames - 1)
        begins.append(frames - 1 - rest)
        last = clip.read(begins[-1], 2, rest, side=tools.side)
        jump = np.append(jump, pairs(last).jump.numpy())
    cuts = []
    for pair in np.flatnonzero(jump > _outlier(jump, pairs.least)):
        begin, end = begins[pair], ends[pair]
        near = [
            pairs(x).jump for x in clip.chunks(begin, end - begin + 1, side=tools.side, shared=1)
        ]
        cuts.append(begin + 1 + int(torch.cat(near).argmax()))
    found = []
    for first, end in itertools.pairwise([0, *cuts, frames]):
        timed = zip(begins[: len(motion)], motion, strict=True)  # behind those is no pair
        inside = [m for begin, m in timed if first <= begin and begin + apart < end]
        found.append((first, end - first, float(np.mean(inside)) if inside else None))
    return found


def _outlier(jump: np.ndarray, least: float) -> float:
    """Above which a jump is a cut."""
    if not len(jump):
        return least
    middle = float(np.median(jump))
    deviation = 1.4826 * float(np.median(np.abs(jump - middle)))
    return max(least, middle + _SPREAD * deviation)


def _piece(
    clip: Frames, scorers: Scorers, tools: Tools, first: int, frames: int, motion: float | None
) -> dict[str, Any]:
    """The scores of one piece."""
    record = clip.record
    every = max(1, round(record.fps))  # one frame a second
    seconds = (frames - 1) // every + 1
    crop = None
    if scorers.text is not None:
        pictures = (
            picture.permute(2, 0, 1).float() / 255
            for chunk in clip.chunks(first, seconds, every, side=_TEXT_SIDE)
            for picture in chunk
        )
        crop = _cropped(clip, edges([scorers.text(picture) for picture in pictures]))
    found: dict[str, Any] = {
        "start": record.start + first,
        "frames": frames,
        "fps": record.fps,
        "cropped": crop is not None,
        **_crop(crop or record.crop, record),
        "motion": motion,
    }
    looks, seen = [], []
    for chunk in clip.chunks(first, seconds, every, side=tools.side, crop=crop):
        seen.append(_mean(chunk))
        if scorers.aesthetic is not None:
            looks.append(scorers.aesthetic(chunk.permute(0, 3, 1, 2).float() / 255))
    found["brightness"] = _brightness(seen)
    if looks:
        found["aesthetic"] = float(torch.cat(looks).mean())
    if scorers.technical is not None:
        count = min(_JUDGED, (frames - 1) // _EVERY + 1)
        begin = first + (frames - 1 - (count - 1) * _EVERY) // 2
        whole = clip.read(begin, count, _EVERY, side=max(record.height, record.width), crop=crop)
        found["technical"] = scorers.technical(whole)
    if crop is not None and motion is not None:
        again, _ = _compared(clip, scorers.pairs, first, frames, tools, crop)
        found["motion_cropped"] = float(again.mean())
    return found


def _mean(frames: Tensor) -> Tensor:
    """The mean colour of each frame: float64 ``[T, 3]`` of uint8 ``[T, H, W, 3]``."""
    return frames.double().mean((1, 2))


def _brightness(means: list[Tensor]) -> float:
    """Mean luma, in [0, 1], of mean colours."""
    mean = torch.cat(means).mean(0)
    return float(mean @ mean.new_tensor(_LUMA)) / 255


def edges(boxes: list[Tensor]) -> tuple[float, float, float, float]:
    """Shares of the picture to crop at the top, bottom, left and right, so that text there goes.

    Args:
        boxes: of text in each frame looked at, ``[n, 4]``: x0, y0, x1, y1 as shares of the sides.
            One that lies within :data:`MOST_CROP` of an edge is cropped, at the edge where that
            costs least; others stay.
    """
    found = [0.0] * 4
    for x0, y0, x1, y1 in torch.cat([torch.zeros(0, 4, dtype=torch.float64), *boxes]).tolist():
        costs = (y1, 1 - y0, x1, 1 - x0)
        least = min(range(4), key=costs.__getitem__)
        if costs[least] <= MOST_CROP:
            found[least] = max(found[least], costs[least])
    top, bottom, left, right = found
    return top, bottom, left, right


def _cropped(
    clip: Frames, shares: tuple[float, float, float, float]
) -> tuple[int, int, int, int] | None:
    """What is left without these shares, in whole pixels of the file's picture; None if all is."""
    if not any(shares):
        return None
    record = clip.record
    if record.crop is None:  # pixels as stored, which need not be square
        info = probe(record.path, root=record.root, limits=clip.limits, whole=False)
        size = (info.height, info.width)
        begin, (height, width) = (0, 0), size if info.rotation % 180 == 0 else size[::-1]
    else:
        begin, (height, width) = record.crop[:2], record.crop[2:]
    top, bottom = (math.ceil(share * height - _ROUNDED) for share in shares[:2])
    left, right = (math.ceil(share * width - _ROUNDED) for share in shares[2:])
    return begin[0] + top, begin[1] + left, height - top - bottom, width - left - right
