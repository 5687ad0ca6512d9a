"""LoRA: a few weights beside frozen ones, and what becomes of them, for the models of all recipes.

A run with ``lora`` trains two thin matrices beside each chosen layer, and nothing else. So its
optimiser, averages and checkpoints hold no more than they: the weights in ``init`` are read again
when it goes on, and have to be what they were. The layers are those of peft.

Source: Hu et al., LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from diffusers.loaders import WanLoraLoaderMixin
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from skiparse.models.checkpoints import refuse
from skiparse.models.data.features import digest
from skiparse.models.images import Images
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.config import Lora
from skiparse.models.train.parallel import frozen_of
from skiparse.models.train.recipe import Recipe, recipe_of

_NAME = "default"  # of the adapter, in the names of its weights


def beside(
    recipe: Recipe, init: str, lora: Lora, seed: int, images: Images | None = None
) -> nn.Module:
    """The model in ``init``, frozen and in float32, with a new LoRA.

    What tells it of ``images``, if it does not have that, is new and trained as a whole.

    Raises:
        ValueError: as :func:`adapt`, or if it has another paradigm of images.
    """
    model = recipe.pretrained(init)
    before = {name for name, _ in model.named_parameters()}
    if images is not None:
        model = recipe.told_of_images(model, images.paradigm, seed)
    new = [x for name, x in model.named_parameters() if name not in before]
    adapt(model, lora, targets(recipe, lora), seed)
    for x in new:
        x.requires_grad_(True)
    return model


def adapt(model: nn.Module, lora: Lora, names: tuple[str, ...], seed: int) -> None:
    """Freeze a model, and give it a new LoRA, which changes nothing yet.

    Args:
        names: ends of the names of the layers that get one.
        seed: of its weights.

    Raises:
        ValueError: naming what no linear layer is called; nothing was changed.
    """
    linear = [f".{name}" for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    missing = [each for each in names if not any(name.endswith(f".{each}") for name in linear)]
    if missing or not names:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(
            f"lora.target_modules: no linear layer of this {type(model).__name__} is called "
            f"{', '.join(missing) or 'so'}; its names end in {', '.join(ends)}"
        )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_settings(lora, names), model, _NAME)


def targets(recipe: Recipe, lora: Lora) -> tuple[str, ...]:
    """The ends of the names of the layers that it goes beside."""
    return lora.target_modules or recipe.adapted


def merged(last: Checkpoint, weights: str, init: str | os.PathLike[str] | None) -> Any:
    """The model that a LoRA was trained beside, with what it learned added, in float32.

    Args:
        last: of a run with a LoRA.
        weights: "ema" or "model".
        init: where the model is by now; None for where it was.

    Raises:
        ValueError: if there is another model, or the checkpoint holds another LoRA.
    """
    settings, recipe = last.about["settings"], recipe_of(last.about["recipe"])
    lora = Lora.of(settings)
    assert lora is not None
    init = settings["init"] if init is None else os.fspath(init)
    told = settings.get("images")  # there were none once
    model = beside(recipe, init, lora, 0, None if told is None else Images(**told))
    if digest(frozen_of(model, settings["dtype"])) != last.about["frozen"]:
        raise ValueError(
            f"init={init} holds not the weights that {last.path} was trained beside; give the "
            "folder that does by init (--init)"
        )
    found = last.read(f"{weights}.")
    wanted = {name for name, x in model.named_parameters() if x.requires_grad}
    refuse(
        f"{last.path} does not hold its LoRA",
        {
            "missing": sorted(wanted - found.keys()),
            "unexpected": sorted(found.keys() - model.state_dict().keys()),
        },
    )
    model.load_state_dict(found, strict=False)
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, LoraLayer)]
    for name, layer in layers:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model.requires_grad_(True).eval()


def save_apart(last: Checkpoint, weights: str, folder: str | os.PathLike[str]) -> None:
    """Write the LoRA alone, as ``load_lora_weights`` of a pipeline of diffusers reads it.

    It is the same file for all pipelines with one ``transformer``. Where the model was retrofitted,
    ``skiparse.json`` goes beside it.
    """
    lora, recipe = Lora.of(last.about["settings"]), recipe_of(last.about["recipe"])
    assert lora is not None
    end = f".{_NAME}.weight"
    found = last.read(f"{weights}.")
    others = sorted(name for name in found if not name.endswith(end))
    if others:
        raise ValueError(
            f"lora=apart: {last.path} has weights that are of no LoRA, for images: "
            f"{', '.join(others[:3])}; export it merged"
        )
    layers: dict[str, Tensor] = {f"{name.removesuffix(end)}.weight": x for name, x in found.items()}
    WanLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=_settings(lora, targets(recipe, lora)).to_dict(),
    )
    sparsity = recipe.sparsity(last.about["model"])
    if sparsity is not None:
        sparsity.save(folder)


def _settings(lora: Lora, wanted: tuple[str, ...]) -> LoraConfig:
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=list(wanted))
