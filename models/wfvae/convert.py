"""How the weights of the released WF-VAE come to bear our names, and go back.

Released files also hold what is no weight: the taps of the Haar filters, and maybe shift and scale
of the latents. Here the config holds those; they are compared with it, dropped, and made again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from skiparse.models import checkpoints, shards
from skiparse.models.checkpoints import Source, State
from skiparse.models.wfvae.blocks import CausalConv, ChannelNorm, FrameConv
from skiparse.models.wfvae.config import RELEASED_HAAR_GAIN
from skiparse.models.wfvae.haar import EXACT_2D, EXACT_3D
from skiparse.models.wfvae.model import COLOURS, WFVAE

# How each program spells one of the filters: MindSpeed-MM without an s.
_SPELLING = {"original": "transform", "mindspeed": "tranform"}
# Released filters in the order of our bands. Over three axes it is theirs too: g is high over
# width, hh over height, those in _v over time. Over two, theirs has ad (height) before da (width).
_CUBE = ("h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v")
_SQUARE = ("aa", "da", "ad", "dd")
_SWAP = (0, 2, 1, 3)  # bands over two axes, ours to theirs and back
# Weights over those bands of the level between, and the dimension the bands lie along.
_BANDED = {
    "encoder.inflow1.weight": 1,
    "decoder.outflow1.conv.weight": 0,
    "decoder.outflow1.conv.bias": 0,
}
_PARTS = {
    "shortcut": "nin_shortcut",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "proj_out",
}
# First components of names: of all released ones, and of those that every WFVAE has.
_ROOTS = frozenset({"encoder", "decoder", "shift", "scale"})
_MUST = frozenset({"encoder", "decoder"})
_WRAPPERS = ((ChannelNorm, ".norm"), (CausalConv, ".conv"), (FrameConv, ""))


@dataclass(frozen=True)
class Report:
    """What was found in released weights, and what was left out."""

    names: str  # "original" or "mindspeed"
    dropped: tuple[str, ...]  # released names of what is no weight: filters, shift, scale
    config: dict[str, Any]  # arguments of the WFVAE that has these weights
    found: str = ""  # the key in the file that held the weights, "" for the file itself
    others: tuple[str, ...] = ()  # keys of other weights of such a model, which were not taken


def from_released(state: State) -> tuple[dict[str, Tensor], Report]:
    """Released weights under our names.

    Args:
        state: names and tensors of the original release or of MindSpeed-MM, with or without what
            wrappers put into names (``module.``, ``_orig_mod.``). Filters, shift and scale are
            compared with :func:`infer_config`, then dropped.

    Returns:
        The tensors in the same dtypes, in the order of our model, and what was found. They are
        not copied, except three over the bands of a transform over two axes, ordered anew.

    Raises:
        ValueError: with the first ten names that are missing, unexpected, misshapen, or of filters
            that are not Haar's.
    """
    bare = checkpoints.plain(state, _ROOTS)
    config = infer_config(bare)
    weights, dropped, wrong = _sort(bare, _skeleton(config))
    checkpoints.refuse("these are not exactly the weights of one WFVAE", wrong)
    return weights, Report(_names_of(bare), (*dropped, *_extra(state)), config)


def load_released(model: WFVAE, state: State) -> Report:
    """Copy released weights into a WFVAE, cast to its dtypes: all of them, or none.

    Args:
        model: with memory, so not on the meta device; made with the arguments of
            :func:`infer_config` if the weights come with filters, or with shift and scale.
        state: as :func:`from_released` takes it.

    Raises:
        ValueError: with the first ten names that are missing, unexpected, misshapen or not
            finite, or of filters, shift or scale unlike the model's. The model is as before.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model has no memory to load into; build it on a real device")
    bare = checkpoints.plain(state, _ROOTS)
    weights, dropped, wrong = _sort(bare, model)
    checkpoints.refuse("the weights do not fit the model, so none were loaded", wrong)
    checkpoints.check_values({name: [tensor] for name, tensor in weights.items()})
    model.load_state_dict(weights, strict=True)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return Report(_names_of(bare), (*dropped, *_extra(state)), config)


