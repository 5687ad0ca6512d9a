"""WF-VAE computes what the original did, whole or in pieces of any length."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import golden as recording
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from skiparse.models.wfvae.blocks import CausalConv, convolve
from skiparse.models.wfvae.haar import Haar
from skiparse.models.wfvae.model import WFVAE
from skiparse.models.wfvae.stream import Stream

FORWARD, GRADIENT = 2e-5, 1e-4  # recorded with the goldens, relative to the largest value
SHIFT = (-0.2129, 0.1226, 1.6328, 0.6211, -0.875, 0.6172, -0.5703, 0.1348)
SCALE = (0.7031, 0.7109, 1.5391, 1.2969, 0.7109, 1.4141, 1.3828, 2.1719)


@pytest.fixture(scope="module")
def golden():
    return recording.load("wfvae_tiny.safetensors")


def our_name(name):
    """The recorded (MindSpeed-MM) name of a parameter in ours; written apart from convert.py."""
    name = re.sub(r"norm(1|2|_out)?\.norm\.", r"norm\1.", name)
    name = re.sub(r"\.conv\.(weight|bias)$", r".\1", name)
    name = re.sub(r"(coder\.)connect_l(\d)\.(weight|bias)", r"\1inflow\2.\3", name)
    name = re.sub(r"connect_l(\d)\.0\.", r"outflow\1.res.0.", name)
    name = re.sub(r"connect_l(\d)\.1\.", r"outflow\1.conv.", name)
    name = re.sub(r"down(\d)\.0\.", r"level\1.conv_in.", name)
    name = re.sub(r"down(\d)\.([12])\.", lambda m: f"level{m[1]}.res.{int(m[2]) - 1}.", name)
    name = re.sub(r"down(\d)\.3\.(conv\.)?", r"level\1.down.", name)
    name = re.sub(r"up(\d)\.([01])\.", r"level\1.res.\2.", name)
    name = re.sub(r"up(\d)\.2\.(conv\.)?", r"level\1.up.conv.", name)
    name = re.sub(r"up(\d)\.3\.", r"level\1.res_out.", name)
    name = re.sub(r"decoder\.layer\.(\d)\.", lambda m: f"decoder.res{int(m[1]) + 1}.", name)
    name = re.sub(r"mid\.([02])\.", lambda m: f"mid.res{int(m[1]) // 2 + 1}.", name)
    name = re.sub(r"mid\.1\.([qkv])\.", r"mid.attn.to_\1.", name)
    name = name.replace("mid.1.proj_out", "mid.attn.to_out").replace("mid.1.", "mid.attn.")
    return name.replace("nin_shortcut", "shortcut")


@pytest.fixture(scope="module")
def released(golden):
    """The recorded model: Haar filters of 0.3536."""
    vae = WFVAE(**WFVAE.presets["tiny"] | {"haar_gain": 0.3536, "shift": SHIFT, "scale": SCALE})
    weights = {our_name(k[2:]): v for k, v in golden.items() if k.startswith("w.")}
    vae.load_state_dict(weights, strict=True)
    return vae.eval()


def close(x, right, tolerance, what=""):
    assert x.shape == right.shape, what
    error = (x - right).abs().max().item()
    assert error <= tolerance * right.abs().max().item(), f"{what}: off by {error:.3e}"


@pytest.mark.parametrize("name", ["x1", "x17"])
def test_moments_of_the_original(golden, released, name):
    with torch.no_grad():
        latents = released.encode(golden[f"in.{name}"].float()).latent_dist
    close(torch.cat([latents.mean, latents.logvar], 1), golden[f"{name}.moments"], FORWARD)


@pytest.mark.parametrize("name", ["z1", "z3", "z5"])
def test_videos_of_the_original(golden, released, name):
    with torch.no_grad():
        close(released.decode(golden[f"in.{name}"]).sample, golden[f"{name}.dec"], FORWARD)


def test_normalised_latents_of_the_original(golden, released):
    with torch.no_grad():
        latents = released.encode(golden["in.x17"].float()).latent_dist
        sample = latents.mean + latents.std * golden["x17.noise_seed5"]
        close(released.normalize(sample), golden["x17.encode_sample_seed5"], FORWARD)
        video = released.decode(released.denormalize(golden["in.z3"])).sample
    close(video, golden["z3.decode_denorm"], FORWARD)
    z = golden["in.z3"]
    close(released.denormalize(released.normalize(z)), z, FORWARD)


def test_gradients_of_the_original(golden, released):
    released.zero_grad()
    video = golden["in.x17"][:1].float().requires_grad_()
    moments, _, _ = released.encoder(video, Stream())
    out, _, _ = released.decoder(moments.chunk(2, 1)[0], Stream())
    loss = (out * golden["grad.G"].float()).sum() / 100 + (moments * golden["grad.Gh"]).sum()
    loss.backward()
    close(video.grad, golden["grad.x17_0"], GRADIENT)
    parameters = dict(released.named_parameters())
    recorded = [key for key in golden if key.startswith("gradp.")]
    assert len(recorded) == 10
    for key in recorded:
        close(parameters[our_name(key[6:])].grad, golden[key], GRADIENT, key)


def test_the_wavelets_of_the_original(golden):
    haar, x = Haar(0.3536), golden["in.x17"][:1, :, :5, :8, :8].float()
    coefficients = haar.analyse(x, Stream())
    close(coefficients, golden["haar.coeffs"], FORWARD)
    close(haar.synthesise(coefficients, Stream()), golden["haar.rec"], FORWARD)


@pytest.mark.parametrize("temporal", [True, False])
def test_wavelets_reconstruct_exactly(temporal):
    """The orthonormal ones; with 0.3536 a round trip gains 1.00026."""
    x = torch.randn(2, 3, 9, 8, 16, dtype=torch.float64)
    haar = Haar(None, temporal=temporal)
    coefficients = haar.analyse(x, Stream())
    assert coefficients.shape == (2, 24, 5, 4, 8) if temporal else (2, 12, 9, 4, 8)
    close(haar.synthesise(coefficients, Stream()), x, 8 * torch.finfo(torch.float64).eps)
    gain = Haar(0.3536).gain ** 2 * 8
    assert gain == pytest.approx(1.000264, abs=1e-6)
    energy = Haar(None, temporal=False).analyse(x, Stream()).square().sum()
    assert energy == pytest.approx(x.square().sum())  # orthonormal


def test_bands_are_numbered_time_height_width():
    """A stripe pattern along one axis shows in that axis' high band alone."""
    for axis, band in ((2, 4), (3, 2), (4, 1)):
        x = torch.ones(1, 3, 4, 4, 4)
        index = [slice(None)] * 5
        index[axis] = slice(1, None, 2)
        x[tuple(index)] = -1
        stream = Stream()
        stream.first = False
        found = Haar(None).analyse(x, stream).unflatten(1, (8, 3)).abs().sum((0, 2, 3, 4, 5))
        assert found.nonzero().flatten().tolist() == [band]


