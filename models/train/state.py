"""What a run carries from step to step, and how it enters a stage: new, kept or converted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from skiparse.models.suv.model import SUV
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.clip import AdaptiveGradClipper
from skiparse.models.train.config import Config, Stage
from skiparse.models.train.ema import EMA
from skiparse.models.train.optimizer import adamw, state_of
from skiparse.models.train.parallel import World, bare, gathered


@dataclass
class State:
    """The model, its average, the optimiser and the clipper.

    ``net`` is the model as a step calls it: itself, or inside what spreads it over processes.
    """

    net: nn.Module
    ema: EMA[SUV]
    optimizer: AdamW
    clipper: AdaptiveGradClipper

    @property
    def model(self) -> SUV:
        return bare(self.net)

    @classmethod
    def made(cls, model: SUV, average: SUV, config: Config, world: World) -> State:
        """Around a model in one piece, with an optimiser and a clipper that know nothing yet."""
        ema = EMA(average.to(world.device), decay=config.ema)
        ema.model.eval()
        net = world.spread(model.train(), config.parallel)
        if world.size > 1 and config.parallel == "fsdp":
            world.sharded(ema.model)
        if config.compile:
            bare(net).compile_repeated_blocks()
        settings = config.optimizer
        optimizer = adamw(
            bare(net).named_parameters(),
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        return cls(net, ema, optimizer, config.clip.make())

    @classmethod
    def resumed(cls, last: Checkpoint, config: Config, world: World) -> State:
        """As the checkpoint has it."""
        model = SUV(**last.about["model"])
        state = cls.made(model, model, config, world)
        last.load(state.tensors())
        state.clipper.load_state_dict(last.about["clipper"])
        return state

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is tensors, by name: ``model.*``, ``ema.*``, ``optimizer.*``."""
        found = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        found |= {f"ema.{name}": x for name, x in self.ema.model.state_dict().items()}
        return found | state_of(self.optimizer, self.model.named_parameters(), "optimizer")

    def about(self) -> dict[str, Any]:
        """The rest of it, ready for JSON."""
        return {"model": arguments_of(self.model), "clipper": self.clipper.state_dict()}


def entered(state: State | None, stage: Stage, config: Config, world: World) -> State:
    """What ``stage`` starts with, made from what the one before it left behind, if there was one.

    The weights, their average and the optimiser stay, unless the model gets skips: then it is
    converted, and the optimiser starts anew. The clipper forgets: norms will be others.
    """
    if state is None:
        model = initial(config, stage)
        state = State.made(model, model, config, world)
    elif state.model.config.skip_connection != stage.skip_connection:
        sparsity = stage.sparsity or state.model.config.sparsity
        model, average = (
            SUV.from_dense(gathered(x), sparsity=sparsity) for x in (state.model, state.ema.model)
        )
        counts = state.clipper.counts
        state = State.made(model, average, config, world)
        state.clipper.counts = counts
    prepare(state, stage, config)
    state.clipper.reset()
    return state


def prepare(state: State, stage: Stage, config: Config) -> None:
    """Set what a stage decides and no checkpoint holds."""
    sparsity = stage.sparsity or tuple(sizes_of(config)["sparsity"])
    for model in (state.model, state.ema.model):
        model.set_sparsity(sparsity)
    state.model.set_checkpointing((stage.checkpointing,) * len(sparsity))


def initial(config: Config, stage: Stage) -> SUV:
    """The model that the first stage starts from, in float32, on the CPU.

    Raises:
        OSError, ValueError: if the weights of ``config.init`` are not there, or of another model.
    """
    if config.init is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return skeleton(config, stage)
    model: SUV = SUV.from_pretrained(_weights(config.init), torch_dtype=torch.float32)
    if model.config.skip_connection == stage.skip_connection:
        return model
    return SUV.from_dense(
        model, sparsity=model.config.sparsity, skip_connection=stage.skip_connection
    )


def skeleton(config: Config, stage: Stage) -> SUV:
    """A model of that size, with new weights."""
    return SUV(**{**sizes_of(config), "skip_connection": stage.skip_connection})


def sizes_of(config: Config) -> dict[str, Any]:
    """The arguments of SUV that ``config`` means.

    Raises:
        FileNotFoundError: if ``config.init`` is no folder of weights.
    """
    if config.init is None:
        return SUV.presets[config.preset] | config.model
    known = SUV.load_config(_weights(config.init))
    return {name: value for name, value in known.items() if not name.startswith("_")}


def arguments_of(model: SUV) -> dict[str, Any]:
    """What ``SUV(...)`` was called with, sparsity as it is now; ready for JSON."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in model.config.items()
        if not name.startswith("_")
    }


def _weights(init: str) -> Path:
    """The folder of SUV in ``init``, which is one or holds a pipeline's."""
    for folder in (Path(init) / "transformer", Path(init)):
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"init={init} holds no SUV: neither config.json nor transformer/config.json is there; make "
        "it of released weights by `skiparse convert suv`, or of a run by `skiparse export`"
    )
