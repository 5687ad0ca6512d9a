"""Registers of a warp lie in four arrays, ``[registers, 32 lanes]``, one for each size.

Constants and special registers have rows of their own, so that every operand is a row.
"""

import re

import numpy as np

from ptx.memory import Unknown

LANES = np.arange(32)
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    "pred": np.bool_,
    "u8": np.uint8, "b8": np.uint8, "s8": np.int8,
    "u16": np.uint16, "b16": np.uint16, "s16": np.int16,
    "u32": np.uint32, "b32": np.uint32, "s32": np.int32, "f32": np.float32,
    "u64": np.uint64, "b64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
VIEWS = {
    "pred": (np.bool_,),
    16: (np.uint16, np.int16),
    32: (np.uint32, np.int32, np.float32),
    64: (np.uint64, np.int64, np.float64),
}
GARBAGE = 0xA5  # in registers that nobody wrote
PARAMETERS = 1 << 60  # the address of the first kernel parameter, where no memory is
SPECIAL = ("%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z",
           "%nctaid.x", "%laneid", "%warpid")  # fmt: skip


def kind_of(dtype):
    return "pred" if dtype == np.bool_ else np.dtype(dtype).itemsize * 8


class Layout:
    """Which row a register, a constant or a special register has."""

    def __init__(self, program):
        self.program = program
        self.rows = {}  # (kind, name) -> row
        self.constants = {}  # (kind, row) -> value
        self.symbols = {p.name: PARAMETERS + p.offset for p in program.parameters}
        self.counts = dict.fromkeys(VIEWS, 0)

    def _new(self, kind, name):
        if (kind, name) not in self.rows:
            self.rows[kind, name] = self.counts[kind]
            self.counts[kind] += 1
        return self.rows[kind, name]

    def register(self, name):
        """``(kind, row)``, or None if the operand is no register."""
        kind = 32 if name in SPECIAL else self.program.kind(name)
        return None if kind is None else (kind, self._new(kind, name))

    def operand(self, text, dtype):
        """``(kind, row)`` of a register or a constant read as ``dtype``."""
        found = self.register(text)
        if found is not None:
            return found
        kind = max(16, kind_of(dtype)) if dtype != np.bool_ else "pred"
        value = self._constant(text, dtype)
        row = self._new(kind, value)
        self.constants[kind, row] = value
        return kind, row

    def _constant(self, text, dtype):
        if text in self.symbols:
            return self.symbols[text]
        if text == "global_smem":
            return 0
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return int(text[2:], 16)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return int(text[2:], 16)
        try:
            value = int(text.removesuffix("U"), 0)
        except ValueError:
            raise Unknown(f"operand {text}") from None
        return int(value != 0) if dtype == np.bool_ else value % (1 << np.dtype(dtype).itemsize * 8)

    def address(self, text):
        """``[base + offset]`` as ``((kind, row) of the base, offset)``."""
        inside = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if inside is None:
            raise Unknown(f"address {text}")
        base, offset = inside[1], int(inside[2] or "0", 0)
        dtype = np.uint64 if base in self.symbols else np.uint32
        return self.operand(base, dtype), offset

    def templates(self):
        """What the registers of a warp hold at first, and which of them are written."""
        values, written = {}, {}
        for kind, count in self.counts.items():
            dtype = VIEWS[kind][0]
            fill = False if kind == "pred" else int.from_bytes([GARBAGE] * (kind // 8), "little")
            values[kind] = np.full((count, 32), fill, dtype)
            written[kind] = np.zeros((count, 32), np.bool_)
        for (kind, row), value in self.constants.items():
            values[kind][row] = value
            written[kind][row] = True
        return values, written


class Registers:
    """Those of one warp: ``views[dtype]`` is the array of all registers of that size."""

    def __init__(self, layout, special):
        values, self.written = layout.templates()
        for name, value in special.items():
            row = layout.rows.get((32, name))
            if row is not None:
                values[32][row] = value
                self.written[32][row] = True
        self.views = {t: values[kind].view(t) for kind, types in VIEWS.items() for t in types}
