"""From a prompt to frames: noise, Euler steps along the model's velocity, and the VAE's decoder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5EncoderModel

from skiparse.models import flow, sizes
from skiparse.models.suv.model import SUV
from skiparse.models.text import TextEmbeddings, TextEncoders, load_encoder
from skiparse.models.wfvae.model import WFVAE

TEMPLATE = "high quality, {prompt}"

# Of our own wording, and shorter than the release's.
NEGATIVE_PROMPT = (
    "low quality, low resolution, blurry, noisy, compression artifacts, flicker, watermark, logo, "
    "caption, frame, badly cropped, out of focus, deformed body, extra limbs, wrong proportions, "
    "duplicate, sketch, monochrome, overexposed, underexposed, ugly"
)

Callback = Callable[["SUVPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class SUVPipelineOutput(BaseOutput):  # type: ignore[misc]  # diffusers' classes are untyped
    """What :class:`SUVPipeline` returns."""

    frames: Tensor  # uint8 [B, T, height, width, 3] RGB on the CPU; or fp32 latents [B, C, t, h, w]


class SUVPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers' classes are untyped
    """Text to video with a :class:`SUV`; a picture is a video of one frame.

    ``vae`` is a :class:`WFVAE`, or any diffusers model with ``decode(latents).sample`` (``[B, C, t,
    h, w]`` to ``[B, 3, T, height, width]`` in [-1, 1]) and the attributes ``spatial_factor`` and
    ``temporal_factor``, 8 each for the released one, where ``T = temporal_factor * (t - 1) + 1``.
    If it has ``denormalize(latents)``, its latents are stored normalised and pass through that
    first. For ``enable_model_cpu_offload`` its ``decode`` needs diffusers' ``apply_forward_hook``.

    Args:
        transformer: the denoiser.
        vae: see above.
        tokenizer, text_encoder: T5's; None if prompts come encoded.
        tokenizer_2, text_encoder_2: CLIP's.

    Attributes:
        text: the :class:`~skiparse.models.text.TextEncoders` made of them, with its cache.

    Source: Open-Sora Plan v1.5 report and release.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _optional_components: ClassVar[list[str]] = [
        "tokenizer",
        "text_encoder",
        "tokenizer_2",
        "text_encoder_2",
    ]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "velocity"]

    def __init__(
        self,
        transformer: SUV,
        vae: WFVAE | ModelMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: T5EncoderModel | None = None,
        tokenizer_2: PreTrainedTokenizerBase | None = None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            tokenizer_2=tokenizer_2,
            text_encoder_2=text_encoder_2,
        )
        self.text = TextEncoders(tokenizer, text_encoder, tokenizer_2, text_encoder_2)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> SUVPipeline:
        """Load every component from a folder that :meth:`save_pretrained` wrote; no download.

        Args:
            pretrained_model_name_or_path: the folder.
            kwargs: as for any diffusers pipeline; ``dtype``, one for all or a dict of them by
                component, and components to use instead above all. The text encoders are loaded
                strictly, in ``dtype``; other arguments concern the transformer and the VAE.

        Raises:
            FileNotFoundError: if it is not such a folder.
            ValueError: if weights are missing.
        """
        folder = Path(pretrained_model_name_or_path)
        index = folder / "model_index.json"
        if not index.is_file():
            raise FileNotFoundError(f"{index} is not there; give a folder with a saved pipeline")
        saved = json.loads(index.read_text(encoding="utf-8"))
        dtypes = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
        if not isinstance(dtypes, dict):
            dtypes = {"default": dtypes}
        encoders = {"text_encoder": T5EncoderModel, "text_encoder_2": CLIPTextModelWithProjection}
        for name, kind in encoders.items():
            if saved.get(name, [None])[0] and name not in kwargs:
                dtype = dtypes.get(name, dtypes.get("default", torch.float32))
                kwargs[name] = load_encoder(kind, folder / name, dtype)
        return super().from_pretrained(folder, **{**kwargs, "local_files_only": True})

    def free_text_encoders(self) -> None:
        """Let go of both text encoders; prompts encoded before, by ``text.encode``, still work."""
        self.text.free()
        self.text_encoder = self.text_encoder_2 = None
        self.maybe_free_model_hooks()  # offloading holds on to models until its hooks are renewed

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """The latents ``(C, t, h, w)`` of a video of that size in pixels and frames.

        Raises:
            ValueError: if the models cannot take it, with the nearest sizes that they can; or if
                the latents of the one are not those of the other.
        """
        channels = self.transformer.config.in_channels
        decoded = getattr(self.vae.config, "latent_channels", channels)
        if decoded != channels:
            raise ValueError(
                f"the transformer makes latents of {channels} channels and the vae decodes "
                f"{decoded}; give the vae it was trained with"
            )
        space, time = self.vae.spatial_factor, self.vae.temporal_factor
        _, *patch = self.transformer.config.patch_size
        rows, columns = (space * side for side in patch)
        sizes.check(height, width, num_frames, rows=rows, columns=columns, time=time)
        return channels, (num_frames - 1) // time + 1, height // space, width // space

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 576,
        width: int = 1024,
        num_frames: int = 121,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.0,
        guidance_rescale: float = 0.7,
        shift: float = flow.SHIFT,
        schedule: flow.Schedule = "linear",
        template: str = TEMPLATE,
        clean_caption: bool = True,
        prompt_embeds: TextEmbeddings | None = None,
        negative_prompt_embeds: TextEmbeddings | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        sequential_cfg: bool = False,
        output_type: str = "uint8",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SUVPipelineOutput:
        """Sample one video for each prompt.

        Latents stay in fp32 from step to step; the models run in their own dtypes.

        Args:
            prompt: one or several, B in all; or give ``prompt_embeds``.
            negative_prompt: what to stay away from: one for all or one each, instead of
                ``NEGATIVE_PROMPT``; ``""`` is what training knew as "no prompt".
            height, width: in pixels, multiples of VAE factor times patch: 16.
            num_frames: 8n + 1, with the VAE's temporal factor of 8.
            num_inference_steps: Euler steps.
            guidance_scale: how much to follow the prompt, at least 1; at 1 there is no negative
                prompt and every step costs half.
            guidance_rescale: in [0, 1], more against over-saturated colours.
            shift, schedule: of :func:`~skiparse.models.flow.inference_sigmas`.
            template, clean_caption: of ``text.encode``, for ``prompt``; the negative prompt is
                taken without a template.
            prompt_embeds, negative_prompt_embeds: encoded prompts in place of prompts.
            generator: for the noise, one or a list of B.
            latents: fp32 noise ``[B, C, t, h, w]`` in place of drawn noise.
            sequential_cfg: run the negative and the positive prompt one after the other: less
                memory, a little slower.
            output_type: "uint8" for frames, "latent" for normalised latents.
            callback_on_step_end: called with the pipeline, the step from 0, the timestep, and a
                dict of the tensors asked for; "latents" in the dict it returns replaces them.
            callback_on_step_end_tensor_inputs: of "latents" and "velocity" (after guidance).

        Raises:
            ValueError: for arguments that make no sense, before any work.
            FloatingPointError: if text, latents or frames are not finite, with the step. Nothing
                is returned then.
        """
        shape = self.latent_shape(height, width, num_frames)
        sigmas = flow.inference_sigmas(num_inference_steps, shift=shift, schedule=schedule)
        guided = guidance_scale != 1
        if not guidance_scale >= 1:
            raise ValueError(f"guidance_scale must be at least 1, got {guidance_scale}")
        if not 0 <= guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
        if output_type not in ("uint8", "latent"):
            raise ValueError(f"output_type must be 'uint8' or 'latent', got {output_type!r}")
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("give either prompt or prompt_embeds")
        given = [x for x in (negative_prompt, negative_prompt_embeds) if x is not None]
        if len(given) > guided:
            raise ValueError(
                "give negative_prompt or negative_prompt_embeds, not both"
                if guided
                else "a negative prompt does nothing at guidance_scale=1; leave it out"
            )
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; choose from "
                f"{self._callback_tensor_inputs}"
            )

        batch = _count(prompt_embeds if prompt is None else prompt)
        negatives = _count("" if not given else given[0])
        if negatives not in (1, batch):
            raise ValueError(
                f"give one negative prompt or one for each of {batch} prompts, got {negatives}"
            )
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"give one generator, or a list with one for each of {batch} prompts, got a list "
                f"of {len(generator)}"
            )
        if latents is not None and latents.shape != (batch, *shape):
            raise ValueError(
                f"latents must be {[batch, *shape]} for {batch} prompts, got {list(latents.shape)}"
            )

        device, dtype = self._execution_device, self.transformer.dtype
        if prompt is not None:
            prompt_embeds = self.text.encode(prompt, template=template, clean_caption=clean_caption)
        assert prompt_embeds is not None  # one of the two was given
        branches = [prompt_embeds.to(device, dtype)]
        if guided:
            if negative_prompt_embeds is None:
                negative_prompt_embeds = self.text.encode(
                    NEGATIVE_PROMPT if negative_prompt is None else negative_prompt,
                    clean_caption=clean_caption,
                )
            negative = negative_prompt_embeds.to(device, dtype)
            copies = batch // len(negative)
            branches.insert(0, TextEmbeddings.cat([negative] * copies))
        if not sequential_cfg:
            branches = [TextEmbeddings.cat(branches)]
        for branch in branches:
            _check_finite(branch.text, "the text embeddings are not finite")
            _check_finite(branch.pooled, "the pooled text embeddings are not finite")

        if latents is None:
            latents = randn_tensor(
                (batch, *shape), generator=generator, device=device, dtype=torch.float32
            )
        latents = latents.to(device, torch.float32)

        with self.progress_bar(total=num_inference_steps) as bar:
            for step in range(num_inference_steps):
                sigma, sigma_next = sigmas[step], sigmas[step + 1]
                timestep = flow.timesteps(sigma).to(device)
                velocity = torch.cat(
                    [self._velocity(latents.to(dtype), timestep, branch) for branch in branches]
                )
                if guided:
                    velocity = flow.guide(
                        *velocity.chunk(2), scale=guidance_scale, rescale=guidance_rescale
                    )
                latents = flow.euler_step(latents, velocity, sigma, sigma_next)
                if callback_on_step_end is not None:
                    known = {"latents": latents, "velocity": velocity}
                    asked = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, timestep, asked)
                    latents = changed.get("latents", latents).float()
                _check_finite(
                    latents,
                    f"the latents are not finite after step {step + 1} of {num_inference_steps} "
                    f"(sigma {sigma:.4f} to {sigma_next:.4f}, {dtype})",
                )
                bar.update()
        frames = latents if output_type == "latent" else self._decode(latents)
        self.maybe_free_model_hooks()
        return SUVPipelineOutput(frames=frames)

    def _velocity(self, latents: Tensor, timestep: Tensor, branch: TextEmbeddings) -> Tensor:
        """The model's velocity for each text of ``branch``, whose number B or 2B decides."""
        copies = len(branch) // len(latents)
        return self.transformer(
            latents.repeat(copies, 1, 1, 1, 1),
            timestep.expand(len(branch)),
            branch.text,
            branch.pooled,
            text_mask=branch.text_mask,
        )

    def _decode(self, latents: Tensor) -> Tensor:
        """Frames, uint8 ``[B, T, height, width, 3]`` on the CPU, one video after the other."""
        if hasattr(self.vae, "denormalize"):
            latents = self.vae.denormalize(latents)
        videos = []
        for latent in latents.to(self.vae.dtype).split(1):
            video = self.vae.decode(latent).sample[0]  # [3, T, height, width]
            _check_finite(video, f"the VAE gave frames that are not finite ({self.vae.dtype})")
            levels = video.float().add(1).mul(127.5).round().clamp(0, 255)
            videos.append(levels.to(torch.uint8).permute(1, 2, 3, 0).cpu())
        return torch.stack(videos).contiguous()


def _count(texts: Any) -> int:
    """How many prompts there are, encoded or not."""
    return 1 if isinstance(texts, str) else len(texts)


def _check_finite(x: Tensor, message: str) -> None:
    if not torch.isfinite(x).all():
        raise FloatingPointError(message)
