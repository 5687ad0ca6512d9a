"""SUV, WF-VAE and what they need, on public names of skiparse."""

from __future__ import annotations

import importlib
from typing import Any

if __name__ == "models":
    raise ImportError("import skiparse.models; this folder is installed under that name")

_EXPORTS = {
    "SUV": "skiparse.models.suv.model",
    "SUVPipeline": "skiparse.models.pipeline",
    "WFVAE": "skiparse.models.wfvae.model",
}

__all__ = ["SUV", "WFVAE", "SUVPipeline"]  # loaded when asked for: they need diffusers


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
