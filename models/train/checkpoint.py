"""How a run's state becomes a folder that is whole and checked, or is not there at all.

``step-00001000`` holds a ``.safetensors`` file from each process, ``about.json`` with all that is
no tensor, and ``COMPLETE``: size and SHA-256 of every other file. It is filled under a hidden name,
flushed to the disk and renamed; only then do older ones go. Nothing in it is a pickle.

The tensors are written and read by ``torch.distributed.checkpoint``, in its safetensors layout: any
number of processes can read what any other number wrote.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import skiparse
from skiparse.models import shards
from skiparse.models.checkpoints import refuse
from skiparse.models.data.atomic import write_json
from skiparse.models.train.parallel import TIMEOUT

FOLDER = "checkpoints"  # in the folder of a run
ABOUT, COMPLETE = "about.json", "COMPLETE"

T = TypeVar("T")


class CheckpointError(OSError):
    """A checkpoint that could not be written, or is damaged: which one, why, and what to do."""


class Checkpoints:
    """The checkpoints of a run, in a folder of their own; one run at a time writes there.

    A ``with`` block of it ends with nothing being written any more.

    Args:
        folder: made by the first :meth:`save`.
        keep: how many stay; older ones are removed once a new one is complete.
        timeout: seconds to wait for another process.

    Raises:
        ValueError: if ``keep`` is below 1.
    """

    def __init__(
        self, folder: str | os.PathLike[str], keep: int = 2, *, timeout: float = TIMEOUT
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep, self.timeout = Path(folder), keep, timedelta(seconds=timeout)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._gloo: dist.ProcessGroup | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        about: Mapping[str, Any],
        *,
        asynchronous: bool = False,
        hold: int | None = None,
    ) -> None:
        """Write a checkpoint, whole or not at all. Every process of the run calls it alike.

        Args:
            step: in the name of the folder.
            tensors: by name, of any device and dtype, the same names in every process. A DTensor is
                written as the shards it has, any other tensor by one process.
            about: anything else, in terms of JSON.
            asynchronous: return once the tensors are copied to the CPU, and write meanwhile; they
                may change at once. The next call of ``save`` or :meth:`wait` waits for it.
            hold: a step after which nothing was learned: those up to it are not pushed out by those
                after it, of which only the newest stays.

        Raises:
            ValueError: for arguments that make no sense, or a step that was saved before.
            CheckpointError: if it cannot be written, in every process, whichever failed; or if the
                asynchronous one before could not be: then this one was not begun. The checkpoints
                there and the tensors are as they were.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        try:
            about = json.loads(json.dumps(about, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"about must be JSON: {error}; convert that") from error
        self.wait()
        path = self.folder / f"step-{step:08d}"
        if _is_complete(path):
            raise ValueError(f"{path} is complete already; save another step, or remove it first")
        if _processes() > 1 and self._gloo is None:
            # For the CPU, and for a thread of its own.
            self._gloo = dist.new_group(backend="gloo", timeout=self.timeout)
        held = _on_cpu(tensors)
        if asynchronous:
            self._writing = self._writer.submit(self._write, path, step, held, about, hold)
        else:
            self._write(path, step, held, about, hold)

    def wait(self) -> None:
        """Until nothing is being written; CheckpointError if that failed, as by :meth:`save`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, None if there is none; incomplete ones are warned of.

        Raises:
            CheckpointError: if it is seen to be damaged. An older one is never taken instead.
        """
        for path in reversed(_steps(self.folder)):
            if _is_complete(path):
                return Checkpoint.at(path)
            warnings.warn(f"{path} has no {COMPLETE} and is ignored; remove it", stacklevel=2)
        return None

    def _write(
        self, path: Path, step: int, tensors: dict[str, Tensor], about: Any, hold: int | None
    ) -> None:
        hidden = path.with_name(f".{path.name}.new")
        first = _rank() == 0
        try:
            _together(lambda: self._begin(hidden, about) if first else None, self._gloo)
            with _torch_dcp():
                writer = HuggingFaceStorageWriter(str(hidden), save_distributed=True)
                state_dict_saver.save(tensors, storage_writer=writer, process_group=self._gloo)
            mine = f"shard-{_rank() + 1:05d}-*"  # as torch names them
            entries = _together(lambda: _entries(hidden.glob(mine)), self._gloo)
            end = partial(self._end, hidden, path, step, entries, hold)
            _together(lambda: end() if first else None, self._gloo)
        except Exception as error:
            if first:
                shutil.rmtree(hidden, ignore_errors=True)
            raise CheckpointError(
                f"saving step {step} in {self.folder} failed: {error}. See that there is room and "
                "that it may be written to; training can go on, or continue from the last one"
            ) from error

    def _begin(self, hidden: Path, about: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".step-*"):  # by a process that was killed
            _delete(left)
        hidden.mkdir()
        write_json(hidden / ABOUT, about)

    def _end(
        self,
        hidden: Path,
        path: Path,
        step: int,
        entries: list[dict[str, Any]],
        hold: int | None,
    ) -> None:
        files = _entries([hidden / ABOUT])
        for entry in entries:
            files |= entry
        versions = {"skiparse": skiparse.__version__, "torch": torch.__version__}
        write_json(hidden / COMPLETE, {"step": step, "files": files, "versions": versions})
        shards.sync(hidden)
        if path.exists():  # incomplete
            _remove(path)
        hidden.rename(path)
        shards.sync(self.folder)
        complete = complete_ones(self.folder)
        after = [old for old in complete if hold is not None and number_of(old) > hold]
        for old in [*complete[: len(complete) - len(after)][: -self.keep], *after[:-1]]:
            _remove(old)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: at which it was saved.
        about: what is no tensor, as it was given; tuples are lists, keys are text.
        files: size and SHA-256 of every file, by name.
    """

    path: Path
    step: int
    about: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @classmethod
    def at(cls, path: Path) -> Checkpoint:
        """The one in the folder ``path``; its tensors are not read yet.

        Raises:
            CheckpointError: if a file is missing or of another size, or is damaged and is none of
                tensors; or if one of tensors is there that was not saved. Other strays, such as a
                file browser leaves, are warned of.
        """
        complete = _read_json(path / COMPLETE)
        try:
            step, files = int(complete["step"]), dict(complete["files"])
            sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path / COMPLETE, "is no record of a checkpoint") from error
        there = {file.name for file in path.iterdir()} - {COMPLETE}
        for name in sorted(sizes.keys() - there):
            raise _damaged(path / name, "is missing")
        for name in sorted(there - sizes.keys()):
            if name.endswith(".safetensors") or name == ".metadata":  # which torch would read
                raise CheckpointError(
                    f"{path / name} is none of the files in {COMPLETE}; see where it is from, and "
                    "remove it"
                )
            warnings.warn(f"{path / name} is none of the checkpoint's and is ignored", stacklevel=2)
        for name, size in sizes.items():
            found = (path / name).stat().st_size
            if found != size:
                raise _damaged(path / name, f"has {found} bytes, not {size}")
        _verify(path / ABOUT, files.get(ABOUT))
        return cls(path, step, _read_json(path / ABOUT), files)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill ``tensors`` in place, all or none. Every process of the run calls it alike.

        Args:
            tensors: exactly those that were saved, in shape and dtype too. A DTensor gets its
                shards, whatever the shards were that were saved.

        Raises:
            CheckpointError: naming a file that does not have its SHA-256.
            ValueError: with the first ten names that are missing, unexpected, or of another shape
                or dtype.
        """
        held: dict[str, Tensor] = {}

        def read() -> None:
            self._check(tensors)
            held.update(_on_cpu(tensors))
            self._fill(held)

        self._verify()
        _together(read)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(held[name])

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, without it; whole, on the CPU.

        Raises:
            CheckpointError: as :meth:`load`.
        """
        self._verify()
        held = {
            name: torch.empty(shape, dtype=dtype)
            for name, (shape, dtype) in self._kinds().items()
            if name.startswith(prefix)
        }
        self._fill(held)
        return {name.removeprefix(prefix): tensor for name, tensor in held.items()}

    def _verify(self) -> None:
        """Every file once, shared out among the processes."""

        def mine() -> None:
            for name in sorted(self.files)[_rank() :: _processes()]:
                _verify(self.path / name, self.files[name])

        _together(mine)

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError unless names, shapes and dtypes are those saved."""
        saved = self._kinds()
        given = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
        differing = [
            f"{name} (saved {list(saved[name][0])} {saved[name][1]}, "
            f"to fill {list(given[name][0])} {given[name][1]})"
            for name in sorted(saved.keys() & given.keys())
            if saved[name] != given[name]
        ]
        refuse(
            f"{self.path} does not fit; continue with the model and settings it was saved with",
            {
                "missing in it": sorted(given.keys() - saved.keys()),
                "unexpected in it": sorted(saved.keys() - given.keys()),
                "of another shape or dtype": differing,
            },
        )

    def _kinds(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        found = HuggingFaceStorageReader(str(self.path)).read_metadata().state_dict_metadata
        return {
            name: (tuple(x.size), x.properties.dtype)
            for name, x in found.items()
            if isinstance(x, TensorStorageMetadata)
        }

    def _fill(self, tensors: dict[str, Tensor]) -> None:
        with _torch_dcp():
            reader = HuggingFaceStorageReader(str(self.path))
            state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)


def _steps(folder: Path) -> list[Path]:
    """What looks like a checkpoint, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=number_of)


def number_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def complete_ones(folder: Path) -> list[Path]:
    """The checkpoints in ``folder`` that are complete, oldest first."""
    return [path for path in _steps(folder) if _is_complete(path)]


def _is_complete(path: Path) -> bool:
    return (path / COMPLETE).is_file()


def _remove(path: Path) -> None:
    """First from sight: half removed, it must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    with suppress(OSError):  # what is left goes before the next one
        _delete(hidden)


def _delete(path: Path) -> None:
    """A folder with all in it, or what else there is of that name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies; of a DTensor, one with the same shards."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def _entries(files: Iterator[Path] | list[Path]) -> dict[str, dict[str, Any]]:
    return {file.name: _entry(file) for file in files}


def _entry(path: Path) -> dict[str, Any]:
    """What ``COMPLETE`` says of a file."""
    return {"bytes": path.stat().st_size, "sha256": shards.sha256(path)}


def _verify(path: Path, entry: object) -> None:
    """CheckpointError unless the file is the one that ``COMPLETE`` says."""
    if _entry(path) != entry:
        raise _damaged(path, f"does not have the SHA-256 in {COMPLETE}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, f"is no JSON: {error}") from error


def _damaged(path: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {how}: the checkpoint is damaged. Copy it again, or remove it to continue from "
        "the one before"
    )


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _together(work: Callable[[], T], group: dist.ProcessGroup | None = None) -> list[T]:
    """What ``work`` gave in every process; if it failed in one, none goes on.

    Raises:
        Exception: this process's own; else CheckpointError with that of another.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    all_of_them = [(result, error and str(error))]
    if _processes() > 1:
        mine, all_of_them = all_of_them[0], all_of_them * _processes()
        dist.all_gather_object(all_of_them, mine, group=group)
    if error is not None:
        raise error
    for rank, (_, reason) in enumerate(all_of_them):
        if reason is not None:
            raise CheckpointError(f"process {rank}: {reason}")
    return [given for given, _ in all_of_them]


@contextmanager
def _torch_dcp() -> Iterator[None]:
    """Around torch's checkpointing: without its warning of being alone, and with plain errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # no Exception, by torch's choice
            rank, (cause, _) = next(iter(error.failures.items()))
            raise CheckpointError(f"process {rank}: {cause}") from cause
