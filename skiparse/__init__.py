"""Skiparse attention: sparse attention for video transformers, forward and backward.

::

    import skiparse
    from skiparse import SkipPattern

    out = skiparse.attention(q, k, v, SkipPattern.group(4))      # [batch, tokens, heads, dim]
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from skiparse._version import __version__
from skiparse.after_import import after_import

if TYPE_CHECKING:
    from skiparse.functional import attention, attention_with_lse, joint_attention, key_mask
    from skiparse.pack import Packed, norm_rope_pack, packing_pays, unpack
    from skiparse.pattern import GridPattern, SkipPattern
    from skiparse.registry import list_backends

__all__ = [
    "GridPattern",
    "Packed",
    "SkipPattern",
    "__version__",
    "attention",
    "attention_with_lse",
    "joint_attention",
    "key_mask",
    "list_backends",
    "norm_rope_pack",
    "packing_pays",
    "unpack",
]

# Torch takes a second to import, which `skiparse --help` has no use for. So what needs it comes
# with it: at once where torch is there, else when somebody imports it or asks for a name.
_WHERE = {
    "GridPattern": "pattern",
    "Packed": "pack",
    "SkipPattern": "pattern",
    "attention": "functional",
    "attention_with_lse": "functional",
    "joint_attention": "functional",
    "key_mask": "functional",
    "list_backends": "registry",
    "norm_rope_pack": "pack",
    "packing_pays": "pack",
    "unpack": "pack",
}
_MODULES = ("backends", "derivatives", "forward_mode", "functional", "ops", "pack", "registry")


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        found = getattr(importlib.import_module(f"skiparse.{_WHERE[name]}"), name)
    elif name in (*_MODULES, "pattern"):
        found = importlib.import_module(f"skiparse.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def _with_torch(torch: ModuleType) -> None:
    """Register the operators, unless one of our modules asked for torch: it goes on by itself."""
    if not any(f"skiparse.{name}" in sys.modules for name in _MODULES):
        for name in _WHERE:
            __getattr__(name)


after_import("torch", _with_torch)
