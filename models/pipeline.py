"""From a prompt to frames: noise, steps along the model's velocity, and the VAE's decoder."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import get_module_execution_device, randn_tensor
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

import skiparse
from skiparse.models import flow, sizes
from skiparse.models.data.atomic import read_table, write_json
from skiparse.models.images import KnownFrames, Pictures
from skiparse.models.scheduler import FlowScheduler, check_scheduler
from skiparse.models.strict import write_import
from skiparse.models.suv.model import SUV
from skiparse.models.text import PARTS, TEXT_LENGTH, TextEmbeddings, TextEncoders, check_encoder
from skiparse.models.wfvae.model import WFVAE

TEMPLATE = "high quality, {prompt}"

# Of our own wording, and shorter than the release's.
NEGATIVE_PROMPT = (
    "low quality, low resolution, blurry, noisy, compression artifacts, flicker, watermark, logo, "
    "caption, frame, badly cropped, out of focus, deformed body, extra limbs, wrong proportions, "
    "duplicate, sketch, monochrome, overexposed, underexposed, ugly"
)

# What diffusers' from_pretrained takes that has an effect on a folder; others it would ignore.
LOADING = frozenset(
    {
        "custom_pipeline",
        "device_map",
        "disable_mmap",
        "dtype",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_folder",
        "offload_state_dict",
        "quantization_config",
        "torch_dtype",
        "trust_remote_code",
        "use_flashpack",
        "use_safetensors",
        "variant",
    }
)

OUTPUT_TYPES = ("np", "pil", "pt", "uint8", "latent")

Callback = Callable[["SUVPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]

logger = logging.getLogger(__name__)


@dataclass
class SUVPipelineOutput(BaseOutput):  # type: ignore[misc]  # diffusers' classes are untyped
    """What :class:`SUVPipeline` returns."""

    frames: Any  # B videos: see output_type


class SUVPipeline(DiffusionPipeline, CogVideoXLoraLoaderMixin):  # type: ignore[misc]  # untyped
    """Text, or text and images, to video with a :class:`SUV`; a picture is a video of one frame.

    Every component may be None, and may be set at any time; what a call needs and does not find it
    names, before any work.

    ``vae`` is a :class:`WFVAE`, or any diffusers model with ``decode(latents).sample`` (``[B, C, t,
    h, w]`` to ``[B, 3, T, height, width]`` in [-1, 1]) and the attributes ``spatial_factor`` and
    ``temporal_factor``, 8 each for the released one, where ``T = temporal_factor * (t - 1) + 1``.
    If it has ``denormalize(latents)``, its latents are stored normalised and pass through that
    first; if it has ``decode_stream``, it decodes a latent at a time. For
    ``enable_model_cpu_offload`` its ``decode`` needs diffusers' ``apply_forward_hook``.

    Adapters are loaded, weighed and fused by diffusers' methods (``load_lora_weights``,
    ``set_adapters``, ``fuse_lora``); they are those of ``transformer``.

    Args:
        transformer: the denoiser.
        vae: see above.
        tokenizer, text_encoder: T5's; None if prompts come encoded.
        tokenizer_2, text_encoder_2: CLIP's.
        scheduler: any flow-matching scheduler of diffusers; None for a
            :class:`~skiparse.models.scheduler.FlowScheduler`.

    Attributes:
        text: the :class:`~skiparse.models.text.TextEncoders` of the four, with what they encoded.

    Source: Open-Sora Plan v1.5 report and release.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar[list[str]] = [
        "transformer",
        "vae",
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
        "scheduler",
    ]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "velocity",
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ]

    def __init__(
        self,
        transformer: SUV | None = None,
        vae: WFVAE | ModelMixin | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: T5EncoderModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        scheduler: SchedulerMixin | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
            scheduler=FlowScheduler() if scheduler is None else scheduler,
        )
        self.text = TextEncoders(tokenizer, text_encoder, tokenizer_2, text_encoder_2)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in PARTS and "text" in self.__dict__:  # so it uses and holds what is here, no more
            self.text.take(*(getattr(self, part) for part in PARTS))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> SUVPipeline:
        """Load every component from a folder that :meth:`save_pretrained` wrote; no download.

        Args:
            pretrained_model_name_or_path: the folder.
            kwargs: as for any diffusers pipeline: ``dtype``, one for all or a dict of them by
                component, ``variant``, ``device_map``, ``quantization_config``, and components to
                use instead, or None. All weights must be there.

        Raises:
            FileNotFoundError: if it is not such a folder.
            ValueError: if weights are missing, or for arguments that nothing takes.
        """
        folder = Path(pretrained_model_name_or_path)
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} is not there; give a folder with a saved pipeline")
        unknown = sorted(kwargs.keys() - LOADING - set(cls._optional_components))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: nothing that loading a folder takes; give components by "
                f"name, or of {', '.join(sorted(LOADING))}"
            )
        saved = json.loads(index.read_text(encoding="utf-8"))
        for name in ("text_encoder", "text_encoder_2"):
            library, kind = saved.get(name) or ("", "")
            variant = kwargs.get("variant")
            there = variant is None or any((folder / name).glob(f"*.{variant}*"))
            if library == "transformers" and name not in kwargs and there:  # else diffusers says it
                check_encoder(getattr(transformers, kind), folder / name, variant)
        return super().from_pretrained(folder, **{**kwargs, "local_files_only": True})

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """As of any diffusers pipeline; the class without the file that a folder names with it."""
        found = super().load_config(*arguments, **options)
        config = found[0] if isinstance(found, tuple) else found
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return found

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As of any diffusers pipeline; beside it ``pipeline.py``, which imports this class.

        ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` makes one of the
        folder too. Weights of text encoders that are missing it does not refuse, as
        :meth:`from_pretrained` does.
        """
        super().save_pretrained(save_directory, **kwargs)
        write_import(save_directory, "pipeline", SUVPipeline)
        index = Path(save_directory) / self.config_name
        write_json(index, read_table(index) | {"_class_name": ["pipeline", SUVPipeline.__name__]})

    def free_text_encoders(self) -> None:
        """Let go of both text encoders; prompts encoded before, by ``text.encode``, still work."""
        self.text_encoder = self.text_encoder_2 = None
        self.maybe_free_model_hooks()  # offloading holds on to models until its hooks are renewed

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | dict[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """An adapter of the transformer, from a folder, a file or a dict of tensors.

        Args:
            pretrained_model_name_or_path_or_dict: what :meth:`save_lora_weights` wrote; tensors
                are named ``transformer.MODULE.lora_A.weight``.
            adapter_name: what to call it.
            hotswap: put it in the place of the one of that name.
            kwargs: as for any diffusers pipeline.

        Raises:
            ValueError: if it has tensors for layers that there are not, where diffusers would go
                on without them, or for no layer at all.
        """
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, dict):
            pickled = str(source).endswith((".bin", ".pt", ".pth"))  # read as tensors alone
            kwargs = {"local_files_only": True, "use_safetensors": not pickled} | kwargs
        found = self.lora_state_dict(source, **kwargs)
        layers = {f"transformer.{name}" for name, _ in self.transformer.named_modules()}
        unknown = sorted(
            {
                key
                for key in found
                if key.partition(".lora_")[0] not in layers or ".lora_" not in key
            }
        )
        if unknown or not found:
            raise ValueError(
                f"the adapter has tensors for no layer of this transformer: {unknown[:10]}"
                if found
                else "the adapter has no tensors"
            )
        super().load_lora_weights(source, adapter_name, hotswap, **kwargs)

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """The latents ``(C, t, h, w)`` of a video of that size in pixels and frames.

        Raises:
            ValueError: if the models cannot take it, with the nearest sizes that they can; or if
                the latents of the one are not those of the other.
        """
        config = self._model("transformer").config
        channels = config.in_channels
        decoded = channels if self.vae is None else _latent_channels(self.vae, channels)
        if decoded != channels:
            raise ValueError(
                f"the transformer makes latents of {channels} channels and the vae decodes "
                f"{decoded}; give the vae it was trained with"
            )
        space, time = _factors(self.vae)
        _, *patch = config.patch_size
        rows, columns = (space * side for side in patch)
        sizes.check(height, width, num_frames, rows=rows, columns=columns, time=time)
        return channels, (num_frames - 1) // time + 1, height // space, width // space

    @property
    def guidance_scale(self) -> float:
        """Of the call; a callback may set ``_guidance_scale`` for the steps to come."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step has guidance: with a scale above 1."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many times the model is called, or twice that many with guidance."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """1000 times the noise level of now; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the steps to come are left out; a callback sets ``_interrupt`` for it."""
        return self._interrupt

    @property
    def attention_kwargs(self) -> Mapping[str, Any] | None:
        """Of the call."""
        return self._attention_kwargs

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        *,
        prompt_embeds: TextEmbeddings | Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: TextEmbeddings | Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        template: str = TEMPLATE,
        clean_caption: bool = True,
        max_sequence_length: int = TEXT_LENGTH,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, ...]:
        """What a call makes of its prompts, to be given to it instead of them.

        Arguments are those of the call, and what is encoded already stays as it is.

        Args:
            device, dtype: of the result; those of the transformer by default.

        Returns:
            ``prompt_embeds [B, L, D]``, ``pooled_prompt_embeds [B, P]``, ``prompt_attention_mask
            [B, L]``, and the same of the negative prompt, or None without guidance.

        Raises:
            ValueError: as of the call.
        """
        positive, negative = self._encoded(
            _given("prompt", prompt, prompt_embeds, pooled_prompt_embeds, prompt_attention_mask),
            _given(
                "negative_prompt",
                negative_prompt,
                negative_prompt_embeds,
                negative_pooled_prompt_embeds,
                negative_prompt_attention_mask,
            ),
            do_classifier_free_guidance,
            num_videos_per_prompt,
            {"clean_caption": clean_caption, "max_sequence_length": max_sequence_length},
            template,
        )
        place = self._execution_device if device is None else device
        kind = positive.text.dtype if self.transformer is None else self.transformer.dtype
        kind = kind if dtype is None else dtype
        positive = positive.to(place, kind)
        prompt_embeds, pooled_prompt_embeds = positive.text, positive.pooled
        prompt_attention_mask = positive.text_mask
        negative_prompt_embeds = negative_pooled_prompt_embeds = None
        negative_prompt_attention_mask = None
        if negative is not None:
            negative = negative.to(place, kind)
            negative_prompt_embeds = negative.text
            negative_pooled_prompt_embeds = negative.pooled
            negative_prompt_attention_mask = negative.text_mask
        return (
            prompt_embeds,
            pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            negative_prompt_attention_mask,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 576,
        width: int = 1024,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        *,
        image: Any = None,
        last_image: Any = None,
        guidance_rescale: float = 0.7,
        shift: float | None = None,
        schedule: flow.Schedule | None = None,
        template: str = TEMPLATE,
        clean_caption: bool = True,
        max_sequence_length: int = TEXT_LENGTH,
        prompt_embeds: TextEmbeddings | Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: TextEmbeddings | Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        sequential_cfg: bool = False,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        backend: str = "auto",
        callback_on_step_end: Callback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Sample videos for each prompt.

        Latents stay in fp32 from step to step; the models run in their own dtypes.

        Args:
            prompt: one or several, B in all; or give ``prompt_embeds``.
            negative_prompt: what to stay away from: one for all or one each, instead of
                ``NEGATIVE_PROMPT``; ``""`` is what training knew as "no prompt". Without guidance
                it has no effect, and the log says so.
            height, width: in pixels, multiples of VAE factor times patch: 16.
            num_frames: 8n + 1, with the VAE's temporal factor of 8.
            num_inference_steps: of the scheduler.
            guidance_scale: how much to follow the prompt; at 1 and below there is no negative
                prompt and every step costs half.
            num_videos_per_prompt: n, so ``B * n`` videos in all.
            generator: for the noise, one or a list of ``B * n``.
            latents: fp32 noise ``[B * n, C, t, h, w]`` in place of drawn noise.
            image: the first frame, for a transformer that is told of images: a PIL image or uint8
                ``[height, width, 3]`` of just that size, or a list of one for each prompt. None
                for text alone.
            last_image: likewise the last frame, beside the first.
            guidance_rescale: in [0, 1], more against over-saturated colours.
            shift, schedule: instead of those of our scheduler; another one has its own settings.
            template, clean_caption: of ``text.encode``, for ``prompt``; the negative prompt is
                taken without a template.
            max_sequence_length: tokens of T5 that a prompt is cut to, and encoded with padding to.
            prompt_embeds, negative_prompt_embeds: encoded prompts in place of prompts: what
                ``text.encode`` gives, or ``[B, L, D]`` with the two that follow.
            pooled_prompt_embeds, negative_pooled_prompt_embeds: ``[B, P]``.
            prompt_attention_mask, negative_prompt_attention_mask: ``[B, L]``, True or 1 where
                there is text; all of it if None.
            sequential_cfg: run the negative and the positive prompt one after the other: less
                memory, a little slower.
            output_type: of each video, "np": fp32 ``[T, height, width, 3]`` in [0, 1]; "pt": the
                same as a tensor ``[T, 3, height, width]``; "pil": a list of T images; "uint8": a
                tensor ``[T, height, width, 3]``; "latent": fp32 latents, normalised.
            return_dict: else a tuple.
            attention_kwargs: ``{"scale": s}`` weighs the adapters.
            backend: of the transformer's attention.
            callback_on_step_end: called with the pipeline, the step from 0, the timestep, and a
                dict of the tensors asked for; what the dict it returns has of them, but the
                velocity, replaces them.
            callback_on_step_end_tensor_inputs: of "latents", "velocity" (after guidance) and the
                encoded prompts.

        Returns:
            a :class:`SUVPipelineOutput`, or a tuple of its frames.

        Raises:
            ValueError: for arguments that make no sense, before any work.
            FloatingPointError: if text, latents or frames are not finite, with the step. Nothing
                is returned then.
        """
        transformer = self._model("transformer")
        if attention_kwargs and not getattr(transformer, "peft_config", None):
            raise ValueError(
                f"attention_kwargs={dict(attention_kwargs)} weighs adapters, and there are none; "
                "load one by load_lora_weights, or leave it out"
            )
        shape = self.latent_shape(height, width, num_frames)
        self._set_timesteps(num_inference_steps, shift, schedule)
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._current_timestep = None
        self._interrupt = False
        guided = self.do_classifier_free_guidance
        if guidance_scale != guidance_scale:
            raise ValueError(f"guidance_scale must be a number, got {guidance_scale}")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
            )
        if output_type != "latent":
            self._model("vae")
        if sequential_cfg and _has_one_state(transformer):
            raise ValueError(
                "sequential_cfg=True calls the transformer for two prompts in turn, which its "
                "cache of attention would mix up; leave it out, or transformer.disable_cache()"
            )
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; choose from "
                f"{self._callback_tensor_inputs}"
            )
        positive = _given(
            "prompt", prompt, prompt_embeds, pooled_prompt_embeds, prompt_attention_mask
        )
        negative = _given(
            "negative_prompt",
            negative_prompt,
            negative_prompt_embeds,
            negative_pooled_prompt_embeds,
            negative_prompt_attention_mask,
        )
        batch = self._check_counts(positive, negative, num_videos_per_prompt)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"give one generator, or a list with one for each of {batch} videos, got a list "
                f"of {len(generator)}"
            )
        if latents is not None and latents.shape != (batch, *shape):
            raise ValueError(
                f"latents must be {[batch, *shape]} for {batch} videos, got {list(latents.shape)}"
            )

        pictures = None
        if image is not None or last_image is not None:
            self._check_images(transformer)
            pictures = Pictures.of(
                image, last_image, height=height, width=width, frames=num_frames, videos=batch
            )

        device, dtype = self._execution_device, transformer.dtype
        if hasattr(transformer, "_reset_stateful_cache"):
            transformer._reset_stateful_cache()  # a run that failed may have left something
        encoding = {"clean_caption": clean_caption, "max_sequence_length": max_sequence_length}
        text, negative_text = self._encoded(
            positive, negative, guided, num_videos_per_prompt, encoding, template
        )
        branches = {"cond": text.to(device, dtype)}
        if negative_text is not None:
            branches["uncond"] = negative_text.to(device, dtype)
        for branch in branches.values():
            _check_finite(branch.text, "the text embeddings are not finite")
            _check_finite(branch.pooled, "the pooled text embeddings are not finite")

        shown = None if pictures is None else pictures.known(self.vae, shape[1]).to(device)
        if latents is None:
            latents = randn_tensor(
                (batch, *shape), generator=generator, device=device, dtype=torch.float32
            )
        latents = latents.to(device, torch.float32)

        timesteps = self.scheduler.timesteps.to(device)
        self._num_timesteps = len(timesteps)
        options = _step_options(self.scheduler, generator)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                # images shift them in fp32
                noisy = latents.to(dtype) if shown is None else latents
                velocity = self._velocity(noisy, timestep, branches, sequential_cfg, backend, shown)
                if self.do_classifier_free_guidance:
                    velocity = flow.guide(
                        *velocity.chunk(2), scale=self._guidance_scale, rescale=guidance_rescale
                    )
                latents = self.scheduler.step(
                    velocity.float(), timestep, latents, return_dict=False, **options
                )[0].float()
                if callback_on_step_end is not None:
                    known = {"latents": latents, "velocity": velocity, **_tensors(branches)}
                    asked = {
                        name: known[name]
                        for name in callback_on_step_end_tensor_inputs
                        if name in known
                    }
                    changed = callback_on_step_end(self, step, timestep, asked)
                    latents = changed.get("latents", latents).float()
                    branches = _replaced(branches, changed)
                _check_finite(
                    latents,
                    f"the latents are not finite after step {step + 1} of {len(timesteps)} "
                    f"(sigma {timestep / 1000:.4f}, {dtype})",
                )
                if (step + 1) % self.scheduler.order == 0 or step + 1 == len(timesteps):
                    bar.update()
        self._current_timestep = None
        frames = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return SUVPipelineOutput(frames=frames) if return_dict else (frames,)

    def set_attention_slice(self, slice_size: str | int | None) -> None:
        """What enabling and disabling slices call: attention in parts, which none of ours needs.

        Raises:
            ValueError: unless it is None, for the whole.
        """
        if slice_size is not None:
            raise ValueError(
                f"attention in slices of {slice_size!r} is nothing that SUV has: its attention "
                "never holds its scores; leave it out"
            )

    def set_use_memory_efficient_attention_xformers(self, valid: bool, *_: Any, **__: Any) -> None:
        """What enabling and disabling that call; ``backend=`` of a call is our way.

        Raises:
            ValueError: unless it is to be disabled, with what to do.
        """
        if valid:
            raise ValueError(
                "SUV has no attention of diffusers' that xformers could compute; pass backend= to "
                f"the call, 'auto' or one of {list(skiparse.list_backends())}"
            )

    @torch.no_grad()
    def frames_of(self, latents: Tensor) -> Iterator[Tensor]:
        """One video, in pieces as they are decoded, for a writer that keeps none of them.

        Args:
            latents: normalised, ``[C, t, h, w]``, as a call gives them for "latent".

        Yields:
            uint8 ``[n, height, width, 3]`` on the CPU.

        Raises:
            FloatingPointError: if frames are not finite.
        """
        yield from self._levels(latents)
        self.maybe_free_model_hooks()  # or an offloaded VAE would stay where it was brought

    def _model(self, name: str) -> Any:
        """A component; ValueError if it is None."""
        found = getattr(self, name)
        if found is None:
            raise ValueError(f"this pipeline has no {name}; set pipe.{name} before the call")
        return found

    def _check_images(self, transformer: Any) -> None:
        """ValueError unless this pipeline can be told of images."""
        if transformer.config.get("images") is None:
            raise ValueError(
                "image: this transformer is told of text alone; train it with images, or leave "
                "image out"
            )
        if not hasattr(self._model("vae"), "encode"):
            raise ValueError(
                f"image: the vae, a {type(self.vae).__name__}, has no encode; give one that has"
            )

    def _set_timesteps(
        self, steps: int, shift: float | None, schedule: flow.Schedule | None
    ) -> None:
        scheduler = self._model("scheduler")
        check_scheduler(scheduler)
        device = self._execution_device
        if isinstance(scheduler, FlowScheduler):
            scheduler.set_timesteps(steps, device, shift=shift, schedule=schedule)
            return
        for name, value in (("shift", shift), ("schedule", schedule)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} is a setting of our own scheduler; set that of "
                    f"{type(scheduler).__name__} by its config, and leave it out here"
                )
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        scheduler.set_timesteps(steps, device=device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)

    def _check_counts(self, positive: Any, negative: Any, videos: int) -> int:
        """ValueError unless prompts are as many as they should be; else the number of videos."""
        if positive is None:
            raise ValueError("give either prompt or prompt_embeds")
        if not isinstance(videos, int) or videos < 1:
            raise ValueError(f"num_videos_per_prompt must be an int >= 1, got {videos!r}")
        prompts = _count(positive)
        negatives = 1 if negative is None else _count(negative)
        if negatives not in (1, prompts):
            raise ValueError(
                f"give one negative prompt or one for each of {prompts} prompts, got {negatives}"
            )
        return prompts * videos

    def _encoded(
        self,
        positive: Any,
        negative: Any,
        guided: bool,
        videos: int,
        encoding: dict[str, Any],
        template: str,
    ) -> tuple[TextEmbeddings, TextEmbeddings | None]:
        """Both texts for each video; prompts that are no embeddings yet are encoded."""
        prompts = self._check_counts(positive, negative, videos) // videos
        if not isinstance(positive, TextEmbeddings):
            positive = self.text.encode(positive, template=template, **encoding)
        if not guided:
            if negative is not None:
                logger.warning(
                    "without guidance (guidance_scale <= 1) a negative prompt does nothing"
                )
            return positive.repeated(videos), None
        if not isinstance(negative, TextEmbeddings):
            negative = self.text.encode(
                NEGATIVE_PROMPT if negative is None else negative, **encoding
            )
        negative = TextEmbeddings.cat([negative] * (prompts // len(negative)))
        return positive.repeated(videos), negative.repeated(videos)

    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        branches: dict[str, TextEmbeddings],
        sequential: bool,
        backend: str,
        shown: KnownFrames | None,
    ) -> Tensor:
        """The model's velocity: of the prompt, or with guidance of the negative one and of it."""
        if not self.do_classifier_free_guidance:
            calls = {"cond": branches["cond"]}
        elif "uncond" not in branches:
            raise ValueError(
                f"a callback set guidance_scale={self._guidance_scale}, but the call began without "
                "guidance and has no negative prompt; begin above 1"
            )
        elif sequential:
            calls = {name: branches[name] for name in ("uncond", "cond")}
        else:
            both = TextEmbeddings.cat([branches["uncond"], branches["cond"]])
            calls = {"cond_uncond": both}
        found = []
        for name, text in calls.items():
            copies = len(text) // len(latents)
            images = {} if shown is None else {"images": shown.repeated(copies)}
            context = getattr(self.transformer, "cache_context", nullcontext)
            with context(name):
                found.append(
                    self.transformer(
                        latents.repeat(copies, 1, 1, 1, 1),
                        timestep.expand(len(text)),
                        text.text,
                        text.pooled,
                        text_mask=text.text_mask,
                        backend=backend,
                        attention_kwargs=self._attention_kwargs,
                        return_dict=False,
                        **images,
                    )[0]
                )
        return torch.cat(found)

    def _pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """Of latents ``[C, t, h, w]``: fp32 ``[3, n, height, width]`` in [0, 1] on the CPU."""
        vae = self._model("vae")
        latents = latents[None].to(get_module_execution_device(vae))
        latents = _denormalized(vae, latents).to(vae.dtype)
        if isinstance(vae, WFVAE) and vae.use_tiling:
            videos = iter([vae.decode(latents, chunk_latents=1).sample])
        elif hasattr(vae, "decode_stream"):
            videos = vae.decode_stream(latents.split(1, 2))
        else:
            videos = iter([vae.decode(latents).sample])
        for video in videos:
            _check_finite(video, f"the VAE gave frames that are not finite ({vae.dtype})")
            yield video[0].float().add(1).div(2).clamp(0, 1).cpu()

    def _levels(self, latents: Tensor) -> Iterator[Tensor]:
        for piece in self._pieces(latents):
            yield piece.mul(255).round().to(torch.uint8).movedim(0, -1).contiguous()

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        """Frames, one video after the other, a latent at a time."""
        if output_type in ("uint8", "pil"):
            videos = [torch.cat(list(self._levels(latent))) for latent in latents]
            if output_type == "uint8":
                return torch.stack(videos)
            return [VaeImageProcessor.numpy_to_pil(v.numpy() / np.float32(255)) for v in videos]
        pixels = torch.stack([torch.cat(list(self._pieces(latent)), 1) for latent in latents])
        return pixels.movedim(1, 2) if output_type == "pt" else pixels.movedim(1, -1).numpy()


def _given(
    name: str, prompt: Any, embeds: Any, pooled: Tensor | None, mask: Tensor | None
) -> str | Sequence[str] | TextEmbeddings | None:
    """The one of a prompt and its embeddings that there is; ValueError if they do not fit."""
    if prompt is not None and embeds is not None:
        raise ValueError(f"give either {name} or {name}_embeds, not both")
    if not isinstance(embeds, Tensor):
        if pooled is not None or mask is not None:
            raise ValueError(
                f"the pooled embeddings and the mask of {name} go with tensors [B, L, D] in "
                f"{name}_embeds; leave them out"
            )
        return prompt if embeds is None else embeds
    if pooled is None:
        raise ValueError(f"{name}_embeds of tensors need their pooled ones [B, P] too")
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
    if embeds.ndim != 3 or pooled.ndim != 2 or len(pooled) != len(embeds):
        raise ValueError(
            f"{name}_embeds must be [B, L, D] and the pooled ones [B, P], got "
            f"{list(embeds.shape)} and {list(pooled.shape)}"
        )
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"the mask of {name}_embeds must be {list(embeds.shape[:2])}, got {list(mask.shape)}"
        )
    mask = skiparse.key_mask(mask, f"mask of {name}_embeds")
    return TextEmbeddings(embeds, mask.to(embeds.device), pooled)


def _tensors(branches: dict[str, TextEmbeddings]) -> dict[str, Tensor]:
    """What a callback may see and replace of the encoded prompts."""
    found = {}
    for branch, prefix in (("cond", ""), ("uncond", "negative_")):
        if branch in branches:
            found[f"{prefix}prompt_embeds"] = branches[branch].text
            found[f"{prefix}pooled_prompt_embeds"] = branches[branch].pooled
    return found


def _replaced(
    branches: dict[str, TextEmbeddings], changed: Mapping[str, Tensor]
) -> dict[str, TextEmbeddings]:
    """The encoded prompts after a callback, which may change their numbers, not their shapes."""
    for name, before in _tensors(branches).items():
        if name in changed and changed[name].shape != before.shape:
            raise ValueError(
                f"a callback gave {name} of {list(changed[name].shape)}; it must stay "
                f"{list(before.shape)}"
            )
    after = _tensors(branches) | dict(changed)
    return {
        branch: replace(
            text, text=after[f"{p}prompt_embeds"], pooled=after[f"{p}pooled_prompt_embeds"]
        )
        for branch, text in branches.items()
        for p in ["" if branch == "cond" else "negative_"]
    }


def _step_options(scheduler: Any, generator: Any) -> dict[str, Any]:
    """A scheduler that draws noise draws it from our generator."""
    return (
        {"generator": generator}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )


def _has_one_state(transformer: Any) -> bool:
    """Whether a cache is on that does not tell calls of one step apart."""
    return type(getattr(transformer, "_cache_config", None)).__name__.startswith("PyramidAttention")


def _factors(vae: Any) -> tuple[int, int]:
    """Pixels and frames to a latent, of any VAE; without one those of WF-VAE."""
    if vae is None or hasattr(vae, "spatial_factor"):
        return getattr(vae, "spatial_factor", 8), getattr(vae, "temporal_factor", 8)
    return vae.config.scale_factor_spatial, vae.config.scale_factor_temporal


def _latent_channels(vae: Any, default: int) -> int:
    return vae.config.get("latent_channels", vae.config.get("z_dim", default))


def _denormalized(vae: Any, latents: Tensor) -> Tensor:
    """Latents as a VAE decodes them, by its own function or by the numbers in its config."""
    if hasattr(vae, "denormalize"):
        return vae.denormalize(latents)
    if vae.config.get("latents_mean") is None:
        return latents
    mean, std = (
        torch.tensor(vae.config[f"latents_{name}"]).to(latents)[:, None, None, None]
        for name in ("mean", "std")
    )
    return latents * std + mean


def _count(texts: Any) -> int:
    """How many prompts there are, encoded or not."""
    return 1 if isinstance(texts, str) else len(texts)


def _check_finite(x: Tensor, message: str) -> None:
    if not torch.isfinite(x).all():
        raise FloatingPointError(message)
