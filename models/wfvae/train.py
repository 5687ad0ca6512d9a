"""How a WF-VAE is trained: an autoencoder and its discriminator take turns, on clips of video.

It is a task of :mod:`skiparse.models.train.core`, which runs it: processes, signals, checkpoints
and the log are those of every trainer. A run is a chain of stages. Each starts from the averaged
weights of the one before, with a new discriminator and new optimisers.

Everything random in a step follows from the seed and the number of the step in its stage, and so
does the choice of its clips. So a run that continues from a checkpoint is the run that was never
interrupted: on a CPU bit for bit, on a GPU as far as its kernels repeat themselves (for all of it,
``torch.use_deterministic_algorithms(True)``). Processes that share a batch do, up to rounding, what
one does alone: batch norm, dropout, the samples of latents and the balance of the terms are those
of the whole batch.

Source: Li et al. 2024, "WF-VAE", section 4.1, and its released code for what the paper leaves out.
Without its gradient scaler: bfloat16 has the range of float32.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from skiparse.models.data import dataset
from skiparse.models.data.buckets import Buckets, Rule, assign
from skiparse.models.data.draws import Place, Use
from skiparse.models.data.limits import Limits
from skiparse.models.data.manifest import DataError, Manifest
from skiparse.models.data.report import NAMED, Report
from skiparse.models.train import config as train_config
from skiparse.models.train import core
from skiparse.models.train.checkpoint import FOLDER, Checkpoint, complete_ones
from skiparse.models.train.ema import EMA
from skiparse.models.train.export import model_of
from skiparse.models.train.guards import undisturbed
from skiparse.models.train.log import tell
from skiparse.models.train.optimizer import adamw, state_of
from skiparse.models.train.parallel import World
from skiparse.models.wfvae import losses
from skiparse.models.wfvae.discriminator import Discriminator
from skiparse.models.wfvae.losses import LPIPS, Weights
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

DTYPES = (torch.float32, torch.bfloat16)
BAD = "bad.jsonl"  # names the files that could not be read

_INIT, _STEP, _ORDER, _CUT, _OTHER = range(5)  # uses of random numbers, which must not meet
_USES = {Use.WINDOW: _CUT, Use.REPLACE: _OTHER}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the outcome of a run besides model, clips and number of steps.

    Defaults are those published for the first stage; see :func:`published`.

    Args:
        frames, size: of a clip; a multiple of the temporal factor plus 1, and of 8.
        every: take every so many frames of a file.
        batch: clips in a step.
        learning_rate, weight_decay: of AdamW, for both networks; constant.
        ema: decay of the averaged weights, per step of the autoencoder.
        weights: of the terms of the loss. With ``adversarial=0`` no step goes to the discriminator.
        discriminator_start: step before which there is no discriminator.
        discriminator_width: of its first layer.
        reduction: "sum" as published or "mean"; see :mod:`skiparse.models.wfvae.losses`.
        seed: of everything random.

    Raises:
        ValueError: for a number out of range.
    """

    frames: int = 25
    size: tuple[int, int] = (256, 256)
    every: int = 1
    batch: int = 8
    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    ema: float = 0.999
    weights: Weights = field(default_factory=Weights)
    discriminator_start: int = 0
    discriminator_width: int = 64
    reduction: str = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("frames", "every", "batch", "discriminator_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("weight_decay", "discriminator_start", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1, got {self.ema}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.reduction not in losses.REDUCTIONS:
            raise ValueError(
                f"reduction must be one of {', '.join(losses.REDUCTIONS)}, got {self.reduction!r}"
            )
        for name, weight in asdict(self.weights).items():
            if not weight >= 0:
                raise ValueError(f"weights.{name} must be at least 0, got {weight}")

    def rule(self, vae: WFVAE) -> Rule:
        """Which videos will do for ``vae``: all that are long and large enough."""
        return Rule(
            frames=self.frames,
            every=self.every,
            size=self.size,
            stride=vae.spatial_factor,
            temporal_factor=vae.temporal_factor,
            min_aspect=2**-20,
            max_aspect=2**20,
            longest=2**31,
            minority=0,
        )


@dataclass(frozen=True, kw_only=True)
class WFVAEStage(Settings):
    """A part of a run.

    Args:
        steps: of both networks together.
    """

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"steps must be above 0, got {self.steps}")


