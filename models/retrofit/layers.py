"""What a retrofit puts into a model: an order of its tokens, and the attention call of each layer.

Every layer keeps its own processor: norms, rotary encoding, gates, fused projections and LoRA are
those of the model, of whatever version. One call in it is another one, that of attention: its
function is made again with other globals (:func:`rebound`).

Why so, and not otherwise. A processor written anew for every family drifts away from diffusers in
silence. A backend registered there for sparse attention is lost with ``set_attention_backend``, in
silence too. To put our function into diffusers' modules would be a few lines shorter, but changes
them for every other model of the process. A function made again changes none, and a processor that
makes no such call is refused. Its one trap, torch.compile, has a test.
"""

from __future__ import annotations

import functools
import math
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

import skiparse
from skiparse import GridPattern, SkipPattern
from skiparse.models.retrofit.families import Family
from skiparse.models.retrofit.shared import Sharing, natural_pattern
from skiparse.pattern import Segment, grid_order, has_grid_order, has_skip_order, skip_order

KINDS = ("dense", "single", "group")
PATTERNS = ("1d", "2d")

Grid = tuple[int, int, int]
Video = tuple[Tensor, Tensor, Tensor]  # q, k and v, [B, tokens, H, D] each


# The grid of a forward.


@dataclass(frozen=True, eq=False)
class Plan:
    """How the tokens of one grid lie.

    ``shaped`` is an empty tensor ``[frames + 1, rows + 1, columns + 1, 0]``. For torch.compile a
    number that a module has is a constant, and a size from 2 on is a variable: so other grids make
    no new graphs.
    ``order`` is int64 ``[N]``, natural tokens by place, and ``inverse`` its way back; both None
    where the tokens keep their natural order, which is not ``ordered``.
    """

    shaped: Tensor
    ordered: bool
    order: Tensor | None
    inverse: Tensor | None

    @property
    def grid(self) -> Grid:
        """``(frames, rows, columns)`` of tokens."""
        frames, rows, columns, _ = self.shaped.shape
        return frames - 1, rows - 1, columns - 1

    @property
    def tokens(self) -> int:
        """How many tokens the video has."""
        frames, rows, columns = self.grid
        return frames * rows * columns


@torch.compiler.assume_constant_result
def _plan(grid: Grid, pattern: str, ratio: int, reorder: bool, device: torch.device) -> Plan:
    found: np.ndarray | None = None
    if reorder and pattern == "2d" and has_grid_order(grid, ratio, "skip"):
        found = grid_order(grid, ratio, "skip")
    elif reorder and pattern == "1d" and has_skip_order(math.prod(grid), ratio):
        found = skip_order(math.prod(grid), ratio)
    with torch.inference_mode(False):  # a tensor made in it could not serve a training step
        shaped = torch.empty(*(size + 1 for size in grid), 0)
        torch._dynamo.maybe_mark_dynamic(shaped, [0, 1, 2])
        if found is None:
            return Plan(shaped, False, None, None)
        order = torch.from_numpy(found).to(device)
        return Plan(shaped, True, order, order.argsort())


