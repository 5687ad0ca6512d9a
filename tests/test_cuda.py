"""On a GPU: exact answers by every library and kernel, the same bits where promised, no waiting.

Skipped without one; `bench/gpu.sh` runs it where there is.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import skiparse
from skiparse import SkipPattern, registry
from skiparse.testing import check, check_sample, make_problem, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

LIBRARIES = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
PATTERNS = (
    SkipPattern.dense(),
    SkipPattern.single(4),
    SkipPattern.group(4),
    SkipPattern.block(4, 256),
    SkipPattern(3, 2),
)
HALVES = (torch.bfloat16, torch.float16)


def only(library):
    """Torch's switches: that library, and plain operations for the eager yardstick."""
    return sdpa_kernel([LIBRARIES[library], SDPBackend.MATH])


def problem_of(p, dtype=torch.bfloat16, **shape):
    return make_problem(p, device="cuda", dtype=dtype, **{"N": 256, "D": 64, **shape})


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_libraries_give_the_exact_answer(p, library, dtype):
    for shape in ({"T": 0}, {"T": 40}, {"N": 251, "T": 7}, {"D": 128, "T": 64}):
        problem = problem_of(p, dtype, B=2, **shape)
        with only(library):
            check(run(problem, "sdpa"), problem)


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("B", [1, 2])
def test_libraries_take_any_layout(B, library, layout):
    for p in PATTERNS:
        for T in (0, 40):
            problem = problem_of(p, B=B, T=T, layout=layout)
            with only(library):
                check(run(problem, "sdpa"), problem)


@pytest.mark.parametrize("library", LIBRARIES)
def test_strides_of_the_gradient_may_change_between_calls(library):
    """cuDNN keeps plans by the strides of q, k and v, not of the output and its gradient."""
    problem = problem_of(SkipPattern.block(4, 256))
    bent = (
        problem.grad_out.transpose(1, 2).contiguous().transpose(1, 2),
        problem.grad_out[:, :1].expand_as(problem.grad_out),
    )
    for grad_out in (problem.grad_out, *bent, problem.grad_out):
        other = problem.__class__(**(problem.__dict__ | {"grad_out": grad_out}))
        with only(library):
            check(run(other, "sdpa"), other)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_triton_gives_the_exact_answer(p, dtype):
    for shape in ({"T": 0}, {"T": 40, "masked": True}, {"N": 251, "T": 7, "D": 128}):
        problem = problem_of(p, dtype, B=2, **shape)
        check(run(problem, "triton"), problem)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("p", "N"),
    [*((p, 2080) for p in PATTERNS[:3]), (SkipPattern.block(4, 2048), 2048)],
    ids=str,
)
def test_pingpong_gives_the_exact_answer(p, N, dtype):
    """Several laps of its slots; the last blocks of keys whole and not."""
    reason = registry.load("triton.pingpong").why_not()
    if reason is not None:
        pytest.skip(reason)
    for shape in ({"T": 0}, {"T": 1}, {"T": 400}, {"T": 128, "D": 128}):
        problem = problem_of(p, dtype, B=2, N=N, H=3, **shape)
        check(run(problem, "triton.pingpong"), problem)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("kind", ["single", "group"])
def test_headline_shape(kind, backend):
    """Two heads of it, forward and all six gradients."""
    p = getattr(SkipPattern, kind)(8)
    problem = problem_of(p, N=36864, T=512, H=2, D=128)
    check_sample(problem, backend, backward=True)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("p", [SkipPattern.single(4), SkipPattern.group(4)], ids=str)
def test_thirty_runs_give_the_same_bits(p, backend):
    """Triton by itself, a library in torch's deterministic mode."""
    torch.use_deterministic_algorithms(backend == "sdpa")
    problem = problem_of(p, B=2, N=2051, T=77, H=8)
    first = run(problem, backend)
    for _ in range(29):
        assert all(map(torch.equal, run(problem, backend), first))


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("p", PATTERNS[1:4], ids=str)
def test_a_graph_captures_forward_and_backward(p, backend):
    problem = problem_of(p, T=40)
    inputs = [x.clone().requires_grad_() for x in problem.inputs]
    grads = (problem.grad_out, problem.grad_text_out)

    def step():
        outputs = skiparse.joint_attention(*inputs, p, backend=backend)
        return (*outputs, *torch.autograd.grad(outputs, inputs, grads))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, plans, and fills workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
def test_nothing_waits_for_the_device(backend):
    problem = problem_of(SkipPattern.group(4), T=40)
    run(problem, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(problem, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backend", "buffers"), [("sdpa", 4), ("triton", 0)])
def test_peak_memory(backend, buffers):
    """Beyond inputs and outputs: with text, packed q, k, v and output; fused kernels need none."""
    p = SkipPattern.single(8)
    problem = problem_of(p, N=36864, T=512, H=4, D=128)
    q = problem.q

    def forward():
        with torch.no_grad():
            return skiparse.joint_attention(*problem.inputs, p, backend=backend)

    forward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = forward()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    packed = q.nbytes * (q.shape[1] + 8 * 512) / q.shape[1]
    lse = 2 * 4 * (packed / 2 / 128)  # fp32, of every row, once from the library and once in order
    assert kept[0].shape == q.shape
    assert extra <= q.nbytes + buffers * packed + packed / 9 + lse + 2**22
