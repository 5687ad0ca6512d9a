"""What the kernels should take on an Atlas A2 by the cost model of the twin. Nothing is measured.

``python -m csrc.twin.model`` prints it for the headline shape.
"""

from __future__ import annotations

import ctypes
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from csrc.twin import launch
from skiparse import SkipPattern
from skiparse.backends import Inputs
from skiparse.pattern import attention_flops

CLOCK = 1.8e9  # of the 910B2 and 910B3
CUBE_FLOPS = 8192  # a cycle of a cube core in 16 bits
QUERY_ROWS = 256  # of a task; csrc/ascend/tiling.h
SAMPLED_STACKS = 60  # of a core, of which the rest is extrapolated
STACK_KEYS = 1024


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
    library: ctypes.CDLL,
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

    l2, hbm, l2_bytes = launch.device(library, guess)
    # The workspace stays in the L2; so do keys and values, if those of all cores fit beside it.
    keys = max(shape.pattern.lengths(shape.N)) + shape.T
    fits = workspace + cores * keys * 2 * shape.D * 2 <= l2_bytes
    from_hbm = sum(
        min(size, more.buffers[name].size) if fits else size
        for name, size in moved.items()
        if name not in ("workspace", "bias")
    )
    return Projection(
        core=(biases + cycles) / clock,
        l2=sum(moved.values()) / l2,
        hbm=from_hbm / hbm,
        busy=busy,
        flops=attention_flops(shape.pattern, shape.N, shape.T, shape.B, shape.H, shape.D),
    )


def patterns() -> list[SkipPattern]:
    """Of the headline."""
    sparse = [kind(k) for k in (2, 4, 8) for kind in (SkipPattern.single, SkipPattern.group)]
    return [SkipPattern.dense(), *sparse]


def name_of(pattern: SkipPattern) -> str:
    if pattern.sparsity == 1:
        return "dense"
    return f"{'single' if pattern.run == 1 else 'group'} {pattern.sparsity}"


def table(library: ctypes.CDLL, cores: int, variant: int = 0) -> list[str]:
    """A line for each pattern of the headline shape."""
    lines = []
    for pattern in patterns():
        shape = Shape(pattern)
        fast, typical, slow = (
            project(library, shape, cores=cores, guess=guess, variant=variant)
            for guess in ("fast", "typical", "slow")
        )
        used = ", ".join(
            f"{pipe} {busy / typical.seconds:.0%}" for pipe, busy in typical.busy.items() if busy
        )
        lines.append(
            f"MODEL {name_of(pattern):8s} {cores} cores: {typical.tflops:.0f} TFLOP/s "
            f"({slow.tflops:.0f} to {fast.tflops:.0f}), {typical.seconds * 1e3:.1f} ms "
            f"({fast.seconds * 1e3:.1f} to {slow.seconds * 1e3:.1f}); limit: {typical.limit}; "
            f"core {typical.core * 1e3:.1f}, L2 {typical.l2 * 1e3:.1f}, "
            f"HBM {typical.hbm * 1e3:.1f} ms; busy: {used}"
        )
    return lines


def main() -> None:
    print("MODEL, not measured: forward, 36,864 video and 512 text tokens, 24 heads of 128, bf16,")
    print("MODEL at 1.8 GHz; in brackets, what the uncertain figures of csrc/twin/cost.h allow")
    with tempfile.TemporaryDirectory() as folder:
        library = launch.build(Path(folder))
        for cores in (24, 20):
            for line in table(library, cores):
                print(line, flush=True)


if __name__ == "__main__":
    main()
