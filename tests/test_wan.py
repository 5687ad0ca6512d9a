"""Wan is trained by its recipe, from the folder of a WanPipeline to the folder of another."""

import copy
import itertools
import json
import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("jsonargparse")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")
pytest.importorskip("transformers")

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from processes import together
from test_text import tiny_tokenizer
from test_train import as_yaml, launch
from transformers import UMT5Config, UMT5EncoderModel

from skiparse import cli
from skiparse.models.data.buckets import Rule
from skiparse.models.data.dataset import Clip
from skiparse.models.data.draws import Place
from skiparse.models.data.features import collate, digest
from skiparse.models.data.video import probe
from skiparse.models.retrofit import Retrofit, Sparsity, retrofit
from skiparse.models.train.checkpoint import Checkpoints
from skiparse.models.train.config import Lora, Samples, load
from skiparse.models.train.core import train
from skiparse.models.train.export import export
from skiparse.models.wan.encoders import Encoders
from skiparse.models.wan.recipe import Sparse, WanConfig, WanRecipe, WanStage
from skiparse.models.writer import write_video

CHANNELS, TEXT, PROMPT = 4, 24, "A &amp; cat\n walks"
SCALING = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.5, 2.0, 0.7]}


def tiny_transformer(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return WanTransformer3DModel(
            **{
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": CHANNELS,
                "out_channels": CHANNELS, "text_dim": TEXT, "freq_dim": 16, "ffn_dim": 32,
                "num_layers": 2, "rope_max_seq_len": 32,
            } | changes
        )  # fmt: skip


def tiny_pipeline(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **SCALING
        )
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=128, d_model=TEXT, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    parts = {
        "tokenizer": tiny_tokenizer(None, "</s>", 512),
        "text_encoder": encoder.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_transformer(),
    }
    return WanPipeline(**parts | changes)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i, caption in enumerate((PROMPT, "a dog", "rain")):
        generator = torch.Generator().manual_seed(i)
        frames = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=generator)
        write_video(folder / f"{i}.mp4", frames)
        (folder / f"{i}.txt").write_text(caption)
    return folder


def config(init, source, out, steps=3, checkpointing="none", **changes):
    rule = Rule(frames=5, size=(32, 32), temporal_factor=4, longest=100.0, minority=0)
    stage = WanStage(
        steps=steps, learning_rate=1e-2, global_batch=2, rule=rule, checkpointing=checkpointing
    )
    given = {"stages": {"only": stage}, "source": str(source), "device": "cpu", "ema": 0.5}
    return WanConfig(**{"init": str(init), "out": str(out)} | given | changes)


def last(out):
    return Checkpoints(out / "checkpoints").latest()


