"""How well WF-VAE gives videos back: PSNR, SSIM, and distances of networks that the caller brings.

Every clip is cut to the same frames and size, coded to the mode of its latents and back, and
compared frame by frame, without a video file in between. LPIPS and the features of a video need
trained networks, which are not shipped; without their files these columns are missing.

Two numbers go by the name of rFVD. ``paired_distance`` is the squared distance between the features
of one clip and of its reconstruction: what the evaluation script released with WF-VAE averages.
``frechet_distance`` is between the features of all clips and of all reconstructions, each set taken
for a Gaussian; it is FVD if the network is that of FVD, and needs many clips to mean much.

Source: Li et al. 2024, "WF-VAE", section 4, and its released evaluation scripts, for the protocol.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

import skiparse
from skiparse.models import shards
from skiparse.models.data.atomic import check_writable, write_json
from skiparse.models.data.limits import Limits
from skiparse.models.data.video import probe, read_video
from skiparse.models.networks import Pictures, existing, load_lpips, script, takes
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.tiling import decode_tiled, encode_tiled
from skiparse.models.writer import MAX_FPS, write_image

FRAMES, SIZE = 33, (256, 256)  # of the published protocol
BEST_PSNR = 100.0  # of frames that do not differ
CHUNK = 2  # latents coded at a time: the result does not depend on it, memory does
SHOWN = 5  # frames in a picture
FEATURE_SIZE = 224  # pixels along each side, of what a feature network is given

Features = Callable[[Tensor], Tensor]

MEANING = {
    "psnr": f"dB, of each frame, then their mean; {BEST_PSNR:.0f} for a frame that is the same",
    "ssim": "11x11 Gaussian window, of each frame and colour, then their mean",
    "lpips": "of each frame, then their mean, by the network named",
    "paired_distance": "squared distance of the features of a clip and of its reconstruction",
    "frechet_distance": "of the features of all clips and of all reconstructions, as Gaussians",
}


def psnr(video: Tensor, made: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB.

    Args:
        video, made: ``[T, 3, H, W]`` in [0, 1].

    Returns:
        ``[T]``, at most ``BEST_PSNR``.
    """
    error = (video.double() - made.double()).square().mean((1, 2, 3))
    return (-10 * error.log10()).clamp(max=BEST_PSNR)


def ssim(video: Tensor, made: Tensor) -> Tensor:
    """Structural similarity of each frame: ``[T]``, of ``[T, 3, H, W]`` in [0, 1].

    Source: Wang et al. 2004, "Image quality assessment"; computed by torchmetrics.
    """
    index = structural_similarity_index_measure(made, video, data_range=1.0, reduction="none")
    assert isinstance(index, Tensor)
    return index


def paired_distance(features: Tensor, made: Tensor) -> Tensor:
    """Squared distance of each pair of rows of ``[N, D]``: ``[N]``."""
    return (features.double() - made.double()).square().sum(1)


def frechet_distance(features: Tensor, made: Tensor) -> float:
    """Between two sets of features, each taken for a Gaussian.

    ``|mean difference|^2 + trace(A + B - 2 (A B)^(1/2))`` with covariances A and B. The trace of
    the root is the sum of the singular values of the product of the centred sets, so no D x D
    matrix is made and no root of one taken.

    Args:
        features, made: ``[N, D]`` and ``[M, D]``, N and M at least 2; computed in fp64.

    Raises:
        ValueError: for sets that have no covariance.

    Source: Dowson and Landau 1982, "The Frechet distance between multivariate normal
    distributions"; Unterthiner et al. 2018, "Towards accurate generative models of video".
    """
    if min(len(features), len(made)) < 2:
        raise ValueError(
            f"a Frechet distance needs at least 2 rows on each side, got {len(features)} and "
            f"{len(made)}"
        )
    means, roots = [], []
    for rows in (features.double(), made.double()):
        means.append(rows.mean(0))
        roots.append((rows - means[-1]) / math.sqrt(len(rows) - 1))  # root^T root: covariance
    shared = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = roots[0].square().sum() + roots[1].square().sum() - 2 * shared
    return float((means[0] - means[1]).square().sum() + spread)


