"""All there is to measure on a GPU, in one go: tests, dense attention, views, kernels, copies.

``bench/gpu.sh`` runs this from a checkout. Every part is a process of its own with a time limit, so
that one that fails or hangs costs its own figures and no others. Each part times dense attention
beside its own contenders, taking turns, so that every ratio is of one process; and no contender is
timed before it is right on the very case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import skiparse
from skiparse.backends import sdpa
from skiparse.bench import baselines, run
from skiparse.bench.baselines import Contender, Work
from skiparse.bench.cases import CASES, HEADLINE, SPARSITY, Case
from skiparse.bench.run import Timing
from skiparse.models.suv.rope import axis_dims
from skiparse.pattern import SkipPattern, ceiling, skip_order
from skiparse.testing import Problem, budget, check_sample, make_problem

CHECKOUT = Path(__file__).resolve().parents[1]
SECONDS = 520.0  # for all parts together
SAMPLE_MS = 20.0  # shorter work is repeated within a sample
SCHEDULE = ((2, 4, 6, 8, 6, 4, 2), (1, 2, 4, 8, 4, 2, 1))  # layers and sparsity of the released SUV


@dataclass(frozen=True)
class Setting:
    """Where and on what: the headline shape on a GPU, or the smallest one on a CPU."""

    device: str
    dtype: torch.dtype
    shape: str  # the beginning of the names of the cases
    sparsity: tuple[int, ...]
    rounds: int

    def cases(self, *, backward: bool, dense: bool = False) -> list[Case]:
        """Dense attention, or both patterns at every sparsity, in both orders."""
        end = "fwdbwd" if backward else "fwd"
        if dense:
            return [CASES[f"{self.shape}.dense.{end}"]]
        return [
            CASES[f"{self.shape}.k{k}.{kind}.{end}"]
            for k in self.sparsity
            for kind in ("single", "group", "group.skip")
        ]


GPU = Setting("cuda", torch.bfloat16, HEADLINE, SPARSITY, rounds=7)
DRY_RUN = Setting("cpu", torch.float32, "1x288x512-1h", (2,), rounds=1)


@dataclass(frozen=True)
class Part:
    """One process: its command, and the seconds after which it is stopped."""

    name: str
    command: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Ended:
    """How a part ended: ``fault`` is empty if it went well."""

    name: str
    seconds: float
    fault: str


# What the parts do. Each function takes the setting and the folder for results.


def dense(setting: Setting, out: Path) -> None:
    """Every dense kernel of torch's, forward, and forward and backward."""
    for backward in (False, True):
        (case,) = setting.cases(backward=backward, dense=True)
        problem = _problem(case, setting)
        _measure(case, problem, _dense(case, problem), [], setting, out)


def flex(setting: Setting, out: Path) -> None:
    """FlexAttention without a pattern, compiled."""
    (case,) = setting.cases(backward=False, dense=True)
    problem = _problem(case, setting)
    _measure(case, problem, _best_dense(case, problem, setting), [baselines.flex], setting, out)


def _views(kernel: SDPBackend, *, backward: bool) -> Callable[[Setting, Path], None]:
    """A library through views alone: the text lies inside the buffers, skip order.

    ``kernel`` is torch's switch; FlashAttention 3 or 4 is taken with that of flash if installed.
    """

    def contender(case: Case, problem: Problem) -> Contender:
        packed = text_inside(case, problem)
        q, k, v = packed.inputs[:3]
        allowed = [kernel, SDPBackend.MATH]  # the second for the eager yardstick of the check

        def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(allowed):
                return (skiparse.attention(q, k, v, packed.pattern, backend="sdpa"),)

        with sdpa_kernel(allowed):
            check_sample(packed, "sdpa", backward=case.backward)
            library = sdpa.library_for(q.transpose(1, 2), backward=case.backward)
        return Contender(
            f"views.{library}", baselines._step(case, attend, (q, k, v), (packed.grad_out,))
        )

    def part(setting: Setting, out: Path) -> None:
        cases = setting.cases(backward=backward)
        _each(setting, [c for c in cases if c.kind == "single" or c.skip_order], [contender], out)

    return part


