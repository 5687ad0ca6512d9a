"""How an image file becomes a clip of one frame: checked, upright, cut and scaled as videos are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from skiparse.models.data.video import Limits, VideoError, fit, plain_file

IMAGES = frozenset({".jpg", ".jpeg", ".png"})

_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})  # of 8 bits
_TURNED = range(5, 9)  # EXIF orientations that exchange height and width


def probe_image(
    path: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> tuple[int, int]:
    """Height and width of the upright image, from its header; VideoError as :func:`read_image`."""
    with _opened(path, root, limits or Limits()) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return (image.width, image.height) if turned else (image.height, image.width)


def read_image(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
    root: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
) -> Tensor:
    """A JPEG or PNG as one frame, cut about the centre to the aspect of ``size`` and scaled to it.

    It is turned upright by its EXIF orientation; transparency is dropped.

    Args:
        path, crop, root, limits: as for :func:`~skiparse.models.data.video.read_video`.
        size: height and width to return, in pixels.

    Returns:
        uint8 ``[1, height, width, 3]``, RGB.

    Raises:
        VideoError: if the file is no plain local JPEG or PNG of 8 bits, exceeds the limits, is
            smaller than ``size``, or is damaged.
    """
    with _opened(path, root, limits or Limits()) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return fit(torch.from_numpy(np.array(upright)), size=size, crop=crop)[None]


@contextmanager
def _opened(
    path: str | os.PathLike[str], root: str | os.PathLike[str] | None, limits: Limits
) -> Iterator[Image.Image]:
    """The image, its size checked, not yet decoded; all errors leave as VideoError."""
    try:
        with (
            plain_file(path, root).open("rb") as file,
            Image.open(file, formats=("JPEG", "PNG")) as image,
        ):
            reason = limits.why_not(image.width * image.height, 1)
            if reason:
                raise VideoError(f"{image.width}x{image.height}: {reason}; scale it down first")
            if image.mode not in _MODES:
                raise VideoError(f"its pixels are {image.mode}, not of 8 bits; convert it")
            yield image
    except VideoError as error:
        raise VideoError(f"{os.fsdecode(path)!r}: {error}") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VideoError(f"{os.fsdecode(path)!r}: no image that can be read ({error})") from error