class State:
    """What the hooks and layers of one transformer share: the plan of the forward that runs.

    A backward with checkpointing runs layers again, by the plan of the last forward. So it has to
    come before a forward with another grid.
    """

    def __init__(
        self,
        family: Family,
        pattern: str,
        ratio: int,
        kinds: tuple[str, ...],
        names: Sequence[str],
        reorder: bool,
    ) -> None:
        self.family = family
        self.pattern = pattern
        self.ratio = ratio
        self.kinds = kinds
        self.names = list(names)  # of the arguments of forward
        self.reorder = reorder
        self.plans: dict[tuple[Grid, torch.device], Plan] = {}
        self.now: Plan | None = None
        self.parallel: Any = None  # diffusers' ContextParallelConfig
        self.sharing: Sharing | None = None
        self.processors: list[tuple[Any, Any]] = []  # attention modules, and what we gave them

    def enter(self, grid: Sequence[int], device: torch.device) -> None:
        """Take the plan of this grid, for all that follows."""
        frames, height, width = grid
        key = ((frames, height, width), device)
        if key not in self.plans:
            reorder = self.reorder and self.sharing is None
            self.plans[key] = _plan(key[0], self.pattern, self.ratio, reorder, device)
        self.now = self.plans[key]

    @property
    def plan(self) -> Plan:
        """The plan of the forward that runs."""
        if self.now is None:
            raise RuntimeError("a layer of a retrofitted model was called outside its forward")
        return self.now

    def pattern_of(self, kind: str) -> SkipPattern | GridPattern:
        """The pattern of a sparse kind of layer, for tokens in the order of the plan."""
        plan = self.plan
        if not plan.ordered:
            return natural_pattern(plan.grid, self.pattern, self.ratio, kind)
        if self.pattern == "2d":
            return GridPattern(plan.grid, self.ratio, kind, "skip")
        if kind == "single":
            return SkipPattern.single(self.ratio)
        return SkipPattern.block(self.ratio, plan.tokens)

    def permuted(self, x: Any, index: Tensor | None, dim: int) -> Any:
        """``x`` with its video tokens in another order; what has no tokens is left alone."""
        if isinstance(x, tuple | list):
            return type(x)(self.permuted(y, index, dim) for y in x)
        tokens = self.plan.tokens
        if index is None or not isinstance(x, Tensor) or x.ndim <= dim or x.shape[dim] < tokens:
            return x
        others = x.shape[dim] - tokens
        if others == 0:
            return x.index_select(dim, index)
        if self.family.others == "first":
            return torch.cat(
                [x.narrow(dim, 0, others), x.narrow(dim, others, tokens).index_select(dim, index)],
                dim,
            )
        return torch.cat(
            [x.narrow(dim, 0, tokens).index_select(dim, index), x.narrow(dim, tokens, others)], dim
        )


# Hooks are objects that hold the state: so a deep copy of the model has one of its own.


class BeforeForward:
    """Finds the grid, and puts the arguments that have tokens in order."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        state = self.state
        for attention, processor in state.processors:
            if attention.processor is not processor:
                raise ValueError(
                    f"a layer has got a {type(attention.processor).__name__} since the retrofit; "
                    "undo() it, set processors or fuse projections, and retrofit again"
                )
        given = dict(zip(state.names, args, strict=False)) | kwargs
        state.enter(state.family.grid(model.config, given), given["hidden_states"].device)
        state.parallel = getattr(model._parallel_config, "context_parallel_config", None)
        if state.sharing is not None:
            _check_shared(state, given)
            grid, heads = state.plan.grid, state.processors[0][0].heads
            state.sharing.enter(grid, state.pattern, state.ratio, state.kinds, heads)
        for name, dim in state.family.arguments.items():
            if given.get(name) is not None:
                given[name] = state.permuted(given[name], state.plan.order, dim)
        return (), given


def _check_shared(state: State, given: dict[str, Any]) -> None:
    """ValueError for what has tokens beside the latents."""
    times = given.get("timestep")
    if state.parallel is not None:
        raise ValueError("the processes share tokens already; do not call enable_parallelism")
    if isinstance(times, Tensor) and times.ndim > 1:
        raise ValueError(
            f"timestep has shape {list(times.shape)}, one for each token, which processes that "
            "share tokens do not have; give one for each sample"
        )


class AfterModule:
    """Puts the tokens of a module's output in order, or back."""

    def __init__(self, state: State, dim: int, *, back: bool = False) -> None:
        self.state, self.dim, self.back = state, dim, back

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        plan = self.state.plan
        index = plan.inverse if self.back else plan.order
        if index is None:
            return None
        if isinstance(out, tuple | list):
            return type(out)(self._permuted(x, index) for x in out)
        return self._permuted(out, index)

    def _permuted(self, x: Tensor, index: Tensor) -> Tensor:
        parallel = self.state.parallel
        if parallel is None or x.shape[self.dim] >= self.state.plan.tokens:
            return self.state.permuted(x, index, self.dim)
        # This process has its part of the natural order, and gets its part of the other.
        group = parallel._flattened_mesh.get_group()
        whole = collectives.all_gather_tensor(x.contiguous(), self.dim, group)
        parts = whole.index_select(self.dim, index).chunk(group.size(), self.dim)
        return parts[group.rank()]


