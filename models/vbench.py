"""What VBench wants to find in a folder of videos, and what is missing there.

VBench reads one flat folder: ``{prompt}-{index}.mp4`` with the exact text of each prompt, five
videos each (25 for temporal flickering), and nothing else, because it takes the extension of the
videos from whichever file is listed first. Side-cars go to a folder beside it. A missing video does
not stop VBench; it changes the score.

Source: the VBench repository's description of its prompt suite.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from skiparse.models.data.plain import read_text

SAMPLES = 5
SUFFIX = ".mp4"
_MAX_BYTES = 254  # of a file name: the usual limit of 255, less one for the side-car's ".json"

_ELSE = (
    "sample it without the VBench layout and score it in VBench's mode custom_input, where a JSON "
    "file maps names to prompts"
)


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, each once, exact but for their ends; empty ones are dropped.

    Args:
        path: in UTF-8, or in UTF-16 with a byte order mark; such marks are no part of a prompt.

    Raises:
        ValueError: if there are none, or it is not such a file.
    """
    try:
        lines = read_text(path).split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is not UTF-8: {error}; convert it") from error
    prompts = [line.removesuffix("\r") for line in lines]
    found = list(dict.fromkeys(prompt for prompt in prompts if prompt.strip()))
    if not found:
        raise ValueError(f"no prompt in {os.fspath(path)!r}; write one a line")
    return found


def file_name(prompt: str, index: int) -> str:
    """The name VBench looks for.

    Raises:
        ValueError: if no file can be called so.
    """
    name = f"{prompt}-{index}{SUFFIX}"
    if "/" in name or "\0" in name:
        raise ValueError(f"prompt {prompt!r} holds a '/' or NUL, so it cannot name a file; {_ELSE}")
    size = len(name.encode())
    if size > _MAX_BYTES:
        raise ValueError(
            f"prompt {prompt!r} makes a file name of {size} bytes, over {_MAX_BYTES}; {_ELSE}"
        )
    return name


def file_names(prompts: Sequence[str], *, samples: int = SAMPLES) -> list[str]:
    """Every name VBench looks for; ValueError for a prompt that cannot name a file."""
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    return [file_name(prompt, index) for prompt in prompts for index in range(samples)]


def sidecar(folder: str | os.PathLike[str], name: str) -> Path:
    """Where the side-car of the video ``name`` goes: beside ``folder``, not in it."""
    folder = Path(folder).absolute()
    return folder.with_name(f"{folder.name}-sidecars") / f"{name.removesuffix(SUFFIX)}.json"


def missing(
    folder: str | os.PathLike[str], prompts: Sequence[str], *, samples: int = SAMPLES
) -> list[str]:
    """The names VBench will not find in ``folder``, or only an empty file of; in order."""
    there = {file.name for file in _files(folder) if file.stat().st_size}
    return [name for name in file_names(prompts, samples=samples) if name not in there]


def strays(
    folder: str | os.PathLike[str], prompts: Sequence[str], *, samples: int = SAMPLES
) -> list[str]:
    """The names in ``folder`` that VBench does not look for, such as left-over temporary files."""
    wanted = set(file_names(prompts, samples=samples))
    return sorted(file.name for file in _files(folder) if file.name not in wanted)


def _files(folder: str | os.PathLike[str]) -> list[Path]:
    folder = Path(folder)
    return list(folder.iterdir()) if folder.exists() else []
