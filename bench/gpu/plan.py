"""The two runs: which steps, in which order, what each should take, and whether it all fits.

Run 1 is what is worth knowing if the device is taken away after it. Run 2 takes the kernels that
run 1 compiled. Both are shorter than ten minutes with all that goes wrong in them, and together
with two starts of a machine shorter than fifteen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skiparse.bench.gpu import model, schedule, steps
from skiparse.bench.gpu.driver import AGAIN
from skiparse.bench.gpu.kernels import Call, call_of
from skiparse.bench.gpu.lab import GPU
from skiparse.bench.gpu.steps import Measurement
from skiparse.bench.op.cases import SPARSITY

LIMITS = {"1": 6 * 60.0, "2": 7 * 60.0}  # seconds
TEST_KERNELS = 360  # that the tests compile; the rehearsal counts them and fails if there are more
FALLING = tuple(sorted(SPARSITY, reverse=True))  # 8 first: where it matters most


@dataclass(frozen=True)
class Step:
    """One measurement: its name, what it does, the seconds a GPU should take (MODEL).

    ``calls`` are those for which Triton compiles something. Steps of one ``process`` share it, and
    stand together. "bundled" has Triton's own ptxas, the others what lies beside the script.
    """

    name: str
    measure: Measurement
    seconds: float
    calls: tuple[Call, ...] = ()
    process: str = "timings"

    @property
    def limit(self) -> float:
        """Seconds after which it is taken to hang."""
        return 20.0 + 2.0 * self.seconds


def backend(
    name: str, kind: str, k: int, *, backward: bool = False, batch: bool = False,
    process: str = "timings",
) -> Step:  # fmt: skip
    """A backend beside the best dense kernel."""
    case = GPU.case(kind, k, backward=backward, batch=GPU.batch if batch else 1)
    calls = () if name == "sdpa" else (call_of(case, name, GPU.dtype),)
    dense = 2 * model.once(GPU.case("dense", backward=backward, batch=case.B), "dense.flash")
    return Step(
        f"{name} {case.name.partition('.')[2]}" + (f" B={case.B}" if batch else "")
        + (f", {process}" if process == "bundled" else ""),
        steps.backend(name, kind, k, backward=backward, batch=batch),
        model.beside_dense(case, name, GPU.rounds) + (4 * dense if batch else 0),
        calls,
        process,
    )  # fmt: skip


def views(library: str, kind: str, k: int, *, backward: bool = False) -> Step:
    """A library through views, beside the best dense kernel."""
    case = GPU.case(kind, k, backward=backward)
    return Step(
        f"views.{library} {case.name.partition('.')[2]}",
        steps.views(library, kind, k, backward=backward),
        model.beside_dense(case, f"views.{library}", GPU.rounds),
    )


def dense(*, backward: bool, batch: bool = False) -> Step:
    """The dense kernels; the first time also which is the best."""
    case = GPU.case("dense", backward=backward, batch=GPU.batch if batch else 1)
    names = ("dense.cudnn", "dense.flash")
    calls = [model.once(case, name) for name in names]
    plans = sum(model.plan(case, name) for name in names)
    seconds = plans + model.turns(calls, GPU.rounds) + 3 * sum(calls)
    name = f"{case.name.partition('.')[2]}" + (f" B={case.B}" if batch else "")
    return Step(name, steps.dense(backward=backward, batch=batch), seconds)


def ceilings() -> Step:
    return Step("ceilings", steps.ceilings, 2.0)


def layers() -> Step:
    """The executed schedule."""
    patterns = [layer.pattern for layer in schedule.layers()]
    kinds = [
        GPU.case("dense")
        if p.sparsity == 1
        else GPU.case("single" if p.run == 1 else "group", p.sparsity)
        for p in patterns
    ]
    once = [
        sum(model.once(GPU.case("dense"), "dense.cudnn") for _ in kinds),
        sum(
            model.once(case, "views.cudnn") + 8 * 2 * case.N * case.heads * case.D * 2 / model.COPY
            for case in kinds
        ),
        sum(model.once(case, "triton") for case in kinds),
    ]
    small = [
        call_of(GPU.small, "triton", GPU.dtype).__class__(
            **{**call_of(GPU.small, "triton", GPU.dtype).__dict__, "pattern": p}
        )
        for p in dict.fromkeys(patterns)
    ]
    calls = (*small, *(call_of(case, "triton", GPU.dtype) for case in dict.fromkeys(kinds)))
    return Step("32 layers", steps.layers, 10.0 + model.turns(once, 3), calls)


def copies() -> Step:
    return Step("copies", steps.copies, 5 * model.turns([0.002], GPU.rounds))


def packing(kind: str) -> Step:
    case = GPU.case(kind, 8)
    return Step(
        f"packing {case.name.partition('.')[2]}", steps.packing(kind),
        4.0 + model.turns([0.005, 0.01], GPU.rounds), (call_of(case, "pack", GPU.dtype),),
    )  # fmt: skip


def flex(kind: str, k: int) -> Step:
    case = GPU.case(kind, k)
    return Step(
        f"flex {case.name.partition('.')[2]}", steps.flex(kind, k),
        25.0 + model.beside_dense(case, "flex", GPU.rounds),
    )  # fmt: skip


def tests() -> Step:
    return Step("tests", steps.tests, model.tests(TEST_KERNELS), process="programs")


def tuning() -> Step:
    """It times the ping-pong kernel too, and so comes behind it."""
    ways = ("sdpa", "triton", "triton.pingpong")
    cases = {
        backward: [
            GPU.case(kind, steps.TUNED, backward=backward)
            for kind in ("single", "group", "group.skip")
        ]
        for backward in (False, True)
    }
    seconds = sum(
        model.turns([model.once(cases[backward][0], "dense.cudnn")], steps.TUNED_ROUNDS)
        + sum(
            model.alone(case, way, steps.TUNED_ROUNDS) for case in cases[backward] for way in ways
        )
        for backward in cases
    )
    calls = tuple(
        call_of(case, way, GPU.dtype)
        for backward in cases
        for case in cases[backward]
        for way in ways[1:]
    )
    return Step("tune", steps.tuning, seconds, calls, "pingpong")


def first_run() -> list[Step]:
    """What matters most, the most telling first."""
    return [
        ceilings(),
        dense(backward=False),
        *(views("cudnn", kind, k) for k in FALLING for kind in ("single", "group.skip")),
        *(backend("triton", kind, k) for k in FALLING for kind in ("group", "single")),
        dense(backward=True),
        *(
            step
            for k in FALLING
            for step in (
                views("cudnn", "single", k, backward=True),
                backend("triton", "group", k, backward=True),
                views("cudnn", "group.skip", k, backward=True),
                backend("triton", "single", k, backward=True),
            )
        ),
        layers(),
        copies(),
        packing("single"),
        packing("group"),
        packing("group.skip"),
        backend("triton.pingpong", "group", 8, process="pingpong"),
        backend("triton.pingpong", "single", 8, process="pingpong"),
    ]


def second_run() -> list[Step]:
    """Tests, what run 1 left out, and the order that ``"auto"`` goes by.

    With run 1 every backward is timed at every k: ``sdpa``'s of the single kind is the view of run
    1, and at the k that ``tune`` asks for, ``tune`` times it.
    """
    compared = [("group", False), ("group", True)]
    return [
        tests(),
        Step("memcheck", steps.memcheck, model.MEMCHECK, process="programs"),
        *(backend("triton", "group.skip", k, backward=True) for k in FALLING),
        *(backend("sdpa", "group", k, backward=True) for k in FALLING if k != steps.TUNED),
        *(
            views("flash", kind, k, backward=True)
            for k in FALLING
            for kind in ("single", "group.skip")
        ),
        backend("triton.pointers", "group", 8),
        backend("triton.short", "group", 8),
        dense(backward=False, batch=True),
        backend("triton", "group", 8, batch=True),
        backend("triton", "single", 8, batch=True),
        flex("group", 8),
        *(backend("triton", kind, 8, backward=b, process="bundled") for kind, b in compared),
        *(
            backend("triton.pingpong", kind, k, process="pingpong")
            for k in FALLING
            for kind in ("group", "single")
        ),
        tuning(),
    ]


RUNS = {"1": first_run, "2": second_run}


def calls_of(run: str, pool: str) -> list[Call]:
    """Every call of a run for which Triton compiles something, with the ptxas of a pool."""
    return [
        call
        for step in RUNS[run]()
        for call in step.calls
        if (step.process == "bundled") == (pool == "bundled")
    ]


def modelled(run: str, kernels: Mapping[str, int]) -> list[tuple[str, float]]:
    """``(what, seconds)`` of a run, line by line; ``kernels`` to be compiled, by each pool."""
    lines = [
        ("start of the driver", model.START),
        (f"{sum(kernels[pool] for pool in model.POOLS)} kernels", model.compiled(kernels)),
    ]
    process = ""
    for step in RUNS[run]():
        if step.process != process:
            process = step.process
            lines.append((f"start of process {process}", AGAIN))
        lines.append((step.name, step.seconds))
    return [*lines, ("the table, the kernels packed", model.END)]


def table(run: str, kernels: Mapping[str, int]) -> str:
    """The plan of a run with its modelled seconds, and their sum."""
    spent = 0.0
    text = [f"run {run}, MODEL of a GPU".ljust(48) + "seconds      at"]
    for what, seconds in modelled(run, kernels):
        spent += seconds
        text.append(f"  {what:46}{seconds:7.1f}{spent:8.0f}")
    verdict = "fits" if spent <= LIMITS[run] else "TOO LONG"
    return "\n".join([*text, f"  {verdict}: the limit is {LIMITS[run]:.0f} s"])


def faults(run: str, kernels: Mapping[str, int]) -> list[str]:
    """Why a run might not end within its limit, in words."""
    seconds = sum(seconds for _, seconds in modelled(run, kernels))
    found = []
    if seconds > LIMITS[run]:
        found.append(f"it should take {seconds:.0f} s, and its limit is {LIMITS[run]:.0f} s")
    if kernels["tests"] > TEST_KERNELS:
        found.append(
            f"the tests compile {kernels['tests']} kernels, planned are {TEST_KERNELS}: "
            "set plan.TEST_KERNELS"
        )
    return found