def small(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    narrow = {"base_channels": 8, "latent_channels": 4}
    vae = WFVAE(**WFVAE.presets["tiny"] | narrow | changes)
    return vae.to(dtype).eval()


EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}  # asked for: relative to the largest value


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_decoding_in_pieces_is_the_whole(dtype, training):
    """Every latent length from 1 to 17, every piece from 1 to 8 latents."""
    vae = small(dtype).train(training)
    with torch.no_grad():
        for t in range(1, 18):
            latents = torch.randn(1, 4, t, 2, 2, dtype=dtype)
            whole = vae.decode(latents).sample
            assert whole.shape == (1, 3, 8 * t - 7, 16, 16)
            for c in range(1, min(t, 8) + 1):
                close(vae.decode(latents, chunk_latents=c).sample, whole, EXACT[dtype], (t, c))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_encoding_in_pieces_is_the_whole(dtype, training):
    vae = small(dtype).train(training)
    with torch.no_grad():
        for t in (1, 2, 3, 6, 9, 17):
            video = torch.randn(1, 3, 8 * t - 7, 16, 16, dtype=dtype)
            whole = vae.encode(video).latent_dist.parameters
            assert whole.shape == (1, 8, t, 2, 2)
            for c in (8, 16, 24, 64):
                pieces = vae.encode(video, chunk_frames=c).latent_dist.parameters
                close(pieces, whole, EXACT[dtype], (t, c))


def test_gradients_flow_through_pieces():
    vae = small(torch.float64)
    latents = torch.randn(1, 4, 5, 2, 2, dtype=torch.float64)
    grads = []
    for c in (None, 2):
        z = latents.clone().requires_grad_()
        out = vae.decode(z, chunk_latents=c).sample
        found = torch.autograd.grad(out.square().sum(), [z, *vae.decoder.parameters()])
        grads.append(torch.cat([grad.flatten() for grad in found]))
    close(*grads, EXACT[torch.float64])


