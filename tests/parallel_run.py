"""Processes that share tokens of toy models: `torchrun --nproc-per-node P tests/parallel_run.py`.

Each case is compared with one process alone; `test_parallel.py` reads what the first one prints.
"""

import datetime
import functools
import itertools
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from volumes import Sent, elements

import skiparse
from skiparse import GridPattern, SkipPattern
from skiparse.layout import Layout, chunk_sizes, route
from skiparse.parallel import skip_exchange, ulysses_attention, ulysses_joint_attention

B, T, D = 2, 3, 4
DENSE = SkipPattern.dense()
WAIT = datetime.timedelta(seconds=90)  # for a process that does not answer


def kinds(single, group):
    return [DENSE, single, group, single, group, DENSE]


def sparse(k):
    return kinds(SkipPattern.single(k), SkipPattern.group(k))


def grid(*sides, p=2):
    return kinds(GridPattern.single(sides, p), GridPattern.group(sides, p))


# name: patterns of the layers, tokens, heads
CASES = {
    "k=1": ([DENSE] * 3, 24, 4),
    "k=2": (sparse(2), 48, 4),
    "k=4": (sparse(4), 64, 4),
    "k=4 ragged": (sparse(4), 53, 4),
    "k=8": (sparse(8), 128, 4),
    "k=8 ragged": (sparse(8), 150, 4),
    "k changes": ([*sparse(2)[:3], *sparse(4)[1:5], *sparse(8)[1:5]], 131, 4),
    "p=2": (grid(2, 8, 8), 128, 4),
    "p=2 ragged": (grid(2, 5, 7), 70, 4),
    "p=2 chunks without tokens": (grid(1, 2, 3), 6, 4),
    "p=4 ragged": (grid(2, 9, 12, p=4), 216, 4),
    "5 heads": (sparse(4), 64, 5),
    "1 head": (sparse(2), 48, 1),
    "1 token": (sparse(2), 1, 4),
    "2 tokens": (sparse(2), 2, 4),  # which the second process has one of, and none of, in turn
    "no tokens": (sparse(2), 0, 4),
}
FEW = ("k=4 ragged", "k changes", "p=2 ragged", "1 head", "1 token")


def parameters(layers, width):
    made = torch.Generator().manual_seed(0)
    shapes = [(width, width)] * 10
    return [
        [(torch.randn(s, generator=made).double() / width**0.5).requires_grad_() for s in shapes]
        for _ in range(layers)
    ]


def block(x, text, w, heads, attend):
    split = lambda y, m: F.linear(F.layer_norm(y, y.shape[-1:]), m).unflatten(-1, (heads, D))  # noqa: E731
    q, k, v = (split(x, m) for m in w[:3])
    if text is None:
        out = attend(q, k, v)
    else:
        out, text_out = attend(q, k, v, *(split(text, m) for m in w[3:6]))
        text = text + F.linear(text_out.flatten(2), w[6])
        text = text + F.gelu(F.linear(text, w[7]))
    x = x + F.linear(out.flatten(2), w[8])
    return x + F.gelu(F.linear(x, w[9])), text


def tensors(N, width, with_text):
    made = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=made, dtype=torch.float64)  # noqa: E731
    x, text = draw(B, N, width), draw(B, T, width)
    weights = draw(B, N, width), draw(B, T, width)
    masks = torch.rand(B, N, generator=made) > 0.3, torch.rand(B, T, generator=made) > 0.3
    return x, text if with_text else None, weights, masks


def grads(*given):
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in given if x is not None]


@functools.cache
def alone(name, with_text, masked):
    patterns, N, heads = CASES[name]
    x, text, weights, masks = tensors(N, heads * D, with_text)
    x.requires_grad_()
    if with_text:
        text.requires_grad_()
    w = parameters(len(patterns), heads * D)
    y, z = x, text
    for pattern, ws in zip(patterns, w, strict=True):
        mask = {"mask": masks[0]} if masked else {}
        text_mask = {"text_mask": masks[1]} if masked and with_text else {}
        call = skiparse.joint_attention if with_text else skiparse.attention

        def attend(*given, pattern=pattern, call=call, named=mask | text_mask):
            return call(*given, pattern, **named)

        y, z = block(y, z, ws, heads, attend)
    loss = (y * weights[0]).sum() + ((z * weights[1]).sum() if with_text else 0)
    loss.backward()
    return y, z, x.grad, grads(text), [g for ws in w for g in grads(*ws)]


