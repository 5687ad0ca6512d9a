"""What codes clips and captions for an SUV: WF-VAE, T5 and CLIP, frozen.

Source: Open-Sora Plan v1.5 report, "text encoders".
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
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
from skiparse.models.text import TextEncoders, clean
from skiparse.models.wfvae.model import WFVAE

if TYPE_CHECKING:  # features are read from a cache where there is no decoder of videos
    from skiparse.models.data.dataset import Clip


class Encoders:
    """The autoencoder and the text encoders, frozen, applied to one clip at a time.

    Args:
        vae: moved to ``device``, in its own dtype; only its encoder is used.
        text: likewise.
        device: where both compute.
        last: whether features have the last frame of each clip too, coded by itself.
    """

    def __init__(
        self,
        vae: WFVAE,
        text: TextEncoders,
        device: torch.device | str = "cpu",
        *,
        last: bool = False,
    ) -> None:
        if text.encoder is None or text.encoder_2 is None:
            raise ValueError("text has let go of its encoders; load it again")
        self.vae, self.text, self.device, self.last = vae, text, torch.device(device), last
        for model in (vae, text.encoder, text.encoder_2):
            model.to(self.device).eval().requires_grad_(False)
        self.null = self.embed("")

    @classmethod
    def from_pretrained(
        cls,
        vae: str | os.PathLike[str],
        text: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
        last: bool = False,
    ) -> Encoders:
        """Load from two folders.

        Args:
            vae: of a :class:`WFVAE`.
            text: holds what :meth:`TextEncoders.from_pretrained` wants.
            device, dtype: where and in what to compute.
            last: as above.

        Raises:
            FileNotFoundError: if the autoencoder or a part of the text encoders is not there.
            OSError, ValueError: if weights are not there, or not those of the model.
        """
        WFVAE.load_config(vae)  # so that both are known to be there before either is loaded
        encoders = TextEncoders.from_pretrained(text, dtype=dtype)
        return cls(WFVAE.from_pretrained(vae, torch_dtype=dtype), encoders, device, last=last)

    def features(self, clip: Clip) -> Features:
        """The features of one clip, on the CPU; those of the same clip are always the same.

        A caption of which cleaning leaves nothing counts as none.

        Raises:
            ValueError: if the autoencoder cannot take the clip's size, or gives numbers that are
                not finite.
        """
        texts = tuple(self.embed(caption) for caption in clip.captions)
        last = self.posterior(replace(clip, frames=clip.frames[-1:]))[0] if self.last else None
        return Features(*self.posterior(clip), texts, self.null, clip.key, clip.place, last)

    def posterior(self, clip: Clip) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a clip's normalised latents, fp32 ``[C, t, h, w]``.

        Raises:
            ValueError: as :meth:`features`.
        """
        pixels = clip.frames.to(self.device).movedim(-1, 0)[None]  # [1, 3, T, H, W]
        video = (pixels / 127.5 - 1).to(self.vae.dtype)
        found = self.vae.encode(video, chunk_frames=self.vae.temporal_factor).latent_dist
        mean, std = self.vae.normalize(found.mean.float()), found.std.float()
        if self.vae.config.scale is not None:
            std = std * std.new_tensor(self.vae.config.scale)[:, None, None, None]
        refuse_infinite(clip.key, self.vae.dtype, mean, std)
        return mean[0].cpu(), std[0].cpu()

    def embed(self, caption: str) -> Text:
        """The embeddings of a caption, cleaned; they are not remembered."""
        text = self.text  # it remembers, and there is no end to the captions of a training
        fresh = TextEncoders(text.tokenizer, text.encoder, text.tokenizer_2, text.encoder_2)
        found = fresh.encode(clean(caption), clean_caption=False)
        return {
            "states": found.text[found.text_mask].float(),  # [l, D], of T5, none for padding
            "pooled": found.pooled[0].float(),  # [P], of CLIP
        }

    def fingerprints(self) -> dict[str, str]:
        """As :func:`fingerprints` of the autoencoder and the text encoders; and ``last``."""
        return fingerprints(self.vae, self.text) | ({LAST: ALONE} if self.last else {})


def fingerprints(vae: WFVAE, text: TextEncoders) -> dict[str, str]:
    """SHA-256 of what features depend on: config, weights and tokenizer of each encoder.

    Its keys are ``vae``, ``t5`` and ``clip``.
    """
    return {
        "vae": fingerprint(vae, vae.config),
        "t5": fingerprint(text.encoder, of_text(text.encoder, text.tokenizer)),
        "clip": fingerprint(text.encoder_2, of_text(text.encoder_2, text.tokenizer_2)),
    }
