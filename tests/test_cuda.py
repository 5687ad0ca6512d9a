"""On a GPU: exact answers by every library and kernel, the same bits where promised, no waiting.

Skipped without one; `bench/gpu.sh` runs it where there is. Every test asks :class:`ran.Ran` which
libraries and kernels ran, so that none passes on the answers of another.
"""

import dataclasses
from contextlib import contextmanager
from unittest import mock

import pytest
import ran as recorder
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import skiparse
from skiparse import SkipPattern, registry
from skiparse.backends import sdpa
from skiparse.testing import check, check_sample, make_problem, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LIBRARIES = ("cudnn", "fa3", "fa4", "flash")
WAYS = (*LIBRARIES, "triton")  # a library of the sdpa backend, or the Triton backend
PACKAGES = {"fa3": sdpa.FA3, "fa4": sdpa.FA4}
KERNELS = {"cudnn": "cudnn", "flash": "pytorch_flash"}  # part of the names of torch's own
PATTERNS = (
    SkipPattern.dense(),
    SkipPattern.single(4),
    SkipPattern.group(4),
    SkipPattern.block(4, 256),
    SkipPattern(3, 2),
)
HALVES = (torch.bfloat16, torch.float16)
FORWARD = ("skiparse_forward", "skiparse_forward_tma")
BACKWARD = ("skiparse_delta", "skiparse_dkdv", "skiparse_dq")
TILES_FORWARD, TILES_BACKWARD = ((9, 0), (10, 0)), ((9, 0),)  # compute capabilities
BACKWARD_TMA = ("skiparse_delta", "skiparse_dkdv_tma", "skiparse_dq_tma")


@pytest.fixture(autouse=True)
def ran():
    """What ran. Fresh memory is NaN, for which torch must be deterministic, but only warn.

    So all libraries may run, as by default; a test of what is refused says so itself.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    with recorder.recorded() as found:
        yield found
    torch.use_deterministic_algorithms(False)


@contextmanager
def only(way):
    """That way alone: torch's switches and our list say one library. Yields the backend's name."""
    if way == "triton":
        yield "triton"
        return
    if way in PACKAGES and not sdpa._is_there(PACKAGES[way]):
        pytest.skip(f"{PACKAGES[way]} is not installed")
    switch = SDPBackend.CUDNN_ATTENTION if way == "cudnn" else SDPBackend.FLASH_ATTENTION
    library = next(x for x in sdpa.LIBRARIES if x.name == way)
    with sdpa_kernel(switch), mock.patch.object(sdpa, "LIBRARIES", (library,)):
        yield "sdpa"


def names(way, *, tma=False, backward=True):
    """What runs: of Triton the kernels that copy tiles, where rows are regular, or the others."""
    if way == "triton":
        capability = torch.cuda.get_device_capability()
        forward = FORWARD[tma and capability in TILES_FORWARD]
        back = BACKWARD_TMA if tma and capability in TILES_BACKWARD else BACKWARD
        return (forward, *(back if backward else ()))
    return (f"{way} forward", *([f"{way} backward"] if backward else []))


def problem_of(p, dtype=torch.bfloat16, **shape):
    return make_problem(p, device="cuda", dtype=dtype, **{"N": 256, "D": 64, **shape})


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_libraries_give_the_exact_answer(p, library, dtype, ran):
    for shape in ({"T": 0}, {"T": 40}, {"N": 251, "T": 7}, {"D": 128, "T": 64}):
        problem = problem_of(p, dtype, B=2, **shape)
        with only(library) as backend:
            check(run(problem, backend), problem)
        ran.only(*names(library))


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("B", [1, 2])
def test_libraries_take_any_layout(B, library, layout, ran):
    for p in PATTERNS:
        for T in (0, 40):
            problem = problem_of(p, B=B, T=T, layout=layout)
            with only(library) as backend:
                check(run(problem, backend), problem)
            ran.only(*names(library))


@pytest.mark.parametrize("library", LIBRARIES)
def test_rows_may_begin_anywhere(library, ran):
    """No multiple of 16 bytes from the beginning, or from each other."""
    for p in PATTERNS[1:4]:
        problem = problem_of(p, B=2)
        wide = problem.k.new_zeros(*problem.k.shape[:3], 68)
        for odd in (wide.flatten()[4 : 4 + problem.k.numel()].view_as(problem.k), wide[..., 4:]):
            moved = dataclasses.replace(problem, k=odd.copy_(problem.k))
            with only(library) as backend:
                check(run(moved, backend), moved)
            ran.only(*names(library))


@pytest.mark.parametrize("library", LIBRARIES)
def test_strides_of_the_gradient_may_change_between_calls(library, ran):
    """cuDNN keeps plans by the strides of q, k and v, not of the output and its gradient."""
    problem = problem_of(SkipPattern.block(4, 256))
    bent = (
        problem.grad_out.transpose(1, 2).contiguous().transpose(1, 2),
        problem.grad_out[:, :1].expand_as(problem.grad_out),
    )
    for grad_out in (problem.grad_out, *bent, problem.grad_out):
        other = dataclasses.replace(problem, grad_out=grad_out)
        with only(library) as backend:
            check(run(other, backend), other)
        ran.only(*names(library))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("p", "B"),
    [(SkipPattern.single(40_000), 1), (SkipPattern.block(40_000, 120_000), 2)],
    ids=str,
)
def test_more_heads_or_batch_entries_than_a_grid_has_room_for(p, B, library, ran):
    """80,000 of them, in two calls."""
    problem = problem_of(p, B=B, N=120_000, H=2)
    with only(library) as backend:
        check_sample(problem, backend, backward=True)
    ran.only(*names(library))


@pytest.mark.parametrize("library", KERNELS)
def test_the_device_runs_the_kernels_of_the_library(library, ran):
    """As the profiler sees them, which knows nothing of our names."""
    problem = problem_of(SkipPattern.single(4))
    with only(library) as backend, profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run(problem, backend)
        torch.cuda.synchronize()
    ran.only(*names(library))
    events = profiler.events() or ()
    kernels = {event.name for event in events if event.device_type == DeviceType.CUDA}
    if not kernels:
        pytest.skip("the profiler sees no kernels on this machine")
    for other, part in KERNELS.items():
        assert any(part in kernel for kernel in kernels) is (other == library), sorted(kernels)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_triton_gives_the_exact_answer(p, dtype, ran):
    for shape in ({"T": 0}, {"T": 40, "masked": True}, {"N": 251, "T": 7, "D": 128}):
        problem = problem_of(p, dtype, B=2, **shape)
        check(run(problem, "triton"), problem)
        regular = p == SkipPattern.dense() or ("N" not in shape and p != SkipPattern(3, 2))
        ran.only(*names("triton", tma=regular and dtype in HALVES))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("p", "N"),
    [*((p, 2080) for p in PATTERNS[:3]), (SkipPattern.block(4, 2048), 2048)],
    ids=str,
)
def test_pingpong_gives_the_exact_answer(p, N, dtype, ran):
    """Several laps of its slots; the last blocks of keys whole and not."""
    reason = registry.load("triton.pingpong").why_not()
    if reason is not None:
        pytest.skip(reason)
    shapes = {"T": 0}, {"T": 1}, {"T": 400}, {"T": 128, "D": 128}
    for shape in (*shapes, {"T": 40, "masked": True}, {"T": 40, "D": 128, "masked": True}):
        problem = problem_of(p, dtype, B=2, N=N, H=3, **shape)
        check(run(problem, "triton.pingpong"), problem)
        ran.only("skiparse_forward_pingpong", *BACKWARD_TMA)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["single", "group"])
def test_headline_shape(kind, way, ran):
    """Two heads of it, forward and all six gradients."""
    p = getattr(SkipPattern, kind)(8)
    problem = problem_of(p, N=36864, T=512, H=2, D=128)
    with only(way) as backend:
        check_sample(problem, backend, backward=True)
    ran.only(*names(way, tma=True))


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("p", [SkipPattern.single(4), SkipPattern.group(4)], ids=str)
def test_thirty_runs_give_the_same_bits(p, way, ran):
    """Triton by itself, a library in torch's deterministic mode."""
    torch.use_deterministic_algorithms(way != "triton")
    problem = problem_of(p, B=2, N=2051, T=77, H=8)
    with only(way) as backend:
        first = run(problem, backend)
        for _ in range(29):
            assert all(map(torch.equal, run(problem, backend), first))
    ran.only(*names(way))


