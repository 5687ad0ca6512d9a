"""The call: which layers become sparse, in place, whole or not at all, and back again."""

from __future__ import annotations

import inspect
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from skiparse.models.data.atomic import check_writable, write_json
from skiparse.models.retrofit.cost import Cost, cost_of
from skiparse.models.retrofit.families import FAMILIES, Family, family_of
from skiparse.models.retrofit.layers import (
    KINDS,
    PATTERNS,
    AfterModule,
    AfterPatches,
    BeforeForward,
    Layer,
    State,
    processor_of,
    told,
)
from skiparse.models.retrofit.shared import AllTokens, BeforeBlock, OwnPatches, Sharing
from skiparse.parallel import rank_of

FILE = "skiparse.json"
_MARK = "_skiparse"  # the attribute of a model that is retrofitted


@dataclass(frozen=True)
class Sparsity:
    """What a transformer's layers attend to: all that is kept beside its weights.

    Args:
        pattern: ``"2d"``, rows and columns of every frame dealt out, or ``"1d"``, the tokens.
        ratio: p, for p * p sub-sequences in 2-D; k, for k of them in 1-D.
        kinds: of every layer: ``"dense"``, ``"single"`` or ``"group"``.

    Raises:
        ValueError: for other values.
    """

    pattern: str
    ratio: int
    kinds: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {PATTERNS}, got {self.pattern!r}")
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, int) or self.ratio < 1:
            raise ValueError(f"ratio must be a whole number above 0, got {self.ratio!r}")
        unknown = sorted({str(kind) for kind in self.kinds if kind not in KINDS})
        if unknown:
            raise ValueError(f"kinds must be of {KINDS}, got {unknown}")

    @property
    def sub_sequences(self) -> int:
        """How many of them a sparse layer has."""
        return self.ratio if self.pattern == "1d" else self.ratio * self.ratio

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``skiparse.json`` into a folder, as of a LoRA; it is there whole or not at all.

        Raises:
            ValueError: if it cannot be written.
        """
        path = Path(folder, FILE)
        check_writable(path)
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Sparsity:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is damaged, or says something else.
        """
        path = Path(folder, FILE)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; give a folder that save() wrote")
        try:
            return cls.of(json.loads(path.read_bytes()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} does not tell what is sparse: {error}") from error

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Sparsity:
        """From a table of settings, as of ``config["skiparse"]``."""
        if not isinstance(settings, dict) or set(settings) != {"pattern", "ratio", "kinds"}:
            raise ValueError(f"sparsity is told by pattern, ratio and kinds, got {settings!r}")
        return cls(**settings)

    def __str__(self) -> str:
        runs, first = [], 0
        for dense, run in itertools.groupby(self.kinds, lambda kind: kind == "dense"):
            found = list(run)
            last = first + len(found) - 1
            where = f"{first}-{last}" if last > first else str(first)
            runs.append(f"{where} {'dense' if dense else _named(found)}")
            first = last + 1
        return (
            f"{self.pattern} ratio {self.ratio}, {self.sub_sequences} sub-sequences: "
            f"layers {', '.join(runs)}"
        )


def _named(kinds: Sequence[str]) -> str:
    return " and ".join(kind for kind in KINDS if kind in kinds)


def schedule(layers: int, dense: tuple[int, int] | None = None) -> tuple[str, ...]:
    """Single-skip and group-skip in turn between dense ends; the kind of each of ``layers``.

    Args:
        layers: how many there are.
        dense: how many stay dense at the beginning and at the end; a tenth each if None.

    Raises:
        ValueError: for more dense layers than there are.

    Source: OSP-Next, arXiv 2605.28691, which keeps 4 and 4 of 40.
    """
    first, last = (layers // 10, layers // 10) if dense is None else dense
    if min(first, last) < 0 or first + last > layers:
        raise ValueError(f"dense must be two numbers >= 0, {layers} at most in all; got {dense}")
    sparse = tuple(("single", "group")[i % 2] for i in range(layers - first - last))
    return ("dense",) * first + sparse + ("dense",) * last


class Retrofit:
    """What :func:`retrofit` made: print it, ask what it costs, save it, undo it."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    @classmethod
    def of(cls, model: Any) -> Retrofit:
        """That of a transformer which is retrofitted; as of a deep copy of one.

        Raises:
            ValueError: if it is not.
        """
        found = cls.found(model)
        if found is None:
            raise ValueError(f"this {type(model).__name__} is not retrofitted")
        return found

    @classmethod
    def found(cls, model: Any) -> Retrofit | None:
        """The same, or None where there is none."""
        return cls([getattr(model, _MARK)]) if hasattr(model, _MARK) else None

    @property
    def sparsity(self) -> Sparsity:
        """Of all transformers.

        Raises:
            ValueError: if they differ; ask each of ``parts``.
        """
        found = {part.sparsity for part in self.parts}
        if len(found) > 1:
            raise ValueError("the transformers differ in sparsity; ask for parts[i].sparsity")
        return found.pop()

    def cost(self, *, frames: int, height: int, width: int) -> Cost:
        """What a forward of a clip of that size costs: of the first transformer, in seconds.

        Args:
            frames, height, width: of the clip, in frames and pixels.

        Raises:
            ValueError: for a size that does not make whole tokens.
        """
        part = self.parts[0]
        return cost_of(
            part.model, lambda twin: retrofit(twin, part.sparsity), frames, height, width
        )

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``skiparse.json`` there; ``retrofit(model, Sparsity.load(folder))`` reads it."""
        return self.sparsity.save(folder)

    def share(self, group: Any) -> None:
        """Let the processes of ``group`` share the tokens of every forward.

        They call the model with the same inputs, and each returns the whole output. If each
        computes the loss of all of it, gradients are to be *averaged* over the processes, as
        DistributedDataParallel and FSDP do. Of the layouts the cheapest is taken, layer by layer
        (:func:`skiparse.layout.route`). This is instead of ``enable_parallelism`` of diffusers,
        which exchanges heads in every layer; ``undo()`` ends it with the retrofit.

        Args:
            group: of torch.distributed, such as ``mesh["context"].get_group()``.

        Raises:
            ValueError: for a model of which it is not known what is token by token (that is known
                of Wan), if it is parallel already, and if this process is not in the group.
        """
        rank_of(group)
        for part in self.parts:
            part.check_share()
        for part in self.parts:
            part.share(group)

    @property
    def shared(self) -> bool:
        """Whether processes share the tokens of a transformer."""
        return any(part.state.sharing is not None for part in self.parts)

    def undo(self) -> None:
        """Make the models as they were: no hook, no attribute and no setting is left.

        Raises:
            ValueError: if it is undone, or if the model is parallel by now.
        """
        for part in self.parts:
            part.check_undo()
        for part in self.parts:
            part.undo()

    def __str__(self) -> str:
        return "\n".join(str(part) for part in self.parts)


class Part:
    """One transformer: what will be done to it, or was. Making one changes nothing."""

    def __init__(self, model: Any, family: Family, sparsity: Sparsity, reorder: bool) -> None:
        names = [*inspect.signature(type(model).forward).parameters][1:]
        sparse = set(sparsity.kinds) != {"dense"}
        ordered = reorder and sparse and family.last is not None
        self.model = model
        self.sparsity = sparsity
        self.state = State(family, sparsity.pattern, sparsity.ratio, sparsity.kinds, names, ordered)
        self.config = model.config.get("skiparse")
        self.processors: list[tuple[Any, Any, Any]] = []  # attention, its own, ours
        for depth, kind in enumerate(sparsity.kinds):
            if kind != "dense" or family.processor is not None:
                self.processors += self._made(depth, kind)
        self.handles: list[Any] = []

    def _made(self, depth: int, kind: str) -> list[tuple[Any, Any, Any]]:
        return [
            (attention, own, processor_of(own, Layer(self.state, kind, depth)))
            for attention in self.state.family.depths[depth]
            for own in [attention.processor]
        ]

    def apply(self) -> None:
        """Change the model."""
        state, family, model = self.state, self.state.family, self.model
        self._set_processors()
        before = BeforeForward(state)
        self.handles.append(model.register_forward_pre_hook(before, with_kwargs=True))

        def after(name: str, hook: Callable[..., Any]) -> None:
            self.handles.append(model.get_submodule(name).register_forward_hook(hook))

        if state.reorder and family.last is not None:
            for name in family.patches:
                after(name, AfterPatches(state))
            for name, dim in family.outputs.items():
                after(name, AfterModule(state, dim))
            after(family.last, AfterModule(state, 1, back=True))
        model.register_to_config(skiparse=asdict(self.sparsity))
        setattr(model, _MARK, self)

    def _set_processors(self) -> None:
        for attention, _, made in self.processors:
            attention.set_processor(made)
        self.state.processors = [(attention, made) for attention, _, made in self.processors]

    def check_share(self) -> None:
        """ValueError if the tokens of this model cannot be shared."""
        self.check_undo()
        if self.state.family.blocks is None:
            raise ValueError(
                f"the tokens of a {type(self.model).__name__} cannot be shared: it is not known "
                "what of it is token by token; use enable_parallelism of diffusers instead"
            )
        if self.state.sharing is not None:
            raise ValueError(
                f"the tokens of this {type(self.model).__name__} are shared already; undo() first"
            )

    def share(self, group: Any) -> None:
        """Let the processes of ``group`` share the tokens."""
        state, family, model = self.state, self.state.family, self.model
        assert family.blocks is not None
        assert family.last is not None
        if family.processor is None:  # dense layers kept their own
            for depth, kind in enumerate(self.sparsity.kinds):
                if kind == "dense":
                    self.processors += self._made(depth, kind)
            self._set_processors()
        state.sharing = Sharing(group)
        state.plans.clear()
        for name in family.patches:
            patches = model.get_submodule(name)
            self.handles.append(patches.register_forward_hook(OwnPatches(state.sharing)))
        for depth, block in enumerate(model.get_submodule(family.blocks)):
            before = BeforeBlock(state.sharing, depth)
            self.handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        last = model.get_submodule(family.last)
        self.handles.append(last.register_forward_hook(AllTokens(state.sharing)))

    def check_undo(self) -> None:
        """ValueError if it cannot be undone now."""
        if getattr(self.model, _MARK, None) is not self:
            raise ValueError(f"this retrofit of {type(self.model).__name__} is undone already")
        layers = [getattr(made, "skiparse_layer", None) for _, _, made in self.processors]
        if any(layer is not None and not isinstance(layer, Layer) for layer in layers):
            raise ValueError("hif8 was applied to the layers of this retrofit; undo() that first")
        if getattr(self.model, "_parallel_config", None) is not None:
            raise ValueError(
                "undo() comes before enable_parallelism, which has told the layers of this retrofit"
            )

    def undo(self) -> None:
        """Make the model as it was."""
        for handle in self.handles:
            handle.remove()
        for attention, own, made in self.processors:
            vars(own).update(told(made))  # as the backend that was set meanwhile
            attention.set_processor(own)
        delattr(self.model, _MARK)
        config = {k: v for k, v in self.model.config.items() if k != "skiparse"}
        if self.config is not None:
            config["skiparse"] = self.config
        self.model._internal_dict = type(self.model._internal_dict)(config)

    def __str__(self) -> str:
        order = "in skip order where the grid has one" if self.state.reorder else "in natural order"
        return f"{type(self.model).__name__}, {self.sparsity}; tokens {order}"


def retrofit(
    model: Any,
    pattern: str | Sparsity | None = None,
    *,
    ratio: int | None = None,
    dense: tuple[int, int] | None = None,
    kinds: Sequence[str] | None = None,
    reorder: bool = True,
    family: Family | None = None,
) -> Retrofit:
    """Make the self-attention of a transformer, or of all in a pipeline, sparse in place.

    Text queries, and those of other tokens that are not the video's, stay dense; a video token
    attends to its sub-sequence and to all of those.

    Args:
        model: a video transformer of diffusers, or a pipeline with such.
        pattern: ``"2d"`` or ``"1d"``, or a :class:`Sparsity`. Without it, nor any of the next
            three: what ``config["skiparse"]`` says, else 2-D.
        ratio: as of :class:`Sparsity`; 2 if not told.
        dense: how many layers stay dense at the beginning and at the end; see :func:`schedule`.
        kinds: instead of ``dense``, of every layer: ``"dense"``, ``"single"`` or ``"group"``.
        reorder: permute the tokens once a forward where model and grid allow it, instead of
            copying in every layer. It changes no result but for rounding.
        family: where a model that is not known has its tokens.

    Returns:
        What was made; keep it for ``undo()``.

    Raises:
        TypeError: for a model that is not known, or one whose attention has changed.
        ValueError: for values that do not fit, a second retrofit, and one after
            ``enable_parallelism``. In every case nothing was changed.
    """
    parts = [
        _part(transformer, pattern, ratio, dense, kinds, reorder, family)
        for transformer in _transformers(model, family)
    ]
    for part in parts:
        part.apply()
    return Retrofit(parts)


def _transformers(model: Any, family: Family | None) -> list[Any]:
    """Those of a pipeline, or the model itself."""
    if not hasattr(model, "components"):
        return [model]
    if family is not None:
        raise ValueError("family is of one transformer; retrofit those of the pipeline one by one")
    known = [
        part
        for part in model.components.values()
        if any(cls.__name__ in FAMILIES for cls in type(part).__mro__)
    ]
    if not known:
        names = ", ".join(type(part).__name__ for part in model.components.values())
        raise TypeError(
            f"no part of this {type(model).__name__} is known to retrofit: {names}; known are "
            f"{', '.join(FAMILIES)}"
        )
    return known


def _part(
    model: Any,
    pattern: str | Sparsity | None,
    ratio: int | None,
    dense: tuple[int, int] | None,
    kinds: Sequence[str] | None,
    reorder: bool,
    family: Family | None,
) -> Part:
    family = family_of(model) if family is None else family
    if hasattr(model, _MARK):
        raise ValueError(
            f"this {type(model).__name__} is retrofitted already; undo() that first, which "
            "Retrofit.of(model) finds"
        )
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            "retrofit() comes before enable_parallelism, which has to tell the new layers; load "
            "the model again"
        )
    layers = len(family.depths)
    untold = all(value is None for value in (pattern, ratio, dense, kinds))
    if isinstance(pattern, Sparsity):
        if any(value is not None for value in (ratio, dense, kinds)):
            raise ValueError("a Sparsity says it all; give no ratio, dense or kinds beside it")
        sparsity = pattern
    elif untold and model.config.get("skiparse") is not None:
        sparsity = Sparsity.of(dict(model.config["skiparse"]))
    else:
        if kinds is not None and dense is not None:
            raise ValueError(f"give kinds or dense={dense}, not both")
        sparsity = Sparsity(
            "2d" if pattern is None else pattern,
            2 if ratio is None else ratio,
            tuple(schedule(layers, dense) if kinds is None else kinds),
        )
    if len(sparsity.kinds) != layers:
        raise ValueError(
            f"kinds has {len(sparsity.kinds)} layers, but {type(model).__name__} has {layers}"
        )
    return Part(model, family, sparsity, reorder)