def to_released(model: WFVAE, *, names: str = "original") -> dict[str, Tensor]:
    """The weights of a model under released names, and the filters that belong to them.

    Args:
        model: its weights are not copied, unless ``temporal_factor`` is 4, then three are.
        names: ``"original"``, or ``"mindspeed"``, which has shift and scale too.

    Returns:
        The tensors; those that are no weights in the dtype of the first weight.

    Raises:
        ValueError: for other ``names``, or a model without paths for wavelet coefficients.
    """
    if names not in _SPELLING:
        raise ValueError(f"names must be one of {tuple(_SPELLING)}, got {names!r}")
    if not model.config.encoder_energy_channels:
        raise ValueError(
            "model has no paths for wavelet coefficients, and every released one has; "
            "keep it as it is, with save_pretrained"
        )
    config, state = model.config, model.state_dict()
    released = {
        new: _reorder_bands(name, state[name], config) for name, new in _translation(model).items()
    }
    constants = _filters(config, names)
    if names == "mindspeed":
        constants |= _normalisation(config)
    like = next(iter(state.values()))
    return released | {name: tensor.to(like.dtype, copy=True) for name, tensor in constants.items()}


def infer_config(state: State) -> dict[str, Any]:
    """The arguments of the WFVAE that has these weights, read off shapes, filters, shift and scale.

    Args:
        state: released names and tensors. Without filters, ``haar_gain`` is that of the release.
            Without shift and scale, they are those of the preset that has just these sizes, if
            there is one: the original release keeps them elsewhere.

    Raises:
        ValueError: if a tensor that tells a size is missing.
    """
    state = checkpoints.plain(state, _ROOTS)

    def shape(name: str, *, dims: int) -> tuple[int, ...]:
        if name not in state or state[name].ndim != dims or 0 in state[name].shape:
            raise ValueError(f"{name}, which tells sizes, is missing or not of {dims} dimensions")
        return tuple(state[name].shape)

    def blocks(place: str) -> int:
        pattern = re.compile(re.escape(place) + r"\.[0-9]+\.norm1\.norm\.weight")
        return sum(pattern.fullmatch(name) is not None for name in state)

    connect = blocks("decoder.connect_l1")
    energy, coefficients = shape("encoder.connect_l1.weight", dims=4)[:2]
    factors = {8 * COLOURS: 8, 4 * COLOURS: 4}
    if coefficients not in factors:
        raise ValueError(
            f"encoder.connect_l1.weight takes {coefficients} wavelet coefficients, not one of "
            f"{tuple(factors)}; this is no WFVAE"
        )
    sizes = {
        "base_channels": shape("encoder.down1.0.weight", dims=4)[0],
        "latent_channels": shape("decoder.conv_in.conv.weight", dims=5)[1],
        "encoder_energy_channels": energy,
        "decoder_energy_channels": shape(f"decoder.connect_l1.{connect}.weight", dims=4)[1],
        "encoder_res_blocks": blocks("encoder.down1"),
        "decoder_res_blocks": max(blocks("decoder.up1") - 1, 0),  # one comes after upsampling
        "connect_res_blocks": connect,
        "temporal_factor": factors[coefficients],
    }
    return sizes | {"haar_gain": _gain(state)} | _shift_and_scale(state, sizes)


def convert_file(
    src: Source,
    dst: Source,
    *,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 4 * 2**30,
    progress: bool = False,
) -> Report:
    """Turn a released checkpoint into a folder for ``WFVAE.from_pretrained``.

    The source is mapped and copied tensor by tensor. Nothing in it is run: see
    :mod:`skiparse.models.archive`.

    Args:
        src: a file that ``torch.save`` wrote or a safetensors file, told apart by their content; or
            a folder, as :func:`skiparse.models.checkpoints.sources` takes it, of one rank, checked
            against its manifest where it has one.
        dst: the folder to make. It appears complete, with a manifest that
            :func:`skiparse.models.shards.verify` checks, or not at all.
        key: where in the file the weights are, dots between levels; None finds the one place there
            is, and of several the one of averaged weights.
        dtype: of the weights written, a floating one; None for their own.
        max_shard_bytes: of tensor data in one file.
        progress: whether to show bars.

    Raises:
        ValueError: if ``dst`` exists; if the source is damaged, compressed or not what it seems;
            or if its weights are not exactly those of one WFVAE, or not finite.
        FileNotFoundError: if a source is missing.
        OSError: if the disk fails or fills up.
    """
    shards.refuse_existing(dst)
    checkpoints.refuse_dtype(dtype)
    files = checkpoints.sources(src)
    if len(files) > 1:
        raise ValueError(f"{src} is of {len(files)} ranks, but a WFVAE is never cut; name one file")
    found = checkpoints.find(checkpoints.read(files[0], progress=progress), key, files[0], _MUST)
    weights, report = from_released(found.state)
    report = replace(report, found=found.place, others=found.others)
    checkpoints.check_values({name: [tensor] for name, tensor in weights.items()}, dtype=dtype)
    about = {"names": report.names, "found": report.found, "dropped": report.dropped}
    lazy = {name: shards.Lazy.of(tensor) for name, tensor in weights.items()}
    if dtype is not None:
        lazy = {name: tensor.to(dtype) for name, tensor in lazy.items()}
    total = sum(tensor.nbytes for tensor in lazy.values())
    with (
        shards.new_folder(dst) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
    ):
        _skeleton(report.config).save_config(folder)
        shards.write(
            folder, lazy, max_shard_bytes=max_shard_bytes, about=about, progress=bar.update
        )
    return report


