"""What the sdpa backend asks of the CUDA libraries, seen without a GPU.

Stand-ins (fake_libraries.py) compute on the CPU what a library would on the device. What only a
device can tell is in test_cuda.py.
"""

import itertools
import sys
import warnings
from contextlib import nullcontext

import pytest
import ran
import torch
from fake_libraries import Operators, fa3_module, fa4_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import skiparse
from skiparse import GridPattern, SkipPattern
from skiparse.backends import Inputs, sdpa
from skiparse.testing import check, make_problem, run

PATTERNS = (
    SkipPattern.dense(),
    SkipPattern.single(4),
    SkipPattern.group(4),
    SkipPattern(3, 2),
    SkipPattern.block(4, 64),
)


def library(name):
    return next(x for x in sdpa.LIBRARIES if x.name == name)


@pytest.fixture
def stand_in(monkeypatch):
    """Let the named library compute everything, here."""

    def put(name):
        release = 2025 if name == "fa3-2025" else 2026
        values = {"fa4-b18": 2, "fa4-b19": 4}.get(name, 5)
        monkeypatch.setattr(sdpa, "aten", Operators())
        monkeypatch.setitem(sys.modules, sdpa.FA3, fa3_module(release))
        monkeypatch.setitem(sys.modules, sdpa.FA4, fa4_module(values))
        chosen = library(name.partition("-")[0])._replace(why_not=lambda operands, backward: None)
        monkeypatch.setattr(sdpa, "LIBRARIES", (chosen,))

    return put


NAMES = ("cudnn", "fa3", "fa3-2025", "fa4", "fa4-b18", "fa4-b19", "flash")
LAYOUTS = ("contiguous", "packed", "heads_first", "expanded")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [0, 7])
def test_answers_and_gradients(T, layout, name, stand_in):
    stand_in(name)
    for p, B in itertools.product(PATTERNS, (1, 2)):
        problem = make_problem(p, B=B, N=64, T=T, H=2, D=16, layout=layout)
        check(run(problem, "sdpa"), problem)
    problem = make_problem(SkipPattern.group(4), N=59, T=T, D=16, layout=layout)
    check(run(problem, "sdpa"), problem)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moved", ["q", "k", "grad_out"])
def test_rows_that_begin_anywhere(moved, name, stand_in):
    """No multiple of 16 bytes from the beginning, or from each other."""
    stand_in(name)
    for p in (SkipPattern.single(4), SkipPattern.block(4, 64)):
        problem = make_problem(p, B=2, N=64, D=16)
        x = getattr(problem, moved)
        wide = torch.zeros(*x.shape[:3], 18)
        for odd in (wide.flatten()[2 : 2 + x.numel()].view(x.shape), wide[..., 2:]):
            other = problem.__class__(**(problem.__dict__ | {moved: odd.copy_(x)}))
            check(run(other, "sdpa"), other)


