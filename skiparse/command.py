"""What a command is: a dataclass, whose fields are its options and whose ``run`` does the work.

Its docstring is the help: what stands before ``Args:`` says what the command does, ``Args:`` what
each field means. The type of a field says how it is read: text, numbers, one of some words
(``Literal``), several with commas between (a tuple), a flag (``bool``), or a dataclass, each field
of which is an option ``--name.field``. ``Annotated`` says what stands for the value in the help: of
a number that is its unit. A field without a default has to be given. This is all of the standard
library, so that ``skiparse info`` asks for nothing but what the operator needs.
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NoReturn,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

C = TypeVar("C")


class Command(Protocol):
    """A dataclass that can be run; ``extra`` is the optional part of the package that it needs."""

    extra: ClassVar[str]

    def run(self) -> None:
        """Do it, with what was given; errors say what is wrong and come before any work."""


@dataclass(frozen=True)
class Positional:
    """In ``Annotated``: the value is given by its place, and shown by this name."""

    shown: str


class Rest(Positional):
    """In ``Annotated``: all that comes behind, as it is."""


def parse(kind: type[C], name: str, words: Sequence[str]) -> C:
    """The dataclass ``kind`` made from what was given to the command ``name``.

    Raises:
        ValueError: for options that there are not, or values of another type.
        SystemExit: after ``--help``.
    """
    return _made(kind, vars(parser(kind, name).parse_args(list(words))))


def parser(kind: type[Any], name: str) -> argparse.ArgumentParser:
    """Reads the options of ``kind``; only those that are given come out."""
    made = _Parser(prog=f"skiparse {name}", description=told(kind), allow_abbrev=False)
    for option in options(kind):
        option.add_to(made)
    return made


def told(kind: type[Any]) -> str:
    """What a command does: its docstring as far as ``Args:``."""
    return _text(kind).partition("\n\nArgs:")[0]


@dataclass(frozen=True)
class Option:
    """A field of a dataclass as it is given on a command line."""

    path: str  # of the field, such as "limits.max_hold"
    kind: Any
    shown: str | Positional | None  # what stands for its value
    default: Any  # MISSING where there is none
    help: str

    @property
    def flag(self) -> str:
        """``--some-field``; the fields of an inner dataclass keep their names, as in a config."""
        return f"--{self.path if '.' in self.path else self.path.replace('_', '-')}"

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare it."""
        given: dict[str, Any] = {"default": argparse.SUPPRESS, "help": self._help()}
        if isinstance(self.shown, Positional):
            given["metavar"] = self.shown.shown
            if isinstance(self.shown, Rest):
                given["nargs"] = argparse.REMAINDER
            elif get_origin(self.kind) is tuple:
                given["nargs"] = "+" if self.default is MISSING else "*"
            parser.add_argument(self.path, type=_reads(self.kind, several=False), **given)
            return
        if self.kind is bool:
            parser.add_argument(self.flag, dest=self.path, action="store_true", **given)
            return
        if get_origin(self.kind) is Literal:
            given["choices"] = get_args(self.kind)
        else:
            given["metavar"] = self.shown
        given["required"] = self.default is MISSING
        parser.add_argument(self.flag, dest=self.path, type=_reads(self.kind), **given)

    def _help(self) -> str:
        """With its default, if that is a value; what None stands for is told in the docstring."""
        text = self.help.replace("%", "%%")
        if self.default is MISSING or self.default in (None, ()) or self.kind is bool:
            return text
        value = ",".join(self.default) if isinstance(self.default, tuple) else self.default
        return f"{text} (default: {value})"


def options(kind: type[Any], prefix: str = "") -> Iterator[Option]:
    """All fields of a dataclass, its own before those of the classes that it builds on."""
    hints, helps = get_type_hints(kind, include_extras=True), _helps(kind)
    for field in _own_first(kind):
        hint, shown = hints[field.name], None
        if get_origin(hint) is Annotated:
            hint, shown = get_args(hint)
        hint = _not_none(hint)
        path = f"{prefix}{field.name}"
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from options(hint, f"{path}.")
        else:
            yield Option(path, hint, shown, field.default, helps[field.name])


def _text(kind: type[Any]) -> str:
    return inspect.cleandoc(kind.__doc__ or "").replace("``", "`")


def _own_first(kind: type[Any]) -> list[Field[Any]]:
    place = {n: i for i, base in enumerate(kind.__mro__) for n in base.__dict__.get(NAMES, ())}
    return sorted(fields(kind), key=lambda field: place[field.name])


NAMES = "__annotations__"  # of the fields that a class itself declares


def _helps(kind: type[Any]) -> dict[str, str]:
    """What the docstrings of a class, and of those that it builds on, say of each field."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, text = _text(base).partition("\n\nArgs:\n")
        for entry in re.split(r"\n(?= {4}\w)", text):
            names, _, said = entry.strip().partition(": ")
            found[names] = " ".join(said.split()).removesuffix(".")
    return found


def _not_none(hint: Any) -> Any:
    """The type of an optional value."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return hint


def _reads(kind: Any, *, several: bool = True) -> Any:
    """What makes a value of text; of a tuple's texts, with commas between, if ``several``."""
    if get_origin(kind) is Literal:
        return str
    if get_origin(kind) is tuple:
        return (lambda text: tuple(text.split(","))) if several else str
    return kind


def _made(kind: type[C], given: dict[str, Any], prefix: str = "") -> C:
    """A dataclass, and those in it, from values by the paths of their fields."""
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    assert is_dataclass(kind)
    for field in fields(kind):
        hint, path = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            assert isinstance(hint, type)
            values[field.name] = _made(hint, given, f"{path}.")
        elif path in given:
            value = given[path]
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as all errors are said: by whoever called."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('skiparse ')}: {message}; see {self.prog} -h")
