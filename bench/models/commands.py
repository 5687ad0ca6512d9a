"""``skiparse bench block``, ``bench vae`` and ``bench cache``: what the models cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from skiparse.bench.options import Kept


@dataclass(frozen=True, kw_only=True)
class Block(Kept):
    """Time the parts of one SUV block, spelled out, as it is, and compiled; and their memory."""

    extra: ClassVar[str] = "bench,models"

    def run(self) -> None:
        """Print the table, and keep the rows."""
        from skiparse.bench.models import block

        device, dtype = self.place
        block.run(device=device, dtype=dtype, rounds=self.rounds, results=self.rows("block"))


@dataclass(frozen=True, kw_only=True)
class VAE(Kept):
    """Time WF-VAE in chunks and whole, beside other autoencoders; and their memory."""

    extra: ClassVar[str] = "bench,models"

    def run(self) -> None:
        """Print the tables, and keep the rows."""
        from skiparse.bench.models import vae

        device, dtype = self.place
        vae.run(device=device, dtype=dtype, rounds=self.rounds, results=self.rows("vae"))


@dataclass(frozen=True, kw_only=True)
class Cache(Kept):
    """Time training from cached features beside training with encoders: what it saves."""

    extra: ClassVar[str] = "bench,train"

    def run(self) -> None:
        """Print the tables, and keep the rows."""
        import torch

        device, dtype = self.place
        if device != "cpu" or dtype != torch.float32:
            raise ValueError("bench cache measures on the CPU in float32; add --device cpu")
        from skiparse.bench.models import cache

        cache.run(rounds=self.rounds, results=self.rows("cache"))
