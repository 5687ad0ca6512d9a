"""What the instructions mean that work on registers alone: numpy functions of ``[rows, 32]``.

A rule is a pattern of opcodes and what makes their function. Patterns are exact: a modifier that
no rule names is unknown. fp32 is rounded to nearest even as on the GPU, except that ``fma`` is
computed in fp64 and so rounded twice, and that ``ex2``, ``lg2``, ``div.full`` and their kind are
the exact results rounded, where the GPU approximates.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from ptx.memory import Unknown
from ptx.registers import LANES, TYPES, UNSIGNED

INTEGERS = "[su](?:16|32|64)"
U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64
F32, F64 = np.float32, np.float64
TINY = np.finfo(F32).tiny  # the smallest normal number


@dataclass(frozen=True, slots=True)
class Meaning:
    """``function(*sources)`` gives the destinations, a tuple if there are several."""

    function: Callable
    outs: tuple  # dtypes
    ins: tuple


RULES: list = []


def rule(pattern):
    """The decorated function makes the Meaning of opcodes that match, given ``(match, counts)``."""

    def add(make):
        RULES.append((re.compile(pattern), make))
        return make

    return add


@cache
def meaning(opcode, counts):
    """Of an opcode with so many operands ``(written, read)``; None if no rule knows it."""
    for pattern, make in RULES:
        match = pattern.fullmatch(opcode)
        if match:
            return make(match, counts)
    return None


def binary(function, dtype, out=None):
    return Meaning(function, (out or dtype,), (dtype, dtype))


def wider(dtype):
    """The integer type of twice the size, signed if ``dtype`` is."""
    return np.dtype(f"{np.dtype(dtype).kind}{2 * np.dtype(dtype).itemsize}").type


def flushed(x):
    """fp32 with subnormal numbers made zero."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def maybe_flushed(function, ftz):
    if not ftz:
        return function
    return lambda *args: flushed(function(*map(flushed, args)))


# ---- integers


@rule(rf"(add|sub|min|max)\.({INTEGERS})")
def _(match, _counts):
    functions = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
    return binary(functions[match[1]], TYPES[match[2]])


