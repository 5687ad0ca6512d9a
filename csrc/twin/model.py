"""What the kernels should take on an Atlas A2 by the cost model of the twin. Nothing is measured.

The band is that of the uncertain figures of cost.h, all fast or all slow. Not in the model: how
cores queue for the L2 (it is a floor), bank conflicts of UB, instruction fetches, the launch.

``python -m csrc.twin.model`` prints it for the headline shape.
"""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from csrc.twin import launch
from skiparse import SkipPattern
from skiparse.backends import Inputs, Outputs
from skiparse.pattern import attention_flops

CLOCK = 1.8e9  # of the 910B2 and 910B3
CUBE_FLOPS = 8192  # a cycle of a cube core in 16 bits
QUERY_ROWS = 256  # of a task; csrc/ascend/tiling.h
SAMPLED_STACKS = 60  # of a core, of which the rest is extrapolated
STACK_KEYS = 1024

# Of the library's attention on a 910B2, published: torch_npu's at 32K tokens of one head, its
# likeliest value here; the least and the most are of other shapes and of an A3.
LIBRARY_TFLOPS: dict[launch.Guess, float] = {"slow": 135.0, "typical": 150.8, "fast": 176.0}


@dataclass(frozen=True)
class Shape:
    """Of one attention problem in 16 bits, tensors ``[B, N, H, D]`` and ``[B, T, H, D]``."""

    pattern: SkipPattern
    N: int = 36864
    T: int = 512
    H: int = 24
    D: int = 128
    B: int = 1
    dtype: torch.dtype = torch.bfloat16

    def inputs(self) -> Inputs:
        """Tensors without data."""
        video, text = (
            torch.empty(self.B, rows, self.H, self.D, dtype=self.dtype, device="meta")
            for rows in (self.N, self.T)
        )
        scale = self.D**-0.5
        return Inputs(video, video, video, text, text, text, None, None, self.pattern, scale)

    def outputs(self) -> Outputs:
        """Of a forward pass, without data."""
        B, N, T, H, D, n = self.B, self.N, self.T, self.H, self.D, self.pattern.sparsity
        return Outputs(
            torch.empty(B, N, H, D, dtype=self.dtype, device="meta"),
            torch.empty(B, n, T, H, D, dtype=self.dtype, device="meta"),
            torch.empty(B, H, N, device="meta"),
            torch.empty(B, H, n, T, device="meta"),
        )

    def flops(self, backward: bool = False) -> int:
        """Counted as skiparse.pattern does."""
        sizes = (self.N, self.T, self.B, self.H, self.D)
        return attention_flops(self.pattern, *sizes, backward=backward)

    def keys(self) -> int:
        """Of the longest sub-sequence."""
        return max(self.pattern.lengths(self.N)) + self.T

    def tasks(self) -> int:
        """Tasks of the kernel, as csrc/ascend/tiling.h counts them."""
        longest = max(self.pattern.lengths(self.N))
        tiles = math.ceil(longest / QUERY_ROWS) + math.ceil(self.T / QUERY_ROWS)
        return self.B * self.H * self.pattern.sparsity * tiles

    def stacks(self) -> int:
        """Stacks of keys of the longest task."""
        return math.ceil((max(self.pattern.lengths(self.N)) + self.T) / STACK_KEYS)


@dataclass(frozen=True)
class Projection:
    """MODEL: seconds that the busiest core and what the cores share need; ``busy`` by pipe."""

    core: float
    l2: float
    hbm: float
    busy: dict[str, float]
    flops: int

    @property
    def seconds(self) -> float:
        """All of them work at once, so the slowest decides."""
        return max(self.core, self.l2, self.hbm)

    @property
    def limit(self) -> str:
        """What decides: the L2, the HBM, or a core and then its busiest pipe."""
        if self.seconds > self.core:
            return "L2" if self.l2 > self.hbm else "HBM"
        return max(self.busy, key=lambda pipe: self.busy[pipe])

    @property
    def tflops(self) -> float:
        """Counted as skiparse.pattern does, per second."""
        return self.flops / self.seconds / 1e12


