"""``skiparse sample``: prompts in, videos out. ``skiparse plan``: what many devices send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from skiparse.models.options import Asked, Computed


@dataclass(frozen=True, kw_only=True)
class Sample(Asked, Computed):
    """Make videos from prompts with a trained model: an SUV, a Wan or an OSP-Next.

    Args:
        model: a folder with a pipeline: an SUVPipeline, or a WanPipeline of diffusers.
        prompt: what to show; default: those of --prompts.
        prompts: a text file, one prompt a line; default: the one of --prompt.
        image: the first frame of every video, a JPEG, PNG or WebP, cut and scaled to its size; of a
            model that was trained with images; default: none.
        last_image: the last frame, beside the first; default: none.
        out: the .mp4 to write, a .png for one frame; with --prompts a folder of them. Side-car
            files beside them record how they were made. Default: sample.mp4, samples/.
        vbench: lay videos out in this folder as VBench expects; default: no.
        samples: videos of a prompt, with --vbench; default: 5.
        list: print what is missing from --vbench DIR and stop.
        seed: of a prompt's first video.
        crf: x264's quality, 0 best to 51.
        offload: keep on the GPU only the model that runs.
    """

    extra: ClassVar[str] = "models,video"
    model: Annotated[str, "DIR"]
    prompt: Annotated[str | None, "TEXT"] = None
    prompts: Annotated[str | None, "FILE"] = None
    image: Annotated[str | None, "FILE"] = None
    last_image: Annotated[str | None, "FILE"] = None
    out: Annotated[str | None, "PATH"] = None
    vbench: Annotated[str | None, "DIR"] = None
    samples: Annotated[int | None, "VIDEOS"] = None
    list: bool = False
    seed: Annotated[int, "SEED"] = 0
    crf: Annotated[int, "CRF"] = 23
    offload: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give --prompt TEXT or --prompts FILE, and one of them only")
        if self.vbench is None and (self.samples is not None or self.list):
            raise ValueError("--samples and --list go with --vbench DIR")
        if self.vbench is not None and (self.out is not None or self.frames == 1):
            raise ValueError("--vbench DIR is for videos of several frames, and instead of --out")
        if self.last_image is not None and self.image is None:
            raise ValueError("--last-image goes with --image; give both, or --image alone")
        if self.negative is not None and self.guidance == 1:
            raise ValueError("--negative does nothing at --guidance 1; leave one of them out")

    def run(self) -> None:
        """Make the videos, or tell which are missing."""
        from skiparse.models import sample, vbench

        prompts = vbench.read_prompts(self.prompts) if self.prompts else [self.prompt or ""]
        sample.check_texts([*prompts, self.negative or ""], self.seed)
        if self.vbench is not None:
            number = vbench.SAMPLES if self.samples is None else self.samples
            jobs = sample.for_vbench(prompts, self.vbench, number, self.seed, listed=self.list)
            if self.list:
                return
        device, dtype = self.place
        if self.offload and device == "cpu":
            raise ValueError("--offload moves models off a GPU; leave it out on a CPU")
        sampler = sample.sampler_of(self.model, self)
        if self.image is not None:
            sampler.show(self.image, self.last_image)
        if self.vbench is None:
            frames, folder = sampler.asked.frames, self.prompts is not None
            jobs = sample.named(prompts, self.out, self.seed, frames=frames, folder=folder)
        sample.run(
            jobs,
            sampler,
            device=device,
            dtype=dtype,
            crf=self.crf,
            offload=self.offload,
            resume=self.vbench is not None,
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show where the tokens of a video lie in each layer when several processes share them.

    Which layout a layer has, and what is sent for that, beside Ulysses in every layer. Computed; no
    process is started.

    Args:
        preset: of a model: a size of SUV, or osp-next.
        shape: of a clip, in frames and pixels.
        context_parallel: processes that share a sequence.
    """

    extra: ClassVar[str] = "models"
    context_parallel: Annotated[int, "PROCESSES"]
    preset: Annotated[str, "NAME"] = "v1.5"
    shape: Annotated[str, "FRAMESxHEIGHTxWIDTH"] = "121x576x1024"

    def run(self) -> None:
        """Print the table."""
        from skiparse.models.planning import Context

        sides = self.shape.split("x")
        if len(sides) != 3 or not all(side.isdecimal() for side in sides):
            raise ValueError(
                f"--shape {self.shape}: give frames, height and width, such as 121x576x1024"
            )
        print(Context.of(self.preset, [int(side) for side in sides], self.context_parallel))
