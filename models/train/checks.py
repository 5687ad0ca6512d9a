"""What a run is asked before it begins, so that what cannot work is said before any work."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from skiparse.models.data.cache import Cache
from skiparse.models.data.features import Coder
from skiparse.models.data.image import read_image
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.config import Config
from skiparse.models.train.parallel import World
from skiparse.models.train.recipe import recipe_of


def check(config: Config, world: World, coder: Coder | None) -> None:
    """Find what cannot work before any work.

    Raises:
        ValueError: naming the setting.
        FileNotFoundError: if ``config.init`` does not hold weights.
    """
    if config.images is not None and not recipe_of(config.recipe).takes_images:
        raise ValueError(
            f"images: the recipe {config.recipe} tells its models of none; leave it out"
        )
    _check_pictures(config)
    dealt = config.tensor_parallel
    if dealt > 1 and not recipe_of(config.recipe).deals:
        raise ValueError(
            f"tensor_parallel={dealt}: the recipe {config.recipe} does not deal out the layers of "
            "its model; leave it out"
        )
    for name, stage in config.stages.items():
        shared = config.context_of(stage)
        if world.size % (shared * dealt):
            times = f" times tensor_parallel={dealt}" if dealt > 1 else ""
            raise ValueError(
                f"stages.{name}: context_parallel={shared}{times} must divide the number of "
                f"processes, {world.size}"
            )
        if shared > 1 and not recipe_of(config.recipe).shares:
            raise ValueError(
                f"stages.{name}: context_parallel={shared}: the recipe {config.recipe} does not "
                "let processes share tokens; leave it out"
            )
        parts = world.size // (shared * dealt) * stage.accumulate
        if stage.global_batch % parts:
            among = f" in groups of context_parallel={shared}" if shared > 1 else ""
            among += f" and tensor_parallel={dealt}" if dealt > 1 else ""
            raise ValueError(
                f"stages.{name}.global_batch={stage.global_batch} must be a multiple of {parts}: "
                f"{world.size} processes{among} times accumulate={stage.accumulate}"
            )
        cache = config.cache_of(stage)
        if cache is not None and Cache(cache).rule != stage.rule:
            raise ValueError(
                f"stages.{name}: {cache} was built by another rule, {Cache(cache).rule.table()}; "
                f"build one for stages.{name}.rule, or take over that rule"
            )
        needs_last = config.images is not None and config.images.needs_last
        if cache is not None and needs_last and not Cache(cache).has_last:
            raise ValueError(
                f"stages.{name}: {cache} has no last frames, which images.kinds with ends wants; "
                "build it anew with this config, or leave ends out"
            )
    recipe_of(config.recipe).check(config, coder)


def _check_pictures(config: Config) -> None:
    """ValueError unless the images of samples can be read, and are large enough."""
    frames, *size = config.samples.shape
    if config.samples.images and frames == 1:
        raise ValueError("samples.images are first frames of videos; samples.shape has 1 frame")
    for file in config.samples.images:
        read_image(file, size=(size[0], size[1]), limits=config.limits)


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
    if (recipe := last.about.get("recipe", "suv")) != config.recipe:
        raise ValueError(
            f"{last.path} is of a run with recipe {recipe}, not {config.recipe}; choose another out"
        )
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
    found = _deciding(config)
    del found["stages"]
    for number, (name, stage) in enumerate(config.stages.items()):
        table = _deciding(stage) | {"rule": stage.rule.table()}
        if name == until:
            del table["steps"]  # may grow
        found |= {f"stages.{name}.{key}": value for key, value in table.items()}
        found[f"stages.{name}"] = number
        if name == until:
            break
    return _as_json(found)


def _deciding(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that tell of what, and not of how."""
    table = asdict(config)
    return {each.name: table[each.name] for each in fields(config) if "how" not in each.metadata}


def _as_json(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists, and keys text."""
    if isinstance(value, dict):
        return {str(key): _as_json(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(x) for x in value]
    return value