@rule(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _(match, _counts):
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return binary(functions[match[1]], TYPES[match[2]])


@rule(r"not\.(pred|b16|b32|b64)")
def _(match, _counts):
    return Meaning(np.invert, (TYPES[match[1]],), (TYPES[match[1]],))


@rule(r"(neg|abs)\.(s16|s32|s64)")
def _(match, _counts):
    dtype = TYPES[match[2]]
    return Meaning({"neg": np.negative, "abs": np.abs}[match[1]], (dtype,), (dtype,))


@rule(rf"mul\.lo\.({INTEGERS})")
def _(match, _counts):
    return binary(np.multiply, TYPES[match[1]])


@rule(r"mul\.(wide|hi)\.([su]16|[su]32)")
def _(match, _counts):
    dtype = TYPES[match[2]]
    wide, bits = wider(dtype), np.dtype(dtype).itemsize * 8
    if match[1] == "wide":
        return binary(lambda x, y: x.astype(wide) * y.astype(wide), dtype, wide)
    return binary(lambda x, y: (x.astype(wide) * y.astype(wide) >> wide(bits)).astype(dtype), dtype)


@rule(r"mul\.hi\.u64")
def _(_match, _counts):
    def high(x, y):
        low, half = U64(0xFFFFFFFF), U64(32)
        x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
        middle = x1 * y0 + (x0 * y0 >> half)
        return x1 * y1 + (middle >> half) + (x0 * y1 + (middle & low) >> half)

    return binary(high, U64)


@rule(rf"mad\.lo\.({INTEGERS})")
def _(match, _counts):
    dtype = TYPES[match[1]]
    return Meaning(lambda x, y, z: x * y + z, (dtype,), (dtype,) * 3)


@rule(r"mad\.wide\.([su]16|[su]32)")
def _(match, _counts):
    dtype = TYPES[match[1]]
    wide = wider(dtype)
    return Meaning(
        lambda x, y, z: x.astype(wide) * y.astype(wide) + z, (wide,), (dtype, dtype, wide)
    )


@rule(rf"(div|rem)\.({INTEGERS})")
def _(match, _counts):
    dtype = TYPES[match[2]]

    def divide(x, y):
        """Towards zero. By zero: all ones, and the rest is what was divided."""
        zero = y == 0
        y = np.where(zero, dtype(1), y)
        quotient = x // y
        if np.dtype(dtype).kind == "i":
            quotient += ((x < 0) != (y < 0)) & (quotient * y != x)
        rest = x - quotient * y
        return np.where(zero, dtype(-1) if np.dtype(dtype).kind == "i" else ~dtype(0), quotient), (
            np.where(zero, x, rest)
        )

    return binary(lambda x, y: divide(x, y)[match[1] == "rem"], dtype)


@rule(r"(shl|shr)\.([bsu])(16|32|64)")
def _(match, _counts):
    dtype, bits = TYPES[match[2] + match[3]], int(match[3])

    def shift(x, by):
        beyond = by >= bits
        near = np.minimum(by, bits - 1).astype(dtype)
        moved = x << near if match[1] == "shl" else x >> near
        if match[1] == "shr" and match[2] == "s":
            return moved  # the sign, however far
        return np.where(beyond, dtype(0), moved)

    return Meaning(shift, (dtype,), (dtype, U32))


@rule(r"bfe\.(u32|s32)")
def _(match, _counts):
    signed = match[1] == "s32"

    def extract(x, start, length):
        """``length`` bits from ``start`` on; what is beyond bit 31 is zero, or the sign."""
        start = np.minimum(start & U32(255), 63).astype(I64)
        length = np.minimum(length & U32(255), 32).astype(I64)
        field = (x.astype(I64) >> start) & ((1 << length) - 1)
        if signed:
            sign = np.where(length > 0, field >> np.maximum(length - 1, 0) & 1, 0)
            field = field - (sign << length)
        return field.astype(TYPES[match[1]])

    return Meaning(extract, (TYPES[match[1]],), (TYPES[match[1]], U32, U32))


@rule(r"prmt\.b32")
def _(_match, _counts):
    def permute(x, y, selector):
        both = x.astype(U64) | y.astype(U64) << U64(32)
        result = np.zeros_like(x)
        for i in range(4):
            choice = selector >> U32(4 * i) & U32(15)
            byte = (both >> ((choice & U32(7)) * U32(8)).astype(U64)).astype(U32) & U32(255)
            sign = np.where(byte & U32(128), U32(255), U32(0))
            result |= np.where(choice & U32(8), sign, byte) << U32(8 * i)
        return result

    return Meaning(permute, (U32,), (U32,) * 3)


@rule(r"lop3\.b32")
def _(_match, _counts):
    def look_up(x, y, z, table):
        result = np.zeros_like(x)
        for i in range(8):
            term = (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
            result |= np.where(table >> U32(i) & U32(1), term, U32(0))
        return result

    return Meaning(look_up, (U32,), (U32,) * 4)


# ---- moves and choices


@rule(r"mov\.(pred|[bsuf](?:16|32|64))")
def _(match, counts):
    dtype, (outs, ins) = TYPES[match[1]], counts
    if outs == ins == 1:
        return Meaning(lambda x: x, (dtype,), (dtype,))
    bits = np.dtype(dtype).itemsize * 8
    part, whole = UNSIGNED[bits // max(outs, ins)], UNSIGNED[bits]
    step = bits // max(outs, ins)
    if ins == 1:
        return Meaning(
            lambda x: tuple((x >> whole(i * step)).astype(part) for i in range(outs)),
            (part,) * outs,
            (whole,),
        )
    return Meaning(
        lambda *parts: sum(
            (x.astype(whole) << whole(i * step) for i, x in enumerate(parts)), whole(0)
        ),
        (whole,),
        (part,) * ins,
    )


@rule(r"cvta(?:\.to)?(?:\.(?:global|shared|param|const))?\.u64")
def _(_match, _counts):
    return Meaning(lambda x: x, (U64,), (U64,))


@rule(r"selp\.([bsuf](?:16|32|64))")
def _(match, _counts):
    dtype = TYPES[match[1]]
    return Meaning(lambda x, y, p: np.where(p, x, y), (dtype,), (dtype, dtype, np.bool_))


def unordered(x, y):
    return np.isnan(x) | np.isnan(y)


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip
OF_FLOATS = {
    "ne": lambda x, y: (x < y) | (x > y),
    "equ": lambda x, y: (x == y) | unordered(x, y), "neu": np.not_equal,
    "ltu": lambda x, y: ~(x >= y), "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y), "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~unordered(x, y), "nan": unordered,
}  # fmt: skip


@rule(r"setp\.(\w+)(?:\.(and|or|xor))?(?:\.ftz)?\.([bsuf](?:16|32|64))")
def _(match, _counts):
    dtype = TYPES[match[3]]
    functions = COMPARISONS | (OF_FLOATS if np.dtype(dtype).kind == "f" else {})
    if match[1] not in functions:
        return None
    compare = functions[match[1]]
    if match[2] is None:
        return Meaning(compare, (np.bool_,), (dtype, dtype))
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[match[2]]
    return Meaning(lambda x, y, p: combine(compare(x, y), p), (np.bool_,), (dtype, dtype, np.bool_))


# ---- floating point


@rule(r"(add|sub|mul|min|max)(?:\.rn)?(\.ftz)?\.f32")
def _(match, _counts):
    functions = {
        "add": np.add,
        "sub": np.subtract,
        "mul": np.multiply,
        "min": np.fmin,  # a number rather than NaN
        "max": np.fmax,
    }
    return binary(maybe_flushed(functions[match[1]], match[2]), F32)


@rule(r"fma\.rn(\.ftz)?\.f32")
def _(match, _counts):
    def fused(x, y, z):
        product = np.multiply(x, y, dtype=F64)  # exact
        product += z
        return product.astype(F32)

    return Meaning(maybe_flushed(fused, match[1]), (F32,), (F32,) * 3)


@rule(r"(neg|abs)(?:\.ftz)?\.f32")
def _(match, _counts):
    return Meaning({"neg": np.negative, "abs": np.abs}[match[1]], (F32,), (F32,))


@rule(r"div\.(?:full|approx|rn)(\.ftz)?\.f32")
def _(match, _counts):
    return binary(maybe_flushed(np.divide, match[1]), F32)


FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": np.reciprocal,
}


@rule(r"(ex2|lg2|sqrt|rsqrt|rcp)\.(?:approx|rn)(\.ftz)?\.f32")
def _(match, _counts):
    function = FUNCTIONS[match[1]]
    return Meaning(
        maybe_flushed(lambda x: function(x.astype(F64)).astype(F32), match[2]), (F32,), (F32,)
    )


def bf16_bits(x):
    """fp32 to the bits of bf16, to nearest even; NaN to 0x7fff as on the GPU."""
    bits = np.ascontiguousarray(x).view(U32)
    rounded = (bits + ((bits >> U32(16) & U32(1)) + U32(0x7FFF)) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def fp16_bits(x):
    """fp32 to the bits of fp16, to nearest even; NaN to 0x7fff as on the GPU."""
    return np.where(np.isnan(x), U16(0x7FFF), x.astype(np.float16).view(U16))


def from_bf16(bits):
    return (bits.astype(U32) << U32(16)).view(F32)


def from_fp16(bits):
    return np.ascontiguousarray(bits).view(np.float16).astype(F32)


NARROW = {"bf16": bf16_bits, "f16": fp16_bits}
WIDEN = {"bf16": from_bf16, "f16": from_fp16}


def halves(x, kind):
    """The two numbers in each register, ``[..., 2]`` fp32, the lower half first."""
    return WIDEN[kind](np.ascontiguousarray(x)[..., None].view(U16))


@rule(r"cvt\.rn\.(bf16|f16)\.f32")
def _(match, _counts):
    return Meaning(NARROW[match[1]], (U16,), (F32,))


@rule(r"cvt\.rn\.(bf16|f16)x2\.f32")
def _(match, _counts):
    narrow = NARROW[match[1]]
    return Meaning(
        lambda high, low: narrow(high).astype(U32) << U32(16) | narrow(low), (U32,), (F32, F32)
    )


@rule(r"cvt(?:\.ftz)?\.f32\.(bf16|f16)")
def _(match, _counts):
    return Meaning(WIDEN[match[1]], (F32,), (U16,))


@rule(r"cvt\.(?:rn\.)?(f32|f64)\.(f32|f64|[su](?:8|16|32|64))")
def _(match, _counts):
    out = TYPES[match[1]]
    return Meaning(lambda x: x.astype(out), (out,), (TYPES[match[2]],))


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@rule(r"cvt\.(rni|rzi|rmi|rpi)(?:\.ftz)?\.([su](?:32|64))\.(f32|f64)")
def _(match, _counts):
    out = TYPES[match[2]]
    limits = np.iinfo(out)

    def convert(x):
        """The nearest that there is; NaN to 0."""
        whole = ROUNDINGS[match[1]](x.astype(F64))
        inside = (whole >= limits.min) & (whole < float(limits.max))
        result = np.where(inside, whole, 0).astype(out)
        result[whole >= float(limits.max)] = limits.max
        result[whole < limits.min] = limits.min
        return result

    return Meaning(convert, (out,), (TYPES[match[3]],))


@rule(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))")
def _(match, _counts):
    out = TYPES[match[1]]
    if np.dtype(out).itemsize > 1:
        return Meaning(lambda x: x.astype(out), (out,), (TYPES[match[2]],))
    wide = {"i": np.int16, "u": U16}[np.dtype(out).kind]  # there are no registers of 8 bits
    return Meaning(lambda x: x.astype(out).astype(wide), (wide,), (TYPES[match[2]],))


# ---- between lanes


@rule(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def _(match, counts):
    def source_lane(lane, clamp):
        width = ~(clamp >> U32(8)).astype(I64) & 31
        first, last = LANES & ~width, (LANES & ~width) | (clamp.astype(I64) & 31 & width)
        lane = lane.astype(I64) & 31
        if match[1] == "up":
            source = LANES - lane
            return source, source >= (LANES & ~width)
        last = (LANES & ~width) | (clamp.astype(I64) & 31)
        source = {"bfly": LANES ^ lane, "idx": first | (lane & width), "down": LANES + lane}
        return source[match[1]], source[match[1]] <= last

    def shuffle(x, lane, clamp, members):
        if not (members == U32(0xFFFFFFFF)).all():
            raise Unknown(f"shfl among the lanes {int(members.ravel()[0]):#x}")
        source, inside = source_lane(lane, clamp)
        moved = np.take_along_axis(x, np.where(inside, source, LANES), -1)
        return moved if counts[0] == 1 else (moved, inside)

    return Meaning(shuffle, (U32, np.bool_)[: counts[0]], (U32,) * 4)
