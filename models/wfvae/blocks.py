"""The layers of WF-VAE: causal in time, normalised at every pixel for itself.

All take ``[B, C, T, H, W]`` and a :class:`Stream`. No layer has statistics over time or space,
which is what makes coding in pieces exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skiparse.models.wfvae.stream import Stream


def frame_by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of images ``[B, C, H, W]``, applied to every frame of ``[B, C, T, H, W]``."""
    frames = x.transpose(1, 2)
    return function(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of every pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, T, H, W]`` to the same."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class CausalConv(nn.Conv3d):
    """A convolution that sees no later frame; before the first frame it sees that frame.

    Stride 2 halves time, height and width: ``T`` frames become ``(T - 1) // 2 + 1``, and space is
    padded at its right and bottom only.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        padding = (0, kernel // 2, kernel // 2) if stride == 1 else 0
        super().__init__(channels, out_channels, kernel, stride, padding)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]  # a stream
        """``[B, C, T, H, W]`` to ``[B, C', T', H', W']``."""
        reach, stride = self.kernel_size[0], self.stride[0]
        if reach > 1:
            past = stream.recall(self)
            if past is None:
                past = x[:, :, :1].expand(-1, -1, reach - 1, -1, -1)
            x = torch.cat([past, x], 2)
            made = (x.shape[2] - reach) // stride + 1
            stream.remember(self, x[:, :, made * stride :])
        if stride > 1:
            x = F.pad(x, (0, 1, 0, 1))
        if _gets_slow_kernel(x):
            return super().forward(x.to_mkldnn()).to_dense()
        return super().forward(x)


def _gets_slow_kernel(x: Tensor) -> bool:
    """Whether torch may convolve ``x`` with a kernel 2 to 10 times slower than oneDNN's.

    On a CPU it does so for a small video alone in its batch; a tensor in oneDNN's own layout never
    gets that kernel.
    """
    return (
        len(x) == 1
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class FrameConv(nn.Conv2d):
    """A convolution of each frame by itself, size-preserving; stride 2 halves height and width."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, 3, stride, 1 if stride == 1 else 0)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]  # a stream
        """``[B, C, T, H, W]`` to ``[B, C', T, H', W']``."""
        if self.stride[0] > 1:
            x = F.pad(x, (0, 1, 0, 1))
        return frame_by_frame(super().forward, x)


class ResBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input; of frames, or causal in time."""

    def __init__(self, channels: int, out_channels: int, eps: float, *, temporal: bool = True):
        super().__init__()
        conv = CausalConv if temporal else FrameConv
        self.norm1 = ChannelNorm(channels, eps)
        self.conv1 = conv(channels, out_channels)
        self.norm2 = ChannelNorm(out_channels, eps)
        self.conv2 = conv(out_channels, out_channels)
        self.shortcut = CausalConv(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T, H, W]``."""
        h = self.conv1(F.silu(self.norm1(x)), stream)
        h = self.conv2(F.silu(self.norm2(h)), stream)
        return h + (x if self.shortcut is None else self.shortcut(x, stream))


class FrameAttention(nn.Module):
    """Dense attention over the pixels of each frame, one head as wide as the channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, eps)
        self.to_q, self.to_k, self.to_v, self.to_out = (
            CausalConv(channels, channels, 1) for _ in range(4)
        )

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to the same."""
        h = self.norm(x)
        q, k, v = (
            linear(h, stream).movedim(1, -1).flatten(2, 3)
            for linear in (self.to_q, self.to_k, self.to_v)
        )  # [B, T, H * W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.unflatten(2, x.shape[3:]).movedim(-1, 1)
        return x + self.to_out(h, stream)


class Upsample(nn.Module):
    """Twice as high and wide, and all frames but the first become two; then a convolution.

    Linear interpolation (not aligned at the corners): frame ``i`` becomes ``x[i-1]/4 + 3 x[i]/4``
    and ``3 x[i]/4 + x[i+1]/4``, the first frame apart and the ends repeated. The second of them
    waits for frame ``i + 1``.
    """

    def __init__(self, channels: int, *, temporal: bool = True) -> None:
        super().__init__()
        self.conv: CausalConv | FrameConv = (
            CausalConv(channels, channels) if temporal else FrameConv(channels, channels)
        )
        self.temporal = temporal

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C, T', 2H, 2W]``."""
        if self.temporal:
            x = self._double_time(x, stream)
        mode = "bilinear" if self.temporal else "nearest"
        x = frame_by_frame(lambda frames: F.interpolate(frames, scale_factor=2.0, mode=mode), x)
        return self.conv(x, stream)

    def _double_time(self, x: Tensor, stream: Stream) -> Tensor:
        made = []
        before = stream.recall(self)  # the frame whose second half is still to come
        if stream.first:
            made.append(x[:, :, :1])
            x = x[:, :, 1:]
        if x.shape[2]:
            begins = before is None
            frames = x if before is None else torch.cat([before, x], 2)
            earlier, later = frames[:, :, :-1], frames[:, :, 1:]
            between = torch.stack(
                (0.75 * earlier + 0.25 * later, 0.25 * earlier + 0.75 * later), 3
            ).flatten(2, 3)
            made += [frames[:, :, :1], between] if begins else [between]
            if stream.last:
                made.append(frames[:, :, -1:])
            else:
                stream.remember(self, frames[:, :, -1:])
        return torch.cat(made, 2)
