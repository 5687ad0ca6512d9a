"""A WF-VAE learns, a stopped run goes on bit for bit, and no accident costs a checkpoint."""

import itertools
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from processes import together
from torch import nn

from skiparse import cli
from skiparse.models.data import dataset
from skiparse.models.train import core
from skiparse.models.train.checkpoint import Checkpoint, CheckpointError, Checkpoints, complete_ones
from skiparse.models.train.ema import EMA
from skiparse.models.wfvae import losses
from skiparse.models.wfvae import train as training
from skiparse.models.wfvae.losses import LPIPS, Weights
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.train import Clips, Settings, WFVAEStage, train
from skiparse.models.writer import write_video

TINY = {
    "base_channels": 8,
    "latent_channels": 4,
    "encoder_energy_channels": 4,
    "decoder_energy_channels": 4,
    "encoder_res_blocks": 1,
    "decoder_res_blocks": 1,
}
SETTINGS = Settings(
    frames=9, size=(16, 16), batch=2, learning_rate=2e-3, discriminator_width=2, ema=0.9
)


class Scenes:
    """Four smooth clips that repeat; remembers which were asked for."""

    def __init__(self, settings=SETTINGS):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(4, 3, 2, 3, 3, generator=generator)
        size = (settings.frames, *settings.size)
        fine = nn.functional.interpolate(coarse, size=size, mode="trilinear", align_corners=True)
        self.clips = (255 * fine).byte().movedim(1, -1).contiguous()
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return self.clips[index % 4]


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return WFVAE(**{**TINY, **changes})


def run(out, steps, *, settings=SETTINGS, vae=None, clips=None, **how):
    clips = Scenes(settings) if clips is None else clips
    return train(vae or tiny(), clips, out=out, steps=steps, settings=settings, **how)


def rows(out):
    """The log, without times, which are never the same."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def checkpoints(out):
    return complete_ones(out / "checkpoints")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder):
    return Checkpoint.at(folder).read("")


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a, b):
    """Two checkpoints; the order of tensors in their files is torch's own affair."""
    assert (a / "about.json").read_bytes() == (b / "about.json").read_bytes()
    assert equal(tensors(a), tensors(b))


def test_ema_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("count", torch.zeros(()))
    nn.init.constant_(model.weight, 1)
    ema = EMA(model, decay=0.5)
    for value, expected in ((3, 2), (5, 3.5)):  # (1 + 3) / 2, (2 + 5) / 2
        nn.init.constant_(model.weight, value)
        model.count += 1
        ema.update(model)
        assert ema.model.weight.item() == expected
        assert ema.model.count == model.count
        assert model.weight.item() == value
    assert not ema.model.weight.requires_grad
    assert model.weight.requires_grad


def test_ema_closed_form():
    model = nn.Linear(3, 1, bias=False).double()
    trail = [model.weight.detach().clone()]
    ema = EMA(model, decay=0.999)
    for seed in range(20):
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(seed))
        trail.append(model.weight.detach().clone())
        ema.update(model)
    expected = 0.999**20 * trail[0]
    for k, weight in enumerate(trail[1:], 1):
        expected = expected + 0.001 * 0.999 ** (20 - k) * weight
    scale = max(weight.abs().max() for weight in trail)
    # 20 steps of three roundings, and 1 - 0.999 is off by eps of 1, not of 0.001
    bound = 4 * 20 * torch.finfo(torch.float64).eps * scale
    assert (ema.model.weight - expected).abs().max() <= bound


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_ema_refuses_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        EMA(nn.Linear(1, 1), decay=decay)


def test_ema_refuses_few_bits():
    with pytest.raises(ValueError, match=r"weight is torch\.bfloat16, too coarse"):
        EMA(nn.Linear(1, 1).bfloat16(), decay=0.999)


