"""Sharded tensors: batch and heads stay cut, tokens are gathered, and nothing else changes."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import skiparse
from skiparse import GridPattern, SkipPattern

BATCH, TOKENS, HEADS = Shard(0), Shard(1), Shard(2)


def test_two_processes():
    done = together(2, __file__)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["batch", "heads", "replicated", "tokens"]


def answer(tensors, mask):
    """Outputs of both calls and gradients of all six, the log-sum-exp's among them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, text_out = skiparse.joint_attention(*leaves, SkipPattern.group(2), mask=mask)
    alone, lse = skiparse.attention_with_lse(*leaves[:3], GridPattern.single((1, 4, 4), 2))
    loss = out.square().sum() + text_out.sum() + lse.square().sum()
    return out, text_out, alone, lse, *torch.autograd.grad(loss, leaves)


def compare(mesh, name, video, text):
    """The same as of whole tensors; returns where the four outputs are."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, rows, 4, 16, generator=generator) for rows in (16,) * 3 + (3,) * 3]
    mask = torch.rand(2, 16, generator=generator) < 0.7
    places = [video] * 3 + [text] * 3
    cut = [distribute_tensor(x, mesh, [at]) for x, at in zip(tensors, places, strict=True)]
    whole_mask = distribute_tensor(mask, mesh, [BATCH if video == BATCH else Replicate()])
    found, right = answer(cut, whole_mask), answer(tensors, mask)
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x.full_tensor(), y)
    if dist.get_rank() == 0:
        print(name, flush=True)
    return [x.placements[0] for x in found[:4]]


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    assert compare(mesh, "batch", BATCH, BATCH) == [BATCH] * 4
    assert compare(mesh, "heads", HEADS, HEADS) == [HEADS, HEADS, HEADS, Shard(1)]
    assert compare(mesh, "replicated", Replicate(), Replicate()) == [Replicate()] * 4
    assert TOKENS not in compare(mesh, "tokens", TOKENS, Replicate())[:3]
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["skiparse", "torch.distributed.tensor"])
def test_shardings_are_known_whichever_is_imported_first(first):
    code = (
        f"import {first}, skiparse, torch.distributed.tensor\n"
        "from torch.distributed.tensor import DTensor\n"
        "rules = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs\n"
        "print(sum(str(op).startswith('skiparse.attention') for op in rules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 3


if __name__ == "__main__":
    main()
