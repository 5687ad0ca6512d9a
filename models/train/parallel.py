"""The processes that share a run: who they are, and how a model is spread over them.

Started by ``torchrun``, each process finds its rank in the environment; without it there is one.
Nobody waits for another for ever: what is not answered in time ends the run, and the processes that
did not answer are named.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from skiparse.models import devices

T = TypeVar("T")
Deal = Callable[[nn.Module, DeviceMesh], None]  # of a block: leaves each process of a mesh its part
TIMEOUT = 1800.0  # seconds to wait for another process, torch's own for gloo
_NOTICE = 10.0  # seconds until those that wait have noticed it too; torchrun kills after 30


class LostError(ConnectionError):
    """Processes of a run did not answer: which ones, and what to do."""


@dataclass(frozen=True)
class Context:
    """Processes with one batch: number ``index`` of ``count`` such groups, each with its data.

    ``first`` is one process of each. ``group`` are those that share the tokens with this one; None
    for this one alone.
    """

    index: int
    count: int
    first: bool
    group: Any


@dataclass(frozen=True)
class World:
    """This process among ``size``; ``device`` is its own.

    ``timeout`` are the seconds after which what is not answered ends the run. Of ``tensor``
    neighbours in rank each has a part of the weights that a model deals out.
    """

    rank: int
    size: int
    device: torch.device
    timeout: float = TIMEOUT
    tensor: int = 1

    @classmethod
    @contextmanager
    def joined(cls, device: str | None, timeout: float = TIMEOUT) -> Iterator[World]:
        """The processes that torchrun started, or this one alone.

        Raises:
            ValueError: if ``device`` is none of this machine.
            LostError: from the block, if others died or did not answer within ``timeout`` seconds;
                with their ranks.
        """
        here = devices.chosen(device, setting="device: ")
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            yield cls(0, 1, here, timeout)
            return
        if here == torch.device("cuda"):
            here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(here)
        dist.init_process_group(
            "nccl" if here.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=here if here.type == "cuda" else None,
        )
        try:
            yield cls(dist.get_rank(), size, here, timeout)
        except Exception as error:
            if not _is_of_others(error):
                raise
            raise LostError(_told(dist.get_rank(), size, timeout)) from error
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

        Neighbours in rank are one group, so that on machines with several devices they are near;
        those that have a model's weights together are nearer still.
        """
        together = number * self.tensor
        count = self.size // together
        group = None
        if number > 1:
            mesh = self._mesh(count, number, self.tensor, names=("data", "context", "tensor"))
            group = mesh["context"].get_group()
        return Context(self.rank // together, count, self.rank % together == 0, group)

    @cached_property
    def _weights(self) -> DeviceMesh:
        """Processes with other parts of a layer (a row), and with other shards of those."""
        return self._mesh(self.size // self.tensor, self.tensor, names=("shards", "tensor"))

    def _mesh(self, *shape: int, names: tuple[str, ...] | None = None) -> DeviceMesh:
        """All processes, whose groups wait no longer than the run does."""
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        for group in mesh.get_all_groups():
            _set_pg_timeout(timedelta(seconds=self.timeout), group)
        return mesh

    def all(self, mine: list[str]) -> list[str]:
        """The lists of all processes in one, in the order of their ranks."""
        if self.size == 1:
            return mine
        lists: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, mine)
        return [x for each in lists for x in each]

    def of_first(self, mine: T) -> T:
        """What the first process has, in all."""
        if self.size == 1:
            return mine
        held = [mine]
        dist.broadcast_object_list(held)
        return held[0]

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

    def spread(
        self,
        model: nn.Module,
        how: str,
        blocks: Collection[str] = (),
        deal: Deal | None = None,
    ) -> nn.Module:
        """``model`` to train: itself alone, a copy in every process, or a shard in each.

        What is in shards already stays so.
        """
        if isinstance(model, FSDPModule):
            return model
        if self.size > 1 and how == "fsdp":
            return self.sharded(model, blocks, deal)
        model.to(self.device)
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def sharded(
        self, model: nn.Module, blocks: Collection[str], deal: Deal | None = None
    ) -> nn.Module:
        """``model`` in shards, each module of a class in ``blocks`` by itself.

        One after the other comes to the device, so that there need be no room for all of it. What
        ``deal`` leaves each of ``tensor`` processes of a block is in shards over the others.
        """
        for module in model.modules():
            if type(module).__name__ in blocks:
                self._cut(module, deal)
        fully_shard(model, mesh=self._shards)
        return model

    @contextmanager
    def cutting(self, blocks: Collection[str], deal: Deal | None = None) -> Iterator[None]:
        """Models that are made meanwhile have their blocks in shards as soon as each is made.

        So there need be no room for all of a model. What is left of it is for :meth:`sharded`.
        """

        def cut(parent: nn.Module, name: str, module: Any) -> None:
            if type(module).__name__ in blocks:
                self._cut(module, deal)

        hook = register_module_module_registration_hook(cut)
        try:
            yield
        finally:
            hook.remove()

    def _cut(self, block: nn.Module, deal: Deal | None) -> None:
        if self.tensor > 1:
            assert deal is not None
            deal(block, self._weights["tensor"])
        fully_shard(block, mesh=self._shards)

    @cached_property
    def _shards(self) -> DeviceMesh:
        return self._mesh(self.size) if self.tensor == 1 else self._weights["shards"]


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


def in_shards(model: nn.Module, made: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Fill ``made``, whose tensors are on the meta device, with those of ``model``; both in shards.

    Each process copies its own shards, and nothing is sent but what experts are copied from.

    Args:
        model: in shards over the processes over which ``made`` is.
        made: has tensors of the same names, and those of ``new``. One with a dimension more has a
            copy in each entry of it; the whole tensor is sent for that, of one at a time.
        new: whole, and the same in every process.
    """
    old, state = model.state_dict(), {}
    for name, x in made.state_dict().items():
        if name in old and old[name].shape == x.shape:
            state[name] = old[name].detach().clone()
            continue
        assert isinstance(x, DTensor)
        whole = new[name] if name in new else old[name].full_tensor().detach().expand(x.shape)
        state[name] = distribute_tensor(whole, x.device_mesh, x.placements, src_data_rank=None)
    made.load_state_dict(state, strict=True, assign=True)


def local(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Gradients of this micro-batch stay in the process unless it is the last of its step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        return nullcontext()
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def _is_of_others(error: BaseException | None) -> bool:
    """Whether it, or what led to it, came from the communication with other processes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, dist.DistError) or any(x in str(error) for x in ("gloo/", "NCCL")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _told(rank: int, size: int, timeout: float) -> str:
    """What happened, as far as those know who noticed it: the others are those that are missed."""
    remedy = (
        "see what it last said, and why it died or hangs; the same command goes on from the last "
        "checkpoint, also with another number of processes"
    )
    try:
        with _patient():
            silent = _silent(rank, size, _NOTICE)
    except dist.DistError:
        return f"process {rank}: the machine of process 0 does not answer; {remedy}"
    if not silent:
        return f"process {rank}: all processes are there, but have lost each other; {remedy}"
    names = ", ".join(map(str, silent))
    named = f"process {names} does" if len(silent) == 1 else f"processes {names} do"
    return f"process {rank}: {named} not answer (timeout={timeout:g} s); {remedy}"


@contextmanager
def _patient() -> Iterator[None]:
    """Not ended by SIGTERM, which torchrun sends as soon as it sees that a process has died."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _silent(rank: int, size: int, seconds: float) -> list[int]:
    """Those that do not say within so many seconds that they have noticed something too."""
    store, end = _get_default_store(), time.monotonic() + seconds
    store.set(f"noticed/{rank}", "")
    while True:
        silent = [each for each in range(size) if not store.check([f"noticed/{each}"])]
        if not silent or time.monotonic() > end:
            return silent
        time.sleep(0.1)
