"""How the weights of the released SUV come to bear our names, and go back.

Two programs wrote such weights: the original release and MindSpeed-MM, which named the attention
layers anew. Either may have cut them over tensor-parallel ranks. All of it is undone by name and by
shape; what does not fit exactly is refused.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from skiparse.models import checkpoints, shards
from skiparse.models.checkpoints import Source, State
from skiparse.models.shards import Lazy
from skiparse.models.suv.model import SUV

# Module names. A row is ours, the original release's, MindSpeed-MM's.
_ROWS = ("ours", "original", "mindspeed")
_ROOT = (
    ("patch_embed", *["patch_embed.proj"] * 2),
    ("timestep_embed.linear_1", *["time_text_embed.timestep_embedder.linear_1"] * 2),
    ("timestep_embed.linear_2", *["time_text_embed.timestep_embedder.linear_2"] * 2),
    ("pooled_embed.linear_1", *["time_text_embed.text_embedder.linear_1"] * 2),
    ("pooled_embed.linear_2", *["time_text_embed.text_embedder.linear_2"] * 2),
    ("text_embed", *["caption_projection"] * 2),
    ("norm_final", *["norm_final"] * 2),
    ("norm_out.linear", *["norm_out.linear"] * 2),
    ("norm_out.norm", *["norm_out.norm"] * 2),
    ("proj_out", *["proj_out"] * 2),
)
_BLOCK = (
    ("norm1.linear", *["norm1.linear"] * 2),
    ("norm1.norm", *["norm1.norm"] * 2),
    ("norm1.text_norm", *["norm1.norm_enc"] * 2),
    ("attn.to_q", "attn1.to_q", "attn1.proj_q"),
    ("attn.to_k", "attn1.to_k", "attn1.proj_k"),
    ("attn.to_v", "attn1.to_v", "attn1.proj_v"),
    ("attn.to_out", "attn1.to_out.0", "attn1.proj_out"),
    ("attn.text_to_q", "attn1.add_q_proj", "attn1.added_proj_q"),
    ("attn.text_to_k", "attn1.add_k_proj", "attn1.added_proj_k"),
    ("attn.text_to_v", "attn1.add_v_proj", "attn1.added_proj_v"),
    ("attn.text_to_out", "attn1.to_add_out", "attn1.added_proj_out"),
    ("attn.norm_q", "attn1.norm_q", "attn1.norm_proj_q"),
    ("attn.norm_k", "attn1.norm_k", "attn1.norm_proj_k"),
    ("attn.text_norm_q", "attn1.norm_added_q", "attn1.norm_added_proj_q"),
    ("attn.text_norm_k", "attn1.norm_added_k", "attn1.norm_added_proj_k"),
    ("norm2.linear", *["norm2.linear"] * 2),
    ("norm2.norm", *["norm2.norm"] * 2),
    ("norm2.text_norm", *["norm2.norm_enc"] * 2),
    ("ff.linear_1", *["ff.net.0.proj"] * 2),
    ("ff.linear_2", *["ff.net.2"] * 2),
    ("text_ff.linear_1", *["ff_enc.net.0.proj"] * 2),
    ("text_ff.linear_2", *["ff_enc.net.2"] * 2),
)
_SKIP = (("norm", "0", "0"), ("linear", "1", "1"))
# What precedes the modules, and how many numbers stand between.
_GROUPS = (
    (("", "", ""), 0, _ROOT),
    (("stages.", *["transformer_blocks."] * 2), 2, _BLOCK),
    (("skips.", *["skip_norm_linear."] * 2), 1, _SKIP),
    (("text_skips.", *["skip_norm_linear_enc."] * 2), 1, _SKIP),
)
_NO_BIAS = ("attn.norm_", "attn.text_norm_", "ff.linear_", "text_ff.linear_")
# Nothing reads the text after the last block, yet with tensor parallelism the original built these.
_INERT = ("attn.text_to_out", "norm2.text_norm", "text_ff.linear_1", "text_ff.linear_2")

# First components of names: of all released ones, and of those that every SUV has.
_ROOTS = frozenset(
    prefix.rstrip(".") or module.partition(".")[0]
    for (_, prefix, _), _, modules in _GROUPS
    for _, module, _ in modules
)
_MUST = frozenset({"patch_embed", "transformer_blocks", "proj_out"})


@dataclass(frozen=True)
class Report:
    """What was found in released weights, and what was left out."""

    names: str  # "original" or "mindspeed"
    ranks: int  # tensor-parallel shards that were merged; 1 if the weights were whole
    dropped: tuple[str, ...]  # released names without a counterpart here; they affect no output
    found: str = ""  # the key in the file that held the weights, "" for the file itself
    others: tuple[str, ...] = ()  # keys of other weights of such a model, which were not taken


def from_released(state: State | Sequence[State]) -> tuple[dict[str, Tensor], Report]:
    """Released weights under our names.

    Args:
        state: names and tensors of the original release or of MindSpeed-MM, with or without what
            wrappers put into names (``module.``, ``_orig_mod.``); or those of every
            tensor-parallel rank, in order. ``_extra_state`` and the text half of the last block,
            which has no effect, are dropped and reported.

    Returns:
        The tensors, in the same dtypes (not copied unless merged), and what was found.

    Raises:
        ValueError: with the first ten names that are unknown, or that the ranks do not share; or
            if shards do not make a whole, in exactly one way.
    """
    parts, report = _collect(_as_states(state))
    if report.ranks == 1:
        return {name: part for name, (part,) in parts.items()}, report
    first = {name: part[0] for name, part in parts.items()}
    whole = _shapes(_skeleton(_sizes(first)))
    merged, wrong = _merge(parts, {name: whole[name] for name in whole if name in parts})
    checkpoints.refuse("these shards make no SUV", wrong)
    return {name: tensor.make() for name, tensor in merged.items()}, report


def load_released(model: nn.Module, state: State | Sequence[State]) -> Report:
    """Copy released weights into an SUV, cast to its dtypes: all of them, or none.

    Args:
        model: an :class:`~skiparse.models.suv.model.SUV` with memory, so not on the meta device.
        state: as :func:`from_released` takes it.

    Raises:
        ValueError: with the first ten names that are missing, unexpected, misshapen or not finite;
            and as :func:`from_released`. The model is as before.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model has no memory to load into; build it on a real device")
    parts, report = _collect(_as_states(state))
    merged, wrong = _merge(parts, _shapes(model))
    checkpoints.refuse("the weights do not fit the model, so none were loaded", wrong)
    checkpoints.check_values(parts)
    _refuse_one_twice(parts, _shapes(model))
    model.load_state_dict({name: tensor.make() for name, tensor in merged.items()}, strict=True)
    return report


