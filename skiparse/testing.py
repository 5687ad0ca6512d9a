"""What is right, and how far from it a kernel may be: the oracle, the error budget, the inputs.

Shared by the tests and the benchmark. The oracle shares no code with any backend: one dense
softmax over all keys, under a mask built token by token from their owners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from skiparse.pattern import GridPattern, SkipPattern

INPUT_NAMES = ("q", "k", "v", "text_q", "text_k", "text_v")


@dataclass(frozen=True)
class Problem:
    """Everything an attention call takes, and the gradients that come back from its outputs."""

    q: Tensor  # [B, N, H, D]
    k: Tensor
    v: Tensor
    text_q: Tensor  # [B, Q, H, D], as many as the keys, or none
    text_k: Tensor  # [B, T, H, D]
    text_v: Tensor
    grad_out: Tensor  # [B, N, H, D]
    grad_text_out: Tensor  # [B, Q, H, D]
    pattern: SkipPattern | GridPattern
    mask: Tensor | None = None  # [B, N] bool, True = attend
    text_mask: Tensor | None = None  # [B, T] bool
    scale: float | None = None
    grad_lse: Tensor | None = None  # [B, H, N], fp32 or fp64
    grad_text_lse: Tensor | None = None  # [B, H, n, Q]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem with its floating tensors in ``dtype``."""
        names = (*INPUT_NAMES, "grad_out", "grad_text_out")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in names})

    def with_inputs(self, inputs: Sequence[Tensor]) -> Problem:
        """The same problem with other tensors for its six inputs."""
        named: dict[str, Any] = dict(zip(INPUT_NAMES, inputs, strict=True))
        return replace(self, **named)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The six differentiable inputs."""
        return tuple(getattr(self, name) for name in INPUT_NAMES)


class Answer(NamedTuple):
    """Outputs and gradients. Text is averaged over sub-sequences."""

    out: Tensor  # [B, N, H, D]
    text_out: Tensor  # [B, Q, H, D]
    lse: Tensor  # [B, H, N]
    text_lse: Tensor  # [B, H, n, Q]
    grad_q: Tensor
    grad_k: Tensor
    grad_v: Tensor
    grad_text_q: Tensor
    grad_text_k: Tensor
    grad_text_v: Tensor


def make_problem(
    pattern: SkipPattern | GridPattern,
    *,
    B: int = 1,
    N: int,
    T: int = 0,
    text_queries: bool = True,
    H: int = 2,
    D: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: str = "contiguous",
    masked: bool = False,
    lse_grads: bool = False,
    scale: float | None = None,
    seed: int = 0,
) -> Problem:
    """Random normal inputs, the same for the same arguments on every machine.

    ``layout`` of q, k, v and the text: ``"contiguous"``; ``"packed"`` (slices of one
    ``[B, N, 3, H, D]``); ``"heads_first"`` (transposed from ``[B, H, N, D]``); ``"expanded"``
    (batch stride 0). ``masked`` hides about a third of all keys, but never a whole row's.
    ``lse_grads``: gradients come into the log-sum-exps too. Without ``text_queries`` the text has
    keys and values alone.
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
            raise ValueError(
                f"layout must be contiguous, packed, heads_first or expanded: {layout}"
            )
        return tuple(normal(B, rows, H, D).to(device, dtype) for _ in range(3))

    q, k, v = triple(N)
    text_q, text_k, text_v = triple(T)
    Q = T if text_queries else 0
    text_q = text_q[:, :Q]
    grad_out, grad_text_out = (normal(B, rows, H, D).to(device, dtype) for rows in (N, T))
    grad_text_out = grad_text_out[:, :Q]
    mask = text_mask = None
    if masked:
        mask = torch.rand(B, N, generator=generator) < 0.67
        text_mask = torch.rand(B, T, generator=generator) < 0.67
        text_mask[:, :1] = True
        if T == 0:
            mask[:, _firsts(pattern, N)] = True
        mask, text_mask = mask.to(device), text_mask.to(device)
    grad_lse = grad_text_lse = None
    if lse_grads:
        wide = torch.promote_types(dtype, torch.float32)
        shapes = (B, H, N), (B, H, pattern.sparsity, Q)
        grad_lse, grad_text_lse = (normal(*shape).to(device, wide) for shape in shapes)
    return Problem(
        q, k, v, text_q, text_k, text_v, grad_out, grad_text_out, pattern, mask, text_mask, scale,
        grad_lse, grad_text_lse,
    )  # fmt: skip


def _firsts(pattern: SkipPattern | GridPattern, N: int) -> slice | list[int]:
    """Some tokens of every sub-sequence that has any."""
    if isinstance(pattern, SkipPattern):
        return slice(pattern.sparsity * pattern.run)
    return [pattern.token(s, 0) for s, length in enumerate(pattern.lengths(N)) if length]


