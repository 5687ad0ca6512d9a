"""From clips to a video of an image: recipes, caches, averages, LoRA, export and pipelines."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("jsonargparse")
pytest.importorskip("peft")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")
pytest.importorskip("transformers")

import test_train as of_suv
import test_wan as of_wan
from test_features import same

from skiparse import cli
from skiparse.models import flow
from skiparse.models.data import cache
from skiparse.models.data.dataset import Clip
from skiparse.models.data.draws import Place
from skiparse.models.data.features import collate
from skiparse.models.data.image import read_image
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import Manifest
from skiparse.models.data.video import probe
from skiparse.models.image_wan import ImageWan, ImageWanPipeline
from skiparse.models.images import Images, KnownFrames, coded
from skiparse.models.pipeline import NEGATIVE_PROMPT, TEMPLATE, SUVPipeline
from skiparse.models.retrofit import Retrofit, retrofit
from skiparse.models.suv import encoders as suv_encoders
from skiparse.models.suv.model import SUV
from skiparse.models.suv.recipe import SUVRecipe
from skiparse.models.train.config import Lora, Samples
from skiparse.models.train.core import train
from skiparse.models.train.export import export
from skiparse.models.train.lora import beside
from skiparse.models.train.samples import make_samples
from skiparse.models.wan import encoders as wan_encoders
from skiparse.models.wan.recipe import Sparse, WanRecipe

FLASH = Images(kinds={"first": 0.5, "ends": 0.5})
MASK = Images(paradigm="mask", kinds={"none": 0.1, "first": 0.3, "ends": 0.2, "start": 0.2,
                                      "some": 0.1, "all": 0.1})  # fmt: skip
LONG = pytest.mark.full  # each paradigm and each model is in another of the tests
source, init, wan_source = of_suv.source, of_wan.init, of_wan.source
SIZE = of_suv.SIZE  # 32 x 48


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A folder with a tiny SUV of text alone."""
    folder = tmp_path_factory.mktemp("init")
    torch.manual_seed(4)
    SUV(**SUV.presets["tiny"] | {"num_layers": (1,) * 5, "num_heads": 1}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """An image file, larger than the videos are."""
    path = tmp_path_factory.mktemp("picture") / "first.png"
    noise = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (64, 96, 3), dtype=torch.uint8, generator=noise)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def suv_config(source, out, text_model, steps=2, **changes):
    stage = dataclasses.replace(
        of_suv.stages()["video"], steps=steps, rule=of_suv.rule(9, minority=1), global_batch=2
    )
    given = {"init": str(text_model), "stages": {"video": stage}, "save_every": 100}
    return of_suv.config(source, out, **given | changes)


def wan_config(init, source, out, **changes):
    given = {"stages": of_wan.stages(Sparse(ratio=2))}
    return of_wan.config(init, source, out, **given | changes)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def moving(frames, seed=0):
    noise = torch.Generator().manual_seed(seed)
    shape = (frames, *SIZE, 3)
    return Clip(
        torch.randint(256, shape, dtype=torch.uint8, generator=noise), ("a",), "k", Place(0, 0, 0)
    )


