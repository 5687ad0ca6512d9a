"""How an SUV is sampled: what :mod:`skiparse.models.sample` has to know of an SUVPipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skiparse.models import flow
from skiparse.models.options import Asked
from skiparse.models.pipeline import NEGATIVE_PROMPT, TEMPLATE, SUVPipeline
from skiparse.models.sample import Sampler


class SUVSampler(Sampler):
    """An SUVPipeline, with the settings of Open-Sora Plan v1.5."""

    defaults = Asked(
        height=576,
        width=1024,
        frames=121,
        steps=50,
        fps=24,
        guidance=7.0,
        negative=NEGATIVE_PROMPT,
        rescale=0.7,
        shift=flow.SHIFT,
        schedule="linear",
        sequential_cfg=False,
    )

    def __init__(self, folder: Path, asked: Asked) -> None:
        super().__init__(folder, asked)
        if asked.hif8:
            raise ValueError("--hif8: it is known of a Wan alone; leave it out")
        self.settings = {
            "height": asked.height,
            "width": asked.width,
            "num_frames": asked.frames,
            "num_inference_steps": asked.steps,
            "guidance_scale": asked.guidance,
            "guidance_rescale": asked.rescale,
            "shift": asked.shift,
            "schedule": asked.schedule,
            "template": TEMPLATE,
        }
        if asked.guidance is not None and asked.guidance > 1:
            self.settings["negative_prompt"] = asked.negative

    def load(self, dtype: torch.dtype) -> None:
        """Every component, strictly; the size is held against them."""
        self.pipeline = SUVPipeline.from_pretrained(self.folder, dtype=dtype)
        self.pipeline.transformer.set_context_parallel(self.group)
        size = (self.settings[name] for name in ("height", "width", "num_frames"))
        self.pipeline.latent_shape(*size)  # raises before any work

    def encode(self, prompts: Sequence[str]) -> None:
        """The pipeline keeps what it has encoded."""
        self.pipeline.text.encode(prompts, template=TEMPLATE)
        if "negative_prompt" in self.settings:
            self.pipeline.text.encode(self.settings["negative_prompt"])
        self.pipeline.free_text_encoders()

    def frames(self, prompt: str, noise: torch.Generator) -> Iterator[Tensor]:
        """As the pipeline makes them, a latent at a time."""
        made = self.pipeline(
            prompt,
            generator=noise,
            sequential_cfg=self.asked.sequential_cfg,
            output_type="latent",
            **self.settings | self.images,
        )
        yield from self.pipeline.frames_of(made.frames[0])
