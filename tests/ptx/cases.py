"""Which launches are executed, how, and against what they are held.

A case is a problem and the ways to run it: ``(mode, seed)``. All ways must give the same bits, and
the first is held to the error budget of ``skiparse.testing``.
"""

import time

import torch

from ptx.run import Machine, attention
from skiparse import SkipPattern
from skiparse.backends.triton import pingpong_kernel
from skiparse.testing import check, make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE, GROUP = SkipPattern.single(2), SkipPattern.group(2)
LATE, EARLY = ("late", 1), ("early", 2)
DRAWN = [("random", seed) for seed in range(3, 6)]


class Runner:
    """Runs cases on one machine, and says of each what it counted and how long it took."""

    def __init__(self, arch):
        self.machine = Machine(arch)

    def attention(self, name, problem, ways, **how):
        """Raises unless the answers of all ways are one, within the budget."""
        first = None
        for mode, seed in ways:
            begin = time.perf_counter()
            answer = attention(self.machine, problem, mode=mode, seed=seed, **how)
            seconds = time.perf_counter() - begin
            if first is None:
                first = answer
                check(answer, problem)
            same = all(map(same_bits, first, answer))
            assert same, f"{name}: {mode} {seed} gives other bits than {ways[0]}"
            yield {"case": name, "mode": mode, "seed": seed, "seconds": round(seconds, 2)}


def same_bits(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def quick(runner):
    """What every run of the tests executes."""
    problem = make_problem(GROUP, N=20, T=3, H=1, D=16, dtype=BF16)
    yield from runner.attention("group D16", problem, [LATE])


def quick_pingpong(runner):
    problem = make_problem(SINGLE, N=20, T=0, H=1, D=64, dtype=BF16)
    how = {"kernel": pingpong_kernel, "backward": False}
    yield from runner.attention("one block", problem, [LATE], **how)


PARTS = {"quick": quick, "quick_pingpong": quick_pingpong}
