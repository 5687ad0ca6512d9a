"""How a denoiser is trained: a chain of stages, and what a step of each is.

It is a task of :mod:`skiparse.models.train.core`, which runs it. Everything random in a step
follows from the seed of its stage, the number of the step and the sample's place in the global
batch (:mod:`skiparse.models.data.draws`): a run that continues from a checkpoint is the run that
was never interrupted, on a CPU bit for bit, and the number of processes changes nothing but the
order in which numbers are summed.

In the folder of a run, beside what the core puts there: ``samples/``, ``data/`` with the index of
each stage's source and, in ``STAGE.json``, how many of its clips are used and why others are not,
``bad.jsonl`` with files that could not be read, and ``stopped.json`` if gradients made an end.

Source: Open-Sora Plan v1.5 report, "Training details", and release.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skiparse.models import flow
from skiparse.models.data import draws
from skiparse.models.data.atomic import write_json
from skiparse.models.data.buckets import assign, without_minority
from skiparse.models.data.cache import Cache
from skiparse.models.data.dataset import Clips
from skiparse.models.data.draws import Use, torch_numbers
from skiparse.models.data.features import Batch, Coder, collate
from skiparse.models.data.manifest import Manifest
from skiparse.models.data.sampler import BucketBatchSampler
from skiparse.models.train import core
from skiparse.models.train.checkpoint import FOLDER, Checkpoint, complete_ones, number_of
from skiparse.models.train.checks import check, check_data, check_resumed, settings_of
from skiparse.models.train.clip import Decision
from skiparse.models.train.config import Config, Stage
from skiparse.models.train.guards import undisturbed
from skiparse.models.train.log import tell
from skiparse.models.train.parallel import Context, World, local
from skiparse.models.train.recipe import Recipe, recipe_of
from skiparse.models.train.samples import make_samples
from skiparse.models.train.state import State, entered, prepare

STOPPED = "stopped.json"


class Denoising:
    """The chain of stages of ``config``, as a task of :mod:`skiparse.models.train.core`."""

    def __init__(self, config: Config) -> None:
        self.config, self.out = config, Path(config.out)
        self.recipe: Recipe = recipe_of(config.recipe)
        ends = itertools.accumulate(stage.steps for stage in config.stages.values())
        self._ends = dict(zip(config.stages, ends, strict=True))  # steps at the end of each stage
        self.total = max(self._ends.values())
        self.hold: int | None = None
        self._changes: list[dict[str, Any]] = []

    def begin(self, last: Checkpoint | None, world: World) -> None:
        """Check config, data and model against each other, and be as ``last`` has it."""
        config = self.config
        world = replace(world, tensor=config.tensor_parallel)
        self._world, self._last = world, last
        self._gave_up = (self.out / STOPPED).exists()
        if last is not None:
            self._changes, self.hold = last.about.get("changes", []), last.about.get("skipping")
            self._change(last.step, check_resumed(config, last, gave_up=self._gave_up))
        self._coder = self.recipe.coder(config, world.device) if config.needs_encoders else None
        check(config, world, self._coder)
        self._contexts = {
            number: world.context(number)
            for number in sorted({config.context_of(stage) for stage in config.stages.values()})
        }
        self._state = State.resumed(last, config, world) if last else None

    def steps(self, done: int) -> core.Steps:
        """Every stage that is not done, from where it is."""
        config, world, last = self.config, self._world, self._last
        for number, (name, stage) in enumerate(config.stages.items()):
            begin, end = self._ends[name] - stage.steps, self._ends[name]
            if done >= end:
                continue
            if done == begin:
                self._state = entered(self._state, stage, config, world)
            assert self._state is not None
            state, self._stage = self._state, name
            prepare(state, stage, config)
            self._context = self._contexts[config.context_of(stage)]
            if self.recipe.shares:
                self.recipe.share(state.model, self._context.group)
            seed = draws.stage_seed(config.seed, number)
            data, self._source = data_of(config, name, seed, self._coder, world)
            if last is not None and last.about["stage"] == name:
                self._change(done, check_data(self._source, last, gave_up=self._gave_up))
            batches = batches_of(
                config, stage, data, seed, done - begin, self._coder, self._context
            )
            parameters = list(state.trained.values())

            for step in range(done, end):
                keys, parts = [], []
                for micro in range(stage.accumulate):
                    batch = next(batches).to(world.device)
                    keys += batch.keys
                    with local(state.net, last=micro == stage.accumulate - 1):
                        loss, told = loss_of(state.net, batch, seed, config)
                        (loss / stage.accumulate).backward()
                    parts.append({"loss": loss.detach(), **told})
                decision = state.clipper.clip_(parameters)
                if decision.action == "stop":
                    self._give_up(step, decision, self._all(keys))
                if decision.action != "skip":
                    self.hold = None
                elif self.hold is None:
                    self.hold = step
                rate = stage.rate(step - begin)
                if decision.action != "skip":
                    for group in state.optimizer.param_groups:
                        group["lr"] = rate
                    state.optimizer.step()
                    state.ema.update(state.model)
                state.optimizer.zero_grad()
                row = {
                    "stage": name,
                    **{name: torch.stack([x[name] for x in parts]).mean() for name in parts[0]},
                    "learning_rate": rate,
                    "norm": decision.norm,
                    "threshold": decision.threshold,
                    "action": decision.action,
                }
                if decision.action == "skip":
                    row["keys"] = self._all(keys)
                yield row
            done = end

    def ends(self, done: int) -> bool:
        """Whether a stage does."""
        return done in self._ends.values()

    def tensors(self) -> dict[str, Tensor]:
        """The state's."""
        assert self._state is not None
        return self._state.tensors()

    def about(self) -> dict[str, Any]:
        """What trained it: stage, data and settings, and what was changed on the way."""
        assert self._state is not None
        return {
            "recipe": self.config.recipe,
            "stage": self._stage,
            "data": self._source,
            "settings": settings_of(self.config, self._stage),
            "changes": self._changes,
            "skipping": self.hold,
            **self._state.about(),
        }

    def saved(self, done: int) -> None:
        """Steps are taken again: nothing has stopped the run."""
        if self.hold is None and self._world.rank == 0:
            (self.out / STOPPED).unlink(missing_ok=True)

    def after(self, done: int) -> None:
        """Samples."""
        config = self.config
        if config.samples.every and done % config.samples.every == 0:
            assert self._coder is not None
            assert self._state is not None
            if self._world.rank == 0:
                stage = config.stages[self._stage]
                pipeline = self.recipe.pipeline(self._state.ema.model, self._coder)
                make_samples(config, stage, done, pipeline)
            self._world.wait()

    def _all(self, keys: list[str]) -> list[str]:
        """Those of all processes, once of such as share them."""
        return self._world.all(keys if self._context.first else [])

    def _change(self, done: int, changed: Mapping[str, Any]) -> None:
        if changed:
            self._changes = [*self._changes, {"step": done, **changed}]

    def _give_up(self, step: int, decision: Decision, keys: list[str]) -> None:
        if self._world.rank == 0:
            found = {name: str(value) for name, value in asdict(decision).items()}
            about = {"step": step, "stage": self._stage, **found, "keys": keys}
            write_json(self.out / STOPPED, about)
        since = step if self.hold is None else self.hold
        complete = complete_ones(self.out / FOLDER)
        before = [path.name for path in complete if number_of(path) <= since]
        back = (
            f"; to go back to {' or '.join(before)}, first remove what is newer" if before else ""
        )
        raise FloatingPointError(
            f"step {step} (stage {self._stage}) has a gradient of norm {decision.norm}, and the "
            f"clipper gives up; {self.out / STOPPED} names the samples. Nothing was learned since "
            f"step {since}: continue with other learning rates of the stage (learning_rate, then), "
            f"or without those samples{back}"
        )