def to_released(state: State, *, names: str = "original") -> dict[str, Tensor]:
    """Our weights under released names, the same tensors.

    Args:
        state: as ``SUV.state_dict()`` gives it.
        names: ``"original"`` or ``"mindspeed"``.

    Raises:
        ValueError: with the first ten names that are not ours.
    """
    if names not in _ROWS[1:]:
        raise ValueError(f"names must be one of {_ROWS[1:]}, got {names!r}")
    renamed = {name: _translate(name, "ours", names) for name in state}
    unknown = [name for name, new in renamed.items() if new is None]
    checkpoints.refuse("state has names that are not of SUV", {"unknown": unknown})
    return {str(renamed[name]): tensor for name, tensor in state.items()}


def infer_config(state: State, *, sparsity: Sequence[int] | None = None) -> dict[str, Any]:
    """The arguments of the SUV that has these weights, read off their shapes.

    Args:
        state: whole tensors under our names; values are not read.
        sparsity: of each stage. Weights do not tell it; None takes that of the preset which has
            these sizes.

    Raises:
        ValueError: if ``sparsity`` is None and no preset, or more than one, has these sizes; or if
            a tensor that tells a size is missing.
    """
    sizes = _sizes(state)
    if sparsity is not None:
        return sizes | {"sparsity": tuple(sparsity)}
    arguments = inspect.signature(SUV).parameters
    defaults = {k: v.default for k, v in arguments.items() if v.default is not v.empty}
    known = {
        tuple(preset["sparsity"])
        for preset in SUV.presets.values()
        if all((defaults | preset)[name] == value for name, value in sizes.items())
    }
    if len(known) != 1:
        raise ValueError(
            f"no preset has just these sizes, {sizes}, and weights do not tell the sparsity; give "
            f"sparsity, one number for each of the {len(sizes['num_layers'])} stages"
        )
    return sizes | {"sparsity": known.pop()}


