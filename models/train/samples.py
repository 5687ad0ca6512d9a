"""Videos that a run makes of itself on the way, to be looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from skiparse.models.data.image import read_image
from skiparse.models.train.config import Config, Stage
from skiparse.models.writer import write_image, write_video


def make_samples(config: Config, stage: Stage, step: int, pipeline: Any) -> None:
    """A video for each prompt of the config, in ``samples/``; the same noise every time."""
    options = config.samples
    pipeline.set_progress_bar_config(disable=True)
    folder = Path(config.out) / "samples"
    folder.mkdir(exist_ok=True)
    frames, height, width = options.shape
    for i, prompt in enumerate(options.prompts):
        told = {}
        if options.images:
            told["image"] = read_image(
                options.images[i], size=(height, width), limits=config.limits
            )[0]
        video = pipeline(
            prompt,
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=torch.Generator().manual_seed(config.seed + i),
            output_type="pt",  # which pipelines of diffusers have too
            **told,
        ).frames[0]
        video = video.float().movedim(1, -1).mul(255).round().to(torch.uint8)
        path = folder / f"step-{step:08d}-{i}"
        if frames == 1:
            write_image(path.with_suffix(".png"), video[0])
        else:
            write_video(path.with_suffix(".mp4"), video, fps=stage.rule.fps)
