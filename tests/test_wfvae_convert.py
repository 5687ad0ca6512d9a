"""The released WF-VAE comes out under our names, bit for bit, or not at all."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn

from skiparse.cli import main
from skiparse.models import checkpoints, shards
from skiparse.models.strict import StrictModelMixin
from skiparse.models.wfvae import convert
from skiparse.models.wfvae.blocks import convolve
from skiparse.models.wfvae.haar import Haar
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

RECORD = json.loads((Path(__file__).parent / "data" / "wfvae_v15_keys.json").read_text())
# The released sizes made small: every number in a recorded shape, and what it becomes.
SMALL = {160: 4, 320: 8, 640: 16, 128: 6, 288: 10, 448: 14, 768: 22, 64: 6, 32: 3}
SMALL_CONFIG = {
    "base_channels": 4,
    "latent_channels": 3,
    "encoder_energy_channels": 6,
    "decoder_energy_channels": 6,
}
# Axes along which each released filter is high.
HIGH = {"h": "", "g": "w", "hh": "h", "gh": "hw", "h_v": "t", "g_v": "tw", "hh_v": "th"}
HIGH |= {"gh_v": "thw", "aa": "", "ad": "h", "da": "w", "dd": "hw"}
BUFFERS = ("shift", "scale")


def taps(name, shape, gain):
    """A released filter from its meaning: -1 at the second place of every axis where it is high."""
    band = re.search(r"([a-z]+(_v)?)(_conv\.conv\.weight)?$", name.rpartition(".wavelet")[2])[1]
    band = name.split(".")[-1] if "inverse" in name else band.split(".")[-1]
    axes = "thw"[-(len(shape) - 2) :]
    made = torch.full(shape, gain)
    for axis, letter in enumerate(axes, 2):
        if letter in HIGH[band]:
            made.select(axis, 1).neg_()
    return made


def released(names, sizes=None, *, gain=0.3536, dtype=torch.float32, seed=0):
    """The recorded names; filters, shift and scale as they should be, and random weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, recorded in RECORD.items():
        shape = [(sizes or {}).get(n, n) for n in recorded]
        if names == "original":
            if name in BUFFERS:
                continue
            name = name.replace("tranform", "transform")
        if "wavelet" in name:
            state[name] = taps(name, shape, gain).to(dtype)
        elif name in BUFFERS:
            state[name] = torch.linspace(0.5, 1.5, shape[1]).reshape(shape).to(dtype)
        elif sizes is None:
            state[name] = torch.empty(shape, device="meta", dtype=dtype)
        else:
            state[name] = torch.randn(shape, generator=generator).to(dtype)
    return state


@pytest.fixture(scope="module")
def small():
    return released("mindspeed", SMALL)


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def built(state):
    """The model with these weights, from nothing else."""
    ours, report = convert.from_released(state)
    model = WFVAE(**report.config).to(next(iter(ours.values())).dtype)
    model.load_state_dict(ours, strict=True)
    return model


# Names.


@pytest.mark.parametrize("names", ["original", "mindspeed"])
def test_the_released_names_and_shapes_are_those_of_the_model(names):
    state = released(names)
    trained = [n for n in state if n not in BUFFERS and "inverse" not in n]
    assert sum(math.prod(state[name].shape) for name in trained) == 227_035_816
    ours, report = convert.from_released(state)
    with torch.device("meta"):
        model = WFVAE(**report.config)
    assert {n: t.shape for n, t in ours.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }
    assert list(ours) == list(model.state_dict())
    assert report.names == names
    assert set(report.dropped) == {n for n in state if "wavelet" in n or n in BUFFERS}
    back = convert.to_released(model, names=names)
    assert {n: t.shape for n, t in back.items()} == {n: t.shape for n, t in state.items()}
    assert len(back) == {"original": 252, "mindspeed": 254}[names]