def convert_file(
    src: Source | Sequence[Source],
    dst: Source,
    *,
    sparsity: Sequence[int] | None = None,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 * 2**30,
    progress: bool = False,
) -> Report:
    """Turn a released checkpoint into a folder for ``SUV.from_pretrained``.

    The source is mapped and copied tensor by tensor, so memory stays at its size, all of it pages
    the system can take back. Nothing in it is run: see :mod:`skiparse.models.archive`.

    Args:
        src: a file that ``torch.save`` wrote or a safetensors file, told apart by their content;
            or such files of all tensor-parallel ranks, in order; or a folder, as
            :func:`skiparse.models.checkpoints.sources` takes it, checked against its manifest
            where it has one.
        dst: the folder to make. It appears complete, with a manifest that
            :func:`skiparse.models.shards.verify` checks, or not at all.
        sparsity: as :func:`infer_config` takes it.
        key: where in the file the weights are, dots between levels, ``"ema_state_dict"``; None
            finds the one place there is, and of several the one of averaged weights.
        dtype: of the weights written, a floating one; None for their own.
        max_shard_bytes: of tensor data in one file.
        progress: whether to show bars.

    Raises:
        ValueError: if ``dst`` exists; if the source is damaged, compressed or not what it seems;
            or if its weights are not exactly those of one SUV, or not finite.
        FileNotFoundError: if a source is missing.
        OSError: if the disk fails or fills up.
    """
    shards.refuse_existing(dst)
    checkpoints.refuse_dtype(dtype)
    found = [
        checkpoints.find(checkpoints.read(source, progress=progress), key, source, _MUST)
        for source in checkpoints.sources(src)
    ]
    for rank, other in enumerate(found):
        if other.place != found[0].place:
            raise ValueError(
                f"the weights of ranks 0 and {rank} are under different keys, {found[0].place!r} "
                f"and {other.place!r}; give key"
            )
    parts, report = _collect([one.state for one in found])
    report = replace(report, found=found[0].place, others=found[0].others)
    config = infer_config({name: part[0] for name, part in parts.items()}, sparsity=sparsity)
    model = _skeleton(config)
    merged, wrong = _merge(parts, _shapes(model))
    checkpoints.refuse(f"{src} does not hold exactly the weights of one SUV", wrong)
    checkpoints.check_values(parts, dtype=dtype)
    _refuse_one_twice(parts, _shapes(model))
    if dtype is not None:
        merged = {name: tensor.to(dtype) for name, tensor in merged.items()}
    about = {
        "names": report.names,
        "ranks": report.ranks,
        "found": report.found,
        "dropped": report.dropped,
    }
    total = sum(tensor.nbytes for tensor in merged.values())
    with (
        shards.new_folder(dst) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
    ):
        model.save_config(folder)
        shards.write(
            folder, merged, max_shard_bytes=max_shard_bytes, about=about, progress=bar.update
        )
    return report


def _translate(name: str, source: str, target: str) -> str | None:
    """A parameter's name from one row of the tables to another; None if it is not in them."""
    old, new = _ROWS.index(source), _ROWS.index(target)
    path, _, leaf = name.rpartition(".")
    for prefix, numbers, modules in _GROUPS:
        number = r"(?:(?:0|[1-9][0-9]*)\.)"
        match = re.fullmatch(f"{re.escape(prefix[old])}({number}{{{numbers}}})(.+)", path)
        if match is None:
            continue
        for module in modules:
            leaves = ("weight",) if module[0].startswith(_NO_BIAS) else ("weight", "bias")
            if module[old] == match[2] and leaf in leaves:
                return f"{prefix[new]}{match[1]}{module[new]}.{leaf}"
    return None


