"""What WF-VAE is trained for: each term of the published objective, and how they add up.

With ``x`` the video, ``y`` what the autoencoder made of it, ``W`` wavelet coefficients and ``D``
the discriminator::

    reconstruction   sum over a frame of |x - y| + weights.lpips * LPIPS(x, y), mean over frames
    + weights.kl *      sum over a clip of (mean**2 + var - 1 - log var) / 2, mean over clips
    + weights.wavelet * sum over a clip of |W(x) - W(y)| on levels 1 and 2, mean over clips
    + balance *         -mean D(y),  balance = weights.adversarial * |grad of reconstruction| /
                                               |grad of -mean D(y)|, at the decoder's last layer

A model without paths for the coefficients has none to compare: the wavelet term is left out.

LPIPS, one number a frame, is added to every one of its values. ``reduction="sum"`` is this.
``reduction="mean"`` is this divided by the values of a frame, 3 * H * W: the reconstruction is then
a mean over values, all weights keep their meaning, and gradients differ by that factor alone.

Source: Li et al. 2024, "WF-VAE", section 3.4, and its released code for sums and means.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skiparse.models import shards

REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True)
class Weights:
    """Of the terms; the published ones. ``lpips`` is 0.1 in the last stage."""

    lpips: float = 1.0
    kl: float = 1e-6
    wavelet: float = 0.1
    adversarial: float = 0.5


def l1(video: Tensor, made: Tensor) -> Tensor:
    """Absolute error ``[B, C, T, H, W]``, summed over each frame, mean over frames: a scalar."""
    return (video - made).abs().sum((1, 3, 4)).mean()


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """Divergence of the latents ``[B, C, t, h, w]`` from standard normal ones: a scalar.

    Summed over all of a clip, mean over clips.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def wavelet(coefficients: Sequence[Tensor], made: Sequence[Tensor]) -> Tensor:
    """Absolute error of the wavelet coefficients, summed over all levels, mean over clips."""
    return sum(
        ((a - b).abs().flatten(1).sum(1).mean() for a, b in zip(coefficients, made, strict=True)),
        start=coefficients[0].new_zeros(()),
    )


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's own loss, from its judgements of video and of reconstructions."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def balance(
    reconstruction: Tensor,
    adversarial: Tensor,
    last: Tensor,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """By what to multiply ``adversarial`` for both to pull equally at the weight ``last``.

    The ratio of the norms of their gradients, from 0 to 1e6, a constant for autograd. Where
    processes share the batch, ``average`` makes of the gradient of one that of all.

    Source: Esser et al. 2021, "Taming Transformers", equation 7, with the 1e-6 of its code.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    if average is not None:
        of_reconstruction, of_adversarial = average(of_reconstruction), average(of_adversarial)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-6)).clamp(0, 1e6)


def objective(
    video: Tensor,
    made: Tensor,
    *,
    mean: Tensor,
    logvar: Tensor,
    coefficients: Sequence[Tensor],
    made_coefficients: Sequence[Tensor],
    weights: Weights,
    reduction: str = "sum",
    perceptual: Tensor | None = None,
    judgement: Tensor | None = None,
    last: Tensor | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The autoencoder's loss and its terms, for one batch.

    Args:
        video, made: ``[B, 3, T, H, W]``.
        mean, logvar: of the latents, ``[B, C, t, h, w]``.
        coefficients, made_coefficients: of each level, ``[B, 24, ...]``; none leave the term out.
        weights: of the terms.
        reduction: "sum", or "mean", which divides everything by ``3 * H * W``.
        perceptual: :class:`LPIPS` of every frame, ``[B * T]``; None leaves the term out.
        judgement: the discriminator's of ``made``, any shape; None leaves the term out.
        last: weight of the decoder's last layer, which ``made`` was computed with.
        average: over the processes that share the batch, as of :func:`balance`.

    Returns:
        Scalars: "loss" to differentiate; "l1" and "kl" in the chosen reduction, before their
        weights; "wavelet" likewise, "lpips", "adversarial", and "balance", its full weight, where
        they exist.

    Raises:
        ValueError: for an unknown reduction, or a judgement without ``last``.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if judgement is not None and last is None:
        raise ValueError("a judgement needs last, the weight at which gradients are balanced")
    values = video[0, :, 0].numel()  # of a frame
    terms = {"l1": l1(video, made), "kl": kl(mean, logvar)}
    if coefficients:
        terms["wavelet"] = wavelet(coefficients, made_coefficients)
    if perceptual is not None:
        terms["lpips"] = perceptual.mean()
    reconstruction = terms["l1"]
    if perceptual is not None:
        reconstruction = reconstruction + weights.lpips * values * terms["lpips"]
    loss = reconstruction + weights.kl * terms["kl"]
    if coefficients:
        loss = loss + weights.wavelet * terms["wavelet"]
    if judgement is not None and last is not None:
        terms["adversarial"] = -judgement.mean()
        ratio = balance(reconstruction, terms["adversarial"], last, average)
        terms["balance"] = weights.adversarial * ratio
        loss = loss + terms["balance"] * terms["adversarial"]
    terms["loss"] = loss
    if reduction == "mean":
        for name in ("l1", "kl", "wavelet", "balance", "loss"):
            if name in terms:
                terms[name] = terms[name] / values
    return terms


_VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT, _SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of the colours VGG was fed


class LPIPS(nn.Module):
    """How different two pictures look: distance of their features in VGG-16, learned weights.

    Version 0.1 with VGG, as in the package ``lpips``, whose weights it takes; the package itself
    is not needed. It starts from random weights: :meth:`from_file` is the one to use.

    Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual
    Metric", section 3.
    """

    def __init__(self) -> None:
        super().__init__()
        channels = [3, *(width for widths in _VGG for width in widths)]
        layers = iter(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))
        self.stages = nn.ModuleList(nn.ModuleList(next(layers) for _ in widths) for widths in _VGG)
        self.heads = nn.ParameterList(torch.rand(widths[-1]) for widths in _VGG)
        self.eval().requires_grad_(False)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> LPIPS:
        """With weights from a file that this makes, where ``lpips`` and its weights are at hand::

            safetensors.torch.save_model(lpips.LPIPS(net="vgg"), "lpips-vgg.safetensors")

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, or holds other than these weights.
        """
        held = shards.read_file(Path(path))
        model = cls()
        weights, index = {}, 0  # index: of the layer in VGG, where ReLU and pooling count as well
        for i, stage in enumerate(model.stages):
            weights[f"heads.{i}"] = f"lin{i}.model.1.weight"
            for j, _ in enumerate(cast(nn.ModuleList, stage)):
                for kind in ("weight", "bias"):
                    weights[f"stages.{i}.{j}.{kind}"] = f"net.slice{i + 1}.{index}.{kind}"
                index += 2
            index += 1
        ours = model.state_dict()
        for name, theirs in weights.items():
            if theirs not in held or held[theirs].numel() != ours[name].numel():
                raise ValueError(
                    f"{os.fspath(path)} lacks {theirs} with {ours[name].numel()} numbers; write it "
                    "from lpips.LPIPS(net='vgg'), as the documentation of LPIPS.from_file shows"
                )
            ours[name] = held[theirs].reshape(ours[name].shape)
        model.load_state_dict(ours)
        return model

    def forward(self, video: Tensor, made: Tensor) -> Tensor:
        """Of two videos ``[B, 3, T, H, W]`` in [-1, 1], the distance of each frame: ``[B * T]``."""
        both = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (video, made)])
        shift, spread = (both.new_tensor(x)[:, None, None] for x in (_SHIFT, _SPREAD))
        x = (both - shift) / spread
        distance = both.new_zeros(len(both) // 2)
        for i, (stage, head) in enumerate(zip(self.stages, self.heads, strict=True)):
            if i:
                x = F.max_pool2d(x, 2)
            for conv in cast(nn.ModuleList, stage):
                x = F.relu(conv(x))
            norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
            a, b = (x / (norm + 1e-10)).chunk(2)
            distance = distance + ((a - b).square() * head[:, None, None]).sum(1).mean((1, 2))
        return distance