def test_the_published_stages():
    stages = training.published()
    assert {name: stage.steps for name, stage in stages.items()} == {
        "I": 800_000, "II": 200_000, "III": 200_000
    }  # fmt: skip
    found = [(s.frames, s.size, s.every, s.batch, s.weights.lpips) for s in stages.values()]
    size = (256, 256)
    assert found == [(25, size, 1, 8, 1.0), (49, size, 2, 8, 1.0), (49, size, 2, 8, 0.1)]
    for s in stages.values():
        assert s.weights == Weights(lpips=s.weights.lpips)
        assert (s.learning_rate, s.weight_decay, s.ema) == (1e-5, 1e-4, 0.999)
        assert (s.discriminator_start, s.discriminator_width, s.reduction) == (0, 64, "sum")


def test_the_loss_falls(tmp_path):
    for reduction in losses.REDUCTIONS:
        out = tmp_path / reduction
        settings = replace(SETTINGS, batch=1, weights=Weights(adversarial=0), reduction=reduction)
        run(out, 30, settings=settings)
        loss = [row["loss"] for row in rows(out)]
        assert len(loss) == 30
        assert sum(loss[-4:]) < 0.8 * sum(loss[:4])  # all four scenes in each


def test_resuming_is_bit_exact(tmp_path):
    settings = replace(SETTINGS, discriminator_start=1)  # both networks have dropout or sampling
    whole, parts = Scenes(), Scenes()
    run(tmp_path / "whole", 4, clips=whole, settings=settings, save_every=2)
    run(tmp_path / "parts", 2, clips=parts, settings=settings)
    torch.manual_seed(77)  # nothing outside the run matters: neither random state nor weights
    run(tmp_path / "parts", 4, clips=parts, settings=settings, vae=tiny(seed=5), save_every=2)
    ours, theirs = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "parts")
    assert [path.name for path in ours] == ["step-00000002", "step-00000004"]
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert whole.asked == parts.asked == list(range(8))
    names = tensors(ours[-1]).keys()
    for kind in ("vae", "vae_optimizer", "ema", "discriminator", "discriminator_optimizer"):
        assert any(name.startswith(f"{kind}.") for name in names), kind
    assert {name.rpartition(".")[2] for name in names if "optimizer" in name} == {
        "step", "exp_avg", "exp_avg_sq"
    }  # fmt: skip
    assert not any(path.suffix in (".pt", ".pkl", ".bin") for path in ours[-1].iterdir())


def test_processes_that_read_ahead_change_nothing(tmp_path):
    a, b = run(tmp_path / "a", 2), run(tmp_path / "b", 2, workers=2)
    assert_same(a, b)


def test_steps_differ_in_their_noise_and_seeds_in_everything(tmp_path):
    class Same(Scenes):
        def __getitem__(self, index):
            return self.clips[0]

    # Almost no learning: what differs from step to step is the sample of the latents.
    still = replace(SETTINGS, learning_rate=1e-30, weights=Weights(adversarial=0))
    run(tmp_path / "a", 2, settings=still, clips=Same())
    first, second = (row["loss"] for row in rows(tmp_path / "a"))
    run(tmp_path / "b", 1, settings=replace(still, seed=1), clips=Same())
    assert len({first, second, rows(tmp_path / "b")[0]["loss"]}) == 3


def test_the_callers_random_state_is_left_alone(tmp_path):
    vae = tiny()
    before = torch.random.get_rng_state()
    run(tmp_path, 2, vae=vae)
    assert torch.equal(torch.random.get_rng_state(), before)


def parts_of(folder):
    """The vae, its average and the trained parameters of the discriminator, in a checkpoint."""
    found = {kind: {} for kind in ("vae", "ema", "discriminator")}
    for name, value in tensors(folder).items():
        kind, _, key = name.partition(".")
        if kind in found and not key.rpartition(".")[2].startswith(("running", "num_batches")):
            found[kind][key] = value
    return found


