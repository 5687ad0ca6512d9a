"""Puts a program into an order in which numpy has much to do at a time.

Instructions that work on registers alone can't be observed by other warps, so within a basic block
they may run as early as their operands allow, and those of one opcode that are ready together run
as one *batch*: their registers are gathered into ``[rows, 32]``. Loads and stores keep their order
among each other, and everything keeps its order with what synchronises.
"""

import itertools
from collections import defaultdict

import numpy as np

from ptx.accesses import ADDRESS, access
from ptx.arithmetic import meaning
from ptx.memory import Fault, Unknown
from ptx.program import members, split
from ptx.registers import UNSIGNED, Layout, kind_of
from ptx.synchronisation import step_of

JUMPED = "jumped"
STORES = ("st", "stmatrix", "red", "atom")  # opcodes whose first operand is read, not written


def index_of(rows):
    """Rows as a slice if they are evenly spaced, which numpy reads without a copy."""
    if len(rows) == 1:
        return slice(rows[0], rows[0] + 1)
    steps = {b - a for a, b in itertools.pairwise(rows)}
    if len(steps) == 1 and (step := steps.pop()) > 0:
        return slice(rows[0], rows[-1] + 1, step)
    return np.array(rows)


class Operands:
    """Reads and writes operands of one instruction, and keeps which registers they are."""

    def __init__(self, layout, instruction):
        self.layout, self.instruction = layout, instruction
        self.reads, self.writes = [], []
        self.guard = None
        if instruction.guard:
            self.guard = layout.operand(instruction.guard, np.bool_)[1]
            self.reads.append(("pred", self.guard))

    def read_from(self, text, dtype):
        """A function of the warp that gives the operand, ``[32]``."""
        kind, row = self.layout.operand(text, dtype)
        self.reads.append((kind, row))
        if kind == kind_of(dtype):
            return lambda warp: warp.registers.views[dtype][row]
        unsigned = UNSIGNED[kind]
        return lambda warp: warp.registers.views[unsigned][row].astype(dtype)

    def read(self, i, dtype):
        return self.read_from(self.instruction.operands[i], dtype)

    def address(self, i):
        """A function of the warp that gives the addresses ``[32]`` of ``[base + offset]``."""
        (kind, row), offset = self.layout.address(self.instruction.operands[i])
        self.reads.append((kind, row))
        unsigned = UNSIGNED[kind]
        return lambda warp: warp.registers.views[unsigned][row].astype(np.int64) + offset

    def write_to(self, text, dtype):
        """A function of warp, values and active lanes that writes a register."""
        if text == "_":
            return lambda warp, values, active: None
        kind, row = self.layout.register(text)
        self.writes.append((kind, row))

        def write(warp, values, active):
            target = warp.registers.views[dtype][row]
            target[...] = values if active is None else np.where(active, values, target)

        return write

    def write(self, i, dtype):
        return self.write_to(self.instruction.operands[i], dtype)

    def rows(self, text, *, written=False):
        """The rows of ``{a, b, ...}``, registers of 32 bits."""
        rows = []
        for name in split(text[1:-1]):
            kind, row = self.layout.operand(name, np.uint32)
            if kind != 32:
                raise Unknown(f"{name} in {self.instruction}: {kind} bits where there should be 32")
            (self.writes if written else self.reads).append((kind, row))
            rows.append(row)
        return rows


class Node:
    """An instruction that can be part of a batch: its function, and the rows of its operands."""

    def __init__(self, operands, instruction):
        self.instruction, self.guard = instruction, operands.guard
        layout, texts = operands.layout, instruction.operands
        head = instruction.opcode.partition(".")[0]
        is_copy = head == "cp"
        into = [] if head in STORES or is_copy else members(texts[0])
        read = [m for x in texts[bool(into) :] for m in ([x] if x[0] == "[" else members(x))]
        counts = len(into), len(read)
        self.meaning = meaning(instruction.opcode, counts)
        self.is_access = self.meaning is None
        if self.is_access:
            self.meaning = access(instruction.opcode, counts)
            if self.meaning is None:
                raise Unknown(str(instruction))
        outs, ins = self.meaning.outs, self.meaning.ins
        if (len(outs), len(ins)) != counts:
            raise Unknown(f"{instruction} has other operands than its opcode takes")
        self.outs = [layout.register(name) if name != "_" else None for name in into]
        self.ins, self.offsets = [], []
        for text, dtype in zip(read, ins, strict=True):
            if dtype == ADDRESS:
                base, offset = layout.address(text)
                self.ins.append(base)
                self.offsets.append(offset)
            else:
                self.ins.append(layout.operand(text, dtype))
        operands.reads += self.ins
        operands.writes += [x for x in self.outs if x]
        self.key = (
            instruction.opcode,
            counts,
            tuple(x and x[0] for x in self.outs),
            tuple(kind for kind, _ in self.ins),
            self.guard is not None,
            instruction.negated,
        )


