"""How an SUV is trained: one function, to be read from top to bottom.

A run is a chain of stages. Everything random in a step follows from the seed of its stage, the
number of the step and the sample's place in the global batch (:mod:`skiparse.models.data.draws`):
a run that continues from a checkpoint is the run that was never interrupted, on a CPU bit for bit,
and the number of processes changes nothing but the order in which numbers are summed.

In the folder of a run: ``checkpoints/``, ``log.jsonl`` with a line for every step, ``tensorboard/``
with the same as curves, ``samples/``, ``data/`` with the index of each stage's source and, in
``STAGE.json``, how many of its clips are used and why others are not, ``bad.jsonl`` with files that
could not be read, and ``stopped.json`` if gradients made an end of it.

Source: Open-Sora Plan v1.5 report, "Training details", and release.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from skiparse.models import flow
from skiparse.models.data import draws
from skiparse.models.data.atomic import write_json
from skiparse.models.data.buckets import assign, without_minority
from skiparse.models.data.cache import Cache
from skiparse.models.data.dataset import Clips
from skiparse.models.data.draws import Use, torch_numbers
from skiparse.models.data.features import Batch, Encoders, collate
from skiparse.models.data.manifest import Manifest
from skiparse.models.data.report import Report
from skiparse.models.data.sampler import BucketBatchSampler
from skiparse.models.train.checkpoint import (
    FOLDER,
    CheckpointError,
    Checkpoints,
    complete_ones,
    number_of,
)
from skiparse.models.train.checks import check, check_data, check_resumed, settings_of
from skiparse.models.train.config import Config, Stage
from skiparse.models.train.guards import alone, told_to_stop, undisturbed
from skiparse.models.train.log import opened
from skiparse.models.train.parallel import World, local
from skiparse.models.train.samples import make_samples
from skiparse.models.train.state import State, entered, prepare

STOPPED = "stopped.json"


def train(config: Config) -> Path:
    """Train from the last checkpoint in ``config.out``, or from the start, to the end of the chain.

    On SIGTERM or Ctrl-C, in whichever process, it saves after the step and returns; called again,
    it goes on. A checkpoint or a line of the log that cannot be written, say on a full disk, is
    reported and tried again later.

    While the clipper skips steps, the checkpoints from before stay, and beside them the last one
    since. Once it gave up, the run may continue with other learning rates of the stage and other
    samples; ``changes`` in ``about.json`` of what it saves then tells of it.

    Args:
        config: see :class:`~skiparse.models.train.config.Config`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: for a config that does not fit the data, the model or the checkpoint, and if
            another run works in the folder; before any work.
        DataError: if more than one in a hundred files cannot be read.
        FloatingPointError: if the clipper gives up. Nothing of that step was applied or saved;
            ``stopped.json`` names its samples.
        CheckpointError: if the last checkpoint cannot be written.
    """
    out, names = Path(config.out), list(config.stages)
    steps = itertools.accumulate(stage.steps for stage in config.stages.values())
    ends = dict(zip(names, steps, strict=True))
    total = ends[names[-1]]
    with (
        World.joined(config.device) as world,
        alone(out, world),
        told_to_stop(world) as told,
        Checkpoints(out / FOLDER, keep=config.keep) as checkpoints,
    ):
        last = checkpoints.latest()
        done = last.step if last else 0
        changes, skipping = [], None  # skipping: steps that were done before the clipper skips
        gave_up = (out / STOPPED).exists()
        if last is not None:
            changes, skipping = last.about.get("changes", []), last.about.get("skipping")
            if changed := check_resumed(config, last, gave_up=gave_up):
                changes = [*changes, {"step": done, **changed}]
        encoders = None
        if config.needs_encoders:
            assert config.vae is not None
            assert config.text is not None
            encoders = Encoders.from_pretrained(config.vae, config.text, world.device)
        check(config, world, encoders)
        state = State.resumed(last, config, world) if last else None

        stopping = 0.0  # the share of processes that were told to
        progress = tqdm(total=total, initial=done, unit="step", disable=world.rank > 0)
        with progress, opened(out if world.rank == 0 else None, done) as log:
            for number, (name, stage) in enumerate(config.stages.items()):
                begin, end = ends[name] - stage.steps, ends[name]
                if done >= end:
                    continue
                if done == begin:
                    state = entered(state, stage, config, world)
                assert state is not None
                prepare(state, stage, config)
                seed = draws.stage_seed(config.seed, number)
                data, source = data_of(config, name, seed, encoders, world)
                if last is not None and last.about["stage"] == name:
                    changed = check_data(source, last, gave_up=gave_up)
                    changes = [*changes, {"step": done, **changed}] if changed else changes
                batches = batches_of(config, stage, data, seed, done - begin, encoders, world)
                parameters = list(state.model.parameters())

                for step in range(done, end):
                    started, keys, parts = time.perf_counter(), [], []
                    for micro in range(stage.accumulate):
                        batch = next(batches).to(world.device)
                        keys += batch.keys
                        with local(state.net, last=micro == stage.accumulate - 1):
                            part = loss_of(state.net, batch, seed, config) / stage.accumulate
                            part.backward()
                        parts.append(part.detach())
                    decision = state.clipper.clip_(parameters)
                    if decision.action == "stop":
                        _give_up(out, step, name, decision, world.all(keys), world, skipping)
                    if decision.action != "skip":
                        skipping = None
                    elif skipping is None:
                        skipping = step
                    rate = stage.rate(step - begin)
                    if decision.action != "skip":
                        for group in state.optimizer.param_groups:
                            group["lr"] = rate
                        state.optimizer.step()
                        state.ema.update(state.model)
                    state.optimizer.zero_grad()
                    done = step + 1

                    loss, stopping = world.mean(torch.stack(parts).sum(), float(told()))
                    row = {
                        "stage": name,
                        "loss": loss,
                        "learning_rate": rate,
                        "norm": decision.norm,
                        "threshold": decision.threshold,
                        "action": decision.action,
                        "seconds": time.perf_counter() - started,
                    }
                    if decision.action == "skip":
                        row["keys"] = world.all(keys)
                    log.write(step, row)
                    progress.set_postfix(stage=name, loss=f"{loss:.4f}", refresh=False)
                    progress.update()

                    ending = done == total or stopping > 0
                    if ending or done == end or done % config.save_every == 0:
                        about = {
                            "stage": name,
                            "data": source,
                            "settings": settings_of(config, name),
                            "changes": changes,
                            "skipping": skipping,
                            **state.about(),
                        }
                        log.sync(done)
                        written = save(
                            checkpoints, done, state, about, config.asynchronous, at_last=ending
                        )
                        if written and skipping is None and world.rank == 0:
                            (out / STOPPED).unlink(missing_ok=True)
                    if config.samples.every and done % config.samples.every == 0:
                        assert encoders is not None
                        if world.rank == 0:
                            make_samples(config, stage, done, state.ema.model, encoders)
                        world.wait()
                    if stopping:
                        break
                if stopping:
                    break
        found = checkpoints.latest()
        assert found is not None
        return found.path


def loss_of(net: nn.Module, batch: Batch, seed: int, config: Config) -> Tensor:
    """The flow-matching loss of a micro-batch; noise and its level are each sample's own."""
    shape = batch.latents.shape[1:]
    shift = flow.dynamic_shift(*shape[-2:])
    noise, sigmas = [], []
    for step, index, _ in batch.places:
        generator = torch_numbers(seed, step, index, Use.NOISE)
        noise.append(torch.randn(shape, generator=generator))
        generator = torch_numbers(seed, step, index, Use.SIGMA)
        sigmas.append(flow.sample_sigmas(1, shift=shift, generator=generator))
    device = batch.latents.device
    noises, levels = torch.stack(noise).to(device), torch.cat(sigmas).to(device)
    noisy = flow.add_noise(batch.latents, noises, levels)
    dtype = getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        velocity = net(
            noisy, flow.timesteps(levels), batch.text, batch.pooled, text_mask=batch.text_mask
        )
    return flow.loss(velocity, flow.velocity(batch.latents, noises))


