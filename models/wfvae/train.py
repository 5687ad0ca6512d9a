"""How a WF-VAE is trained: an autoencoder and its discriminator take turns, from clips in a folder.

Everything random in a step follows from the seed and the number of the step, and so does the choice
of its clips. So a run that continues from a checkpoint is the run that was never interrupted: on a
CPU bit for bit, on a GPU as far as its kernels repeat themselves (for all of it,
``torch.use_deterministic_algorithms(True)``).

A checkpoint is a folder ``step-00001000`` of safetensors and JSON. It loads as the model with
averaged weights, ``WFVAE.from_pretrained(folder)``; to continue there are ``train.safetensors``
(weights, discriminator, optimisers) and ``state.json`` (settings, step).

Source: Li et al. 2024, "WF-VAE", section 4.1, and its released code for what the paper leaves out.
Without its gradient scaler: bfloat16 has the range of float32.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skiparse.models import shards
from skiparse.models.data.atomic import truncated
from skiparse.models.data.folder import walk
from skiparse.models.data.plain import printable
from skiparse.models.data.report import Dropped, Report
from skiparse.models.data.video import Limits, VideoError, probe, read_video
from skiparse.models.train.ema import EMA
from skiparse.models.wfvae import losses
from skiparse.models.wfvae.discriminator import Discriminator
from skiparse.models.wfvae.losses import LPIPS, Weights
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

LOG, STATE, TENSORS = "log.jsonl", "state.json", "train.safetensors"
KEEP = 2  # checkpoints in the folder of a run
DTYPES = (torch.float32, torch.bfloat16)
SCAN = "scan.json"  # which files are used

_BAD_SHARE, _JUDGED, _TRIES = 0.01, 100, 20  # as in skiparse.models.data.dataset

_INIT, _STEP, _ORDER, _CUT, _OTHER = range(5)  # uses of random numbers, which must not meet


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that decides the outcome of a run besides model, clips and number of steps.

    Defaults are those published for the first stage; see :data:`STAGES`.

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


# Steps and settings. Each stage starts from the averaged weights of the one before, with a new
# discriminator and new optimisers.
STAGES: dict[str, tuple[int, Settings]] = {
    "I": (800_000, Settings()),
    "II": (200_000, Settings(frames=49, every=2)),
    "III": (200_000, Settings(frames=49, every=2, weights=Weights(lpips=0.1))),
}


class Clips(Dataset[Tensor]):
    """Cuts of the videos under a folder, without end: each file once an epoch, at a random time.

    Cut ``i`` depends on ``i``, the seed and the files alone. In place of one that cannot be read
    comes one of another file; once more than 1 % of those that a worker tried are bad (of 100, or
    of all if there are fewer), it raises. A file too large to be read through at the beginning has
    its frames counted when it is first cut.

    Args:
        folder: everything in it and below is tried.
        settings: size and length of the cuts, and the seed.
        limits: the largest source to decode; ``Limits()`` if None.

    Attributes:
        files: path, frames per second of a cut, and frames to cut from, for each file that will do.
        left_out: path and reason, for each that will not.
        bad: reasons of the files that could not be read in this process, by path.
        report: how many files will do, and why others will not.

    Raises:
        ValueError: if there is no such folder or no file in it will do.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Settings,
        limits: Limits | None = None,
    ) -> None:
        self.settings, self.limits = settings, limits or Limits()
        self.files: list[tuple[Path, Fraction, int]] = []
        self.left_out: dict[Path, str] = {}
        self.bad: dict[Path, str] = {}
        self._tried: set[int] = set()  # numbers of files
        self._estimated: set[Path] = set()  # their lengths are
        if not Path(folder).is_dir():
            raise ValueError(f"{os.fspath(folder)} is no folder; give one with video files")
        dropped = Dropped()
        paths = sorted(walk(Path(folder), dropped))
        with ThreadPoolExecutor() as pool:
            found = pool.map(self._look, paths)
            for path, looked in tqdm(
                zip(paths, found, strict=True), "looking at files", len(paths), unit="file"
            ):
                if isinstance(looked[1], str):
                    reason, why = looked
                    self.left_out[path] = why
                    dropped.add(str(reason), why)
                else:
                    self.files.append((path, *looked))
        self.report = Report(os.fspath(folder), len(self.files), dropped.counts, dropped.examples)
        if not self.files:
            reasons = "; ".join(list(self.left_out.values())[:3]) or "there are no files"
            raise ValueError(f"{os.fspath(folder)} has no video to train on: {reasons}")

    def _look(self, path: Path) -> tuple[Fraction, int] | tuple[str, str]:
        """Rate of a cut and frames to cut from; or why the file will not do, and more about it."""
        settings, limits = self.settings, self.limits
        try:
            info = probe(path, limits=limits)
            if not info.frames or not info.fps:
                why = "does not say how many frames it has, or how many a second"
                return "without a length", f"{str(path)!r}: {why}"
            held = limits.why_held(info.hold)
            if held:
                return "with a long pause", f"{str(path)!r}: {held}"
            rate, frames = info.fps / settings.every, (info.frames - 1) // settings.every + 1
            if not info.exact:
                self._estimated.add(path)
            if frames < settings.frames:
                return "too few frames", (
                    f"{str(path)!r}: {info.frames} frames, too few for {settings.frames} of every "
                    f"{settings.every}"
                )
            read_video(path, frames=1, fps=rate, size=settings.size, limits=limits, threads=1)
        except VideoError as error:
            kind = printable(path.suffix.lower()) or "no suffix"
            return f"that cannot be read ({kind})", str(error)
        return rate, frames

    def __getitem__(self, index: int) -> Tensor:
        """uint8 ``[frames, height, width, 3]``, RGB; ValueError if too many files are bad."""
        settings, count = self.settings, len(self.files)
        epoch, place = divmod(index, count)
        order = _random(settings.seed, epoch, _ORDER).permutation(count)
        others = iter(_random(settings.seed, index, _OTHER).permutation(count)[:_TRIES].tolist())
        number: int | None = int(order[place])
        while number is not None:
            self._tried.add(number)
            try:
                return self._cut(number, index)
            except VideoError as error:
                self.bad.setdefault(self.files[number][0], str(error))
            share = len(self.bad) / len(self._tried)
            if share > _BAD_SHARE and len(self._tried) >= min(_JUDGED, count):
                break
            number = next(others, None)
        raise ValueError(
            f"{len(self.bad)} of the {len(self._tried)} files tried are bad: "
            f"{'; '.join(list(self.bad.values())[:3])}. Mend or remove these files"
        )

    def _cut(self, number: int, index: int) -> Tensor:
        """Cut ``index`` of a file; VideoError if it cannot be read."""
        settings = self.settings
        path, rate, frames = self.files[number]
        if path in self._estimated:
            info = probe(path, limits=self.limits, whole=True)
            if (
                not info.fps
                or not info.frames
                or info.frames <= settings.every * (settings.frames - 1)
            ):
                raise VideoError(f"{str(path)!r}: {info.frames} frames when counted, too few")
            rate, frames = info.fps / settings.every, (info.frames - 1) // settings.every + 1
            self.files[number] = path, rate, frames
            self._estimated.remove(path)
        start = int(
            _random(settings.seed, index, _CUT).integers(frames - settings.frames, endpoint=True)
        )
        return read_video(
            path,
            frames=settings.frames,
            fps=rate,
            size=settings.size,
            start=start / rate,
            limits=self.limits,
            threads=1,
        )


