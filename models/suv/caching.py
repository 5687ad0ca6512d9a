"""Which of diffusers' caches fit a SUV, and how they are put in.

Attention hardly changes from one step of sampling to the next, so it may be taken from the step
before (Pyramid Attention Broadcast) or continued from some (TaylorSeer). Both ask one layer alone.

FirstBlockCache leaves out all blocks but the first where that did about what it did before, and
adds what they did then. The outputs of the first stages come back in the last ones here, so what
can be left out is what is nested in a pair of them: all stages but the first and the last. The
first stage decides. The last is always computed; it sees the first one's output of now.

Others watch a row of blocks in ways that were not made to fit, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    ModelHook,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_taylorseer_cache,
)
from diffusers.hooks.first_block_cache import _FBC_BLOCK_HOOK, _FBC_LEADER_BLOCK_HOOK
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from skiparse.models.suv.plan import SharedLayer

CACHES = "a PyramidAttentionBroadcastConfig, a TaylorSeerCacheConfig or a FirstBlockCacheConfig"
OF_WEIGHTS = ("group_offloading", "layerwise_casting")
ATTENTION, BLOCK, LAST = r"stages\.\d+\.\d+\.attn", r"stages\.\d+\.\d+", "proj_out"


class Hooks(HookRegistry):  # type: ignore[misc]  # diffusers' are untyped
    """diffusers' hooks of a whole SUV, or of what stands for its blocks: those that fit it."""

    def register_hook(self, hook: ModelHook, name: str) -> None:
        """As of any module; of diffusers' hooks only those that move and cast weights.

        Raises:
            ValueError: for its others, such as those of caches.
        """
        _, _, kind = type(hook).__module__.partition("diffusers.hooks.")
        if kind and kind not in OF_WEIGHTS:
            raise ValueError(
                f"a SUV has no row of blocks, nor attention of diffusers', that a "
                f"{type(hook).__name__} could be put into; call enable_cache of the model, with "
                f"{CACHES}; or set_context_parallel for processes that share tokens"
            )
        super().register_hook(hook, name)


class Hooked:
    """A module whose hooks of diffusers' are :class:`Hooks`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_diffusers_hook":  # the first that each of its functions does
            value = Hooks(self)
        super().__setattr__(name, value)


class NoBlock(Hooked, nn.Module, AttentionModuleMixin):  # type: ignore[misc]  # diffusers' are untyped
    """What diffusers' own functions find where they look for a block, or for attention: a refusal.

    ``apply_first_block_cache(model, ...)`` and the others go by names and classes of diffusers',
    of which an SUV has none; most of them would say nothing and do nothing.
    """

    processor = None  # no attention either


def no_row() -> nn.ModuleList:
    """For the name ``blocks``: a first and a last, and in them the names that patterns look for."""
    row = [NoBlock(), NoBlock()]
    for block in row:
        block.attn, block.stages = NoBlock(), NoBlock()
    return nn.ModuleList(row)


@contextmanager
def row_aside(model: nn.Module) -> Iterator[None]:
    """Without it for a while: it holds no weights, so what moves them has nothing to do there."""
    modules = model._modules
    model._modules = {name: module for name, module in modules.items() if name != "blocks"}
    try:
        yield
    finally:
        model._modules = modules


def apply(model: nn.Module, config: Any) -> Any:
    """Put a cache into ``model``; the config of it, with the names of the layers it is in.

    Raises:
        ValueError: for a cache that does not fit, or a setting that would have no effect.
    """
    if isinstance(config, PyramidAttentionBroadcastConfig):
        return _broadcast(model, config)
    if isinstance(config, TaylorSeerCacheConfig):
        config = _named(config)
        apply_taylorseer_cache(model, config)
        return config
    if isinstance(config, FirstBlockCacheConfig):
        return _first_stage(model, config)
    raise ValueError(
        f"{type(config).__name__} does not fit a SUV, whose stages come back as in a U-Net; take "
        f"{CACHES}"
    )


def _broadcast(
    model: nn.Module, config: PyramidAttentionBroadcastConfig
) -> PyramidAttentionBroadcastConfig:
    """diffusers' hook on every attention; diffusers itself looks for its own classes.

    Names that a config looks for, if they are not those of diffusers, choose among ours.
    """
    for field in fields(config):
        own = field.name.startswith(("spatial_attention_block_skip", "spatial_attention_timestep"))
        own |= field.name in ("current_timestep_callback", "spatial_attention_block_identifiers")
        if not own and getattr(config, field.name) != field.default:
            raise ValueError(
                f"{field.name} concerns nothing here: SUV has one attention, of space, time and "
                "text together; set the ranges of spatial_attention"
            )
    if config.current_timestep_callback is None:
        raise ValueError("current_timestep_callback is needed: lambda: pipe.current_timestep")
    if config.spatial_attention_block_skip_range is None:
        config = replace(config, spatial_attention_block_skip_range=2)
    names = [name for name, _ in model.named_modules() if re.fullmatch(ATTENTION, name)]
    asked = config.spatial_attention_block_identifiers
    if asked != PyramidAttentionBroadcastConfig.spatial_attention_block_identifiers:
        names = [name for name in names if any(re.search(one, name) for one in asked)]
        if not names:
            raise ValueError(
                f"spatial_attention_block_identifiers={asked}: no attention here has such a name; "
                "leave them out for all, or give some like 'stages.3'"
            )
    for name, module in model.named_modules():
        if name in names:
            hook = PyramidAttentionBroadcastHook(
                config.spatial_attention_timestep_skip_range,
                config.spatial_attention_block_skip_range,
                config.current_timestep_callback,
            )
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(hook, "pyramid_attention_broadcast")
    return config


def _first_stage(model: Any, config: FirstBlockCacheConfig) -> FirstBlockCacheConfig:
    stages = list(model.stages)
    if len(stages) < 3:
        raise ValueError(
            f"{type(config).__name__} leaves out what is between the first stage and the last; "
            f"this model has {len(stages)}"
        )
    states = StateManager(Reuse)
    for place, stage in enumerate(stages[:-1]):
        hook = FirstStage(states, config.threshold)
        if place:
            hook = InnerStage(states, enters=place == 1, leaves=place == len(stages) - 2)
        registry = HookRegistry.check_if_exists_or_initialize(stage)
        registry.register_hook(hook, _FBC_BLOCK_HOOK if place else _FBC_LEADER_BLOCK_HOOK)
    return config


class Reuse(BaseState):  # type: ignore[misc]  # diffusers' are untyped
    """What is known of the last step that was computed whole, and of this one."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget it."""
        self.first: Tensor | None = None  # what the first stage added to the video then
        self.inner: tuple[Tensor, Tensor] | None = None  # what those behind it added, to both
        self.entered: tuple[Tensor, Tensor, Any] | None = None  # video, text, order; of now
        self.whole = True  # whether this step is computed whole


