"""How an image file becomes a clip of one frame: checked, upright, cut and scaled as videos are."""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from skiparse.models.data.limits import Limits
from skiparse.models.data.video import VideoError, fit, plain_file

IMAGES = frozenset({".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp"})

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})  # of 8 bits
# What Pillow raises at damage: it makes no promise.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, struct.error),
    *(zlib.error, TypeError, AttributeError, LookupError, ArithmeticError),
)
_FORMATS = ("JPEG", "PNG", "WEBP")

# How to turn a picture upright, by its EXIF orientation; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXCHANGED = range(5, 9)  # orientations that exchange height and width
_IN_XMP = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')  # where there is no EXIF
_ORIENTATION, _SHORT = 0x0112, 3  # a tag of EXIF, and its type


def probe_image(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> tuple[int, int]:
    """Height and width of the upright image, from its header; VideoError as :func:`read_image`."""
    with _opened(path, root, limits or Limits()) as image:
        turned = _orientation(image) in _EXCHANGED
        return (image.width, image.height) if turned else (image.height, image.width)


def read_image(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """A JPEG, PNG or WebP as one frame, cut about its centre to the aspect of ``size`` and scaled.

    It is turned upright by its EXIF orientation, as far as that can be read; transparency is
    dropped.

    Args:
        path, crop, root, limits: as for :func:`~skiparse.models.data.video.read_video`.
        size: height and width to return, in pixels.

    Returns:
        uint8 ``[1, height, width, 3]``, RGB.

    Raises:
        VideoError: if the file is no plain local JPEG, PNG or WebP of 8 bits, moves, exceeds the
            limits, is smaller than ``size``, or is damaged.
    """
    with _opened(path, root, limits or Limits()) as image:
        turn = _TURNS.get(_orientation(image))
        picture = image.convert("RGB")
        upright = picture if turn is None else picture.transpose(turn)
        return fit(torch.from_numpy(np.array(upright)), size=size, crop=crop)[None]


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none that makes sense.

    Cameras and programs write odd things into the other tags, on which a reader of all of them
    stumbles; so nothing but this one is read: the first directory of the TIFF that EXIF is.
    """
    data = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    order = {b"II": "little", b"MM": "big"}.get(data[:2])
    if order is None:
        said = _IN_XMP.search(image.info.get("xmp", b""))
        return int(said[1]) if said else 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]  # a literal

    start = number(4, 4)
    for at in range(start + 2, start + 2 + 12 * number(start, 2), 12):
        if at + 12 <= len(data) and number(at, 2) == _ORIENTATION:
            value = number(at + 8, 2) if number(at + 2, 2) == _SHORT else number(at + 8, 4)
            return value if value in _TURNS else 1
    return 1


@contextmanager
def _opened(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, limits: Limits
) -> Iterator[Image.Image]:
    """The image, its size checked, not yet decoded; all errors leave as VideoError."""
    try:
        with (
            plain_file(path, root).open() as file,
            Image.open(file, formats=_FORMATS) as image,
        ):
            reason = limits.why_not(image.width * image.height, 1)
            if reason:
                raise VideoError(f"{image.width}x{image.height}: {reason}; scale it down first")
            if image.mode not in _MODES:
                raise VideoError(f"its pixels are {image.mode}, not of 8 bits; convert it")
            if getattr(image, "is_animated", False):
                raise VideoError("moves; convert it to a video, say mp4")
            yield image
    except VideoError as error:
        raise VideoError(f"{os.fsdecode(path)!r}: {error}") from error
    except _DAMAGE as error:
        raise VideoError(f"{os.fsdecode(path)!r}: no image that can be read ({error})") from error
