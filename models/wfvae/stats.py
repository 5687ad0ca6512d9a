"""Shift and scale of a WF-VAE's latents, measured: a denoiser learns latents of mean 0, variance 1.

They are of samples of the posterior, which is what a denoiser is trained on, but none are drawn:
the mean of all samples is that of the posterior means, their variance is the variance of these
means and the mean of the posterior variances together. Sums are in fp64.

Measuring that is stopped goes on where it was: the sums so far are kept beside the folder to be
made, in ``OUT.measuring``, which goes when that is there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from skiparse.models import shards
from skiparse.models.data.atomic import seal, write_json
from skiparse.models.data.features import fingerprint
from skiparse.models.data.limits import Limits
from skiparse.models.train.guards import alone, interrupted_by_sigterm, undisturbed
from skiparse.models.train.parallel import World
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.train import Clips, Settings, check_size

CHUNK = 2  # latents coded at a time: the result does not depend on it, memory does
REPORT, SCAN = "statistics.json", "scan.json"
SUMS = "sums.json"  # in ``OUT.measuring``
SAVE_EVERY = 60.0  # seconds from one writing of the sums to the next

Values = tuple[float, ...]


@dataclass(frozen=True)
class Sums:
    """Over the latent pixels of some clips.

    Attributes:
        mean, square: of the posterior means, and of their squares and the variances together;
            fp64 ``[latent channels]`` each, on the CPU.
        pixels, clips: how many they are of.
    """

    mean: Tensor
    square: Tensor
    pixels: int = 0
    clips: int = 0

    @classmethod
    def none(cls, vae: WFVAE) -> Sums:
        """Of no clips."""
        zeros = torch.zeros(vae.config.latent_channels, dtype=torch.float64)
        return cls(zeros, zeros)

    @torch.no_grad()
    def plus(self, vae: WFVAE, clip: Tensor) -> Sums:
        """Of one more: a video ``[B, 3, T, H, W]`` in [-1, 1]; ValueError if it is not finite."""
        latents = vae.encode(clip, chunk_frames=CHUNK * vae.temporal_factor).latent_dist
        mean, variance = latents.mean.double(), latents.var.double()
        dims = (0, 2, 3, 4)
        sums = mean.sum(dims).cpu(), (mean.square() + variance).sum(dims).cpu()
        _check_finite(*sums)
        return Sums(
            self.mean + sums[0],
            self.square + sums[1],
            self.pixels + mean[:, 0].numel(),
            self.clips + 1,
        )

    def result(self) -> tuple[Values, Values]:
        """Shift and scale; ValueError if there are no clips, or the sums are not finite."""
        if not self.pixels:
            raise ValueError("clips has no video in it; give at least one")
        shift, square = self.mean / self.pixels, self.square / self.pixels
        scale = (square - shift.square()).rsqrt()
        _check_finite(shift, scale)
        return tuple(shift.tolist()), tuple(scale.tolist())

    def write(self, path: Path, of: Mapping[str, Any]) -> None:
        """With a checksum, and with what they are sums of; numbers keep all their digits."""
        table = {
            "of": dict(of),
            "mean": self.mean.tolist(),
            "square": self.square.tolist(),
            "pixels": self.pixels,
            "clips": self.clips,
        }
        write_json(path, {**table, "sha256": seal(table)})

    @classmethod
    def read(cls, path: Path, of: Mapping[str, Any]) -> Sums:
        """Those that :meth:`write` wrote.

        Raises:
            ValueError: if the file is damaged, or they are of something else than ``of``.
        """
        anew = f"remove {path.parent} to measure anew"
        try:
            table = json.loads(path.read_bytes())
            sound = isinstance(table, dict) and table.pop("sha256") == seal(table)
        except (ValueError, KeyError):
            sound = False
        if not sound:
            raise ValueError(f"{path} is damaged; {anew}")
        for name, value in of.items():
            if table["of"].get(name) != value:
                raise ValueError(
                    f"{path} has been begun with {name} {table['of'].get(name)}, not {value}; go "
                    f"on with that, or {anew}"
                )
        mean, square = (torch.tensor(table[x], dtype=torch.float64) for x in ("mean", "square"))
        return cls(mean, square, table["pixels"], table["clips"])


def statistics(vae: WFVAE, clips: Iterable[Tensor]) -> tuple[Values, Values]:
    """Mean and 1 / standard deviation of each latent channel, for :meth:`WFVAE.normalize`.

    Args:
        vae: its own shift and scale do not matter.
        clips: videos ``[B, 3, T, H, W]`` in [-1, 1] that ``vae`` can take, of any sizes; every
            latent pixel counts the same.

    Returns:
        Shift and scale, a number for each latent channel.

    Raises:
        ValueError: if there are no clips, ``vae`` cannot take one, or its latents are not finite.
    """
    sums = Sums.none(vae)
    for clip in clips:
        sums = sums.plus(vae, clip)
    return sums.result()


def _check_finite(*values: Tensor) -> None:
    """ValueError unless all of them are numbers."""
    if not torch.stack(values).isfinite().all():
        raise ValueError(
            "the latents of vae have no finite mean and spread, got "
            f"{' and '.join(str(x.tolist()) for x in values)}; look at its weights"
        )


def normalised(vae: WFVAE, shift: Values, scale: Values) -> WFVAE:
    """A copy of ``vae`` with this shift and scale in its config.

    Raises:
        ValueError: unless each has a number for every latent channel.
    """
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        made = type(vae)(**{**config, "shift": tuple(shift), "scale": tuple(scale)})
    weights = {name: weight.clone() for name, weight in vae.state_dict().items()}
    made.load_state_dict(weights, assign=True)
    made.train(vae.training)
    return made


@interrupted_by_sigterm()
def run(
    model: str | os.PathLike[str],
    clips: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    frames: int = 25,
    size: tuple[int, int] = (256, 256),
    every: int = 1,
    cuts: int | None = None,
    seed: int = 0,
    limits: Limits | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> Path:
    """Measure a saved model on the videos of a folder, and write it with its shift and scale.

    Stopped by a signal, an error or a power cut, it goes on when it is called alike again, and
    gives what it would have given.

    Args:
        model: a folder of :class:`WFVAE`, such as ``skiparse export`` makes of a run.
        clips: a folder with videos at any depth, or another source of
            :meth:`~skiparse.models.data.manifest.Manifest.open`; those that will not do are named
            in ``scan.json`` and left out.
        out: the folder to make, with ``statistics.json``, which says what was measured.
        frames, size: of the cuts; a multiple of the temporal factor plus 1, and of 8.
        every: take every so many frames of a file.
        cuts: how many; None takes one of each file. They are random, and follow from ``seed``.
        limits: the largest files to decode.
        device, dtype: where, and the type to compute in. Weights are saved in float32.
        workers: processes that read clips ahead; 0 reads them in between.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: if ``model`` holds no model.
        ValueError: for arguments that make no sense, a folder without videos, an ``out`` that
            exists or that another call is about to make, or one that was begun with other clips
            or settings; before any work.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the sums so far were written.
    """
    if cuts is not None and cuts < 1:
        raise ValueError(f"cuts must be at least 1, got {cuts}; None takes one of each file")
    if not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(f"{Path(model) / 'config.json'} is not there; give a WFVAE")
    shards.refuse_existing(out)
    settings = Settings(frames=frames, size=size, every=every, batch=1, seed=seed)
    vae = WFVAE.from_pretrained(model, local_files_only=True).eval()
    check_size(vae, settings)
    found = Clips(clips, settings, vae, limits)
    for reason, names in found.report.examples.items():
        print(f"left out, {reason}: {', '.join(names)}")
    print(found.report.line)
    count = len(found) if cuts is None else cuts
    settled = {
        "frames": frames,
        "size": list(size),
        "every": every,
        "cuts": count,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    of = {**settled, "model": fingerprint(vae, vae.config), "clips": found.fingerprint}
    worker = WFVAE.from_pretrained(model, torch_dtype=dtype, local_files_only=True).eval()
    worker.to(device)
    begun = Path(out).absolute().with_name(f"{Path(out).name}.measuring")
    with alone(begun, World(0, 1, torch.device(device))):
        try:
            sums = _measured(worker, found, count, begun / SUMS, of, workers)
            shift, scale = sums.result()
            with shards.new_folder(out) as folder:
                normalised(vae, shift, scale).save_pretrained(folder, max_shard_size="100GB")
                about = {
                    "of": "samples of the posterior",
                    "files": len(found),
                    **settled,
                    "shift": list(shift),
                    "scale": list(scale),
                }
                write_json(folder / REPORT, about)
                found.report.write(folder / SCAN)
            (begun / SUMS).unlink()
        finally:
            if not (begun / SUMS).exists():
                shutil.rmtree(begun)
    for channel, (mean, inverse) in enumerate(zip(shift, scale, strict=True)):
        print(f"channel {channel:3}: mean {mean:9.4f}, standard deviation {1 / inverse:9.4f}")
    print(f"The model with shift and scale is at {Path(out).resolve()}")
    return Path(out)


def _measured(
    vae: WFVAE, clips: Clips, count: int, path: Path, of: Mapping[str, Any], workers: int
) -> Sums:
    """Of the first ``count`` cuts of ``clips``; those that ``path`` has are not done again."""
    sums = Sums.read(path, of) if path.exists() else Sums.none(vae)
    loader = DataLoader(
        clips,
        1,
        sampler=range(sums.clips, count),
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=undisturbed,
    )
    first, written = sums.clips, time.monotonic()
    progress = tqdm(loader, "measuring latents", count, initial=first, unit="clip", disable=None)
    try:
        for pictures in progress:
            video = pictures.to(vae.device).movedim(-1, 1) / 127.5 - 1
            sums = sums.plus(vae, video.to(vae.dtype))
            if time.monotonic() - written > SAVE_EVERY:
                sums.write(path, of)
                written = time.monotonic()
    finally:
        if sums.clips > first:
            sums.write(path, of)
    return sums