def together(name, with_text, masked, again=False, layouts=None, group=None):
    patterns, N, heads = CASES[name]
    rank, P = dist.get_rank(group), dist.get_world_size(group)
    made = route(patterns, N, P, heads)
    layouts = made.layouts if layouts is None else layouts
    x, text, weights, masks = tensors(N, heads * D, with_text)
    first, last = layouts[0], layouts[-1]
    x = x[:, first.owned(rank)].requires_grad_()
    if with_text:
        text.requires_grad_()
    w = parameters(len(patterns), heads * D)
    y, z, layout = x, text, first
    for pattern, its, ws in zip(patterns, layouts, w, strict=True):
        y, layout = skip_exchange(y, layout, its, group), its
        mask = {"mask": masks[0]} if masked else {}
        text_mask = {"text_mask": masks[1]} if masked and with_text else {}
        call = ulysses_joint_attention if with_text else ulysses_attention

        def attend(*given, pattern=pattern, its=its, call=call, named=mask | text_mask):
            return call(*given, pattern, its, group, **named)

        if again:
            y, z = torch.utils.checkpoint.checkpoint(
                block, y, z, ws, heads, attend, use_reentrant=False
            )
        else:
            y, z = block(y, z, ws, heads, attend)
    loss = (y * weights[0][:, last.owned(rank)]).sum()
    if with_text:
        loss = loss + (z * weights[1]).sum() / P
    return made, layouts, (x, text, w, y, z, loss)


def far(ours, theirs):
    """Their largest difference, relative to the largest of theirs; over all processes."""
    found = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.numel():
            found = max(found, ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item())
    return found


def summed(xs, group=None):
    """Over all processes, in one message: each costs them a switch of who computes."""
    if not xs:
        return []
    flat = torch.cat([x.flatten() for x in xs])
    dist.all_reduce(flat, group=group)
    return [x.view_as(y) for x, y in zip(flat.split([y.numel() for y in xs]), xs, strict=True)]


def averaged(xs):
    """The same of a loss that all of them have."""
    return [x / dist.get_world_size() for x in summed(xs)]


def compare(name, with_text, masked, again=False, layouts=None, group=None):
    rank = dist.get_rank(group)
    heads = CASES[name][2]
    wanted = alone(name, with_text, masked)
    with Sent(rank) as forward:
        made, layouts, (x, text, w, y, z, loss) = together(
            name, with_text, masked, again, layouts, group
        )
    with Sent(rank) as backward:
        loss.backward()
    first, last = layouts[0].owned(rank), layouts[-1].owned(rank)
    errors = [
        far([y, *([z] if with_text else [])], [wanted[0][:, last], *wanted[1:2][: int(with_text)]]),
        far([x.grad], [wanted[2][:, first]]),
        far(summed(grads(text), group), wanted[3]),
        far(summed([g for ws in w for g in grads(*ws)], group), wanted[4]),
    ]
    worst = torch.tensor(errors, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    sent = elements(forward.exchanged, backward.exchanged, forward.reduced, backward.reduced)
    if dist.get_rank() == 0:
        words = f"{name}{' text' * with_text}{' masks' * masked}{' again' * again}"
        formula = B * D * sent_by(CASES[name][0], layouts, heads)
        assert layouts is not made.layouts or formula == B * D * made.sent
        per_text = B * T * heads * D * len(layouts) * dist.get_world_size(group) * with_text
        print("case", words.replace(" ", "_"), *(f"{e:.2e}" for e in worst.tolist()),
              "sent", *sent, "formula", formula, per_text, flush=True)  # fmt: skip


def sent_by(patterns, layouts, heads):
    """Heads of tokens: off the diagonal of the chunk matrices, and what each layer exchanges."""
    chunks = [chunk_sizes(*pair) for pair in itertools.pairwise(layouts)]
    meetings = [
        layout.sent(pattern, heads) for pattern, layout in zip(patterns, layouts, strict=True)
    ]
    return heads * sum(c.sum() - c.trace() for c in chunks) + sum(meetings)


def own(name):
    """Each layer in the layout of its pattern, however uneven; dense ones wherever they are."""
    patterns, N, _ = CASES[name]
    P = dist.get_world_size()
    layouts = []
    for pattern in patterns:
        if pattern.sparsity == 1 and layouts:
            layouts.append(layouts[-1])
        else:
            layouts.append(Layout.of(pattern, N, P, most=P))
    return layouts


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=WAIT)
    few = sys.argv[1:] == ["few"]
    for name in FEW if few else CASES:
        for with_text, masked in ((True, False), (True, True), (False, False)):
            compare(name, with_text, masked)
        compare(name, True, False, again=True)
    # Given layouts: each pattern's own, some process without tokens, and all layers in one.
    P = dist.get_world_size()
    for name in ("k=4 ragged", "p=2 ragged", "p=2 chunks without tokens", "1 token", "2 tokens"):
        compare(name, True, True, layouts=own(name))
    for pattern, teams in ((SkipPattern.group(4), 1), (SkipPattern.single(4), P if P < 5 else 1)):
        patterns, N, _ = CASES["k=4 ragged"]
        compare("k=4 ragged", True, True, layouts=[Layout(pattern, N, P, teams)] * len(patterns))
    dist.destroy_process_group()
