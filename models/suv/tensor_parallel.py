"""The heads and feed-forwards of an SUV dealt out to processes: tensor parallelism, of its weights.

By torch's ``parallelize_module``. A process has the rows of q, k, v for its heads and of the first
layer of a feed-forward, and the columns of the layers behind them, whose outputs are summed over
the processes: an all-reduce of the tokens forward and backward, for attention and feed-forward
each. Everything else every process has, and computes, whole.

Source: Shoeybi et al., Megatron-LM, arXiv 1909.08053. Not yet run on GPUs.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from skiparse.models.suv.blocks import SUVBlock
from skiparse.models.suv.experts import Experts


class _Everywhere(ParallelStyle):
    """Parameters that every process has whole, though it uses them for a part of the heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh)


def check_tensor_parallel(block: SUVBlock, number: int) -> None:
    """Whether so many processes can have a part of the weights each.

    Raises:
        ValueError: with what does not let them.
    """
    heads = block.attn.heads
    if heads % number:
        raise ValueError(
            f"tensor_parallel={number} must divide the heads of the model, {heads}, which it deals "
            "out"
        )
    if isinstance(block.ff, Experts):
        raise ValueError(
            f"tensor_parallel={number}: nothing deals out experts; leave it out, or experts"
        )


def deal_out(block: SUVBlock, mesh: DeviceMesh) -> None:
    """Leave each process of ``mesh`` its part of a block's weights, in place, as DTensors.

    They call the block with the same inputs, and each gets the whole output. All have the same
    weights before; nothing is sent. Names of weights stay.

    Args:
        block: on any device, also the meta device.
        mesh: of one dimension.

    Raises:
        ValueError: as :func:`check_tensor_parallel`.
    """
    check_tensor_parallel(block, mesh.size())
    parallelize_module(block, mesh, _plan(block), src_data_rank=None)
    block.attn.heads //= mesh.size()


def _plan(block: SUVBlock) -> dict[str, ParallelStyle]:
    """How each part of a block is dealt out, by name."""
    # Video and text, whose gradients are summed once for q, k and v; and five arguments besides.
    layouts = (Replicate(), Replicate(), None, None, None, None, None)
    plan: dict[str, ParallelStyle] = {
        "attn": PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)
    }
    for name, module in block.attn.named_children():
        if name.endswith(("to_q", "to_k", "to_v")):
            plan[f"attn.{name}"] = ColwiseParallel()
        elif name.endswith("to_out"):
            plan[f"attn.{name}"] = RowwiseParallel()
        else:  # of heads
            assert "norm" in name
            plan[f"attn.{name}"] = _Everywhere()
        assert list(module.children()) == []
    for name in ("ff", "text_ff"):
        if getattr(block, name) is not None:
            plan[f"{name}.linear_1"] = ColwiseParallel()
            plan[f"{name}.linear_2"] = RowwiseParallel()
    return plan
