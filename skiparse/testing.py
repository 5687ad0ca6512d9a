"""What is right, and how far from it a kernel may be: the oracle, the error budget, the inputs.

Shared by the tests and the benchmark. The oracle shares no code with any backend: one dense
softmax over all keys, under a mask built token by token from ``sub_of``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from skiparse.pattern import SkipPattern, sub_of

INPUT_NAMES = ("q", "k", "v", "text_q", "text_k", "text_v")


@dataclass(frozen=True)
class Problem:
    """Everything an attention call takes, and the gradients that come back from its outputs."""

    q: Tensor  # [B, N, H, D]
    k: Tensor
    v: Tensor
    text_q: Tensor  # [B, T, H, D]
    text_k: Tensor
    text_v: Tensor
    grad_out: Tensor  # [B, N, H, D]
    grad_text_out: Tensor  # [B, T, H, D]
    pattern: SkipPattern
    mask: Tensor | None = None  # [B, N] bool, True = attend
    text_mask: Tensor | None = None  # [B, T] bool
    scale: float | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with its floating tensors in ``dtype``."""
        names = (*INPUT_NAMES, "grad_out", "grad_text_out")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The six differentiable inputs."""
        return tuple(getattr(self, name) for name in INPUT_NAMES)


class Answer(NamedTuple):
    """Outputs and gradients. Text is averaged over sub-sequences."""

    out: Tensor  # [B, N, H, D]
    text_out: Tensor  # [B, T, H, D]
    lse: Tensor  # [B, H, N]
    text_lse: Tensor  # [B, H, n, T]
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_text_q: Tensor
    grad_text_k: Tensor
    grad_text_v: Tensor


def make_problem(
    pattern: SkipPattern,
    *,
    B: int = 1,
    N: int,
    T: int = 0,
    H: int = 2,
    D: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    masked: bool = False,
    scale: float | None = None,
    seed: int = 0,
) -> Problem:
    """Random normal inputs, the same for the same arguments on every machine.

    ``layout`` of q, k, v and the text: ``"contiguous"``; ``"packed"`` (slices of one
    ``[B, N, 3, H, D]``); ``"heads_first"`` (transposed from ``[B, H, N, D]``); ``"expanded"``
    (batch stride 0). ``masked`` hides about a third of all keys, but never a whole row's.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def triple(rows: int) -> tuple[Tensor, ...]:
        if layout == "packed":
            packed = normal(B, rows, 3, H, D).to(device, dtype)
            return packed.unbind(2)
        if layout == "heads_first":
            return tuple(normal(B, H, rows, D).to(device, dtype).transpose(1, 2) for _ in range(3))
        if layout == "expanded":
            one = (normal(1, rows, H, D).to(device, dtype) for _ in range(3))
            return tuple(x.expand(B, rows, H, D) for x in one)
        if layout != "contiguous":
            raise ValueError(f"layout must be contiguous, packed, heads_first or expanded: {layout}")
        return tuple(normal(B, rows, H, D).to(device, dtype) for _ in range(3))

    q, k, v = triple(N)
    text_q, text_k, text_v = triple(T)
    grads = (normal(B, rows, H, D).to(device, dtype) for rows in (N, T))
    mask = text_mask = None
    if masked:
        mask = torch.rand(B, N, generator=generator) < 0.67
        text_mask = torch.rand(B, T, generator=generator) < 0.67
        text_mask[:, :1] = True
        if T == 0:
            mask[:, : pattern.sparsity * pattern.run] = True
        mask, text_mask = mask.to(device), text_mask.to(device)
    return Problem(q, k, v, text_q, text_k, text_v, *grads, pattern, mask, text_mask, scale)


