"""How large a file may be, and how long a pause in it, for it to be decoded at all."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated


@dataclass(frozen=True)
class Limits:
    """What a source may be like to be decoded at all. Frames are streamed; the sizes bound time.

    Args:
        max_pixels: width x height of one frame. Default: 4K cinema, with some air.
        max_frames: frames to decode for one clip: those asked for and those before them, from the
            key frame on where a file can be entered, or else from its beginning. Default: ten
            minutes at 30 frames per second.
        max_pixel_frames: pixels in these frames together. Default: ten minutes of 1080p at 30.
        max_hold: seconds from one frame to the next. More is taken for frames lost in a damaged
            file, of which some containers leave no other trace.
    """

    max_pixels: Annotated[int, "PIXELS"] = 4096 * 2304
    max_frames: Annotated[int, "FRAMES"] = 18_000
    max_pixel_frames: Annotated[int, "PIXELS"] = 1920 * 1088 * 18_000
    max_hold: Annotated[float, "SECONDS"] = 2.0

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_frames", "max_pixel_frames", "max_hold"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def why_not(self, pixels: int, frames: int) -> str | None:
        """The limit that ``frames`` frames of ``pixels`` pixels exceed, or None."""
        for name, value in (
            ("max_pixels", pixels),
            ("max_frames", frames),
            ("max_pixel_frames", pixels * frames),
        ):
            limit = getattr(self, name)
            if value > limit:
                return f"{value:,} exceeds {name}={limit:,}"
        return None

    def why_held(self, seconds: Fraction) -> str | None:
        """What is wrong with ``seconds`` from one frame to the next, or None."""
        if seconds <= self.max_hold:
            return None
        return (
            f"nothing for {float(seconds):.3f} s, longer than max_hold={self.max_hold}; frames may "
            "be lost. If not, pass larger limits (--limits.max_hold)"
        )
