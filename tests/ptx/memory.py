"""Global memory is the buffers that exist, shared memory a poisoned array; both know their ends."""

import ctypes

import numpy as np

POISON = 0xFF  # NaN in every floating type, -1 in every integer
GRANULE = 16  # bytes of shared memory whose last writer is remembered together
COPY = 64  # added to the number of a warp that wrote by cp.async


class Fault(Exception):
    """What a GPU would not forgive. ``row`` is the instruction in a batch of them, if known."""

    def __init__(self, message, row=None):
        super().__init__(message)
        self.row = row


class Unknown(Exception):
    """PTX that the machine was never taught."""


def flat(addresses, active, size):
    """The addresses of active lanes, ``[lanes]``, aligned to the ``size`` of the access."""
    found = addresses.ravel() if active is None else addresses[active]
    if np.bitwise_and(found, size - 1).any():
        wrong = found & (size - 1) != 0
        place = row_of(addresses, active, wrong)
        raise Fault(f"address {found[wrong][0]:#x} is not a multiple of {size}", place)
    return found


def row_of(addresses, active, wrong):
    """The row of the first active lane of ``addresses``, ``[rows, 32]``, that is ``wrong``."""
    rows = np.repeat(np.arange(len(addresses)), addresses.shape[1]).reshape(addresses.shape)
    return int((rows.ravel() if active is None else rows[active])[wrong][0])


class GlobalMemory:
    """Buffers by address. Each tensor is a buffer of its own: nothing lies between them."""

    def __init__(self):
        self.buffers = {}  # begin -> (end, name)
        self._sorted = None

    def add(self, begin, size, name=""):
        """Let kernels see ``size`` bytes at ``begin``; they belong to somebody else."""
        if size:
            self.buffers[begin] = max(self.buffers.get(begin, (0, ""))[0], begin + size), name
            self._sorted = None

    def add_array(self, array, name=""):
        self.add(array.ctypes.data, array.nbytes, name)

    def _tables(self):
        if self._sorted is None:
            begins = sorted(self.buffers)
            ends = [self.buffers[begin][0] for begin in begins]
            self._sorted = np.array(begins, np.int64), np.array(ends, np.int64), {}
        return self._sorted

    def _view(self, buffer, dtype):
        """The elements of one buffer, and the address of the first: 16-byte aligned."""
        begins, ends, views = self._tables()
        if (buffer, dtype) not in views:
            begin = int(begins[buffer]) & ~15
            size = int(ends[buffer]) - begin
            bytes_ = (ctypes.c_uint8 * size).from_address(begin)
            whole = np.frombuffer(bytes_, np.uint8)
            itemsize = np.dtype(dtype).itemsize
            views[buffer, dtype] = whole[: size // itemsize * itemsize].view(dtype), begin
        return views[buffer, dtype]

    def _parts(self, addresses, active, size):
        """``(addresses, [(lanes or None, buffer)])`` of an access that lies inside buffers."""
        found = flat(addresses, active, size)
        begins, ends, _ = self._tables()
        buffers = np.searchsorted(begins, found, "right") - 1
        outside = (buffers < 0) | (found + size > ends[buffers]) if len(begins) else found == found
        if outside.any():
            address = int(found[outside][0])
            raise Fault(
                f"{size} bytes at {address:#x} are outside every buffer{self._nearest(address)}",
                row_of(addresses, active, outside),
            )
        if len(found) and (buffers == buffers[0]).all():
            return found, [(None, int(buffers[0]))]
        return found, [(buffers == buffer, int(buffer)) for buffer in np.unique(buffers)]

    def _nearest(self, address):
        if not self.buffers:
            return ""
        distance, begin = min(
            (max(begin - address, address - end), begin) for begin, (end, _) in self.buffers.items()
        )
        end, name = self.buffers[begin]
        return f"; the nearest, {name or 'unnamed'}, is {begin:#x} to {end:#x}, {distance} away"

    def load(self, addresses, active, dtype, count):
        """``[lanes, count]`` elements, of the active lanes of ``addresses`` ``[rows, 32]``."""
        itemsize = np.dtype(dtype).itemsize
        found, parts = self._parts(addresses, active, itemsize * count)
        data = np.empty((len(found), count), dtype)
        for lanes, buffer in parts:
            view, begin = self._view(buffer, dtype)
            index = (found if lanes is None else found[lanes]) - begin
            data[slice(None) if lanes is None else lanes] = view[
                (index // itemsize)[:, None] + np.arange(count)
            ]
        return data

    def store(self, addresses, active, data):
        """Write ``data`` ``[lanes, count]`` where the active lanes of ``addresses`` say."""
        itemsize = data.dtype.itemsize
        found, parts = self._parts(addresses, active, itemsize * data.shape[1])
        for lanes, buffer in parts:
            view, begin = self._view(buffer, data.dtype.type)
            index = (found if lanes is None else found[lanes]) - begin
            view[(index // itemsize)[:, None] + np.arange(data.shape[1])] = (
                data if lanes is None else data[lanes]
            )


class SharedMemory:
    """What one block has, full of NaN at first, and when each part was written by whom.

    Warps write through the generic proxy; wgmma and bulk copies read through the async proxy, which
    may see what was there before, unless there was a fence: of the writer, before others learnt of
    it, or of the reader after that.
    """

    def __init__(self, size, warps):
        size = max(-(-size // GRANULE), 1) * GRANULE
        self.bytes = np.full(size, POISON, np.uint8)
        self.views = {t: self.bytes.view(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64)}
        self.clock = 0
        self.written = np.zeros(size // GRANULE, np.int64)  # by a warp, when; 0: by a bulk copy
        self.writers = np.zeros(size // GRANULE, np.int64)  # the warp; of a cp.async, + COPY
        self.fenced = np.zeros(warps, np.int64)  # when each warp has fenced

    def _index(self, addresses, active, dtype, count):
        size = np.dtype(dtype).itemsize * count
        found = flat(addresses, active, size)
        outside = (found < 0) | (found + size > len(self.bytes))
        if outside.any():
            raise Fault(
                f"{size} bytes at {int(found[outside][0]):#x} are outside shared memory, "
                f"which has {len(self.bytes)}",
                row_of(addresses, active, outside),
            )
        return found, (found // np.dtype(dtype).itemsize)[:, None] + np.arange(count)

    def load(self, addresses, active, dtype, count):
        """``[lanes, count]`` elements."""
        return self.views[dtype][self._index(addresses, active, dtype, count)[1]]

    def store(self, addresses, active, data, writer):
        """Write ``[lanes, count]``; ``writer`` is a warp, or COPY + warp for a cp.async."""
        found, index = self._index(addresses, active, data.dtype.type, data.shape[1])
        self.views[data.dtype.type][index] = data
        granules = found // GRANULE  # an access is within one
        self.clock += 1
        self.written[granules] = self.clock
        self.writers[granules] = writer

    def fence(self, warp):
        """What this warp wrote or knows of can be seen by the async proxy from now on."""
        self.clock += 1
        self.fenced[warp] = self.clock

    def unfenced(self, granules, fenced):
        """Who wrote what a reader that fenced at ``fenced`` may not see yet, if anybody."""
        written, writers = self.written[granules], self.writers[granules]
        hidden = written > np.maximum(self.fenced[writers % COPY], fenced)
        return writers[hidden]