def loss_of(
    net: nn.Module, batch: Batch, seed: int, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The flow-matching loss of a micro-batch with what its recipe adds to it, and that by name.

    Noise and its level are each sample's own. What is told by name is not weighed, and detached.
    """
    recipe: Recipe = recipe_of(config.recipe)
    shape = batch.latents.shape[1:]
    shift = recipe.shift(tuple(shape))
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
        velocity, penalties = recipe.penalised(config, net, noisy, levels, batch)
    loss = flow.loss(velocity, flow.velocity(batch.latents, noises))
    for penalty in penalties.values():
        loss = loss + penalty.weight * penalty.value
    return loss, {name: penalty.value.detach() for name, penalty in penalties.items()}


def data_of(
    config: Config, name: str, seed: int, coder: Coder | None, world: World
) -> tuple[Cache | Clips, dict[str, str]]:
    """What a stage reads, and fingerprints of all that is in it."""
    stage, out = config.stages[name], Path(config.out)
    cache, source = config.cache_of(stage), config.source_of(stage)
    if cache is not None:
        held = Cache(cache, coder.fingerprints() if coder else None)
        held.buckets = without_minority(held.buckets, stage.global_batch, held.rule)
        tell(out, name, held.report(), world)
        return held, {"data": held.data, "windows": "fixed", **held.fingerprints}
    assert source is not None
    assert coder is not None
    with world.first_here():  # the others find the index made
        manifest = Manifest.open(source, index=out / "data" / name, limits=config.limits)
    buckets = without_minority(assign(manifest, stage.rule, seed), stage.global_batch, stage.rule)
    tell(out, name, manifest.report(buckets), world)
    clips = Clips(
        manifest, buckets, stage.rule, seed=seed, limits=config.limits, bad=out / "bad.jsonl"
    )
    return clips, {
        "data": manifest.fingerprint,
        "windows": "random",
        **coder.fingerprints(),
    }


def batches_of(
    config: Config,
    stage: Stage,
    data: Cache | Clips,
    seed: int,
    start: int,
    coder: Coder | None,
    context: Context,
) -> Iterator[Batch]:
    """The micro-batches of this process, from step ``start`` of the stage to its end."""
    sampler = BucketBatchSampler(
        data.buckets.bucket,
        stage.global_batch // (context.count * stage.accumulate),
        world=context.count,
        rank=context.index,
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
            assert coder is not None
            features = [coder.features(clip) for clip in read]
        yield collate(
            features, seed=seed, drop=config.drop, mode=config.posterior, images=config.images
        )
