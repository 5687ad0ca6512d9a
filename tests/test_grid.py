"""Attention over grids is exact on every one of them, in every order, whichever backend runs it."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import skiparse
from skiparse import GridPattern, SkipPattern
from skiparse.pattern import KINDS, ORDERS, grid_order, has_grid_order, inverse_grid_order
from skiparse.testing import check, check_sample, make_problem, run, settings

BACKENDS = ("reference", "sdpa")
KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"

# Even and ragged, a period of ratio**2 or a part of it; the last have empty sub-sequences.
GRIDS = (
    ((2, 4, 8), 2), ((1, 6, 10), 2), ((2, 5, 7), 2), ((1, 9, 9), 3), ((1, 7, 5), 3),
    ((1, 6, 9), 4), ((2, 1, 3), 2), ((1, 1, 1), 3),
)  # fmt: skip


def patterns(grid, ratio):
    for kind, order in itertools.product(KINDS, ORDERS):
        if has_grid_order(grid, ratio, order) and (order not in KINDS or order == kind):
            yield GridPattern(grid, ratio, kind, order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("grid", "ratio"), GRIDS, ids=str)
def test_every_grid_in_every_order(grid, ratio, backend):
    for p in patterns(grid, ratio):
        for T, masked, text_queries in ((0, False, True), (3, True, True), (3, True, False)):
            problem = make_problem(
                p, B=2, N=p.tokens, T=T, D=32, masked=masked, text_queries=text_queries,
                lse_grads=masked,
            )  # fmt: skip
            check(run(problem, backend), problem)


# In the interpreter every program is slow: a few grids, each kind, order and text in one of them.
INTERPRETED = (
    (GridPattern.single((1, 5, 7), 2), {"T": 3, "masked": True}),
    (GridPattern.group((2, 5, 6), 2), {"lse_grads": True}),
    (GridPattern.group((1, 7, 5), 3), {"T": 3, "text_queries": False}),
    (GridPattern.single((1, 1, 3), 2), {"T": 2}),
    (GridPattern.group((1, 6, 10), 2, order="skip"), {"T": 3, "masked": True, "lse_grads": True}),
    (GridPattern.single((1, 3, 5), 2, order="single"), {"T": 3, "text_queries": False}),
    (SkipPattern.group(2), {"N": 20, "T": 3, "text_queries": False, "masked": True}),
)


@pytest.mark.parametrize(("p", "shape"), INTERPRETED, ids=str)
def test_triton(p, shape):
    N = p.tokens if isinstance(p, GridPattern) else shape["N"]
    problem = make_problem(p, H=1, **(shape | {"N": N}))
    check(run(problem, "triton"), problem)


@pytest.mark.full
def test_triton_on_every_grid():
    for grid, ratio in GRIDS:
        for p in patterns(grid, ratio):
            problem = make_problem(p, B=2, N=p.tokens, T=3, masked=True, lse_grads=True)
            check(run(problem, "triton"), problem)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype(dtype, backend):
    for p in (GridPattern.single((1, 5, 8), 2), GridPattern.group((2, 6, 9), 3, order="group")):
        problem = make_problem(p, B=2, N=p.tokens, T=5, D=32, dtype=dtype, masked=True)
        check(run(problem, backend), problem)


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
@pytest.mark.parametrize("order", ["natural", "skip", "group"])
def test_any_layout(order, layout):
    p = GridPattern.group((2, 6, 10), 2, order=order)
    for T in (0, 5):
        problem = make_problem(p, B=2, N=p.tokens, T=T, D=32, layout=layout)
        check(run(problem, "sdpa"), problem)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_full_matrix(backend, dtype):
    sides = itertools.product((1, 2), (1, 3, 8, 9), (2, 5, 8), (1, 2, 3, 4))
    for (*grid, ratio), T, masked in itertools.product(sides, (0, 7), (False, True)):
        for p, queries in itertools.product(patterns(tuple(grid), ratio), (True, False)):
            problem = make_problem(
                p, B=2, N=p.tokens, T=T, D=32, dtype=dtype, masked=masked, text_queries=queries
            )  # fmt: skip
            check(run(problem, backend), problem)


def test_the_grids_of_wan():
    """480P, one head and five frames of 21: the real rows and columns, a sample of the queries."""
    for kind, ratio in itertools.product(KINDS, (2, 4)):
        p = GridPattern((5, 30, 52), ratio, kind)
        problem = make_problem(p, N=p.tokens, T=16, H=1, D=64, text_queries=False)
        check_sample(problem, "sdpa", backward=True, rows=32)


@pytest.mark.parametrize("kind", KINDS)
def test_another_order_gives_the_natural_answer(kind):
    """Outputs and gradients equal the natural-order ones after the permutation."""
    natural = make_problem(GridPattern((2, 4, 8), 2, kind), B=2, N=64, T=5, D=32)
    for order in ("tile", "skip", kind):
        there, back = (
            torch.from_numpy(f((2, 4, 8), 2, order)) for f in (grid_order, inverse_grid_order)
        )
        moved = {name: getattr(natural, name)[:, there] for name in ("q", "k", "v", "grad_out")}
        p = GridPattern((2, 4, 8), 2, kind, order)
        answer = run(dataclasses.replace(natural, **moved, pattern=p), "sdpa")
        found = {
            name: getattr(answer, name)[:, back] for name in ("out", "grad_q", "grad_k", "grad_v")
        }
        check(answer._replace(**found, lse=answer.lse[:, :, back]), natural)


def test_public_calls_agree_with_the_operator():
    p = GridPattern.group((2, 5, 7), 2)
    problem = make_problem(p, B=2, N=70, T=4, masked=True)
    q, k, v, *text = problem.inputs
    masks = {"mask": problem.mask, "text_mask": problem.text_mask}
    answer = run(problem, "auto")
    out, text_out = skiparse.joint_attention(q, k, v, *text, p, **masks)
    assert torch.equal(out, answer.out)
    assert torch.equal(text_out, answer.text_out)
    alone, lse = skiparse.attention_with_lse(q, k, v, p, mask=problem.mask)
    assert torch.equal(skiparse.attention(q, k, v, p, mask=problem.mask), alone)
    problem = make_problem(p, B=2, N=70, masked=True)
    check(run(problem, "auto"), problem)
    assert lse.shape == (2, 2, 70)


def test_another_number_of_tokens_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr("skiparse.ops.call", lambda *_: pytest.fail("launched"))
    q = torch.zeros(1, 25, 2, 16)
    with pytest.raises(ValueError, match=r"grid=\(2, 3, 4\) has 24 tokens, not 25; give \(frames"):
        skiparse.attention(q, q, q, GridPattern.single((2, 3, 4), 2))


# Keys and values of the text without queries.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "p",
    [SkipPattern.dense(), SkipPattern.single(4), SkipPattern.group(4), SkipPattern(3, 7)],
    ids=str,
)
def test_keys_without_queries(p, backend):
    """As with queries, whose outputs get no gradient; of lengths that divide, and not."""
    for N, masked in ((64, False), (45, True), (3, True)):
        shape = {"B": 2, "N": N, "T": 7, "D": 32, "masked": masked, "lse_grads": True}
        problem = make_problem(p, **shape, text_queries=False)
        assert problem.text_q.shape[1] == 0
        answer = run(problem, backend)
        check(answer, problem)
        assert answer.text_out.shape == (2, 0, 2, 32)
        whole = run(make_problem(p, **shape), backend)
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(answer.out, whole.out, **close)
        torch.testing.assert_close(answer.lse, whole.lse, **close)


def test_the_public_call_without_text_queries():
    problem = make_problem(SkipPattern.group(2), B=2, N=20, T=5, masked=True)
    q, k, v, text_q, text_k, text_v = (x.requires_grad_() for x in problem.inputs)
    masks = {"mask": problem.mask, "text_mask": problem.text_mask}
    given = (q, k, v, text_q, text_k, text_v)
    out = skiparse.joint_attention(*given, problem.pattern, **masks)[0]
    alone, none = skiparse.joint_attention(
        q, k, v, None, text_k, text_v, problem.pattern, **masks
    )  # fmt: skip
    assert none.shape == (2, 0, 2, 16)
    torch.testing.assert_close(alone, out)
    inputs = (q, k, v, text_k, text_v)
    wanted = torch.autograd.grad(out, inputs, problem.grad_out)
    for x, y in zip(torch.autograd.grad(alone, inputs, problem.grad_out), wanted, strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match=r"text_v has shape \[2, 4, 2, 16\], .* length of text_k"):
        skiparse.joint_attention(q, k, v, None, text_k, text_v[:, :4], problem.pattern)


def test_no_text_row_is_computed():
    """The matrix products are those of the video's queries alone."""
    q = torch.zeros(1, 24, 2, 16)
    text = torch.zeros(1, 5, 2, 16)
    p = GridPattern.single((2, 3, 4), 2)
    with FlopCounterMode(display=False) as counter:
        skiparse.joint_attention(q, q, q, None, text, text, p)
    assert counter.get_total_flops() == 4 * 2 * 16 * sum(n * (n + 5) for n in p.lengths(24))


