"""The operator is a good citizen: opcheck, compile, checkpoint, autocast, flop count, gradcheck."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import MATRIX
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import skiparse
from skiparse import SkipPattern
from skiparse.testing import make_problem, run

SINGLE, GROUP = SkipPattern.single(2), SkipPattern.group(2)


def leaves(problem):
    return [x.detach().requires_grad_() for x in problem.inputs]


@pytest.mark.parametrize("T", [0, 5])
@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("backend", [*MATRIX, "auto"])
def test_opcheck(backend, B, layout, T):
    for p in (SINGLE, GROUP):
        problem = make_problem(p, B=B, N=20, T=T, layout=layout, masked=T > 0)
        masks = (problem.mask, problem.text_mask)
        args = (*leaves(problem), *masks, p.sparsity, p.run, 0.25, backend)
        torch.library.opcheck(torch.ops.skiparse.attention, args)


def test_opcheck_of_the_backward():
    problem = make_problem(GROUP, B=2, N=20, T=5, masked=True)
    settings = (GROUP.sparsity, GROUP.run, 0.25, "sdpa")
    inputs = (*problem.inputs, problem.mask, problem.text_mask)
    outputs = torch.ops.skiparse.attention(*inputs, *settings)
    grads = (problem.grad_out, outputs[1])
    args = (*grads, *inputs, *outputs, *settings)
    torch.library.opcheck(torch.ops.skiparse.attention_backward, args)
    torch.library.opcheck(torch.ops.skiparse.attention_backward, (*args, *outputs[2:]))


def test_opcheck_of_the_forward_mode():
    problem = make_problem(GROUP, B=2, N=20, T=5, masked=True)
    inputs = (*problem.inputs, *problem.inputs, problem.mask, problem.text_mask)
    args = (*inputs, GROUP.sparsity, GROUP.run, 0.25)
    torch.library.opcheck(torch.ops.skiparse.attention_jvp, args)


def test_saved_graphs_find_the_operators_as_they_were():
    """A graph of `torch.export` calls them by these names and places; written by version 0.1.0.

    What came later stands behind that, and may be left out.
    """
    for line in (Path(__file__).parent / "data/schemas.txt").read_text().splitlines():
        schema = torch._C.parse_schema(line)
        operator = getattr(torch.ops.skiparse, schema.name.partition("::")[2]).default
        assert operator._schema.is_backward_compatible_with(schema)


def both(q, k, v, text_q, text_k, text_v, mask):
    out = skiparse.attention(q, k, v, GROUP, mask=mask)
    video, text = skiparse.joint_attention(q, k, v, text_q, text_k, text_v, SINGLE, mask=mask)
    return out + video, text


def test_compiles_whole_and_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, N in enumerate((32, 36, 45, 64)):
        problem = make_problem(GROUP, B=2, N=N, T=5, masked=True)
        inputs, again = leaves(problem), leaves(problem)
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            outputs = compiled(*inputs, problem.mask)
            grads = torch.autograd.grad(outputs, inputs, (problem.grad_out, problem.grad_text_out))
        expected = both(*again, problem.mask)
        wanted = torch.autograd.grad(expected, again, (problem.grad_out, problem.grad_text_out))
        for x, y in zip((*outputs, *grads), (*expected, *wanted), strict=True):
            assert torch.equal(x, y)


def test_inductor_compiles_it():
    torch._dynamo.reset()
    problem = make_problem(GROUP, B=2, N=20, T=5, masked=True)
    inputs = (*problem.inputs, problem.mask)
    # fuses `out + video`, so this is not only the operator
    out, text = torch.compile(both, fullgraph=True)(*inputs)
    expected, expected_text = both(*inputs)
    assert torch.equal(out, expected)
    torch.testing.assert_close(text, expected_text)  # the mean may be summed in another order


def test_inside_activation_checkpointing():
    problem = make_problem(GROUP, B=2, N=30, T=5)

    def block(*inputs):
        return skiparse.joint_attention(*inputs, GROUP)

    grads = (problem.grad_out, problem.grad_text_out)
    inputs, again = leaves(problem), leaves(problem)
    plain = torch.autograd.grad(block(*inputs), inputs, grads)
    kept = torch.autograd.grad(checkpoint(block, *again, use_reentrant=False), again, grads)
    for x, y in zip(plain, kept, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize(
    ("p", "N"), [(SkipPattern.single(3), 7), (GROUP, 9), (SkipPattern(2, 5), 10)]
)
def test_gradcheck_in_fp64(p, N, backend):
    problem = make_problem(p, N=N, T=2, H=1, D=3, dtype=torch.float64, masked=True)

    def call(*inputs):
        return skiparse.joint_attention(
            *inputs, p, mask=problem.mask, text_mask=problem.text_mask, backend=backend
        )

    assert torch.autograd.gradcheck(call, leaves(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_sdpa(dtype):
    problem = make_problem(GROUP, N=30, T=5)
    inputs = leaves(problem)
    inputs[1] = inputs[1].detach().to(torch.bfloat16).requires_grad_()  # mixed on purpose
    with torch.autocast("cpu", dtype=dtype):
        out, text_out = skiparse.joint_attention(*inputs, GROUP)
        compiled = torch.compile(skiparse.joint_attention, fullgraph=True, backend="aot_eager")
        again, _ = compiled(*inputs, GROUP)
    assert out.dtype == text_out.dtype == again.dtype == dtype
    grads = torch.autograd.grad((out, text_out), inputs, (out, text_out))
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    narrow = [x.detach().to(dtype) for x in inputs]
    assert torch.equal(out, skiparse.joint_attention(*narrow, GROUP)[0])


def test_autocast_leaves_fp64_alone():
    inputs = make_problem(GROUP, N=12, dtype=torch.float64).inputs[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert skiparse.attention(*inputs, GROUP).dtype == torch.float64


@pytest.mark.parametrize("p", [SkipPattern.dense(), SkipPattern.single(4), SkipPattern.group(3)])
def test_flops_are_counted(p):
    B, N, T, H, D = 2, 31, 5, 2, 16
    problem = make_problem(p, B=B, N=N, T=T, H=H, D=D)
    inputs = leaves(problem)
    forward = 4 * B * H * D * p.pairs(N, T)
    with FlopCounterMode(display=False) as counter:
        outputs = skiparse.joint_attention(*inputs, p)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(outputs, inputs, (problem.grad_out, problem.grad_text_out))
    assert counter.get_total_flops() == forward * 5 // 2


@pytest.mark.parametrize("first", ["skiparse", "torch.utils.flop_counter"])
def test_flops_are_counted_whichever_is_imported_first(first):
    code = (
        f"import {first}, torch, skiparse\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "x = torch.ones(1, 8, 1, 16)\n"
        "with FlopCounterMode(display=False) as c:\n"
        "    skiparse.attention(x, x, x, skiparse.SkipPattern.single(2))\n"
        "print(c.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4 * 16 * 32


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("p", [SINGLE, GROUP], ids=str)
def test_thirty_runs_are_bitwise_equal(p, backend):
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        problem = make_problem(p, B=2, N=200, T=20, H=3, D=32)
        first = run(problem, backend)
        for _ in range(29):
            for x, y in zip(run(problem, backend), first, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(threads)


def test_flops_are_counted_after_somebody_asked_for_the_counter():
    code = (
        "import importlib.util, torch, skiparse\n"
        "importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "x = torch.ones(1, 8, 1, 16)\n"
        "with FlopCounterMode(display=False) as c:\n"
        "    skiparse.attention(x, x, x, skiparse.SkipPattern.single(2))\n"
        "print(c.get_total_flops())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4 * 16 * 32


def test_a_changing_scale_compiles():
    torch._dynamo.reset()
    q = make_problem(GROUP, N=20).q

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(q, scale):
        return skiparse.attention(q, q, q, GROUP, scale=scale)

    for scale in (0.1, 0.2, 0.3):
        assert torch.equal(compiled(q, scale), skiparse.attention(q, q, q, GROUP, scale=scale))


def test_numpy_numbers_in_a_pattern_compile():
    torch._dynamo.reset()
    q = make_problem(GROUP, N=20).q
    compiled = torch.compile(skiparse.attention, fullgraph=True, backend="aot_eager")
    numbers = SkipPattern(np.int64(2), np.int32(2))
    assert torch.equal(compiled(q, q, q, numbers), skiparse.attention(q, q, q, GROUP))


def test_integer_masks_compile():
    torch._dynamo.reset()
    problem = make_problem(GROUP, N=20, masked=True)
    q, mask = problem.q, problem.mask
    compiled = torch.compile(skiparse.attention, fullgraph=True, backend="aot_eager")
    found = compiled(q, q, q, GROUP, mask=mask.long())
    assert torch.equal(found, skiparse.attention(q, q, q, GROUP, mask=mask))
    with pytest.raises(RuntimeError, match="integers that are only 0 and 1"):
        compiled(q, q, q, GROUP, mask=mask.long() * 255)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 30, 4, 16, device="meta")
    text = torch.empty(2, 5, 4, 16, device="meta")
    out, text_out = skiparse.joint_attention(q, q, q, text, text, text, GROUP)
    assert out.shape == q.shape
    assert text_out.shape == text.shape
