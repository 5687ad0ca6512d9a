"""``skiparse convert suv``: released weights of the denoiser become a folder of ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from skiparse.command import Positional
from skiparse.models.options import Converted


@dataclass(frozen=True, kw_only=True)
class Convert(Converted):
    """Turn released weights of the denoiser, SUV, into safetensors.

    Args:
        src: a .pt or safetensors file, that of each parallel rank, or a folder.
        dst: the folder to make; it must not exist.
        sparsity: of each stage, such as 1,2,4,8,4,2,1; default: that of the preset.
    """

    src: Annotated[tuple[str, ...], Positional("IN")]
    dst: Annotated[str, Positional("OUT")]
    sparsity: Annotated[tuple[str, ...] | None, "K,K,..."] = None

    def __post_init__(self) -> None:
        if not all(k.isdecimal() for k in self.sparsity or ()):
            given = ",".join(self.sparsity or ())
            raise ValueError(f"--sparsity {given}: give whole numbers such as 1,2,4,2,1")

    def run(self) -> None:
        """Convert, and say what was found and what was left out."""
        from skiparse.models.suv.convert import convert_file

        report = convert_file(
            self.src if len(self.src) > 1 else self.src[0],
            self.dst,
            sparsity=None if self.sparsity is None else [int(k) for k in self.sparsity],
            key=self.key,
            dtype=self.written,
            progress=True,
        )
        where = self.where(report.found, report.others)
        print(f"{self.dst}: {report.names} names, {report.ranks} rank(s), weights found {where}")
        print(f"left out, without effect: {', '.join(report.dropped) or 'nothing'}")
