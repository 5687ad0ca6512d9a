"""Flow matching agrees with the original implementation, and does what its formulas promise.

`tests/data/README.md` tells where the recorded values come from.
"""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from skiparse.models import flow

GOLDEN = load_file(Path(__file__).parent / "data" / "scheduler.safetensors")
FORWARD = 2e-5  # relative to max|golden|: what fp32 of the original allows
EPS = torch.finfo(torch.float32).eps


def assert_near(x, golden):
    golden = torch.as_tensor(golden)
    assert x.dtype == torch.float32
    assert x.shape == golden.shape
    assert (x.double() - golden.double()).abs().max() <= FORWARD * golden.abs().max()


def training_golden(*names):
    """Tensors of the recorded training step; those of one number a sample as [B]."""
    tensors = [GOLDEN[f"train.{name}"] for name in names]
    return [x.flatten() if x[0].numel() == 1 else x for x in tensors]


# Against the original


SEQ256, SEQ2304 = flow.dynamic_shift(32, 32), flow.dynamic_shift(72, 128)


@pytest.mark.parametrize(
    ("name", "sigmas"),
    [
        ("noshift.n50", flow.inference_sigmas(50, shift=1)),
        ("shift7.n50", flow.inference_sigmas(50)),
        ("shift7.n50.inversion", flow.inference_sigmas(50).flip(0)),
        ("dynamic.seq256.n50", flow.inference_sigmas(50, shift=SEQ256)),
        ("dynamic.seq2304.n50", flow.inference_sigmas(50, shift=SEQ2304)),
        ("linquad.n50", flow.inference_sigmas(50, schedule="linear_quadratic")),
    ],
)
def test_inference_sigmas(name, sigmas):
    assert_near(sigmas, GOLDEN[f"sigmas.{name}"])


def test_timesteps():
    assert_near(flow.timesteps(flow.inference_sigmas(50)[:-1]), GOLDEN["timesteps.shift7.n50"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("logit_normal.raw.seed11", {}),
        ("logit_normal.shift7", {"shift": 7.0}),
        ("logit_normal.dynamic.seq2304", {"shift": SEQ2304}),
        ("logit_normal.dynamic.seq2304.gamma1.3", {"shift": SEQ2304, "gamma": 1.3}),
        ("uniform.raw.seed11", {"density": "uniform"}),
        ("uniform.dynamic.seq2304", {"density": "uniform", "shift": SEQ2304}),
    ],
)
def test_densities(name, options):
    golden = GOLDEN[f"density.{name}"]
    torch.manual_seed(11)
    assert_near(flow.sample_sigmas(64, **options), golden)
    generator = torch.Generator().manual_seed(11)
    assert_near(flow.sample_sigmas(64, generator=generator, **options), golden)


def test_noisy_latents():
    x0, noise, x_t, sigmas, timesteps = training_golden("x0", "noise", "x_t", "sigmas", "timesteps")
    torch.manual_seed(13)
    assert_near(flow.sample_sigmas(3, shift=flow.dynamic_shift(6, 8)), sigmas)
    assert_near(flow.add_noise(x0, noise, sigmas), x_t)
    assert_near(flow.timesteps(sigmas), timesteps)


@pytest.mark.parametrize("scheme", ["none", "sigma_sqrt", "cosmap"])
def test_loss(scheme):
    x0, noise, prediction, sigmas = training_golden("x0", "noise", "model_out", "sigmas")
    weight = flow.loss_weight(sigmas, scheme)
    if scheme == "none":
        assert torch.equal(weight, torch.ones(3))
        (golden,) = training_golden("loss_full")
        plain = flow.loss(prediction, flow.velocity(x0, noise))
        assert_near(plain, golden[0])
    else:
        assert_near(weight, training_golden(f"loss_weight.{scheme}")[0])
        (golden,) = training_golden(f"loss_full.{scheme}")
    assert_near(flow.loss(prediction, flow.velocity(x0, noise), weight=weight), golden[0])


def test_guidance():
    uncond, cond = GOLDEN["cfg.uncond"], GOLDEN["cfg.cond"]
    assert_near(flow.guide(uncond, cond, scale=7, rescale=0), GOLDEN["cfg.guided_g7"])
    assert_near(flow.guide(uncond, cond, scale=7), GOLDEN["cfg.rescaled_0.7"])


