"""What a run is asked before it begins, so that what cannot work is said before any work."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from skiparse.models.data.cache import Cache
from skiparse.models.data.features import Encoders
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.config import Config
from skiparse.models.train.parallel import World
from skiparse.models.train.state import skeleton


def check(config: Config, world: World, encoders: Encoders | None) -> None:
    """Find what cannot work before any work.

    Raises:
        ValueError: naming the setting.
        FileNotFoundError: if ``config.init`` is no folder of weights.
    """
    first, *_ = config.stages.values()
    try:
        with torch.device("meta"):
            model = skeleton(config, first)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    for name, stage in config.stages.items():
        parts = world.size * stage.accumulate
        if stage.global_batch % parts:
            raise ValueError(
                f"stages.{name}.global_batch={stage.global_batch} must be a multiple of {parts}: "
                f"{world.size} processes times accumulate={stage.accumulate}"
            )
        if stage.sparsity is not None:
            try:
                model.set_sparsity(stage.sparsity)
            except ValueError as error:
                raise ValueError(f"stages.{name}.sparsity: {error}") from error
        cache = config.cache_of(stage)
        if cache is not None and Cache(cache).rule != stage.rule:
            raise ValueError(
                f"stages.{name}: {cache} was built by another rule, {Cache(cache).rule.table()}; "
                f"build one for stages.{name}.rule, or take over that rule"
            )
    if encoders is None:
        return
    for key, width, what in (
        ("in_channels", encoders.vae.config.latent_channels, "autoencoder"),
        ("text_channels", encoders.null.states.shape[1], "text encoder"),
        ("pooled_channels", encoders.null.pooled.shape[0], "text encoder"),
    ):
        if model.config[key] != width:
            raise ValueError(
                f"the model has {key}={model.config[key]}, but the {what} has {width}; set "
                f"model.{key}={width}, or give another {what}"
            )
    if config.samples.every:
        frames, height, width = config.samples.shape
        SUVPipeline(model, encoders.vae).latent_shape(height, width, frames)


def check_resumed(config: Config, last: Checkpoint, *, gave_up: bool) -> dict[str, Any]:
    """Refuse to continue a run as one with another outcome.

    Args:
        config: of the run that continues.
        last: its checkpoint.
        gave_up: whether the clipper made an end of it: then the learning rates of the stage may be
            others.

    Returns:
        What they were before and what they are now, by path.

    Raises:
        ValueError: naming the settings that differ.
    """
    name = last.about["stage"]
    before = last.about["settings"]
    now = settings_of(config, name) if name in config.stages else {}
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    rates = {f"stages.{name}.{key}" for key in ("learning_rate", "then", "warmup")}
    if set(changed) - (rates if gave_up else set()):
        raise ValueError(
            f"{last.path} was trained with other settings: {', '.join(changed)}; put them back, or "
            "choose another out"
        )
    return {key: [before.get(key), now.get(key)] for key in changed}


def check_data(
    source: dict[str, str], last: Checkpoint, *, gave_up: bool
) -> dict[str, list[str | None]]:
    """Refuse to continue a stage with other data than it began with.

    Once the clipper ``gave_up``, the samples may be others; returns both fingerprints then.
    """
    before = last.about["data"]
    changed = sorted(key for key in source if source[key] != before.get(key))
    if changed == ["data"] and gave_up:
        return {"data": [before.get("data"), source["data"]]}
    if changed:
        raise ValueError(
            f"{last.path} was trained on other data in this stage ({', '.join(changed)} differ); "
            "put it back, or begin a stage with the new data"
        )
    return {}


def settings_of(config: Config, until: str) -> dict[str, Any]:
    """All that has decided the outcome up to the stage ``until``, by path; ready for JSON."""
    kept = ("preset", "model", "init", "posterior", "drop", "optimizer", "clip", "ema", "dtype")
    every = asdict(config)
    found = {name: every[name] for name in (*kept, "seed")}
    for number, (name, stage) in enumerate(every["stages"].items()):
        for key in ("source", "cache", "accumulate", "checkpointing"):  # tell of how, not of what
            del stage[key]
        stage["rule"] = config.stages[name].rule.table()
        if name == until:
            del stage["steps"]  # may grow
        found |= {f"stages.{name}.{key}": value for key, value in stage.items()}
        found[f"stages.{name}"] = number
        if name == until:
            break
    return _as_json(found)


def _as_json(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists, and keys text."""
    if isinstance(value, dict):
        return {str(key): _as_json(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(x) for x in value]
    return value
