"""Options that several commands share; none of them asks for torch before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Computed:
    """Of a command that computes: on which device, in which numbers.

    Args:
        device: "cpu" or "cuda", or "cuda:1"; default: cuda if there is one.
        dtype: float32, bfloat16, float16 or float64; default: bfloat16 on cuda, float32 on cpu.
    """

    device: Annotated[str | None, "DEVICE"] = None
    dtype: Annotated[str | None, "DTYPE"] = None

    @property
    def place(self) -> tuple[str, torch.dtype]:
        """The device, and the type to compute in.

        Raises:
            ValueError: if there is no such device here, or no such type.
        """
        from skiparse.models import devices

        device = str(devices.chosen(self.device, setting="--device "))
        return device, devices.dtype(self.dtype or ("bfloat16" if device != "cpu" else "float32"))


def height_and_width(text: str) -> tuple[int, int]:
    """The two sides that ``--size`` gives, in pixels.

    Raises:
        ValueError: unless they are whole numbers with an x between.
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"--size {text}: give height and width, such as 256x256")
    return int(sides[0]), int(sides[1])


@dataclass(frozen=True, kw_only=True)
class Converted:
    """Of the conversion of released weights.

    Args:
        key: where IN keeps the weights; default: averaged ones if there are any.
        dtype: of the weights written; default: that of IN.
    """

    extra: ClassVar[str] = "models"
    key: Annotated[str | None, "NAME"] = None
    dtype: Annotated[str | None, "DTYPE"] = None

    @property
    def written(self) -> torch.dtype | None:
        """The type of the weights written; None for that which they have.

        Raises:
            ValueError: if there is no such type.
        """
        from skiparse.models import devices

        return devices.dtype(self.dtype) if self.dtype else None

    @staticmethod
    def where(found: str, others: Sequence[str]) -> str:
        """Under which key weights were, and under which there are some that were not taken."""
        where = f"under {found}" if found else "at the top"
        keys = ", ".join(f"--key {other}" if other else "--key ''" for other in others)
        return f"{where}; not taken, but there: {keys}" if others else where
