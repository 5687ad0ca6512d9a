"""Coding frames too large for memory tile by tile: exact if tiles overlap enough, else blended.

All of WF-VAE but its middle sees a neighbourhood of each pixel and no more. The middle, whose
attention looks at whole frames, works where there are 64 times fewer pixels. So the other layers
run on one tile after the other, each for the whole length of the video, and the middle on whole
frames. All that can differ is then what the zero padding at the edge of a tile does to the pixels
near it. It comes no farther than a known distance: with an overlap of :func:`exact_overlap` those
pixels are cut off and the result is that of the whole frame. With less they are blended.

Tiling makes nothing better but memory: pixels in overlaps are coded twice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from skiparse.models.wfvae.model import WFVAE, Decoder, Encoder, _joined, _pieces
from skiparse.models.wfvae.stream import Stream


def exact_overlap(vae: WFVAE) -> tuple[int, int]:
    """Overlaps with which tiling changes nothing: pixels to encode, latents to decode."""
    encode, decode = _reach(vae)
    return 2 * encode * vae.spatial_factor, 2 * decode


@torch.no_grad()
def encode_tiled(
    vae: WFVAE, video: Tensor, *, tile: int, overlap: int, chunk_frames: int | None = None
) -> AutoencoderKLOutput:
    """The distribution of the latents of a video, as ``vae.encode`` gives it.

    Args:
        video: ``[B, 3, T, H, W]`` in [-1, 1], sizes as ``vae.encode`` takes them.
        tile: height and width of a tile in pixels, a multiple of 8; those at the right and the
            bottom are smaller if need be.
        overlap: pixels that neighbours share, a multiple of 8, at most half of ``tile``.
        chunk_frames: so many frames of a tile at a time, after the first one.

    Raises:
        ValueError: as ``vae.encode``, and for a tile or an overlap that are none.
    """
    vae._check_video(video)
    factor = vae.spatial_factor
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value % factor:
            near = max(round(value / factor), 1) * factor
            raise ValueError(
                f"{name} must be a multiple of {factor} pixels, got {value}: try {near}"
            )
    check_tile(tile, overlap)
    if chunk_frames is not None and (chunk_frames < 1 or chunk_frames % vae.temporal_factor):
        raise ValueError(
            f"chunk_frames must be a multiple of {vae.temporal_factor}, got {chunk_frames}"
        )
    encoder: Encoder = vae.encoder
    features = _in_tiles(
        video,
        lambda part: _in_time(part, chunk_frames, lambda x, stream: encoder(x, stream, "down")[0]),
        tile=tile // factor,
        overlap=overlap // factor,
        reach=_reach(vae)[0],
        scales=(factor, 1),
    )
    moments = _in_time(
        features,
        None if chunk_frames is None else chunk_frames // vae.temporal_factor,
        lambda x, stream: encoder(x, stream, "finish")[0],
    )
    return AutoencoderKLOutput(DiagonalGaussianDistribution(moments))


@torch.no_grad()
def decode_tiled(
    vae: WFVAE, latents: Tensor, *, tile: int, overlap: int, chunk_latents: int | None = None
) -> DecoderOutput:
    """The video of latents, as ``vae.decode`` gives it.

    Args:
        latents: ``[B, C, t, h, w]``, not normalised.
        tile: height and width of a tile in latents; those at the right and the bottom are smaller
            if need be.
        overlap: latents that neighbours share, at most half of ``tile``.
        chunk_latents: so many of a tile at a time, after the first one.

    Raises:
        ValueError: as ``vae.decode``, and for a tile or an overlap that are none.
    """
    vae._check_latents(latents)
    check_tile(tile, overlap)
    if chunk_latents is not None and chunk_latents < 1:
        raise ValueError(f"chunk_latents must be at least 1, got {chunk_latents}")
    decoder: Decoder = vae.decoder
    features = _in_time(
        latents,
        chunk_latents,
        lambda x, stream: decoder(x, stream, "start")[0],
    )
    video = _in_tiles(
        features,
        lambda part: _in_time(part, chunk_latents, lambda x, stream: decoder(x, stream, "up")[0]),
        tile=tile,
        overlap=overlap,
        reach=_reach(vae)[1],
        scales=(1, vae.spatial_factor),
    )
    return DecoderOutput(sample=video)


def check_tile(tile: int, overlap: int) -> None:
    """ValueError unless neighbours can share ``overlap`` of ``tile``."""
    if tile < 1:
        raise ValueError(f"tile must be above 0, got {tile}")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(
            f"overlap must be from 0 to half of the tile, {tile // 2}, got {overlap}; make the "
            "tile larger or the overlap smaller"
        )


def _reach(vae: WFVAE) -> tuple[int, int]:
    """How far the padding at the edge of a tile is felt, in latents: to encode, to decode.

    A convolution of 3 takes 1 from each side where it works; halving and doubling take 1 more.
    """
    config = vae.config
    level = 1 + 2 * config.encoder_res_blocks + 1  # at 1/2, and again at 1/4
    encode = -(-(2 * level + 4 * level) // vae.spatial_factor)
    res, connect = 2 * config.decoder_res_blocks, 2 * config.connect_res_blocks + 1
    half = 1 + 2 + 2 + 2 + 1  # out, two residual blocks, the last one of `level1`, its upsampler
    quarter = max(half // 2 + 1 + res, connect) + 2 + 1
    return encode, max(quarter // 2 + 1 + res, connect)


def _in_time(x: Tensor, length: int | None, code: Callable[[Tensor, Stream], Tensor]) -> Tensor:
    """``code`` over a stream of its own, ``length`` frames at a time or all at once."""
    stream = Stream()
    pieces = [x] if length is None else _pieces(x, length)
    return _joined(code(piece, stream) for piece in stream.pieces(pieces))


def _in_tiles(
    x: Tensor,
    code: Callable[[Tensor], Tensor],
    *,
    tile: int,
    overlap: int,
    reach: int,
    scales: tuple[int, int],
) -> Tensor:
    """``code`` of each tile, put together; lengths in latents, ``scales`` pixels in and out each.

    Columns are blended to strips, strips to the whole. What ``overlap`` leaves out at the two
    edges of a tile is its whole ``reach`` if there is room for that, else most of a half.
    """
    taken, given = scales
    height, width = (length // taken for length in x.shape[3:])
    margin = reach if overlap >= 2 * reach else 3 * overlap // 8
    whole = strip = None
    for top in _starts(height, tile, overlap):
        for left in _starts(width, tile, overlap):
            rows = slice(top * taken, (top + tile) * taken)
            columns = slice(left * taken, (left + tile) * taken)
            part = code(x[:, :, :, rows, columns])
            if left == 0:
                strip = part.new_empty(*part.shape[:4], width * given)
            assert strip is not None
            _paste(strip, part, 4, left * given, overlap * given, margin * given)
        assert strip is not None
        if whole is None:
            whole = strip.new_empty(*strip.shape[:3], height * given, width * given)
        _paste(whole, strip, 3, top * given, overlap * given, margin * given)
    assert whole is not None
    return whole


def _starts(length: int, tile: int, overlap: int) -> range:
    """Where tiles begin; each ends ``overlap`` behind the beginning of the next."""
    return range(0, max(length - overlap, 1), tile - overlap)


def _paste(canvas: Tensor, part: Tensor, axis: int, start: int, overlap: int, margin: int) -> None:
    """Put ``part`` at ``start``, going over from what is there within the overlap.

    Going over is ``old + weight * (new - old)``: the weights of the two add up to one exactly.
    """
    length = part.shape[axis]
    if start == 0:
        overlap = 0
    shared = canvas.narrow(axis, start, overlap)
    weight = ramp(overlap, margin).to(part).view(-1, *[1] * (part.ndim - axis - 1))
    shared.lerp_(part.narrow(axis, 0, overlap), weight)
    canvas.narrow(axis, start + overlap, length - overlap).copy_(
        part.narrow(axis, overlap, length - overlap)
    )


def ramp(overlap: int, margin: int) -> Tensor:
    """Weights of the later of two tiles: 0 for ``margin``, rising evenly, 1 for ``margin``."""
    rising = overlap - 2 * margin
    place = torch.arange(overlap) - margin + 0.5
    return (place / rising).clamp(0, 1) if rising else (place > 0).float()