@dataclass
class Run:
    """The networks and optimisers of a run: what a checkpoint holds."""

    vae: WFVAE
    ema: EMA[WFVAE]
    discriminator: Discriminator
    optimizers: dict[str, AdamW]  # "vae" and "discriminator"

    @classmethod
    def start(cls, vae: WFVAE, settings: Settings, device: str | torch.device) -> Run:
        """Around ``vae``, with a new discriminator."""
        vae.to(device)
        torch.manual_seed(_seed(settings.seed, 0, _INIT))
        discriminator = Discriminator(settings.discriminator_width).to(device)
        optimizers = {
            name: AdamW(
                model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
            )
            for name, model in (("vae", vae), ("discriminator", discriminator))
        }
        return cls(vae, EMA(vae, decay=settings.ema), discriminator, optimizers)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the average, by name: ``vae.*``, ``vae_optimizer.*`` and so on."""
        found: dict[str, Tensor] = {}
        for name, optimizer in self.optimizers.items():
            model = getattr(self, name)
            found |= {f"{name}.{key}": tensor for key, tensor in model.state_dict().items()}
            for key, parameter in model.named_parameters():
                for kind, tensor in optimizer.state[parameter].items():
                    found[f"{name}_optimizer.{key}.{kind}"] = tensor
        return {name: tensor.detach().contiguous() for name, tensor in found.items()}

    def load(self, folder: Path) -> None:
        """Continue from the checkpoint in ``folder``; strict about names and shapes."""
        self.ema.model.load_state_dict(shards.read_file(folder / f"{shards.STEM}.safetensors"))
        held = shards.read_file(folder / TENSORS)
        for name, optimizer in self.optimizers.items():
            model = getattr(self, name)
            model.load_state_dict(_under(f"{name}.", held))
            state = _under(f"{name}_optimizer.", held)
            names = [key for key, _ in model.named_parameters()]
            optimizer.load_state_dict(
                {
                    "state": {i: _under(f"{key}.", state) for i, key in enumerate(names) if state},
                    "param_groups": optimizer.state_dict()["param_groups"],
                }
            )

    def save(self, out: Path, step: int, about: Mapping[str, Any]) -> Path:
        """A checkpoint in ``out``, whole or not at all; then the oldest ones go."""
        path = out / f"step-{step:08d}"
        with shards.new_folder(path) as folder:
            self.ema.model.save_pretrained(folder, max_shard_size="100GB")
            save_file(self.tensors(), folder / TENSORS)
            text = json.dumps({"step": step, **about}, indent=2)
            (folder / STATE).write_text(text + "\n", encoding="utf-8")
        for old in checkpoints(out)[:-KEEP]:
            hidden = out / f".{old.name}.old"  # half removed, it must not look like one
            old.rename(hidden)
            shutil.rmtree(hidden)
        return path


def checkpoints(out: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in the folder of a run, oldest first."""
    return sorted(Path(out).glob("step-[0-9]*"))


