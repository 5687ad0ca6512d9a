"""What each step would take on a GPU nobody has measured yet: a MODEL, slow on purpose.

Compilations are counted (``kernels``), and their seconds were measured on a CPU. Everything else
follows from floating-point operations, repetitions and the assumed rates below, each of which is
meant to be slower than the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from skiparse.bench.gpu.driver import AGAIN
from skiparse.bench.gpu.lab import SAMPLE_MS
from skiparse.bench.op.cases import CASES, HEADLINE, Case
from skiparse.pattern import SkipPattern, attention_flops

START = 15.0  # seconds until the first process has torch, nothing being in memory yet
END = 10.0  # the table, and the compiled kernels in one file
STEP = 0.5  # of a step beside what is computed: printing, a row written and synced
POOLS = {"timings": 12, "bundled": 3}  # processes that compile, by whose ptxas; of 16 cores
POOL_LIMIT = 60.0  # seconds; what is not compiled then is when it is used
# Seconds to compile a kernel for sm_90 on one core: measured 0.1 to 1.7, ping-pong 3.6, with
# Triton 3.6.0 on a CPU shared with others; building the launcher and loading it come on top.
COMPILE = 5.0
MEAN_COMPILE = 2.5  # of many: measured 1.3, launcher and loading on top
CORES = 16
TESTED = 20.0  # what the tests compute, eager attention in fp64 mostly
MEMCHECK = 40.0  # a process that starts and computes under a checker, ten times as slow
PLAN = {False: 2.0, True: 5.0}  # the first call of a library that chooses and may build kernels
GATE = {False: 0.7, True: 2.0}  # at the headline shape, by whether gradients are compared
COPY = 1.0e12  # bytes a second, read and written, of what is rearranged
# TFLOP/s forward and backward; public figures are 1.3 to 2 times as high.
RATES = {
    "dense.cudnn": (450, 350),
    "dense.flash": (300, 200),
    "views.cudnn": (400, 300),
    "views.flash": (250, 180),
    "sdpa": (350, 250),
    "triton": (300, 170),
    "triton.pointers": (250, 170),
    "triton.short": (250, 170),
    "triton.pingpong": (300, 170),
    "flex": (200, 120),
}


def once(case: Case, name: str) -> float:
    """Seconds of one call."""
    pattern = SkipPattern.dense() if name.startswith("dense") else case.pattern
    forward, backward = RATES[name]
    shape = (case.N, case.T, case.B, case.heads, case.D)
    seconds = attention_flops(pattern, *shape) / forward / 1e12
    if case.backward:
        seconds += attention_flops(pattern, *shape, backward=True) / backward / 1e12
    return seconds


def turns(calls: Sequence[float], rounds: int) -> float:
    """Seconds of contenders that take turns, from those of a call of each."""
    return sum(2 * call + rounds * sample(call) for call in calls)


def sample(call: float) -> float:
    """Seconds of a sample: one call, and as many more as fill the least if it is shorter."""
    least = SAMPLE_MS / 1e3
    return call if call >= least else 2 * call + least


def gate(case: Case) -> float:
    """Seconds until a case is known to be right: a sample of rows, and all gradients."""
    head = CASES[f"{HEADLINE}.dense.fwd"]
    share = case.N * case.heads / (head.N * head.heads)
    return GATE[case.backward] * max(share, 0.1)


def plan(case: Case, name: str) -> float:
    """Seconds that cuDNN takes for a shape it has not met; FlashAttention's kernels lie ready."""
    return PLAN[case.backward] if name in ("dense.cudnn", "views.cudnn", "sdpa") else 0.0


def compiled(kernels: Mapping[str, int]) -> float:
    """Seconds until so many kernels are compiled by each pool, side by side."""
    turns = max(math.ceil(kernels[pool] / processes) for pool, processes in POOLS.items())
    return AGAIN + turns * COMPILE


def tests(kernels: int) -> float:
    """Seconds of the tests in as many processes as cores, all of which start at once."""
    return 2 * START + kernels / CORES * MEAN_COMPILE + TESTED


def alone(case: Case, name: str, rounds: int) -> float:
    """Seconds of a contender by itself: the gate, a library's first call, its turns."""
    return plan(case, name) + gate(case) + turns([once(case, name)], rounds)


def beside_dense(case: Case, name: str, rounds: int) -> float:
    """Seconds of a step: the same in turn with the best dense kernel."""
    return STEP + alone(case, name, rounds) + turns([once(case, "dense.cudnn")], rounds)