def test_networks_take_turns_from_the_discriminators_first_step(tmp_path, monkeypatch):
    settings, kept = replace(SETTINGS, discriminator_start=3), []
    monkeypatch.setattr(
        training.Coding,
        "saved",
        lambda self, done: kept.append(parts_of(checkpoints(tmp_path)[-1])),
    )
    run(tmp_path, 6, settings=settings, save_every=1)
    changed = [
        {kind for kind in before if not equal(before[kind], after[kind])}
        for before, after in itertools.pairwise(kept)
    ]  # in steps 1 to 5
    vae, discriminator = {"vae", "ema"}, {"discriminator"}
    assert changed == [vae, vae, discriminator, vae, discriminator]
    turns = ["vae", "vae", "vae", "discriminator", "vae", "discriminator"]
    assert [row["of"] for row in rows(tmp_path)] == turns
    assert ["balance" in row for row in rows(tmp_path)] == [*4 * [False], True, False]


def test_the_average_follows_the_weights(tmp_path):
    vae = tiny()
    begin = {name: value.clone() for name, value in vae.state_dict().items()}
    found = parts_of(run(tmp_path, 1, vae=vae))
    for name, value in found["ema"].items():
        assert torch.equal(value, torch.lerp(begin[name], found["vae"][name], 1 - 0.9)), name


def test_what_the_objective_is_given(tmp_path, monkeypatch):
    seen = []
    real = losses.objective
    monkeypatch.setattr(losses, "objective", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    clips, vae = Scenes(), tiny()
    run(tmp_path, 1, vae=vae, clips=clips, lpips=LPIPS())
    (video, made), given = seen[0]
    pixels = clips.clips[:2].movedim(-1, 1).double()
    assert torch.equal(video, ((pixels.float() / 127.5) - 1))
    assert video.shape == made.shape == (2, 3, 9, 16, 16)
    # Level 1 and 2 of the Haar transform, in time 9 -> 5 -> 3 -> 2.
    shapes = [(2, 24, 3, 4, 4), (2, 24, 2, 2, 2)]
    for name in ("coefficients", "made_coefficients"):
        assert [tuple(x.shape) for x in given[name]] == shapes
    low = video.double()
    for level in range(3):
        low = torch.cat([low[:, :, :1], low], 2)
        low = nn.functional.avg_pool3d(low, 2) * 8**0.5  # the low band: 8 pixels by 1 / sqrt(8)
        if level:
            found = given["coefficients"][level - 1][:, :3]
            # in float32, three sums of two for each level so far, and one product
            bound = 4 * 3 * torch.finfo(torch.float32).eps * low.abs().max()
            assert (found - low).abs().max() <= bound
    assert given["last"] is vae.decoder.conv_out.weight
    assert given["mean"].shape == given["logvar"].shape == (2, 4, 2, 2, 2)
    assert given["perceptual"].shape == (18,)
    assert given["judgement"].shape[:2] == (2, 1)
    row = rows(tmp_path)[0]
    assert {"l1", "kl", "wavelet", "lpips", "adversarial", "balance"} <= row.keys()
    expected = (
        row["l1"] + 3 * 16 * 16 * row["lpips"] + 1e-6 * row["kl"] + 0.1 * row["wavelet"]
        + row["balance"] * row["adversarial"]
    )  # fmt: skip
    assert abs(row["loss"] - expected) <= 16 * torch.finfo(torch.float32).eps * expected


def test_bfloat16_computes_in_fewer_bits_and_keeps_float32(tmp_path):
    coarse = run(tmp_path / "bf16", 2, dtype=torch.bfloat16)
    run(tmp_path / "fp32", 2)
    for tensor in tensors(coarse).values():
        assert tensor.dtype in (torch.float32, torch.int64)
    for a, b in zip(rows(tmp_path / "bf16"), rows(tmp_path / "fp32"), strict=True):
        assert a["loss"] != b["loss"]
        # 2 to the power of -8 is a rounding; the network is some 30 layers deep
        assert abs(a["loss"] - b["loss"]) <= 30 * 2**-8 * abs(b["loss"])


def test_a_loss_that_is_not_finite_stops_and_changes_nothing(tmp_path):
    settings = replace(SETTINGS, weights=Weights(adversarial=0))
    folder = run(tmp_path, 2, settings=settings)
    kept = files(folder)

    vae = tiny()
    real = vae.decoder.forward
    calls = iter(range(9))

    def broken(*arguments):
        made, *rest = real(*arguments)
        return (made * float("nan") if next(calls) == 1 else made), *rest

    vae.decoder.forward = broken
    with pytest.raises(FloatingPointError, match=r"step 3 of the vae: not finite.*step-00000002"):
        run(tmp_path, 6, settings=settings, vae=vae)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002"]
    assert files(folder) == kept
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    run(tmp_path, 6, settings=settings)  # goes on from step 2
    assert [row["step"] for row in rows(tmp_path)] == list(range(6))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    vae = tiny()
    vae.decoder.conv_out.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"step 0 of the vae.*no checkpoint is the last"):
        run(tmp_path, 1, vae=vae)
    assert checkpoints(tmp_path) == []


