"""What the experiments learn from: a few scenes of the real clip as latents, a tiny model.

There is no autoencoder and no text encoder here:

1. From the clip a few scenes of a few frames are cut, and grouped in time as the demo does: the
   first frame alone, then eights. Of the temporal mean of each step, every 16 x 16 pixel patch
   becomes one latent pixel: the low coefficients of the demo's orthonormal DCT, for R, G and B.
   Each channel is standardised over all scenes. The way back gives a blurred picture.
2. Text and its pooled embedding are stand-ins: seeded normal numbers, others for each scene.

The problems are so small that more threads than one would wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from skiparse.bench.clip import FPS
from skiparse.bench.patches import GROUP, PATCH, dct_basis, patches
from skiparse.models.data.video import read_video
from skiparse.models.suv.model import SUV
from skiparse.models.suv.plan import Plan


@dataclass(frozen=True)
class Size:
    """The scenes, the part of their DCT that is kept, and the model."""

    scenes: int
    stride: int  # frames from the start of one scene to that of the next
    frames: int  # of a scene
    height: int
    width: int
    order: int  # DCT coefficients u + v < order are kept
    heads: int  # of 32 channels
    text: int
    sparsity: tuple[int, ...] = (1, 2, 4, 2, 1)


QUICK = Size(2, 9, 9, 64, 128, order=2, heads=2, text=4)  # to see that an experiment works


@dataclass(frozen=True)
class Scenes:
    """Normalised latents ``[B, C, t, h, w]``, their text, and the way back to pictures."""

    latents: Tensor
    text: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P]
    mean: Tensor  # of each channel, [C, 1, 1, 1]
    spread: Tensor
    basis: Tensor  # [256, coefficients]

    @property
    def tokens(self) -> int:
        """Video tokens of a scene: the model's patches are 2 x 2 latent pixels."""
        _, _, t, h, w = self.latents.shape
        return t * h * w // 4

    def part(self, kept: slice | list[int]) -> Self:
        """Some of the scenes."""
        parts = {name: getattr(self, name)[kept] for name in ("latents", "text", "pooled")}
        return replace(self, **parts)

    def asked(self, model: nn.Module, noisy: Tensor, times: Tensor) -> Tensor:
        """What a model says to noisy latents of all scenes."""
        found: Tensor = model(noisy, times, self.text, self.pooled)
        return found

    def pictures(self, latents: Tensor) -> Tensor:
        """``[B, C, t, h, w]`` as RGB in [0, 1], ``[B, t, 16 h, 16 w, 3]``."""
        coefficients = latents * self.spread + self.mean
        pixels = torch.einsum(
            "bcnthw,pn->btchwp", coefficients.unflatten(1, (3, -1)), self.basis
        ).unflatten(-1, (PATCH, PATCH))  # b t c h w y x
        rows = pixels.permute(0, 1, 3, 5, 4, 6, 2)  # b t h y w x c
        return rows.flatten(4, 5).flatten(2, 3).clamp(0, 1)


def scenes_of(clip: Path, size: Size) -> Scenes:
    """Decode the clip and make its latents."""
    frames = read_video(
        clip,
        frames=(size.scenes - 1) * size.stride + size.frames,
        fps=FPS,
        size=(size.height, size.width),
        threads=1,
    )
    basis, _ = dct_basis(size.order)
    grid = size.height // PATCH, size.width // PATCH
    scenes = []
    for first in range(0, len(frames) - size.frames + 1, size.stride):
        scene = frames[first : first + size.frames].float() / 255
        groups = (scene[:1], *scene[1:].split(GROUP))
        coefficients = torch.stack([patches(group.mean(0)) @ basis for group in groups])
        scenes.append(coefficients.flatten(2).unflatten(1, grid).permute(3, 0, 1, 2))  # c t h w
    raw = torch.stack(scenes)
    dims = (0, 2, 3, 4)
    mean = raw.mean(dims, keepdim=True)[0]
    spread = raw.std(dims, keepdim=True)[0]
    generator = torch.Generator().manual_seed(0)
    tiny = SUV.presets["tiny"]
    text = torch.randn(size.scenes, size.text, tiny["text_channels"], generator=generator)
    pooled = torch.randn(size.scenes, tiny["pooled_channels"], generator=generator)
    return Scenes((raw - mean) / spread, text, pooled, mean, spread, basis)


def dense_of(scenes: Scenes, size: Size, *, seed: int = 0, **settings: Any) -> SUV:
    """A dense model of the scenes with seeded random weights; ``settings`` are SUV's own."""
    channels = scenes.latents.shape[1]
    config = SUV.presets["tiny"] | {
        "num_heads": size.heads,
        "in_channels": channels,
        "out_channels": channels,
        "sparsity": (1,) * len(size.sparsity),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SUV(**config | settings)


def attention_pairs(model: SUV, scenes: Scenes) -> int:
    """Query-key pairs of all attention layers."""
    tokens, text = scenes.tokens, scenes.text.shape[1]
    plan = Plan.of(tokens, model.config.sparsity)
    return sum(
        plan.pattern(stage, layer).pairs(tokens, text)
        for stage, count in enumerate(model.config.num_layers)
        for layer in range(count)
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread meanwhile, so that small problems give the same numbers again."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
