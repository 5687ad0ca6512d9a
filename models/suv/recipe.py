"""How an SUV is trained: what the trainer has to know of it, and what it can be told besides."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from skiparse.models import flow
from skiparse.models.data.features import Batch
from skiparse.models.images import of_other_images
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.strict import WRITTEN_BY_DIFFUSERS
from skiparse.models.suv.encoders import Encoders, fingerprints
from skiparse.models.suv.model import CHECKPOINTS, SUV, SUVOutput
from skiparse.models.suv.tensor_parallel import check_tensor_parallel, deal_out
from skiparse.models.text import TextEncoders
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.config import HOW, Config, Stage
from skiparse.models.train.export import check_encoders, model_of
from skiparse.models.train.recipe import Recipe
from skiparse.models.wfvae.model import WFVAE

BALANCE = 0.01  # Fedus et al., Switch Transformer, arXiv 2101.03961


@dataclass(frozen=True, kw_only=True)
class SUVStage(Stage):
    """A part of a run with one kind of data, one sparsity and one schedule.

    Args:
        sparsity: of each part of the U; None for that of the preset or of ``init``.
        skip_connection: False for the dense model of the first stages. A stage with skips after
            one without converts the model: new skips begin without effect.
        checkpointing: what is computed again in the backward pass: none, feed_forward or block.
        linear_attention: for each part of the U, whether attention has a linear branch over all
            tokens beside it. A stage with some after one without converts the model: new ones
            begin without effect. None for what the model has.
        experts: for each part, of how many feed-forwards its blocks have a mixture; 1 for the
            feed-forward itself. New ones begin as its copies. None for what the model has.
        experts_per_token: how many each token goes through, at least 2. None for what the model
            has.
    """

    sparsity: tuple[int, ...] | None = None
    skip_connection: bool = True
    checkpointing: str = field(default="none", metadata=HOW)
    linear_attention: tuple[bool, ...] | None = None
    experts: tuple[int, ...] | None = None
    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpointing not in CHECKPOINTS:
            raise ValueError(
                f"checkpointing must be one of {', '.join(CHECKPOINTS)}, got {self.checkpointing!r}"
            )

    @property
    def parts(self) -> dict[str, Any]:
        """What it asks of the model besides: arguments of :meth:`SUV.extended`."""
        asked = {
            "linear_attention": self.linear_attention,
            "experts": self.experts,
            "experts_per_token": self.experts_per_token,
        }
        return {name: value for name, value in asked.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SUVConfig(Config):
    """A training run of an SUV.

    Args:
        init: folder with weights to start from: a released model that was converted, an exported
            run, or a dense one; instead of ``preset`` and ``model``.
        preset: size of the model; see ``SUV.presets``.
        model: arguments of SUV that differ from the preset's.
        vae: folder of a WFVAE; not needed where all stages have a cache and nothing is sampled.
        text: folder that holds the text encoders, as a pipeline keeps them; as ``vae``.
        balance: weight in the loss of how unevenly experts are used; None for 0.01, the Switch
            Transformer's, where there are some.
    """

    recipe: Literal["suv"] = field(default="suv", metadata=HOW)
    stages: dict[str, SUVStage]
    preset: str = "v1.5"
    model: dict[str, Any] = field(default_factory=dict)
    vae: str | None = field(default=None, metadata=HOW)
    text: str | None = field(default=None, metadata=HOW)
    balance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balance is not None and not 0 <= self.balance < math.inf:
            raise ValueError(f"balance must be a number from 0 on, got {self.balance}")
        if self.preset not in SUV.presets:
            raise ValueError(f"preset must be one of {', '.join(SUV.presets)}, got {self.preset!r}")
        if self.model.get("images") is not None:
            raise ValueError("model.images is set by images.paradigm; leave it out")
        if self.init is not None and self.model:
            raise ValueError("model has no effect with init, which has a config; leave one out")
        wrong = self.model.keys() - inspect.signature(SUV.__init__).parameters.keys()
        if wrong:
            raise ValueError(f"model has no {', '.join(sorted(wrong))}; see the arguments of SUV")
        skips = [stage.skip_connection for stage in self.stages.values()]
        if sorted(skips) != skips:
            raise ValueError(
                "stages: one without skip_connection follows one with it, which would drop the "
                "skips; set skip_connection: true there"
            )
        if self.lora is not None and len(set(skips)) > 1:
            raise ValueError(
                "stages: with lora the model stays that of init; set skip_connection alike in all"
            )
        if self.needs_encoders and (self.vae is None or self.text is None):
            raise ValueError(
                "vae and text are needed to encode clips and to make samples; give their folders, "
                "or train from a cache without samples"
            )


class SUVRecipe(Recipe):
    """The recipe of the denoiser of Open-Sora Plan v1.5."""

    config = SUVConfig
    blocks = ("SUVBlock",)
    adapted = tuple(f"{of}to_{each}" for of in ("", "text_") for each in ("q", "k", "v", "out"))

    def typed(self, config: SUVConfig) -> Mapping[str, tuple[type[Any], Mapping[str, Any]]]:
        """The arguments of SUV."""
        if config.init is not None:
            return {}
        return {"model": (SUV, SUV.presets[config.preset] | config.model)}

    def check(self, config: SUVConfig, coder: Any) -> None:
        """Whether the model can be made, can have the stages' sparsity, and fits the encoders."""
        first, *_ = config.stages.values()
        try:
            with torch.device("meta"):
                model = skeleton(config, first)
        except ValueError as error:
            raise ValueError(f"model: {error}") from error
        for name, stage in config.stages.items():
            try:
                wanted = self._extended(model, stage)
            except ValueError as error:
                raise ValueError(f"stages.{name}: {error}") from error
            if config.lora is not None and wanted is not model:
                raise ValueError(
                    f"stages.{name}: with lora the model stays that of init, which lacks "
                    f"{', '.join(stage.parts)}; train those first without lora"
                )
            model, mixed = wanted, max(wanted.config.experts or (1,)) > 1
            for part in cast(list[Any], model.stages):
                check_tensor_parallel(part[0], config.tensor_parallel)
            if stage.experts_per_token is not None and not mixed:
                raise ValueError(
                    f"stages.{name}: experts_per_token={stage.experts_per_token} is of experts, "
                    "and there are none; leave it out, or set experts"
                )
            if stage.sparsity is not None:
                try:
                    model.set_sparsity(stage.sparsity)
                except ValueError as error:
                    raise ValueError(f"stages.{name}.sparsity: {error}") from error
        if config.balance is not None and max(model.config.experts or (1,)) == 1:
            raise ValueError(
                f"balance={config.balance} is of experts, and no stage has some; leave it out, or "
                "set experts in a stage"
            )
        if coder is None:
            return
        for key, width, what in (
            ("in_channels", coder.vae.config.latent_channels, "autoencoder"),
            ("text_channels", coder.null["states"].shape[1], "text encoder"),
            ("pooled_channels", coder.null["pooled"].shape[0], "text encoder"),
        ):
            if model.config[key] != width:
                raise ValueError(
                    f"the model has {key}={model.config[key]}, but the {what} has {width}; set "
                    f"model.{key}={width}, or give another {what}"
                )
        if config.samples.every:
            frames, height, width = config.samples.shape
            SUVPipeline(model, coder.vae).latent_shape(height, width, frames)

    def initial(self, config: SUVConfig, stage: SUVStage) -> SUV:
        """New, or as ``config.init`` has it, in float32.

        Raises:
            OSError, ValueError: if the weights of ``config.init`` are not there, or of another
                model.
        """
        new = self.begun(config, stage)
        if new is not None:
            return self._extended(new, stage)
        assert config.init is not None
        model = self.pretrained(config.init)
        if config.images is not None:
            model = self.told_of_images(model, config.images.paradigm, config.seed)
        if model.config.skip_connection != stage.skip_connection:
            model = SUV.from_dense(
                model, sparsity=model.config.sparsity, skip_connection=stage.skip_connection
            )
        return self._extended(model, stage)

    in_pieces = True

    def begun(self, config: SUVConfig, stage: SUVStage) -> SUV | None:
        """Each block draws its weights when it is made."""
        if config.init is not None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return skeleton(config, stage)

    takes_images = True

    def told_of_images(self, model: Any, paradigm: str, seed: int) -> SUV:
        """In place."""
        if model.config.images not in (None, paradigm):
            raise ValueError(of_other_images(model.config.images, paradigm))
        if model.config.images is None:
            model.take_images(paradigm, seed=seed)
        told: SUV = model
        return told

    def pretrained(self, init: str) -> SUV:
        """As the folder has it."""
        model: SUV = SUV.from_pretrained(_weights(init), torch_dtype=torch.float32)
        return model

    def remade(self, config: SUVConfig, about: Mapping[str, Any]) -> SUV:
        """All of it is trained, so it has any weights."""
        return SUV(**about)

    def about(self, model: Any) -> dict[str, Any]:
        """What ``SUV(...)`` was called with, sparsity as it is now."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in model.config.items()
            if not name.startswith("_")
        }

    def changes(self, model: Any, stage: SUVStage) -> bool:
        """It gets skips, a linear branch or experts."""
        skips: bool = model.config.skip_connection != stage.skip_connection
        return skips or _lacks(model, stage)

    def converted(self, model: Any, stage: SUVStage) -> tuple[SUV, dict[str, Tensor]]:
        """With what it lacks, which begins without effect."""
        skips = model.config.skip_connection or stage.skip_connection
        return SUV.beyond(model, sparsity=stage.sparsity, skip_connection=skips, **stage.parts)

    @staticmethod
    def _extended(model: SUV, stage: SUVStage) -> SUV:
        """With the branches and experts of the stage; itself where it has them.

        Routers begin alike in all runs, as in all processes.
        """
        return SUV.extended(model, **stage.parts) if _lacks(model, stage) else model

    def prepare(self, model: Any, config: SUVConfig, stage: SUVStage) -> None:
        """Sparsity, and what is computed again in the backward pass."""
        sparsity = stage.sparsity or tuple(sizes_of(config)["sparsity"])
        model.set_sparsity(sparsity)
        if model.training:  # of which the average does none
            model.set_checkpointing((stage.checkpointing,) * len(sparsity))

    shares = True

    def share(self, model: Any, group: Any) -> None:
        """By layouts of its own."""
        model.set_context_parallel(group)

    deals = True

    def deal_out(self, block: Any, mesh: DeviceMesh) -> None:
        """By heads, and by columns of feed-forwards."""
        deal_out(block, mesh)

    def compiled(self, model: Any) -> None:
        """Block by block."""
        model.compile_repeated_blocks()

    def coder(self, config: SUVConfig, device: torch.device) -> Encoders:
        """WF-VAE, T5 and CLIP."""
        if config.vae is None or config.text is None:
            raise ValueError("vae and text are needed to encode clips; give their folders")
        last = config.images is not None and config.images.needs_last
        return Encoders.from_pretrained(config.vae, config.text, device, last=last)

    def shift(self, shape: tuple[int, ...]) -> float:
        """By height and width."""
        return flow.dynamic_shift(*shape[-2:])

    def velocity(self, net: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch) -> Tensor:
        """SUV's forward."""
        found: Tensor = _answer(net, noisy, levels, batch).sample
        return found

    def penalised(
        self, config: SUVConfig, net: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor | None]:
        """With how unevenly experts are used."""
        found = _answer(net, noisy, levels, batch)
        if found.imbalance is None:
            return found.sample, None
        weight = BALANCE if config.balance is None else config.balance
        return found.sample, weight * found.imbalance.mean()

    def pipeline(self, model: Any, coder: Encoders) -> SUVPipeline:
        """With the encoders it is trained with."""
        text = coder.text
        return SUVPipeline(
            model, coder.vae, text.tokenizer, text.encoder, text.tokenizer_2, text.encoder_2
        )

    def exported(self, last: Checkpoint, weights: str, **given: Any) -> SUVPipeline:
        """A pipeline with the encoders of the run."""
        vae, text = given["vae"], given["text"]
        if "model" not in last.about:
            raise ValueError(f"{last.path} is of no SUV: its about.json has no model")
        if vae is None or text is None:
            raise ValueError(f"{last.path} is of a denoiser; give the vae and text of its run")
        channels = WFVAE.load_config(vae).get("latent_channels")
        if channels != last.about["model"]["in_channels"]:
            raise ValueError(
                f"vae={vae} has latents of {channels} channels, but the model of {last.path} takes "
                f"{last.about['model']['in_channels']}; give the vae that it was trained with"
            )
        encoders = TextEncoders.from_pretrained(text)
        decoder = WFVAE.from_pretrained(vae)
        if not given["other_encoders"]:
            folders = {"vae": vae, "t5": text, "clip": text}
            check_encoders(last, fingerprints(decoder, encoders), folders)
        model = model_of(last, SUV, last.about["model"], weights, given["init"])
        model.set_sparsity(last.about["model"]["sparsity"])  # which init may have otherwise
        return SUVPipeline(
            model,
            decoder,
            encoders.tokenizer,
            encoders.encoder,
            encoders.tokenizer_2,
            encoders.encoder_2,
        )


