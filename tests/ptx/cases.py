"""Which launches are executed, how, and against what they are held.

A problem is run in several ways, ``(mode, seed)``: all must give the same bits, and they are held
to the error budget of ``skiparse.testing``. A part is a function of a ``Runner`` that gives a row
for each run.
"""

import ctypes
import functools
import time
from dataclasses import replace

import torch

from ptx import faults
from ptx.memory import Fault
from ptx.run import Machine, attention, inputs_of, tensors_of
from skiparse import SkipPattern, pack
from skiparse.backends import Inputs
from skiparse.backends.triton import (
    backward_kernel,
    forward_kernel,
    pack_kernel,
    pingpong_kernel,
)
from skiparse.testing import budget, check, make_problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SINGLE, GROUP = SkipPattern.single(2), SkipPattern.group(2)
LATE, EARLY, DRAWN = ("late", 1), ("early", 2), ("random", 3)
ALL_WAYS = [LATE, EARLY, *(("random", seed) for seed in range(3, 6))]


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


SMALL = {"N": 150, "T": 5, "H": 1, "D": 64}
LAPS = {"N": 300, "T": 130, "H": 1, "D": 64}  # three times round the ring of slots


def quick(runner):
    """What every run of the tests executes on Hopper."""
    yield from runner.attention("single", make_problem(SINGLE, **SMALL, dtype=BF16), [LATE, DRAWN])
    masked = make_problem(GROUP, N=45, T=20, H=1, D=64, dtype=FP16, masked=True)
    yield from runner.attention("group, masked", masked, [EARLY])
    laps = make_problem(SkipPattern.dense(), **LAPS, dtype=BF16)
    yield from runner.pingpong("dense", laps, [LATE, EARLY, DRAWN])
    yield from runner.pingpong("no key", hidden(SINGLE, **SMALL | {"N": 272}, dtype=BF16), [DRAWN])
    yield from runner.pack("group", Packing(2, 2, N=48, T=6, D=64), [LATE])


def quick_on_ampere(runner):
    """And on Ampere."""
    yield from runner.attention("single", make_problem(SINGLE, **SMALL, dtype=BF16), [LATE, DRAWN])


def attention_cases(runner):
    """Forward and backward of every pattern and dtype."""
    cases = {
        "group D16": {"p": GROUP, "N": 20, "T": 3, "D": 16},
        "single": {"p": SINGLE, "N": 150, "T": 5, "D": 64},
        "masked": {"p": GROUP, "N": 45, "T": 20, "D": 64, "masked": True},
        "block": {"p": SkipPattern.block(2, 512), "N": 512, "T": 19, "D": 64},
        "single D128": {"p": SINGLE, "N": 300, "T": 70, "D": 128},
        "odd D128": {"p": SkipPattern(3, 2), "N": 50, "T": 7, "D": 128},
        "dense, no text": {"p": SkipPattern.dense(), "N": 40, "T": 0, "D": 128},
        "packed D96": {"p": GROUP, "B": 2, "N": 24, "T": 9, "D": 96, "layout": "packed"},
        "D256": {"p": SINGLE, "N": 30, "T": 3, "D": 256},
    }
    for name, arguments in cases.items():
        for dtype in (BF16, FP16):
            given = {"H": 1, **arguments}
            problem = make_problem(given.pop("p"), dtype=dtype, **given)
            yield from runner.attention(f"{name} {dtype}", problem, ALL_WAYS)


def fp32_cases(runner):
    """The same in fp32, where nothing is multiplied by tensor cores."""
    for name, pattern, D, masked in (
        ("single D16", SINGLE, 16, False),
        ("group D64", GROUP, 64, False),
        ("masked D64", SINGLE, 64, True),
        ("dense D128", SkipPattern.dense(), 128, False),
    ):
        problem = make_problem(pattern, N=40, T=3, H=1, D=D, masked=masked)
        yield from runner.attention(name, problem, ALL_WAYS)