def data_of(
    config: Config, name: str, seed: int, encoders: Encoders | None, world: World
) -> tuple[Cache | Clips, dict[str, str]]:
    """What a stage reads, and fingerprints of all that is in it."""
    stage, out = config.stages[name], Path(config.out)
    cache, source = config.cache_of(stage), config.source_of(stage)
    if cache is not None:
        held = Cache(cache, encoders.fingerprints() if encoders else None)
        held.buckets = without_minority(held.buckets, stage.global_batch, held.rule)
        _tell(out, name, held.report(), world)
        return held, {"data": held.data, "windows": "fixed", **held.fingerprints}
    assert source is not None
    assert encoders is not None
    with world.first_here():  # the others find the index made
        manifest = Manifest.open(source, index=out / "data" / name, limits=config.limits)
    buckets = without_minority(assign(manifest, stage.rule, seed), stage.global_batch, stage.rule)
    _tell(out, name, manifest.report(buckets), world)
    clips = Clips(
        manifest, buckets, stage.rule, seed=seed, limits=config.limits, bad=out / "bad.jsonl"
    )
    return clips, {
        "data": manifest.fingerprint,
        "windows": "random",
        **encoders.fingerprints(),
    }


def _tell(out: Path, name: str, report: Report, world: World) -> None:
    """How many clips a stage uses, in a line and a file."""
    if world.rank == 0:
        tqdm.write(f"stage {name}: {report.line}")
        (out / "data").mkdir(parents=True, exist_ok=True)
        report.write(out / "data" / f"{name}.json")


