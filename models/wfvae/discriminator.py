"""What tells video from its reconstruction, patch by patch, while a WF-VAE trains."""

from __future__ import annotations

from torch import Tensor, nn

_STRIDES = ((2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1))  # time, height, width
_WIDTHS = (1, 2, 4, 8, 8)  # in terms of `base`
_SPREAD = 0.02  # of the first weights


class Discriminator(nn.Sequential):
    """3D PatchGAN: six convolutions, batch norm on the inner ones; 11.74 M parameters.

    Args:
        base: width of the first layer; later ones are up to eight times as wide.
        channels: of the video.
        dropout: after every layer with a norm.

    Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks",
    with 3D convolutions, as in Li et al. 2024, "WF-VAE", and its released code.
    """

    def __init__(self, base: int = 64, *, channels: int = 3, dropout: float = 0.3) -> None:
        super().__init__()
        widths = [channels, *(base * factor for factor in _WIDTHS), 1]
        for i, stride in enumerate(_STRIDES):
            normed = 0 < i < len(_STRIDES) - 1
            self.append(nn.Conv3d(widths[i], widths[i + 1], 3, stride, 1, bias=not normed))
            if normed:
                self.append(nn.BatchNorm3d(widths[i + 1]))
            if i < len(_STRIDES) - 1:
                self.append(nn.LeakyReLU(0.2))
            if normed:
                self.append(nn.Dropout(dropout))
        for layer in self:
            if isinstance(layer, nn.Conv3d):
                nn.init.normal_(layer.weight, 0, _SPREAD)
            elif isinstance(layer, nn.BatchNorm3d):
                nn.init.normal_(layer.weight, 1, _SPREAD)

    def forward(self, video: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` to one number for each patch ``[B, 1, ~T/4, ~H/16, ~W/16]``, high
        for real."""
        return super().forward(video)
