"""Options that the benchmarks share: where, in which numbers, how often, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from skiparse.models.options import Computed

CHECKOUT = Path("bench/results.jsonl")  # from here, if this is one


@dataclass(frozen=True, kw_only=True)
class Rounds(Computed):
    """Of what is measured in turns.

    Args:
        rounds: interleaved repetitions, of which medians are taken.
    """

    rounds: Annotated[int, "ROUNDS"] = 5

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"--rounds {self.rounds}: give at least 1")


@dataclass(frozen=True, kw_only=True)
class Kept(Rounds):
    """Of what is kept in rows.

    Args:
        results: JSON lines to append rows to, '' for none; default: the file of that name in bench/
            where bench/results.jsonl exists, as in a checkout.
    """

    results: Annotated[str | None, "FILE"] = None

    def rows(self, name: str) -> Path | None:
        """The file that gets the rows, ``bench/<name>.jsonl`` by itself; None for none."""
        if self.results is not None:
            return Path(self.results) if self.results else None
        return CHECKOUT.with_name(f"{name}.jsonl") if CHECKOUT.exists() else None
