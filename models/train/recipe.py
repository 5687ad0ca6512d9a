"""What the trainer has to know of a model; everything else is the same for all of them.

A recipe is found by its name. That of a denoiser is a :class:`Recipe`: how its model is made,
enters a stage, is called and used, and what codes clips and captions for it. Whatever is trained
otherwise brings a task of its own to :mod:`skiparse.models.train.core`, as the autoencoder does.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:  # what is found by name knows who finds it
    from skiparse.models.data.features import Batch, Coder
    from skiparse.models.retrofit import Sparsity
    from skiparse.models.train.checkpoint import Checkpoint
    from skiparse.models.train.core import Task

RECIPES = {
    "suv": "skiparse.models.suv.recipe:SUVRecipe",
    "wan": "skiparse.models.wan.recipe:WanRecipe",
    "wfvae": "skiparse.models.wfvae.train:WFVAERecipe",
}


class Trainable(Protocol):
    """What can be trained by name."""

    config: type[Any]  # a dataclass, of config.Run; how it is told what to do

    def task(self, config: Any) -> Task:
        """What :func:`skiparse.models.train.core.run` runs."""

    def typed(self, config: Any) -> Mapping[str, tuple[type[Any], Mapping[str, Any]]]:
        """Fields that are arguments of a class, with it and their values, to be checked."""

    def exported(self, last: Checkpoint, weights: str, **given: Any) -> Any:
        """A checkpoint as it is used, by ``save_pretrained``: see ``train/export.py``."""


class Penalty(NamedTuple):
    """What a loss has besides its error."""

    weight: float
    value: Tensor  # a number, whose gradient counts as often as it weighs


class Recipe(ABC):
    """A family of denoisers.

    ``config`` and ``stage`` are of its own classes, which may add fields to those of
    :mod:`skiparse.models.train.config`. What is trained of a model has ``requires_grad`` and is
    float32; the rest is in no checkpoint and has to come from :meth:`remade` as it was.
    """

    config: type[Any]
    blocks: tuple[str, ...]  # class names of the modules that FSDP shards by themselves
    adapted: tuple[str, ...] = ()  # ends of the names of the layers that get a LoRA, unless told

    def task(self, config: Any) -> Task:
        """The chain of stages of ``config``."""
        from skiparse.models.train.loop import Denoising

        return Denoising(config)

    def typed(self, config: Any) -> Mapping[str, tuple[type[Any], Mapping[str, Any]]]:
        """Fields that are arguments of a class, with it and their values, to be checked."""
        return {}

    @abstractmethod
    def check(self, config: Any, coder: Coder | None) -> None:
        """Find what cannot work before any work.

        Raises:
            ValueError: naming the setting.
            FileNotFoundError: if ``config.init`` does not hold weights.
        """

    @abstractmethod
    def initial(self, config: Any, stage: Any) -> nn.Module:
        """The model that the first stage starts from, on the CPU."""

    def pretrained(self, init: str) -> nn.Module:
        """The model in the folder ``init``, in float32, on the CPU: what a LoRA goes beside.

        Raises:
            FileNotFoundError: if there is none.
        """
        raise ValueError(f"the recipe {type(self).__name__} reads no weights, so there is no LoRA")

    @abstractmethod
    def remade(self, config: Any, about: Mapping[str, Any]) -> nn.Module:
        """A model of what :meth:`about` said of one, with any weights where they are trained."""

    @abstractmethod
    def about(self, model: nn.Module) -> dict[str, Any]:
        """What makes the model again, ready for JSON."""

    def changes(self, model: nn.Module, stage: Any) -> bool:
        """Whether ``model`` has to be converted for ``stage``."""
        return False

    def converted(self, model: nn.Module, stage: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        """Another model for ``stage``, where ``model`` :meth:`changes`.

        ``model`` may be in shards. All its tensors become those of the other one, by name; where
        that has a dimension more, in front, each entry of it becomes a copy.

        Returns:
            The other one on the meta device, and the tensors of it that ``model`` does not have.
        """
        raise NotImplementedError(f"{type(self).__name__} converts no models")

    @abstractmethod
    def prepare(self, model: nn.Module, config: Any, stage: Any) -> None:
        """Set what a stage decides and no checkpoint holds, such as sparsity."""

    takes_images: ClassVar[bool] = False  # whether its models can be told of them

    def told_of_images(self, model: nn.Module, paradigm: str, seed: int) -> nn.Module:
        """The model with weights for them, which change nothing yet; or as it is, if it has them.

        Args:
            model: new, or as :meth:`pretrained` gives it.
            paradigm: of :mod:`skiparse.models.images`.
            seed: of the new weights.

        Raises:
            ValueError: if it has those of another paradigm.
        """
        raise NotImplementedError(f"{type(self).__name__} tells no models of images")

    shares: ClassVar[bool] = False  # whether processes can share the tokens of its model

    def share(self, model: nn.Module, group: Any) -> None:
        """Let the processes of ``group`` share the tokens; each returns the whole velocity.

        None ends that. It is called for every stage, after :meth:`prepare`.
        """
        raise NotImplementedError(f"{type(self).__name__} shares no tokens")

    in_pieces: ClassVar[bool] = False  # whether models are made block by block, none without memory

    def begun(self, config: Any, stage: Any) -> nn.Module | None:
        """What :meth:`initial` gives, before it is :meth:`converted`; None where weights are read.

        For models that are made ``in_pieces``: each block may be in shards before the next is made.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no models in pieces")

    deals: ClassVar[bool] = False  # whether its layers can be dealt out to processes

    def deal_out(self, block: nn.Module, mesh: DeviceMesh) -> None:
        """Leave each process of ``mesh`` its part of a block's weights, in place, as DTensors."""
        raise NotImplementedError(f"{type(self).__name__} deals out no layers")

    def compiled(self, model: nn.Module) -> None:
        """Compile what ``compile: true`` means."""
        model.compile()

    @abstractmethod
    def coder(self, config: Any, device: torch.device) -> Coder:
        """What codes clips and captions."""

    @abstractmethod
    def shift(self, shape: tuple[int, ...]) -> float:
        """Of noise levels, for latents ``[C, t, h, w]``."""

    @abstractmethod
    def velocity(self, net: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch) -> Tensor:
        """The model's answer to latents ``[B, C, t, h, w]`` with noise of ``levels`` ``[B]``."""

    def penalised(
        self, config: Any, net: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch
    ) -> tuple[Tensor, Mapping[str, Penalty]]:
        """:meth:`velocity`, and what the loss has besides its error, by the names in the log."""
        return self.velocity(net, noisy, levels, batch), {}

    def exported(self, last: Checkpoint, weights: str, **given: Any) -> Any:
        """What a checkpoint is used as, by ``save_pretrained``.

        Args:
            last: of a run.
            weights: "ema" or "model".
            given: ``vae``, ``text``, ``init`` and ``other_encoders`` of
                :func:`~skiparse.models.train.export.export`.

        Raises:
            ValueError: if it does not fit what was given.
        """
        raise ValueError(f"{last.path} is of a model that `skiparse export` knows no use for")

    def sparsity(self, about: Mapping[str, Any]) -> Sparsity | None:
        """What of a model of diffusers is sparse, of which :meth:`about` said ``about``."""
        return None

    @abstractmethod
    def pipeline(self, model: nn.Module, coder: Any) -> Any:
        """A diffusers pipeline around it, for samples."""


def recipe_of(name: str) -> Any:
    """The recipe by that name of :data:`RECIPES`: a :class:`Recipe`, or another Trainable.

    Raises:
        ValueError: if there is none.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    module, _, attribute = RECIPES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