# The operator is a good citizen with them.


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_gradcheck_in_fp64(backend, text_queries):
    for p in (GridPattern.single((1, 3, 4), 2), GridPattern.group((1, 3, 4), 2, order="group")):
        shape = {"N": 12, "T": 2, "H": 1, "D": 3, "dtype": torch.float64, "masked": True}
        problem = make_problem(p, **shape)
        q, k, v, *text = (x.requires_grad_() for x in problem.inputs)
        text[0] = text[0] if text_queries else None

        def call(*inputs, p=p, problem=problem):
            given = inputs if text_queries else (*inputs[:3], None, *inputs[3:])
            return skiparse.joint_attention(
                *given, p, mask=problem.mask, text_mask=problem.text_mask, backend=backend
            )

        assert torch.autograd.gradcheck(call, [x for x in (q, k, v, *text) if x is not None])


@pytest.mark.parametrize("order", ["natural", "skip"])
def test_opcheck(order):
    p = GridPattern.group((1, 6, 4), 2, order=order)
    for queries in (True, False):
        problem = make_problem(p, B=2, N=24, T=5, masked=True, text_queries=queries)
        given = (*problem.inputs, *settings(problem, "sdpa"))
        leaves = [x.detach().requires_grad_() for x in given[:6]]
        torch.library.opcheck(torch.ops.skiparse.attention, (*leaves, *given[6:]))
        outputs = torch.ops.skiparse.attention(*given)
        *numbers, grid = given[8:]
        back = (problem.grad_out, outputs[1], *given[:8], *outputs, *numbers, *outputs[2:], grid)
        torch.library.opcheck(torch.ops.skiparse.attention_backward, back)
        tangents = (*problem.inputs, *given[:8], *numbers[:3], grid)
        torch.library.opcheck(torch.ops.skiparse.attention_jvp, tangents)


