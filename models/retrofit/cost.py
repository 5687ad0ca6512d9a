"""What a retrofit can gain at a size: the operations of the real model, counted without its memory.

A twin of the model on the meta device runs one forward under PyTorch's counter of operations, dense
and sparse. So it holds for every layer that the model has, and no formula for a family is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from skiparse.models.retrofit.families import family_of

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """What one forward of a clip costs, dense and sparse; a multiply-add counts as two.

    Args:
        tokens: of the video.
        dense, sparse: operations of the whole model, before and after.
        dense_attention: of those, the products of queries, keys and values in the layers that a
            retrofit may change.
    """

    tokens: int
    dense: int
    sparse: int
    dense_attention: int

    @property
    def attention(self) -> float:
        """How many times fewer operations the attention of all these layers takes."""
        return self.dense_attention / (self.dense_attention - (self.dense - self.sparse))

    @property
    def model(self) -> float:
        """How many times fewer the whole model takes: the most that it can become faster."""
        return self.dense / self.sparse

    @property
    def share(self) -> float:
        """The part of the dense model that is this attention."""
        return self.dense_attention / self.dense

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} tokens: attention {self.attention:.2f}x, whole model "
            f"{self.model:.2f}x at most ({self.share:.0%} of the dense one is attention)"
        )


def cost_of(
    model: Any, apply: Callable[[Any], object], frames: int, height: int, width: int
) -> Cost:
    """Count a twin of the model, and one that ``apply`` has made sparse.

    Raises:
        ValueError: for a size that does not make whole tokens, or a model whose call is not known.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    name = next((name for name in names if name in CALLS), None)
    if name is None:
        raise ValueError(
            f"how a {type(model).__name__} is called is not known to cost(); known are "
            f"{', '.join(CALLS)}"
        )
    cls = next(cls for cls in type(model).__mro__ if cls.__name__ == name)
    beside = ("skiparse", "images")  # of what tells of images nothing is counted
    config = {key: value for key, value in model.config.items() if key not in beside}
    latents = _latents(name, model.config, frames, height, width)
    counts: list[int] = []
    tokens = others = 0
    for sparse in (False, True):
        with torch.device("meta"), torch.no_grad():
            twin = cls.from_config(config)  # type: ignore[attr-defined]  # ConfigMixin's
            if sparse:
                apply(twin)
            with FlopCounterMode(display=False) as counter:
                tokens, others = CALLS[name](twin, latents)
        counts.append(counter.get_total_flops())
    layers: list[Any] = [attention for depth in family_of(twin).depths for attention in depth]
    pairs = (tokens + others) ** 2
    dense = sum(4 * layer.to_q.out_features * pairs for layer in layers)
    return Cost(tokens, counts[0], counts[1], dense)


# One forward of each family, of one sample: (video tokens, other tokens in the same attention).


def _latents(name: str, config: Any, frames: int, height: int, width: int) -> Grid:
    """``(frames, height, width)`` of latents, by the autoencoder that the model came with."""
    time, space = (8, 32) if name.startswith("LTX") else (4, 8)
    if name == "HunyuanVideo15Transformer3DModel":
        space = 16
    if name.startswith("Wan") and config.out_channels == 48:  # the autoencoder of Wan 2.2 TI2V
        space = 16
    patch = config.patch_size
    side = space * (patch if isinstance(patch, int) else patch[-1])
    if frames < 1 or (frames - 1) % time or height % side or width % side or not height * width:
        raise ValueError(
            f"{frames} frames of {height}x{width} do not make whole tokens; give {time}n + 1 "
            f"frames, and sides that are multiples of {side}"
        )
    return (frames - 1) // time + 1, height // space, width // space


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _wan(model: Any, latents: Grid) -> tuple[int, int]:
    c = model.config
    given = {
        "hidden_states": _empty(1, c.in_channels, *latents),
        "timestep": _empty(1),
        "encoder_hidden_states": _empty(1, 512, c.text_dim),
    }
    if c.image_dim is not None:
        given["encoder_hidden_states_image"] = _empty(1, 257, c.image_dim)
    if hasattr(model, "vace_blocks"):
        given["control_hidden_states"] = _empty(1, c.vace_in_channels, *latents)
    model(**given)
    return _patches(latents, c.patch_size), 0