class AfterPatches:
    """Puts the patches ``[B, C, frames, rows, columns]`` that become tokens in order."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        order = self.state.plan.order
        if order is None:
            return None
        # Made contiguous, or a batch of one has other strides, and its own graph when compiled.
        return out.flatten(2).index_select(2, order).unflatten(2, out.shape[2:])


# One layer.


@dataclass(eq=False)
class Layer:
    """The attention of one layer: whom its video tokens attend to, and all that is not video."""

    state: State
    kind: str
    depth: int = 0

    def dispatch(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        scale: float | None = None,
        backend: Any = None,
        parallel: Any = None,
    ) -> Tensor:
        """In the place of diffusers' ``dispatch_attention_fn``.

        Args:
            query, key, value: ``[B, S, H, D]``, the video's tokens in the order of the plan, and
                others first or last, as the family has them.
            attn_mask: bool ``[B, 1, 1, S]``; it hides keys that are not the video's, if any.
            scale: factor on the scores.
            backend: of diffusers, for every sub-sequence; None: :func:`skiparse.attention`.
            parallel: diffusers' configuration of parallelism, or None.

        Raises:
            ValueError: for tokens that are not of the grid, a mask over pairs of video tokens, and
                parallelism over anything but heads.
        """
        if self.state.sharing is not None:
            if attn_mask is not None or backend is not None:
                raise ValueError(
                    f"processes that share tokens have no mask and no attention backend of "
                    f"diffusers; got backend={backend} and a mask of "
                    f"{None if attn_mask is None else list(attn_mask.shape)}"
                )
            return self.state.sharing.attention(self.depth, query, key, value, scale=scale)
        if self.kind == "dense":
            return dispatch_attention_fn(
                query, key, value, attn_mask, scale=scale, backend=backend, parallel_config=parallel
            )
        plan, where = self.state.plan, self.state.family.others
        if parallel is not None:
            return self._parallel((query, key, value), attn_mask, scale, backend, parallel)
        others = query.shape[1] - plan.tokens
        if attn_mask is not None and (others == 0 or attn_mask.shape[1:3] != (1, 1)):
            raise _masked(attn_mask)
        pattern = self.state.pattern_of(self.kind)
        if others == 0:
            return _video((query, key, value), pattern, scale, backend)
        if where is None or others < 0:
            raise ValueError(
                f"attention over {query.shape[1]} tokens, but the grid {plan.grid} has "
                f"{plan.tokens}; the retrofit does not know the others, undo() it"
            )
        first = where == "first"
        cut = [others, plan.tokens] if first else [plan.tokens, others]
        q, k, v = (x.split(cut, 1)[first] for x in (query, key, value))
        text_q, text_k, text_v = (x.split(cut, 1)[not first] for x in (query, key, value))
        text_mask = None if attn_mask is None else attn_mask[:, 0, 0].split(cut, 1)[not first]
        video = _joint((q, k, v), (text_k, text_v), text_mask, pattern, scale, backend)
        text = dispatch_attention_fn(text_q, key, value, attn_mask, scale=scale, backend=backend)
        return torch.cat([text, video] if first else [video, text], 1)

    def _parallel(
        self, video: Video, mask: Tensor | None, scale: float | None, backend: Any, parallel: Any
    ) -> Tensor:
        """Each process has a part of the tokens; here all tokens of a part of the heads (Ulysses).

        Source: DeepSpeed-Ulysses, arXiv 2309.14509.
        """
        if mask is not None:
            raise _masked(mask)
        config = parallel.context_parallel_config
        heads = video[0].shape[2]
        ways = config.ulysses_degree
        if config.ring_degree > 1 or config.ulysses_anything or heads % ways:
            raise ValueError(
                f"sparse layers run in parallel over heads, in equal parts: got ring_degree="
                f"{config.ring_degree}, ulysses_degree={ways} and ulysses_anything="
                f"{config.ulysses_anything} for {heads} heads; give ulysses_degree alone, a "
                "divisor of the heads"
            )
        group = config._ulysses_mesh.get_group()
        q, k, v = (_exchanged(x, 2, 1, group) for x in video)
        if q.shape[1] != self.state.plan.tokens:
            raise ValueError(
                f"attention over {q.shape[1]} tokens of all processes, but the grid "
                f"{self.state.plan.grid} has {self.state.plan.tokens}; call the model without "
                "conditions, or without enable_parallelism"
            )
        pattern = self.state.pattern_of(self.kind)
        return _exchanged(_video((q, k, v), pattern, scale, backend), 1, 2, group)


def _masked(mask: Tensor) -> ValueError:
    return ValueError(
        f"a mask {list(mask.shape)} over pairs of video tokens has no sparse form; make this layer "
        "dense, or call the model without it"
    )


def _video(
    video: Video, pattern: SkipPattern | GridPattern, scale: float | None, backend: Any
) -> Tensor:
    """Video tokens over their sub-sequences: ``[B, N, H, D]``."""
    if backend is None:
        return skiparse.attention(*video, pattern, scale=scale)
    return _by_backend(video, None, None, pattern, scale, backend)


def _joint(
    video: Video,
    text: tuple[Tensor, Tensor],
    text_mask: Tensor | None,
    pattern: SkipPattern | GridPattern,
    scale: float | None,
    backend: Any,
) -> Tensor:
    """Video tokens over their sub-sequences and the keys of all others: ``[B, N, H, D]``."""
    if backend is None:
        return skiparse.joint_attention(
            *video, None, *text, pattern, text_mask=text_mask, scale=scale
        )[0]
    return _by_backend(video, text, text_mask, pattern, scale, backend)


def _all_keys(text_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The key mask of the text as one of all keys: bool ``[B, 1, 1, N + T]``, video first."""
    if text_mask is None:
        return None
    return F.pad(text_mask, (tokens, 0), value=True)[:, None, None]