@pytest.mark.parametrize("kind", ["suv", "wan"])
def test_a_clip_s_first_latent_is_that_of_its_first_frame(source, init, kind):
    """So features have what a pipeline makes of an image; the last frame is coded by itself."""
    if kind == "suv":
        coder = suv_encoders.Encoders.from_pretrained(source / "vae", source / "text", last=True)
        vae, clip = coder.vae, moving(9)
    else:
        coder = wan_encoders.Encoders.from_pretrained(init, last=True)
        vae, clip = coder.pipeline.vae, moving(5)
    found = coder.features(clip)
    first, last = (coded(vae, clip.frames[i : i + 1 or None])[0] for i in (0, -1))
    scale = found.mean.abs().max().item()
    torch.testing.assert_close(found.mean[:, :1], first, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(found.last, last, rtol=0, atol=1e-5 * scale)
    assert (found.last - found.mean[:, -1:]).abs().max() > 0.1 * scale
    batch = collate([found] * 2, seed=0, drop=0.0, images=Images(kinds={"ends": 1.0}))
    assert torch.equal(batch.images.latents[0][:, :1], found.mean[:, :1])
    assert torch.equal(batch.images.latents[1][:, -1:], found.last)
    assert "last" in coder.fingerprints()
    assert collate([found], seed=0, drop=0.0).images is None


@pytest.fixture(scope="module")
def of_text(source, text_model, tmp_path_factory):
    """A run without images."""
    out = tmp_path_factory.mktemp("text")
    train(suv_config(source, out, text_model))
    return out


@pytest.mark.parametrize("images", [FLASH, pytest.param(MASK, marks=LONG)], ids=["flash", "mask"])
def test_an_suv_of_text_learns_images(source, text_model, of_text, tmp_path, images, picture):
    """Its first loss is that of the run of text, to the bit; it goes on, and makes a video."""
    train(suv_config(source, tmp_path / "whole", text_model, images=images))
    text, told = losses(of_text), losses(tmp_path / "whole")
    assert text[0] == told[0]
    assert text[1] != told[1]
    train(suv_config(source, tmp_path / "parts", text_model, images=images, steps=1))
    samples = Samples(
        every=2, prompts=("stripes",), images=(str(picture),), shape=(9, *SIZE), steps=1
    )
    train(suv_config(source, tmp_path / "parts", text_model, images=images, samples=samples))
    of_suv.assert_same(tmp_path / "whole", tmp_path / "parts")
    made = probe(tmp_path / "parts" / "samples" / "step-00000002-0.mp4")
    assert (made.frames, made.height, made.width) == (9, *SIZE)
    tensors = of_suv.tensors(tmp_path / "whole")
    moved = {x for x in tensors if x.startswith("ema.guide") and tensors[x].any()}
    assert moved == {x for x in tensors if x.startswith("ema.guide")}
    with pytest.raises(ValueError, match="trained with other settings: images"):
        train(suv_config(source, tmp_path / "parts", text_model, steps=3))

    export(tmp_path / "whole", tmp_path / "made", vae=source / "vae", text=source / "text")
    pipe = SUVPipeline.from_pretrained(tmp_path / "made")
    assert pipe.transformer.config.images == images.paradigm
    for name, x in pipe.transformer.state_dict().items():
        assert torch.equal(x, tensors[f"ema.{name}"]), name
    with pytest.raises(ValueError, match="the model is told of images by"):
        train(suv_config(source, tmp_path / "no", tmp_path / "made"))
    other = dataclasses.replace(images, paradigm="mask", kinds={"first": 1.0})
    if images.paradigm == "flash":
        with pytest.raises(ValueError, match=r"by flash, but images.paradigm is mask; set it to"):
            train(suv_config(source, tmp_path / "no", tmp_path / "made", images=other))


@torch.no_grad()
def test_the_pipeline_of_an_suv(source, text_model):
    """``image=`` is what the formulas make of it; guidance has the image in both branches."""
    coder = suv_encoders.Encoders.from_pretrained(source / "vae", source / "text")
    model = SUV.from_pretrained(text_model)
    model.take_images("flash")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    text = coder.text
    pipe = SUVPipeline(
        model.eval(), coder.vae, text.tokenizer, text.encoder, text.tokenizer_2, text.encoder_2
    )
    pipe.set_progress_bar_config(disable=True)
    first, last = moving(9).frames[0], moving(9).frames[-1]
    asked = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2,
             "output_type": "latent"}  # fmt: skip
    noise = torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(1))

    def sample(prompt="a cat", **given):
        return pipe(prompt, **asked | {"latents": noise} | given).frames

    found = sample(image=first, last_image=Image.fromarray(last.numpy()), guidance_scale=3.0)
    ends = torch.cat([coded(coder.vae, x[None]) for x in (first, last)], 2)
    images = KnownFrames(ends, torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.1]))
    x = noise
    words = [pipe.text.encode(NEGATIVE_PROMPT), pipe.text.encode(TEMPLATE.format(prompt="a cat"))]
    sigmas = flow.inference_sigmas(2)
    for sigma, after in itertools.pairwise(sigmas):
        both = [
            model(x, 1000 * sigma[None], e.text, e.pooled, text_mask=e.text_mask, images=images)
            for e in words
        ]
        x = flow.euler_step(x, flow.guide(*both, scale=3.0, rescale=0.7), sigma, after)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4 * x.abs().max().item())
    again = sample(
        image=first, last_image=last, guidance_scale=3.0,
        callback_on_step_end=lambda pipe, step, timestep, given: given,
    )  # fmt: skip
    assert torch.equal(again, found)
    alone = sample(guidance_scale=3.0)
    assert (alone - found).abs().max() > 0.01 * x.abs().max()
    one, two = (sample(image=first, guidance_scale=3.0, sequential_cfg=way) for way in (0, 1))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4 * one.abs().max().item())
    several = sample(["a", "b"], image=[first, last], latents=torch.cat([noise, noise]),
                     guidance_scale=3.0)  # fmt: skip
    wanted = sample("b", image=last, guidance_scale=3.0)[0]
    torch.testing.assert_close(several[1], wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
    assert sample(image=first, output_type="uint8").shape == (1, 9, 32, 48, 3)

    with pytest.raises(ValueError, match="image is 31x48, but the video 32x48"):
        sample(image=first[1:])
    with pytest.raises(ValueError, match="last_image goes with image"):
        sample(last_image=first)
    pipe.transformer = SUV.from_pretrained(text_model)
    with pytest.raises(ValueError, match="image: this transformer is told of text alone"):
        sample(image=first)


def test_samples_get_the_image_of_their_prompt(picture, tmp_path):
    """Cut and scaled to the size of the video; none where there are none."""
    given = []

    def pipeline(prompt, **told):
        given.append((prompt, told.get("image")))
        return SimpleNamespace(frames=torch.zeros(1, 1, 3, *SIZE))

    pipeline.set_progress_bar_config = lambda disable: None
    other = tmp_path / "other.png"
    Image.new("RGB", (96, 64), (9, 8, 7)).save(other)
    files = (str(other), str(picture))
    for images in (files, ()):
        samples = Samples(every=1, prompts=("a", "b"), images=images, shape=(1, *SIZE))
        config = SimpleNamespace(samples=samples, out=tmp_path, seed=0, limits=Limits())
        make_samples(config, None, 1, pipeline)
    assert [prompt for prompt, _ in given] == ["a", "b"] * 2
    for (_, found), file in zip(given, files, strict=False):
        assert torch.equal(found, read_image(file, size=SIZE)[0])
    assert [image for _, image in given[2:]] == [None, None]


def test_new_weights_follow_the_seed_of_the_run(source, text_model, init, wan_source, tmp_path):
    """From weights of text, alone or with a LoRA beside them."""
    given = {"images": FLASH, "seed": 5}
    config = suv_config(source, tmp_path, text_model, **given)
    wanted = SUV.from_pretrained(text_model)
    wanted.take_images("flash", seed=5)
    models = [
        SUVRecipe().initial(config, config.stages["video"]),
        beside(SUVRecipe(), str(text_model), Lora(rank=2), 5, FLASH),
    ]
    for model in models:
        assert torch.equal(model.guide.shift[0].weight, wanted.guide.shift[0].weight)
    config = wan_config(init, wan_source, tmp_path, **given)
    told = WanRecipe().initial(config, None)
    wanted = ImageWan.of(of_wan.tiny_transformer(), "flash", seed=5)
    assert torch.equal(told.guide.shift[0].weight, wanted.guide.shift[0].weight)


HOW = [{"parallel": "ddp"}, {"parallel": "fsdp"}, {"context_parallel": 2}]


def assert_equals_one(one, two, launched):
    """Losses and norms of a run by one process and by two; guides have learnt, and are told."""
    train(one)
    of_wan.launch(2, of_wan.as_yaml(launched, two), shared=two.context_parallel > 1)
    ours, theirs = of_suv.rows(one.out), of_suv.rows(two.out)
    assert len(ours) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)
    found, wanted = (of_suv.tensors(x.out) for x in (two, one))
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in wanted.items()}
    told = ("model.guide", "model.patch_embedding.beside")
    guides = {name for name in wanted if name.startswith(told)}
    assert guides
    for name in guides:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("how", HOW, ids=str)
