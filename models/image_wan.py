"""A Wan that is told of images too: the model, and its pipeline.

Weights that a text-to-video Wan has keep their names. What is told of images goes in as further
channels of the latents, which the patch embedding tells apart; so a retrofit, LoRA, caches and
compiled blocks find all that they look for.

This file is not in ``wan/``: diffusers writes into the folder of a pipeline that a class is its
own, if the folder of the class is called as one of its pipelines.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    ModelMixin,  # a pipeline looks for it in the module of a model
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from skiparse.models import sizes
from skiparse.models.images import Guide, KnownFrames, Pictures, embedding

_IMAGES = "images"  # in attention_kwargs, by which a WanPipeline passes them on


class GuidedPatches(nn.Conv3d):
    """Wan's patch embedding of latents, and beside it that of the channels that follow them.

    Args:
        own: the embedding of a model of text alone, whose weights it takes.
        beside: embeds further channels; what both give is added.
    """

    def __init__(self, own: nn.Conv3d, beside: nn.Module) -> None:
        size: Any = own.kernel_size
        super().__init__(own.in_channels, own.out_channels, size, stride=size, device="meta")
        self.weight, self.bias = own.weight, own.bias
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C + n, t, h, w]``, or just C channels, to ``[B, width, t', h', w']``."""
        own, more = x.tensor_split([self.in_channels], 1)
        found = super().forward(own)
        return found + self.beside(more) if more.shape[1] else found


class ImageWan(WanTransformer3DModel, ModelMixin):  # type: ignore[misc]  # diffusers' are untyped
    """diffusers' Wan of text, told of known frames besides; see :mod:`skiparse.models.images`.

    Args:
        images: ``"flash"`` or ``"mask"``.
        config: of a ``WanTransformer3DModel``, by name.

    Raises:
        ValueError: for another paradigm, or a config of a model that is told of images already.
    """

    def __init__(self, *, images: str = "flash", **config: Any) -> None:
        super().__init__(**config)
        if self.config.image_dim is not None or self.config.in_channels != self.config.out_channels:
            raise ValueError(
                f"images={images!r}: the config is of a Wan that takes images by itself, with "
                f"image_dim={self.config.image_dim}, in_channels={self.config.in_channels} and "
                f"out_channels={self.config.out_channels}; give one of text alone"
            )
        self.guide = Guide(images, self.config.in_channels)
        own: nn.Conv3d = self.get_submodule("patch_embedding")
        self.patch_embedding = GuidedPatches(own, self._beside(images))
        self.register_to_config(images=images)

    def _beside(self, images: str) -> nn.Module:
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return embedding(images, self.config.in_channels, width, self.config.patch_size)

    @classmethod
    def of(cls, wan: WanTransformer3DModel, images: str, *, seed: int = 0) -> ImageWan:
        """A Wan with new weights for images, which change nothing yet.

        Args:
            wan: of text alone, not retrofitted; its parts become those of the result.
            images: ``"flash"`` or ``"mask"``.
            seed: of the new weights that are not 0.

        Raises:
            ValueError: as the class, or for a model that is retrofitted.
        """
        if hasattr(wan, "_skiparse"):
            raise ValueError(
                "this Wan is retrofitted; undo() that first, and retrofit what comes of it"
            )
        told = inspect.signature(WanTransformer3DModel.__init__).parameters
        config = {name: value for name, value in wan.config.items() if name in told}
        with torch.device("meta"):
            made = cls(images=images, **config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            guide, beside = Guide(images, made.config.in_channels), made._beside(images)
        own = wan.patch_embedding
        for module in (guide, beside):
            module.to(own.weight.device, own.weight.dtype)
        parts = dict(wan.named_children())
        parts |= {"guide": guide, "patch_embedding": GuidedPatches(own, beside)}
        for name, part in parts.items():
            setattr(made, name, part)
        made.scale_shift_table = wan.scale_shift_table
        if wan.config.get("skiparse") is not None:
            made.register_to_config(skiparse=wan.config["skiparse"])
        return made.train(wan.training)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        images: KnownFrames | None = None,
    ) -> Any:
        """As of a Wan.

        Args:
            hidden_states: noisy latents ``[B, C, t, h, w]``, not shifted.
            timestep, encoder_hidden_states, encoder_hidden_states_image, return_dict: as of a Wan.
            attention_kwargs: as of a Wan; it may have ``images`` instead.
            images: frames that are known; None for text alone.

        Raises:
            ValueError: if their shapes do not fit.
        """
        rest = dict(attention_kwargs or {})
        images = rest.pop(_IMAGES, images)
        if images is not None:
            hidden_states = self.guide(hidden_states, images).to(hidden_states.dtype)
        return super().forward(
            hidden_states,
            timestep,
            encoder_hidden_states,
            encoder_hidden_states_image,
            return_dict=return_dict,
            attention_kwargs=rest or None,
        )


# from_pretrained and from_config look there for what a config may have
ImageWan.__init__.__signature__ = inspect.signature(  # type: ignore[attr-defined]  # of functions
    WanTransformer3DModel.__init__
).replace(
    parameters=[
        *inspect.signature(WanTransformer3DModel.__init__).parameters.values(),
        inspect.signature(ImageWan.__init__).parameters["images"],
    ]
)


def kind_of(config: Mapping[str, Any]) -> type[Any]:
    """The class of the Wan that has this config."""
    found: type[Any] = WanTransformer3DModel if config.get("images") is None else ImageWan
    return found


class ImageWanPipeline(WanPipeline):  # type: ignore[misc]  # diffusers' classes are untyped
    """Text and images to video with an :class:`ImageWan`; all else is as of a WanPipeline.

    In half precision a WanPipeline rounds latents before it calls the transformer, which shifts
    them then; FlashI2V's release shifts first.
    """

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Any = None,
        last_image: Any = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        attention_kwargs: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Any:
        """Sample videos for each prompt.

        Args:
            prompt, height, width, num_frames, num_videos_per_prompt, prompt_embeds,
                attention_kwargs, others: as of a WanPipeline.
            image: the first frame: a PIL image or uint8 ``[height, width, 3]`` of just that size,
                or a list of one for each prompt. None for text alone.
            last_image: likewise the last frame, beside the first.

        Raises:
            ValueError: for images that do not fit, before any work.
        """
        told = dict(attention_kwargs or {})
        if image is not None or last_image is not None:
            transformer = self._told_of_images()
            _, rows, columns = transformer.config.patch_size
            space, time = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
            sizes.check(
                height, width, num_frames, rows=space * rows, columns=space * columns, time=time
            )
            if prompt_embeds is not None:
                prompts = len(prompt_embeds)
            else:
                prompts = 1 if prompt is None or isinstance(prompt, str) else len(prompt)
            pictures = Pictures.of(
                image,
                last_image,
                height=height,
                width=width,
                frames=num_frames,
                videos=prompts * num_videos_per_prompt,
            )
            known = pictures.known(self.vae, (num_frames - 1) // time + 1)
            told[_IMAGES] = known.to(self._execution_device)
        return super().__call__(
            prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_videos_per_prompt=num_videos_per_prompt,
            prompt_embeds=prompt_embeds,
            attention_kwargs=told or None,
            **others,
        )

    def _told_of_images(self) -> Any:
        """The transformer; ValueError unless it can be told of images, and is the only one."""
        if not isinstance(self.transformer, ImageWan) or self.transformer_2 is not None:
            raise ValueError(
                "image: the transformer has to be one ImageWan; train one with images, or leave "
                "image out"
            )
        return self.transformer
