"""How a video file becomes a tensor of frames: checked, whole, and at the times asked for.

Built for files from anywhere. Only plain local files in self-contained formats are opened; sizes
are checked before anything is decoded and again while decoding; a clip is returned whole or not
at all.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor
from torch.nn import functional

from skiparse.models.data.h264 import FrameNumbers
from skiparse.models.data.limits import Limits
from skiparse.models.data.span import Span, parted

# Formats that hold their pictures themselves. Playlists and scripts (ffconcat, HLS, DASH, image
# sequences) name other files and are not among them.
_FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf,nut,ivf,yuv4mpegpipe"

# Two letters at least, for `C:` is a drive; and no blank behind, as in `Re: the film.mp4`.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?!\s)")

SCAN_BYTES = 2**28  # of a file that is read through for the times of its frames

# H.264 and HEVC show a frame at most this many frames after those that may be predicted from it.
_REORDER = 16

# Containers that stamp every picture with its time, so that it is the same time after a jump.
_SEEKABLE = {"mov", "matroska"}

# A time in seconds is a float, often one that somebody has rounded: so much too early still counts.
_EARLY = Fraction(1, 50_000)

_COARSE = Fraction(1, 1000)  # a rounding to the ticks of a clock is believed to be no larger

_EVERY_PACKET = {"h264", "hevc"}  # is a frame, in these codecs

_NO_TIMES = "its frames have no time stamps; put them into a container, say mp4"

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED, the colour matrix of an untagged frame
_BT709 = 1  # AVCOL_SPC_BT709


class VideoError(ValueError):
    """A video file that cannot be used, with its name and the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What there is to see in a file's first video stream.

    Attributes:
        width, height: pixels as stored, before rotation.
        frames: those that are shown, without what an edit list hides or what cannot be decoded for
            want of a key frame. None where the container does not say.
        fps: frames per second: the rate that the container names if the frames keep to it, or else
            their average, ``frames / duration``.
        duration: seconds from the first frame's appearance to the last one's end.
        rotation: degrees counter-clockwise that turn the stored picture upright.
        pixel_aspect: width of a stored pixel over its height.
        hold: seconds of the longest pause between two frames; 0 where it is not known.
        exact: whether frames, rate and duration come from the times of all frames; if not, they are
            what a container says, which may be wrong.
    """

    width: int
    height: int
    frames: int | None
    fps: Fraction | None
    duration: Fraction | None
    rotation: int
    pixel_aspect: Fraction
    hold: Fraction = Fraction(0)
    exact: bool = False

    def upright(self) -> tuple[int, int]:
        """Height and width to show it at, in square pixels, so that neither side is enlarged."""
        height = int(self.height / max(self.pixel_aspect, Fraction(1)))
        width = int(self.width * min(self.pixel_aspect, Fraction(1)))
        return (height, width) if self.rotation % 180 == 0 else (width, height)


def probe(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
    whole: bool | None = None,
) -> VideoInfo:
    """Size, length and rotation of a video: what there is to see, from the times of its frames.

    At most the first frame is decoded, within the limits: the rotation comes with it.

    Args:
        path, root, limits: as for :func:`read_video`.
        whole: whether to read all of the file for the times of its frames. None does so up to
            :data:`SCAN_BYTES`; of a larger file the container is believed, and ``exact`` is False.

    Raises:
        VideoError: as :func:`read_video`, for what can be known without decoding all of it.
    """
    limits = limits or Limits()
    with _opened(path, root, limits) as (container, stream):
        first = next(_frames(container, stream, limits), None)
        if first is None:
            raise VideoError("not one frame in it can be decoded")
        assert first.pts is not None
        codec, size = stream.codec_context, plain_file(path, root).size
        info = VideoInfo(
            codec.width,
            codec.height,
            _indexed_frames(container, stream, size) or _promised_frames(container, stream),
            stream.average_rate,
            _duration(container, stream),
            first.rotation,
            stream.sample_aspect_ratio or Fraction(1),
        )
        zero = first.pts
    if whole or (whole is None and size <= SCAN_BYTES):
        with _opened(path, root, limits) as (container, stream):
            return replace(info, **_scanned(container, stream, zero))
    return info


def count_frames(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> int:
    """Frames that are shown, of a file of any size; reads all of it, decodes the first.

    Raises:
        VideoError: as :func:`probe`.
    """
    frames = probe(path, root=root, limits=limits, whole=True).frames
    assert frames is not None
    return frames


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: int,
    fps: float | Fraction,
    size: tuple[int, int],
    start: float | Fraction = 0,
    crop: tuple[int, int, int, int] | None = None,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
    allow_upscale: bool = False,
    threads: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """``frames`` frames of a video from ``start`` on, sampled by time, cut and scaled to ``size``.

    Frame ``i`` is the picture on screen ``start + i / fps`` seconds after the first one, by the
    time stamps of the file, so a variable frame rate comes out right. Pictures are turned upright,
    cut about the centre to the aspect of ``size`` and scaled (bicubic, antialiased). Frames without
    a colour tag are taken as BT.709 from 720 lines up and BT.601 below; there is no tone mapping.

    In mp4, mov, Matroska and WebM decoding begins at a key frame before ``start``, if that gives
    the frame on screen at ``start``; else, and in other formats, at the beginning. The frames are
    the same.

    Args:
        path: a plain file, or the address of one in a shard (:mod:`skiparse.models.data.span`). A
            name with a colon near its start needs a folder before it, ``./a:b``.
        frames: how many frames to return, at least 1.
        fps: frames per second to return, above 0.
        size: height and width to return, in pixels.
        start: seconds after the first frame at which the clip begins, at least 0.
        crop: top, left, height and width, in pixels of the upright picture, of the part to use.
        root: if given, ``path`` is relative to it and may not leave it, by symlink or otherwise.
        limits: the largest source to decode; ``Limits()`` if None.
        allow_upscale: whether a source smaller than ``size`` is enlarged instead of refused.
        threads: of the decoder and of the conversion to RGB; 0 lets them choose. Must be 1 in a
            process that is forked later, say for a DataLoader.
        progress: called with 1 for every frame finished.

    Returns:
        uint8 ``[frames, height, width, 3]``, RGB.

    Raises:
        VideoError: if the file is no plain local file, holds no video, exceeds the limits, has
            less to show than was asked for, is too small, or is damaged anywhere from where
            decoding begins up to the last frame needed. Damage is what the decoder notices: in
            H.264, MPEG-4 and AV1 nearly all of it, in HEVC and VP9 little, as they carry no
            checksums. Where that matters, compare a hash of the file first.
        ValueError: for arguments that make no sense.
    """
    height, width = size
    if frames < 1 or height < 1 or width < 1:
        raise ValueError(f"frames and size must be at least 1, got frames={frames}, size={size}")
    rate = Fraction(fps).limit_denominator(100_000)
    if rate <= 0:
        raise ValueError(f"fps must be above 0, got {fps}")
    if not 0 <= start < math.inf:
        raise ValueError(f"start must be at least 0 seconds, got {start}")
    begin = Fraction(start)
    if crop is not None and (min(crop[:2]) < 0 or min(crop[2:]) < 1):
        raise ValueError(f"crop must be (top, left, height, width) of some pixels, got {crop}")
    limits = limits or Limits()
    entry = _entry(path, root, limits, begin)
    clip = torch.empty((frames, height, width, 3), dtype=torch.uint8)
    done, spare, end = 0, _REORDER, Fraction(0)
    seconds = frames / rate + (begin if entry is None else 0)  # to decode, at least
    with _opened(path, root, limits, threads, seconds) as (container, stream):
        if entry is None:
            pictures, zero, matrix = _frames(container, stream, limits), None, None
        else:
            pictures = _after_jump(container, stream, limits, entry)
            zero, matrix = entry.zero, entry.matrix
        try:
            for end, frame in _shown(container, pictures, stream, limits, zero):
                matrix = _display_matrix(frame) if matrix is None else matrix
                if done == frames:
                    spare -= 1
                    if not spare:
                        break
                first = done
                while done < frames and begin + done / rate < end:
                    if done == first:
                        clip[done] = _picture(
                            frame, stream, matrix, size, crop, allow_upscale, threads
                        )
                    else:
                        clip[done] = clip[first]
                    done += 1
                    if progress is not None:
                        progress(1)
        except VideoError as error:
            raise VideoError(f"{error} (with {done} of {frames} frames done)") from error
        if done < frames:
            promised = _promised_frames(container, stream) or "no number of"
            raise VideoError(
                f"ends after {float(end):.3f} s, enough for {done} of the {frames} frames asked "
                f"for: the last is due at {float(begin + (frames - 1) / rate):.3f} s. The "
                f"container speaks of {promised} frames"
            )
    return clip


@contextmanager
def _opened(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    limits: Limits,
    threads: int = 1,
    seconds: Fraction | None = None,
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream, sizes checked; all errors leave as VideoError.

    ``seconds`` are those to decode, if it is more than a frame.

    What has several threads and is still in memory when the process is forked, into workers of a
    DataLoader say, hangs or crashes the copy once it is freed there. So there is one by default.
    """
    try:
        with (
            plain_file(path, root).open() as file,
            av.open(
                file,
                mode="r",
                options={"format_whitelist": _FORMATS, "protocol_whitelist": ""},
                metadata_errors="replace",
            ) as container,
        ):
            stream = _video_stream(container)
            codec = stream.codec_context
            stream.thread_type, codec.thread_count = "AUTO", threads
            # The decoder refuses larger frames itself, before allocating them. It counts whole
            # blocks of up to 128 x 128 pixels, so it is given some slack; _frames is exact.
            codec.options = {
                "max_pixels": str(2 * limits.max_pixels + 256 * 256),
                "err_detect": "crccheck+bitstream+buffer+explode",  # stop at damage, hide none
            }
            frames = None if seconds is None else _to_decode(container, stream, seconds)
            reason = limits.why_not(codec.width * codec.height, frames or 1)
            if reason:
                raise VideoError(
                    f"{codec.width}x{codec.height}, {frames or 'unknown'} frames: {reason}; cut "
                    "it or scale it down first, or pass larger limits (--limits.max_frames and so "
                    "on)"
                )
            yield container, stream
    except VideoError as error:
        raise VideoError(f"{os.fsdecode(path)!r}: {error}") from error
    except av.ArgumentError as error:  # what the whitelist answers
        raise VideoError(
            f"{os.fsdecode(path)!r}: not in a format that is read; convert it to one of {_FORMATS}"
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{os.fsdecode(path)!r}: not a video that can be read ({error.strerror})"
        ) from error


