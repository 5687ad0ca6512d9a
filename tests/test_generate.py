"""The way from a clip to a generated video: walked once, and gone on with after an interruption."""

import os
import shutil
import signal

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("matplotlib")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

from skiparse.bench.clip import bundled_clip
from skiparse.bench.demo import generate
from skiparse.models.data.video import probe
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.train import loop
from skiparse.models.wfvae.model import WFVAE


@pytest.fixture(scope="module")
def clip():
    try:
        return bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def made(clip, tmp_path_factory):
    """All of it with an untrained autoencoder, and the least number of steps."""
    out = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    vae = WFVAE(
        base_channels=8,
        latent_channels=4,
        encoder_energy_channels=4,
        decoder_energy_channels=4,
        encoder_res_blocks=1,
        decoder_res_blocks=1,
    )
    vae.save_pretrained(out / "vae")
    patch = pytest.MonkeyPatch()
    patch.setattr(generate, "SAMPLE_STEPS", 2)
    try:
        yield out, generate.run(out, clip, steps=0.001), patch
    finally:
        patch.undo()


def test_an_interruption_ends_it_until_it_is_called_again(made, clip, tmp_path, monkeypatch):
    """Nothing is made of a model that is not yet trained."""
    shutil.copytree(made[0] / "vae", tmp_path / "vae")
    calls, real = iter(range(100)), loop.loss_of

    def interrupted(*arguments):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(loop, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate.run(tmp_path, clip, steps=0.001)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "model").exists()
    assert len(generate.run(tmp_path, clip, steps=0.001)["log"]) == 4


def test_every_stage_is_trained(made):
    _, found, _ = made
    assert [row["stage"] for row in found["log"]] == ["image", "suv", "video", "longer"]


def test_videos_lie_beside_their_sources(made):
    out, found, _ = made
    assert len(found["videos"]) == len(generate.SCENES)
    for one in found["videos"]:
        assert len(one["psnr"]) == len(generate.SCENES)
        for name in one["files"]:
            info = probe(out / name)
            assert (info.frames, info.height, info.width) == (17, generate.SIDE, generate.SIDE)


def test_the_model_is_a_pipeline(made):
    out, _, _ = made
    pipeline = SUVPipeline.from_pretrained(out / "model")
    assert pipeline.transformer.config.in_channels == 4  # as the autoencoder has


def test_again_nothing_is_trained_or_encoded(made, clip, monkeypatch):
    out, found, _ = made

    def never(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(loop, "loss_of", never)
    before = {path: os.stat(path).st_mtime_ns for path in (out / "cache").rglob("*.safetensors")}
    again = generate.run(out, clip, steps=0.001)
    assert again["log"] == found["log"]
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    assert [one["psnr"] for one in again["videos"]] == [one["psnr"] for one in found["videos"]]


def test_the_section_loads_nothing(made):
    out, found, _ = made
    text = generate.section(out, found)
    assert text.count("<video") == 2 * len(generate.SCENES)
    assert "learns" in text
    assert "by heart" in text
    assert "http" not in text
    assert text.count("data:video/mp4;base64,") == 2 * len(generate.SCENES)


def test_psnr_by_hand():
    black, grey = torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 255 / 10)
    assert generate.likeness(black, grey) == pytest.approx(20)