def test_two_processes_equal_one(source, text_model, tmp_path, how):
    """An SUV; each process draws what is known of its samples, and of shared ones the same."""
    one, two = (
        suv_config(source, tmp_path / out, text_model, steps=3, images=FLASH, **more)
        for out, more in (("one", {}), ("two", how))
    )
    assert_equals_one(one, two, tmp_path / "two.yaml")


@pytest.mark.full
@pytest.mark.parametrize("how", HOW[1:], ids=str)
@pytest.mark.parametrize("images", [FLASH, MASK], ids=["flash", "mask"])
def test_two_processes_with_a_wan_equal_one(init, wan_source, tmp_path, images, how):
    """Retrofitted, as tokens are shared."""
    stages = of_wan.stages(Sparse(ratio=2), steps=3)
    one, two = (
        wan_config(init, wan_source, tmp_path / out, images=images, stages=stages, **more)
        for out, more in (("one", {}), ("two", how))
    )
    assert_equals_one(one, two, tmp_path / "two.yaml")


def test_images_come_from_a_cache(source, text_model, tmp_path, capsys):
    """With last frames, bit for bit what training from the clips is; without them it is told."""
    online = suv_config(source, tmp_path / "online", text_model, images=FLASH)
    train(online)
    manifest = Manifest.open(source / "clips", index=tmp_path / "index")
    rule = online.stages["video"].rule
    for name, last in (("ends", True), ("first", False)):
        coder = suv_encoders.Encoders.from_pretrained(source / "vae", source / "text", last=last)
        cache.build(tmp_path / name, manifest, rule, coder)
        assert not cache.verify(tmp_path / name)
    clip, place = cache.Cache(tmp_path / "ends"), Place(0, 0, 1)
    assert clip[place].last.shape == (4, 1, 4, 6)
    assert cache.Cache(tmp_path / "first")[place].last is None
    held = dataclasses.replace(
        online, out=str(tmp_path / "held"), cache=str(tmp_path / "ends"), source=None
    )
    train(dataclasses.replace(held, vae=None, text=None))
    of_suv.assert_same(tmp_path / "online", tmp_path / "held")
    with pytest.raises(ValueError, match=r"first has no last frames, which images.kinds with ends"):
        train(dataclasses.replace(held, cache=str(tmp_path / "first"), vae=None, text=None))
    plain = suv_encoders.Encoders.from_pretrained(source / "vae", source / "text")
    more, less = (cache.Cache(tmp_path / x, plain.fingerprints()) for x in ("ends", "first"))
    assert same(dataclasses.replace(more[place], last=None), less[place])
    shard = next((tmp_path / "ends" / "shards").iterdir())
    spoilt, found = bytearray(shard.read_bytes()), clip[place]
    spoilt[spoilt.index(found.last.numpy().tobytes())] ^= 1
    shard.write_bytes(spoilt)
    assert [damage.keys for damage in cache.verify(tmp_path / "ends")] == [(found.key,)]