def _skeleton(config: Mapping[str, Any]) -> WFVAE:
    """The model without memory."""
    with torch.device("meta"):
        return WFVAE(**config)


def _extra(state: State) -> list[str]:
    return [name for name in state if checkpoints.is_extra(name)]


def _names_of(state: State) -> str:
    start = f"encoder.wavelet_{_SPELLING['mindspeed']}_in."
    return "mindspeed" if any(name.startswith(start) for name in state) else "original"


def _sort(state: State, model: WFVAE) -> tuple[dict[str, Tensor], list[str], dict[str, list[str]]]:
    """Weights by our names, names of the rest, and all that does not fit the model."""
    names = _translation(model)
    shapes = {names[name]: list(tensor.shape) for name, tensor in model.state_dict().items()}
    constants = {
        name: tensor
        for group in (_filters(model.config, _names_of(state)), _normalisation(model.config))
        if group.keys() & state.keys()  # all of them or none
        for name, tensor in group.items()
    }
    shapes |= {name: list(tensor.shape) for name, tensor in constants.items()}
    held = {name: list(tensor.shape) for name, tensor in state.items()}
    wrong = {
        "missing": [name for name in shapes if name not in held],
        "unexpected": [name for name in held if name not in shapes],
        "misshapen": [
            f"{name}: {held[name]} for {shape}"
            for name, shape in shapes.items()
            if held.get(name, shape) != shape
        ],
        "unlike the config's haar_gain, shift and scale": [
            name
            for name, tensor in constants.items()
            if held.get(name) == shapes[name]
            and not torch.equal(tensor.to(state[name]), state[name])
        ],
    }
    weights = {
        name: _reorder_bands(name, state[released], model.config)
        for name, released in names.items()
        if held.get(released) == shapes[released]
    }
    return weights, list(constants), wrong


def _translation(model: WFVAE) -> dict[str, str]:
    """The released name of every weight of ours, in the order of the model."""
    places = _places(model.config)
    names = {}
    for path, module in model.named_modules():
        wrapper = next((text for kind, text in _WRAPPERS if isinstance(module, kind)), None)
        if wrapper is None:
            continue
        ours = next((place for place in places if f"{path}.".startswith(f"{place}.")), path)
        rest = [_PARTS.get(part, part) for part in path[len(ours) :].split(".")]
        released = places.get(ours, ours) + ".".join(rest) + wrapper
        for leaf, _ in module.named_parameters(recurse=False):
            names[f"{path}.{leaf}"] = f"{released}.{leaf}"
    return names


def _places(config: Mapping[str, Any]) -> dict[str, str]:
    """Our names of groups of layers, where the release counts through sequences."""
    encoder, decoder, connect = (
        config[f"{name}_res_blocks"] for name in ("encoder", "decoder", "connect")
    )
    places = {
        f"{side}.mid.{ours}": f"{side}.mid.{number}"
        for side in ("encoder", "decoder")
        for number, ours in enumerate(("res1", "attn", "res2"))
    }
    for level in (1, 2):
        down, up, flow = (
            f"encoder.down{level}", f"decoder.up{level}", f"decoder.connect_l{level}"
        )  # fmt: skip
        rows = [
            (f"encoder.level{level}.conv_in", f"{down}.0"),
            *((f"encoder.level{level}.res.{i}", f"{down}.{i + 1}") for i in range(encoder)),
            (f"encoder.level{level}.down", f"{down}.{encoder + 1}.conv"),
            (f"encoder.inflow{level}", f"encoder.connect_l{level}"),
            *((f"decoder.outflow{level}.res.{i}", f"{flow}.{i}") for i in range(connect)),
            (f"decoder.outflow{level}.conv", f"{flow}.{connect}"),
            *((f"decoder.level{level}.res.{i}", f"{up}.{i}") for i in range(decoder)),
            (f"decoder.level{level}.up", f"{up}.{decoder}"),
            (f"decoder.level{level}.res_out", f"{up}.{decoder + 1}"),
            (f"decoder.res{level}", f"decoder.layer.{level - 1}"),
        ]
        places |= dict(rows)
    return places


