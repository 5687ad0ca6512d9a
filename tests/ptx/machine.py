"""Runs a launch block by block: warps take turns at random, and what is asynchronous may wait."""

import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from ptx.memory import Fault, SharedMemory
from ptx.registers import Registers
from ptx.schedule import JUMPED
from ptx.synchronisation import STAY, Barriers, Groups

MODES = ("early", "late", "random")
TURNS = (1, 3, 12, 60)  # steps of a warp before another may run; drawn
FILE = 65536  # registers of 32 bits that a multiprocessor has
LIMIT = 20_000_000  # steps of one block


@dataclass
class Launch:
    """A kernel and what it is given; ``memory`` holds the buffers that it may touch.

    With ``copies_need_fences`` it is a fault if wgmma reads what came by cp.async and was not
    fenced, as the PTX ISA has it; else it is counted.
    """

    schedule: object
    grid: int
    threads: int
    shared: int  # bytes
    parameters: np.ndarray  # bytes, as the kernel finds them
    memory: object
    tensor_maps: list = field(default_factory=list)
    copies_need_fences: bool = True


class Warp:
    """32 lanes; ``at`` is the step they are at, ``lanes_at`` the step of each if they differ."""

    def __init__(self, block, index):
        self.block, self.index = block, index
        special = {
            "%tid.x": np.arange(32) + 32 * index, "%tid.y": 0, "%tid.z": 0,
            "%ntid.x": block.threads, "%ctaid.x": block.index, "%ctaid.y": 0, "%ctaid.z": 0,
            "%nctaid.x": block.launch.grid, "%laneid": np.arange(32), "%warpid": index,
        }  # fmt: skip
        self.registers = Registers(block.schedule.layout, special)
        self.at, self.lanes_at = 0, None
        self.blocked = self.at_barrier = None
        self.products, self.copies = Groups(), Groups()
        self.stores = [Groups() for _ in range(32)]  # of each lane
        self.registers_held = block.registers_at_launch

    @property
    def place(self):
        """The step that is next."""
        return self.at if self.lanes_at is None else int(self.lanes_at.min())

    @property
    def done(self):
        return self.place == self.block.schedule.end

    def is_rest(self, active):
        """Whether all other lanes have ended."""
        return bool((self.lanes_at[~active] == self.block.schedule.end).all())

    def jump(self, active, taken, target):
        """Lanes ``taken`` of those that are ``active`` go to ``target``, the others on."""
        following = self.place + 1
        if self.lanes_at is None:
            if taken is None:
                self.at = target
            elif not taken.any():
                self.at = following
            else:
                self.lanes_at = np.where(taken, target, following)
        else:
            self.lanes_at[active] = following
            self.lanes_at[active if taken is None else taken] = target

    def begin_product(self, multiply):
        """wgmma: may read and write registers and shared memory until it is waited for."""
        if self.block.is_late():
            self.products.append(multiply)
        else:
            self.products.finish()  # those before end first
            multiply()

    def run(self, turns):
        steps, block = self.block.schedule.steps, self.block
        while turns > 0 and self.blocked is None:
            turns -= 1
            active = None
            place = self.at
            if self.lanes_at is not None:
                place = int(self.lanes_at.min())
                active = self.lanes_at == place
                if active.all():
                    self.at, self.lanes_at, active = place, None, None
            if place == block.schedule.end:
                return
            step = steps[place]
            try:
                answer = step(self, active)
            except Fault as fault:
                raise Fault(
                    f"block {block.index}, warp {self.index}, {step.at(fault.row)}: {fault}"
                ) from None
            except Exception as error:
                error.add_note(f"block {block.index}, warp {self.index}, {step.at(None)}")
                raise
            block.counts["steps"] += 1
            if answer == STAY:
                return
            if answer != JUMPED:
                if self.lanes_at is None:
                    self.at = place + 1
                else:
                    self.lanes_at[active] = place + 1


class Block:
    """The warps of one block, their shared memory, barriers and copies under way."""

    def __init__(self, launch, index, mode, seed):
        self.launch, self.index, self.mode = launch, index, mode
        self.schedule, self.threads = launch.schedule, launch.threads
        self.random = random.Random(f"{seed} {index}")
        self.shared = SharedMemory(launch.shared, launch.threads // 32)
        self.barriers, self.mbarriers = Barriers(), {}
        self.copies = []
        self.counts = Counter()
        declared = launch.schedule.program.registers
        self.registers_at_launch = declared or min(255, FILE // launch.threads // 8 * 8)
        warps = launch.threads // 32
        self.registers_left = FILE // 32 - warps * self.registers_at_launch
        self.warps = [Warp(self, i) for i in range(warps)]

    def is_late(self):
        """Whether what begins now ends only when it is waited for."""
        return self.mode == "late" or (self.mode == "random" and self.random.random() < 0.5)

    def begin_copy(self, land, instruction):
        """A bulk copy: it lands at once, when nothing else can go on, or at random."""
        if self.mode == "early":
            land()
        else:
            self.copies.append((land, instruction))

    def land_copy(self):
        which = self.random.randrange(len(self.copies)) if self.mode == "random" else 0
        land, instruction = self.copies.pop(which)
        try:
            land()
        except Fault as fault:
            raise Fault(f"block {self.index}, the copy of {instruction}: {fault}") from None

    def run(self):
        while True:
            live = [warp for warp in self.warps if not warp.done]
            if not live:
                break
            ready = [warp for warp in live if warp.blocked is None or warp.blocked()]
            lands = not ready or (self.mode == "random" and self.random.random() < 0.3)
            if self.copies and lands:
                self.land_copy()
            elif not ready:
                raise Fault(self.deadlock(live))
            else:
                warp = self.random.choice(ready)
                warp.blocked = None
                warp.run(self.random.choice(TURNS))
            if self.counts["steps"] > LIMIT:
                raise Fault(f"block {self.index} has not ended after {LIMIT} steps")
        for warp in self.warps:
            if warp.products:
                raise Fault(f"block {self.index}, warp {warp.index} ends with wgmma in flight")
            if any(warp.stores):
                raise Fault(f"block {self.index}, warp {warp.index} ends with copies in flight")
        if self.copies:
            raise Fault(
                f"block {self.index} ends before the copy of {self.copies[0][1]} has landed"
            )

    def deadlock(self, live):
        places = (f"warp {w.index} at {self.schedule.steps[w.place].at(None)}" for w in live)
        return f"block {self.index} is in a deadlock: {'; '.join(places)}"


def execute(launch, mode="late", seed=0, blocks=None):
    """Run every block of a launch, or those given; what it counted.

    Raises:
        Fault: for what a GPU would not forgive, with block, warp, PTX line and text.
        Unknown: for PTX that the machine was never taught.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}: {mode}")
    counts = Counter()
    with np.errstate(all="ignore"):
        for index in range(launch.grid) if blocks is None else blocks:
            block = Block(launch, index, mode, seed)
            block.run()
            counts += block.counts
    return counts