@torch.no_grad()
def test_features_are_what_the_pipeline_makes_of_prompts_and_frames(init):
    pipeline, encoders = tiny_pipeline(), Encoders.from_pretrained(init)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=generator)
    clip = Clip(frames, (PROMPT, ""), "key", Place(0, 0, 0))
    found = encoders.features(clip)
    for text, caption in zip(found.texts, clip.captions, strict=True):
        rows, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=512
        )
        count = len(text["states"])
        assert count == (len("A & cat walks") if caption else 0) + 1  # with the mark of the end
        assert torch.equal(text["states"], rows[0, :count])
        assert not rows[0, count:].any()
    assert torch.equal(found.null["states"], found.texts[1]["states"])
    video = frames.movedim(-1, 0)[None] / 127.5 - 1
    posterior = pipeline.vae.encode(video).latent_dist
    shift, spread = (torch.tensor(x).view(-1, 1, 1, 1) for x in SCALING.values())
    # as the pipeline takes normalised latents back, up to the rounding of both
    torch.testing.assert_close(found.mean * spread + shift, posterior.mean[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.std * spread, posterior.std[0], rtol=1e-6, atol=0)


@torch.no_grad()
def test_the_model_is_called_as_the_pipeline_calls_it(init):
    """With 512 rows of text, those behind the caption zero; time is 1000 times the noise level."""
    encoders = Encoders.from_pretrained(init)
    frames = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    clips = [Clip(frames, (c,), c, Place(0, i, 0)) for i, c in enumerate((PROMPT, "a dog"))]
    batch = collate([encoders.features(clip) for clip in clips], seed=0, drop=0.0)
    net, levels = tiny_transformer(), torch.tensor([0.25, 0.9])
    noisy = torch.randn(2, CHANNELS, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text, _ = tiny_pipeline().encode_prompt(
        [PROMPT, "a dog"], do_classifier_free_guidance=False, max_sequence_length=512
    )
    wanted = net(noisy, torch.tensor([250.0, 900.0]), text, return_dict=False)[0]
    assert torch.equal(WanRecipe().velocity(net, noisy, levels, batch), wanted)
    assert WanRecipe().shift((CHANNELS, 21, 90, 160)) == pytest.approx(2.904, abs=5e-4)  # OSP-Next


def test_a_run_learns_is_continued_and_becomes_a_pipeline(init, source, tmp_path):
    """Bit for bit what a run in one piece gives; with blocks computed again, the same too."""
    train(config(init, source, tmp_path / "whole"))
    train(config(init, source, tmp_path / "parts", steps=2, checkpointing="block"))
    samples = Samples(every=3, prompts=("a cat",), shape=(5, 32, 32), steps=2, guidance=2.0)
    train(config(init, source, tmp_path / "parts", samples=samples))
    ours, theirs = last(tmp_path / "whole").read(""), last(tmp_path / "parts").read("")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name
    assert last(tmp_path / "whole").about["data"].keys() == {"data", "windows", "vae", "umt5"}
    before = tiny_transformer().state_dict()
    moved = [name for name, x in before.items() if not torch.equal(ours[f"model.{name}"], x)]
    assert moved == list(before)
    made = probe(tmp_path / "parts" / "samples" / "step-00000003-0.mp4")
    assert (made.frames, made.height, made.width) == (5, 32, 32)

    with pytest.raises(ValueError, match="give as vae the folder of the WanPipeline"):
        export(tmp_path / "whole", tmp_path / "made")
    export(tmp_path / "whole", tmp_path / "made", vae=init)
    pipeline = WanPipeline.from_pretrained(tmp_path / "made")
    for name, x in pipeline.transformer.state_dict().items():
        assert torch.equal(x, ours[f"ema.{name}"]), name
    assert pipeline.scheduler.config.shift == 3.0
    video = pipeline("a cat", height=32, width=32, num_frames=5, num_inference_steps=1).frames[0]
    assert video.shape == (5, 32, 32, 3)


def test_other_encoders_are_refused_or_taken_knowingly(init, source, tmp_path):
    train(config(init, source, tmp_path / "run", steps=1))
    other = tiny_pipeline()
    torch.nn.init.zeros_(other.vae.decoder.conv_out.bias)
    other.vae.decoder.conv_out.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"vae of .*other: not what .* was trained with"):
        export(tmp_path / "run", tmp_path / "made", vae=tmp_path / "other")
    assert not (tmp_path / "made").exists()
    export(tmp_path / "run", tmp_path / "made", vae=tmp_path / "other", other_encoders=True)
    bias = WanPipeline.from_pretrained(tmp_path / "made").vae.decoder.conv_out.bias
    assert torch.equal(bias, torch.ones(3))


def test_by_the_command_line_from_a_cache(init, source, tmp_path):
    table = {
        "recipe": "wan",
        "init": str(init),
        "device": "cpu",
        "stages": {
            "only": {
                "steps": 2,
                "learning_rate": 1e-2,
                "global_batch": 2,
                "rule": {
                    "frames": 5,
                    "size": [32, 32],
                    "temporal_factor": 4,
                    "longest": 100.0,
                    "minority": 0,
                },
            }
        },
    }
    file, cached = tmp_path / "run.yaml", tmp_path / "cache"
    file.write_text(json.dumps(table))
    out, online = tmp_path / "held", tmp_path / "online"
    command = ["cache", "build", str(file), "only", str(cached), "--out", str(out)]
    assert cli.main([*command, "--source", str(source)]) == 0
    assert cli.main(["train", str(file), "--out", str(out), "--cache", str(cached)]) == 0
    assert cli.main(["train", str(file), "--out", str(online), "--source", str(source)]) == 0
    found, wanted = last(out), last(online)
    for name, x in wanted.read("").items():
        assert torch.equal(x, found.read("")[name]), name


def stages(*sparsities, steps=2, **changes):
    """One stage after another, each with a sparsity."""
    rule = Rule(frames=5, size=(32, 32), temporal_factor=4, longest=100.0, minority=0)
    return {
        f"s{i}": WanStage(
            steps=steps, learning_rate=1e-2, global_batch=2, rule=rule, sparsity=each, **changes
        )
        for i, each in enumerate(sparsities)
    }


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def said(model):
    given = torch.Generator().manual_seed(3)
    latents, text = (
        torch.randn(s, generator=given) for s in ((1, CHANNELS, 2, 4, 4), (1, 5, TEXT))
    )
    model = copy.deepcopy(model)  # whose weights lie where torch puts them, as kernels look at that
    with torch.no_grad():
        return model(latents, torch.tensor([500]), text, return_dict=False)[0]


TWO, ONE = Sparse(ratio=2), Sparse(pattern="1d", ratio=3, dense=(1, 0))


def test_stages_are_sparse_as_they_say(init, source, tmp_path):
    """Dense, 2-D, 1-D, and what is exported is sparse as the last one was."""
    train(config(init, source, tmp_path / "whole", stages=stages(None, TWO, ONE)))
    one = stages(None, TWO, steps=2)
    train(
        config(init, source, tmp_path / "parts", stages=one | {"s1": replace(one["s1"], steps=1)})
    )
    middle = last(tmp_path / "parts")
    assert middle.about["model"]["skiparse"] == {
        "pattern": "2d", "ratio": 2, "kinds": ["single", "group"]
    }  # fmt: skip
    again = stages(None, TWO, ONE, checkpointing="block")
    train(config(init, source, tmp_path / "parts", stages=again))
    ours, theirs = last(tmp_path / "whole").read(""), last(tmp_path / "parts").read("")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name

    export(tmp_path / "whole", tmp_path / "made", vae=init)
    pipeline = WanPipeline.from_pretrained(tmp_path / "made")
    dense = said(pipeline.transformer)
    assert retrofit(pipeline).sparsity == Sparsity("1d", 3, ("dense", "single"))
    by_hand = tiny_transformer()
    weights = last(tmp_path / "whole").read("ema.")
    by_hand.load_state_dict(weights)
    assert torch.equal(said(by_hand), dense)
    retrofit(by_hand, "1d", ratio=3, dense=(1, 0))
    assert torch.equal(said(by_hand), said(pipeline.transformer))
    assert not torch.equal(said(by_hand), dense)


def test_what_a_stage_says_is_what_its_steps_compute(init, source, tmp_path):
    """From the same weights and noise another loss, and the dense one where every layer is."""
    dense = Sparse(kinds=("dense", "dense"))
    found = {}
    for name, each in {"none": None, "dense": dense, "2d": TWO, "1d": ONE}.items():
        train(config(init, source, tmp_path / name, stages=stages(None, each, None, steps=1)))
        found[name] = losses(tmp_path / name)
    assert len({each[0] for each in found.values()}) == 1
    assert found["none"] == found["dense"]
    assert len({found[name][1] for name in ("none", "2d", "1d")}) == 3
    assert "skiparse" not in last(tmp_path / "2d").about["model"]  # dense again


def test_compiled_blocks_follow_the_stages(init, source, tmp_path):
    """They were compiled dense, and must not stay so; nor sparse."""
    torch._dynamo.reset()
    given = stages(None, TWO, ONE, None)
    told, recipe = config(init, source, tmp_path, stages=given), WanRecipe()
    model, plain = tiny_transformer().eval(), tiny_transformer().eval()
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    latents, text = torch.randn(1, CHANNELS, 2, 4, 4), torch.randn(1, 5, TEXT)
    found = []
    for stage in given.values():
        for each in (model, plain):
            recipe.prepare(each, told, stage)
        with torch.no_grad():
            ours, theirs = (x(latents, torch.tensor([500]), text)[0] for x in (model, plain))
        assert torch.equal(ours, theirs)
        found.append(ours)
    assert torch.equal(found[0], found[3])
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(found))
    torch._dynamo.reset()


