"""The named problems everybody is measured on: training shapes of the released model, by pattern.

A name reads ``<frames>x<height>x<width>[-<heads>h].k<k>.<pattern>[.skip].<fwd|fwdbwd>``: the video
in pixels, 24 heads unless said, the pattern, tokens in natural order unless ``skip``, forward
alone or forward and backward. 512 text tokens, head dimension 128, batch 1. Single-skip is the
same operation in either order, so it has no ``skip``.
"""

from __future__ import annotations

from dataclasses import dataclass

from skiparse.pattern import SkipPattern

TEXT_TOKENS = 512
HEAD_DIM = 128
SPARSITY = (2, 4, 8)

# pixels -> video tokens: an 8x8x8 VAE (1 + (frames - 1) / 8 latent frames), patches of 1x2x2
TOKENS = {
    "1x288x512": 1 * 18 * 32,
    "57x288x512": 8 * 18 * 32,
    "121x288x512": 16 * 18 * 32,
    "121x576x1024": 16 * 36 * 64,
}
HEADLINE = "121x576x1024"
HEADS = {"": 24, "-2h": 2, "-1h": 1}  # few heads: for machines without an accelerator


@dataclass(frozen=True)
class Case:
    """One problem: shape, pattern and direction."""

    video: str
    heads: int
    k: int
    kind: str  # "dense", "single" or "group"
    skip_order: bool
    backward: bool
    N: int
    T: int = TEXT_TOKENS
    D: int = HEAD_DIM
    B: int = 1

    @property
    def name(self) -> str:
        suffix = {count: text for text, count in HEADS.items()}[self.heads]
        pattern = "dense" if self.kind == "dense" else f"k{self.k}.{self.kind}"
        order = ".skip" if self.skip_order else ""
        return f"{self.video}{suffix}.{pattern}{order}.{'fwdbwd' if self.backward else 'fwd'}"

    @property
    def pattern(self) -> SkipPattern:
        """The pattern as it is in this case's token order."""
        if self.kind == "group" and self.skip_order:
            return SkipPattern.block(self.k, self.N)
        return {"single": SkipPattern.single, "group": SkipPattern.group}.get(
            self.kind, SkipPattern
        )(self.k)

    @property
    def ceiling(self) -> float:
        """The most it can gain over dense attention: the ratio of query-key pairs."""
        dense = SkipPattern.dense().pairs(self.N, self.T)
        return dense / self.pattern.pairs(self.N, self.T)


def _table() -> dict[str, Case]:
    cases = [
        Case(video, heads, k, kind, skip_order, backward, N)
        for video, N in TOKENS.items()
        for heads in HEADS.values()
        for backward in (False, True)
        for k, kind, skip_order in (
            (1, "dense", False),
            *((k, kind, skip) for k in SPARSITY
              for kind, skip in (("single", False), ("group", False), ("group", True))),
        )
    ]  # fmt: skip
    return {case.name: case for case in cases}


CASES = _table()


def select(text: str) -> list[Case]:
    """The cases whose name is ``text`` or begins with it, or that match it with ``*``.

    Raises:
        ValueError: if none does, naming a few that exist.
    """
    from fnmatch import fnmatchcase

    found = [c for name, c in CASES.items() if fnmatchcase(name, text) or name == text]
    if not found:
        some = ", ".join(list(CASES)[:3])
        raise ValueError(f"no case matches {text!r}; there are e.g. {some}; * stands for anything")
    return found
