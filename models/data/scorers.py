"""What clips are scored by: pictures go in and numbers come out, with what those depend on.

No network is shipped. LPIPS, a network of features, a finder of text, an aesthetic predictor and a
judge of technical quality are files that one has: TorchScript, or weights where the network is
known here. Without one its score is missing; motion alone can do without, by optical flow.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from skiparse.models import archive, shards
from skiparse.models.data.tools import FLOW, Tools
from skiparse.models.networks import existing, load_lpips, script, takes

SEEN = 224  # pixels along each side, of what an aesthetic predictor is given
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's own pictures
_CLIP_SPREAD = (0.26862954, 0.26130258, 0.27577711)


class Compared(NamedTuple):
    """Each of T frames with the one behind it."""

    motion: Tensor  # [T - 1], float64
    jump: Tensor  # [T - 1]: how little one follows from the other


class Pairs(Protocol):
    """Compares frames with those behind them, uint8 ``[T, H, W, 3]``.

    Attributes:
        measure: "lpips", "features" or "flow". A range of motion is of one of them.
        least: a jump below it is no cut, however much it stands out.
    """

    measure: str
    least: float

    def about(self) -> Mapping[str, Any]:
        """What its numbers depend on, as JSON has it."""

    def __call__(self, frames: Tensor) -> Compared:
        """The numbers of each pair; they do not depend on the other pairs."""


@dataclass(frozen=True)
class Scorers:
    """What :class:`Tools` name, ready to use.

    Attributes:
        pairs: compares frames.
        text: of a picture ``[3, H, W]`` in [0, 1], boxes ``[n, 4]`` as shares of its sides.
        aesthetic: of pictures ``[T, 3, H, W]`` in [0, 1], a number each.
        technical: of frames, uint8 ``[T, H, W, 3]``, a number.
        about: what all numbers depend on: files by their SHA-256, settings, versions.
    """

    pairs: Pairs
    text: Callable[[Tensor], Tensor] | None
    aesthetic: Callable[[Tensor], Tensor] | None
    technical: Callable[[Tensor], float] | None
    about: Mapping[str, Any]

    @classmethod
    def of(cls, tools: Tools, device: str = "cpu") -> Scorers:
        """Load all that is named.

        Raises:
            FileNotFoundError: for a file that is not there.
            ValueError: for one that holds something else.
        """
        pairs = load_pairs(tools.motion, device=device)
        made: dict[str, Any] = {}
        about: dict[str, Any] = {"apart": tools.apart, "side": tools.side, "motion": pairs.about()}
        loaders = {"text": load_text, "aesthetic": load_aesthetic, "technical": load_technical}
        for name, load in loaders.items():
            path = getattr(tools, name)
            made[name] = None if path is None else load(path, device=device)
            about[name] = None if path is None else _digests(path)
        return cls(pairs, about={**about, "torch": torch.__version__}, **made)


def load_pairs(motion: str, *, device: str = "cpu") -> Pairs:
    """What compares frames: ``flow``, or a file as :class:`Tools` has it; errors as there."""
    if motion == FLOW:
        from skiparse.models.data.optical import Flow

        return Flow()
    file = existing(motion)
    if file.suffix == ".safetensors" or len(takes(script(file, device))) > 1:
        return Perceptual(file, device)
    return Deep(file, device)


class Perceptual:
    """LPIPS of each pair, for motion and for jumps; the measure of v1.3."""

    measure, least = "lpips", 0.4

    def __init__(self, file: Path, device: str = "cpu") -> None:
        self._lpips, self._device, self._file = load_lpips(file, device=device), device, file

    def about(self) -> dict[str, Any]:
        """What its numbers depend on."""
        return {"measure": self.measure, **_digests(self._file)}

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Compared:
        """As :class:`Pairs`."""
        seen = _signed(frames, self._device)
        found = [self._lpips(a[None], b[None]).reshape(-1) for a, b in itertools.pairwise(seen)]
        both = torch.cat([*found, seen.new_zeros(0)]).double().cpu()
        return Compared(both, both)


class Deep:
    """How far apart the features of two frames point, by a network that is given.

    ``mean over layers and places of |a - b|^2``, with ``a`` and ``b`` the features of a place,
    each of length 1: LPIPS without its learned weights. So its range is another one.
    """

    measure, least = "features", 0.1

    def __init__(self, file: Path, device: str = "cpu") -> None:
        self._network, self._device, self._file = script(file, device), device, file

    def about(self) -> dict[str, Any]:
        """What its numbers depend on."""
        return {"measure": self.measure, **_digests(self._file)}

    @torch.no_grad()
    def __call__(self, frames: Tensor) -> Compared:
        """As :class:`Pairs`."""
        seen = (self._features(frame[None]) for frame in _signed(frames, self._device))
        found = [
            torch.stack([(a - b).square().sum(1).mean() for a, b in zip(*pair, strict=True)]).mean()
            for pair in itertools.pairwise(seen)
        ]
        both = torch.tensor([float(each) for each in found], dtype=torch.float64)
        return Compared(both, both)

    def _features(self, picture: Tensor) -> list[Tensor]:
        """Of each layer, ``[1, C, h, w]``, of length 1 in every place."""
        layers = self._network(picture)
        layers = [layers] if isinstance(layers, Tensor) else list(layers)
        if not layers or any(not isinstance(x, Tensor) or x.ndim != 4 for x in layers):
            raise ValueError(
                f"{self._file} gives no features [1, C, h, w], of one layer or several"
            )
        return [functional.normalize(x.float(), dim=1) for x in layers]


def load_text(path: str | os.PathLike[str], *, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """What finds text, of TorchScript ``[1, 3, H, W]`` in [0, 1] to ``[n, 4]`` in pixels."""
    file = existing(path)
    network = script(file, device)

    @torch.no_grad()
    def boxes(picture: Tensor) -> Tensor:
        found = network(picture[None].to(device))
        if not isinstance(found, Tensor) or found.ndim != 2 or found.shape[1] != 4:
            raise ValueError(f"{file} gives no boxes [n, 4] of text in a picture")
        height, width = picture.shape[1:]
        sides = torch.tensor([width, height, width, height], dtype=torch.float64)
        return (found.double().cpu() / sides).clamp(0, 1)

    return boxes


def load_aesthetic(
    path: str | os.PathLike[str], *, device: str = "cpu"
) -> Callable[[Tensor], Tensor]:
    """An aesthetic predictor, of TorchScript, or of a folder of CLIP and LAION's predictor.

    Pictures are scaled to 224 along their shorter side, and the middle is cut out.
    """
    if Path(path).is_dir():
        network: Callable[[Tensor], Any] = Aesthetic(Path(path)).to(device)
    else:
        network = script(existing(path), device)

    @torch.no_grad()
    def score(pictures: Tensor) -> Tensor:
        found = network(_middle(pictures).to(device))
        if not isinstance(found, Tensor) or found.numel() != len(pictures):
            raise ValueError(f"{path} gives no number for each of {len(pictures)} pictures")
        return found.reshape(-1).double().cpu()

    return score


class Aesthetic(nn.Module):
    """LAION's improved aesthetic predictor: linear layers on CLIP's embedding, of length 1.

    Args:
        folder: CLIP as transformers save it (published: ViT-L/14), and beside it the predictor's
            weights, one ``.pth`` (``sac+logos+ava1-l14-linearMSE.pth``).

    Raises:
        ValueError: if there is not one ``.pth``, or it is of other layers.

    Source: <https://github.com/christophschuhmann/improved-aesthetic-predictor>.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import CLIPVisionModelWithProjection

        super().__init__()
        files = sorted(folder.glob("*.pth"))
        if len(files) != 1:
            raise ValueError(f"{folder} holds {len(files)} files .pth; put LAION's predictor there")
        self.clip = CLIPVisionModelWithProjection.from_pretrained(folder, local_files_only=True)
        weights = archive.read(files[0])
        names = [n for n in (0, 2, 4, 6, 7) if f"layers.{n}.weight" in weights]  # dropout between
        if len(weights) != 2 * len(names) or not names:
            raise ValueError(f"{files[0]} is no aesthetic predictor; its layers have other names")
        layers = []
        for n in names:
            weight, bias = weights[f"layers.{n}.weight"], weights[f"layers.{n}.bias"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers.append(layer)
        width = self.clip.config.projection_dim
        if layers[0].in_features != width or layers[-1].out_features != 1:
            raise ValueError(
                f"{files[0]} takes embeddings of {layers[0].in_features} numbers, and CLIP in "
                f"{folder} gives {width}; take the CLIP that it was trained on"
            )
        self.layers = nn.Sequential(*layers)
        self.eval().requires_grad_(False)

    def forward(self, pictures: Tensor) -> Tensor:
        """Of ``[T, 3, 224, 224]`` in [0, 1]: ``[T]``, from about 1 to 10."""
        shift, spread = (pictures.new_tensor(x)[:, None, None] for x in (_CLIP_MEAN, _CLIP_SPREAD))
        found = self.clip(pixel_values=(pictures - shift) / spread).image_embeds
        return self.layers(functional.normalize(found, dim=1))[:, 0]


def load_technical(
    path: str | os.PathLike[str], *, device: str = "cpu"
) -> Callable[[Tensor], float]:
    """A judge of technical quality, of TorchScript: uint8 ``[1, 3, T, H, W]`` to one number."""
    file = existing(path)
    network = script(file, device)

    @torch.no_grad()
    def score(frames: Tensor) -> float:
        found = network(frames.permute(3, 0, 1, 2)[None].to(device))
        if not isinstance(found, Tensor) or found.numel() != 1:
            raise ValueError(f"{file} gives no number for a video")
        return float(found)

    return score


def _digests(path: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of a file, or of those in a folder, by name."""
    place = Path(path)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    return {file.name: shards.sha256(file) for file in files if file.is_file()}


def _signed(frames: Tensor, device: str) -> Tensor:
    """uint8 ``[T, H, W, 3]`` as ``[T, 3, H, W]`` in [-1, 1]."""
    return frames.permute(0, 3, 1, 2).to(device).float() / 127.5 - 1


def _middle(pictures: Tensor) -> Tensor:
    """``[T, 3, H, W]`` scaled to 224 along the shorter side, and the middle of it."""
    height, width = pictures.shape[2:]
    scale = SEEN / min(height, width)
    size = [max(round(side * scale), SEEN) for side in (height, width)]
    scaled = functional.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - SEEN) // 2 for side in size)
    return scaled[:, :, top : top + SEEN, left : left + SEEN]