def plain_file(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Span:
    """The file ``path``, of ``root`` if given; VideoError if it is none, empty, or outside.

    An address leads to its part of a shard (:mod:`skiparse.models.data.span`).
    """
    name = os.fspath(path)
    check_name(name)
    part = parted(name)
    try:
        real = (Path(root or ".") / (name if part is None else part[0])).resolve(strict=True)
        if root is not None and not real.is_relative_to(Path(root).resolve(strict=True)):
            raise VideoError(f"leads out of root {os.fspath(root)!r}, to {str(real)!r}")
    except FileNotFoundError as error:
        raise VideoError("no such file") from error
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise VideoError(f"no file can be reached by that name ({error})") from error
    if not real.is_file():
        raise VideoError("not a plain file")
    try:
        span = Span.within(real, None if part is None else part[1:])
    except OSError as error:
        raise VideoError(error.strerror or str(error)) from error
    if not span.size:
        raise VideoError("the file is empty")
    return span


def check_name(name: str) -> None:
    """VideoError if a name is none of a plain local file: a URL, or with NUL in it."""
    if "\0" in name:
        raise VideoError("NUL in the name; only plain local files are read")
    if _SCHEME.match(name):
        raise VideoError("looks like a URL; only plain local files are read (./a:b for a name)")


def _video_stream(container: InputContainer) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song
            return stream
    kinds = {"a cover" if s.type == "video" else s.type for s in container.streams}
    raise VideoError(f"no video in it, only {' and '.join(sorted(kinds)) or 'an empty container'}")


def _duration(container: InputContainer, stream: VideoStream) -> Fraction | None:
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    return None if container.duration is None else Fraction(container.duration, av.time_base)


def _promised_frames(container: InputContainer, stream: VideoStream) -> int | None:
    duration = _duration(container, stream)
    if stream.frames or duration is None or stream.average_rate is None:
        return stream.frames or None
    return round(duration * stream.average_rate)


def _indexed_frames(container: InputContainer, stream: VideoStream, size: int) -> int | None:
    """Frames that are shown, by the index of an mp4 or mov; VideoError if it ends before them."""
    if not _is(container, "mov") or not len(stream.index_entries):
        return None
    shown = [entry for entry in stream.index_entries if not entry.is_discard]
    there = sum(entry.pos + entry.size <= size for entry in shown)
    if there < len(shown):
        raise VideoError(f"cut short: {there} of its {len(shown)} frames are there")
    return len(shown) if stream.frames else None  # in fragments only the first are known


def _to_decode(container: InputContainer, stream: VideoStream, seconds: Fraction) -> int | None:
    """Frames in ``seconds`` of it, or in all of it if that is less; None if it does not say."""
    promised, rate = _promised_frames(container, stream), stream.average_rate
    if promised is None or not rate:
        return promised
    return min(promised, math.ceil(seconds * rate))


def _is(container: InputContainer, *formats: str) -> bool:
    return not set(formats).isdisjoint(container.format.name.split(","))


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    """What is to be decoded, and the end; stops with VideoError where something is missing.

    A file begins with its first key frame: what is before it in the order of decoding, as where a
    recording was cut without care, cannot be decoded, and some decoders do not even notice.
    """
    codec = stream.codec_context
    numbers = FrameNumbers(codec.extradata) if codec.name == "h264" else None
    begun, count = False, 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise VideoError(f"damaged after {count} frames: a packet is cut short")
        if packet.size:
            begun = begun or packet.is_keyframe
            if not begun:
                continue
            if numbers is not None and numbers.lost(bytes(packet), packet.is_keyframe):
                raise VideoError(
                    f"damaged after {count} frames: by its numbers a frame is missing that others "
                    "are made from"
                )
            count += 1
        elif packet.dts is not None:  # in AVI: the frame before stays on screen
            continue
        yield packet
    if not begun:
        raise VideoError("holds no key frame, from which decoding could begin")


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """The frames in the order of showing, each with its time."""
    clock = None
    if _is(container, "avi"):
        clock = _AviClock(every=stream.codec_context.name in _EVERY_PACKET)
    for packet in _packets(container, stream):
        if clock is not None:
            clock.packet(packet)
        for frame in packet.decode():
            if clock is not None:
                frame.pts = clock.time(frame)
            if frame.pts is None or frame.time_base is None:
                raise VideoError(_NO_TIMES)
            yield frame


class _AviClock:
    """Times of frames in AVI, which only has those of packets, in the order of decoding.

    A decoder's guesses are wrong where frames are made from later ones. Where every packet is a
    frame, the first frame has the first of these times, and so on. Else a packet may say that the
    frame before stays; but then a decoder is always as many packets behind as with its first frame.
    """

    def __init__(self, *, every: bool) -> None:
        self._every = every
        self._times: list[int] = []  # of the packets so far
        self._behind: int | None = None  # packets
        self._next = 0  # number of the packet that has the next frame's time

    def packet(self, packet: Packet[VideoStream]) -> None:
        """One goes to the decoder."""
        if packet.dts is not None:
            self._times.append(packet.dts)

    def time(self, frame: VideoFrame) -> int:
        """Of the frame that comes next."""
        if not self._every and frame.dts is not None:  # the time of the packet that brought it out
            number = bisect_left(self._times, frame.dts)
            self._behind = number if self._behind is None else self._behind
            self._next = number - self._behind
        self._next += 1
        return self._times[min(self._next, len(self._times)) - 1]


def _frames(container: InputContainer, stream: VideoStream, limits: Limits) -> Iterator[VideoFrame]:
    """Every frame in the order of showing; stops with VideoError at the first sign of damage."""
    count = 0
    size = matrix = None
    try:
        for frame in _decoded(container, stream):
            if frame.is_corrupt:
                raise VideoError(f"damaged after {count} frames: a frame is incomplete")
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise VideoError(
                    f"changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} after "
                    f"{count} frames; cut it there"
                )
            matrix = matrix or _display_matrix(frame)
            if "DISPLAYMATRIX" in frame.side_data and _display_matrix(frame) != matrix:
                raise VideoError(
                    f"is to be shown turned in another way after {count} frames; cut it there"
                )
            count += 1
            reason = limits.why_not(frame.width * frame.height, count)
            if reason:
                raise VideoError(
                    f"too much to decode: {reason}; cut it first, or pass larger limits "
                    "(--limits.max_frames and so on)"
                )
            yield frame
    except av.FFmpegError as error:
        raise VideoError(f"damaged after {count} frames: {error.strerror}") from error


def _scanned(container: InputContainer, stream: VideoStream, zero: int) -> dict[str, Any]:
    """Fields of VideoInfo from the times of all packets; the first one that counts is at ``zero``.

    A packet is a frame unless it is hidden: by an edit list, by its own header, or because it would
    be shown before the first key frame, when what it is made from is not there.
    """
    codec, by_packet = stream.codec_context.name, _is(container, "avi")
    tick, seen = stream.time_base, {}  # by time, so that what is replaced at once counts once
    assert tick is not None
    for packet in _packets(container, stream):
        time = packet.dts if by_packet or packet.pts is None else packet.pts
        if not packet.size or packet.is_discard or (time is not None and time < zero):
            continue
        if time is None:
            raise VideoError(_NO_TIMES)
        if _is_hidden(codec, packet):
            continue
        seen[time] = packet.duration or 0
    if not seen:
        raise VideoError("not one frame in it can be decoded")
    times = sorted(seen)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    rates = _rates(stream)
    before = gaps[-1] * tick if gaps else Fraction(0)
    lasts = _lasts(container, seen[times[-1]] * tick, before, rates)
    duration = (times[-1] - times[0]) * tick + lasts
    return {
        "frames": len(times),
        "fps": _rate(len(times), duration, rates),
        "duration": duration,
        "hold": max(gaps, default=0) * tick,
        "exact": True,
    }


def _rate(frames: int, duration: Fraction, rates: list[Fraction]) -> Fraction | None:
    """The first of ``rates`` that the frames keep to, or their average; None for no duration.

    Up to a tenth of them may be missing, as behind a cut. Never do they last longer than the file,
    by half a frame at most, so that every frame number is a time at which something is shown.
    """
    if not duration:
        return None
    kept = (
        rate
        for rate in rates
        if duration * Fraction(9, 10) <= frames / rate < duration + 1 / (2 * rate)
    )
    return next(kept, frames / duration)


def _rates(stream: VideoStream) -> list[Fraction]:
    """What the container says, or what follows from the first frames, best first."""
    return [r for r in (stream.average_rate, stream.guessed_rate, stream.base_rate) if r]


def _is_hidden(codec: str, packet: Packet[VideoStream]) -> bool:
    """Whether nothing is shown of it: VP8 and VP9 have frames for others to be made from."""
    if codec == "vp8":
        return not bytes(packet)[0] >> 4 & 1
    if codec == "vp9":
        data = bytes(packet)
        several = data[-1] & 0xE0 == 0xC0  # then one of them is shown
        return not several and data[0] >> 4 != 0xB and not data[0] & 0b1010
    return False


def _lasts(
    container: InputContainer,
    stated: Fraction,
    before: Fraction,
    rates: list[Fraction],
) -> Fraction:
    """How long the last frame is shown: what mp4 and mov say; elsewhere as long as the one before.

    Other containers leave it open, and what the library fills in follows from a guess at the rate.
    """
    if _is(container, "mov") and stated:
        return stated
    return before or stated or next((1 / rate for rate in rates), Fraction(0))


@dataclass(frozen=True)
class _Entry:
    """Where to enter a file: in ticks of its clock."""

    zero: int  # the first frame of the file
    matrix: tuple[int, int, int, int]  # how it is to be shown
    jump: int  # what to ask the container for, to arrive at a key frame early enough


def _entry(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] | None,
    limits: Limits,
    begin: Fraction,
) -> _Entry | None:
    """A way to the frame on screen at ``begin`` without decoding all before it, or None.

    It has been tried: the first frame that comes is a key frame, and early enough. Containers look
    for key frames by the time of decoding, which is up to ``_REORDER`` frames before that of
    showing; so the jump is that much shorter.
    """
    if not begin:
        return None
    with _opened(path, root, limits) as (container, stream):
        rate = stream.average_rate
        if not rate or begin <= _REORDER / rate or not _is(container, *_SEEKABLE):
            return None
        first = next(_frames(container, stream, limits), None)
        if first is None:
            return None
        assert first.pts is not None
        assert first.time_base is not None
        jump = first.pts + math.floor((begin - _REORDER / rate) / first.time_base)
        entry = _Entry(first.pts, _display_matrix(first), jump)
        try:
            found = next(_after_jump(container, stream, limits, entry), None)
        except VideoError:  # frames shown before the key frame may lack what they are made from
            return None
        if found is None or found.pts is None or found.pts > jump or not found.key_frame:
            return None
        return entry


