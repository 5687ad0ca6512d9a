"""How a call is launched without being worked out again: plans, kept by what they depend on.

A launcher allocates results and starts kernels. Which ones, on what grid, with which strides and
block sizes, follows from the shapes, strides, dtypes and alignment of its tensors and from its
settings, never from addresses. So it runs once on *operands*, tensors without memory, and what it
did is a plan; other calls of that kind look the plan up, allocate, and put their tensors in.

The first call of a plan goes through Triton, which specialises the kernels by its own rules and
compiles them; later ones start the compiled kernels. So the key of a plan holds all that those
rules look at: shapes and strides, which are the integers, dtypes, whether addresses are multiples
of 16 (on AMD also how large the memory is), the device, and the settings that Triton's own key has.
"""

# Triton has no type stubs, and launchers take operands for tensors:
# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

PLANS = 1024  # of some 10 KB each; a model has one for each pattern, direction and shape
ALIGNMENT = 16  # bytes; what Triton and tensor maps ask of an address

Key = tuple[torch.Size, tuple[int, ...], torch.dtype, int, bool] | None
Fill = Callable[[Sequence[Tensor]], Any]


class Launch(NamedTuple):
    """A kernel on so many programs, with its arguments and the rest of them by name."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]


class Trace:
    """What a launcher did: the tensors it allocated and the kernels it started, in order."""

    def __init__(self, given: int) -> None:
        self.given = given
        self.allocated: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.launches: list[Launch] = []

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Operand:
        self.allocated.append((shape, dtype))
        slot = self.given + len(self.allocated) - 1
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * max(size, 1))
        # Fresh memory is aligned: by 64 bytes on a CPU, by 256 and more on a GPU.
        return Operand(self, slot, shape, tuple(strides), dtype, 0, device)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Operand:
    """A tensor as a launcher sees it: everything but its memory."""

    trace: Trace
    slot: int  # its place among the tensors of a call, those given and then those allocated
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    residue: int  # its address modulo ALIGNMENT
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def stride(self, dim: int) -> int:
        return self.strides[dim]

    def element_size(self) -> int:
        return self.dtype.itemsize

    def data_ptr(self) -> int:
        """An address that is aligned as the tensor's."""
        return self.residue

    def storage_offset(self) -> int:
        """How many elements behind an aligned address it begins."""
        return self.residue // self.element_size()

    def as_strided(self, shape: Sequence[int], strides: Sequence[int]) -> Operand:
        """Another view that begins at the same address."""
        return dataclasses.replace(self, shape=tuple(shape), strides=tuple(strides))

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> Operand:
        return self.trace.allocate(shape, dtype or self.dtype, self.device)


def start(q: Tensor, launch: Launch) -> None:
    """Start a kernel on the device of ``q``; if that is an operand, make it a part of the plan."""
    if isinstance(q, Operand):
        q.trace.launches.append(launch)
    else:
        with torch.cuda.device_of(q):
            launch.kernel[(launch.programs,)](*launch.args, **launch.options)


class Step:
    """One launch of a plan; from the second on without Triton's front end."""

    def __init__(self, launch: Launch, places: Sequence[int]) -> None:
        self.kernel, programs, _, self.options = launch
        self.grid = (programs, 1, 1)
        self.places = places  # of its arguments among those of the plan
        self.run: Callable[..., None] | None = None
        self.rest: tuple[Any, ...] = ()  # the arguments by name, in the kernel's order

    def __call__(self, filled: Sequence[Any]) -> None:
        args = [filled[place] for place in self.places]
        if self.run is not None and not self.kernel.pre_run_hooks:
            self.run(*args, *self.rest)
            return
        compiled = self.kernel[self.grid](*args, **self.options)
        if isinstance(compiled, CompiledKernel):  # else an interpreter or a recorder ran it
            names = self.kernel.arg_names[len(args) :]
            self.rest = tuple(self.options[name] for name in names)
            self.run = compiled[self.grid]