class Batch:
    """Instructions with one opcode that run at a time."""

    def __init__(self, nodes):
        first = nodes[0]
        self.instructions = [node.instruction for node in nodes]
        self.function, self.is_access = first.meaning.function, first.is_access
        self.count = len(nodes)
        self.guards = index_of([node.guard for node in nodes]) if first.guard is not None else None
        self.negated = first.instruction.negated
        self.sources, self.outs = [], []
        addresses = 0
        for i, dtype in enumerate(first.meaning.ins):
            kind, rows = first.ins[i][0], index_of([node.ins[i][1] for node in nodes])
            if dtype == ADDRESS:
                offsets = np.array([[node.offsets[addresses]] for node in nodes], np.int64)
                addresses += 1
                self.sources.append((UNSIGNED[kind], rows, np.int64, offsets))
            elif kind == kind_of(dtype):
                self.sources.append((dtype, rows, None, None))
            else:
                self.sources.append((UNSIGNED[kind], rows, dtype, None))
        for i, dtype in enumerate(first.meaning.outs):
            if first.outs[i] is None:
                self.outs.append(None)
                continue
            kind = first.outs[i][0]
            view = dtype if kind == kind_of(dtype) else UNSIGNED[kind]
            self.outs.append((view, index_of([node.outs[i][1] for node in nodes])))

    def __call__(self, warp, active):
        views = warp.registers.views
        if self.guards is not None:
            guards = views[np.bool_][self.guards]
            guards = ~guards if self.negated else guards
            active = guards if active is None else guards & active
            if active.all():
                active = None
            elif not active.any():
                return
        elif active is not None:
            active = np.broadcast_to(active, (self.count, 32))
        sources = []
        for view, rows, convert, offsets in self.sources:
            x = views[view][rows]
            if convert is not None:
                x = x.astype(convert)
                if offsets is not None:
                    x += offsets
            sources.append(x)
        if self.is_access:
            results = self.function(warp, active, *sources)
        else:
            results = self.function(*sources)
        if len(self.outs) == 1:
            results = (results,)
        for out, result in zip(self.outs, results, strict=True):
            if out is None:
                continue
            target = views[out[0]]
            if active is None:
                target[out[1]] = result
            else:
                target[out[1]] = np.where(active, result, target[out[1]])

    def at(self, row):
        """The instruction that is row ``row`` of the batch."""
        return self.instructions[row if row is not None and row < self.count else 0]


class Single:
    """An instruction that orders others, with its guard."""

    def __init__(self, operands, instruction, step):
        self.instruction, self.step, self.guard = instruction, step, operands.guard

    def __call__(self, warp, active):
        if self.guard is not None:
            active = guarded(self, warp, active)
            if active is not None and not active.any():
                return None
        return self.step(warp, active)

    def at(self, _row):
        return self.instruction


def guarded(step, warp, active):
    """The lanes of ``active`` whose guard holds; None for all."""
    guard = warp.registers.views[np.bool_][step.guard]
    guard = ~guard if step.instruction.negated else guard
    guard = guard if active is None else guard & active
    return None if guard.all() else guard


class Jump:
    """bra, brx.idx and ret: where lanes go on. ``end`` is behind the last step."""

    def __init__(self, operands, instruction):
        self.instruction, self.guard = instruction, operands.guard
        self.choice = operands.read(0, np.uint32) if instruction.opcode == "brx.idx" else None
        self.targets = None  # steps, known when all are made

    def __call__(self, warp, active):
        taken = active if self.guard is None else guarded(self, warp, active)
        target = self.targets[0]
        if self.choice is not None:
            lanes = slice(None) if taken is None else taken
            choices = set(self.choice(warp)[lanes].tolist())
            if len(choices) > 1 or max(choices, default=0) >= len(self.targets):
                raise Fault(f"an indexed branch to {sorted(choices)} of {len(self.targets)}")
            target = self.targets[choices.pop()] if choices else target
        warp.jump(active, taken, target)
        return JUMPED

    def at(self, _row):
        return self.instruction