@pytest.mark.parametrize("names", ["original", "mindspeed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_through_a_model_is_bit_exact(names, dtype):
    state = released(names, SMALL, dtype=dtype)
    if dtype == torch.float64:  # constants are published in fp32 at most
        state = {n: t.float().double() for n, t in state.items()}
    model = built(state)
    assert model.config.haar_gain == 0.3536
    assert same(convert.to_released(model, names=names), state)
    again = WFVAE(**model.config).to(dtype)
    report, known = convert.load_released(again, state), convert.from_released(state)[1]
    assert report.config == known.config | {"eps": 1e-6}
    assert (report.names, report.dropped) == (known.names, known.dropped)
    assert same(again.state_dict(), model.state_dict())


def test_the_same_values_arrive_in_the_right_layers(small):
    ours, _ = convert.from_released(small)
    for mine, theirs in (
        ("encoder.level1.conv_in.weight", "encoder.down1.0.weight"),
        ("encoder.level1.res.1.conv2.bias", "encoder.down1.2.conv2.bias"),
        ("encoder.level2.res.0.norm1.weight", "encoder.down2.1.norm1.norm.weight"),
        ("encoder.level2.down.weight", "encoder.down2.3.conv.conv.weight"),
        ("encoder.inflow2.weight", "encoder.connect_l2.weight"),
        ("encoder.mid.res1.shortcut.weight", "encoder.mid.0.nin_shortcut.conv.weight"),
        ("encoder.mid.attn.norm.weight", "encoder.mid.1.norm.norm.weight"),
        ("encoder.mid.attn.to_k.weight", "encoder.mid.1.k.conv.weight"),
        ("decoder.mid.attn.to_out.bias", "decoder.mid.1.proj_out.conv.bias"),
        ("decoder.level2.res.1.conv1.weight", "decoder.up2.1.conv1.conv.weight"),
        ("decoder.level1.up.conv.bias", "decoder.up1.2.conv.conv.bias"),
        ("decoder.level2.res_out.conv2.weight", "decoder.up2.3.conv2.conv.weight"),
        ("decoder.outflow1.res.0.norm2.bias", "decoder.connect_l1.0.norm2.norm.bias"),
        ("decoder.outflow2.conv.weight", "decoder.connect_l2.1.weight"),
        ("decoder.res2.conv1.weight", "decoder.layer.1.conv1.conv.weight"),
        ("decoder.norm_out.bias", "decoder.norm_out.norm.bias"),
        ("decoder.conv_out.weight", "decoder.conv_out.weight"),
    ):
        assert ours[mine] is small[theirs], mine


def test_wrappers_and_extra_state_are_undone(small):
    state = {f"module.module.{name}": tensor for name, tensor in small.items()}
    state["module.decoder._extra_state"] = None
    ours, report = convert.from_released(state)
    assert same(ours, convert.from_released(small)[0])
    assert report.dropped[-1] == "module.decoder._extra_state"


# Filters, shift and scale.


@pytest.mark.parametrize("gain", [0.3536, None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_config_carries_what_is_dropped(gain, dtype):
    shift, scale = (0.1, -0.2129, 3.0), (0.7031, 1.0, 2.5)
    config = SMALL_CONFIG | {"haar_gain": gain, "shift": shift, "scale": scale}
    model = WFVAE(**config).to(dtype)
    state = convert.to_released(model, names="mindspeed")
    found = convert.infer_config(state)
    if dtype == torch.float32 or gain is not None:
        assert found["haar_gain"] == gain
    if dtype == torch.float32:  # the decimals as they were written
        assert (found["shift"], found["scale"]) == (shift, scale)
    assert same(convert.to_released(built(state), names="mindspeed"), state)


@pytest.mark.parametrize("names", ["original", "mindspeed"])
def test_weights_without_filters_have_the_gain_of_the_release(names):
    state = {n: t for n, t in released(names, SMALL).items() if "wavelet" not in n}
    config = convert.infer_config(state)
    assert config["haar_gain"] == 0.3536
    assert (config["shift"] is None) == (names == "original")
    assert same(built(state).state_dict(), convert.from_released(released(names, SMALL))[0])


def test_the_original_release_has_the_published_shift_and_scale():
    config = convert.infer_config(released("original"))
    assert WFVAE.presets["v1.5-M"].items() <= config.items()
    assert convert.infer_config(released("mindspeed"))["shift"][0] == 0.5  # not if the file has it
    for name in ("S", "L", "tiny"):
        with torch.device("meta"):
            model = WFVAE(**WFVAE.presets[name])
        config = convert.infer_config(convert.to_released(model))
        assert config["shift"] is config["scale"] is config["haar_gain"] is None
        assert WFVAE.presets[name].items() <= config.items()


def conv(x, state, start, bands, **options):
    """Each colour through each released filter, band-major, as the release orders them."""
    function = F.conv3d if x.ndim == 5 else F.conv2d
    colours = x.flatten(0, 1)[:, None]
    made = [function(colours, state[start.format(band)], stride=2) for band in bands]
    return torch.cat([y.unflatten(0, x.shape[:2])[:, :, 0] for y in made], 1)


def transposed(coefficients, state, start, bands):
    function = F.conv_transpose3d if coefficients.ndim == 5 else F.conv_transpose2d
    parts = coefficients.chunk(len(bands), 1)
    return sum(
        function(part.flatten(0, 1)[:, None], state[start.format(band)], stride=2)
        .unflatten(0, part.shape[:2])
        .squeeze(2)
        for band, part in zip(bands, parts, strict=True)
    )


CUBE = [*HIGH][:8]
SQUARE = [*HIGH][8:]


def whole_numbers(*shape, seed=0):
    """So that sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("place", ["in", "l1", "l2"])
@pytest.mark.parametrize("names", ["original", "mindspeed"])
def test_released_filters_are_our_transform(place, names):
    state = convert.to_released(WFVAE(**SMALL_CONFIG, haar_gain=0.5), names=names)
    haar = Haar(0.5)
    video = whole_numbers(2, 3, 5, 4, 6)
    spelling = "tranform" if (names, place) == ("mindspeed", "in") else "transform"
    encoder = f"encoder.wavelet_{spelling}_{place}.{{}}_conv.conv.weight"
    coefficients = conv(torch.cat([video[:, :, :1], video], 2), state, encoder, CUBE)
    assert torch.equal(haar.analyse(video, Stream()), coefficients)
    decoder = f"decoder.inverse_wavelet_transform_{place.replace('in', 'out')}.{{}}"
    back = transposed(coefficients, state, decoder, CUBE)[:, :, 1:]
    assert torch.equal(haar.synthesise(coefficients, Stream()), back)


def test_between_two_and_three_axes_bands_are_ordered_anew():
    """With temporal factor 4: the release has height before width there, as no other level has."""
    model = WFVAE(**SMALL_CONFIG, temporal_factor=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole_numbers(*parameter.shape, seed=len(name)))
    state = convert.to_released(model)
    assert state["encoder.down1.3.conv.weight"].shape == (4, 4, 3, 3)
    assert state["decoder.up1.2.conv.weight"].shape == (8, 8, 3, 3)
    haar = Haar(None, temporal=False)

    image = whole_numbers(2, 3, 4, 6)
    bands = conv(image, state, "encoder.wavelet_transform_l1.{}", SQUARE)
    weight, bias = (state[f"encoder.connect_l1.{leaf}"] for leaf in ("weight", "bias"))
    theirs = F.conv2d(bands, weight, bias, padding=1)
    ours = convolve(model.encoder.inflow1, haar.analyse(image[:, :, None], Stream()), Stream())
    assert torch.equal(ours[:, :, 0], theirs)

    flow = whole_numbers(2, 6, 3, 2)
    weight, bias = (state[f"decoder.connect_l1.1.{leaf}"] for leaf in ("weight", "bias"))
    theirs = F.conv2d(flow, weight, bias, padding=1)
    theirs = transposed(theirs, state, "decoder.inverse_wavelet_transform_l1.{}", SQUARE)
    ours = convolve(model.decoder.outflow1.conv, flow[:, :, None], Stream())
    assert torch.equal(haar.synthesise(ours, Stream())[:, :, 0], theirs)

    ours, report = convert.from_released(state)
    assert report.config["temporal_factor"] == 4
    assert same(ours, model.state_dict())


@pytest.mark.parametrize(
    "other",
    [
        {"encoder_res_blocks": 1},
        {"decoder_res_blocks": 3, "connect_res_blocks": 2},
        {"decoder_energy_channels": 5, "encoder_energy_channels": 7},
        {"temporal_factor": 4, "encoder_res_blocks": 3},
        {"connect_res_blocks": 0, "latent_channels": 5},
    ],
    ids=str,
)
def test_the_config_is_read_off_the_shapes(other):
    config = SMALL_CONFIG | other
    model = WFVAE(**config)
    state = convert.to_released(model)
    assert config.items() <= convert.infer_config(state).items()
    assert same(built(state).state_dict(), model.state_dict())


# What is refused.


def test_a_model_takes_all_or_nothing(small):
    model = built(small)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = {n: t + 1 for n, t in small.items() if not n.startswith("decoder.up2.")}
    wrong |= {n: t for n, t in small.items() if "wavelet" in n or n in BUFFERS}
    wrong["decoder.layer.2.norm1.norm.weight"] = torch.zeros(1)
    wrong["decoder.conv_out.bias"] = torch.zeros(3)
    wrong["shift"] = small["shift"] + 1
    with pytest.raises(ValueError, match="none were loaded") as caught:
        convert.load_released(model, wrong)
    missing, unexpected, misshapen, unlike = str(caught.value).split("loaded: ")[1].split("; ")
    assert missing.startswith("28 missing: decoder.up2.0.norm1.norm.weight, ")
    assert missing.count("decoder.") == 10
    assert unexpected == "1 unexpected: decoder.layer.2.norm1.norm.weight"
    assert misshapen == "1 misshapen: decoder.conv_out.bias: [3] for [24]"
    assert unlike == "1 unlike the config's haar_gain, shift and scale: shift"
    assert same(model.state_dict(), before)


def test_a_model_of_another_gain_is_refused(small):
    exact = WFVAE(**(convert.infer_config(small) | {"haar_gain": None}))
    with pytest.raises(ValueError, match="48 unlike the config's haar_gain"):
        convert.load_released(exact, small)
    with torch.device("meta"):
        model = WFVAE(**SMALL_CONFIG)
    with pytest.raises(ValueError, match="no memory to load into"):
        convert.load_released(model, small)


def test_what_is_not_exactly_one_model_is_refused(small):
    def refused(match, change):
        state = small | change
        with pytest.raises(ValueError, match=match):
            convert.from_released({name: t for name, t in state.items() if t is not ...})

    refused(r"1 unexpected: scale2$", {"scale2": torch.zeros(1)})
    refused(r"1 missing: scale;", {"scale": ...})
    refused(r"1 misshapen: scale: \[3\] for \[1, 3, 1, 1, 1\]", {"scale": torch.ones(3)})
    refused(r"shift must have 3 values.* got 2", {"shift": torch.ones(2)})
    refused(r"1 missing: encoder\.conv_out\.conv\.bias$", {"encoder.conv_out.conv.bias": ...})
    filters = "decoder.inverse_wavelet_transform_l2.hh_v"
    refused(rf"1 missing: {filters}$", {filters: ...})
    refused(rf"scale: {filters}$", {filters: -small[filters]})
    first = "encoder.wavelet_tranform_in.h_conv.conv.weight"
    refused(r"47 unlike the config's", {first: small[first] * 2})
    misspelt = {name: ... for name in small if "tranform" in name}
    misspelt |= {name.replace("tran", "tram"): small[name] for name in misspelt}
    refused(r"8 missing: encoder\.wavelet_transform_in.* 8 unexpected: enc", misspelt)
    for name in ("encoder.down1.0.weight", "decoder.conv_in.conv.weight"):
        refused(rf"{name}, which tells sizes, is missing", {name: ...})
        refused(rf"{name}, which tells sizes, is missing or not", {name: torch.zeros(3)})
    refused("takes 9 wavelet coefficients", {"encoder.connect_l1.weight": torch.zeros(6, 9, 3, 3)})
    refused(r"1 others: scale$", {"scale": torch.zeros(3, dtype=torch.int64)})
    group_norm = {"decoder.norm_out.norm.bias": ..., "decoder.norm_out.bias": torch.zeros(4)}
    refused(r"missing: decoder\.norm_out\.norm\.bias; 1 unexpected", group_norm)
    with pytest.raises(ValueError, match="names must be one of"):
        convert.to_released(WFVAE(**SMALL_CONFIG), names="ours")
    bare = {"encoder_energy_channels": 0, "decoder_energy_channels": 0}
    with pytest.raises(ValueError, match="no paths for wavelet coefficients"):
        convert.to_released(WFVAE(**SMALL_CONFIG | bare))


# Files.


def holds(folder, state):
    """The folder is complete, and loads as exactly these weights."""
    shards.verify(folder)
    model = WFVAE.from_pretrained(folder)
    return same(convert.to_released(model, names="mindspeed"), state)


EMA, OTHER = "ema_state_dict", {"x": torch.zeros(1)}


@pytest.mark.parametrize(
    ("found", "wrap"),
    [
        ("", lambda state: state),
        (EMA, lambda state: {EMA: {f"module.{n}": t for n, t in state.items()}, "state_dict": {
            "gen_model": OTHER}}),
        ("state_dict.gen_model", lambda state: {EMA: {}, "epoch": 3, "state_dict": {
            "gen_model": state, "dics_model": OTHER}}),
        ("state_dict", lambda state: {"state_dict": state}),
    ],
)  # fmt: skip
def test_weights_are_found(small, tmp_path, found, wrap):
    torch.save(wrap(small), tmp_path / "in.ckpt")
    report = convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out")
    assert report.found == found
    assert holds(tmp_path / "out", small)
    about = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (about["names"], about["found"]) == ("mindspeed", found)
    assert about["dropped"] == list(report.dropped)


def test_other_sources(small, tmp_path):
    exported = convert.to_released(built(small), names="mindspeed")
    save_file(exported, tmp_path / "in.safetensors")  # which takes no shared memory
    convert.convert_file(tmp_path / "in.safetensors", tmp_path / "a", max_shard_bytes=60_000)
    assert holds(tmp_path / "a", small)
    pieces = list((tmp_path / "a").glob("*.safetensors"))
    assert len(pieces) > 3
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in pieces) <= 60_000
    lazy = {name: shards.Lazy.of(tensor) for name, tensor in small.items()}
    with shards.new_folder(tmp_path / "indexed") as folder:
        shards.write(folder, lazy, max_shard_bytes=10**6, about={}, progress=int)
    convert.convert_file(tmp_path / "indexed", tmp_path / "b")
    assert holds(tmp_path / "b", small)


@pytest.mark.parametrize(
    ("found", "others", "make"),
    [
        ("ema_model", ("gen_model",), lambda s, t: {"gen_model": t, "ema_model": s}),
        ("vae_ema", ("vae",), lambda s, t: {"vae": t, "vae_ema": {f"model.{n}": v for n, v in
                                                                  s.items()}}),
        ("model", ("ema",), None),
    ],
)  # fmt: skip
def test_averaged_weights_are_preferred(small, tmp_path, found, others, make):
    weights = {name: t for name, t in small.items() if "wavelet" not in name}
    other = {name: t + 1 for name, t in weights.items()}
    if make is None:
        torch.save({"model": weights, "ema": [other]}, tmp_path / "in.ckpt")
        with pytest.raises(ValueError, match=r"not read under ema \(a list\); give key"):
            convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out")
        convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out", key="model")
    else:
        torch.save(make(weights, other), tmp_path / "in.ckpt")
        report = convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out")
        assert (report.found, report.others) == (found, others)
    kept = WFVAE.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(kept["decoder.conv_in.weight"], weights["decoder.conv_in.conv.weight"])


def test_values_and_dtypes(small, tmp_path):
    bad = small | {"decoder.conv_in.conv.bias": torch.full((16,), math.nan)}
    torch.save(bad, tmp_path / "in.ckpt")
    match = r"1 not finite: decoder\.conv_in\.bias$"
    with pytest.raises(ValueError, match=match):
        convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out")
    with pytest.raises(ValueError, match=match):
        convert.load_released(WFVAE(**convert.infer_config(bad)), bad)
    torch.save(small, tmp_path / "in.ckpt")
    with pytest.raises(ValueError, match="dtype must be float32"):
        convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out", dtype=torch.int32)
    convert.convert_file(tmp_path / "in.ckpt", tmp_path / "out", dtype=torch.bfloat16)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert WFVAE.load_config(tmp_path / "out")["haar_gain"] == 0.3536  # as before it was cast


def test_folders_of_ranks(small, tmp_path):
    for rank in range(2):
        (tmp_path / "in" / f"mp_rank_0{rank}").mkdir(parents=True)
        torch.save({"model": small}, tmp_path / "in" / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    with pytest.raises(ValueError, match="is of 2 ranks, but a WFVAE is never cut"):
        convert.convert_file(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    (tmp_path / "in" / "mp_rank_01").rmdir()
    convert.convert_file(tmp_path / "in", tmp_path / "out")
    assert holds(tmp_path / "out", small)


def test_files_that_are_refused(small, tmp_path):
    source, out = tmp_path / "in.ckpt", tmp_path / "out"

    def refused(match, **options):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            convert.convert_file(source, out, **options)
        assert os.listdir(tmp_path) == (["in.ckpt"] if source.exists() else [])

    refused("is missing or no file")
    torch.save([1, 2], source)
    refused("holds a list, not weights by name")
    torch.save({"ema_state_dict": 3}, source)
    refused(r"holds no tensors by name; it has \['ema_state_dict'\]")
    torch.save({"state_dict": {"gen_model": small}}, source)
    refused("has no key 'disc'; it has", key="state_dict.disc")
    refused("1 others: gen_model", key="state_dict")
    refused("max_shard_bytes must be at least 1", max_shard_bytes=0)
    torch.save({n: t for n, t in small.items() if "mid.1" not in n}, source)
    refused("20 missing: encoder")
    source.unlink()
    out.mkdir()  # which is looked at before the source
    with pytest.raises(ValueError, match="exists; give a new name"):
        convert.convert_file(source, out)


def test_the_command(small, tmp_path, capsys, monkeypatch):
    torch.save({"state_dict": {"gen_model": small}}, tmp_path / "in.ckpt")
    assert main(["convert", "vae", str(tmp_path / "in.ckpt"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "mindspeed names, weights found under state_dict.gen_model" in told
    assert "Haar gain 0.3536; shift and scale: of the weights" in told
    assert "decoder.inverse_wavelet_transform_out.gh_v" in told
    assert holds(tmp_path / "out", small)
    assert main(["convert", "vae", str(tmp_path / "in.ckpt"), str(tmp_path / "out")]) == 2
    assert "exists; give a new name" in capsys.readouterr().err
    exact = WFVAE(**SMALL_CONFIG)
    torch.save({"mine": convert.to_released(exact)}, tmp_path / "in.ckpt")
    arguments = ["convert", "vae", str(tmp_path / "in.ckpt"), str(tmp_path / "other")]
    assert main([*arguments, "--key", "other"]) == 2
    assert "has no key 'other'; it has ['mine']" in capsys.readouterr().err
    assert main([*arguments, "--key", "mine"]) == 0
    told = capsys.readouterr().out
    assert "Haar gain exact; shift and scale: none, so latents stay as they are" in told
    assert same(WFVAE.from_pretrained(tmp_path / "other").state_dict(), exact.state_dict())
    published = {"shift": (1.0, 2.0, 3.0), "scale": (4.0, 5.0, 6.0)}
    monkeypatch.setitem(WFVAE.presets, "mine", SMALL_CONFIG | published)
    assert main([*arguments[:3], str(tmp_path / "third"), "--key", "mine"]) == 0
    assert "shift and scale: of the preset of this size" in capsys.readouterr().out
    assert WFVAE.from_pretrained(tmp_path / "third").config.scale == published["scale"]


# Reading what other programs wrote: more of it in test_suv_convert.py.


def test_where_weights_are(tmp_path):
    inner = {"b": torch.zeros(1)}
    checkpoint = {"a": {"x": inner}, "n": 3}
    assert checkpoints.at(checkpoint, "", tmp_path) is checkpoint
    assert checkpoints.at(checkpoint, "a.x", tmp_path) is inner
    with pytest.raises(ValueError, match="has no key 'y'; it has \\['x'\\]"):
        checkpoints.at(checkpoint, "a.y", tmp_path)
    for key in ("n", "n.m"):
        with pytest.raises(ValueError, match="holds a int, not weights by name"):
            checkpoints.at(checkpoint, key, tmp_path)


def test_a_beginning_that_all_names_share_may_be_the_models_own():
    roots = frozenset({"encoder", "decoder"})
    for given, left in (
        (["encoder.a.b", "encoder.c"], ["encoder.a.b", "encoder.c"]),
        (["model.encoder.a", "model.encoder.b"], ["encoder.a", "encoder.b"]),
        (["x.y.a", "x.y.b"], ["a", "b"]),
        (["x.a", "y.a"], ["x.a", "y.a"]),
        (["x"], ["x"]),
        ([], []),
    ):
        assert checkpoints.unwrapped(given, roots) == left


# Loading a folder.


class Scale(StrictModelMixin):
    @register_to_config
    def __init__(self, *, width=2, bias=True):
        super().__init__()
        self.linear = nn.Linear(width, width, bias)


def test_strict_models_load_exactly_what_they_are(tmp_path):
    model = Scale(width=3)
    model.save_pretrained(tmp_path)
    again, info = Scale.from_pretrained(tmp_path, output_loading_info=True)
    assert same(again.state_dict(), model.state_dict())
    assert again.config.width == 3
    assert not any(info.values())
    assert isinstance(Scale.from_pretrained(tmp_path), Scale)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    for change, match in (
        ({"linear.bias": None}, r"missing_keys: \['linear\.bias'\]"),
        ({"other": torch.zeros(1)}, r"unexpected_keys: \['other'\]"),
    ):
        state = model.state_dict() | change
        save_file({n: t for n, t in state.items() if t is not None}, file, {"format": "pt"})
        with pytest.raises(
            ValueError, match=f"does not hold exactly this model's weights; {match}"
        ):
            Scale.from_pretrained(tmp_path)


def test_strict_models_refuse_unknown_config(tmp_path):
    assert Scale.from_config({"width": 5, "_class_name": "Scale"}).config.width == 5
    with pytest.raises(ValueError, match=r"keys that Scale does not know: \['depth'\]"):
        Scale.from_config({"width": 5, "depth": 2})
    Scale().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"depth": 2}))
    with pytest.raises(ValueError, match=r"keys that Scale does not know: \['depth'\]"):
        Scale.from_pretrained(tmp_path)
