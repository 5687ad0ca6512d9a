"""The measurements, each a function of the lab: what is timed, and what must be right before."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import skiparse
from skiparse.backends import sdpa
from skiparse.bench.gpu import kernels, schedule
from skiparse.bench.gpu.lab import DENSE, Lab
from skiparse.bench.gpu.schedule import Hidden, packed_pattern, text_inside
from skiparse.bench.op import baselines, run, tune
from skiparse.bench.op.baselines import Contender
from skiparse.bench.op.cases import Case
from skiparse.bench.timing import speedup
from skiparse.models.suv.rope import axis_dims
from skiparse.pattern import SkipPattern, ceiling, skip_order
from skiparse.testing import Problem, budget, check_sample, oracle

CHECKOUT = Path(__file__).resolve().parents[2]
Measurement = Callable[[Lab], None]


def ceilings(lab: Lab) -> None:
    """The most there is: a matrix product in bf16, a copy."""
    setting = lab.setting

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=setting.dtype, device=setting.device)

    n = setting.square
    a, b = draw(n, n), draw(n, n)
    lab.record(f"matrix product of {n}", lambda: a @ b, tflops=lambda ms: 2 * n**3 / ms / 1e9)
    source = torch.zeros(setting.copied, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    lab.record("copy", lambda: target.copy_(source), gb_s=lambda ms: 2 * source.nbytes / ms / 1e6)


def dense(*, backward: bool, batch: bool = False) -> Measurement:
    """Torch's dense kernels."""
    return lambda lab: lab.compare_dense(
        lab.setting.case("dense", backward=backward, batch=lab.setting.batch if batch else 1)
    )


def views(library: str, kind: str, k: int, *, backward: bool) -> Measurement:
    """A library through views alone: the text lies inside the buffers, groups in skip order.

    ``library`` is one of torch's switches; FlashAttention 3 or 4 is taken with that of flash if it
    is installed.
    """
    allowed = [DENSE[library], SDPBackend.MATH]  # the second for the yardstick of the gate

    def make(case: Case, problem: Problem) -> Contender:
        packed = packed_problem(case, problem)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(allowed):
                return (skiparse.attention(q, k, v, packed.pattern, backend="sdpa"),)

        with sdpa_kernel(allowed):
            gate(case, packed, "sdpa")
            ran = sdpa.library_for(packed.q.transpose(1, 2), backward=case.backward)
        return Contender(
            f"views.{ran}", baselines.step(case, attend, packed.inputs[:3], (packed.grad_out,))
        )

    return lambda lab: lab.compare(lab.setting.case(kind, k, backward=backward), make)


def backend(
    name: str, kind: str, k: int, *, backward: bool = False, batch: bool = False
) -> Measurement:
    """A backend through the public call, text beside the video; or one with other tiles."""

    def measure(lab: Lab) -> None:
        real = lab.setting.backend("triton" if name in kernels.TILES else name)

        def make(case: Case, problem: Problem) -> Contender:
            gate(case, problem, real)
            contender = baselines.skiparse_backend(case, problem, real)
            return replace(contender, name=name) if name in kernels.TILES else contender

        size = lab.setting.batch if batch else 1
        with kernels.tiles(name):
            lab.compare(lab.setting.case(kind, k, backward=backward, batch=size), make)

    return measure


def gate(case: Case, problem: Problem, name: str) -> None:
    """Raise unless the backend is right on this very case.

    Of a batch only the last entry is held to the exact answer, for want of memory; in the batch it
    must have the same bits as alone.
    """
    if case.B == 1:
        check_sample(problem, name, backward=case.backward)
        return
    alone = problem.with_inputs([x[-1:] for x in problem.inputs])
    alone = replace(alone, grad_out=problem.grad_out[-1:], grad_text_out=problem.grad_text_out[-1:])
    check_sample(alone, name, backward=case.backward)
    for x, y in zip(*(outputs(case, p, name) for p in (problem, alone)), strict=True):
        assert torch.equal(x[-1:], y), "an entry of a batch gets another answer than alone"


def outputs(case: Case, problem: Problem, name: str) -> tuple[Tensor, ...]:
    """What is timed gives: outputs, or gradients."""
    work = baselines.skiparse_backend(case, problem, name).work
    assert work is not None
    return cast(tuple[Tensor, ...], work())