@pytest.mark.parametrize("temporal_factor", [4, 8])
def test_a_stream_of_any_pieces(temporal_factor):
    """Frames one by one, or a few at a time: latents come as soon as they are known."""
    vae = small(torch.float64, temporal_factor=temporal_factor)
    frames = 4 * temporal_factor + 1
    video = torch.randn(1, 3, frames, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = vae.encode(video).latent_dist.parameters
        decoded = vae.decode(whole[:, :4]).sample
    assert whole.shape[2] == 5
    assert decoded.shape == video.shape
    for n in (1, 3, 7, 8, frames):
        seen = 0

        def source(n=n):
            nonlocal seen
            for piece in video.split(n, 2):
                seen += piece.shape[2]
                yield piece

        parts = []
        for latents in vae.encode_stream(source()):
            parts.append(latents.parameters)
            known = 1 + (seen - 1) // temporal_factor
            assert sum(p.shape[2] for p in parts) >= known - 1 - n // temporal_factor
        close(torch.cat(parts, 2), whole, 1e-12, n)
    for n in (1, 2, 5):
        parts = list(vae.decode_stream(whole[:, :4].split(n, 2)))
        assert len(parts) == -(-5 // n)
        close(torch.cat(parts, 2), decoded, 1e-12, n)


def test_a_stream_that_ends_early_is_told():
    vae = small()
    for frames in (2, 8, 16):
        pieces = torch.randn(1, 3, frames, 16, 16).split(3, 2)
        with pytest.raises(ValueError, match="frames are left over"):
            list(vae.encode_stream(pieces))
    with pytest.raises(ValueError, match="0 frames are left over"):
        list(vae.encode_stream([]))


def test_two_threads_at_once():
    """State lives in the call."""
    vae = small()
    latents = [
        torch.randn(1, 4, 6, 2, 2, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    ]

    def decode(z):
        with torch.no_grad():
            return vae.decode(z, chunk_latents=1).sample

    alone = [decode(z) for z in latents]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            together = list(pool.map(decode, latents))
            assert all(map(torch.equal, together, alone))


def test_nothing_is_decoded_twice(monkeypatch):
    """Frames that pass the last convolution: as many in pieces as in the whole."""
    from skiparse.models.wfvae.blocks import FrameConv

    vae = small()
    passed = []
    right = FrameConv.forward
    monkeypatch.setattr(
        FrameConv, "forward", lambda self, x: passed.append((self, len(x))) or right(self, x)
    )
    latents = torch.randn(1, 4, 7, 2, 2)
    counts = []
    for c in (None, 1, 2, 3):
        passed.clear()
        with torch.no_grad():
            vae.decode(latents, chunk_latents=c)
        counts.append(sum(frames for conv, frames in passed if conv is vae.decoder.conv_out))
    assert counts == [25] * 4  # of 49 frames, half as many coefficients and one


def test_published_sizes():
    """227,035,816 with the 192 numbers of the Haar filters, which are no parameters here."""
    counts = {}
    for name in ("v1.5-M", "S", "L"):
        with torch.device("meta"):
            vae = WFVAE(**WFVAE.presets[name])
        counts[name] = sum(p.numel() for p in vae.parameters())
        assert not list(vae.buffers())
    assert counts["v1.5-M"] + 192 == 227_035_816
    assert sum(p.numel() for p in vae.encoder.parameters()) == pytest.approx(85.93e6, rel=1e-3)
    assert counts["S"] == pytest.approx(149.16e6, rel=1e-4)
    with torch.device("meta"):  # the 4x8x8 model of the paper's table
        vae = WFVAE(latent_channels=4, temporal_factor=4)
    assert sum(p.numel() for p in vae.encoder.parameters()) == pytest.approx(58.88e6, rel=1e-4)
    assert sum(p.numel() for p in vae.decoder.parameters()) == pytest.approx(164.37e6, rel=1e-4)


BARE = {"encoder_energy_channels": 0, "decoder_energy_channels": 0}


@pytest.mark.parametrize("temporal_factor", [4, 8])
def test_without_paths_for_the_coefficients(temporal_factor):
    """The parameters of the paths and no others are gone; coding in pieces stays exact."""
    vae = small(torch.float64, temporal_factor=temporal_factor, **BARE)
    full = small(temporal_factor=temporal_factor).state_dict()
    wider = ("decoder.mid.res2.shortcut", "decoder.level2.res_out.shortcut")  # in the full model
    kept = {name for name in full if "flow" not in name and not name.startswith(wider)}
    assert vae.state_dict().keys() == kept
    video = torch.randn(1, 3, 2 * temporal_factor + 1, 16, 16, dtype=torch.float64)
    (moments,) = vae.encoder(video, Stream())
    assert moments.shape == (1, 8, 3, 2, 2)
    (made,) = vae.decoder(moments[:, :4], Stream())
    assert made.shape == video.shape
    pieces = vae.encode(video, chunk_frames=temporal_factor).latent_dist.parameters
    close(pieces, moments, EXACT[torch.float64])
    close(vae.decode(moments[:, :4], chunk_latents=1).sample, made, EXACT[torch.float64])
    made.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in vae.parameters())


@pytest.mark.parametrize("energy", [(0, 8), (8, 0), (-1, -1), (-1, 8), (0, -1)])
def test_paths_on_one_side_alone_are_refused(energy):
    encoder, decoder = energy
    with pytest.raises(ValueError, match=f"both 0 for .*, got {encoder} and {decoder}"):
        small(encoder_energy_channels=encoder, decoder_energy_channels=decoder)


@pytest.mark.parametrize("channels", [8, 16, 64])
def test_a_small_video_alone_is_not_convolved_slowly(channels):
    """torch's slow kernel for one video in a batch is not called, and the results are right."""
    torch.manual_seed(0)
    x = torch.randn(1, channels, 5, 16, 16)
    for conv in (
        CausalConv(channels, channels),
        CausalConv(channels, channels, stride=2),
        CausalConv(channels, 2 * channels, 1),
    ):
        found = []
        for dtype in (torch.float32, torch.float64):
            exact = copy.deepcopy(conv).to(dtype)
            video = x.to(dtype).requires_grad_()
            with profile(activities=[ProfilerActivity.CPU]) as seen:
                out = convolve(exact, video, Stream())
                grads = torch.autograd.grad(out.square().sum(), [video, *exact.parameters()])
            found.append([out, *grads])
            names = {event.key for event in seen.key_averages()}
            assert any("slow_conv3d" in name for name in names) == (dtype == torch.float64)
        for single, double in zip(*found, strict=True):
            close(single, double.float(), FORWARD)


def test_saved_and_loaded(tmp_path):
    vae = small(shift=(1.0, 2.0, 3.0, 4.0), scale=(0.5,) * 4, haar_gain=0.3536)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is a file; give the folder of a WFVAE"):
        WFVAE.from_pretrained(tmp_path / "config.json")
    again = WFVAE.from_pretrained(tmp_path)
    assert again.config.shift == (1.0, 2.0, 3.0, 4.0)
    video = torch.rand(1, 3, 9, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.encode(video).latent_dist.mean, vae.encode(video).latent_dist.mean)


def test_the_distribution():
    vae = small()
    latents = vae.encode(torch.rand(2, 3, 9, 16, 16) * 2 - 1).latent_dist
    assert torch.equal(latents.mode(), latents.mean)
    one = latents.sample(torch.Generator().manual_seed(5))
    assert torch.equal(latents.sample(torch.Generator().manual_seed(5)), one)
    assert latents.logvar.min() >= -30
    assert latents.logvar.max() <= 20
    assert vae(torch.rand(1, 3, 9, 16, 16)).sample.shape == (1, 3, 9, 16, 16)


def test_one_frame():
    vae = small()
    with torch.no_grad():
        latents = vae.encode(torch.rand(2, 3, 1, 24, 16)).latent_dist.mean
        assert latents.shape == (2, 4, 1, 3, 2)
        assert vae.decode(latents).sample.shape == (2, 3, 1, 24, 16)
        assert vae.decode(latents, chunk_latents=3).sample.shape == (2, 3, 1, 24, 16)


def test_what_it_cannot_take():
    vae = small()
    video = torch.rand(1, 3, 9, 16, 16)
    spoilt = video.clone()
    spoilt[0, 0, 0, 0, 0] = float("nan")
    for wrong, words in (
        (torch.rand(1, 3, 12, 16, 16), r"12 frames; it must have 8n \+ 1: take 9 or 17"),
        (torch.rand(1, 3, 9, 20, 15), "20x15 pixels.*nearest is 16x16"),
        (torch.rand(0, 3, 9, 16, 16), "none of them 0"),
        (torch.rand(1, 3, 0, 16, 16), "none of them 0"),
        (torch.rand(1, 4, 9, 16, 16), r"\[batch, 3"),
        (torch.rand(3, 9, 16, 16), r"\[batch, 3"),
        (spoilt, "not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            vae.encode(wrong)
    for wrong in (0, 4, 12, -8):
        with pytest.raises(ValueError, match="chunk_frames must be a multiple of 8"):
            vae.encode(video, chunk_frames=wrong)
    with pytest.raises(ValueError, match="chunk_latents must be at least 1"):
        vae.decode(torch.rand(1, 4, 2, 2, 2), chunk_latents=0)
    with pytest.raises(ValueError, match=r"latents must be \[batch, 4"):
        vae.decode(torch.rand(1, 3, 2, 2, 2))
    with pytest.raises(ValueError, match="not finite"):
        vae.decode(torch.full((1, 4, 2, 2, 2), float("inf")))
    for sizes in ({"base_channels": -8}, {"latent_channels": 0}, {"latent_channels": "4"}):
        with pytest.raises(ValueError, match=r"_channels must be a whole number above 0, got"):
            WFVAE(**sizes)
    with pytest.raises(ValueError, match="temporal_factor must be 4 or 8"):
        small(temporal_factor=2)
    with pytest.raises(ValueError, match="shift must have 4 values"):
        small(shift=(1.0,))
