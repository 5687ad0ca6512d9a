"""The published sizes of SUV, as keyword arguments of :class:`skiparse.models.SUV`.

"v1.5" is the released model. Its siblings are known by heads, layers and condition width; their
names count the parameters, which fits a feed-forward shared by video and text ("6B" is the released
one with that). What else they need is taken from the released model.

Source: Open-Sora Plan v1.5 report, table of the denoiser; siblings: the project's `mmdit` branch.
"""

from __future__ import annotations

from typing import Any

_RELEASED: dict[str, Any] = {
    "num_layers": (2, 4, 6, 8, 6, 4, 2),
    "sparsity": (1, 2, 4, 8, 4, 2, 1),
    "num_heads": 24,
    "head_dim": 128,
    "in_channels": 32,
    "out_channels": 32,
    "text_channels": 2048,
    "pooled_channels": 1280,
    "timestep_channels": 1024,
}

_SHARED = _RELEASED | {"double_ff": False}

PRESETS: dict[str, dict[str, Any]] = {
    "v1.5": _RELEASED,
    "2B": _SHARED | {"num_layers": (2, 2, 4, 6, 4, 2, 2), "head_dim": 96, "timestep_channels": 512},
    "3B": _SHARED | {"num_layers": (2, 4, 4, 8, 4, 4, 2), "head_dim": 96, "timestep_channels": 768},
    "6B": _SHARED,
    "9B": _SHARED | {"num_heads": 40, "head_dim": 96, "timestep_channels": 1280},
    "13B": _SHARED
    | {"num_layers": (2, 6, 8, 8, 8, 6, 2), "num_heads": 32, "timestep_channels": 1536},
    "32B": _SHARED
    | {
        "num_layers": (4, 8, 8, 8, 8, 8, 4),
        "num_heads": 40,
        "head_dim": 144,
        "timestep_channels": 2048,
    },
    "tiny": {
        "num_layers": (2, 2, 2, 2, 2),
        "sparsity": (1, 2, 4, 2, 1),
        "num_heads": 2,
        "head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_channels": 24,
        "pooled_channels": 20,
        "timestep_channels": 32,
    },
}
