"""OSP-Next's weights, converted and made sparse, compute what its own code recorded."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.models.embeddings import Timesteps
from test_wan import config, last, tiny_pipeline

from skiparse import cli
from skiparse.models import flow, shards
from skiparse.models.retrofit import Retrofit, retrofit
from skiparse.models.train.config import Clip
from skiparse.models.train.core import train
from skiparse.models.wan.convert import _config, convert_file, from_released
from skiparse.models.wan.recipe import WanRecipe
from skiparse.models.writer import write_video

DATA = Path(__file__).parent / "data" / "osp_next.safetensors"
CASES = {  # num_full_blocks of the recording, as dense layers at both ends
    "divisible": (2, 2), "h": (2, 2), "w": (2, 2), "both": (2, 2), "both_larger": (2, 2),
    "tiny": (2, 2), "all_sparse": (0, 0), "dense": (4, 4),
}  # fmt: skip
STATES = {
    "h": 5,
    "tiny": 8,
}  # recorded behind as many blocks; a ragged grid, and empty sub-sequences
# Of the largest entry of a tensor. The recordings, in fp32, are within 1.5e-6 of fp64, in which we
# compute: then what is left for our own faults is half of it.
LIMIT = 3e-6
HEADS = 4


@pytest.fixture(scope="module")
def recorded():
    return load_file(DATA)


@pytest.fixture(scope="module")
def weights(recorded):
    """By Wan's original names, fp32."""
    return {
        name.removeprefix("weights/"): x.float()
        for name, x in recorded.items()
        if name.startswith("weights/")
    }


@pytest.fixture(scope="module")
def released(weights, tmp_path_factory):
    """As it is released: a file that ``torch.save`` wrote."""
    path = tmp_path_factory.mktemp("released") / "model.pt"
    torch.save(weights, path)
    return path


def close(found, wanted):
    if wanted.abs().max() < 1e-6:  # zero, but for rounding
        assert found.abs().max() < 1e-5
    else:
        assert (found - wanted).abs().max() <= LIMIT * wanted.abs().max()


def names_of_diffusers(weights):
    """What the converter calls each weight."""
    tagged = {name: torch.full_like(x, float(i)) for i, (name, x) in enumerate(weights.items())}
    made, _ = from_released(tagged, heads=HEADS, dense=(2, 2))
    originals = list(weights)
    return {originals[int(x.flatten()[0])]: name for name, x in made.items()}


@pytest.fixture
def double(monkeypatch):
    """In fp64 what diffusers computes in fp32 whatever weights are in: norms, and waves of time.

    The original has these in fp64. In fp32 a gradient may be 4e-6 off, at times near 1000.
    """

    def waves(module, time):
        half = module.num_channels // 2
        angles = time.double()[:, None] * 10_000 ** (-torch.arange(half).double() / half)
        return torch.cat([angles.cos(), angles.sin()], 1)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(Timesteps, "forward", waves)


@pytest.mark.parametrize("name", CASES)
def test_velocity_states_and_gradients(recorded, weights, released, double, tmp_path, name):
    out = tmp_path / "model"
    convert_file(released, out, heads=HEADS, dense=CASES[name])
    model = WanTransformer3DModel.from_pretrained(out / "transformer").double()
    made = retrofit(model)
    if name == "divisible":
        assert str(made.sparsity) == (
            "2d ratio 2, 4 sub-sequences: layers 0-1 dense, 2-5 single and group, 6-7 dense"
        )
    given = {
        key.partition("/")[2]: x.double()
        for key, x in recorded.items()
        if key.startswith(f"{name}/")
    }
    states, plan = {}, Retrofit.of(model).parts[0].state

    def keep(at, dim):
        def hook(module, args, output):
            states[at] = (
                output.index_select(dim, plan.plan.inverse) if plan.plan.ordered else output
            )

        return hook

    for i, block in enumerate(model.blocks):
        block.register_forward_hook(keep(f"block{i}", 1))
    latents, text = (given[key].clone().requires_grad_() for key in ("latents", "text"))
    velocity = model(latents, given["timestep"], text, return_dict=False)[0]
    close(velocity, given["velocity"])
    compared = [at for at in states if at in given]
    assert len(compared) == STATES.get(name, 0)
    for at in compared:
        close(states[at], given[at])
    velocity.backward(given["cotangent"])
    close(latents.grad, given["grad.latents"])
    close(text.grad, given["grad.text"])
    called, parameters = names_of_diffusers(weights), dict(model.named_parameters())
    graded = [key for key in given if key.removeprefix("grad.") in called]
    assert len(graded) >= 3
    for key in graded:
        grad = parameters[called[key.removeprefix("grad.")]].grad
        close(grad, given[key].reshape(grad.shape))


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_velocity_as_it_is_computed_in_fp32(recorded, weights, name):
    made, report = from_released(weights, heads=HEADS, dense=CASES[name])
    config = {key: value for key, value in report.config.items() if key != "skiparse"}
    model = WanTransformer3DModel(**config)
    model.load_state_dict(made)
    retrofit(model, report.sparsity)
    given = (recorded[f"{name}/{key}"] for key in ("latents", "timestep", "text"))
    close(model(*given, return_dict=False)[0], recorded[f"{name}/velocity"])


