"""How a Wan is trained: what the trainer has to know of it, and what it can be told besides.

It begins from the folder of a WanPipeline, whose autoencoder and text encoder make the features. In
every stage it may be sparse, by :mod:`skiparse.models.retrofit`: its weights stay what they are.
Of the models of that family it is those that get text alone, and time by the sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from skiparse.models import flow
from skiparse.models.data.features import Batch
from skiparse.models.image_wan import ImageWan, ImageWanPipeline, kind_of
from skiparse.models.images import of_other_images
from skiparse.models.retrofit import Retrofit, Sparsity, retrofit, schedule
from skiparse.models.train.checkpoint import Checkpoint
from skiparse.models.train.config import HOW, Config, Stage
from skiparse.models.train.export import check_encoders, model_of
from skiparse.models.train.recipe import Recipe
from skiparse.models.wan.encoders import Encoders, padded

CHECKPOINTS = ("none", "block")


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """What of a model is sparse in a stage; see :func:`~skiparse.models.retrofit.retrofit`.

    Args:
        pattern: 2d deals out rows and columns of every frame, 1d the tokens.
        ratio: p in 2d, for p * p sub-sequences; k in 1d, for k.
        dense: layers that stay dense at the beginning and at the end; null for a tenth each.
        kinds: instead of dense, of every layer: dense, single or group.
    """

    pattern: Literal["2d", "1d"] = "2d"
    ratio: int = 2
    dense: tuple[int, int] | None = None
    kinds: tuple[Literal["dense", "single", "group"], ...] | None = None

    def __post_init__(self) -> None:
        if self.kinds is not None and self.dense is not None:
            raise ValueError(f"sparsity: give kinds or dense={self.dense}, not both")
        Sparsity(self.pattern, self.ratio, self.kinds or ())

    def of(self, layers: int) -> Sparsity:
        """The same, of a model with that many layers; ValueError if it cannot be."""
        kinds = schedule(layers, self.dense) if self.kinds is None else self.kinds
        if len(kinds) != layers:
            raise ValueError(f"kinds has {len(kinds)} layers, but the model has {layers}")
        return Sparsity(self.pattern, self.ratio, kinds)


@dataclass(frozen=True, kw_only=True)
class WanStage(Stage):
    """A part of a run with one kind of data, one sparsity and one schedule.

    Args:
        sparsity: what tokens attend to; null for what ``init`` says, which may be dense.
        checkpointing: what is computed again in the backward pass: none or block.
    """

    sparsity: Sparse | None = None
    checkpointing: str = field(default="none", metadata=HOW)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpointing not in CHECKPOINTS:
            raise ValueError(
                f"checkpointing must be one of {', '.join(CHECKPOINTS)}, got {self.checkpointing!r}"
            )


@dataclass(frozen=True, kw_only=True)
class WanConfig(Config):
    """A training run of a Wan.

    Args:
        init: folder of a WanPipeline: the weights to start from, and what codes clips and captions.
    """

    recipe: Literal["wan"] = field(default="wan", metadata=HOW)
    stages: dict[str, WanStage]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init is None:
            raise ValueError("init is needed: give the folder of a WanPipeline to start from")


class WanRecipe(Recipe):
    """The recipe of Wan's denoiser, dense or sparse."""

    config = WanConfig
    blocks = ("WanTransformerBlock",)
    adapted = ("to_q", "to_k", "to_v", "to_out.0")

    def check(self, config: WanConfig, coder: Any) -> None:
        """Whether the model is one that is trained here, and fits its encoders."""
        model = _config(config)
        if model.get("image_dim") is not None or model["in_channels"] != model["out_channels"]:
            raise ValueError(
                f"init={config.init}: its transformer takes images too; the models that are "
                "trained here get text alone"
            )
        asked = None if config.images is None else config.images.paradigm
        if model.get("images") not in (None, asked):
            raise ValueError(f"init={config.init}: {of_other_images(model['images'], asked)}")
        for name, stage in config.stages.items():
            try:
                _sparsity(config, stage)
            except ValueError as error:
                raise ValueError(f"stages.{name}.sparsity: {error}") from error
        if coder is None:
            return
        pipeline = coder.pipeline
        if pipeline.config.expand_timesteps or pipeline.config.boundary_ratio is not None:
            raise ValueError(
                f"init={config.init}: it has time by the token, or two transformers; the models "
                "that are trained here have one, with time by the sample"
            )
        for key, width, what in (
            ("in_channels", pipeline.vae.config.z_dim, "autoencoder"),
            ("text_dim", coder.null["states"].shape[1], "text encoder"),
        ):
            if model[key] != width:
                raise ValueError(
                    f"init={config.init}: the model has {key}={model[key]}, but the {what} has "
                    f"{width}; give a pipeline whose parts belong together"
                )
        if config.samples.every:
            _check_shape(config.samples.shape, pipeline, model["patch_size"])

    def initial(self, config: WanConfig, stage: WanStage) -> Any:
        """As ``config.init`` has it, in float32."""
        assert config.init is not None
        model = self.pretrained(config.init)
        if config.images is not None:
            model = self.told_of_images(model, config.images.paradigm, config.seed)
        return model

    takes_images = True

    def told_of_images(self, model: Any, paradigm: str, seed: int) -> ImageWan:
        """Of the same parts."""
        if not isinstance(model, ImageWan):
            return ImageWan.of(model, paradigm, seed=seed)
        if model.config.images != paradigm:
            raise ValueError(of_other_images(model.config.images, paradigm))
        return model

    def pretrained(self, init: str) -> Any:
        """As the folder has it, dense whatever its config says."""
        folder = _transformer(init)
        kind = kind_of(WanTransformer3DModel.load_config(folder, local_files_only=True))
        return kind.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)

    def remade(self, config: WanConfig, about: Mapping[str, Any]) -> Any:
        """All of it is trained, so it has any weights."""
        return kind_of(about)(**_parted(about)[0])

    def about(self, model: Any) -> dict[str, Any]:
        """Its config; that all layers are dense is not said, as of any model."""
        found = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in model.config.items()
            if not name.startswith("_")
        }
        told = _parted(found)[1]
        if told is not None and set(told.kinds) == {"dense"}:
            del found["skiparse"]
        return found

    def prepare(self, model: Any, config: WanConfig, stage: WanStage) -> None:
        """What is sparse, and what is computed again in the backward pass."""
        wanted, made = _sparsity(config, stage), Retrofit.found(model)
        if made is not None and made.sparsity != wanted:
            made.undo()
        if wanted is not None and (made is None or made.sparsity != wanted):
            retrofit(model, wanted)
        if model.training and stage.checkpointing == "block":  # of which the average does none
            model.enable_gradient_checkpointing()
        else:
            model.disable_gradient_checkpointing()

    shares = True

    def share(self, model: Any, group: Any) -> None:
        """By a retrofit, of which a dense model gets one with dense layers alone."""
        made = Retrofit.found(model)
        if made is not None and made.shared:
            sparsity = made.sparsity
            made.undo()
            made = retrofit(model, sparsity)
        if group is None:
            return
        if made is None:
            made = retrofit(model, kinds=("dense",) * model.config.num_layers)
        made.share(group)

    def compiled(self, model: Any) -> None:
        """Block by block."""
        model.compile_repeated_blocks()

    def coder(self, config: WanConfig, device: torch.device) -> Encoders:
        """Its VAE and UMT5."""
        assert config.init is not None
        last = config.images is not None and config.images.needs_last
        return Encoders.from_pretrained(config.init, device, last=last)

    def shift(self, shape: tuple[int, ...]) -> float:
        """By height and width, as OSP-Next trains it."""
        return flow.dynamic_shift(*shape[-2:])

    def velocity(self, net: nn.Module, noisy: Tensor, levels: Tensor, batch: Batch) -> Tensor:
        """Wan's forward; text is padded by zeros, to which it attends."""
        states = padded(batch.captions["states"])
        told = {} if batch.images is None else {"images": batch.images}
        found: Tensor = net(noisy, flow.timesteps(levels), states, return_dict=False, **told)[0]
        return found

    def pipeline(self, model: Any, coder: Encoders) -> WanPipeline:
        """With the encoders it is trained with, and the pipeline's own scheduler."""
        return _around(coder, model)

    def exported(self, last: Checkpoint, weights: str, **given: Any) -> WanPipeline:
        """The pipeline in the folder ``vae``, with the run's transformer."""
        folder = given["vae"]
        if folder is None or given["text"] is not None:
            raise ValueError(
                f"{last.path} is of a Wan; give as vae the folder of the WanPipeline that it was "
                "trained from, which has the text encoder too, and no text"
            )
        encoders = Encoders.from_pretrained(folder)
        if not given["other_encoders"]:
            found = encoders.fingerprints()
            check_encoders(last, found, dict.fromkeys(found, folder))
        about, sparsity = _parted(last.about["model"])
        model = model_of(last, kind_of(about), about, weights, given["init"])
        if sparsity is not None:
            retrofit(model, sparsity)
        return _around(encoders, model)

    def sparsity(self, about: Mapping[str, Any]) -> Sparsity | None:
        """As its config says."""
        return _parted(about)[1]


