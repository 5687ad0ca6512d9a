"""The processes that share a run: who they are, how a model is spread over them and gathered.

Started by ``torchrun``, each process finds its rank in the environment; without it there is one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from skiparse.models import devices


@dataclass(frozen=True)
class Context:
    """Processes that share tokens: number ``index`` of ``count`` such groups, each with its data.

    ``first`` is one process of each. A group of one is None.
    """

    index: int
    count: int
    first: bool
    group: Any


@dataclass(frozen=True)
class World:
    """This process among ``size``; ``device`` is its own."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextmanager
    def joined(cls, device: str | None) -> Iterator[World]:
        """The processes that torchrun started, or this one alone.

        Raises:
            ValueError: if ``device`` is none of this machine.
        """
        here = devices.chosen(device, setting="device: ")
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(0, 1, here)
            return
        if here == torch.device("cuda"):
            here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(here)
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), size, here)
        finally:
            dist.destroy_process_group()

    def mean(self, *values: Tensor | float) -> list[float]:
        """Each value averaged over all processes."""
        numbers = torch.stack([torch.as_tensor(x, device=self.device).float() for x in values])
        if self.size > 1:
            dist.all_reduce(numbers)
        return (numbers / self.size).tolist()

    def average(self, x: Tensor) -> Tensor:
        """``x`` averaged over all processes, element by element; gradients are averaged too."""
        found: Tensor = _Average.apply(x) if self.size > 1 else x
        return found

    def share(self, batch: int) -> slice:
        """Which samples of a batch of all processes are this one's."""
        own = batch // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def context(self, number: int) -> Context:
        """The groups of ``number`` processes that share tokens, and which of them is this one's.

        Neighbours in rank are one group, so that on machines with several devices they are near.
        """
        if number == 1:
            return Context(self.rank, self.size, True, None)
        mesh = init_device_mesh(
            self.device.type, (self.size // number, number), mesh_dim_names=("data", "context")
        )
        group = mesh["context"].get_group()
        return Context(
            mesh.get_local_rank("data"), mesh.size(0), mesh.get_local_rank("context") == 0, group
        )

    def all(self, mine: list[str]) -> list[str]:
        """The lists of all processes in one, in the order of their ranks."""
        if self.size == 1:
            return mine
        lists: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, mine)
        return [x for each in lists for x in each]

    @contextmanager
    def first_here(self) -> Iterator[None]:
        """The first process does it, then all the others do."""
        if self.rank > 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def spread(self, model: nn.Module, how: str, blocks: Collection[str] = ()) -> nn.Module:
        """``model`` to train: itself alone, a copy in every process, or a shard in each."""
        model.to(self.device)
        if self.size == 1:
            return model
        if how == "fsdp":
            return self.sharded(model, blocks)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def sharded(self, model: nn.Module, blocks: Collection[str]) -> nn.Module:
        """``model`` in shards, each module of a class in ``blocks`` by itself."""
        mesh = init_device_mesh(self.device.type, (self.size,))
        for module in model.modules():
            if type(module).__name__ in blocks:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


class _Average(torch.autograd.Function):
    """A mean over all processes. What a loss that is a mean over them wants of it is the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        made = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(made)
        return made / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        found: Tensor = _Average.apply(gradients[0])
        return found


def frozen_of(model: nn.Module, dtype: str) -> dict[str, Tensor]:
    """What of a model takes no gradient, in ``dtype``, by name; without a copy where it is so.

    What a model of diffusers says has to stay in float32 stays so: it is little, such as norms.
    """
    precise = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: x.detach() if precise & set(name.split(".")) else x.detach().to(getattr(torch, dtype))
        for name, x in model.named_parameters()
        if not x.requires_grad
    }


def bare(model: nn.Module) -> nn.Module:
    """The model inside of what :meth:`World.spread` gave."""
    inner: Any = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def gathered(model: nn.Module, again: Callable[[], nn.Module]) -> nn.Module:
    """``model`` whole and by itself; if it is in shards, from all processes, on the CPU.

    ``again`` makes another of its kind, for which there need be no memory.
    """
    if not isinstance(model, FSDPModule):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=False)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank():
        state = {}
    held = [state]
    dist.broadcast_object_list(held)
    with torch.device("meta"):
        whole = again()
    whole.load_state_dict(held[0], strict=True, assign=True)
    return whole.train(model.training)


def local(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients of this micro-batch stay in the process unless it is the last of its step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()
