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
    """A convolution without padding in time, and with none at all if its stride is 2.

    :func:`convolve` calls it, with the past in front.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> None:
        padding = (0, kernel // 2, kernel // 2) if stride == 1 else 0
        super().__init__(channels, out_channels, kernel, stride, padding)

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv3d``."""
        if _gets_slow_kernel(input):
            return super().forward(input.to_mkldnn()).to_dense()
        return super().forward(input)


def _gets_slow_kernel(x: Tensor) -> bool:
    """Whether torch may convolve ``x`` with a kernel 2 to 10 times slower than oneDNN's.

    On a CPU it does so for a small video alone in its batch; a tensor in oneDNN's own layout never
    gets that kernel.
    """
    return (
        not torch.compiler.is_compiling()
        and len(x) == 1
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
    )


class FrameConv(nn.Conv2d):
    """A convolution of a frame, size-preserving, or with no padding if its stride is 2."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, 3, stride, 1 if stride == 1 else 0)


def convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor, stream: Stream) -> Tensor:
    """A video through a convolution: each frame by itself, or with what came before.

    A causal one sees no later frame; before the first frame it sees that frame. Stride 2 halves
    height and width, which are padded at their right and bottom only, and in causal ones time:
    ``T`` frames become ``(T - 1) // 2 + 1``.

    Args:
        conv: a :class:`FrameConv` or a :class:`CausalConv`, or what was put in its place. It is
            called with one tensor as any layer of torch, so what replaces or watches those works.
        x: ``[B, C, T, H, W]``.
        stream: remembers the last frames for ``conv``.

    Returns:
        ``[B, C', T', H', W']``.
    """
    stride, causal = conv.stride[0], len(conv.kernel_size) == 3
    if causal and conv.kernel_size[0] > 1:
        reach = conv.kernel_size[0]
        past = stream.recall(conv)
        if past is None:
            past = x[:, :, :1].expand(-1, -1, reach - 1, -1, -1)
        x = torch.cat([past, x], 2)
        made = (x.shape[2] - reach) // stride + 1
        stream.remember(conv, x[:, :, made * stride :])
    if stride > 1:
        x = F.pad(x, (0, 1, 0, 1))
    return conv(x) if causal else frame_by_frame(conv, x)


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
        h = convolve(self.conv1, F.silu(self.norm1(x)), stream)
        h = convolve(self.conv2, F.silu(self.norm2(h)), stream)
        return h + (x if self.shortcut is None else convolve(self.shortcut, x, stream))


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
            convolve(linear, h, stream).movedim(1, -1).flatten(2, 3)
            for linear in (self.to_q, self.to_k, self.to_v)
        )  # [B, T, H * W, C]
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.unflatten(2, x.shape[3:]).movedim(-1, 1)
        return x + convolve(self.to_out, h, stream)


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
        return convolve(self.conv, x, stream)

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
