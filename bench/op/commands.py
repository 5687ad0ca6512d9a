"""``skiparse bench`` and ``skiparse tune``: the operator's cases, timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from skiparse.bench.options import Kept, Rounds
from skiparse.command import Positional


@dataclass(frozen=True, kw_only=True)
class Bench(Kept):
    """Time Skiparse attention beside dense attention, with the ceiling.

    ``skiparse bench block``, ``bench vae`` and ``bench cache`` time the models instead.

    Args:
        cases: their names, * stands for anything; default: those of the headline video.
        list: print the names of all cases and stop.
        backends: of skiparse, with commas between.
        against: what is timed beside them, with commas between.
    """

    extra: ClassVar[str] = "bench"
    cases: Annotated[tuple[str, ...], Positional("CASE")] = ()
    list: bool = False
    backends: Annotated[tuple[str, ...], "NAMES"] = ("sdpa", "triton")
    against: Annotated[tuple[str, ...], "NAMES"] = ("dense", "original", "flex", "natten")

    def run(self) -> None:
        """Print a table of each case, and keep its rows."""
        from skiparse import registry
        from skiparse.bench.op import cases, run

        if self.list:
            print("\n".join(cases.CASES))
            return
        device, dtype = self.place
        for name in self.backends:
            registry.check_name(name)
        unknown = set(self.against) - set(run.BASELINES)
        if unknown:
            raise ValueError(f"--against {sorted(unknown)}: choose from {', '.join(run.BASELINES)}")
        heads = "" if device != "cpu" else "-1h"
        wanted = self.cases or [f"{cases.HEADLINE}{heads}.k*"]
        chosen = {case.name: case for text in wanted for case in cases.select(text)}
        run.run(
            [*chosen.values()],
            device=device,
            dtype=dtype,
            rounds=self.rounds,
            backends=self.backends,
            others=self.against,
            results=self.rows("results"),
        )


@dataclass(frozen=True, kw_only=True)
class Tune(Rounds):
    """Measure which backend is fastest on this GPU, for backend='auto'."""

    extra: ClassVar[str] = "bench"
    rounds: Annotated[int, "ROUNDS"] = 7

    def run(self) -> None:
        """Print where the order is, which the next process goes by."""
        from skiparse.bench.op import tune

        device, dtype = self.place
        if device == "cpu":
            raise ValueError("tune is for a GPU, and torch finds none here; a CPU has its order")
        print(tune.tune(device=device, dtype=dtype, rounds=self.rounds))
