"""A forward kernel for Hopper whose warps have roles: one copies, two groups multiply in turn.

The producer has tiles of keys and values copied into a ring of slots in shared memory. Each of two
consumers, warpgroups of 64 query rows, begins the scores of the next block of keys before it adds
up the values of the last one, and computes the softmax meanwhile; they take turns, so that one
multiplies while the other computes exponentials. It computes what ``forward_kernel`` does.

Slots are handed over by barriers in shared memory, which count arrivals and flip a phase when all
are there: ``ready`` when a copy has landed, ``free`` when both consumers have read it, ``turn``
when the other consumer has issued its products. ``tests/test_pingpong.py`` runs the three roles,
this very source, on a model of such barriers, copies and products.

Source: Shah et al. 2024, "FlashAttention-3", algorithms 1 and 2.
"""

# Triton has no type stubs, and kernels no Python types:
# mypy: disable-error-code="import-untyped, no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

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
from skiparse.backends.triton.device import (
    LOG2E,
    SIZES,
    launch,
    length_of,
    lse_pair,
    own,
    pair_pointers,
    program,
    rows_at,
    shared,
)
from skiparse.backends.triton.forward_kernel import Box, allocate, tile_pair, tile_views

# Chosen to compile without spills; tests/test_aot.py has the registers and shared memory.
TILES = {"BLOCK_M": 128, "BLOCK_N": 128, "STAGES": 2}
HEAD_DIMS = (64, 128)