def _fill(arg: Any) -> Fill:
    """The function that gives ``arg`` with tensors in the places of operands."""
    if isinstance(arg, Operand):
        slot = arg.slot
        return lambda tensors: tensors[slot]
    if isinstance(arg, tuple):
        first, *others = arg
        if isinstance(first, Operand) and all(isinstance(x, int) for x in others):
            return _fill_source(first.slot, others)
        fills = [_fill(x) for x in arg]
        return lambda tensors: tuple([fill(tensors) for fill in fills])
    if dataclasses.is_dataclass(arg) and isinstance(getattr(arg, "base", None), Operand):
        return _fill_descriptor(arg)
    return lambda _: arg


def _fill_source(slot: int, strides: Sequence[int]) -> Fill:
    return lambda tensors: (tensors[slot], *strides)


def _fill_descriptor(descriptor: Any) -> Fill:
    """The same for a tensor descriptor; it was checked when it was made, and is not again."""
    kind, fields, slot = type(descriptor), vars(descriptor), descriptor.base.slot

    def fill(tensors: Sequence[Tensor]) -> Any:
        filled = object.__new__(kind)
        filled.__dict__.update(fields, base=tensors[slot])
        return filled

    return fill


class Plan:
    """What a launcher did, to be done again with other tensors."""

    def __init__(self, trace: Trace, results: Sequence[Operand]) -> None:
        self.allocated = trace.allocated
        args = {id(arg): arg for launch in trace.launches for arg in launch.args}
        places = {of: place for place, of in enumerate(args)}  # launches have arguments in common
        self.fills = [_fill(arg) for arg in args.values()]
        self.steps = [
            Step(launch, [places[id(arg)] for arg in launch.args]) for launch in trace.launches
        ]
        self.results = [operand.slot for operand in results]

    def __call__(self, given: Sequence[Any]) -> list[Tensor]:
        q = given[0]
        fresh = [q.new_empty(shape, dtype=dtype) for shape, dtype in self.allocated]
        tensors = [*given, *fresh]
        filled = [fill(tensors) for fill in self.fills]
        with torch.cuda.device_of(q):
            for step in self.steps:
                step(filled)
        return [tensors[slot] for slot in self.results]


def planned(
    launcher: Callable[..., Sequence[Any]], tensors: Sequence[Tensor | None], *settings: Hashable
) -> list[Tensor]:
    """``launcher(tensors, *settings)``, by the plan for calls like this one.

    Args:
        launcher: a function of a module that allocates by ``tensors[0].new_empty``, starts kernels
            by :func:`start`, and returns what it allocated. It must do the same for equal settings
            and tensors of equal shape, strides, dtype and alignment.
        tensors: those it reads, on one device; None for one that is missing.
        settings: all else that it depends on.
    """
    q: Any = tensors[0]
    keys = tuple([None if x is None else _key(x) for x in tensors])
    return _plan(launcher, q.device, keys, settings, _compilation())(tensors)


def _key(x: Tensor) -> Key:
    # On AMD Triton compiles another kernel for memory beyond 2 GB.
    large = torch.version.hip is not None and x.untyped_storage().size() >= 2**31
    return x.shape, x.stride(), x.dtype, x.data_ptr() % ALIGNMENT, large


def _compilation() -> tuple[Hashable, ...]:
    """Triton's settings that are part of its own key of a kernel."""
    runtime = triton.knobs.runtime
    inspection = getattr(runtime, "add_stages_inspection_hook", None)  # since Triton 3.7
    inspected = None if inspection is None else inspection()
    return runtime.debug, triton.knobs.compilation.instrumentation_mode, inspected


@functools.lru_cache(PLANS)
def _plan(
    launcher: Callable[..., Sequence[Any]],
    device: torch.device,
    keys: tuple[Key, ...],
    settings: tuple[Hashable, ...],
    compilation: tuple[Hashable, ...],
) -> Plan:
    trace = Trace(len(keys))
    operands = [key and Operand(trace, slot, *key[:4], device) for slot, key in enumerate(keys)]
    return Plan(trace, launcher(operands, *settings))
