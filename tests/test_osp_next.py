"""A retrofitted Wan of diffusers is OSP-Next: recordings of the original, ragged grids included."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers")
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers  # noqa: E402

from skiparse.models.retrofit import retrofit, schedule  # noqa: E402

DATA = Path(__file__).parent / "data" / "osp_next"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
CASES = {case["name"]: case for case in MANIFEST["cases"]}
KINDS = {"full": "dense", "token": "single", "group": "group"}
WITHIN = 3e-6  # of the largest entry: recorded in fp32, computed in fp64


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Models have islands of fp32, which are fp64 here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(scope="module")
def recorded():
    return load_file(DATA / "osp_next.safetensors")


@pytest.fixture(scope="module")
def weights(recorded):
    return {k.split("/")[1]: x for k, x in recorded.items() if k.startswith("weights/")}


def wan(weights):
    config = MANIFEST["config"]
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=config["in_dim"],
        out_channels=config["out_dim"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
    )
    model.load_state_dict(convert_wan_transformer_to_diffusers(dict(weights)))  # strict
    return model.double().eval()


def far(found, wanted):
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("reorder", [True, False], ids=["reordered", "natural"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_original(name, reorder, recorded, weights):
    case = CASES[name]
    model = wan(weights)
    kinds = [KINDS[kind] for kind in case["block_types"]]
    retrofit(model, "2d", ratio=case["sparse_ratio"], kinds=kinds, reorder=reorder)
    inputs = ("latents", "text", "timestep", "cotangent")
    given = {k: recorded[f"{name}/{k}"].double() for k in inputs}
    latents, text = given["latents"].requires_grad_(), given["text"].requires_grad_()
    velocity = model(latents, given["timestep"], text, return_dict=False)[0]
    assert far(velocity, recorded[f"{name}/velocity"]) <= WITHIN
    velocity.backward(given["cotangent"])
    names = list(weights)
    index = convert_wan_transformer_to_diffusers(
        {original: torch.tensor(i) for i, original in enumerate(names)}
    )
    ours = {names[i]: parameter for parameter, i in index.items()}
    parameters = dict(model.named_parameters())
    count = 0
    for key, wanted in recorded.items():
        if key.startswith(f"{name}/grad."):
            original = key.split("grad.")[1]
            if given["text"].shape[1] == 1 and "cross_attn.k" in original:
                assert wanted.abs().max() < 1e-6  # of a key alone there is none but rounding
            else:
                count += 1
                source = given if original in given else parameters
                found = source[ours.get(original, original)].grad
                assert far(found, wanted) <= WITHIN, original
    assert count >= 4


@pytest.mark.parametrize("fault", ["dense", "exchanged"])
def test_another_pattern_would_be_seen(fault, recorded, weights):
    model = wan(weights)
    exchanged = {"token": "group", "group": "single", "full": "dense"}
    types = CASES["both_larger"]["block_types"]
    kinds = ["dense"] * 8 if fault == "dense" else [exchanged[kind] for kind in types]
    retrofit(model, kinds=kinds)
    given = [recorded[f"both_larger/{k}"].double() for k in ("latents", "timestep", "text")]
    with torch.no_grad():
        found = model(*given, return_dict=False)[0]
    assert far(found, recorded["both_larger/velocity"]) > 1e-2


def test_its_layers_are_the_schedule():
    kinds = [KINDS[kind] for kind in CASES["divisible"]["block_types"]]
    assert schedule(8, (2, 2)) == tuple(kinds)
