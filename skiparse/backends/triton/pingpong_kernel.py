"""A forward kernel for Hopper whose warps have roles: one copies, two groups multiply in turn.

The producer has tiles of queries copied, and of keys and values into a ring of slots. Each of two
consumers, warpgroups of 64 query rows, begins the scores of the next block of keys before it adds
up the values of the last one, and computes the softmax meanwhile; they take turns, so that one
multiplies while the other computes exponentials. It computes what ``forward_kernel`` does. A
program stays on its multiprocessor and takes one task after the other; its barriers count on.

Slots are handed over by barriers in shared memory, which count arrivals and flip a phase when all
are there: ``ready`` when a copy has landed, ``free`` when its consumers have read it, ``turn``
when the other consumer has issued its products. ``tests/test_pingpong.py`` runs the three roles,
this very source, on a model of such barriers, copies and products.

Source: Shah et al. 2024, "FlashAttention-3", algorithms 1 and 2.
"""

# Triton has no type stubs, and kernels no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as ttgl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from skiparse.backends import Inputs, Outputs
from skiparse.backends.triton import tiles
from skiparse.backends.triton.device import (
    LOG2E,
    SIZES,
    attended,
    inputs_of,
    launch,
    lse_pair,
    mask_pair,
    own,
    pair_pointers,
    rows_at,
    shared,
    task_at,
    tensors_of,
)
from skiparse.backends.triton.forward_kernel import allocate, tile_views
from skiparse.backends.triton.plans import planned
from skiparse.backends.triton.tiles import Box
from skiparse.pattern import SkipPattern

# Chosen to compile without spills; tests/test_aot.py has the registers and shared memory.
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "STAGES": 2}
HEAD_DIMS = (64, 128)


@gluon.jit
def kept(x):
    """The same number, but compilers do not know whence: what follows from it stays where it is.

    Else they compute that before the roles part, or before the first task, and registers run out.
    """
    return ttgl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=ttgl.int32, is_pure=False, pack=1
    )


@gluon.jit
def copy(tiles, is_video, at, text_at, ready, slot):
    """Have a tile of the video or of the text copied into a slot."""
    video, text = tiles
    text_shape: ttgl.constexpr = text.block_type.shape
    mbarrier.expect(ready, video.block_type.nbytes)
    if is_video:
        tma.async_copy_global_to_shared(video, at, ready, slot)
    else:
        tma.async_copy_global_to_shared(text, text_at, ready, slot.reshape(text_shape))


@gluon.jit
def produce(
    tiles,
    q_slots,
    slots,
    barriers,
    shape,
    work,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_M: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
):
    """Of each task, have the queries copied and the keys and values, each when its slot is free.

    First the blocks of the video, then those of the text. The first keys of a task do not wait for
    the queries, which the last task uses longer.
    """
    q, k, v = tiles
    k_slots, v_slots = slots
    k_ready, v_ready, k_free, v_free, q_ready, q_free, _ = barriers
    first, tasks, step, video_blocks, blocks = work
    _, _, n, w, H = shape
    half: ttgl.constexpr = BLOCK_M // 2
    copied = 0  # blocks of keys and values
    done = 0
    for task in range(first, tasks, step):
        b, h, s, block = task_at(task, blocks, n, H)
        b = b.to(ttgl.int32)
        column = h.to(ttgl.int32) * HEAD_DIM
        for i in range(blocks):
            slot = copied % STAGES
            lap = copied // STAGES & 1
            is_video = i < video_blocks
            run = i * BLOCK_N // w
            at = [b, run, s, i * BLOCK_N - run * w, column]
            text_at = [b, 0, 0, (i - video_blocks) * BLOCK_N, column]
            mbarrier.wait(k_free.index(slot), lap ^ 1)  # at once in the first lap
            copy(k, is_video, at, text_at, k_ready.index(slot), k_slots.index(slot))
            if i == 0:
                for group in ttgl.static_range(2):
                    row = block * BLOCK_M + group * half
                    q_run = row // w
                    q_at = [b, q_run, s, row - q_run * w, column]
                    q_text_at = [b, 0, 0, row - video_blocks * BLOCK_M, column]
                    mbarrier.wait(q_free.index(group), done & 1 ^ 1)
                    copy(
                        q, block < video_blocks, q_at, q_text_at,
                        q_ready.index(group), q_slots.index(group),
                    )  # fmt: skip
            mbarrier.wait(v_free.index(slot), lap ^ 1)
            copy(v, is_video, at, text_at, v_ready.index(slot), v_slots.index(slot))
            copied += 1
        done += 1  # noqa: SIM113  # not in Gluon


