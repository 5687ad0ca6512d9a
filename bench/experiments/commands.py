"""``skiparse experiment``: comparisons on the real clip, as they come out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Of every experiment.

    Args:
        out: folder for a picture and every number in it; made if need be.
        steps: of the optimiser; default: as many as it takes to see something.
    """

    extra: ClassVar[str] = "demo,models"
    out: Annotated[str, "DIR"] = "demo_out"
    steps: Annotated[int | None, "STEPS"] = None

    @property
    def asked(self) -> dict[str, Any]:
        """The steps, if they were given."""
        return {} if self.steps is None else {"steps": self.steps}


@dataclass(frozen=True, kw_only=True)
class Overfit(Experiment):
    """Let a tiny SUV, dense and sparse, learn scenes of the clip by heart."""

    def run(self) -> None:
        """Train, sample and draw."""
        from skiparse.bench.experiments import overfit

        overfit.run(self.out, **self.asked)


@dataclass(frozen=True, kw_only=True)
class Clipping(Experiment):
    """Compare adaptive and fixed clipping of gradients, when batches are bad."""

    def run(self) -> None:
        """Train and draw."""
        from skiparse.bench.experiments import clipping

        clipping.run(self.out, **self.asked)


@dataclass(frozen=True, kw_only=True)
class Sparsity(Experiment):
    """Train dense, sparse and converted models at equal steps."""

    def run(self) -> None:
        """Train and draw."""
        from skiparse.bench.experiments import sparsity

        sparsity.run(self.out, **self.asked)


@dataclass(frozen=True, kw_only=True)
class Extended(Experiment):
    """Train sparse models with a linear branch, and with experts, beside ones without."""

    def run(self) -> None:
        """Train and draw."""
        from skiparse.bench.experiments import extended

        extended.run(self.out, **self.asked)


@dataclass(frozen=True, kw_only=True)
class Retrofit(Experiment):
    """Make a tiny dense Wan sparse and tune it, in full and with LoRA, beside the dense one."""

    def run(self) -> None:
        """Train and draw."""
        from skiparse.bench.experiments import retrofit

        retrofit.run(self.out, **self.asked)


@dataclass(frozen=True, kw_only=True)
class Images(Experiment):
    """Tell a tiny SUV of first frames, by FlashI2V and by masks, beside one of text alone."""

    def run(self) -> None:
        """Train, sample and draw."""
        from skiparse.bench.experiments import images

        images.run(self.out, **self.asked)


@dataclass(frozen=True, kw_only=True)
class Wavelets(Experiment):
    """Train a tiny WF-VAE with and without its wavelet loss and its energy flow."""

    def run(self) -> None:
        """Train and draw."""
        from skiparse.bench.experiments import wavelets

        wavelets.run(self.out, **self.asked)