def _around(coder: Encoders, model: Any) -> WanPipeline:
    """The pipeline of a model, with its encoders and the scheduler that they came with."""
    kind = ImageWanPipeline if isinstance(model, ImageWan) else WanPipeline
    return kind(**coder.pipeline.components | {"transformer": model})


def _sparsity(config: WanConfig, stage: WanStage) -> Sparsity | None:
    """What is sparse in a stage: as it says, or as the model in ``config.init`` does."""
    about, own = _parted(_config(config))
    return own if stage.sparsity is None else stage.sparsity.of(about["num_layers"])


def _parted(about: Mapping[str, Any]) -> tuple[dict[str, Any], Sparsity | None]:
    """The config of a model without what it says of its sparsity, and that."""
    rest = {name: value for name, value in about.items() if name != "skiparse"}
    told = about.get("skiparse")
    return rest, None if told is None else Sparsity.of(dict(told))


def _config(config: WanConfig) -> dict[str, Any]:
    """That of the model in ``config.init``."""
    assert config.init is not None
    found = WanTransformer3DModel.load_config(_transformer(config.init), local_files_only=True)
    return dict(found)


def _transformer(init: str) -> Path:
    """The folder of the model in ``init``.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(init) / "transformer"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"init={init} holds no Wan: transformer/config.json is not there; give the "
            "folder of a WanPipeline"
        )
    return folder


def _check_shape(shape: tuple[int, int, int], pipeline: Any, patch: tuple[int, int, int]) -> None:
    """ValueError unless videos of that many frames, rows and columns of pixels can be made."""
    frames, *sides = shape
    every, side = pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial * patch[1]
    if (frames - 1) % every:
        raise ValueError(f"samples.shape must have {every}n + 1 frames, got {frames}")
    if any(length % side for length in sides):
        raise ValueError(f"samples.shape must have sides that are multiples of {side}, got {sides}")
