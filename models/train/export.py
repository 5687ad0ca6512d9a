"""How a training run becomes what it is used as: a pipeline beside its encoders, or a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from skiparse.models import shards
from skiparse.models.train.checkpoint import FOLDER, Checkpoint, Checkpoints
from skiparse.models.train.config import Lora
from skiparse.models.train.recipe import recipe_of

Weights = Literal["ema", "model"]
Form = Literal["merged", "apart"]


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    vae: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    weights: Weights = "ema",
    other_encoders: bool = False,
    dtype: torch.dtype | None = None,
    lora: Form | None = None,
    init: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the newest checkpoint of a run as what it is used as, which its recipe knows.

    That of a denoiser becomes a pipeline, which ``skiparse sample`` loads; that of an autoencoder
    a folder of :class:`~skiparse.models.wfvae.model.WFVAE`, without ``vae`` and ``text``.

    Args:
        run: the ``out`` of a training run.
        out: folder to make, whole or not at all, by ``save_pretrained``.
        vae: folder of the WFVAE that a denoiser was trained with; for a Wan, that of the
            WanPipeline it was trained from.
        text: folder that holds its text encoders, as a pipeline keeps them; none for a Wan.
        weights: the averaged ones, or those of the last step.
        other_encoders: whether ``vae`` and ``text`` may be others than the run's, such as a VAE
            whose decoder was trained further. The model sees then what it was not trained on.
        dtype: of all weights; fp32 if None, as they were trained.
        lora: of a run with one: ``merged`` with the weights that it was trained beside, into a
            whole pipeline, which is what None means too; or ``apart``, the file that
            ``load_lora_weights`` of a pipeline reads, with ``skiparse.json`` if the model is
            sparse. Then none of ``vae``, ``text``, ``init`` is needed, or taken.
        init: where the weights that it was trained beside are by now, if not where they were.

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
    if lora is not None and lora not in get_args(Form):
        raise ValueError(f"lora must be one of {', '.join(get_args(Form))}, got {lora!r}")
    shards.refuse_existing(out)
    checkpoints = Path(run) / FOLDER
    last = Checkpoints(checkpoints).latest()
    if last is None:
        raise FileNotFoundError(f"no complete checkpoint in {checkpoints}; give the out of a run")
    recipe = recipe_of(last.about.get("recipe", "suv"))  # there was no other once
    given = {"vae": vae, "text": text, "init": init, "other_encoders": other_encoders}
    if Lora.of(last.about.get("settings", {})) is None:
        for name, value in (("lora", lora), ("init", init)):
            if value is not None:
                raise ValueError(f"{name}={value}: {last.path} is of no LoRA; leave it out")
    elif lora == "apart" and (any(given.values()) or dtype is not None):
        names = ", ".join(name for name, value in (given | {"dtype": dtype}).items() if value)
        raise ValueError(f"{names}: nothing is needed beside a LoRA apart; leave it out")
    made = None if lora == "apart" else recipe.exported(last, weights, **given)
    if made is not None and dtype is not None:
        made.to(dtype)
    with shards.new_folder(out) as folder:
        if made is None:
            from skiparse.models.train.lora import save_apart  # peft is needed with a LoRA alone

            save_apart(last, weights, folder)
        else:
            made.save_pretrained(folder)
        for file in folder.rglob("*"):
            shards.sync(file)
    return Path(out)


def model_of(
    checkpoint: Checkpoint,
    kind: type[Any],
    config: dict[str, Any],
    prefix: str,
    init: str | os.PathLike[str] | None = None,
) -> Any:
    """The model of that class and config in a checkpoint of a run, under ``prefix``.

    Of a run with a LoRA it is merged with the weights in ``init``.

    Raises:
        ValueError: if it holds another, or ``init`` does.
        CheckpointError: if it is damaged.
    """
    if Lora.of(checkpoint.about.get("settings", {})) is not None:
        from skiparse.models.train.lora import merged  # peft is needed with a LoRA alone

        return merged(checkpoint, prefix, init)
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
