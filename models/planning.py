"""What processes that share the tokens of a video send each other: the table of ``skiparse plan``.

Counted, not measured: the formulas of :mod:`skiparse.layout`, which the tests hold to what is sent
on gloo, element by element. One unit is a vector of every token that goes to another process once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from skiparse import GridPattern, SkipPattern
from skiparse.layout import Layout, Route, Shared, route
from skiparse.models.retrofit.model import schedule
from skiparse.models.sizes import check as check_size
from skiparse.models.suv import sparsity
from skiparse.models.suv.config import PRESETS
from skiparse.models.suv.plan import route_of

OSP_NEXT = "osp-next"  # Wan 2.1 of 14B, sparse in 2-D as released
NAMES = (*PRESETS, OSP_NEXT)
_BYTES = 2  # of a number in bfloat16
_TEXT = 512  # tokens


@dataclass(frozen=True)
class Context:
    """A model whose tokens several processes share.

    Args:
        name: of the model.
        route: of its layers.
        head_dim: of attention.
        text: tokens of text that attend with the video's, and need an all-reduce in each layer.
    """

    name: str
    route: Route
    head_dim: int
    text: int

    @classmethod
    def of(cls, name: str, shape: Sequence[int], processes: int) -> Context:
        """By the name of a preset, for a clip ``(frames, height, width)`` in frames and pixels.

        Raises:
            ValueError: for another name, a shape that does not make whole tokens, or fewer
                processes than two.
        """
        if name not in NAMES:
            raise ValueError(f"--preset {name}: give one of {', '.join(NAMES)}")
        if processes < 2:
            raise ValueError(f"--context-parallel {processes}: give two processes or more")
        frames, height, width = shape
        if name == OSP_NEXT:
            return cls(name, _osp_next((frames, height, width), processes), 128, 0)
        sizes = PRESETS[name]
        tokens = sparsity.tokens((frames, height, width))
        layers, skipped = tuple(sizes["num_layers"]), tuple(sizes["sparsity"])
        made = route_of(tokens, layers, skipped, sizes["num_heads"], True, processes)
        return cls(name, made, sizes["head_dim"], _TEXT)

    @property
    def processes(self) -> int:
        """How many share the tokens."""
        return self.route.layouts[0].processes

    @property
    def tokens(self) -> int:
        """Of the video."""
        return self.route.layouts[0].tokens

    def units(self, sent: int) -> float:
        """Heads of tokens as vectors of all tokens."""
        return sent / self.route.heads / self.tokens

    def gibibytes(self, sent: int) -> float:
        """What one process sends in a forward of one sample, in bfloat16, on average."""
        return sent * self.head_dim * _BYTES / self.processes / 2**30

    @property
    def uneven(self) -> float:
        """The tokens of the process that has most, times its even share, in the worst layer."""
        most = max(max(layout.sizes) for layout in self.route.layouts)
        return most * self.processes / self.tokens

    def rows(self) -> Iterator[tuple[str, str, str, str, str]]:
        """Of each layer: number, pattern, layout, what moves before it, what it exchanges."""
        made = self.route
        for i, (pattern, layout) in enumerate(zip(made.patterns, made.layouts, strict=True)):
            move = self.units(made.moves[i] * made.heads)
            meet = self.units(layout.sent(pattern, made.heads))
            yield str(i), _named(pattern), _placed(layout), _shown(move), _shown(meet)

    def __str__(self) -> str:
        made = self.route
        table = [("layer", "attends by", "tokens lie by", "moves", "heads"), *self.rows()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        share = f"{self.uneven:.3f} times its share at most"
        lines = [f"{self.name}: {self.tokens:,} tokens for {self.processes} processes, {share}", ""]
        for row in table:
            words = (word.ljust(width) for word, width in zip(row, widths, strict=True))
            lines.append("  ".join(words).rstrip())
        lines.append(
            "\nsent in a forward, as vectors of all tokens and by one process in bfloat16; a "
            "backward sends as much again"
        )
        for name, sent in (("this plan", made.sent), ("Ulysses everywhere", made.ulysses)):
            size = self.gibibytes(sent)
            lines.append(f"  {name:18}  {self.units(sent):7.2f}  {size:6.2f} GiB")
        ratio = made.ulysses / made.sent if made.sent else float("inf")
        lines.append(f"  {ratio:.2f}x less")
        if self.text:
            size = self.text * made.heads * self.head_dim * _BYTES / 2**20
            lines.append(
                f"beside it the mean of {self.text} text tokens: an all-reduce of {size:.1f} MiB "
                f"in each of {len(made.layouts)} layers"
            )
        return "\n".join(lines)


def _osp_next(shape: tuple[int, int, int], processes: int) -> Route:
    frames, height, width = shape
    check_size(height, width, frames, rows=16, columns=16, time=4)
    grid = ((frames - 1) // 4 + 1, height // 16, width // 16)
    layers: list[Shared] = [
        SkipPattern.dense() if kind == "dense" else GridPattern(grid, 2, kind)
        for kind in schedule(40, (4, 4))
    ]
    return route(layers, grid[0] * grid[1] * grid[2], processes, 40)


def _named(pattern: Shared) -> str:
    if pattern.sparsity == 1:
        return "dense"
    if isinstance(pattern, GridPattern):
        return f"{pattern.kind} {pattern.ratio}x{pattern.ratio}"
    return f"{'single' if pattern.run == 1 else 'group'} {pattern.sparsity}"


def _placed(layout: Layout) -> str:
    if layout.pattern.sparsity == 1:
        return "turns"
    size = layout.processes // layout.teams
    return _named(layout.pattern) + (f", teams of {size}" if size > 1 else "")


def _shown(units: float) -> str:
    return f"{units:.3f}" if units else ""