def test_only_what_a_library_cannot_read_is_copied():
    x = torch.empty(3, 64, 2, 16, dtype=torch.bfloat16).transpose(1, 2)
    for name in ("cudnn", "fa3", "fa4", "flash", "cpu"):
        assert library(name).readable(x) is x
        assert (library(name).readable(x[:1].expand_as(x)).stride(0) == 0) is (
            name in ("flash", "cpu")
        )
        odd = x[..., 4:]
        assert (library(name).readable(odd) is odd) is (name == "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_what_ran_is_recorded(name, stand_in):
    stand_in(name)
    problem = make_problem(SkipPattern.single(2), N=16, T=3)
    first = name.partition("-")[0]
    with ran.recorded() as seen:
        run(problem, "sdpa")
        seen.only(f"{first} forward", f"{first} backward")
        with torch.no_grad():
            skiparse.attention(*problem.inputs[:3], problem.pattern, backend="sdpa")
        seen.only(f"{first} forward")
        run(problem, "reference")
        seen.only()
    run(problem, "sdpa")
    seen.only()


@pytest.mark.parametrize("name", NAMES)
def test_strides_of_the_gradient_may_change_between_calls(name, stand_in):
    stand_in(name)
    problem = make_problem(SkipPattern.block(4, 64), N=64, D=16)
    bent = (
        problem.grad_out.transpose(1, 2).contiguous().transpose(1, 2),
        problem.grad_out[:, :1].expand_as(problem.grad_out),
    )
    for grad_out in (problem.grad_out, *bent, problem.grad_out):
        other = problem.__class__(**(problem.__dict__ | {"grad_out": grad_out}))
        check(run(other, "sdpa"), other)


@pytest.mark.parametrize("name", ["fa3", "fa4"])
@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_packages_are_told_to_be_deterministic(mode, name, stand_in):
    """Where torch's own FlashAttention is: not under warn_only, which warns."""
    stand_in(name)
    torch.set_deterministic_debug_mode(mode)
    problem = make_problem(SkipPattern.single(2), N=16)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(problem, "sdpa")
    module = sys.modules[sdpa.FA3 if name == "fa3" else sdpa.FA4]
    assert module.deterministic is (mode == "error")
    said = [str(w.message) for w in told if "non-deterministic" in str(w.message)]
    assert len(said) == (1 if mode == "warn" else 0)
    assert all(f"FlashAttention {name[2]}" in x and "warn_only=False" in x for x in said)


# More than a library can count goes to it in several calls. Here the limits are as small as the
# problems, and the stand-ins hold every call against them.


@pytest.fixture
def limits(monkeypatch):
    """Lets a library have so many heads and batch entries, and padded numbers, in a call."""

    def put(grid=sdpa.GRID, padded=sdpa.PADDED):
        monkeypatch.setattr(sdpa, "GRID", grid)
        monkeypatch.setattr(sdpa, "PADDED", padded)
        (chosen,) = sdpa.LIBRARIES
        calls = {"forward": 0, "backward": 0}

        def held(step, query):
            batch, heads, rows, D = query.shape
            calls[step] += 1
            assert batch <= grid
            assert heads <= grid
            if step == "backward":
                assert batch * heads * -(-rows // 128) * 128 * -(-D // 32) * 32 <= padded

        def forward(operands, bias, scale):
            held("forward", operands[0])
            return chosen.forward(operands, bias, scale)

        def backward(sources, bias, scale):
            held("backward", sources.query)
            return chosen.backward(sources, bias, scale)

        held_library = chosen._replace(forward=forward, backward=backward)
        monkeypatch.setattr(sdpa, "LIBRARIES", (held_library,))
        return calls

    return put


@pytest.mark.parametrize("name", ["cudnn", "fa3", "fa4", "flash"])
@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize("layout", ["contiguous", "packed"])
def test_many_heads_and_batch_entries_go_in_several_calls(layout, T, name, stand_in, limits):
    stand_in(name)
    calls = limits(grid=5)
    cases = [(SkipPattern.dense(), 7), (SkipPattern.single(8), 2), (SkipPattern.single(3), 11)]
    cases += [(SkipPattern.block(8, 64), 2), (SkipPattern.block(2, 64), 7), (SkipPattern(3, 2), 3)]
    for p, B in cases:
        calls.update(forward=0, backward=0)
        problem = make_problem(p, B=B, N=64, T=T, H=2, D=16, layout=layout)
        check(run(problem, "sdpa"), problem)
        assert min(calls.values()) > 1


@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize("p", PATTERNS, ids=str)
def test_large_gradients_go_in_several_calls(p, T, stand_in, limits):
    """Of FlashAttention 2, backward only: 128 rows of 2 heads of 64 numbers are the least."""
    stand_in("flash")
    calls = limits(padded=3 * 2 * 128 * 64)
    problem = make_problem(p, B=5, N=64, T=T, H=2, D=16)
    check(run(problem, "sdpa"), problem)
    assert calls["backward"] > len(p.segments(64))
    if p.run in (1, 16):
        assert calls["forward"] == len(p.segments(64)) or T > 0  # views, not cut


@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize("text_queries", [True, False])
def test_a_grid_is_one_call_for_each_length(text_queries, T, stand_in, limits, monkeypatch):
    """In natural order, wherever the sub-sequences of a length are among the others."""
    stand_in("flash")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)  # or a CPU cuts what it copies
    calls = limits(grid=65_535)
    for p, lengths in (
        (GridPattern.group((1, 14, 20), 4), 3),
        (GridPattern.single((2, 5, 6), 2), 2),
    ):
        calls.update(forward=0, backward=0)
        N = p.tokens
        problem = make_problem(p, B=2, N=N, T=T, H=2, D=16, text_queries=text_queries)
        check(run(problem, "sdpa"), problem)
        assert len(set(p.lengths(N))) == lengths
        assert calls == {"forward": lengths, "backward": lengths}


def test_calls_are_no_smaller_than_they_must_be(stand_in, limits):
    stand_in("flash")
    calls = limits(grid=8)
    for p, B, number in (
        (SkipPattern.single(8), 8, 2),  # 4 sub-sequences of 2 heads, 8 entries
        (SkipPattern.block(4, 64), 4, 2),  # 4 sub-sequences of 2 entries
        (SkipPattern.block(16, 64), 2, 4),  # 8 sub-sequences of 1 entry
        (SkipPattern.single(4), 8, 1),
    ):
        calls.update(forward=0)
        problem = make_problem(p, B=B, N=64, H=2, D=16)
        sdpa.forward(inputs_of(problem))
        assert calls["forward"] == number


def inputs_of(problem):
    p = problem
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, p.q.shape[-1] ** -0.5)


