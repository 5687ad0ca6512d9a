"""The published sizes of WF-VAE, as keyword arguments of :class:`skiparse.models.WFVAE`.

Source: Open-Sora Plan v1.5 report and its released configuration, for sizes, shift and scale; Li et
al. 2024, "WF-VAE", for S and L.
"""

from __future__ import annotations

from typing import Any

RELEASED_HAAR_GAIN = 0.3536  # where orthonormal filters have 1 / sqrt(8) = 0.35355...

# Mean and 1 / standard deviation of each latent channel of the released model.
_SHIFT = (
    -0.2129, 0.1226, 1.6328, 0.6211, -0.8750, 0.6172, -0.5703, 0.1348,
    -0.2178, -0.9375, 0.3184, 0.3281, -0.0544, -0.1826, -0.2812, 0.4355,
    0.1621, -0.2578, 0.7148, -0.7422, -0.2295, -0.2324, -1.4922, 0.6328,
    1.1250, -0.2578, -2.1094, 1.0391, 1.1797, -1.2422, -0.2988, -0.9570,
)  # fmt: skip
_SCALE = (
    0.7031, 0.7109, 1.5391, 1.2969, 0.7109, 1.4141, 1.3828, 2.1719,
    1.7266, 1.8281, 1.9141, 1.2031, 0.6875, 0.9609, 1.6484, 1.1875,
    1.5312, 1.1328, 0.8828, 0.6836, 0.8828, 0.9219, 1.6953, 1.4453,
    1.5312, 0.6836, 0.7656, 0.8242, 1.2344, 1.0312, 1.7266, 0.9492,
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "v1.5-M": {
        "base_channels": 160,
        "latent_channels": 32,
        "haar_gain": RELEASED_HAAR_GAIN,
        "shift": _SHIFT,
        "scale": _SCALE,
    },
    "S": {"base_channels": 128, "latent_channels": 32},
    "L": {"base_channels": 192, "latent_channels": 32},
    "tiny": {
        "base_channels": 16,
        "latent_channels": 8,
        "encoder_energy_channels": 8,
        "decoder_energy_channels": 8,
    },
}
