"""How checkpoints of other programs are read: nothing in them is run, and nothing is guessed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence, ValuesView
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from skiparse.models import archive, shards
from skiparse.models.archive import Inert

State = Mapping[str, Tensor]
Source = str | os.PathLike[str]

_RANK = re.compile(r"mp_rank_([0-9]+)")
_MEGATRON = ("model_optim_rng.pt", "model_rng.pt")  # with and without the optimiser's state
_LATEST = "latest_checkpointed_iteration.txt"
_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
# Components that wrappers put into names: torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = (
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
)  # fmt: skip
_AVERAGED = re.compile(  # not Adam's exp_avg
    r"(?<![a-z])(?<!exp_)(ema|swa|avg)(?![a-z])|averag|shadow|polyak", re.IGNORECASE
)
_LEVELS = 8  # to which weights are looked for


def sources(src: Source | Sequence[Source]) -> list[Path]:
    """The files, or the one folder of safetensors, that hold each rank's weights.

    Args:
        src: a file; those of every rank, in order; or a folder: of safetensors, of one file of
            weights, or of ranks, ``mp_rank_00/model_optim_rng.pt`` and so on, also below what
            ``latest_checkpointed_iteration.txt`` names.

    Raises:
        ValueError: if a rank is given twice or out of order, or a folder holds something else.
    """
    if not isinstance(src, (str, os.PathLike)):
        return _in_order([Path(source) for source in src])
    path = Path(src)
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return [path]
    pickles = [file for file in path.iterdir() if file.suffix in _PICKLES and file.is_file()]
    if len(pickles) == 1:
        return pickles
    if (path / _LATEST).exists():
        step = (path / _LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch("release|[0-9]{1,9}", step):
            raise ValueError(f"{path / _LATEST} says {step[:40]!r}, not a step or release")
        path /= "release" if step == "release" else f"iter_{int(step):07d}"
    ranks = sorted(child for child in path.glob("mp_rank_*") if child.is_dir())
    numbers = [int(m[1]) for rank in ranks if (m := _RANK.fullmatch(rank.name))]
    if not ranks or numbers != list(range(len(ranks))):
        held = [file.name for file in pickles] or [rank.name for rank in ranks]
        raise ValueError(
            f"{path} holds neither safetensors, nor one file of weights, nor folders mp_rank_00, "
            "mp_rank_01, ... without a gap (a second number, of pipeline parallelism, is not "
            f"handled); it has {sorted(held)[:10]}. Name the files instead"
        )
    return [
        next((rank / name for name in _MEGATRON if (rank / name).exists()), rank / _MEGATRON[0])
        for rank in ranks
    ]


def _in_order(files: list[Path]) -> list[Path]:
    """The files of ranks, unless one is there twice or their names tell another order."""
    if not files:
        raise ValueError("src names no file; give one, or one for each rank")
    places = [file.resolve() for file in files]
    twice = sorted({str(file) for file in files if places.count(file.resolve()) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: the same rank is given twice; give each rank once")
    numbers = [[int(n) for n in _RANK.findall(str(place))][-1:] for place in places]
    if len(files) > 1 and all(numbers) and numbers != [[n] for n in range(len(files))]:
        raise ValueError(
            f"the files are of ranks {[n for (n,) in numbers]}, by their names; give those of "
            f"ranks 0 to {len(files) - 1}, in order"
        )
    return files


def read(path: Path, *, progress: bool = False) -> Any:
    """What a file holds, mapped rather than read, and by its content, whatever its suffix.

    Args:
        path: a safetensors file, a folder with an index or one such file, or what ``torch.save``
            wrote.
        progress: whether to show a bar while checksums are compared.

    Returns:
        As :func:`skiparse.models.archive.read`: tensors and plain values, all else inert.

    Raises:
        ValueError: if it is damaged, or something else.
        FileNotFoundError: if it is not there.
    """
    if path.is_dir():
        if (path / shards.MANIFEST).exists():
            shards.verify(path)
        return shards.read(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or no file")
    with path.open("rb") as file:
        head = file.read(shards.HEAD)
    if head.startswith(b"PK\x03\x04"):
        size = path.stat().st_size
        with tqdm(
            total=size, unit="B", unit_scale=True, desc=f"check {path.name}", disable=not progress
        ) as bar:
            return archive.read(path, bar.update)
    if path.suffix == ".safetensors" or shards.is_safetensors(head):
        return shards.read_file(path)
    raise ValueError(
        f"{path} is {shards.described(head)}, not what torch.save (since torch 1.6) writes; fetch "
        "it again, or save the weights anew"
    )


@dataclass(frozen=True)
class Found:
    """Weights in a checkpoint."""

    state: State
    place: str  # under which key, dots between levels, "" for the top
    others: tuple[str, ...] = ()  # keys of other weights of such a model, which were not taken


@dataclass
class _Search:
    """Places that hold the weights of a model, and averaged ones that cannot be read."""

    roots: frozenset[str]
    fitting: dict[str, State] = field(default_factory=dict)
    others: dict[str, State] = field(default_factory=dict)
    averaged: list[tuple[str, str]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def look(
        self, held: Mapping[Any, Any], trail: tuple[str, ...] = (), *, table: bool = True
    ) -> None:
        """Note what ``held`` is, a table or a group of names that begin alike, and go on below."""
        if id(held) in self.seen or len(trail) > _LEVELS:
            return
        self.seen.add(id(held))
        place = ".".join(trail)
        names = [n for n, value in held.items() if isinstance(n, str) and _is_tensor(value)]
        fits = bool(names) and self.roots <= {_first(n) for n in unwrapped(names, self.roots)}
        if fits:
            self.fitting[place] = _without_tables(held)
        elif names and table:
            self.others[place] = _without_tables(held)
        groups: dict[str, dict[str, Any]] = {}
        for name, value in held.items():
            if isinstance(name, str) and not fits and "." in name:
                first, _, rest = name.partition(".")
                groups.setdefault(first, {})[rest] = value
        tables = {name: value for name, value in held.items() if isinstance(name, str)}
        for name, value in (groups | tables).items():
            is_new = not _AVERAGED.search(place) and _AVERAGED.search(name)
            if is_new and (what := _substance(value)):
                self.averaged.append((".".join((*trail, name)), what))
            if isinstance(value, Mapping):
                self.look(value, (*trail, name), table=name not in groups)


def find(checkpoint: Any, key: str | None, path: Path, roots: frozenset[str]) -> Found:
    """The weights of a model in what a file holds.

    Args:
        checkpoint: of :func:`read`.
        key: where they are, dots between levels; None looks for them. Averaged ones are then
            preferred.
        path: of the file, for errors.
        roots: first components of names, all of which the model has.

    Raises:
        ValueError: if there is nothing under ``key``; or, without it, if there are several such
            weights of which not just one are averaged, or averaged ones that cannot be read.
    """
    if key is not None:
        return Found(_without_tables(at(checkpoint, key, path)), key)
    search = _Search(roots)
    if isinstance(checkpoint, Mapping):
        search.look(checkpoint)
    fitting = search.fitting
    averaged = [place for place in fitting if _AVERAGED.search(place)]
    unread = [
        f"{place} (a {what})"
        for place, what in search.averaged
        if not any(f"{found}.".startswith(f"{place}.") for found in fitting)
    ]
    if len(averaged) == 1 or (len(fitting) == 1 and not unread):
        (place,) = averaged or fitting
    elif fitting:
        also = f", and averaged ones that are not read under {', '.join(unread)}" if unread else ""
        raise ValueError(f"{path} has weights under each of {list(fitting)}{also}; give key")
    elif len(search.others) == 1:  # what is wrong with them will be told name by name
        ((place, state),) = search.others.items()
        return Found(state, place)
    elif search.others:
        raise ValueError(
            f"{path} has tensors, but no such model's weights, under each of "
            f"{list(search.others)[:10]}; give key"
        )
    else:
        has = [_told(name, value) for name, value in at(checkpoint, "", path).items()]
        raise ValueError(f"{path} holds no tensors by name; it has {has[:10]}")
    return Found(fitting[place], place, tuple(other for other in fitting if other != place))


def at(checkpoint: Any, key: str, path: Path) -> State:
    """The weights under ``key``, dots between levels, ``""`` for the whole; or ValueError.

    A level may be a table of its own or the beginning of names: ``"ema"`` finds ``ema.a.weight``.
    """
    while key:
        if not isinstance(checkpoint, Mapping):
            break
        step, _, rest = (key, "", "") if key in checkpoint else key.partition(".")
        if step in checkpoint:
            checkpoint = checkpoint[step]
        else:
            within = {
                name.removeprefix(f"{step}."): value
                for name, value in checkpoint.items()
                if isinstance(name, str) and name.startswith(f"{step}.")
            }
            if not within:
                has = [_shown(name) for name in list(checkpoint)[:10]]
                raise ValueError(f"{path} has no key {step!r}; it has {has}")
            checkpoint = within
        key = rest
    if not isinstance(checkpoint, Mapping):
        what = checkpoint.what if isinstance(checkpoint, Inert) else type(checkpoint).__name__
        raise ValueError(f"{path} holds a {what}, not weights by name")
    return checkpoint


def plain(state: State, roots: frozenset[str]) -> dict[str, Tensor]:
    """Without ``_extra_state``, and without what wrappers put into names.

    Args:
        state: the weights.
        roots: first components of the model's own names.

    Raises:
        ValueError: with the first ten entries that are no dense floating-point tensors, or whose
            names are one without what wrappers put in.
    """
    bare = {name: tensor for name, tensor in state.items() if not is_extra(name)}
    strange = [_told(name, tensor) for name, tensor in bare.items() if not _is_weight(name, tensor)]
    refuse("state holds more than dense floating-point tensors by name", {"others": strange})
    names = unwrapped(bare, roots)
    if len(set(names)) < len(names):
        twice = [old for old, new in zip(bare, names, strict=True) if names.count(new) > 1]
        refuse("state has the same weights under several names", {"names": twice})
    return dict(zip(names, bare.values(), strict=True))


def unwrapped(names: Iterable[str], roots: frozenset[str]) -> list[str]:
    """Names without what wrappers put in: a part of any name, or a beginning that all share."""
    parts = [[part for part in name.split(".") if part not in _WRAPPERS] for name in names]
    while parts and all(len(part) > 1 and part[0] == parts[0][0] for part in parts):
        if parts[0][0] in roots:
            break
        parts = [part[1:] for part in parts]
    return [".".join(part) for part in parts]


def check_values(
    weights: Mapping[str, Sequence[Tensor]], *, dtype: torch.dtype | None = None
) -> None:
    """Read every number once, before it is written or loaded.

    Args:
        weights: by name, each rank's tensor.
        dtype: to which they will be cast, None for their own.

    Raises:
        ValueError: with the first ten tensors that have no values, that are not finite, or that
            ``dtype`` cannot hold.
    """
    wrong: dict[str, list[str]] = {"on the meta device, without values": [], "not finite": []}
    large = wrong.setdefault(f"too large for {dtype}", [])
    for name, parts in weights.items():
        if any(part.is_meta for part in parts):
            wrong["on the meta device, without values"].append(name)
            continue
        limits = [limit for part in parts if part.numel() for limit in part.detach().aminmax()]
        most = max((abs(float(limit)) for limit in limits), default=0.0)
        if not all(bool(limit.isfinite()) for limit in limits):
            wrong["not finite"].append(name)
        elif dtype is not None and most > torch.finfo(dtype).max:
            large.append(name)
    refuse("these weights cannot be used", wrong)


def refuse_dtype(dtype: torch.dtype | None) -> None:
    """ValueError unless weights can be cast to ``dtype``."""
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")


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
        f"{len(names)} {kind}: {', '.join(map(_shown, names[:10]))}{', ...' * (len(names) > 10)}"
        for kind, names in wrong.items()
        if names
    ]
    return ValueError(f"{what}: {'; '.join(told)}")


def _without_tables(held: Mapping[Any, Any]) -> dict[Any, Any]:
    """Without the tables that lie beside tensors, for they are places of their own."""
    if not any(_is_tensor(value) for value in held.values()):
        return dict(held)
    return {name: value for name, value in held.items() if not isinstance(value, Mapping)}


def _is_weight(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout == torch.strided
    )


def _is_tensor(value: object) -> bool:
    """Whether it is a tensor of more than a number."""
    return isinstance(value, Tensor) and value.ndim > 0


def _told(name: object, value: object) -> str:
    """A name, and what is there instead of a tensor if that was not read."""
    return f"{_shown(name)} (a {value.what})" if isinstance(value, Inert) else _shown(name)


def _shown(name: object) -> str:
    """A name out of a file, fit for a terminal."""
    text = name.what if isinstance(name, Inert) else str(name)
    return text if text.isprintable() and len(text) <= 300 else ascii(text)[:300]


def _first(name: str) -> str:
    return name.partition(".")[0]


def _substance(value: object, levels: int = 4) -> str:
    """The kind of something that may hold weights; nothing for numbers, text and the like."""
    if isinstance(value, Inert):
        return value.what
    if _is_tensor(value):
        return "tensor"
    inner = value.values() if isinstance(value, Mapping) else value
    if not isinstance(inner, (ValuesView, list, tuple)) or levels == 0:
        return ""
    return type(value).__name__ if any(_substance(each, levels - 1) for each in inner) else ""
