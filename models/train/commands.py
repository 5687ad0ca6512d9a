"""``skiparse train`` and ``skiparse export``: a run, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from skiparse.command import Positional, Rest


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model through the stages of a config.

    The same command again continues the run. Under torchrun, several processes share the work.
    ``skiparse train CONFIG --help`` tells of all settings, ``--print_config`` prints their values.

    Args:
        config: a YAML file, or v1.5, mini or wfvae.
        settings: each can be changed behind the file, such as --seed 1 --stages.V1.steps 100.
    """

    extra: ClassVar[str] = "train"
    config: Annotated[str, Positional("CONFIG")]
    settings: Annotated[tuple[str, ...], Rest("--SETTING VALUE")] = ()

    def run(self) -> None:
        """Train, and print the last checkpoint."""
        from skiparse.models.train.config import load
        from skiparse.models.train.core import train

        print(train(load(self.config, self.settings)))


@dataclass(frozen=True, kw_only=True)
class Export:
    """Make a model of a run: for ``skiparse sample``, or a WFVAE.

    Args:
        run_folder: the out of a run.
        out: the folder to make; it must not exist.
        vae: a folder that WFVAE saved; default: none, as a denoiser alone needs it.
        text: a folder with the text encoders; default: none, as a denoiser alone needs it.
        weights: averaged ones, or those of the last step.
        other_encoders: take a VAE or text encoders that are not those of the run.
        dtype: of all weights, such as bfloat16; default: float32, as they were trained.
        lora: of a run with one: merged with the weights beside it, or apart, for pipelines of
            diffusers to load; default: merged.
        init: where those weights are by now; default: where they were.
    """

    extra: ClassVar[str] = "train"
    run_folder: Annotated[str, Positional("RUN")]
    out: Annotated[str, Positional("OUT")]
    vae: Annotated[str | None, "DIR"] = None
    text: Annotated[str | None, "DIR"] = None
    weights: Literal["ema", "model"] = "ema"
    other_encoders: bool = False
    dtype: Annotated[str | None, "DTYPE"] = None
    lora: Literal["merged", "apart"] | None = None
    init: Annotated[str | None, "DIR"] = None

    def run(self) -> None:
        """Export, and print the folder made."""
        from skiparse.models import devices
        from skiparse.models.train.export import export

        made = export(
            self.run_folder,
            self.out,
            vae=self.vae,
            text=self.text,
            weights=self.weights,
            other_encoders=self.other_encoders,
            dtype=devices.dtype(self.dtype) if self.dtype else None,
            lora=self.lora,
            init=self.init,
        )
        print(made)
