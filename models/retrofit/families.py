"""Where the video transformers of diffusers have their tokens; a few lines a family.

A retrofit needs to know three things of a model: the self-attention at every depth, the grid of its
video tokens, and which tensors have tokens, so that they can be permuted once a forward instead of
once a layer. All else is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from skiparse.models.retrofit.processors import HunyuanVideo15Processor

Arguments = Mapping[str, Any]  # of a model's forward, by name


@dataclass(frozen=True)
class Family:
    """Where a transformer has its video tokens.

    Args:
        depths: the self-attention modules at each depth, in order; those at one depth are alike.
        grid: ``(frames, rows, columns)`` of tokens, from the model's config and the arguments of
            its forward.
        others: where tokens that are not of the grid stand in the same attention, text or
            conditions: ``"last"`` or ``"first"``; None if there are none.
        arguments: arguments of forward that have tokens, and their dimension of them. One that has
            fewer than the grid, as a time for each sample has, is left alone.
        outputs: modules whose output has tokens, a tensor or a tuple of such, and the dimension.
        patches: convolutions whose output ``[B, C, frames, rows, columns]`` becomes the tokens.
        last: the module after whose output ``[B, tokens, C]`` the natural order is back; None if
            the model needs it throughout.
        blocks: where there is one for each depth, and each is called with ``hidden_states`` ``[B,
            tokens, C]`` and a pair ``rotary_emb`` of ``[1, tokens, ...]``, and does nothing else
            that is not token by token: then processes can share the tokens.
        call: what its processors call for attention.
        processor: makes the processor of a layer, instead of the model's own.
    """

    depths: Sequence[Sequence[nn.Module]]
    grid: Callable[[Any, Arguments], Sequence[int]]
    others: str | None = None
    arguments: Mapping[str, int] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)
    patches: tuple[str, ...] = ()
    last: str | None = None
    blocks: str | None = None
    call: str = "dispatch_attention_fn"
    processor: Callable[[Any], Any] | None = None


def family_of(model: nn.Module) -> Family:
    """What is known of a model, by the names of its class and of those it is derived from.

    Raises:
        TypeError: for a model that is not known, with those that are.
    """
    for cls in type(model).__mro__:  # FSDP gives a model a class of its own
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__](model)
    raise TypeError(
        f"{type(model).__name__} is not known to retrofit; known are {', '.join(FAMILIES)}. "
        "Tell it where its tokens are: retrofit(model, family=Family(...))"
    )


def _wan(model: Any) -> Family:
    return Family(
        [[block.attn1] for block in model.blocks],
        _of_latents,
        arguments={"timestep": 1},
        outputs={"rope": 1},
        patches=("patch_embedding",),
        last="proj_out",
        blocks="blocks",
    )


def _wan_vace(model: Any) -> Family:
    """A block of the control branch is as the one that it feeds."""
    depths: list[list[nn.Module]] = [[block.attn1] for block in model.blocks]
    for depth, block in zip(model.config.vace_layers, model.vace_blocks, strict=True):
        depths[depth].append(block.attn1)
    return Family(
        depths,
        _of_latents,
        arguments={"timestep": 1},
        outputs={"rope": 1},
        patches=("patch_embedding", "vace_patch_embedding"),
        last="proj_out",
    )


def _wan_animate(model: Any) -> Family:
    """In natural order: its face adapters cut the tokens into frames."""
    return Family([[block.attn1] for block in model.blocks], _of_latents)


def _hunyuan(model: Any) -> Family:
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    depths = [[block.attn] for block in blocks]
    if model.config.image_condition_type == "token_replace":  # cuts the first frame's tokens off
        return Family(depths, _of_latents, others="last")
    outputs = {"x_embedder": 1, "rope": 0}
    return Family(depths, _of_latents, others="last", outputs=outputs, last="proj_out")


def _hunyuan_15(model: Any) -> Family:
    return Family(
        [[block.attn] for block in model.transformer_blocks],
        _of_latents,
        others="last",
        outputs={"x_embedder": 1, "rope": 0},
        last="proj_out",
        processor=HunyuanVideo15Processor,
    )


def _cogvideox(model: Any) -> Family:
    return Family(
        [[block.attn1] for block in model.transformer_blocks],
        _of_frames,
        others="first",
        arguments={"image_rotary_emb": 0},
        outputs={"patch_embed": 1},
        last="proj_out",
        call="scaled_dot_product_attention",
    )


def _ltx(model: Any) -> Family:
    """Tokens of a condition stand before the video's."""
    return Family(
        [[block.attn1] for block in model.transformer_blocks],
        _as_told,
        others="first",
        arguments={"hidden_states": 1, "timestep": 1},
        outputs={"rope": 1},
        last="proj_out",
    )


def _ltx2(model: Any) -> Family:
    """Only the video's self-attention; keyframes stand behind it. Sound is short."""
    dim = 1 if model.config.rope_type == "interleaved" else 2
    return Family(
        [[block.attn1] for block in model.transformer_blocks],
        _as_told,
        others="last",
        arguments={"hidden_states": 1, "timestep": 1, "video_keyframes_mask": 1},
        outputs={"rope": dim, "cross_attn_rope": dim},
        last="proj_out",
    )


FAMILIES: Mapping[str, Callable[[Any], Family]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan_vace,
    "WanAnimateTransformer3DModel": _wan_animate,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _hunyuan_15,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
}


def _of_latents(config: Any, given: Arguments) -> list[int]:
    """Latents ``[B, C, frames, height, width]``, after patches are made."""
    patch = config.patch_size
    sides = (config.patch_size_t, patch, patch) if isinstance(patch, int) else tuple(patch)
    shape = given["hidden_states"].shape[2:]
    return [size // side for size, side in zip(shape, sides, strict=True)]


def _of_frames(config: Any, given: Arguments) -> list[int]:
    """Latents ``[B, frames, C, height, width]``, after patches are made."""
    _, frames, _, height, width = given["hidden_states"].shape
    depth, side = config.patch_size_t or 1, config.patch_size
    return [-(-frames // depth), height // side, width // side]


def _as_told(config: Any, given: Arguments) -> list[int]:
    """The grid that the caller of forward names."""
    names = ("num_frames", "height", "width")
    missing = [name for name in names if given.get(name) is None]
    if missing:
        raise ValueError(
            f"the grid of tokens is unknown: {', '.join(missing)} not given; call the transformer "
            "with num_frames, height and width of its latents, or undo() the retrofit"
        )
    return [given[name] for name in names]
