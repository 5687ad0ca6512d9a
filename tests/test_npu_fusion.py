"""The NPU's library path gives the exact answer, as far as a CPU can tell.

The library is a fake after its documentation. Nothing here has run on an NPU.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from fake_torch_npu import Fake

from skiparse import GridPattern, SkipPattern, list_backends, registry
from skiparse.backends import Inputs, npu_fusion
from skiparse.pattern import pattern_of
from skiparse.testing import check, make_problem, run

PATTERNS = (
    SkipPattern.dense(),
    SkipPattern.single(4),
    SkipPattern.group(4),
    SkipPattern(3, 2),
    SkipPattern.block(3, 72),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def library():
    with Fake().registered() as fake:
        yield fake


@pytest.fixture
def fake(library, monkeypatch):
    monkeypatch.setattr(npu_fusion, "why_not", lambda *_, **__: None)
    device = SimpleNamespace(get_device_name=lambda: "Ascend910B2")
    monkeypatch.setattr(torch, "npu", device, raising=False)
    library.calls.clear()
    library.variants.clear()
    return library


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("T", [0, 5])
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_outputs_and_gradients(fake, p, T, masked, dtype):
    for N in (72, 71):
        problem = make_problem(p, B=2, N=N, T=T, dtype=dtype, masked=masked)
        check(run(problem, "npu_fusion"), problem)


@pytest.mark.parametrize("masked", [False, True])
def test_grids_in_order(fake, masked):
    """Ragged blocks: one call for each length, forward and backward."""
    for p in (
        GridPattern.group((2, 6, 10), 2, order="skip"),
        GridPattern.single((1, 1, 3), 2, order="single"),
    ):
        for T in (0, 5):
            problem = make_problem(p, B=2, N=p.tokens, T=T, masked=masked)
            fake.calls.clear()
            check(run(problem, "npu_fusion"), problem)
            assert len(fake.calls) == 2 * len({L for L in p.lengths(p.tokens) if L + T})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_keys_of_the_text_without_queries(fake, p, masked):
    for N in (72, 2):
        problem = make_problem(p, B=2, N=N, T=5, masked=masked, lse_grads=True, text_queries=False)
        check(run(problem, "npu_fusion"), problem)


def test_a_grid_in_natural_order_is_refused(monkeypatch):
    monkeypatch.setattr(npu_fusion, "_why_no_npu", lambda: None)
    q = SimpleNamespace(shape=(1, 16, 1, 16), device=SimpleNamespace(type="npu"), dtype=torch.half)
    text = torch.empty(1, 0, 1, 16)
    for p, refused in ((GridPattern.single((1, 4, 4), 2), True), (SkipPattern.single(4), False)):
        reason = npu_fusion.why_not(
            Inputs(q, q, q, text, text, text, None, None, pattern_of(p.numbers), 1.0)
        )
        assert ("skiparse.pattern.grid_order" in (reason or "")) == refused


@pytest.mark.parametrize("kind", ["single", "group"])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_any_length(fake, kind, k):
    p = getattr(SkipPattern, kind)(k)
    for N, T, masked in itertools.product(
        {0, 1, k - 1, k, k * k - 1, k * k, k * k + 1}, (0, 3), (False, True)
    ):
        problem = make_problem(p, N=N, T=T, dtype=torch.float16, masked=masked)
        check(run(problem, "npu_fusion"), problem)


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
def test_layouts(fake, layout):
    for p in PATTERNS:
        problem = make_problem(p, B=2, N=72, layout=layout)
        check(run(problem, "npu_fusion"), problem)


@pytest.mark.parametrize("T", [0, 3])
def test_rows_that_attend_to_nothing(fake, T):
    """Zero, with log-sum-exp -inf, and no gradient; those with one key as ever."""
    problem = make_problem(SkipPattern.single(3), B=2, N=20, T=T, masked=True)
    problem.mask[0] = False
    problem.mask[1, 1::3] = False
    problem.mask[1, 4] = True
    problem.text_mask[:] = False
    answer = run(problem, "npu_fusion")
    assert torch.isneginf(answer.lse[0]).all()
    check(answer, problem)


def test_gradients_from_the_outputs_of_another_backend(fake, monkeypatch):
    """Which hands over the log-sum-exp, not the maximum and the sum."""
    problem = make_problem(SkipPattern.group(2), N=32, T=4, masked=True, scale=2.0)
    load = registry.load
    monkeypatch.setattr(
        registry, "select", lambda name, *_, backward=False: load(name if backward else "sdpa")
    )
    monkeypatch.setattr("skiparse.ops.select", registry.select)
    check(run(problem, "npu_fusion"), problem)
    assert len(fake.calls) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_the_third_variant_is_taken_where_it_is(fake, masked, monkeypatch):
    """It has no Ascend 950, and older releases do not have it."""
    problem = make_problem(SkipPattern.group(2), B=2, N=37, T=3, masked=masked)
    check(run(problem, "npu_fusion"), problem)
    assert set(fake.variants) == {"v3"}
    fake.variants.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.npu, "get_device_name", lambda: "Ascend950PR_9599")
        check(run(problem, "npu_fusion"), problem)
    old = ("npu_fusion_attention", "npu_fusion_attention_grad")
    operators = SimpleNamespace(**{name: getattr(torch.ops.npu, name) for name in old})
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops, "npu", operators)
        check(run(problem, "npu_fusion"), problem)
    assert set(fake.variants) == {""}


def test_key_masks_need_a_cann_that_orders_the_statistics(monkeypatch):
    utils = SimpleNamespace()
    npu = SimpleNamespace(utils=utils)
    masked, plain = on_npu(mask=True), on_npu()
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    assert npu_fusion.why_not(masked) is None  # an older torch_npu, which does not read it
    for version, refused in (("8.2.RC1", True), ("7.0.0", True), ("8.3.RC1", False),
                             ("9.1.0", False), ("10.0.RC2", False), ("", False)):  # fmt: skip
        utils.get_cann_version = lambda version=version: version
        reason = npu_fusion.why_not(masked)
        assert reason == (
            f"key masks need CANN 8.3.RC1 or later, not {version}" if refused else None
        )
        assert npu_fusion.why_not(plain) is None


def test_views_where_the_pattern_allows(fake):
    for p, shape in (
        (SkipPattern.single(4), (2, 18, 8, 16)),
        (SkipPattern.block(4, 72), (8, 18, 2, 16)),
        (SkipPattern.dense(), (2, 72, 2, 16)),
    ):
        problem = make_problem(p, B=2, N=72)
        fake.calls.clear()
        run(problem, "npu_fusion")
        for layout, *operands in fake.calls:
            assert layout == "BSND"
            for seen, given in zip(operands, (problem.q, problem.k, problem.v), strict=True):
                assert seen.data_ptr() == given.data_ptr()
                assert seen.shape == shape


def test_more_heads_than_the_library_takes_are_packed(fake):
    problem = make_problem(SkipPattern.single(3), N=6, H=100)
    check(run(problem, "npu_fusion"), problem)
    assert [x[1].shape for x in fake.calls] == [(3, 2, 100, 16)] * 2


def test_masks_become_lengths(fake):
    """Hidden keys are not handed over: no dense mask, which would grow with the square."""
    problem = make_problem(SkipPattern.single(2), N=40, T=4, masked=True)
    run(problem, "npu_fusion")
    kept = problem.mask.sum() + 2 * problem.text_mask.sum()
    for layout, query, key, value in fake.calls:
        assert layout == "TND"
        assert len(query) == 40 + 2 * 4
        assert len(key) == len(value) == kept


def test_at_most_three_calls_for_lengths_that_differ(fake):
    for N in range(1, 40):
        problem = make_problem(SkipPattern.group(3), N=N, T=2)
        fake.calls.clear()
        run(problem, "npu_fusion")
        assert len(fake.calls) <= 6


def on_npu(*, B=1, N=8, T=0, H=2, D=64, dtype=torch.bfloat16, n=2, mask=None):
    """Inputs as far as `why_not` looks at them."""
    device = torch.device("npu") if hasattr(torch, "npu") else SimpleNamespace(type="npu")
    q, text = (
        SimpleNamespace(device=device, dtype=dtype, shape=(B, rows, H, D)) for rows in (N, T)
    )
    return Inputs(q, q, q, text, text, text, mask, None, SkipPattern.single(n), 1.0)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"H": 257}, "256 heads, not 257"),
        ({"D": 1024}, "768, not 1024"),
        ({"N": 3_000_000}, "rows, not 1500000"),
        ({"N": 1_000_000, "B": 2, "mask": True}, "in all, with key masks, not 2000000"),
        ({"N": 4000, "n": 2000, "mask": True}, "1000 sub-sequences are taken, not 2000"),
    ],
)
def test_limits(problem, reason):
    found = npu_fusion.why_not(on_npu(**problem))
    assert found is None if reason is None else reason in found


def test_why_not_names_what_is_missing_and_the_remedy(monkeypatch):
    problem = make_problem(SkipPattern.single(2), N=4)
    with pytest.raises(RuntimeError, match='takes "npu" tensors, not "cpu"'):
        run(problem, "npu_fusion")
    if hasattr(torch, "npu"):
        return
    monkeypatch.setattr(npu_fusion.importlib.util, "find_spec", lambda name: None)
    assert "pip install torch_npu==2." in list_backends()["npu_fusion"]
    monkeypatch.setattr(npu_fusion.importlib.util, "find_spec", lambda name: object())
    assert "import torch_npu first" in npu_fusion.why_not()
    missing = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(torch, "npu", missing, raising=False)
    assert "npu-smi info" in npu_fusion.why_not()
    missing.is_available = lambda: True
    assert npu_fusion.why_not() is None


def test_auto_takes_the_library_on_an_npu():
    assert registry.select("auto", on_npu()) is npu_fusion
    assert registry.select("auto", on_npu(), backward=True) is npu_fusion
    with pytest.raises(RuntimeError, match=r"(?s)npu_fusion: .*fp32, not torch.float64"):
        registry.select("auto", on_npu(dtype=torch.float64))


def test_autocast_reaches_the_operator_on_an_npu():
    """Whose dispatch key has no device here to call it with."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("skiparse::attention", "AutocastPrivateUse1")
