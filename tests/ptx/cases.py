"""Which launches are executed, how, and against what they are held.

A problem is run in several ways, ``(mode, seed)``: all must give the same bits, and they are held
to the error budget of ``skiparse.testing``. A part is a function of a ``Runner`` that gives a row
for each run.
"""

import time

import torch

from ptx import faults
from ptx.memory import Fault
from ptx.run import Machine, attention, inputs_of, tensors_of
from skiparse import SkipPattern, pack
from skiparse.backends.triton import forward_kernel, pack_kernel, pingpong_kernel
from skiparse.testing import budget, check, make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE, GROUP = SkipPattern.single(2), SkipPattern.group(2)
LATE, EARLY, DRAWN = ("late", 1), ("early", 2), ("random", 3)
ALL_WAYS = [LATE, EARLY, *(("random", seed) for seed in range(3, 7))]


class Runner:
    """Runs problems on one machine, and says what was run and how long it took."""

    def __init__(self, arch):
        self.machine = Machine(arch)

    def attention(self, name, problem, ways, **how):
        """A row for each way; raises unless all answers are one, within the budget."""
        first = None
        for way in ways:
            begin = self.begin()
            answer = attention(self.machine, problem, mode=way[0], seed=way[1], **how)
            row = self.row(name, way, begin)
            if first is None:
                first = answer
                check(answer, problem)
            assert all(map(same_bits, first, answer)), f"{name}: {way} gives other bits"
            yield row

    def pingpong(self, name, problem, ways):
        yield from self.attention(name, problem, ways, kernel=pingpong_kernel, backward=False)

    def pack(self, name, given, ways):
        """The same for packing and its gradient."""
        first = None
        for way in ways:
            begin = self.begin()
            answer = given.run(self.machine, mode=way[0], seed=way[1])
            row = self.row(name, way, begin)
            if first is None:
                first = answer
                given.check(answer)
            assert all(map(same_bits, first, answer)), f"{name}: {way} gives other bits"
            yield row

    def begin(self):
        self.machine.counts.clear()
        self.machine.edited.clear()
        return time.perf_counter()

    def row(self, name, way, begin):
        seconds = round(time.perf_counter() - begin, 2)
        return {"case": name, "way": way, "seconds": seconds, "counts": dict(self.machine.counts)}

    def caught(self, planted, run):
        """``run(mode=, seed=, edit=)`` raises with the fault, in one of a few ways."""
        for mode, seed in (LATE, EARLY, DRAWN):
            self.begin()
            try:
                run(mode=mode, seed=seed, edit=planted.edit)
            except (Fault, AssertionError) as error:
                assert self.machine.edited == {planted.kernel}, f"{planted} was not executed"
                return {
                    "kernel": planted.kernel,
                    "fault": planted.what,
                    "way": [mode, seed],
                    "caught": f"{type(error).__name__}: {error}",
                }
        raise AssertionError(f"{planted.kernel}: nobody noticed that {planted.what}")


def same_bits(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


class Packing:
    """Arguments of the packing kernels, and what is right."""

    def __init__(self, n, w, *, N, T, D, H=2, B=1, dtype=BF16, layout="contiguous"):
        pattern = SkipPattern(n, w)
        p = make_problem(pattern, B=B, N=N, T=T, H=H, D=D, dtype=dtype, layout=layout)
        generator = torch.Generator().manual_seed(1)
        norms = 0.5 + torch.rand(4, D, generator=generator)
        angles = 9 * torch.rand(N, D // 2, generator=generator)
        third = D // 48 * 16
        self.settings = ((D - 2 * third, third, third), 1e-6, n, w)
        self.norms = [norms[:2].to(dtype), norms[2:].to(dtype)]
        self.rows = [(p.q, p.k, p.v), (p.text_q, p.text_k, p.text_v)]
        self.turns = [angles.cos(), angles.sin()]
        packed = N + n * T
        self.grads = [torch.randn(B, packed, H, D, generator=generator).to(dtype) for _ in "qkv"]

    def tensors(self, dtype=None):
        def cast(xs):
            return tuple(x.to(dtype or x.dtype) for x in xs)

        return (*map(cast, self.rows), *map(cast, self.norms)), cast(self.turns), cast(self.grads)

    def answer(self, forward, backward, dtype=None):
        (video, text, *norms), turns, grads = self.tensors(dtype)
        packed = forward(video, text, *norms, *turns, *self.settings)
        back = backward(grads, video[:2], text[:2], *norms, *turns, *self.settings)
        return (*packed, *back)

    def run(self, machine, **how):
        given = [*self.rows[0], *self.rows[1], *self.norms, *self.turns, *self.grads]

        def launch():
            return self.answer(pack_kernel.forward, pack_kernel.backward)

        return machine.run(launch, given, **how)

    def check(self, answer):
        eager = self.answer(pack._forward, pack._backward)
        exact = self.answer(pack._forward, pack._backward, torch.float64)
        for i, (x, y, z) in enumerate(zip(answer, eager, exact, strict=True)):
            allowed = budget({"x": z}, [{"x": y}], x.dtype) * z.abs().max()
            error = (x.double() - z).abs().max()
            assert error <= allowed, f"result {i}: off by {error:.3e}, allowed {allowed:.3e}"


def quick(runner):
    """What every run of the tests executes on Hopper."""
    problem = make_problem(SINGLE, N=150, T=5, H=1, D=64, dtype=BF16)
    yield from runner.attention("single D64", problem, [LATE, DRAWN])
    masked = make_problem(GROUP, N=45, T=20, H=1, D=64, dtype=FP16, masked=True)
    yield from runner.attention("group D64, masked", masked, [EARLY])
    laps = make_problem(SkipPattern.dense(), N=300, T=130, H=1, D=64, dtype=BF16)
    yield from runner.pingpong("dense D64", laps, [LATE, EARLY, DRAWN])
    yield from runner.pack("group D64", Packing(2, 2, N=48, T=6, D=64), [LATE])


def quick_on_ampere(runner):
    """And on Ampere."""
    problem = make_problem(SINGLE, N=150, T=5, H=1, D=64, dtype=BF16)
    yield from runner.attention("single D64", problem, [LATE, DRAWN])


def planted(runner):
    """Eight faults."""
    machine = runner.machine
    problem = make_problem(SINGLE, N=150, T=5, H=1, D=64, dtype=BF16)
    laps = make_problem(SkipPattern.dense(), N=300, T=130, H=1, D=64, dtype=BF16)
    packing = Packing(2, 2, N=48, T=6, D=64)

    def forward(problem, kernel):
        def run(**how):
            check(attention(machine, problem, kernel=kernel, backward=False, **how), problem)

        return run

    outputs = machine.run(lambda: forward_kernel.forward(inputs_of(problem)), tensors_of(problem))

    def backward(**how):
        check(attention(machine, problem, outputs=outputs, **how), problem)

    runs = {
        faults.TMA: forward(problem, forward_kernel),
        faults.DKDV: backward,
        faults.DQ: backward,
        faults.PINGPONG: forward(laps, pingpong_kernel),
        faults.PACK: lambda **how: packing.check(packing.run(machine, **how)),
    }
    for fault in faults.ON_HOPPER:
        yield runner.caught(fault, runs[fault.kernel])


PARTS = {"quick": quick, "quick_on_ampere": quick_on_ampere, "planted": planted}