def test_cudnn_is_refused_where_bits_must_be_the_same(ran):
    torch.use_deterministic_algorithms(True)
    with only("cudnn") as backend, pytest.raises(RuntimeError, match="no library takes"):
        run(problem_of(SkipPattern.single(4)), backend)
    ran.only()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("p", PATTERNS[1:4], ids=str)
def test_a_graph_captures_forward_and_backward(p, way, ran):
    problem = problem_of(p, T=40)
    inputs = [x.clone().requires_grad_() for x in problem.inputs]
    grads = (problem.grad_out, problem.grad_text_out)

    def step(backend):
        outputs = skiparse.joint_attention(*inputs, p, backend=backend)
        return (*outputs, *torch.autograd.grad(outputs, inputs, grads))

    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with only(way) as backend:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(backend)  # compiles, plans, and fills workspaces
        torch.cuda.current_stream().wait_stream(stream)
        ran.only(*names(way, tma=True))
        with torch.cuda.graph(graph):
            captured = step(backend)
        ran.only(*names(way, tma=True))
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        graph.replay()
        ran.only()
        for got, wanted in zip(captured, step(backend), strict=True):
            torch.testing.assert_close(got, wanted)
    ran.only(*names(way, tma=True))


@pytest.mark.parametrize("way", WAYS)
def test_nothing_waits_for_the_device(way, ran):
    problem = problem_of(SkipPattern.group(4), T=40)
    with only(way) as backend:
        run(problem, backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(problem, backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    ran.only(*names(way, tma=True))


@pytest.mark.parametrize(("way", "buffers"), [*((x, 4) for x in LIBRARIES), ("triton", 0)])
def test_peak_memory(way, buffers, ran):
    """Beyond inputs and outputs: with text, packed q, k, v and output; fused kernels need none."""
    p = SkipPattern.single(8)
    problem = problem_of(p, N=36864, T=512, H=4, D=128)
    q = problem.q

    def forward(backend):
        with torch.no_grad():
            return skiparse.joint_attention(*problem.inputs, p, backend=backend)

    with only(way) as backend:
        forward(backend)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = forward(backend)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before
    ran.only(*names(way, tma=True, backward=False))
    packed = q.nbytes * (q.shape[1] + 8 * 512) / q.shape[1]
    lse = 2 * 4 * (packed / 2 / 128)  # fp32, of every row, once from the library and once in order
    assert kept[0].shape == q.shape
    assert extra <= q.nbytes + buffers * packed + packed / 9 + lse + 2**22
