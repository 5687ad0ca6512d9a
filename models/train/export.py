"""How a training run becomes a pipeline: its weights, beside the encoders it was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

import torch

from skiparse.models import shards
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.suv.model import SUV
from skiparse.models.text import TextEncoders
from skiparse.models.train.checkpoint import FOLDER, Checkpoint, Checkpoints
from skiparse.models.wfvae.model import WFVAE

Weights = Literal["ema", "model"]


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str],
    text: str | os.PathLike[str],
    weights: Weights = "ema",
) -> Path:
    """Write the newest checkpoint of a run as a pipeline, which ``skiparse sample`` loads.

    Args:
        run: the ``out`` of a training run.
        out: folder to make, whole or not at all, by
            :meth:`~skiparse.models.pipeline.SUVPipeline.save_pretrained`, weights in fp32.
        vae: folder of a WFVAE.
        text: folder that holds the text encoders, as a pipeline keeps them.
        weights: the averaged ones, or those of the last step.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``out`` exists, for unknown ``weights``, or if the checkpoint is of something
            else than a SUV; before any work.
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
    if not (Path(vae) / "config.json").is_file():
        raise FileNotFoundError(f"{Path(vae) / 'config.json'} is not there; give a WFVAE")
    encoders = TextEncoders.from_pretrained(text)
    pipeline = SUVPipeline(
        _model(last, weights),
        WFVAE.from_pretrained(vae),
        encoders.tokenizer,
        encoders.encoder,
        encoders.tokenizer_2,
        encoders.encoder_2,
    )
    with shards.new_folder(out) as folder:
        pipeline.save_pretrained(folder)
        for file in folder.rglob("*"):
            shards.sync(file)
    return Path(out)


def _model(checkpoint: Checkpoint, weights: str) -> SUV:
    """The SUV in a checkpoint of a run."""
    if "model" not in checkpoint.about:
        raise ValueError(f"{checkpoint.path} is of no SUV: its about.json has no model")
    with torch.device("meta"):
        model = SUV(**checkpoint.about["model"])
    try:
        model.load_state_dict(checkpoint.read(f"{weights}."), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path} does not hold its SUV: {error}") from error
    return model.eval()
