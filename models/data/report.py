"""What a scan found, in one line and one file: how many clips are used, and why others are not."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skiparse.models.data.atomic import write_json
from skiparse.models.data.plain import printable

NAMED = 20  # of what is dropped for one reason


@dataclass
class Dropped:
    """What is not used, by reason: how many, and the first of them by name."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """One more; ``name`` may say more about it."""
        self.counts[reason] += 1
        named = self.examples.setdefault(reason, [])
        if len(named) < NAMED:
            named.append(printable(name))


@dataclass(frozen=True)
class Report:
    """What a scan found.

    Attributes:
        source: what was looked at.
        used: clips that are used.
        dropped: how many are not, by reason.
        examples: the first of them, for each reason.
        more: what else is worth knowing, by name.
    """

    source: str
    used: int
    dropped: Mapping[str, int]
    examples: Mapping[str, Sequence[str]]
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """``clips: used 2 of 40; dropped 38: 38 fps too low``."""
        lost = sum(self.dropped.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        end = f"; dropped {lost}: {reasons}" if lost else "; nothing dropped"
        return f"{printable(self.source)}: used {self.used} of {self.used + lost}{end}"

    def write(self, path: str | os.PathLike[str]) -> None:
        """As JSON, in place of an older one."""
        about = {
            "source": printable(self.source),
            "used": self.used,
            "of": self.used + sum(self.dropped.values()),
            "dropped": dict(self.dropped),
            "examples": {reason: list(names) for reason, names in self.examples.items()},
            **self.more,
        }
        write_json(path, json.loads(json.dumps(about)))
