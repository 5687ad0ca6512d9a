"""The named problems everybody is measured on: shapes of released models, by pattern.

A name reads ``<video>[-<heads>h][-b<batch>].k<k>.<pattern>[.skip].<fwd|fwdbwd>``: the video in
pixels, ``<frames>x<height>x<width>``; the heads and the batch where they are not the model's own
and 1; the pattern, tokens in natural order unless ``skip``; forward alone or forward and backward.
The head dimension is 128. Single-skip is the same operation in either order, so it has no
``skip``; nor has a length that ``k*k`` does not divide, for which there is no skip order. There
the last period is cut short, and no padding makes up for it.

Where the grid of tokens is given, there are also ``p<ratio>.<kind>``: rows and columns dealt out,
:class:`skiparse.GridPattern`. ``.skip`` is the order in which both kinds are views, for grids that
have it; others have ``.sorted``, the order of the kind. No text goes with them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from skiparse.pattern import (
    KINDS,
    Grid,
    GridPattern,
    SkipPattern,
    has_grid_order,
    has_skip_order,
)

HEAD_DIM = 128
SPARSITY = (2, 4, 8)
RATIOS = (2, 4)  # of grids


@dataclass(frozen=True)
class Video:
    """What a model makes of a video: tokens, beside how many text tokens, in how many heads."""

    tokens: int
    text: int
    heads: int
    grid: Grid | None = (
        None  # frames, rows and columns of tokens, where patterns of it are measured
    )


def _on_grid(frames: int, height: int, width: int, heads: int) -> Video:
    return Video(frames * height * width, 0, heads, (frames, height, width))


VIDEOS = {
    # Open-Sora Plan v1.5: an 8x8x8 VAE (1 + (frames - 1) / 8 latent frames), patches of 1x2x2
    "1x288x512": Video(1 * 18 * 32, 512, 24),
    "57x288x512": Video(8 * 18 * 32, 512, 24),
    "121x288x512": Video(16 * 18 * 32, 512, 24),
    "121x576x1024": Video(16 * 36 * 64, 512, 24),
    # Wan 2.1 14B (text in a cross-attention of its own): a 4x8x8 VAE, patches of 1x2x2
    "81x480x832": _on_grid(21, 30, 52, 40),
    "81x576x1024": _on_grid(21, 36, 64, 40),
    "81x720x1280": _on_grid(21, 45, 80, 40),
    "81x768x1344": _on_grid(21, 48, 84, 40),
    # HunyuanVideo, its video tokens alone: the same VAE and patches
    "117x768x1280": Video(30 * 48 * 80, 0, 24),
    "129x720x1280": _on_grid(33, 45, 80, 24),
    # of no model: so small that Triton's interpreter gets through it, for rehearsals
    "1x128x128": Video(1 * 8 * 8, 8, 1),
}
HEADLINE = "121x576x1024"
REHEARSAL = "1x128x128"
FEW_HEADS = {  # for machines without an accelerator
    "1x288x512": (2, 1),
    "57x288x512": (2, 1),
    "121x288x512": (2, 1),
    "121x576x1024": (2, 1),
    "81x480x832": (1,),
    "81x576x1024": (1,),
    "81x720x1280": (1,),
    "81x768x1344": (1,),
    "129x720x1280": (1,),
}
BATCHES = {HEADLINE: (8,), REHEARSAL: (2,)}


@dataclass(frozen=True)
class Case:
    """One problem: shape, pattern and direction."""

    video: str
    heads: int
    k: int  # of a grid, the ratio
    kind: str  # "dense", "single" or "group"
    skip_order: bool  # or, of a grid that has none, the order of the kind
    backward: bool
    N: int
    T: int
    D: int = HEAD_DIM
    B: int = 1
    grid: Grid | None = None

    @property
    def order(self) -> str:
        """How the tokens lie."""
        if not self.skip_order:
            return "natural"
        has_one = self.grid is None or has_grid_order(self.grid, self.k, "skip")
        return "skip" if has_one else self.kind

    @property
    def name(self) -> str:
        heads = "" if self.heads == VIDEOS[self.video].heads else f"-{self.heads}h"
        batch = "" if self.B == 1 else f"-b{self.B}"
        letter = "k" if self.grid is None else "p"
        pattern = "dense" if self.kind == "dense" else f"{letter}{self.k}.{self.kind}"
        order = {"natural": "", "skip": ".skip"}.get(self.order, ".sorted")
        end = "fwdbwd" if self.backward else "fwd"
        return f"{self.video}{heads}{batch}.{pattern}{order}.{end}"

    @property
    def pattern(self) -> SkipPattern | GridPattern:
        """The pattern as it is in this case's token order."""
        if self.grid is not None:
            return GridPattern(self.grid, self.k, self.kind, self.order)
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
        Case(
            video, heads, k, kind, skip_order, backward, about.tokens, about.text,
            B=batch, grid=grid,
        )
        for video, about in VIDEOS.items()
        for heads, batch in (
            *((heads, 1) for heads in (about.heads, *FEW_HEADS.get(video, ()))),
            *((about.heads, batch) for batch in BATCHES.get(video, ())),
        )
        for backward in (False, True)
        for k, kind, skip_order, grid in _patterns(about)
    ]  # fmt: skip
    return {case.name: case for case in cases}


def _patterns(about: Video) -> Iterator[tuple[int, str, bool, Grid | None]]:
    """``k``, pattern, whether in skip order, and the grid, of all that there are of a video."""
    yield 1, "dense", False, None
    for k in SPARSITY:
        yield k, "single", False, None
        yield k, "group", False, None
        if has_skip_order(about.tokens, k):
            yield k, "group", True, None
    for ratio, kind in itertools.product(RATIOS if about.grid else (), KINDS):
        yield ratio, kind, False, about.grid
        yield ratio, kind, True, about.grid


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
