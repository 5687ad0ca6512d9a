"""Parses the PTX of one kernel: parameters, instructions with line and text, labels, tables."""

import re
from dataclasses import dataclass, field

from ptx.memory import Unknown

SIZES = {"u8": 1, "b8": 1, "u16": 2, "b16": 2, "u32": 4, "s32": 4, "b32": 4, "f32": 4,
         "u64": 8, "s64": 8, "b64": 8, "f64": 8}  # fmt: skip
KINDS = {"pred": "pred", "b16": 16, "u16": 16, "s16": 16, "b32": 32, "u32": 32, "s32": 32,
         "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}  # fmt: skip
DIRECTIVES = (".loc", ".pragma", ".file", ".section")


@dataclass(slots=True)
class Instruction:
    """``@guard opcode operands``; ``scopes`` are those in which its labels are looked up."""

    text: str
    line: int
    opcode: str
    operands: list
    guard: str | None = None
    negated: bool = False
    scopes: tuple = ()

    def __str__(self):
        text = self.text if len(self.text) < 120 else f"{self.text[:117]}..."
        return f"PTX line {self.line}: {text}"


@dataclass(slots=True)
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Program:
    """One kernel. ``labels`` are positions in ``instructions``; ``kinds`` those of registers."""

    name: str
    parameters: list
    instructions: list
    labels: dict  # (scope, name) -> position
    tables: dict  # of indexed branches: name -> labels
    kinds: dict  # register name without its number -> its size in bits, or "pred"
    registers: int | None  # of a thread at launch, if the PTX says so
    text: str = field(repr=False)

    def target(self, instruction, label):
        """The position that a label stands for where ``instruction`` is."""
        for scope in reversed(instruction.scopes):
            if (scope, label) in self.labels:
                return self.labels[scope, label]
        raise Unknown(f"there is no label {label} for {instruction}")

    def kind(self, register):
        """The size of a register in bits, or "pred"; None if it is none."""
        found = self.kinds.get(register)
        return self.kinds.get(register.rstrip("0123456789")) if found is None else found


def split(operands):
    """``a, {b, c}, [d, {e, f}]`` at the commas that are in no brackets."""
    parts, depth, current = [], 0, ""
    for character in operands:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def members(operand):
    """``{a, b}`` or ``a|b`` as a list; another operand as a list of one."""
    if operand.startswith("{"):
        return split(operand[1:-1])
    return [part.strip() for part in operand.split("|")]


def parse(text):
    """The program of a PTX file with one kernel."""
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{]*)\{", text, re.S)
    if entry is None:
        raise Unknown("the PTX has no .entry")
    registers = re.search(r"\.maxnreg\s+(\d+)", entry[3])
    program = Program(
        entry[1], _parameters(entry[2]), [], {}, {}, {}, registers and int(registers[1]), text
    )
    _body(program, text[entry.end() :], text[: entry.end()].count("\n") + 1)
    return program


def _parameters(text):
    offset, found = 0, []
    for line in text.split(",\n"):
        line = line.strip()
        if not line:
            continue
        array = re.search(r"([\w$]+)\[(\d+)\]$", line)
        if array:
            align = int(re.search(r"\.align (\d+)", line)[1])
            name, size = array[1], int(array[2])
        else:
            name = line.split()[-1]
            size = align = SIZES[re.search(r"\.param\s+\.(\w+)", line)[1]]
        offset = -(-offset // align) * align
        found.append(Parameter(name, offset, size))
        offset += size
    return found


def _body(program, text, line):
    """Statements, labels and scopes up to the brace that closes the kernel."""
    scopes, made, rest = [0], 0, ""
    last_label = None
    for number, raw in enumerate(text.split("\n"), line):
        raw = raw.split("//")[0].strip()
        if raw.startswith(DIRECTIVES):
            continue
        rest = f"{rest} {raw}".strip()
        while rest:
            label = re.match(r"([$\w]+):(?!:)\s*", rest)
            if label:
                last_label = label[1]
                program.labels[scopes[-1], last_label] = len(program.instructions)
                rest = rest[label.end() :]
            elif rest[0] == "{":
                made += 1
                scopes.append(made)
                rest = rest[1:].lstrip()
            elif rest[0] == "}":
                scopes.pop()
                if not scopes:
                    return
                rest = rest[1:].lstrip()
            else:
                statement, end, rest = rest.partition(";")
                if not end:
                    rest = statement
                    break
                rest = rest.lstrip()
                _statement(program, statement.strip(), number, tuple(scopes), last_label)


def _statement(program, text, line, scopes, label):
    if text.startswith(".reg"):
        kind = re.match(r"\.reg\s+\.(\w+)\s+", text)
        for name in text[kind.end() :].split(","):
            program.kinds[re.sub(r"<\d+>", "", name.strip())] = KINDS[kind[1]]
    elif text.startswith(".branchtargets"):
        program.tables[label] = split(text.removeprefix(".branchtargets"))
    elif text.startswith("."):
        raise Unknown(f"directive at PTX line {line}: {text}")
    elif text:
        guard = re.match(r"@(!?)([%\w$]+)\s+", text)
        opcode, *rest = (text[guard.end() :] if guard else text).split(None, 1)
        program.instructions.append(
            Instruction(
                " ".join(text.split()),
                line,
                opcode,
                split(rest[0]) if rest else [],
                guard and guard[2],
                bool(guard and guard[1]),
                scopes,
            )
        )
