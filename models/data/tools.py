"""By which files clips are scored, and which frames are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

FLOW = "flow"


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What scores are made by. TorchScript is a program: give only files from a source you trust.

    Args:
        motion: flow, by OpenCV and without weights; or LPIPS, as safetensors of its VGG or as
            TorchScript of two pictures; or TorchScript of one picture, which gives features.
        text: TorchScript of a picture in [0, 1], to boxes of text, x0, y0, x1, y1 in pixels;
            default: none, and nothing is cropped.
        aesthetic: TorchScript of pictures of 224 x 224 in [0, 1], to a number each; or a folder of
            CLIP with LAION's predictor in it, one .pth; default: none, and no score.
        technical: TorchScript of a video of bytes, to its quality, as DOVER's technical branch;
            default: none, and no score.
        apart: frames from one to that which it is compared with.
        side: of the frames compared: they are scaled down until their shorter side is this.
    """

    motion: Annotated[str, "flow|FILE"] = FLOW
    text: Annotated[str | None, "FILE"] = None
    aesthetic: Annotated[str | None, "FILE|FOLDER"] = None
    technical: Annotated[str | None, "FILE"] = None
    apart: Annotated[int, "FRAMES"] = 8
    side: Annotated[int, "PIXELS"] = 256

    def __post_init__(self) -> None:
        for name, least in (("apart", 1), ("side", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