def test_the_recordings_tell_the_patterns_apart(recorded, weights):
    """Dense layers, or kinds exchanged, are far beyond the limit."""
    made, report = from_released(weights, heads=HEADS, dense=(2, 2))
    config = {key: value for key, value in report.config.items() if key != "skiparse"}
    velocity = recorded["both/velocity"]
    for kinds in (["dense"] * 8, ["dense"] * 2 + ["group", "single"] * 2 + ["dense"] * 2):
        model = WanTransformer3DModel(**config)
        model.load_state_dict(made)
        retrofit(model, "2d", ratio=2, kinds=kinds)
        with torch.no_grad():
            found = model(
                *(recorded[f"both/{key}"] for key in ("latents", "timestep", "text")),
                return_dict=False,
            )[0]
        assert (found - velocity).abs().max() > 0.02 * velocity.abs().max()


def test_both_kinds_of_names_give_the_same(weights, released, tmp_path):
    made, report = from_released(weights, heads=HEADS, dense=(2, 2))
    assert report.names == "original"
    again, theirs = from_released(made, heads=HEADS, dense=(2, 2))
    assert theirs.names == "diffusers"
    assert theirs.config == report.config
    assert made.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in made.items())
    save_file({name: x.contiguous() for name, x in made.items()}, tmp_path / "made.safetensors")
    for i, source in enumerate((released, tmp_path / "made.safetensors")):
        convert_file(source, tmp_path / str(i), heads=HEADS, dense=(2, 2))
    one, two = (WanTransformer3DModel.from_pretrained(tmp_path / x / "transformer") for x in "01")
    for name, x in one.state_dict().items():
        assert torch.equal(x, two.state_dict()[name]), name


def test_by_the_command_line_to_a_pipeline(released, tmp_path, capsys):
    base = tmp_path / "base"
    pipeline = tiny_pipeline(text_encoder=tiny_text(40), transformer=WanTransformer3DModel(**SMALL))
    pipeline.save_pretrained(base)
    out = tmp_path / "osp"
    command = ["convert", "osp-next", str(released), str(out), "--base", str(base)]
    assert cli.main([*command, "--heads", "4", "--dense", "2,2", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "original names, weights found at the top" in said
    assert "layers 0-1 dense, 2-5 single and group, 6-7 dense" in said
    made = WanPipeline.from_pretrained(out, torch_dtype=torch.float32)
    assert made.scheduler.config.shift == 7.0
    assert made.transformer.config["skiparse"]["kinds"] == [
        "dense", "dense", "single", "group", "single", "group", "dense", "dense",
    ]  # fmt: skip
    assert all(
        torch.equal(x, y)
        for x, y in zip(made.vae.parameters(), pipeline.vae.parameters(), strict=True)
    )
    shards.verify(out / "transformer")
    video = retrofit_and_sample(made)
    assert video.shape == (5, 32, 32, 3)
    assert cli.main(command) == 2
    assert "osp exists; give a new name" in capsys.readouterr().err


SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
         "text_dim": 40, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1}  # fmt: skip


def tiny_text(width):
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    ).eval()


