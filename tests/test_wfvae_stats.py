"""Shift and scale are those of posterior samples, and the saved model has them."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

pytest.importorskip("av")
pytest.importorskip("diffusers")

from skiparse.models.wfvae import stats
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stats import normalised, run, statistics
from skiparse.models.writer import write_video

TINY = {
    "base_channels": 8,
    "latent_channels": 4,
    "encoder_energy_channels": 4,
    "decoder_energy_channels": 4,
    "encoder_res_blocks": 1,
    "decoder_res_blocks": 1,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(**changes):
    torch.manual_seed(0)
    return WFVAE(**{**TINY, **changes}).eval()


def videos(*shapes):
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.rand(b, 3, t, h, w, generator=generator) - 1 for b, t, h, w in shapes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    for number, name in enumerate(("a.mp4", "b.mp4")):
        generator = torch.Generator().manual_seed(number)
        frames = torch.randint(0, 256, (9, 16, 16, 3), generator=generator, dtype=torch.uint8)
        write_video(path / name, frames, fps=10)
    (path / "notes.txt").write_text("no video")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny(shift=(9.0,) * 4, scale=(7.0,) * 4).save_pretrained(path)
    return path


@torch.no_grad()
def test_the_moments_of_samples():
    """Two clips of other sizes: every latent pixel counts the same, whatever its clip."""
    vae, clips = tiny(), videos((2, 9, 16, 24), (1, 1, 32, 16))
    shift, scale = statistics(vae, iter(clips))
    posteriors = [vae.encode(clip).latent_dist for clip in clips]
    generator = torch.Generator().manual_seed(2)
    rounds, samples = 4000, []
    for posterior in posteriors:
        shape = (rounds, *posterior.mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn = posterior.mean + posterior.std * noise
        samples.append(drawn.movedim(2, 0).flatten(1))
    pixels = torch.cat(samples, 1)  # [4, latent pixels of all rounds]
    mean, std = pixels.mean(1), pixels.std(1)
    # of n samples, the mean is off by std / sqrt(n) and the spread by std / sqrt(2 n); 5 of them
    assert ((torch.tensor(shift).double() - mean) / std).abs().max() < 5 / pixels.shape[1] ** 0.5
    error = (1 / torch.tensor(scale).double() / std - 1).abs().max()
    assert error < 5 / (2 * pixels.shape[1]) ** 0.5
    means = torch.cat([p.mean.movedim(1, 0).flatten(1) for p in posteriors], 1)
    assert (1 / torch.tensor(scale) > 1.1 * means.std(1)).all()  # means alone spread less


@torch.no_grad()
def test_normalised_latents_have_mean_0_and_variance_1():
    vae, clips = tiny(shift=(9.0,) * 4, scale=(7.0,) * 4), videos((1, 17, 24, 16), (1, 9, 16, 16))
    made = normalised(vae, *statistics(vae, clips))
    posteriors = [made.encode(clip).latent_dist for clip in clips]
    total = torch.zeros(4, dtype=torch.float64)
    square, count = total.clone(), 0
    for posterior in posteriors:
        mean = made.normalize(posterior.mean).double()
        scale = torch.tensor(made.config.scale).double()[:, None, None, None]
        variance = posterior.var.double() * scale.square()
        total += mean.sum((0, 2, 3, 4))
        square += (mean.square() + variance).sum((0, 2, 3, 4))
        count += mean[:, 0].numel()
    eps = torch.finfo(torch.float32).eps  # latents are fp32
    assert (total / count).abs().max() < 16 * eps
    assert (square / count - 1).abs().max() < 16 * eps


def test_a_large_mean_costs_no_digits():
    """Latents near 1000 that spread by about 1: sums of squares in fp32 would lose the spread."""
    vae, clips = tiny(), videos((1, 9, 16, 16))
    _, scale = statistics(vae, clips)
    with torch.no_grad():
        vae.encoder.conv_out.bias[:4] += 1000
    _, moved = statistics(vae, clips)
    # the latents themselves are rounded at 1000 * eps
    bound = 2 * 1000 * torch.finfo(torch.float32).eps
    assert torch.tensor(moved).sub(torch.tensor(scale)).abs().max() < bound


def test_the_copy_alone_has_them():
    vae = tiny()
    made = normalised(vae, (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))
    assert (made.config.shift, made.config.scale) == ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))
    assert (vae.config.shift, vae.config.scale) == (None, None)
    before = vae.encoder.conv_out.bias.clone()
    made.encoder.conv_out.bias.data += 1
    assert torch.equal(vae.encoder.conv_out.bias, before)
    with pytest.raises(ValueError, match="shift must have 4 values"):
        normalised(vae, (1.0,), (1.0,) * 4)


def test_what_has_no_statistics():
    vae = tiny()
    with pytest.raises(ValueError, match="clips has no video in it"):
        statistics(vae, [])
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="no finite mean and spread"):
        statistics(vae, videos((1, 1, 16, 16)))


def test_a_folder_of_clips_and_a_saved_model(folder, model, tmp_path, capsys):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    out = run(model, folder, tmp_path / "one", frames=9, size=(16, 16))
    assert torch.equal(torch.get_rng_state(), before)
    said = capsys.readouterr().out
    assert "notes.txt" in said
    assert "channel   3: mean" in said
    made, plain = WFVAE.from_pretrained(out), WFVAE.from_pretrained(model)
    assert load_file(out / WEIGHTS).keys() == load_file(model / WEIGHTS).keys()
    for name, weight in plain.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight)
    assert str(model) not in (out / "config.json").read_text()
    about = json.loads((out / "statistics.json").read_text())
    assert (about["files"], about["cuts"], about["of"]) == (2, 2, "samples of the posterior")
    assert about["shift"] == list(made.config.shift)
    again = run(model, folder, tmp_path / "two", frames=9, size=(16, 16), cuts=4)
    # four cuts of two files of nine frames are the same two twice
    found = WFVAE.from_pretrained(again).config
    assert found.shift == pytest.approx(made.config.shift, rel=1e-12)
    assert found.scale == pytest.approx(made.config.scale, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cuts": 0}, ValueError, "cuts must be at least 1, got 0"),
        ({"frames": 8}, ValueError, r"frames must be 8n \+ 1, got 8"),
        ({"size": (16, 12)}, ValueError, "size must be multiples of 8"),
        ({"model": "missing"}, FileNotFoundError, "config.json is not there"),
        ({"clips": "missing"}, ValueError, "does not exist; give annotations or a folder"),
        ({"out": "."}, ValueError, "exists; give a new name"),
    ],
)
def test_arguments_that_make_no_sense(folder, model, tmp_path, changes, error, message):
    given = {"model": model, "clips": folder, "out": tmp_path / "out", "frames": 9}
    with pytest.raises(error, match=message):
        run(**{**given, "size": (16, 16), **changes})
    assert not (tmp_path / "out").exists()


def test_a_clip_that_cannot_be_read_costs_itself_only(folder, model, tmp_path, monkeypatch):
    monkeypatch.setattr("skiparse.models.data.dataset._BAD_SHARE", 0.5)
    real = stats.Clips.__init__

    def spoiling(self, source, *arguments, **options):
        real(self, source, *arguments, **options)
        (source / "b.mp4").write_bytes(b"no video")  # after the scan

    copy = tmp_path / "clips"
    shutil.copytree(folder, copy)
    monkeypatch.setattr(stats.Clips, "__init__", spoiling)
    out = run(model, copy, tmp_path / "out", frames=9, size=(16, 16))
    (copy / "b.mp4").unlink()
    monkeypatch.undo()
    alone = run(model, copy, tmp_path / "alone", frames=9, size=(16, 16))
    found, right = (WFVAE.from_pretrained(path).config for path in (out, alone))
    assert found.shift == pytest.approx(right.shift, rel=1e-12)  # a.mp4 twice, and once


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["measuring", "writing"])
def test_what_a_signal_stops_goes_on(folder, model, tmp_path, monkeypatch, kind, moment):
    """Nothing half written stays, the sums so far do; the end is that of a call in one piece."""
    whole = run(model, folder, tmp_path / "whole", frames=9, size=(16, 16))
    plus, write, measured = stats.Sums.plus, stats.write_json, []

    def told():
        os.kill(os.getpid(), kind)
        os.kill(os.getpid(), kind)
        time.sleep(1)

    def told_at_the_second(sums, *arguments):
        measured.append(sums.clips)
        return told() if sums.clips else plus(sums, *arguments)

    def told_at_the_report(path, table):
        return told() if path.name == "statistics.json" else write(path, table)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        if moment == "measuring":
            patched.setattr(stats.Sums, "plus", told_at_the_second)
        else:
            patched.setattr(stats, "write_json", told_at_the_report)
        try:
            with pytest.raises(KeyboardInterrupt):
                run(model, folder, tmp_path / "out", frames=9, size=(16, 16))
        finally:
            signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out.measuring"}

    def counted(sums, *arguments):
        measured.append(sums.clips)
        return plus(sums, *arguments)

    measured.clear()
    monkeypatch.setattr(stats.Sums, "plus", counted)
    out = run(model, folder, tmp_path / "out", frames=9, size=(16, 16))
    assert measured == ([1] if moment == "measuring" else [])  # what was measured, is
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}
    for name in ("statistics.json", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_sums_are_written_on_the_way(folder, model, tmp_path, monkeypatch):
    """What kills without a word, such as a power cut, costs the last minute."""
    monkeypatch.setattr(stats, "SAVE_EVERY", 0.0)
    there = []
    plus = stats.Sums.plus

    def looking(sums, *arguments):
        file = tmp_path / "out.measuring" / "sums.json"
        there.append(json.loads(file.read_bytes())["clips"] if file.exists() else 0)
        return plus(sums, *arguments)

    monkeypatch.setattr(stats.Sums, "plus", looking)
    run(model, folder, tmp_path / "out", frames=9, size=(16, 16), cuts=3)
    assert there == [0, 1, 2]


@pytest.fixture
def begun(folder, model, tmp_path):
    """A call that was stopped after its first clip."""
    plus = stats.Sums.plus

    def once(sums, *arguments):
        if sums.clips:
            raise KeyboardInterrupt
        return plus(sums, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stats.Sums, "plus", once)
        with pytest.raises(KeyboardInterrupt):
            run(model, folder, tmp_path / "out", frames=9, size=(16, 16))
    return tmp_path / "out.measuring" / "sums.json"


def test_a_flipped_bit_of_the_sums_is_seen(folder, model, begun, tmp_path):
    sound = begun.read_bytes()
    places = range(0, len(sound), 7)
    for place in places:
        begun.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        if json_or_none(begun) == json.loads(sound):
            continue  # a space became another one
        with pytest.raises(ValueError, match=r"sums\.json is damaged; remove .*to measure anew"):
            stats.Sums.read(begun, {})
    begun.write_bytes(sound[:-9])
    with pytest.raises(ValueError, match=r"sums\.json is damaged"):
        run(model, folder, tmp_path / "out", frames=9, size=(16, 16))


def json_or_none(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_sums_of_something_else_are_refused(folder, model, begun, tmp_path):
    given = {"frames": 9, "size": (16, 16)}
    with pytest.raises(ValueError, match="begun with seed 0, not 1; go on with that, or remove"):
        run(model, folder, tmp_path / "out", **given, seed=1)
    with pytest.raises(ValueError, match="begun with cuts 2, not 5"):
        run(model, folder, tmp_path / "out", **given, cuts=5)
    tiny(shift=(9.0,) * 4, scale=(6.0,) * 4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="begun with model"):
        run(tmp_path / "other", folder, tmp_path / "out", **given)
    copy = tmp_path / "clips"
    shutil.copytree(folder, copy)
    (copy / "b.mp4").unlink()
    with pytest.raises(ValueError, match="begun with cuts 2, not 1"):
        run(model, copy, tmp_path / "out", **given)
    with pytest.raises(ValueError, match="begun with clips"):
        run(model, copy, tmp_path / "out", **given, cuts=2)


def test_two_do_not_measure_for_one_folder(folder, model, begun, tmp_path):
    before = begun.read_bytes()
    with (
        FileLock(begun.parent / ".lock"),
        pytest.raises(ValueError, match="another run is at work there"),
    ):
        run(model, folder, tmp_path / "out", frames=9, size=(16, 16))
    assert begun.read_bytes() == before


def test_what_fails_at_once_leaves_nothing(folder, tmp_path):
    vae = tiny()
    with torch.no_grad():
        vae.encoder.conv_out.bias[0] = float("nan")
    vae.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="no finite mean and spread"):
        run(tmp_path / "broken", folder, tmp_path / "out", frames=9, size=(16, 16))
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}
