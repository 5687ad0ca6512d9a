"""Bulk tensor copies: what a tensor map must satisfy, and the box that a copy brings.

Source: CUDA driver API, ``cuTensorMapEncodeTiled``; PTX ISA, "Tensor copies" and "Swizzling modes".
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from ptx.memory import GRANULE, Fault

ITEMSIZE = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2}  # by CUtensorMapDataType
SWIZZLE_BYTES = {0: None, 1: 32, 2: 64, 3: 128}  # by CUtensorMapSwizzle
SWIZZLE_BITS = {0: 0, 1: 0x10, 2: 0x30, 3: 0x70}  # of the address, XORed with those 3 above
MAGIC = 0x5450_5854_4D41_5021  # in the first 8 bytes of a tensor map; its number in the next 8


@dataclass(frozen=True)
class TensorMap:
    """The arguments of ``cuTensorMapEncodeTiled``, the innermost dimension first; bytes."""

    kind: int
    address: int
    dims: tuple
    strides: tuple  # of all dimensions but the innermost
    box: tuple
    steps: tuple = ()  # elementStrides
    interleave: int = 0
    swizzle: int = 0

    def illegal(self):
        """Every reason for which the driver may refuse it, as its documentation has it."""
        size = ITEMSIZE.get(self.kind)
        if size is None:
            return [f"data type {self.kind}"]
        inner = self.box[0] * size
        span = SWIZZLE_BYTES.get(self.swizzle)
        chain = zip(self.strides, self.strides[1:], strict=False)
        reasons = {
            f"rank {len(self.dims)}": not 1 <= len(self.dims) <= 5,
            f"address {self.address:#x}, no multiple of 16": self.address % 16,
            f"dims {self.dims}": not all(0 < d <= 2**32 for d in self.dims),
            f"strides {self.strides}, not positive multiples of 16 below 2**40": not all(
                0 < s < 2**40 and s % 16 == 0 for s in self.strides
            ),
            f"strides {self.strides}, one not a multiple of the one before": any(
                a and b % a for a, b in chain
            ),
            f"box {self.box}, not from 1 to 256": not all(0 < b <= 256 for b in self.box),
            f"{inner} bytes in a row of the box, no multiple of 16": inner % 16,
            f"element strides {self.steps}": any(s != 1 for s in self.steps),
            f"interleave {self.interleave}": self.interleave,
            f"swizzle {self.swizzle}": self.swizzle not in SWIZZLE_BYTES,
            f"{inner} bytes in a row of the box, more than the swizzle's {span}": span
            and inner > span,
        }
        return [reason for reason, is_so in reasons.items() if is_so]

    @cached_property
    def itemsize(self):
        return ITEMSIZE[self.kind]

    @cached_property
    def nbytes(self):
        """What a copy tells its mbarrier, also of a box partly outside."""
        return int(np.prod(self.box)) * self.itemsize

    @cached_property
    def rows(self):
        """The place of every row of the box in each outer dimension, ``[dims - 1, rows]``."""
        outer = self.box[1:]
        return np.indices(outer[::-1]).reshape(len(outer), -1)[::-1]


@cache
def places(destination, rows, row_bytes, itemsize, swizzle):
    """Which elements of shared memory a box fills, ``[rows, elements]``, and which granules."""
    linear = destination + np.arange(rows)[:, None] * row_bytes
    linear = linear + np.arange(0, row_bytes, itemsize)
    addresses = linear ^ (linear >> 3 & SWIZZLE_BITS[swizzle])
    return addresses // itemsize, np.unique(addresses // GRANULE)


def copy_box(block, tensor_map, at, destination):
    """Bring the box at ``at``, innermost first; what is outside the tensor is zero."""
    size, width = tensor_map.itemsize, tensor_map.box[0]
    bits = np.dtype(f"u{size}").type
    if destination % 128:
        raise Fault(f"the copy's destination {destination:#x} is no multiple of 128")
    if destination + tensor_map.nbytes > len(block.shared.bytes):
        raise Fault(
            f"the copy's {tensor_map.nbytes} bytes at {destination:#x} are outside shared memory, "
            f"which has {len(block.shared.bytes)}"
        )
    place = tensor_map.rows + np.array(at[1:], np.int64)[:, None]  # [dims - 1, rows]
    limits = np.array(tensor_map.dims[1:], np.int64)[:, None]
    inside = ((place >= 0) & (place < limits)).all(0)  # [rows]
    column = at[0] + np.arange(width)
    columns = (column >= 0) & (column < tensor_map.dims[0])
    data = np.zeros((len(inside), width), bits)
    if inside.any() and columns.any():
        offset = (place * np.array(tensor_map.strides, np.int64)[:, None]).sum(0)[inside]
        addresses = tensor_map.address + offset[:, None] + column[columns] * size
        values = block.launch.memory.load(addresses, None, bits, 1)
        data[np.ix_(inside, columns)] = values.reshape(addresses.shape)
    index, granules = places(destination, len(inside), width * size, size, tensor_map.swizzle)
    block.shared.views[bits][index] = data
    block.shared.written[granules] = 0  # by the async proxy itself


def store_box(block, tensor_map, at, source, fenced):
    """Write the box at ``at``, innermost first, from shared memory; what is outside is left out."""
    size, width = tensor_map.itemsize, tensor_map.box[0]
    bits = np.dtype(f"u{size}").type
    if source % 128:
        raise Fault(f"the copy's source {source:#x} is no multiple of 128")
    if source + tensor_map.nbytes > len(block.shared.bytes):
        raise Fault(
            f"the copy's {tensor_map.nbytes} bytes at {source:#x} are outside shared memory"
        )
    place = tensor_map.rows + np.array(at[1:], np.int64)[:, None]  # [dims - 1, rows]
    limits = np.array(tensor_map.dims[1:], np.int64)[:, None]
    inside = ((place >= 0) & (place < limits)).all(0)  # [rows]
    column = at[0] + np.arange(width)
    columns = (column >= 0) & (column < tensor_map.dims[0])
    index, granules = places(source, len(inside), width * size, size, tensor_map.swizzle)
    for writer in block.shared.unfenced(granules, fenced)[:1]:
        raise Fault(f"the copy reads what warp {writer} wrote and nobody fenced")
    data = block.shared.views[bits][index]
    offset = (place * np.array(tensor_map.strides, np.int64)[:, None]).sum(0)[inside]
    addresses = tensor_map.address + offset[:, None] + column[columns] * size
    block.launch.memory.store(
        addresses.reshape(-1, 1), None, data[np.ix_(inside, columns)].reshape(-1, 1)
    )
