"""How SUV learns and samples: straight paths from data to noise, and the velocity along them.

A latent at noise level ``sigma`` is ``sigma * noise + (1 - sigma) * x0``: data at 0, noise at 1.
The model learns the velocity ``noise - x0``; sampling follows it from 1 down to 0. One formula
decides where levels are dense, in training and in sampling: ``shift_sigmas``.

Latents, noise and velocities are ``[B, ...]``, batch first, and noise levels ``[B]``, one for each
of them. What is computed from them is fp32, whatever their dtype.

Source: Open-Sora Plan v1.5 report; Esser et al., "Scaling Rectified Flow Transformers", 2024,
section 3.1 for the densities and weights.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Density = Literal["logit_normal", "uniform", "mode"]
Schedule = Literal["linear", "linear_quadratic"]
Weighting = Literal["none", "sigma_sqrt", "cosmap"]

SHIFT = 7.0  # of the released model when it samples
_MODE_SCALE = 1.29


def shift_sigmas(sigmas: Tensor, shift: float, *, gamma: float = 1.0) -> Tensor:
    """Noise levels moved towards 1 where ``shift > 1``, towards 0 where ``shift < 1``.

    In log-odds it is a line: ``logit(result) = log(shift) + gamma * logit(sigmas)``. So shifting a
    logit-normal density sets its mean to ``log(shift)`` and its standard deviation to ``gamma``.

    Args:
        sigmas: any shape, floating point, within [0, 1]; 0 and 1 stay what they are.
        shift: above 0; 1 changes nothing.
        gamma: above 0; 1 is the usual shift, ``shift * s / (1 + (shift - 1) * s)``.

    Returns:
        shape and dtype of ``sigmas``.

    Raises:
        ValueError: if shift or gamma is not a finite number above 0.
    """
    _check_above_0("shift", shift)
    _check_above_0("gamma", gamma)
    towards_noise, towards_data = shift * sigmas**gamma, (1 - sigmas) ** gamma
    return towards_noise / (towards_noise + towards_data)


def dynamic_shift(latent_height: int, latent_width: int) -> float:
    """The shift of training, ``exp(mu)``: larger frames need more noise to hide the same detail.

    ``mu`` is linear in the tokens of one frame, ``latent_height * latent_width // 4``, whatever
    the number of frames: 0.5 at 256 tokens, 1.15 at 4096, and on beyond either.

    Raises:
        ValueError: if either side is less than 1.

    Source: Open-Sora Plan v1.5 release.
    """
    if latent_height < 1 or latent_width < 1:
        raise ValueError(
            "latent_height and latent_width must be at least 1, "
            f"got {latent_height} and {latent_width}; they are pixels / 8"
        )
    tokens = latent_height * latent_width // 4
    return math.exp(0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256))


def inference_sigmas(steps: int, *, shift: float = SHIFT, schedule: Schedule = "linear") -> Tensor:
    """The noise levels that ``steps`` Euler steps pass through, from 1 down to exactly 0.

    "linear": evenly spaced, then shifted. "linear_quadratic": the first half of the steps descend
    as slowly as a sampler of ``10 * steps`` steps (250 at least, 1000 at most) would, the others
    faster and faster; it takes no shift. ``.flip(0)`` leads from data to noise instead.

    Args:
        steps: at least 1; for "linear_quadratic" even and at most 1000.
        shift: above 0, see :func:`shift_sigmas`. Left at its default with "linear_quadratic".

    Returns:
        fp32 ``[steps + 1]`` on the CPU, computed in fp64.

    Raises:
        ValueError: for an unknown schedule, or steps or a shift that it cannot take.
    """
    _check_name("schedule", schedule, Schedule)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if schedule == "linear":
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return shift_sigmas(even, shift).float()
    if shift != SHIFT:
        raise ValueError(
            f'shift={shift} has no effect on schedule="linear_quadratic"; leave it out, or use '
            'schedule="linear"'
        )
    if steps % 2 or steps > 1000:
        raise ValueError(
            f'steps must be even and at most 1000 with schedule="linear_quadratic", got {steps}'
        )
    half, fine = steps // 2, min(max(10 * steps, 250), 1000)
    i = torch.arange(steps + 1)
    bend = (i - half).clamp(min=0)
    # 1 - i / fine - c * bend^2, with the c that ends at 0: in integers, so that it ends there
    level = (fine - i) * half**2 - (fine - steps) * bend**2
    return (level.double() / (fine * half**2)).float()


def timesteps(sigmas: Tensor) -> Tensor:
    """What the model is told a noise level is: ``1000 * sigmas``, fp32, not rounded."""
    return 1000 * sigmas.float()


def sample_sigmas(
    batch: int,
    *,
    density: Density = "logit_normal",
    shift: float = 1.0,
    gamma: float = 1.0,
    sigma_eps: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noise levels to train at, drawn from a density, then shifted, then kept off 0.

    Args:
        batch: how many, at least 1.
        density: "logit_normal", the sigmoid of a standard normal, which the released model
            used; "uniform" on [0, 1); or "mode" (scale 1.29), densest at 1/2 as the first is, but
            not 0 at the ends.
        shift, gamma: see :func:`shift_sigmas`. The released model used
            ``shift=dynamic_shift(latent_height, latent_width)``.
        sigma_eps: the least level returned, in [0, 1).
        generator: torch's global CPU generator if None.

    Returns:
        fp32 ``[batch]`` on the generator's device.

    Raises:
        ValueError: for an unknown density, or a number out of range.
    """
    _check_name("density", density, Density)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if not 0 <= sigma_eps < 1:
        raise ValueError(f"sigma_eps must be in [0, 1), got {sigma_eps}")
    _check_above_0("shift", shift)
    _check_above_0("gamma", gamma)
    device = torch.device("cpu") if generator is None else generator.device
    draw = torch.randn if density == "logit_normal" else torch.rand
    u = draw(batch, generator=generator, device=device, dtype=torch.float32)
    if density == "logit_normal":
        u = torch.sigmoid(u)
    elif density == "mode":
        u = 1 - u - _MODE_SCALE * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    return shift_sigmas(u, shift, gamma=gamma).clamp(min=sigma_eps)


