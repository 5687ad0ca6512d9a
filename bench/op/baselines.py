"""What Skiparse attention is held against: dense, the original way, FlexAttention, NATTEN.

Each contender is built once for a case, does there what need not be repeated in a training step
(concatenated dense inputs, masks, compilation), and is then a function without arguments that
runs the timed work. ``None`` instead of one means that it cannot run here, and why.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from skiparse import joint_attention
from skiparse.bench.op.cases import Case
from skiparse.bench.timing import Work
from skiparse.testing import Problem


@dataclass(frozen=True)
class Contender:
    """Something to time: ``work`` is None where it cannot run, ``why_not`` then says why."""

    name: str
    work: Work | None
    why_not: str = ""


def skiparse_backend(case: Case, problem: Problem, backend: str) -> Contender:
    """The library itself, through its public call, by one backend."""
    p, name = problem, f"skiparse.{backend}"

    def attend(q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> tuple[Tensor, ...]:
        text_q, text_k, text_v = text
        return joint_attention(q, k, v, text_q, text_k, text_v, p.pattern, backend=backend)

    return Contender(name, step(case, attend, p.inputs, (p.grad_out, p.grad_text_out)))


def dense(case: Case, problem: Problem) -> list[Contender]:
    """Dense attention over video and text by each of torch's kernels, inputs concatenated before.

    Only the fastest is kept by the runner.
    """
    q, k, v, grad = (
        torch.cat(pair, 1).transpose(1, 2)
        for pair in (
            (problem.q, problem.text_q),
            (problem.k, problem.text_k),
            (problem.v, problem.text_v),
            (problem.grad_out, problem.grad_text_out),
        )
    )
    kernels = (
        {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}
        if q.device.type == "cuda"
        else {"flash": SDPBackend.FLASH_ATTENTION}
    )  # fmt: skip

    def contender(name: str, kernel: SDPBackend) -> Contender:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel([kernel]):
                return (F.scaled_dot_product_attention(q, k, v),)

        return Contender(f"dense.{name}", step(case, attend, (q, k, v), (grad,)))

    return [contender(name, kernel) for name, kernel in kernels.items()]


def original(case: Case, problem: Problem) -> Contender:
    """The way of the released code: pad, rearranged copies, text repeated, dense boolean masks.

    Source: reference semantics of Open-Sora Plan v1.5 (restated, not copied). It has no skip
    order, so it runs on tokens in natural order.
    """
    if case.grid is not None:
        return Contender("original", None, "it knows no grids")
    if case.skip_order:
        return Contender("original", None, "it knows no skip order")
    if case.kind == "dense":
        return Contender("original", None, "without skipping it is dense attention")
    n, N, T = case.k, case.N, case.T
    padded = -(-N // n**2) * n**2
    fold = {
        "single": "b (l k) h d -> (k b) h l d",
        "group": "b (l k j) h d -> (k b) h (l j) d",
    }[case.kind]
    unfold = {
        "single": "(k b) h l d -> b (l k) h d",
        "group": "(k b) h (l j) d -> b (l k j) h d",
    }[case.kind]
    sizes = {"k": n} if case.kind == "single" else {"k": n, "j": n}

    valid = torch.zeros(case.B, padded, 1, 1, dtype=torch.bool, device=problem.q.device)
    valid[:, :N] = True
    keys = torch.cat(
        [rearrange(valid, fold, **sizes)[..., 0], valid.new_ones(n * case.B, 1, T)], -1
    )
    mask = repeat(keys, "b 1 keys -> b 1 rows keys", rows=padded // n + T).contiguous()

    def together(video: Tensor, text: Tensor) -> Tensor:
        video = rearrange(F.pad(video, (0, 0, 0, 0, 0, padded - N)), fold, **sizes)
        return torch.cat([video, repeat(text, "b t h d -> (k b) h t d", k=n)], 2)

    def attend(*inputs: Tensor) -> tuple[Tensor, ...]:
        video, text = inputs[:3], inputs[3:]
        q, k, v = (together(x, y) for x, y in zip(video, text, strict=True))
        rows = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = rearrange(rows[:, :, : padded // n], unfold, **sizes)[:, :N]
        text_out = rearrange(rows[:, :, padded // n :], "(k b) h t d -> k b t h d", k=n).mean(0)
        return out.contiguous(), text_out

    grads = (problem.grad_out, problem.grad_text_out)
    return Contender("original", step(case, attend, problem.inputs, grads))


def flex(case: Case, problem: Problem, *, compiled: bool = True) -> Contender:
    """FlexAttention over tokens sorted by sub-sequence, so that its blocks are sparse.

    Sorted by its owner, the mask is nearly block-diagonal; in natural order FlexAttention would
    visit every block of single-skip. Text queries are repeated for each sub-sequence.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = problem.q.device
    if device.type == "cpu" and case.backward:
        return Contender("flex", None, "torch has no FlexAttention backward on a CPU")
    n, N, T = case.pattern.sparsity, case.N, case.T
    owner = case.pattern.owner(torch.arange(N, device=device))
    order = owner.argsort(stable=True)
    back = order.argsort()
    key_owner = torch.cat([owner[order], owner.new_full((T,), n)])
    query_owner = torch.cat([owner[order], torch.arange(n, device=device).repeat_interleave(T)])

    def attends(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (query_owner[row] == key_owner[key]) | (key_owner[key] == n)

    blocks = create_block_mask(attends, None, None, N + n * T, N + T, device=device)
    kernel = torch.compile(flex_attention) if compiled else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> tuple[Tensor, ...]:
        text_q, text_k, text_v = text
        query = torch.cat([q[:, order], text_q.repeat(1, n, 1, 1)], 1).transpose(1, 2)
        key = torch.cat([k[:, order], text_k], 1).transpose(1, 2)
        value = torch.cat([v[:, order], text_v], 1).transpose(1, 2)
        rows = kernel(query, key, value, block_mask=blocks).transpose(1, 2)
        return rows[:, :N][:, back], rows[:, N:].unflatten(1, (n, T)).mean(1)

    grads = (problem.grad_out, problem.grad_text_out)
    return Contender("flex", step(case, attend, problem.inputs, grads))


def natten(case: Case, problem: Problem) -> Contender:
    """NATTEN's dilated neighbourhoods, which express both patterns, with the text as extra keys.

    It has no text queries, so it does less than the others; the difference is a tenth at k = 8.
    """
    if importlib.util.find_spec("natten") is None:
        return Contender("natten", None, "natten is not installed")
    if problem.q.device.type == "cpu":
        return Contender("natten", None, "on a CPU it forms the whole score matrix")
    library = importlib.import_module("natten")
    if case.grid is not None:
        return _natten_on_grid(case, problem, library)
    k, N = case.k, case.N
    if N % k**2 or case.skip_order or case.kind == "dense":
        return Contender("natten", None, "it takes natural order with k*k dividing N")

    def attend(q: Tensor, key: Tensor, v: Tensor, *text: Tensor) -> tuple[Tensor, ...]:
        extra = {"additional_keys": text[1], "additional_values": text[2]}
        if case.kind == "single":
            return (library.na1d(q, key, v, kernel_size=N // k, dilation=k, **extra),)
        q, key, v = (x.unflatten(1, (N // k, k)) for x in (q, key, v))
        out = library.na2d(q, key, v, kernel_size=(N // k**2, k), dilation=(k, 1), **extra)
        return (out.flatten(1, 2),)

    return Contender("natten", step(case, attend, problem.inputs, (problem.grad_out,)))


def _natten_on_grid(case: Case, problem: Problem, library: Any) -> Contender:
    """Single-skip of a grid as a neighbourhood of all frames, dilated along the two sides."""
    assert case.grid is not None
    frames, height, width = case.grid
    if case.kind == "group" or case.skip_order or height % case.k or width % case.k:
        return Contender(
            "natten",
            None,
            "it takes single-skip in natural order with the ratio dividing the sides",
        )
    how = {
        "kernel_size": (frames, height // case.k, width // case.k),
        "dilation": (1, case.k, case.k),
    }

    def attend(*rows: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.unflatten(1, (frames, height, width)) for x in rows)
        return (library.na3d(q, k, v, **how).flatten(1, 3),)

    return Contender("natten", step(case, attend, problem.inputs[:3], (problem.grad_out,)))


def step(
    case: Case,
    attend: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
) -> Work:
    """The timed work: forward without autograd, or forward and backward."""
    if not case.backward:

        def forward() -> object:
            with torch.no_grad():
                return attend(*inputs)

        return forward

    def forward_backward() -> object:
        leaves = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(attend(*leaves), leaves, grads, allow_unused=True)

    return forward_backward
