"""How frames become a file that any player opens, and is there whole or not at all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from torch import Tensor

from skiparse.models.data.atomic import replacing

CRF = 23  # x264's own default
MAX_CRF = 51
MAX_FPS = 1000


def write_video(
    path: str | os.PathLike[str],
    frames: Tensor | Iterable[Tensor],
    *,
    fps: float | Fraction = 24,
    crf: int = CRF,
) -> None:
    """Write frames as H.264 in an mp4 that plays while it loads.

    8-bit 4:2:0, tagged and converted as BT.709 with limited range, so that players need not guess.

    Args:
        path: ends in ``.mp4``; an older file of that name is replaced.
        frames: uint8 ``[T, height, width, 3]``, RGB, any device; even height and width. Or such
            pieces of one video, each written before the next is asked for.
        fps: frames per second, above 0.
        crf: x264's constant rate factor, 0 (lossless but for the colours) to 51 (worst).

    Raises:
        ValueError: for arguments that make no sense, before anything is written; for a piece of
            another size than the first, then nothing is.
    """
    _check_name(path, ".mp4")
    check_settings(fps=fps, crf=crf)
    pieces = iter([frames] if isinstance(frames, Tensor) else frames)
    first = next(pieces, torch.empty(0, 0, 0, 3, dtype=torch.uint8))
    _check(first, 4)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"frames must have even height and width for 4:2:0, got {height}x{width}")
    rate = Fraction(fps).limit_denominator(100_000)
    options = {"movflags": "+faststart"}
    with (
        replacing(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options=options) as container,
    ):
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for piece in itertools.chain([first], pieces):
            _check(piece, 4)
            if piece.shape[1:3] != first.shape[1:3]:
                raise ValueError(
                    f"a piece of frames is {list(piece.shape)} and the first {list(first.shape)}; "
                    "give frames of one size"
                )
            for picture in piece:
                frame = VideoFrame.from_ndarray(picture.cpu().contiguous().numpy(), format="rgb24")
                container.mux(
                    stream.encode(
                        frame.reformat(
                            format="yuv420p",
                            dst_colorspace=Colorspace.ITU709,
                            dst_color_range=ColorRange.MPEG,
                        )
                    )
                )
        container.mux(stream.encode())


def check_settings(*, fps: float | Fraction, crf: int) -> None:
    """ValueError unless :func:`write_video` takes these; for callers with long work before it."""
    if not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps must be above 0 and at most {MAX_FPS}, got {fps}")
    if not 0 <= crf <= MAX_CRF:
        raise ValueError(f"crf must be from 0 to {MAX_CRF}, got {crf}")


def write_image(path: str | os.PathLike[str], picture: Tensor) -> None:
    """Write one picture as PNG, without loss.

    Args:
        path: ends in ``.png``; an older file of that name is replaced.
        picture: uint8 ``[height, width, 3]``, RGB, any device.

    Raises:
        ValueError: for arguments that make no sense, before anything is written.
    """
    _check_name(path, ".png")
    _check(picture, 3)
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = picture.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    frame = VideoFrame.from_ndarray(picture.cpu().contiguous().numpy(), format="rgb24")
    data = b"".join(map(bytes, [*codec.encode(frame), *codec.encode(None)]))
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _check_name(path: str | os.PathLike[str], suffix: str) -> None:
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"path must end in {suffix}, got {os.fspath(path)!r}")


def _check(pixels: Tensor, dims: int) -> None:
    if pixels.dtype != torch.uint8 or pixels.dim() != dims or pixels.shape[-1] != 3:
        shape = "[height, width, 3]" if dims == 3 else "[T, height, width, 3]"
        raise ValueError(
            f"pixels must be uint8 {shape}, got {pixels.dtype} {list(pixels.shape)}; frames in "
            "[-1, 1] become so by SUVPipeline, or by (x * 127.5 + 127.5).round()"
        )
    if not pixels.numel():
        raise ValueError(f"there are no pixels to write, the shape is {list(pixels.shape)}")
