"""Loads and stores of lanes: ld, st, ldmatrix, stmatrix and cp.async.

``function(warp, active, *sources)`` gets addresses as int64 ``[rows, 32]`` and the active lanes of
the same shape, or None if all are; a row is one instruction of a batch.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from ptx.arithmetic import U16, U32
from ptx.memory import COPY, Fault, flat
from ptx.registers import LANES, PARAMETERS, TYPES

ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class Access:
    """Like ``arithmetic.Meaning``, in memory; a source that is ADDRESS is ``[base + offset]``."""

    function: Callable
    outs: tuple
    ins: tuple


CACHING = r"(?:\.(?:L1::\w+|L2::\w+|ca|cg|cs|nc|relaxed|gpu|volatile))*"
PLAIN = re.compile(
    rf"(ld|st){CACHING}\.(param|global|shared(?:::cta)?){CACHING}(?:\.v([24]))?\.(\w+)"
)
MATRIX = re.compile(
    r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16"
)
COPY_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::\w+)*")


@cache
def access(opcode, counts):
    """The Access of an opcode with so many operands ``(written, read)``, or None."""
    match = PLAIN.fullmatch(opcode)
    if match and match[4] in TYPES:
        make = load if match[1] == "ld" else store
        return make(match[2].partition(":")[0], int(match[3] or 1), TYPES[match[4]])
    match = MATRIX.fullmatch(opcode)
    if match:
        make = load_matrix if match[1] == "ld" else store_matrix
        return make(int(match[2]), bool(match[3]))
    if COPY_ASYNC.fullmatch(opcode):
        return Access(copy, (), (ADDRESS, ADDRESS) + (U32,) * (counts[1] - 2))
    return None


def spread(data, addresses, active):
    """``[lanes, count]`` as ``count`` arrays ``[rows, 32]``; lanes that are not active get 0."""
    if active is None:
        return tuple(data.T.reshape(-1, *addresses.shape))
    whole = np.zeros((data.shape[1], *addresses.shape), data.dtype)
    whole[:, active] = data.T
    return tuple(whole)


def load(space, count, dtype):
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}").type

    def function(warp, active, addresses):
        if space == "param":
            offsets = (addresses - PARAMETERS)[:, :1]
            data = warp.block.launch.parameters[offsets + np.arange(np.dtype(dtype).itemsize)]
            return (np.broadcast_to(data.view(dtype), addresses.shape),)
        memory = warp.block.shared if space == "shared" else warp.block.launch.memory
        values = spread(memory.load(addresses, active, bits, count), addresses, active)
        values = tuple(x.view(dtype) for x in values)
        return values[0] if count == 1 else values

    if space == "param":
        return Access(lambda *args: function(*args)[0], (dtype,), (ADDRESS,))
    return Access(function, (dtype,) * count, (ADDRESS,))


def store(space, count, dtype):
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}").type

    def function(warp, active, addresses, *values):
        data = np.stack([x.view(bits) for x in values], -1)  # [rows, 32, count]
        data = data.reshape(-1, count) if active is None else data[active]
        if space == "shared":
            warp.block.shared.store(addresses, active, data, warp.index)
        else:
            warp.block.launch.memory.store(addresses, active, data)
        return ()

    return Access(function, (), (ADDRESS,) + (dtype,) * count)


ROW, COLUMN = LANES // 4, 2 * (LANES % 4)


def rows_of_matrices(addresses, active, count):
    """The addresses of the 8 rows of each matrix, ``[rows, 8 * count]``: lanes 0 to 8 * count."""
    if active is not None and not active.all():
        raise Fault("ldmatrix or stmatrix by a part of a warp")
    return addresses[:, : 8 * count]


def load_matrix(count, transposed):
    def function(warp, active, addresses):
        rows = rows_of_matrices(addresses, active, count)
        data = warp.block.shared.load(rows, None, np.uint64, 2).view(U16)  # 16 bytes of each row
        matrices = data.reshape(len(rows), count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        low, high = matrices[:, :, ROW, COLUMN], matrices[:, :, ROW, COLUMN + 1]
        pairs = low.astype(U32) | high.astype(U32) << U32(16)
        return tuple(pairs[:, i] for i in range(count)) if count > 1 else pairs[:, 0]

    return Access(function, (U32,) * count, (ADDRESS,))


def store_matrix(count, transposed):
    def function(warp, active, addresses, *values):
        rows = rows_of_matrices(addresses, active, count)
        matrices = np.empty((len(rows), count, 8, 8), U16)
        for i, pairs in enumerate(values):
            matrices[:, i, ROW, COLUMN] = pairs.astype(U16)
            matrices[:, i, ROW, COLUMN + 1] = (pairs >> U32(16)).astype(U16)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        data = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint64)
        warp.block.shared.store(rows, None, data, warp.index)
        return ()

    return Access(function, (), (ADDRESS,) + (U32,) * count)


def copy(warp, active, to, source, size, given=None):
    """cp.async: the first ``given`` of ``size`` bytes, then zeros; now or when waited for."""
    block = warp.block
    (size,) = set(size.ravel().tolist())
    given = np.full_like(to, size) if given is None else given.astype(np.int64)
    flat(source, active, size)  # an address must be aligned even if nothing is read from it
    everyone = np.ones(to.shape, bool) if active is None else active

    def land():
        data = np.zeros((*to.shape, size), np.uint8)
        for part in set(given[everyone].tolist()) - {0}:
            lanes = everyone & (given == part)
            if part & (part - 1):
                raise Fault(f"cp.async of {part} bytes")
            unit = min(part, 8)
            bits = np.dtype(f"u{unit}").type
            data[lanes, :part] = block.launch.memory.load(source, lanes, bits, part // unit).view(
                np.uint8
            )
        unit = min(size, 8)
        block.shared.store(
            to, everyone, data[everyone].view(np.dtype(f"u{unit}").type), COPY + warp.index
        )

    if block.is_late():
        warp.copies.append(land)
    else:
        land()
    return ()
