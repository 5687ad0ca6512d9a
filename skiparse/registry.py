"""Which backends there are, and which one a call gets.

Named explicitly, a backend runs or raises with its reason. ``"auto"`` takes the first row of
``BACKENDS`` that lists the device and accepts the problem; if none does, the error gives every
reason. No environment variable, no fallback, no reference backend on an accelerator.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from skiparse.backends import Backend, Inputs


@dataclass(frozen=True)
class Row:
    """A backend: its name, the device types on which ``"auto"`` may take it, and its standing."""

    name: str
    auto: tuple[str, ...]
    what: str
    verified: str


BACKENDS = (
    Row(
        "sdpa",
        ("cpu", "cuda"),
        "PyTorch's own attention kernels, through views where the pattern allows",
        "CPU: every test. CUDA: not yet run on a GPU",
    ),
    Row(
        "triton",
        ("cuda",),
        "fused kernels, text as a second key source, deterministic backward",
        "interpreter: every test; sm_80, sm_90, gfx942: compiled ahead of time. "
        "Not yet run on a GPU",
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
    reasons = []
    for row in BACKENDS:
        if device in row.auto:
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
