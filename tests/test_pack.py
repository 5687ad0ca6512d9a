"""Packed q, k and v give joint attention of the normalised and rotated inputs, and its gradients.

The eager spelling and the Triton kernels, on a CUDA device if there is one, else in Triton's
interpreter. What is right is written out here: norm by its definition, rotation as complex
numbers, attention by the oracle, places by the formulas of ``skiparse.pattern``.
"""

import copy
import functools
import os

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

import skiparse
from skiparse import SkipPattern, pack
from skiparse.models.suv import blocks
from skiparse.models.suv.model import SUV
from skiparse.models.suv.plan import Plan
from skiparse.models.suv.rope import rotary_angles
from skiparse.pattern import length_of, pos_of, sub_of, token_of
from skiparse.testing import (
    INPUT_NAMES,
    WAYS,
    budget,
    make_problem,
    oracle_rows,
    within_budget,
    yardstick,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
NORMS = ("norm_q", "norm_k", "text_norm_q", "text_norm_k")
FORWARD = 2e-5  # recorded with SUV's goldens, relative to the largest value
EPS = 0.05  # large enough to be missed if it were left out

# A tile has 128 pairs of dimensions in the interpreter: 16 rows at D = 16, 4 at D = 48.
CASES = {
    "single": (SkipPattern.single(4), {"N": 48, "T": 5}),
    "single-ragged": (SkipPattern.single(3), {"N": 50, "T": 5}),
    "group": (SkipPattern.group(2), {"N": 48, "T": 5}),
    "block": (SkipPattern.block(4, 48), {"N": 48, "T": 19}),
    "odd-runs": (SkipPattern(3, 2), {"N": 54, "T": 7}),
    "dense": (SkipPattern.dense(), {"N": 41, "T": 3}),
    "dense-runs": (SkipPattern(1, 7), {"N": 41, "T": 3}),
    "single-no-text": (SkipPattern.single(4), {"N": 30, "T": 0}),
    "group-no-text": (SkipPattern.group(2), {"N": 24, "T": 0}),
    "one-token": (SkipPattern.single(2), {"N": 1, "T": 2}),
    "text-alone": (SkipPattern.group(2), {"N": 0, "T": 5}),
    "one-text": (SkipPattern.block(2, 0), {"N": 0, "T": 1}),
    "nothing": (SkipPattern.single(2), {"N": 0, "T": 0}),
    "no-batch": (SkipPattern.single(2), {"B": 0, "N": 20, "T": 3}),
    "no-heads": (SkipPattern.single(2), {"H": 0, "N": 20, "T": 3}),
    "packed": (SkipPattern.group(2), {"B": 2, "N": 20, "T": 3, "layout": "packed"}),
    "expanded": (SkipPattern.single(2), {"B": 2, "N": 20, "T": 3, "layout": "expanded"}),
    "heads-first": (SkipPattern.block(2, 20), {"N": 20, "T": 3, "layout": "heads_first"}),
    "D48": (SkipPattern.single(2), {"N": 20, "T": 3, "D": 48}),
    "one-axis": (SkipPattern.group(2), {"N": 20, "T": 3, "D": 10}),
}
AXES = {16: (4, 6, 6), 48: (12, 18, 18), 10: (10,), 4: (2, 2)}


class Given:
    """A problem, its norms and its angles."""

    def __init__(self, case, dtype=torch.float32, norm_dtype=None):
        self.pattern, arguments = CASES[case]
        self.problem = make_problem(self.pattern, dtype=dtype, device=DEVICE, **arguments)
        q = self.problem.q
        D = q.shape[-1]
        self.axes = AXES[D]
        generator = torch.Generator().manual_seed(1)
        wide = {"generator": generator, "dtype": torch.float64}
        self.norms = [(0.5 + torch.rand(D, **wide)).to(DEVICE, norm_dtype or dtype) for _ in NORMS]
        self.angles = (9 * torch.rand(q.shape[1], D // 2, **wide)).to(DEVICE)

    def leaves(self, dtype=None):
        """The six inputs and the four norms, to be differentiated."""
        given = (*self.problem.inputs, *self.norms)
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]

    def pack(self, leaves, backend="auto"):
        q, k, v, text_q, text_k, text_v, norm_q, norm_k, text_norm_q, text_norm_k = leaves
        wide = torch.promote_types(q.dtype, torch.float32)
        return skiparse.norm_rope_pack(
            q, k, v, self.angles.cos().to(wide), self.angles.sin().to(wide), norm_q, norm_k,
            self.pattern, text_q=text_q, text_k=text_k, text_v=text_v, text_norm_q=text_norm_q,
            text_norm_k=text_norm_k, axes=self.axes, eps=EPS, backend=backend,
        )  # fmt: skip

    @property
    def output_grads(self):
        return self.problem.grad_out, self.problem.grad_text_out


def places(pattern, N, T):
    """Rows of the video tokens ``[N]`` and of the copies of the text ``[n, T]``, one by one."""
    n, w, W = pattern.sparsity, pattern.run, pattern.packed(N, T).run
    video = [token_of(sub_of(t, n, w), pos_of(t, n, w), n, W) for t in range(N)]
    text = [[token_of(s, length_of(s, N, n, w) + t, n, W) for t in range(T)] for s in range(n)]
    shape = (n, T)
    return (
        torch.tensor(video, dtype=torch.int64, device=DEVICE),
        torch.tensor(text, dtype=torch.int64, device=DEVICE).reshape(shape),
    )


def normal(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def turned(x, angles, axes):
    """Each pair of dimensions as a complex number, times ``exp(i angle)``."""
    out = []
    parts = angles.to(x.dtype).split([size // 2 for size in axes], -1)
    for part, angle in zip(x.split(axes, -1), parts, strict=True):
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        z = torch.complex(*part.chunk(2, -1)) * turn
        out += [z.real, z.imag]
    return torch.cat(out, -1)


def right(given, dtype=torch.float64, way=None):
    """Outputs and gradients without packing, in ``dtype``; norm and rotation rounded once."""
    leaves = given.leaves(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, text_q, text_k, text_v, *norms = (x.to(wide) for x in leaves)
    rows = (
        turned(normal(q, norms[0]), given.angles, given.axes),
        turned(normal(k, norms[1]), given.angles, given.axes),
        v,
        normal(text_q, norms[2]),
        normal(text_k, norms[3]),
        text_v,
    )
    problem = given.problem.to(dtype).with_inputs([x.to(dtype) for x in rows])
    N, T, n = q.shape[1], text_q.shape[1], given.pattern.sparsity
    out, lse = oracle_rows(problem, torch.arange(N + n * T, device=DEVICE), way)
    text_out = out[:, N:].unflatten(1, (n, T)).mean(1)
    outputs = (out[:, :N], text_out)
    grads = torch.autograd.grad(outputs, leaves, (problem.grad_out, problem.grad_text_out))
    lses = (lse[:, :, :N], lse[:, :, N:].unflatten(2, (n, T)))
    return named(outputs, lses, grads)


def packed_attention(given, backend):
    leaves = given.leaves()
    packed = given.pack(leaves, backend)
    rows, lse = skiparse.attention_with_lse(*packed, backend=attention_backend(packed.q))
    N, T = given.problem.q.shape[1], given.problem.text_q.shape[1]
    outputs = skiparse.unpack(rows, given.pattern, N)
    grads = torch.autograd.grad(outputs, leaves, given.output_grads)
    video, text = places(given.pattern, N, T)
    return named(outputs, (lse[:, :, video], lse[:, :, text]), grads)


def attention_backend(q):
    return "sdpa" if q.device.type == "cpu" or q.dtype in HALVES else "triton"


def named(outputs, lses, grads):
    names = ("out", "text_out", "lse", "text_lse", *(f"grad_{x}" for x in (*INPUT_NAMES, *NORMS)))
    return {n: x.detach() for n, x in zip(names, (*outputs, *lses, *grads), strict=True)}


def check(actual, given):
    """Against the budget; the weights' gradients by themselves, under the names of q and k."""
    dtype = given.problem.q.dtype
    exact = right(given)
    eager = functools.cache(lambda way: right(given, yardstick(dtype), way))

    def norms(answer):
        return {name.replace("norm_", ""): answer[name] for name in answer if "norm_" in name}

    within_budget(actual, exact, map(eager, WAYS), dtype)
    within_budget(norms(actual), norms(exact), (norms(eager(way)) for way in WAYS), dtype)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", ["single-ragged", "group", "block", "dense", "group-no-text"])
def test_equals_joint_attention(case, backend):
    given = Given(case)
    check(packed_attention(given, backend), given)


@pytest.mark.parametrize("case", ["single", "packed", "text-alone"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(case, dtype):
    given = Given(case, dtype)
    check(packed_attention(given, "eager"), given)


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float16], ids=str)
def test_half_precision_in_the_kernels(norm_dtype):
    given = Given("block", torch.float16, norm_dtype)
    answer = packed_attention(given, "triton")
    assert answer["grad_norm_q"].dtype == norm_dtype
    check(answer, given)


def buffers_and_gradients(given, backend, dtype=None):
    leaves = given.leaves(dtype)
    packed = given.pack(leaves, backend)[:3]
    generator = torch.Generator().manual_seed(2)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in packed]
    return [*packed, *torch.autograd.grad(packed, leaves, grads)]


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_do_what_eager_does(case):
    for dtype in (torch.float32, *HALVES):
        given = Given(case, dtype)
        found, eager, exact = (
            buffers_and_gradients(given, *how)
            for how in (("triton",), ("eager",), ("eager", torch.float64))
        )
        for x, y, z in zip(found, eager, exact, strict=True):
            assert x.shape == y.shape
            assert x.dtype == y.dtype
            assert x.is_contiguous()
            assert y.is_contiguous()
            if z.numel():
                allowed = budget({"x": z}, [{"x": y}], dtype) * z.abs().max()
                assert (x.double() - z).abs().max() <= allowed


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", CASES)
def test_every_row_is_where_the_pattern_says(case, backend):
    given = Given(case)
    packed = given.pack([*given.problem.inputs, *given.norms], backend)
    N, T = given.problem.q.shape[1], given.problem.text_q.shape[1]
    video, text = places(given.pattern, N, T)
    assert packed.pattern == given.pattern.packed(N, T)
    assert torch.equal(packed.v[:, video], given.problem.v)
    for rows in text:
        assert torch.equal(packed.v[:, rows], given.problem.text_v)
    found, text_found = skiparse.unpack(packed.v, given.pattern, N)
    assert torch.equal(found, given.problem.v)
    assert torch.equal(text_found, packed.v[:, text].mean(1))


def test_single_skip_is_unpacked_without_a_copy():
    out = torch.arange(2 * 22 * 3.0).view(2, 22, 3, 1)
    video, _ = skiparse.unpack(out, SkipPattern.single(2), 12)
    assert video.data_ptr() == out.data_ptr()
    assert torch.equal(video, out[:, :12])


def test_any_last_stride_and_any_stride_of_gradients():
    """Dimensions ``H`` apart; one gradient for all rows and heads, and a transposed one."""
    given = Given("block")
    bent = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in given.problem.inputs]
    for backend in ("eager", "triton"):
        plain, leaves = given.leaves(), [*bent, *given.norms]
        leaves = [x.detach().requires_grad_() for x in leaves]
        assert leaves[0].stride(-1) == given.problem.q.shape[2]
        packed, expected = given.pack(leaves, backend)[:3], given.pack(plain, backend)[:3]
        shape = packed[0].shape
        grads = (
            torch.randn(1, 1, 1, shape[-1], device=DEVICE).expand(shape),
            torch.randn(shape, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2),
            torch.randn(shape, device=DEVICE).transpose(2, 3).contiguous().transpose(2, 3),
        )
        found = torch.autograd.grad(packed, leaves, grads)
        wanted = torch.autograd.grad(expected, plain, [g.contiguous() for g in grads])
        for x, y in zip((*packed, *found), (*expected, *wanted), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("p", "N"), [(SkipPattern.single(3), 7), (SkipPattern.group(2), 8)])
def test_gradcheck_in_fp64(p, N, monkeypatch):
    monkeypatch.setitem(CASES, "tiny", (p, {"N": N, "T": 2, "H": 2, "D": 4}))
    given = Given("tiny", torch.float64)

    def call(*leaves):
        packed = given.pack(leaves)
        return *packed[:3], *skiparse.unpack(skiparse.attention(*packed), p, N)

    assert torch.autograd.gradcheck(call, given.leaves())


def arguments_of(given):
    """What the operator behind the public call gets."""
    run = 1 if given.pattern.packed(given.problem.q.shape[1], 1).run == 1 else given.pattern.run
    wide = torch.promote_types(given.problem.q.dtype, torch.float32)
    tables = (given.angles.cos().to(wide), given.angles.sin().to(wide))
    settings = ([*given.axes], EPS, given.pattern.sparsity, run, "auto")
    return given.leaves(), tables, settings


@pytest.mark.parametrize("case", ["single", "group", "heads-first", "group-no-text", "packed"])
def test_opcheck(case):
    leaves, tables, settings = arguments_of(Given(case))
    torch.library.opcheck(torch.ops.skiparse.norm_rope_pack, (*leaves, *tables, *settings))


def test_opcheck_of_the_backward():
    leaves, tables, settings = arguments_of(Given("packed"))
    q, k, _, text_q, text_k, _, *norms = (x.detach() for x in leaves)
    buffers = torch.ops.skiparse.norm_rope_pack(*(x.detach() for x in leaves), *tables, *settings)
    args = (*buffers, q, k, text_q, text_k, *norms, *tables, *settings)
    torch.library.opcheck(torch.ops.skiparse.norm_rope_pack_backward, args)


@pytest.mark.parametrize("pattern", [SkipPattern.single(2), SkipPattern.group(2), "block"])
def test_compiles_whole_and_once_for_all_lengths(pattern, monkeypatch):
    def call(cos, sin, *leaves):
        q, k, v, text_q, text_k, text_v, norm_q, norm_k, text_norm_q, text_norm_k = leaves
        N = q.shape[1]
        p = SkipPattern.block(2, N) if pattern == "block" else pattern
        packed = skiparse.norm_rope_pack(
            q, k, v, cos, sin, norm_q, norm_k, p, text_q=text_q, text_k=text_k, text_v=text_v,
            text_norm_q=text_norm_q, text_norm_k=text_norm_k, axes=(4, 6, 6),
        )  # fmt: skip
        return skiparse.unpack(skiparse.attention(*packed), p, N)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for index, (N, T) in enumerate(((32, 5), (48, 7), (40, 3))):
        monkeypatch.setitem(CASES, "now", (SkipPattern.group(2), {"B": 2, "N": N, "T": T}))
        given = Given("now")
        _, tables, _ = arguments_of(given)
        leaves, again = given.leaves(), given.leaves()
        with torch._dynamo.config.patch(error_on_recompile=index > 0):
            outputs = compiled(*tables, *leaves)
            grads = torch.autograd.grad(outputs, leaves, given.output_grads)
        expected = call(*tables, *again)
        wanted = torch.autograd.grad(expected, again, given.output_grads)
        for x, y in zip((*outputs, *grads), (*expected, *wanted), strict=True):
            assert torch.equal(x, y)


def test_autocast_packs_in_its_dtype():
    given = Given("single")
    leaves = given.leaves()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        packed = given.pack(leaves)
        out = skiparse.attention(*packed)
    assert {x.dtype for x in (*packed[:3], out)} == {torch.bfloat16}
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert {g.dtype for g in grads} == {torch.float32}
    narrow = [x.to(torch.bfloat16) for x in given.problem.inputs]
    for x, y in zip(packed[:3], given.pack([*narrow, *given.norms])[:3], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_every_run_gives_the_same_bits(backend):
    torch.use_deterministic_algorithms(False)  # by itself, without torch's help
    given = Given("block")
    first = buffers_and_gradients(given, backend)
    for _ in range(3 if DEVICE == "cpu" else 29):
        assert all(map(torch.equal, buffers_and_gradients(given, backend), first))


def test_no_flops_are_counted():
    given = Given("group")
    with FlopCounterMode(display=False) as counter:
        buffers_and_gradients(given, "auto")
    assert counter.get_total_flops() == 0


def test_meta_tensors_give_shapes():
    given = Given("group")
    inputs = [x.to("meta") for x in (*given.problem.inputs, *given.norms)]
    given.angles = given.angles.to("meta")
    packed = given.pack(inputs)
    assert packed.q.shape == (1, 48 + 2 * 5, 2, 16)
    assert packed.pattern == SkipPattern(2, 24 + 5)


WRONG = [
    ({"cos": torch.ones(48, 7)}, r"cos must be floating \[48, 8\], got torch.float32 \[48, 7\]"),
    ({"sin": torch.ones(48, 8).requires_grad_()}, "sin requires a gradient"),
    ({"sin": torch.ones(48, 8, dtype=torch.int64)}, "sin must be floating"),
    ({"norm_q": None}, r"norm_q must be floating \[16\], got None"),
    ({"text_norm_k": torch.ones(15)}, r"text_norm_k must be floating \[16\]"),
    ({"norm_k": torch.ones(16, device="meta")}, "norm_k is on meta"),
    ({"axes": (4, 6)}, r"axes must be even, positive and 16 together, got \(4, 6\)"),
    ({"axes": (5, 5, 6)}, "axes must be even"),
    ({"axes": (16, 0)}, "axes must be even, positive"),
    ({"eps": 0.0}, "eps must be > 0, got 0.0"),
    ({"backend": "sdpa"}, "backend must be one of .*'eager', 'triton'.*, got 'sdpa'"),
    ({"pattern": SkipPattern(5, 5)}, r"packed\(N=48\) .* must divide N"),
    ({"text_q": torch.ones(1, 4, 2, 16)}, "text_k has shape"),
    ({"text_v": torch.ones(1, 5, 2, 16).double()}, "text_v is torch.float64 but q is"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda x: str(*x) if len(x) == 1 else "")
def test_what_does_not_fit_is_named(changes, words):
    names = (*INPUT_NAMES, *NORMS, "cos", "sin", "pattern", "axes")
    problem = make_problem(SkipPattern.group(2), N=48, T=5)
    tables = (torch.ones(48, 8), torch.ones(48, 8), problem.pattern, (4, 6, 6))
    given = dict(zip(names, (*problem.inputs, *(torch.ones(16),) * 4, *tables), strict=True))
    with pytest.raises(ValueError, match=words):
        skiparse.norm_rope_pack(**given | changes)


def test_a_buffer_of_another_length_is_not_unpacked():
    with pytest.raises(ValueError, match=r"not \[B, N \+ 4 \* T, H, D\] with N = 12"):
        skiparse.unpack(torch.ones(1, 15, 2, 4), SkipPattern.single(4), 12)
    with pytest.raises(ValueError, match="with N = 16"):
        skiparse.unpack(torch.ones(1, 12, 2, 4), SkipPattern.single(4), 16)


@pytest.mark.parametrize("p", [SkipPattern.single(4000), SkipPattern.block(4000, 8000)], ids=str)
def test_the_kernels_count_the_rows_of_the_buffer(p, monkeypatch):
    """Which are many more than those of the video: 4000 times 600,000 rows of text."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    video, text = (torch.ones(1).expand(1, rows, 1, 2) for rows in (8000, 600_000))
    with pytest.raises(RuntimeError, match=r"to \d+, not to 2400008000"):
        pack._kernels("triton", video, text, p.sparsity, p.run)
    assert pack._kernels("triton", video, text[:, :500_000], p.sparsity, p.run) is not None


def test_named_kernels_run_or_say_why_not(monkeypatch):
    given = Given("single", torch.float64)
    with pytest.raises(RuntimeError, match=r'"triton" cannot run this: .*not torch\.float64'):
        given.pack(given.leaves(), "triton")
    assert given.pack(given.leaves(), "auto").q.dtype == torch.float64
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match="only if TRITON_INTERPRET=1"):
            Given("single").pack(Given("single").leaves(), "triton")


def attend_in(dtype, inputs, grads, pattern, attention):
    """Outputs and all gradients of SUV's attention layer, as ``dtype``."""
    attention = copy.deepcopy(attention).to(dtype)
    leaves = [x.to(dtype).requires_grad_() for x in inputs[:2]]
    outputs = attention(*leaves, inputs[2:], pattern, None, None, "auto")
    wanted = [*leaves, *attention.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [g.to(dtype) for g in grads])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "pattern", [SkipPattern.single(4), SkipPattern.block(4, 48), SkipPattern.group(2)], ids=str
)
def test_a_layer_of_suv_gives_the_same_packed(pattern, dtype, monkeypatch):
    """Within the error that it has unpacked; exact are norms and rotation as written out above."""
    torch.manual_seed(0)
    attention = blocks.JointAttention(2, 16, EPS, last=False)
    for norm in (attention.norm_q, attention.norm_k, attention.text_norm_q, attention.text_norm_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    angles = rotary_angles((3, 4, 4), 16)
    inputs = (torch.randn(2, 48, 32), torch.randn(2, 5, 32), angles.cos(), angles.sin())
    grads = [torch.randn(x.shape) for x in inputs[:2]]
    given = (inputs, grads, pattern, attention)
    plain = attend_in(dtype, *given)
    with monkeypatch.context() as patch:
        patch.setattr(skiparse, "packing_pays", lambda *_: True)
        packed = attend_in(dtype, *given)

    def head_norm(norm, x, rotary=None):
        x = normal(x, norm.weight)
        return x if rotary is None else turned(x, angles, AXES[16])

    monkeypatch.setattr(blocks.HeadNorm, "forward", head_norm)
    exact = attend_in(torch.float64, *given)
    for i, right in enumerate(exact):
        allowed = budget({"x": right}, [{"x": plain[i]}], dtype) * right.abs().max()
        assert (packed[i].double() - right).abs().max() <= allowed, i


def test_a_whole_suv_packs_unless_there_are_masks(monkeypatch):
    """As it would on a GPU; N = 72, so that k = 2 is in skip order and k = 4 in natural order."""
    torch.manual_seed(0)
    model = SUV(**SUV.presets["tiny"]).eval()
    config = model.config
    latents = torch.randn(2, config.in_channels, 2, 12, 12)
    text = torch.randn(2, 7, config.text_channels)
    inputs = (latents, torch.rand(2), text, torch.randn(2, config.pooled_channels))

    def run(mask):
        with torch.no_grad(), Calls() as calls:
            return model(*inputs, text_mask=mask), calls.packs

    everything = torch.ones(2, 7, dtype=torch.bool)
    plain, packs = run(everything)
    assert packs == 0
    monkeypatch.setattr(
        skiparse, "packing_pays", lambda q, pattern, _: pattern.can_pack(q.shape[1])
    )
    packed, packs = run(everything)
    possible = [
        plan.pattern(stage, layer).can_pack(72)
        for plan in [Plan.of(72, config.sparsity)]
        for stage, layers in enumerate(config.num_layers)
        for layer in range(layers)
    ]
    assert packs == sum(possible) > len(possible) / 2
    assert (packed - plain).abs().max() <= FORWARD * plain.abs().max()
    some = everything.clone()
    some[0, 2] = False
    assert run(some)[1] == 0


class Calls(TorchDispatchMode):
    """Counts how often buffers were packed."""

    packs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.packs += function is torch.ops.skiparse.norm_rope_pack.default
        return function(*args, **kwargs or {})


SINGLE = SkipPattern.single(2)


def test_suv_packs_where_library_kernels_would():
    def packs(dtype=torch.bfloat16, device="cuda", pattern=SINGLE, backend="auto"):
        with FakeTensorMode():
            return skiparse.packing_pays(
                torch.empty(1, 30, 1, 16, dtype=dtype, device=device), pattern, backend
            )

    assert packs()
    assert packs(torch.float16, backend="sdpa")
    assert not packs(torch.float32)
    assert not packs(device="cpu")
    assert not packs(backend="triton")
    assert not packs(pattern=SkipPattern.group(4))  # 16 does not divide 30