def train(
    vae: WFVAE,
    clips: Dataset[Tensor],
    *,
    out: str | os.PathLike[str],
    steps: int,
    settings: Settings,
    lpips: LPIPS | None = None,
    report: Report | None = None,
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
        out: folder for checkpoints and ``log.jsonl``, a line for every step; made if need be.
        steps: in all, of both networks together.
        settings: the same as those of the checkpoint.
        lpips: the perceptual term; left out if None.
        report: of the clips, to be kept in ``out`` as ``scan.json``.
        save_every: steps from one checkpoint to the next; there is one at the end too.
        device, dtype: where, and the type to compute in: float32, or bfloat16 by autocast.
        workers: processes that read clips ahead; 0 reads them in between.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: for arguments that make no sense or do not fit the checkpoint, before any work.
        FloatingPointError: if the loss or its gradient is not finite, naming the step; what was
            saved before stays.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    check_size(vae, settings)
    out, device = Path(out), torch.device(device)
    about = json.loads(
        json.dumps(
            {
                "settings": asdict(settings),
                "model": {k: v for k, v in vae.config.items() if not k.startswith("_")},
                "lpips": lpips is not None,
                "dtype": str(dtype).removeprefix("torch."),
            }
        )
    )
    saved = checkpoints(out)
    begin = _continue_at(saved[-1], about) if saved else 0
    if steps <= begin:
        raise ValueError(f"steps must be above {begin}, which {out} has reached, got {steps}")
    out.mkdir(parents=True, exist_ok=True)
    if report is not None:
        report.write(out / SCAN)
    with (
        torch.random.fork_rng(range(torch.cuda.device_count())),
        tqdm(total=steps, initial=begin, unit="step") as bar,
        truncated(out / LOG, begin) as log,
    ):
        run = Run.start(vae, settings, device)
        if saved:
            run.load(saved[-1])
        discriminator, weights = run.discriminator.train(), settings.weights
        vae.train()
        if lpips is not None:
            lpips.to(device)
        loader = DataLoader(
            clips,
            settings.batch,
            sampler=range(begin * settings.batch, steps * settings.batch),
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        for step, pictures in enumerate(loader, begin):
            if pictures.shape[1:] != (settings.frames, *settings.size, 3):
                raise ValueError(
                    f"clips must be [{settings.frames}, {settings.size[0]}, {settings.size[1]}, 3] "
                    f"by settings, got {list(pictures.shape[1:])}"
                )
            torch.manual_seed(_seed(settings.seed, step, _STEP))
            video = pictures.to(device).movedim(-1, 1) / 127.5 - 1  # [B, 3, T, H, W]
            adversarial = weights.adversarial > 0 and step >= settings.discriminator_start
            judging = adversarial and step % 2 == 1
            discriminator.requires_grad_(judging)

            with (
                torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
                torch.set_grad_enabled(not judging),
            ):
                moments, *coefficients = vae.encoder(video, Stream())
                posterior = DiagonalGaussianDistribution(moments.float())
                made, *made_coefficients = vae.decoder(posterior.sample(), Stream())

            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                perceptual = lpips(video, made) if lpips is not None and not judging else None
                judgement = discriminator(made) if adversarial else None
                real = discriminator(video) if judging else None

            if real is not None and judgement is not None:
                terms = {"loss": losses.hinge(real.float(), judgement.float())}
            else:
                terms = losses.objective(
                    video,
                    made.float(),
                    mean=posterior.mean,
                    logvar=posterior.logvar,
                    coefficients=[x.float() for x in coefficients],
                    made_coefficients=[x.float() for x in made_coefficients],
                    weights=weights,
                    reduction=settings.reduction,
                    perceptual=None if perceptual is None else perceptual.float(),
                    judgement=None if judgement is None else judgement.float(),
                    last=vae.decoder.conv_out.weight,
                )

            name = "discriminator" if judging else "vae"
            optimizer = run.optimizers[name]
            optimizer.zero_grad()
            terms["loss"].backward()
            parameters = optimizer.param_groups[0]["params"]
            terms["gradient"] = get_total_norm([p.grad for p in parameters if p.grad is not None])
            row = dict(zip(terms, torch.stack(list(terms.values())).tolist(), strict=True))
            if not np.isfinite(list(row.values())).all():
                raise FloatingPointError(
                    f"step {step} of the {name}: not finite, {row}; nothing of it was kept, "
                    f"{checkpoints(out)[-1] if checkpoints(out) else 'no checkpoint'} is the last "
                    "checkpoint. Lower learning_rate, or look at the clips"
                )
            optimizer.step()
            if not judging:
                run.ema.update(vae)

            log.write(json.dumps({"step": step, "of": name, **row}) + "\n")
            bar.set_postfix_str(f"{name} {row['loss']:.4g}")
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == steps:
                log.flush()
                run.save(out, step + 1, about)
    return checkpoints(out)[-1]


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
    **how: Any,
) -> Path:
    """A published stage on the videos of a folder: what ``skiparse train-vae`` does.

    Args:
        folder: with videos, at any depth; those that will not do are named and left out.
        out: folder of the run, which continues if it has begun.
        model: a preset of :class:`WFVAE`, from random weights, with exact wavelet filters.
        init: instead, a folder with a trained one, such as a checkpoint of the stage before.
        stage: of :data:`STAGES`.
        steps: instead of those of the stage.
        lpips: file with the weights of :class:`LPIPS`; None leaves the term out.
        given: settings that differ from those of the stage, by name, weights among them as
            ``lpips_weight`` and so on.
        limits: the largest files to decode.
        how: ``save_every``, ``device``, ``dtype``, ``workers`` of :func:`train`.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError: as :func:`train` and :class:`Clips`, and for unknown names.
        FileNotFoundError: if ``lpips`` or ``init`` is not there.
    """
    for name, value, known in (("stage", stage, STAGES), ("model", model, WFVAE.presets)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    length, settings = STAGES[stage]
    changes, suffix = dict(given), "_weight"
    weights = {
        name.removesuffix(suffix): changes.pop(name) for name in given if name.endswith(suffix)
    }
    settings = replace(settings, weights=replace(settings.weights, **weights), **changes)
    perceptual = None if lpips is None else LPIPS.from_file(lpips)
    if perceptual is None and settings.weights.lpips:
        print("without --lpips FILE: trained without the perceptual term")
    if init is None:
        torch.manual_seed(settings.seed)
        fresh = {"haar_gain": None, "shift": None, "scale": None}  # those of released weights
        vae = WFVAE(**{**WFVAE.presets[model], **fresh})
    else:
        if not (Path(init) / "config.json").is_file():
            raise FileNotFoundError(f"{Path(init) / 'config.json'} is not there; give a WFVAE")
        vae = WFVAE.from_pretrained(init)
    check_size(vae, settings)
    clips = Clips(folder, settings, limits)
    for reason in clips.left_out.values():
        print(f"left out: {printable(reason)}")
    print(f"files to train on: {len(clips.files)}")
    print(clips.report.line)
    return train(
        vae,
        clips,
        out=out,
        steps=length if steps is None else steps,
        settings=settings,
        lpips=perceptual,
        report=clips.report,
        **how,
    )


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


def _continue_at(folder: Path, about: Mapping[str, Any]) -> int:
    """The step at which the checkpoint was saved; ValueError if it is of another kind of run."""
    state = json.loads((folder / STATE).read_text("utf-8"))
    for name, value in about.items():
        if state[name] != value:
            was, now = _differences(state[name], value)
            raise ValueError(
                f"{folder} is of a run with {name} {was}, not {now}; continue with those, or "
                "start in another folder"
            )
    return int(state["step"])


def _differences(was: Any, now: Any) -> tuple[Any, Any]:
    """What differs, of two dicts only the entries that do."""
    if not isinstance(was, dict):
        return was, now
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return {n: was.get(n) for n in names}, {n: now.get(n) for n in names}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose name begins with ``prefix``, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _random(seed: int, number: int, use: int) -> np.random.Generator:
    return np.random.default_rng((seed, number, use))


def _seed(seed: int, number: int, use: int) -> int:
    return int(_random(seed, number, use).integers(2**63))