def test_ten_steps():
    """The recorded start and prompts; the end was not recorded, so numpy in fp64 gives it."""
    start, prompts = GOLDEN["sample.latents0"], GOLDEN["sample.prompt_[uncond,cond]"]
    mean = prompts.mean((1, 2)).view(2, 2, 1, 1, 1, 1)  # [uncond or cond, B, 1, 1, 1, 1]
    sigmas = flow.inference_sigmas(10)
    x = start
    for s, s_next in pairwise(sigmas):
        uncond, cond = 0.3 * x.tanh() + 0.001 * flow.timesteps(s) * mean * x.cos()
        x = flow.euler_step(x, flow.guide(uncond, cond, scale=7, rescale=0.7), s, s_next)

    mean, y = mean.double().numpy(), start.double().numpy()
    for i in range(10):
        now, after = (7 * s / (1 + 6 * s) for s in (1 - i / 10, 1 - (i + 1) / 10))
        u, c = 0.3 * np.tanh(y) + now * mean * np.cos(y)
        v = u + 7 * (c - u)
        for b in range(2):
            v[b] = 0.7 * v[b] * c[b].std(ddof=1) / v[b].std(ddof=1) + 0.3 * v[b]
        y = y + (after - now) * v
    assert_near(x, y)


# Noise levels


def test_published_shifts():
    for (height, width), shift in {
        (256, 256): 1.6487,
        (288, 512): 1.7405,
        (384, 384): 1.7405,
        (576, 1024): 2.3319,
    }.items():
        assert round(flow.dynamic_shift(height // 8, width // 8), 4) == shift


def test_dynamic_shift_goes_on_beyond_its_ends():
    assert math.log(flow.dynamic_shift(16, 16)) < 0.5
    assert math.log(flow.dynamic_shift(256, 256)) > 1.15


@pytest.mark.parametrize("gamma", [1.0, 1.3])
def test_shifted_logit_normal_is_a_logit_normal(gamma):
    shift = flow.dynamic_shift(72, 128)
    z = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    shifted = flow.shift_sigmas(z.sigmoid(), shift, gamma=gamma)
    direct = (math.log(shift) + gamma * z).sigmoid()
    # A rounding of sigma moves the result by d shifted / d sigma of it.
    s = z.sigmoid()
    slope = gamma * direct * (1 - direct) / (s * (1 - s))
    eps = torch.finfo(torch.float64).eps
    assert ((shifted - direct).abs() <= eps * (slope + 4)).all()


def test_shift_1_changes_nothing_and_the_ends_stay():
    s = torch.linspace(0, 1, 1001)
    assert torch.equal(flow.shift_sigmas(s, 1.0), s)
    for shift, gamma in ((7.0, 1.0), (0.2, 1.0), (2.3, 1.3), (2.3, 0.7)):
        moved = flow.shift_sigmas(s, shift, gamma=gamma)
        assert moved[0] == 0
        assert moved[-1] == 1
        assert (moved.diff() > 0).all()
    assert (flow.shift_sigmas(s, 0.2)[1:-1] < s[1:-1]).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 333, 1000])
@pytest.mark.parametrize("schedule", ["linear", "linear_quadratic"])
def test_sigmas_fall_from_1_to_exactly_0(steps, schedule):
    if schedule == "linear_quadratic" and steps % 2:
        with pytest.raises(ValueError, match="steps must be even"):
            flow.inference_sigmas(steps, schedule=schedule)
        return
    sigmas = flow.inference_sigmas(steps, schedule=schedule)
    assert sigmas.dtype == torch.float32
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize(("steps", "fine"), [(10, 250), (50, 500), (80, 800), (998, 1000)])
def test_linear_quadratic_halves(steps, fine):
    """Steps of 1 / fine, then steps that grow by the same amount each."""
    sigmas, half = flow.inference_sigmas(steps, schedule="linear_quadratic"), steps // 2
    linear = 1 - torch.arange(half + 1, dtype=torch.float64) / fine
    assert torch.equal(sigmas[: half + 1], linear.float())
    growth = sigmas[half:].double().diff().diff()
    assert (growth - growth.mean()).abs().max() <= 4 * EPS


