"""What ``skiparse sample`` does: prompts in, videos out, each with a record of how it was made.

All that it has to know of a pipeline is a :class:`Sampler`, found by the class that the pipeline's
folder names. What a video is to be, nobody has to say: what is not asked for is as the folder has
it in ``sampling.json``, if there is one, and else as the model is sampled usually.

Under torchrun, groups of processes share the tokens of a video, each has the whole of it in the
end, and its first one writes the files. A video is the same however many there are, up to rounding.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

import skiparse
from skiparse.models import vbench, writer
from skiparse.models.data.atomic import check_writable, read_table, write_json
from skiparse.models.options import Asked
from skiparse.models.text import check_text
from skiparse.models.train.parallel import World

SAMPLERS = {
    "SUVPipeline": "skiparse.models.suv.sampler:SUVSampler",
    "WanPipeline": "skiparse.models.wan.sampler:WanSampler",
    "ImageWanPipeline": "skiparse.models.wan.sampler:WanSampler",
}
CONFIG = "transformer/config.json"  # which model it is; its SHA-256 is noted beside every video


class Job(NamedTuple):
    """One video to make."""

    prompt: str
    seed: int
    video: Path
    sidecar: Path


class Sampler(ABC):
    """A pipeline in a folder. To make one loads no weights, and finds what it cannot do.

    Args:
        folder: of the pipeline.
        asked: all of it, with what the folder and the model say where nothing was asked.

    Attributes:
        settings: all that decides a video besides prompt and seed, ready for JSON.
        images: the frames that are known, by the pipeline's arguments: uint8 ``[H, W, 3]``.
        pipeline: of diffusers, once it is loaded.
        group: the processes that share the tokens, if any do.

    Raises:
        ValueError: for what this model does not have, or sizes that it cannot take.
        FileNotFoundError: if a part of the pipeline is missing.
    """

    defaults: ClassVar[Asked]
    settings: dict[str, Any]
    images: dict[str, Tensor]
    pipeline: Any
    group: Any = None

    def __init__(self, folder: Path, asked: Asked) -> None:
        self.folder, self.asked, self.images = folder, asked, {}
        self.table(CONFIG)

    def table(self, name: str) -> dict[str, Any]:
        """What a JSON file of the folder holds.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: if it is damaged.
        """
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(
                f"--model {self.folder}: {path} is not there; give the folder of a whole pipeline, "
                "with its VAE and text encoder"
            )
        return read_table(path)

    def show(self, image: str, last_image: str | None) -> None:
        """Take the first frame of every video, and the last one, from image files.

        They are cut about their centre to the size of the video, and scaled.

        Raises:
            ValueError: for a model of text alone, files that cannot be read or are smaller than
                the video, and videos of one frame.
        """
        # It needs what reads videos, as nothing else here does.
        from skiparse.models.data.image import read_image

        if self.table(CONFIG).get("images") is None:
            raise ValueError(
                f"--image {image}: the model of {self.folder} is told of text alone; train one "
                "with images, or leave it out"
            )
        size = (self.settings["height"], self.settings["width"])
        if self.settings["num_frames"] == 1:
            raise ValueError(f"--image {image}: it is the first of several frames; --frames is 1")
        for name, file in (("image", image), ("last_image", last_image)):
            if file is not None:
                self.images[name] = read_image(file, size=size)[0]
                self.settings[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()

    def share(self, group: Any) -> None:
        """Let the processes of ``group`` share the tokens of every call, once models are loaded.

        Raises:
            ValueError: for what they cannot do together.
        """
        self.group = group

    @abstractmethod
    def load(self, dtype: torch.dtype) -> None:
        """Set ``pipeline``, on the CPU.

        Raises:
            ValueError: if weights are missing.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> None:
        """Encode prompts, and what to stay away from; then let go of the text encoders."""

    @abstractmethod
    def frames(self, prompt: str, noise: torch.Generator) -> Iterator[Tensor]:
        """A video of an encoded prompt, in pieces as they are decoded.

        Yields:
            uint8 ``[n, height, width, 3]``, on the CPU.

        Raises:
            FloatingPointError: if latents or frames are not finite.
        """


def sampler_of(folder: str | os.PathLike[str], asked: Asked) -> Sampler:
    """The sampler of the pipeline in a folder; no weights are loaded.

    Raises:
        FileNotFoundError: if there is none, or a part of it is missing.
        ValueError: if it is of a class that is not known, damaged, or cannot do what is asked.
    """
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"--model {folder}: {index} is not there; give the folder of a pipeline, with its VAE "
            "and text encoder"
        )
    found = read_table(index).get("_class_name")
    name = found[-1] if isinstance(found, list) else found  # behind the file that imports it
    if name not in SAMPLERS:
        raise ValueError(f"--model {folder}: it holds a {name}; known are {', '.join(SAMPLERS)}")
    module, _, attribute = SAMPLERS[name].partition(":")
    kind: type[Sampler] = getattr(importlib.import_module(module), attribute)
    return kind(Path(folder), asked.over(Asked.load(Path(folder))).over(kind.defaults))


def check_texts(texts: Sequence[str], seed: int) -> None:
    """ValueError for texts that hold half a character, and seeds that a generator does not take."""
    for text in texts:
        check_text(text)
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed {seed}: give a number from 0, below 2**63")


