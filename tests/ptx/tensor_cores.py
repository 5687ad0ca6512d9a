"""mma and wgmma: which lane holds which element, and what a descriptor of shared memory shows.

Products are exact in fp64, rounded to fp32 once for each instruction; the GPU truncates inside.
"""

from functools import cache

import numpy as np

from ptx.arithmetic import F32, F64, U16, U32, WIDEN, Meaning, halves, rule
from ptx.memory import COPY, GRANULE, Fault, Unknown
from ptx.registers import LANES

GROUP, QUAD = LANES // 4, LANES % 4


def fragment_a(registers, kind):
    """``[..., 16, 16]`` from four registers ``[..., 32]`` of pairs."""
    tile = np.empty((*registers[0].shape[:-1], 16, 16), F64)
    for i, register in enumerate(registers):
        pairs = halves(register, kind)
        for j in (0, 1):
            tile[..., GROUP + 8 * (i & 1), 2 * QUAD + j + 8 * (i >> 1)] = pairs[..., j]
    return tile


@rule(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16|f16)\.\1\.f32")
def _(match, _counts):
    kind = match[1]

    def multiply(*registers):
        a = fragment_a(registers[:4], kind)
        b = np.empty((*registers[0].shape[:-1], 16, 8), F64)
        for i, register in enumerate(registers[4:6]):
            pairs = halves(register, kind)
            for j in (0, 1):
                b[..., 2 * QUAD + j + 8 * i, GROUP] = pairs[..., j]
        product = a @ b
        return tuple(
            (product[..., GROUP + 8 * (i >> 1), 2 * QUAD + (i & 1)] + c).astype(F32)
            for i, c in enumerate(registers[6:])
        )

    return Meaning(multiply, (F32,) * 4, (U32,) * 6 + (F32,) * 4)


SWIZZLES = {0: (16, 0), 1: (128, 0x70), 2: (64, 0x30), 3: (32, 0x10)}  # row's bytes, bits XORed


@cache
def descriptor_addresses(descriptor, rows, mn_major):
    """Where the elements ``[rows, 16]`` of a 16-bit operand lie, and in which granules.

    Source: PTX ISA, "Shared memory matrix layout" and "Matrix descriptor" of wgmma.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    if descriptor >> 49 & 7:
        raise Fault(f"wgmma descriptor {descriptor:#x} with a base offset, which nothing here uses")
    pitch, bits = SWIZZLES[descriptor >> 62 & 3]
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if mn_major:
        width = pitch // 2
        linear = (row // width) * leading + (k // 8) * stride + k % 8 * pitch + row % width * 2
    else:
        inside = k * 2 if bits else k // 8 * leading + k % 8 * 2
        linear = (row // 8) * stride + row % 8 * pitch + inside
    linear = linear + start
    addresses = linear ^ (linear >> 3 & bits)
    return addresses, np.unique(addresses // GRANULE)


def descriptor_tile(block, descriptor, rows, mn_major, kind, fenced):
    """The operand ``[rows, 16]`` that a descriptor shows, fp64, to a warp that fenced then."""
    addresses, granules = descriptor_addresses(descriptor, rows, mn_major)
    shared = block.shared
    if granules[-1] >= len(shared.writers):
        raise Fault(
            f"the descriptor {descriptor:#x} reaches byte {int(addresses.max()) + 2} "
            f"of {len(shared.bytes)} in shared memory"
        )
    for writer in shared.unfenced(granules, fenced)[:1]:
        how = "stored" if writer < COPY else "had copied by cp.async"
        fault = f"it reads what warp {writer % COPY} {how}, with no fence.proxy.async since"
        if writer < COPY or block.launch.copies_need_fences:
            raise Fault(fault)
        block.counts["cp.async without fence"] += 1
    return WIDEN[kind](shared.views[U16][addresses >> 1]).astype(F64)


def wgmma(operands, instruction, match):
    """The step of one wgmma: queued, or done at once, as the block's asynchrony decides."""
    columns, kind = int(match[1]), match[2]
    outs, first, _, scale, *rest = instruction.operands
    a_rows = operands.rows(first) if first.startswith("{") else None
    a_descriptor = None if a_rows else operands.read(1, np.uint64)
    b_descriptor, add = operands.read(2, np.uint64), operands.read(3, np.bool_)
    if scale != "0":
        operands.rows(outs)
    outs = operands.rows(outs, written=True)
    if rest[:2] != ["1", "1"]:
        raise Unknown(f"{instruction} negates an operand")
    major_a, major_b = (0, int(rest[2])) if a_rows else map(int, rest[2:])
    i = np.arange(len(outs))[:, None]
    place, column = GROUP + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * QUAD + (i & 1)

    def step(warp, active):
        if active is not None:
            raise Fault("wgmma by a part of a warp")
        block = warp.block
        block.counts["wgmma"] += 1
        fenced = block.shared.fenced[warp.index]
        add_to = bool(add(warp)[0])
        b_at = int(b_descriptor(warp)[0])
        a_at = None if a_descriptor is None else int(a_descriptor(warp)[0])

        def multiply():
            if a_rows:
                a = fragment_a(warp.registers.views[U32][a_rows], kind)
            else:
                quarter = 16 * (warp.index % 4)
                a = descriptor_tile(block, a_at, 64, major_a, kind, fenced)[quarter : quarter + 16]
            b = descriptor_tile(block, b_at, columns, major_b, kind, fenced)
            product = (a @ b.T)[place, column]
            values = warp.registers.views[F32]
            if add_to:
                product += values[outs]
            values[outs] = product

        warp.begin_product(multiply)

    return step