STRUCTURES = (
    (2, 6, 6), (3, 4, 6), (1, 9, 8), (2, 5, 8), (2, 7, 7), (1, 10, 10), (4, 2, 9), (2, 12, 8),
)  # fmt: skip


@pytest.mark.parametrize("dynamic", [None, True])
def test_ragged_structures_make_no_new_graphs(dynamic):
    """All grids and both kinds in one graph; what torch learns by itself costs four more."""

    def block(q, k, v, p):
        return skiparse.attention(q * 2, k, v, p).sin()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=dynamic)
    for grid, kind in itertools.product(STRUCTURES, KINDS):
        p = GridPattern(grid, 2, kind)
        inputs = [x.requires_grad_() for x in make_problem(p, N=p.tokens).inputs[:3]]
        out, wanted = compiled(*inputs, p), block(*inputs, p)
        assert torch.equal(out, wanted)
        for x, y in zip(
            *(torch.autograd.grad(o.sum(), inputs) for o in (out, wanted)), strict=True
        ):
            assert torch.equal(x, y)
    assert counter.frame_count <= (1 if dynamic else 5)


def test_inductor_compiles_it():
    torch._dynamo.reset()
    p = GridPattern.group((2, 5, 7), 2)
    q = make_problem(p, N=70).q
    compiled = torch.compile(lambda x: skiparse.attention(x * 2, x, x, p) + x, fullgraph=True)
    torch.testing.assert_close(compiled(q), skiparse.attention(q * 2, q, q, p) + q)