def _as_states(state: State | Sequence[State]) -> Sequence[State]:
    states = [state] if isinstance(state, Mapping) else state
    if not states:
        raise ValueError("state is empty; give the weights, or those of each rank in order")
    return states


def _collect(states: Sequence[State]) -> tuple[dict[str, list[Tensor]], Report]:
    """Every rank's part of each tensor by our name, inert ones left out, and what was found."""
    plain = [checkpoints.plain(state, _ROOTS) for state in states]
    for rank, state in enumerate(plain):
        odd = sorted(plain[0].keys() ^ state.keys())
        checkpoints.refuse(f"ranks 0 and {rank} do not hold the same names", {"held by one": odd})
    extra = sorted({name for state in states for name in state if checkpoints.is_extra(name)})
    names, renamed = _rename(plain[0])
    blocks = [name.split(".")[1:3] for name in renamed.values() if name.startswith("stages.")]
    last = max(((int(stage), int(block)) for stage, block in blocks), default=(0, 0))
    start = f"stages.{last[0]}.{last[1]}."
    inert = tuple(f"{start}{module}." for module in _INERT)
    dropped = [name for name, ours in renamed.items() if ours.startswith(inert)]
    parts = {
        ours: [state[name] for state in plain]
        for name, ours in renamed.items()
        if not ours.startswith(inert)
    }
    return parts, Report(names, len(states), (*dropped, *extra))


def _rename(state: State) -> tuple[str, dict[str, str]]:
    """Which of the two name sets it is, and our name for each name; unknown names are refused."""
    unknown: dict[str, list[str]] = {}
    for names in _ROWS[1:]:
        renamed = {name: _translate(name, names, "ours") for name in state}
        unknown[names] = [name for name, ours in renamed.items() if ours is None]
        if not unknown[names]:
            return names, {name: str(ours) for name, ours in renamed.items()}
    if all(_translate(name, "ours", "original") is not None for name in state):
        raise ValueError(
            "these weights have our names already; a folder of them is for SUV.from_pretrained as "
            "it is"
        )
    nearest = min(unknown, key=lambda names: len(unknown[names]))
    raise checkpoints.error(
        f"state has names unknown to the {nearest} naming", {"unknown": unknown[nearest]}
    )


def _sizes(state: State) -> dict[str, Any]:
    """Every argument of SUV that shapes tell, from tensors that no rank holds a part of."""

    def shape(name: str, *, dims: int) -> tuple[int, ...]:
        if name not in state or state[name].ndim != dims or 0 in state[name].shape:
            raise ValueError(f"{name}, which tells sizes, is missing or not of {dims} dimensions")
        return tuple(state[name].shape)

    width, channels, height, breadth = shape("patch_embed.weight", dims=4)
    (head_dim,) = shape("stages.0.0.attn.norm_q.weight", dims=1)
    (pixel_values, _) = shape("proj_out.weight", dims=2)
    for name, value, of in (
        ("head_dim", head_dim, width),
        ("patch", height * breadth, pixel_values),
    ):
        if of % value:
            raise ValueError(f"a {name} of {value} does not divide {of}; this is no SUV, or a part")
    return {
        "num_layers": _count_layers(state),
        "num_heads": width // head_dim,
        "head_dim": head_dim,
        "in_channels": channels,
        "out_channels": pixel_values // (height * breadth),
        "text_channels": shape("text_embed.weight", dims=2)[1],
        "pooled_channels": shape("pooled_embed.linear_1.weight", dims=2)[1],
        "timestep_channels": shape("timestep_embed.linear_1.weight", dims=2)[1],
        "double_ff": any(".text_ff." in name for name in state),
        "skip_connection": any(name.startswith("skips.") for name in state),
        "skip_zero_init": not any(name.startswith("skips.0.norm.") for name in state),
        "norm": "layer_norm" if "norm_final.bias" in state else "rms_norm",
        "patch_size": (1, height, breadth),
    }