def test_mode_density():
    """Dense about 1/2, sparse at the ends, never outside [0, 1]."""
    n = 20_000
    sigmas = flow.sample_sigmas(n, density="mode", generator=torch.Generator().manual_seed(0))
    assert sigmas.min() >= 0
    assert sigmas.max() <= 1
    u = torch.rand(n, generator=torch.Generator().manual_seed(0)).double()
    expected = 1 - u + 1.29 * ((math.pi / 2 * u).sin() ** 2 - u)
    assert (sigmas - expected).abs().max() <= 8 * EPS
    # |d sigma / d u| = 1 + 1.29 (1 - pi/2 sin(pi u)), from 2.29 at the ends to 0.264 in the middle.
    low, middle = (sigmas < 0.05).double().mean(), ((sigmas - 0.5).abs() < 0.025).double().mean()
    assert low < 0.05 < middle


def test_sigma_eps_is_the_least_level():
    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        return flow.sample_sigmas(256, density="uniform", generator=generator, **options)

    assert torch.equal(draw(shift=0.5, sigma_eps=0.1), draw(shift=0.5).clamp(min=0.1))
    assert (draw(shift=0.5) < 0.1).any()


# Learning and sampling


def test_masked_loss_is_the_mean_of_what_is_kept():
    x0, noise, prediction, mask, sigmas = training_golden(
        "x0", "noise", "model_out", "mask_partial", "sigmas"
    )
    mask, weight = mask.bool(), flow.loss_weight(sigmas, "cosmap")
    target = flow.velocity(x0, noise)
    error = (prediction.double() - (noise.double() - x0.double())).square()
    kept = mask.unsqueeze(1).expand_as(error)
    weighted = error * weight.double().view(3, 1, 1, 1, 1)
    assert_near(flow.loss(prediction, target, mask=mask), error[kept].mean())
    assert_near(flow.loss(prediction, target, mask=mask, weight=weight), weighted[kept].mean())
    assert torch.equal(
        flow.loss(prediction, target, mask=torch.ones_like(mask)), flow.loss(prediction, target)
    )


def test_padding_has_no_effect_even_if_nan():
    x0, noise, prediction, mask = training_golden("x0", "noise", "model_out", "mask_partial")
    mask, target = mask.bool(), flow.velocity(x0, noise)
    hole = ~mask.unsqueeze(1).expand_as(prediction)
    results = []
    for filler in (0.0, float("nan")):
        given = prediction.masked_fill(hole, filler).requires_grad_()
        value = flow.loss(given, target.masked_fill(hole, filler), mask=mask)
        results.append((value, *torch.autograd.grad(value, given)))
    (a, da), (b, db) = results
    assert torch.equal(a, b)
    assert torch.equal(da, db)
    assert not da[hole].any()
    assert da[~hole].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_in_fp32_out(dtype):
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 2, 4, 2, 3, 3, generator=generator).to(dtype)
    sigmas = torch.tensor([0.3, 0.9])
    for function in (
        lambda a, b: flow.add_noise(a, b, sigmas),
        flow.velocity,
        flow.loss,
        lambda a, b: flow.euler_step(a, b, 0.9, 0.7),
        lambda a, b: flow.guide(a, b, scale=7),
    ):
        result = function(a, b)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(a.float(), b.float()))


def test_guidance_keeps_the_contrast_of_each_sample():
    generator = torch.Generator().manual_seed(6)
    uncond, cond = torch.randn(2, 3, 4, 2, 6, 6, generator=generator)
    cond = cond * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1, 1)
    guided = flow.guide(uncond, cond, scale=8, rescale=1)
    assert_near(guided.flatten(1).std(1), cond.flatten(1).std(1))
    assert_near(flow.guide(uncond, cond, scale=1), cond)
    zero = torch.zeros(2, 4, 1, 2, 2)  # the velocity of a new model
    assert torch.equal(flow.guide(zero, zero, scale=7), zero)


def gaussian_after(steps, mean, std):
    """Mean and standard deviation of noise sampled to data, by a linear model that was fitted.

    Data mean +- std and noise +- 1, all four pairs, have the second moments of two Gaussians; and
    for Gaussians the best velocity is linear in the latent, so least squares on the four finds it.
    """
    x0 = torch.tensor([mean - std, mean - std, mean + std, mean + std])
    noise = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    sigmas = flow.inference_sigmas(steps, shift=2)
    x = torch.tensor([-1.0, 1.0])
    for s, s_next in pairwise(sigmas):
        x_t, v = flow.add_noise(x0, noise, s.expand(4)), flow.velocity(x0, noise)
        centred = x_t - x_t.mean()
        slope = (centred * v).sum() / centred.square().sum()
        x = flow.euler_step(x, v.mean() + slope * (x - x_t.mean()), s, s_next)
    return x.mean().item(), ((x[1] - x[0]) / 2).item()


