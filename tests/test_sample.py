"""`skiparse sample` takes a WanPipeline, dense or sparse, or OSP-Next, as it takes an SUV.

What it promises of files, records and prompts for any pipeline is in `test_pipeline.py`.
"""

import inspect
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from processes import together
from same_videos import same
from test_osp_next import HEADS, SMALL, tiny_text
from test_wan import tiny_pipeline, tiny_transformer

from skiparse import cli
from skiparse.models import hif8, vbench, writer
from skiparse.models.data.video import probe
from skiparse.models.options import OWN, Asked
from skiparse.models.retrofit import retrofit
from skiparse.models.sample import sampler_of
from skiparse.models.wan.convert import SAMPLED, SHIFT, convert_file
from skiparse.models.wan.sampler import WanSampler, levels

DATA = Path(__file__).parent / "data"
KINDS = ["dense", "single", "group", "dense"]
SIZE = {"height": 64, "width": 32, "num_frames": 5, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same tiny Wan, dense and sparse."""
    folder = tmp_path_factory.mktemp("wan")
    pipeline = tiny_pipeline(transformer=tiny_transformer(num_layers=4))
    for parameter in pipeline.transformer.parameters():  # as it is made, text hardly matters
        torch.nn.init.normal_(parameter, std=0.2)
    pipeline.save_pretrained(folder / "dense")
    pipeline.transformer.register_to_config(skiparse={"pattern": "2d", "ratio": 2, "kinds": KINDS})
    pipeline.save_pretrained(folder / "sparse")
    return folder


def sample(folder, *arguments):
    sizes = ["--height", 64, "--width", 32, "--frames", 5, "--steps", 2, "--device", "cpu"]
    return cli.main(["sample", "--model", *map(str, (folder, *sizes, *arguments))])


def by_diffusers(folder, seed, sparse, *, eight=False, **given):
    """What its own pipeline makes; in the same numbers."""
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    if sparse:
        retrofit(pipeline)
    if eight:
        hif8.apply(pipeline.transformer)
    noise = torch.Generator().manual_seed(seed)
    return levels(pipeline(**SIZE | given, generator=noise, output_type="pt").frames)[0]


@pytest.mark.parametrize(
    ("kind", "asked", "given"),
    [
        ("dense", [], {}),
        ("sparse", [], {}),
        ("sparse", ["--negative", "Rain, &amp; more", "--guidance", 3],
         {"negative_prompt": "Rain, &amp; more", "guidance_scale": 3.0}),
        ("sparse", ["--guidance", 1], {"guidance_scale": 1.0}),
        ("sparse", ["--hif8"], {"eight": True}),
    ],
)  # fmt: skip
def test_a_video_is_what_the_pipeline_makes_itself(folders, tmp_path, kind, asked, given):
    out, again = tmp_path / "x.mp4", tmp_path / "again.mp4"
    folder = folders / kind
    assert sample(folder, "--prompt", "A  cat", "--seed", 5, "--out", out, "--crf", 0, *asked) == 0
    frames = by_diffusers(folder, 5, kind == "sparse", prompt="A  cat", **given)
    writer.write_video(again, frames, fps=16, crf=0)
    assert out.read_bytes() == again.read_bytes()
    record = json.loads(out.with_suffix(".json").read_text())
    assert record.get("hif8") == given.get("eight")
    assert record["guidance_scale"] == given.get("guidance_scale", 5.0)
    assert record.get("negative_prompt") == (
        None if record["guidance_scale"] == 1 else given.get("negative_prompt", "")
    )
    assert (record["shift"], record["schedule"], record["fps"]) == (3.0, None, 16)
    assert record["scheduler"] == "FlowMatchEulerDiscreteScheduler"


def test_sparse_layers_and_eight_bits_make_other_videos(folders):
    dense, sparse = (by_diffusers(folders / "sparse", 0, x, prompt="a") for x in (False, True))
    assert not torch.equal(dense, sparse)
    eight = by_diffusers(folders / "sparse", 0, True, eight=True, prompt="a")
    assert not torch.equal(sparse, eight)


def test_defaults_are_those_of_diffusers():
    told = inspect.signature(WanPipeline.__call__).parameters
    ours = WanSampler.defaults
    assert (ours.height, ours.width, ours.frames, ours.steps, ours.guidance) == tuple(
        told[name].default
        for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    )


@pytest.fixture(scope="module")
def osp(tmp_path_factory):
    """What `skiparse convert osp-next` makes of recorded weights."""
    folder = tmp_path_factory.mktemp("osp")
    recorded = load_file(DATA / "osp_next.safetensors")
    weights = {
        name.removeprefix("weights/"): x.float()
        for name, x in recorded.items()
        if name.startswith("weights/")
    }
    torch.save(weights, folder / "model.pt")
    base = tiny_pipeline(text_encoder=tiny_text(40), transformer=WanTransformer3DModel(**SMALL))
    base.save_pretrained(folder / "base")
    made = folder / "made"
    convert_file(folder / "model.pt", made, base=folder / "base", heads=HEADS, dense=(2, 2))
    return made


def test_osp_next_says_how_it_is_sampled(osp):
    sampler = sampler_of(osp, Asked())
    assert sampler.settings == {
        "height": 720, "width": 1280, "num_frames": 81, "num_inference_steps": 50,
        "guidance_scale": 5.0, "scheduler": "FlowMatchEulerDiscreteScheduler", "shift": 7.0,
        "schedule": "linear", "negative_prompt": SAMPLED.negative,
    }  # fmt: skip
    assert (sampler.asked.fps, SHIFT, len(SAMPLED.negative)) == (16, 7.0, 137)
    assert sampler_of(osp, Asked(height=480, fps=8)).asked == Asked(height=480, fps=8).over(SAMPLED)


def test_a_folder_may_have_whole_numbers(tmp_path):
    (tmp_path / OWN).write_text('{"guidance": 5, "height": 480, "hif8": true}')
    assert Asked.load(tmp_path) == Asked(guidance=5, height=480, hif8=True)
    assert Asked.load(tmp_path / "none") == Asked()
    for wrong in ('{"guidance": "5"}', '{"height": 480.5}', '{"negative": 3}'):
        (tmp_path / OWN).write_text(wrong)
        with pytest.raises(ValueError, match="is damaged"):
            Asked.load(tmp_path)


def test_osp_next_goes_through_its_own_noise_levels(osp):
    """Recorded; those of the scheduler by itself end at 0.047 instead of 0.125."""
    sampler = sampler_of(osp, Asked())
    sampler.load(torch.float32)
    scheduler = sampler.pipeline.scheduler
    wanted = load_file(DATA / "osp_next_schedule.safetensors")["sigmas.50.shift7"]
    scheduler.set_timesteps(50)
    torch.testing.assert_close(scheduler.sigmas, wanted, rtol=0, atol=2 * 2**-24)
    torch.testing.assert_close(scheduler.timesteps, 1000 * wanted[:-1])
    assert scheduler.sigmas[-2].item() == pytest.approx(0.125)
    made = sampler.pipeline.transformer.attn_processors["blocks.2.attn1.processor"]
    assert made.skiparse_layer.kind == "single"


def test_osp_next_from_weights_to_a_video(osp, tmp_path):
    """By hand: Euler's steps of guided velocities along 7u / (1 + 6u)."""
    out = tmp_path / "x.mp4"
    assert sample(osp, "--prompt", "a cat", "--out", out, "--crf", 0, "--steps", 3) == 0
    info = probe(out)
    assert (info.height, info.width, info.frames, info.fps) == (64, 32, 5, 16)
    pipeline = WanPipeline.from_pretrained(osp, torch_dtype=torch.float32)
    retrofit(pipeline)
    text, negative = pipeline.encode_prompt("a cat", SAMPLED.negative, max_sequence_length=512)
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 2, 8, 4, generator=noise)
    u = torch.tensor([1, 2 / 3, 1 / 3, 0], dtype=torch.float64)
    sigmas = (7 * u / (1 + 6 * u)).float()
    with torch.no_grad():
        for now, after in itertools.pairwise(sigmas):
            without, with_it = (
                pipeline.transformer(x, 1000 * now[None], rows, return_dict=False)[0]
                for rows in (negative, text)
            )
            x = x + (after - now) * (without + 5 * (with_it - without))
        config = pipeline.vae.config
        mean, std = (
            torch.tensor(v).view(-1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        video = pipeline.vae.decode(x * std + mean).sample
    sampler = sampler_of(osp, Asked(height=64, width=32, frames=5, steps=3))
    sampler.load(torch.float32)
    sampler.encode(["a cat"])
    made = torch.cat(list(sampler.frames("a cat", torch.Generator().manual_seed(0))))
    by_hand = levels((video / 2 + 0.5).clamp(0, 1).movedim(1, 2))[0]
    assert (made.int() - by_hand.int()).abs().max() <= 1
    writer.write_video(tmp_path / "again.mp4", made, fps=16, crf=0)
    assert out.read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_pictures_prompts_and_vbench(folders, tmp_path, capsys):
    model, prompts = folders / "sparse", tmp_path / "p.txt"
    prompts.write_text("a cat\na dog\n")
    many = ["--prompts", prompts]
    assert sample(model, *many, "--out", tmp_path / "out", "--frames", 1) == 0
    names = ["00000.json", "00000.png", "00001.json", "00001.png"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names

    folder = tmp_path / "videos"
    asked = [*many, "--vbench", folder, "--samples", 1, "--seed", 7]
    assert sample(model, *asked) == 0
    files = [folder / "a cat-0.mp4", folder / "a dog-0.mp4"]
    assert sorted(folder.iterdir()) == files
    assert json.loads(vbench.sidecar(folder, files[0].name).read_text())["seed"] == 7
    before = files[0].stat().st_mtime_ns
    files[1].unlink()
    capsys.readouterr()
    assert sample(model, *asked) == 0  # goes on where it was stopped
    assert "1 of 2 videos missing" in capsys.readouterr().out
    assert files[0].stat().st_mtime_ns == before
    assert files[1].is_file()
    for changed in (["--shift", 5], ["--schedule", "linear"], ["--negative", "rain"]):
        assert sample(model, *asked, *changed) == 2  # and mixes nothing
        assert "made with other settings" in capsys.readouterr().err
    assert sample(folders / "dense", *asked) == 2  # the record names the model's config
    assert "made with other settings" in capsys.readouterr().err


def test_a_scheduler_of_another_kind_keeps_its_schedule(folders, tmp_path, capsys):
    """As Wan of diffusers comes; its shift has another name."""
    model = tmp_path / "unipc"
    pipeline = WanPipeline.from_pretrained(folders / "dense")
    pipeline.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    pipeline.save_pretrained(model)
    out, again = tmp_path / "x.mp4", tmp_path / "again.mp4"
    assert sample(model, "--prompt", "a cat", "--out", out, "--crf", 0) == 0
    writer.write_video(again, by_diffusers(model, 0, False, prompt="a cat"), fps=16, crf=0)
    assert out.read_bytes() == again.read_bytes()
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["scheduler"], record["shift"]) == ("UniPCMultistepScheduler", 5.0)
    assert sample(model, "--prompt", "a cat", "--out", out, "--crf", 0, "--shift", 2) == 0
    assert out.read_bytes() != again.read_bytes()
    capsys.readouterr()
    assert sample(model, "--prompt", "a cat", "--out", out, "--schedule", "linear") == 2
    assert "a UniPCMultistepScheduler has a schedule of its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rescale", "0.7"], "--rescale: a WanPipeline has no such setting; leave it out"),
        (["--sequential-cfg"], "--sequential-cfg: a WanPipeline has no such setting"),
        (["--guidance", "0.5"], "--guidance 0.5: give at least 1, which is none"),
        (["--guidance", "1", "--negative", "x"], "--negative does nothing at --guidance 1"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--shift", "0"], "--shift 0.0: give a number above 0"),
        (["--shift", "-1", "--schedule", "linear"], "shift must be a finite number above 0"),
        (["--schedule", "karras"], "schedule must be one of linear, linear_quadratic, got"),
        (["--frames", "6"], "num_frames=6 must be 4n + 1: take 5 or 9"),
        (["--frames", "0"], "num_frames=0 must be 4n + 1: take 1"),
        (["--width", "40"], "width=40 must be a multiple of 16: take 32 or 48"),
        (["--out", "x.png"], "--out x.png: --frames 5 makes a .mp4"),
        (["--crf", "60"], "crf must be from 0 to 51, got 60"),
        (["--fps", "0"], "fps must be above 0"),
    ],
)  # fmt: skip
def test_what_a_wan_cannot_do_is_said_before_weights_are_loaded(
    folders, tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(WanSampler, "load", None)
    assert sample(folders / "sparse", "--prompt", "a cat", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def spoilt(folder, name, **changes):
    """A copy of a folder's small files with some of them changed."""
    for file in folder.rglob("*.json"):
        copy = name / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        table = json.loads(file.read_text())
        copy.write_text(json.dumps(table | changes.get(copy.parent.name, {})))
    return name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "model_index.json is not there; give the"),
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is damaged"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
         "it holds a FluxPipeline; known are SUVPipeline, WanPipeline"),
        (lambda f: (f / "vae/config.json").unlink(), "vae/config.json is not there; give the"),
        (lambda f: (f / "transformer/config.json").write_text("[]"), "it holds no table"),
        (lambda f: (f / OWN).write_text('{"height": "720"}'), "height='720'; it may have height"),
        (lambda f: (f / OWN).write_text('{"size": 720}'), "size=720; it may have height, width"),
        (lambda f: (f / OWN).write_text('{"rescale": 0.5}'), "--rescale: a WanPipeline has no"),
        (lambda f: (f / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDIM"}'),
         "a DDIM has no shift of flow matching"),
    ],
)  # fmt: skip
def test_other_folders_are_refused(folders, tmp_path, capsys, spoil, message):
    model = spoilt(folders / "sparse", tmp_path / "model")
    spoil(model)
    assert sample(model, "--prompt", "a cat", "--out", tmp_path / "x.mp4") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.mp4").exists()