@gluon.jit
def allowed(mask, task, i, shape, counts, WHOLE_RUNS: ttgl.constexpr, BLOCK_N: ttgl.constexpr):
    """Which keys ``[N]`` of block ``i`` exist and are not masked, one a thread.

    None without masks.
    """
    attend = None
    if mask is not None:
        L, T, n, w, H = shape
        b, h, s, _ = task_at(task, counts[1], n, H)
        i = kept(i)  # the row numbers of the first block, else computed before all tasks
        lane = ttgl.arange(0, BLOCK_N, layout=ttgl.BlockedLayout([1], [32], [4], [0]))
        is_video, key, exists = rows_at(i, lane, counts[0], s, (L, T, n, w), WHOLE_RUNS, BLOCK_N)
        video, text = mask  # all heads and sub-sequences see the same: strides of 0, compiled in
        seen = (video[0], video[1], 0, video[3], 0), (text[0], text[1], 0, text[3], 0)
        attend = attended(seen, is_video, b, s, key, h, exists)
    return attend


@gluon.jit
def softmax(
    scores, attend, i, counts, log2_scale, top, BLOCK_N: ttgl.constexpr, LAYOUT: ttgl.constexpr
):
    """Weights of the keys of block ``i``, the new ``top``, and by what the old sums decay.

    ``attend`` is None where every key is attended to that exists.
    """
    video_blocks, _, L, T = counts
    if attend is None:
        left = L - i * BLOCK_N if i < video_blocks else T - (i - video_blocks) * BLOCK_N
        if left < BLOCK_N:  # else the block is full
            key = ttgl.arange(0, BLOCK_N, layout=ttgl.SliceLayout(0, LAYOUT))
            scores = ttgl.where((key < left)[None, :], scores, -float("inf"))
    else:
        attend = ttgl.convert_layout(attend, ttgl.SliceLayout(0, LAYOUT))  # [N]
        scores = ttgl.where(attend[None, :], scores, -float("inf"))
    new_top = ttgl.maximum(top, ttgl.max(scores, 1) * log2_scale)  # [M]
    shift = new_top
    if attend is not None:
        shift = ttgl.where(new_top == -float("inf"), 0.0, new_top)  # no key yet: inf - inf is NaN
    p = ttgl.exp2(scores * log2_scale - shift[:, None])  # [M, N]
    decay = ttgl.exp2(top - shift)  # [M]
    return p, new_top, decay