def test_a_pipeline_that_is_sparse_is_trained_so(init, source, tmp_path):
    sparse = tiny_pipeline()
    retrofit(sparse, "2d", ratio=2)
    sparse.save_pretrained(tmp_path / "sparse")
    told = {"asked": config(init, source, tmp_path / "asked", stages=stages(TWO))}
    told["own"] = config(tmp_path / "sparse", source, tmp_path / "own", stages=stages(None))
    for each in told.values():
        train(each)
    assert losses(tmp_path / "asked") == losses(tmp_path / "own")
    assert last(tmp_path / "own").about["model"]["skiparse"]["ratio"] == 2


LORA = Lora(rank=3, alpha=6.0)


def lora_run(init, source, out, **changes):
    given = {"lora": LORA, "dtype": "bfloat16", "stages": stages(None, TWO)}
    return config(init, source, out, **given | changes)


def test_a_lora_is_all_that_is_trained_and_saved(init, source, tmp_path):
    train(lora_run(init, source, tmp_path))
    found = last(tmp_path)
    layers = [f"blocks.{i}.attn{a}.{x}" for i in (0, 1) for a in (1, 2) for x in
              ("to_q", "to_k", "to_v", "to_out.0")]  # fmt: skip
    names = {f"{layer}.lora_{x}.default.weight" for layer in layers for x in "AB"}
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(found.read("")) == (
        {f"{model}.{name}" for model in ("model", "ema") for name in names}
        | {f"optimizer.{name}.{kind}" for name in names for kind in kinds}
    )
    assert {x.dtype for x in found.read("").values()} == {torch.float32}
    assert all(x.any() for x in found.read("model.").values())
    base = tiny_transformer()
    precise = set(base._keep_in_fp32_modules)
    frozen = {}
    for name, x in base.named_parameters():
        layer, _, kind = name.rpartition(".")
        name = f"{layer}.base_layer.{kind}" if layer in layers else name
        frozen[name] = x if precise & set(name.split(".")) else x.bfloat16()
    assert found.about["frozen"] == digest(frozen)


