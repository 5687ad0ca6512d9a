"""The PTX machine computes what the PTX ISA says, and refuses what a GPU would not forgive.

Small programs by hand, with answers that are known or written out here: each instruction family,
every kind of fault, and what is asynchronous.
"""

import re

import numpy as np
import pytest
from ptx.machine import Launch, execute
from ptx.memory import Fault, GlobalMemory, Unknown
from ptx.program import parse
from ptx.schedule import Batch, Schedule
from ptx.tma import MAGIC, TensorMap

REGISTERS = """
    .reg .pred %p<32>; .reg .b16 %h<64>; .reg .b32 %r<256>; .reg .b64 %d<64>;
"""


def ptx_of(body, given):
    kinds = [
        f".param .align 64 .b8 in{i}[128]" if isinstance(x, TensorMap) else f".param .u64 in{i}"
        for i, x in enumerate(given)
    ]
    parameters = ",\n".join(kinds)
    return f".version 8.7\n.visible .entry kernel(\n{parameters}\n)\n{{{REGISTERS}{body}\nret;\n}}"


def run(body, *given, threads=32, shared=1024, mode="late", seed=0, grid=1):
    """Execute a kernel; ``%d0`` to ``%d7`` are the addresses of the arrays or tensor maps."""
    loads = [
        f"mov.b64 %d{i}, in{i};" if isinstance(x, TensorMap) else f"ld.param.b64 %d{i}, [in{i}];"
        for i, x in enumerate(given)
    ]
    program = parse(ptx_of("\n".join([*loads, "mov.u32 %r0, %tid.x;", body]), given))
    memory, maps, raw = GlobalMemory(), [], np.zeros(4096, np.uint8)
    for parameter, x in zip(program.parameters, given, strict=True):
        if isinstance(x, TensorMap):
            value = np.array([MAGIC, len(maps)], np.uint64)
            maps.append(x)
        else:
            memory.add_array(x, "an array")
            value = np.array([x.ctypes.data], np.uint64)
        raw[parameter.offset :][: value.nbytes] = value.view(np.uint8)
    launch = Launch(Schedule(program), grid, threads, shared, raw, memory, maps)
    return execute(launch, mode, seed)


STORE = "mul.wide.u32 %d60, %r0, 4; add.s64 %d61, %d{to}, %d60; st.global.b32 [%d61], %r{what};"


def each_lane(code, *columns):
    """``code`` from %r1, %r2, ... to %r9, for every lane's numbers; uint32 ``[lanes]``."""
    inputs = [np.resize(np.asarray(x), 32).astype(x.dtype).view(np.uint32) for x in columns]
    out = np.zeros(32, np.uint32)
    body = "mul.wide.u32 %d50, %r0, 4;"
    for i in range(len(inputs)):
        body += f"add.s64 %d51, %d{i}, %d50; ld.global.b32 %r{i + 1}, [%d51];"
    run(f"{body}{code}{STORE.format(to=len(inputs), what=9)}", *inputs, out)
    return out[: len(columns[0])]


def bits(*values):
    return np.array(values, np.uint32)


def ints(*values):
    return np.array(values, np.int32)


def floats(*values):
    return np.array(values, np.float32)


# ---- registers