def oracle(problem: Problem, dtype: torch.dtype = torch.float64, way: Way | None = None) -> Answer:
    """Outputs and gradients by dense softmax under a token-by-token mask, computed in ``dtype``.

    In fp64 it is the exact answer; in a narrower dtype it is what eager PyTorch would give, the
    yardstick of :func:`budget`. Memory grows with ``(N + n*T) * (N + T)``.
    """
    problem = problem.to(dtype)
    N, Q, n = problem.q.shape[1], problem.text_q.shape[1], problem.pattern.sparsity
    inputs = [x.detach().clone().requires_grad_() for x in problem.inputs]
    leaves = problem.with_inputs(inputs)
    rows = torch.arange(N + n * Q, device=problem.q.device)
    with torch.enable_grad():
        out, lse = oracle_rows(leaves, rows, way)
        text_out = out[:, N:].unflatten(1, (n, Q)).mean(1) if Q else out[:, N:]
        loss = (out[:, :N] * problem.grad_out).sum() + (text_out * problem.grad_text_out).sum()
        if problem.grad_lse is not None and problem.grad_text_lse is not None:
            weights = torch.cat([problem.grad_lse, problem.grad_text_lse.flatten(2)], 2)
            loss = loss + (lse * weights).sum()
    grads = torch.autograd.grad(loss, inputs)
    lse = lse.detach()
    text_lse = lse[:, :, N:].unflatten(2, (n, Q)) if Q else lse.new_empty(*lse.shape[:2], n, 0)
    return Answer(out[:, :N].detach(), text_out.detach(), lse[:, :, :N], text_lse, *grads)


@dataclass(frozen=True)
class Way:
    """One of the ways in which eager PyTorch may compute attention, all equal but for rounding.

    ``how`` is ``"softmax"``, differentiated by autograd; ``"lse"``: ``exp(scores - lse)``, with
    the gradient from the output, as fused kernels are written; or ``"kernel"``: torch's own SDPA.
    ``shuffle`` seeds the order in which sums over the keys and the head dimension are taken; None
    leaves them as they lie.
    """

    how: str
    shuffle: int | None


WAYS = (
    *(Way(how, shuffle) for shuffle in range(2) for how in ("softmax", "lse", "kernel")),
    *(Way("kernel", shuffle) for shuffle in (*range(2, 6), None)),  # whose rounding varies most
)


def oracle_rows(problem: Problem, rows: Tensor, way: Way | None = None) -> tuple[Tensor, Tensor]:
    """Some query rows only: ``(out [B, R, H, D], lse [B, H, R])``, differentiable.

    Row ``i < N`` is video token ``i``; row ``N + s*Q + t`` is text token ``t`` in sub-sequence
    ``s``. So the largest problems can be checked without forming all of their scores.
    """
    q, text_q = problem.q, problem.text_q
    (B, N, _, D), Q, T = q.shape, text_q.shape[1], problem.text_k.shape[1]
    n, device = problem.pattern.sparsity, q.device
    owner = problem.pattern.owner(torch.arange(N, device=device))
    query_sub = torch.cat([owner, torch.arange(n, device=device).repeat_interleave(Q)])[rows]
    source = torch.cat(
        [torch.arange(N, device=device), N + torch.arange(Q, device=device).repeat(n)]
    )[rows]
    attend = torch.cat(
        [query_sub[:, None] == owner[None, :], query_sub.new_ones(len(rows), T).bool()], 1
    ).expand(B, -1, -1)  # [B, R, N + T]
    if problem.mask is not None:
        attend = attend & torch.cat([problem.mask, problem.mask.new_ones(B, T)], 1)[:, None]
    if problem.text_mask is not None:
        visible = torch.cat([problem.text_mask.new_ones(B, N), problem.text_mask], 1)
        attend = attend & visible[:, None]
    scale = D**-0.5 if problem.scale is None else problem.scale

    keys, dims = torch.arange(N + T), torch.arange(D)
    if way is not None and way.shuffle is not None:
        generator = torch.Generator().manual_seed(way.shuffle)
        keys, dims = (x[torch.randperm(len(x), generator=generator)] for x in (keys, dims))
    keys, dims = keys.to(device), dims.to(device)
    query = torch.cat([q, text_q], 1)[:, source].transpose(1, 2)[..., dims]  # [B, H, R, D]
    key = torch.cat([problem.k, problem.text_k], 1)[:, keys].transpose(1, 2)[..., dims]
    value = torch.cat([problem.v, problem.text_v], 1)[:, keys].transpose(1, 2)[..., dims]
    attend = attend[:, None, :, keys]  # [B, 1, R, N + T]
    how = "softmax" if way is None else way.how
    if how == "lse":
        out, lse = _FromLse.apply(query, key, value, attend, scale)
    else:
        scores = (query @ key.mT * scale).masked_fill(~attend, -math.inf)
        lse = _lse(scores)
        alive = attend.any(-1, keepdim=True)
        if how == "softmax":
            out = scores.masked_fill(~alive, 0).softmax(-1) @ value
        else:
            # On a GPU plain operations: a library there may be what the yardstick is held against.
            with sdpa_kernel(SDPBackend.MATH) if query.is_cuda else nullcontext():
                out = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=attend | ~alive, scale=scale
                )
        out = out.masked_fill(~alive, 0)
    return out.transpose(1, 2)[..., dims.argsort()], lse