def retrofit_and_sample(pipeline):
    retrofit(pipeline)
    made = pipeline("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
    return made.frames[0]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: w.pop("blocks.3.ffn.2.bias"), {}, "missing: blocks.3.ffn.net.2.bias"),
        (lambda w: w.update({"blocks.3.extra": torch.ones(1)}), {}, "unexpected: blocks.3.extra"),
        (lambda w: w.update({"head.head.bias": torch.ones(3)}), {}, "misshapen: proj_out.bias"),
        (lambda w: w.update({"head.head.bias": torch.full((16,), torch.nan)}), {}, "not finite"),
        (lambda w: w.pop("time_embedding.0.weight"), {}, "linear_1.weight' is missing"),
        (lambda w: None, {"heads": None}, "a width of 64 has no heads of 128 channels; give heads"),
        (lambda w: None, {"heads": 5}, "heads must divide the width 64, got 5"),
        (lambda w: None, {"heads": 0}, "heads must divide the width 64, got 0"),
        (lambda w: None, {"ratio": 0}, "ratio must be a whole number above 0, got 0"),
        (lambda w: None, {"dense": (5, 4)}, "dense must be two numbers >= 0, 8 at most in all"),
        (lambda w: None, {"base": "nowhere"}, "model_index.json is not there"),
        (lambda w: None, {"dtype": torch.int8}, "dtype must be float32"),
    ],
)  # fmt: skip
def test_what_is_refused(weights, tmp_path, change, options, message):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "model.pt")
    given = {"heads": HEADS, "dense": (2, 2)} | options
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        convert_file(tmp_path / "model.pt", tmp_path / "out", **given)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda base: set_in(base / "vae/config.json", z_dim=9), "its z_dim is 9"),
        (lambda base: set_in(base / "text_encoder/config.json", d_model=9), "its d_model is 9"),
        (lambda base: set_in(base / "model_index.json", _class_name="Flux"), "but a Flux"),
        (lambda base: set_in(base / "model_index.json", expand_timesteps=True), "one transformer"),
        (lambda base: (base / "vae/config.json").unlink(), "vae/config.json is not there"),
        (lambda base: (base / "vae/config.json").write_text("{"), r"vae/config\.json is damaged"),
        (lambda base: (base / "model_index.json").write_text("[]"), "holds no table"),
    ],
)  # fmt: skip
def test_other_pipelines_are_no_base(released, tmp_path, spoil, message):
    base = tmp_path / "base"
    tiny_pipeline(
        text_encoder=tiny_text(40), transformer=WanTransformer3DModel(**SMALL)
    ).save_pretrained(base)
    spoil(base)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_file(released, tmp_path / "out", base=base, heads=HEADS, dense=(2, 2))
    assert not (tmp_path / "out").exists()


def set_in(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_heads_have_128_channels_unless_told(weights):
    """As of the 14B: of its width, 5120, there are 40."""
    state = {
        name: SimpleNamespace(shape=torch.Size(shape))
        for name, shape in {
            "patch_embedding.weight": (5120, 16, 1, 2, 2),
            "condition_embedder.text_embedder.linear_1.weight": (5120, 4096),
            "condition_embedder.time_embedder.linear_1.weight": (5120, 256),
            "blocks.0.ffn.net.0.proj.weight": (13824, 5120),
            "blocks.39.ffn.net.0.proj.weight": (13824, 5120),
            "blocks.0.norm2.weight": (5120,),
            "blocks.0.attn1.norm_q.weight": (5120,),
            "proj_out.weight": (64, 5120),
        }.items()
    }
    assert _config(state, None) == {
        "patch_size": [1, 2, 2], "num_attention_heads": 40, "attention_head_dim": 128,
        "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
        "ffn_dim": 13824, "num_layers": 40, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    }  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(480, 832), (720, 1280), (768, 1344)])
def test_noise_levels_of_training_are_those_recorded(height, width):
    recorded = load_file(DATA.with_name("osp_next_schedule.safetensors"))
    shift = WanRecipe().shift((16, 21, height // 8, width // 8))
    found = flow.shift_sigmas(recorded["train.normal"].double().sigmoid(), shift)
    wanted = recorded[f"train.sigmas.{height}x{width}"].double()
    assert (found - wanted).abs().max() < 4 * 2**-24  # recorded in fp32


def test_a_run_clips_as_osp_next_does_and_goes_on_so(tmp_path):
    """Chosen in the configuration; continued, it is bit for bit the run that was never stopped."""
    source = tmp_path / "clips"
    source.mkdir()
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        frames = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=generator)
        write_video(source / f"{i}.mp4", frames)
        (source / f"{i}.txt").write_text("a cat")
    tiny_pipeline().save_pretrained(tmp_path / "init")

    def run(name, steps, mode="osp_next"):
        clip = Clip(mode=mode, decay=0.5)
        train(config(tmp_path / "init", source, tmp_path / name, steps=steps, clip=clip))
        return last(tmp_path / name)

    whole = run("whole", 4)
    run("parts", 2)
    parts = run("parts", 4)
    assert whole.about["clipper"] == parts.about["clipper"]
    assert whole.about["clipper"] != run("safe", 4, "safe").about["clipper"]
    assert whole.about["clipper"]["counts"]["clip"] > 0
    assert sum(whole.about["clipper"]["counts"].values()) == 4
    for name, x in whole.read("").items():
        assert torch.equal(x, parts.read("")[name]), name
