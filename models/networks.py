"""How networks that are not shipped come from files that one has: TorchScript, and LPIPS."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from skiparse.models.wfvae.losses import LPIPS

Pictures = Callable[[Tensor, Tensor], Tensor]


def existing(path: str | os.PathLike[str]) -> Path:
    """``path``; FileNotFoundError if there is no such file."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; networks are not shipped")
    return file


def script(file: Path, device: str) -> torch.jit.ScriptModule:
    """The network in a file. TorchScript is a program: run only files from a source you trust.

    Raises:
        ValueError: if it is none.
    """
    if file.suffix == ".safetensors":
        raise ValueError(f"{file} holds weights and no network; save one with torch.jit.save")
    try:
        return torch.jit.load(file, map_location=device).eval()
    except RuntimeError as error:
        raise ValueError(f"{file} is no TorchScript; save one with torch.jit.save") from error


def takes(network: torch.jit.ScriptModule) -> list[str]:
    """The names of what its ``forward`` is given."""
    schema = network.forward.schema  # type: ignore[attr-defined]  # a ScriptMethod
    return [argument.name for argument in schema.arguments if argument.name != "self"]


def load_lpips(path: str | os.PathLike[str], *, device: str = "cpu") -> Pictures:
    """LPIPS from a file: frames ``[T, 3, H, W]`` in [-1, 1] twice, to distances ``[T]``.

    Args:
        path: ``.safetensors`` as :meth:`LPIPS.from_file` takes it, with VGG; else TorchScript that
            takes two batches of pictures in [-1, 1] and gives a number, or a map of them, for each
            pair. TorchScript is a program: run only files from a source you trust.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither, or gives something else.
    """
    file = existing(path)
    if file.suffix == ".safetensors":
        lpips = LPIPS.from_file(file).to(device)
        return lambda video, made: lpips(*(x.transpose(0, 1)[None] for x in (video, made)))
    network = script(file, device)

    def distances(video: Tensor, made: Tensor) -> Tensor:
        found = network(video, made)
        if not isinstance(found, Tensor) or found.ndim < 1 or len(found) != len(video):
            raise ValueError(f"{file} gives no number for each of {len(video)} pairs of pictures")
        return found.reshape(len(video), -1).mean(1)

    return distances
