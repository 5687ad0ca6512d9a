"""Released weights come out under our names, bit for bit, or not at all."""

import argparse
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skiparse.cli import main
from skiparse.models import shards
from skiparse.models.suv import convert
from skiparse.models.suv.model import SUV

RECORD = json.loads((Path(__file__).parent / "data" / "suv_v15_keys.json").read_text())
# The released sizes made small: every number in a recorded shape, and what it becomes.
SMALL = {3072: 32, 6144: 64, 12288: 128, 18432: 192, 1024: 16, 128: 16, 2048: 24, 1280: 20, 32: 4}
SMALL_CONFIG = SUV.presets["v1.5"] | {
    "num_heads": 2,
    "head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_channels": 24,
    "pooled_channels": 20,
    "timestep_channels": 16,
}
TINY = SUV.presets["tiny"]


def original(name):
    for old, new in RECORD["original_to_mindspeed"].items():
        name = name.replace(new, old)
    return name


def released(names, sizes=None, *, inert=False):
    """The recorded names with their shapes, ``sizes`` put in the place of the recorded ones."""
    shapes = dict(RECORD["outside"])
    for stage, count in enumerate(RECORD["num_layers"]):
        for layer in range(count):
            last = stage == len(RECORD["num_layers"]) - 1 and layer == count - 1
            for name, shape in RECORD["block"].items():
                if inert or not last or name not in RECORD["absent_from_last_block"]:
                    shapes[f"transformer_blocks.{stage}.{layer}.{name}"] = shape
    return {
        original(name) if names == "original" else name: [(sizes or {}).get(n, n) for n in shape]
        for name, shape in shapes.items()
    }


