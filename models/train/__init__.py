"""What any training run needs: averages of weights, and clipping that follows the gradients."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skiparse.models.train.clip import AdaptiveGradClipper, Decision

__all__ = ["AdaptiveGradClipper", "Decision"]  # loaded when asked for: they need torch


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("skiparse.models.train.clip"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
