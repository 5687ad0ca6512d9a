"""What ``skiparse sample`` does: prompts in, videos out, each with a record of how it was made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import skiparse
from skiparse.models import vbench, writer
from skiparse.models.commands import Sample
from skiparse.models.data.atomic import check_writable, write_json
from skiparse.models.pipeline import NEGATIVE_PROMPT, TEMPLATE, SUVPipeline
from skiparse.models.text import check_text

Job = tuple[str, int, Path, Path]  # prompt, seed, video, side-car


def run(options: Sample, device: str, dtype: torch.dtype) -> None:
    """Make every video of :func:`plan` that is not there yet, from one loading of the models.

    Args:
        options: of ``skiparse sample``.
        device, dtype: of the models.

    Raises:
        ValueError, FileNotFoundError: for what cannot be done, before any work.
        FloatingPointError: if a result is not finite; nothing of that video is written.
    """
    jobs = plan(options)
    if options.offload and device == "cpu":
        raise ValueError("--offload moves models off a GPU; leave it out on a CPU")
    writer.check_settings(fps=options.fps, crf=options.crf)
    config = Path(options.model) / "transformer" / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"--model {options.model}: {config} is not there")
    negative = NEGATIVE_PROMPT if options.negative is None else options.negative
    settings: dict[str, Any] = {
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "guidance_rescale": options.rescale,
        "shift": options.shift,
        "schedule": options.schedule,
        "template": TEMPLATE,
    }
    if options.guidance != 1:
        settings["negative_prompt"] = negative
    record = {
        **settings,
        "fps": options.fps,
        "crf": options.crf,
        "dtype": str(dtype).removeprefix("torch."),
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(),
        "skiparse": skiparse.__version__,
    }
    records = [{"prompt": prompt, "seed": seed, **record} for prompt, seed, _, _ in jobs]
    done = [False] * len(jobs)
    for i, (_, _, video, sidecar) in enumerate(jobs if options.vbench else ()):
        if video.exists() and video.stat().st_size:
            done[i] = sidecar.exists() and json.loads(sidecar.read_text("utf-8")) == records[i]
            if not done[i]:
                raise ValueError(
                    f"{video} is there but was made with other settings, see {sidecar}; take "
                    "another folder for --vbench, or remove what is old"
                )

    check_writable(*(file for *_, video, sidecar in jobs for file in (video, sidecar)))

    pipeline = SUVPipeline.from_pretrained(options.model, dtype=dtype)
    pipeline.latent_shape(options.height, options.width, options.frames)  # raises before any work
    if options.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    pipeline.text.encode([prompt for prompt, *_ in jobs], template=TEMPLATE)
    if options.guidance != 1:
        pipeline.text.encode(negative)
    pipeline.free_text_encoders()
    for (prompt, seed, video, sidecar), made_from, there in zip(jobs, records, done, strict=True):
        if there:
            continue
        noise = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        frames = pipeline(
            prompt, generator=noise, sequential_cfg=options.sequential_cfg, **settings
        ).frames[0]
        write_json(sidecar, made_from)
        if len(frames) == 1:
            writer.write_image(video, frames[0])
        else:
            writer.write_video(video, frames, fps=options.fps, crf=options.crf)
        print(video)


def plan(options: Sample) -> list[Job]:
    """Prompt, seed, video and side-car of everything to make; for VBench, tells what is missing."""
    prompts = vbench.read_prompts(options.prompts) if options.prompts else [options.prompt or ""]
    for prompt in (*prompts, options.negative or ""):
        check_text(prompt)
    if not 0 <= options.seed < 2**63:
        raise ValueError(f"--seed {options.seed}: give a number from 0, below 2**63")
    suffix = ".png" if options.frames == 1 else ".mp4"
    if options.vbench:
        if options.out or options.frames == 1:
            raise ValueError("--vbench DIR is for videos of several frames, and instead of --out")
        folder = Path(options.vbench)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--vbench {folder} is a file; give a folder")
        samples = vbench.SAMPLES if options.samples is None else options.samples
        missing = vbench.missing(folder, prompts, samples=samples)
        print(f"{folder}: {len(missing)} of {len(prompts) * samples} videos missing")
        if options.list:
            print(*missing, sep="\n")
        strays = vbench.strays(folder, prompts, samples=samples)
        if strays:
            print(f"not VBench's, move them elsewhere: {', '.join(strays)}")
        named = [(p, i, vbench.file_name(p, i)) for p in prompts for i in range(samples)]
        return [
            (prompt, options.seed + i, folder / name, vbench.sidecar(folder, name))
            for prompt, i, name in named
        ]
    if options.samples is not None or options.list:
        raise ValueError("--samples and --list go with --vbench DIR")
    if options.prompts:
        folder = Path(options.out or "samples")
        videos = [folder / f"{i:05d}{suffix}" for i in range(len(prompts))]
    else:
        videos = [Path(options.out or f"sample{suffix}")]
        if videos[0].suffix.lower() != suffix:
            raise ValueError(f"--out {options.out}: --frames {options.frames} makes a {suffix}")
    return [
        (prompt, options.seed, video, video.with_suffix(".json"))
        for prompt, video in zip(prompts, videos, strict=True)
    ]
