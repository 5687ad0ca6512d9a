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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from skiparse.models.data.draws import Place, Use, numbers, torch_numbers
from skiparse.models.images import Images, KnownFrames, drawn, stacked

if TYPE_CHECKING:  # features are read from a cache where there is no decoder of videos
    from skiparse.models.data.dataset import Clip

Mode = Literal["sample", "mean"]


# Among fingerprints, of encoders that code the last frame of each clip besides; and what it says.
LAST, ALONE = "last", "coded alone"

Text = Mapping[str, Tensor]  # the embeddings of one caption by name, fp32: [l, D], or [P]


@dataclass(frozen=True, eq=False)
class Features:
    """One clip as the encoders see it, on the CPU, with all its captions."""

    mean: Tensor  # [C, t, h, w] fp32, of the latents' posterior, normalised
    std: Tensor  # the same
    texts: tuple[Text, ...]  # one for each caption, in their order
    null: Text  # of no caption
    key: str
    place: Place
    last: Tensor | None = None  # [C, 1, h, w] fp32, mean of the last frame alone, where asked for


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one shape, ready for the denoiser."""

    latents: Tensor  # [B, C, t, h, w] fp32, normalised
    captions: dict[str, Tensor]  # by the names of Text: [B, L, D] fp32, zero where NAME_mask, [B,
    # L] bool, is False; or [B, P] fp32
    places: list[Place]
    keys: list[str]
    images: KnownFrames | None = None  # where a model is told of them

    def to(self, device: torch.device | str) -> Batch:
        """The same on ``device``."""
        return replace(
            self,
            latents=self.latents.to(device),
            captions={name: x.to(device) for name, x in self.captions.items()},
            images=None if self.images is None else self.images.to(device),
        )


class Coder(Protocol):
    """What a model's recipe makes features with, one clip at a time."""

    @property
    def null(self) -> Text:
        """The embeddings of no caption."""

    def features(self, clip: Clip) -> Features:
        """The features of one clip, on the CPU; those of the same clip are always the same."""

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of what features depend on, by name: config, weights and tokenizers."""


def collate(
    features: Sequence[Features],
    *,
    seed: int,
    drop: float,
    mode: Mode = "sample",
    images: Images | None = None,
) -> Batch:
    """One batch of samples of one shape; what is random follows from the seed and their places.

    Args:
        features: latents of one shape ``[C, t, h, w]``.
        seed: of the run.
        drop: how often a sample's caption is dropped, in [0, 1], for guidance without a classifier:
            one coin for all that encode it.
        mode: "sample" draws latents from their posterior, "mean" takes its mean.
        images: which frames are known, and how often; None tells of none.

    Returns:
        A batch whose captions are as long as its longest.

    Raises:
        ValueError: if there are no features or several shapes, for a drop or mode out of range, or
            if features lack the last frames that ``images`` wants.
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
    captions = {}
    for name, first in texts[0].items():
        rows = [text[name] for text in texts]
        if first.ndim == 1:
            captions[name] = torch.stack(rows)
        else:
            lengths = torch.tensor([len(row) for row in rows])
            captions[name] = pad_sequence(rows, batch_first=True)
            captions[f"{name}_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return Batch(
        latents=torch.stack([_latents(each, seed, mode) for each in features]),
        captions=captions,
        places=[each.place for each in features],
        keys=[each.key for each in features],
        images=None if images is None else stacked([_known(x, seed, images) for x in features]),
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


def _known(features: Features, seed: int, images: Images) -> KnownFrames:
    """What of a sample the model is told beside its caption."""
    step, index, _ = features.place
    chance = numbers(seed, step, index, Use.IMAGES)
    return drawn(images, features.mean, features.last, chance)


def _latents(features: Features, seed: int, mode: Mode) -> Tensor:
    if mode == "mean":
        return features.mean
    step, index, _ = features.place
    generator = torch_numbers(seed, step, index, Use.POSTERIOR)
    return features.mean + features.std * torch.randn(features.mean.shape, generator=generator)


def fingerprint(model: Any, config: Mapping[str, Any]) -> str:
    """SHA-256 of a model's weights and config; where it was loaded from does not count."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    found = hashlib.sha256(json.dumps(public, sort_keys=True).encode())
    found.update(digest(model.state_dict()).encode())
    return found.hexdigest()


def refuse_infinite(key: str, dtype: torch.dtype, *values: Tensor) -> None:
    """ValueError unless all that an autoencoder in ``dtype`` made of the clip ``key`` is finite."""
    if not all(bool(x.isfinite().all()) for x in values):
        raise ValueError(
            f"{key}: the autoencoder in {dtype} gives numbers that are not finite; load it in "
            "float32, or look at its weights"
        )


def of_text(encoder: Any, tokenizer: Any) -> dict[str, Any]:
    """The config of a text encoder of transformers and its tokenizer, for :func:`fingerprint`.

    Without what tells of versions, and what the last use of the tokenizer left in it.
    """
    config = encoder.config.to_diff_dict()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("transformers_version", "architectures", "dtype"):
        config.pop(name, None)
    for name in ("truncation", "padding"):
        backend.pop(name, None)
    return {**config, "tokenizer": backend}
