"""Derivatives of every kind: forward mode, `torch.func`, and those of the log-sum-exp."""

import itertools

import pytest
import torch
from backends import MATRIX, SMALL
from torch.autograd import forward_ad

import skiparse
from skiparse import SkipPattern
from skiparse.testing import check, make_problem, oracle_rows, run

SINGLE, GROUP = SkipPattern.single(2), SkipPattern.group(2)
PATTERNS = (SkipPattern.dense(), SINGLE, GROUP, SkipPattern(3, 2), SkipPattern.block(4, 48))


def close(x, y):
    """Equal but for rounding of fp64."""
    torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * max(y.abs().max().item(), 1.0))


# The log-sum-exp.


@pytest.mark.parametrize("backend", SMALL)
@pytest.mark.parametrize("p", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_log_sum_exp_is_differentiable(dtype, p, backend):
    for T, masked in ((0, False), (5, True)):
        shape = {"B": 2, "N": 48, "T": T, "D": 32, "dtype": dtype, "masked": masked}
        problem = make_problem(p, **shape, lse_grads=True)
        check(run(problem, backend), problem)


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("p", [SINGLE, GROUP, SkipPattern(3, 2)], ids=str)
def test_its_gradient_alone(p, backend):
    """Against the derivative of the definition, in fp64, where the outputs get none."""
    problem = make_problem(p, B=2, N=23, T=4, dtype=torch.float64, lse_grads=True, masked=True)
    inputs = [x.detach().requires_grad_() for x in problem.inputs]
    settings = (problem.mask, problem.text_mask, p.sparsity, p.run, 0.25, backend)
    lse, text_lse = torch.ops.skiparse.attention(*inputs, *settings)[2:]
    loss = (lse * problem.grad_lse).sum() + (text_lse * problem.grad_text_lse).sum()
    found = torch.autograd.grad(loss, inputs)
    rows = torch.arange(23 + p.sparsity * 4)
    weights = torch.cat([problem.grad_lse, problem.grad_text_lse.flatten(2)], 2)
    scaled = problem.__class__(**(problem.__dict__ | {"scale": 0.25}))
    exact = oracle_rows(scaled.with_inputs(inputs), rows)[1]
    wanted = torch.autograd.grad((exact * weights).sum(), inputs, materialize_grads=True)
    for x, y in zip(found, wanted, strict=True):
        close(x, y)


@pytest.mark.parametrize("backend", SMALL)
def test_a_row_without_keys_passes_no_gradient(backend):
    """Its log-sum-exp is -inf, whatever gradient it is given."""
    problem = make_problem(SINGLE, N=16, D=32)
    q, k, v = (x.detach().requires_grad_() for x in problem.inputs[:3])
    mask = torch.arange(16)[None] % 2 == 0  # nothing is left of the second sub-sequence
    out, lse = skiparse.attention_with_lse(q, k, v, SINGLE, mask=mask, backend=backend)
    grads = torch.autograd.grad((out, lse), (q, k, v), (problem.grad_out, torch.ones_like(lse)))
    for grad in grads:
        assert torch.equal(grad[:, 1::2], torch.zeros_like(grad[:, 1::2]))
        assert grad[:, ::2].abs().sum() > 0


@pytest.mark.parametrize("backend", MATRIX)
def test_a_merge_can_be_trained(backend):
    """The keys in two halves, put together by their log-sum-exps: as if never taken apart."""
    problem = make_problem(GROUP, B=2, N=24, D=8, dtype=torch.float64)
    q, k, v = (x.detach().requires_grad_() for x in problem.inputs[:3])
    first = (torch.arange(24) % 3 == 0).expand(2, -1)
    (a, lse_a), (b, lse_b) = (
        skiparse.attention_with_lse(q, k, v, GROUP, mask=mask, backend=backend)
        for mask in (first, ~first)
    )
    share = (lse_a - lse_b).sigmoid().transpose(1, 2).unsqueeze(-1)
    merged = share * a + (1 - share) * b
    whole = skiparse.attention(q, k, v, GROUP, backend="reference")
    close(merged, whole)
    grads, wanted = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (merged, whole))
    for x, y in zip(grads, wanted, strict=True):
        close(x, y)


# Forward mode, and torch.func.