def tensors(shapes, *, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def small():
    return tensors(released("original", SMALL))


@pytest.fixture(scope="module")
def tiny():
    """A whole small model, its weights under the original names."""
    torch.manual_seed(1)
    state = SUV(**TINY).state_dict()
    return convert.to_released({name: torch.randn_like(tensor) for name, tensor in state.items()})


COLUMN = re.compile(r"to_[qkv]\.|add_[qkv]_proj\.|ff(_enc)?\.net\.0\.|norm[12]\.linear\.")
ROW = re.compile(r"(to_out\.0|to_add_out|ff(_enc)?\.net\.2)\.weight")


def cut(state, ranks, column=COLUMN):
    """What each tensor-parallel rank holds, by Megatron's rules for the original names."""

    def part(name, tensor, rank):
        if column.search(name):
            return tensor.chunk(ranks, 0)[rank].clone()
        return (tensor.chunk(ranks, 1)[rank] if ROW.search(name) else tensor).clone()

    return [{name: part(name, t, rank) for name, t in state.items()} for rank in range(ranks)]


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


# Names.


@pytest.mark.parametrize("names", ["original", "mindspeed"])
def test_the_released_names_and_shapes_are_those_of_the_model(names):
    shapes = released(names)
    assert len(shapes) == 1178
    assert sum(map(math.prod, shapes.values())) == 8_504_661_120
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours, report = convert.from_released(state)
    with torch.device("meta"):
        model = SUV(**SUV.presets["v1.5"])
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert report == convert.Report(names, 1, ())
    back = convert.to_released(ours, names=names)
    assert back.keys() == shapes.keys()
    assert all(back[name] is state[name] for name in back)


@pytest.mark.parametrize("names", ["original", "mindspeed"])
def test_round_trip_through_a_model_is_bit_exact(names):
    state = tensors(released(names, SMALL))
    model = SUV(**SMALL_CONFIG).to(torch.bfloat16)
    convert.load_released(model, state)
    assert same(convert.to_released(model.state_dict(), names=names), state)


def test_what_has_no_effect_is_dropped_and_reported(small):
    shapes = released("original", SMALL, inert=True)
    state = small | tensors({name: shapes[name] for name in shapes.keys() - small.keys()})
    state["transformer_blocks.0.0.attn1.to_q._extra_state"] = None
    ours, report = convert.from_released({f"module.module.{n}": t for n, t in state.items()})
    assert same(convert.to_released(ours), small)
    absent = {original(f"transformer_blocks.6.1.{n}") for n in RECORD["absent_from_last_block"]}
    assert len(absent) == 6
    extra = "module.module.transformer_blocks.0.0.attn1.to_q._extra_state"
    assert sorted(report.dropped) == sorted(absent | {extra})


@pytest.mark.parametrize(
    "name",
    [
        "transformer_blocks.0.0.attn1.to_q.bias2",
        "transformer_blocks.0.0.ff.net.2.bias",
        "transformer_blocks.0.0.attn1.norm_q.bias",
        "transformer_blocks.00.0.norm1.norm.weight",
        "transformer_blocks.0.norm1.norm.weight",
        "transformer_blocks.0.0.attn1.proj_q.weight",
        "skip_norm_linear.0.2.weight",
        "stages.0.0.attn.to_q.weight",
        "module.proj_out.weight",
        "weight",
    ],
)
def test_unknown_names_are_refused(small, name):
    with pytest.raises(ValueError, match=rf"original naming: 1 unknown: {re.escape(name)}$"):
        convert.from_released(small | {name: torch.zeros(2)})


def test_ten_unknown_names_are_told(small):
    more = {f"more.{i}": torch.zeros(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"12 unknown: more\.0, .*more\.9, \.\.\.$"):
        convert.from_released(small | more)
    with pytest.raises(ValueError, match=r"12 unknown: more\.0, .*more\.9, \.\.\.$"):
        convert.to_released(more)
    with pytest.raises(ValueError, match="names must be one of"):
        convert.to_released({}, names="ours")


@pytest.mark.parametrize("value", [None, 3, torch.zeros(2, dtype=torch.int64), "text"])
def test_what_is_no_weight_is_refused(small, value):
    with pytest.raises(ValueError, match=r"1 others: proj_out\.bias$"):
        convert.from_released(small | {"proj_out.bias": value})
    with pytest.raises(ValueError, match=r"1 others: 3$"):
        convert.from_released(small | {3: torch.zeros(1)})


# Loading.


def test_a_model_takes_all_or_nothing(tiny):
    model = SUV(**TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {k: v for k, v in tiny.items() if not k.startswith("transformer_blocks.4.1.attn1.")}
    wrong["skip_norm_linear.7.1.weight"] = torch.zeros(1)
    for layer in range(2):
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            wrong[f"transformer_blocks.0.{layer}.attn1.{name}.bias"] = torch.zeros(63)
    with pytest.raises(ValueError, match="none were loaded") as caught:
        convert.load_released(model, wrong)
    missing, unexpected, misshapen = str(caught.value).split("loaded: ")[1].split("; ")
    absent = [f"stages.4.1.attn.{name}" for name in ("to_q.weight", "to_q.bias", "to_k.weight")]
    assert missing.startswith(f"18 missing: {', '.join(absent)}, ")
    assert missing.count("stages.") == 10
    assert unexpected == "1 unexpected: skips.7.linear.weight"
    assert misshapen.startswith(
        "12 misshapen: stages.0.0.attn.to_q.bias: [63] torch.float32 for [64]"
    )
    assert misshapen.count("for [64]") == 10
    assert same(model.state_dict(), before)
    convert.load_released(model, tiny)
    assert same(convert.to_released(model.state_dict()), tiny)


def test_a_model_without_memory_is_refused(tiny):
    with torch.device("meta"):
        model = SUV(**TINY)
    with pytest.raises(ValueError, match="no memory to load into"):
        convert.load_released(model, tiny)


# Tensor-parallel shards.

NO_ADALN = re.compile(COLUMN.pattern.rpartition("|")[0])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("column", [COLUMN, NO_ADALN], ids=["adaln cut", "adaln whole"])
def test_shards_are_merged(small, ranks, column):
    parts = cut(small, ranks, column)
    assert parts[1]["transformer_blocks.3.2.ff.net.2.weight"].shape == (32, 128 // ranks)
    for rank, part in enumerate(parts):
        part["proj_out._extra_state"] = torch.full((1,), float(rank))
    ours, report = convert.from_released(parts)
    assert same(convert.to_released(ours), small)
    assert report == convert.Report("original", ranks, ("proj_out._extra_state",))
    model = SUV(**SMALL_CONFIG).to(torch.bfloat16)
    assert convert.load_released(model, parts) == report
    assert same(convert.to_released(model.state_dict()), small)


def test_shards_that_make_no_whole_are_refused(small):
    def refused(match, parts):
        with pytest.raises(ValueError, match=match):
            convert.from_released(parts)

    name, bias = (f"transformer_blocks.1.2.attn1.to_out.0.{leaf}" for leaf in ("weight", "bias"))
    first, second = cut(small, 2)
    refused(
        r"stages\.1\.2\.attn\.to_out\.bias: ranks 0 and 1 should hold copies, but they differ",
        [first, second | {bias: second[bias] + 1}],
    )
    refused(
        r"1 misshapen: stages\.1\.2\.attn\.to_out\.weight: \[32, 8\] torch\.bfloat16 \+ ",
        [part | {name: part[name][:, :8]} for part in (first, second)],
    )
    refused(r"1 misshapen: .*float32", [first, second | {name: second[name].float()}])
    fewer = {k: v for k, v in second.items() if k != name}
    refused(r"ranks 0 and 1 .*: 1 held by one: " + re.escape(name), [first, fewer])
    refused("each of the shards is whole", [small, small])
    refused("state is empty", [])
    refused(r"misshapen: .*to_q\.weight", cut(small, 4)[:3])


# What the shapes tell.


def test_the_config_is_read_off_the_shapes():
    for name in ("v1.5", "9B", "32B", "tiny"):
        with torch.device("meta"):
            model = SUV(**SUV.presets[name])
        assert SUV.presets[name].items() <= convert.infer_config(model.state_dict()).items()


@pytest.mark.parametrize(
    "other",
    [
        {"double_ff": False},
        {"skip_connection": False},
        {"skip_zero_init": False},
        {"norm": "rms_norm"},
        {"patch_size": (1, 1, 4)},
        {"out_channels": 8},
        {"num_layers": (1, 3, 2)},
    ],
    ids=str,
)
def test_sparsity_is_not_guessed(other):
    config = TINY | other
    config["sparsity"] = (3, 2, 1, 2, 3)[: len(config["num_layers"])]
    with torch.device("meta"):
        state = SUV(**config).state_dict()
    with pytest.raises(ValueError, match=r"weights do not tell the sparsity; give"):
        convert.infer_config(state)
    found = convert.infer_config(state, sparsity=config["sparsity"])
    assert config.items() <= found.items()
    with torch.device("meta"):
        again = SUV(**found).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_a_part_of_a_model_has_no_config(tiny):
    ours, _ = convert.from_released(tiny)
    gap = {k: v for k, v in ours.items() if not k.startswith("stages.1.0.")}
    with pytest.raises(ValueError, match="blocks are left out"):
        convert.infer_config(gap)
    del ours["text_embed.weight"]
    with pytest.raises(ValueError, match=r"text_embed\.weight, which tells sizes, is missing"):
        convert.infer_config(ours)


# Files.


def holds(folder, state):
    """The folder is complete, and loads as exactly these weights."""
    shards.verify(folder)
    model = SUV.from_pretrained(folder, torch_dtype=next(iter(state.values())).dtype)
    return same(convert.to_released(model.state_dict()), state)


def wrapped(state):
    """As Megatron saves it."""
    arguments = argparse.Namespace(lr=1e-4, params_dtype=torch.bfloat16)
    return {"args": arguments, "iteration": 7, "model": state, "rng_state": [{"cuda": b"1"}]}


def ranks_in(folder, parts):
    for rank, part in enumerate(parts):
        (folder / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(wrapped(part), folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
    return folder


@pytest.mark.parametrize(
    ("found", "wrap"),
    [
        ("", lambda state: state),
        ("ema_state_dict", lambda state: {"ema_state_dict": state, "state_dict": {}}),
        ("model", wrapped),
        ("model.state_dict", lambda state: {"model": {"state_dict": state}}),
    ],
)
def test_a_checkpoint_becomes_a_folder(tiny, tmp_path, found, wrap):
    torch.save(wrap({f"module.{name}": t for name, t in tiny.items()}), tmp_path / "in.pt")
    report = convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert report == convert.Report("original", 1, (), found)
    assert holds(tmp_path / "out", tiny)
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out"]
    config = SUV.load_config(tmp_path / "out")
    assert {
        k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
    }.items() >= TINY.items()


def test_shards_and_manifest(tiny, tmp_path):
    torch.save(tiny, tmp_path / "in.pt")
    size = sum(t.nbytes for t in tiny.values())
    convert.convert_file(tmp_path / "in.pt", tmp_path / "out", max_shard_bytes=size // 4)
    files = sorted(os.listdir(tmp_path / "out"))
    pieces = [name for name in files if name.endswith(".safetensors")]
    count = len(pieces)
    assert 4 <= count <= 6
    assert pieces == [
        f"diffusion_pytorch_model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    for name in pieces:
        assert sum(t.nbytes for t in load_file(tmp_path / "out" / name).values()) <= size // 4
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert sorted([*manifest["files"], "manifest.json"]) == files
    assert manifest["names"] == "original"
    assert holds(tmp_path / "out", tiny)
    permissions = (tmp_path / "out").stat().st_mode
    (tmp_path / "other").mkdir()
    assert permissions == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "latest", "release", "list", "safetensors", "index"])
def test_sources(tiny, tmp_path, kind):
    ranks = 1
    source = tmp_path / "in"
    if kind in ("folder", "list"):
        ranks_in(source, cut(tiny, 2))
        ranks = 2
    if kind in ("latest", "release"):
        step, folder = {"latest": ("70", "iter_0000070"), "release": ("release", "release")}[kind]
        ranks_in(source / folder, cut(tiny, 2))
        (source / "latest_checkpointed_iteration.txt").write_text(step + "\n")
        ranks = 2
    if kind == "list":
        source = [source / f"mp_rank_0{rank}" / "model_optim_rng.pt" for rank in range(2)]
    if kind == "safetensors":
        source = tmp_path / "in.safetensors"
        save_file(tiny, source)
    if kind == "index":
        source.mkdir()
        lazy = {name: shards.Lazy.of(tensor) for name, tensor in tiny.items()}
        shards.write(source, lazy, max_shard_bytes=10**5, about={}, progress=int)
    report = convert.convert_file(source, tmp_path / "out")
    assert report.ranks == ranks
    assert holds(tmp_path / "out", tiny)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["mp_rank_00", "mp_rank_02"], "without a gap"),
        (["mp_rank_00_000", "mp_rank_00_001"], "pipeline parallelism, is not handled"),
        ([], "holds neither"),
    ],
)
def test_folders_of_something_else_are_refused(tmp_path, names, match):
    for name in names:
        (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=match):
        convert.convert_file(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text("../../elsewhere")
    with pytest.raises(ValueError, match="not a step or release"):
        convert.convert_file(tmp_path / "in", tmp_path / "out")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_refused(tiny, tmp_path):
    source, out = tmp_path / "in.pt", tmp_path / "out"

    def refused(match, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            convert.convert_file(source, out, **options)
        assert os.listdir(tmp_path) == (["in.pt"] if source.exists() else [])

    refused("is missing or no file")
    torch.save({**tiny, "x": Evil(tmp_path / "run")}, source)
    refused(r"1 others: x \(a posix\.mkdir\)$")
    torch.save(tiny, source, _use_new_zipfile_serialization=False)
    refused("is by a torch before 1.6, not what")
    source.write_bytes(b"")
    refused("is empty, or begins with zeros alone, not what")
    source.write_text("hello" * 100)
    refused("is of an unknown kind, not what")
    torch.save(tiny, source)
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) // 2])
    refused("is refused")
    torch.save([1, 2], source)
    refused("holds a list, not weights by name")
    torch.save({"model": tiny, "state_dict": dict(tiny)}, source)
    refused(r"weights under each of \['model', 'state_dict'\]; give key")
    refused(r"has no key 'other'; it has \['model', 'state_dict'\]", key="other")
    refused("max_shard_bytes must be at least 1, got 0", key="model", max_shard_bytes=0)
    refused("dtype must be float32, .* got torch.int8", key="model", dtype=torch.int8)
    torch.save({k: v for k, v in tiny.items() if "norm_out.linear" not in k}, source)
    refused(r"2 missing: norm_out\.linear\.weight, norm_out\.linear\.bias$")
    torch.save({k: v[:1] if k == "norm_final.bias" else v for k, v in tiny.items()}, source)
    refused(r"1 misshapen: norm_final\.bias: \[1\] torch\.float32 for \[64\]$")


def test_key_chooses(tiny, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "other": {"ema": tiny}}, tmp_path / "in.pt")
    report = convert.convert_file(tmp_path / "in.pt", tmp_path / "out", key="other.ema")
    assert report.found == "other.ema"
    assert holds(tmp_path / "out", tiny)


def test_what_exists_is_never_touched(tiny, tmp_path, monkeypatch):
    torch.save(tiny, tmp_path / "in.pt")
    for make in (Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")):
        make(tmp_path / "out")
        before = (tmp_path / "out").lstat()
        with pytest.raises(ValueError, match="exists; give a new name"):
            convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
        assert (tmp_path / "out").lstat() == before
        os.rename(tmp_path / "out", tmp_path / f"kept{before.st_ino}")
    with pytest.raises(ValueError, match="is no folder, so"):
        convert.convert_file(tmp_path / "in.pt", tmp_path / "no" / "out")
    monkeypatch.setattr(
        convert.checkpoints, "read", None
    )  # what cannot be made is said before any work
    with pytest.raises(ValueError, match="x cannot be made: File name too long; choose another"):
        convert.convert_file(tmp_path / "in.pt", tmp_path / ("x" * 300))


def test_a_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    torch.save(tiny, tmp_path / "in.pt")
    spent = []

    def sync(path):
        spent.append(path)
        if len(spent) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "sync", sync)
        with pytest.raises(OSError, match="No space left"):
            convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(shards.shutil, "disk_usage", lambda path: argparse.Namespace(free=1000))
        with pytest.raises(ValueError, match="only 1,000 are free; make room"):
            convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.pt"]


def test_all_is_on_disk_before_the_name(tiny, tmp_path, monkeypatch):
    torch.save(tiny, tmp_path / "in.pt")
    events = []
    rename = os.rename
    monkeypatch.setattr(shards, "sync", lambda path: events.append(path.name))

    def renamed(before, after):
        assert before.parents[1] == after.parent  # so on one file system
        events.append("rename")
        rename(before, after)

    monkeypatch.setattr(os, "rename", renamed)
    convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    at = events.index("rename")
    assert sorted(events[:at]) == sorted([*os.listdir(tmp_path / "out"), "out"])
    assert events[at + 1 :] == [tmp_path.name]


# What programs wrap around weights.


class MMConfig:
    """Of MindSpeed-MM, which is not here when its checkpoints are read."""

    def __init__(self, **values):
        for name, value in values.items():
            setattr(self, name, MMConfig(**value) if isinstance(value, dict) else value)


def test_a_folder_of_mindspeed_is_read(tiny, tmp_path):
    """With the objects that its checkpoints hold beside the weights."""
    config = MMConfig(predictor={"sparse_n": [1, 2], "dtype": torch.bfloat16}, frames=121)
    extra = io.BytesIO(b"recipe")
    for rank, part in enumerate(cut(tiny, 2)):
        weights = {f"module.{name}": tensor for name, tensor in part.items()}
        weights |= dict.fromkeys([f"{name}._extra_state" for name in ("a", "b")], extra)
        rng = {
            "random_rng_state": (3, (1, 2), None),
            "np_rng_state": ("MT19937", np.arange(624, dtype=np.uint32), 1, 0, 0.0),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
        (tmp_path / "in" / "iter_0000007" / f"mp_rank_{rank:02d}").mkdir(parents=True)
        torch.save(
            {
                "args": argparse.Namespace(mm=config, np=np.float64(1.5), path=Path("x")),
                "checkpoint_version": 3.0,
                "iteration": 7,
                "model": weights,
                "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}, "param_groups": [{}]},
                "opt_param_scheduler": {"max_lr": 1e-4},
                "rng_state": [rng],
            },
            tmp_path / "in" / "iter_0000007" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt",
        )
    (tmp_path / "in" / "latest_checkpointed_iteration.txt").write_text("7")
    report = convert.convert_file(tmp_path / "in", tmp_path / "out")
    assert report == convert.Report("original", 2, ("a._extra_state", "b._extra_state"), "model")
    assert holds(tmp_path / "out", tiny)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"model.{name}",
        lambda name: f"_forward_module.{name}",
        lambda name: f"module.module._orig_mod.model.predictor.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: re.sub(r"^(transformer_blocks\.\d+\.\d+\.)", r"\1_orig_mod.", name),
        lambda name: (
            "_fsdp_wrapped_module."
            + re.sub(r"(\.\d+\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)
        ),
    ],
)
def test_what_wrappers_put_into_names_is_undone(tiny, tmp_path, wrap):
    torch.save({"model": {wrap(name): t for name, t in tiny.items()}}, tmp_path / "in.pt")
    convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert holds(tmp_path / "out", tiny)


def test_wrappers_that_make_two_names_one_are_refused(small):
    name = "transformer_blocks.0.0.attn1.to_q.weight"
    twice = small | {name.replace("attn1", "attn1._orig_mod"): small[name]}
    with pytest.raises(ValueError, match="same weights under several names: 2 names: transf"):
        convert.from_released(twice)


def test_our_own_names_need_no_conversion(tiny, tmp_path):
    SUV(**TINY).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="have our names already"):
        convert.convert_file(tmp_path / "in", tmp_path / "out")


# Averaged weights.


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("found", "others", "make"),
    [
        ("ema_model", ("model",), lambda s: {"model": other(s), "ema_model": s}),
        ("ema", ("model",), lambda s: {"model": other(s), "ema": s, "ema_decay": 0.9}),
        ("model_ema", ("state_dict",), lambda s: {"state_dict": other(s), "model_ema": s}),
        ("averaged", ("",), lambda s: {**other(s), "averaged": s}),
        ("state.ema", ("state.model",), lambda s: {"state": {"model": other(s), "ema": s}}),
        ("ema.module", ("module",), lambda s: {"module": other(s), "ema": {"module": s}}),
        ("swa_model", (), lambda s: {"swa_model": s}),
        ("model", (), lambda s: {"model": s, "ema": {}, "ema_decay": 0.9, "ema_on": None}),
        ("model", (), lambda s: {"model": s, "ema": {"decay": 0.9, "step": torch.tensor(3)}}),
        ("model", (), lambda s: {"model": s, "schema": {"x": torch.zeros(2)}}),
        ("model", (), lambda s: {"model": s, "adam": {"w": {"exp_avg": torch.zeros(2)}}}),
        (
            "state_dict.model_ema",
            ("state_dict.model",),
            lambda s: {
                "state_dict": {f"model.{n}": t for n, t in other(s).items()}
                | {f"model_ema.{n}": t for n, t in s.items()}
            },
        ),
    ],
)
def test_averaged_weights_are_preferred(tiny, tmp_path, found, others, make):
    torch.save(make(tiny), tmp_path / "in.pt")
    report = convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert (report.found, report.others) == (found, others)
    assert holds(tmp_path / "out", tiny)
    for number, key in enumerate(others):
        convert.convert_file(tmp_path / "in.pt", tmp_path / f"o{number}", key=key)
        assert holds(tmp_path / f"o{number}", other(tiny))


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (r"\['model', 'net'\]; give key", lambda s: {"model": s, "net": other(s)}),
        (r"\['model', 'ema', 'ema2'\]|\['model', 'ema_1', 'ema_2'\]; give key",
         lambda s: {"model": s, "ema_1": other(s), "ema_2": dict(s)}),
        (r"\['model'\], and averaged .* under ema \(a list\); give key",
         lambda s: {"model": s, "ema": list(s.values())}),
        (r"under ema_model \(a tests?\S*\.MMConfig|under ema_model \(a test_suv_convert.MMConfig",
         lambda s: {"model": s, "ema_model": MMConfig(x=3)}),
        (r"under ema \(a dict\); give key",
         lambda s: {"model": s, "ema": {"shadow_params": list(s.values()), "decay": 0.9}}),
        (r"under ema \(a dict\); give key",
         lambda s: {"model": s, "ema": {n.replace(".", ""): t for n, t in s.items()}}),
        (r"\['model'\], and averaged ones that are not read under model_ema \(a dict\)",
         lambda s: {f"model.{n}": t for n, t in s.items()} | {f"model_ema.x{n}": t for n, t in
                                                              s.items()}),
    ],
)  # fmt: skip
def test_averaged_weights_are_never_passed_over(tiny, tmp_path, match, make):
    torch.save(make(tiny), tmp_path / "in.pt")
    with pytest.raises(ValueError, match=match):
        convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert os.listdir(tmp_path) == ["in.pt"]
    report = convert.convert_file(tmp_path / "in.pt", tmp_path / "out", key="model")
    assert (report.found, report.others) == ("model", ())
    assert holds(tmp_path / "out", tiny)


