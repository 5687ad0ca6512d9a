"""The edges: bad arguments are named before any work, empty and masked-out inputs just work."""

import dataclasses
import math

import pytest
import torch
from backends import MATRIX, SMALL, run_if_it_can

import skiparse
from skiparse import SkipPattern, registry
from skiparse.testing import check, make_problem, oracle, run

P = SkipPattern.group(2)


def x(B=1, N=8, H=2, D=16, dtype=torch.float32, device="cpu"):
    return torch.zeros(B, N, H, D, dtype=dtype, device=device)


def joint(q=None, k=None, v=None, text_q=None, text_k=None, text_v=None, pattern=P, **options):
    given = [x() if y is None else y for y in (q, k, v)]
    text = [x(N=3) if y is None else y for y in (text_q, text_k, text_v)]
    return skiparse.joint_attention(*given, *text, pattern, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": x(N=9)}, r"k has shape \[1, 9, 2, 16\] but q has \[1, 8, 2, 16\]; they must be"),
        ({"v": x(H=3)}, r"v has shape \[1, 8, 3, 16\] but q has"),
        ({"v": x(D=8)}, r"v has shape \[1, 8, 2, 8\] but q has"),
        ({"q": torch.zeros(8, 2, 16)}, r"q must have 4 dimensions .* got \[8, 2, 16\]"),
        ({"k": "no"}, "k must be a tensor"),
        ({"k": x(dtype=torch.float64)}, "k is torch.float64 but q is torch.float32; convert"),
        ({"text_v": x(N=3, dtype=torch.float16)}, "text_v is torch.float16 but q is"),
        ({"k": x(device="meta")}, "k is on meta but q is on cpu; move"),
        ({"text_k": x(N=4)}, r"text_k has shape \[1, 4, 2, 16\], expected \[1, 3, 2, 16\]"),
        ({"text_q": x(N=3, B=2)}, r"text_q has shape \[2, 3, 2, 16\], expected \[1, 3, 2, 16\]"),
        ({"mask": torch.ones(1, 8)}, r"mask must be bool, .* \(0 = keep\) pass mask == 0"),
        ({"mask": torch.zeros(1, 8) - 1e4}, r"got torch.float32; of an additive mask \(0 = keep\)"),
        ({"mask": torch.full((1, 8), 255).byte()}, "values from 255 to 255; .* pass mask > 0"),
        ({"mask": -torch.ones(1, 8).long()}, "got values from -1 to -1"),
        ({"mask": [True] * 8}, "mask must be bool, or integers"),
        ({"mask": torch.ones(1, 7).bool()}, r"mask has shape \[1, 7\], expected \[1, 8\]"),
        ({"text_mask": torch.ones(3).bool()}, r"text_mask has shape \[3\], expected \[1, 3\]"),
        ({"text_mask": torch.ones(1, 3, device="meta").bool()}, "text_mask is on meta"),
        ({"pattern": 4}, r"pattern must be a SkipPattern or .* got 4; try SkipPattern.single\(4\)"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"scale": 10**400}, "scale must be a finite number, got 1000"),
        ({"q": x().to_sparse()}, "q must be a dense tensor, got a torch.sparse_coo one"),
        ({"k": x().to_mkldnn()}, "k must be a dense tensor, got a torch._mkldnn one"),
        ({"text_v": torch.nested.nested_tensor([x()[0], x()[0]])}, "text_v must be a dense tensor"),
        ({"scale": "1"}, "scale must be a finite number, got '1'"),
        ({"scale": True}, "scale must be a finite number, got True"),
        ({"backend": "fastest"}, r"backend must be one of \['auto', .*got 'fastest'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_before_any_work(arguments, message, monkeypatch):
    monkeypatch.setattr("skiparse.ops.call", lambda *_: pytest.fail("launched"))
    with pytest.raises(ValueError, match=message):
        joint(**arguments)


@pytest.mark.parametrize("missing", ["text_k", "text_v"])
def test_text_in_part_is_refused(missing):
    text = {name: x(N=3) for name in ("text_q", "text_k", "text_v")} | {missing: None}
    with pytest.raises(ValueError, match=f"{missing} is None; give text_q, text_k and text_v"):
        skiparse.joint_attention(x(), x(), x(), **text, pattern=P)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    q = x(dtype=dtype)
    with pytest.raises(ValueError, match="q must be fp64, fp32, bf16 or fp16"):
        skiparse.attention(q, q, q, P)


def test_head_dimension_zero_is_refused():
    with pytest.raises(ValueError, match="q has head dimension 0"):
        skiparse.attention(x(D=0), x(D=0), x(D=0), P)


def test_a_named_backend_that_cannot_says_why():
    q = x(D=257)
    with pytest.raises(
        RuntimeError, match=r'backend "sdpa" cannot run this: .* up to 256, not 257'
    ):
        skiparse.attention(q, q, q, P, backend="sdpa")
    assert skiparse.attention(q, q, q, P).shape == q.shape  # auto goes on to the reference


def test_auto_lists_every_reason(monkeypatch):
    monkeypatch.setattr("skiparse.backends.sdpa.why_not", lambda *_, **__: "no library today")
    monkeypatch.setattr("skiparse.backends.reference.why_not", lambda *_, **__: "nor that")
    with pytest.raises(RuntimeError) as caught:
        skiparse.attention(x(), x(), x(), P)
    text = str(caught.value)
    assert "sdpa: no library today" in text
    assert "reference: nor that" in text
    assert 'triton: not chosen by itself on "cpu"' in text


def test_no_backend_is_the_reference_on_an_accelerator():
    for row in registry.BACKENDS:
        assert row.name != "reference" or row.auto == ("cpu",)


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("sizes", [
    {"B": 0}, {"H": 0}, {"N": 0}, {"N": 0, "T": 0}, {"T": 0}, {"N": 1}, {"N": 1, "T": 0},
])  # fmt: skip
def test_empty_is_empty_and_differentiable(sizes, backend):
    shape = {"B": 2, "N": 9, "T": 3, "H": 2, "D": 16} | sizes
    for p in (SkipPattern.single(2), P, SkipPattern.dense(), SkipPattern.group(4)):
        problem = make_problem(p, **shape)
        answer = run_if_it_can(problem, backend)
        if shape["B"] and shape["H"]:
            check(answer, problem)
        assert [g.shape for g in answer[4:]] == [y.shape for y in problem.inputs]


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("p", [SkipPattern.single(3), P, SkipPattern.dense()], ids=str)
def test_nothing_to_attend_to(p, dtype, backend):
    """Every key masked: out 0, gradients 0, lse -inf, no NaN; the other sample is not disturbed."""
    problem = make_problem(p, B=2, N=20, T=4, D=32, dtype=dtype, masked=True)
    problem.mask[0] = False
    problem.text_mask[0] = False
    answer = run_if_it_can(problem, backend)
    for name, value in answer._asdict().items():
        if "lse" in name:
            assert (value[0] == -math.inf).all(), name
        else:
            assert (value[0] == 0).all(), name
            assert value.isfinite().all(), name
    check(answer, problem)


@pytest.mark.parametrize("backend", MATRIX)
def test_one_sub_sequence_without_keys(backend):
    problem = make_problem(SkipPattern.single(2), N=12, D=32)
    mask = torch.arange(12)[None] % 2 == 0  # all of sub-sequence 1 is hidden
    problem = problem.__class__(**(problem.__dict__ | {"mask": mask}))
    answer = run_if_it_can(problem, backend)
    assert (answer.out[:, 1::2] == 0).all()
    assert (answer.lse[:, :, 1::2] == -math.inf).all()
    check(answer, problem)


@pytest.mark.parametrize("backend", MATRIX)
@pytest.mark.parametrize("p", [SkipPattern.single(4), SkipPattern.group(4)], ids=str)
def test_nan_stays_in_its_sub_sequence(p, backend):
    problem = make_problem(p, N=40, T=3, D=32)
    clean = run_if_it_can(problem, backend)
    for tensor in (problem.q, problem.k, problem.v):
        tensor[0, 9] = math.nan
    dirty = run_if_it_can(problem, backend)
    owner = skiparse.pattern.sub_of(torch.arange(40), p.sparsity, p.run)
    others = owner != owner[9]
    for name in ("out", "grad_q", "grad_k", "grad_v"):
        a, b = getattr(dirty, name), getattr(clean, name)
        assert torch.equal(a[:, others], b[:, others]), name
        assert a[:, 9].isnan().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_logits_stay_finite(dtype):
    problem = make_problem(P, N=24, T=3, D=16, dtype=dtype)
    big = problem.__class__(**(problem.__dict__ | {"q": problem.q * 100, "k": problem.k * 100}))
    for value in run(big, "sdpa"):
        assert value.isfinite().all()
    assert oracle(big).lse.max() > 1e4  # they are large indeed


def test_last_stride_other_than_one_is_taken():
    problem = make_problem(P, N=24, T=3)
    odd = {n: getattr(problem, n).transpose(2, 3).contiguous().transpose(2, 3) for n in ("q", "v")}
    strided = problem.__class__(**(problem.__dict__ | odd))
    assert strided.q.stride(-1) != 1
    for a, b in zip(run(strided, "sdpa"), run(problem, "sdpa"), strict=True):
        assert torch.equal(a, b)


def test_expanded_gradient_is_taken():
    """`out.sum().backward()` hands in a gradient with all strides 0."""
    inputs = [y.requires_grad_() for y in make_problem(P, N=24).inputs[:3]]
    summed = torch.autograd.grad(skiparse.attention(*inputs, P).sum(), inputs)
    out = skiparse.attention(*inputs, P)
    for a, b in zip(summed, torch.autograd.grad(out, inputs, torch.ones_like(out)), strict=True):
        assert torch.equal(a, b)


def test_list_backends_covers_the_registry():
    reasons = skiparse.list_backends()
    assert list(reasons) == [row.name for row in registry.BACKENDS]
    assert reasons["sdpa"] is None
    assert reasons["reference"] is None


@pytest.mark.parametrize("backend", SMALL)
@pytest.mark.parametrize("p", [SkipPattern.dense(), SkipPattern.single(2), P], ids=str)
@pytest.mark.parametrize("T", [0, 4])
def test_masked_keys_and_values_may_be_as_large_as_numbers_are(T, p, backend):
    """Finite is all that is asked of them: nothing of them is in outputs or gradients."""
    problem = make_problem(p, B=2, N=32, T=T, D=32, masked=True, lse_grads=True)
    right = run_if_it_can(problem, backend)
    largest = torch.finfo(torch.float32).max
    rows = {"k": problem.mask, "v": problem.mask}
    rows |= {"text_k": problem.text_mask, "text_v": problem.text_mask} if T else {}
    large = {
        name: getattr(problem, name).masked_fill(~seen[..., None, None], sign * largest)
        for sign, (name, seen) in zip((1, -1, -1, 1), rows.items(), strict=False)
    }
    found = run(dataclasses.replace(problem, **large), backend)
    for name, x, y in zip(found._fields, found, right, strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", SMALL)
def test_more_sub_sequences_than_tokens(backend, dtype):
    """Each attends to itself alone, so that gradients of q and k are 0, but for rounding."""
    for p in (SkipPattern.single(8), SkipPattern.group(8), SkipPattern(3, 7)):
        problem = make_problem(p, B=2, N=3, D=32, dtype=dtype)
        check(run_if_it_can(problem, backend), problem)


def test_patterns_that_no_index_could_count_are_refused():
    for arguments in ((2**63,), (2, 2**63), (2**31, 1)):
        with pytest.raises(ValueError, match=r"must be in \[1, 2\*\*31\)"):
            SkipPattern(*arguments)
