"""Released weights of OSP-Next become a Wan of diffusers that says what of it is sparse.

OSP-Next is Wan 2.1, parameter for parameter, with sparse self-attention in its middle layers. Its
files have Wan's original names, or those of diffusers. What is written is what diffusers loads;
``config["skiparse"]`` tells which layers attend to what, and :func:`skiparse.models.retrofit`
makes them do so.

Source: OSP-Next, arXiv 2605.28691, and its release.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor
from tqdm import tqdm

from skiparse.models import checkpoints, shards
from skiparse.models.data.atomic import read_table, write_json
from skiparse.models.options import Asked
from skiparse.models.retrofit import Sparsity, schedule

# Of Wan 2.1's settings, Apache-2.0: what OSP-Next was evaluated with.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
HEAD_DIM = 128  # of all Wan models
RATIO, DENSE = 2, (4, 4)  # of the released 14B
SHIFT = 7.0  # of its sampling
SAMPLED = Asked(
    height=720,
    width=1280,
    frames=81,
    steps=50,
    fps=16,
    guidance=5.0,
    negative=NEGATIVE_PROMPT,
    shift=SHIFT,
    schedule="linear",
)

_MUST = frozenset({"patch_embedding", "blocks"})
_ORIGINAL = "text_embedding.0.weight"  # a name that diffusers has otherwise
_KEY = "skiparse"  # in the config of a model
_PARTS = ("vae", "text_encoder", "tokenizer")  # of a pipeline, that are Wan's own

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Report:
    """What was converted.

    Attributes:
        names: "original" or "diffusers".
        found: under which key of the file the weights were, "" for the top.
        others: keys of other such weights, which were not taken.
        config: of the WanTransformer3DModel.
        sparsity: of its layers.
    """

    names: str
    found: str
    others: tuple[str, ...]
    config: dict[str, Any]
    sparsity: Sparsity


def from_released(
    state: State,
    *,
    heads: int | None = None,
    ratio: int = RATIO,
    dense: tuple[int, int] = DENSE,
) -> tuple[dict[str, Tensor], Report]:
    """Weights by the names of diffusers, and what they are of.

    Args:
        state: all weights of one model, by Wan's original names or those of diffusers.
        heads: of attention; None for heads of 128 channels, as all released ones have.
        ratio: p, for p * p sub-sequences.
        dense: how many layers are dense at the beginning and at the end.

    Raises:
        ValueError: with the names that are missing, unexpected or misshapen; or for heads, a ratio
            or dense layers that the model cannot have.
    """
    names = "original" if _ORIGINAL in state else "diffusers"
    renamed = dict(state)
    if names == "original":
        renamed = convert_wan_transformer_to_diffusers(renamed)
    config = _config(renamed, heads)
    layers = config["num_layers"]
    sparsity = Sparsity("2d", ratio, schedule(layers, dense))
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in WanTransformer3DModel(**config).state_dict().items()}
    checkpoints.refuse(
        "these are not exactly the weights of one Wan from text to video",
        {
            "missing": [name for name in shapes if name not in renamed],
            "unexpected": [name for name in renamed if name not in shapes],
            "misshapen": [
                f"{name}: {list(renamed[name].shape)} for {list(shape)}"
                for name, shape in shapes.items()
                if name in renamed and renamed[name].shape != shape
            ],
        },
    )
    weights = {name: renamed[name] for name in shapes}
    return weights, Report(names, "", (), config | {_KEY: asdict(sparsity)}, sparsity)


def convert_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    heads: int | None = None,
    ratio: int = RATIO,
    dense: tuple[int, int] = DENSE,
    key: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: bool = False,
) -> Report:
    """Make a folder of diffusers from released weights.

    The source is mapped and copied tensor by tensor. Nothing in it is run: see
    :mod:`skiparse.models.archive`.

    Args:
        src: ``model.pt``, ``ema_model_state_dict.pt`` or a safetensors file, told apart by their
            content; or a folder with one of them, or with safetensors in pieces.
        dst: the folder to make. It appears complete or not at all; ``transformer/`` in it has a
            manifest that :func:`skiparse.models.shards.verify` checks.
        base: folder of the WanPipeline whose VAE, text encoder and tokenizer go with it; they are
            copied, and ``dst`` is a WanPipeline then. None: ``dst`` has the transformer and the
            scheduler alone.
        heads, ratio, dense: as :func:`from_released` takes them.
        key: where in the file the weights are, dots between levels; None finds the one place there
            is, and of several the one of averaged weights.
        dtype: of the weights written, a floating one; None for their own.
        max_shard_bytes: of tensor data in one file.
        progress: whether to show bars.

    Raises:
        ValueError: if ``dst`` exists; if the source is damaged, compressed or not what it seems; if
            its weights are not exactly those of one model, or not finite; or if ``base`` does not
            go with it.
        FileNotFoundError: if a source, or the pipeline of ``base``, is missing.
        OSError: if the disk fails or fills up.
    """
    shards.refuse_existing(dst)
    checkpoints.refuse_dtype(dtype)
    index = None if base is None else _index(Path(base))
    files = checkpoints.sources(src)
    if len(files) > 1:
        raise ValueError(f"{src} is of {len(files)} ranks; gather the model, and name one file")
    found = checkpoints.find(checkpoints.read(files[0], progress=progress), key, files[0], _MUST)
    weights, report = from_released(found.state, heads=heads, ratio=ratio, dense=dense)
    report = replace(report, found=found.place, others=found.others)
    if base is not None:
        _check_base(Path(base), report.config)
    checkpoints.check_values({name: [x] for name, x in weights.items()}, dtype=dtype)
    lazy = {name: shards.Lazy.of(x) for name, x in weights.items()}
    if dtype is not None:
        lazy = {name: x.to(dtype) for name, x in lazy.items()}
    about = {"names": report.names, "found": report.found, "sparsity": str(report.sparsity)}
    total = sum(x.nbytes for x in lazy.values())
    with (
        shards.new_folder(dst) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=not progress) as bar,
    ):
        transformer = folder / "transformer"
        transformer.mkdir()
        with torch.device("meta"):
            made = WanTransformer3DModel(**{k: v for k, v in report.config.items() if k != _KEY})
        made.register_to_config(**{_KEY: report.config[_KEY]})
        made.save_config(transformer)
        shards.write(
            transformer, lazy, max_shard_bytes=max_shard_bytes, about=about, progress=bar.update
        )
        FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
        if base is not None and index is not None:
            for name in _PARTS:
                shutil.copytree(Path(base) / name, folder / name)
            write_json(folder / "model_index.json", index)
            SAMPLED.save(folder)
        for file in folder.rglob("*"):
            shards.sync(file)
    return report


def _config(state: State, heads: int | None) -> dict[str, Any]:
    """The arguments of WanTransformer3DModel that weights of these shapes are of."""
    try:
        width, channels, *patch = state["patch_embedding.weight"].shape
        text = state["condition_embedder.text_embedder.linear_1.weight"].shape[1]
        steps = state["condition_embedder.time_embedder.linear_1.weight"].shape[1]
        inner = state["blocks.0.ffn.net.0.proj.weight"].shape[0]
        out = state["proj_out.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"these are not the weights of a Wan: {error} is missing, or of another shape"
        ) from error
    if heads is None:
        if width % HEAD_DIM:
            raise ValueError(f"a width of {width} has no heads of {HEAD_DIM} channels; give heads")
        heads = width // HEAD_DIM
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide the width {width}, got {heads}; give the model's")
    numbers = {int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))}
    return {
        "patch_size": list(patch),
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": out // math.prod(patch),
        "text_dim": text,
        "freq_dim": steps,
        "ffn_dim": inner,
        "num_layers": max(numbers) + 1,
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in state else None,
    }


def _index(base: Path) -> dict[str, Any]:
    """The ``model_index.json`` of a WanPipeline, for one with our scheduler.

    Raises:
        FileNotFoundError: if it, or a part of it, is not there.
        ValueError: if it is of another pipeline.
    """
    for name in (
        "model_index.json",
        *(f"{part}/." for part in _PARTS),
        "vae/config.json",
        "text_encoder/config.json",
    ):
        if not (base / name).exists():
            raise FileNotFoundError(
                f"base={base}: {name} is not there; give the folder of a WanPipeline"
            )
    index = read_table(base / "model_index.json")
    kind = index.get("_class_name")
    if kind != "WanPipeline" or index.get("expand_timesteps") or index.get("boundary_ratio"):
        raise ValueError(
            f"base={base} is no WanPipeline with one transformer and time by the sample, as those "
            f"of Wan 2.1 are, but a {kind}; give one of them"
        )
    index["scheduler"] = ["diffusers", FlowMatchEulerDiscreteScheduler.__name__]
    index["transformer"] = ["diffusers", WanTransformer3DModel.__name__]
    return index


def _check_base(base: Path, config: Mapping[str, Any]) -> None:
    """ValueError unless the encoders of a pipeline fit the model."""
    vae, text = (read_table(base / part / "config.json") for part in ("vae", "text_encoder"))
    for key, of, name in (("in_channels", vae, "z_dim"), ("text_dim", text, "d_model")):
        if of.get(name) != config[key]:
            raise ValueError(
                f"base={base}: its {name} is {of.get(name)}, but the model has {key}={config[key]};"
                " give the pipeline of Wan 2.1"
            )
