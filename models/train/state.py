"""What a run carries from step to step, and how it enters a stage: new, kept or converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import AdamW

from skiparse.models.data.features import digest
from skiparse.models.strict import filled
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.clip import AdaptiveGradClipper
from skiparse.models.train.config import Config, Stage
from skiparse.models.train.ema import EMA
from skiparse.models.train.optimizer import adamw, state_of
from skiparse.models.train.parallel import World, bare, frozen_of, in_shards
from skiparse.models.train.recipe import Recipe, recipe_of


@dataclass
class State:
    """The model, its average, the optimiser and the clipper.

    ``net`` is the model as a step calls it: itself, or inside what spreads it over processes. What
    takes no gradient is neither averaged nor saved: the average shares it, and a checkpoint has
    its SHA-256, so that a run does not go on around another.
    """

    net: nn.Module
    ema: EMA[nn.Module]
    optimizer: AdamW
    clipper: AdaptiveGradClipper
    recipe: Recipe
    frozen: str | None  # SHA-256 of what takes no gradient

    @property
    def model(self) -> nn.Module:
        return bare(self.net)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that take gradients, by name."""
        return {name: x for name, x in self.model.named_parameters() if x.requires_grad}

    @classmethod
    def made(cls, model: nn.Module, average: nn.Module, config: Config, world: World) -> State:
        """Around a model, with an optimiser and a clipper that know nothing yet.

        Args:
            model: in one piece, or in shards already.
            average: the same, of which a copy is made, or another, which is taken.
        """
        recipe = recipe_of(config.recipe)
        frozen = frozen_of(model, config.dtype)
        for name, x in frozen.items():
            model.get_parameter(name).data = x
        held, names = digest(frozen) if frozen else None, [*frozen]
        del frozen
        sharded = world.size > 1 and config.parallel == "fsdp"
        if not sharded:  # shards come to the device one by one
            model.to(world.device)
            average.to(world.device)
        for name in names:
            average.get_parameter(name).requires_grad_(False).data = model.get_parameter(name).data
        ema = EMA(model, decay=config.ema, average=None if average is model else average)
        ema.model.eval()
        net = world.spread(model.train(), config.parallel, recipe.blocks, recipe.deal_out)
        if sharded and not isinstance(ema.model, FSDPModule):
            world.sharded(ema.model, recipe.blocks, recipe.deal_out)
        if config.compile:
            recipe.compiled(bare(net))
        settings = config.optimizer
        optimizer = adamw(
            [(name, x) for name, x in bare(net).named_parameters() if x.requires_grad],
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        return cls(net, ema, optimizer, config.clip.make(), recipe, held)

    @classmethod
    def resumed(cls, last: Checkpoint, config: Config, world: World) -> State:
        """As the checkpoint has it.

        Raises:
            ValueError: if what is not trained is not what it was.
        """
        model, average = _remade(last.about["model"], config, world)
        state = cls.made(model, average, config, world)
        if last.about.get("frozen") != state.frozen:
            raise ValueError(
                f"{last.path} was trained around other weights, which are not in it; put back what "
                f"init={config.init} was, or choose another out"
            )
        last.load(state.tensors())
        state.clipper.load_state_dict(last.about["clipper"])
        return state

    def tensors(self) -> dict[str, Tensor]:
        """All of it that is tensors, by name: ``model.*``, ``ema.*``, ``optimizer.*``."""
        frozen = {name for name, x in self.model.named_parameters() if not x.requires_grad}
        found = {}
        for kind, model in (("model", self.model), ("ema", self.ema.model)):
            for name, x in model.state_dict().items():
                if name not in frozen:
                    found[f"{kind}.{name}"] = x
        return found | state_of(self.optimizer, self.trained.items(), "optimizer")

    def about(self) -> dict[str, Any]:
        """The rest of it, ready for JSON."""
        about = self.recipe.about(self.model)
        return {"model": about, "frozen": self.frozen, "clipper": self.clipper.state_dict()}


def entered(state: State | None, stage: Stage, config: Config, world: World) -> State:
    """What ``stage`` starts with, made from what the one before it left behind, if there was one.

    The weights, their average and the optimiser stay, unless the model has to be converted: then
    the optimiser starts anew. The clipper forgets: norms will be others.
    """
    recipe = recipe_of(config.recipe)
    if state is None:
        model, average = _initial(stage, config, world)
        if config.lora is not None:
            _refuse_changes(model, stage, recipe)
        state = State.made(model, average, config, world)
    elif config.lora is not None:
        _refuse_changes(state.model, stage, recipe)
    elif recipe.changes(state.model, stage):
        model, average = (
            _converted(x, stage, recipe, world) for x in (state.model, state.ema.model)
        )
        counts = state.clipper.counts
        state = State.made(model, average, config, world)
        state.clipper.counts = counts
    prepare(state, stage, config)
    state.clipper.reset()
    return state


def _initial(stage: Stage, config: Config, world: World) -> tuple[nn.Module, nn.Module]:
    """What the first stage starts with, and its average, which is the same or its copy."""
    recipe = recipe_of(config.recipe)
    if config.lora is not None:
        model = _beside(config)
        return model, model
    if _in_pieces(config, world):
        with world.cutting(recipe.blocks, recipe.deal_out):
            begun = recipe.begun(config, stage)
        if begun is not None:
            model = world.sharded(begun, recipe.blocks, recipe.deal_out)
            if recipe.changes(model, stage):
                model = _converted(model, stage, recipe, world)
            return model, _copied(model, config, world)
    model = recipe.initial(config, stage)
    return model, model


def _remade(about: Mapping[str, Any], config: Config, world: World) -> tuple[nn.Module, nn.Module]:
    """A model to be filled from a checkpoint, and its average, which is the same or its copy."""
    recipe = recipe_of(config.recipe)
    if config.lora is None and _in_pieces(config, world):
        with world.cutting(recipe.blocks, recipe.deal_out):
            model = recipe.remade(config, about)
        world.sharded(model, recipe.blocks, recipe.deal_out)
        return model, _copied(model, config, world)
    model = recipe.remade(config, about) if config.lora is None else _beside(config)
    return model, model


def _in_pieces(config: Config, world: World) -> bool:
    """Whether no process need have a whole model while it is made."""
    in_pieces: bool = recipe_of(config.recipe).in_pieces
    return world.size > 1 and config.parallel == "fsdp" and in_pieces


def _copied(model: nn.Module, config: Config, world: World) -> nn.Module:
    """Another one with the same shards."""
    recipe = recipe_of(config.recipe)
    with torch.device("meta"):
        made = recipe.remade(config, recipe.about(model))
    in_shards(model, world.sharded(made, recipe.blocks, recipe.deal_out), {})
    copy: nn.Module = made.train(model.training)
    return copy


def _converted(model: nn.Module, stage: Stage, recipe: Recipe, world: World) -> nn.Module:
    """What :meth:`Recipe.converted` says, with its tensors: whole, or shard by shard."""
    made, new = recipe.converted(model, stage)
    if isinstance(model, FSDPModule):
        in_shards(model, world.sharded(made, recipe.blocks, recipe.deal_out), new)
    else:
        filled(made, model, new)
    return made.train(model.training)


def prepare(state: State, stage: Stage, config: Config) -> None:
    """Set what a stage decides and no checkpoint holds."""
    for model in (state.model, state.ema.model):
        state.recipe.prepare(model, config, stage)


def _beside(config: Config) -> nn.Module:
    """The model in ``config.init`` with a new LoRA."""
    from skiparse.models.train.lora import beside  # peft is needed with a LoRA alone

    assert config.init is not None
    assert config.lora is not None
    return beside(recipe_of(config.recipe), config.init, config.lora, config.seed, config.images)


def _refuse_changes(model: nn.Module, stage: Stage, recipe: Recipe) -> None:
    """ValueError if the weights beside a LoRA would have to be others."""
    if recipe.changes(model, stage):
        raise ValueError(
            "lora: a stage wants another model than init holds, whose weights stay as they are; "
            "let all stages have that of init, or convert it first"
        )