def oracle(
    problem: Problem, dtype: torch.dtype = torch.float64, *, shuffle: int | None = None
) -> Answer:
    """Outputs and gradients by dense softmax under a token-by-token mask, computed in ``dtype``.

    In fp64 it is the exact answer; in a narrower dtype it is what eager PyTorch would give, the
    yardstick of :func:`budget`. ``shuffle`` seeds an order in which to take all sums, over the
    keys and over the head dimension. Memory grows with ``(N + n*T) * (N + T)``.
    """
    problem = problem.to(dtype)
    (_, N, _, D), T, n = problem.q.shape, problem.text_q.shape[1], problem.pattern.sparsity
    generator = torch.Generator().manual_seed(shuffle or 0)
    keys, dims = torch.arange(N + T), torch.arange(D)
    if shuffle is not None:
        keys, dims = (x[torch.randperm(len(x), generator=generator)] for x in (keys, dims))
    inputs = [x.detach().clone().requires_grad_() for x in problem.inputs]
    shuffled = {name: x[..., dims] for name, x in zip(INPUT_NAMES, inputs, strict=True)}
    rows = torch.arange(N + n * T, device=problem.q.device)
    with torch.enable_grad():
        out, lse = oracle_rows(replace(problem, **shuffled), rows, keys)
        out = out[..., dims.argsort()]
        text_out = out[:, N:].unflatten(1, (n, T)).mean(1) if T else out[:, N:]
        loss = (out[:, :N] * problem.grad_out).sum() + (text_out * problem.grad_text_out).sum()
    grads = torch.autograd.grad(loss, inputs)
    lse = lse.detach()
    text_lse = lse[:, :, N:].unflatten(2, (n, T)) if T else lse.new_empty(*lse.shape[:2], n, 0)
    return Answer(out[:, :N].detach(), text_out.detach(), lse[:, :, :N], text_lse, *grads)