@pytest.mark.parametrize(
    ("code", "columns", "right"),
    [
        ("div.s32 %r9, %r1, %r2;", (ints(-7, 7, -7, 7), ints(2, -2, -2, 2)), ints(-3, -3, 3, 3)),
        ("rem.s32 %r9, %r1, %r2;", (ints(-7, 7, -7, 7), ints(2, -2, -2, 2)), ints(-1, 1, -1, 1)),
        ("div.u32 %r9, %r1, %r2;", (bits(2**32 - 1, 9), bits(2, 0)), bits(2**31 - 1, 2**32 - 1)),
        ("shr.s32 %r9, %r1, %r2;", (ints(-8, -8, 8), ints(1, 40, 40)), ints(-4, -1, 0)),
        ("shr.u32 %r9, %r1, %r2;", (ints(-8, -8), ints(1, 32)), bits(2**31 - 4, 0)),
        ("shl.b32 %r9, %r1, %r2;", (ints(3, 3), ints(31, 32)), bits(2**31, 0)),
        ("mul.lo.s32 %r9, %r1, %r2;", (ints(2**30, -5), ints(6, 7)), ints(-(2**31), -35)),
        ("mul.hi.s32 %r9, %r1, %r2;", (ints(-1, 2**30), ints(2, 8)), ints(-1, 2)),
        ("mul.hi.u32 %r9, %r1, %r2;", (bits(2**32 - 1), bits(2**32 - 1)), bits(2**32 - 2)),
        ("min.s32 %r9, %r1, %r2;", (ints(-1, 5), ints(1, 6)), ints(-1, 5)),
        ("min.u32 %r9, %r1, %r2;", (ints(-1, 5), ints(1, 6)), ints(1, 5)),
        ("bfe.s32 %r9, %r1, 4, 4;", (bits(0xF0, 0x70, 0x80),), ints(-1, 7, -8)),
        ("bfe.u32 %r9, %r1, 28, 8;", (bits(0xA0000000),), bits(10)),
        ("bfe.s32 %r9, %r1, 28, 8;", (bits(0xA0000000),), ints(-6)),
        ("prmt.b32 %r9, %r1, %r2, 0x7041;", (bits(0x33221100), bits(0x77665544)), bits(0x77004411)),
        ("lop3.b32 %r9, %r1, %r2, %r3, 0x96;", (bits(12), bits(10), bits(7)), bits(12 ^ 10 ^ 7)),
        (
            "mul.wide.s32 %d9, %r1, %r2; shr.s64 %d9, %d9, 32; cvt.u32.u64 %r9, %d9;",
            (ints(-1, 2**30), ints(2**31 - 1, 16)),
            ints(-1, 4),
        ),
        (
            "mov.b64 %d9, {%r1, %r2}; mov.b64 {%r7, %r8}, %d9; sub.s32 %r9, %r8, %r7;",
            (ints(5, 8), ints(7, 3)),
            ints(2, -5),
        ),
        ("setp.lt.u32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;", (ints(-1), ints(1)), ints(2)),
        ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 2, %p1;", (ints(-1), ints(1)), ints(1)),
    ],
)
def test_integers(code, columns, right):
    assert each_lane(code, *columns).tolist() == right.view(np.uint32).tolist()


NAN, INF = float("nan"), float("inf")
TIE = 2.0**-8  # half a step of bf16 at 1


@pytest.mark.parametrize(
    ("code", "columns", "right"),
    [
        (  # to nearest, ties to even; too large is infinite; NaN is 0x7fff
            "cvt.rn.bf16.f32 %h1, %r1; cvt.u32.u16 %r9, %h1;",
            (floats(1 + TIE, 1 + 3 * TIE, 1 + 1.01 * TIE, -1 - TIE, 3.4e38, NAN, 1e-40),),
            bits(0x3F80, 0x3F82, 0x3F81, 0xBF80, 0x7F80, 0x7FFF, 0x0001),
        ),
        (
            "cvt.rn.f16.f32 %h1, %r1; cvt.u32.u16 %r9, %h1;",
            (floats(1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520, NAN, 2**-24, 2**-25),),
            bits(0x3C00, 0x3C02, 0x7BFF, 0x7C00, 0x7FFF, 1, 0),
        ),
        (  # the first operand is the upper half
            "cvt.rn.bf16x2.f32 %r9, %r1, %r2;",
            (floats(1), floats(-2)),
            bits(0x3F80C000),
        ),
        ("cvt.rn.f16x2.f32 %r9, %r1, %r2;", (floats(1), floats(-2)), bits(0x3C00C000)),
        ("cvt.rn.f32.s32 %r9, %r1;", (ints(2**24 + 1, 2**24 + 3),), floats(2**24, 2**24 + 4)),
        (
            "cvt.rzi.s32.f32 %r9, %r1;",
            (floats(-1.9, 3e9, -3e9, NAN),),
            ints(-1, 2**31 - 1, -(2**31), 0),
        ),
        ("cvt.rni.s32.f32 %r9, %r1;", (floats(0.5, 1.5, -2.5),), ints(0, 2, -2)),
        ("max.f32 %r9, %r1, %r2;", (floats(NAN, 1, NAN), floats(2, NAN, 3)), floats(2, 1, 3)),
        ("ex2.approx.ftz.f32 %r9, %r1;", (floats(-126, -127, -INF, 3),), floats(2**-126, 0, 0, 8)),
        (  # the product is not rounded: (1 + e)(1 - e) - 1 = -e^2
            "fma.rn.f32 %r9, %r1, %r2, %r3;",
            (floats(1 + 2**-20), floats(1 - 2**-20), floats(-1)),
            floats(-(2.0**-40)),
        ),
        ("fma.rn.f32 %r9, %r1, 0f40000000, 0fBF800000;", (floats(3),), floats(5)),
        (
            """setp.ne.f32 %p1, %r1, %r2; setp.neu.f32 %p2, %r1, %r2;
            selp.b32 %r8, 1, 0, %p1; selp.b32 %r9, 2, 0, %p2; or.b32 %r9, %r8, %r9;""",
            (floats(1, NAN, 1), floats(1, 1, 2)),
            ints(0, 2, 3),
        ),
    ],
)
def test_floating_point(code, columns, right):
    assert each_lane(code, *columns).tolist() == right.view(np.uint32).tolist()