@dataclass(frozen=True, kw_only=True)
class WFVAEConfig(train_config.Run):
    """A training run of a WF-VAE.

    Args:
        init: folder with a trained one to start from, such as ``skiparse export`` makes of a run;
            instead of ``preset``.
        preset: size of the model, see ``WFVAE.presets``; from random weights, with exact wavelet
            filters.
        source: what to train on: a folder of videos, or annotations; captions are not looked at.
        lpips: file with the weights of :class:`LPIPS`; None leaves the term out.
    """

    recipe: Literal["wfvae"] = "wfvae"
    stages: dict[str, WFVAEStage]
    preset: str = "v1.5-M"
    source: str
    lpips: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in WFVAE.presets:
            raise ValueError(
                f"preset must be one of {', '.join(WFVAE.presets)}, got {self.preset!r}"
            )


class WFVAERecipe:
    """The recipe of the autoencoder of Open-Sora Plan v1.5."""

    config = WFVAEConfig

    def typed(self, config: WFVAEConfig) -> dict[str, tuple[type[Any], Mapping[str, Any]]]:
        """Nothing: all fields have types of their own."""
        return {}

    def task(self, config: WFVAEConfig) -> Coding:
        """The chain of stages of ``config``.

        Raises:
            ValueError: for sizes that the model cannot take.
            FileNotFoundError: if ``lpips`` or ``init`` is not there.
        """
        lpips = None if config.lpips is None else LPIPS.from_file(config.lpips)
        if lpips is None and any(stage.weights.lpips for stage in config.stages.values()):
            print("without --lpips FILE: trained without the perceptual term")
        vae, out = _initial(config), Path(config.out)

        def source(name: str, world: World) -> tuple[Clips, str]:
            with world.first_here():  # the others find the index made
                clips = Clips(
                    config.source,
                    config.stages[name],
                    vae,
                    config.limits,
                    index=out / "data" / name,
                    bad=out / BAD,
                )
            tell(out, name, clips.report, world)
            return clips, clips.fingerprint

        dtype = getattr(torch, config.dtype)
        return Coding(
            vae, config.stages, source, out, lpips=lpips, dtype=dtype, workers=config.workers
        )

    def exported(self, last: Checkpoint, weights: str, **given: Any) -> WFVAE:
        """The model itself, which needs no other."""
        if given["vae"] is not None or given["text"] is not None:
            raise ValueError(f"{last.path} is of a WFVAE, which needs no vae and text; leave them")
        prefix = {"ema": "ema", "model": "vae"}[weights]
        vae: WFVAE = model_of(last, WFVAE, last.about["wfvae"], prefix)
        return vae


class Clips(Dataset[Tensor]):
    """Cuts of the videos of a source, without end: each clip once an epoch, at a random time.

    Cut ``i`` depends on ``i``, the seed and the files alone. What cannot be read is replaced, and
    too much of it raises, as in :class:`skiparse.models.data.dataset.Clips`.

    Args:
        source: as of :meth:`Manifest.open`; captions are not looked at.
        settings: size and length of the cuts, the batch and the seed.
        vae: whose factors the sizes go by.
        limits: the largest source to decode; ``Limits()`` if None.
        index: folder to keep the list of clips in; None: in memory.
        bad: file that gets a line for every file that cannot be read; None: nowhere.

    Attributes:
        report: how many clips will do, and why others will not.
        fingerprint: of the list of clips.

    Raises:
        DataError: if there is no such source or nothing in it will do.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        settings: Settings,
        vae: WFVAE,
        limits: Limits | None = None,
        *,
        index: str | os.PathLike[str] | None = None,
        bad: str | os.PathLike[str] | None = None,
    ) -> None:
        manifest = Manifest.open(source, index=index, limits=limits, captions=False)
        rule = settings.rule(vae)
        buckets = _videos(assign(manifest, rule, settings.seed), rule)
        self.report: Report = manifest.report(buckets)
        self.fingerprint = manifest.fingerprint
        self._settings, self._rows = settings, np.flatnonzero(buckets.bucket >= 0)
        self._clips = dataset.Clips(
            manifest,
            buckets,
            rule,
            seed=settings.seed,
            limits=limits,
            chance=partial(_chance, settings.batch),
            bad=bad,
        )

    def __len__(self) -> int:
        """How many clips there are."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 ``[frames, height, width, 3]``, RGB; DataError if too many files are bad."""
        settings = self._settings
        epoch, place = divmod(index, len(self))
        order = _random(settings.seed, epoch, _ORDER).permutation(len(self))
        step, sample = divmod(index, settings.batch)
        return self._clips[Place(step, sample, int(self._rows[order[place]]))].frames