@gluon.jit
def produce(
    queries,
    tiles,
    q_slots,
    slots,
    barriers,
    where,
    counts,
    w,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_M: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
):
    """Have the blocks of the video copied, then those of the text, each when its slot is free."""
    q, text_q = queries
    k, v, text_k, text_v = tiles
    k_slots, v_slots = slots
    k_ready, v_ready, k_free, v_free, q_ready, _ = barriers
    b, h, s, block, query_blocks = where
    video_blocks, blocks, _, _ = counts
    text_shape: ttgl.constexpr = text_k.block_type.shape
    text_q_shape: ttgl.constexpr = text_q.block_type.shape
    b, h = b.to(ttgl.int32), h.to(ttgl.int32)
    for group in ttgl.static_range(2):
        mbarrier.expect(q_ready.index(group), q.block_type.nbytes)
        if block < query_blocks:
            first = block * BLOCK_M + group * (BLOCK_M // 2)
            run = first // w
            at = [b, run, s, first - run * w, h * HEAD_DIM]
            tma.async_copy_global_to_shared(q, at, q_ready.index(group), q_slots.index(group))
        else:
            first = (block - query_blocks) * BLOCK_M + group * (BLOCK_M // 2)
            at = [b, first, 0, 0, h * HEAD_DIM]
            q_slot = q_slots.index(group).reshape(text_q_shape)
            tma.async_copy_global_to_shared(text_q, at, q_ready.index(group), q_slot)
    for i in range(blocks):
        slot = i % STAGES
        lap = i // STAGES & 1
        if i < video_blocks:
            run = i * BLOCK_N // w
            at = [b, run, s, i * BLOCK_N - run * w, h * HEAD_DIM]
            mbarrier.wait(k_free.index(slot), lap ^ 1)  # at once in the first lap
            mbarrier.expect(k_ready.index(slot), k.block_type.nbytes)
            tma.async_copy_global_to_shared(k, at, k_ready.index(slot), k_slots.index(slot))
            mbarrier.wait(v_free.index(slot), lap ^ 1)
            mbarrier.expect(v_ready.index(slot), v.block_type.nbytes)
            tma.async_copy_global_to_shared(v, at, v_ready.index(slot), v_slots.index(slot))
        else:
            at = [b, (i - video_blocks) * BLOCK_N, 0, 0, h * HEAD_DIM]
            k_slot = k_slots.index(slot).reshape(text_shape)
            v_slot = v_slots.index(slot).reshape(text_shape)
            mbarrier.wait(k_free.index(slot), lap ^ 1)
            mbarrier.expect(k_ready.index(slot), text_k.block_type.nbytes)
            tma.async_copy_global_to_shared(text_k, at, k_ready.index(slot), k_slot)
            mbarrier.wait(v_free.index(slot), lap ^ 1)
            mbarrier.expect(v_ready.index(slot), text_v.block_type.nbytes)
            tma.async_copy_global_to_shared(text_v, at, v_ready.index(slot), v_slot)


@gluon.jit
def softmax(scores, i, counts, log2_scale, top, BLOCK_N: ttgl.constexpr, LAYOUT: ttgl.constexpr):
    """Weights of the keys of block ``i``, the new ``top``, and by what the old sums decay."""
    video_blocks, _, L, T = counts
    left = L - i * BLOCK_N if i < video_blocks else T - (i - video_blocks) * BLOCK_N
    if left < BLOCK_N:  # else the block is full
        key = ttgl.arange(0, BLOCK_N, layout=ttgl.SliceLayout(0, LAYOUT))
        scores = ttgl.where((key < left)[None, :], scores, -float("inf"))
    new_top = ttgl.maximum(top, ttgl.max(scores, 1) * log2_scale)  # [M]
    p = ttgl.exp2(scores * log2_scale - new_top[:, None])  # [M, N]
    decay = ttgl.exp2(top - new_top)  # [M]
    return p, new_top, decay


@gluon.jit
def attend(
    q_slots,
    slots,
    barriers,
    counts,
    log2_scale,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
    GROUP: ttgl.constexpr,
):
    """One consumer: values weighted and added up, ``[M, D]``, with ``top`` and ``total``, ``[M]``.

    There is at least one block, and a key in each.
    """
    k_slots, v_slots = slots
    k_ready, v_ready, k_free, v_free, q_ready, turn = barriers
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

    q_tile = q_slots.index(GROUP).reshape([rows, HEAD_DIM])
    mbarrier.wait(q_ready.index(GROUP), 0)
    mbarrier.wait(k_ready.index(0), 0)
    k_tile = k_slots.index(0).reshape([BLOCK_N, HEAD_DIM])
    scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), none, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_free.index(0), count=1)
    p, top, _ = softmax(scores, 0, counts, log2_scale, top, BLOCK_N, layout)
    total = ttgl.sum(p, 1)  # [M]

    for i in range(1, blocks):
        slot = i % STAGES
        last = (i - 1) % STAGES
        # Rounded here, not where they are computed: there they would need registers beside those
        # that the products under way still read, and copies from these to those.
        weights = ttgl.convert_layout(p.to(dtype), p_layout)
        mbarrier.wait(k_ready.index(slot), i // STAGES & 1)
        mbarrier.wait(turn.index(GROUP), (i - 1) & 1)
        k_tile = k_slots.index(slot).reshape([BLOCK_N, HEAD_DIM])
        scores = warpgroup_mma(q_tile, k_tile.permute([1, 0]), none, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(last), (i - 1) // STAGES & 1)
        v_tile = v_slots.index(last).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(weights, v_tile, acc, is_async=True)
        mbarrier.arrive(turn.index(1 - GROUP), count=1)

        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_free.index(slot), count=1)
        p, top, decay = softmax(scores, i, counts, log2_scale, top, BLOCK_N, layout)
        total = total * decay + ttgl.sum(p, 1)
        # A wait that is over at once, and a dependence: without them the compilers move the end of
        # the products up before the exponentials.
        mbarrier.wait(v_ready.index(last), (i - 1) // STAGES & 1)
        acc, p = warpgroup_mma_wait(0, [acc, p])
        mbarrier.arrive(v_free.index(last), count=1)
        acc = acc * ttgl.convert_layout(decay, row_layout)[:, None]

    last = (blocks - 1) % STAGES
    weights = ttgl.convert_layout(p.to(dtype), p_layout)
    mbarrier.wait(v_ready.index(last), (blocks - 1) // STAGES & 1)
    v_tile = v_slots.index(last).reshape([BLOCK_N, HEAD_DIM])
    acc = warpgroup_mma(weights, v_tile, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    return acc, ttgl.convert_layout(top, row_layout), ttgl.convert_layout(total, row_layout)


@gluon.jit
def consume(
    out,
    lse,
    q_slots,
    slots,
    barriers,
    where,
    sizes,
    counts,
    log2_scale,
    WHOLE_RUNS: ttgl.constexpr,
    HEAD_DIM: ttgl.constexpr,
    BLOCK_M: ttgl.constexpr,
    BLOCK_N: ttgl.constexpr,
    STAGES: ttgl.constexpr,
    GROUP: ttgl.constexpr,
):
    """Its half of the query rows: attending, and written by pointers."""
    acc, top, total = attend(
        q_slots, slots, barriers, counts, log2_scale, HEAD_DIM, BLOCK_N, STAGES, GROUP
    )
    b, h, s, block, query_blocks = where
    rows: ttgl.constexpr = BLOCK_M // 2
    wide: ttgl.constexpr = ttgl.BlockedLayout(
        [1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0]
    )
    lane = GROUP * rows + ttgl.arange(0, rows, layout=ttgl.SliceLayout(1, wide))  # [M]
    d = ttgl.arange(0, HEAD_DIM, layout=ttgl.SliceLayout(0, wide)).to(ttgl.int64)  # [D]
    is_video, row, exists = rows_at(block, lane, query_blocks, s, sizes, WHOLE_RUNS, BLOCK_M)
    tile = ttgl.convert_layout((acc / total[:, None]).to(q_slots.dtype), wide)
    pointers = pair_pointers(out, is_video, b, s, row, h)[:, None] + d[None, :]  # [M, D]
    ttgl.store(pointers, tile, mask=exists[:, None])
    row_lse = ttgl.convert_layout((top + ttgl.log2(total)) / LOG2E, ttgl.SliceLayout(1, wide))
    ttgl.store(pair_pointers(lse, is_video, b, s, row, h), row_lse, mask=exists)


@gluon.jit(do_not_specialize=SIZES)
def skiparse_forward_pingpong(
    q,
    text_q,
    k,
    v,
    text_k,
    text_v,
    out,
    lse,
    scale,
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
    """One block of query rows of one sub-sequence, against all of its keys."""
    query_blocks = ttgl.cdiv(longest, BLOCK_M)
    b, h, s, block = program(query_blocks + ttgl.cdiv(T, BLOCK_M), n, H)
    L = length_of(s, N, n, w)
    video_blocks = ttgl.cdiv(L, BLOCK_N)
    counts = (video_blocks, video_blocks + ttgl.cdiv(T, BLOCK_N), L, T)

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
    turn = ttgl.allocate_shared_memory(ttgl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in ttgl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    for i in ttgl.static_range(2):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    mbarrier.arrive(turn.index(0), count=1)  # the first consumer goes first
    fence_async_shared()

    where = (b, h, s, block, query_blocks)
    sizes = (L, T, n, w)
    slots = (k_slots, v_slots)
    barriers = (k_ready, v_ready, k_free, v_free, q_ready, turn)
    queries, tiles = (q, text_q), (k, v, text_k, text_v)
    log2_scale = scale * LOG2E
    ttgl.warp_specialize(
        [
            (consume, (out, lse, q_slots, slots, barriers, where, sizes, counts, log2_scale,
                       WHOLE_RUNS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, 0)),
            (consume, (out, lse, q_slots, slots, barriers, where, sizes, counts, log2_scale,
                       WHOLE_RUNS, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, 1)),
            (produce, (queries, tiles, q_slots, slots, barriers, where, counts, w,
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
    outputs = allocate(inputs)
    launch(
        skiparse_forward_pingpong,
        inputs,
        TILES["BLOCK_M"],
        *tile_pair(inputs.q, inputs.text_q, inputs.pattern, TILES["BLOCK_M"] // 2, _described),
        *tile_views(inputs, TILES["BLOCK_N"], _described),
        (shared(outputs.out), own(outputs.text_out)),
        lse_pair(outputs.lse, outputs.text_lse),
        inputs.scale,
        num_warps=4,
        **TILES,
    )
    return outputs
