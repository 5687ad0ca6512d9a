"""Two processes with one retrofitted Wan: `torchrun --nproc-per-node 2 tests/retrofit_parallel.py`.

Each prints how far it is from one process alone; `test_retrofit.py` reads that.
"""

import copy

import diffusers
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from skiparse.models.retrofit import retrofit

torch.accelerator.device_count = lambda: 1  # diffusers 0.42 divides by it, which is 0 on a CPU
torch.Tensor.float = torch.Tensor.double  # the model's islands of fp32
KINDS = ("dense", "single", "group", "single")


def tiny():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=24, num_layers=4,
    )  # fmt: skip
    return model.double()


def arguments(grid, tokens_time):
    torch.manual_seed(1)
    t, h, w = grid
    return {
        "hidden_states": torch.randn(1, 4, t, 2 * h, 2 * w).double(),
        "timestep": torch.rand(1, t * h * w).double() * 999 if tokens_time else torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16).double(),
    }


def run(model, given):
    out = model(**given, return_dict=False)[0]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    (out * weight).sum().backward()
    return out.detach()


def far(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()


def say(name, *errors):
    if dist.get_rank() == 0:
        print(name, *(f"{error:.3e}" for error in errors), flush=True)


def parallel(pattern, grid, tokens_time):
    given = arguments(grid, tokens_time)
    alone = tiny()
    retrofit(alone, pattern, kinds=KINDS)
    wanted = run(alone, given)
    shared = tiny()
    retrofit(shared, pattern, kinds=KINDS)
    config = diffusers.ContextParallelConfig(ulysses_degree=2)
    shared.enable_parallelism(config=config)
    out = far(run(shared, given), wanted)
    grads = [0.0]
    largest = max(p.grad.abs().max() for p in alone.parameters() if p.grad is not None)
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        if ours.grad is not None:
            dist.all_reduce(ours.grad)  # the loss is whole in each: a sum
            scale = max(theirs.grad.abs().max(), 1e-3 * largest)
            grads.append(((ours.grad - theirs.grad).abs().max() / scale).item())
    say(f"parallel {pattern} {grid} {tokens_time}", out, max(grads))


def sharded():
    given = arguments((2, 8, 8), False)
    alone = tiny()
    retrofit(alone, kinds=KINDS)
    wanted = run(alone, given)
    split = tiny()
    retrofit(split, kinds=KINDS)
    split.enable_gradient_checkpointing()
    for block in split.blocks:
        fully_shard(block)
    fully_shard(split)
    out = far(run(split, given), wanted)
    grads = [
        far(ours.grad.full_tensor(), theirs.grad)
        for ours, theirs in zip(split.parameters(), alone.parameters(), strict=True)
        if theirs.grad is not None and theirs.grad.abs().max() > 1e-9
    ]
    say("FSDP2", out, max(grads))
    first = copy.deepcopy(tiny())
    for block in first.blocks:
        fully_shard(block)
    fully_shard(first)
    retrofit(first, kinds=KINDS)  # its class has another name by now
    say("FSDP2 first", far(run(first, given), wanted))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for pattern, grid, tokens_time in (
        ("2d", (2, 8, 8), False), ("2d", (2, 8, 8), True), ("1d", (2, 8, 8), False),
        ("2d", (2, 5, 7), False),
    ):  # fmt: skip
        parallel(pattern, grid, tokens_time)
    sharded()
    dist.destroy_process_group()
