"""Shift and scale of a WF-VAE's latents, measured: a denoiser learns latents of mean 0, variance 1.

They are of samples of the posterior, which is what a denoiser is trained on, but none are drawn:
the mean of all samples is that of the posterior means, their variance is the variance of these
means and the mean of the posterior variances together. Sums are in fp64.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from skiparse.models import shards
from skiparse.models.data.atomic import write_json
from skiparse.models.data.limits import Limits
from skiparse.models.train.guards import interrupted_by_sigterm, undisturbed
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.train import Clips, Settings, check_size

CHUNK = 2  # latents coded at a time: the result does not depend on it, memory does
REPORT, SCAN = "statistics.json", "scan.json"

Values = tuple[float, ...]


@torch.no_grad()
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
    device = next(vae.parameters()).device
    total = torch.zeros(2, vae.config.latent_channels, dtype=torch.float64, device=device)
    count = 0
    for clip in clips:
        latents = vae.encode(clip, chunk_frames=CHUNK * vae.temporal_factor).latent_dist
        mean, variance = latents.mean.double(), latents.var.double()
        dims = (0, 2, 3, 4)
        total += torch.stack([mean.sum(dims), (mean.square() + variance).sum(dims)])
        count += mean[:, 0].numel()
    if not count:
        raise ValueError("clips has no video in it; give at least one")
    shift, square = total / count
    scale = (square - shift.square()).rsqrt()
    if not torch.stack([shift, scale]).isfinite().all():
        raise ValueError(
            f"the latents of vae have no finite mean and spread, got a shift of {shift.tolist()} "
            f"and a scale of {scale.tolist()}; look at its weights"
        )
    return tuple(shift.tolist()), tuple(scale.tolist())


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

    Args:
        model: a folder of :class:`WFVAE`, such as ``skiparse export`` makes of a run.
        clips: a folder with videos at any depth, or another source of :meth:`Manifest.open`; those
            that will not do are named in ``scan.json`` and left out.
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
        ValueError: for arguments that make no sense, a folder without videos, or an ``out`` that
            exists; before any work.
        KeyboardInterrupt: on Ctrl-C or SIGTERM; nothing half written stays.
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
    loader = DataLoader(
        found,
        1,
        sampler=range(count),
        num_workers=workers,
        generator=torch.Generator(),
        worker_init_fn=undisturbed,
    )
    worker = WFVAE.from_pretrained(model, torch_dtype=dtype, local_files_only=True).eval()
    worker.to(device)

    def videos() -> Iterator[Tensor]:
        for pictures in tqdm(loader, "measuring latents", count, unit="clip", disable=None):
            yield (pictures.to(device).movedim(-1, 1) / 127.5 - 1).to(dtype)

    shift, scale = statistics(worker, videos())
    with shards.new_folder(out) as folder:
        normalised(vae, shift, scale).save_pretrained(folder, max_shard_size="100GB")
        about = {
            "of": "samples of the posterior",
            "files": len(found),
            "cuts": count,
            "frames": frames,
            "size": list(size),
            "every": every,
            "seed": seed,
            "dtype": str(dtype).removeprefix("torch."),
            "shift": list(shift),
            "scale": list(scale),
        }
        write_json(folder / REPORT, about)
        found.report.write(folder / SCAN)
    for channel, (mean, inverse) in enumerate(zip(shift, scale, strict=True)):
        print(f"channel {channel:3}: mean {mean:9.4f}, standard deviation {1 / inverse:9.4f}")
    print(f"The model with shift and scale is at {Path(out).resolve()}")
    return Path(out)