def batches_of(
    config: Config,
    stage: Stage,
    data: Cache | Clips,
    seed: int,
    start: int,
    encoders: Encoders | None,
    world: World,
) -> Iterator[Batch]:
    """The micro-batches of this process, from step ``start`` of the stage to its end."""
    sampler = BucketBatchSampler(
        data.buckets.bucket,
        stage.global_batch // (world.size * stage.accumulate),
        world=world.size,
        rank=world.rank,
        accumulate=stage.accumulate,
        seed=seed,
        start=start,
        stop=stage.steps,
    )
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=undisturbed,
    )
    for read in loader:
        features = read
        if isinstance(data, Clips):
            assert encoders is not None
            features = [encoders.features(clip) for clip in read]
        yield collate(features, seed=seed, drop=config.drop, mode=config.posterior)


def save(
    checkpoints: Checkpoints,
    step: int,
    state: State,
    about: dict[str, Any],
    asynchronous: bool,
    *,
    at_last: bool,
) -> bool:
    """A checkpoint; if it fails, training goes on without, but not past the last one.

    Returns whether it is there by now.
    """
    write = partial(checkpoints.save, step, state.tensors(), about, hold=about["skipping"])
    written = True
    for act in (checkpoints.wait, partial(write, asynchronous=asynchronous and not at_last)):
        try:
            act()
        except CheckpointError as error:
            if at_last and isinstance(act, partial):
                raise
            tqdm.write(f"step {step}: {error}; training goes on, and will try again")
            written = False
    return written and (at_last or not asynchronous)


def _give_up(
    out: Path,
    step: int,
    stage: str,
    decision: Any,
    keys: list[str],
    world: World,
    skipping: int | None,
) -> None:
    if world.rank == 0:
        found = {name: str(value) for name, value in asdict(decision).items()}
        write_json(out / STOPPED, {"step": step, "stage": stage, **found, "keys": keys})
    since = step if skipping is None else skipping
    before = [path.name for path in complete_ones(out / FOLDER) if number_of(path) <= since]
    back = f"; to go back to {' or '.join(before)}, first remove what is newer" if before else ""
    raise FloatingPointError(
        f"step {step} (stage {stage}) has a gradient of norm {decision.norm}, and the clipper "
        f"gives up; {out / STOPPED} names the samples. Nothing was learned since step "
        f"{since}: continue with other learning rates of the stage (learning_rate, then), or "
        f"without those samples{back}"
    )