def test_a_lora_beside_images(source, text_model, tmp_path):
    """What tells of images is trained whole beside it, from text; and stays where it was there."""
    given = {"images": FLASH, "lora": Lora(rank=2)}
    train(suv_config(source, tmp_path / "whole", text_model, **given))
    train(suv_config(source, tmp_path / "parts", text_model, steps=1, **given))
    train(suv_config(source, tmp_path / "parts", text_model, **given))
    of_suv.assert_same(tmp_path / "whole", tmp_path / "parts")
    tensors = of_suv.tensors(tmp_path / "whole")
    learnt = {name for name in tensors if name.startswith("model.")}
    assert {name for name in learnt if "lora_" not in name} == {
        name for name in learnt if name.startswith("model.guide")
    }
    encoders = {"vae": source / "vae", "text": source / "text"}
    export(tmp_path / "whole", tmp_path / "made", **encoders)
    made = SUV.from_pretrained(tmp_path / "made" / "transformer")
    for name, x in made.state_dict().items():
        if name.startswith("guide"):
            assert torch.equal(x, tensors[f"ema.{name}"]), name
            assert x.any(), name
    with pytest.raises(ValueError, match=r"lora=apart: .* weights that are of no LoRA, for images"):
        export(tmp_path / "whole", tmp_path / "apart", lora="apart")
    assert not (tmp_path / "apart").exists()
    train(suv_config(source, tmp_path / "again", tmp_path / "made", steps=1, **given))
    assert all("lora_" in name for name in of_suv.tensors(tmp_path / "again"))
    export(tmp_path / "again", tmp_path / "apart", lora="apart")


