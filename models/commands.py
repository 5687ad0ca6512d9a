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
        context_parallel: processes that share the tokens of a video; default: all that torchrun
            started. Groups of so many make videos side by side.
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
    context_parallel: Annotated[int | None, "PROCESSES"] = None

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give --prompt TEXT or --prompts FILE, and one of them only")
        if self.vbench is None and (self.samples is not None or self.list):
            raise ValueError("--samples and --list go with --vbench DIR")
        if self.vbench is not None and (self.out is not None or self.frames == 1):
            raise ValueError("--vbench DIR is for videos of several frames, and instead of --out")
        if self.last_image is not None and self.image is None:
            raise ValueError("--last-image goes with --image; give both, or --image alone")
        if self.context_parallel is not None and self.context_parallel < 1:
            raise ValueError(f"--context-parallel {self.context_parallel}: give at least 1")
        if self.negative is not None and self.guidance == 1:
            raise ValueError("--negative does nothing at --guidance 1; leave one of them out")

    def run(self) -> None:
        """Make the videos, or tell which are missing."""
        from skiparse.models import sample, vbench
        from skiparse.models.train.parallel import World

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
        with World.joined(device) as world:
            shared = self.context_parallel
            sample.run(
                jobs,
                sampler,
                world=world,
                context_parallel=world.size if shared is None else shared,
                dtype=dtype,
                crf=self.crf,
                offload=self.offload,
                resume=self.vbench is not None,
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Show what many devices send each other, and what training takes on them: computed alone.

    With --context-parallel: which layout each layer has when so many processes share the tokens of
    a video, and what is sent for that, beside Ulysses in every layer. With --cluster: estimates of
    the seconds of a step and the memory of a device, for 8 to 512 devices and the stages of v1.5.

    Args:
        preset: of a model: a size of SUV, or osp-next; default: v1.5.
        shape: of a clip, in frames and pixels; default: 121x576x1024.
        context_parallel: processes that share a sequence; default: --cluster tries some.
        cluster: a file with memory, flops, devices_per_machine, inside and between, as the
            guide has it; default: none.
    """

    extra: ClassVar[str] = "models,train"
    context_parallel: Annotated[int | None, "PROCESSES"] = None
    preset: Annotated[str | None, "NAME"] = None
    shape: Annotated[str | None, "FRAMESxHEIGHTxWIDTH"] = None
    cluster: Annotated[str | None, "FILE"] = None

    def __post_init__(self) -> None:
        if (self.context_parallel is None) == (self.cluster is None):
            raise ValueError("give --context-parallel PROCESSES or --cluster FILE, and one alone")
        if self.cluster is not None and (self.preset is not None or self.shape is not None):
            raise ValueError("--preset and --shape go with --context-parallel: leave them out")

    def run(self) -> None:
        """Print the table."""
        if self.cluster is not None:
            from skiparse.models.cluster import Cluster, table

            print(table(Cluster.load(self.cluster)))
            return
        from skiparse.models.planning import Context

        shape = "121x576x1024" if self.shape is None else self.shape
        sides = shape.split("x")
        if len(sides) != 3 or not all(side.isdecimal() for side in sides):
            raise ValueError(
                f"--shape {shape}: give frames, height and width, such as 121x576x1024"
            )
        assert self.context_parallel is not None
        print(Context.of(self.preset or "v1.5", [int(x) for x in sides], self.context_parallel))