@pytest.mark.parametrize(
    ("how", "right"),
    [
        ("bfly.b32 %r9, %r1, 5, 31", [i ^ 5 for i in range(32)]),
        ("idx.b32 %r9, %r1, 7, 31", [7] * 32),
        ("up.b32 %r9, %r1, 3, 0", [i - 3 if i >= 3 else i for i in range(32)]),
        ("down.b32 %r9, %r1, 3, 31", [i + 3 if i < 29 else i for i in range(32)]),
        ("idx.b32 %r9, %r1, 1, 0x181f", [8 * (i // 8) + 1 for i in range(32)]),  # parts of 8
    ],
)
def test_shuffles(how, right):
    lanes = np.arange(32, dtype=np.uint32)
    assert each_lane(f"shfl.sync.{how}, -1;", lanes).tolist() == right


def test_batches_keep_the_order_of_reuse():
    """A register is read, written again and read, in code that invites to be batched."""
    code = """
    mov.b32 %r2, 10; add.s32 %r3, %r1, %r2; mov.b32 %r2, 20; add.s32 %r4, %r1, %r2;
    mov.b32 %r2, 30; add.s32 %r5, %r1, %r2; add.s32 %r2, %r2, %r3; add.s32 %r6, %r2, %r4;
    mul.lo.s32 %r7, %r5, 1000; add.s32 %r9, %r6, %r7;
    """
    x = np.arange(32, dtype=np.uint32)
    right = 30 + (x + 10) + (x + 20) + (x + 30) * 1000
    assert each_lane(code, x).tolist() == right.tolist()


def test_independent_instructions_are_one_batch():
    """That is where the speed comes from."""
    body = "".join(f"add.s32 %r{i + 100}, %r0, {i};" for i in range(50))
    schedule = Schedule(parse(ptx_of(f"mov.u32 %r0, %tid.x; {body}", ())))
    assert [s.count for s in schedule.steps if isinstance(s, Batch)] == [1, 50]


def test_lanes_go_separate_ways_and_meet_again():
    """Lane i goes round a loop i times; a guard chooses lanes without a branch."""
    out = np.zeros(32, np.uint32)
    body = """
    mov.b32 %r1, 0; mov.b32 %r2, 0;
    $again: setp.ge.u32 %p1, %r1, %r0; @%p1 bra $out;
    add.s32 %r1, %r1, 1; add.s32 %r2, %r2, %r1; bra.uni $again;
    $out: setp.lt.u32 %p2, %r0, 4; @%p2 add.s32 %r2, %r2, 1000; @!%p2 add.s32 %r2, %r2, 2000;
    """
    run(body + STORE.format(to=0, what=2), out)
    assert out.tolist() == [i * (i + 1) // 2 + (1000 if i < 4 else 2000) for i in range(32)]


def test_indexed_branches_and_scoped_labels():
    out = np.zeros(64, np.uint32)
    body = """
    shr.u32 %r5, %r0, 5;
    $table: .branchtargets
        $first,
        $second;
    brx.idx %r5, $table;
    $first: { .reg .pred done; setp.eq.b32 done, 0, 0; @done bra here; mov.b32 %r2, 9;
    here: mov.b32 %r2, 1; } bra.uni $end;
    $second: { .reg .pred done; setp.eq.b32 done, 0, 0; @done bra here; mov.b32 %r2, 9;
    here: mov.b32 %r2, 2; }
    $end:
    """
    run(body + STORE.format(to=0, what=2), out, threads=64)
    assert out.tolist() == [1] * 32 + [2] * 32


# ---- matrices


def halves_of(x, kind="f16"):
    """Numbers that are exact in 16 bits, as these."""
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def small_numbers(*shape):
    return np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_and_ldmatrix(kind):
    """D = A B + C, with A [16, 16] and B [16, 8] row by row in shared memory, C = 100 lane."""
    a, b = small_numbers(16, 16), small_numbers(16, 8)
    data = np.concatenate([halves_of(a, kind).ravel(), halves_of(b, kind).ravel()]).view(np.uint32)
    out = np.zeros(128, np.float32)
    copy = "".join(
        f"add.s64 %d10, %d0, %d60; ld.global.b32 %r{20 + i}, [%d10+{128 * i}];"
        f"st.shared.b32 [%r60+{128 * i}], %r{20 + i};"
        for i in range(6)
    )
    body = f"""
    shl.b32 %r60, %r0, 2; cvt.u64.u32 %d60, %r60; {copy} bar.sync 0;
    and.b32 %r1, %r0, 15; shr.u32 %r2, %r0, 4; shl.b32 %r1, %r1, 5; shl.b32 %r2, %r2, 4;
    add.s32 %r3, %r1, %r2; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r3];
    and.b32 %r1, %r0, 15; shl.b32 %r1, %r1, 4; add.s32 %r1, %r1, 512;
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r8, %r9}}, [%r1];
    mul.lo.s32 %r10, %r0, 100; cvt.rn.f32.s32 %r10, %r10;
    mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%r11, %r12, %r13, %r14}},
        {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {{%r10, %r10, %r10, %r10}};
    shl.b32 %r20, %r0, 4; cvt.u64.u32 %d20, %r20; add.s64 %d20, %d1, %d20;
    st.global.v4.b32 [%d20], {{%r11, %r12, %r13, %r14}};
    """
    run(body, data, out)
    found = np.zeros((16, 8))
    for lane, values in enumerate(out.reshape(32, 4)):
        for i, value in enumerate(values):
            found[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] = value - 100 * lane
    assert np.array_equal(found, a @ b)


def swizzled(tile, chunks):
    """Rows of ``8 * chunks`` 16-bit numbers as copies of 32, 64 or 128 bytes a row lay them."""
    rows = tile.reshape(len(tile), chunks, 8)
    out = np.empty_like(rows)
    for r in range(len(rows)):
        for c in range(chunks):
            out[r, c ^ (r // (8 // chunks) % chunks)] = rows[r, c]
    return out


def core_matrices(tile):
    """[rows, 16] as 8 x 8 matrices of 128 bytes, those of one k first."""
    return tile.reshape(-1, 8, 2, 8).transpose(2, 0, 1, 3)


def descriptor(start, leading, stride, swizzle):
    fields = (start >> 4, 0), (leading >> 4, 16), (stride >> 4, 32), (swizzle, 62)
    return sum(value << place for value, place in fields)


WGMMA = """
    mul.wide.u32 %d10, %r0, 16; add.s64 %d11, %d0, %d10; shl.b32 %r1, %r0, 4;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d11]; st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%d11+2048];
    st.shared.v4.b32 [%r1+2048], {{%r2, %r3, %r4, %r5}};
    {fence}
    bar.sync 0;
    mov.b32 %r20, 0f42C80000; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r20, %r21, %r22, %r23}}, {a}, {b}, 1, 1, 1,
        {major_a}, {major_b};
    wgmma.commit_group.sync.aligned;
    {wait}
    mul.wide.u32 %d20, %r0, 16; add.s64 %d20, %d1, %d20;
    st.global.v4.b32 [%d20], {{%r20, %r21, %r22, %r23}};
"""
FENCE = "fence.proxy.async.shared::cta;"
WAIT = "wgmma.wait_group.sync.aligned 0;"


def run_wgmma(a, b, a_bytes, b_bytes, a_at, b_at, majors=(0, 0), fence=FENCE, wait=WAIT, **how):
    """64 x 8 of a product whose operands lie in the first and the second 2,048 bytes."""
    assert a_bytes.nbytes <= 2048
    assert b_bytes.nbytes <= 2048
    data = np.zeros(2048, np.uint16)
    data[: a_bytes.size], data[1024 : 1024 + b_bytes.size] = a_bytes.ravel(), b_bytes.ravel()
    out = np.zeros(512, np.float32)
    body = WGMMA.format(
        a=a_at, b=b_at, major_a=majors[0], major_b=majors[1], fence=fence, wait=wait
    )
    run(body, data, out, threads=128, shared=4096, **how)
    found = np.zeros((64, 8))
    for thread, values in enumerate(out.reshape(128, 4)):
        for i, value in enumerate(values):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2)
            found[row, 2 * (thread % 4) + i % 2] = value - 100
    return np.array_equal(found, a @ b.T)


A, B = small_numbers(64, 16), small_numbers(9, 16)[1:]
A_PLAIN = core_matrices(halves_of(A)), descriptor(0, 1024, 128, 0)


@pytest.mark.parametrize(("chunks", "swizzle"), [(2, 3), (4, 2), (8, 1)])
def test_a_descriptor_of_each_swizzle(chunks, swizzle):
    """B [8, 16] is the last 16 columns of rows of 32, 64 or 128 bytes."""
    tile = np.zeros((8, 8 * chunks), np.uint16)
    tile[:, -16:] = halves_of(B)
    at = descriptor(2048 + 16 * chunks - 32, 0, 128 * chunks, swizzle)
    assert run_wgmma(A, B, A_PLAIN[0], swizzled(tile, chunks), A_PLAIN[1], at)


def test_a_descriptor_without_swizzle():
    at = descriptor(2048, 128, 256, 0)
    assert run_wgmma(A, B, A_PLAIN[0], core_matrices(halves_of(B)), A_PLAIN[1], at)


def test_a_descriptor_of_columns():
    """A is [16, 64] in memory, rows of 128 bytes: its first dimension is the dense one."""
    rows = swizzled(halves_of(A.T.copy()), 8)
    at = descriptor(2048, 128, 256, 0)
    b = core_matrices(halves_of(B))
    assert run_wgmma(A, B, rows, b, descriptor(0, 0, 1024, 1), at, majors=(1, 0))


def test_wgmma_is_waited_for_and_fenced():
    """Early it happens to be right; late the sum is missing."""
    at = descriptor(2048, 128, 256, 0)
    given = A, B, A_PLAIN[0], core_matrices(halves_of(B)), A_PLAIN[1], at
    assert run_wgmma(*given, wait="wgmma.wait_group.sync.aligned 1;" + WAIT, mode="early")
    with pytest.raises(Fault, match="block 0, warp 0 ends with wgmma in flight"):
        run_wgmma(*given, wait="", mode="late")
    for mode in ("early", "late"):
        with pytest.raises(Fault, match=r"reads what warp \d stored, with no fence.proxy.async"):
            run_wgmma(*given, fence="", mode=mode)


# ---- bulk tensor copies

COPY = """
    setp.eq.b32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [1024], 1; bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [1024], {bytes};
    @%p1 cp.async.bulk.tensor.{rank}d.shared::cta.global.mbarrier::complete_tx::bytes [0],
        [%d0, {{{at}}}], [1024];
    mov.b32 %r1, 0;
    {{ .reg .pred complete;
    waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [1024], %r1;
    @!complete bra.uni waitLoop; }}
    shl.b32 %r2, %r0, 5; ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2];
    ld.shared.v4.b32 {{%r7, %r8, %r9, %r10}}, [%r2+16];
    cvt.u64.u32 %d2, %r2; add.s64 %d2, %d1, %d2;
    st.global.v4.b32 [%d2], {{%r3, %r4, %r5, %r6}};
    st.global.v4.b32 [%d2+16], {{%r7, %r8, %r9, %r10}};
"""


def copied(source, box, at, swizzle=0, expect=None, mode="late"):
    """The first 1,024 bytes of shared memory after a copy from a matrix of 16-bit numbers."""
    rows, columns = source.shape
    made = TensorMap(
        1, source.ctypes.data, (columns, rows), (2 * columns,), box, (1, 1), 0, swizzle
    )
    assert made.illegal() == []
    out = np.zeros(512, np.uint16)
    body = COPY.format(rank=2, at=", ".join(map(str, at)), bytes=expect or made.nbytes)
    counts = run(body, made, out, source, shared=2048, mode=mode)
    assert counts["bulk copies"] == 1
    return out


NUMBERS = np.arange(1, 1 + 20 * 64, dtype=np.uint16).reshape(20, 64)


@pytest.mark.parametrize("mode", ["early", "late", "random"])
def test_a_box_partly_outside_is_zero_there(mode):
    found = copied(NUMBERS, (32, 16), (-8, 10), mode=mode).reshape(16, 32)
    right = np.zeros((16, 32), np.uint16)
    right[:10, 8:] = NUMBERS[10:, :24]
    assert np.array_equal(found, right)


@pytest.mark.parametrize(("columns", "swizzle"), [(16, 1), (32, 2), (64, 3)])
def test_swizzled_copies(columns, swizzle):
    rows = 512 // columns
    source = np.ascontiguousarray(np.resize(NUMBERS, (rows, 64)))
    found = copied(source, (columns, rows), (0, 0), swizzle)
    assert np.array_equal(found, swizzled(source[:, :columns], columns // 8).ravel())


def test_a_wrong_number_of_bytes_is_a_deadlock_told_with_warp_and_line():
    message = r"deadlock: warp 0 at PTX line \d+: mbarrier\.try_wait\.parity\S* complete, \[1024\]"
    for expect in (512, 2048):
        with pytest.raises(Fault, match=message):
            copied(NUMBERS, (32, 16), (0, 0), expect=expect)


STORED = """
    shl.b32 %r2, %r0, 5; st.shared.v4.b32 [%r2], {{%r0, %r0, %r0, %r0}};
    st.shared.v4.b32 [%r2+16], {{%r0, %r0, %r0, %r0}};
    {fence} bar.sync 0; setp.eq.b32 %p1, %r0, 0;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d0, {{{at}}}], [0];
    {behind}
"""
SENT = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0;"


def stored(at, *, fence=FENCE, behind=SENT, mode="late"):
    """A 64 by 20 matrix after a box of 32 by 16 went there; row ``i`` of it is lanes 2i, 2i + 1."""
    out = np.full((20, 64), 7, np.uint16)
    made = TensorMap(1, out.ctypes.data, (64, 20), (128,), (32, 16), (1, 1), 0, 0)
    body = STORED.format(fence=fence, at=", ".join(map(str, at)), behind=behind)
    counts = run(body, made, out, shared=2048, mode=mode)
    assert counts["bulk stores"] == 1
    return out


@pytest.mark.parametrize("mode", ["early", "late", "random"])
def test_a_box_is_stored_but_for_what_is_outside(mode):
    box = np.repeat(np.arange(32, dtype=np.uint32), 8).view(np.uint16).reshape(16, 32)
    right = np.full((20, 64), 7, np.uint16)
    right[10:, :24] = box[:10, 8:]
    assert np.array_equal(stored((-8, 10), mode=mode), right)


def test_a_box_is_read_until_its_group_is_waited_for():
    over = "st.shared.b32 [%r2], 1;"
    with pytest.raises(Fault, match="reads what warp 0 wrote"):
        stored((0, 0), behind=over + SENT)
    in_time = [stored((0, 0), behind=SENT + over, mode=mode) for mode in ("early", "late")]
    assert np.array_equal(*in_time)
    assert np.array_equal(in_time[0], stored((0, 0)))


def test_stores_of_boxes_are_fenced_and_waited_for():
    with pytest.raises(Fault, match=r"reads what warp 0 wrote and nobody fenced"):
        stored((0, 0), fence="")
    for behind in ("", "@%p1 cp.async.bulk.commit_group;"):
        with pytest.raises(Fault, match=r"warp 0 ends with copies in flight"):
            stored((0, 0), behind=behind)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"address": 8}, "address 0x8"),
        ({"dims": (64, 0)}, "dims"),
        ({"strides": (24,)}, "multiples of 16"),
        ({"strides": (2**40,)}, "below 2\\*\\*40"),
        ({"box": (64, 257)}, "from 1 to 256"),
        ({"box": (4, 8)}, "8 bytes in a row"),
        (
            {"box": (64, 8), "swizzle": 2},
            "128 bytes in a row of the box, more than the swizzle's 64",
        ),
        ({"dims": (64,) * 6, "strides": (128,) * 5}, "rank 6"),
        ({"dims": (64, 4, 4), "strides": (128, 192)}, "not a multiple of the one before"),
        ({"kind": 99}, "data type 99"),
        ({"steps": (1, 2)}, "element strides"),
    ],
)
def test_tensor_maps_that_the_driver_refuses(changes, word):
    sound = {"kind": 9, "address": 256, "dims": (64, 20), "strides": (128,), "box": (64, 8)}
    assert TensorMap(**sound, swizzle=3).illegal() == []
    reasons = TensorMap(**sound | {"swizzle": 3} | changes).illegal()
    assert any(re.search(word, reason) for reason in reasons), reasons


# ---- asynchrony and faults

ASYNC = """
    shl.b32 %r1, %r0, 2; mul.wide.u32 %d60, %r0, 4; add.s64 %d10, %d0, %d60;
    cp.async.ca.shared.global [%r1], [%d10], 4, %r9; cp.async.commit_group;
    {wait} ld.shared.b32 %r2, [%r1];
"""


def test_cp_async_fills_with_zeros_and_lands_when_it_is_waited_for():
    data, out = np.arange(32, dtype=np.uint32), np.zeros(32, np.uint32)
    size = "setp.lt.u32 %p1, %r0, 20; selp.b32 %r9, 4, 0, %p1;"
    store = STORE.format(to=1, what=2)
    for mode in ("early", "late", "random"):
        run(size + ASYNC.format(wait="cp.async.wait_group 0;") + store, data, out, mode=mode)
        assert out.tolist() == [i if i < 20 else 0 for i in range(32)]
    run(size + ASYNC.format(wait="cp.async.wait_group 1;") + store, data, out, mode="late")
    assert out.tolist() == [0xFFFFFFFF] * 32  # what was there before


EXCHANGE = """
    shl.b32 %r1, %r0, 2; st.shared.b32 [%r1], %r0; {barrier}
    xor.b32 %r2, %r1, 128; ld.shared.b32 %r3, [%r2];
"""


def test_warps_run_in_any_order():
    """With a barrier they see each other's numbers; without, one finds what was there before."""
    out = np.zeros(64, np.uint32)
    for seed in range(5):
        body = EXCHANGE.format(barrier="bar.sync 0;") + STORE.format(to=0, what=3)
        run(body, out, threads=64, seed=seed)
        assert out.tolist() == [i ^ 32 for i in range(64)]
        body = EXCHANGE.format(barrier="") + STORE.format(to=0, what=3)
        run(body, out, threads=64, seed=seed)
        assert 0xFFFFFFFF in out.tolist()


INIT = "setp.eq.b32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [64], 1; bar.sync 0;"
ARRIVE = "mbarrier.arrive.shared.b64 _, [64];"
FIRST_WARP = "setp.lt.u32 %p1, %r0, 32;"
THREE = "setp.lt.u32 %p1, %r0, 3;"
MATRIX = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r2];"
BULK = "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes"
FAULTS = {
    "4 bytes at .* are outside every buffer; the nearest, an array, .* 0 away":
        "st.global.b32 [%d0+256], %r0;",
    "4 bytes at .* are outside every buffer.*, 4 away": "ld.global.b32 %r1, [%d0+-4];",
    "is not a multiple of 4": "st.global.b32 [%d0+2], %r0;",
    "is not a multiple of 8": "ld.shared.v2.b32 {%r1, %r2}, [4];",
    "4 bytes at 0x400 are outside shared memory, which has 1024": "st.shared.b32 [1024], %r0;",
    "%r7 was never written": "add.s32 %r1, %r7, 1;",
    "%p7 was never written": "@%p7 mov.b32 %r1, 1;",
    "1 arrivals at an mbarrier that waits for 0|32 arrivals": f"{INIT} {ARRIVE}",
    "there is no mbarrier at 0x40": ARRIVE,
    "barrier 1 for (64|96) threads and for (96|64)":
        f"{FIRST_WARP} @%p1 bra $x; bar.sync 1, 96; $x: @!%p1 bra $y; bar.sync 1, 64; $y:",
    "a barrier for a part of a warp": f"{THREE} @%p1 bra $x; bar.sync 0; $x: bar.sync 0;",
    "barrier 0 for 40 threads, not whole warps": "bar.sync 0, 40;",
    r"deadlock: warp 0 at PTX line \d+: bar.sync 0$": f"{FIRST_WARP} @!%p1 bra $x; bar.sync 0; $x:",
    "an indexed branch to .*of 2":
        "mov.b32 %r1, 2; $t: .branchtargets $a, $b; brx.idx %r1, $t; $a: $b:",
    "ldmatrix or stmatrix by a part of a warp": f"mov.b32 %r2, 0; {THREE} @%p1 {MATRIX}",
    "the copy is begun by 3 lanes": f"{INIT} {THREE} @%p1 {BULK} [0], [%d0, {{%r0}}], [64];",
    "there is no tensor map at": f"{INIT} @%p1 {BULK} [0], [%d0, {{%r0}}], [64];",
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_told_with_line_and_text(message):
    body, out = FAULTS[message], np.zeros(64, np.uint32)
    with pytest.raises(Fault, match=message) as error:
        run(body, out, threads=64)
    assert re.search(r"warp \d.* PTX line \d+: ", str(error.value))


def test_each_array_is_a_buffer_of_its_own():
    """Also those that lie side by side."""
    whole = np.zeros(128, np.uint32)
    first, second = whole[:63], whole[63:]
    run("st.global.b32 [%d0+248], %r0; st.global.b32 [%d1], %r0;", first, second)
    with pytest.raises(Fault, match="8 bytes at"):
        run("st.global.v2.b32 [%d0+248], {%r0, %r0};", first, second)


def test_registers_are_handed_over_between_warps():
    """168 for each of 12 warps; 240 are to be had after another group has given some up."""
    body = """
    setp.lt.u32 %p1, %r0, 128; @!%p1 bra $x; setmaxnreg.dec.sync.aligned.u32 24; bra.uni $y;
    $x: setmaxnreg.inc.sync.aligned.u32 240; $y:
    """
    text = ptx_of(f"mov.u32 %r0, %tid.x; {body}", ()).replace(")\n{", ")\n.maxnreg 168\n{")
    for n, right in ((240, True), (248, False)):
        program = parse(text.replace("240", str(n)))
        launch = Launch(Schedule(program), 1, 384, 16, np.zeros(8, np.uint8), GlobalMemory())
        if right:
            execute(launch)
        else:
            with pytest.raises(Fault, match=r"deadlock: warp.*setmaxnreg.*248"):
                execute(launch)


@pytest.mark.parametrize(
    "text",
    [
        "tanh.approx.f32 %r1, %r0",
        "add.rz.f32 %r1, %r0, %r0",
        "ld.local.b32 %r1, [%r0]",
        "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%r1}, %d0, %d0, 1",
        "atom.global.add.u32 %r1, [%d0], 1",
    ],
)
def test_what_is_unknown_is_told_with_its_text(text):
    with pytest.raises(Unknown, match=rf"PTX line \d+: {re.escape(text)}"):
        run(f"mov.b32 %r1, 0; {text};", np.zeros(64, np.uint32))