def test_a_lora_goes_on_bit_for_bit_beside_the_same_weights_alone(init, source, tmp_path):
    train(lora_run(init, source, tmp_path / "whole"))
    part = stages(None, TWO)
    part["s1"] = replace(part["s1"], steps=1)
    train(lora_run(init, source, tmp_path / "parts", stages=part))
    other = tmp_path / "moved"
    shutil.copytree(init, other)
    model = tiny_transformer()
    model.proj_out.bias.data += 1
    model.save_pretrained(other / "transformer")
    again = {"stages": stages(None, TWO, checkpointing="block")}
    with pytest.raises(ValueError, match="with other settings: init"):
        train(lora_run(other, source, tmp_path / "parts", **again))
    shutil.move(init, tmp_path / "away")
    shutil.copytree(other, init)
    try:
        with pytest.raises(ValueError, match="was trained around other weights, which are not in"):
            train(lora_run(init, source, tmp_path / "parts", **again))
    finally:
        shutil.rmtree(init)
        shutil.move(tmp_path / "away", init)
    train(lora_run(init, source, tmp_path / "parts", **again))
    ours, theirs = last(tmp_path / "whole").read(""), last(tmp_path / "parts").read("")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name


def test_a_lora_is_merged_or_goes_apart(init, source, tmp_path):
    train(lora_run(init, source, tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "merged", vae=init)
    export(tmp_path / "run", tmp_path / "apart", lora="apart")
    assert {file.name for file in (tmp_path / "apart").iterdir()} == {
        "pytorch_lora_weights.safetensors", "skiparse.json"
    }  # fmt: skip
    whole, pipeline = (WanPipeline.from_pretrained(x) for x in (tmp_path / "merged", init))
    assert whole.transformer.config.keys() == pipeline.transformer.config.keys() | {"skiparse"}
    before = said(pipeline.transformer)
    pipeline.load_lora_weights(tmp_path / "apart")
    assert not torch.equal(said(pipeline.transformer), before)
    assert pipeline.transformer.blocks[0].attn1.to_q.scaling == {"default_0": 6.0 / 3}
    pipeline.fuse_lora()
    merged = whole.transformer.state_dict()
    for name, x in pipeline.transformer.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(x, merged.pop(name.replace("base_layer.", ""))), name
    assert not merged
    retrofit(whole)
    retrofit(pipeline, Sparsity.load(tmp_path / "apart"))
    assert Retrofit.of(whole.transformer).sparsity == Retrofit.of(pipeline.transformer).sparsity

    shutil.copytree(init, tmp_path / "moved")
    export(tmp_path / "run", tmp_path / "same", vae=init, init=tmp_path / "moved", weights="model")
    other = tiny_transformer()
    other.proj_out.bias.data += 1
    other.save_pretrained(tmp_path / "moved" / "transformer")
    with pytest.raises(ValueError, match=r"moved holds not the weights that .* trained beside"):
        export(tmp_path / "run", tmp_path / "no", vae=init, init=tmp_path / "moved")
    with pytest.raises(ValueError, match="vae: nothing is needed beside a LoRA apart"):
        export(tmp_path / "run", tmp_path / "no", vae=init, lora="apart")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("parallel", [pytest.param("ddp", marks=pytest.mark.full), "fsdp"])
def test_a_lora_in_two_processes(init, source, tmp_path, parallel):
    """Beside weights in two types, of which FSDP takes those that are trained alike."""
    given = lora_run(init, source, tmp_path / "one")
    train(given)
    given = replace(given, out=str(tmp_path / "two"), parallel=parallel)
    launch(2, as_yaml(tmp_path / "config.yaml", given))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, rel=2**-8)  # bf16
    assert last(tmp_path / "one").read("").keys() == last(tmp_path / "two").read("").keys()
    assert last(tmp_path / "one").about["frozen"] == last(tmp_path / "two").about["frozen"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=0), "lora.rank must be at least 1, got 0"),
        (lambda: Lora(rank=1, alpha=0.0), "lora.alpha must be above 0, got 0.0"),
        (lambda: Lora(rank=1, target_modules=()), "lora.target_modules must name layers"),
        (lambda: Sparse(ratio=0), "ratio must be a whole number above 0, got 0"),
        (lambda: Sparse(dense=(1, 1), kinds=("dense", "single")), "give kinds or dense="),
        (lambda: Sparse(kinds=("sparse",)), "kinds must be of"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_the_model_is_refused(init, source, tmp_path):
    for each, told in (
        (Sparse(dense=(2, 1)), r"stages\.s0\.sparsity: dense must be two numbers >= 0, 2 at most"),
        (Sparse(kinds=("single",)), r"stages\.s0\.sparsity: kinds has 1 layers, .* has 2"),
    ):
        with pytest.raises(ValueError, match=told):
            train(config(init, source, tmp_path / "out", stages=stages(each)))
    lora = Lora(rank=1, target_modules=("to_q", "to_z"))
    with pytest.raises(ValueError, match=r"no linear layer of this Wan.* is called to_z; its"):
        train(config(init, source, tmp_path / "out", lora=lora))
    assert last(tmp_path / "out") is None
    table = {"recipe": "wan", "lora": {"rank": 1, "beta": 2}}
    table["stages"] = {"only": {"sparsity": {"ration": 2}}}
    (tmp_path / "run.yaml").write_text(json.dumps(table))
    with pytest.raises(
        ValueError, match=r"mean nothing: lora\.beta, stages\.only\.sparsity\.ration"
    ):
        load(tmp_path / "run.yaml")
    train(config(init, source, tmp_path / "out", steps=1))
    for given in ({"lora": "merged"}, {"init": init}):
        with pytest.raises(ValueError, match=r"is of no LoRA; leave it out"):
            export(tmp_path / "out", tmp_path / "made", vae=init, **given)
    with pytest.raises(ValueError, match="lora must be one of merged, apart, got 'both'"):
        export(tmp_path / "out", tmp_path / "made", vae=init, lora="both")


def test_a_lora_by_the_command_line(init, source, tmp_path):
    table = json.loads(json.dumps(asdict(config(init, source, tmp_path / "run", steps=1))))
    file = tmp_path / "run.yaml"
    table["stages"]["only"] |= {"rule": Rule(**table["stages"]["only"]["rule"]).table()}
    file.write_text(json.dumps(table))
    more = ["--lora.alpha", "8", "--lora.rank", "2", "--lora.target_modules", '["attn1.to_q"]']
    sparse = ["--stages.only.sparsity.pattern", "1d", "--stages.only.sparsity.ratio", "2"]
    assert cli.main(["train", str(file), *more, *sparse]) == 0
    found = last(tmp_path / "run")
    assert found.about["settings"]["lora"] == {
        "rank": 2, "alpha": 8.0, "target_modules": ["attn1.to_q"]
    }  # fmt: skip
    assert found.about["model"]["skiparse"]["kinds"] == ["single", "group"]
    assert len(found.read("model.")) == 4
    made = tmp_path / "made"
    assert cli.main(["export", str(tmp_path / "run"), str(made), "--lora", "apart"]) == 0
    assert Sparsity.load(made) == Sparsity("1d", 2, ("single", "group"))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"transformer": tiny_transformer(in_channels=9)}, "its transformer takes images too"),
        ({"transformer": tiny_transformer(image_dim=8)}, "its transformer takes images too"),
        ({"transformer": tiny_transformer(text_dim=8)}, "text_dim=8, but the text encoder has 24"),
        ({"transformer": tiny_transformer(in_channels=6, out_channels=6)},
         "in_channels=6, but the autoencoder has 4"),
        ({"expand_timesteps": True}, "time by the token, or two transformers"),
        ({"boundary_ratio": 0.9, "transformer_2": tiny_transformer()}, "or two transformers"),
    ],
)  # fmt: skip
def test_models_that_are_not_trained_here(source, tmp_path, parts, message):
    tiny_pipeline(**parts).save_pretrained(tmp_path / "init")
    with pytest.raises(ValueError, match=re.escape(message)):
        train(config(tmp_path / "init", source, tmp_path / "out"))
    assert last(tmp_path / "out") is None