# A dense backend of diffusers over sub-sequences.


def _by_backend(
    video: Video,
    text: tuple[Tensor, Tensor] | None,
    text_mask: Tensor | None,
    pattern: SkipPattern | GridPattern,
    scale: float | None,
    backend: Any,
) -> Tensor:
    """Sub-sequences as heads or batch entries of a dense backend; views where they can be."""
    N, n = video[0].shape[1], pattern.sparsity
    segments = [segment for segment in pattern.segments(N) if segment.length]

    def dense(q: Tensor, k: Tensor, v: Tensor, repeat: Callable[[Tensor], Tensor]) -> Tensor:
        mask = None
        if text is not None:
            k, v = torch.cat([k, repeat(text[0])], 1), torch.cat([v, repeat(text[1])], 1)
        if text_mask is not None:
            rows = text_mask.repeat_interleave(len(q) // len(text_mask), 0)
            mask = _all_keys(rows, q.shape[1])
        return dispatch_attention_fn(q, k, v, mask, scale=scale, backend=backend)

    if _taking_turns(segments, n):
        q, k, v = (x.unflatten(1, (-1, n)).flatten(2, 3) for x in video)  # [B, N / n, n * H, D]
        out = dense(q, k, v, lambda y: y.repeat(1, 1, n, 1))
        return out.unflatten(2, (n, -1)).flatten(1, 2)

    index = None if _in_pieces(segments) else _by_sub(pattern, segments, video[0].device)
    if index is not None:
        video = (video[0][:, index], video[1][:, index], video[2][:, index])
    parts, start = [], 0
    for segment in segments:
        size = (segment.number, segment.length)
        tokens = math.prod(size)
        q, k, v = (x.narrow(1, start, tokens).unflatten(1, size).flatten(0, 1) for x in video)
        repeat = functools.partial(torch.repeat_interleave, repeats=segment.number, dim=0)
        parts.append(dense(q, k, v, repeat).unflatten(0, (-1, segment.number)).flatten(1, 2))
        start += tokens
    out = torch.cat(parts, 1)
    return out if index is None else out[:, index.argsort()]


def _taking_turns(segments: Sequence[Segment], n: int) -> bool:
    """Whether a token of each sub-sequence follows a token of the one before, to the end."""
    boxes = [box for segment in segments for box in segment.boxes]
    return len(boxes) == 1 and boxes[0].shape[::2] == (n, 1) and boxes[0].strides[:2] == (1, n)


def _in_pieces(segments: Sequence[Segment]) -> bool:
    """Whether each sub-sequence is one piece, behind the one before."""
    return all(
        len(segment.boxes) == 1 and segment.boxes[0].shape[1:] == (1, segment.length)
        for segment in segments
    )


def _by_sub(
    pattern: SkipPattern | GridPattern, segments: Sequence[Segment], device: torch.device
) -> Tensor:
    """The tokens, one sub-sequence behind the other: int64 ``[N]``."""
    places = [torch.arange(segment.length, device=device) for segment in segments]
    return torch.cat(
        [
            pattern.token(s, place)
            for segment, place in zip(segments, places, strict=True)
            for s in segment.subs
        ]
    )


def _exchanged(x: Tensor, scatter: int, gather: int, group: Any) -> Tensor:
    """All-to-all in equal parts: one dimension is dealt out, another comes together."""
    parts = torch.cat([part.contiguous()[None] for part in x.chunk(group.size(), scatter)])
    flat = collectives.all_to_all_single_autograd(parts.flatten(0, 1), None, None, group)
    return torch.cat(list(flat.unflatten(0, (group.size(), -1)).unbind(0)), gather)


# One call of a processor made another.


class _Now(threading.local):
    """The layer that a processor of this thread computes."""

    def __init__(self) -> None:
        self.layer: Layer | None = None  # set here: an attribute that comes later is a new graph


_now = _Now()


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """``dispatch_attention_fn`` of diffusers, by the layer that computes."""
    if dropout_p or is_causal or enable_gqa or attention_kwargs:
        raise ValueError(
            f"sparse attention has no dropout_p={dropout_p}, is_causal={is_causal}, enable_gqa="
            f"{enable_gqa} or attention_kwargs={attention_kwargs}; make the layer dense"
        )
    layer = _now.layer
    assert layer is not None
    return layer.dispatch(
        query, key, value, attn_mask, scale=scale, backend=backend, parallel=parallel_config
    )


class _Functional:
    """``F`` of a processor that calls PyTorch's attention, ``[B, H, S, D]``."""

    @staticmethod
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return _dispatch(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)


_STANDS_IN: dict[str, dict[str, Any]] = {
    "dispatch_attention_fn": {"dispatch_attention_fn": _dispatch},
    "scaled_dot_product_attention": {"F": _Functional},
}


@functools.cache
def rebound(cls: type, call: str) -> type:
    """A class of processors derived from ``cls``, whose attention call is that of a layer.

    Raises:
        TypeError: if ``cls`` makes no such call.
    """
    own = cls.__call__
    if not isinstance(own, types.FunctionType) or call not in own.__code__.co_names:
        raise TypeError(
            f"{cls.__name__} of this diffusers does not call {call}; skiparse has to learn how it "
            "attends, please open an issue"
        )
    # torch.compile finds globals by the name of their module, or if they have none by themselves.
    # With their name it would take diffusers' own, and sparse layers would be dense, in silence.
    scope = {**own.__globals__, **_STANDS_IN[call]}
    del scope["__name__"]
    code = types.FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    code.__kwdefaults__ = own.__kwdefaults__

    @functools.wraps(own)  # diffusers looks at the signature
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, _now.layer = _now.layer, self.skiparse_layer
        try:
            return code(self, *args, **kwargs)
        finally:
            _now.layer = before

    def __reduce__(self: Any) -> Any:
        return _blank, (cls, call), self.__dict__

    own_name = f"Skiparse{cls.__name__}"
    return type(own_name, (cls,), {"__call__": __call__, "__reduce__": __reduce__})


def _blank(cls: type, call: str) -> Any:
    """A processor of :func:`rebound` without anything in it: for pickles, and deep copies."""
    made = rebound(cls, call)
    return object.__new__(made)


def processor_of(own: Any, layer: Layer) -> Any:
    """The processor of a layer, with all that the model's ``own`` was told."""
    family = layer.state.family
    if family.processor is None:
        return rebound_to(own, layer, family.call)
    made = family.processor(layer.dispatch)
    vars(made).update(vars(own))
    return made


def rebound_to(own: Any, layer: Any, call: str) -> Any:
    """A processor as ``own``, with all that it was told, whose attention is ``layer.dispatch``.

    Raises:
        TypeError: if ``own`` makes no such call.
        ValueError: if it is one of these itself.
    """
    if hasattr(own, "skiparse_layer"):
        raise ValueError(
            f"a layer has a {type(own).__name__}: another attention was put in its place already, "
            "as by retrofit or hif8; undo() that, and put hif8 last"
        )
    made = _blank(type(own), call)
    vars(made).update(vars(own))
    made.skiparse_layer = layer
    return made


def told(made: Any) -> dict[str, Any]:
    """What a processor of ours was told meanwhile that goes back to the model's own."""
    return {k: v for k, v in vars(made).items() if k not in ("skiparse_layer", "attend")}