def load_features(path: str | os.PathLike[str], *, device: str = "cpu") -> Features:
    """A feature network from a file: a video ``[T, 3, H, W]`` in [-1, 1] to ``[D]``.

    Args:
        path: TorchScript that takes ``[1, 3, T, 224, 224]`` in [-1, 1] and gives ``[1, D]``, such
            as the I3D that FVD is computed with. If its ``forward`` has arguments ``rescale``,
            ``resize`` and ``return_features``, as that of StyleGAN-V, they are set to False, False
            and True. The shorter side of frames is scaled to 224, then the middle cut out. A file
            of weights alone does not do: it says nothing of the network.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no TorchScript, or gives something else.
    """
    file = existing(path)
    network = script(file, device)
    known = {"rescale": False, "resize": False, "return_features": True}
    options = {name: value for name, value in known.items() if name in takes(network)}

    def features(video: Tensor) -> Tensor:
        height, width = video.shape[2:]
        scale = FEATURE_SIZE / min(height, width)
        size = [max(round(side * scale), FEATURE_SIZE) for side in (height, width)]
        frames = functional.interpolate(video, size=size, mode="bilinear", antialias=True)
        top, left = ((side - FEATURE_SIZE) // 2 for side in size)
        frames = frames[:, :, top : top + FEATURE_SIZE, left : left + FEATURE_SIZE]
        found = network(frames.transpose(0, 1)[None], **options)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            raise ValueError(f"{file} gives no features [1, D] of a video")
        return found[0]

    return features


def load_vae(folder: str | os.PathLike[str], *, device: str, dtype: torch.dtype) -> WFVAE:
    """A saved model, all of whose weights are there.

    Raises:
        FileNotFoundError: if ``folder`` holds no model.
        ValueError: if weights are missing or left over.
    """
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{os.fspath(folder)}/config.json is not there; name the folder")
    vae = WFVAE.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    return vae.eval().to(device)


@torch.no_grad()
def reconstruct(
    vae: WFVAE, video: Tensor, *, tile: int | None = None, overlap: int | None = None
) -> Tensor:
    """A video through the mode of its latents: ``[B, 3, T, H, W]`` in [-1, 1], clamped to it.

    Args:
        tile, overlap: in pixels, as :func:`skiparse.models.wfvae.tiling.encode_tiled` takes them;
            None codes whole frames.
    """
    chunk = CHUNK * vae.temporal_factor
    if tile is None:
        latents = vae.encode(video, chunk_frames=chunk).latent_dist.mode()
        return vae.decode(latents, chunk_latents=CHUNK).sample.clamp(-1, 1)
    shared, factor = overlap or 0, vae.spatial_factor
    latents = encode_tiled(
        vae, video, tile=tile, overlap=shared, chunk_frames=chunk
    ).latent_dist.mode()
    return decode_tiled(
        vae, latents, tile=tile // factor, overlap=shared // factor, chunk_latents=CHUNK
    ).sample.clamp(-1, 1)


def run(
    model: str | os.PathLike[str],
    clips: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    frames: int = FRAMES,
    size: tuple[int, int] = SIZE,
    fps: float | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    lpips: str | os.PathLike[str] | None = None,
    fvd: str | os.PathLike[str] | None = None,
    limits: Limits | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Code clips and back, print a table, and write ``evaluation.json`` and a picture of each.

    A picture shows frames of the clip above those of its reconstruction, spread evenly in time.

    Args:
        model: a folder of :class:`WFVAE`.
        clips: video files; no two of the same name.
        out: the folder to write to; made if need be, files of the same name are replaced.
        frames: ``temporal_factor * n + 1`` of each clip, the first ones.
        size: height and width in pixels; clips are cut about the centre and scaled down to it.
        fps: frames per second; None takes those of each clip.
        tile, overlap: pixels, see :func:`reconstruct`.
        lpips: a file for :func:`load_lpips`, or None.
        fvd: a file for :func:`load_features`, or None.
        limits: the largest source to decode.
        dtype: of the model; what is compared is fp32.

    Returns:
        What ``evaluation.json`` holds.

    Raises:
        FileNotFoundError: if the model or a network is not there.
        ValueError: for arguments that make no sense, clips that cannot be used, or an ``out`` that
            cannot be written to; before any work.
    """
    names = [Path(clip).stem for clip in clips]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        raise ValueError(f"clips must be at least one and of different names, got twice: {twice}")
    if (tile is None) != (overlap is None):
        raise ValueError(f"tile and overlap go together, got tile={tile} and overlap={overlap}")
    rates = [_rate(clip, fps, limits) for clip in clips]
    pictures = None if lpips is None else load_lpips(lpips, device=device)
    features = None if fvd is None else load_features(fvd, device=device)
    vae = load_vae(model, device=device, dtype=dtype)
    vae._check_video(torch.zeros(1, 3, frames, *size))
    folder = Path(out)
    check_writable(folder / "evaluation.json", *(folder / f"{name}.png" for name in names))

    rows: list[dict[str, Any]] = []
    pairs: list[Tensor] = []
    columns = ["psnr", "ssim", *(["lpips"] if pictures else ()), *(["paired_distance"] * bool(fvd))]
    print(f"{'clip':24}" + "".join(f"{column:>17}" for column in columns))
    for clip, name, rate in tqdm(
        list(zip(clips, names, rates, strict=True)), unit="clip", disable=None, leave=False
    ):
        source = read_video(clip, frames=frames, fps=rate, size=size, limits=limits)
        video = source.permute(3, 0, 1, 2)[None].to(device, torch.float32) / 127.5 - 1
        made = reconstruct(vae, video.to(dtype), tile=tile, overlap=overlap).float()
        row: dict[str, Any] = {"clip": name, "fps": str(rate)}
        row |= compare(_frames(video), _frames(made), pictures=pictures)
        if features is not None:
            pairs.append(torch.stack([features(x[0].transpose(0, 1)) for x in (video, made)]).cpu())
            row["paired_distance"] = float(paired_distance(*pairs[-1][:, None]))
        rows.append(row)
        write_image(folder / f"{name}.png", side_by_side(_frames(video), _frames(made)))
        tqdm.write(_line(name, row, columns))
    mean = {key: sum(row[key] for row in rows) / len(rows) for key in columns}
    print(_line(f"mean of {len(rows)}", mean, columns))
    frechet = None
    if len(pairs) > 1:
        frechet = frechet_distance(*torch.stack(pairs, 1))
        print(f"Frechet distance of {len(pairs)} clips: {frechet:.4f}")
    found = {
        "model": {
            "config": {k: v for k, v in vae.config.items() if not k.startswith("_")},
            "weights_sha256": _weights(Path(model)),
        },
        "frames": frames,
        "size": list(size),
        "tile": tile,
        "overlap": overlap,
        "dtype": str(dtype).removeprefix("torch."),
        "networks": {
            key: {"file": Path(path).name, "sha256": shards.sha256(Path(path))}
            for key, path in (("lpips", lpips), ("features", fvd))
            if path is not None
        },
        "meaning": {key: MEANING[key] for key in [*columns, *(["frechet_distance"] * bool(fvd))]},
        "clips": rows,
        "mean": mean,
        "frechet_distance": frechet,
        "versions": {
            "skiparse": skiparse.__version__,
            "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__,
        },
    }
    write_json(folder / "evaluation.json", found)
    return found


def compare(video: Tensor, made: Tensor, *, pictures: Pictures | None = None) -> dict[str, float]:
    """Means over the frames of two videos ``[T, 3, H, W]`` in [0, 1].

    Args:
        pictures: of :func:`load_lpips`; None leaves LPIPS out.
    """
    found = {"psnr": psnr(video, made), "ssim": ssim(video, made)}
    if pictures is not None:
        found["lpips"] = torch.cat(
            [
                pictures(*(2 * x - 1 for x in pair))
                for pair in zip(video.split(8), made.split(8), strict=True)
            ]
        )
    return {name: float(values.double().mean()) for name, values in found.items()}


def side_by_side(video: Tensor, made: Tensor) -> Tensor:
    """Frames of a video above those of another, spread evenly in time.

    Args:
        video, made: ``[T, 3, H, W]`` in [0, 1].

    Returns:
        uint8 ``[2 * H, n * W, 3]``.
    """
    chosen = torch.linspace(0, len(video) - 1, min(SHOWN, len(video))).round().long()
    strips = [torch.cat(list(x[chosen.to(x.device)]), 2) for x in (video, made)]
    return (torch.cat(strips, 1) * 255).round().to(torch.uint8).movedim(0, -1)


def _frames(video: Tensor) -> Tensor:
    """``[1, 3, T, H, W]`` in [-1, 1] to ``[T, 3, H, W]`` in [0, 1]."""
    return (video[0].transpose(0, 1) + 1) / 2


def _line(name: str, row: dict[str, Any], columns: Sequence[str]) -> str:
    return f"{name[:23]:24}" + "".join(f"{row[column]:17.4f}" for column in columns)


def _rate(clip: str | os.PathLike[str], fps: float | None, limits: Limits | None) -> Fraction:
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise ValueError(f"fps must be above 0 and at most {MAX_FPS}, got {fps}")
    found = probe(clip, limits=limits).fps
    if fps is not None:
        return Fraction(fps).limit_denominator(100_000)
    if found is None:
        raise ValueError(
            f"{os.fspath(clip)} does not say how many frames a second it has; give fps"
        )
    return found


def _weights(folder: Path) -> dict[str, str]:
    return {file.name: shards.sha256(file) for file in sorted(folder.glob("*.safetensors"))}