def _reorder_bands(name: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A weight over bands of two axes in the other order; all else as it is."""
    if config["temporal_factor"] == 8 or name not in _BANDED:
        return tensor
    dim = _BANDED[name]
    order = torch.tensor(_SWAP, device=tensor.device)
    return tensor.unflatten(dim, (len(_SWAP), -1)).index_select(dim, order).flatten(dim, dim + 1)


def _filters(config: Mapping[str, Any], names: str) -> dict[str, Tensor]:
    """The filters by their released names, fp32 ``[1, 1, 2, 2, 2]``.

    Those over two axes, ``[1, 1, 2, 2]``, are 1/2 in the release whatever the gain of the others.
    """
    gain = EXACT_3D if config["haar_gain"] is None else config["haar_gain"]
    cube = dict(zip(_CUBE, _haar(3) * gain, strict=True))
    level1 = cube
    if config["temporal_factor"] == 4:
        level1 = dict(zip(_SQUARE, _haar(2) * EXACT_2D, strict=True))
    filters = {}
    for bands, encoder, decoder in (
        (cube, f"{_SPELLING[names]}_in", "transform_out"),
        (level1, "transform_l1", "transform_l1"),
        (cube, "transform_l2", "transform_l2"),
    ):
        for band, taps in bands.items():
            leaf = f"{band}_conv.conv.weight" if taps.ndim == 5 else band
            filters[f"encoder.wavelet_{encoder}.{leaf}"] = taps
            filters[f"decoder.inverse_wavelet_{decoder}.{band}"] = taps
    return filters


def _haar(axes: int) -> Tensor:
    """Signs ``[bands, 1, 1, 2, ...]`` of each band's filter: high is the first less the second."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32)
    return reduce(torch.kron, [pair] * axes).reshape(-1, 1, 1, *[2] * axes)


def _normalisation(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Shift and scale as MindSpeed-MM keeps them, fp32 ``[1, C, 1, 1, 1]``."""
    channels = config["latent_channels"]
    return {
        name: torch.tensor(config[name] or [neutral] * channels, dtype=torch.float32).reshape(
            1, channels, 1, 1, 1
        )
        for name, neutral in (("shift", 0.0), ("scale", 1.0))
    }


def _gain(state: State) -> float | None:
    """That of the filters in ``state``, as it was meant before it was rounded to their dtype."""
    taps = state.get(f"encoder.wavelet_{_SPELLING[_names_of(state)]}_in.h_conv.conv.weight")
    if taps is None or taps.numel() == 0:
        return RELEASED_HAAR_GAIN
    tap = taps.flatten()[0]
    for gain in (RELEASED_HAAR_GAIN, None):
        if torch.equal(torch.tensor(gain or EXACT_3D).to(tap), tap):
            return gain
    return _decimals(tap)[0]


def _shift_and_scale(state: State, sizes: Mapping[str, Any]) -> dict[str, Any]:
    if {"shift", "scale"} <= state.keys():
        return {name: _decimals(state[name]) for name in ("shift", "scale")}
    arguments = inspect.signature(WFVAE).parameters
    defaults = {name: argument.default for name, argument in arguments.items()}
    for preset in WFVAE.presets.values():
        whole = defaults | preset
        if whole["shift"] and all(whole[name] == size for name, size in sizes.items()):
            return {name: whole[name] for name in ("shift", "scale")}
    return {"shift": None, "scale": None}


def _decimals(tensor: Tensor) -> tuple[float, ...]:
    """The shortest decimals that fp32 rounds to these numbers: 0.3536, not 0.35359999537."""
    return tuple(float(str(np.float32(value))) for value in tensor.flatten().tolist())