@dataclass
class Run:
    """The networks and optimisers of a stage: what a checkpoint holds."""

    vae: WFVAE
    ema: EMA[WFVAE]
    discriminator: Discriminator
    optimizers: dict[str, AdamW]  # "vae" and "discriminator"

    @classmethod
    def start(cls, vae: WFVAE, settings: Settings, device: torch.device) -> Run:
        """Around ``vae``, with a new discriminator."""
        vae.to(device)
        torch.manual_seed(_seed(settings.seed, 0, _INIT))
        discriminator = Discriminator(settings.discriminator_width).to(device)
        optimizers = {
            name: adamw(
                model.named_parameters(),
                lr=settings.learning_rate,
                weight_decay=settings.weight_decay,
            )
            for name, model in (("vae", vae), ("discriminator", discriminator))
        }
        return cls(vae.train(), EMA(vae, decay=settings.ema), discriminator.train(), optimizers)

    def tensors(self) -> dict[str, Tensor]:
        """By name: ``vae.*``, ``ema.*``, ``vae_optimizer.*``, ``discriminator.*`` and so on."""
        found: dict[str, Tensor] = {}
        models: dict[str, nn.Module] = {
            "vae": self.vae,
            "ema": self.ema.model,
            "discriminator": self.discriminator,
        }
        for name, model in models.items():
            found |= {f"{name}.{key}": tensor for key, tensor in model.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            found |= state_of(optimizer, models[name].named_parameters(), f"{name}_optimizer")
        return found


class Coding:
    """The chain of stages of a WF-VAE, as a task of :mod:`skiparse.models.train.core`.

    Args:
        vae: in float32; trained in place.
        stages: by name, in the order in which they are trained.
        source: of a stage, by its name, gives clips and their fingerprint: ``clips[i]`` is uint8
            ``[frames, height, width, 3]``, for every ``i`` from 0 up, and the same each time.
        out: the folder of the run.
        lpips: the perceptual term; left out if None.
        dtype: to compute in: float32, or bfloat16 by autocast.
        workers: processes that read clips ahead; 0 reads them in between.

    Raises:
        ValueError: for arguments that make no sense, or a folder of an older kind of run.
    """

    hold = None  # a step of which something is not finite ends the run

    def __init__(
        self,
        vae: WFVAE,
        stages: Mapping[str, WFVAEStage],
        source: Callable[[str, World], tuple[Dataset[Tensor], str]],
        out: Path,
        *,
        lpips: LPIPS | None = None,
        dtype: torch.dtype = torch.float32,
        workers: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        for stage in stages.values():
            check_size(vae, stage)
        _refuse_older(out)
        self.vae, self.stages, self.source, self.out = vae, stages, source, out
        self.lpips, self.dtype, self.workers = lpips, dtype, workers
        ends = itertools.accumulate(stage.steps for stage in stages.values())
        self._ends = dict(zip(stages, ends, strict=True))
        self.total = max(self._ends.values())

    def begin(self, last: Checkpoint | None, world: World) -> None:
        """Check stages, processes and checkpoint against each other, and be as ``last`` has it."""
        self._world, self._last = world, last
        for name, stage in self.stages.items():
            if stage.batch % world.size:
                raise ValueError(
                    f"stages.{name}.batch={stage.batch} must be a multiple of {world.size}, the "
                    "number of processes"
                )
        self._stage, *_ = self.stages
        if last is not None:
            self._stage = last.about.get("stage", "")
            self._refuse_other(last)
        self._run = Run.start(self.vae, self.stages[self._stage], world.device)
        if last is not None:
            last.load(self._run.tensors())
        if self.lpips is not None:
            self.lpips.to(world.device)

    def steps(self, done: int) -> core.Steps:
        """Every stage that is not done, from where it is."""
        for name, stage in self.stages.items():
            begin, end = self._ends[name] - stage.steps, self._ends[name]
            if done >= end:
                continue
            if name != self._stage:
                self.vae.load_state_dict(self._run.ema.model.state_dict())
                self._run, self._stage = Run.start(self.vae, stage, self._world.device), name
            clips, self._data = self.source(name, self._world)
            self._refuse_other_data()
            networks = _Networks(self._run, self._world)
            batches = self._batches(clips, stage, done - begin)
            for step, pictures in enumerate(batches, done - begin):
                yield {"stage": name, **self._step(networks, stage, step, pictures, begin)}
            done = end

    def _batches(self, clips: Dataset[Tensor], stage: WFVAEStage, start: int) -> DataLoader[Tensor]:
        """This process's share of the clips of every step from ``start`` on, uint8."""
        share = range(stage.batch)[self._world.share(stage.batch)]
        return DataLoader(
            clips,
            batch_sampler=(
                [step * stage.batch + i for i in share] for step in range(start, stage.steps)
            ),
            num_workers=self.workers,
            pin_memory=self._world.device.type == "cuda",
            worker_init_fn=undisturbed,
        )

    def _step(
        self, networks: _Networks, stage: WFVAEStage, step: int, pictures: Tensor, begin: int
    ) -> dict[str, Any]:
        """One step of one of the networks, and its row."""
        if pictures.shape[1:] != (stage.frames, *stage.size, 3):
            raise ValueError(
                f"clips must be [{stage.frames}, {stage.size[0]}, {stage.size[1]}, 3] by settings, "
                f"got {list(pictures.shape[1:])}"
            )
        run, world, weights = self._run, self._world, stage.weights
        torch.manual_seed(_seed(stage.seed, step, _STEP))
        video = pictures.to(world.device).movedim(-1, 1) / 127.5 - 1  # [B, 3, T, H, W]
        adversarial = weights.adversarial > 0 and step >= stage.discriminator_start
        judging = adversarial and step % 2 == 1
        run.discriminator.requires_grad_(judging)
        coarse = partial(
            torch.autocast,
            world.device.type,
            torch.bfloat16,
            enabled=self.dtype == torch.bfloat16,
        )
        with coarse(), torch.set_grad_enabled(not judging):
            coded = networks.vae(video)
        if judging:
            with coarse():
                fake, real = networks.discriminator(coded.made, video)
            terms = {"loss": losses.hinge(real.float(), fake.float())}
        else:
            with coarse():
                perceptual = None if self.lpips is None else self.lpips(video, coded.made)
                judgement = run.discriminator(coded.made) if adversarial else None
            terms = losses.objective(
                video,
                coded.made.float(),
                mean=coded.mean,
                logvar=coded.logvar,
                coefficients=[x.float() for x in coded.coefficients],
                made_coefficients=[x.float() for x in coded.made_coefficients],
                weights=weights,
                reduction=stage.reduction,
                perceptual=None if perceptual is None else perceptual.float(),
                judgement=None if judgement is None else judgement.float(),
                last=run.vae.decoder.conv_out.weight,
                average=world.average,
            )

        name = "discriminator" if judging else "vae"
        optimizer = run.optimizers[name]
        optimizer.zero_grad()
        terms["loss"].backward()
        parameters = optimizer.param_groups[0]["params"]
        terms["gradient"] = get_total_norm([p.grad for p in parameters if p.grad is not None])
        row = dict(zip(terms, world.mean(*(x.detach() for x in terms.values())), strict=True))
        if not np.isfinite(list(row.values())).all():
            last, *_ = [*reversed(complete_ones(self.out / FOLDER)), "no checkpoint"]
            raise FloatingPointError(
                f"step {begin + step} of the {name}: not finite, {row}; nothing of it was kept, "
                f"{last} is the last checkpoint. Lower learning_rate, or look at the clips"
            )
        optimizer.step()
        if not judging:
            run.ema.update(run.vae)
        return {"of": name, **row}

    def ends(self, done: int) -> bool:
        """Whether a stage does."""
        return done in self._ends.values()

    def tensors(self) -> dict[str, Tensor]:
        """The run's."""
        return self._run.tensors()

    def about(self) -> dict[str, Any]:
        """What made it, none of which may change when the run goes on."""
        return {**self._settings(), "data": self._data}

    def _settings(self) -> dict[str, Any]:
        """All of that but the data, ready for JSON."""
        begun = itertools.takewhile(lambda name: name != self._stage, self.stages)
        stages = {name: asdict(self.stages[name]) for name in [*begun, self._stage]}
        del stages[self._stage]["steps"]  # may grow
        about = {
            "recipe": "wfvae",
            "stage": self._stage,
            **{f"settings of {name}": settings for name, settings in stages.items()},
            "wfvae": {k: v for k, v in self.vae.config.items() if not k.startswith("_")},
            "lpips": self.lpips is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        found: dict[str, Any] = json.loads(json.dumps(about))
        return found

    def saved(self, done: int) -> None:
        """Nothing more is to be done then."""

    def after(self, done: int) -> None:
        """Nothing more is to be done after a step."""

    def _refuse_other(self, last: Checkpoint) -> None:
        """ValueError if the checkpoint is of another kind of run, or at the end of this one."""
        if "wfvae" not in last.about:
            raise ValueError(f"{last.path} is of no WFVAE; choose another out")
        if self._stage not in self.stages:
            raise ValueError(
                f"{last.path} is of the stage {self._stage!r}, which the run does not have; "
                "continue with its stages, or start in another folder"
            )
        for name, value in self._settings().items():
            if last.about.get(name) != value:
                was, now = _differences(last.about.get(name), value)
                raise ValueError(
                    f"{last.path} is of a run with {name} {was}, not {now}; continue with those, "
                    "or start in another folder"
                )
        if self.total <= last.step:
            raise ValueError(
                f"steps must be above {last.step}, which {self.out} has reached, got {self.total}"
            )

    def _refuse_other_data(self) -> None:
        """ValueError if the stage was begun with other clips."""
        last = self._last
        if last is None or last.about["stage"] != self._stage or last.about["data"] == self._data:
            return
        raise ValueError(
            f"{last.path} was trained on other clips in this stage; put them back, or begin a "
            "stage with the new ones"
        )


@dataclass
class _Coded:
    """What an autoencoder made of a video."""

    made: Tensor  # [B, 3, T, H, W]
    mean: Tensor  # of the latents [B, C, t, h, w], fp32
    logvar: Tensor
    coefficients: list[Tensor]  # of each level, [B, 24, ...]
    made_coefficients: list[Tensor]


class _Autoencoder(nn.Module):
    """There and back, by a sample of the latents, as one call: what processes share."""

    def __init__(self, vae: WFVAE, world: World) -> None:
        super().__init__()
        self.vae, self._world = vae, world

    def forward(self, video: Tensor) -> _Coded:
        """Of ``[B, 3, T, H, W]``; samples are those of the whole batch."""
        moments, *coefficients = self.vae.encoder(video, Stream())
        posterior = DiagonalGaussianDistribution(moments.float())
        mean, batch = posterior.mean, len(video) * self._world.size
        noise = torch.randn((batch, *mean.shape[1:]), dtype=mean.dtype, device=mean.device)
        latents = mean + posterior.std * noise[self._world.share(batch)]
        made, *made_coefficients = self.vae.decoder(latents, Stream())
        return _Coded(made, mean, posterior.logvar, coefficients, made_coefficients)


class _Judge(nn.Module):
    """Both judgements of a step of the discriminator, as one call."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, made: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
        """Of ``[B, 3, T, H, W]`` each."""
        return self.discriminator(made), self.discriminator(video)


class _Networks:
    """The networks of a run as a step calls them: themselves, or spread over the processes."""

    def __init__(self, run: Run, world: World) -> None:
        run.discriminator.shared(world).requires_grad_(True)
        self.vae = world.spread(_Autoencoder(run.vae, world), "ddp")
        self.discriminator = world.spread(_Judge(run.discriminator), "ddp")


def train(
    vae: WFVAE,
    clips: Dataset[Tensor],
    *,
    out: str | os.PathLike[str],
    steps: int,
    settings: Settings,
    lpips: LPIPS | None = None,
    save_every: int = 1000,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> Path:
    """Train ``vae`` until step ``steps``, from the last checkpoint in ``out`` if there is one.

    Odd steps train the discriminator, even ones the autoencoder, each on new clips; steps before
    ``settings.discriminator_start`` all train the autoencoder, without the adversarial term.

    Args:
        vae: in float32; trained in place, with weights from the checkpoint if there is one.
        clips: ``clips[i]`` is uint8 ``[frames, height, width, 3]``, for every ``i`` from 0 up, and
            the same each time.
        out: folder of the run, see :mod:`skiparse.models.train.core`; made if need be.
        steps: in all, of both networks together.
        settings: the same as those of the checkpoint.
        lpips: the perceptual term; left out if None.
        save_every: steps from one checkpoint to the next; there is one at the end too.
        device, dtype: where, and the type to compute in: float32, or bfloat16 by autocast.
        workers: processes that read clips ahead; 0 reads them in between.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: for arguments that make no sense or do not fit the checkpoint, before any work.
        CheckpointError: if the checkpoint is damaged, or none can be written at the end.
        FloatingPointError: if the loss or its gradient is not finite, naming the step; what was
            saved before stays.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    stage = WFVAEStage(**{**vars(settings), "steps": steps})
    task = Coding(
        vae,
        {"vae": stage},
        lambda name, world: (clips, ""),
        Path(out),
        lpips=lpips,
        dtype=dtype,
        workers=workers,
    )
    return core.run(task, Path(out), device=str(device), save_every=save_every, keep=2)


def train_folder(
    folder: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    model: str = "v1.5-M",
    init: str | os.PathLike[str] | None = None,
    stage: str = "I",
    steps: int | None = None,
    lpips: str | os.PathLike[str] | None = None,
    given: Mapping[str, Any],
    limits: Limits | None = None,
    save_every: int = 1000,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> Path:
    """One published stage on the videos of a folder: what ``skiparse train-vae`` does.

    It is a short way to say ``skiparse train wfvae`` with that stage alone.

    Args:
        folder: with videos, at any depth; those that will not do are named and left out.
        out: folder of the run, which continues if it has begun.
        model: a preset of :class:`WFVAE`, from random weights, with exact wavelet filters.
        init: instead, a folder with a trained one, such as ``skiparse export`` makes of a run.
        stage: of the chain ``wfvae``.
        steps: instead of those of the stage.
        lpips: file with the weights of :class:`LPIPS`; None leaves the term out.
        given: settings that differ from those of the stage, by name, weights among them as
            ``lpips_weight`` and so on.
        limits: the largest files to decode.
        save_every, device, dtype, workers: as of :func:`train`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: as :func:`train` and :class:`Clips`, and for unknown names.
        FileNotFoundError: if ``lpips`` or ``init`` is not there.
    """
    stages = published()
    for name, value, known in (("stage", stage, stages), ("model", model, WFVAE.presets)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    chosen, changes, suffix = stages[stage], dict(given), "_weight"
    weights = {
        name.removesuffix(suffix): changes.pop(name) for name in given if name.endswith(suffix)
    }
    chosen = replace(
        chosen,
        steps=chosen.steps if steps is None else steps,
        weights=replace(chosen.weights, **weights),
        **changes,
    )
    config = WFVAEConfig(
        out=os.fspath(out),
        stages={stage: chosen},
        init=None if init is None else os.fspath(init),
        preset=model,
        source=os.fspath(folder),
        lpips=None if lpips is None else os.fspath(lpips),
        limits=limits or Limits(),
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        workers=workers,
        save_every=save_every,
    )
    return core.train(config)


def published() -> dict[str, WFVAEStage]:
    """The stages of the chain ``wfvae``, by name."""
    return dict(train_config.stages_of("wfvae"))


def _initial(config: WFVAEConfig) -> WFVAE:
    """The model that the first stage starts from."""
    if config.init is not None:
        if not (Path(config.init) / "config.json").is_file():
            raise FileNotFoundError(
                f"{Path(config.init) / 'config.json'} is not there; give a WFVAE"
            )
        found: WFVAE = WFVAE.from_pretrained(config.init, local_files_only=True)
        return found
    first, *_ = config.stages.values()
    fresh = {"haar_gain": None, "shift": None, "scale": None}  # those of released weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(first.seed)
        return WFVAE(**{**WFVAE.presets[config.preset], **fresh})


def check_size(vae: WFVAE, settings: Settings) -> None:
    """ValueError unless ``vae`` can take clips of the frames and size in ``settings``."""
    factor, pixels = vae.temporal_factor, vae.spatial_factor
    if (settings.frames - 1) % factor:
        below = (settings.frames - 1) // factor * factor + 1
        raise ValueError(
            f"frames must be {factor}n + 1, got {settings.frames}: take {below} or {below + factor}"
        )
    if min(settings.size) < pixels or any(length % pixels for length in settings.size):
        raise ValueError(f"size must be multiples of {pixels}, got {settings.size}")


def _differences(was: Any, now: Any) -> tuple[Any, Any]:
    """What differs, of two dicts only the entries that do."""
    if not isinstance(was, dict):
        return was, now
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return {n: was.get(n) for n in names}, {n: now.get(n) for n in names}


def _random(seed: int, number: int, use: int) -> np.random.Generator:
    return np.random.default_rng((seed, number, use))


def _seed(seed: int, number: int, use: int) -> int:
    return int(_random(seed, number, use).integers(2**63))


def _chance(batch: int, seed: int, step: int, index: int, use: Use) -> np.random.Generator:
    """Of one cut, by its number, whatever the batch."""
    return _random(seed, step * batch + index, _USES[use])


def _videos(buckets: Buckets, rule: Rule) -> Buckets:
    """``buckets`` without images, which are none of as many frames."""
    assert rule.size is not None
    wanted = [shape == (rule.frames, *rule.size) for shape in buckets.shapes]
    other = (buckets.bucket >= 0) & ~np.array([*wanted, False])[buckets.bucket]
    if not other.any():
        return buckets
    if not any(wanted):
        raise DataError(f"no clip is left: {other.sum()} images; give videos")
    return replace(
        buckets,
        bucket=np.where(other, -1, buckets.bucket).astype(np.int16),
        dropped={**buckets.dropped, "an image": int(other.sum())},
        examples={**buckets.examples, "an image": np.flatnonzero(other)[:NAMED].tolist()},
    )


def _refuse_older(out: Path) -> None:
    """ValueError if ``out`` has checkpoints of the trainer that there was before version 0.2."""
    older = sorted(path.parent for path in out.glob("step-[0-9]*/state.json"))
    if older:
        raise ValueError(
            f"{older[-1]} is a checkpoint of an older trainer, without checksums, and is not "
            "continued; begin a run in another folder from its averaged weights, by --init "
            f"{older[-1]}"
        )