def project(
    library: ModuleType,
    shape: Shape,
    *,
    cores: int = 24,
    clock: float = CLOCK,
    guess: launch.Guess = "typical",
    half_scores: bool = False,
    variant: int = 0,
) -> Projection:
    """Forward. A few tasks of one core are counted at the true strides, the rest extrapolated."""
    inputs, tasks = shape.inputs(), shape.tasks()
    few = min(math.ceil(SAMPLED_STACKS / shape.stacks()), tasks // 3)
    splits = math.ceil(tasks / few), math.ceil(tasks / (3 * few))
    first, second = (tasks // split for split in splits)  # tasks of core 0
    less, more = (
        launch.forward_costs(
            library,
            inputs,
            cores=split,
            guess=guess,
            core=0,
            half_scores=half_scores,
            variant=variant,
        )
        for split in splits
    )

    def extrapolate(a: float, b: float, to: int) -> float:
        return a + (b - a) * (to - first) / (second - first)

    busiest = math.ceil(tasks / cores)
    cycles = extrapolate(less.cycles(1), more.cycles(1), busiest)
    busy: dict[str, float] = {}
    for a, b in zip(less.lanes, more.lanes, strict=True):
        for pipe in a.busy if a.launch == 1 else ():
            name = f"{'cube' if a.lane == 'cube' else 'vector'} {pipe}"
            used = extrapolate(a.busy[pipe], b.busy[pipe], busiest) / clock
            busy[name] = max(busy.get(name, 0.0), used)
    moved = {
        name: extrapolate(less.buffers[name].moved, more.buffers[name].moved, tasks)
        for name in more.buffers
    }
    workspace = more.buffers["workspace"].size / splits[1] * cores
    bias_rows = shape.B * shape.pattern.sparsity * shape.stacks()
    biases = less.cycles(0) / math.ceil(bias_rows / splits[0]) * math.ceil(bias_rows / cores)
    return Projection(
        core=(biases + cycles) / clock,
        l2=sum(moved.values()) / launch.device(library, guess)[0],
        hbm=_from_hbm(library, shape, cores, guess, moved, more, workspace),
        busy=busy,
        flops=shape.flops(),
    )


def project_backward(
    library: ModuleType,
    shape: Shape,
    *,
    cores: int = 24,
    clock: float = CLOCK,
    guess: launch.Guess = "typical",
) -> Projection:
    """All kernels of the backward pass on the core that has the most of them, which is the last."""
    costs = launch.backward_costs(
        library, shape.inputs(), shape.outputs(), cores=cores, guess=guess, core=cores - 1
    )
    sequences = shape.B * shape.H * shape.pattern.sparsity
    share = math.ceil(sequences / cores) / sequences  # of all, on that core
    launches = {lane.launch for lane in costs.lanes}
    busy: dict[str, float] = {}
    for lane in costs.lanes:
        for pipe, cycles in lane.busy.items() if lane.launch == 2 else ():
            name = f"{'cube' if lane.lane == 'cube' else 'vector'} {pipe}"
            busy[name] = max(busy.get(name, 0.0), cycles / clock)
    moved = {name: buffer.moved / share for name, buffer in costs.buffers.items()}
    workspace = costs.buffers["workspace"].size
    return Projection(
        core=sum(costs.cycles(i) for i in launches) / clock,
        l2=sum(moved.values()) / launch.device(library, guess)[0],
        hbm=_from_hbm(library, shape, cores, guess, moved, costs, workspace),
        busy=busy,
        flops=shape.flops(backward=True),
    )


def _from_hbm(
    library: ModuleType,
    shape: Shape,
    cores: int,
    guess: launch.Guess,
    moved: dict[str, float],
    costs: launch.Costs,
    workspace: float,
) -> float:
    """Seconds. The workspace stays in the L2 if it fits, keys and values if they fit beside it."""
    _, hbm, l2 = launch.device(library, guess)
    all_fit = workspace + cores * shape.keys() * 2 * shape.D * 2 <= l2
    moved = {
        name: min(size, costs.buffers[name].size) if all_fit else size
        for name, size in moved.items()
        if name != "workspace" or workspace > l2
    }
    return sum(moved.values()) / hbm


def rearranging(library: ModuleType, shape: Shape, guess: launch.Guess = "typical") -> float:
    """Seconds of the other way: copies to and from contiguous sub-sequences with the text in each,
    and the library's attention over them at its published rates.

    Each copy reads and writes once, at the rate of the HBM. Dense attention needs none but of text.
    """
    _, hbm, _ = launch.device(library, guess)
    row = shape.B * shape.H * shape.D * 2
    n = shape.pattern.sparsity
    copied = (0 if n == 1 else 4 * 2 * shape.N) + 4 * (n + 1) * shape.T  # q, k, v and the output
    return copied * row / hbm + shape.flops() / LIBRARY_TFLOPS[guess] / 1e12


def patterns() -> list[SkipPattern]:
    """Of the headline."""
    sparse = [kind(k) for k in (2, 4, 8) for kind in (SkipPattern.single, SkipPattern.group)]
    return [SkipPattern.dense(), *sparse]


def name_of(pattern: SkipPattern) -> str:
    if pattern.sparsity == 1:
        return "dense"
    return f"{'single' if pattern.run == 1 else 'group'} {pattern.sparsity}"


def line(pattern: SkipPattern, what: str, of: Callable[..., Projection], peak: float) -> str:
    """One projection with its band."""
    fast, typical, slow = (of(guess=guess) for guess in launch.GUESSES)
    used = ", ".join(
        f"{pipe} {busy / typical.seconds:.0%}" for pipe, busy in typical.busy.items() if busy
    )
    return (
        f"MODEL {name_of(pattern):8s} {what}: {typical.tflops:.0f} TFLOP/s "
        f"({slow.tflops:.0f} to {fast.tflops:.0f}), {typical.tflops * 1e12 / peak:.0%} of peak, "
        f"{typical.seconds * 1e3:.1f} ms ({fast.seconds * 1e3:.1f} to {slow.seconds * 1e3:.1f}); "
        f"limit: {typical.limit}; core {typical.core * 1e3:.1f}, L2 {typical.l2 * 1e3:.1f}, "
        f"HBM {typical.hbm * 1e3:.1f} ms; busy: {used}"
    )


def break_even(library: ModuleType, pattern: SkipPattern) -> str:
    """What the fused forward must reach to take as long as rearranging, and what it does."""
    shape = Shape(pattern)
    needed = shape.flops() / rearranging(library, shape) / 1e12
    of_library = LIBRARY_TFLOPS["typical"]
    fused = project(library, shape).tflops
    return (
        f"MODEL {name_of(pattern):8s} breaks even at {needed:.0f} TFLOP/s, "
        f"{needed / of_library:.1%} of a library that reaches {of_library:.0f}; "
        f"projected {fused:.0f}, "
        f"{fused / needed - 1:+.1%}"
    )


def main() -> None:
    print("MODEL, not measured: 36,864 video and 512 text tokens, 24 heads of 128, bf16, 1.8 GHz;")
    print("MODEL in brackets, what the uncertain figures of csrc/twin/cost.h allow")
    with tempfile.TemporaryDirectory() as folder:
        library = launch.load(Path(folder))
        for cores, pattern in itertools.product((24, 20), patterns()):
            shape, peak = Shape(pattern), cores * CUBE_FLOPS * CLOCK
            forward = functools.partial(project, library, shape, cores=cores)
            fast = functools.partial(forward, half_scores=True)
            backward = functools.partial(project_backward, library, shape, cores=cores)
            for what, of in (("forward", forward), ("half scores", fast), ("backward", backward)):
                print(line(pattern, f"{cores} cores, {what}", of, peak), flush=True)
        for pattern in patterns():
            print(break_even(library, pattern), flush=True)


if __name__ == "__main__":
    main()