def _lse(scores: Tensor) -> Tensor:
    """``logsumexp`` over keys, -inf where there are none."""
    return (
        scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    )


class _FromLse(torch.autograd.Function):
    """Attention written as fused kernels write it, every step an eager operation."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        scores = (q @ k.mT * scale).masked_fill(~attend, -math.inf)
        lse = _lse(scores)
        p = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
        out = p @ v
        ctx.save_for_backward(q, k, v, p, out)
        ctx.scale = scale
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, out = ctx.saved_tensors
        delta = (grad * out).sum(-1, keepdim=True) - grad_lse.unsqueeze(-1)
        ds = p * (grad @ v.mT - delta) * ctx.scale
        return ds @ k, ds.mT @ q, p.mT @ grad, None, None


def settings(problem: Problem, backend: str) -> tuple[Any, ...]:
    """What the operator takes behind its six tensors."""
    p = problem
    scale = p.q.shape[-1] ** -0.5 if p.scale is None else p.scale
    sparsity, run, *grid = p.pattern.numbers
    return p.mask, p.text_mask, sparsity, run, scale, backend, grid


def run(problem: Problem, backend: str) -> Answer:
    """Outputs and gradients of the operator, by the named backend."""
    p = problem
    inputs = [x.detach().requires_grad_() for x in p.inputs]
    out, text_parts, lse, text_lse = torch.ops.skiparse.attention(*inputs, *settings(p, backend))
    text_out = text_parts.mean(1)
    found, given = [out, text_out], [p.grad_out, p.grad_text_out]
    if p.grad_lse is not None and p.grad_text_lse is not None:
        found, given = [*found, lse, text_lse], [*given, p.grad_lse, p.grad_text_lse]
    grads = torch.autograd.grad(found, inputs, given, materialize_grads=True)
    return Answer(*(x.detach() for x in (out, text_out, lse, text_lse)), *grads)


def run_forward(problem: Problem, backend: str) -> dict[str, Tensor]:
    """Outputs of the operator by name, as :func:`run` gives them, without a backward."""
    given = (*problem.inputs, *settings(problem, backend))
    with torch.no_grad():
        out, text_parts, lse, text_lse = torch.ops.skiparse.attention(*given)
    return {"out": out, "text_out": text_parts.mean(1), "lse": lse, "text_lse": text_lse}


def check(actual: Answer, problem: Problem, ways: Sequence[Way] = WAYS) -> None:
    """Hold every output and gradient of ``actual`` against :func:`budget` of eager's ``ways``.

    Raises:
        AssertionError: naming the tensor, its error and the budget.
    """
    dtype = problem.q.dtype
    exact = oracle(problem)._asdict()
    eagers = (oracle(problem, yardstick(dtype), way)._asdict() for way in ways)
    within_budget(actual._asdict(), exact, eagers, dtype)


def check_sample(
    problem: Problem,
    backend: str | Callable[[Problem], Mapping[str, Tensor]],
    *,
    backward: bool,
    rows: int = 128,
    seed: int = 0,
) -> None:
    """The same for a problem too large for :func:`oracle`: some query rows, and all that follows.

    The outputs are compared at a sample of the queries, text in every sub-sequence included. The
    gradients that come back into the call are zero at all others, so that those of all six inputs
    follow from the sample and are compared whole. Forward alone runs no backward. ``backend`` may
    be a function instead, which gives some of what an :class:`Answer` has, by name.
    """
    N, Q, n = problem.q.shape[1], problem.text_q.shape[1], problem.pattern.sparsity
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randperm(N, generator=generator)[:rows].sort().values
    texts = torch.randperm(Q, generator=generator)[: max(rows // (4 * n), 1)].sort().values
    copies = (N + torch.arange(n)[:, None] * Q + texts).flatten()
    tokens, texts, copies = (x.to(problem.q.device) for x in (tokens, texts, copies))

    def only(grad: Tensor, index: Tensor) -> Tensor:
        return torch.zeros_like(grad).index_copy(1, index, grad[:, index])

    problem = replace(
        problem,
        grad_out=only(problem.grad_out, tokens),
        grad_text_out=only(problem.grad_text_out, texts),
    )

    def sample(dtype: torch.dtype, way: Way | None) -> dict[str, Tensor]:
        typed = problem.to(dtype)
        inputs = [x.detach().requires_grad_(backward) for x in typed.inputs]
        leaves = typed.with_inputs(inputs)
        with torch.set_grad_enabled(backward):
            out, lse = oracle_rows(leaves, torch.cat([tokens, copies]), way)
            video, text = out.split([len(tokens), len(copies)], 1)
            text = text.unflatten(1, (n, len(texts))).mean(1) if Q else text
        found = {"out": video.detach(), "text_out": text.detach(), "lse": lse.detach()}
        if backward:
            seen = (typed.grad_out[:, tokens], typed.grad_text_out[:, texts])
            grads = torch.autograd.grad((video, text), inputs, seen)
            found |= {f"grad_{name}": g for name, g in zip(INPUT_NAMES, grads, strict=True)}
        return found

    dtype = problem.q.dtype
    if callable(backend):
        answer = dict(backend(problem))
    else:
        answer = run(problem, backend)._asdict() if backward else run_forward(problem, backend)
    answer["out"] = answer["out"][:, tokens]
    answer["text_out"] = answer["text_out"][:, texts]
    if "lse" in answer:
        text_lse = answer["text_lse"][:, :, :, texts].flatten(2)
        answer["lse"] = torch.cat([answer["lse"][:, :, tokens], text_lse], 2)
    exact = {name: x for name, x in sample(torch.float64, None).items() if name in answer}
    eagers = (sample(yardstick(dtype), way) for way in WAYS[:3])
    within_budget(answer, exact, eagers, dtype)


# Tensors that come out of the same arithmetic share a relative error.
GROUPS = (
    ("out", "text_out"),
    ("lse", "text_lse"),
    tuple(f"grad_{name}" for name in INPUT_NAMES),
)


def yardstick(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which eager PyTorch is run to know its error: the same, but fp32 for fp64."""
    return torch.float32 if dtype == torch.float64 else dtype


