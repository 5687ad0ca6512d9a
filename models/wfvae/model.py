"""WF-VAE: a causal video autoencoder in which wavelet coefficients flow past the network.

The input is a Haar transform of the video; two further levels join the encoder where the network
has come down to their size, and leave the decoder in the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # a pipeline looks for it in the module of a model
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from skiparse.models.strict import StrictModelMixin, check_sizes
from skiparse.models.wfvae.blocks import (
    CausalConv,
    ChannelNorm,
    FrameAttention,
    FrameConv,
    ResBlock,
    Upsample,
    convolve,
)
from skiparse.models.wfvae.config import PRESETS
from skiparse.models.wfvae.haar import Haar
from skiparse.models.wfvae.stream import Stream

COLOURS = 3


class WFVAEConfig(FrozenDict):  # type: ignore[misc]  # diffusers' are untyped
    """Of a WFVAE; some of it has the names of AutoencoderKLWan too, as attributes."""

    @property
    def z_dim(self) -> int:
        """``latent_channels``."""
        return self["latent_channels"]

    @property
    def scale_factor_spatial(self) -> int:
        """Pixels to a latent."""
        return WFVAE.spatial_factor

    @property
    def scale_factor_temporal(self) -> int:
        """Frames to a latent, but the first."""
        return self["temporal_factor"]

    @property
    def latents_mean(self) -> tuple[float, ...]:
        """``shift``, of each channel."""
        return self["shift"] or (0.0,) * self.z_dim

    @property
    def latents_std(self) -> tuple[float, ...]:
        """``1 / scale``, of each channel."""
        return tuple(1 / scale for scale in self["scale"] or (1.0,) * self.z_dim)


class Wavelets:
    """The three transforms: of the video, and of the low band of the one before, twice.

    With a temporal factor of 4 the middle one leaves time alone, as do the layers beside it.
    """

    def __init__(self, gain: float | None, temporal_factor: int) -> None:
        self.temporal = temporal_factor == 8
        self.video = Haar(gain)
        self.level1 = Haar(gain, temporal=self.temporal)
        self.level2 = Haar(gain)


class Mid(nn.Module):
    """A residual block, attention within frames, a residual block."""

    def __init__(self, channels: int, width: int, out_channels: int, eps: float) -> None:
        super().__init__()
        self.res1 = ResBlock(channels, width, eps)
        self.attn = FrameAttention(width, eps)
        self.res2 = ResBlock(width, out_channels, eps)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T, H, W]``."""
        return self.res2(self.attn(self.res1(x, stream), stream), stream)


class Encoder(nn.Module):
    """Video to the moments of its latents, an eighth as high and wide.

    ``level1`` and ``level2`` halve the size; ``inflow1`` and ``inflow2`` bring in the wavelet
    coefficients of the size they come to, unless ``energy`` is 0.
    """

    def __init__(
        self, base: int, latent: int, energy: int, res_blocks: int, wavelets: Wavelets, eps: float
    ) -> None:
        super().__init__()
        self.wavelets, self.energy = wavelets, energy
        video = wavelets.video.bands * COLOURS
        self.level1 = Down(video, base, res_blocks, eps, temporal=False, down=wavelets.temporal)
        if energy:
            self.inflow1 = FrameConv(wavelets.level1.bands * COLOURS, energy)
        self.level2 = Down(base + energy, 2 * base, res_blocks, eps, temporal=True, down=True)
        if energy:
            self.inflow2 = FrameConv(wavelets.level2.bands * COLOURS, energy)
        self.mid = Mid(2 * base + energy, 4 * base, 4 * base, eps)
        self.norm_out = ChannelNorm(4 * base, eps)
        self.conv_out = CausalConv(4 * base, 2 * latent)

    def forward(self, video: Tensor, stream: Stream, part: str = "all") -> tuple[Tensor, ...]:
        """Moments ``[B, 2 * latent, t, h, w]``, and the coefficients of the two further levels.

        Without a path for them, the moments alone. ``part="down"`` ends before the middle,
        ``part="finish"`` begins with it; both through here, where hooks bring weights.
        """
        if part == "finish":
            return (self.finish(video, stream),)
        x, *coefficients = self.down(video, stream)
        return (x if part == "down" else self.finish(x, stream)), *coefficients

    def down(self, video: Tensor, stream: Stream) -> tuple[Tensor, ...]:
        """All before the middle, which sees a neighbourhood of each pixel and no more."""
        coefficients = self.wavelets.video.analyse(video, stream)
        x = self.level1(coefficients, stream)
        if not self.energy:
            return (self.level2(x, stream),)
        level1 = self.wavelets.level1.analyse(coefficients[:, :COLOURS], stream)
        level2 = self.wavelets.level2.analyse(level1[:, :COLOURS], stream)
        x = self.level2(torch.cat([x, convolve(self.inflow1, level1, stream)], 1), stream)
        return torch.cat([x, convolve(self.inflow2, level2, stream)], 1), level1, level2

    def finish(self, x: Tensor, stream: Stream) -> Tensor:
        """The middle, whose attention sees whole frames, and the moments."""
        return convolve(self.conv_out, F.silu(self.norm_out(self.mid(x, stream))), stream)


