"""``skiparse demo``: attention on a real clip, then models trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Show attention on a real clip, then an autoencoder and a model trained on it.

    Args:
        out: folder for report.html and all that it shows.
        clip: only attention, on this video file; default: all parts, on a clip of Big Buck Bunny.
    """

    extra: ClassVar[str] = "demo"
    out: Annotated[str, "DIR"] = "demo_out"
    clip: Annotated[str | None, "FILE"] = None

    def run(self) -> None:
        """Write the report."""
        from skiparse.bench.demo import attention, tour

        if self.clip is not None:
            attention.run(self.out, self.clip)
        else:
            tour.run(self.out)
