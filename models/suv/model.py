"""SUV: the sparse U-shaped video denoiser of Open-Sora Plan v1.5.

Stages of transformer blocks over the tokens of a video. Attention is sparse, sparser towards the
middle stage; the outputs of the first half's stages come back in the second half, as in a U-Net.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # a pipeline looks for it in the module of a model
from diffusers.configuration_utils import register_to_config
from diffusers.hooks import HookRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from einops import rearrange
from torch import Tensor, nn
from torch.distributed import ProcessGroup

import skiparse
from skiparse import SkipPattern
from skiparse.models.images import Guide, KnownFrames, embedding
from skiparse.models.strict import StrictModelMixin, check_sizes, filled
from skiparse.models.suv import caching
from skiparse.models.suv.blocks import INIT_STD, Norm, Stage, SUVBlock
from skiparse.models.suv.config import PRESETS
from skiparse.models.suv.experts import check_experts
from skiparse.models.suv.parts import Fp32Linear, clamp_fp16
from skiparse.models.suv.plan import NATURAL, Plan, Processes, SharedPlan
from skiparse.models.suv.rope import axis_dims, rotary_angles
from skiparse.parallel import rank_of

NORMS = ("layer_norm", "rms_norm")
CHECKPOINTS = ("none", "feed_forward", "block")
_TABLES = 64  # rotary tables and permutations that are kept, a dozen for each shape


@dataclass
class SUVOutput(Transformer2DModelOutput):  # type: ignore[misc]  # diffusers' is untyped
    """The velocity, and of a model with experts how unevenly they are used.

    Attributes:
        sample: ``[B, out_channels, t, h, w]``.
        imbalance: ``[B]`` fp32, the mean over all blocks with experts of
            :func:`~skiparse.models.suv.experts.imbalance`; None where there are none.
    """

    imbalance: Tensor | None = None


class SUV(StrictModelMixin, caching.Hooked, ModelMixin, PeftAdapterMixin, CacheMixin):  # type: ignore[misc]  # diffusers' are untyped
    """The denoiser: noisy latents, a time and a text in, a velocity out.

    Args:
        num_layers: blocks of each stage; an odd number of stages.
        sparsity: Skiparse sparsity of each stage, 1 = dense.
        num_heads, head_dim: their product is the width; ``head_dim`` a multiple of 16.
        in_channels, out_channels: channels of the latents, and of the velocity.
        text_channels: width of the text encoder's output (T5).
        pooled_channels: width of the pooled text embedding (CLIP).
        timestep_channels: width of the condition vector, even.
        double_ff: text has feed-forward layers of its own, else it shares the video's.
        skip_connection: the second half of the stages sees the outputs of the first half.
        skip_zero_init: skips begin as ``[I | 0]``, without effect; else they are normalised and
            initialised as any linear layer.
        norm: ``"layer_norm"`` or ``"rms_norm"``.
        patch_size: ``(1, p, p)``: a token is a patch of p x p latent pixels of one frame.
        eps: of every norm.
        linear_attention: for each stage, whether attention has a linear branch over all video
            tokens beside it, see :class:`~skiparse.models.suv.blocks.JointAttention`; None for
            nowhere.
        experts: for each stage, of how many feed-forwards its blocks have a mixture, see
            :mod:`skiparse.models.suv.experts`; 1 for a feed-forward as it is, None for that
            everywhere. A text's own feed-forward stays one.
        experts_per_token: how many of them each token goes through, at least 2.
        images: how it is told of frames that are known, ``"flash"`` or ``"mask"``; None for text
            alone. See :mod:`skiparse.models.images`.

    Raises:
        ValueError: for sizes that make no model.

    Source: Open-Sora Plan v1.5 report; ``SUV.presets`` has the published sizes. The linear branch
    and the experts are no part of the release.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    converted_by = "suv"
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SUVBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["SUVBlock"]
    _group_offload_block_modules: ClassVar[list[str]] = ["stages"]  # a group is of blocks
    _cache_config: Any = None
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = [
        "_embed",
        "skips",
        "norm",
        "router",
        "guide",
    ]
    _cp_plan: ClassVar[dict[str, Any]] = {}  # diffusers cuts nothing: the forward does

    @register_to_config
    def __init__(
        self,
        *,
        num_layers: Sequence[int],
        sparsity: Sequence[int],
        num_heads: int,
        head_dim: int,
        in_channels: int,
        out_channels: int,
        text_channels: int,
        pooled_channels: int,
        timestep_channels: int,
        double_ff: bool = True,
        skip_connection: bool = True,
        skip_zero_init: bool = True,
        norm: str = "layer_norm",
        patch_size: Sequence[int] = (1, 2, 2),
        eps: float = 1e-6,
        linear_attention: Sequence[bool] | None = None,
        experts: Sequence[int] | None = None,
        experts_per_token: int = 2,
        images: str | None = None,
    ) -> None:
        super().__init__()
        layers, skipped = tuple(num_layers), tuple(sparsity)
        check_sizes(
            num_heads=num_heads,
            in_channels=in_channels,
            out_channels=out_channels,
            text_channels=text_channels,
            pooled_channels=pooled_channels,
        )
        _check(layers, skipped, head_dim, timestep_channels, norm, patch_size)
        _check_branches(linear_attention, len(layers))
        check_experts(experts, experts_per_token, len(layers))
        self.register_to_config(
            num_layers=layers,
            sparsity=skipped,
            patch_size=tuple(patch_size),
            linear_attention=None if linear_attention is None else tuple(linear_attention),
            experts=None if experts is None else tuple(experts),
        )  # tuples also when they come from JSON
        width = num_heads * head_dim
        pixels = patch_size[1] * patch_size[2]
        self.checkpointing: tuple[str, ...] = ("none",) * len(layers)
        self._tables: dict[tuple[Any, ...], Any] = {}
        self._sharing: Processes | None = None  # that share the tokens

        self.blocks = caching.no_row()  # without weights
        patch = (patch_size[1], patch_size[2])
        self.patch_embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.timestep_embed = ConditionMLP(timestep_channels, timestep_channels)
        self.pooled_embed = ConditionMLP(pooled_channels, timestep_channels)
        self.text_embed = nn.Linear(text_channels, width)
        self.stages = nn.ModuleList(
            Stage(
                SUVBlock(
                    num_heads,
                    head_dim,
                    timestep_channels,
                    double_ff=double_ff,
                    last=stage == len(layers) - 1 and layer == count - 1,
                    norm=norm,
                    eps=eps,
                    linear=linear_attention is not None and linear_attention[stage],
                    experts=1 if experts is None else experts[stage],
                    taken=experts_per_token,
                )
                for layer in range(count)
            )
            for stage, count in enumerate(layers)
        )
        decoders = len(layers) // 2 if skip_connection else 0
        kind = None if skip_zero_init else norm
        self.skips = nn.ModuleList(Skip(width, kind, eps) for _ in range(decoders))
        self.text_skips = nn.ModuleList(Skip(width, kind, eps) for _ in range(decoders))
        self.norm_final = Norm(width, norm, eps)
        self.norm_out = OutputNorm(width, timestep_channels, norm, eps)
        self.proj_out = nn.Linear(width, pixels * out_channels)
        self.guide: Guide | None = None
        self.guide_embed: nn.Module | None = None
        if images is not None:
            self._guided(images)

    def _guided(self, images: str) -> None:
        """New weights for images."""
        channels, width = self.config.in_channels, self.text_embed.out_features
        self.guide = Guide(images, channels)
        self.guide_embed = embedding(images, channels, width, self.config.patch_size)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
        *,
        images: KnownFrames | None = None,
        trim_text: bool = True,
        reorder: bool = True,
        backend: str = "auto",
        attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | SUVOutput | tuple[Tensor]:
        """The velocity, ``noise - clean``, at every latent pixel.

        Args:
            latents: ``[B, C, t, h, w]``; ``h`` and ``w`` multiples of the patch.
            timestep: ``[B]``, 1000 * sigma, in [0, 1000].
            text: ``[B, L, text_channels]``.
            pooled: ``[B, pooled_channels]``.
            text_mask: ``[B, L]``, True or 1 where there is text, in bool or integers
                (:func:`skiparse.key_mask`); all of it if None.
            video_mask: ``[B, t, h, w]``, True or 1 where there is video; a patch counts if any of
                its pixels does; all of it if None.
            images: frames that are known, of a model that is told of them; None for text alone.
            trim_text: drop what is padding in the whole batch. The velocity is the same, since
                masked text reaches nothing, and a k = 8 layer 15 % cheaper; False keeps it, and so
                does a whole model that is compiled.
            reorder: keep tokens in skip order, where both patterns are views. The velocity is the
                same; False keeps natural order, which ``torch.export`` for any size of video needs.
            backend: of ``skiparse.joint_attention``.
            attention_kwargs: ``{"scale": s}`` weighs the adapters of this call.
            return_dict: True for :class:`SUVOutput`, False for a tuple of one; None for the
                velocity itself.

        Returns:
            ``[B, out_channels, t, h, w]`` in the model's dtype.

        Raises:
            ValueError: for shapes that do not fit, before any work.
        """
        grid = self._check_inputs(latents, timestep, text, pooled, text_mask, video_mask)
        if attention_kwargs:  # the scale is taken out of them before
            raise ValueError(f"attention_kwargs may have scale, got {sorted(attention_kwargs)} too")
        dtype = self.dtype
        plan = self._plan(grid[0] * grid[1] * grid[2], reorder)
        keys, text, text_keys = self._keys(text, text_mask, video_mask, trim_text)

        order: Any = plan.orders[0]
        if images is not None:
            latents = self._guiding()(latents, images)
        patches = self._take(self._patches(latents.to(dtype)), plan, NATURAL, order)
        video = self._embed(patches)
        text = self.text_embed(text.to(dtype))
        condition = self._condition(timestep, pooled.to(dtype))

        passed: list[tuple[Tensor, Tensor, Any]] = []
        imbalances: list[Tensor] = []
        middle = len(self.stages) // 2
        for stage, blocks in enumerate(cast(list[Stage], self.stages)):
            video, order = self._take(video, plan, order, plan.orders[stage]), plan.orders[stage]
            if self.skips and stage > middle:
                before, text_before, its_order = passed.pop()
                before = self._take(before, plan, its_order, order)
                video = self.skips[stage - middle - 1](video, before)
                text = self.text_skips[stage - middle - 1](text, text_before)
            rotary = self._rotary(grid, plan, order, latents.device)
            patterns = self._patterns(plan, stage, grid, latents.device)
            shared = isinstance(plan, SharedPlan)  # attention takes masks of all tokens then
            its_keys = keys if shared else self._take(keys, plan, NATURAL, order)
            again = self.checkpointing[stage]
            video, text, told = blocks(
                video, text, condition, rotary, patterns, its_keys, text_keys, again, backend
            )
            imbalances += told
            video, order = (
                self._take(video, plan, plan.ends[stage], plan.kept[stage]),
                plan.kept[stage],
            )
            if self.skips and stage < middle:
                passed.append((video, text, order))

        if video.dtype == torch.float16 and not self.training:
            video = clamp_fp16(video)
        video = self.norm_out(self.norm_final(video), condition)
        out = self._unpatchify(self._take(self.proj_out(video), plan, order, NATURAL), grid)
        if return_dict is None:
            return out
        if not return_dict:
            return (out,)
        return SUVOutput(out, torch.stack(imbalances).mean(0) if imbalances else None)

    def _check_inputs(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        text_mask: Tensor | None,
        video_mask: Tensor | None,
    ) -> tuple[int, int, int]:
        """Raise ValueError for what does not fit; else the grid of tokens (t, h, w)."""
        config = self.config
        given = {"latents": latents, "timestep": timestep, "text": text, "pooled": pooled}
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, got {value!r}")
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise ValueError(
                f"latents must be [batch, {config.in_channels}, t, h, w], got {list(latents.shape)}"
            )
        B, _, *size = latents.shape
        patches = list(zip(size, config.patch_size, strict=True))
        if any(length % patch or length < 1 for length, patch in patches):
            nearest = [max(round(length / patch), 1) * patch for length, patch in patches]
            raise ValueError(
                f"latents have t, h, w = {size}, which patches of {config.patch_size} do not fill; "
                f"the nearest valid size is {nearest}"
            )
        for name, x, shape in (
            ("timestep", timestep, [B]),
            ("text", text, [B, text.shape[1] if text.ndim > 1 else 0, config.text_channels]),
            ("pooled", pooled, [B, config.pooled_channels]),
            ("text_mask", text_mask, [B, text.shape[1] if text.ndim > 1 else 0]),
            ("video_mask", video_mask, [B, *size]),
        ):
            if x is not None and list(x.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
            if x is not None and x.device != latents.device:
                raise ValueError(
                    f"{name} is on {x.device} but latents are on {latents.device}; move it there"
                )
        t, h, w = (length // patch for length, patch in patches)
        return t, h, w

    def _keys(
        self, text: Tensor, text_mask: Tensor | None, video_mask: Tensor | None, trim: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Key masks of the video ``[B, N]`` and of the text, and the text, trimmed.

        None where every key counts: not all attention kernels take masks.
        """
        keys = text_keys = None
        if video_mask is not None:
            there = skiparse.key_mask(video_mask, "video_mask")
            valid = F.max_pool3d(there.float(), self.config.patch_size)
            keys = _unless_all(valid.flatten(1) > 0)
        if text_mask is not None:
            text_keys = skiparse.key_mask(text_mask, "text_mask")
            if trim and not torch.compiler.is_compiling() and not text_keys.is_meta:
                used = text_keys.any(0).nonzero()
                length = int(used[-1]) + 1 if len(used) else 0
                text, text_keys = text[:, :length], text_keys[:, :length]
            text_keys = _unless_all(text_keys)
        return keys, text, text_keys

    def _patches(self, latents: Tensor) -> Tensor:
        """``[B, C, t, h, w]`` as ``[B, N, C, ph, pw]``, tokens in order of (t, h, w)."""
        _, ph, pw = self.config.patch_size
        return rearrange(latents, "b c t (h ph) (w pw) -> b (t h w) c ph pw", ph=ph, pw=pw)

    def _embed(self, patches: Tensor) -> Tensor:
        """``[B, N, C, ph, pw]``, in any order of tokens, to ``[B, N, width]``.

        One below the other they are an image, whose convolution keeps their order.
        """
        column = rearrange(patches, "b n c ph pw -> b c (n ph) pw")
        own, beside = column.tensor_split([self.config.in_channels], 1)
        video = self.patch_embed(own)  # [B, width, N, 1]
        if beside.shape[1]:  # of images
            assert self.guide_embed is not None
            video = video + self.guide_embed(beside[:, :, None]).squeeze(2)
        return video.squeeze(-1).transpose(1, 2)

    def _guiding(self) -> Guide:
        """What tells it of images; ValueError if there is nothing."""
        if self.guide is None:
            raise ValueError(
                'this SUV is told of text alone; train one with images, or take_images("flash")'
            )
        return self.guide

    def _condition(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """``[B, timestep_channels]`` fp32 from the time and the pooled text."""
        sinusoid = timestep_sinusoid(timestep, self.config.timestep_channels).to(pooled.dtype)
        return self.timestep_embed(sinusoid).float() + self.pooled_embed(pooled).float()

    def _plan(self, tokens: int, reorder: bool) -> Plan | SharedPlan:
        """How the tokens lie: of this process alone, or of those that share them."""
        config = self.config
        if self._sharing is None:
            if reorder and isinstance(tokens, torch.SymInt):
                raise ValueError(
                    "reorder=True is for one number of tokens; pass reorder=False to export a "
                    "model for videos of any size"
                )
            return Plan.of(tokens, config.sparsity, reorder=reorder)
        layers, heads, skips = config.num_layers, config.num_heads, len(self.skips) > 0
        group = self._sharing.group
        return SharedPlan.of(tokens, layers, config.sparsity, heads, skips, group)

    def _patterns(
        self, plan: Any, stage: int, grid: tuple[int, int, int], device: torch.device
    ) -> list[Any]:
        """What each block of a stage is told of the tokens."""
        layers = range(self.config.num_layers[stage])
        if isinstance(plan, Plan):
            return [plan.pattern(stage, layer) for layer in layers]
        return [
            plan.pattern(stage, i, self._rotary(grid, plan, plan.layout(stage, i), device))
            for i in layers
        ]

    def _rotary(
        self, grid: tuple[int, int, int], plan: Any, order: Any, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """cos and sin ``[n, head_dim / 2]`` fp32 in a token order, computed once for a shape."""

        def make() -> tuple[Tensor, Tensor]:
            angles = rotary_angles(grid, self.config.head_dim)
            index = plan.permutation(NATURAL, order)
            table = angles if index is None else angles[torch.from_numpy(index)]
            return table.cos().to(device), table.sin().to(device)

        return self._kept((grid, order, device), make)

    def _take(self, x: Tensor | None, plan: Any, before: Any, after: Any) -> Any:
        """Tokens ``[B, n, ...]`` from one order or layout to another; None stays None."""
        if x is None or before == after:
            return x
        if isinstance(plan, SharedPlan) and before != NATURAL:
            return plan.moved(x, before, after)
        device = x.device

        def make() -> Tensor:
            return torch.from_numpy(plan.permutation(before, after)).to(device)

        return x.index_select(1, self._kept((x.shape[1], before, after, device), make))

    def _kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` makes, from the last time if it was made before."""
        if torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
            return make()  # what a tracer makes must not outlive it
        found = self._tables.get(key)
        if found is None:
            with torch.inference_mode(False):  # or no backward pass could keep it
                found = make()
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            self._tables[key] = found
        return found

    def _unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        t, h, w = grid
        _, ph, pw = self.config.patch_size
        return rearrange(
            patches,
            "b (t h w) (ph pw c) -> b c t (h ph) (w pw)",
            t=t, h=h, w=w, ph=ph, pw=pw,
        )  # fmt: skip

    def set_sparsity(self, sparsity: Sequence[int]) -> None:
        """Another sparsity for each stage, from the next forward on; weights stay as they are.

        Raises:
            ValueError: unless there is one int >= 1 for each stage.
        """
        skipped = tuple(sparsity)
        _check_sparsity(self.config.num_layers, skipped)
        self.register_to_config(sparsity=skipped)

    def take_images(self, images: str, *, seed: int = 0) -> None:
        """Add what it takes to be told of images; the velocity stays what it is until that learns.

        Args:
            images: ``"flash"`` or ``"mask"``.
            seed: of the weights that are not 0.

        Raises:
            ValueError: for another paradigm, or if it is told of images already.
        """
        if self.guide is not None:
            raise ValueError(
                f"this SUV is told of images already, by {self.config.images!r}; leave it out"
            )
        weight = self.text_embed.weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._guided(images)
        for module in (self.guide, self.guide_embed):
            assert module is not None
            module.to(weight.device, weight.dtype).train(self.training)
        self.register_to_config(images=images)

    def set_context_parallel(self, group: ProcessGroup | None) -> None:
        """Share the tokens of every forward with the processes of ``group``; None ends that.

        They call the model with the same inputs, and each returns the whole velocity. Weights are
        not shared out. If each computes the loss of the whole velocity, gradients are to be
        *averaged* over the processes, as DistributedDataParallel and FSDP do. ``reorder`` of the
        forward says nothing then: tokens lie as :func:`skiparse.models.suv.plan.route_of` has them.

        Args:
            group: of torch.distributed, such as ``mesh["context"].get_group()``.

        Raises:
            ValueError: if this process is not in it.
        """
        if group is not None:
            rank_of(group)
        self._tables.clear()
        self._sharing = None if group is None else Processes(group)

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Diffusers' way to :meth:`set_context_parallel`, with ``ulysses_degree`` processes.

        Args:
            config: a ``ContextParallelConfig``, or a ``ParallelConfig`` with one. Layers exchange
                heads only where that is cheapest; any number of tokens and heads will do.
            cp_plan: none: SUV cuts its tokens by itself.

        Raises:
            ValueError: for rings, and for a plan.
            RuntimeError: if it is parallel already.
        """
        context = getattr(config, "context_parallel_config", config)
        if cp_plan is not None or getattr(context, "ring_degree", 1) > 1:
            raise ValueError(
                f"SUV shares tokens by layouts of its own: got ring_degree="
                f"{getattr(context, 'ring_degree', 1)} and cp_plan={cp_plan!r}; give "
                "ContextParallelConfig(ulysses_degree=...) alone"
            )
        super().enable_parallelism(config=config)
        mesh = self._parallel_config.context_parallel_config._ulysses_mesh
        self.set_context_parallel(mesh.get_group())

    def _instead(self) -> str:
        return f"pass backend= to its forward, 'auto' or one of {list(skiparse.list_backends())}"

    def enable_cache(self, config: Any) -> None:
        """Take something from steps before, by a cache of diffusers'; ``disable_cache`` ends it.

        Args:
            config: a ``PyramidAttentionBroadcastConfig``, whose spatial range and timesteps hold
                for every attention; a ``TaylorSeerCacheConfig``, which where it names no modules
                predicts every attention, in its lite mode the last projection, and blocks are left
                out; or a ``FirstBlockCacheConfig``, which where the first stage adds about what it
                did before leaves out all but it and the last one.

        Raises:
            ValueError: for other caches, which compare what goes in and out of a row of blocks,
                where the stages of a U come back; for settings that concern nothing here.
        """
        if self.is_cache_enabled:
            raise ValueError(
                f"Caching has already been enabled, by a {type(self._cache_config).__name__}; call "
                "disable_cache() first"
            )
        self._cache_config = caching.apply(self, config)
        HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()

    def add_adapter(self, *arguments: Any, **options: Any) -> None:
        """As of any model of diffusers; ValueError under layerwise casting."""
        self._check_not_cast("add an adapter")
        super().add_adapter(*arguments, **options)

    def load_lora_adapter(self, *arguments: Any, **options: Any) -> Any:
        """As of any model of diffusers; ValueError under layerwise casting."""
        self._check_not_cast("load an adapter")
        return super().load_lora_adapter(*arguments, **options)

    def fuse_lora(self, *arguments: Any, **options: Any) -> None:
        """As of any model of diffusers; ValueError under layerwise casting."""
        self._check_not_cast("fuse it")
        super().fuse_lora(*arguments, **options)

    def unfuse_lora(self, *arguments: Any, **options: Any) -> None:
        """As of any model of diffusers; ValueError under layerwise casting."""
        self._check_not_cast("unfuse it")
        super().unfuse_lora(*arguments, **options)

    def _check_not_cast(self, what: str) -> None:
        """ValueError if layers keep their weights in a type that nothing is computed in.

        PEFT would make an adapter of that type, and fail when it is called.
        """
        for module in self.modules():
            hooks = getattr(module, "_diffusers_hook", None)
            if hooks is not None and hooks.get_hook("layerwise_casting") is not None:
                raise ValueError(
                    f"layerwise casting is on, which keeps weights in {module.weight.dtype}: "
                    f"{what} before enable_layerwise_casting()"
                )

    def enable_group_offload(self, *arguments: Any, **options: Any) -> None:
        """As of any model of diffusers."""
        with caching.row_aside(self):
            super().enable_group_offload(*arguments, **options)

    def set_checkpointing(self, stages: Sequence[str]) -> None:
        """What each stage computes again in the backward pass instead of keeping it.

        Args:
            stages: for each stage ``"none"``, ``"feed_forward"`` (as the release did) or
                ``"block"``. ``enable_gradient_checkpointing()`` means ``"block"`` everywhere, and
                goes before.

        Raises:
            ValueError: for another word, or another number of stages.
        """
        if len(stages) != len(self.stages) or not set(stages) <= set(CHECKPOINTS):
            raise ValueError(
                f"stages must be {len(self.stages)} of {CHECKPOINTS}, got {tuple(stages)}"
            )
        self.checkpointing = tuple(stages)

    @classmethod
    def from_dense(
        cls, dense: SUV, *, sparsity: Sequence[int], skip_connection: bool = True
    ) -> SUV:
        """A sparse model with the weights of a dense one, and skips that begin without effect.

        Args:
            dense: any SUV; it is not changed. Its own skips are kept if it has them.
            sparsity: for each stage.
            skip_connection: whether the new model has skips; new ones are ``[I | 0]``.

        Returns:
            A model of the same dtype and device that computes exactly what ``dense`` would with
            that sparsity.

        Raises:
            ValueError: if ``dense`` has skips and the new model should not.
        """
        made, new = cls.beyond(dense, sparsity=sparsity, skip_connection=skip_connection)
        return filled(made, dense, new)

    @classmethod
    def extended(
        cls,
        model: SUV,
        *,
        linear_attention: Sequence[bool] | None = None,
        experts: Sequence[int] | None = None,
        experts_per_token: int | None = None,
        seed: int = 0,
    ) -> SUV:
        """A model with the weights of another, and more parts, which begin without effect.

        Linear branches begin with a projection of 0: the velocity is the same to the bit. Experts
        begin as copies of the feed-forward (they are upcycled): it is the same up to rounding,
        since the weights of a token's experts sum to one.

        Args:
            model: any SUV; it is not changed. What it has of these parts is kept.
            linear_attention, experts, experts_per_token: as of :class:`SUV`; None for what
                ``model`` has.
            seed: of the routers' weights, from N(0, 0.02).

        Returns:
            A model of the same dtype and device.

        Raises:
            ValueError: if a branch would be dropped, or experts that are there become more or
                fewer, in number or for a token.
        """
        made, new = cls.beyond(
            model,
            linear_attention=linear_attention,
            experts=experts,
            experts_per_token=experts_per_token,
            seed=seed,
        )
        return filled(made, model, new)

    @classmethod
    def beyond(cls, model: SUV, *, seed: int = 0, **wanted: Any) -> tuple[SUV, dict[str, Tensor]]:
        """What :meth:`from_dense` and :meth:`extended` make, without the weights ``model`` has.

        ``model`` may be in shards, of which nothing is read.

        Args:
            model: any SUV; it is not changed.
            seed: of the weights of routers.
            wanted: arguments of those two; None for what ``model`` has.

        Returns:
            The other one on the meta device, and those of its tensors that ``model`` lacks, by
            name. One that ``model`` has with a dimension less is a copy of that for each expert.

        Raises:
            ValueError: as those two.
        """
        config = model.arguments
        config |= {name: value for name, value in wanted.items() if value is not None}
        had = model.config.skip_connection
        if had and not config["skip_connection"]:
            raise ValueError(
                "skip_connection=False would drop the skips of the given model; pass True"
            )
        if not had and config["skip_connection"]:
            config["skip_zero_init"] = True
        with torch.device("meta"):
            made = cls(**config)
        _refuse_less(model, made)
        generator = torch.Generator().manual_seed(seed)
        weight, has = model.text_embed.weight, model.state_dict().keys()
        new = {}
        for name, like in made.state_dict().items():
            if name in has:
                continue
            if name.startswith(("skips.", "text_skips.")) and name.endswith(".weight"):
                begun = torch.eye(*like.shape)  # [I | 0]
            elif name.endswith(".router.weight"):
                begun = torch.empty(like.shape).normal_(std=INIT_STD, generator=generator)
            else:
                begun = torch.zeros(like.shape)
            new[name] = begun.to(device=weight.device, dtype=weight.dtype)
        return made.train(model.training), new


def _refuse_less(model: SUV, made: SUV) -> None:
    """ValueError if ``made`` has not all that ``model`` has."""
    had, has = model.config, made.config
    if had.linear_attention is not None:
        both = zip(had.linear_attention, has.linear_attention, strict=True)
        if any(before and not after for before, after in both):
            raise ValueError(
                f"linear_attention={has.linear_attention} would drop branches of the given model, "
                f"which has {had.linear_attention}; keep those"
            )
    if had.experts is not None:
        counts = zip(had.experts, has.experts, strict=True)
        if any(before not in (1, after) for before, after in counts):
            raise ValueError(
                f"experts={has.experts} would change how many there are in a stage of the given "
                f"model, which has {had.experts}; keep those above 1"
            )
        if max(had.experts) > 1 and had.experts_per_token != has.experts_per_token:
            raise ValueError(
                f"experts_per_token={has.experts_per_token} would change the given model, which "
                f"has {had.experts_per_token}; keep that"
            )


class ConditionMLP(nn.Module):
    """Linear, SiLU, linear."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels]`` to ``[B, width]``."""
        return self.linear_2(F.silu(self.linear_1(x)))


class Skip(nn.Module):
    """What a stage of the first half left, added to the tokens of the second half.

    One linear layer over both side by side, with a norm in front if ``kind`` says which; without
    one it begins as ``[I | 0]``: the current tokens, unchanged.
    """

    def __init__(self, width: int, kind: str | None, eps: float) -> None:
        super().__init__()
        self.norm = None if kind is None else Norm(2 * width, kind, eps)
        self.linear = nn.Linear(2 * width, width)
        if self.norm is None:
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """``[B, N, C]`` twice to ``[B, N, C]``."""
        both = torch.cat([x, before], -1)
        return self.linear(both if self.norm is None else self.norm(both))


class OutputNorm(nn.Module):
    """The last norm, shifted and scaled by the condition."""

    def __init__(self, width: int, condition: int, kind: str, eps: float) -> None:
        super().__init__()
        self.linear = Fp32Linear(condition, 2 * width)
        self.norm = Norm(width, kind, eps)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``[B, N, C]`` and ``[B, condition]`` fp32 to ``[B, N, C]``."""
        shift, scale = self.linear(F.silu(condition)).chunk(2, -1)
        return self.norm(x, shift, scale)


def timestep_sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """``[B]`` to ``[B, channels]`` fp32: cosines, then sines, of frequencies from 1 to 1e-4.

    Source: Vaswani et al. 2017; frequency ``i`` of ``half`` is ``10000**(-i / half)``.
    """
    half = channels // 2
    exponent = -torch.arange(half, device=timestep.device, dtype=torch.float32) / half
    angle = timestep.float()[:, None] * 10000.0**exponent
    return torch.cat([angle.cos(), angle.sin()], -1)


def _unless_all(mask: Tensor) -> Tensor | None:
    """The mask, or None if it hides nothing; where nobody may look at it, it stays."""
    blind = torch.compiler.is_compiling() or mask.is_meta
    return mask if blind or not bool(mask.all()) else None


def _check(
    num_layers: tuple[int, ...],
    sparsity: tuple[int, ...],
    head_dim: int,
    timestep_channels: int,
    norm: str,
    patch_size: Sequence[int],
) -> None:
    if len(num_layers) % 2 == 0 or min(num_layers, default=0) < 1:
        raise ValueError(
            f"num_layers must be an odd number of stages, each with a layer, got {num_layers}"
        )
    _check_sparsity(num_layers, sparsity)
    axis_dims(head_dim)
    if timestep_channels % 2 or timestep_channels < 2:
        raise ValueError(f"timestep_channels must be even and positive, got {timestep_channels}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if len(patch_size) != 3 or patch_size[0] != 1 or min(patch_size) < 1:
        raise ValueError(f"patch_size must be (1, height, width), got {tuple(patch_size)}")


def _check_branches(wanted: Sequence[bool] | None, stages: int) -> None:
    if wanted is not None and (
        len(wanted) != stages or not all(isinstance(each, bool) for each in wanted)
    ):
        raise ValueError(
            f"linear_attention must be {stages} of true or false, one for each stage, got "
            f"{tuple(wanted)}"
        )


def _check_sparsity(num_layers: Sequence[int], sparsity: tuple[int, ...]) -> None:
    if len(sparsity) != len(num_layers):
        raise ValueError(
            f"sparsity has {len(sparsity)} entries for {len(num_layers)} stages; give one each"
        )
    for k in sparsity:
        SkipPattern(k)
