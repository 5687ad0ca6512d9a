"""Finds the command that is meant in a table of them, runs it, and says what went wrong."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence

from skiparse.command import Command, parse, told

Table = Mapping[str, str]  # of each command, by its words, where its class is: "module:Class"
HELP = ("-h", "--help")


def main(table: Table, words: Sequence[str], *, about: str) -> int:
    """Run what ``words`` ask for, and tell in one line what was wrong.

    Returns:
        The exit status: 0; 1 for what went wrong on the way; 2 for arguments that make no sense and
        packages that are not installed; 130 for Ctrl-C.
    """
    extra = "dev"
    try:
        name, rest = split(table, words)
        if name in table:
            kind = command(table[name])
            extra = kind.extra
            parse(kind, name, rest).run()
        elif rest[:1] and rest[0] in HELP:
            print(overview(table, name, about))
        else:
            raise ValueError(_unknown(table, name, rest))
    except ModuleNotFoundError as error:
        return _failed(f"{error.name} is not installed; pip install 'skiparse[{extra}]'", 2)
    except (ValueError, FileNotFoundError) as error:
        return _failed(error, 2)
    except (FloatingPointError, OSError) as error:  # what went wrong on the way
        return _failed(error, 1)
    except KeyboardInterrupt:
        return _failed("interrupted", 130)
    return 0


def split(table: Table, words: Sequence[str]) -> tuple[str, list[str]]:
    """The longest beginning of ``words`` with which names of commands begin, and the rest."""
    count = 0
    while count < len(words) and _below(table, " ".join(words[: count + 1])):
        count += 1
    return " ".join(words[:count]), list(words[count:])


def command(where: str) -> type[Command]:
    """The class at ``module:Class``."""
    module, _, name = where.partition(":")
    found: type[Command] = getattr(importlib.import_module(module), name)
    return found


def overview(table: Table, name: str, about: str) -> str:
    """The commands that begin with ``name``, a line each."""
    lines = {each: told(command(table[each])).splitlines()[0] for each in _below(table, name)}
    width = max(map(len, lines))
    return "\n".join(
        [
            f"usage: skiparse {f'{name} ' if name else ''}COMMAND ...",
            "",
            about,
            "",
            *(f"  {each:{width}}  {line.removesuffix('.')}" for each, line in lines.items()),
            "",
            "skiparse COMMAND --help tells of its options.",
        ]
    )


def _below(table: Table, name: str) -> list[str]:
    return [each for each in table if not name or f"{each} ".startswith(f"{name} ")]


def _unknown(table: Table, name: str, rest: Sequence[str]) -> str:
    asked = " ".join([name, *rest[:1]]).strip()
    said = f"{asked} is no command" if rest else f"{asked or 'nothing'} is no whole command"
    return f"{said}; give one of {', '.join(_below(table, name))}"


def _failed(why: object, status: int) -> int:
    print(f"skiparse: {why}", file=sys.stderr)
    return status