def dense(q, k, v):
    """Attention over everything, in plain PyTorch."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def ours(q, k, v):
    return skiparse.attention(q, k, v, SkipPattern.dense())


def three(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


ROWS, TANGENTS = three(2, 7, 2, 4), three(2, 7, 2, 4, seed=1)


def loss_of(attention):
    return lambda q: attention(q, *ROWS[1:]).sin().sum()


def dual(attention):
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, ROWS, TANGENTS)
        return forward_ad.unpack_dual(attention(*duals)).tangent


MANY = torch.stack([ROWS[0], ROWS[1], 2 * ROWS[0]])
TRANSFORMS = {
    "jvp": lambda f: torch.func.jvp(f, ROWS, TANGENTS)[1],
    "jvp of one": lambda f: torch.func.jvp(
        lambda k: f(ROWS[0], k, ROWS[2]), ROWS[1:2], TANGENTS[1:2]
    )[1],
    "dual": dual,
    "jacfwd": lambda f: torch.func.jacfwd(lambda q: f(q, *ROWS[1:]))(ROWS[0]),
    "jacrev": lambda f: torch.func.jacrev(lambda q: f(q, *ROWS[1:]))(ROWS[0]),
    "grad": lambda f: torch.func.grad(loss_of(f))(ROWS[0]),
    "vjp": lambda f: torch.stack(torch.func.vjp(f, *ROWS)[1](TANGENTS[0])),
    "vmap": lambda f: torch.vmap(lambda q: f(q, *ROWS[1:]))(MANY),
    "vmap of another dimension": lambda f: torch.vmap(
        lambda q: f(q, *ROWS[1:]), in_dims=2, out_dims=1
    )(MANY.movedim(0, 2)),
    "vmap(grad)": lambda f: torch.vmap(torch.func.grad(loss_of(f)))(MANY),
    "grad(vmap)": lambda f: torch.func.grad(lambda x: torch.vmap(loss_of(f))(x).sum())(MANY),
    "vmap(jvp)": lambda f: torch.vmap(
        lambda q: torch.func.jvp(lambda x: f(x, *ROWS[1:]), (q,), TANGENTS[:1])[1]
    )(MANY),
    "compiled grad": lambda f: torch.compile(
        torch.func.grad(loss_of(f)), fullgraph=True, backend="aot_eager"
    )(ROWS[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_as_of_plain_pytorch(name):
    torch._dynamo.reset()
    close(TRANSFORMS[name](ours), TRANSFORMS[name](dense))


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize(
    ("p", "N"), [(SkipPattern.single(3), 7), (GROUP, 9), (SkipPattern(4, 1), 3)]
)
def test_gradcheck_of_every_kind(p, N, backend):
    """Outputs and log-sum-exps, in reverse and forward mode, alone and batched."""
    problem = make_problem(p, N=N, T=2, H=1, D=3, dtype=torch.float64, masked=True)

    def call(*inputs):
        settings = (problem.mask, problem.text_mask, p.sparsity, p.run, 0.3, backend)
        return torch.ops.skiparse.attention(*inputs, *settings)

    inputs = [x.detach().requires_grad_() for x in problem.inputs]
    assert torch.autograd.gradcheck(
        call,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_forward_mode_in_blocks_of_queries(monkeypatch):
    whole = torch.func.jvp(ours, ROWS, TANGENTS)[1]
    monkeypatch.setattr("skiparse.forward_mode.SCORES", 3 * 2 * 2 * 7)  # three queries at a time
    close(torch.func.jvp(ours, ROWS, TANGENTS)[1], whole)


def test_forward_mode_does_not_see_what_is_masked():
    q, k, v = ROWS
    mask = torch.arange(7).expand(2, -1) < 4
    large = [x.masked_fill(~mask[..., None, None], 1e200) for x in (k, v)]

    def tangent(k, v):
        return torch.func.jvp(
            lambda *x: skiparse.attention(*x, SINGLE, mask=mask), (q, k, v), TANGENTS
        )[1]

    close(tangent(*large), tangent(k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_mode_keeps_the_dtype(dtype):
    rows, tangents = ([x.to(dtype) for x in three] for three in (ROWS, TANGENTS))
    out, tangent = torch.func.jvp(ours, tuple(rows), tuple(tangents))
    assert out.dtype == tangent.dtype == dtype
    exact = torch.func.jvp(dense, ROWS, TANGENTS)[1]
    eager = torch.func.jvp(dense, tuple(rows), tuple(tangents))[1]
    error, its = ((x.double() - exact).abs().max() for x in (tangent, eager))
    assert error <= 2 * its + torch.finfo(dtype).eps * exact.abs().max()


def test_second_derivatives_are_refused():
    q = ROWS[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss_of(ours)(q), q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of attention cannot be differentiated again"):
        grad.sum().backward()
    for first, second in itertools.product(
        (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), TANGENTS[:1])[1].sum()),
        repeat=2,
    ):
        with pytest.raises(RuntimeError, match=r"again|second derivatives are not written"):
            second(lambda x, f=first: f(loss_of(ours))(x).sum())(ROWS[0])


def test_forward_mode_inside_a_compiled_graph_is_refused():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: torch.func.jvp(lambda x: ours(x, *ROWS[1:]), (q,), TANGENTS[:1])[1],
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(RuntimeError, match=r"torch.func.jvp has to stand outside torch.compile"):
        compiled(ROWS[0])


# norm_rope_pack.


def packing():
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = [normal(1, 8, 2, 6) for _ in range(3)] + [normal(1, 3, 2, 6) for _ in range(3)]
    weights = [normal(6) for _ in range(4)]
    angles = normal(8, 3)

    def pack(q, k, v, text_q, text_k, text_v, norm_q, norm_k, text_norm_q, text_norm_k):
        return skiparse.norm_rope_pack(
            q, k, v, angles.cos(), angles.sin(), norm_q, norm_k, GROUP, text_q=text_q,
            text_k=text_k, text_v=text_v, text_norm_q=text_norm_q, text_norm_k=text_norm_k,
            axes=(2, 4),
        )[:3]  # fmt: skip

    return pack, rows + weights


def test_packing_has_derivatives_of_every_kind():
    pack, inputs = packing()
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(
        pack,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


def test_packing_under_vmap():
    pack, inputs = packing()

    def gradient(q):
        return torch.func.grad(lambda x: sum(y.sin().sum() for y in pack(x, *inputs[1:])))(q)

    many = torch.stack([inputs[0], 2 * inputs[0]])
    found = torch.vmap(gradient)(many)
    assert torch.equal(found, torch.stack([gradient(x) for x in many]))


def test_a_second_derivative_of_packing_is_refused():
    pack, inputs = packing()
    q = inputs[0].clone().requires_grad_()
    loss = sum(y.sin().sum() for y in pack(q, *inputs[1:]))
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient of norm_rope_pack cannot be differentiated"):
        grad.sum().backward()