class Decoder(nn.Module):
    """Latents to video: the encoder backwards, with the coefficients leaving on the way.

    The last ``energy`` channels behind ``mid`` and ``level2`` become coefficients; each level's
    low band is added to the one above. If ``energy`` is 0 there are none but those of the video.
    """

    def __init__(
        self,
        base: int,
        latent: int,
        energy: int,
        res_blocks: int,
        connect: int,
        wavelets: Wavelets,
        eps: float,
    ) -> None:
        super().__init__()
        self.wavelets, self.energy = wavelets, energy
        width = 4 * base
        self.conv_in = CausalConv(latent, width)
        self.mid = Mid(width, width, width + energy, eps)
        if energy:
            self.outflow2 = Outflow(energy, connect, wavelets.level2.bands * COLOURS, eps)
        self.level2 = Up(width, width, width + energy, res_blocks, eps, temporal=True)
        if energy:
            self.outflow1 = Outflow(energy, connect, wavelets.level1.bands * COLOURS, eps)
        self.level1 = Up(width, 2 * base, 2 * base, res_blocks, eps, temporal=wavelets.temporal)
        self.res1 = ResBlock(2 * base, base, eps)
        self.res2 = ResBlock(base, base, eps)
        self.norm_out = ChannelNorm(base, eps)
        self.conv_out = FrameConv(base, wavelets.video.bands * COLOURS)

    def forward(self, latents: Tensor, stream: Stream, part: str = "all") -> tuple[Tensor, ...]:
        """Video, and the coefficients of the two further levels, as the encoder gives them.

        ``part="start"`` ends with the middle, ``part="up"`` begins behind it; both through here,
        where hooks bring weights.
        """
        if part == "up":
            return self.up(latents, stream)
        x = self.start(latents, stream)
        return (x,) if part == "start" else self.up(x, stream)

    def start(self, latents: Tensor, stream: Stream) -> Tensor:
        """The middle, whose attention sees whole frames."""
        return self.mid(convolve(self.conv_in, latents, stream), stream)

    def up(self, x: Tensor, stream: Stream) -> tuple[Tensor, ...]:
        """All behind the middle, which sees a neighbourhood of each pixel and no more."""
        if not self.energy:
            coefficients = self._finish(self.level2(x, stream), stream)
            return (self.wavelets.video.synthesise(coefficients, stream),)
        x, flow = self._split(x)
        level2 = self.outflow2(flow, stream)
        x, flow = self._split(self.level2(x, stream))
        low = self.wavelets.level2.synthesise(level2, stream)
        level1 = self._add_low("level1", self.outflow1(flow, stream), low, stream)
        low = self.wavelets.level1.synthesise(level1, stream)
        coefficients = self._add_low("video", self._finish(x, stream), low, stream)
        return self.wavelets.video.synthesise(coefficients, stream), level1, level2

    def _finish(self, x: Tensor, stream: Stream) -> Tensor:
        """From behind ``level2`` to coefficients of the video."""
        x = self.res2(self.res1(self.level1(x, stream), stream), stream)
        return convolve(self.conv_out, F.silu(self.norm_out(x)), stream)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : -self.energy], x[:, -self.energy :]

    @staticmethod
    def _add_low(name: str, coefficients: Tensor, low: Tensor, stream: Stream) -> Tensor:
        """``low`` added to the low band; it is ahead of the path that was upsampled."""
        low = stream.wait(name, low, coefficients.shape[2])
        return torch.cat([coefficients[:, :COLOURS] + low, coefficients[:, COLOURS:]], 1)


