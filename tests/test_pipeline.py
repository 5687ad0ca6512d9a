"""What SUVPipeline and `skiparse sample` promise: Euler's steps, checked, and files to match."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
import shutil
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from processes import together
from safetensors.torch import load_file, save_file
from same_videos import same
from test_text import tiny_encoders

import skiparse.models
from skiparse.cli import main
from skiparse.models import flow, vbench, writer
from skiparse.models import sample as by_command
from skiparse.models.data.video import probe
from skiparse.models.pipeline import NEGATIVE_PROMPT, TEMPLATE, SUVPipeline
from skiparse.models.suv.model import SUV
from skiparse.models.wfvae.model import WFVAE

UINT8 = {"output_type": "uint8"}
SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3}


class TinyVAE(ModelMixin, ConfigMixin):
    """The decoder's interface: 8 x 8 x 8 nearest neighbours of a mix of the channels."""

    spatial_factor = temporal_factor = 8

    @register_to_config
    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        self.mix = torch.nn.Conv3d(latent_channels, 3, 1)

    def denormalize(self, latents):
        return latents / 2 + 0.25

    @apply_forward_hook
    def decode(self, latents):
        frames = self.mix(latents).repeat_interleave(8, 2)[:, :, 7:]
        return SimpleNamespace(sample=frames.repeat_interleave(8, 3).repeat_interleave(8, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a tiny random pipeline."""
    torch.manual_seed(1)
    parts = dict(
        zip(
            ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"),
            tiny_encoders(),
            strict=True,
        )
    )
    model = SUV(**SUV.presets["tiny"])
    for parameter in model.parameters():  # as initialised, the text hardly matters
        torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("pipeline")
    SUVPipeline(model.eval(), TinyVAE(), **parts).save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(saved):
    pipeline = SUVPipeline.from_pretrained(saved)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(pipe, prompts, negative, noise, *, scale, rescale, steps, shift):
    """The latents by the formulas alone, each prompt by itself."""
    found = []
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).float()
    for prompt, x in zip(prompts, noise.split(1), strict=True):
        cond = pipe.text.encode(TEMPLATE.format(prompt=prompt))
        uncond = pipe.text.encode(negative)
        for sigma, following in itertools.pairwise(sigmas):
            u, c = (
                pipe.transformer(x, 1000 * sigma[None], e.text, e.pooled, text_mask=e.text_mask)
                for e in (uncond, cond)
            )
            v = u + scale * (c - u)
            v = rescale * v * c.std() / v.std() + (1 - rescale) * v
            x = x + (following - sigma) * v
        found.append(x)
    return torch.cat(found)


@torch.no_grad()
def test_sampling_is_the_formulas(pipe):
    """CFG with rescale, shift, template, negative prompt; to twice what fp32 loses by hand."""
    prompts, noise = ["a cat", "a very long dog"], torch.randn(2, 4, 2, 4, 6, generator=generator())
    asked = {"scale": 5.0, "rescale": 0.6, "steps": 3, "shift": 4.0}
    found = pipe(
        prompts, **SIZE, latents=noise, output_type="latent", guidance_scale=5.0,
        guidance_rescale=0.6, shift=4.0,
    ).frames  # fmt: skip
    assert found.dtype == torch.float32
    hand = by_hand(pipe, prompts, NEGATIVE_PROMPT, noise, **asked)
    pipe.transformer.double()
    exact = by_hand(pipe, prompts, NEGATIVE_PROMPT, noise.double(), **asked)
    own = (hand - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * own
    other = by_hand(pipe, prompts, "", noise.double(), **asked)
    assert (other - exact).abs().max() > 100 * own  # the negative prompt counts


def test_saving_and_loading_is_exact(pipe, saved, tmp_path):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["transformer"] == ["skiparse.models.suv.model", "SUV"]
    first = pipe("a cat", **SIZE, **UINT8, generator=generator()).frames
    assert first.dtype == torch.uint8
    assert first.shape == (1, 9, 32, 48, 3)
    assert first.unique().numel() > 20
    pipe.save_pretrained(tmp_path)
    again = SUVPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        a, b = getattr(pipe, name).state_dict(), getattr(again, name).state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    asked = {**SIZE, **UINT8}
    assert torch.equal(again("a cat", **asked, generator=generator()).frames, first)
    assert not torch.equal(again("a cat", **asked, generator=generator(1)).frames, first)
    assert not torch.equal(again("a dog", **asked, generator=generator()).frames, first)
    assert skiparse.models.SUVPipeline is SUVPipeline


@torch.no_grad()
def test_frames_are_the_decoded_latents(pipe):
    pipe.vae.mix.weight.mul_(10)  # far beyond [-1, 1], where frames are clipped, not wrapped
    latents = pipe("a cat", **SIZE, generator=generator(), output_type="latent").frames
    frames = pipe("a cat", **SIZE, **UINT8, generator=generator()).frames
    pixels = pipe.vae.mix(latents / 2 + 0.25)[0].permute(1, 2, 3, 0)  # [t, h, w, 3]
    levels = (127.5 * (pixels + 1)).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(frames[0, 0, ::8, ::8], levels[0])
    assert torch.equal(frames[0, 8, 7::8, 7::8], levels[1])
    assert levels.min() == 0
    assert levels.max() == 255


@torch.no_grad()
def test_with_the_vae_of_the_release(pipe, tmp_path):
    """WF-VAE in its place: saved, loaded and decoded, a chunk or the whole of the latents."""
    torch.manual_seed(2)
    vae = WFVAE(**WFVAE.presets["tiny"] | {"latent_channels": 4, "scale": (0.5,) * 4}).eval()
    SUVPipeline(pipe.transformer, vae).save_pretrained(tmp_path)
    again = SUVPipeline.from_pretrained(tmp_path)
    assert type(again.vae) is WFVAE
    noise = torch.randn(1, 4, 2, 4, 6, generator=generator())
    text = pipe.text.encode("a cat")
    frames = again(
        **SIZE, prompt_embeds=text, latents=noise, guidance_scale=1, output_type="latent"
    ).frames
    made = again(**SIZE, **UINT8, prompt_embeds=text, latents=noise, guidance_scale=1).frames
    right = vae.decode(frames / 0.5).sample[0].add(1).mul(127.5).round().clamp(0, 255)
    assert torch.equal(made[0].movedim(-1, 0).float(), right)


def test_what_is_missing_is_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model_index\.json is not there"):
        SUVPipeline.from_pretrained(tmp_path)  # and never a download
    shutil.copytree(saved, tmp_path / "x")
    file = tmp_path / "x" / "text_encoder_2" / "model.safetensors"
    state = load_file(file)
    del state["text_projection.weight"]
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder_2 lacks weights.*text_projection"):
        SUVPipeline.from_pretrained(tmp_path / "x")


def test_dtypes(saved):
    pipe = SUVPipeline.from_pretrained(saved, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder_2"):
        assert getattr(pipe, name).dtype == torch.bfloat16
    seen = []
    forward = pipe.transformer.forward

    def watch(latents, timestep, text, pooled, **rest):
        seen.append((latents.dtype, timestep.dtype, text.dtype, pooled.dtype))
        return forward(latents, timestep, text, pooled, **rest)

    pipe.transformer.forward = watch
    noise, sigmas = torch.randn(1, 4, 2, 4, 6, generator=generator()), flow.inference_sigmas(3)
    kept = [noise]

    def step(pipeline, i, timestep, tensors):
        following = flow.euler_step(kept[-1], tensors["velocity"], sigmas[i], sigmas[i + 1])
        assert torch.equal(tensors["latents"], following)  # not one bit lost to bf16
        kept.append(tensors["latents"])
        return {}

    pipe(
        "a cat", **SIZE, latents=noise, callback_on_step_end=step,
        callback_on_step_end_tensor_inputs=["latents", "velocity"],
    )  # fmt: skip
    bf16 = torch.bfloat16
    assert set(seen) == {(bf16, torch.float32, bf16, bf16)}
    assert [x.dtype for x in kept] == [torch.float32] * 4
    mixed = SUVPipeline.from_pretrained(
        saved, dtype={"transformer": bf16, "default": torch.float32}
    )
    assert (mixed.transformer.dtype, mixed.text_encoder.dtype) == (bf16, torch.float32)


@torch.no_grad()
def test_one_branch_after_the_other(pipe):
    """The same to twice fp32's own error; half the batch in every call."""
    sizes = []
    pipe.transformer.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
    noise = torch.randn(1, 4, 2, 4, 6, generator=generator())
    together = pipe("a cat", **SIZE, latents=noise, output_type="latent").frames
    assert sizes == [2] * 3
    apart = pipe("a cat", **SIZE, latents=noise, output_type="latent", sequential_cfg=True).frames
    assert sizes == [2] * 3 + [1] * 6
    asked = {"scale": 7.0, "rescale": 0.7, "steps": 3, "shift": 7.0}
    pipe.transformer.double()
    exact = by_hand(pipe, ["a cat"], NEGATIVE_PROMPT, noise.double(), **asked)
    own = (together - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (apart - exact).abs().max() <= 2 * own


def test_without_guidance_there_is_no_negative_prompt(pipe, caplog):
    sizes = []
    pipe.transformer.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
    pipe(["a cat", "a dog"], **SIZE, guidance_scale=1.0, generator=generator())
    assert sizes == [2] * 3
    plain = pipe("a cat", **SIZE, guidance_scale=1.0, generator=generator()).frames
    with caplog.at_level(logging.WARNING):
        asked = {"guidance_scale": 0.5, "negative_prompt": "blur"}  # as user interfaces send it
        found = pipe("a cat", **SIZE, **asked, generator=generator()).frames
    assert "a negative prompt does nothing" in caplog.text
    assert np.array_equal(found, plain)


def test_encoded_prompts_and_freed_encoders(pipe):
    asked = {**SIZE, **UINT8, "negative_prompt": ["grey", "dark"]}
    first = pipe(["a cat", "a dog"], **asked, generator=generator()).frames
    positive = pipe.text.encode(["a cat", "a dog"], template=TEMPLATE)
    negative = pipe.text.encode(["grey", "dark"])
    pipe.free_text_encoders()
    assert pipe.text_encoder is pipe.text_encoder_2 is None
    assert torch.equal(pipe(["a cat", "a dog"], **asked, generator=generator()).frames, first)
    given = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        **SIZE,
        **UINT8,
        generator=generator(),
    ).frames
    assert torch.equal(given, first)
    with pytest.raises(ValueError, match="'high quality, a bird' was not encoded before"):
        pipe("a bird", **SIZE, negative_prompt="grey")


def test_a_generator_for_each_video(pipe):
    asked = {**SIZE, **UINT8}
    both = pipe(["a cat", "a cat"], **asked, generator=[generator(3), generator(4)]).frames
    swapped = pipe(["a cat", "a cat"], **asked, generator=[generator(4), generator(3)]).frames
    assert torch.equal(both, swapped.flip(0))
    assert not torch.equal(both[0], both[1])


def test_progress_and_callback(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    seen = []

    def callback(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, round(float(timestep), 2), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else {}

    out = pipe(
        "a cat", **SIZE, output_type="latent", generator=generator(),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "velocity"],
    ).frames  # fmt: skip
    names = ["latents", "velocity"]
    sigmas = flow.inference_sigmas(3)
    assert seen == [(i, round(1000 * float(sigmas[i]), 2), names) for i in range(3)]
    assert not out.any()
    assert "3/3" in capsys.readouterr().err


def test_a_picture_is_a_video_of_one_frame(pipe):
    frames = pipe("a cat", **{**SIZE, "num_frames": 1}, generator=generator()).frames
    assert frames.shape == (1, 1, 32, 48, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_failing_step_is_named(pipe, value):
    count = []

    def spoil(module, inputs, output):
        count.append(1)
        if len(count) == 2:
            output[0].view(-1)[7] = value

    pipe.transformer.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"after step 2 of 3 .*float32"):
        pipe("a cat", **SIZE, generator=generator())
    assert len(count) == 2


def test_spoilt_text_and_frames_are_refused(pipe):
    embeds = pipe.text.encode("a cat")
    embeds.pooled[0, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="pooled text embeddings are not finite"):
        pipe(prompt_embeds=embeds, **SIZE)
    embeds = pipe.text.encode("a dog")
    embeds.text[0, 0, 3] = float("inf")
    with pytest.raises(FloatingPointError, match="the text embeddings are not finite"):
        pipe(prompt_embeds=embeds, **SIZE)
    with pytest.raises(FloatingPointError, match="the text embeddings are not finite"):
        pipe("a cat", negative_prompt_embeds=embeds, **SIZE)
    spoilt = {"latents": torch.full((1, 4, 2, 4, 6), float("nan"))}
    with pytest.raises(FloatingPointError, match="not finite after step 1 of 3"):
        pipe("a cat", **SIZE, callback_on_step_end=lambda *_: spoilt)
    torch.nn.init.constant_(pipe.vae.mix.bias, float("nan"))
    with pytest.raises(FloatingPointError, match="the VAE gave frames that are not finite"):
        pipe("a bird", **SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 40}, "height=40 must be a multiple of 16: take 32 or 48"),
        ({"width": 3}, "width=3 must be a multiple of 16: take 16"),
        ({"num_frames": 10}, r"num_frames=10 must be 8n \+ 1: take 9 or 17"),
        ({"num_frames": 0}, r"num_frames=0 must be 8n \+ 1: take 1$"),
        ({"height": 8, "num_frames": 8}, r"height=8 .*take 16; num_frames=8 .*: take 1 or 9"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number, got nan"),
        ({"guidance_rescale": 2.0}, r"guidance_rescale must be in \[0, 1\], got 2.0"),
        ({"output_type": "gif"}, "output_type must be one of np, pil, pt, uint8, latent, got 'gi"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be an int >= 1, got 0"),
        ({"num_videos_per_prompt": 2, "generator": [generator()]}, "each of 2 videos, got a list"),
        ({"attention_kwargs": {"scale": 2}}, r"\{'scale': 2\} weighs adapters, and there are none"),
        ({"prompt_embeds": torch.zeros(1, 4, 24)}, "either prompt or prompt_embeds, not both"),
        ({"pooled_prompt_embeds": torch.zeros(1, 20)}, "go with tensors .* in prompt_embeds"),
        ({"num_inference_steps": 0}, "steps"),
        ({"schedule": "cosine"}, "schedule"),
        ({"prompt": None}, "give either prompt or prompt_embeds"),
        ({"negative_prompt": ["a", "b", "c"]}, "one negative prompt or one for each of 1 prompts"),
        ({"generator": []}, "a list with one for each of 1 videos, got a list of 0"),
        ({"prompt": ["a", "b"], "generator": [generator()]}, "each of 2 videos, got a list of 1"),
        ({"generator": [generator()] * 2}, "each of 1 videos, got a list of 2"),
        ({"prompt": "a \ud800 cat"}, r"prompt 'a \\ud800 cat' holds U\+D800, which is no char"),
        ({"negative_prompt": "\udcff"}, r"holds U\+DCFF, which is no character"),
        ({"prompt": "\udcff", "clean_caption": False}, r"holds U\+DCFF, which is no character"),
        ({"latents": torch.zeros(1, 4, 2, 4, 4)}, r"latents must be \[1, 4, 2, 4, 6\] for 1"),
        ({"callback_on_step_end_tensor_inputs": ["text"]}, r"has \['text'\]; choose from"),
    ],
)
def test_arguments_that_make_no_sense(pipe, change, message):
    pipe.transformer.forward = None  # nothing runs before the arguments are right
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a cat", **SIZE, **change})


def test_both_prompts_are_cleaned_or_neither(pipe, monkeypatch):
    asked, real = [], pipe.text.encode

    def encode(prompt, **options):
        asked.append((prompt, options))
        return real(prompt, **options)

    monkeypatch.setattr(pipe.text, "encode", encode)
    for clean in (True, False):
        pipe("A Cat", negative_prompt="A Dog", clean_caption=clean, **SIZE)
        assert asked == [
            ("A Cat", {"template": TEMPLATE, "clean_caption": clean, "max_sequence_length": 512}),
            ("A Dog", {"clean_caption": clean, "max_sequence_length": 512}),
        ]
        asked.clear()


def sample(saved, *arguments):
    sizes = ["--height", "32", "--width", "48", "--steps", "2", "--device", "cpu"]
    return main(["sample", "--model", str(saved), *sizes, *map(str, arguments)])


def test_sample_writes_a_video_and_its_record(saved, pipe, tmp_path):
    out = tmp_path / "new" / "x.mp4"
    asked = ["--frames", 9, "--seed", 5, "--guidance", 3, "--crf", 0]
    assert sample(saved, "--prompt", "A Cat", "--out", out, *asked) == 0
    info = probe(out)
    assert (info.width, info.height, info.frames, info.fps) == (48, 32, 9, 24)
    record = json.loads(out.with_suffix(".json").read_text())
    config = (saved / "transformer" / "config.json").read_bytes()
    assert record["prompt"] == "A Cat"
    assert record["seed"] == 5
    assert record["config_sha256"] == hashlib.sha256(config).hexdigest()
    assert record["dtype"] == "float32"
    assert sorted(p.name for p in out.parent.iterdir()) == ["x.json", "x.mp4"]
    settings = {
        name: record[name]
        for name in (
            "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
            "guidance_rescale", "shift", "schedule", "template", "negative_prompt",
        )
    }  # fmt: skip
    noise = generator(record["seed"])
    frames = pipe(record["prompt"], generator=noise, **settings, **UINT8).frames[0]
    writer.write_video(tmp_path / "again.mp4", frames, crf=record["crf"])
    assert (tmp_path / "again.mp4").read_bytes() == out.read_bytes()


@pytest.fixture
def streaming(pipe, tmp_path):
    """A folder whose autoencoder decodes in pieces."""
    pipe.vae = WFVAE(**WFVAE.presets["tiny"] | {"latent_channels": 4})
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_sample_holds_no_whole_video(streaming, tmp_path, monkeypatch):
    """Frames are written as they are decoded; the record when all are sound."""
    events = []

    class Frames:
        @staticmethod
        def from_ndarray(*arguments, real=writer.VideoFrame.from_ndarray, **options):
            events.append("frame")
            return real(*arguments, **options)

    def noted(*arguments, real=by_command.write_json):
        events.append("record")
        real(*arguments)

    def pieces(*arguments, real=SUVPipeline._pieces):
        for piece in real(*arguments):
            events.append("piece")
            yield piece

    monkeypatch.setattr(writer, "VideoFrame", Frames)
    monkeypatch.setattr(by_command, "write_json", noted)
    monkeypatch.setattr(SUVPipeline, "_pieces", pieces)
    out = tmp_path / "x.mp4"
    assert sample(streaming, "--prompt", "a cat", "--out", out, "--frames", 17) == 0
    groups = [(what, len(list(group))) for what, group in itertools.groupby(events)]
    assert sum(length for what, length in groups if what == "frame") == 17
    assert [what for what, _ in groups] == ["piece", "frame"] * events.count("piece") + ["record"]
    assert events.count("piece") == 3


def test_a_video_that_fails_at_its_end_leaves_nothing(streaming, tmp_path, monkeypatch, capsys):
    def fails(*arguments, real=SUVPipeline._pieces):
        yield next(real(*arguments))
        raise FloatingPointError("the VAE gave frames that are not finite")

    monkeypatch.setattr(SUVPipeline, "_pieces", fails)
    assert sample(streaming, "--prompt", "a cat", "--out", tmp_path / "x.mp4", "--frames", 17) == 1
    assert "frames that are not finite" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_sample_writes_a_picture(saved, pipe, tmp_path):
    import av

    out = tmp_path / "x.png"
    assert sample(saved, "--prompt", "a cat", "--out", out, "--frames", 1, "--guidance", 1) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    assert "negative_prompt" not in record
    with av.open(str(out)) as container:
        picture = next(container.decode(video=0)).to_ndarray(format="rgb24")
    asked = {**SIZE, **UINT8, "num_frames": 1, "num_inference_steps": 2, "guidance_scale": 1.0}
    frames = pipe("a cat", **asked, generator=generator()).frames
    assert (picture == frames[0, 0].numpy()).all()


def test_sample_takes_a_file_of_prompts(saved, tmp_path):
    (tmp_path / "p.txt").write_text("a cat\n\na dog\n")
    out = tmp_path / "out"
    assert sample(saved, "--prompts", tmp_path / "p.txt", "--out", out, "--frames", 1) == 0
    names = ["00000.json", "00000.png", "00001.json", "00001.png"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert json.loads((out / "00001.json").read_text())["prompt"] == "a dog"


def test_sample_lays_out_vbench(saved, tmp_path, capsys, monkeypatch):
    prompts, folder = ["A cat runs.", "a dog: 100% \u00fc"], tmp_path / "videos"
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    asked = ["--prompts", tmp_path / "p.txt", "--vbench", folder, "--samples", 2, "--frames", 9]
    assert sample(saved, *asked, "--list") == 0
    names = [f"{prompt}-{i}.mp4" for prompt in prompts for i in (0, 1)]
    assert capsys.readouterr().out.splitlines()[1:] == names
    assert not folder.exists()

    assert sample(saved, *asked, "--seed", 7) == 0
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)  # videos, nothing else
    records = [json.loads(vbench.sidecar(folder, name).read_text()) for name in names]
    assert [(r["prompt"], r["seed"]) for r in records] == [(p, s) for p in prompts for s in (7, 8)]
    assert (folder / names[0]).read_bytes() != (folder / names[1]).read_bytes()

    times = {name: (folder / name).stat().st_mtime_ns for name in names}
    (folder / names[2]).unlink()
    capsys.readouterr()
    assert sample(saved, *asked, "--seed", 7) == 0  # goes on where it was stopped
    assert "1 of 4 videos missing" in capsys.readouterr().out
    again = {name: (folder / name).stat().st_mtime_ns for name in names}
    assert [name for name in names if again[name] != times[name]] == [names[2]]
    assert sample(saved, *asked, "--seed", 7, "--shift", 5) == 2  # and mixes nothing
    assert "made with other settings" in capsys.readouterr().err


def test_sample_writes_nothing_that_is_not_finite(saved, tmp_path, capsys, monkeypatch):
    real = SUVPipeline.from_pretrained.__func__

    def spoilt(cls, path, **kwargs):
        pipeline = real(cls, path, **kwargs)
        torch.nn.init.constant_(pipeline.transformer.proj_out.bias, float("nan"))
        return pipeline

    monkeypatch.setattr(SUVPipeline, "from_pretrained", classmethod(spoilt))
    out = tmp_path / "x.mp4"
    assert sample(saved, "--prompt", "a cat", "--out", out, "--frames", 9) == 1
    assert "latents are not finite after step 1 of 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x.png", "--frames", "9"], "--out x.png: --frames 9 makes a .mp4"),
        (["--out", "x.mp4", "--frames", "1"], "--out x.mp4: --frames 1 makes a .png"),
        (["--frames", "10"], "num_frames=10 must be 8n + 1: take 9 or 17"),
        (["--height", "33"], "height=33 must be a multiple of 16: take 32 or 48"),
        (["--hif8"], "--hif8: it is known of a Wan alone; leave it out"),
        (["--negative", "x", "--guidance", "1"], "--negative does nothing at --guidance 1"),
        (["--crf", "60"], "crf must be from 0 to 51, got 60"),
        (["--fps", "0"], "fps must be above 0"),
        (["--samples", "3"], "--samples and --list go with --vbench DIR"),
        (["--list"], "--samples and --list go with --vbench DIR"),
        (["--vbench", "v", "--out", "x.mp4"], "--vbench DIR is for videos"),
        (["--vbench", "v", "--frames", "1"], "--vbench DIR is for videos"),
        (["--vbench", "v", "--samples", "0"], "samples must be at least 1, got 0"),
        (["--model", "nowhere"], "--model nowhere: nowhere/model_index.json is not there; give"),
        (["--offload"], "--offload moves models off a GPU"),
        (["--dtype", "int8"], "--dtype int8: give float32"),
        (["--device", "mps"], "--device mps: models run on cpu and cuda alone"),
        (["--device", "gpu"], "--device gpu: give cpu, cuda or cuda:1"),
        (["--device", ""], "--device : give cpu, cuda or cuda:1"),
        (["--seed", "-1"], "--seed -1: give a number from 0"),
        (["--seed", str(2**63)], "give a number from 0, below 2**63"),
        (["--negative", "\udcff"], "holds U+DCFF, which is no character"),
    ],
)
def test_sample_refuses(saved, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert sample(saved, "--prompt", "a cat", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--prompt", "--prompts", "--negative"])
@pytest.mark.parametrize("prompt", ["\udcff", "a \ud83d cat"])
def test_sample_refuses_half_characters_before_it_loads(
    saved, tmp_path, capsys, monkeypatch, option, prompt
):
    def never(*arguments, **options):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(SUVPipeline, "from_pretrained", never)
    monkeypatch.setattr(vbench, "read_prompts", lambda file: [prompt])
    given = [] if option != "--negative" else ["--prompt", "a cat"]
    out = tmp_path / "x.mp4"
    assert sample(saved, *given, option, prompt, "--out", out, "--frames", 9) == 2
    assert "is no character" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sample_knows_before_the_work_that_it_cannot_write(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "side.json").mkdir()
    (tmp_path / "p.txt").write_text("a cat\na dog")

    def never(*arguments, **options):
        raise AssertionError("loaded the models")

    monkeypatch.setattr(SUVPipeline, "from_pretrained", never)
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in (
        (["--out", "file/x.mp4"], "file/x.mp4 cannot be written: {folder}/file is a file"),
        (["--out", "folder.mp4"], "folder.mp4 cannot be written: it is a folder"),
        (["--out", "side.mp4"], "side.json cannot be written: it is a folder"),
        (["--out", "x" * 300 + ".mp4"], "cannot be written: File name too long"),
        (["--vbench", "file"], "--vbench file is a file; give a folder"),
    ):
        prompt = ["--prompts", "p.txt"] if "--vbench" in arguments else ["--prompt", "a cat"]
        assert sample(saved, *prompt, *arguments, "--frames", 9) == 2
        assert message.format(folder=tmp_path) in capsys.readouterr().err
    assert sample(saved, "--prompts", "p.txt", "--out", "file", "--frames", 9) == 2
    assert "00000.mp4 cannot be written: " in capsys.readouterr().err

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert sample(saved, "--prompt", "a cat", "--out", "x.mp4", "--frames", 9) == 2
    assert "x.mp4 cannot be written: No space left on device" in capsys.readouterr().err
    left = sorted(path for path in tmp_path.rglob("*") if "sidecars" not in path.name)
    assert left == before


def test_latents_of_other_channels_are_refused_before_any_work(pipe):
    pipe.vae = TinyVAE(latent_channels=8)
    pipe.transformer.forward = None
    with pytest.raises(ValueError, match=r"latents of 4 channels and the vae decodes 8; give"):
        pipe("a cat", **SIZE)


def test_vbench_names():
    assert vbench.file_name("A 1800s house.", 4) == "A 1800s house.-4.mp4"
    assert vbench.file_names(["a", "b"]) == [f"{p}-{i}.mp4" for p in "ab" for i in range(5)]
    for bad in ("this/that", "x\0y"):
        with pytest.raises(ValueError, match=r"cannot name a file; .*custom_input"):
            vbench.file_name(bad, 0)
    longest = "\u00fc" * 124  # 248 bytes, and "-0.mp4"
    assert len(vbench.file_name(longest, 0).encode()) == 254
    with pytest.raises(ValueError, match="a file name of 255 bytes, over 254"):
        vbench.file_name(longest + "x", 0)
    side = vbench.sidecar("some/videos", vbench.file_name(longest, 0))
    assert side.parent.name == "videos-sidecars"
    assert len(side.name.encode()) == 255


def test_vbench_finds_what_is_missing(tmp_path):
    assert vbench.missing(tmp_path / "none", ["a"], samples=2) == ["a-0.mp4", "a-1.mp4"]
    (tmp_path / "a-0.mp4").write_bytes(b"x")
    (tmp_path / "a-1.mp4").write_bytes(b"")
    (tmp_path / ".1234.tmp").write_bytes(b"x")
    assert vbench.missing(tmp_path, ["a"], samples=2) == ["a-1.mp4"]
    assert vbench.strays(tmp_path, ["a"], samples=2) == [".1234.tmp"]


def test_prompt_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("a cat. \r\n\r\nna\u00efve\u2028x\na cat. \n".encode())
    assert vbench.read_prompts(path) == ["a cat. ", "na\u00efve\u2028x"]
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="no prompt in"):
        vbench.read_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_of_the_encoding_is_no_part_of_a_prompt(tmp_path, encoding):
    """Nor of the file that VBench looks for; it may stand anywhere, in files that were joined."""
    path = tmp_path / "prompts.txt"
    path.write_bytes("ein Kätzchen\r\n\ufeffa dog\n".encode(encoding))
    assert vbench.read_prompts(path) == ["ein Kätzchen", "a dog"]
    path.write_bytes("a cat".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"is not UTF-8: .*NUL in it; is it UTF-16.*convert it"):
        vbench.read_prompts(path)


@pytest.mark.full
def test_processes_that_share_tokens_make_the_same_videos(tmp_path):
    """Four: two groups of two, each with its own videos, of an SUV with a WF-VAE."""
    torch.manual_seed(1)
    names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    parts = dict(zip(names, tiny_encoders(), strict=True))
    model = SUV(**SUV.presets["tiny"])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = WFVAE(
        base_channels=8, latent_channels=4, encoder_energy_channels=4, decoder_energy_channels=4,
        encoder_res_blocks=1, decoder_res_blocks=1,
    )  # fmt: skip
    SUVPipeline(model.eval(), vae.eval(), **parts).save_pretrained(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nrain\na dog\n")
    words = ["sample", "--model", tmp_path / "model", "--height", 32, "--width", 48, "--frames", 9,
             "--steps", 2, "--device", "cpu", "--prompts", prompts, "--crf", 0]  # fmt: skip
    assert main([*map(str, words), "--out", str(tmp_path / "one")]) == 0
    done = together(4, "counting.py", *words, "--out", tmp_path / "two", "--context-parallel", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^sent \d [1-9]", done.stdout, re.MULTILINE)) == 4, done.stdout
    same(tmp_path / "one", tmp_path / "two", number=3)