# On tensors that have a shape and no numbers: fake CUDA ones, or "meta" where they are indexed.


@pytest.fixture
def device(monkeypatch):
    """A machine on which torch says yes to these libraries, and these packages are installed."""

    def make(*libraries, capability=(9, 0), packages=()):
        torch.use_deterministic_algorithms(False)
        for name in ("cudnn", "flash"):
            monkeypatch.setattr(
                torch.backends.cuda,
                f"can_use_{name}_attention",
                lambda params, debug=False, *, yes=name in libraries: yes,
            )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(sdpa, "_is_there", lambda module: module in packages)

    return make


def inputs(p, N=64, D=64, dtype=torch.bfloat16, make=torch.empty, device="cuda", **masks):
    with nullcontext() if device == "meta" else FakeTensorMode():
        video = [make((1, N, 2, D), dtype=dtype, device=device) for _ in range(3)]
        text = [torch.empty(1, 0, 2, D, dtype=dtype, device=device) for _ in range(3)]
    return Inputs(*video, *text, masks.get("mask"), masks.get("text_mask"), p, D**-0.5)


def chosen(given, *, backward=False):
    operands = [x.transpose(1, 2) for x in (given.q, given.k, given.v)]
    found, reasons = sdpa._choose(tuple(operands), backward)
    return found.name if found else reasons


BOTH = (sdpa.FA3, sdpa.FA4)
GIVEN = SkipPattern.single(2)


@pytest.mark.parametrize(
    ("libraries", "capability", "packages", "first"),
    [
        (("cudnn", "flash"), (9, 0), BOTH, "cudnn"),
        (("flash",), (9, 0), BOTH, "fa3"),
        (("flash",), (9, 0), BOTH[1:], "fa4"),
        (("flash",), (10, 0), BOTH, "fa4"),
        (("flash",), (8, 0), BOTH, "flash"),
        (("flash",), (9, 0), (), "flash"),
        (("cudnn",), (12, 0), (), "cudnn"),
    ],
)
def test_order_of_the_libraries(libraries, capability, packages, first, device):
    device(*libraries, capability=capability, packages=packages)
    given = inputs(GIVEN)
    assert sdpa.why_not(given) is None
    assert sdpa.why_not(given, backward=True) is None
    assert chosen(given) == chosen(given, backward=True) == first
    assert sdpa.library_for(given.q.transpose(1, 2)) == first