class Enter:
    """The begin of a basic block: what it reads must have been written; what it writes will be."""

    def __init__(self, nodes):
        self.needs, self.gives = {}, {}
        self.readers = {}
        self.instruction = nodes[0][1]
        needs, gives = defaultdict(list), defaultdict(list)
        seen = set()
        for operands, instruction in nodes:
            for register in operands.reads:
                if register not in seen:
                    seen.add(register)
                    needs[register[0]].append(register[1])
                    self.readers[register] = instruction
            for register in operands.writes:
                if register not in seen:
                    seen.add(register)
                gives[register[0]].append(register[1])
        self.needs = {kind: np.array(rows) for kind, rows in needs.items()}
        self.gives = {kind: np.array(rows) for kind, rows in gives.items()}

    def __call__(self, warp, active):
        written = warp.registers.written
        for kind, rows in self.needs.items():
            there = written[kind].take(rows, 0)
            if not (there if active is None else there[:, active]).all():
                lanes = slice(None) if active is None else active
                missing = int(rows[~there[:, lanes].all(1)][0])
                self.instruction = self.readers[kind, missing]
                raise Fault(f"{warp.block.schedule.name_of(kind, missing)} was never written")
        for kind, rows in self.gives.items():
            if active is None:
                written[kind][rows] = True
            else:
                written[kind][np.ix_(rows, active)] = True

    def at(self, _row):
        return self.instruction


class Schedule:
    """The steps of a program, and the layout of its registers."""

    def __init__(self, program):
        self.program, self.layout = program, Layout(program)
        self.steps = []
        jumps = [(i, x) for i, x in enumerate(program.instructions) if is_jump(x)]
        begins = {0, *(i + 1 for i, _ in jumps)}
        begins.update(*(self._targets(x) for _, x in jumps))  # other labels are for debuggers
        begins = sorted(i for i in begins if i < len(program.instructions))
        places = {len(program.instructions): None}
        for begin, end in zip(begins, [*begins[1:], len(program.instructions)], strict=True):
            places[begin] = len(self.steps)
            self._block(program.instructions[begin:end])
        self.end = len(self.steps)
        places[len(program.instructions)] = self.end
        for step in self.steps:
            if isinstance(step, Jump):
                step.targets = [places[t] for t in self._targets(step.instruction)]

    def name_of(self, kind, row):
        """The register of a row."""
        return next(name for (k, name), r in self.layout.rows.items() if (k, r) == (kind, row))

    def _targets(self, instruction):
        if instruction.opcode in ("ret", "exit"):
            return [len(self.program.instructions)]
        labels = instruction.operands[-1:]
        if instruction.opcode == "brx.idx":
            labels = self.program.tables[labels[0]]
        return [self.program.target(instruction, label) for label in labels]

    def _block(self, instructions):
        """Steps of one basic block."""
        nodes = [(Operands(self.layout, x), x) for x in instructions]
        region, steps = [], []
        for operands, instruction in nodes:
            if is_jump(instruction):
                step = Jump(operands, instruction)
            else:
                step = step_of(operands, instruction)
                step = step and Single(operands, instruction, step)
            if step is None:
                region.append((operands, Node(operands, instruction)))
            else:
                steps += batches(region)
                steps.append(step)
                region = []
        steps += batches(region)
        self.steps.append(Enter(nodes))
        self.steps += steps


def is_jump(instruction):
    return instruction.opcode in ("bra", "bra.uni", "brx.idx", "ret", "exit")


def batches(region):
    """The instructions of a region as batches, each as early as its operands allow."""
    written, read = {}, {}  # register -> the level of its last writer, of its last reader
    levels = defaultdict(list)
    memory_level, memory_key = 0, None
    for operands, node in region:
        level = 0
        for register in operands.reads:
            level = max(level, written.get(register, -1) + 1)
        for register in operands.writes:
            level = max(level, written.get(register, -1) + 1, read.get(register, -1) + 1)
        if node.guard is not None:  # where it does not hold, what was there stays
            for register in operands.writes:
                level = max(level, written.get(register, -1) + 1)
        if node.is_access:
            level = max(level, memory_level + (memory_key not in (None, node.key)))
            memory_level, memory_key = level, node.key
        for register in operands.reads:
            read[register] = max(read.get(register, -1), level)
        for register in operands.writes:
            written[register] = level
        levels[level, node.key].append(node)
    order = sorted(levels, key=lambda place: place[0])
    return [Batch(levels[place]) for place in order]
