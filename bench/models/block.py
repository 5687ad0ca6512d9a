"""What each part of an SUV block costs, in time and memory: spelled out, as it is, and compiled.

``naive`` is the plain spelling: fp32 copies of activations, every intermediate kept by autograd,
attention by rearranged copies. ``eager`` is what the model runs, ``compiled`` that through
``torch.compile``. Linear layers have one spelling only, so there ``eager`` is not timed apart; and
attention is one operator that the compiler does not look into. In the parts named ``packing``,
``naive`` is the model's own block with the text beside the video, and the others put it inside q, k
and v (``skiparse.norm_rope_pack``). Before anything of a part is timed, its ways must agree. The
ways then take turns, round after round.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import skiparse
from skiparse import SkipPattern
from skiparse.bench import rows
from skiparse.bench.timing import Timing, peak_extra_bytes, repeats_of, speedup, time_of
from skiparse.models.suv.blocks import AdaptiveNorm, Norm, SUVBlock
from skiparse.models.suv.parts import gated_residual, head_norm_rotate, modulated_norm, recomputed
from skiparse.models.suv.rope import axis_dims, rotary_angles
from skiparse.pattern import sub_of
from skiparse.testing import budget

FORWARD, GRADIENT = 2e-5, 1e-4  # fp32, relative to the largest value: the goldens' tolerances
SPARSITIES = (1, 8)
PACKED = {"single": SkipPattern.single, "group": SkipPattern.group}  # and blocks: in skip order


@dataclass(frozen=True)
class Size:
    """A block, and the tokens it is given."""

    heads: int
    head_dim: int
    grid: tuple[int, int, int]  # tokens along t, h, w
    text: int
    condition: int

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def name(self) -> str:
        return f"{self.tokens}+{self.text} tokens, {self.heads} heads of {self.head_dim}"


SIZES = {
    "cuda": Size(heads=24, head_dim=128, grid=(16, 36, 64), text=512, condition=1024),
    "cpu": Size(heads=4, head_dim=128, grid=(4, 18, 32), text=512, condition=1024),
}


@dataclass(frozen=True)
class Part:
    """A piece of a block, spelled two ways; ``naive is ours`` where there is only one.

    Gradients are taken for the ``inputs`` that require them, and for the ``parameters``.
    """

    name: str
    per_block: int  # how often a block does this to its video tokens
    naive: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: tuple[Any, ...]
    parameters: tuple[Tensor, ...] = ()

    @property
    def wanted(self) -> list[Tensor]:
        leaves = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        return [*leaves, *self.parameters]


@dataclass(frozen=True)
class Figure:
    """One part, one way (the timing's name) and one direction."""

    part: Part
    backward: bool
    timing: Timing
    kept_bytes: int | None = None  # alive between forward and backward, the weights not counted

    @property
    def case(self) -> str:
        return f"block.{self.part.name}.{'fwdbwd' if self.backward else 'fwd'}"


def run(
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    rounds: int = 3,
    size: Size | None = None,
    compiler: str = "inductor",
    results: Path | None = None,
) -> list[rows.Row]:
    """Measure every part, print the table, and append the rows to ``results``.

    Args:
        dtype: of the block and its tokens. Below fp32 a CPU runs forward passes only: its backward
            passes are too slow for anybody to train with.
        rounds: interleaved repetitions; medians are over these.
        size: None takes that of the device in ``SIZES``.
        compiler: the backend of ``torch.compile``.
        results: a JSON-lines file, or None to keep nothing.

    Returns:
        One row for each part, way and direction that ran.

    Raises:
        AssertionError: if two ways disagree. Nothing of that part is timed then.
        ValueError: if rounds is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    kind = torch.device(device).type
    size = size or SIZES[kind]
    directions = (False, True) if kind == "cuda" or dtype == torch.float32 else (False,)
    parts = parts_of(size, device, dtype)
    exact = parts if dtype == torch.float32 else parts_of(size, device, dtype, torch.float32)
    figures: list[Figure] = []
    todo = list(zip(parts, exact, strict=True))
    for part, right in tqdm(todo, desc="parts", unit="part", disable=None, leave=False):
        torch.compiler.reset()  # its limit is for each function, over all parts and sizes
        for backward in directions:
            figures += _measure(part, right, backward, device, dtype, rounds, compiler)
    print(table(size, dtype, figures), flush=True)
    ran = [figure for figure in figures if figure.timing.seconds]
    found = [row(size, figure, _naive(figure, figures), device, dtype) for figure in ran]
    if results is not None:
        rows.append(results, found)
    return found


def parts_of(
    size: Size, device: str, rounded: torch.dtype, dtype: torch.dtype | None = None
) -> list[Part]:
    """The parts of a block on seeded random tokens, rounded to one dtype and held in another."""
    generator = torch.Generator().manual_seed(0)
    width = size.heads * size.head_dim

    def draw(*shape: int, fp32: bool = False) -> Tensor:
        x = torch.randn(shape, generator=generator)
        x = x if fp32 else x.to(rounded).to(dtype or rounded)
        return x.to(device).requires_grad_()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = SUVBlock(
            size.heads,
            size.head_dim,
            size.condition,
            double_ff=True,
            last=False,
            norm="layer_norm",
            eps=1e-6,
        )
    block = block.to(rounded).to(dtype or rounded).to(device)
    norm, attn = block.norm1.norm, block.attn
    angles = rotary_angles(size.grid, size.head_dim).to(device)
    rotary = angles.cos(), angles.sin()
    weights = attn.norm_q.weight, attn.norm_k.weight

    video, text = draw(1, size.tokens, width), draw(1, size.text, width)
    update, condition = draw(1, size.tokens, width), draw(1, size.condition, fp32=True)
    shift, scale = (draw(1, width, fp32=True) for _ in range(2))
    heads = [draw(1, n, size.heads, size.head_dim) for n in (size.tokens, size.text) for _ in "qkv"]

    def qkv(x: Tensor) -> tuple[Tensor, ...]:
        return attn.to_q(x), attn.to_k(x), attn.to_v(x)

    def norms(
        function: Callable[..., Tensor], q: Tensor, k: Tensor, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(
            function(x, w, *tables, attn.norm_q.eps) for x, w in zip((q, k), weights, strict=True)
        )

    def linear(name: str, count: int, call: Callable[..., Any], *modules: nn.Module) -> Part:
        parameters = tuple(p for module in modules for p in module.parameters())
        return Part(name, count, call, call, (video,), parameters)

    single = {k: SkipPattern.single(k) for k in SPARSITIES}
    k = SPARSITIES[-1]
    packed = {name: pattern(k) for name, pattern in PACKED.items()}
    packed["blocks"] = SkipPattern.block(k, size.tokens)
    whole = (video, text, condition, rotary)
    return [
        Part(
            "modulated_norm",
            2,
            naive_modulated_norm,
            lambda *inputs: recomputed(modulated_norm, *inputs),
            (video, shift, scale, norm.weight, norm.bias, norm.eps),
        ),
        linear("qkv", 1, qkv, attn.to_q, attn.to_k, attn.to_v),
        Part(
            "qk_norm_rope",
            1,
            lambda *inputs: norms(naive_head_norm_rotate, *inputs),
            lambda *inputs: norms(
                lambda *each: recomputed(head_norm_rotate, *each),
                *inputs,
            ),
            (heads[0], heads[1], *rotary),
            weights,
        ),
        *(
            Part(
                f"attention.k{k}",
                1,
                naive_attention,
                skiparse.joint_attention,
                (*heads, single[k]),
            )
            for k in SPARSITIES
        ),
        linear("out_projection", 1, attn.to_out, attn.to_out),
        Part(
            "gated_residual",
            2,
            naive_gated_residual,
            lambda *inputs: gated_residual(*inputs),
            (video, shift, update),
        ),
        linear("feed_forward", 1, block.ff, block.ff),
        *(
            Part(
                f"whole.k{k}",
                1,
                lambda *inputs: naive_block(block, *inputs),
                block,
                (*whole, single[k]),
                tuple(block.parameters()),
            )
            for k in SPARSITIES
        ),
        *(
            Part(
                f"packing.k{k}.{name}",
                1,
                packing(block, False),
                packing(block, True),
                (*whole, pattern),
                tuple(block.parameters()),
            )
            for name, pattern in packed.items()
        ),
    ]


def packing(block: SUVBlock, packs: bool) -> SUVBlock:
    """The block with the same parameters, its attention putting the text inside q, k and v or not.

    By itself it does where that pays.
    """
    kept: dict[int, Any] = {id(p): p for p in block.parameters()}
    other = copy.deepcopy(block, kept)
    other.attn.packs = packs
    return other


# What is measured.


def ways_of(part: Part, compiler: str) -> dict[str, Callable[..., Any]]:
    """The functions that are timed, by name, ``naive`` first."""
    ways = {"naive": part.naive}
    if part.ours is not part.naive:
        ways["eager"] = part.ours
    if part.ours is not skiparse.joint_attention:
        ways["compiled"] = torch.compile(part.ours, fullgraph=True, dynamic=False, backend=compiler)
    return ways


def answer(
    function: Callable[..., Any], part: Part, grads: Sequence[Tensor] | None
) -> list[Tensor]:
    """The outputs; and with ``grads`` for them, the gradients of all that is wanted."""
    if grads is None:
        with torch.no_grad():
            return list(_tensors(function(*part.inputs)))
    out = _tensors(function(*part.inputs))
    return [x.detach() for x in out] + list(torch.autograd.grad(out, part.wanted, list(grads)))


def check(
    part: Part,
    right: Part,
    ways: Mapping[str, Callable[..., Any]],
    grads: Sequence[Tensor] | None,
) -> None:
    """Hold every way against the naive one: fp32 to the goldens' tolerance, others to the budget.

    Args:
        part: as it is timed.
        right: the same in fp32; ``part`` itself if that is fp32.
        ways: of :func:`ways_of`.
        grads: for the outputs; None to look at these only.

    Raises:
        AssertionError: naming part, way and tensor that are off.
    """
    naive = answer(part.naive, part, grads)
    exact = naive
    if right is not part:
        exact = answer(right.naive, right, None if grads is None else [g.float() for g in grads])
    outputs = len(naive) - (0 if grads is None else len(part.wanted))
    for way, function in ways.items():
        for i, (x, y, z) in enumerate(
            zip(answer(function, part, grads), exact, naive, strict=True)
        ):
            allowed = FORWARD if i < outputs else GRADIENT
            if right is not part:
                allowed = budget({"": y}, [{"": z}], z.dtype)
            error = float((x.double() - y).abs().max() / y.abs().max())
            assert error <= allowed, (
                f"{part.name}, {way}: tensor {i} is off by {error:.1e}, allowed {allowed:.1e}"
            )


def kept_bytes(function: Callable[..., Any], part: Part) -> int:
    """Memory that autograd holds between forward and backward, the part's weights not counted."""
    weights = {x.untyped_storage().data_ptr() for x in part.parameters}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*part.inputs)
    total = sum(size for place, size in kept.items() if place not in weights)
    del out  # until here, so that no storage was freed and its place taken by another
    return total