def test_cudnn_gives_way_where_it_would_not_be_deterministic(device):
    """Where torch would refuse, that is; with warn_only torch itself warns and runs it."""
    device("cudnn", "flash")
    for mode, backward in (("default", "cudnn"), ("warn", "cudnn"), ("error", "flash")):
        torch.set_deterministic_debug_mode(mode)
        assert chosen(inputs(GIVEN)) == "cudnn"
        assert chosen(inputs(GIVEN), backward=True) == backward


def test_torchs_switch_for_flash_is_that_of_the_packages(device):
    device("flash", packages=BOTH)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert chosen(inputs(GIVEN)) == "flash"  # which torch itself would refuse, here it is asked
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_expanded_tensors_stay_with_the_fastest_library(device):
    """A copy costs less than a kernel half as fast."""
    device("cudnn", "flash", packages=BOTH)

    def expanded(shape, **options):
        return torch.empty((shape[0], 1, *shape[2:]), **options).expand(shape)

    assert chosen(inputs(GIVEN, make=expanded)) == "cudnn"


def test_head_dimensions_of_the_packages(device):
    device("flash", packages=BOTH)
    assert chosen(inputs(GIVEN, D=256)) == "fa3"
    device("flash", packages=BOTH[1:])
    assert chosen(inputs(GIVEN, D=256)) == chosen(inputs(GIVEN, D=136)) == "fa4"
    device("flash", capability=(10, 0), packages=BOTH)
    assert chosen(inputs(GIVEN, D=128)) == chosen(inputs(GIVEN, D=256)) == "fa4"
    assert chosen(inputs(GIVEN, D=136)) == "flash"
    device(capability=(10, 0), packages=BOTH)
    assert "fa4: it takes a head dimension up to 128 or 256, not 136" in chosen(
        inputs(GIVEN, D=136)
    )


def test_torch_is_asked_about_the_backward_where_there_is_one(device, monkeypatch):
    device("flash")
    seen = []
    monkeypatch.setattr(
        torch.backends.cuda,
        "can_use_flash_attention",
        lambda params: not seen.append((params.query.requires_grad, torch.is_grad_enabled())),
    )
    with torch.no_grad():
        assert sdpa.why_not(inputs(GIVEN)) is None
        assert sdpa.why_not(inputs(GIVEN), backward=True) is None
    assert seen == [(False, False), (True, True)]


def test_reasons(device):
    device("cudnn", "flash")
    mask = torch.ones(1, 64, dtype=torch.bool)
    assert "fp16 and bf16" in sdpa.why_not(inputs(GIVEN, dtype=torch.float32))
    assert "no key masks" in sdpa.why_not(inputs(GIVEN, mask=mask))
    assert "up to 256, not 264" in sdpa.why_not(inputs(GIVEN, D=264))
    assert "multiple of 8, not 20" in sdpa.why_not(inputs(GIVEN, D=20))
    device(capability=(7, 5), packages=BOTH[:1])
    reason = sdpa.why_not(inputs(GIVEN))
    for part in (
        "cudnn: torch.backends.cuda.can_use_cudnn_attention says no",
        "fa3: it is for compute capability (9,), not 7.5",
        "fa4: flash_attn.cute.interface is not installed",
        "flash: torch.backends.cuda.can_use_flash_attention says no",
    ):
        assert part in reason
    with pytest.raises(RuntimeError, match="no library takes rows"):
        sdpa.forward(inputs(GIVEN, device="meta"))


@pytest.mark.parametrize("name", ["cudnn", "fa3", "fa4", "flash"])
def test_a_sub_sequence_that_is_too_large_is_refused(name, device):
    """Before any work, with the numbers; the shape is asked for, without its memory."""
    device(name, packages=BOTH)
    if name in ("fa3", "fa4"):
        device(packages=(sdpa.FA3 if name == "fa3" else sdpa.FA4,))
    for p, shape in (
        (SkipPattern.dense(), (1, 4, 65_536, 8)),
        (SkipPattern.block(2, 4), (1, 4, 65_536, 8)),
    ):
        reason = sdpa.why_not(large(p, shape))
        assert f"{name}: it takes up to 65535 batch entries, and heads" in reason
        assert "65536" in reason
    for p, shape in (
        (SkipPattern.dense(), (70_000, 4, 2, 8)),
        (SkipPattern.single(40_000), (1, 80_000, 2, 8)),
        (SkipPattern.block(40_000, 80_000), (2, 80_000, 2, 8)),
    ):
        for backward in (False, True):
            assert sdpa.why_not(large(p, shape), backward=backward) is None