def test_what_makes_no_sense_is_refused(init, source, tmp_path):
    with pytest.raises(ValueError, match="init is needed: give the folder of a WanPipeline"):
        WanConfig(out="x", stages=config(init, source, tmp_path).stages, source="y")
    with pytest.raises(ValueError, match="checkpointing must be one of none, block, got 'all'"):
        config(init, source, tmp_path, checkpointing="all")
    (tmp_path / "empty" / "transformer").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is not there"):
        train(config(tmp_path / "empty", source, tmp_path / "out"))
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="holds a FluxPipeline; give the folder of a WanPipeline"):
        train(config(tmp_path / "empty", source, tmp_path / "out"))
    for shape, told in (((6, 32, 32), "4n \\+ 1 frames, got 6"), ((5, 24, 32), "multiples of 16")):
        samples = Samples(every=1, prompts=("a",), shape=shape)
        with pytest.raises(ValueError, match=told):
            train(config(init, source, tmp_path / "out", samples=samples))
    with pytest.raises(ValueError, match="tensor_parallel=2: the recipe wan does not deal out"):
        train(config(init, source, tmp_path / "out", tensor_parallel=2, parallel="fsdp"))
    coder = Encoders.from_pretrained(init)
    coder.pipeline.vae.encoder.conv_out.bias.data[:] = float("nan")
    frames = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"key: the autoencoder in torch\.float32 gives"):
        coder.features(Clip(frames, ("a",), "key", Place(0, 0, 0)))