class FirstStage(ModelHook):  # type: ignore[misc]
    """Computes the first stage, and decides by what it did."""

    _is_stateful = True

    def __init__(self, states: StateManager, threshold: float) -> None:
        super().__init__()
        self.states, self.threshold = states, threshold

    def new_forward(self, module: nn.Module, video: Tensor, *others: Any) -> Any:
        """As the stage's."""
        if isinstance(others[3][0], SharedLayer):
            raise ValueError(
                "a FirstBlockCacheConfig is not for tokens that processes share, each of which "
                "would decide by its own; disable_cache(), or set_context_parallel(None)"
            )
        state, found = self.states.get_state(), self.fn_ref.original_forward(video, *others)
        added = found[0] - video
        state.whole = state.inner is None or self._moved(added, state.first)
        if state.whole:
            state.first, state.inner = added, None
        return found

    @torch.compiler.disable  # it looks at numbers
    def _moved(self, added: Tensor, before: Tensor) -> bool:
        change = (added - before).abs().mean() / before.abs().mean()
        return not bool(change <= self.threshold)  # so is NaN

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Begin anew."""
        self.states.reset()
        return module


class InnerStage(ModelHook):  # type: ignore[misc]
    """Computes a stage in a step that is whole; else the last of them adds what they added then."""

    _is_stateful = True

    def __init__(self, states: StateManager, *, enters: bool, leaves: bool) -> None:
        super().__init__()
        self.states, self.enters, self.leaves = states, enters, leaves

    def new_forward(self, module: nn.Module, video: Tensor, text: Tensor, *others: Any) -> Any:
        """As the stage's."""
        state, order = self.states.get_state(), others[1]  # tables of an order are made once
        if self.enters:
            state.entered = video, text, order
        if state.whole:
            found = self.fn_ref.original_forward(video, text, *others)
        else:
            found = video, text, []  # as of a stage without experts
        if not self.leaves:
            return found
        before = state.entered
        if before[2] is not order:
            raise ValueError(
                "a FirstBlockCacheConfig adds what the stages between the first and the last did "
                "to tokens in the order in which they come in, and they leave in another; give "
                "the second stage and the last but one the same sparsity, by set_sparsity"
            )
        if state.whole:
            state.inner = found[0] - before[0], found[1] - before[1]
            return found
        return before[0] + state.inner[0], before[1] + state.inner[1], []

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Begin anew."""
        self.states.reset()
        return module


def _named(config: TaylorSeerCacheConfig) -> TaylorSeerCacheConfig:
    """With the names of our layers, where the config has none itself."""
    named = config.cache_identifiers or config.skip_predict_identifiers
    if not config.use_lite_mode:
        return config if named else replace(config, cache_identifiers=[ATTENTION])
    if named:
        raise ValueError("use_lite_mode=True names the modules itself; leave identifiers out")
    return replace(
        config, use_lite_mode=False, skip_predict_identifiers=[BLOCK], cache_identifiers=[LAST]
    )
