"""What codes clips and captions for a Wan: its VAE and UMT5, frozen, by its own pipeline.

Captions become what the pipeline makes of prompts. Wan attends to 512 rows of text, those behind
the caption zero, and has no mask for them: a caption without its padding is not the same to it.
So it is kept without, and padded again when a model is called (:data:`LENGTH`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor

from skiparse.models.data.features import (
    ALONE,
    LAST,
    Features,
    Text,
    fingerprint,
    of_text,
    refuse_infinite,
)

if TYPE_CHECKING:  # features are read from a cache where there is no decoder of videos
    from skiparse.models.data.dataset import Clip

LENGTH = 512  # rows of text
PIPELINES = ("WanPipeline", "ImageWanPipeline")  # whose folders are read here


class Encoders:
    """The autoencoder and the text encoder of a WanPipeline, applied to one clip at a time.

    Args:
        pipeline: with or without its transformer; its VAE and text encoder are moved to ``device``,
            in their own dtypes, and frozen.
        device: where both compute.
        last: whether features have the last frame of each clip too, coded by itself.
    """

    def __init__(
        self, pipeline: Any, device: torch.device | str = "cpu", *, last: bool = False
    ) -> None:
        self.pipeline, self.device, self.last = pipeline, torch.device(device), last
        for model in (pipeline.vae, pipeline.text_encoder):
            model.to(self.device).eval().requires_grad_(False)
        self.null = self.embed("")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        last: bool = False,
    ) -> Encoders:
        """Load from the folder of a WanPipeline; its transformers are not read.

        Raises:
            FileNotFoundError: if ``folder`` holds no pipeline.
            ValueError: if it is of another kind.
        """
        return cls(loaded(folder, transformer=None, transformer_2=None), device, last=last)

    @torch.no_grad()
    def features(self, clip: Clip) -> Features:
        """The features of one clip, on the CPU; those of the same clip are always the same.

        Raises:
            ValueError: if the autoencoder gives numbers that are not finite.
        """
        texts = tuple(self.embed(caption) for caption in clip.captions)
        last = self.posterior(replace(clip, frames=clip.frames[-1:]))[0] if self.last else None
        return Features(*self.posterior(clip), texts, self.null, clip.key, clip.place, last)

    @torch.no_grad()
    def posterior(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a clip's normalised latents, fp32 ``[C, t, h, w]``.

        Raises:
            ValueError: as :meth:`features`.
        """
        vae = self.pipeline.vae
        pixels = clip.frames.to(self.device).movedim(-1, 0)[None]  # [1, 3, T, H, W]
        found = vae.encode((pixels / 127.5 - 1).to(vae.dtype)).latent_dist
        shift, spread = (
            torch.tensor(x, device=self.device)[:, None, None, None]
            for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        mean, std = (found.mean[0].float() - shift) / spread, found.std[0].float() / spread
        refuse_infinite(clip.key, vae.dtype, mean, std)
        return mean.cpu(), std.cpu()

    @torch.no_grad()
    def embed(self, caption: str) -> Text:
        """The embeddings of a caption as the pipeline has those of a prompt, without padding."""
        rows, _ = self.pipeline.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            max_sequence_length=LENGTH,
            device=self.device,
        )
        return {"states": trimmed(rows[0].float().cpu())}  # [l, D]

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what features depend on, by ``vae`` and ``umt5``; and ``last``."""
        vae, encoder = self.pipeline.vae, self.pipeline.text_encoder
        return {
            "vae": fingerprint(vae, vae.config),
            "umt5": fingerprint(encoder, of_text(encoder, self.pipeline.tokenizer)),
            **({LAST: ALONE} if self.last else {}),
        }


def trimmed(rows: Tensor) -> Tensor:
    """Rows of text ``[L, D]`` without the zeros behind them, one row at least."""
    last = int(rows.any(1).nonzero().max()) if rows.any() else 0
    return rows[: last + 1].clone()


def padded(rows: Tensor) -> Tensor:
    """What was :func:`trimmed`, ``[..., L, D]``, with :data:`LENGTH` rows again."""
    return F.pad(rows, (0, 0, 0, LENGTH - rows.shape[-2]))


def loaded(folder: str | os.PathLike[str], **without: None) -> WanPipeline:
    """The WanPipeline in ``folder``, in float32, but for the components that are None.

    Raises:
        FileNotFoundError: if there is none; nothing is asked of the network.
        ValueError: if ``folder`` holds another pipeline.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no pipeline: model_index.json is not there; give the folder of a "
            "WanPipeline, such as its save_pretrained makes"
        )
    kind = WanPipeline.load_config(folder, local_files_only=True).get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{folder} holds a {kind}; give the folder of a WanPipeline")
    return WanPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, **without
    )