class Down(nn.Module):
    """A convolution, residual blocks, and half the size."""

    def __init__(
        self, channels: int, width: int, blocks: int, eps: float, *, temporal: bool, down: bool
    ) -> None:
        super().__init__()
        self.conv_in = FrameConv(channels, width)
        self.res = nn.ModuleList(
            ResBlock(width, width, eps, temporal=temporal) for _ in range(blocks)
        )
        self.down = CausalConv(width, width, stride=2) if down else FrameConv(width, width, 2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, width, T', H / 2, W / 2]``."""
        x = convolve(self.conv_in, x, stream)
        for block in self.res:
            x = block(x, stream)
        return convolve(self.down, x, stream)


class Up(nn.Module):
    """Residual blocks, twice the size, and one more residual block."""

    def __init__(
        self,
        channels: int,
        width: int,
        out_channels: int,
        blocks: int,
        eps: float,
        *,
        temporal: bool,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(channels if i == 0 else width, width, eps) for i in range(blocks)
        )
        self.up = Upsample(width, temporal=temporal)
        self.res_out = ResBlock(width, out_channels, eps)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, C, T, H, W]`` to ``[B, C', T', 2H, 2W]``."""
        for block in self.res:
            x = block(x, stream)
        return self.res_out(self.up(x, stream), stream)


class Outflow(nn.Module):
    """From the channels set aside for them to wavelet coefficients."""

    def __init__(self, energy: int, blocks: int, coefficients: int, eps: float) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResBlock(energy, energy, eps) for _ in range(blocks))
        self.conv = FrameConv(energy, coefficients)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        """``[B, energy, T, H, W]`` to ``[B, coefficients, T, H, W]``."""
        for block in self.res:
            x = block(x, stream)
        return convolve(self.conv, x, stream)


class WFVAE(StrictModelMixin, ModelMixin):  # type: ignore[misc]  # diffusers' are untyped
    """Video to latents an eighth as long, high and wide, and back.

    Args:
        base_channels: width at full size; levels are two and four times as wide.
        latent_channels: of a latent.
        encoder_energy_channels, decoder_energy_channels: width of the paths of the coefficients;
            both 0 for a model without them.
        encoder_res_blocks, decoder_res_blocks, connect_res_blocks: residual blocks of a level, and
            of the decoder's paths of coefficients.
        temporal_factor: 8, or 4, where the middle level leaves time alone.
        haar_gain: of the wavelet filters; None for orthonormal ones, 0.3536 for released weights.
        shift, scale: of each latent channel, for :meth:`normalize`; 0 and 1 if None.
        eps: of every norm.

    Attributes:
        spatial_factor, temporal_factor: pixels and frames to a latent.
        use_framewise_encoding, use_framewise_decoding: code a latent at a time where a call does
            not say how many; False at first.
        use_tiling, use_slicing: see :meth:`enable_tiling` and :meth:`enable_slicing`.

    Raises:
        ValueError: for sizes that make no model.

    Source: Li et al. 2024, "WF-VAE"; Open-Sora Plan v1.5 report; ``WFVAE.presets`` has the
    published sizes.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    converted_by = "vae"
    spatial_factor: ClassVar[int] = 8
    _supports_gradient_checkpointing = False
    _group_offload_block_modules: ClassVar[list[str]] = ["encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        *,
        base_channels: int = 160,
        latent_channels: int = 32,
        encoder_energy_channels: int = 128,
        decoder_energy_channels: int = 128,
        encoder_res_blocks: int = 2,
        decoder_res_blocks: int = 2,
        connect_res_blocks: int = 1,
        temporal_factor: int = 8,
        haar_gain: float | None = None,
        shift: Sequence[float] | None = None,
        scale: Sequence[float] | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_sizes(base_channels=base_channels, latent_channels=latent_channels)
        if temporal_factor not in (4, 8):
            raise ValueError(f"temporal_factor must be 4 or 8, got {temporal_factor}")
        energy = encoder_energy_channels, decoder_energy_channels
        if min(energy) < 0 or (0 in energy and any(energy)):
            raise ValueError(
                "encoder_energy_channels and decoder_energy_channels must both be above 0, or both "
                f"0 for a model without these paths, got {energy[0]} and {energy[1]}"
            )
        for name, values in (("shift", shift), ("scale", scale)):
            if values is not None and len(values) != latent_channels:
                raise ValueError(
                    f"{name} must have {latent_channels} values, one for each latent channel, got "
                    f"{len(values)}"
                )
        self.register_to_config(  # tuples also when they come from JSON
            shift=None if shift is None else tuple(shift),
            scale=None if scale is None else tuple(scale),
        )
        self.temporal_factor = temporal_factor
        self.use_framewise_encoding = self.use_framewise_decoding = False
        self.use_tiling = self.use_slicing = False
        self._tile, self._overlaps = 0, (0, 0)
        wavelets = Wavelets(haar_gain, temporal_factor)
        self.encoder = Encoder(
            base_channels,
            latent_channels,
            encoder_energy_channels,
            encoder_res_blocks,
            wavelets,
            eps,
        )
        self.decoder = Decoder(
            base_channels,
            latent_channels,
            decoder_energy_channels,
            decoder_res_blocks,
            connect_res_blocks,
            wavelets,
            eps,
        )

    @property
    def config(self) -> WFVAEConfig:
        """The arguments, and what AutoencoderKLWan calls some of them."""
        return WFVAEConfig(self._internal_dict)

    @property
    def spatial_compression_ratio(self) -> int:
        """``spatial_factor``, by diffusers' name."""
        return self.spatial_factor

    @property
    def temporal_compression_ratio(self) -> int:
        """``temporal_factor``, by diffusers' name."""
        return self.temporal_factor

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Code frames larger than a tile tile by tile, by :mod:`~skiparse.models.wfvae.tiling`.

        Args:
            tile_sample_min_height, tile_sample_min_width: of a tile in pixels, both the same, a
                multiple of 8; the smallest from 256 that is exact if None.
            tile_sample_stride_height, tile_sample_stride_width: from tile to tile, both the same,
                a multiple of 8, at least half of a tile; if None the largest for which the result
                is that of the whole, which differs between encoding and decoding.

        Raises:
            ValueError: for other numbers.
        """
        from skiparse.models.wfvae.tiling import check_tile, exact_overlap

        pixels, latents = exact_overlap(self)
        factor = self.spatial_factor
        least = 2 * max(pixels, latents * factor)
        tile = _side("tile_sample_min", tile_sample_min_height, tile_sample_min_width, factor)
        tile = max(256, least) if tile is None else tile
        stride = _side(
            "tile_sample_stride", tile_sample_stride_height, tile_sample_stride_width, factor
        )
        overlaps = (pixels, latents * factor) if stride is None else (tile - stride,) * 2
        for overlap in overlaps:
            check_tile(tile, overlap)
        self._tile, self._overlaps, self.use_tiling = tile, overlaps, True

    def disable_tiling(self) -> None:
        """Code whole frames."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Code one video of a batch after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Code the videos of a batch together."""
        self.use_slicing = False

    @apply_forward_hook
    def encode(
        self, x: Tensor, *, chunk_frames: int | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of a video.

        Args:
            x: ``[B, 3, T, H, W]`` in [-1, 1]; ``T = temporal_factor * n + 1``, ``H`` and ``W``
                multiples of 8.
            chunk_frames: a multiple of ``temporal_factor``: so many frames at a time, after the
                first one, in memory that does not grow with ``T``. The result is the same.
            return_dict: else a tuple.

        Returns:
            ``.latent_dist`` with ``mean``, ``logvar`` ``[B, C, t, h, w]``, ``sample(generator)``
            and ``mode()``; not normalised.

        Raises:
            ValueError: for sizes it cannot take, with the nearest it can, or numbers that are not
                finite.
        """
        self._check_video(x)
        factor = self.temporal_factor
        if chunk_frames is None and self.use_framewise_encoding:
            chunk_frames = factor
        if chunk_frames is not None and (chunk_frames < 1 or chunk_frames % factor):
            raise ValueError(
                f"chunk_frames must be a multiple of {factor}, got {chunk_frames}; None codes "
                "the video whole"
            )
        videos = x.split(1) if self.use_slicing else [x]
        moments = torch.cat([self._moments(video, chunk_frames) for video in videos])
        distribution = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(distribution) if return_dict else (distribution,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, *, chunk_latents: int | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """The video of latents.

        Args:
            z: ``[B, C, t, h, w]``, not normalised: see :meth:`denormalize`.
            chunk_latents: so many at a time, in memory that does not grow with ``t``. The result
                is the same.
            return_dict: else a tuple.

        Returns:
            ``.sample``: ``[B, 3, T, 8h, 8w]``, about in [-1, 1]; ``T = temporal_factor * (t - 1)
            + 1``.

        Raises:
            ValueError: for shapes that are no latents, or numbers that are not finite.
        """
        self._check_latents(z)
        if chunk_latents is None and self.use_framewise_decoding:
            chunk_latents = 1
        if chunk_latents is not None and chunk_latents < 1:
            raise ValueError(f"chunk_latents must be at least 1, got {chunk_latents}")
        parts = z.split(1) if self.use_slicing else [z]
        video = torch.cat([self._frames(latents, chunk_latents) for latents in parts])
        return DecoderOutput(sample=video) if return_dict else (video,)

    def _moments(self, video: Tensor, chunk_frames: int | None) -> Tensor:
        if self.use_tiling and max(video.shape[3:]) > self._tile:
            from skiparse.models.wfvae.tiling import encode_tiled

            overlap = self._overlaps[0]
            found = encode_tiled(
                self, video, tile=self._tile, overlap=overlap, chunk_frames=chunk_frames
            )
            return found.latent_dist.parameters
        pieces = [video] if chunk_frames is None else _pieces(video, chunk_frames)
        return _joined(self._encode(pieces))

    def _frames(self, latents: Tensor, chunk_latents: int | None) -> Tensor:
        tile = self._tile // self.spatial_factor
        if self.use_tiling and max(latents.shape[3:]) > tile:
            from skiparse.models.wfvae.tiling import decode_tiled

            overlap = self._overlaps[1] // self.spatial_factor
            return decode_tiled(
                self, latents, tile=tile, overlap=overlap, chunk_latents=chunk_latents
            ).sample
        pieces = [latents] if chunk_latents is None else _pieces(latents, chunk_latents)
        return _joined(self._decode(pieces))

    @apply_forward_hook
    @torch.no_grad()
    def encode_stream(self, video: Iterable[Tensor]) -> Iterator[DiagonalGaussianDistribution]:
        """Distributions of the latents of a video that comes in pieces, as soon as they are known.

        Args:
            video: pieces ``[B, 3, n, H, W]`` of any number of frames, together
                ``temporal_factor * n + 1``.

        Yields:
            a latent at first, then one for each ``temporal_factor`` frames, in pieces.

        Raises:
            ValueError: as :meth:`encode`; if frames are left over at the end, then.
        """

        def whole(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
            factor, held, first = self.temporal_factor, None, True
            for piece in pieces:
                self._check_frames(piece)
                held = piece if held is None else torch.cat([held, piece], 2)
                count = held.shape[2] - (held.shape[2] - first) % factor
                if count > 0:
                    yield held[:, :, :count]
                    held, first = held[:, :, count:], False
            if held is None or first or held.shape[2]:
                left = 0 if held is None else held.shape[2]
                raise ValueError(
                    f"{left} frames are left over at the end; a video must have {factor}n + 1"
                )

        for moments in self._encode(whole(video)):
            yield DiagonalGaussianDistribution(moments)

    @apply_forward_hook
    @torch.no_grad()
    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[Tensor]:
        """The video of latents that come in pieces ``[B, C, n, h, w]``, in pieces.

        The last frames of a piece come with the next one, which they depend on.

        Raises:
            ValueError: as :meth:`decode`.
        """

        def checked(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
            for piece in pieces:
                self._check_latents(piece)
                yield piece

        yield from self._decode(checked(latents))

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """A video through its latents and back.

        Args:
            sample: ``[B, 3, T, H, W]``, as of :meth:`encode`.
            sample_posterior: through latents that are drawn; else through the most likely ones.
            return_dict: else a tuple.
            generator: to draw with.
        """
        latents = self.encode(sample).latent_dist
        z = latents.sample(generator) if sample_posterior else latents.mode()
        return self.decode(z, return_dict=return_dict)

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents of about zero mean and unit variance, ``(latents - shift) * scale``."""
        return (latents - self._per_channel("shift", latents)) * self._per_channel("scale", latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """The way back from :meth:`normalize`."""
        return latents / self._per_channel("scale", latents) + self._per_channel("shift", latents)

    def _per_channel(self, name: str, latents: Tensor) -> Tensor:
        values = self.config[name]
        if values is None:
            values = [float(name == "scale")] * self.config.latent_channels
        return torch.tensor(values, dtype=latents.dtype, device=latents.device)[:, None, None, None]

    def _encode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        stream = Stream()
        for piece in stream.pieces(pieces):
            yield self.encoder(piece, stream)[0]

    def _decode(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        stream = Stream()
        for piece in stream.pieces(pieces):
            yield self.decoder(piece, stream)[0]

    def _check_video(self, video: Tensor) -> None:
        self._check_frames(video)
        frames, factor = video.shape[2], self.temporal_factor
        if (frames - 1) % factor:
            below = (frames - 1) // factor * factor + 1
            raise ValueError(
                f"video has {frames} frames; it must have {factor}n + 1: take {below} or "
                f"{below + factor}"
            )

    def _check_frames(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != COLOURS or 0 in video.shape:
            raise ValueError(
                f"video must be [batch, {COLOURS}, frames, height, width], none of them 0, got "
                f"{list(video.shape)}"
            )
        size, factor = list(video.shape[3:]), self.spatial_factor
        nearest = [max(round(length / factor), 1) * factor for length in size]
        if size != nearest:
            raise ValueError(
                f"video is {size[0]}x{size[1]} pixels; both must be multiples of {factor}: the "
                f"nearest is {nearest[0]}x{nearest[1]}"
            )
        _check_finite("video", video)

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(
                f"latents must be [batch, {channels}, frames, height, width], none of them 0, got "
                f"{list(latents.shape)}"
            )
        _check_finite("latents", latents)


def _pieces(x: Tensor, length: int) -> list[Tensor]:
    """The first frame, which has none before it, then ``length`` frames at a time."""
    return [x[:, :, :1], *(piece for piece in x[:, :, 1:].split(length, 2) if piece.shape[2])]


def _joined(pieces: Iterable[Tensor]) -> Tensor:
    made = list(pieces)
    return made[0] if len(made) == 1 else torch.cat(made, 2)


def _side(name: str, height: int | None, width: int | None, factor: int) -> int | None:
    """The one length that both are; ValueError if they are not, or none."""
    if height is None and width is None:
        return None
    side = height if width is None else width
    if height not in (None, side) or side is None or side < 1 or side % factor:
        raise ValueError(
            f"{name}_height and {name}_width must be the same multiple of {factor} pixels, got "
            f"{height} and {width}"
        )
    return side


def _check_finite(name: str, x: Tensor) -> None:
    if torch.compiler.is_compiling() or x.is_meta:  # nobody may look at numbers there
        return
    if not torch.stack(x.aminmax()).isfinite().all():  # NaN is passed on; no copy of x is made
        raise ValueError(f"{name} has numbers that are not finite; look at where it comes from")