def test_forward_mode_and_functorch():
    p = GridPattern.group((1, 3, 4), 2)
    problem = make_problem(p, N=12, T=2, D=4, dtype=torch.float64)
    rows, text = problem.inputs[:3], problem.inputs[4:]

    def call(q):
        return skiparse.joint_attention(q, *rows[1:], None, *text, p)[0]

    tangent = problem.grad_out
    found = torch.func.jvp(call, rows[:1], (tangent,))[1]
    jacobian = torch.func.jacrev(call)(rows[0])  # [1, N, H, D, 1, N, H, D]
    torch.testing.assert_close(found, torch.tensordot(jacobian, tangent, 4))
    torch.testing.assert_close(torch.func.jacfwd(call)(rows[0]), jacobian)
    many = torch.stack([rows[0], rows[1]])
    torch.testing.assert_close(
        torch.func.vmap(call)(many), torch.stack([call(q) for q in many])
    )  # fmt: skip


@pytest.mark.parametrize("order", ["natural", "skip"])
def test_flops_are_counted(order):
    p = GridPattern.group((1, 6, 10), 2, order=order)
    problem = make_problem(p, B=2, N=60, T=5)
    inputs = [x.requires_grad_() for x in problem.inputs]
    forward = 4 * 2 * 2 * 16 * sum((n + 5) ** 2 for n in p.lengths(60))
    with FlopCounterMode(display=False) as counter:
        outputs = skiparse.joint_attention(*inputs, p)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(outputs, inputs, (problem.grad_out, problem.grad_text_out))
    assert counter.get_total_flops() == forward * 5 // 2


def test_in_order_there_is_a_view_and_a_call_for_each_length():
    """q, k and v are not copied; the output is, once, where there are several lengths."""
    for grid, lengths in (((2, 8, 8), 1), ((2, 6, 8), 2), ((2, 6, 10), 4)):
        p = GridPattern.group(grid, 2, order="skip")
        q, k, v = make_problem(p, N=p.tokens, D=64).inputs[:3]
        with (
            profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found,
            torch.no_grad(),
        ):
            skiparse.attention(q, k, v, p, backend="sdpa")
        events = [e for e in found.events() if e.name == KERNEL]
        assert len(events) == lengths
        sizes = [math.prod(e.input_shapes[0]) for e in found.events() if e.name == "aten::copy_"]
        assert sum(size for size in sizes if size >= 64) / q.numel() <= (lengths > 1) + 0.02


def test_packing_refuses_a_grid():
    p = GridPattern.single((1, 4, 4), 2)
    q, one = torch.zeros(1, 16, 1, 8), torch.zeros(8)
    text = dict.fromkeys(("text_q", "text_k", "text_v"), q[:, :2])
    norms = {"text_norm_q": one, "text_norm_k": one}
    angles = torch.zeros(16, 4)
    with pytest.raises(ValueError, match="a grid is not packed, call skiparse"):
        skiparse.norm_rope_pack(q, q, q, angles, angles, one, one, p, **text, **norms, axes=(8,))