@pytest.mark.full
def test_processes_that_share_tokens_equal_one(init, source, tmp_path):
    """A dense stage, a sparse one, one that nobody shares, and a sparse one again."""
    one = config(init, source, tmp_path / "one", steps=2, checkpointing="block").stages["only"]
    kinds = ("dense", "single")
    grid = Sparse(pattern="2d", ratio=2, kinds=kinds)
    line = Sparse(pattern="1d", ratio=2, kinds=kinds)
    stages = {
        "dense": replace(one, context_parallel=2),
        "sparse": replace(one, sparsity=grid),
        "alone": replace(one, sparsity=grid, context_parallel=1),
        "line": replace(one, sparsity=line),
    }
    logs = []
    for out, number in (("one", 1), ("two", 2)):
        given = config(init, source, tmp_path / out, stages=stages)
        table = json.loads(json.dumps(asdict(given)))
        if number == 1:
            table["stages"]["dense"]["context_parallel"] = 1
        file = tmp_path / f"{out}.yaml"
        file.write_text(json.dumps(table))
        done = together(number, "counting.py", "train", file, "--context-parallel", number)
        assert done.returncode == 0, done.stderr[-3000:]
        sent = re.findall(r"^sent \d [1-9]", done.stdout, re.MULTILINE)
        assert len(sent) == (2 if number == 2 else 0), done.stdout
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for a, b in zip(*logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)
    about = [last(tmp_path / out).about["model"] for out in ("one", "two")]
    assert about[0] == about[1]