def test_ranks_keep_their_weights_alike(tiny, tmp_path):
    files = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for file, part, key in zip(files, cut(tiny, 2), ("ema", "model"), strict=True):
        torch.save({key: part}, file)
    with pytest.raises(ValueError, match="ranks 0 and 1 are under different keys, 'ema' and 'mo"):
        convert.convert_file(files, tmp_path / "out")


# Ranks.


def test_a_rank_given_twice_is_refused(tiny, tmp_path):
    parts = cut(tiny, 2)
    ranks_in(tmp_path / "in", parts)
    first, second = (tmp_path / "in" / f"mp_rank_0{n}" / "model_optim_rng.pt" for n in range(2))
    copy, link, out = tmp_path / "copy.pt", tmp_path / "link.pt", tmp_path / "out"
    copy.write_bytes(first.read_bytes())
    link.symlink_to(first)
    for files in ([first, first], [first, link]):
        with pytest.raises(ValueError, match=r"the same rank is given twice"):
            convert.convert_file(files, out)
    with pytest.raises(ValueError, match="ranks 0 and 1 hold the same numbers"):
        convert.convert_file([first, copy], out)
    with pytest.raises(ValueError, match=r"of ranks \[1, 0\], .* ranks 0 to 1, in order"):
        convert.convert_file([second, first], out)
    model = SUV(**TINY)
    with pytest.raises(ValueError, match="ranks 0 and 1 hold the same numbers"):
        convert.load_released(model, [parts[0], dict(parts[0])])
    assert not out.exists()