def packed_problem(case: Case, problem: Problem) -> Problem:
    """The same as plain attention over buffers that hold the text in every sub-sequence.

    For single-skip, or group-skip in skip order.
    """
    k, blocks = case.k, case.kind == "group"
    pairs = zip(problem.inputs[:3], problem.inputs[3:], strict=True)
    inside = [text_inside(video, text, k, blocks=blocks) for video, text in pairs]
    none = problem.text_q[:, :0]
    return replace(
        problem.with_inputs([*inside, none, none, none]),
        grad_out=text_inside(problem.grad_out, problem.grad_text_out / k, k, blocks=blocks),
        grad_text_out=none,
        pattern=packed_pattern(k, case.N, case.T, blocks=blocks),
    )


def flex(kind: str, k: int) -> Measurement:
    """FlexAttention, compiled, with the pattern as a block mask over sorted tokens."""

    def make(case: Case, problem: Problem) -> Contender:
        contender = baselines.flex(case, problem, compiled=problem.q.device.type != "cpu")
        assert contender.work is not None, contender.why_not
        out, text_out = cast(tuple[Tensor, Tensor], contender.work())
        check_sample(problem, lambda _: {"out": out, "text_out": text_out}, backward=False)
        return contender

    return lambda lab: lab.compare(lab.setting.case(kind, k), make)


def layers(lab: Lab) -> None:
    """The whole schedule of layers: dense, by views, by Triton; each way right on a small model."""
    case = lab.setting.case("dense")
    problem = lab.inputs(case)
    check_schedule(lab)
    best = lab.best_dense(case)
    switch = DENSE[best.name.removeprefix("dense.")]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([switch]):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    kernel = lab.setting.backend("triton")
    entered = [
        Contender(best.name, lambda: schedule.dense(problem, attend)),
        Contender("views", schedule.Views(problem).attend),
        Contender(f"skiparse.{kernel}", lambda: schedule.by_backend(problem, kernel)),
    ]
    with torch.no_grad():
        timings = lab.take_turns(entered, rounds=min(3, lab.setting.rounds))
    limit = ceiling(schedule.LAYERS, schedule.SPARSITY, case.N, case.T)
    for timing in timings:
        gain = speedup(timing, timings[0])
        lab.passed(
            f"32 layers, {case.video}",
            timing.name,
            timing.seconds,
            speedup=round(gain, 4),
            ceiling=round(limit, 4),
            reached=round(gain / limit, 4),
        )


def check_schedule(lab: Lab) -> None:
    """Raise unless both ways through the layers give the exact answer, on a small problem."""
    small = run.draw(lab.setting.small, lab.setting.dtype, lab.setting.device)

    def by_oracle(dtype: torch.dtype) -> Hidden:
        x = small.to(dtype)
        for layer in schedule.layers():
            answer = oracle(replace(x, pattern=layer.pattern), dtype)
            x = replace(x, q=answer.out, text_q=answer.text_out)
        return Hidden(x.q, x.text_q)

    exact, eager = by_oracle(torch.float64), by_oracle(lab.setting.dtype)
    views = schedule.Views(small)
    for way, made in (
        ("views", views.natural(views.attend())),
        ("triton", schedule.by_backend(small, lab.setting.backend("triton"))),
    ):
        for name, right, plain, x in zip(Hidden._fields, exact, eager, made, strict=True):
            allowed = budget({"": right}, [{"": plain}], lab.setting.dtype) * right.abs().max()
            assert (x - right).abs().max() <= allowed, f"32 layers by {way}: {name} is wrong"


def copies(lab: Lab) -> None:
    """Passes over memory that a layout may cost, each alone."""
    case = lab.setting.case("group.skip", 8)
    problem = lab.inputs(case)
    q, text, k = problem.q, problem.text_q, case.k
    order = torch.from_numpy(skip_order(case.N, k)).to(q.device)
    works: dict[str, Callable[[], Sequence[Tensor]]] = {
        "clone": lambda: (q.clone(),),
        "skip order by an index": lambda: (q[:, order],),
        "skip order by a transpose": lambda: (
            q.unflatten(1, (-1, k, k)).transpose(1, 2).flatten(1, 3),
        ),
        "text inside, single": lambda: (text_inside(q, text, k, blocks=False),),
        "text inside, blocks": lambda: (text_inside(q, text, k, blocks=True),),
    }
    for name, work in works.items():
        lab.passes(name, case, work)