def _answer(net: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch) -> SUVOutput:
    captions = batch.captions
    found: SUVOutput = net(
        noisy,
        flow.timesteps(levels),
        captions["states"],
        captions["pooled"],
        text_mask=captions["states_mask"],
        images=batch.images,
        return_dict=True,
    )
    return found


def _lacks(model: SUV, stage: SUVStage) -> bool:
    """Whether the stage asks for other branches or experts than the model has."""
    config, stages = model.config, len(model.config.num_layers)
    has = {
        "linear_attention": config.linear_attention or (False,) * stages,
        "experts": config.experts or (1,) * stages,
        "experts_per_token": config.experts_per_token,
    }
    return any(value != has[name] for name, value in stage.parts.items())


def skeleton(config: SUVConfig, stage: SUVStage) -> SUV:
    """A model of that size, with new weights."""
    return SUV(**{**sizes_of(config), "skip_connection": stage.skip_connection})


def sizes_of(config: SUVConfig) -> dict[str, Any]:
    """The arguments of SUV that ``config`` means.

    Raises:
        FileNotFoundError: if ``config.init`` is no folder of weights.
    """
    told = {} if config.images is None else {"images": config.images.paradigm}
    if config.init is None:
        return SUV.presets[config.preset] | config.model | told
    known = SUV.load_config(_weights(config.init))
    own, asked = known.get("images"), told.get("images")
    if own is not None and own != asked:
        raise ValueError(f"init={config.init}: {of_other_images(own, asked)}")
    known |= told
    return {
        name: value
        for name, value in known.items()
        if not name.startswith("_") and name not in WRITTEN_BY_DIFFUSERS
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
