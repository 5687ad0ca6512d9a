"""How a Wan is sampled, dense or sparse: what is to be known of a WanPipeline for that.

Layers become sparse as ``config["skiparse"]`` of a transformer says, of OSP-Next's weights as
``skiparse convert osp-next`` wrote them and of any other; a transformer without it stays dense.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
)
from torch import Tensor
from transformers import UMT5EncoderModel

from skiparse.models import flow, hif8, sizes, strict
from skiparse.models.image_wan import ImageWan, ImageWanPipeline, kind_of
from skiparse.models.options import Asked
from skiparse.models.retrofit import Retrofit, retrofit
from skiparse.models.sample import CONFIG, Sampler
from skiparse.models.text import load_encoder
from skiparse.models.wan.encoders import LENGTH, padded, trimmed

TRANSFORMERS = ("transformer", "transformer_2")
EULER = FlowMatchEulerDiscreteScheduler.__name__


class WanSampler(Sampler):
    """A WanPipeline, also of images; what nobody asked for is as diffusers has it, at 16 fps."""

    defaults = Asked(height=480, width=832, frames=81, steps=50, fps=16, guidance=5.0, negative="")

    def __init__(self, folder: Path, asked: Asked) -> None:
        super().__init__(folder, asked)
        told = {
            "height": asked.height,
            "width": asked.width,
            "num_frames": asked.frames,
            "num_inference_steps": asked.steps,
            "guidance_scale": asked.guidance,
        }
        self.called: dict[str, Any] = told  # arguments of the pipeline
        self._refuse()
        self.settings = {**told, **self._noise()}
        if asked.guidance != 1:
            self.settings["negative_prompt"] = asked.negative
        if asked.hif8:
            self.settings["hif8"] = True
        self.rows: dict[str, Tensor] = {}  # text by prompt, without padding, on the CPU

    def _refuse(self) -> None:
        """What this pipeline cannot do."""
        for name in ("rescale", "sequential_cfg"):
            if getattr(self.asked, name) is not None:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag}: a WanPipeline has no such setting; leave it out")
        guidance, steps = self.called["guidance_scale"], self.called["num_inference_steps"]
        if not guidance >= 1:
            raise ValueError(f"--guidance {guidance}: give at least 1, which is none")
        if steps < 1:
            raise ValueError(f"--steps {steps}: give at least 1")
        model, vae = self.table("transformer/config.json"), self.table("vae/config.json")
        if model.get("image_dim") is not None or model["in_channels"] != model["out_channels"]:
            raise ValueError(
                f"--model {self.folder}: its transformer takes images too; give one that gets text "
                "alone"
            )
        _, height, width = model["patch_size"]
        side = vae.get("scale_factor_spatial", 8)
        sizes.check(
            *(self.called[name] for name in ("height", "width", "num_frames")),
            rows=side * height,
            columns=side * width,
            time=vae.get("scale_factor_temporal", 4),
        )

    def _noise(self) -> dict[str, Any]:
        """The scheduler and its settings; ``shift`` is its own where none was asked for."""
        config, asked = self.table("scheduler/scheduler_config.json"), self.asked
        name = config.get("_class_name")
        key = next((key for key in ("shift", "flow_shift") if key in config), None)
        if key is None:
            raise ValueError(
                f"--model {self.folder}: a {name} has no shift of flow matching; give a pipeline "
                f"with a {EULER}, or another that has"
            )
        self.shifted = {key: config[key] if asked.shift is None else asked.shift}
        shift = self.shifted[key]
        if asked.schedule is not None:
            if name != EULER:
                raise ValueError(
                    f"--schedule {asked.schedule}: a {name} has a schedule of its own; leave it out"
                )
            flow.inference_sigmas(
                self.called["num_inference_steps"],
                shift=shift,
                schedule=asked.schedule,  # type: ignore[arg-type]  # refused if it is none
            )
        elif not shift > 0:
            raise ValueError(f"--shift {shift}: give a number above 0")
        return {"scheduler": name, "shift": shift, "schedule": asked.schedule}

    def share(self, group: Any) -> None:
        """A dense transformer gets a retrofit of dense layers for that."""
        if self.asked.hif8:
            raise ValueError(
                "--hif8: its scales are of whole tensors, which processes that share tokens do not "
                "have; give --context-parallel 1"
            )
        super().share(group)

    def load(self, dtype: torch.dtype) -> None:
        """Every component, strictly; the autoencoder in float32 at least, as Wan's has to be."""
        index, parts = self.table("model_index.json"), {}
        transformer = kind_of(self.table(CONFIG))
        kinds = dict.fromkeys(TRANSFORMERS, transformer) | {"vae": AutoencoderKLWan}
        for name, kind in kinds.items():
            if index.get(name, [None])[0] is not None:
                number = torch.promote_types(dtype, torch.float32) if name == "vae" else dtype
                parts[name] = strict.loaded(kind, self.folder / name, dtype=number)
        encoder = load_encoder(UMT5EncoderModel, self.folder / "text_encoder", dtype)
        kind = ImageWanPipeline if transformer is ImageWan else WanPipeline
        self.pipeline = kind.from_pretrained(
            self.folder, text_encoder=encoder, local_files_only=True, **parts
        )
        for model in (parts[name] for name in TRANSFORMERS if name in parts):
            if model.config.get("skiparse") is not None:
                retrofit(model)
            elif self.group is not None:
                retrofit(model, kinds=("dense",) * model.config.num_layers)
            if self.group is not None:
                Retrofit.of(model).share(self.group)
            if self.asked.hif8:
                hif8.apply(model)
        config = self.pipeline.scheduler.config
        if self.asked.schedule is None:
            scheduler = type(self.pipeline.scheduler)
            self.pipeline.scheduler = scheduler.from_config(config, **self.shifted)
        else:
            sigmas = flow.inference_sigmas(
                self.called["num_inference_steps"],
                shift=self.settings["shift"],
                schedule=self.settings["schedule"],
            )
            self.pipeline.scheduler = Told.from_config(config, shift=1.0)
            self.pipeline.scheduler.told = sigmas[:-1].tolist()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> None:
        """One after the other, without padding."""
        negative = self.settings.get("negative_prompt")
        for text in (*prompts, *([] if negative is None else [negative])):
            if text not in self.rows:
                rows, _ = self.pipeline.encode_prompt(
                    text, do_classifier_free_guidance=False, max_sequence_length=LENGTH
                )
                self.rows[text] = trimmed(rows[0].cpu())
        self.pipeline.text_encoder = None
        self.pipeline.maybe_free_model_hooks()  # which hold on to models until they are renewed

    def frames(self, prompt: str, noise: torch.Generator) -> Iterator[Tensor]:
        """As the pipeline makes them: all in one piece."""
        given = {"prompt_embeds": prompt}
        if "negative_prompt" in self.settings:
            given["negative_prompt_embeds"] = self.settings["negative_prompt"]
        device = self.pipeline._execution_device
        made = self.pipeline(
            **{name: padded(self.rows[text])[None].to(device) for name, text in given.items()},
            **self.called,
            **self.images,
            generator=noise,
            output_type="pt",
            callback_on_step_end=self._check_latents,
        )
        if not made.frames.isfinite().all():
            raise FloatingPointError(
                f"the VAE gave frames that are not finite ({self.pipeline.vae.dtype})"
            )
        yield levels(made.frames)[0].cpu()

    def _check_latents(
        self, pipeline: Any, step: int, timestep: Tensor, found: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if not found["latents"].isfinite().all():
            raise FloatingPointError(
                f"the latents are not finite after step {step + 1} of "
                f"{self.called['num_inference_steps']} ({pipeline.transformer.dtype})"
            )
        return found


class Told(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers' classes are untyped
    """Euler's steps through noise levels that it is told, and then to 0.

    By itself its own class ends at another level before 0 than a linear schedule has.
    """

    told: list[float]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        **given: Any,
    ) -> None:
        """The levels told, whose number is that of the steps."""
        super().set_timesteps(device=device, sigmas=self.told, **given)


def levels(frames: Tensor) -> Tensor:
    """Frames of a WanPipeline, ``[B, T, 3, H, W]`` in [0, 1], as uint8 ``[B, T, H, W, 3]``."""
    return (frames.movedim(2, -1) * 255).round().to(torch.uint8)
