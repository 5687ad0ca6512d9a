"""What the denoiser is trained on: latents and text embeddings of clips, and batches of them.

The encoders work on one clip at a time, so a feature does not depend on its neighbours and one read
from a cache is, bit for bit, the one computed now. Nothing random is in it: the posterior's noise,
the choice among captions and the dropping of captions come when a batch is put together, from the
place of each sample in the run.

Source: Open-Sora Plan v1.5 report, "text encoders" and training; Ho and Salimans, 2022, for the
captions that are dropped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skiparse.models.data.draws import Place, Use, numbers, torch_numbers
from skiparse.models.text import TextEncoders, clean
from skiparse.models.wfvae.model import WFVAE

if TYPE_CHECKING:  # features are read from a cache where there is no decoder of videos
    from skiparse.models.data.dataset import Clip

Mode = Literal["sample", "mean"]


@dataclass(frozen=True, eq=False)
class Text:
    """The embeddings of one caption, fp32."""

    states: Tensor  # [l, D], T5's, one for each token and none for padding
    pooled: Tensor  # [P], CLIP's


@dataclass(frozen=True, eq=False)
class Features:
    """One clip as the encoders see it, on the CPU, with all its captions."""

    mean: Tensor  # [C, t, h, w] fp32, of the latents' posterior, normalised
    std: Tensor  # the same
    texts: tuple[Text, ...]  # one for each caption, in their order
    null: Text  # of no caption
    key: str
    place: Place


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one shape, ready for the denoiser."""

    latents: Tensor  # [B, C, t, h, w] fp32, normalised
    text: Tensor  # [B, L, D] fp32; zero where text_mask is False
    text_mask: Tensor  # [B, L] bool, True = attend
    pooled: Tensor  # [B, P] fp32
    places: list[Place]
    keys: list[str]

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        return replace(
            self,
            latents=self.latents.to(device),
            text=self.text.to(device),
            text_mask=self.text_mask.to(device),
            pooled=self.pooled.to(device),
        )


class Encoders:
    """The autoencoder and the text encoders, frozen, applied to one clip at a time.

    Args:
        vae: moved to ``device``, in its own dtype; only its encoder is used.
        text: likewise.
        device: where both compute.
    """

    def __init__(self, vae: WFVAE, text: TextEncoders, device: torch.device | str = "cpu") -> None:
        if text.encoder is None or text.encoder_2 is None:
            raise ValueError("text has let go of its encoders; load it again")
        self.vae, self.text, self.device = vae, text, torch.device(device)
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
    ) -> Encoders:
        """Load from two folders.

        Args:
            vae: of a :class:`WFVAE`.
            text: holds what :meth:`TextEncoders.from_pretrained` wants.
            device, dtype: where and in what to compute.

        Raises:
            FileNotFoundError: if the autoencoder or a part of the text encoders is not there.
            OSError, ValueError: if weights are not there, or not those of the model.
        """
        WFVAE.load_config(vae)  # so that both are known to be there before either is loaded
        encoders = TextEncoders.from_pretrained(text, dtype=dtype)
        return cls(WFVAE.from_pretrained(vae, torch_dtype=dtype), encoders, device)

    def features(self, clip: Clip) -> Features:
        """The features of one clip, on the CPU; those of the same clip are always the same.

        A caption of which cleaning leaves nothing counts as none.

        Raises:
            ValueError: if the autoencoder cannot take the clip's size, or gives numbers that are
                not finite.
        """
        texts = tuple(self.embed(caption) for caption in clip.captions)
        return Features(*self.posterior(clip), texts, self.null, clip.key, clip.place)

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
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ValueError(
                f"{clip.key}: the autoencoder in {self.vae.dtype} gives numbers that are not "
                "finite; load it in float32, or look at its weights"
            )
        return mean[0].cpu(), std[0].cpu()

    def embed(self, caption: str) -> Text:
        """The embeddings of a caption, cleaned; they are not remembered."""
        text = self.text  # it remembers, and there is no end to the captions of a training
        fresh = TextEncoders(text.tokenizer, text.encoder, text.tokenizer_2, text.encoder_2)
        found = fresh.encode(clean(caption), clean_caption=False)
        return Text(found.text[found.text_mask].float(), found.pooled[0].float())

    def fingerprints(self) -> dict[str, str]:
        """As :func:`fingerprints` of the autoencoder and the text encoders."""
        return fingerprints(self.vae, self.text)


def fingerprints(vae: WFVAE, text: TextEncoders) -> dict[str, str]:
    """SHA-256 of what features depend on: config, weights and tokenizer of each encoder.

    Its keys are ``vae``, ``t5`` and ``clip``.
    """
    return {
        "vae": _fingerprint(vae, vae.config),
        "t5": _fingerprint(text.encoder, _settings(text.encoder, text.tokenizer)),
        "clip": _fingerprint(text.encoder_2, _settings(text.encoder_2, text.tokenizer_2)),
    }


def collate(
    features: Sequence[Features], *, seed: int, drop: float, mode: Mode = "sample"
) -> Batch:
    """One batch of samples of one shape; what is random follows from the seed and their places.

    Args:
        features: latents of one shape ``[C, t, h, w]``.
        seed: of the run.
        drop: how often a sample's caption is dropped, in [0, 1], for guidance without a classifier:
            one coin for T5 and CLIP together.
        mode: "sample" draws latents from their posterior, "mean" takes its mean.

    Returns:
        A batch whose text is as long as its longest caption.

    Raises:
        ValueError: if there are no features or several shapes, or for a drop or mode out of range.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be in [0, 1], got {drop}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    shapes = {tuple(each.mean.shape) for each in features}
    if len(shapes) != 1:
        raise ValueError(
            f"features must have latents of one shape, got {sorted(shapes) or 'none at all'}; put "
            "samples of one bucket together"
        )
    texts = [_text(each, seed, drop) for each in features]
    lengths = torch.tensor([len(text.states) for text in texts])
    return Batch(
        latents=torch.stack([_latents(each, seed, mode) for each in features]),
        text=pad_sequence([text.states for text in texts], batch_first=True),
        text_mask=torch.arange(int(lengths.max())) < lengths[:, None],
        pooled=torch.stack([text.pooled for text in texts]),
        places=[each.place for each in features],
        keys=[each.key for each in features],
    )


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the order and the device."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _text(features: Features, seed: int, drop: float) -> Text:
    """The caption that a sample is trained with: one of its own, or none."""
    step, index, _ = features.place
    if numbers(seed, step, index, Use.DROP).random() < drop:
        return features.null
    choice = numbers(seed, step, index, Use.CAPTION).integers(len(features.texts))
    return features.texts[choice]


def _latents(features: Features, seed: int, mode: Mode) -> Tensor:
    if mode == "mean":
        return features.mean
    step, index, _ = features.place
    generator = torch_numbers(seed, step, index, Use.POSTERIOR)
    return features.mean + features.std * torch.randn(features.mean.shape, generator=generator)


def _settings(encoder: Any, tokenizer: Any) -> dict[str, Any]:
    """The config of a text encoder and its tokenizer, without what their last use left."""
    config, backend = (
        encoder.config.to_diff_dict(),
        json.loads(tokenizer.backend_tokenizer.to_str()),
    )
    for name in ("transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    for name in ("truncation", "padding"):
        backend.pop(name, None)
    return {**config, "tokenizer": backend}


def _fingerprint(model: Any, config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's weights and config; where it was loaded from does not count."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    found = hashlib.sha256(json.dumps(public, sort_keys=True).encode())
    found.update(digest(model.state_dict()).encode())
    return found.hexdigest()