def packing(kind: str) -> Measurement:
    """``norm_rope_pack`` and its gradient, once they are right."""

    def measure(lab: Lab) -> None:
        setting = lab.setting
        case = setting.case(kind, 8)
        problem = lab.inputs(case)
        kernel = "eager" if setting.device == "cpu" else "triton"
        generator = torch.Generator(setting.device).manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=setting.device)

        angles = draw(case.N, case.D // 2)
        norms = (1 + draw(4, case.D) / 4).to(setting.dtype)
        rows = [x.detach().requires_grad_() for x in (*problem.inputs, *norms)]
        pattern = case.pattern
        assert isinstance(pattern, SkipPattern)  # a grid is not packed
        packed_shape = case.B, case.N + case.k * case.T, case.heads, case.D
        grads = [draw(*packed_shape).to(setting.dtype) for _ in range(3)]

        def forward(way: str, rows: Sequence[Tensor]) -> Sequence[Tensor]:
            q, k, v, text_q, text_k, text_v, *weights = rows
            norm_q, norm_k, text_norm_q, text_norm_k = weights
            return skiparse.norm_rope_pack(
                q, k, v, angles.cos(), angles.sin(), norm_q, norm_k, pattern,
                text_q=text_q, text_k=text_k, text_v=text_v, text_norm_q=text_norm_q,
                text_norm_k=text_norm_k, axes=axis_dims(case.D), backend=way,
            )[:3]  # fmt: skip

        def answer(way: str, dtype: torch.dtype) -> list[Tensor]:
            given = [x.detach().to(dtype).requires_grad_() for x in rows]
            made = forward(way, given)
            return [*made, *torch.autograd.grad(made, given, [x.to(dtype) for x in grads])]

        exact, plain = answer("eager", torch.float64), answer("eager", setting.dtype)
        for i, (right, eager, x) in enumerate(
            zip(exact, plain, answer(kernel, setting.dtype), strict=True)
        ):
            allowed = budget({"": right}, [{"": eager}], setting.dtype) * right.abs().max()
            assert (x - right).abs().max() <= allowed, f"packing: tensor {i} is wrong"
        del exact, plain
        made = forward(kernel, rows)
        lab.passes("pack", case, lambda: forward(kernel, rows), kernel)
        lab.passes(
            "pack, backward", case,
            lambda: torch.autograd.grad(made, rows, grads, retain_graph=True), kernel,
        )  # fmt: skip

    return measure


TESTS = ("tests/test_cuda.py", "tests/test_triton_tma.py", "tests/test_triton.py")
TEST_SECONDS = 40  # of one test; then its stacks are printed and its process ends


def tests(lab: Lab) -> None:
    """The tests of the GPU, in as many processes as there are cores, told as they happen."""
    files = TESTS if lab.setting.device == "cuda" else TESTS[:1]
    parallel = ["-n", "auto", "--dist", "worksteal"] if has("xdist") else []
    telling = ["--tb=short", "-p", "skiparse.bench.gpu.telling"]
    telling += ["-o", f"faulthandler_timeout={TEST_SECONDS}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *parallel, *telling]
    program([*command, "--rootdir", CHECKOUT, *(CHECKOUT / name for name in files)])


def has(package: str) -> bool:
    """Whether a package is installed."""
    import importlib.util

    return importlib.util.find_spec(package) is not None


def program(command: Sequence[str | Path], **environment: str) -> None:
    """Run a program whose output is seen as it comes; RuntimeError if it fails."""
    sys.stdout.flush()
    done = subprocess.run(command, env={**os.environ, **environment}, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} ended with status {done.returncode}")


def memcheck(lab: Lab) -> None:
    """Every kernel once on a small case, each access to memory checked."""
    found = shutil.which("compute-sanitizer")
    checker = [found, "--tool", "memcheck", "--error-exitcode", "9"] if found else []
    if not found:
        print("there is no compute-sanitizer here; the small case runs without it", flush=True)
    program([*checker, sys.executable, "-m", "skiparse.bench.gpu.small", lab.setting.device])


TUNED = 4  # an order holds from half to twice the length it was measured at: for 2 and 8 as well

TUNED_ROUNDS = 3


def tuning(lab: Lab) -> None:
    """``skiparse tune``, of problems with text; the order it writes comes back beside the rows."""
    setting = lab.setting
    path = tune.tune(
        device=setting.device,
        dtype=setting.dtype,
        shape=setting.shape,
        sparsity=(TUNED,),
        text=(True,),
        rounds=min(TUNED_ROUNDS, setting.rounds),
        folder=lab.out,
    )
    print(f"wrote {path.name}: {len(json.loads(path.read_text())['rules'])} rules", flush=True)