def test_a_model_that_takes_images_is_refused(folders, tmp_path, capsys):
    model = spoilt(folders / "dense", tmp_path / "model", transformer={"in_channels": 9})
    assert sample(model, "--prompt", "a cat", "--out", tmp_path / "x.mp4") == 2
    assert "its transformer takes images too" in capsys.readouterr().err


def test_missing_weights_are_refused(folders, tmp_path, capsys):
    """diffusers by itself would make them up, with a warning."""
    pipeline = WanPipeline.from_pretrained(folders / "dense")
    pipeline.save_pretrained(tmp_path / "model")
    table = tmp_path / "model" / "transformer" / "config.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | {"num_layers": 5}))
    assert sample(tmp_path / "model", "--prompt", "a", "--out", tmp_path / "x.mp4") == 2
    said = capsys.readouterr().err
    assert "does not hold exactly this model's weights; missing_keys: ['blocks.4." in said


@pytest.mark.parametrize(
    ("part", "message"),
    [("transformer", "latents are not finite after step 1 of 2"), ("vae", "frames that are not")],
)
def test_nothing_is_written_that_is_not_finite(folders, tmp_path, capsys, part, message):
    pipeline = WanPipeline.from_pretrained(folders / "dense")
    last = pipeline.transformer.proj_out if part == "transformer" else pipeline.vae.decoder.conv_out
    torch.nn.init.constant_(last.bias, float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    assert sample(tmp_path / "model", "--prompt", "a", "--out", tmp_path / "x.mp4") == 1
    assert message in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("kind", ["sparse", pytest.param("dense", marks=pytest.mark.full)])
def test_processes_that_share_tokens_make_the_same_videos(folders, tmp_path, kind):
    """Two with one video; of a dense model and of a sparse one."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("A cat\nrain\n")
    asked = ["--prompts", prompts, "--seed", 5, "--crf", 0]
    assert sample(folders / kind, *asked, "--out", tmp_path / "one") == 0
    words = ["sample", "--model", folders / kind, "--height", 64, "--width", 32, "--frames", 5,
             "--steps", 2, "--device", "cpu", *asked, "--out", tmp_path / "two"]  # fmt: skip
    done = together(2, "counting.py", *words, "--context-parallel", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^sent \d [1-9]", done.stdout, re.MULTILINE)) == 2, done.stdout
    assert done.stdout.count(".mp4") == 2  # the first process alone writes, and says so
    same(tmp_path / "one", tmp_path / "two")


def test_what_processes_cannot_share_is_said_before_any_work(folders, tmp_path, capsys):
    assert sample(folders / "dense", "--prompt", "a", "--context-parallel", 2) == 2
    assert "--context-parallel 2 must divide the number of processes, 1" in capsys.readouterr().err
    assert sample(folders / "dense", "--prompt", "a", "--context-parallel", 0) == 2
    assert "--context-parallel 0: give at least 1" in capsys.readouterr().err
    asked = Asked(hif8=True, height=64, width=32, frames=5)
    with pytest.raises(ValueError, match="--hif8: its scales are of whole tensors"):
        sampler_of(folders / "sparse", asked).share(object())
