"""Tiles that overlap enough give what the whole frame gives; with less, the seams are blended."""

import pytest
import torch

pytest.importorskip("diffusers")

from skiparse.models.wfvae import tiling
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.tiling import decode_tiled, encode_tiled, exact_overlap

EXACT = 1e-12  # fp64, relative to the largest value


def model(blocks=1, factor=8):
    torch.manual_seed(0)
    vae = WFVAE(
        base_channels=4,
        latent_channels=4,
        encoder_energy_channels=4,
        decoder_energy_channels=4,
        encoder_res_blocks=blocks,
        decoder_res_blocks=blocks,
        temporal_factor=factor,
    )
    return vae.double().eval()


@pytest.fixture(scope="module")
def vae():
    return model()


@pytest.fixture(scope="module")
def video():
    return torch.rand(1, 3, 9, 8, 160, dtype=torch.float64) * 2 - 1


@pytest.fixture(scope="module")
def latents():
    return torch.randn(1, 4, 3, 2, 48, dtype=torch.float64)


def error(x, right):
    return float((x - right).abs().max() / right.abs().max())


def test_the_published_size_needs_these_overlaps():
    with torch.device("meta"):
        assert exact_overlap(WFVAE(base_channels=4, latent_channels=4)) == (80, 22)


@pytest.mark.parametrize(("blocks", "factor"), [(1, 8), (2, 8), (1, 4)])
@torch.no_grad()
def test_with_the_exact_overlap_nothing_changes(blocks, factor, video, latents):
    vae = model(blocks, factor)
    pixels, overlap = exact_overlap(vae)
    right = vae.encode(video).latent_dist
    found = encode_tiled(vae, video, tile=max(2 * pixels, 96), overlap=pixels).latent_dist
    assert error(found.mean, right.mean) <= EXACT
    assert error(found.logvar, right.logvar) <= EXACT
    right = vae.decode(latents).sample
    found = decode_tiled(vae, latents, tile=2 * overlap, overlap=overlap).sample
    assert error(found, right) <= EXACT


@torch.no_grad()
def test_the_exact_overlap_is_the_smallest(vae, video, latents, monkeypatch):
    pixels, overlap = exact_overlap(vae)
    right = vae.encode(video).latent_dist.mean, vae.decode(latents).sample
    monkeypatch.setattr(tiling, "_reach", lambda _: (pixels // 16 - 1, overlap // 2 - 1))
    mean = encode_tiled(vae, video, tile=96, overlap=pixels - 16).latent_dist.mean
    made = decode_tiled(vae, latents, tile=32, overlap=overlap - 2).sample
    assert error(mean, right[0]) > EXACT
    assert error(made, right[1]) > EXACT


@torch.no_grad()
def test_both_axes_are_tiled(vae):
    z = torch.randn(2, 4, 1, 37, 40, dtype=torch.float64)
    found = decode_tiled(vae, z, tile=32, overlap=16).sample
    assert error(found, vae.decode(z).sample) <= EXACT
    x = torch.rand(2, 3, 1, 104, 152, dtype=torch.float64)
    found = encode_tiled(vae, x, tile=96, overlap=48).latent_dist.mean
    assert error(found, vae.encode(x).latent_dist.mean) <= EXACT


@torch.no_grad()
def test_tiles_in_chunks_are_the_same_again(vae, video, latents):
    """Also where tiles are blended."""
    whole = encode_tiled(vae, video, tile=64, overlap=16).latent_dist.mean
    chunked = encode_tiled(vae, video, tile=64, overlap=16, chunk_frames=8).latent_dist.mean
    assert error(chunked, whole) <= EXACT
    whole = decode_tiled(vae, latents, tile=16, overlap=4).sample
    chunked = decode_tiled(vae, latents, tile=16, overlap=4, chunk_latents=1).sample
    assert error(chunked, whole) <= EXACT


@torch.no_grad()
def test_one_tile_is_the_whole(vae, video, latents):
    found = encode_tiled(vae, video, tile=160, overlap=0).latent_dist.mean
    assert error(found, vae.encode(video).latent_dist.mean) <= EXACT
    found = decode_tiled(vae, latents, tile=48, overlap=0).sample
    assert error(found, vae.decode(latents).sample) <= EXACT


@torch.no_grad()
def test_a_constant_colour_is_that_of_the_whole(vae):
    x = torch.full((1, 3, 1, 8, 160), 0.3, dtype=torch.float64)
    right = vae.encode(x).latent_dist.mean
    found = encode_tiled(vae, x, tile=96, overlap=48).latent_dist.mean
    assert error(found, right) <= EXACT
    found = decode_tiled(vae, right, tile=32, overlap=16).sample
    assert error(found, vae.decode(right).sample) <= EXACT


@pytest.mark.parametrize("overlap", [0, 1, 2, 4, 7, 10])
def test_what_all_tiles_agree_on_is_kept_to_the_bit(overlap):
    """The weights of two tiles add up to one exactly, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(1, 2, 3, 43, 50).to(dtype)
        found = tiling._in_tiles(
            x, lambda part: part.clone(), tile=20, overlap=overlap, reach=3, scales=(1, 1)
        )
        assert torch.equal(found, x)


def test_the_ramp_goes_evenly_from_one_tile_to_the_other():
    assert tiling.ramp(4, 0).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert tiling.ramp(6, 2).tolist() == [0, 0, 0.25, 0.75, 1, 1]
    assert tiling.ramp(4, 2).tolist() == [0, 0, 1, 1]
    assert tiling.ramp(0, 0).tolist() == []


def test_a_seam_is_blended():
    """Tiles that disagree by one: no step between neighbours is larger than the ramp's."""
    count = iter(range(2))
    found = tiling._in_tiles(
        torch.zeros(1, 1, 1, 1, 30),
        lambda part: part + next(count),
        tile=20,
        overlap=10,
        reach=9,
        scales=(1, 1),
    )
    margin = 3 * 10 // 8
    assert found.diff().max() == pytest.approx(1 / (10 - 2 * margin))
    assert found.flatten()[[0, -1]].tolist() == [0, 1]


def test_no_gradients_are_kept(vae, latents):
    assert not decode_tiled(vae, latents, tile=48, overlap=0).sample.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 60, "overlap": 0}, "tile must be a multiple of 8 pixels, got 60: try 64"),
        ({"tile": 64, "overlap": 12}, "overlap must be a multiple of 8 pixels, got 12: try 16"),
        ({"tile": 64, "overlap": 40}, "overlap must be from 0 to half of the tile, 32, got 40"),
        ({"tile": 64, "overlap": -8}, "overlap must be from 0"),
        ({"tile": 0, "overlap": 0}, "tile must be above 0, got 0"),
        ({"tile": 64, "overlap": 0, "chunk_frames": 4}, "chunk_frames must be a multiple of 8"),
    ],
)
def test_encode_says_what_is_wrong(vae, video, options, message):
    with pytest.raises(ValueError, match=message):
        encode_tiled(vae, video, **options)
    with pytest.raises(ValueError, match="it must have 8n"):
        encode_tiled(vae, video[:, :, :8], tile=64, overlap=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8, "overlap": 5}, "overlap must be from 0 to half of the tile, 4, got 5"),
        ({"tile": 8, "overlap": 0, "chunk_latents": 0}, "chunk_latents must be at least 1, got 0"),
    ],
)
def test_decode_says_what_is_wrong(vae, latents, options, message):
    with pytest.raises(ValueError, match=message):
        decode_tiled(vae, latents, **options)
    with pytest.raises(ValueError, match="latents must be"):
        decode_tiled(vae, latents[:, :3], tile=8, overlap=0)