def _hunyuan(model: Any, latents: Grid) -> tuple[int, int]:
    c, text = model.config, 256
    model(
        hidden_states=_empty(1, c.in_channels, *latents),
        timestep=_empty(1),
        encoder_hidden_states=_empty(1, text, c.text_embed_dim),
        encoder_attention_mask=torch.ones(1, text, dtype=torch.bool, device="meta"),
        pooled_projections=_empty(1, c.pooled_projection_dim),
        guidance=_empty(1) if c.guidance_embeds else None,
    )
    return _patches(latents, (c.patch_size_t, c.patch_size, c.patch_size)), text


def _hunyuan_15(model: Any, latents: Grid) -> tuple[int, int]:
    """Its blocks alone: what is before them looks at values, which are not there."""
    c, text = model.config, 1000 + 256 + 729  # of Qwen, of ByT5, of the image
    N, width = math.prod(latents), c.num_attention_heads * c.attention_head_dim
    if hasattr(model, "_skiparse"):
        model._skiparse.state.enter(latents, torch.device("meta"))
    rotary = (_empty(N, c.attention_head_dim), _empty(N, c.attention_head_dim))
    mask = torch.ones(1, text, dtype=torch.bool, device="meta")
    for block in model.transformer_blocks:
        block(_empty(1, N, width), _empty(1, text, width), _empty(1, width), mask, rotary)
    return N, text


def _cogvideox(model: Any, latents: Grid) -> tuple[int, int]:
    c, text = model.config, model.config.max_text_seq_length
    time = c.patch_size_t or 1
    frames = -(-latents[0] // time) * time  # its pipeline fills the last patch
    N = _patches((frames, *latents[1:]), (time, c.patch_size, c.patch_size))
    rotary = (_empty(N, c.attention_head_dim), _empty(N, c.attention_head_dim))
    model(
        hidden_states=_empty(1, frames, c.in_channels, *latents[1:]),
        encoder_hidden_states=_empty(1, text, c.text_embed_dim),
        timestep=_empty(1),
        ofs=None if c.ofs_embed_dim is None else _empty(1),
        image_rotary_emb=rotary if c.use_rotary_positional_embeddings else None,
    )
    return N, text


def _ltx(model: Any, latents: Grid) -> tuple[int, int]:
    c, N, text = model.config, math.prod(latents), 128
    frames, height, width = latents
    model(
        hidden_states=_empty(1, N, c.in_channels),
        encoder_hidden_states=_empty(1, text, c.caption_channels),
        timestep=_empty(1),
        encoder_attention_mask=_empty(1, text),
        num_frames=frames,
        height=height,
        width=width,
    )
    return N, 0


def _ltx2(model: Any, latents: Grid) -> tuple[int, int]:
    """With sound: 25 tokens a second, at 24 frames a second."""
    c, N, text = model.config, math.prod(latents), 1024
    frames, height, width = latents
    sound = round(((frames - 1) * 8 + 1) / 24 * 25)
    video_text, sound_text = (
        (c.caption_channels, c.caption_channels)
        if c.use_prompt_embeddings
        else (c.cross_attention_dim, c.audio_cross_attention_dim)
    )
    model(
        hidden_states=_empty(1, N, c.in_channels),
        audio_hidden_states=_empty(1, sound, c.audio_in_channels),
        encoder_hidden_states=_empty(1, text, video_text),
        audio_encoder_hidden_states=_empty(1, text, sound_text),
        timestep=_empty(1),
        sigma=_empty(1),
        encoder_attention_mask=_empty(1, text),
        audio_encoder_attention_mask=_empty(1, text),
        num_frames=frames,
        height=height,
        width=width,
        audio_num_frames=sound,
    )
    return N, 0


def _patches(latents: Grid, patch: tuple[int, ...]) -> int:
    return math.prod(n // p for n, p in zip(latents, patch, strict=True))


CALLS: Mapping[str, Callable[[Any, Grid], tuple[int, int]]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan,
    "HunyuanVideo15Transformer3DModel": _hunyuan_15,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx2,
}
