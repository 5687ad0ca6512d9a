"""Steps that order others: barriers, mbarriers, fences, groups, copies that end by themselves.

``step(warp, active)`` runs one instruction with its active lanes, or None for all of them, and
answers ``STAY`` if the warp has to wait; ``warp.blocked`` says until when.
"""

import re

import numpy as np

from ptx.arithmetic import U32
from ptx.memory import Fault
from ptx.program import split
from ptx.registers import LANES, PARAMETERS
from ptx.tensor_cores import wgmma
from ptx.tma import MAGIC, copy_box, store_box

STAY = "stay"
RULES = []


def rule(pattern):
    """The decorated function makes the step of instructions whose opcode matches."""

    def add(make):
        RULES.append((re.compile(pattern), make))
        return make

    return add


def step_of(operands, instruction):
    """The step of an instruction that orders others, or None if no rule knows it."""
    for pattern, make in RULES:
        match = pattern.fullmatch(instruction.opcode)
        if match:
            return make(operands, instruction, match)
    return None


rule(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")(wgmma)


def lanes_of(active):
    return 32 if active is None else int(active.sum())


def first_of(active):
    return 0 if active is None else int(np.flatnonzero(active)[0])


class Mbarrier:
    """Counts arrivals and bytes that are to come; turns its phase when both are at zero."""

    def __init__(self, count):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def arrive(self, count):
        if count > self.pending:
            raise Fault(f"{count} arrivals at an mbarrier that waits for {self.pending}")
        self.pending -= count
        self.settle()

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count


def mbarrier_at(warp, address):
    found = warp.block.mbarriers.get(address)
    if found is None:
        raise Fault(f"there is no mbarrier at {address:#x}")
    return found


@rule(r"mbarrier\.init(?:\.shared(?:::cta)?)?\.b64")
def _(operands, instruction, _match):
    address, count = operands.address(0), operands.read(1, U32)

    def step(warp, active):
        lane = first_of(active)
        if int(address(warp)[lane]) % 8:
            raise Fault(f"an mbarrier at {int(address(warp)[lane]):#x}, no multiple of 8")
        warp.block.mbarriers[int(address(warp)[lane])] = Mbarrier(int(count(warp)[lane]))

    return step


@rule(r"mbarrier\.inval(?:\.shared(?:::cta)?)?\.b64")
def _(operands, instruction, _match):
    address = operands.address(0)

    def step(warp, active):
        place = int(address(warp)[first_of(active)])
        mbarrier_at(warp, place)
        del warp.block.mbarriers[place]

    return step


@rule(r"mbarrier\.arrive(\.expect_tx)?(?:\.release\.cta)?(?:\.shared(?:::cta)?)?\.b64")
def _(operands, instruction, match):
    address = operands.address(1)
    amount = operands.read(2, U32) if len(instruction.operands) > 2 else None

    def step(warp, active):
        lane, lanes = first_of(active), lanes_of(active)
        barrier = mbarrier_at(warp, int(address(warp)[lane]))
        if match[1]:
            barrier.bytes += lanes * int(amount(warp)[lane])
            barrier.arrive(lanes)
        else:
            barrier.arrive(lanes * (1 if amount is None else int(amount(warp)[lane])))

    return step


@rule(r"mbarrier\.(?:try|test)_wait\.parity(?:\.acquire\.cta)?(?:\.shared(?:::cta)?)?\.b64")
def _(operands, instruction, _match):
    done, address = operands.write(0, np.bool_), operands.address(1)
    parity = operands.read(2, U32)

    def step(warp, active):
        """There is no use in trying again before the phase has turned."""
        lane = first_of(active)
        place, wanted = int(address(warp)[lane]), int(parity(warp)[lane]) & 1
        if mbarrier_at(warp, place).phase == wanted:
            warp.blocked = lambda: mbarrier_at(warp, place).phase != wanted
            return STAY
        done(warp, np.ones(32, bool), active)
        return None

    return step


@rule(r"(?:bar|barrier)\.sync(?:\.aligned)?|bar\.sync\.aligned")
def _(operands, instruction, _match):
    number = operands.read(0, U32)
    threads = operands.read(1, U32) if len(instruction.operands) > 1 else None

    def step(warp, active):
        if active is not None and not warp.is_rest(active):
            raise Fault("a barrier for a part of a warp")
        block, key = warp.block, int(number(warp)[0])
        if warp.at_barrier is None:
            expected = block.threads if threads is None else int(threads(warp)[0])
            warp.at_barrier = block.barriers.arrive(key, expected)
        generation = warp.at_barrier
        if not block.barriers.passed(key, generation):
            warp.blocked = lambda: block.barriers.passed(key, generation)
            return STAY
        warp.at_barrier = None
        return None

    return step


class Barriers:
    """The 16 named barriers of a block: so many threads, in whole warps, and all go on."""

    def __init__(self):
        self.arrived, self.expected, self.generation = {}, {}, {}

    def arrive(self, key, expected):
        """A warp is there; the generation to be passed."""
        if not 0 <= key < 16:
            raise Fault(f"barrier {key}: there are 16")
        if self.arrived.get(key, 0) and self.expected[key] != expected:
            raise Fault(f"barrier {key} for {expected} threads and for {self.expected[key]}")
        if expected % 32 or expected <= 0:
            raise Fault(f"barrier {key} for {expected} threads, not whole warps")
        self.expected[key] = expected
        generation = self.generation.setdefault(key, 0)
        self.arrived[key] = self.arrived.get(key, 0) + 32
        if self.arrived[key] == expected:
            self.arrived[key] = 0
            self.generation[key] += 1
        return generation

    def passed(self, key, generation):
        return self.generation[key] != generation


@rule(r"bar\.warp\.sync")
def _(operands, instruction, _match):
    return lambda warp, active: None  # lanes of a warp run together here


@rule(r"elect\.sync")
def _(operands, instruction, _match):
    leader, elected = instruction.operands[0].split("|")
    lane, elected = operands.write_to(leader.strip(), U32), operands.write_to(elected, np.bool_)

    def step(warp, active):
        first = first_of(active)
        lane(warp, np.full(32, first, U32), active)
        elected(warp, first == LANES, active)

    return step


@rule(r"fence\.proxy\.async(?:\.shared::cta)?")
def _(operands, instruction, _match):
    return lambda warp, active: warp.block.shared.fence(warp.index)


@rule(r"fence\.mbarrier_init\.release\.cluster|membar\.\w+|fence\.(?:sc|acq_rel)\.\w+")
def _(operands, instruction, _match):
    return lambda warp, active: None  # memory is in order here


@rule(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32")
def _(operands, instruction, match):
    wanted = int(instruction.operands[0])

    def step(warp, active):
        """Registers of a warp, from and to what the block has left over."""
        block, more = warp.block, wanted - warp.registers_held
        more = max(more, 0) if match[1] == "inc" else min(more, 0)
        if more > block.registers_left:
            warp.blocked = lambda: more <= block.registers_left
            return STAY
        block.registers_left -= more
        warp.registers_held += more
        return None

    return step


@rule(r"wgmma\.fence\.sync\.aligned")
def _(operands, instruction, _match):
    return lambda warp, active: None


@rule(r"wgmma\.(commit|wait)_group\.sync\.aligned")
def _(operands, instruction, match):
    if match[1] == "commit":
        return lambda warp, active: warp.products.commit()
    left = int(instruction.operands[0])
    return lambda warp, active: warp.products.wait(left)


@rule(r"cp\.async\.(commit|wait)_(group|all)")
def _(operands, instruction, match):
    if match[1] == "commit":
        return lambda warp, active: warp.copies.commit()
    left = int(instruction.operands[0]) if match[2] == "group" else 0

    def step(warp, active):
        if match[2] == "all":
            warp.copies.commit()
        warp.copies.wait(left)

    return step


class Groups:
    """What a warp has begun and not waited for, oldest first, in committed groups."""

    def __init__(self):
        self.committed, self.open = [], []

    def append(self, work):
        self.open.append(work)

    def commit(self):
        self.committed.append(self.open)
        self.open = []

    def wait(self, left):
        """Until all but the last ``left`` groups have ended."""
        while len(self.committed) > left:
            for work in self.committed.pop(0):
                work()

    def finish(self):
        """End everything now, but leave the groups to be waited for."""
        for group in (*self.committed, self.open):
            for work in group:
                work()
            group.clear()

    def __bool__(self):
        return bool(self.committed or self.open)


@rule(
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::c(?:ta|luster)\.global(?:\.tile)?"
    r"\.mbarrier::complete_tx::bytes"
)
def _(operands, instruction, match):
    destination, barrier = operands.address(0), operands.address(2)
    descriptor, at = split(instruction.operands[1][1:-1])
    descriptor = operands.read_from(descriptor, np.uint64)
    at = [operands.read_from(x, np.int32) for x in split(at[1:-1])]
    if len(at) != int(match[1]):
        raise Fault(f"{instruction} has {len(at)} coordinates")

    def step(warp, active):
        lane, block = first_of(active), warp.block
        if lanes_of(active) != 1:
            raise Fault(f"the copy is begun by {lanes_of(active)} lanes")
        tensor_map = map_at(block, int(descriptor(warp)[lane]))
        if len(tensor_map.dims) != len(at):
            raise Fault(f"{len(at)} coordinates for a tensor map of rank {len(tensor_map.dims)}")
        where = [int(x(warp)[lane]) for x in at]
        place, signal = int(destination(warp)[lane]), int(barrier(warp)[lane])
        mbarrier_at(warp, signal)
        block.counts["bulk copies"] += 1

        def land():
            copy_box(block, tensor_map, where, place)
            done = mbarrier_at(warp, signal)
            done.bytes -= tensor_map.nbytes
            done.settle()

        block.begin_copy(land, instruction)

    return step


@rule(r"cp\.async\.bulk\.tensor\.([1-5])d\.global\.shared::cta(?:\.tile)?\.bulk_group")
def _(operands, instruction, match):
    """A box from shared memory; it is read, and written, until its group is waited for."""
    from ptx.program import split

    source = operands.address(1)
    descriptor, at = split(instruction.operands[0][1:-1])
    descriptor = operands.read_from(descriptor, np.uint64)
    at = [operands.read_from(x, np.int32) for x in split(at[1:-1])]
    if len(at) != int(match[1]):
        raise Fault(f"{instruction} has {len(at)} coordinates")

    def step(warp, active):
        lane, block = first_of(active), warp.block
        if lanes_of(active) != 1:
            raise Fault(f"the copy is begun by {lanes_of(active)} lanes")
        tensor_map = map_at(block, int(descriptor(warp)[lane]))
        if len(tensor_map.dims) != len(at):
            raise Fault(f"{len(at)} coordinates for a tensor map of rank {len(tensor_map.dims)}")
        where = [int(x(warp)[lane]) for x in at]
        place, fenced = int(source(warp)[lane]), block.shared.fenced[warp.index]
        block.counts["bulk stores"] += 1

        def land():
            store_box(block, tensor_map, where, place, fenced)

        if block.is_late():
            warp.stores[lane].append(land)
        else:
            land()

    return step


@rule(r"cp\.async\.bulk\.(commit|wait)_group(?:\.read)?")
def _(operands, instruction, match):
    left = None if match[1] == "commit" else int(instruction.operands[0], 0)

    def step(warp, active):
        for lane in np.flatnonzero(np.broadcast_to(True if active is None else active, 32)):
            groups = warp.stores[lane]
            groups.commit() if left is None else groups.wait(left)

    return step


def map_at(block, address):
    """The tensor map that the driver put into the kernel's parameters."""
    offset = address - PARAMETERS
    raw = block.launch.parameters[offset : offset + 16].view(np.uint64) if offset >= 0 else ()
    if len(raw) < 2 or raw[0] != MAGIC:
        raise Fault(f"there is no tensor map at {address:#x}")
    return block.launch.tensor_maps[int(raw[1])]