def _measure(
    part: Part,
    right: Part,
    backward: bool,
    device: str,
    dtype: torch.dtype,
    rounds: int,
    compiler: str,
) -> list[Figure]:
    """Check and time the ways of one part in one direction."""
    reason = None if compiler != "inductor" else why_not_compiled(device)
    ways = ways_of(part, compiler)
    figures = []
    if reason is not None and ways.pop("compiled", None) is not None:
        figures = [Figure(part, backward, Timing("compiled", why_not=reason))]
    grads = _grads(part, device) if backward else None
    check(part, right, ways, grads)

    def work(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: answer(function, part, grads)

    calls = {way: work(function) for way, function in ways.items()}
    peaks = {way: peak_extra_bytes(call, device) for way, call in calls.items()}
    kept = {way: kept_bytes(function, part) for way, function in ways.items()}
    once = time_of(calls["naive"], 1, device)
    repeats = repeats_of(once)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in calls.items():
            seconds[way].append(time_of(call, repeats, device))
    return [
        Figure(part, backward, Timing(way, tuple(seconds[way]), peaks[way]), kept[way])
        for way in ways
    ] + figures


def why_not_compiled(device: str) -> str | None:
    """What the compiler misses on this device, or None."""
    if torch.device(device).type == "cuda":
        there = importlib.util.find_spec("triton") is not None
        return None if there else "torch.compile needs triton on a GPU; pip install triton"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, not {compiler}"


def _grads(part: Part, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        out = _tensors(part.ours(*part.inputs))
    return [torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in out]


def _tensors(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


# What is shown.


def table(size: Size, dtype: torch.dtype, figures: Sequence[Figure]) -> str:
    """For a terminal: every part and way, time and its ratio to naive, memory."""
    lines = [
        "",
        f"one SUV block: {size.name}, {str(dtype).removeprefix('torch.')}; MiB beyond the inputs",
        f"{'':20}{'':10}{'':7}{'ms':>10}{'spread':>18}{'naive/this':>12}{'peak':>8}{'kept':>8}",
    ]
    for figure in figures:
        timing, direction = figure.timing, "fwdbwd" if figure.backward else "fwd"
        name = figure.part.name + (f" (x{figure.part.per_block})" * (figure.part.per_block > 1))
        head = f"{name:20}{timing.name:10}{direction:7}"
        if not timing.seconds:
            lines.append(f"{head}  not run: {timing.why_not}")
            continue
        low, high = min(timing.seconds) * 1e3, max(timing.seconds) * 1e3
        gain = speedup(timing, _naive(figure, figures).timing)
        lines.append(
            f"{head}{timing.median * 1e3:10.1f}{f'{low:.1f}-{high:.1f}':>18}{gain:11.2f}x"
            f"{_mib(timing.peak_bytes):>8}{_mib(figure.kept_bytes):>8}"
        )
    return "\n".join(lines)


def row(size: Size, figure: Figure, naive: Figure, device: str, dtype: torch.dtype) -> rows.Row:
    """One line of the results, as in ``results.jsonl``; speed-up is over the naive way."""
    timing = figure.timing
    return rows.row(
        figure.case,
        timing.name,
        device=device,
        dtype=dtype,
        seconds=timing.seconds,
        shape=size.name,
        peak_extra_mib=rows.mib(timing.peak_bytes),
        kept_mib=rows.mib(figure.kept_bytes),
        speedup=round(speedup(timing, naive.timing), 4),
    )


def _naive(figure: Figure, figures: Sequence[Figure]) -> Figure:
    return next(f for f in figures if f.case == figure.case and f.timing.name == "naive")


def _mib(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.0f}"


# The plain spellings.


def naive_modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm of ``[B, N, C]`` by its formula, then ``(1 + scale)`` and ``shift`` ``[B, C]``."""
    centred = x.float() - x.float().mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    normal = normal * weight.float() + bias.float()
    return (normal * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def naive_head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of every head of ``[B, N, H, D]`` by its formula."""
    normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight


def naive_head_norm_rotate(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    """RMSNorm of every head, then rotation with tables as wide as the head, part by part."""
    normal = naive_head_norm(x, weight, eps).float()
    turned = []
    start = 0
    for dim in axis_dims(x.shape[-1]):
        part = normal[..., start : start + dim]
        c, s = (table[:, start // 2 : (start + dim) // 2].repeat(1, 2) for table in (cos, sin))
        other = torch.cat([-part[..., dim // 2 :], part[..., : dim // 2]], -1)
        turned.append(part * c[:, None] + other * s[:, None])
        start += dim
    return torch.cat(turned, -1).to(x.dtype)


def naive_gated_residual(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """``x + gate * update`` in fp32."""
    return (x.float() + gate[:, None] * update.float()).to(x.dtype)


def naive_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Sub-sequences gathered by copies, text repeated for each, torch's attention, scattered back.

    It takes and returns what :func:`skiparse.joint_attention` does, ``N`` a multiple of the
    sparsity.
    """
    *rows, pattern = arguments
    n, batch, tokens = pattern.sparsity, rows[0].shape[0], rows[0].shape[1]
    owner = sub_of(torch.arange(tokens, device=rows[0].device), n, pattern.run)
    order = owner.argsort(stable=True)

    def together(video: Tensor, text: Tensor) -> Tensor:
        subs = video[:, order].unflatten(1, (n, -1)).flatten(0, 1)
        return torch.cat([subs, text.repeat_interleave(n, 0)], 1).transpose(1, 2)

    q, k, v = map(together, rows[:3], rows[3:])
    found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    each = found.unflatten(0, (batch, n))
    out = each[:, :, : tokens // n].flatten(1, 2)[:, order.argsort()]
    return out, each[:, :, tokens // n :].mean(1)


def naive_block(
    block: SUVBlock,
    video: Tensor,
    text: Tensor,
    condition: Tensor,
    rotary: tuple[Tensor, Tensor],
    pattern: SkipPattern,
) -> tuple[Tensor, Tensor]:
    """:class:`SUVBlock` of the plain spellings, with the same parameters and the same result.

    For blocks whose text has a feed-forward of its own, and is read by another block.
    """
    attn, eps = block.attn, block.attn.norm_q.eps
    assert attn.text_to_out is not None
    assert block.text_ff is not None

    def normed(x: Tensor, norm: Norm | None, shift: Tensor, scale: Tensor) -> Tensor:
        assert norm is not None
        assert norm.bias is not None
        return naive_modulated_norm(x, shift, scale, norm.weight, norm.bias, norm.eps)

    def both(norm: AdaptiveNorm) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        linear = norm.linear
        parts = F.linear(F.silu(condition), linear.weight.float(), linear.bias.float())
        shift, scale, gate, text_shift, text_scale, text_gate = parts.chunk(6, -1)
        inner = normed(video, norm.norm, shift, scale)
        return inner, gate, normed(text, norm.text_norm, text_shift, text_scale), text_gate

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1))

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        return naive_head_norm_rotate(x, weight, *rotary, eps)

    inner, gate, inner_text, text_gate = both(block.norm1)
    out, text_out = naive_attention(
        rotated(split(attn.to_q(inner)), attn.norm_q.weight),
        rotated(split(attn.to_k(inner)), attn.norm_k.weight),
        split(attn.to_v(inner)),
        naive_head_norm(split(attn.text_to_q(inner_text)), attn.text_norm_q.weight, eps),
        naive_head_norm(split(attn.text_to_k(inner_text)), attn.text_norm_k.weight, eps),
        split(attn.text_to_v(inner_text)),
        pattern,
    )
    video = naive_gated_residual(video, gate, attn.to_out(out.flatten(2)))
    text = naive_gated_residual(text, text_gate, attn.text_to_out(text_out.flatten(2)))

    inner, gate, inner_text, text_gate = both(block.norm2)
    video = naive_gated_residual(video, gate, block.ff(inner))
    return video, naive_gated_residual(text, text_gate, block.text_ff(inner_text))
