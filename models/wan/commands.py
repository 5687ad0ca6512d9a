"""``skiparse convert osp-next``: released weights become a model of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from skiparse.command import Positional
from skiparse.models.options import Converted


@dataclass(frozen=True, kw_only=True)
class Convert(Converted):
    """Turn released weights of OSP-Next, a sparse Wan 2.1, into what diffusers loads.

    Args:
        src: model.pt, ema_model_state_dict.pt, a safetensors file, or a folder with one of them.
        dst: the folder to make; it must not exist.
        base: the WanPipeline whose VAE and text encoder are copied; default: none, and there are
            the transformer and the scheduler alone.
        heads: of attention; default: as many as have 128 channels.
        ratio: rows, and columns, of a frame that are dealt out together.
        dense: layers at the beginning and at the end that are dense.
    """

    src: Annotated[str, Positional("IN")]
    dst: Annotated[str, Positional("OUT")]
    base: Annotated[str | None, "DIR"] = None
    heads: Annotated[int | None, "HEADS"] = None
    ratio: Annotated[int, "OWNERS"] = 2
    dense: Annotated[tuple[str, ...], "FIRST,LAST"] = ("4", "4")

    def __post_init__(self) -> None:
        if len(self.dense) != 2 or not all(count.isdecimal() for count in self.dense):
            raise ValueError(f"--dense {','.join(self.dense)}: give two numbers, such as 4,4")

    def run(self) -> None:
        """Convert, and say what was found."""
        from skiparse.models.wan.convert import convert_file

        first, last = (int(count) for count in self.dense)
        report = convert_file(
            self.src,
            self.dst,
            base=self.base,
            heads=self.heads,
            ratio=self.ratio,
            dense=(first, last),
            key=self.key,
            dtype=self.written,
            progress=True,
        )
        where = self.where(report.found, report.others)
        print(f"{self.dst}: {report.names} names, weights found {where}")
        print(report.sparsity)
