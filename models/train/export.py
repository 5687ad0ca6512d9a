"""How a training run becomes a pipeline: its weights, beside the encoders it was trained with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from skiparse.models import shards
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.suv.encoders import fingerprints
from skiparse.models.suv.model import SUV
from skiparse.models.text import TextEncoders
from skiparse.models.train.checkpoint import FOLDER, Checkpoint, Checkpoints
from skiparse.models.wfvae.model import WFVAE

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
    """Write the newest checkpoint of a run as what it is used as.

    That of a denoiser becomes a pipeline, which ``skiparse sample`` loads; that of an autoencoder
    a folder of :class:`WFVAE`, without ``vae`` and ``text``.

    Args:
        run: the ``out`` of a training run.
        out: folder to make, whole or not at all, by
            :meth:`~skiparse.models.pipeline.SUVPipeline.save_pretrained`, weights in fp32.
        vae: folder of the WFVAE that a denoiser was trained with.
        text: folder that holds its text encoders, as a pipeline keeps them.
        weights: the averaged ones, or those of the last step.
        other_encoders: whether ``vae`` and ``text`` may be others than the run's, such as a VAE
            whose decoder was trained further. The model sees then what it was not trained on.

    Returns:
        ``out``.

    Raises:
        ValueError: if ``out`` exists, for unknown ``weights``, if the checkpoint is of something
            else than a SUV, or if the encoders are not those of the run or do not fit its model;
            before anything is written.
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
    if "wfvae" in last.about:
        if vae is not None or text is not None:
            raise ValueError(f"{run} is of a WFVAE, which needs no vae and text; leave them out")
        name = "vae" if weights == "model" else weights
        autoencoder = _model(last, WFVAE, last.about["wfvae"], name)
        with shards.new_folder(out) as folder:
            autoencoder.save_pretrained(folder, max_shard_size="100GB")
        return Path(out)
    if "model" not in last.about:
        raise ValueError(f"{last.path} is of no SUV: its about.json has no model")
    if vae is None or text is None:
        raise ValueError(f"{run} is of a denoiser; give vae and text, which it was trained with")
    channels = WFVAE.load_config(vae)["latent_channels"]
    if channels != last.about["model"]["in_channels"]:
        raise ValueError(
            f"vae={vae} has latents of {channels} channels, but the model of {run} takes "
            f"{last.about['model']['in_channels']}; give the vae that it was trained with"
        )
    encoders = TextEncoders.from_pretrained(text)
    decoder = WFVAE.from_pretrained(vae)
    if not other_encoders:
        _check_encoders(last, fingerprints(decoder, encoders), vae, text)
    pipeline = SUVPipeline(
        _model(last, SUV, last.about["model"], weights),
        decoder,
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


def _check_encoders(
    checkpoint: Checkpoint,
    found: dict[str, str],
    vae: str | os.PathLike[str],
    text: str | os.PathLike[str],
) -> None:
    """ValueError unless the encoders are those whose features the checkpoint was trained on."""
    trained = checkpoint.about.get("data", {})
    missing = sorted(found.keys() - trained.keys())
    if missing:
        raise ValueError(
            f"{checkpoint.path} does not tell which {', '.join(missing)} it was trained with; if "
            "you know, say so by other_encoders=True (--other-encoders)"
        )
    given = {"vae": vae, "t5": text, "clip": text}
    others = [f"{name} of {given[name]}" for name in found if found[name] != trained[name]]
    if others:
        raise ValueError(
            f"{', '.join(others)}: not what {checkpoint.path} was trained with; give that, or take "
            "another knowingly by other_encoders=True (--other-encoders)"
        )


def _model(checkpoint: Checkpoint, kind: type[Any], config: dict[str, Any], weights: str) -> Any:
    """The model of that kind and config in a checkpoint of a run."""
    with torch.device("meta"):
        model = kind(**config)
    try:
        model.load_state_dict(checkpoint.read(f"{weights}."), strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path} does not hold its {kind.__name__}: {error}") from error
    return model.eval()