def _skiparse(backend: str, *, backward: bool) -> Callable[[Setting, Path], None]:
    """A backend through the public call: text beside the video, natural order and skip order."""

    def contender(case: Case, problem: Problem) -> Contender:
        own = replace(problem, pattern=case.pattern)
        check_sample(own, backend, backward=case.backward)
        return baselines.skiparse_backend(case, own, backend)

    def part(setting: Setting, out: Path) -> None:
        _each(setting, setting.cases(backward=backward), [contender], out)

    return part


def _triton(name: str, configs: dict[str, dict[int, tuple[int, ...]]]) -> Callable[..., None]:
    """The forward kernel with other tile configurations; none: by pointers."""

    def part(setting: Setting, out: Path) -> None:
        from skiparse.backends.triton import device, forward_kernel

        forward_kernel.TMA_CONFIGS = {  # of this process only
            arch: {D: device.Config(*config) for D, config in row.items()}
            for arch, row in configs.items()
        }

        def contender(case: Case, problem: Problem) -> Contender:
            own = replace(problem, pattern=case.pattern)
            check_sample(own, "triton", backward=False)
            return replace(baselines.skiparse_backend(case, own, "triton"), name=name)

        _each(setting, setting.cases(backward=False), [contender], out)

    return part


def copies(setting: Setting, out: Path) -> None:
    """Passes over memory that a layout may cost, each alone."""
    case = setting.cases(backward=False)[-1]
    problem = _problem(case, setting)
    q, text, k = problem.q, problem.text_q, case.k
    order = torch.from_numpy(skip_order(case.N, k)).to(q.device)
    works: dict[str, Pass] = {
        "copy": lambda: (q.clone(),),
        "skip order by an index": lambda: (q[:, order],),
        "skip order by a transpose": lambda: (
            q.unflatten(1, (-1, k, k)).transpose(1, 2).flatten(1, 3),
        ),
        "text inside, single": lambda: (_with_text(q, text, k, blocks=False),),
        "text inside, blocks": lambda: (_with_text(q, text, k, blocks=True),),
    }
    for name, work in works.items():
        _pass(name, work, case, setting, out)


