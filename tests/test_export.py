"""What a run learned leaves it as a pipeline that `skiparse sample` takes, or not at all."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

pytest.importorskip("diffusers")

from safetensors.torch import load_file
from test_text import save, tiny_encoders

from skiparse.cli import main
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.suv.encoders import fingerprints
from skiparse.models.suv.model import SUV
from skiparse.models.text import TextEncoders
from skiparse.models.train.checkpoint import CheckpointError, Checkpoints
from skiparse.models.train.export import export
from skiparse.models.wfvae.model import WFVAE

VAE = {
    "base_channels": 8,
    "latent_channels": 4,
    "encoder_energy_channels": 4,
    "decoder_energy_channels": 4,
    "encoder_res_blocks": 1,
    "decoder_res_blocks": 1,
}


def model(seed):
    torch.manual_seed(seed)
    made = SUV(**SUV.presets["tiny"])
    for parameter in made.parameters():  # as initialised, the text hardly matters
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def save_run(run, step, data=None, **models):
    """A checkpoint as a run has it: models, something of the optimiser, the config, the data."""
    tensors = {"optimizer.x.step": torch.tensor(float(step))}
    for name, made in models.items():
        tensors |= {f"{name}.{key}": x for key, x in made.state_dict().items()}
    config = {k: v for k, v in made.config.items() if not k.startswith("_")}
    about = {"model": config, "clipper": {}} | ({"data": data} if data else {})
    Checkpoints(run / "checkpoints").save(step, tensors, about)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two checkpoints, a VAE and text encoders."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    vae = WFVAE(**VAE)
    vae.save_pretrained(folder / "vae")
    save(folder / "text", tiny_encoders())
    data = {"data": "x", **fingerprints(vae, TextEncoders.from_pretrained(folder / "text"))}
    save_run(folder / "run", 1, data, model=model(1), ema=model(2))
    save_run(folder / "run", 2, data, model=model(3), ema=model(4))
    return folder


@pytest.fixture
def parts(made, tmp_path):
    """Copies of them, to spoil."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return {name: tmp_path / name for name in ("run", "vae", "text")}


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("weights", "seed"), [({}, 4), ({"weights": "model"}, 3)])
def test_the_newest_weights_and_the_encoders(parts, tmp_path, weights, seed):
    out = tmp_path / "out"
    assert export(out=out, **parts, **weights) == out
    pipe = SUVPipeline.from_pretrained(out)
    assert equal(pipe.transformer, model(seed))
    assert pipe.transformer.config.sparsity == SUV.presets["tiny"]["sparsity"]
    assert not pipe.transformer.training
    assert equal(pipe.vae, WFVAE.from_pretrained(parts["vae"]))
    _, t5, _, clip = tiny_encoders()
    assert equal(pipe.text_encoder, t5)
    assert equal(pipe.text_encoder_2, clip)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".py", ".safetensors"}
    code = {str(path.relative_to(out)): path.read_text() for path in files if path.suffix == ".py"}
    assert set(code) == {"pipeline.py", "transformer/model.py", "vae/model.py"}
    assert all(
        text.startswith("from skiparse.") and text.count("\n") == 1 for text in code.values()
    )


def test_in_half_the_numbers(parts, tmp_path, capsys):
    command = ["export", str(parts["run"]), str(tmp_path / "out"), "--dtype", "bfloat16"]
    command += ["--vae", str(parts["vae"]), "--text", str(parts["text"])]
    assert main([*command[:3], "--dtype", "int8"]) == 2
    assert "--dtype int8: give float32" in capsys.readouterr().err
    assert main(command) == 0
    pipe = SUVPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    right = model(4).bfloat16().float()
    assert equal(pipe.transformer, right)
    file = tmp_path / "out" / "text_encoder" / "model.safetensors"
    assert {x.dtype for x in load_file(file).values()} == {torch.bfloat16}


def test_sample_takes_it(parts, tmp_path):
    pytest.importorskip("av")
    out = export(out=tmp_path / "out", **parts)
    video = tmp_path / "x.mp4"
    size = ["--height", "32", "--width", "48", "--frames", "9", "--steps", "2", "--device", "cpu"]
    asked = ["--prompt", "cat", "--out", str(video)]
    assert main(["sample", "--model", str(out), *size, *asked]) == 0
    assert video.stat().st_size
    assert json.loads(video.with_suffix(".json").read_text())["prompt"] == "cat"


