"""All that a training run can be told: one dataclass, read from YAML, and a chain of stages in it.

``skiparse train CONFIG.yaml --a.b value`` reads these fields; so does Python. What every run can be
told is here, and so is what every denoiser can; the rest is with the recipe of a model, which adds
its own fields to :class:`Config` and :class:`Stage` (:mod:`skiparse.models.train.recipe`). Three
chains come with the library, by name: ``v1.5``, the stages of the report with its numbers,
``mini``, which walks the same way on a CPU in minutes, and ``wfvae``, those of the autoencoder.

Source: Open-Sora Plan v1.5 report, training stages and hyper-parameters.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from skiparse.models.data.buckets import Rule
from skiparse.models.data.limits import Limits
from skiparse.models.images import Images
from skiparse.models.plain_yaml import read_yaml
from skiparse.models.text import cleaned
from skiparse.models.train.clip import AdaptiveGradClipper, Mode
from skiparse.models.train.parallel import TIMEOUT
from skiparse.models.train.recipe import recipe_of

CHAINS = {file.stem: file for file in Path(__file__).parent.glob("*.yaml")}
DTYPES = ("float32", "bfloat16")
# Of a field that tells how a run is done and not what comes of it: it may change on the way.
HOW: Mapping[str, bool] = MappingProxyType({"how": True})


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every training run can be told.

    Args:
        recipe: what is trained, by a name of :data:`skiparse.models.train.recipe.RECIPES`.
        out: folder for checkpoints, log and samples; a run that has begun there continues.
        stages: by name (letters, digits, - and _), in the order in which they are trained.
        init: folder with weights to start from.
        limits: the largest files to decode, and the longest pause in one.
        dtype: to compute in: float32, or bfloat16 by autocast. Weights that are trained are
            float32, others of this type.
        device: cpu or cuda; None takes a GPU if there is one.
        workers: processes that read data ahead; 0 reads in between.
        save_every: steps from one checkpoint to the next; there is one after every stage too.
        keep: checkpoints that stay.
        asynchronous: write checkpoints while training goes on.
        timeout: seconds that a process waits for another before the run ends; longer than the
            first one needs to look through new data, and to make samples.
    """

    recipe: str = field(metadata=HOW)
    out: str = field(metadata=HOW)
    stages: Mapping[str, Any]
    init: str | None = None
    limits: Limits = field(default_factory=Limits, metadata=HOW)
    dtype: str = "float32"
    device: str | None = field(default=None, metadata=HOW)
    workers: int = field(default=0, metadata=HOW)
    save_every: int = field(default=1000, metadata=HOW)
    keep: int = field(default=2, metadata=HOW)
    asynchronous: bool = field(default=False, metadata=HOW)
    timeout: float = field(default=TIMEOUT, metadata=HOW)

    def __post_init__(self) -> None:
        _refuse_nulls(self)
        if not self.stages:
            raise ValueError("stages is empty; give at least one")
        for name in self.stages:
            if not (isinstance(name, str) and re.fullmatch(r"\w[\w-]{0,63}", name)):
                raise ValueError(
                    f"stages: {name!r} cannot be the name of one, which names files too; take "
                    "letters, digits, - and _, in quotes if they are all digits"
                )
        for holder in (self, *self.stages.values()):
            for name in ("out", "init", "vae", "text", "source", "cache"):
                if getattr(holder, name, None) == "":
                    raise ValueError(f"{name} is empty; give a path, or leave it out")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        for name, least in (("save_every", 1), ("keep", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"timeout must be seconds above 0, got {self.timeout}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a denoiser's run with one kind of data and one schedule.

    Args:
        steps: of the optimiser.
        learning_rate: after the warm-up.
        then: other learning rates, by the step of the stage from which they hold.
        warmup: steps over which the learning rate rises from 0.
        global_batch: samples in a step, over all processes and micro-batches.
        accumulate: micro-batches that each process takes one after the other in a step.
        rule: which clips are taken, and what shapes they get.
        source: instead of the run's.
        cache: instead of the run's.
        context_parallel: instead of the run's.
    """

    steps: int
    learning_rate: float
    then: dict[int, float] = field(default_factory=dict)
    warmup: int = 0
    global_batch: int
    accumulate: int = field(default=1, metadata=HOW)
    rule: Rule
    source: str | None = field(default=None, metadata=HOW)
    cache: str | None = field(default=None, metadata=HOW)
    context_parallel: int | None = field(default=None, metadata=HOW)

    def __post_init__(self) -> None:
        _refuse_nulls(self)
        _check_context(self.context_parallel)
        for name in ("steps", "global_batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0, got {self.warmup}")
        for rate in (self.learning_rate, *self.then.values()):
            if not 0 < rate < math.inf:
                raise ValueError(f"learning_rate must be above 0, got {rate}")
        if any(step < 0 for step in self.then):
            raise ValueError(f"then must begin at steps of the stage, from 0, got {self.then}")

    def rate(self, step: int) -> float:
        """The learning rate of a step of the stage, from 0."""
        begun = [at for at in self.then if at <= step]
        rate = self.then[max(begun)] if begun else self.learning_rate
        return rate * min((step + 1) / (self.warmup + 1), 1.0)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW's settings, those of the release.

    Args:
        betas: decay of the averages of the gradient and of its square.
        eps: tiny, because gradients are, late in a run.
        weight_decay: per step, times the learning rate.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        _refuse_nulls(self)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be in [0, 1), got {self.betas}")
        for name in ("eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is trained beside the weights of ``init``, which stay as they are.

    Args:
        rank: of what is added to a layer.
        alpha: what is added counts alpha / rank times; null for rank.
        target_modules: ends of the names of the linear layers that get one; null for those of the
            recipe, which are the projections of attention.
    """

    rank: int
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _refuse_nulls(self)
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha must be above 0, got {self.alpha}")
        if self.target_modules is not None and not all(self.target_modules or ("",)):
            raise ValueError("lora.target_modules must name layers, or be left out")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Lora | None:
        """The one among the settings that a checkpoint tells of, if there is one."""
        told = settings.get("lora")
        if told is None:
            return None
        names = told["target_modules"]
        return cls(**told | {"target_modules": None if names is None else tuple(names)})


@dataclass(frozen=True, kw_only=True)
class Clip:
    """How gradients are clipped; see :class:`~skiparse.models.train.AdaptiveGradClipper`.

    Args:
        mode: safe, report, osp15 or osp_next.
        decay: of the averages of the norm.
        sigmas: how many standard deviations above its mean a norm may be.
    """

    mode: Mode = "safe"
    decay: float = 0.99
    sigmas: float = 3.0

    def __post_init__(self) -> None:
        _refuse_nulls(self)
        self.make()

    def make(self) -> AdaptiveGradClipper:
        """A clipper without history."""
        return AdaptiveGradClipper(decay=self.decay, sigmas=self.sigmas, mode=self.mode)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Videos that a run makes of itself on the way, with the averaged weights.

    Args:
        every: steps from one to the next; 0 for none.
        prompts: one video each.
        shape: frames, height and width in pixels.
        steps: of the sampler.
        guidance: 1 is none.
        images: files with the first frame of each video; none for videos of text alone.
    """

    every: int = 0
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    shape: tuple[int, int, int] = (17, 128, 128)
    steps: int = 50
    guidance: float = 7.0

    def __post_init__(self) -> None:
        _refuse_nulls(self)
        if self.every < 0 or self.steps < 1:
            raise ValueError(
                "samples.every must be at least 0 and samples.steps at least 1, got "
                f"{self.every} and {self.steps}"
            )
        if self.every and not self.prompts:
            raise ValueError("samples.every is set but samples.prompts is empty; give a prompt")
        if len(self.images) not in (0, len(self.prompts)):
            raise ValueError(
                f"samples.images has {len(self.images)} files for {len(self.prompts)} prompts; "
                "give one each"
            )
        if not 1 <= self.guidance < math.inf:
            raise ValueError(f"samples.guidance must be at least 1, got {self.guidance}")
        for prompt in self.prompts:
            cleaned(prompt)


@dataclass(frozen=True, kw_only=True)
class Config(Run):
    """A training run of a denoiser.

    Args:
        source: what to train on: a ``data.txt``, or a folder of clips with captions beside them.
        cache: folder of ``skiparse cache build`` to train from, instead of ``source``.
        posterior: latents to learn: a sample of the autoencoder's posterior, or its mean.
        drop: share of captions that are dropped, for guidance without a classifier.
        lora: what is trained instead of the weights themselves; null for none.
        images: which frames the model knows beside text; null for text alone.
        optimizer: AdamW's settings.
        clip: how gradients are clipped.
        ema: decay of the averaged weights, per step.
        seed: of everything random.
        parallel: with several processes, copies of the model (ddp), or shards of it (fsdp).
        context_parallel: processes that share the tokens of a micro-batch, a divisor of all.
        tensor_parallel: with fsdp, processes that each have a part of every layer's weights.
        compile: whether to compile the blocks.
        samples: videos made on the way.
    """

    stages: Mapping[str, Stage]
    source: str | None = field(default=None, metadata=HOW)
    cache: str | None = field(default=None, metadata=HOW)
    posterior: Literal["sample", "mean"] = "sample"
    drop: float = 0.1
    lora: Lora | None = None
    images: Images | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)
    clip: Clip = field(default_factory=Clip)
    ema: float = 0.9999
    seed: int = 0
    parallel: Literal["ddp", "fsdp"] = field(default="ddp", metadata=HOW)
    context_parallel: int = field(default=1, metadata=HOW)
    tensor_parallel: int = field(default=1, metadata=HOW)
    compile: bool = field(default=False, metadata=HOW)
    samples: Samples = field(default_factory=Samples, metadata=HOW)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must be in [0, 1], got {self.drop}")
        if self.samples.images and self.images is None:
            raise ValueError("samples.images is for a model that takes them; set images too")
        _check_context(self.context_parallel)
        if self.tensor_parallel < 1:
            raise ValueError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.tensor_parallel > 1:
            for name, fits, remedy in (
                ("parallel", self.parallel == "fsdp", "set parallel: fsdp"),
                ("lora", self.lora is None, "leave one of them out"),
                ("compile", not self.compile, "leave one of them out"),
            ):
                if not fits:
                    raise ValueError(
                        f"tensor_parallel={self.tensor_parallel} does not go with "
                        f"{name}={getattr(self, name)}; {remedy}"
                    )
        if self.lora is not None and self.init is None:
            raise ValueError("lora needs init: the weights that it is trained beside")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema must be in [0, 1], got {self.ema}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2**63, got {self.seed}")
        for name, stage in self.stages.items():
            if (self.source_of(stage) is None) == (self.cache_of(stage) is None):
                raise ValueError(f"stages.{name} needs a source or a cache, its own or the run's")
        if self.samples.every and self.parallel == "fsdp":
            raise ValueError("samples.every is for parallel: ddp; with fsdp export, then sample")

    @property
    def needs_encoders(self) -> bool:
        """Whether clips and captions have to be coded."""
        online = any(self.cache_of(stage) is None for stage in self.stages.values())
        return online or self.samples.every > 0

    def source_of(self, stage: Stage) -> str | None:
        """What ``stage`` reads, if it reads no cache."""
        return None if self.cache_of(stage) is not None else stage.source or self.source

    def context_of(self, stage: Stage) -> int:
        """How many processes share the tokens of a micro-batch of ``stage``."""
        own = stage.context_parallel
        return self.context_parallel if own is None else own

    def cache_of(self, stage: Stage) -> str | None:
        """The cache that ``stage`` reads, if it reads one; its own source goes before the run's."""
        return stage.cache or (self.cache if stage.source is None else None)


def _check_context(number: int | None) -> None:
    """ValueError unless a number of processes that share tokens is one."""
    if number is not None and number < 1:
        raise ValueError(f"context_parallel must be at least 1, got {number}")


def load(path: str | os.PathLike[str] | None = None, arguments: Sequence[str] = ()) -> Any:
    """The config in a YAML file, changed by arguments as on a command line.

    Args:
        path: a file, or a name of :data:`CHAINS`.
        arguments: such as ``["--stages.V1.steps", "100"]``, with _ or - in the names of settings;
            ``--print_config`` prints instead.

    Returns:
        The config of the recipe that it names, a :class:`Run`; that of an SUV if it names none.

    Raises:
        ValueError: for keys that are unknown, with their path, and for values of a wrong type.
        FileNotFoundError: if there is no such file.
    """
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    given, (file, read) = [_by_field(each) for each in arguments], _read(path)
    recipe = recipe_of(read.get("recipe", "suv"))
    if file is not None:
        wrong = list(unknown_keys(recipe.config, read))
        if wrong:
            raise ValueError(f"{file} has keys that mean nothing: {', '.join(wrong[:10])}")
        _refuse_empty(recipe.config, f"{file} has", read)
        given = ["--config", str(file), *given]
    parser = ArgumentParser(
        prog="skiparse train CONFIG.yaml", exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(recipe.config)
    parser.add_argument("--config", action="config")
    try:
        found = parser.parse_args(given)
        _refuse_empty(recipe.config, "the arguments have", found.as_dict())
        made: Namespace = parser.instantiate(found)
        fields_of = {name: value for name, value in vars(made).items() if name != "config"}
        config = recipe.config(**fields_of)
        for name, (kind, values) in recipe.typed(config).items():
            sizes = ArgumentParser(exit_on_error=False)
            sizes.add_class_arguments(kind, name)
            sizes.parse_object({name: values})
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return config


def _by_field(argument: str) -> str:
    """``--context-parallel=2`` as ``--context_parallel=2``; names of stages stay as they are."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    parts = name.split(".")
    renamed = [
        part if i == 1 and parts[0] == "stages" else part.replace("-", "_")
        for i, part in enumerate(parts)
    ]
    return f"--{'.'.join(renamed)}{equals}{value}"


def _read(path: str | os.PathLike[str] | None) -> tuple[Path | None, dict[str, Any]]:
    """The file of a config, and what is in it."""
    if path is None:
        return None, {}
    file = CHAINS.get(str(path), Path(path))
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is neither a file nor a chain of the library: {', '.join(sorted(CHAINS))}"
        )
    read = read_yaml(file)
    if not isinstance(read, dict):
        raise ValueError(f"{file} must hold a table of settings; see `skiparse train --help`")
    return file, read


def stages_of(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """The stages of a config by name, for those who need no run: it may lack a run's places.

    Raises:
        ValueError, FileNotFoundError: as :func:`load`.
    """
    _, read = _read(path)
    told = {field.name for field in fields(recipe_of(read.get("recipe", "suv")).config)}
    places = [name for name in ("out", "source", "vae", "text") if name in told]
    stages: Mapping[str, Any] = load(path, [f"--{name}=unused" for name in places]).stages
    return stages


def _refuse_nulls(config: Any) -> None:
    """ValueError if a field is None that may not be."""
    hints = get_type_hints(type(config))
    for name in (each.name for each in fields(config)):
        if getattr(config, name) is None and not _may_be_null(hints[name]):
            raise ValueError(f"{name} is null; give a value, or leave it out")


def _refuse_empty(kind: Any, where: str, table: Mapping[Any, Any]) -> None:
    """ValueError with the paths of keys that are null and may not be."""
    empty = list(null_keys(kind, table))
    if empty:
        raise ValueError(f"{where} null for {', '.join(empty[:10])}; give a value, or leave it out")


def _is_tables(hint: Any) -> bool:
    """Whether it is a dict of dataclasses."""
    return get_origin(hint) in (dict, Mapping) and is_dataclass(get_args(hint)[1])


def _present(hint: Any) -> Any:
    """What ``X | None`` is where it is there, if it is of one kind."""
    kinds = [each for each in get_args(hint) if each is not type(None)]
    return kinds[0] if type(None) in get_args(hint) and len(kinds) == 1 else hint


def _may_be_null(hint: Any) -> bool:
    return hint is Any or type(None) in get_args(hint)


def null_keys(kind: Any, table: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    """Paths of the keys in ``table`` that are null though the dataclass ``kind`` wants a value."""
    hints = get_type_hints(kind)
    for key, value in table.items():
        inner, here = _present(hints.get(key, Any)), f"{path}{key}"
        if value is None and not _may_be_null(hints.get(key, Any)):
            yield here
        elif is_dataclass(inner) and isinstance(value, Mapping):
            yield from null_keys(inner, value, f"{here}.")
        elif _is_tables(inner) and isinstance(value, Mapping):
            for name, entry in value.items():
                if entry is None:
                    yield f"{here}.{name}"
                elif isinstance(entry, Mapping):
                    yield from null_keys(get_args(inner)[1], entry, f"{here}.{name}.")


def unknown_keys(kind: Any, table: Mapping[Any, Any], path: str = "") -> list[str]:
    """Paths of the keys in ``table`` that the dataclass ``kind`` has no field for."""
    hints, wrong = get_type_hints(kind), []
    known = {each.name for each in fields(kind)}
    for key, value in table.items():
        here = f"{path}{key}"
        if key not in known:
            wrong.append(here)
            continue
        inner = _present(hints[key])
        if is_dataclass(inner) and isinstance(value, Mapping):
            wrong += unknown_keys(inner, value, f"{here}.")
        elif _is_tables(inner) and isinstance(value, Mapping):
            for name, entry in value.items():
                if isinstance(entry, Mapping):
                    wrong += unknown_keys(get_args(inner)[1], entry, f"{here}.{name}.")
    return wrong