@gluon.jit
def attend(
    q_slots,
    slots,
    barriers,
    mask,
    task,
    shape,
    counts,
    log2_scale,
    done,
    WHOLE_RUNS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
    GROUP: ttgl.constexpr,
):
    """One consumer: values weighted and added up, ``[M, D]``, with ``top`` and ``total``, ``[M]``.

    There is at least one block, and a key in each, which may be masked. Barriers went on counting
    in the tasks ``done`` before this one, all of which had as many blocks.
    """
    k_slots, v_slots = slots
    k_ready, v_ready, k_free, v_free, q_ready, q_free, turn = barriers
    _, blocks, _, _ = counts
    rows: ttgl.constexpr = q_slots.shape[1] * q_slots.shape[2] * q_slots.shape[4]
    dtype: ttgl.constexpr = q_slots.dtype
    layout: ttgl.constexpr = ttgl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: ttgl.constexpr = ttgl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: ttgl.constexpr = ttgl.SliceLayout(1, out_layout)
    p_layout: ttgl.constexpr = ttgl.DotOperandLayout(0, out_layout, 2)

    top = ttgl.full([rows], -float("inf"), ttgl.float32, ttgl.SliceLayout(1, layout))
    none = ttgl.zeros([rows, BLOCK_N], ttgl.float32, layout)
    acc = ttgl.zeros([rows, HEAD_DIM], ttgl.float32, out_layout)

    at_first = allowed(mask, task, kept(0), shape, counts, WHOLE_RUNS, BLOCK_N)
    q_tile = q_slots.index(GROUP).reshape([rows, HEAD_DIM])
    before = done * blocks
    slot = before % STAGES
    mbarrier.wait(q_ready.index(GROUP), done & 1)
    mbarrier.wait(k_ready.index(slot), before // STAGES & 1)
    k_tile = k_slots.index(slot).reshape([BLOCK_N, HEAD_DIM])
    scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(slot), count=1)
    p, top, _ = softmax(scores, at_first, kept(0), counts, log2_scale, top, BLOCK_N, layout)
    total = ttgl.sum(p, 1)  # [M]

    for i in range(1, blocks):
        slot = (before + i) % STAGES
        last = (before + i - 1) % STAGES
        # Rounded here, not where they are computed: there they would need registers beside those
        # that the products under way still read, and copies from these to those.
        weights = ttgl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(k_ready.index(slot), (before + i) // STAGES & 1)
        mbarrier.wait(turn.index(GROUP), (before - done + i - 1) & 1)
        k_tile = k_slots.index(slot).reshape([BLOCK_N, HEAD_DIM])
        scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), none, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(last), (before + i - 1) // STAGES & 1)
        v_tile = v_slots.index(last).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(weights, v_tile, acc, is_async=True)
        mbarrier.arrive(turn.index(1 - GROUP), count=1)
        # Behind the products, which take longer than the load; in front of them registers run out.
        attend = allowed(mask, task, i, shape, counts, WHOLE_RUNS, BLOCK_N)

        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_free.index(slot), count=1)
        p, top, decay = softmax(scores, attend, i, counts, log2_scale, top, BLOCK_N, layout)
        total = total * decay + ttgl.sum(p, 1)
        # A wait that is over at once, and a dependence: without them the compilers move the end of
        # the products up before the exponentials.
        mbarrier.wait(v_ready.index(last), (before + i - 1) // STAGES & 1)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_free.index(last), count=1)
        acc = acc * ttgl.convert_layout(decay, row_layout)[:, None]

    mbarrier.arrive(q_free.index(GROUP), count=1)
    last = (before + blocks - 1) % STAGES
    weights = ttgl.convert_layout(p.to(dtype), p_layout)
    mbarrier.wait(v_ready.index(last), (before + blocks - 1) // STAGES & 1)
    v_tile = v_slots.index(last).reshape([BLOCK_N, HEAD_DIM])
    acc = warpgroup_mma(weights, v_tile, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_free.index(last), count=1)
    return acc, ttgl.convert_layout(top, row_layout), ttgl.convert_layout(total, row_layout)


@gluon.jit
def consume(
    mask,
    out,
    lse,
    q_slots,
    slots,
    barriers,
    shape,
    work,
    scale,
    WHOLE_RUNS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_M: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
    GROUP: ttgl.constexpr,
):
    """Of each task, its half of the query rows: attending, and written by pointers."""
    first, tasks, step, video_blocks, blocks = work
    L, T, n, w, H = shape
    counts = (video_blocks, blocks, L, T)
    rows: ttgl.constexpr = BLOCK_M // 2
    stored: ttgl.constexpr = (  # in whole rows; with masks as they lie, for want of registers
        ttgl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        if mask is None
        else ttgl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    )
    done = 0
    for task in range(first, tasks, step):
        acc, top, total = attend(
            q_slots, slots, barriers, mask, task, shape, counts, scale * LOG2E, done,
            WHOLE_RUNS, HEAD_DIM, BLOCK_N, STAGES, GROUP,
        )  # fmt: skip
        if mask is not None:
            total = ttgl.where(total == 0.0, 1.0, total)  # without a key acc is 0 and top -inf
        b, h, s, block = task_at(task, blocks, n, H)
        lane = GROUP * rows + ttgl.arange(0, rows, layout=ttgl.SliceLayout(1, stored))  # [M]
        d = ttgl.arange(0, HEAD_DIM, layout=ttgl.SliceLayout(0, stored)).to(ttgl.int64)  # [D]
        is_video, row, exists = rows_at(
            block, lane, video_blocks, s, (L, T, n, w), WHOLE_RUNS, BLOCK_M
        )
        tile = ttgl.convert_layout((acc / total[:, None]).to(q_slots.dtype), stored)
        pointers = pair_pointers(out, is_video, b, s, row, h)[:, None] + d[None, :]  # [M, D]
        ttgl.store(pointers, tile, mask=exists[:, None])
        lane = GROUP * rows + ttgl.arange(0, rows, layout=top.type.layout)  # [M], as top lies
        _, row, exists = rows_at(block, lane, video_blocks, s, (L, T, n, w), WHOLE_RUNS, BLOCK_M)
        row_lse = (top + ttgl.log2(total)) / LOG2E  # [M]
        ttgl.store(pair_pointers(lse, is_video, b, s, row, h), row_lse, mask=exists)
        done += 1  # noqa: SIM113  # not in Gluon


@gluon.jit(do_not_specialize=["B", *SIZES])
def skiparse_forward_pingpong(
    q,
    text_q,
    k,
    v,
    text_k,
    text_v,
    mask,
    out,
    lse,
    scale,
    B,
    N,
    T,
    H,
    longest,
    n,
    w,
    WHOLE_RUNS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_D: ttgl.constexpr,
    BLOCK_M: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
):
    """Tasks one after the other: a block of query rows of a sub-sequence, against all of its keys.

    All sub-sequences are equally long.
    """
    q_shape: ttgl.constexpr = [2] + q.block_type.shape  # noqa: RUF005  # not in Gluon
    k_shape: ttgl.constexpr = [STAGES] + k.block_type.shape  # noqa: RUF005  # not in Gluon
    v_shape: ttgl.constexpr = [STAGES] + v.block_type.shape  # noqa: RUF005  # not in Gluon
    q_slots = ttgl.allocate_shared_memory(q.dtype, q_shape, q.layout)
    k_slots = ttgl.allocate_shared_memory(k.dtype, k_shape, k.layout)
    v_slots = ttgl.allocate_shared_memory(v.dtype, v_shape, v.layout)
    k_ready = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = ttgl.allocate_shared_memory(ttgl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_ready = ttgl.allocate_shared_memory(ttgl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_free = ttgl.allocate_shared_memory(ttgl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = ttgl.allocate_shared_memory(ttgl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in ttgl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    for i in ttgl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    mbarrier.arrive(turn.index(0), count=1)  # the first consumer goes first
    fence_async_shared()

    slots = (k_slots, v_slots)
    barriers = (k_ready, v_ready, k_free, v_free, q_ready, q_free, turn)
    tiles = ((q, text_q), (k, text_k), (v, text_v))
    ttgl.static_assert(BLOCK_M == BLOCK_N)  # so there are equally many blocks of queries and keys
    video_blocks = ttgl.cdiv(longest, BLOCK_N)
    blocks = video_blocks + ttgl.cdiv(T, BLOCK_N)
    shape = (kept(longest), kept(T), kept(n), w, kept(H))
    work = (
        kept(ttgl.program_id(0)), kept(blocks * n * H * B), kept(ttgl.num_programs(0)),
        kept(video_blocks), kept(blocks),
    )  # fmt: skip
    ttgl.warp_specialize(
        [
            (consume, (mask, out, lse, q_slots, slots, barriers, shape, work, scale,
                       WHOLE_RUNS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, 0)),
            (consume, (mask, out, lse, q_slots, slots, barriers, shape, work, scale,
                       WHOLE_RUNS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, 1)),
            (produce, (tiles, q_slots, slots, barriers, shape, work,
                       HEAD_DIM, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _described(x: Tensor, shape: list[int], strides: list[int], box: Box) -> TensorDescriptor:
    dtype = getattr(ttgl, str(x.dtype).removeprefix("torch."))
    layout = ttgl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(x, shape, strides, box, layout)


def forward(inputs: Inputs) -> Outputs:
    """Allocate, and launch over the blocks of query rows."""
    return Outputs(*planned(_launches, tensors_of(inputs), inputs.pattern, inputs.scale))


def _launches(tensors: Sequence[Any], pattern: SkipPattern, scale: float) -> Outputs:
    inputs = inputs_of(tensors, pattern, scale)
    outputs = allocate(inputs)
    half = TILES["BLOCK_M"] // 2  # of a consumer
    queries = tiles.tile_views(inputs, half, (inputs.q,), (inputs.text_q,), _described)
    launch(
        skiparse_forward_pingpong,
        inputs,
        TILES["BLOCK_M"],
        *queries,
        *tile_views(inputs, TILES["BLOCK_N"], _described),
        mask_pair(inputs),
        (shared(outputs.out), own(outputs.text_out)),
        lse_pair(outputs.lse, outputs.text_lse),
        scale,
        inputs.q.shape[0],
        keys=False,
        persistent=True,
        num_warps=4,
        **TILES,
    )
    return outputs
