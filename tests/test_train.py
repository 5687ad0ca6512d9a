"""A run goes through its stages, is the same however often it stops, and survives what it must."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

from processes import together, torchrun
from test_text import save, tiny_encoders

from skiparse import cli
from skiparse.models import flow
from skiparse.models.data import draws
from skiparse.models.data.buckets import Rule, assign
from skiparse.models.data.dataset import Clips
from skiparse.models.data.features import collate
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import DataError, Manifest
from skiparse.models.data.sampler import BucketBatchSampler
from skiparse.models.pipeline import SUVPipeline, SUVPipelineOutput
from skiparse.models.suv.encoders import Encoders
from skiparse.models.suv.model import SUV
from skiparse.models.suv.recipe import SUVConfig as Config
from skiparse.models.suv.recipe import SUVStage as Stage
from skiparse.models.train import clip, guards, loop
from skiparse.models.train import log as log_module
from skiparse.models.train.checkpoint import Checkpoint, CheckpointError, Checkpoints
from skiparse.models.train.checks import check
from skiparse.models.train.clip import AdaptiveGradClipper
from skiparse.models.train.config import Lora, Optimizer, Samples, load
from skiparse.models.train.core import train
from skiparse.models.train.export import export
from skiparse.models.train.parallel import World
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.writer import write_video

SIZE = (32, 48)
CLIPS = 6


def rule(frames, **changes):
    given = {
        "frames": frames,
        "fps": 24,
        "size": SIZE,
        "longest": 100.0,
        "minority": 0,
    }
    return Rule(**given | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Six clips of moving stripes, nine frames each, with captions; a VAE and text encoders."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "clips").mkdir()
    for i in range(CLIPS):
        t, y, x = torch.meshgrid(*map(torch.arange, (9, *SIZE)), indexing="ij")
        grey = 127 + 120 * torch.sin((x * (i + 1) + 3 * y + 5 * t) / 10)
        frames = torch.stack([grey, grey.flip(1), 255 - grey], -1).to(torch.uint8)
        write_video(folder / "clips" / f"{i}.mp4", frames, crf=10)
        (folder / "clips" / f"{i}.txt").write_text(f"stripes number {i}")
    torch.manual_seed(0)
    vae = WFVAE(
        base_channels=8,
        latent_channels=4,
        encoder_energy_channels=4,
        decoder_energy_channels=4,
        encoder_res_blocks=1,
        decoder_res_blocks=1,
    )
    vae.save_pretrained(folder / "vae")
    save(folder / "text", tiny_encoders())
    return folder


def stages(**changes):
    dense = {"sparsity": (1,) * 5, "skip_connection": False}
    common = {"learning_rate": 2e-3, "global_batch": 4} | changes
    return {
        "image": Stage(steps=3, rule=rule(1), **common, **dense),
        "suv": Stage(steps=2, rule=rule(1), **common),
        "video": Stage(steps=4, rule=rule(9), **common),
    }


def config(folder, out, **changes):
    given = {
        "out": str(out),
        "preset": "tiny",
        "stages": stages(),
        "vae": str(folder / "vae"),
        "text": str(folder / "text"),
        "source": str(folder / "clips"),
        "ema": 0.5,
        "save_every": 2,
        "device": "cpu",
    }
    return Config(**given | changes)


def rows(out):
    """The log, without times, which are never the same."""
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def tensors(out):
    """All tensors of the last checkpoint."""
    return Checkpoints(Path(out) / "checkpoints").latest().read("")


def assert_same(a, b):
    assert rows(a) == rows(b)
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    samples = Samples(every=6, prompts=("stripes",), shape=(9, *SIZE), steps=2, guidance=2.0)
    assert train(config(source, out, samples=samples)).name == "step-00000009"
    return out


def test_the_stages_are_walked(whole):
    found = rows(whole)
    assert [row["step"] for row in found] == list(range(9))
    assert [row["stage"] for row in found] == ["image"] * 3 + ["suv"] * 2 + ["video"] * 4
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000009"]
    about = Checkpoints(whole / "checkpoints").latest().about
    assert about["stage"] == "video"
    assert about["model"]["skip_connection"] is True
    assert about["model"]["sparsity"] == list(SUV.presets["tiny"]["sparsity"])
    assert sum(about["clipper"]["counts"].values()) == 9  # of the whole run
    assert about["clipper"]["fed"] == 4  # since the last stage began
    assert [path.name for path in (whole / "samples").iterdir()] == ["step-00000006-0.mp4"]
    assert list((whole / "tensorboard").iterdir())


def test_the_conversion_carries_weights_and_average(source, tmp_path):
    """The stage with skips starts as what the dense stage left, and its average too."""
    first = {"image": stages()["image"]}
    train(config(source, tmp_path, stages=first))
    before = tensors(tmp_path)
    frozen = dataclasses.replace(stages()["suv"], steps=1, learning_rate=1e-30)
    train(config(source, tmp_path, stages=first | {"suv": frozen}))
    after = tensors(tmp_path)
    fresh = {name for name in after.keys() - before.keys() if name.startswith(("model.", "ema."))}
    assert fresh
    assert all("skips" in name for name in fresh)
    averages = [name for name in before if name.startswith("ema.")]
    assert any(not torch.equal(before[name], before[f"model{name[3:]}"]) for name in averages)
    for name in before:
        if name.startswith("model."):
            assert torch.equal(before[name], after[name]), name
        elif name.startswith("ema."):
            expected = before[name].lerp(before[f"model{name[3:]}"], 0.5)
            torch.testing.assert_close(after[name], expected)


def read_by_hand(config, stage, seed):
    """The micro-batches of each step of a stage, of public functions."""
    manifest = Manifest.open(config.source)
    buckets = assign(manifest, stage.rule, seed)
    clips = Clips(manifest, buckets, stage.rule, seed=seed)
    encoders = Encoders.from_pretrained(config.vae, config.text)
    sampler = BucketBatchSampler(
        buckets.bucket,
        stage.global_batch // stage.accumulate,
        accumulate=stage.accumulate,
        seed=seed,
        stop=stage.steps,
    )
    options = {"seed": seed, "drop": config.drop, "mode": config.posterior}
    micros = [
        collate([encoders.features(clips[place]) for place in places], **options)
        for places in sampler
    ]
    return [micros[i : i + stage.accumulate] for i in range(0, len(micros), stage.accumulate)]


def by_hand(config, stage, batches, seed):
    """Weights, their average and the norms of gradients after the steps of ``batches``.

    Each is a list of micro-batches. Of public functions, written out: a step draws noise and levels
    from streams of their own, sums gradients, clips, sets the rate, steps, and only then averages.
    """
    torch.manual_seed(config.seed)
    model = SUV(**SUV.presets["tiny"] | {"sparsity": stage.sparsity, "skip_connection": False})
    average = {name: x.clone() for name, x in model.state_dict().items()}
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    clipper, norms = AdaptiveGradClipper(), []
    for step, micros in enumerate(batches):
        for batch in micros:
            noises, levels = [], []
            for at, index, _ in batch.places:
                assert at == step
                noise, level = (  # 6 is for noise, 5 for its level
                    torch.Generator().manual_seed(
                        int(np.random.default_rng((seed, at, index, use)).integers(2**63))
                    )
                    for use in (6, 5)
                )
                shape = batch.latents.shape[1:]
                shift = flow.dynamic_shift(*shape[-2:])
                noises.append(torch.randn(shape, generator=noise))
                levels.append(flow.sample_sigmas(1, shift=shift, generator=level))
            noise, level = torch.stack(noises), torch.cat(levels)
            velocity = model(
                flow.add_noise(batch.latents, noise, level),
                flow.timesteps(level),
                batch.captions["states"],
                batch.captions["pooled"],
                text_mask=batch.captions["states_mask"],
            )
            loss = flow.loss(velocity, flow.velocity(batch.latents, noise))
            (loss / len(micros)).backward()
        decision = clipper.clip_(list(model.parameters()))
        assert decision.action != "skip"
        norms.append(decision.norm)
        optimizer.param_groups[0]["lr"] = stage.learning_rate * (1 / 2, 1)[step]  # warm-up
        optimizer.step()
        optimizer.zero_grad()
        for name, x in model.state_dict().items():
            average[name] = average[name].lerp(x, 1 - config.ema)
    return model.state_dict(), average, norms


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_equal_steps_written_out(source, tmp_path, monkeypatch, accumulate, processes):
    # Of one frame out of nine; or of clips that are too short, of which chance takes a part.
    wanted = rule(1) if accumulate == 1 else rule(17, min_frames=9, drop_short=0.5)
    stage = Stage(
        steps=2, rule=wanted, learning_rate=2e-3, global_batch=4, accumulate=accumulate, warmup=1,
        sparsity=(1,) * 5, skip_connection=False,
    )  # fmt: skip
    # With a tiny eps of the optimiser, gradients of nearly 0 would make a step of their rounding.
    given = config(
        source, tmp_path / "one", stages={"only": stage}, optimizer=Optimizer(eps=1e-4), ema=0.75,
        seed=3, drop=0.5, posterior="sample" if accumulate == 1 else "mean",
    )  # fmt: skip
    seen, seeds, real = [], set(), loop.loss_of

    def seeing(net, batch, seed, config):
        seen.append(batch)
        seeds.add(seed)
        return real(net, batch, seed, config)

    monkeypatch.setattr(loop, "loss_of", seeing)
    train(given)
    assert seeds == {draws.stage_seed(3, 0)}
    batches = read_by_hand(given, stage, *seeds)
    for found, right in zip(seen, [micro for step in batches for micro in step], strict=True):
        assert (found.keys, found.places) == (right.keys, right.places)
        assert torch.equal(found.latents, right.latents)
        assert found.captions.keys() == right.captions.keys() == {"states", "states_mask", "pooled"}
        for name in right.captions:
            assert torch.equal(found.captions[name], right.captions[name]), name
    weights, average, norms = by_hand(given, stage, batches, *seeds)
    if processes == 2:
        two = dataclasses.replace(given, out=str(tmp_path / "two"))
        launch(2, as_yaml(tmp_path / "two.yaml", two))
    out = tmp_path / ("one" if processes == 1 else "two")
    found = tensors(out)
    # Neither the clipper nor the optimiser would let a wrong scale of all gradients be seen.
    assert [row["norm"] for row in rows(out)] == pytest.approx(norms, rel=1e-6)
    for kind, right in (("model", weights), ("ema", average)):
        for name, x in right.items():
            if processes == 1:
                assert torch.equal(found[f"{kind}.{name}"], x), f"{kind}.{name}"
            else:  # summed in another order
                torch.testing.assert_close(found[f"{kind}.{name}"], x)


def test_each_stage_has_its_own(source, tmp_path, monkeypatch):
    """Seed, rates, sparsity and checkpointing, also when a run goes on within it."""
    seen, averages, real = [], [], loop.loss_of

    def seeing(net, batch, seed, config):
        seen.append((seed, net.config.sparsity, net.checkpointing))
        return real(net, batch, seed, config)

    monkeypatch.setattr(loop, "loss_of", seeing)
    monkeypatch.setattr(
        loop, "make_samples", lambda *a: averages.append(a[3].transformer.config.sparsity)
    )
    sparse, own = (1, 2, 2, 2, 1), {"checkpointing": "block", "then": {1: 5e-4}, "steps": 1}
    first = dataclasses.replace(stages()["image"], steps=1)
    second = dataclasses.replace(stages()["suv"], sparsity=sparse, **own)
    given = config(
        source, tmp_path, stages={"a": first, "b": second}, seed=3,
        samples=Samples(every=1, prompts=("a",), shape=(1, *SIZE)),
    )  # fmt: skip
    train(given)
    longer = {"a": first, "b": dataclasses.replace(second, steps=2)}
    train(dataclasses.replace(given, stages=longer))
    assert seen == [
        (draws.stage_seed(3, 0), (1,) * 5, ("none",) * 5),
        *[(draws.stage_seed(3, 1), sparse, ("block",) * 5)] * 2,
    ]
    assert averages == [(1,) * 5, sparse, sparse]
    assert [row["learning_rate"] for row in rows(tmp_path)] == [2e-3, 2e-3, 5e-4]


def test_samples_are_of_the_averaged_weights(source, tmp_path, monkeypatch):
    """Each prompt with noise of its own, the same every time, and as the config says."""
    calls = []

    def called(self, prompt, *, generator, **options):
        weights = {name: x.clone() for name, x in self.transformer.state_dict().items()}
        calls.append((prompt, generator.initial_seed(), options, weights))
        return SUVPipelineOutput(torch.zeros(1, 1, 3, *SIZE))

    monkeypatch.setattr(SUVPipeline, "__call__", called)
    samples = Samples(every=1, prompts=("a", "b"), shape=(1, *SIZE), steps=2, guidance=3.0)
    only = {"image": dataclasses.replace(stages()["image"], steps=1)}
    train(config(source, tmp_path, stages=only, samples=samples, seed=3))
    found, options = tensors(tmp_path), {"num_frames": 1, "height": SIZE[0], "width": SIZE[1]}
    options |= {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    assert [call[:3] for call in calls] == [("a", 3, options), ("b", 4, options)]
    for name, x in calls[0][3].items():
        assert torch.equal(x, found[f"ema.{name}"]), name
    assert any(not torch.equal(x, found[f"model.{name}"]) for name, x in calls[0][3].items())


@pytest.mark.full  # a minute of compiling
def test_compiled_blocks_train_as_they_do_uncompiled(source, tmp_path, monkeypatch):
    """Through every stage, with its other sparsity; and really compiled."""
    compiled, real = [], SUV.compile_repeated_blocks
    monkeypatch.setattr(
        SUV, "compile_repeated_blocks", lambda self: (compiled.append(self), real(self))
    )
    train(config(source, tmp_path / "plain"))
    assert not compiled
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    torch._dynamo.utils.counters.clear()
    train(config(source, tmp_path / "compiled", compile=True))
    assert len(compiled) == 2  # the dense model, and the one it was converted to
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    for plain, other in zip(rows(tmp_path / "plain"), rows(tmp_path / "compiled"), strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], rel=1e-5)
        assert other["norm"] == pytest.approx(plain["norm"], rel=1e-3)
    whole, other = tensors(tmp_path / "plain"), tensors(tmp_path / "compiled")
    assert whole.keys() == other.keys()


class Killed(BaseException):
    """As by kill -9, as far as one process can: nothing after it is done."""


@pytest.mark.parametrize(
    "at", [3, 7, pytest.param(2, marks=pytest.mark.full), pytest.param(5, marks=pytest.mark.full)]
)
def test_a_killed_run_goes_on_bit_for_bit(source, whole, tmp_path, monkeypatch, at):
    calls = iter(range(100))
    real = loop.loss_of

    def killing(*arguments):
        if next(calls) == at:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(loop, "loss_of", killing)
    with pytest.raises(Killed):
        train(config(source, tmp_path))
    monkeypatch.undo()
    train(config(source, tmp_path))
    assert_same(whole, tmp_path)


def test_sigterm_saves_and_exits(source, whole, tmp_path, monkeypatch):
    calls = iter(range(100))
    real = loop.loss_of

    def terminated(*arguments):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "loss_of", terminated)
    assert train(config(source, tmp_path)).name == "step-00000005"
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    train(config(source, tmp_path))
    assert_same(whole, tmp_path)


def test_signals_that_come_together_are_one_request(monkeypatch):
    seen = []
    outer = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    # What starts a process in the background may have it ignore Ctrl-C.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    alone, two = (World(0, size, torch.device("cpu")) for size in (1, 2))
    try:
        with guards.told_to_stop(alone) as told:
            assert not told()
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert told()
        assert seen == []
        with guards.told_to_stop(two) as told:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # a terminal's and torchrun's
            assert told()
        with guards.told_to_stop(alone) as told:
            signal.raise_signal(signal.SIGINT)
            assert told()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(guards, "GRACE", -1.0)
        with guards.told_to_stop(alone) as told:
            signal.raise_signal(signal.SIGTERM)
            assert seen == []
            signal.raise_signal(signal.SIGTERM)  # somebody means it
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, outer)
        signal.signal(signal.SIGINT, interrupt)


def test_sigterm_to_every_process_of_a_job_saves(source, tmp_path):
    """As SLURM and systemd send it; torchrun hands on its own, so that it comes twice."""
    long = {"image": dataclasses.replace(stages()["image"], steps=500)}
    given = config(source, tmp_path / "run", stages=long, save_every=1000, workers=1)
    file = as_yaml(tmp_path / "config.yaml", given)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", "-m", "skiparse.cli", "train", file]
    log, limit = tmp_path / "run" / "log.jsonl", time.monotonic() + 300
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as job:
        while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
            assert job.poll() is None, job.stdout.read()[-2000:]
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGTERM)  # workers that read are among them
        told = job.communicate(timeout=300)[0]
    found = Checkpoints(tmp_path / "run" / "checkpoints").latest()
    assert found is not None, told[-2000:]
    assert found.step == len(rows(tmp_path / "run")) < 500


def test_a_finished_run_stays(source, whole, tmp_path):
    before = rows(whole)
    assert train(config(source, whole)).name == "step-00000009"
    assert rows(whole) == before


def test_accumulation_changes_rounding_only(source, whole, tmp_path):
    train(config(source, tmp_path, stages=stages(accumulate=2), save_every=100))
    for a, b in zip(rows(whole), rows(tmp_path), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def launch(processes, *arguments, shared=False):
    """``skiparse train`` in processes; ``shared``: each of them has to give tokens to others."""
    done = together(processes, "counting.py", "train", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    sent = re.findall(r"^sent \d [1-9]", done.stdout, re.MULTILINE)
    assert len(sent) == (processes if shared else 0), done.stdout


def as_yaml(path, given):
    table = json.loads(json.dumps(dataclasses.asdict(given)))
    path.write_text(json.dumps(table))  # which is YAML too
    return str(path)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(source, whole, tmp_path, parallel):
    given = config(source, tmp_path / "run", parallel=parallel, save_every=100)
    launch(2, as_yaml(tmp_path / "config.yaml", given))
    for a, b in zip(rows(whole), rows(given.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert (a["action"], a["stage"]) == (b["action"], b["stage"])
    one, two = tensors(whole), tensors(given.out)
    assert one.keys() == two.keys()


def test_processes_that_share_tokens_equal_one(source, whole, tmp_path):
    """Two with one batch."""
    given = config(source, tmp_path / "run", context_parallel=2, save_every=100)
    launch(2, as_yaml(tmp_path / "config.yaml", given), shared=True)
    for a, b in zip(rows(whole), rows(given.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)
        assert (a["action"], a["stage"]) == (b["action"], b["stage"])
    assert tensors(whole).keys() == tensors(given.out).keys()


@pytest.mark.full
def test_processes_that_share_tokens_may_leave_a_run_to_one(source, whole, tmp_path):
    """Here at the end of a stage; within one after a fault, in the test below."""
    begun = config(
        source, tmp_path / "begun", stages={"image": stages()["image"]}, context_parallel=2
    )
    launch(2, as_yaml(tmp_path / "begun.yaml", begun), shared=True)
    train(dataclasses.replace(begun, stages=stages(), context_parallel=1))
    for a, b in zip(rows(whole), rows(begun.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


@pytest.mark.parametrize("how", ["hangs", pytest.param("dies", marks=pytest.mark.full)])
def test_a_process_that_is_lost_ends_the_run_and_is_named(source, whole, tmp_path, how):
    """In a group that shares tokens; another number of processes goes on from what was saved."""
    given = config(source, tmp_path / "run", context_parallel=2, timeout=8.0)
    file = as_yaml(tmp_path / "config.yaml", given)
    end = 0
    if how == "hangs":
        done = together(2, "faulty.py", how, 1, 6, file)
    else:
        end = 20  # who waits for a dead process says so after ten seconds
        done = torchrun(2, Path(__file__).with_name("faulty.py"), how, 1, 6, file, end=end)
    lost = float(re.search(r"^lost at (\S+)$", done.stdout, re.MULTILINE)[1])
    assert time.time() - lost < 8 + 10 + end + 20  # the last for a busy machine
    assert done.returncode != 0
    assert "process 0: process 1 does not answer (timeout=8 s)" in done.stderr
    assert Checkpoints(tmp_path / "run" / "checkpoints").latest().step == 5
    train(dataclasses.replace(given, context_parallel=1))
    for a, b in zip(rows(whole), rows(given.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("more", [(), ("--tensor-parallel", "2")])
def test_four_processes_on_a_mesh_go_on_from_one(source, whole, tmp_path, more):
    """Begun by one; then groups of two that share tokens, with all weights in shards; then one.

    There are two such groups, or one whose processes have a part of every layer each.
    """
    names = [*stages()]
    begun = config(source, tmp_path / "run", stages={"image": stages()["image"]})
    train(begun)
    given = dataclasses.replace(begun, stages=stages(), parallel="fsdp")
    until = {name: stages()[name] for name in names[:2]}
    file = as_yaml(tmp_path / "config.yaml", dataclasses.replace(given, stages=until))
    launch(4, file, "--context-parallel", "2", *more, shared=True)
    train(dataclasses.replace(begun, stages=stages()))
    for a, b in zip(rows(whole), rows(given.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)
    one, four = tensors(whole), tensors(given.out)
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in four.items()}


@pytest.mark.full
def test_every_stage_has_its_own_number(source, whole, tmp_path):
    """Shared by two, by none, and by two again."""
    made = stages()
    for name, number in (("image", 2), ("video", 2)):
        made[name] = dataclasses.replace(made[name], context_parallel=number)
    given = config(source, tmp_path / "run", stages=made)
    launch(2, as_yaml(tmp_path / "config.yaml", given), shared=True)
    for a, b in zip(rows(whole), rows(given.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_groups_that_cannot_share_tokens_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="context_parallel must be at least 1, got 0"):
        config(source, tmp_path, context_parallel=0)
    with pytest.raises(
        ValueError, match="context_parallel=2 must divide the number of processes, 1"
    ):
        train(config(source, tmp_path / "run", context_parallel=2))
    with pytest.raises(ValueError, match="tensor_parallel must be at least 1, got 0"):
        config(source, tmp_path, tensor_parallel=0)
    for given, words in (
        ({"parallel": "ddp"}, "parallel=ddp; set parallel: fsdp"),
        ({"lora": Lora(rank=2), "init": "x"}, "lora=Lora"),
        ({"compile": True}, "compile=True; leave one of them out"),
    ):
        with pytest.raises(ValueError, match=f"tensor_parallel=2 does not go with {words}"):
            config(source, tmp_path, **{"parallel": "fsdp", "tensor_parallel": 2} | given)
    given = {"parallel": "fsdp", "tensor_parallel": 2}
    with pytest.raises(
        ValueError, match="context_parallel=1 times tensor_parallel=2 must divide the number"
    ):
        train(config(source, tmp_path / "run", **given))
    four = World(0, 4, torch.device("cpu"))
    for changes, words in (
        ({"stages": stages(global_batch=3)}, "global_batch=3 must be a multiple of 2"),
        ({"model": {"num_heads": 3}}, "tensor_parallel=2 must divide the heads of the model, 3"),
        (
            {"stages": {"video": dataclasses.replace(stages()["video"], experts=(1, 1, 4, 1, 1))}},
            "nothing deals out experts",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            check(config(source, tmp_path, **given | changes), four, None)


def test_another_number_of_processes_continues_the_same_order(source, whole, tmp_path):
    """Begun by two, finished by one."""
    given = config(source, tmp_path / "run", stages={"image": stages()["image"]})
    launch(2, as_yaml(tmp_path / "config.yaml", given))
    train(dataclasses.replace(given, stages=stages()))
    for a, b in zip(rows(whole), rows(given.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_an_suv_learns_a_lora(source, tmp_path):
    """Its base is in no checkpoint; what is exported is merged, and as sparse as in the run."""
    sizes = {"in_channels": 4, "out_channels": 4}
    SUV(**SUV.presets["tiny"] | sizes).save_pretrained(tmp_path / "init")
    only = {"video": dataclasses.replace(stages()["video"], sparsity=(1, 2, 2, 2, 1))}
    given = config(
        source, tmp_path / "whole", stages=only, init=str(tmp_path / "init"), lora=Lora(rank=2),
        dtype="bfloat16",
    )  # fmt: skip
    train(given)
    part = {"video": dataclasses.replace(only["video"], steps=3)}
    train(dataclasses.replace(given, out=str(tmp_path / "run"), stages=part))
    again = {"video": dataclasses.replace(only["video"], checkpointing="block")}
    train(dataclasses.replace(given, out=str(tmp_path / "run"), stages=again))
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert all("lora_" in name for name in tensors(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "made", vae=source / "vae", text=source / "text")
    made = SUV.from_pretrained(tmp_path / "made" / "transformer")
    assert made.config.sparsity == (1, 2, 2, 2, 1)
    base = SUV.from_pretrained(tmp_path / "init").state_dict()
    moved = {name for name, x in made.state_dict().items() if not torch.equal(x, base[name])}
    changed = {name.rpartition(".")[0].rpartition(".")[2] for name in moved}
    assert {"to_q", "to_k", "to_v", "to_out", "text_to_k", "text_to_v"} <= changed
    assert all(name.endswith("weight") and "to_" in name for name in moved)
    dense = dataclasses.replace(given, out=str(tmp_path / "no"), stages={"i": stages()["image"]})
    with pytest.raises(ValueError, match="a stage wants another model than init holds"):
        train(dense)
    with pytest.raises(ValueError, match="with lora the model stays that of init"):
        dataclasses.replace(given, stages=stages())


def test_training_from_a_cache_is_training_on_line(source, tmp_path):
    """Clips as long as the rule wants leave nothing to chance but what comes after the encoders."""
    cache = pytest.importorskip("skiparse.models.data.cache")
    only = {"video": dataclasses.replace(stages()["video"], rule=rule(9, minority=1))}
    online = config(source, tmp_path / "online", stages=only)
    train(online)
    encoders = Encoders.from_pretrained(source / "vae", source / "text")
    manifest = Manifest.open(source / "clips", index=tmp_path / "index")
    cache.build(tmp_path / "cache", manifest, only["video"].rule, encoders)
    held = config(
        source,
        tmp_path / "cached",
        stages=only,
        source=None,
        vae=None,
        text=None,
        cache=str(tmp_path / "cache"),
    )
    train(held)
    assert_same(online.out, held.out)
    few = {"video": dataclasses.replace(only["video"], global_batch=8)}
    for given in (online, held):
        with pytest.raises(DataError, match="no bucket has the 1 global batches of 8 samples"):
            train(dataclasses.replace(given, stages=few, out=str(tmp_path / "few")))
    other = {"video": dataclasses.replace(only["video"], rule=rule(9, fps=12, minority=1))}
    with pytest.raises(ValueError, match="was built by another rule"):
        train(dataclasses.replace(held, stages=other, out=str(tmp_path / "new")))


def spoil(monkeypatch, value, when):
    """Losses times ``value`` at the micro-batches, counted from 0, that ``when`` is true of."""
    calls, real = itertools.count(), loop.loss_of

    def loss_of(*arguments):
        loss, told = real(*arguments)
        return loss * (value if when(next(calls)) else 1), told

    monkeypatch.setattr(loop, "loss_of", loss_of)


@pytest.mark.parametrize("at", [0, 3])
def test_a_step_that_is_not_finite_is_skipped(source, tmp_path, monkeypatch, at):
    spoil(monkeypatch, math.nan, lambda call: call == at)
    train(config(source, tmp_path, save_every=100))
    found = rows(tmp_path)
    assert [row["step"] for row in found if row["action"] == "skip"] == [at]
    assert len(found[at]["keys"]) == 4
    assert all(torch.isfinite(x).all() for x in tensors(tmp_path).values())
    assert Checkpoints(tmp_path / "checkpoints").latest().about["clipper"]["counts"]["skip"] == 1


def test_a_skipped_step_moves_nothing(source, tmp_path, monkeypatch):
    spoil(monkeypatch, math.nan, lambda call: call == 3)
    only = {"image": dataclasses.replace(stages()["image"], steps=2, accumulate=2)}
    train(config(source, tmp_path, stages=only, save_every=1))
    assert [row["action"] == "skip" for row in rows(tmp_path)] == [False, True]
    assert len(set(rows(tmp_path)[1]["keys"])) == 4  # of both micro-batches
    before, after = (
        Checkpoint.at(tmp_path / "checkpoints" / f"step-{step:08d}").read("") for step in (1, 2)
    )
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    averages = [name for name in before if name.startswith("ema.")]  # which are on their way
    assert any(not torch.equal(before[name], before[f"model{name[3:]}"]) for name in averages)


def test_fifty_of_them_stop_the_run(source, tmp_path, monkeypatch):
    spoil(monkeypatch, math.inf, lambda call: True)
    long = {"image": dataclasses.replace(stages()["image"], steps=60)}
    with pytest.raises(FloatingPointError, match=r"step 49 \(stage image\).*stopped.json"):
        train(config(source, tmp_path, stages=long, save_every=40))
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert (stopped["step"], len(stopped["keys"])) == (49, 4)
    assert Checkpoints(tmp_path / "checkpoints").latest().step == 40


def test_what_the_advice_after_divergence_says_can_be_done(source, tmp_path, monkeypatch):
    """And the checkpoints from before the gradients went bad are still there."""
    monkeypatch.setattr(clip, "PATIENCE", 8)
    spoil(monkeypatch, math.nan, lambda call: call >= 3)
    one = dataclasses.replace(stages()["image"], steps=20)
    given = config(source, tmp_path / "run", stages={"image": one}, save_every=1)
    with pytest.raises(
        FloatingPointError,
        match=r"since step 3: .*learning_rate, then.* to "
        r"step-00000002 or step-00000003, first remove what is newer",
    ):
        train(given)
    out = tmp_path / "run"
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003", "step-00000010"]
    assert Checkpoints(out / "checkpoints").latest().about["skipping"] == 3
    monkeypatch.undo()
    shorter = dataclasses.replace(one, steps=12)
    slower = dataclasses.replace(shorter, learning_rate=1e-3, then={11: 1e-4})
    with pytest.raises(ValueError, match=r"other settings: ema, stages\.image\.learning_rate"):
        train(dataclasses.replace(given, ema=0.6, stages={"image": slower}))
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in (source / "clips").iterdir():
        if not path.name.startswith("0."):  # without those samples
            (copy / path.name).write_bytes(path.read_bytes())
    changed = dataclasses.replace(given, stages={"image": slower}, source=str(copy))
    train(changed)
    about = Checkpoints(out / "checkpoints").latest().about
    settings, data = about["changes"]
    assert settings["step"] == data["step"] == 10
    assert settings["stages.image.learning_rate"] == [2e-3, 1e-3]
    assert settings["stages.image.then"] == [{}, {"11": 1e-4}]
    assert data["data"][1] == about["data"]["data"] != data["data"][0]
    assert [row["learning_rate"] for row in rows(out)[10:]] == [1e-3, 1e-4]
    assert not (out / "stopped.json").exists()
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == ["step-00000011", "step-00000012"]
    with pytest.raises(ValueError, match=r"other settings: stages\.image\.learning_rate"):
        train(dataclasses.replace(given, stages={"image": dataclasses.replace(one, steps=14)}))


def test_a_full_disk_keeps_training_alive(source, whole, tmp_path, monkeypatch, capsys):
    real, calls = Checkpoints.save, []

    def failing(self, step, *arguments, **options):
        calls.append(step)
        if step in (2, 3):
            raise CheckpointError("no space left")
        real(self, step, *arguments, **options)

    monkeypatch.setattr(Checkpoints, "save", failing)
    train(config(source, tmp_path))
    assert calls == [2, 3, 4, 5, 6, 8, 9]
    assert "no space left; training goes on" in capsys.readouterr().out
    assert_same(whole, tmp_path)


def lines(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# TensorBoard's own thread ends with the error, which comes out at the next call too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_the_log(tmp_path, capsys):
    """A limit on the size of files, as a disk without room: a line is cut short, then none goes."""
    import resource

    row, file = {"loss": 1.0, "stage": "x" * 50}, tmp_path / "log.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with log_module.opened(tmp_path, 0) as log:
        log.write(0, row)
        size = file.stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, before[1]))
            for step in (1, 2, 3):
                log.write(step, row)
                log.sync(step + 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert lines(file) == [0]
        log.write(4, row)
        assert lines(file) == [0, 1, 2, 3, 4]
        log.sync(5)
        log.write(5, row)
    told = capsys.readouterr().out
    assert told.count("log.jsonl cannot be written: [Errno 27]") == 1
    assert told.count("tensorboard cannot be written") <= 1
    assert lines(file) == [0, 1, 2, 3, 4, 5]
    assert any((tmp_path / "tensorboard").iterdir())


def test_curves_that_cannot_be_written_end_nothing(tmp_path, monkeypatch, capsys):
    real, full = log_module.SummaryWriter, []

    class Writer(real):
        def add_scalar(self, *arguments):
            if full:
                raise OSError(28, "No space left on device")
            super().add_scalar(*arguments)

    monkeypatch.setattr(log_module, "SummaryWriter", Writer)
    with log_module.opened(tmp_path, 0) as log:
        log.write(0, {"loss": 1.0})
        full.append(True)
        log.write(1, {"loss": 1.0})
        log.write(2, {"loss": 1.0})
        full.clear()
        log.sync(3)
        log.write(3, {"loss": 1.0})
    assert capsys.readouterr().out.count("tensorboard cannot be written: [Errno 28]") == 1
    assert lines(tmp_path / "log.jsonl") == [0, 1, 2, 3]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\n", b"[]\n"])
@pytest.mark.parametrize("steps", [0, 2, 3, 5])
def test_a_log_goes_on_after_the_steps_that_count(tmp_path, tail, steps):
    written = "".join(json.dumps({"step": step}) + "\n" for step in range(3))
    (tmp_path / "log.jsonl").write_bytes(written.encode() + tail)
    with log_module.opened(tmp_path, steps) as log:
        log.write(steps, {})
    assert lines(tmp_path / "log.jsonl") == [*range(min(steps, 3)), steps]


def test_the_last_checkpoint_must_be_written(source, tmp_path, monkeypatch):
    def failing(self, step, *arguments, **options):
        raise CheckpointError("no space left")

    monkeypatch.setattr(Checkpoints, "save", failing)
    with pytest.raises(CheckpointError, match="no space left"):
        train(config(source, tmp_path))


def test_asynchronous_checkpoints_hold_the_same(source, whole, tmp_path):
    train(config(source, tmp_path, asynchronous=True))
    assert_same(whole, tmp_path)


def test_half_precision_and_checkpointing(source, whole, tmp_path):
    again = stages(checkpointing="block")
    train(config(source, tmp_path / "a", stages=again, save_every=100))
    assert_same(whole, tmp_path / "a")
    train(config(source, tmp_path / "b", dtype="bfloat16", save_every=100))
    pairs = list(zip(rows(whole), rows(tmp_path / "b"), strict=True))
    assert all(a["loss"] == pytest.approx(b["loss"], rel=0.02) for a, b in pairs)
    assert any(a["loss"] != b["loss"] for a, b in pairs)
    assert {x.dtype for x in tensors(tmp_path / "b").values()} == {torch.float32}


def test_an_out_that_cannot_be_made_is_named(source, tmp_path):
    (tmp_path / "file").touch()
    for out, what in (("file", "file is a file"), ("x" * 300, "File name too long")):
        with pytest.raises(ValueError, match=f"cannot be written: .*{what}"):
            train(config(source, tmp_path / out))


def test_one_run_at_a_time(source, tmp_path):
    from filelock import FileLock

    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ValueError, match="another run is at work"),
    ):
        train(config(source, tmp_path))
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed"),
        ({"ema": 0.6}, "ema"),
        ({"stages": stages(learning_rate=1e-3)}, r"stages\.image\.learning_rate"),
        ({"stages": stages(global_batch=2)}, r"stages\.video\.global_batch"),
    ],
)
def test_a_run_is_not_continued_as_another(source, whole, change, message):
    before = rows(whole)
    longer = {"video": dataclasses.replace(stages()["video"], steps=5)}
    with pytest.raises(ValueError, match=f"trained with other settings.*{message}"):
        train(config(source, whole, **{"stages": stages() | longer} | change))
    assert rows(whole) == before


def test_other_data_is_not_the_same_run(source, whole, tmp_path):
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in (source / "clips").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "0.txt").write_text("another caption")
    longer = {"video": dataclasses.replace(stages()["video"], steps=5)}
    with pytest.raises(ValueError, match="other data"):
        train(config(source, whole, stages=stages() | longer, source=str(copy)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": stages(accumulate=3)}, r"stages\.image\.global_batch=4 must be a multiple"),
        ({"model": {"in_channels": 8}}, "in_channels=8, but the autoencoder has 4"),
        ({"model": {"text_channels": 8}}, "text_channels=8, but the text encoder has 24"),
        ({"model": {"pooled_channels": 8}}, "pooled_channels=8, but the text encoder has 20"),
        ({"model": {"depth": 8}}, "model has no depth"),
        ({"model": {"num_heads": 0}}, "num_heads must be a whole number above 0, got 0"),
        ({"model": {"pooled_channels": -1}}, "pooled_channels must be a whole number above 0"),
        ({"model": {"num_layers": (2, 2)}}, "model: .*num_layers"),
        ({"model": {"sparsity": (1, 2)}}, "model: .*sparsity"),
        ({"stages": {"a": dataclasses.replace(stages()["suv"], sparsity=(1, 2))}},
         r"stages\.a\.sparsity"),
        ({"device": "cuda"}, "no GPU"),
        ({"samples": Samples(every=1, prompts=("a",), shape=(8, 32, 48))}, "num_frames=8"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_at_once(source, tmp_path, change, message):
    if "device" in change and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        train(config(source, tmp_path, **change))
    assert not (tmp_path / "checkpoints").exists()


def test_weights_to_start_from(source, whole, tmp_path):
    """An exported run, a dense one, or a folder of SUV; what it is not, it is refused as."""
    only = {"suv": dataclasses.replace(stages()["suv"], steps=1, learning_rate=1e-30)}
    exported = tmp_path / "exported"
    export(whole, exported, vae=source / "vae", text=source / "text")
    train(config(source, tmp_path / "a", stages=only, init=str(exported)))
    theirs, mine = tensors(whole), tensors(tmp_path / "a")
    for name in mine:
        if name.startswith("model."):
            assert torch.equal(mine[name], theirs[f"ema{name[5:]}"]), name
    dense = SUV(**SUV.presets["tiny"] | {"skip_connection": False, "sparsity": (1,) * 5})
    dense.save_pretrained(tmp_path / "dense")
    train(config(source, tmp_path / "b", stages=only, init=str(tmp_path / "dense")))
    weight = dense.proj_out.weight
    assert torch.equal(tensors(tmp_path / "b")["model.proj_out.weight"], weight)
    with pytest.raises(FileNotFoundError, match=r"holds no SUV.*convert suv"):
        train(config(source, tmp_path / "c", stages=only, init=str(tmp_path)))


def test_a_run_tells_what_it_uses(source, tmp_path, capsys):
    """Of 12 clips half, and by name why not the others."""
    folder = tmp_path / "clips"
    shutil.copytree(source / "clips", folder)
    for i in range(4):
        slow = torch.full((9, *SIZE, 3), 60, dtype=torch.uint8)
        write_video(folder / f"slow{i}.mp4", slow, fps=20)
        (folder / f"slow{i}.txt").write_text("x")
    (folder / "x.gif").write_bytes(b"x")
    (folder / "x.txt").write_text("x")
    (folder / "y.mp4").symlink_to("/nowhere.mp4")
    (folder / "y.txt").write_text("y")
    only = {"video": stages()["video"]}
    given = config(source, tmp_path / "run", stages=only, source=str(folder))
    with pytest.warns(UserWarning, match="1 of 11 clips"):
        train(given)
    line = (
        f"stage video: {folder}: used 6 of 12; dropped 6: 1 of a kind that is not read (.gif), 1 "
        "cannot be opened, 4 fps too low\n"
    )
    assert line in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "data" / "video.json").read_text())
    assert (about["used"], about["of"]) == (6, 12)
    assert about["dropped"]["fps too low"] == 4
    assert about["examples"]["fps too low"] == [f"slow{i}.mp4" for i in range(4)]


def test_data_check(source, tmp_path, capsys, monkeypatch):
    """The same before a run, by the folder alone or by the rule of a stage."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "clips"
    shutil.copytree(source / "clips", folder)
    write_video(folder / "slow.mp4", torch.zeros((9, *SIZE, 3), dtype=torch.uint8), fps=20)
    (folder / "slow.txt").write_text("x")
    (folder / "0.txt").unlink()
    assert cli.main(["data", "check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: used 6 of 7; dropped 1: 1 no caption in a .txt of its name\n" in out
    assert "6 videos and 0 images" in out
    assert "20 to 24 frames a second" in out
    assert json.loads((tmp_path / "data_check.json").read_text())["used"] == 6
    file = as_yaml(tmp_path / "config.yaml", config(source, tmp_path / "run"))
    made = ["data", "check", str(folder), "--config", file, "--stage", "video", "--out", "x.json"]
    assert cli.main(made) == 0
    assert "used 5 of 7; dropped 2: 1 no caption in a .txt of its name, 1 fps too low" in (
        capsys.readouterr().out
    )
    assert json.loads((tmp_path / "x.json").read_text())["examples"]["fps too low"] == ["slow.mp4"]
    assert not (tmp_path / "run").exists()
    assert cli.main(["data", "check", str(folder), "--stage", "video"]) == 2
    assert cli.main(["data", "check", str(folder), "--config", file, "--stage", "x"]) == 2
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 2
    assert cli.main(["data", "check", str(folder), "--limits.max_hold", "0"]) == 2
    assert "max_hold must be above 0" in capsys.readouterr().err

    def never(*arguments, **options):
        raise AssertionError("looked at the clips")

    monkeypatch.setattr(Manifest, "open", never)
    assert cli.main(["data", "check", str(folder), "--out", str(folder)]) == 2
    assert "cannot be written: it is a folder" in capsys.readouterr().err


def test_limits_are_settings(source, tmp_path):
    """As the errors say."""
    given = config(source, tmp_path / "run", stages={"video": stages()["video"]})
    file = as_yaml(tmp_path / "config.yaml", given)
    assert load(file, ["--limits.max_hold", "7", "--limits.max_frames=20"]).limits == Limits(
        max_hold=7, max_frames=20
    )
    with pytest.raises(ValueError, match="max_frames must be above 0"):
        load(file, ["--limits.max_frames=0"])
    assert cli.main(["train", file, "--limits.max_frames=8"]) == 2


def test_the_commands(source, tmp_path, capsys):
    """``train``, ``export`` and ``sample``, one after the other."""
    given = config(source, tmp_path / "run", stages={"suv": stages()["suv"]})
    file = as_yaml(tmp_path / "config.yaml", given)
    assert cli.main(["train", file, "--stages.suv.steps=1"]) == 0
    assert capsys.readouterr().out.strip().endswith("step-00000001")
    folders = ["--vae", str(source / "vae"), "--text", str(source / "text")]
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "model"), *folders]) == 0
    assert SUVPipeline.from_pretrained(tmp_path / "model").transformer.config.num_heads == 2
    video = tmp_path / "video.mp4"
    size = ["--height=32", "--width=48", "--frames=9", "--steps=2"]
    made = ["sample", "--model", str(tmp_path / "model"), "--prompt", "a", "--out", str(video)]
    assert cli.main([*made, *size]) == 0
    assert video.stat().st_size
    assert cli.main(["train", file, "--stages.suv.stepz=1"]) == 2
    assert "stepz" in capsys.readouterr().err