def test_a_gradient_that_is_too_large_is_refused(device):
    device("flash")
    given = large(SkipPattern.dense(), (1, 2**20, 16, 128))  # 2**31 numbers
    assert sdpa.why_not(given) is None
    reason = sdpa.why_not(given, backward=True)
    assert "flash: its backward counts up to 2147483647 padded numbers of q" in reason
    assert "not 2147483648" in reason
    for p in (SkipPattern.single(2), SkipPattern.group(2)):
        assert sdpa.why_not(large(p, (3, 2**20, 16, 128)), backward=True) is None
    device("cudnn")
    assert sdpa.why_not(given, backward=True) is None


def test_the_real_length_is_asked(device, monkeypatch):
    """One that torch refuses, which would be in the middle of the work: a single key for cuDNN."""
    device("cudnn")
    shapes = set()
    monkeypatch.setattr(
        torch.backends.cuda,
        "can_use_cudnn_attention",
        lambda params: not shapes.add(tuple(params.query.shape)) and params.key.shape[2] != 1,
    )
    assert sdpa.why_not(inputs(SkipPattern.single(4), N=65)) is None
    assert shapes == {(1, 2, 17, 64), (1, 6, 16, 64)}
    assert "no library takes rows [1, 8, 1, 64]" in sdpa.why_not(inputs(SkipPattern.single(4), N=4))


def large(p, shape):
    """A problem of that size in a row of memory."""
    with FakeTensorMode():
        x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        text = torch.empty((shape[0], 0, *shape[2:]), dtype=torch.bfloat16, device="cuda")
        return Inputs(x, x, x, text, text, text, None, None, p, 1.0)


class Recorder(TorchDispatchMode):
    """The operators that run, and how many elements are copied."""

    def __init__(self):
        super().__init__()
        self.names, self.copied = [], 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        self.names.append(name)
        if name in ("copy_", "clone"):
            self.copied += args[0].numel()
        return operator(*args, **(kwargs or {}))


def passes(given, *, backward):
    """Library calls, and elements copied in units of q, for forward or backward."""
    outputs = sdpa.forward(given)
    with Recorder() as seen:
        if backward:
            sdpa.backward(given, outputs, torch.empty_like(outputs.out), outputs.text_out)
        else:
            sdpa.forward(given)
    calls = sum("scaled_dot_product" in name for name in seen.names)
    return calls, seen.copied / given.q.numel()


@pytest.mark.parametrize("p", [SkipPattern.single(4), SkipPattern.block(4, 64)], ids=str)
@pytest.mark.parametrize("name", ["cudnn", "flash"])
@pytest.mark.parametrize("backward", [False, True])
def test_views_are_one_call_and_no_copy(backward, name, p, device):
    device(name)
    calls, copied = passes(inputs(p, device="meta"), backward=backward)
    assert calls == 1
    assert copied <= 1 / 32  # the log-sum-exp, put in order: a number for each row of D = 64


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_natural_group_skip_is_one_pass_each(name, device):
    device(name)
    for backward, most in ((False, 4), (True, 8)):  # q, k, v and out; grad and 3 results besides
        calls, copied = passes(inputs(SkipPattern.group(4), device="meta"), backward=backward)
        assert calls == 1
        assert most <= copied <= most + 1 / 32


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    find = sdpa._is_there.__wrapped__
    assert find(sdpa.FA3)
    assert not find(sdpa.FA4)
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("raise SystemExit('imported')")
    assert not find(sdpa.FA4)
    (tmp_path / "flash_attn/cute").mkdir()
    (tmp_path / "flash_attn/cute/interface.py").write_text("raise SystemExit('imported')")
    assert find(sdpa.FA4)
