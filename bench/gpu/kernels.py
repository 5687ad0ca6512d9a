"""Which Triton kernels the measurements need: counted without a GPU, and compiled beforehand.

The launchers run on meta tensors, which have shapes and no memory. What they would launch is
recorded and specialised by Triton's own rules, so what comes out is what Triton would compile on
the device, once each. Compiling starts nothing on the GPU.

``python -m skiparse.bench.gpu.kernels`` prints how many kernels each run compiles, by whose ptxas.
With ``--compile 1 timings 3 12`` it compiles every twelfth, from the third on, into Triton's cache.
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from skiparse.backends import Inputs, Outputs
from skiparse.bench.op.cases import Case
from skiparse.pattern import GridPattern, SkipPattern

ARCHITECTURE = "sm_90"
TARGET = ("cuda", 90, 32)


@dataclass(frozen=True)
class Call:
    """One use of a backend with kernels: the same call always compiles the same."""

    backend: str  # "triton", "triton.pingpong", "pack", or "triton" with other tiles
    pattern: SkipPattern | GridPattern
    B: int
    N: int
    T: int
    H: int
    D: int
    dtype: torch.dtype
    backward: bool


def call_of(case: Case, backend: str, dtype: torch.dtype) -> Call:
    """What a case asks of a backend."""
    return Call(
        backend, case.pattern, case.B, case.N, case.T, case.heads, case.D, dtype, case.backward
    )


@dataclass(frozen=True)
class Kernel:
    """One compilation: Triton's name for the kernel, and all that tells it from another."""

    name: str
    key: str
    source: Any
    options: dict[str, Any]


def kernels_of(calls: Sequence[Call]) -> list[Kernel]:
    """The kernels that the calls compile, each once, in the order in which they are met."""
    found: dict[str, Kernel] = {}
    for call in dict.fromkeys(calls):
        for launch in launches(call):
            kernel = specialised(*launch)
            found.setdefault(kernel.key, kernel)
    return list(found.values())


def launches(call: Call) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What a call would launch on the device: ``(kernel, arguments, options)`` each."""
    B, N, T, H, D, n = call.B, call.N, call.T, call.H, call.D, call.pattern.sparsity

    def empty(*shape: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (empty(B, N, H, D) for _ in range(3))
    text_q, text_k, text_v = (empty(B, T, H, D) for _ in range(3))
    inputs = Inputs(q, k, v, text_q, text_k, text_v, None, None, call.pattern, D**-0.5)
    with recording() as recorded:
        if call.backend == "pack":
            _pack(inputs, empty)
            return recorded
        name = "pingpong_kernel" if call.backend == "triton.pingpong" else "forward_kernel"
        with tiles(call.backend):
            importlib.import_module(f"skiparse.backends.triton.{name}").forward(inputs)
        if call.backward:
            from skiparse.backends.triton import backward_kernel

            lse, text_lse = (
                empty(B, H, N, dtype=torch.float32),
                empty(B, H, n, T, dtype=torch.float32),
            )
            outputs = Outputs(empty(B, N, H, D), empty(B, n, T, H, D), lse, text_lse)
            backward_kernel.backward(inputs, outputs, outputs.out, outputs.text_out)
    return recorded


def _pack(inputs: Inputs, empty: Any) -> None:
    """Packing with norms and rotation, and its gradient."""
    from skiparse.backends.triton import pack_kernel
    from skiparse.models.suv.rope import axis_dims

    video, text = (inputs.q, inputs.k, inputs.v), (inputs.text_q, inputs.text_k, inputs.text_v)
    (_, N, _, D), p = inputs.q.shape, inputs.pattern
    assert isinstance(p, SkipPattern)  # a grid is not packed
    norms = [empty(D) for _ in range(2)]
    angles = [empty(N, D // 2, dtype=torch.float32) for _ in range(2)]
    others = (norms, norms, *angles, axis_dims(D), 1e-6, p.sparsity, p.run)
    packed = pack_kernel.forward(video, text, *others)
    pack_kernel.backward(packed, video[:2], text[:2], *others)


TILES: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {  # of the forward, other than its own
    "triton.pointers": {},
    "triton.short": {ARCHITECTURE: {128: (128, 64, 8, 3)}},
}


@contextlib.contextmanager
def tiles(backend: str) -> Iterator[None]:
    """The forward kernel with the tiles that ``backend`` names: its own unless in ``TILES``."""
    from skiparse.backends.triton import device, forward_kernel

    if backend not in TILES:
        yield
        return
    configs = {
        row: {D: device.Config(*config) for D, config in table.items()}
        for row, table in TILES[backend].items()
    }
    with mock.patch.object(forward_kernel, "TMA_CONFIGS", configs):
        yield


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches are noted instead of made, and the device is a Hopper GPU."""
    from triton.runtime.jit import JITFunction

    from skiparse.backends.triton import device, pack_kernel

    recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        recorded.append((kernel, arguments, options))

    def hopper(q: torch.Tensor) -> str:
        return ARCHITECTURE

    def multiprocessors(q: torch.Tensor) -> int:
        return 132  # any number: it is the grid's, not a kernel's

    with (
        mock.patch.object(JITFunction, "run", note),
        mock.patch.multiple(
            device,
            architecture=hopper,
            exact_architecture=hopper,
            multiprocessors=multiprocessors,
        ),
        mock.patch.object(pack_kernel, "architecture", hopper),
    ):
        yield recorded


def specialised(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Kernel:
    """A launch as Triton would compile it, by its own rules of what is compiled in."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget(*TARGET))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {**options, "debug": False, "instrumentation_mode": ""}
    bound, specialization, rest = bind(*arguments, **options)
    parsed, signature, constants, attrs = kernel._pack_args(
        backend, options, bound, specialization, rest
    )
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constants, attrs)
    return Kernel(
        kernel.__name__, f"{source.hash()} {parsed.hash()}", source, dict(parsed.__dict__)
    )


def compile_kernel(kernel: Kernel) -> Any:
    """Compile for the device and keep it in Triton's cache, where a launch will find it."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(kernel.source, target=GPUTarget(*TARGET), options=kernel.options)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    from skiparse.bench.gpu import model, plan

    parser = argparse.ArgumentParser(prog="skiparse.bench.gpu.kernels", description=__doc__)
    parser.add_argument("--compile", nargs=4, metavar=("RUN", "POOL", "I", "OF"))
    options = parser.parse_args(arguments)
    if options.compile is None:
        counts = {
            run: {pool: len(kernels_of(plan.calls_of(run, pool))) for pool in model.POOLS}
            for run in plan.RUNS
        }
        print(json.dumps(counts))
        return 0
    run, pool, first, step = options.compile
    for kernel in kernels_of(plan.calls_of(run, pool))[int(first) :: int(step)]:
        start = time.monotonic()
        compiled = compile_kernel(kernel)
        if torch.cuda.is_available():
            compiled._init_handles()  # builds the launcher and loads the kernel; starts nothing
        print(f"compiled {kernel.name} in {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