@pytest.mark.parametrize("spoiled", ["vae", "clip"])
def test_other_encoders_are_taken_knowingly(parts, tmp_path, spoiled, capsys):
    {"vae": another_vae, "clip": another_clip}[spoiled](parts)
    command = ["export", str(parts["run"]), str(tmp_path / "out")]
    command += ["--vae", str(parts["vae"]), "--text", str(parts["text"])]
    assert main(command) == 2
    assert "--other-encoders" in capsys.readouterr().err
    assert main([*command, "--other-encoders"]) == 0
    assert equal(SUVPipeline.from_pretrained(tmp_path / "out").transformer, model(4))


def without(name):
    return lambda parts: shutil.rmtree(parts[name])


def already_there(parts):
    """There already; and looked at first, since what comes after is missing."""
    os.rename(parts["run"], parts["run"].parent / "out")


def damaged(parts):
    path = next(parts["run"].glob("checkpoints/step-00000002/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def of_another_size(parts):
    models = {name: SUV(**{**SUV.presets["tiny"], "num_heads": 3}) for name in ("model", "ema")}
    data = Checkpoints(parts["run"] / "checkpoints").latest().about["data"]
    save_run(parts["run"], 3, data, **models, small=model(1))


def another_vae(parts):
    torch.manual_seed(1)
    shutil.rmtree(parts["vae"])
    WFVAE(**VAE).save_pretrained(parts["vae"])


def of_more_channels(parts):
    shutil.rmtree(parts["vae"])
    WFVAE(**VAE | {"latent_channels": 8}).save_pretrained(parts["vae"])


def another_clip(parts):
    made = tiny_encoders()
    with torch.no_grad():
        next(made[3].parameters()).add_(1)
    shutil.rmtree(parts["text"])
    save(parts["text"], made)


@pytest.mark.parametrize(
    ("spoil", "change", "kind", "message"),
    [
        (None, {"weights": "best"}, ValueError, "weights must be one of ema, model, got 'best'"),
        (already_there, {}, ValueError, "out exists; give a new name"),
        (without("run"), {}, FileNotFoundError, "no complete checkpoint in .*run/checkpoints"),
        (without("vae"), {}, FileNotFoundError, "vae/config.json is not there; give the fold"),
        (without("text"), {}, FileNotFoundError, "no text encoder in "),
        (lambda parts: (parts["vae"] / "config.json").unlink(), {}, FileNotFoundError,
         "vae/config.json is not there; give the folder of a WFVAE"),
        (lambda parts: (parts["vae"] / "config.json").write_text("[]"), {}, ValueError,
         "vae/config.json holds no table of settings"),
        (lambda parts: (parts["vae"] / "config.json").write_text("{}"), {}, ValueError,
         "latents of None channels, but the model of .* takes 4"),
        (another_vae, {}, ValueError, "vae of .*/vae: not what .*step-00000002 was trained with"),
        (another_clip, {}, ValueError, "^clip of .*/text: not what .*step-00000002 was trained"),
        (of_more_channels, {}, ValueError, "latents of 8 channels, but the model of .* takes 4"),
        (of_more_channels, {"other_encoders": True}, ValueError, "8 channels, but the model"),
        (lambda parts: save_run(parts["run"], 3, model=model(1), ema=model(1)), {}, ValueError,
         "step-00000003 does not tell which clip, t5, vae it was trained with"),
        (damaged, {}, CheckpointError, "step-00000002.*does not have the SHA-256"),
        (of_another_size, {}, ValueError, "step-00000003 does not hold its SUV: .*size mismatch"),
        (
            lambda parts: Checkpoints(parts["run"] / "checkpoints").save(3, {}, {}),
            {}, ValueError, "step-00000003 is of no SUV",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_exported(parts, tmp_path, spoil, change, kind, message):
    if spoil:
        spoil(parts)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(kind, match=f"(?s){message}"):
        export(out=tmp_path / "out", **parts, **change)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