def oracle_rows(
    problem: Problem, rows: Tensor, key_order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Some query rows only: ``(out [B, R, H, D], lse [B, H, R])``, differentiable.

    Row ``i < N`` is video token ``i``; row ``N + s*T + t`` is text token ``t`` in sub-sequence
    ``s``. So the largest problems can be checked without forming all of their scores.
    """
    q, text_q = problem.q, problem.text_q
    (B, N, _, D), T = q.shape, text_q.shape[1]
    n, w = problem.pattern.sparsity, problem.pattern.run
    device = q.device
    owner = sub_of(torch.arange(N, device=device), n, w)
    query_sub = torch.cat([owner, torch.arange(n, device=device).repeat_interleave(T)])[rows]
    source = torch.cat(
        [torch.arange(N, device=device), N + torch.arange(T, device=device).repeat(n)]
    )[rows]
    attend = torch.cat(
        [query_sub[:, None] == owner[None, :], query_sub.new_ones(len(rows), T).bool()], 1
    ).expand(B, -1, -1)
    if problem.mask is not None:
        attend = attend & torch.cat([problem.mask, problem.mask.new_ones(B, T)], 1)[:, None]
    if problem.text_mask is not None:
        attend = attend & torch.cat(
            [problem.text_mask.new_ones(B, N), problem.text_mask], 1
        )[:, None]  # fmt: skip
    scale = D**-0.5 if problem.scale is None else problem.scale
    keys = slice(None) if key_order is None else key_order.to(device)

    attend = attend[:, :, keys]  # [B, R, N + T]
    query = torch.cat([q, text_q], 1)[:, source].transpose(1, 2)  # [B, H, R, D]
    key = torch.cat([problem.k, problem.text_k], 1)[:, keys].transpose(1, 2)  # [B, H, N + T, D]
    value = torch.cat([problem.v, problem.text_v], 1)[:, keys].transpose(1, 2)
    scores = (query @ key.mT * scale).masked_fill(~attend[:, None], -torch.inf)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    alive = attend.any(-1)[:, None, :, None]  # [B, 1, R, 1]
    weights = scores.masked_fill(~alive, 0).softmax(-1).masked_fill(~alive, 0)
    return (weights @ value).transpose(1, 2), lse


def run(problem: Problem, backend: str) -> Answer:
    """Outputs and gradients of the operator, by the named backend."""
    p = problem
    inputs = [x.detach().requires_grad_() for x in p.inputs]
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    out, text_parts, lse, text_lse = torch.ops.skiparse.attention(
        *inputs, p.mask, p.text_mask, p.pattern.sparsity, p.pattern.run, scale, backend
    )
    text_out = text_parts.mean(1)
    grads = torch.autograd.grad(
        (out, text_out), inputs, (p.grad_out, p.grad_text_out), materialize_grads=True
    )
    return Answer(out.detach(), text_out.detach(), lse, text_lse, *grads)


def check(actual: Answer, problem: Problem, names: Sequence[str] = Answer._fields) -> None:
    """Hold outputs and gradients of ``actual`` against :func:`budget`.

    Raises:
        AssertionError: naming the tensor, its error and the budget.
    """
    dtype = problem.q.dtype
    exact, eagers = oracle(problem), eager_answers(problem)
    for name in names:
        yardsticks = [getattr(eager, name) for eager in eagers]
        within_budget(name, getattr(actual, name), getattr(exact, name), yardsticks, dtype)


def check_sample(
    problem: Problem, backend: str, *, backward: bool, rows: int = 128, seed: int = 0
) -> None:
    """The same for a problem too large for :func:`oracle`: some query rows, and all that follows.

    The outputs are compared at a sample of the queries, text in every sub-sequence included. The
    gradients that come back into the call are zero at all others, so that those of all six inputs
    follow from the sample and are compared whole.
    """
    (_, N, _, _), T, n = problem.q.shape, problem.text_q.shape[1], problem.pattern.sparsity
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(N, generator=generator)[:rows].sort().values
    texts = torch.randperm(T, generator=generator)[: max(rows // (4 * n), 1)].sort().values
    copies = (N + torch.arange(n)[:, None] * T + texts).flatten()
    tokens, texts, copies = (x.to(problem.q.device) for x in (tokens, texts, copies))
    grads = {"grad_out": tokens, "grad_text_out": texts}
    problem = replace(
        problem,
        **{
            name: torch.zeros_like(getattr(problem, name)).index_copy(
                1, index, getattr(problem, name)[:, index]
            )
            for name, index in grads.items()
        },
    )

    def sample(dtype: torch.dtype, shuffle: int | None) -> dict[str, Tensor]:
        narrow = problem.to(dtype)
        inputs = [x.detach().requires_grad_(backward) for x in narrow.inputs]
        narrow = replace(narrow, **dict(zip(INPUT_NAMES, inputs, strict=True)))
        order = None
        if shuffle is not None:
            order = torch.randperm(N + T, generator=torch.Generator().manual_seed(shuffle))
        with torch.set_grad_enabled(backward):
            out, lse = oracle_rows(narrow, torch.cat([tokens, copies]), order)
            video = out[:, : len(tokens)]
            text = out[:, len(tokens) :].unflatten(1, (n, len(texts))).mean(1)
        result = {"out": video.detach(), "text_out": text.detach(), "lse": lse.detach()}
        if backward:
            seen = (narrow.grad_out[:, tokens], narrow.grad_text_out[:, texts])
            found = torch.autograd.grad((video, text), inputs, seen)
            result |= {f"grad_{x}": g for x, g in zip(INPUT_NAMES, found, strict=True)}
        return result

    dtype = problem.q.dtype
    exact = sample(torch.float64, None)
    narrow = torch.float32 if dtype == torch.float64 else dtype
    eagers = [sample(narrow, seed) for seed in range(2)]
    answer = run(problem, backend)._asdict()
    answer["out"] = answer["out"][:, tokens]
    answer["text_out"] = answer["text_out"][:, texts]
    text_lse = answer["text_lse"][:, :, :, texts].flatten(2)
    answer["lse"] = torch.cat([answer["lse"][:, :, tokens], text_lse], 2)
    for name, value in exact.items():
        within_budget(name, answer[name], value, [eager[name] for eager in eagers], dtype)


def eager_answers(problem: Problem) -> list[Answer]:
    """What eager PyTorch makes of the problem, taking the sums in four different orders.

    A sum may be taken in any order, so eager's error is not one number; in a small problem one
    order can be exact by luck. fp64 problems are computed in fp32, see :func:`budget`.
    """
    dtype = torch.float32 if problem.q.dtype == torch.float64 else problem.q.dtype
    return [oracle(problem, dtype, shuffle=seed) for seed in range(4)]


def budget(exact: Tensor, eagers: Sequence[Tensor], dtype: torch.dtype) -> float:
    """The error allowed in ``dtype``: twice what eager PyTorch makes, plus one rounding.

    ``2 * max|eager - exact| + eps * max|exact|``, over the finite values. There is nothing more
    exact to hold fp64 against: its eager error is that of fp32 scaled by the ratio of the two
    eps, to which rounding errors are proportional, and counts three times, as ``exact`` has it too.
    """
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    reference = exact[finite].double()
    error = max((eager[finite].double() - reference).abs().max().item() for eager in eagers)
    if dtype == torch.float64:
        error *= 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * error + torch.finfo(dtype).eps * reference.abs().max().item()


def within_budget(
    name: str, actual: Tensor, exact: Tensor, eagers: Sequence[Tensor], dtype: torch.dtype
) -> None:
    """Raise AssertionError unless ``actual`` has the shape, the NaN and inf, and the accuracy."""
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(actual), kind(exact)), f"{name}: {kind.__name__} in other places"
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (actual[finite].double() - exact[finite].double()).abs().max().item()
    allowed = budget(exact, eagers, dtype)
    assert error <= allowed, f"{name}: off by {error:.3e}, allowed {allowed:.3e}"