def hidden(pattern, **arguments):
    """A problem whose first sub-sequence has no key, and the second none in its first block."""
    problem = make_problem(pattern, masked=True, **arguments)
    N = problem.q.shape[1]
    tokens = torch.arange(N)
    mask, text_mask = problem.mask.clone(), torch.zeros_like(problem.text_mask)
    own = [tokens[tokens // pattern.run % pattern.sparsity == s] for s in range(2)]
    mask[:, own[0]] = False
    mask[:, own[1][:128]] = False
    assert mask[:, own[1]].any()
    return replace(problem, mask=mask, text_mask=text_mask)


def masked_pingpong_cases(runner):
    """Key masks that hide some of the keys, all of a block, all of a sub-sequence."""
    cases = {
        "masked": (make_problem, {"p": GROUP, "N": 704, "T": 150, "masked": True}),
        "masked, long runs": (
            make_problem, {"p": SkipPattern.block(2, 512), "N": 512, "T": 20, "masked": True}
        ),
        "masked, packed": (
            make_problem,
            {"p": SINGLE, "B": 2, "N": 320, "T": 0, "H": 2, "layout": "packed", "masked": True},
        ),
        "no key": (hidden, {"p": SINGLE, "N": 560, "T": 130}),
        "no key in runs": (hidden, {"p": SkipPattern.group(4), "N": 1040, "T": 3, "dtype": FP16}),
    }  # fmt: skip
    for name, (make, arguments) in cases.items():
        for D in (64, 128):
            given = {"H": 1, "dtype": BF16, **arguments}
            problem = make(given.pop("p"), D=D, **given)
            yield from runner.pingpong(f"{name} D{D}", problem, ALL_WAYS)


def pingpong_cases(runner):
    """Rings that turn several times, text alone in the last blocks, long runs, packed layouts."""
    cases = {
        "three laps, no text": {"p": SINGLE, "N": 1040, "T": 0},
        "one text token": {"p": SkipPattern.group(4), "N": 2080, "T": 1},
        "more text than video": {"p": SkipPattern.dense(), "N": 300, "T": 400, "dtype": FP16},
        "one block": {"p": SINGLE, "N": 20, "T": 0},
        "long runs": {"p": SkipPattern.block(2, 1024), "N": 1024, "T": 128},
        "packed": {
            "p": SkipPattern.group(4), "B": 2, "N": 256, "T": 40, "H": 2, "layout": "packed",
        },
    }  # fmt: skip
    for name, arguments in cases.items():
        for D in (64, 128):
            given = {"H": 1, "dtype": BF16, **arguments}
            problem = make_problem(given.pop("p"), D=D, **given)
            yield from runner.pingpong(f"{name} D{D}", problem, ALL_WAYS)


def pack_cases(runner):
    """Packing and its gradient."""
    for D, n, w, dtype in (
        (64, 2, 2, BF16), (128, 2, 1, BF16), (128, 4, 4, FP16), (48, 2, 2, FP32), (16, 3, 1, BF16),
    ):  # fmt: skip
        given = Packing(n, w, N=n * w * 12, T=6, D=D, dtype=dtype)
        yield from runner.pack(f"n={n} w={w} D{D} {dtype}", given, ALL_WAYS)


class Faulty:
    """Runs one kernel with an edit, and holds what comes of it against what is right."""

    def __init__(self, machine, D):
        self.machine = machine
        self.problem = make_problem(SINGLE, **SMALL | {"D": D}, dtype=BF16)
        self.whole = make_problem(SINGLE, **SMALL | {"N": 560, "D": D}, dtype=BF16)  # whole blocks
        self.laps = make_problem(SkipPattern.dense(), **LAPS | {"D": D}, dtype=BF16)
        self.packing = Packing(2, 2, N=48, T=6, D=D)
        self.outputs = machine.run(
            lambda: forward_kernel.forward(inputs_of(self.problem)), tensors_of(self.problem)
        )

    def run(self, kernel, **how):
        if kernel == faults.PACK:
            self.packing.check(self.packing.run(self.machine, **how))
            return
        others = {faults.PINGPONG: self.laps, faults.TMA: self.whole}
        problem = others.get(kernel, self.problem)
        if kernel in (faults.DKDV, faults.DQ, faults.DKDV_TMA, faults.DQ_TMA):
            how |= {"outputs": self.outputs}
        else:
            launcher = pingpong_kernel if kernel == faults.PINGPONG else forward_kernel
            how |= {"kernel": launcher, "backward": False}
        check(attention(self.machine, problem, **how), problem)


def planted_in(chosen, D):
    """A part: each of these faults is caught."""

    def part(runner):
        faulty = Faulty(runner.machine, D)
        for fault in chosen:
            yield runner.caught(fault, functools.partial(faulty.run, fault.kernel))

    return part


def headline(runner):
    """The launches of 36,864 tokens with 24 heads of 128 are legal; nothing of them is executed."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # 2 GB that nobody reads
    for name, pattern in (
        ("single", SkipPattern.single(8)),
        ("group", SkipPattern.group(8)),
        ("block", SkipPattern.block(8, 36864)),
    ):
        video, text = (
            [torch.empty(1, rows, 24, 128, dtype=BF16) for _ in range(3)] for rows in (36864, 512)
        )
        inputs = Inputs(*video, *text, None, None, pattern, 128**-0.5)
        outputs = forward_kernel.allocate(inputs)
        grads = outputs.out, outputs.text_out
        launches = {
            "forward": functools.partial(forward_kernel.forward, inputs),
            "pingpong": functools.partial(pingpong_kernel.forward, inputs),
            "backward": functools.partial(backward_kernel.backward, inputs, outputs, *grads),
        }
        for what, launch in launches.items():
            row = {"case": name, "launch": what}
            if what == "backward":  # besides, it sums over sub-sequences, which a GPU would do
                launch()
                runner.machine.recorder.check()
            else:
                row["seconds"] = runner.machine.launch_time(launch, 50)
            yield row


def refused(runner):
    """The recording libcuda refuses a tensor map that is not legal, and says why."""
    recorder = runner.machine.recorder
    dims, strides = (ctypes.c_uint64 * 2)(64, 20), (ctypes.c_uint64 * 1)(136)
    box, steps = (ctypes.c_uint32 * 2)(64, 8), (ctypes.c_uint32 * 2)(1, 1)
    made = (ctypes.c_uint8 * 128)()
    given = made, 9, 2, ctypes.c_void_p(256), dims, strides, box, steps, 0, 3, 0, 0
    assert recorder.library.cuTensorMapEncodeTiled(*given) != 0
    try:
        recorder.check()
    except Fault as fault:
        assert not any(made)
        yield {"refused": str(fault)}


PARTS = {
    "quick": quick,
    "quick_on_ampere": quick_on_ampere,
    "planted": planted_in(faults.ON_HOPPER, 64),
    "refused": refused,
    "attention": attention_cases,
    "fp32": fp32_cases,
    "pingpong": pingpong_cases,
    "pingpong_masked": masked_pingpong_cases,
    "pack": pack_cases,
    "planted_more": planted_in((*faults.ON_HOPPER, *faults.MORE_ON_HOPPER), 128),
    "planted_on_ampere": planted_in(faults.ON_AMPERE, 64),
    "headline": headline,
}
