"""How a training run becomes what it is used as: a pipeline beside its encoders, or a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from skiparse.models import shards
from skiparse.models.train.checkpoint import FOLDER, Checkpoint, Checkpoints
from skiparse.models.train.recipe import recipe_of

Weights = Literal["ema", "model"]


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    weights: Weights = "ema",
    other_encoders: bool = False,
) -> Path:
    """Write the newest checkpoint of a run as what it is used as, which its recipe knows.

    That of a denoiser becomes a pipeline, which ``skiparse sample`` loads; that of an autoencoder
    a folder of :class:`~skiparse.models.wfvae.model.WFVAE`, without ``vae`` and ``text``.

    Args:
        run: the ``out`` of a training run.
        out: folder to make, whole or not at all, by ``save_pretrained``, weights in fp32.
        vae: folder of the WFVAE that a denoiser was trained with; for a Wan, that of the
            WanPipeline it was trained from.
        text: folder that holds its text encoders, as a pipeline keeps them; none for a Wan.
        weights: the averaged ones, or those of the last step.
        other_encoders: whether ``vae`` and ``text`` may be others than the run's, such as a VAE
            whose decoder was trained further. The model sees then what it was not trained on.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``out`` exists, for unknown ``weights``, if the checkpoint is of something
            else than its recipe says, or if the encoders are not those of the run or do not fit
            its model; before anything is written.
        FileNotFoundError: if there is no checkpoint, VAE or text encoder.
        CheckpointError: if the checkpoint is damaged.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, got {weights!r}")
    shards.refuse_existing(out)
    checkpoints = Path(run) / FOLDER
    last = Checkpoints(checkpoints).latest()
    if last is None:
        raise FileNotFoundError(f"no complete checkpoint in {checkpoints}; give the out of a run")
    recipe = recipe_of(last.about.get("recipe", "suv"))  # there was no other once
    made = recipe.exported(last, weights, vae=vae, text=text, other_encoders=other_encoders)
    with shards.new_folder(out) as folder:
        made.save_pretrained(folder)
        for file in folder.rglob("*"):
            shards.sync(file)
    return Path(out)


def model_of(checkpoint: Checkpoint, kind: type[Any], config: dict[str, Any], prefix: str) -> Any:
    """The model of that class and config in a checkpoint of a run, under ``prefix``.

    Raises:
        ValueError: if it holds another.
        CheckpointError: if it is damaged.
    """
    with torch.device("meta"):
        model = kind(**config)
    try:
        model.load_state_dict(checkpoint.read(f"{prefix}."), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path} does not hold its {kind.__name__}: {error}") from error
    return model.eval()


def check_encoders(
    last: Checkpoint, found: Mapping[str, str], given: Mapping[str, str | os.PathLike[str]]
) -> None:
    """Whether encoders are those whose features a checkpoint was trained on.

    Args:
        last: the checkpoint.
        found: fingerprints of the encoders, by name.
        given: where each is from.

    Raises:
        ValueError: if they are others, or the checkpoint does not tell.
    """
    trained = last.about.get("data", {})
    missing = sorted(found.keys() - trained.keys())
    if missing:
        raise ValueError(
            f"{last.path} does not tell which {', '.join(missing)} it was trained with; if you "
            "know, say so by other_encoders=True (--other-encoders)"
        )
    others = [f"{name} of {given[name]}" for name in found if found[name] != trained[name]]
    if others:
        raise ValueError(
            f"{', '.join(others)}: not what {last.path} was trained with; give that, or take "
            "another knowingly by other_encoders=True (--other-encoders)"
        )