def named(
    prompts: Sequence[str], out: str | None, seed: int, *, frames: int | None, folder: bool
) -> list[Job]:
    """A video for each prompt, or a picture if it has one frame: in a folder, or just ``out``.

    Raises:
        ValueError: if ``out`` names another kind of file.
    """
    suffix = ".png" if frames == 1 else ".mp4"
    if folder:
        videos = [Path(out or "samples") / f"{i:05d}{suffix}" for i in range(len(prompts))]
    else:
        videos = [Path(out or f"sample{suffix}")]
        if videos[0].suffix.lower() != suffix:
            raise ValueError(f"--out {out}: --frames {frames} makes a {suffix}")
    return [
        Job(prompt, seed, video, video.with_suffix(".json"))
        for prompt, video in zip(prompts, videos, strict=True)
    ]


def for_vbench(
    prompts: Sequence[str], folder: str, samples: int, seed: int, *, listed: bool
) -> list[Job]:
    """The videos that VBench looks for; tells how many are missing, and which if ``listed``.

    Raises:
        ValueError: if ``folder`` is a file, or a prompt cannot name one.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--vbench {path} is a file; give a folder")
    missing = vbench.missing(path, prompts, samples=samples)
    print(f"{path}: {len(missing)} of {len(prompts) * samples} videos missing")
    if listed:
        print(*missing, sep="\n")
    strays = vbench.strays(path, prompts, samples=samples)
    if strays:
        print(f"not VBench's, move them elsewhere: {', '.join(strays)}")
    found = [(p, i, vbench.file_name(p, i)) for p in prompts for i in range(samples)]
    return [Job(p, seed + i, path / name, vbench.sidecar(path, name)) for p, i, name in found]


def run(
    jobs: Sequence[Job],
    sampler: Sampler,
    *,
    world: World,
    context_parallel: int,
    dtype: torch.dtype,
    crf: int,
    offload: bool,
    resume: bool,
) -> None:
    """Make every video, from one loading of the models.

    Args:
        jobs: what to make; groups of processes take them in turn.
        sampler: what makes it.
        world: the processes that call this alike, and the device of this one.
        context_parallel: of them those that share the tokens of a video, a divisor of all.
        dtype: of the models.
        crf: x264's quality.
        offload: keep on the GPU only the model that runs.
        resume: leave videos alone that are there, and were made so.

    Raises:
        ValueError: for what cannot be done, before any work.
        FloatingPointError: if a result is not finite; nothing of that video is written.
    """
    asked = sampler.asked
    assert asked.fps is not None  # every sampler has one
    writer.check_settings(fps=asked.fps, crf=crf)
    if world.size % context_parallel:
        raise ValueError(
            f"--context-parallel {context_parallel} must divide the number of processes, "
            f"{world.size}; start them by torchrun"
        )
    record = {
        **sampler.settings,
        "fps": asked.fps,
        "crf": crf,
        "dtype": str(dtype).removeprefix("torch."),
        "config_sha256": hashlib.sha256((sampler.folder / CONFIG).read_bytes()).hexdigest(),
        "skiparse": skiparse.__version__,
    }
    records = [{"prompt": job.prompt, "seed": job.seed, **record} for job in jobs]
    done = [False] * len(jobs)
    for i, job in enumerate(jobs if resume else ()):
        if job.video.exists() and job.video.stat().st_size:
            there = job.sidecar.exists() and json.loads(job.sidecar.read_text("utf-8"))
            done[i] = there == records[i]
            if not done[i]:
                raise ValueError(
                    f"{job.video} is there but was made with other settings, see {job.sidecar}; "
                    "take another folder for --vbench, or remove what is old"
                )
    check_writable(*(file for job in jobs for file in (job.video, job.sidecar)))
    context = world.context(context_parallel)
    left = [i for i, there in enumerate(done) if not there]
    own = world.of_first(left)[context.index :: context.count]
    if context.group is not None:
        sampler.share(context.group)

    sampler.load(dtype)
    if world.rank > 0:
        sampler.pipeline.set_progress_bar_config(disable=True)
    if offload:
        sampler.pipeline.enable_model_cpu_offload(device=world.device)
    else:
        sampler.pipeline.to(world.device)
    sampler.encode([job.prompt for job in jobs])
    for i in own:
        job = jobs[i]
        noise = torch.Generator("cpu").manual_seed(job.seed)  # the same on every device
        pieces = sampler.frames(job.prompt, noise)
        if not context.first:
            next(pieces)  # the denoiser has run when there are frames; the first process has all
            continue
        pieces = _noted(pieces, job.sidecar, records[i])
        if job.video.suffix == ".png":
            writer.write_image(job.video, torch.cat(list(pieces))[0])
        else:
            writer.write_video(job.video, pieces, fps=asked.fps, crf=crf)
        print(job.video)
    world.wait()


def _noted(pieces: Iterator[Tensor], sidecar: Path, record: dict[str, Any]) -> Iterator[Tensor]:
    """The pieces; behind the last, when all are known to be sound, the record is written.

    The video gets its name after that, so none is without its record.
    """
    yield from pieces
    write_json(sidecar, record)
