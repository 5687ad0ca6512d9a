"""``skiparse sample``: prompts in, videos out. ``skiparse plan``: what many devices send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from skiparse.models.options import Computed


@dataclass(frozen=True, kw_only=True)
class Sample(Computed):
    """Make videos from prompts with a trained model.

    Args:
        model: a folder that SUVPipeline saved.
        prompt: what to show; default: those of --prompts.
        prompts: a text file, one prompt a line; default: the one of --prompt.
        out: the .mp4 to write, a .png for one frame; with --prompts a folder of them. Side-car
            files beside them record how they were made. Default: sample.mp4, samples/.
        vbench: lay videos out in this folder as VBench expects; default: no.
        samples: videos of a prompt, with --vbench; default: 5.
        list: print what is missing from --vbench DIR and stop.
        negative: what to stay away from; default: a list of flaws.
        seed: of a prompt's first video.
        height: of a video.
        width: of a video.
        frames: 8n + 1; 1 for a picture.
        steps: calls of the model, or pairs of them with guidance.
        fps: of the video.
        crf: x264's quality, 0 best to 51.
        guidance: how much more a prompt counts than none; 1 is no guidance.
        rescale: from 0 to 1, more against garish colours.
        shift: of the noise.
        schedule: of the noise, linear or linear_quadratic.
        sequential_cfg: less memory: one prompt after the other.
        offload: keep on the GPU only the model that runs.
    """

    extra: ClassVar[str] = "models,video"
    model: Annotated[str, "DIR"]
    prompt: Annotated[str | None, "TEXT"] = None
    prompts: Annotated[str | None, "FILE"] = None
    out: Annotated[str | None, "PATH"] = None
    vbench: Annotated[str | None, "DIR"] = None
    samples: Annotated[int | None, "VIDEOS"] = None
    list: bool = False
    negative: Annotated[str | None, "TEXT"] = None
    seed: Annotated[int, "SEED"] = 0
    height: Annotated[int, "PIXELS"] = 576
    width: Annotated[int, "PIXELS"] = 1024
    frames: Annotated[int, "FRAMES"] = 121
    steps: Annotated[int, "STEPS"] = 50
    fps: Annotated[int, "PER_SECOND"] = 24
    crf: Annotated[int, "CRF"] = 23
    guidance: Annotated[float, "FACTOR"] = 7.0
    rescale: Annotated[float, "SHARE"] = 0.7
    shift: Annotated[float, "FACTOR"] = 7.0
    schedule: Annotated[str, "NAME"] = "linear"
    sequential_cfg: bool = False
    offload: bool = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give --prompt TEXT or --prompts FILE, and one of them only")

    def run(self) -> None:
        """Make the videos, or tell which are missing."""
        from skiparse.models import sample

        if self.list:
            sample.plan(self)
        else:
            sample.run(self, *self.place)


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