@pytest.mark.parametrize("images", [pytest.param(FLASH, marks=LONG), MASK], ids=["flash", "mask"])
def test_a_sparse_wan_of_text_learns_images(init, wan_source, tmp_path, images, picture):
    """The same, retrofitted; from the folder of a WanPipeline to a video by the shell."""
    out = tmp_path / "whole"
    train(wan_config(init, wan_source, tmp_path / "text"))
    train(wan_config(init, wan_source, out, images=images))
    text, told = losses(tmp_path / "text"), losses(out)
    assert text[0] == told[0]
    assert text[1] != told[1]
    one = of_wan.stages(Sparse(ratio=2), steps=1)
    train(wan_config(init, wan_source, tmp_path / "parts", images=images, stages=one))
    samples = Samples(every=2, prompts=("a",), images=(str(picture),), shape=(5, 32, 32), steps=1)
    train(wan_config(init, wan_source, tmp_path / "parts", images=images, samples=samples))
    ours, theirs = (of_wan.last(x).read("") for x in (out, tmp_path / "parts"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name
    assert probe(tmp_path / "parts" / "samples" / "step-00000002-0.mp4").frames == 5

    export(out, tmp_path / "made", vae=init)
    pipe = ImageWanPipeline.from_pretrained(tmp_path / "made")
    assert isinstance(pipe.transformer, ImageWan)
    for name, x in pipe.transformer.state_dict().items():
        assert torch.equal(x, ours[f"ema.{name}"]), name
    retrofit(pipe)
    assert Retrofit.of(pipe.transformer).sparsity.ratio == 2
    shell = ["sample", "--model", tmp_path / "made", "--prompt", "a", "--height", 32, "--width", 32,
             "--frames", 5, "--steps", 1, "--device", "cpu", "--out"]  # fmt: skip
    shell = [str(x) for x in shell]
    assert cli.main([*shell, str(tmp_path / "a.mp4"), "--image", str(picture)]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert len(record["image"]) == 64
    assert "last_image" not in record
    assert probe(tmp_path / "a.mp4").frames == 5

    train(
        wan_config(tmp_path / "made", wan_source, tmp_path / "on", images=images, lora=Lora(rank=2))
    )
    assert all("lora_" in name for name in of_wan.last(tmp_path / "on").read("model."))
    with pytest.raises(ValueError, match=r"the model is told of images by .*, but images.paradigm"):
        train(wan_config(tmp_path / "made", wan_source, tmp_path / "no"))


@torch.no_grad()
def test_the_pipeline_of_a_wan(init):
    """A WanPipeline around a transformer that is told of images at every step."""
    told = ImageWan.of(of_wan.tiny_transformer(), "flash")
    for parameter in told.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    pipe = ImageWanPipeline(**of_wan.tiny_pipeline(transformer=told.eval()).components)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    image = moving(1).frames[0, :, :32]
    asked = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2,
             "output_type": "latent", "latents": noise, "guidance_scale": 2.0}  # fmt: skip
    found = pipe("a cat", image=image, **asked).frames
    first = coded(pipe.vae, image[None])
    images = KnownFrames(
        torch.cat([first, 0 * first], 2), torch.tensor([[True, False]]), torch.tensor([0.1])
    )
    words = pipe.encode_prompt("a cat", negative_prompt="", max_sequence_length=512)
    pipe.scheduler.set_timesteps(2)
    x = noise
    levels = itertools.pairwise(pipe.scheduler.sigmas)
    for t, (sigma, after) in zip(pipe.scheduler.timesteps, levels, strict=True):
        cond, uncond = (told(x, t[None], e, return_dict=False, images=images)[0] for e in words)
        x = x + (after - sigma) * (uncond + 2.0 * (cond - uncond))
    torch.testing.assert_close(found, x, rtol=0, atol=1e-4 * x.abs().max().item())
    assert (pipe("a cat", **asked).frames - found).abs().max() > 0.01 * x.abs().max()
    both = asked | {"latents": torch.cat([noise, noise])}
    several = pipe(["a dog", "a cat"], image=[image.flip(0), image], **both).frames
    torch.testing.assert_close(several[1:], found, rtol=0, atol=1e-4 * x.abs().max().item())

    with pytest.raises(ValueError, match="image is 32x48, but the video 32x32"):
        pipe("a cat", image=moving(1).frames[0], **asked)
    with pytest.raises(ValueError, match=r"num_frames=6 must be 4n \+ 1"):
        pipe("a cat", image=image, **asked | {"num_frames": 6})
    pipe.transformer = of_wan.tiny_transformer()
    with pytest.raises(ValueError, match="image: the transformer has to be one ImageWan"):
        pipe("a cat", image=image, **asked)
    with pytest.raises(ValueError, match="a Wan that takes images by itself, with image_dim=8"):
        ImageWan(**dict(of_wan.tiny_transformer(image_dim=8, added_kv_proj_dim=24).config))


def test_what_cannot_work_is_said_at_once(source, text_model, init, tmp_path, picture, capsys):
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 40)).save(small)
    with pytest.raises(
        ValueError, match=r"samples.images has 1 files for 2 prompts; give one each"
    ):
        Samples(every=1, prompts=("a", "b"), images=("x.png",))
    told = Samples(every=1, prompts=("a",), images=(str(small),), shape=(9, *SIZE))
    with pytest.raises(ValueError, match=r"samples.images is for a model that takes them"):
        suv_config(source, tmp_path / "no", text_model, samples=told)
    with pytest.raises(ValueError, match=r"small.png"):
        train(suv_config(source, tmp_path / "no", text_model, samples=told, images=FLASH))
    with pytest.raises(ValueError, match=r"model.images is set by images.paradigm; leave it out"):
        of_suv.config(source, tmp_path / "no", model={"images": "flash"})
    given = ["sample", "--model", str(init), "--prompt", "a", "--device", "cpu"]
    for arguments, message in (
        (["--image", str(picture)], "told of text alone; train one"),
        (["--last-image", str(picture)], "--last-image goes with --image"),
    ):
        assert cli.main([*given, *arguments]) != 0
        assert message in capsys.readouterr().err