def loss_weight(sigmas: Tensor, scheme: Weighting = "none") -> Tensor:
    """How much a sample at each noise level counts in the loss; fp32, shape of ``sigmas``.

    "none" is 1, as the released model used; "sigma_sqrt" ``sigma^-2``, infinite at 0, so draw its
    levels with a ``sigma_eps``; "cosmap" ``2 / (pi * (1 - 2 * sigma + 2 * sigma^2))``.

    Raises:
        ValueError: for an unknown scheme.
    """
    _check_name("scheme", scheme, Weighting)
    s = sigmas.float()
    if scheme == "none":
        return torch.ones_like(s)
    if scheme == "sigma_sqrt":
        return s**-2
    return 2 / (math.pi * (1 - 2 * s + 2 * s**2))


def add_noise(x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The latents on the way to noise: ``sigma * noise + (1 - sigma) * x0``, fp32.

    Args:
        x0: ``[B, ...]`` clean, normalised latents.
        noise: standard normal, shape of ``x0``.
        sigmas: ``[B]``, on any device.

    Raises:
        ValueError: if shapes do not match.
    """
    _check_shape("noise", noise, x0)
    sigma = _per_sample("sigmas", sigmas, x0)
    return sigma * noise.float() + (1 - sigma) * x0.float()


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model learns to predict: ``noise - x0``, fp32, the same at every noise level.

    Raises:
        ValueError: if the shapes differ.
    """
    _check_shape("noise", noise, x0)
    return noise.float() - x0.float()


def loss(
    prediction: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the velocity over all elements, or over those that are not padding.

    Args:
        prediction: ``[B, C, t, h, w]``, the model's output.
        target: the same shape, from :func:`velocity`.
        mask: bool ``[B, t, h, w]``, True where a latent is real. What lies elsewhere has no effect
            on the loss or its gradient, not even if it is NaN.
        weight: ``[B]``, from :func:`loss_weight`; its mean need not be 1.

    Returns:
        fp32 scalar.

    Raises:
        ValueError: if a shape or dtype does not match, or the mask is False everywhere. To know
            that, the mask is read back from its device.
    """
    _check_shape("target", target, prediction)
    if mask is not None:
        expected = (prediction.shape[0], *prediction.shape[2:])
        if mask.dtype != torch.bool or mask.shape != expected:
            raise ValueError(
                f"mask must be bool of shape {expected}, got {mask.dtype} of {tuple(mask.shape)}"
            )
        if not mask.any():
            raise ValueError(
                "mask is False everywhere, so there is nothing to learn; skip the batch"
            )
    difference = prediction.float() - target.float()
    kept: int | Tensor = difference.numel()
    if mask is not None:
        difference = difference.masked_fill(~mask.unsqueeze(1), 0)
        kept = mask.sum() * prediction.shape[1]
    error = difference.square()
    if weight is not None:
        error = error * _per_sample("weight", weight, prediction)
    return error.sum() / kept


def euler_step(
    latents: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor
) -> Tensor:
    """Latents at the next noise level; fp32, and to be kept so from step to step.

    Args:
        latents: ``[B, ...]`` at ``sigma``.
        velocity: the model's, same shape.
        sigma, sigma_next: neighbours in :func:`inference_sigmas`; numbers or 0-d tensors.

    Raises:
        ValueError: if the shapes differ, or a noise level is not a single number.
    """
    _check_shape("velocity", velocity, latents)
    for name, level in (("sigma", sigma), ("sigma_next", sigma_next)):
        if isinstance(level, Tensor) and level.ndim:
            raise ValueError(f"{name} must be a single number, got shape {tuple(level.shape)}")
    return latents.float() + (sigma_next - sigma) * velocity.float()


def guide(uncond: Tensor, cond: Tensor, *, scale: float, rescale: float = 0.7) -> Tensor:
    """Classifier-free guidance, with the contrast it adds taken back in part; fp32.

    ``guided = uncond + scale * (cond - uncond)``, then the share ``rescale`` of it is brought to
    the standard deviation of ``cond``, sample by sample. A constant ``guided`` has none to bring
    anywhere and stays as it is.

    Args:
        uncond: ``[B, ...]`` velocity for the negative prompt.
        cond: velocity for the prompt, same shape.
        scale: 1 follows the prompt alone; released configurations use 7 or 8.
        rescale: in [0, 1]; 0 leaves ``guided``. Raise it against over-saturated colours.

    Raises:
        ValueError: if the shapes differ, or rescale is out of range.

    Source: Ho and Salimans, 2022; Lin et al., "Common Diffusion Noise Schedules and Sample Steps
    are Flawed", 2024, section 3.4.
    """
    _check_shape("uncond", uncond, cond)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale must be in [0, 1], got {rescale}")
    guided = uncond.float() + scale * (cond.float() - uncond.float())
    dims = tuple(range(1, guided.ndim))
    spread = guided.std(dims, keepdim=True)
    ratio = torch.where(spread > 0, cond.float().std(dims, keepdim=True) / spread, 1)
    return guided * (rescale * ratio + (1 - rescale))


def _check_name(argument: str, value: str, known: object) -> None:
    if value not in get_args(known):
        raise ValueError(f"{argument} must be one of {', '.join(get_args(known))}, got {value!r}")


def _check_above_0(argument: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{argument} must be a finite number above 0, got {value}")


def _check_shape(argument: str, x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape:
        raise ValueError(
            f"{argument} must have the shape {tuple(like.shape)}, got {tuple(x.shape)}"
        )


def _per_sample(argument: str, values: Tensor, like: Tensor) -> Tensor:
    """``values`` ``[B]`` as fp32 ``[B, 1, 1, ...]``, ready to multiply ``like``."""
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"{argument} must have the shape ({like.shape[0]},), one for each sample, "
            f"got {tuple(values.shape)}"
        )
    return values.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))
