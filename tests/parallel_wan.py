"""Processes that share a retrofitted Wan: `torchrun --nproc-per-node P tests/parallel_wan.py`.

Each case is compared with one process alone; `test_parallel.py` reads what the first one prints.
"""

import math

import diffusers
import torch
import torch.distributed as dist
from parallel_run import WAIT, averaged, far, grads
from volumes import Sent, elements

from skiparse.models.cluster import WanModel
from skiparse.models.retrofit import retrofit

torch.Tensor.float = torch.Tensor.double  # the model's islands of fp32
BYTES = 2  # of a number, as the planner has it
KINDS = ("dense", "single", "group", "single", "dense")
CASES = {
    "2d": ("2d", (2, 8, 8), False),
    "2d ragged": ("2d", (2, 5, 7), False),
    "1d": ("1d", (2, 8, 8), False),
    "2d checkpointed": ("2d", (2, 6, 8), True),
}


class Planned(WanModel):
    """A tiny one, as `skiparse plan --cluster` counts that of 14B."""

    head_dim, layers, out = 12, 5, 4 * 4

    def __init__(self, grid, route):
        self.tokens, self.found = math.prod(grid), route

    def route(self, processes):
        return self.found


def tiny():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=24, num_layers=5,
    )  # fmt: skip
    return model.double()


def run(model, grid):
    torch.manual_seed(1)
    t, h, w = grid
    latents = torch.randn(2, 4, t, 2 * h, 2 * w).double().requires_grad_()
    text = torch.randn(2, 6, 16).double().requires_grad_()
    model.zero_grad()
    out = model(latents, torch.tensor([500, 20]), text, return_dict=False)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    (out * weight).sum().backward()
    return out.detach(), [g.clone() for g in grads(latents, text)], [
        g.clone() for g in grads(*model.parameters())
    ]  # fmt: skip


def compare(name):
    pattern, grid, again = CASES[name]
    rank, P = dist.get_rank(), dist.get_world_size()
    model = tiny()
    made = retrofit(model, pattern, kinds=KINDS)
    wanted = run(model, grid)
    made.share(dist.group.WORLD)
    if again:
        model.enable_gradient_checkpointing()
    with Sent(rank) as sent:
        found = run(model, grid)
    route = made.parts[0].state.sharing.route
    made.undo()
    retrofit(model, pattern, kinds=KINDS)
    errors = [
        far([found[0]], [wanted[0]]),
        far(averaged(found[1]), wanted[1]),
        far([run(model, grid)[0]], [wanted[0]]),  # nothing is left
        far(averaged(found[2]), wanted[2]),
    ]
    worst = torch.tensor(errors, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    exchanged, reduced = elements(sent.exchanged, sent.reduced)
    counted, how = Planned(grid, route), "block" if again else "none"
    formula = 2 * P * (counted.sent(P) + counted.sent_back(P, how)) / BYTES
    if rank == 0:
        print("case", name.replace(" ", "_"), *(f"{e:.2e}" for e in worst.tolist()),
              "sent", exchanged + reduced, "formula", round(formula), flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=WAIT)
    for name in CASES:
        compare(name)
    dist.destroy_process_group()
