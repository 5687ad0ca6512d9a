"""Which backends there are, and which one a call gets.

Named explicitly, a backend runs or raises with its reason. ``"auto"`` takes the first row of
``BACKENDS`` that lists the device and accepts the problem; if none does, the error gives every
reason. No environment variable, no fallback, no reference backend on an accelerator.

A file in ``orders/`` that ``skiparse tune`` wrote on a device, with the times it measured, puts
those that accept in another order there: for problems like the measured ones, the forward and the
backward pass each by itself. Nothing is measured when attention runs.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from skiparse.backends import Backend, Inputs
from skiparse.pattern import GridPattern, SkipPattern


@dataclass(frozen=True)
class Row:
    """A backend: its name, the device types on which ``"auto"`` may take it, and its standing.

    On those of ``if_measured`` it may only where an order measured on the device names it.
    With text it may copy all rows into one buffer on a GPU, ``copies_text``; then a model does
    better to pack them itself. ``pack_kernels`` is the module that packs by kernels of its own.
    """

    name: str
    auto: tuple[str, ...]
    what: str
    verified: str
    copies_text: bool = False
    pack_kernels: str | None = None
    if_measured: tuple[str, ...] = ()

    @property
    def chosen_on(self) -> list[str]:
        """Where ``"auto"`` may take it, in words."""
        return [*self.auto, *(f"{device} if measured" for device in self.if_measured)]


BACKENDS = (
    Row(
        "sdpa",
        ("cpu", "cuda"),
        "PyTorch's own attention kernels, through views where the pattern allows",
        "CPU: every test. CUDA: not yet run on a GPU",
        copies_text=True,
    ),
    Row(
        "triton",
        ("cuda",),
        "fused kernels, text as a second key source, deterministic backward",
        "interpreter: every test; sm_80 and sm_90a: the compiled PTX executed on a CPU; compiled "
        "ahead of time for sm_89, sm_100, sm_120, gfx942, gfx950. Not yet run on a GPU",
        pack_kernels="skiparse.backends.triton.pack_kernel",
    ),
    Row(
        "triton.pingpong",
        (),
        "the same with another forward for Hopper: producer and consumer warps",
        "CPU: its schedule, on a model of barriers and copies; sm_90a: the compiled PTX executed "
        "on a CPU. Not yet run on a GPU",
        if_measured=("cuda",),
    ),
    # The fused kernels are not chosen by themselves until they are measured to be faster.
    Row(
        "npu_fusion",
        ("npu",),
        "torch_npu's fused attention, through views where the pattern allows",
        "CPU: against a fake of the library, made from its documentation. Never run on an NPU",
        copies_text=True,
    ),
    Row(
        "ascendc",
        (),
        "fused AscendC kernels for Atlas A2 and A3, built on request; deterministic backward",
        "CPU: the kernels on a host twin, the host side against torch_npu's headers. "
        "Never run on an NPU",
    ),
    Row(
        "ascendc.half_scores",
        (),
        "the same with a forward whose scores pass through memory in fp16: faster, less exact",
        "CPU: the kernel on a host twin. Never run on an NPU",
    ),
    Row(
        "reference",
        ("cpu",),
        "the definition, written to be read; fp64",
        "CPU: every test",
    ),
)


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or a backend's."""
    names = ["auto", *(row.name for row in BACKENDS)]
    if name not in names:
        raise ValueError(f"backend must be one of {names}, got {name!r}")


def load(name: str) -> Backend:
    """The module of a backend in ``BACKENDS``."""
    return cast(Backend, importlib.import_module(f"skiparse.backends.{name}"))


ORDERS = Path(__file__).with_name("orders")
FURTHEST = 2.0  # times longer or shorter than measured a sub-sequence may be


def order(first: Sequence[str]) -> Sequence[Row]:
    """The rows of ``BACKENDS`` as ``"auto"`` tries them: those named ``first``, then the others."""
    return sorted(BACKENDS, key=lambda row: first.index(row.name) if row.name in first else 99)


def measured_order(inputs: Inputs, *, backward: bool) -> Sequence[str]:
    """The backends measured on the device for problems like this, the fastest first."""
    rules = measured(device_name(inputs.q))
    if not rules:
        return ()
    alike = problem_like(inputs, backward=backward)
    length = alike.pop("length")

    def distance(rule: dict[str, Any]) -> float:
        return abs(math.log(length / rule["length"])) if length else math.inf

    nearest = min(
        (rule for rule in rules if all(rule[key] == value for key, value in alike.items())),
        key=distance,
        default=None,
    )
    if nearest is None or distance(nearest) > math.log(FURTHEST):
        return ()
    names: list[str] = nearest["order"]
    return names


def problem_like(inputs: Inputs, *, backward: bool) -> dict[str, Any]:
    """What decides which backend is fastest, as the files in ``orders/`` spell it."""
    pattern, N = inputs.pattern, inputs.q.shape[1]
    boxes = [box for segment in pattern.segments(N) for box in segment.boxes]
    if pattern.sparsity == 1:
        kind = "dense"
    elif isinstance(pattern, GridPattern):
        kind = "grid"
    elif isinstance(pattern, SkipPattern) and pattern.run == 1:
        kind = "single"
    else:
        kind = "block" if all(box.shape[1] == 1 for box in boxes) else "group"
    return {
        "pass": "backward" if backward else "forward",
        "kind": kind,
        "text": inputs.text_q.shape[1] > 0,
        "dtype": str(inputs.q.dtype).removeprefix("torch."),
        "head_dim": inputs.q.shape[-1],
        "length": N / pattern.sparsity,
    }


def device_name(x: Tensor) -> str:
    """The name of the device ``x`` is on, as its maker gives it."""
    return torch.cuda.get_device_name(x.device) if x.device.type == "cuda" else x.device.type


def orders_file(device: str) -> Path:
    """Where the measurements of a device are kept."""
    return ORDERS / f"{re.sub('[^a-z0-9]+', '-', device.lower())}.json"


@functools.cache
def measured(device: str) -> tuple[dict[str, Any], ...]:
    """The rules measured on a device; none if nobody did."""
    path = orders_file(device)
    return tuple(json.loads(path.read_text())["rules"]) if path.exists() else ()


def select(name: str, inputs: Inputs, *, backward: bool = False) -> Backend:
    """The backend that runs this problem.

    Raises:
        RuntimeError: if the named backend cannot, or with ``"auto"`` none of the device's can.
    """
    if name != "auto":
        backend = load(name)
        reason = backend.why_not(inputs, backward=backward)
        if reason is not None:
            raise RuntimeError(f'backend "{name}" cannot run this: {reason}')
        return backend
    device = inputs.q.device.type
    first = measured_order(inputs, backward=backward)
    reasons = []
    for row in order(first):
        if device in row.auto or (device in row.if_measured and row.name in first):
            backend = load(row.name)
            reason = backend.why_not(inputs, backward=backward)
            if reason is None:
                return backend
        else:
            reason = f'not chosen by itself on "{device}"; name it to use it'
        reasons.append(f"\n  {row.name}: {reason}")
    raise RuntimeError(f'no backend for this on "{device}":' + "".join(reasons))


def list_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run on this machine, else the reason why not."""
    return {row.name: load(row.name).why_not() for row in BACKENDS}