def packing(setting: Setting, out: Path) -> None:
    """``norm_rope_pack`` and its gradient, once they are right; on a CPU plain PyTorch's."""
    case = setting.cases(backward=False)[-1]
    problem, backend = _problem(case, setting), "eager" if setting.device == "cpu" else "triton"
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(setting.device)

    angles = draw(case.N, case.D // 2)
    norms = (1 + draw(4, case.D) / 4).to(setting.dtype)
    rows = [x.detach().requires_grad_() for x in (*problem.inputs, *norms)]
    packed_shape = case.B, case.N + case.k * case.T, case.heads, case.D
    grads = [draw(*packed_shape).to(setting.dtype) for _ in range(3)]

    def forward(pattern: SkipPattern, way: str, rows: Sequence[Tensor]) -> Sequence[Tensor]:
        q, k, v, text_q, text_k, text_v, *weights = rows
        norm_q, norm_k, text_norm_q, text_norm_k = weights
        return skiparse.norm_rope_pack(
            q, k, v, angles.cos(), angles.sin(), norm_q, norm_k, pattern,
            text_q=text_q, text_k=text_k, text_v=text_v, text_norm_q=text_norm_q,
            text_norm_k=text_norm_k, axes=axis_dims(case.D), backend=way,
        )[:3]  # fmt: skip

    def answer(pattern: SkipPattern, way: str, dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in rows]
        made = forward(pattern, way, given)
        return [*made, *torch.autograd.grad(made, given, [x.to(dtype) for x in grads])]

    def measure(name: str, pattern: SkipPattern) -> None:
        exact, plain, ours = (
            answer(pattern, way, dtype)
            for way, dtype in (
                ("eager", torch.float64), ("eager", setting.dtype), (backend, setting.dtype),
            )
        )  # fmt: skip
        for i, (right, eager, x) in enumerate(zip(exact, plain, ours, strict=True)):
            allowed = budget({"": right}, [{"": eager}], setting.dtype) * right.abs().max()
            assert (x - right).abs().max() <= allowed, f"{name}: tensor {i}"
        made = forward(pattern, backend, rows)
        _pass(f"pack, {name}", lambda: forward(pattern, backend, rows), case, setting, out)
        _pass(
            f"pack, {name}, backward",
            lambda: torch.autograd.grad(made, rows, grads, retain_graph=True),
            case,
            setting,
            out,
        )

    measure("single", SkipPattern.single(case.k))
    measure("group", SkipPattern.group(case.k))
    measure("blocks", SkipPattern.block(case.k, case.N))


WORK: dict[str, Callable[[Setting, Path], None]] = {
    "dense": dense,
    "flex": flex,
    "views.cudnn": _views(SDPBackend.CUDNN_ATTENTION, backward=False),
    "views.flash": _views(SDPBackend.FLASH_ATTENTION, backward=False),
    "sdpa": _skiparse("sdpa", backward=False),
    "triton": _skiparse("triton", backward=False),
    "triton.pointers": _triton("triton.pointers", {}),
    "triton.short": _triton("triton.short", {"sm_90": {128: (128, 64, 8, 3)}}),
    "triton.pingpong": _skiparse("triton.pingpong", backward=False),
    "views.cudnn.backward": _views(SDPBackend.CUDNN_ATTENTION, backward=True),
    "views.flash.backward": _views(SDPBackend.FLASH_ATTENTION, backward=True),
    "sdpa.backward": _skiparse("sdpa", backward=True),
    "triton.backward": _skiparse("triton", backward=True),
    "copies": copies,
    "packing": packing,
}
LIMITS = {"flex": 80.0}  # seconds of a part, 60 for others
NEEDS_A_GPU = (
    "flex", "views.cudnn", "triton", "triton.pointers", "triton.short", "triton.pingpong",
    "views.cudnn.backward", "triton.backward",
)  # fmt: skip
TESTS = ("tests/test_cuda.py", "tests/test_triton_tma.py", "tests/test_triton.py")


def parts(out: Path, *, dry_run: bool) -> list[Part]:
    """The tests, then what there is to measure, in the order in which it matters most."""
    python = [sys.executable, "-m"]
    options = ["-p", "no:cacheprovider", "--rootdir", str(CHECKOUT)]
    files = [str(CHECKOUT / name) for name in (TESTS[:1] if dry_run else TESTS)]
    tests = Part("tests", (*python, "pytest", *options, *files), 130.0)
    flags = ["--out", str(out), *(["--dry-run"] if dry_run else [])]
    names = [name for name in WORK if not (dry_run and name in NEEDS_A_GPU)]
    return [
        tests,
        *(
            Part(
                name,
                (*python, "skiparse.bench.gpu", "--part", name, *flags),
                LIMITS.get(name, 60.0),
            )
            for name in names
        ),
    ]


def run_parts(todo: Sequence[Part], out: Path, seconds: float = SECONDS) -> list[Ended]:
    """Run the parts one after another, what they print going to ``out/log.txt``.

    A part that fails, or is stopped at its limit or when ``seconds`` are over, does not keep the
    others from running.
    """
    ended = []
    start = time.monotonic()
    with (out / "log.txt").open("a") as log:
        for part in todo:
            left = seconds - (time.monotonic() - start)
            began = time.monotonic()
            fault = _run_part(part, min(part.seconds, left), log) if left > 0 else "no time left"
            ended.append(Ended(part.name, time.monotonic() - began, fault))
            print(f"{part.name:22} {ended[-1].seconds:5.0f} s  {fault or 'ok'}", flush=True)
    return ended


def _run_part(part: Part, seconds: float, log: Any) -> str:
    """Run one part; what went wrong with it, or nothing."""
    log.write(f"\n== {part.name}\n")
    log.flush()
    process = subprocess.Popen(
        part.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return f"exit status {status}" if status else ""


# Measuring.


def text_inside(case: Case, problem: Problem) -> Problem:
    """The same problem as plain attention over buffers that hold the text in every sub-sequence.

    For single-skip, or group-skip in skip order.
    """
    k, blocks = case.k, case.kind == "group"
    pairs = zip(problem.inputs[:3], problem.inputs[3:], strict=True)
    q, key, v = (_with_text(x, y, k, blocks=blocks) for x, y in pairs)
    none = problem.text_q[:, :0]
    return replace(
        problem,
        q=q,
        k=key,
        v=v,
        text_q=none,
        text_k=none,
        text_v=none,
        grad_out=_with_text(problem.grad_out, problem.grad_text_out / k, k, blocks=blocks),
        grad_text_out=none,
        pattern=SkipPattern(k, case.N // k + case.T) if blocks else SkipPattern.single(k),
    )


def _with_text(video: Tensor, text: Tensor, k: int, *, blocks: bool) -> Tensor:
    """One buffer ``[B, N + k*T, H, D]``: text behind every block, or interleaved at the end."""
    if not blocks:
        return torch.cat([video, text.repeat_interleave(k, 1)], 1)
    copies = text[:, None].expand(-1, k, -1, -1, -1)
    return torch.cat([video.unflatten(1, (k, -1)), copies], 2).flatten(1, 2)


Pass = Callable[[], Sequence[Tensor]]  # over memory


def _pass(name: str, work: Pass, case: Case, setting: Setting, out: Path) -> None:
    """Time a pass; GB/s counts what it makes twice, as read and as written."""
    work()
    milliseconds = statistics.median(_time(work, setting) for _ in range(setting.rounds))
    row = {
        "what": name,
        "shape": [case.B, case.N, case.heads, case.D],
        "k": case.k,
        "device": run.device_name(setting.device),
        "median_ms": round(milliseconds, 4),
        "gb_s": round(2 * sum(made.nbytes for made in work()) / milliseconds / 1e6, 1),
        "versions": run.versions(),
        "commit": run.commit(),
    }
    print(row, flush=True)
    run.append(out / "copies.jsonl", [row])


def _problem(case: Case, setting: Setting) -> Problem:
    return make_problem(
        case.pattern, B=case.B, N=case.N, T=case.T, H=case.heads, D=case.D, dtype=setting.dtype,
        device=setting.device,
    )  # fmt: skip


def _each(
    setting: Setting,
    cases: Sequence[Case],
    makers: Sequence[Callable[[Case, Problem], Contender]],
    out: Path,
) -> None:
    """Measure cases that differ in the pattern only; one that fails does not stop the others.

    Raises:
        RuntimeError: at the end, if one failed. Why is printed where it happened.
    """
    problem = _problem(cases[0], setting)
    best = _best_dense(cases[0], problem, setting)
    failed = []
    for case in cases:
        try:
            _measure(case, problem, best, makers, setting, out)
        except Exception:  # whatever a kernel may do; what is wrong is told, and is a failure
            traceback.print_exc()
            failed.append(case.name)
    if failed:
        raise RuntimeError(f"no figures of {', '.join(failed)}")


def _dense(case: Case, problem: Problem) -> list[Contender]:
    """Torch's dense kernels, and FlashAttention 3 or 4 where a package is installed."""
    contenders = baselines.dense(case, problem)
    q, k, v, grad = (
        torch.cat(pair, 1)
        for pair in (
            *zip(problem.inputs[:3], problem.inputs[3:], strict=True),
            (problem.grad_out, problem.grad_text_out),
        )
    )
    allowed = [SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(allowed):
        library = sdpa.library_for(q.transpose(1, 2), backward=case.backward)
    if library not in ("fa3", "fa4"):
        return contenders

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with sdpa_kernel(allowed):
            return (skiparse.attention(q, k, v, SkipPattern.dense(), backend="sdpa"),)

    work = baselines._step(case, attend, (q, k, v), (grad,))
    return [*contenders, Contender(f"dense.{library}", work)]


def _best_dense(case: Case, problem: Problem, setting: Setting) -> list[Contender]:
    """The fastest dense kernel that runs here."""
    times = {}
    for contender in _dense(case, problem):
        assert contender.work is not None
        try:
            contender.work()
            times[contender] = _time(contender.work, setting)
        except RuntimeError as error:  # this kernel does not take this
            print(contender.name, error, flush=True)
    return [min(times, key=times.__getitem__)]


def _measure(
    case: Case,
    problem: Problem,
    dense: Sequence[Contender],
    makers: Sequence[Callable[[Case, Problem], Contender]],
    setting: Setting,
    out: Path,
) -> None:
    """Time the contenders of a case in turn; print the table, and append the rows to a file."""
    entered = [*dense, *(make(case, problem) for make in makers)]
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int | None] = {}
    for contender in entered:
        assert contender.work is not None
        contender.work()
        peaks[contender.name] = run.peak_extra_bytes(contender.work, setting.device)
        seconds[contender.name] = []
    for _ in range(setting.rounds):
        for contender in entered:
            assert contender.work is not None
            seconds[contender.name].append(_time(contender.work, setting) / 1e3)
    timings = [Timing(name, tuple(seconds[name]), peaks[name]) for name in seconds]
    timings.sort(key=lambda t: (not t.name.startswith("dense"), t.median))  # the best dense leads
    print(run.table(case, timings), flush=True)
    rows = [run.row(case, t, timings[0], setting.device, setting.dtype) for t in timings]
    run.append(out / "results.jsonl", rows)


def _time(work: Work, setting: Setting) -> float:
    """Milliseconds of one call, by the device's own clock, averaged over ``SAMPLE_MS`` or more."""
    if setting.device == "cpu":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(repeats: int) -> float:
        begin.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / repeats

    once = sample(1)
    return once if once >= SAMPLE_MS else sample(round(SAMPLE_MS / once) + 1)


# The table.


def summary(rows: Sequence[dict[str, Any]], passes: Sequence[dict[str, Any]]) -> str:
    """The figures of all parts, and what they mean for a whole schedule of layers."""
    lines = ["", f"{'case':34}{'what':16}{'ms':>9}{'TFLOP/s':>9}{'x dense':>9}{'reached':>9}"]
    for row in rows:
        if row["backend"].startswith("dense") and ".dense." not in row["case"]:
            continue  # once is enough
        lines.append(
            f"{row['case']:34}{row['backend']:16}{row['median_ms']:9.2f}{row['tflops']:9.1f}"
            f"{row['speedup']:9.2f}{row['reached']:9.2f}"
        )
    for row in passes:
        lines.append(f"{row['what']:50}{row['median_ms']:9.2f}{row['gb_s']:9.0f} GB/s")
    for backend in dict.fromkeys(row["backend"] for row in rows):
        if backend.startswith("dense"):
            continue
        for end in ("fwd", "fwdbwd"):
            gain, limit = schedule_gain(rows, backend, end)
            if gain:
                lines.append(f"32 layers, {backend}, {end}: {gain:.2f}x dense, of {limit:.2f}x")
    return "\n".join(lines)


def schedule_gain(rows: Sequence[dict[str, Any]], backend: str, end: str) -> tuple[float, float]:
    """How much faster than dense the released schedule of layers is, and the most there could be.

    From the layers' own ratios to dense attention, single-skip and group-skip in turn; 0 if a
    layer was not measured. Group-skip is taken in the order in which it is faster.
    """
    gains: dict[tuple[int, str], float] = {}
    for row in rows:
        case = CASES[row["case"]]
        if row["backend"] == backend and row["case"].endswith(f".{end}") and case.kind != "dense":
            key = case.k, case.kind
            gains[key] = max(gains.get(key, 0.0), row["speedup"])
    if len(gains) < 2 * len(SPARSITY):
        return 0.0, 0.0
    spent = sum(
        layers if k == 1 else layers / 2 * sum(1 / gains[k, kind] for kind in ("single", "group"))
        for layers, k in zip(*SCHEDULE, strict=True)
    )
    case = CASES[rows[0]["case"]]
    return sum(SCHEDULE[0]) / spent, ceiling(*SCHEDULE, case.N, case.T)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or one of them here; returns the exit status, 1 if a part failed."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and the log")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with small shapes")
    parser.add_argument("--part", choices=WORK, help="only this one, in this process")
    options = parser.parse_args(arguments)
    setting = DRY_RUN if options.dry_run else GPU
    if not options.dry_run and not torch.cuda.is_available():
        print("bench/gpu.sh: torch finds no GPU here; --dry-run needs none", file=sys.stderr)
        return 2
    if options.part:
        WORK[options.part](setting, options.out)
        return 0
    for name in ("results.jsonl", "copies.jsonl", "log.txt"):
        (options.out / name).unlink(missing_ok=True)
    ended = run_parts(parts(options.out, dry_run=options.dry_run), options.out)
    print(summary(_rows(options.out / "results.jsonl"), _rows(options.out / "copies.jsonl")))
    print(f"\n{run.device_name(setting.device)}; {run.versions()}; {run.commit()}")
    failed = [part for part in ended if part.fault]
    print(*(f"FAILED {part.name}: {part.fault}" for part in failed), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
