"""How checkpoints of other programs are read: nothing in them is run, and nothing is guessed."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skiparse.models import shards

State = Mapping[str, Tensor]


def read(path: Path) -> Any:
    """What a file holds, mapped rather than read.

    Args:
        path: a ``.safetensors`` file, a folder of them with an index, or what ``torch.save`` wrote.

    Raises:
        ValueError: if it is damaged, or holds more than tensors, plain values and
            ``argparse.Namespace``.
        FileNotFoundError: if it is not there.
    """
    if path.is_dir():
        if (path / shards.MANIFEST).exists():
            shards.verify(path)
        return shards.read(path)
    if path.suffix == ".safetensors":
        return shards.read_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no file")
    if torch.__version__ < "2.10":  # compared as versions, not as text
        raise ValueError(
            f"{path}: torch {torch.__version__} does not read .pt files from others safely "
            "(CVE-2026-24747); install torch >= 2.10"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle can raise anything at all
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it holds a {refused[1]}" if refused else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is refused: {reason}. It must be what torch.save (since torch 1.6) writes of "
            "tensors and plain values; save the weights alone, or fetch it again"
        ) from error


def at(checkpoint: Any, key: str, path: Path) -> State:
    """The weights under ``key``, dots between levels, ``""`` for the whole; or ValueError."""
    for step in key.split(".") if key else ():
        if not isinstance(checkpoint, Mapping):
            break
        if step not in checkpoint:
            raise ValueError(f"{path} has no key {step!r}; it has {list(checkpoint)[:10]}")
        checkpoint = checkpoint[step]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not weights by name")
    return checkpoint


def plain(state: State) -> dict[str, Tensor]:
    """Without ``_extra_state``, and without the ``module.`` that wrappers put before every name.

    Raises:
        ValueError: with the first ten entries that are no dense floating-point tensors.
    """
    bare = {name: tensor for name, tensor in state.items() if not is_extra(name)}
    strange = [name for name, tensor in bare.items() if not _is_weight(name, tensor)]
    refuse("state holds more than dense floating-point tensors by name", {"others": strange})
    while bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module."): tensor for name, tensor in bare.items()}
    return bare


def is_extra(name: object) -> bool:
    """Whether it is a layer's ``_extra_state``, which no output depends on."""
    return isinstance(name, str) and name.split(".")[-1] == "_extra_state"


def refuse(what: str, wrong: Mapping[str, Sequence[object]]) -> None:
    """Raise :func:`error` if there is anything in ``wrong``."""
    if any(wrong.values()):
        raise error(what, wrong)


def error(what: str, wrong: Mapping[str, Sequence[object]]) -> ValueError:
    """``what``, and the first ten of each kind of ``wrong``."""
    told = [
        f"{len(names)} {kind}: {', '.join(map(str, names[:10]))}{', ...' * (len(names) > 10)}"
        for kind, names in wrong.items()
        if names
    ]
    return ValueError(f"{what}: {'; '.join(told)}")


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
    )