def budget(
    exact: Mapping[str, Tensor], eagers: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> float:
    """The error allowed relative to ``max|exact|``: twice what eager PyTorch makes, plus one eps.

    ``2 * max|eager - exact| / max|exact| + eps(dtype)``, over the finite values, the worst of the
    tensors given and of the ways in which eager may compute them: rounding errors are few in a
    small problem, and the largest of a few is a matter of luck. There is nothing more exact to
    hold fp64 against: its eager error is that of fp32 scaled by the ratio of the two eps, to
    which rounding is proportional, and counts once more, because ``exact`` has it too.
    """
    scales = {name: _largest(x[x.isfinite()]) for name, x in exact.items()}
    worst = 0.0
    for name, right in exact.items():
        finite = right.isfinite()
        scale = scales[name] or max(scales.values())  # what is exactly 0 is rounded as the others
        if scale > 0:
            errors = (_largest(x[name][finite].double() - right[finite]) for x in eagers)
            worst = max(worst, max(errors, default=0.0) / scale)
    if dtype == torch.float64:
        worst *= 1.5 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return 2 * worst + torch.finfo(dtype).eps


def within_budget(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    eagers: Iterable[Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Raise AssertionError unless every tensor has the shape, the NaN and inf, and the accuracy.

    A tensor that is exactly zero is held to the scale of the others in its group. The budget is
    that of all ``eagers``; since each can only raise it, they are computed one after another and
    only until it suffices.
    """
    for name, x in exact.items():
        y = actual[name]
        assert y.shape == x.shape, f"{name}: shape {y.shape}, expected {x.shape}"
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(y), kind(x)), f"{name}: {kind.__name__} in other places"
    drawn: list[Mapping[str, Tensor]] = []
    more = iter(eagers)
    for group in GROUPS:
        right = {name: exact[name] for name in group if name in exact}
        scales = {name: _largest(x[x.isfinite()]) for name, x in right.items()}
        errors = {
            name: _largest(actual[name][x.isfinite()].double() - x[x.isfinite()])
            for name, x in right.items()
        }
        while True:
            allowed = budget(right, drawn, dtype)
            limits = {n: allowed * (scales[n] or max(scales.values())) for n in right}
            over = next((n for n in right if errors[n] > limits[n]), None)
            if over is None:
                break
            eager = next(more, None)
            assert eager is not None, (
                f"{over}: off by {errors[over]:.3e}, allowed {limits[over]:.3e}"
            )
            drawn.append(eager)


def _largest(x: Tensor) -> float:
    """``max|x|``, 0 of nothing."""
    return x.abs().max().item() if x.numel() else 0.0
