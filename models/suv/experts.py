"""A mixture of experts in the place of a feed-forward, and how a dense one becomes one.

A router gives every token chances of the ``E`` experts; it goes to the ``k`` with the largest, and
their answers are weighed by their chances, normalised to sum to one. So while experts are copies of
one feed-forward, as upcycling leaves them, the mixture is that feed-forward, whatever the router.

No expert has a capacity: whatever the router does, ``k`` rows are computed for each token, and none
is left out. That costs ``k`` feed-forwards, and memory for ``E`` in weights.

Source: Shazeer et al., arXiv 1701.06538 (top-k routing); Fedus et al., Switch Transformer,
arXiv 2101.03961 (the loss that balances); Komatsuzaki et al., Sparse Upcycling, arXiv 2212.05055
(copies, normalised weights); Gale et al., MegaBlocks, arXiv 2211.15841 (no capacity).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skiparse.models.suv.parts import Fp32Linear

LEAST = 2  # experts of a token: the weight of one alone would be 1, and teach its router nothing


class GroupedLinear(nn.Module):
    """A linear layer of each expert, without biases, on rows that lie expert by expert."""

    def __init__(self, experts: int, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outer, inner))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """``[M, C_in]`` to ``[M, C_out]``.

        Args:
            x: the rows of expert 0, then those of expert 1, and so on.
            ends: the row behind the last of each expert, int32 ``[E]``.

        In bf16 it is torch's grouped product; in other dtypes, of which that has no fast one nor
        shapes without memory, a product for each expert.
        """
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        weight = self.weight.to(x.dtype)
        if x.dtype == torch.bfloat16:
            return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(x.split(sizes), weight.unbind(0), strict=True)
        return torch.cat([F.linear(part, its) for part, its in parts])


class Experts(nn.Module):
    """``E`` feed-forwards, of which each token goes through ``k``."""

    def __init__(self, width: int, experts: int, taken: int) -> None:
        super().__init__()
        self.taken = taken
        self.router = Fp32Linear(width, experts, bias=False)
        self.linear_1 = GroupedLinear(experts, width, 4 * width)
        self.linear_2 = GroupedLinear(experts, 4 * width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, N, C]`` to the same; and the load, of which :func:`imbalance` makes a loss.

        The load is fp32 ``[B, 2, E]``: how often each expert was taken, and the sum of its chances;
        both are sums over tokens.
        """
        chances = self.router(x).softmax(-1)  # [B, N, E]
        weights, chosen = chances.topk(self.taken, -1)  # [B, N, k]
        weights = weights / weights.sum(-1, keepdim=True)
        everyone = torch.arange(chances.shape[-1], device=x.device)
        counts = (chosen[..., None] == everyone).sum((1, 2))  # [B, E]
        ends = counts.sum(0).cumsum(0).to(torch.int32)
        order = chosen.flatten().argsort(stable=True)  # rows, expert by expert; k lie side by side
        rows = x.flatten(0, 1).index_select(0, order // self.taken)
        inner = F.gelu(self.linear_1(rows, ends), approximate="tanh")
        found = self.linear_2(inner, ends).index_select(0, order.argsort())
        answers = found.view(*chosen.shape, -1)  # [B, N, k, C]
        mixed = (answers.float() * weights[..., None]).sum(-2).to(answers.dtype)
        return mixed, torch.stack([counts.float(), chances.sum(1)], 1)


def imbalance(load: Tensor, tokens: int, taken: int) -> Tensor:
    """How unevenly a sample uses the experts: 1 where all alike, ``E / k`` where ``k`` of them.

    ``E * sum_e f_e p_e``: the share of an expert in what was taken, times its mean chance, through
    which the router learns. Each sample has its own, so batches and processes change nothing.

    Args:
        load: ``[B, 2, E]`` of :class:`Experts`, of all tokens.
        tokens: how many that are.
        taken: ``k``.

    Returns:
        ``[B]`` fp32.

    Source: Fedus et al., arXiv 2101.03961, equation 4, of each sequence.
    """
    counts, chances = load.unbind(1)
    return load.shape[-1] * (counts / (taken * tokens) * (chances / tokens)).sum(-1)


def check_experts(experts: Sequence[int] | None, taken: int, stages: int) -> None:
    """ValueError unless there is a number of experts for each stage, and ``taken`` fits all.

    One expert is the feed-forward itself.
    """
    experts = (1,) * stages if experts is None else tuple(experts)
    if len(experts) != stages or not all(isinstance(x, int) and x >= 1 for x in experts):
        raise ValueError(
            f"experts must be {stages} whole numbers from 1 on, one for each stage, 1 for a "
            f"feed-forward as it is; got {experts}"
        )
    most = min((number for number in experts if number > 1), default=LEAST)
    if not isinstance(taken, int) or not LEAST <= taken <= most:
        raise ValueError(
            f"experts_per_token must be from {LEAST} to the fewest experts of a stage that has "
            f"some, here {most}; got {taken} of experts={experts}"
        )