def test_ranks_of_equal_numbers_are_no_rank_twice(tiny):
    """A model in which all that is cut is one number says nothing."""
    model = SUV(**TINY)
    even = {name: torch.ones_like(tensor) for name, tensor in tiny.items()}
    convert.load_released(model, cut(even, 2))
    assert same(convert.to_released(model.state_dict()), even)


@pytest.mark.parametrize("name", ["model_rng.pt", "model_optim_rng.pt"])
def test_both_names_of_megatron(tiny, tmp_path, name):
    ranks_in(tmp_path / "in", cut(tiny, 2))
    for folder in (tmp_path / "in").iterdir():
        (folder / "model_optim_rng.pt").rename(folder / name)
        (folder / "distrib_optim.pt").write_bytes(b"x")
    convert.convert_file(tmp_path / "in", tmp_path / "out")
    assert holds(tmp_path / "out", tiny)


# Values.


def test_weights_without_finite_values_are_refused(tiny, tmp_path):
    model = SUV(**TINY)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = {name: tensor.clone() for name, tensor in tiny.items()}
        bad["norm_out.linear.bias"][-1] = value
        bad["proj_out.weight"][0, 0] = value
        torch.save(bad, tmp_path / "in.pt")
        match = r"2 not finite: norm_out\.linear\.bias, proj_out\.weight$"
        with pytest.raises(ValueError, match=match):
            convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
        with pytest.raises(ValueError, match=match):
            convert.load_released(model, bad)
        second = cut(tiny, 2)
        second[1]["transformer_blocks.0.0.attn1.to_q.bias"][0] = value
        with pytest.raises(ValueError, match=r"1 not finite: stages\.0\.0\.attn\.to_q\.bias$"):
            convert.load_released(model, second)
    assert same(model.state_dict(), before)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_tensors_without_values_are_refused(tiny, tmp_path):
    bad = tiny | {"proj_out.weight": tiny["proj_out.weight"].to("meta")}
    torch.save(bad, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=r"proj_out\.weight \(a tensor .* of the meta device\)$"):
        convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    with pytest.raises(ValueError, match=r"1 on the meta device, without values: proj_out\.weight"):
        convert.load_released(SUV(**TINY), bad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_are_cast(tiny, tmp_path, dtype, ranks):
    files = []
    for rank, part in enumerate(cut(tiny, ranks)):
        files.append(tmp_path / f"{rank}.pt")
        torch.save(part, files[-1])
    convert.convert_file(files, tmp_path / "out", dtype=dtype)
    assert holds(tmp_path / "out", {name: tensor.to(dtype) for name, tensor in tiny.items()})


def test_what_a_dtype_cannot_hold_is_refused(tiny, tmp_path):
    large = tiny | {"proj_out.bias": tiny["proj_out.bias"] + 7e4}
    torch.save(large, tmp_path / "in.pt")
    with pytest.raises(ValueError, match=r"1 too large for torch\.float16: proj_out\.bias$"):
        convert.convert_file(tmp_path / "in.pt", tmp_path / "out", dtype=torch.float16)
    convert.convert_file(tmp_path / "in.pt", tmp_path / "out", dtype=torch.bfloat16)


# Folders of safetensors.


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model", "sora"])
def test_a_folder_with_one_file_needs_no_index(tiny, tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(tiny, folder / f"{name}.safetensors")
    (folder / "config.json").write_text("{}")
    convert.convert_file(folder, tmp_path / "out")
    assert holds(tmp_path / "out", tiny)
    save_file(tiny, folder / "another.safetensors")
    with pytest.raises(ValueError, match="holds 2 safetensors files and no index"):
        convert.convert_file(folder, tmp_path / "other")


def test_an_index_of_any_name(tiny, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    lazy = {name: shards.Lazy.of(tensor) for name, tensor in tiny.items()}
    shards.write(folder, lazy, max_shard_bytes=10**5, about={}, progress=int)
    (folder / "manifest.json").unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.rename(folder / "model.safetensors.index.json")
    convert.convert_file(folder, tmp_path / "out")
    assert holds(tmp_path / "out", tiny)
    (folder / "b.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has several indexes"):
        convert.convert_file(folder, tmp_path / "other")


def test_a_folder_with_one_pickle(tiny, tmp_path):
    (tmp_path / "in").mkdir()
    torch.save(tiny, tmp_path / "in" / "a.pt")
    (tmp_path / "in" / "README.md").write_text("x")
    convert.convert_file(tmp_path / "in", tmp_path / "out")
    assert holds(tmp_path / "out", tiny)
    torch.save(tiny, tmp_path / "in" / "b.pt")
    with pytest.raises(ValueError, match=r"it has \['a.pt', 'b.pt'\]. Name the files instead"):
        convert.convert_file(tmp_path / "in", tmp_path / "other")


def test_the_content_tells_the_kind(tiny, tmp_path):
    save_file(tiny, tmp_path / "a.pt")
    torch.save(tiny, tmp_path / "b.safetensors")
    for number, name in enumerate(("a.pt", "b.safetensors")):
        convert.convert_file(tmp_path / name, tmp_path / f"out{number}")
        assert holds(tmp_path / f"out{number}", tiny)


def test_names_from_files_are_fit_for_a_terminal(tiny, tmp_path):
    torch.save(tiny | {"\x1b[31mred\ud800": torch.zeros(1)}, tmp_path / "in.pt")
    with pytest.raises(ValueError, match="unknown: ") as caught:
        convert.convert_file(tmp_path / "in.pt", tmp_path / "out")
    assert str(caught.value).isprintable()


# A folder that changed afterwards.


@pytest.fixture
def folder(tmp_path):
    made = {f"t{i}": torch.full((4, 4), float(i)) for i in range(4)}
    lazy = {name: shards.Lazy.of(tensor) for name, tensor in made.items()}
    with shards.new_folder(tmp_path / "made") as path:
        shards.write(path, lazy, max_shard_bytes=128, about={"kind": "test"}, progress=int)
    shards.verify(tmp_path / "made")
    assert same(shards.read(tmp_path / "made"), made)
    return tmp_path / "made"


def test_changes_are_seen(folder):
    second = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    data = second.read_bytes()
    second.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    shards.read(folder)  # the format itself does not notice
    with pytest.raises(ValueError, match=f"{second.name} does not have the SHA-256"):
        shards.verify(folder)
    second.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{second.name} has {len(data) - 1} bytes"):
        shards.verify(folder)
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        shards.read(folder)
    second.unlink()
    with pytest.raises(ValueError, match=f"{second.name} is missing"):
        shards.verify(folder)
    with pytest.raises(FileNotFoundError, match=f"{second.name} is missing"):
        shards.read(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        shards.verify(folder)


@pytest.mark.parametrize("name", ["../made.safetensors", "/etc/passwd", "link", "", "a\0b", 3, [1]])
def test_names_in_files_stay_in_the_folder(folder, name):
    (folder.parent / "made.safetensors").write_bytes(b"x")
    (folder / "link").symlink_to(folder.parent / "made.safetensors")
    if isinstance(name, str):
        (folder / "manifest.json").write_text(json.dumps({"files": {name: {}}}))
        with pytest.raises(ValueError, match="names must stay in their folder"):
            shards.verify(folder)
    index = {"weight_map": {"t0": name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must stay in their folder|damaged"):
        shards.read(folder)


def test_index_and_manifest_must_agree(folder):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["t9"] = index["weight_map"]["t0"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"disagree about \['t9'\]"):
        shards.read(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][index["weight_map"]["t0"]], manifest["files"][path.name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="leaves out"):
        shards.verify(folder)


def test_a_changed_source_folder_is_refused(tiny, tmp_path):
    with shards.new_folder(tmp_path / "in") as path:
        lazy = {name: shards.Lazy.of(tensor) for name, tensor in tiny.items()}
        shards.write(path, lazy, max_shard_bytes=10**9, about={}, progress=int)
    file = tmp_path / "in" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="does not have the SHA-256"):
        convert.convert_file(tmp_path / "in", tmp_path / "out")


def test_every_dtype_and_shape_is_written_as_it_is(tmp_path):
    made = {
        "odd": torch.arange(3, dtype=torch.int8),
        "half": torch.randn(5).half(),
        "none": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 3).T,
        "brain": torch.randn(3, 1).bfloat16().expand(3, 2),
        "count": torch.arange(3),
        "spread": torch.ones(1).expand(3),
    }
    seen = []
    lazy = {name: shards.Lazy.of(tensor) for name, tensor in made.items()}
    shards.write(tmp_path, lazy, max_shard_bytes=10**6, about={}, progress=seen.append)
    (file,) = tmp_path.glob("*.safetensors")
    assert same(load_file(file), made)
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert header["__metadata__"] == {"format": "pt"}  # diffusers and transformers ask for it
    for name, tensor in made.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0
    assert sum(seen) == sum(tensor.nbytes for tensor in made.values())
    assert same(shards.read(tmp_path), made)


def test_a_promise_about_a_tensor_must_hold(tmp_path):
    for lazy, match in (
        (shards.Lazy((2,), torch.float32, lambda: torch.zeros(3)), r"x came out as \[3\]"),
        (shards.Lazy((2,), torch.complex64, lambda: torch.zeros(2)), "x is torch.complex64"),
    ):
        with (
            pytest.raises(ValueError, match=match),
            shards.new_folder(tmp_path / "out") as folder,
        ):
            shards.write(folder, {"x": lazy}, max_shard_bytes=9, about={}, progress=int)
        assert not os.listdir(tmp_path)


# Memory.

MEASURE = """
import sys
from skiparse.models.suv import convert

def now(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

before = now("VmRSS")
whole, *ranks = sys.argv[1:]
for source in (whole, ranks):
    convert.convert_file(source, whole + str(len(source)), sparsity=(1, 2, 4, 8, 4, 2, 1))
    print(now("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's accounts")
def test_memory_stays_near_the_size_of_the_file(tmp_path):
    wide = SMALL | {3072: 256, 6144: 512, 12288: 1024, 18432: 1536, 1024: 128, 128: 16}
    shapes = released("original", wide)
    state = tensors(shapes)
    files = []
    for number, part in enumerate([state, *cut(state, 2)]):
        files.append(tmp_path / f"{number}.pt")
        torch.save(part, files[-1])
    size = files[0].stat().st_size
    assert size > 100e6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [int(peak) < 1.3 * size for peak in done.stdout.split()] == [True, True], done.stdout


# The command.


def test_the_command(tiny, tmp_path, capsys):
    ranks_in(tmp_path, cut(tiny, 2))
    files = [str(tmp_path / f"mp_rank_0{rank}" / "model_optim_rng.pt") for rank in range(2)]
    assert main(["convert", "suv", *files, str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "original names, 2 rank(s), weights found under model" in told
    assert "left out, without effect: nothing" in told
    assert holds(tmp_path / "out", tiny)
    assert main(["convert", "suv", files[0], str(tmp_path / "out")]) == 2
    assert "exists; give a new name" in capsys.readouterr().err
    arguments = ["convert", "suv", *files, str(tmp_path / "other")]
    assert main([*arguments, "--sparsity", "1,x"]) == 2
    assert "--sparsity 1,x: give whole numbers" in capsys.readouterr().err
    assert main([*arguments, "--key", "other"]) == 2
    assert "has no key 'other'" in capsys.readouterr().err
    assert main([*arguments, "--dtype", "int8"]) == 2
    assert "--dtype int8: give float32" in capsys.readouterr().err
    chosen = ["--sparsity", "3,1,1,1,3", "--key", "model", "--dtype", "bfloat16"]
    assert main([*arguments, *chosen]) == 0
    assert SUV.from_pretrained(tmp_path / "other").config.sparsity == (3, 1, 1, 1, 3)
    (file,) = (tmp_path / "other").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    torch.save({"ema": tiny, "model": other(tiny)}, tmp_path / "in.pt")
    assert main(["convert", "suv", str(tmp_path / "in.pt"), str(tmp_path / "third")]) == 0
    assert "under ema; not taken, but there: --key model" in capsys.readouterr().out
