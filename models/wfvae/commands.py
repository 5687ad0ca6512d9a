"""What ``skiparse`` does with WF-VAE: convert weights, train, measure, normalise latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from skiparse.command import Positional
from skiparse.models.data.limits import Limits
from skiparse.models.options import Computed, Converted, height_and_width


@dataclass(frozen=True, kw_only=True)
class Convert(Converted):
    """Turn released weights of WF-VAE, the video autoencoder, into safetensors.

    Args:
        src: a .ckpt or .safetensors file, or a folder of safetensors.
        dst: the folder to make; it must not exist.
    """

    src: Annotated[str, Positional("IN")]
    dst: Annotated[str, Positional("OUT")]

    def run(self) -> None:
        """Convert, and say what was found and what was left out."""
        from skiparse.models.wfvae.convert import convert_file

        report = convert_file(self.src, self.dst, key=self.key, dtype=self.written, progress=True)
        where = self.where(report.found, report.others)
        latents = "none, so latents stay as they are"
        if report.config["shift"] is not None:
            latents = (
                "of the weights" if "shift" in report.dropped else "of the preset of this size"
            )
        print(f"{self.dst}: {report.names} names, weights found {where}")
        print(f"Haar gain {report.config['haar_gain'] or 'exact'}; shift and scale: {latents}")
        print(f"left out, for the config holds it: {', '.join(report.dropped) or 'nothing'}")


@dataclass(frozen=True, kw_only=True)
class Train(Computed):
    """Train a WF-VAE on a folder of clips: one published stage.

    It is a short way to say ``skiparse train wfvae`` with that stage alone; the same command again
    continues the run. What is not given is that of the stage.

    Args:
        folder: with video files of some seconds, at any depth.
        out: folder of the run.
        model: a size, from random weights; default: v1.5-M.
        init: instead, a trained one, as of the stage before; default: none.
        stage: I, II or III, as published.
        lpips: weights of the perceptual term, as safetensors; default: none, and no such term.
        size: of a clip; default: 256x256.
        reduction: of the error over pixels, sum or mean; default: sum, as published.
        steps: in all; default: that of the stage.
        frames: of a clip, 8n + 1; default: that of the stage.
        every: take each so-manieth frame; default: that of the stage.
        batch: clips in a step; default: that of the stage.
        learning_rate: of both networks; default: that of the stage.
        lpips_weight: of the perceptual term; default: that of the stage.
        kl_weight: of the divergence of latents from normal ones; default: that of the stage.
        wavelet_weight: of the wavelet coefficients; default: that of the stage.
        adversarial_weight: 0 for no discriminator; default: that of the stage.
        discriminator_start: step before which there is none; default: that of the stage.
        discriminator_width: of its first layer; default: that of the stage.
        seed: of everything random; default: that of the stage.
        save_every: steps from one checkpoint to the next.
        workers: processes that read.
        limits: the largest files to decode.
    """

    extra: ClassVar[str] = "train"
    folder: Annotated[str, Positional("CLIPS")]
    out: Annotated[str, "DIR"]
    model: Annotated[str | None, "NAME"] = None
    init: Annotated[str | None, "DIR"] = None
    stage: Annotated[str, "NAME"] = "I"
    lpips: Annotated[str | None, "FILE"] = None
    size: Annotated[str | None, "HxW"] = None
    reduction: Annotated[str | None, "HOW"] = None
    steps: Annotated[int | None, "STEPS"] = None
    frames: Annotated[int | None, "FRAMES"] = None
    every: Annotated[int | None, "FRAMES"] = None
    batch: Annotated[int | None, "CLIPS"] = None
    learning_rate: Annotated[float | None, "PER_STEP"] = None
    lpips_weight: Annotated[float | None, "FACTOR"] = None
    kl_weight: Annotated[float | None, "FACTOR"] = None
    wavelet_weight: Annotated[float | None, "FACTOR"] = None
    adversarial_weight: Annotated[float | None, "FACTOR"] = None
    discriminator_start: Annotated[int | None, "STEP"] = None
    discriminator_width: Annotated[int | None, "CHANNELS"] = None
    seed: Annotated[int | None, "SEED"] = None
    save_every: Annotated[int, "STEPS"] = 1000
    workers: Annotated[int, "PROCESSES"] = 2
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.model is not None and self.init is not None:
            raise ValueError(
                f"--model {self.model} begins from random weights and --init {self.init} from "
                "trained ones; give one of them"
            )

    def run(self) -> None:
        """Train, and print the last checkpoint."""
        from skiparse.models.wfvae.train import train_folder

        names = (
            "frames", "every", "batch", "learning_rate", "reduction", "seed", "discriminator_start",
            "discriminator_width", "lpips_weight", "kl_weight", "wavelet_weight",
            "adversarial_weight",
        )  # fmt: skip
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.size is not None:
            given["size"] = height_and_width(self.size)
        device, dtype = self.place
        checkpoint = train_folder(
            self.folder,
            out=self.out,
            model=self.model or "v1.5-M",
            init=self.init,
            stage=self.stage,
            steps=self.steps,
            lpips=self.lpips,
            given=given,
            save_every=self.save_every,
            limits=self.limits,
            device=device,
            dtype=dtype,
            workers=self.workers,
        )
        print(checkpoint)


@dataclass(frozen=True, kw_only=True)
class Evaluate(Computed):
    """Code clips and back, and measure what is lost.

    Args:
        clips: video files.
        model: a folder that WFVAE saved.
        out: folder for evaluation.json and pictures.
        frames: of a clip, 8n + 1.
        height: of a clip.
        width: of a clip.
        fps: at which frames are taken; default: those of a clip.
        tile: sides of the tiles that are coded one by one; default: all at once.
        overlap: what tiles share, with --tile; default: none.
        lpips: the network of LPIPS, safetensors (VGG) or TorchScript; default: none, not measured.
        fvd: the feature network of FVD, TorchScript, run none you distrust; default: none, not
            measured.
        limits: the largest files to decode.
    """

    extra: ClassVar[str] = "models,video"
    clips: Annotated[tuple[str, ...], Positional("CLIP")]
    model: Annotated[str, "DIR"]
    out: Annotated[str, "DIR"]
    frames: Annotated[int, "FRAMES"] = 33
    height: Annotated[int, "PIXELS"] = 256
    width: Annotated[int, "PIXELS"] = 256
    fps: Annotated[float | None, "PER_SECOND"] = None
    tile: Annotated[int | None, "PIXELS"] = None
    overlap: Annotated[int | None, "PIXELS"] = None
    lpips: Annotated[str | None, "FILE"] = None
    fvd: Annotated[str | None, "FILE"] = None
    limits: Limits = field(default_factory=Limits)

    def run(self) -> None:
        """Measure, print and write."""
        from skiparse.models.wfvae import evaluate

        device, dtype = self.place
        evaluate.run(
            self.model,
            self.clips,
            self.out,
            frames=self.frames,
            size=(self.height, self.width),
            fps=self.fps,
            tile=self.tile,
            overlap=self.overlap,
            lpips=self.lpips,
            fvd=self.fvd,
            limits=self.limits,
            device=device,
            dtype=dtype,
        )


@dataclass(frozen=True, kw_only=True)
class Statistics(Computed):
    """Give a WF-VAE the shift and scale of its latents.

    Args:
        model: a folder that WFVAE saved.
        clips: a folder with video files.
        out: the folder to make; it must not exist.
        frames: of a clip, 8n + 1.
        size: of a clip.
        every: take each so-manieth frame.
        cuts: how many clips; default: one of each file.
        seed: of the cuts.
        workers: processes that read.
        limits: the largest files to decode.
    """

    extra: ClassVar[str] = "train"
    model: Annotated[str, Positional("MODEL")]
    clips: Annotated[str, Positional("CLIPS")]
    out: Annotated[str, Positional("OUT")]
    frames: Annotated[int, "FRAMES"] = 25
    size: Annotated[str, "HxW"] = "256x256"
    every: Annotated[int, "FRAMES"] = 1
    cuts: Annotated[int | None, "CLIPS"] = None
    seed: Annotated[int, "SEED"] = 0
    workers: Annotated[int, "PROCESSES"] = 2
    limits: Limits = field(default_factory=Limits)

    def run(self) -> None:
        """Measure, and print the folder made."""
        from skiparse.models.wfvae import stats

        device, dtype = self.place
        made = stats.run(
            self.model,
            self.clips,
            self.out,
            frames=self.frames,
            size=height_and_width(self.size),
            every=self.every,
            cuts=self.cuts,
            seed=self.seed,
            limits=self.limits,
            device=device,
            dtype=dtype,
            workers=self.workers,
        )
        print(made)
