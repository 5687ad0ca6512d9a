"""Which of diffusers' caches fit a SUV, and how they are put in.

Attention hardly changes from one step of sampling to the next, so it may be taken from the step
before (Pyramid Attention Broadcast) or continued from some (TaylorSeer). Both ask one layer alone.
The others watch what goes in and out of a row of blocks; here the outputs of the first stages come
back in the last ones, so a row is no unit that could be left out.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from diffusers.hooks import (
    HookRegistry,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_taylorseer_cache,
)
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

ATTENTION, BLOCK, LAST = r"stages\.\d+\.\d+\.attn", r"stages\.\d+\.\d+", "proj_out"


class NoBlock(nn.Module, AttentionModuleMixin):  # type: ignore[misc]  # diffusers' are untyped
    """What diffusers' own functions find where they look for a block, or for attention: a refusal.

    ``apply_first_block_cache(model, ...)`` and the others go by names and classes of diffusers',
    of which an SUV has none; most of them would say nothing and do nothing.
    """

    processor = None  # no attention either

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_diffusers_hook":  # the first that each of them does
            raise ValueError(
                "a SUV has no row of blocks, nor attention of diffusers', that this could be put "
                "into; call enable_cache of the model, with a PyramidAttentionBroadcastConfig or a "
                "TaylorSeerCacheConfig"
            )
        super().__setattr__(name, value)

    def set_attention_backend(self, backend: str) -> None:
        """Refused, as by the model.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a SUV has no attention of diffusers' that {backend!r} could compute")


def no_row() -> nn.ModuleList:
    """For the name ``blocks``: a first and a last, and in them the names that patterns look for."""
    row = [NoBlock(), NoBlock()]
    for block in row:
        block.attn, block.stages = NoBlock(), NoBlock()
    return nn.ModuleList(row)


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
    raise ValueError(
        f"{type(config).__name__} does not fit a SUV, whose stages come back as in a U-Net; take a "
        "PyramidAttentionBroadcastConfig or a TaylorSeerCacheConfig"
    )


def _broadcast(
    model: nn.Module, config: PyramidAttentionBroadcastConfig
) -> PyramidAttentionBroadcastConfig:
    """diffusers' hook on every attention; diffusers itself looks for its own classes."""
    for field in fields(config):
        own = field.name.startswith(("spatial_attention_block_skip", "spatial_attention_timestep"))
        own = own or field.name == "current_timestep_callback"
        if not own and getattr(config, field.name) != field.default:
            raise ValueError(
                f"{field.name} concerns nothing here: SUV has one attention, of space, time and "
                "text together; set the ranges of spatial_attention"
            )
    if config.current_timestep_callback is None:
        raise ValueError("current_timestep_callback is needed: lambda: pipe.current_timestep")
    if config.spatial_attention_block_skip_range is None:
        config = replace(config, spatial_attention_block_skip_range=2)
    for name, module in model.named_modules():
        if re.fullmatch(ATTENTION, name):
            hook = PyramidAttentionBroadcastHook(
                config.spatial_attention_timestep_skip_range,
                config.spatial_attention_block_skip_range,
                config.current_timestep_callback,
            )
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(hook, "pyramid_attention_broadcast")
    return config


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
