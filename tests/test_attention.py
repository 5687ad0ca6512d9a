"""Every backend gives the exact answer, and its gradients, within the computed error budget."""

import itertools

import pytest
import torch
from backends import MATRIX, run_if_it_can

import skiparse
from skiparse import SkipPattern, pattern
from skiparse.testing import Answer, check, check_sample, make_problem, run

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PATTERNS = (
    SkipPattern.dense(),
    SkipPattern.single(4),
    SkipPattern.group(4),
    SkipPattern(3, 2),
    SkipPattern(2, 36),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_joint_attention(p, backend, dtype):
    problem = make_problem(p, B=2, N=72, T=7, D=32, dtype=dtype, masked=True)
    check(run_if_it_can(problem, backend), problem)


@pytest.mark.parametrize("layout", ["contiguous", "packed", "heads_first", "expanded"])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_video_alone_in_any_layout(p, B, layout):
    problem = make_problem(p, B=B, N=72, D=32, layout=layout)
    check(run(problem, "sdpa"), problem)


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("kind", ["single", "group"])
def test_any_length(kind, k, backend):
    """N = 1, k-1, k*k +- 1, primes, and k*k > N.

    In fp16: with so few numbers, whether fp32 stays below twice eager's error is a matter of luck.
    """
    p = getattr(SkipPattern, kind)(k)
    for N in {1, k - 1, k, k * k - 1, k * k, k * k + 1, 13, 31}:
        problem = make_problem(p, N=N, T=3, D=32, dtype=torch.float16, masked=True)
        check(run_if_it_can(problem, backend), problem)


@pytest.mark.parametrize(("p", "N"), [(SkipPattern(5, 3), 64), (SkipPattern.dense(), 12)])
def test_a_library_is_held_to_what_it_does_itself(p, N):
    """Its own order of the sums is among those of the budget: on an EPYC no other errs so much."""
    problem = make_problem(p, B=1 + (N == 12), N=N, T=7, D=32, dtype=torch.float32, masked=True)
    check(run(problem, "sdpa"), problem)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("layout", ["contiguous", "packed", "heads_first", "expanded"])
def test_full_matrix(backend, dtype, layout):
    for p, (N, T), B, masked in itertools.product(
        (*PATTERNS, SkipPattern.single(8), SkipPattern.group(8), SkipPattern(5, 3)),
        ((64, 7), (72, 0), (97, 20), (144, 33), (31, 1)),
        (1, 2),
        (False, True),
    ):
        problem = make_problem(p, B=B, N=N, T=T, D=32, dtype=dtype, layout=layout, masked=masked)
        check(run_if_it_can(problem, backend), problem)


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("D", [16, 24, 40, 80, 96, 128, 256])
def test_any_head_dimension(D, backend):
    problem = make_problem(SkipPattern.group(2), N=48, T=5, D=D, dtype=torch.float16)
    check(run_if_it_can(problem, backend), problem)


@pytest.mark.parametrize("backend", MATRIX)
def test_scale(backend):
    problem = make_problem(SkipPattern.single(2), N=48, T=5, D=32, scale=0.05)
    check(run_if_it_can(problem, backend), problem)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("kind", ["single", "group"])
def test_skip_order_gives_the_natural_answer(kind, k):
    """Outputs and gradients equal the natural-order ones after the permutation."""
    natural = make_problem(getattr(SkipPattern, kind)(k), B=2, N=64, T=5, D=32)
    order = torch.from_numpy(pattern.skip_order(64, k))
    inverse = torch.from_numpy(pattern.inverse_order(64, k))
    skip_pattern = SkipPattern.single(k) if kind == "single" else SkipPattern.block(k, 64)
    fields = {n: getattr(natural, n)[:, order] for n in ("q", "k", "v", "grad_out")}
    problem = natural.__class__(**(natural.__dict__ | fields | {"pattern": skip_pattern}))
    answer = run(problem, "sdpa")
    back = {"lse": answer.lse[:, :, inverse]} | {
        name: getattr(answer, name)[:, inverse] for name in ("out", "grad_q", "grad_k", "grad_v")
    }
    check(answer._replace(**back), natural)


def test_public_calls_agree_with_the_operator():
    problem = make_problem(SkipPattern.group(3), B=2, N=31, T=4, masked=True)
    q, k, v, *text = problem.inputs
    p, mask, text_mask = problem.pattern, problem.mask, problem.text_mask
    answer = run(problem, "auto")
    out, text_out = skiparse.joint_attention(
        q, k, v, *text, p, mask=mask, text_mask=text_mask
    )  # fmt: skip
    assert torch.equal(out, answer.out)
    assert torch.equal(text_out, answer.text_out)
    alone = make_problem(SkipPattern.group(3), B=2, N=31, masked=True)
    q, k, v = alone.inputs[:3]
    out, lse = skiparse.attention_with_lse(q, k, v, p, mask=alone.mask)
    check(run(alone, "auto")._replace(out=out, lse=lse), alone)
    assert torch.equal(skiparse.attention(q, k, v, p, mask=alone.mask), out)


def test_merging_two_halves_by_their_log_sum_exp():
    """What `attention_with_lse` is for: the keys split in two, the outputs put together again."""
    problem = make_problem(SkipPattern.single(2), N=40, D=32, dtype=torch.float64)
    q, k, v = problem.inputs[:3]
    first = torch.arange(40) < 25
    halves = [
        skiparse.attention_with_lse(q, k, v, problem.pattern, mask=m.expand(1, 40))
        for m in (first, ~first)
    ]
    total = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(o * (lse - total).exp().transpose(1, 2).unsqueeze(-1) for o, lse in halves)
    answer = run(problem, "reference")
    check(answer._replace(out=merged, lse=total), problem)


def test_one_backend_goes_back_from_another_ones_forward():
    from skiparse import registry
    from skiparse.backends import Inputs, Outputs

    problem = make_problem(SkipPattern.group(2), B=2, N=30, T=4, masked=True)
    p = problem
    inputs = Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, 0.25)
    grad_text = (p.grad_text_out / 2)[:, None].expand(-1, 2, -1, -1, -1)
    for first, second in itertools.permutations(MATRIX, 2):
        outputs = Outputs(*registry.load(first).forward(inputs))
        grads = registry.load(second).backward(inputs, outputs, p.grad_out, grad_text)
        text_out = outputs.text_out.mean(1)
        check(Answer(outputs.out, text_out, outputs.lse, outputs.text_lse, *grads), problem)


@pytest.mark.parametrize("name", ["out", "grad_q", "grad_text_v", "lse"])
def test_the_check_sees_a_small_mistake(name):
    """The budget is tight enough to notice one value that is 0.1 % off."""
    problem = make_problem(SkipPattern.group(2), N=40, T=5, D=32)
    answer = run(problem, "sdpa")
    wrong = getattr(answer, name).clone()
    wrong.flatten()[wrong.abs().argmax()] *= 1.001
    with pytest.raises(AssertionError, match=f"{name}: off by"):
        check(answer._replace(**{name: wrong}), problem)


def test_the_sampled_check_agrees_with_the_whole_one(monkeypatch):
    problem = make_problem(SkipPattern.group(4), N=640, T=40, D=32, dtype=torch.bfloat16)
    check_sample(problem, "sdpa", backward=True)
    from skiparse.backends import sdpa

    right = sdpa._attend
    monkeypatch.setattr(
        sdpa, "_attend", lambda q, k, v, bias, scale: right(q, k, v, bias, scale * 1.1)
    )
    with pytest.raises(AssertionError, match="off by"):
        check_sample(problem, "sdpa", backward=False)
