"""Which device a command computes on and in which numbers, checked before anything is put there."""

from __future__ import annotations

import torch


def chosen(device: str | None, *, setting: str) -> torch.device:
    """The device that was asked for, or a GPU if there is one, or the CPU.

    Args:
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; None chooses.
        setting: how it was set, for the error: ``"--device "``.

    Raises:
        ValueError: if there is no such device here.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        made = torch.device(kind)
    except RuntimeError as error:
        raise ValueError(f"{setting}{kind}: give cpu, cuda or cuda:1") from error
    if made.type not in ("cpu", "cuda"):
        raise ValueError(f"{setting}{kind}: models run on cpu and cuda alone; give one of them")
    if made.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{setting}{kind}: torch finds no GPU here; use {setting}cpu")
    if made.type == "cuda" and (made.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{setting}{kind}: torch finds {torch.cuda.device_count()} GPUs, from 0")
    return made


def dtype(name: str) -> torch.dtype:
    """The type of a name that ``--dtype`` gives.

    Raises:
        ValueError: if nothing is computed in it.
    """
    for known in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        if name == str(known).removeprefix("torch."):
            return known
    raise ValueError(f"--dtype {name}: give float32, bfloat16, float16 or float64")
