"""What a denoiser is told of images: frames of a video that are known, by two paradigms.

Known frames are latents of the autoencoder, each coded so that it knows of no frame after it. Of a
causal autoencoder the first latents of a clip are those of its first frames alone, so a cache of
features has them; the last frame of a clip is coded by itself, as an image.

``flash``, FlashI2V: the noisy latents ``x`` are shifted by what a small network makes of the known
frame, ``x - s``, and what is left of that frame without its low frequencies is embedded and added
to the embedded patches. Data and noise are shifted alike, so the velocity ``noise - x0`` and the
loss stay what they were, and ``s`` is 0 at first: training begins as the model of text alone. Here
the shift is a part of the model, whose caller has latents that are not shifted: along a path

    ``x(sigma) - s = sigma * (noise - s) + (1 - sigma) * (x0 - s)``

steps from ``noise - s`` in shifted latents with ``s`` added at the end, and steps from ``noise`` in
those that are not, arrive at the same ``x0``, since ``s`` is the same at every step. So any sampler
of the velocity will do, and there is nothing left to add.

``mask``, the older paradigm of Open-Sora Plan v1.2 and v1.3: a mask and the known frames, 0 where
nothing is known, go in as further channels, whose weights are 0 at first.

Published are the first frame, the network, the frequencies and their share, and the six kinds of
masks. Ours are the first and the last frame for ``flash``, between which shift and frequencies
change evenly over time, and masks of latents instead of pixels.

Source: Ge et al., FlashI2V, arXiv 2509.25187, and its release; Open-Sora Plan v1.2 and v1.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Paradigm = Literal["flash", "mask"]
KINDS: dict[str, tuple[str, ...]] = {
    "flash": ("none", "first", "ends"),
    "mask": ("none", "first", "ends", "start", "some", "all"),
}
SHARES = (0.05, 0.95)  # of the low frequencies in training; drawn evenly between
SHARE = 0.1  # in sampling
_EDGE = (0, 1, 1)  # of zeros around frames, for kernels of 1 x 3 x 3


@dataclass(frozen=True, kw_only=True)
class Images:
    """Which frames of its clips a model knows in training.

    Args:
        paradigm: flash shifts latents by a frame (FlashI2V), mask has channels of its own for them.
        kinds: how often what is known: none, the first frame, both ends; with mask also start (some
            of the first), some (of all) and all. Shares that add up to 1.
    """

    paradigm: Paradigm = "flash"
    kinds: dict[str, float] = field(default_factory=lambda: {"first": 1.0})

    def __post_init__(self) -> None:
        check_paradigm(self.paradigm)
        known = KINDS[self.paradigm]
        unknown = sorted(self.kinds.keys() - set(known))
        if unknown:
            raise ValueError(
                f"images.kinds has {', '.join(unknown)}; with {self.paradigm} there are "
                f"{', '.join(known)}"
            )
        shares = [*self.kinds.values()]
        if any(not 0 <= share <= 1 for share in shares) or not math.isclose(sum(shares), 1):
            raise ValueError(
                f"images.kinds must be shares from 0 to 1 that add up to 1, got {self.kinds}"
            )

    @property
    def needs_last(self) -> bool:
        """Whether the last frame of a clip has to be coded by itself."""
        return self.kinds.get("ends", 0) > 0


class KnownFrames(NamedTuple):
    """What is known of videos: a latent of each frame or group of frames, and which they are."""

    latents: Tensor  # [B, C, t, h, w] fp32, normalised; 0 where nothing is known
    known: Tensor  # [B, t] bool
    share: Tensor  # [B] fp32, of magnitude in the low frequencies that flash leaves out

    def to(self, device: torch.device | str) -> KnownFrames:
        """The same on ``device``."""
        return KnownFrames(*(x.to(device) for x in self))

    def repeated(self, copies: int) -> KnownFrames:
        """So many times, one after the other, as latents for guidance are."""
        return KnownFrames(*(x.repeat(copies, *[1] * (x.ndim - 1)) for x in self))


def check_paradigm(paradigm: Any) -> None:
    """ValueError unless there is such a paradigm."""
    if paradigm not in get_args(Paradigm):
        raise ValueError(f"images must be one of {', '.join(get_args(Paradigm))}, got {paradigm!r}")


def of_other_images(own: str, asked: str | None) -> str:
    """What is to be said of a model that is told of images otherwise than a config says."""
    return f"the model is told of images by {own}, but images.paradigm is {asked}; set it to {own}"


# Training.


def frames_known(kind: str, frames: int, chance: np.random.Generator) -> Tensor:
    """Which of so many latents of a clip are known: bool ``[frames]``.

    Of one frame none is, whatever the kind: there is nothing left to make.
    """
    known = torch.zeros(frames, dtype=torch.bool)
    if frames == 1 or kind == "none":
        return known
    if kind == "all":
        return ~known
    known[0] = kind != "some"
    known[-1] = kind == "ends"
    if kind in ("start", "some"):
        number = int(chance.integers(1, frames))
        places = chance.permutation(frames) if kind == "some" else np.arange(frames)
        known[torch.from_numpy(places[:number])] = True
    return known


def drawn(
    images: Images, mean: Tensor, last: Tensor | None, chance: np.random.Generator
) -> KnownFrames:
    """What is known of one clip in training, without the dimension of a batch.

    Args:
        images: how often what is known.
        mean: ``[C, t, h, w]``, of the clip's latents.
        last: ``[C, 1, h, w]``, of its last frame alone.
        chance: of this sample.

    Raises:
        ValueError: if the last frame is wanted, and is not there.
    """
    kinds = sorted(images.kinds)
    kind = str(chance.choice(kinds, p=[images.kinds[each] for each in kinds]))
    known = frames_known(kind, mean.shape[1], chance)
    latents = mean * known[:, None, None]
    if kind == "ends" and known.any():
        if last is None:
            raise ValueError(
                "the features have no last frames; build the cache with images.kinds that has ends"
            )
        latents[:, -1:] = last
    return KnownFrames(latents, known, torch.tensor(chance.uniform(*SHARES), dtype=torch.float32))


def stacked(each: Sequence[KnownFrames]) -> KnownFrames:
    """Those of several clips of one shape as a batch."""
    return KnownFrames(*(torch.stack(parts) for parts in zip(*each, strict=True)))


# The model.


class Guide(nn.Module):
    """What goes into a denoiser's patches: noisy latents, and beside them what is known.

    Args:
        paradigm: flash or mask.
        channels: of the latents.

    Raises:
        ValueError: for another paradigm.
    """

    def __init__(self, paradigm: str, channels: int) -> None:
        super().__init__()
        check_paradigm(paradigm)
        self.shift: nn.Sequential | None = None
        if paradigm == "flash":
            inner, kernel = 4 * channels, (1, 3, 3)
            self.shift = nn.Sequential(
                Fp32Conv3d(channels, inner, kernel, padding=_EDGE),
                nn.SiLU(),
                Fp32Conv3d(inner, channels, kernel, padding=_EDGE),
            )
            _begin(self.shift[0], zero=False)
            _begin(self.shift[2], zero=True)

    def forward(self, noisy: Tensor, frames: KnownFrames) -> Tensor:
        """Computed in fp32, whatever the weights are in.

        Args:
            noisy: ``[B, C, t, h, w]``, not shifted.
            frames: of the same shape.

        Returns:
            ``[B, C + n, t, h, w]`` fp32: C channels of latents, shifted by flash, and n for
            :func:`embedding`: C of frequencies with flash, 1 + C of the mask and
            what it shows else.

        Raises:
            ValueError: if the shapes differ.
        """
        _check(noisy, frames)
        with _without_autocast(noisy.device.type):
            noisy = noisy.float()
            if self.shift is None:
                mask = frames.known[:, None, :, None, None].float()
                shown = frames.latents.float() * mask
                return torch.cat([noisy, mask.expand_as(noisy[:, :1]), shown], 1)
            ends = frames.latents[:, :, [0, -1]].float()  # [B, C, 2, h, w]
            over = weights_of_ends(frames.known)[:, None, :, :, None, None]  # [B, 1, 2, t, 1, 1]
            shift = (self.shift(ends)[:, :, :, None] * over).sum(2)
            edges = (high_pass(ends, frames.share)[:, :, :, None] * over).sum(2)
            return torch.cat([noisy - shift, edges], 1)


class Fp32Conv3d(nn.Conv3d):
    """A convolution in fp32, whatever its weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, n, h, w]`` to fp32 of the same shape but for C."""
        bias = None if self.bias is None else self.bias.float()
        return F.conv3d(x.float(), self.weight.float(), bias, padding=_EDGE)


def embedding(paradigm: str, channels: int, width: int, patch: Sequence[int]) -> nn.Module:
    """What embeds the channels that a :class:`Guide` adds, as patches are: 0 at first.

    It takes ``[B, n, t, h, w]`` and gives ``[B, width, t', h', w']``.
    """
    check_paradigm(paradigm)
    size = (patch[0], patch[1], patch[2])
    if paradigm == "mask":
        only = nn.Conv3d(1 + channels, width, size, stride=size, bias=False)
        _begin(only, zero=True)
        return only
    patches, last = nn.Conv3d(channels, width, size, stride=size), nn.Conv3d(width, width, 1)
    _begin(patches, zero=False)
    _begin(last, zero=True)
    return nn.Sequential(patches, last)


def _begin(layer: Any, *, zero: bool) -> None:
    """Weights 0, or Xavier's of the layer as a matrix; biases 0."""
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.xavier_uniform_(layer.weight.flatten(1))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def weights_of_ends(known: Tensor) -> Tensor:
    """How much the first and the last frame count at each time, of those of them that are known.

    One that is known alone counts 1 all the time; of two the first falls evenly from 1 to 0, and
    the last rises.

    Args:
        known: ``[B, t]`` bool.

    Returns:
        ``[B, 2, t]`` fp32.
    """
    first, last = known[:, :1].float(), known[:, -1:].float()
    late = torch.linspace(0, 1, known.shape[1], device=known.device)
    return torch.stack([first * (1 - last * late), last * (1 - first * (1 - late))], 1)


@torch.no_grad()
def high_pass(latents: Tensor, share: Tensor) -> Tensor:
    """The magnitude of what frames are without their low frequencies; fp32.

    Frequencies below a radius are left out: the least at which the magnitudes up to it, averaged
    over channels, reach a share of them all.

    Args:
        latents: ``[B, C, n, h, w]``.
        share: ``[B]``, from 0 to 1.

    Returns:
        ``[B, C, n, h, w]``.

    Source: FlashI2V.
    """
    h, w = latents.shape[-2:]
    down, across = (torch.arange(n, device=latents.device) for n in (h, w))
    down, across = down.minimum(h - down), across.minimum(w - across)  # from frequency 0
    squares = down[:, None] ** 2 + across**2  # of radii, [h, w]
    spectrum = torch.fft.fft2(latents.float())
    magnitude = spectrum.abs().mean(1).flatten(2)  # [B, n, h * w]
    sums = magnitude.new_zeros(*magnitude.shape[:2], (h // 2) ** 2 + (w // 2) ** 2 + 1)
    reached = sums.index_add_(2, squares.flatten(), magnitude).cumsum(2)
    wanted = share.float()[:, None, None] * reached[:, :, -1:]
    cut = (reached < wanted).sum(2)  # [B, n], the square of the least radius that stays
    kept = squares >= cut[:, None, :, None, None]
    return torch.fft.ifft2(spectrum * kept).abs()


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """In fp32; tensors without memory know no autocast."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _check(noisy: Tensor, frames: KnownFrames) -> None:
    B, _, t, *_ = noisy.shape
    for name, wanted in (("latents", noisy.shape), ("known", (B, t)), ("share", (B,))):
        found = getattr(frames, name).shape
        if found != tuple(wanted):
            raise ValueError(f"images.{name} must be {list(wanted)}, got {list(found)}")


# Sampling.


@dataclass(frozen=True)
class Pictures:
    """The images of a call, checked: uint8 ``[B, height, width, 3]`` each."""

    first: Tensor
    last: Tensor | None

    @classmethod
    def of(
        cls, image: Any, last_image: Any, *, height: int, width: int, frames: int, videos: int
    ) -> Pictures:
        """What was given as ``image`` and ``last_image`` for so many videos.

        Args:
            image, last_image: a PIL image, or uint8 ``[height, width, 3]``, RGB; or a list of one
                for each prompt. The second may be None.
            height, width, frames: of the videos.
            videos: how many; a multiple of the images.

        Raises:
            ValueError: for images of another size, number or type, and videos of one frame.
        """
        if image is None:
            raise ValueError("last_image goes with image; give both, or image alone")
        if frames == 1:
            raise ValueError("image is the first frame of several; give more than num_frames=1")
        found = [
            None if given is None else _pictures(name, given, (height, width), videos)
            for name, given in (("image", image), ("last_image", last_image))
        ]
        assert found[0] is not None
        return cls(found[0], found[1])

    def known(self, vae: Any, frames: int) -> KnownFrames:
        """Of videos of so many latents."""
        first = coded(vae, self.first)
        B, C, _, h, w = first.shape
        latents, known = first.new_zeros(B, C, frames, h, w), torch.zeros(B, frames).bool()
        latents[:, :, :1], known[:, 0] = first, True
        if self.last is not None:
            latents[:, :, -1:], known[:, -1] = coded(vae, self.last), True
        return KnownFrames(latents, known, torch.full((B,), SHARE)).to(first.device)


def _pictures(name: str, given: Any, size: tuple[int, int], videos: int) -> Tensor:
    each = [*given] if isinstance(given, list | tuple) else [given]
    if not each or videos % len(each):
        raise ValueError(f"{name}: {len(each)} images for {videos} videos; give one, or one each")
    found = []
    for one in each:
        is_array = isinstance(one, Tensor | np.ndarray)
        pixels = torch.as_tensor(one if is_array else np.array(_rgb(name, one)))
        if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"{name} must be uint8 [height, width, 3], got {pixels.dtype} of "
                f"{list(pixels.shape)}"
            )
        if pixels.shape[:2] != size:
            raise ValueError(
                f"{name} is {pixels.shape[0]}x{pixels.shape[1]}, but the video {size[0]}x{size[1]};"
                " cut and scale it, as skiparse.models.data.image.read_image does, or ask for a "
                "video of its size"
            )
        found.append(pixels)
    return torch.stack(found).repeat_interleave(videos // len(each), 0)


def _rgb(name: str, image: Any) -> Any:
    if not hasattr(image, "convert"):
        raise ValueError(
            f"{name} must be a PIL image or uint8 [height, width, 3], got a {type(image).__name__}"
        )
    return image.convert("RGB")


@torch.no_grad()
def coded(vae: Any, pixels: Tensor) -> Tensor:
    """Images as latents: means of their posteriors, normalised, fp32 ``[B, C, 1, h, w]``.

    Args:
        vae: whose config or ``normalize`` tells how; each image is coded by itself.
        pixels: uint8 ``[B, height, width, 3]``.

    Raises:
        FloatingPointError: if they are not finite.
    """
    from diffusers.utils.torch_utils import get_module_execution_device  # of offloaded models

    device = get_module_execution_device(vae)
    found = []
    for image in pixels:
        video = (image.to(device).movedim(-1, 0)[None, :, None] / 127.5 - 1).to(vae.dtype)
        mean = vae.encode(video).latent_dist.mean.float()  # [1, C, 1, h, w]
        found.append(normalized(vae, mean))
    latents = torch.cat(found)
    if not latents.isfinite().all():
        raise FloatingPointError(f"the VAE in {vae.dtype} gave latents that are not finite")
    return latents


def normalized(vae: Any, latents: Tensor) -> Tensor:
    """Latents as a denoiser has them, by a VAE's own function or by the numbers in its config."""
    if hasattr(vae, "normalize"):
        made: Tensor = vae.normalize(latents)
        return made
    if vae.config.get("latents_mean") is None:
        return latents
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"]).to(latents)[:, None, None, None]
        for name in ("mean", "std")
    )
    return (latents - mean) / std