def test_checkpoints_are_those_of_every_trainer(tmp_path):
    run(tmp_path, 4, save_every=1)
    names = [path.name for path in checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-00000004"]
    there = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert there == {"log.jsonl", "tensorboard", "checkpoints"}
    about = Checkpoint.at(checkpoints(tmp_path)[-1]).about
    assert (about["stage"], about["wfvae"]["base_channels"]) == ("vae", 8)


def test_a_flipped_bit_is_refused(tmp_path):
    folder = run(tmp_path, 2)
    damaged = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    held = bytearray(damaged.read_bytes())
    held[len(held) // 2] ^= 1
    damaged.write_bytes(held)
    with pytest.raises(
        CheckpointError, match=r"does not have the SHA-256.*the checkpoint is damaged"
    ):
        run(tmp_path, 3)
    held[len(held) // 2] ^= 1
    damaged.write_bytes(held)
    assert run(tmp_path, 3).name == "step-00000003"


def test_one_run_at_a_time(tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another run is at work"):
        run(tmp_path, 1)
    assert not (tmp_path / "checkpoints").exists()


def test_sigterm_saves_after_the_step(tmp_path):
    """Sent twice, as a job's are; and then it goes on bit for bit."""

    class Terminated(Scenes):
        def __getitem__(self, index):
            if index == 5:  # the second clip of step 2
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    before = signal.getsignal(signal.SIGTERM)
    run(tmp_path / "whole", 4)
    assert run(tmp_path / "parts", 4, clips=Terminated()).name == "step-00000003"
    assert signal.getsignal(signal.SIGTERM) is before
    run(tmp_path / "parts", 4)
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    ours, theirs = (tensors(checkpoints(tmp_path / name)[-1]) for name in ("whole", "parts"))
    assert equal(ours, theirs)


def test_a_checkpoint_of_the_trainer_before_is_refused(tmp_path):
    old = tmp_path / "step-00000007"
    old.mkdir()
    (old / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step-00000007 is a checkpoint of an older.*--init .*7"):
        run(tmp_path, 9)
    assert list(tmp_path.iterdir()) == [old]


def test_stages_begin_with_the_average(tmp_path):
    """As a run of its own that is given it: the first step of the second stage is that run's."""
    settings = replace(SETTINGS, seed=3)
    first = WFVAEStage(**vars(SETTINGS), steps=3)
    second = WFVAEStage(**vars(settings), steps=2)

    def chain(out, stages):
        task = training.Coding(tiny(), stages, lambda name, world: (Scenes(), name), out)
        core.run(task, out, device="cpu", save_every=100, keep=9)

    chain(tmp_path / "whole", {"a": first, "b": second})
    assert [row["stage"] for row in rows(tmp_path / "whole")] == [*"aaabb"]
    end, whole = checkpoints(tmp_path / "whole")
    average = tiny()
    average.load_state_dict(parts_of(end)["ema"])
    folder = run(tmp_path / "alone", 2, vae=average, settings=settings)
    ours, theirs = tensors(whole), tensors(folder)
    assert equal(ours, theirs)
    chain(tmp_path / "parts", {"a": first})
    chain(tmp_path / "parts", {"a": first, "b": second})
    assert equal(tensors(checkpoints(tmp_path / "parts")[-1]), ours)
    with pytest.raises(ValueError, match=r"settings of a \{'steps': 3\}, not \{'steps': 2\}"):
        chain(tmp_path / "whole", {"a": replace(first, steps=2), "b": replace(second, steps=4)})
    with pytest.raises(ValueError, match="is of the stage 'b', which the run does not have"):
        chain(tmp_path / "whole", {"a": first})


def test_a_folder_of_another_recipe_is_refused(tmp_path):
    Checkpoints(tmp_path / "checkpoints").save(1, {"x": torch.zeros(1)}, {"stage": "vae"})
    with pytest.raises(ValueError, match="step-00000001 is of no WFVAE; choose another out"):
        run(tmp_path, 2)


def test_other_clips_are_not_the_same_stage(tmp_path):
    def once(steps, data):
        stages = {"a": WFVAEStage(**vars(SETTINGS), steps=steps)}
        task = training.Coding(tiny(), stages, lambda name, world: (Scenes(), data), tmp_path)
        core.run(task, tmp_path, device="cpu", save_every=100, keep=9)

    once(1, "these")
    with pytest.raises(ValueError, match="was trained on other clips"):
        once(2, "others")
    once(2, "these")


def test_another_kind_of_run_does_not_continue(tmp_path):
    folder = run(tmp_path, 1)
    kept = files(folder)
    with pytest.raises(
        ValueError, match=r"settings of vae \{'batch': 2\}, not \{'batch': 3\}; continue"
    ):
        run(tmp_path, 2, settings=replace(SETTINGS, batch=3))
    with pytest.raises(ValueError, match=r"wfvae \{'base_channels': 8\}, not \{'base_channels'"):
        run(tmp_path, 2, vae=tiny(base_channels=4))
    with pytest.raises(ValueError, match="with lpips False, not True"):
        run(tmp_path, 2, lpips=LPIPS())
    with pytest.raises(ValueError, match=r"steps must be above 1, which .* has reached, got 1"):
        run(tmp_path, 1)
    assert files(folder) == kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 8}, "frames must be 8n \\+ 1, got 8: take 1 or 9"),
        ({"size": (16, 12)}, "size must be multiples of 8"),
        ({"size": (0, 16)}, "size must be multiples of 8"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"every": 0}, "every must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"reduction": "none"}, "reduction must be one of sum, mean"),
        ({"weights": Weights(kl=-1)}, "weights.kl must be at least 0"),
        ({"ema": 1.0}, "ema must be at least 0 and below 1"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", 1, settings=replace(SETTINGS, **changes), clips=Scenes())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"dtype": torch.float16}, r"dtype must be torch.float32 or torch.bfloat16"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, how, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", 1, **how)
    assert not (tmp_path / "out").exists()


def test_clips_of_another_size_than_the_settings(tmp_path):
    clips = Scenes(replace(SETTINGS, size=(16, 24)))
    with pytest.raises(
        ValueError, match=r"clips must be \[9, 16, 16, 3\] by settings, got \[9, 16"
    ):
        run(tmp_path, 1, clips=clips)


def grey(path, frames, size=32, fps=10):
    """Frame i has the grey level 8 * i."""
    levels = torch.arange(frames, dtype=torch.uint8) * 8
    picture = levels[:, None, None, None].expand(frames, size, size, 3)
    write_video(path, picture, fps=fps, crf=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips")
    (path / "below").mkdir()
    grey(path / "a.mp4", 20)
    grey(path / "below" / "b.mp4", 14)
    grey(path / "c.mp4", 9, fps=25)
    grey(path / "short.mp4", 8)
    grey(path / "small.mp4", 20, size=8)
    (path / "notes.pdf").write_text("no video")
    return path


def levels(cut):
    """The number of each frame of a grey clip."""
    return np.rint(cut.float().mean((1, 2, 3)).numpy() / 8).astype(int).tolist()


def cuts(folder, settings=SETTINGS, **how):
    return Clips(folder, settings, tiny(), **how)


def test_cuts_are_whole_random_and_repeatable(folder):
    clips = cuts(folder)
    assert (len(clips), clips.report.used) == (3, 3)
    assert clips.report.dropped == {
        "of a kind that is not read (.pdf)": 1, "too small": 1, "too short": 1
    }  # fmt: skip
    assert clips.report.examples["too short"] == ["short.mp4"]
    starts = []
    for index in range(12):
        cut = clips[index]
        assert (cut.dtype, cut.shape) == (torch.uint8, (9, 16, 16, 3))
        numbers = levels(cut)
        assert numbers == list(range(numbers[0], numbers[0] + 9))
        starts.append(numbers[0])
    assert all(min(starts[i : i + 3]) == 0 for i in range(0, 12, 3))  # c.mp4, once an epoch
    assert max(starts) <= 11
    assert len(set(starts)) > 4
    again = cuts(folder)
    assert [levels(again[index])[0] for index in (11, 3, 7)] == [starts[i] for i in (11, 3, 7)]
    other = cuts(folder, replace(SETTINGS, seed=1))
    assert [levels(other[index])[0] for index in range(12)] != starts
    assert other.fingerprint == clips.fingerprint


def test_the_same_cuts_whatever_the_batch_and_the_index(folder, tmp_path):
    """Those that were cut before there was an index: their first frames, by hand."""
    ways = [cuts(folder), cuts(folder, replace(SETTINGS, batch=5), index=tmp_path / "index")]
    lengths = (20, 14, 9)  # of a.mp4, below/b.mp4 and c.mp4

    def draws(number, use):
        return np.random.default_rng((SETTINGS.seed, number, use))

    for number in range(9):
        length = lengths[draws(number // 3, 2).permutation(3)[number % 3]]
        first = int(draws(number, 3).integers(length - 9, endpoint=True))
        assert [levels(clips[number])[0] for clips in ways] == [first, first]


def test_each_file_comes_once_an_epoch_in_another_order(folder, monkeypatch):
    clips = cuts(folder)
    read = []
    monkeypatch.setattr(
        dataset, "read_video", lambda path, **k: read.append(path) or torch.zeros(20)
    )
    for index in range(24):
        clips[index]
    epochs = [tuple(read[i : i + 3]) for i in range(0, 24, 3)]
    assert all(sorted(epoch) == ["a.mp4", "below/b.mp4", "c.mp4"] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_every_second_frame(folder):
    clips = cuts(folder, replace(SETTINGS, every=2))
    assert len(clips) == 1
    seen = {tuple(levels(clips[index])) for index in range(8)}
    assert seen == {tuple(range(0, 18, 2)), tuple(range(2, 20, 2))}


def test_annotations_are_a_source_too(folder, tmp_path):
    """Without captions, and with a part of a file."""
    size = {"height": 32, "width": 32}
    clip = {"path": "a.mp4", "resolution": size, "num_frames": 20, "fps": 10, "cut": [4, 14]}
    (tmp_path / "clips.jsonl").write_text(json.dumps(clip) + "\n")
    (tmp_path / "data.txt").write_text(f"{folder},clips.jsonl\n")
    clips = cuts(tmp_path / "data.txt")
    assert {levels(clips[index])[0] for index in range(12)} == {4, 5}


def test_folders_with_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give annotations or a folder of clips"):
        cuts(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no clip in .*: no records"):
        cuts(tmp_path)
    (tmp_path / "a.pdf").write_text("no video")
    with pytest.raises(ValueError, match=r"no clip in .*: 1 of a kind that is not read \(\.pdf\)"):
        cuts(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no clip is left: 1 images; give videos"):
        cuts(tmp_path)


def test_images_are_no_videos(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clips")
    Image.new("RGB", (32, 32)).save(tmp_path / "clips" / "b.png")
    clips = cuts(tmp_path / "clips")
    assert (len(clips), clips.report.dropped["an image"]) == (3, 1)
    assert clips.report.examples["an image"] == ["b.png"]
    assert [levels(clips[i]) for i in range(6)] == [levels(cuts(folder)[i]) for i in range(6)]


def command(folder, out, *more):
    return cli.main(
        ["train-vae", str(folder), "--out", str(out), "--model", "tiny", "--frames", "9",
         "--size", "16x16", "--batch", "1", "--discriminator-width", "2", "--workers", "0",
         "--device", "cpu", "--adversarial-weight", "0.25", *more]
    )  # fmt: skip


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(folder, out, "--steps", "1", "--stage", "III", "--reduction", "mean") == 0
    said = capsys.readouterr().out
    assert "without --lpips FILE" in said
    assert "stage III: " in said
    assert "used 1 of 6" in said  # every second frame: only a.mp4 is long enough
    folder_of = json.loads((out / "data" / "III.json").read_text())
    assert "short.mp4" in folder_of["examples"]["too short"]
    about = Checkpoint.at(out / "checkpoints" / "step-00000001").about
    settings = about["settings of III"]
    assert settings["weights"] == {"lpips": 0.1, "kl": 1e-6, "wavelet": 0.1, "adversarial": 0.25}
    assert (settings["every"], settings["reduction"], settings["size"]) == (2, "mean", [16, 16])
    assert cli.main(["export", str(out), str(tmp_path / "vae")]) == 0
    vae = WFVAE.from_pretrained(tmp_path / "vae")
    assert vae.config.base_channels == WFVAE.presets["tiny"]["base_channels"]

    second = tmp_path / "second"
    arguments = [
        "train-vae", str(folder), "--out", str(second), "--init", str(tmp_path / "vae"),
        "--frames", "9", "--size", "16x16", "--batch", "1", "--discriminator-width", "2",
        "--steps", "1", "--learning-rate", "1e-30", "--workers", "0", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    found = parts_of(second / "checkpoints" / "step-00000001")["ema"]
    assert equal(found, dict(vae.state_dict()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "16"], "--size 16: give height and width"),
        (["--stage", "IV"], "stage must be one of I, II, III, got 'IV'"),
        (["--model", "huge"], "model must be one of v1.5-M, S, L, tiny, got 'huge'"),
        (["--lpips", "missing.safetensors"], "missing.safetensors is missing"),
        (["--frames", "10"], "frames must be 8n + 1, got 10"),
        (["--steps", "0"], "steps must be above 0"),
    ],
)
def test_the_command_refuses(folder, tmp_path, capsys, more, message):
    assert command(folder, tmp_path / "run", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_new_model_has_exact_wavelets_and_no_statistics_of_another(tmp_path, monkeypatch, folder):
    small = {**WFVAE.presets["v1.5-M"], **TINY, "shift": 4 * [1.0], "scale": 4 * [2.0]}
    monkeypatch.setitem(WFVAE.presets, "v1.5-M", small)
    given = {"frames": 9, "size": (16, 16), "batch": 1, "discriminator_width": 2}
    about = Checkpoint.at(training.train_folder(folder, out=tmp_path, steps=1, given=given)).about
    config = about["wfvae"]
    assert (config["haar_gain"], config["shift"], config["scale"]) == (None, None, None)


@pytest.fixture
def folder_of_eight(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for i in range(8):
        write_video(folder / f"{i}.mp4", torch.full((9, 16, 16, 3), 20 * i, dtype=torch.uint8))
    return folder


def test_a_clip_that_cannot_be_read_is_replaced(folder_of_eight, tmp_path, monkeypatch):
    """The same for whoever reads it, and as long as they are few."""
    monkeypatch.setattr(dataset, "_BAD_SHARE", 0.2)
    whole = [cuts(folder_of_eight)[i] for i in range(16)]
    index, bad = tmp_path / "index", tmp_path / "bad.jsonl"
    cuts(folder_of_eight, index=index)
    damaged = folder_of_eight / "3.mp4"
    stat = damaged.stat()
    damaged.write_bytes(bytes(stat.st_size))
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the index is still current
    again = [cuts(folder_of_eight, index=index, bad=bad)[i] for i in range(16)]
    changed = [i for i in range(16) if not torch.equal(whole[i], again[i])]
    assert [round(float(whole[i].float().mean()) / 20) for i in changed] == [3, 3]
    assert "3.mp4" in json.loads(bad.read_text().splitlines()[0])["path"]
    other = cuts(folder_of_eight, index=index)
    assert all(torch.equal(other[i], again[i]) for i in reversed(range(16)))
    monkeypatch.undo()
    other = cuts(folder_of_eight, index=index)
    with pytest.raises(ValueError, match=r"12\.5% of the files tried are bad.*"):
        [other[i] for i in range(16)]


def hidden_start(path, frames, hidden):
    """A video of which an edit list hides the first frames."""
    write_video(path.with_suffix(".whole.mp4"), torch.zeros((frames, 16, 16, 3), dtype=torch.uint8))
    with av.open(str(path.with_suffix(".whole.mp4"))) as old, av.open(str(path), "w") as new:
        made = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                back = round(hidden / 24 / packet.time_base)
                packet.pts, packet.dts = packet.pts - back, packet.dts - back
                packet.stream = made
                new.mux(packet)
    path.with_suffix(".whole.mp4").unlink()


@pytest.mark.parametrize("scanned", [True, False])
def test_frames_that_are_hidden_are_not_cut(tmp_path, monkeypatch, scanned):
    """Cuts are of what can be seen, also where that is only known once the file is read."""
    if not scanned:
        monkeypatch.setattr("skiparse.models.data.video.SCAN_BYTES", 10)
        monkeypatch.setattr("skiparse.models.data.manifest.SCAN_BYTES", 10)
    hidden_start(tmp_path / "b.mp4", 25, 10)
    clips = cuts(tmp_path)
    assert clips.report.more["estimated"] == (not scanned)
    assert all(clips[i].shape == (9, 16, 16, 3) for i in range(20))


def test_the_scan_is_a_line_and_a_file(folder_of_eight, tmp_path, capsys):
    write_video(folder_of_eight / "x.mp4", torch.zeros((5, 16, 16, 3), dtype=torch.uint8))
    (folder_of_eight / "y.mp4").write_bytes(b"no video")
    (folder_of_eight / "z.mp4").symlink_to("/nowhere.mp4")
    with pytest.warns(UserWarning, match="2 of 11 clips"):
        assert command(folder_of_eight, tmp_path / "run", "--steps", "1") == 0
    line = "used 8 of 11; dropped 3: 2 cannot be opened, 1 too short"
    assert line in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "data" / "I.json").read_text())
    assert (about["used"], about["of"]) == (8, 11)
    assert about["dropped"] == {"too short": 1, "cannot be opened": 2}
    assert "z.mp4" in about["examples"]["cannot be opened"][1]


def test_two_processes_equal_one(tmp_path):
    """Samples, batch norm, dropout and the balance of terms are those of the whole batch."""
    settings = replace(SETTINGS, batch=4, learning_rate=1e-4, discriminator_start=1)
    run(tmp_path / "one", 5, settings=settings)
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from test_wfvae_train import SETTINGS, run\n"
        "settings = replace(\n"
        "    SETTINGS, batch=4, learning_rate=1e-4, discriminator_start=1\n"
        ")\n"
        "run(Path(sys.argv[1]), 5, settings=settings)\n"
    )
    done = together(2, script, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["of"] for row in one] == [row["of"] for row in two]
    assert "balance" in one[2]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - {"of", "step", "stage"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
    ours, theirs = (tensors(checkpoints(tmp_path / name)[-1]) for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        if "running" in name:
            torch.testing.assert_close(x, theirs[name], rtol=1e-3, atol=1e-5)