def test_gaussian_toy_recovers_its_moments():
    """The mean comes out as it is; the error of the spread halves when steps double, to 1/steps."""
    counts = (16, 32, 64, 128)
    means, spreads = np.array([gaussian_after(n, 1.5, 0.4) for n in counts]).T
    assert np.abs(means - 1.5).max() <= 128 * EPS * 4  # a few roundings a step, of numbers below 4
    errors = np.abs(spreads - 0.4)
    halving = errors[1:] / errors[:-1]
    assert (np.abs(halving - 0.5) < 1 / np.array(counts[:-1])).all()


# What is refused


X, S = torch.zeros(2, 4, 1, 2, 2), torch.full((2,), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.shift_sigmas(S, 0), "shift must be a finite number above 0, got 0"),
        (lambda: flow.shift_sigmas(S, -1.0), "shift must be a finite number above 0"),
        (lambda: flow.shift_sigmas(S, math.inf), "shift must be a finite number above 0"),
        (lambda: flow.shift_sigmas(S, math.nan), "shift must be a finite number above 0"),
        (lambda: flow.shift_sigmas(S, 2, gamma=0), "gamma must be a finite number above 0"),
        (lambda: flow.dynamic_shift(0, 8), "latent_height and latent_width must be at least 1"),
        (lambda: flow.dynamic_shift(8, 0), "latent_height and latent_width must be at least 1"),
        (lambda: flow.inference_sigmas(0), "steps must be at least 1, got 0"),
        (lambda: flow.inference_sigmas(50, shift=0), "shift must be a finite number above 0"),
        (lambda: flow.inference_sigmas(50, schedule="karras"), "schedule must be one of linear,"),
        (lambda: flow.inference_sigmas(0, schedule="linear_quadratic"), "steps must be at least 1"),
        (lambda: flow.inference_sigmas(51, schedule="linear_quadratic"), "steps must be even"),
        (lambda: flow.inference_sigmas(1002, schedule="linear_quadratic"), "at most 1000"),
        (
            lambda: flow.inference_sigmas(50, shift=3, schedule="linear_quadratic"),
            "shift=3 has no effect",
        ),
        (lambda: flow.sample_sigmas(0), "batch must be at least 1"),
        (lambda: flow.sample_sigmas(2, density="normal"), "density must be one of logit_normal,"),
        (lambda: flow.sample_sigmas(2, shift=0), "shift must be a finite number above 0"),
        (lambda: flow.sample_sigmas(2, gamma=-1), "gamma must be a finite number above 0"),
        (lambda: flow.sample_sigmas(2, sigma_eps=1), r"sigma_eps must be in \[0, 1\)"),
        (lambda: flow.sample_sigmas(2, sigma_eps=-0.1), r"sigma_eps must be in \[0, 1\)"),
        (lambda: flow.loss_weight(S, "snr"), "scheme must be one of none, sigma_sqrt, cosmap"),
        (lambda: flow.add_noise(X, X[:1], S), "noise must have the shape"),
        (lambda: flow.add_noise(X, X, S[:1]), "sigmas must have the shape"),
        (lambda: flow.add_noise(X, X, S.view(2, 1, 1, 1, 1)), "sigmas must have the shape"),
        (lambda: flow.velocity(X, X[:1]), "noise must have the shape"),
        (lambda: flow.loss(X, X[:1]), "target must have the shape"),
        (lambda: flow.loss(X, X, weight=S[:1]), "weight must have the shape"),
        (lambda: flow.loss(X, X, mask=X[:, 0]), "mask must be bool"),
        (lambda: flow.loss(X, X, mask=X.bool()), r"mask must be bool of shape \(2, 1, 2, 2\)"),
        (lambda: flow.loss(X, X, mask=X[:, 0].bool()), "mask is False everywhere"),
        (lambda: flow.euler_step(X, X[:1], 1, 0), "velocity must have the shape"),
        (lambda: flow.euler_step(X, X, S, 0), "sigma must be a single number"),
        (lambda: flow.euler_step(X, X, 1, S), "sigma_next must be a single number"),
        (lambda: flow.guide(X, X[:1], scale=7), "uncond must have the shape"),
        (lambda: flow.guide(X, X, scale=7, rescale=1.1), r"rescale must be in \[0, 1\]"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