def _count_layers(state: Iterable[str]) -> tuple[int, ...]:
    """Blocks of each stage; ValueError if a number is left out."""
    seen = {tuple(map(int, n.split(".")[1:3])) for n in state if n.startswith("stages.")}
    counts = [len([1 for s, _ in seen if s == stage]) for stage in range(len({s for s, _ in seen}))]
    whole = {(stage, block) for stage, count in enumerate(counts) for block in range(count)}
    if seen != whole:
        raise ValueError(f"blocks are left out, for these numbers do not count up: {sorted(seen)}")
    return tuple(counts)


def _skeleton(config: Mapping[str, Any]) -> SUV:
    """The model without memory. Sparsity affects no shape, so sizes alone will do."""
    dense = {"sparsity": (1,) * len(config["num_layers"])}
    with torch.device("meta"):
        return SUV(**(dense | dict(config)))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _merge(
    parts: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Lazy], dict[str, list[str]]]:
    """Whole tensors, to be made when needed, in the order of ``shapes``; and what does not fit."""
    merged: dict[str, Lazy] = {}
    misshapen = []
    cut = False
    for name, whole in shapes.items():
        if name not in parts:
            continue
        part = parts[name]
        dim = _cut_dim(part, whole)
        if dim is None:
            held = " + ".join(f"{list(p.shape)} {p.dtype}" for p in part)
            misshapen.append(f"{name}: {held} for {list(whole)}")
            continue
        cut |= dim >= 0
        merged[name] = Lazy(whole, part[0].dtype, partial(_make, name, part, dim))
    wrong = {
        "missing": [name for name in shapes if name not in parts],
        "unexpected": [name for name in parts if name not in shapes],
        "misshapen": misshapen,
    }
    if not any(wrong.values()) and not cut and any(len(part) > 1 for part in parts.values()):
        raise ValueError("each of the shards is whole, so they are no parts; give one alone")
    return merged, wrong


def _cut_dim(part: Sequence[Tensor], whole: tuple[int, ...]) -> int | None:
    """The dimension along which the ranks' tensors make ``whole``, -1 for copies, None if none.

    Column-parallel layers are cut along the first dimension and row-parallel ones along the second,
    in order of rank, and everything else is held by every rank. The shapes tell which.
    """
    shape = tuple(part[0].shape)
    if any(tuple(p.shape) != shape or p.dtype != part[0].dtype for p in part):
        return None
    if shape == whole:
        return -1
    if len(shape) != len(whole):
        return None
    differs = [dim for dim in range(len(whole)) if shape[dim] != whole[dim]]
    if len(differs) > 1 or shape[differs[0]] * len(part) != whole[differs[0]]:
        return None
    return differs[0]


def _refuse_one_twice(
    parts: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """ValueError if two ranks hold the same numbers in all that is cut over ranks."""
    cut = [
        part
        for name, part in parts.items()
        if len(part) > 1 and _cut_dim(part, shapes[name]) != -1
        if part[0].numel() and not bool(torch.equal(*part[0].detach().aminmax()))
    ]
    for first, second in itertools.combinations(range(len(cut[0]) if cut else 0), 2):
        if all(torch.equal(part[first], part[second]) for part in cut):
            raise ValueError(
                f"ranks {first} and {second} hold the same numbers, where each should hold its own "
                "part; is one of them given twice?"
            )


def _make(name: str, part: Sequence[Tensor], dim: int) -> Tensor:
    if dim >= 0:
        return torch.cat([p.detach() for p in part], dim)
    for rank, copy in enumerate(part[1:], 1):
        if not torch.equal(copy, part[0]):
            raise ValueError(
                f"{name}: ranks 0 and {rank} should hold copies, but they differ; are these the "
                "ranks of one checkpoint?"
            )
    return part[0].detach()
