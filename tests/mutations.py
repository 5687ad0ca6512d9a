"""Faults planted in copies of the kernels: the tests show that the twin or the answers tell."""

import re
from dataclasses import dataclass

import built

KERNELS = built.ROOT / "csrc" / "ascend"
COPIES = 20  # in a file; the files are compiled side by side
TABLE = """#include "run.h"
{parts}
Table table() {{
    static const std::vector<Kernels> all = [] {{
        std::vector<Kernels> all;
        for (auto part : {{{all}}}) {{
            for (const Kernels& kernels : part()) all.push_back(kernels);
        }}
        return all;
    }}();
    return {{all.data(), static_cast<int>(all.size())}};
}}
"""


@dataclass(frozen=True)
class Mutation:
    """``old`` becomes ``new``. In ``old`` and ``at`` a space is any white space.

    The fault contains ``fault``. It begins with the line where ``at`` ends; by default with that of
    ``old``, and with None without a line. Where ``fault`` is empty, the answer is wrong, and
    nothing else.
    """

    name: str
    old: str
    fault: str = ""
    at: str | None = ""
    new: str = ""
    case: str = "tiles"


def handshake(event, flag, prefix=""):
    calls = (f"{prefix}{name}Flag<HardEvent::{event}>({flag});" for name in ("Set", "Wait"))
    return " " + " ".join(calls)


class Sources:
    """Files of the kernels, in an order in which they compile without their ``#include``."""

    def __init__(self, *files):
        self.texts = {name: (KERNELS / name).read_text() for name in files}

    def find(self, text):
        """The file of the only occurrence of ``text``, and where it begins and ends."""
        pattern = re.compile(r"\s+".join(map(re.escape, text.split())))
        found = [
            (f, *x.span()) for f, source in self.texts.items() for x in pattern.finditer(source)
        ]
        assert len(found) == 1, f"{len(found)} times in the kernels, not once: {text}"
        return found[0]

    def place_of(self, text):
        """The file and line on which the only occurrence of ``text`` ends, as a fault names it."""
        file, _, end = self.find(text)
        return f"{file}:{self.texts[file][:end].count(chr(10)) + 1}: "

    def altered(self, mutation):
        """The texts with the fault; the other lines keep their numbers."""
        file, first, end = self.find(mutation.old)
        source = self.texts[file]
        lost_lines = source.count("\n", first, end) - mutation.new.count("\n")
        return self.texts | {file: source[:first] + mutation.new + "\n" * lost_lines + source[end:]}

    def build(self, name, mutations, kernels):
        """The twin ``name`` of the sound kernels, then the altered ones in order.

        ``kernels`` are the names that the copies have of those in `Kernels` of run.h, in its order;
        None for those that they lack, and which are not compiled.
        """
        copies = [self.texts, *map(self.altered, mutations)]
        files, parts = {}, range(0, len(copies), COPIES)
        for first in parts:
            texts, rows = ['#include "run.h"'], []
            for i, copy in enumerate(copies[first : first + COPIES], first):
                texts.append(_in_namespace(f"copy{i}", copy, kernels))
                names = ("nullptr" if name is None else f"copy{i}::{name}" for name in kernels)
                rows.append("{" + ", ".join(names) + "}")
            table = "{" + ", ".join(rows) + "}"
            texts.append(f"std::vector<Kernels> part{first}() {{ return {table}; }}\n")
            files[f"part{first}.cpp"] = "\n".join(texts)
        files["table.cpp"] = TABLE.format(
            parts=" ".join(f"std::vector<Kernels> part{first}();" for first in parts),
            all=", ".join(f"part{first}" for first in parts),
        )
        return built.altered(name, files)


# Of a kernel by name, as it stands in the sources.
KERNEL = re.compile(r'^extern "C" [^{]*?\bvoid\s+(\w+)\(.*?^}$', re.MULTILINE | re.DOTALL)


def _in_namespace(name, texts, kernels):
    """The kernels in the namespace ``name``, with the file names and lines of the originals."""

    def wanted(found):
        return found[0] if found[1] in kernels else "\n" * found[0].count("\n")

    files = [f"namespace {name} {{ namespace skiparse {{ using namespace ::skiparse; }}"]
    for file, source in texts.items():
        source = re.sub(r"^#(include|pragma once).*$", "", source, flags=re.MULTILINE)
        source = KERNEL.sub(wanted, source)
        files.append(f'#line 1 "{file}"\n' + source.replace('extern "C" ', ""))
    return "\n".join([*files, "}"])
