"""Every term of WF-VAE's objective against numbers worked out by hand, and its networks' layers."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from skiparse.models.wfvae import losses
from skiparse.models.wfvae.discriminator import Discriminator
from skiparse.models.wfvae.losses import LPIPS, Weights

EPS = torch.finfo(torch.float64).eps
VGG = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def tensor(*values, shape=None):
    made = torch.tensor(values, dtype=torch.float64)
    return made if shape is None else made.reshape(shape)


def same(found, expected, roundings=16):
    """Equal but for so many roundings of float64."""
    return abs(found.item() - expected) <= roundings * EPS * abs(expected)


def test_l1_sums_a_frame_and_averages_frames():
    # frames [channel 0 | channel 1]: |1| + |-2| + 0 + |0.5| = 3.5 and 0 + 0 + 1 + 1 = 2; mean 2.75
    made = tensor(1, -2, 0, 0, 0, 0.5, 1, 1, shape=(1, 2, 2, 1, 2))
    assert same(losses.l1(torch.zeros_like(made), made), 2.75)
    two = torch.cat([made, 2 * made])  # frames 3.5, 2, 7, 4; mean 4.125
    assert same(losses.l1(torch.zeros_like(two), two), 4.125)


def test_kl_sums_a_whole_clip_time_included_and_averages_clips():
    # clip 0: (1 + 1 - 1 - 0) / 2 = 0.5 and (0 + 2 - 1 - ln 2) / 2
    # clip 1: (4 + 1 - 1 - 0) / 2 = 2 and 0
    mean = tensor(1, 0, 2, 0, shape=(2, 1, 2, 1, 1))
    logvar = tensor(0, math.log(2), 0, 0, shape=(2, 1, 2, 1, 1))
    expected = (0.5 + (1 - math.log(2)) / 2 + 2) / 2
    assert same(losses.kl(mean, logvar), expected)
    assert same(losses.kl(mean.transpose(1, 2), logvar.transpose(1, 2)), expected)
    assert same(losses.kl(mean.movedim(2, 4), logvar.movedim(2, 4)), expected)


def test_wavelet_sums_levels_and_averages_clips():
    # level 1: clips |1| + |-1| = 2 and |3| + |0| = 3, mean 2.5; level 2: 4 and 0, mean 2; 4.5
    level1, level2 = (
        tensor(1, -1, 3, 0, shape=(2, 1, 2, 1, 1)),
        tensor(-4, 0, shape=(2, 1, 1, 1, 1)),
    )
    zeros = [torch.zeros_like(level1), torch.zeros_like(level2)]
    assert same(losses.wavelet(zeros, [level1, level2]), 4.5)
    assert same(losses.wavelet([level1, level2], zeros), 4.5)


def test_hinge():
    # real: 1 - 2 < 0, so 0; 1 - 0.5 = 0.5; 1 + 1 = 2; mean 2.5 / 3
    # fake: 1 - 2 < 0, so 0; 1 + 0 = 1;     1 + 1 = 2; mean 1;     half the sum 11 / 12
    assert same(losses.hinge(tensor(2, 0.5, -1), tensor(-2, 0, 1)), 11 / 12)


def test_balance_is_the_ratio_of_gradient_norms_and_a_constant():
    last = tensor(1, 1, 1).requires_grad_()
    reconstruction = (tensor(0, 3, 4) * last).sum()  # gradient norm 5
    adversarial = (tensor(2, 0, 0) * last.square() / 2).sum()  # gradient (2, 0, 0), norm 2
    found = losses.balance(reconstruction, adversarial, last)
    assert same(found, 5 / (2 + 1e-6))
    assert not found.requires_grad
    reconstruction.backward()  # the graph is still there


@pytest.mark.parametrize(("slope", "expected"), [(0.0, 1e6), (4e-6, 1.0), (-4e-6, 1.0)])
def test_balance_near_nothing_is_bounded(slope, expected):
    last = tensor(1).requires_grad_()
    # 5 / (0 + 1e-6) = 5e6, bounded to 1e6; 5e-6 / (4e-6 + 1e-6) = 1
    reconstruction = (5 if slope == 0 else 5e-6) * last.sum()
    assert same(losses.balance(reconstruction, slope * last.sum(), last), expected)


def by_hand():
    """made = a * (1, 2 | 3, 4), perceptual = a * (0.2, 0.4), judgement = a * (1, -3), a = 0.5."""
    last = tensor(0.5).requires_grad_()
    made = last * tensor(1, 2, 3, 4, shape=(1, 1, 2, 1, 2))
    return last, {
        "video": torch.zeros_like(made),
        "made": made,
        "mean": tensor(2, shape=(1, 1, 1, 1, 1)),
        "logvar": tensor(0, shape=(1, 1, 1, 1, 1)),
        "coefficients": [tensor(1, shape=(1, 1, 1, 1, 1)), tensor(0, shape=(1, 1, 1, 1, 1))],
        "made_coefficients": [tensor(3, shape=(1, 1, 1, 1, 1)), tensor(-1, shape=(1, 1, 1, 1, 1))],
        "weights": Weights(lpips=2, kl=0.1, wavelet=0.2, adversarial=0.5),
        "perceptual": last * tensor(0.2, 0.4),
        "judgement": last * tensor(1, -3),
        "last": last,
    }


def objective(arguments, **changes):
    arguments = {**arguments, **changes}
    return losses.objective(arguments.pop("video"), arguments.pop("made"), **arguments)


def test_objective_by_hand():
    # l1:      frames 0.5 + 1 and 1.5 + 2, mean 2.5; its slope in a: (3 + 7) / 2 = 5
    # lpips:   (0.1 + 0.2) / 2 = 0.15, slope 0.3; on 2 values a frame, weight 2: 0.6, slope 1.2
    # kl:      (4 + 1 - 1 - 0) / 2 = 2, times 0.1: 0.2;  wavelet: |1-3| + |0+1| = 3, times 0.2: 0.6
    # adversarial: -(0.5 - 1.5) / 2 = 0.5, slope 1; balance: 0.5 * (5 + 1.2) / (1 + 1e-6)
    last, arguments = by_hand()
    terms = objective(arguments)
    balance = 0.5 * 6.2 / (1 + 1e-6)
    expected = {
        "l1": 2.5, "lpips": 0.15, "kl": 2, "wavelet": 3, "adversarial": 0.5, "balance": balance,
        "loss": 2.5 + 0.6 + 0.2 + 0.6 + balance * 0.5,
    }  # fmt: skip
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert same(terms[name], value), name
    (slope,) = torch.autograd.grad(terms["loss"], last)
    assert same(slope, 6.2 + balance)  # balance is a constant


def test_objective_without_networks_has_neither_of_their_terms():
    last, arguments = by_hand()
    terms = objective(arguments, perceptual=None, judgement=None, last=None)
    assert terms.keys() == {"l1", "kl", "wavelet", "loss"}
    assert same(terms["loss"], 2.5 + 0.2 + 0.6)
    (slope,) = torch.autograd.grad(terms["loss"], last)
    assert same(slope, 5)


def test_objective_without_coefficients_has_no_wavelet_term():
    _, arguments = by_hand()
    terms = objective(arguments, coefficients=[], made_coefficients=[])
    assert objective(arguments).keys() - terms.keys() == {"wavelet"}
    assert same(terms["loss"], 2.5 + 0.6 + 0.2 + terms["balance"] * 0.5)
    with pytest.raises(ValueError, match="shorter"):
        objective(arguments, made_coefficients=[])


def test_mean_is_the_sum_divided_by_the_values_of_a_frame():
    last, arguments = by_hand()
    of_sum, of_mean = objective(arguments), objective(arguments, reduction="mean")
    per_frame = {"l1", "kl", "wavelet", "balance", "loss"}
    for name, value in of_sum.items():
        assert same(of_mean[name], value.item() / (2 if name in per_frame else 1)), name
    (a,), (b,) = (
        torch.autograd.grad(x["loss"], last, retain_graph=True) for x in (of_sum, of_mean)
    )
    assert same(b, a.item() / 2)


def test_mean_counts_colours_and_both_axes():
    generator = torch.Generator().manual_seed(0)
    video, made = torch.rand(2, 2, 3, 5, 8, 16, generator=generator, dtype=torch.float64)
    _, arguments = by_hand()
    plain = {"video": video, "made": made, "perceptual": None, "judgement": None, "last": None}
    terms = objective(arguments, reduction="mean", **plain)
    assert same(terms["l1"], (video - made).abs().mean().item(), roundings=video.numel())


def test_the_published_weights():
    assert Weights() == Weights(lpips=1.0, kl=1e-6, wavelet=0.1, adversarial=0.5)


def test_objective_refuses():
    _, arguments = by_hand()
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, got 'none'"):
        objective(arguments, reduction="none")
    with pytest.raises(ValueError, match="needs last"):
        objective(arguments, last=None)


def test_discriminator_has_the_published_size():
    with torch.device("meta"):
        model = Discriminator()
        judgement = model(torch.empty(1, 3, 25, 256, 256))
    # 3*64*27 + 64, then 27*(64*128 + 128*256 + 256*512 + 512*512) and 2 a channel for the norms,
    # then 512*27 + 1
    assert sum(p.numel() for p in model.parameters()) == 11_744_641
    assert judgement.shape == (1, 1, 7, 16, 16)


def test_discriminator_layers():
    model = Discriminator(8)
    kinds = [type(layer).__name__ for layer in model]
    normed = ["Conv3d", "BatchNorm3d", "LeakyReLU", "Dropout"]
    assert kinds == ["Conv3d", "LeakyReLU", *4 * normed, "Conv3d"]
    assert [layer.negative_slope for layer in model if isinstance(layer, nn.LeakyReLU)] == 5 * [0.2]
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == 4 * [0.3]
    strides = [layer.stride for layer in model if isinstance(layer, nn.Conv3d)]
    assert strides == [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1)]


def test_discriminator_starts_from_the_published_spread():
    torch.manual_seed(0)
    model = Discriminator(16)
    for kind, mean in ((nn.Conv3d, 0), (nn.BatchNorm3d, 1)):
        values = torch.cat([m.weight.flatten() for m in model if isinstance(m, kind)])
        # five standard errors of a mean and of a standard deviation
        assert abs(values.mean() - mean) < 5 * 0.02 / len(values) ** 0.5
        assert abs(values.std() - 0.02) < 5 * 0.02 / (2 * len(values)) ** 0.5


@pytest.fixture(scope="module")
def lpips_weights():
    """Random ones under the names that the package `lpips` saves."""
    generator = torch.Generator().manual_seed(0)
    weights, channels, index, slices = {}, 3, 0, 1
    for width in VGG:
        if width == "M":
            index, slices = index + 1, slices + 1
            continue
        gain = (2 / (channels * 9)) ** 0.5
        name = f"net.slice{slices}.{index}"
        weights[f"{name}.weight"] = gain * torch.randn(width, channels, 3, 3, generator=generator)
        weights[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)
        channels, index = width, index + 2
    for i, width in enumerate((64, 128, 256, 512, 512)):
        weights[f"lin{i}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    weights["scaling_layer.shift"] = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    weights["scaling_layer.scale"] = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    return weights


@pytest.fixture(scope="module")
def lpips_file(lpips_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(lpips_weights, path)
    return path


def plain_lpips(weights, a, b):
    """Of two pictures [3, H, W], layer by layer from its definition."""
    total, index, slices = 0.0, 0, 1
    shift = tensor(-0.030, -0.088, -0.188, shape=(3, 1, 1))
    scale = tensor(0.458, 0.448, 0.450, shape=(3, 1, 1))
    a, b = (a - shift) / scale, (b - shift) / scale
    for width, following in itertools.pairwise((*VGG, "M")):
        if width == "M":
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
            index, slices = index + 1, slices + 1
            continue
        name = f"net.slice{slices}.{index}"
        weight, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
        a, b = (F.conv2d(x[None], weight, bias, padding=1)[0].clamp(min=0) for x in (a, b))
        index += 2
        if following == "M":
            unit = [x / (x.square().sum(0, keepdim=True).sqrt() + 1e-10) for x in (a, b)]
            head = weights[f"lin{slices - 1}.model.1.weight"].double().reshape(-1, 1, 1)
            total += float((head * (unit[0] - unit[1]) ** 2).sum(0).mean())
    return total


def test_lpips_is_its_definition(lpips_weights, lpips_file):
    model = LPIPS.from_file(lpips_file).double()
    generator = torch.Generator().manual_seed(1)
    video, made = 2 * torch.rand(2, 2, 3, 3, 32, 16, generator=generator, dtype=torch.float64) - 1
    found = model(video, made)
    assert found.shape == (6,)
    for i, (clip, frame) in enumerate(itertools.product(range(2), range(3))):
        expected = plain_lpips(lpips_weights, video[clip, :, frame], made[clip, :, frame])
        # 13 convolutions, each a sum of at most 512 * 9 products
        assert same(found[i], expected, roundings=13 * 512 * 9)
    assert model(video, video).count_nonzero() == 0


def test_lpips_is_frozen_but_lets_gradients_through(lpips_file):
    model = LPIPS.from_file(lpips_file)
    model.stages[4][2].bias.fill_(-1e6)  # all of the last features are 0
    made = torch.zeros(1, 3, 1, 16, 16, requires_grad=True)
    model(torch.ones(1, 3, 1, 16, 16), made).sum().backward()
    assert made.grad.isfinite().all()
    assert made.grad.any()
    assert not any(p.requires_grad for p in model.parameters())


def test_lpips_refuses_other_files(lpips_weights, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        LPIPS.from_file(path)
    save_file({k: v for k, v in lpips_weights.items() if k != "net.slice3.12.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks net\.slice3\.12\.bias with 256 numbers"):
        LPIPS.from_file(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        LPIPS.from_file(path)
