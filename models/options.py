"""Options that several commands share; none of them asks for torch before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args, get_type_hints

from skiparse.models.data.atomic import read_table, write_json

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


OWN = "sampling.json"  # what the videos of a pipeline in a folder are to be, by fields of Asked


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Of a command that makes videos: what they are to be; None leaves it to the model.

    Args:
        height: of a video; default: the model's own, as of all that follows.
        width: of a video; default: its own.
        frames: of a video; 1 for a picture; default: its own.
        steps: calls of the model, or pairs of them with guidance; default: its own.
        fps: of the video; default: its own.
        guidance: how much more a prompt counts than none; 1 is no guidance; default: its own.
        negative: what to stay away from; default: its own.
        rescale: from 0 to 1, more against garish colours; default: its own.
        shift: of the noise; default: its own.
        schedule: of the noise, linear or linear_quadratic; default: its own.
        sequential_cfg: less memory: one prompt after the other.
        hif8: simulate HiF8, eight bits, in the model's products.
    """

    height: Annotated[int | None, "PIXELS"] = None
    width: Annotated[int | None, "PIXELS"] = None
    frames: Annotated[int | None, "FRAMES"] = None
    steps: Annotated[int | None, "STEPS"] = None
    fps: Annotated[int | None, "PER_SECOND"] = None
    guidance: Annotated[float | None, "FACTOR"] = None
    negative: Annotated[str | None, "TEXT"] = None
    rescale: Annotated[float | None, "SHARE"] = None
    shift: Annotated[float | None, "FACTOR"] = None
    schedule: Annotated[str | None, "NAME"] = None
    sequential_cfg: bool | None = None
    hif8: bool | None = None

    def over(self, other: Asked) -> Asked:
        """What is asked here, and where nothing is, what is asked there."""
        told = {each.name: getattr(self, each.name) for each in fields(Asked)}
        return Asked(
            **{k: getattr(other, k) if value is None else value for k, value in told.items()}
        )

    def save(self, folder: Path) -> None:
        """Write it beside a pipeline, whose videos are so unless something else is asked."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        write_json(folder / OWN, told)

    @classmethod
    def load(cls, folder: Path) -> Asked:
        """What :meth:`save` wrote there, if anything.

        Raises:
            ValueError: if it is damaged.
        """
        file = folder / OWN
        if not file.is_file():
            return cls()
        told, hints = read_table(file), get_type_hints(cls)
        wrong = [
            f"{name}={value!r}"
            for name, value in told.items()
            if name not in hints or not isinstance(value, hints[name] | _wider(hints[name]))
        ]
        if wrong:
            known = ", ".join(each.name for each in fields(cls))
            raise ValueError(f"{file} is damaged: {', '.join(wrong)}; it may have {known}")
        return cls(**told)


def _wider(kind: Any) -> Any:
    """What JSON may have in the place of a type: a whole number for a number."""
    return int if float in get_args(kind) else kind


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