def _after_jump(
    container: InputContainer, stream: VideoStream, limits: Limits, entry: _Entry
) -> Iterator[VideoFrame]:
    """The frames from the key frame on to which ``entry`` leads."""
    try:
        container.seek(entry.jump, stream=stream)
    except av.FFmpegError as error:
        raise VideoError(f"no jump to {entry.jump} in it: {error.strerror}") from error
    yield from _frames(container, stream, limits)


def _shown(
    container: InputContainer,
    frames: Iterator[VideoFrame],
    stream: VideoStream,
    limits: Limits,
    zero: int | None,
) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Each frame, with the time at which the next one replaces it, counted from ``zero``.

    ``zero`` is in ticks of the container's clock; if None, it is the first of the frames. All ends
    are in seconds, and early by :func:`_early`.
    """
    current: VideoFrame | None = None
    pts = before = 0
    tick = early = Fraction(0)
    for frame in frames:
        assert frame.pts is not None
        assert frame.time_base is not None
        if current is None:
            zero, tick = frame.pts if zero is None else zero, frame.time_base
            early = _early(tick, _rates(stream))
        elif frame.pts < pts:
            raise VideoError(f"time goes backwards, from {pts * tick} s to {frame.pts * tick} s")
        elif reason := limits.why_held((frame.pts - pts) * tick):
            raise VideoError(reason)
        else:
            assert zero is not None
            yield (frame.pts - zero) * tick - early, current
            before = frame.pts - pts
        current, pts = frame, frame.pts
    if current is not None and zero is not None:
        lasts = _lasts(container, current.duration * tick, before * tick, _rates(stream))
        yield (pts - zero) * tick + lasts - early, current


def _early(tick: Fraction, rates: list[Fraction]) -> Fraction:
    """Seconds before its time at which a frame counts as shown, so that ``i / fps`` finds frame i.

    Time stamps are rounded to ticks, by half a tick at most, unless frames last whole ticks. A
    clock as coarse as the frames themselves has no such error: a tick may be a whole frame.
    """
    whole = any((1 / (rate * tick)).denominator == 1 for rate in rates[:1])
    return _EARLY if whole else max(_EARLY, min(tick / 2, _COARSE))


def _picture(
    frame: VideoFrame,
    stream: VideoStream,
    matrix: tuple[int, int, int, int],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None,
    allow_upscale: bool,
    threads: int,
) -> Tensor:
    """One frame upright, cut and scaled: uint8 ``[height, width, 3]``."""
    if frame.colorspace == _UNSPECIFIED and frame.height >= 720:
        frame.colorspace = _BT709
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24", threads=threads))
    pixel_aspect = stream.sample_aspect_ratio or Fraction(1)  # width of a pixel over its height
    a, b, c, d = matrix
    if a == 0:  # x and y change places
        picture, pixel_aspect = picture.transpose(0, 1), 1 / pixel_aspect
    mirrored = [axis for axis, sign in ((0, b + d), (1, a + c)) if sign < 0]
    picture = picture.flip(mirrored) if mirrored else picture

    return fit(
        picture, size=size, crop=crop, pixel_aspect=pixel_aspect, allow_upscale=allow_upscale
    )


def fit(
    picture: Tensor,
    *,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    pixel_aspect: Fraction = Fraction(1),
    allow_upscale: bool = False,
) -> Tensor:
    """A picture cut about its centre to the aspect of ``size`` and scaled to it.

    Args:
        picture: uint8 ``[height, width, 3]``.
        size: height and width to return, in pixels.
        crop: top, left, height and width of the part to use, in pixels; all of it if None.
        pixel_aspect: width of a pixel of ``picture`` over its height; that of the result is 1.
        allow_upscale: whether a cut smaller than ``size`` is enlarged instead of refused.

    Returns:
        uint8 ``[*size, 3]``, bicubic and antialiased.

    Raises:
        VideoError: if ``crop`` is not inside the picture, or the cut is too small.
    """
    height, width = picture.shape[:2]
    if crop is not None:
        top, left = crop[:2]
        if top + crop[2] > height or left + crop[3] > width:
            raise VideoError(
                f"the crop {crop} (top, left, height, width) is not inside its {width}x{height} "
                "pixels; correct the crop"
            )
        height, width = crop[2:]
        picture = picture[top : top + height, left : left + width]
    aspect = Fraction(size[1], size[0]) / pixel_aspect  # of the cut, in pixels as stored
    cut_height = min(height, max(1, round(width / aspect)))
    cut_width = min(width, max(1, round(height * aspect)))
    if (cut_height < size[0] or cut_width < size[1]) and not allow_upscale:
        raise VideoError(
            f"{cut_width}x{cut_height} pixels after the cut, fewer than the {size[1]}x{size[0]} "
            "asked for; ask for a smaller size, or pass allow_upscale=True"
        )
    top, left = (height - cut_height) // 2, (width - cut_width) // 2
    picture = picture[top : top + cut_height, left : left + cut_width]
    if picture.shape[:2] == size:
        return picture
    return functional.interpolate(
        picture.permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True
    )[0].permute(1, 2, 0)


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Signs (a, b, c, d) of ``x' = a*x + c*y, y' = b*x + d*y``: how the picture is to be shown."""
    if "DISPLAYMATRIX" not in frame.side_data:
        return 1, 0, 0, 1
    side_data = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]  # stub lacks it
    matrix = np.frombuffer(bytes(side_data), dtype=np.int32)
    a, b, c, d = (int(x) for x in np.sign(matrix[[0, 1, 3, 4]]))
    if not (a == d == 0 != b * c or b == c == 0 != a * d):
        raise VideoError(f"is to be shown turned by {frame.rotation} degrees, not a multiple of 90")
    return a, b, c, d
