"""What tells video from its reconstruction, patch by patch, while a WF-VAE trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skiparse.models.train.parallel import World

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

    def shared(self, world: World) -> Discriminator:
        """Itself, for a batch that all processes share: its judgements are those of one alone."""
        for layer in self:
            if isinstance(layer, BatchNorm3d | Dropout):
                layer.world = world
        return self

    def __init__(self, base: int = 64, *, channels: int = 3, dropout: float = 0.3) -> None:
        super().__init__()
        widths = [channels, *(base * factor for factor in _WIDTHS), 1]
        for i, stride in enumerate(_STRIDES):
            normed = 0 < i < len(_STRIDES) - 1
            self.append(nn.Conv3d(widths[i], widths[i + 1], 3, stride, 1, bias=not normed))
            if normed:
                self.append(BatchNorm3d(widths[i + 1]))
            if i < len(_STRIDES) - 1:
                self.append(nn.LeakyReLU(0.2))
            if normed:
                self.append(Dropout(dropout))
        for layer in self:
            if isinstance(layer, nn.Conv3d):
                nn.init.normal_(layer.weight, 0, _SPREAD)
            elif isinstance(layer, nn.BatchNorm3d):
                nn.init.normal_(layer.weight, 1, _SPREAD)

    def forward(self, video: Tensor) -> Tensor:
        """``[B, 3, T, H, W]`` to one number for each patch ``[B, 1, ~T/4, ~H/16, ~W/16]``, high
        for real."""
        return super().forward(video)


class BatchNorm3d(nn.BatchNorm3d):
    """Batch norm over the samples of all processes."""

    world: World | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As torch's, of ``[B, C, T, H, W]``."""
        if self.world is None or self.world.size == 1 or not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        dims, shape = (0, 2, 3, 4), (1, -1, 1, 1, 1)
        wide = x.float()
        mean = self.world.average(wide.mean(dims))
        variance = self.world.average((wide - mean.view(shape)).square().mean(dims))
        with torch.no_grad():
            count = self.world.size * x[:, 0].numel()
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        made = (wide - mean.view(shape)) * scale.view(shape) + self.bias.view(shape)
        return made.to(x.dtype)


class Dropout(nn.Dropout):
    """Dropout whose draws are those of the batch of all processes."""

    world: World | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As torch's."""
        if self.world is None or self.world.size == 1 or not self.training:
            return super().forward(x)
        batch = len(x) * self.world.size
        # Draws go by the order in memory, in which samples come first, whatever comes next.
        strides = (x[0].numel(), *x.stride()[1:])
        ones = x.new_empty_strided((batch, *x.shape[1:]), strides).fill_(1)
        kept = F.dropout(ones, self.p)
        return x * kept[self.world.share(batch)]
