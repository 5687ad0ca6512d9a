"""Retrofitted video transformers of diffusers: exact to masks written token by token, and composed."""

import sys

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import dispatch_attention_fn  # noqa: E402

from skiparse.models.retrofit import FAMILIES, Retrofit, Sparsity, retrofit, schedule  # noqa: E402
from skiparse.models.retrofit.families import family_of  # noqa: E402

EVEN, RAGGED = (2, 8, 8), (3, 5, 7)  # tokens: with a skip order for all that is used here; without


def seeded(cls, **config):
    torch.manual_seed(0)
    model = cls(**config).double().eval()
    for parameter in model.parameters():  # what is initialised to zero would hide an error
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Tiny models: (model, the arguments of its forward for a grid of tokens).


def wan(
    grid, cls="WanTransformer3DModel", layers=4, channels=4, tokens_time=False, image=0, **more
):
    model = seeded(
        getattr(diffusers, cls), num_attention_heads=2, attention_head_dim=12, in_channels=channels,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=24, num_layers=layers,
        image_dim=image or None, added_kv_proj_dim=24 if image else None, **more,
    )  # fmt: skip
    t, h, w = grid
    given = {
        "hidden_states": normal(2, channels, t, 2 * h, 2 * w),
        "timestep": torch.rand(2, t * h * w) * 999 if tokens_time else torch.tensor([5.0, 700.0]),
        "encoder_hidden_states": normal(2, 512 if image else 5, 16),
    }
    if image:
        given["encoder_hidden_states_image"] = normal(2, 9, image)
    return model, given


def vace(grid):
    model, given = wan(grid, "WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=6)
    t, h, w = grid
    return model, given | {"control_hidden_states": normal(2, 6, t, 2 * h, 2 * w)}


def hunyuan(grid, kind=None):
    model = seeded(
        diffusers.HunyuanVideoTransformer3DModel, in_channels=4, out_channels=4,
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(4, 4, 4), image_condition_type=kind, guidance_embeds=kind is None,
    )  # fmt: skip
    t, h, w = grid
    given = {
        "hidden_states": normal(2, 4, t, 2 * h, 2 * w),
        "timestep": torch.tensor([5, 700]),
        "encoder_hidden_states": normal(2, 6, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "pooled_projections": normal(2, 8),
    }
    return model, given | ({"guidance": torch.tensor([6000.0, 3000.0])} if kind is None else {})


def hunyuan_15(grid, image=False):
    model = seeded(
        diffusers.HunyuanVideo15Transformer3DModel, in_channels=4, out_channels=4,
        num_attention_heads=2, attention_head_dim=12, num_layers=4, num_refiner_layers=1,
        text_embed_dim=16, text_embed_2_dim=10, image_embed_dim=8, rope_axes_dim=(4, 4, 4),
    )  # fmt: skip
    given = {
        "hidden_states": normal(2, 4, *grid),
        "timestep": torch.tensor([5.0, 700.0]).double(),
        "encoder_hidden_states": normal(2, 6, 16),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "encoder_hidden_states_2": normal(2, 3, 10),
        "encoder_attention_mask_2": torch.tensor([[1, 0, 0], [1, 1, 0]]),
        "image_embeds": normal(2, 4, 8) if image else torch.zeros(2, 4, 8, dtype=torch.float64),
    }
    return model, given


def cogvideox(grid, form="rotary"):
    t, h, w = grid
    depth = 2 if form == "1.5" else None
    frames = t * (depth or 1)
    model = seeded(
        diffusers.CogVideoXTransformer3DModel, num_attention_heads=2, attention_head_dim=16,
        in_channels=4, out_channels=4, time_embed_dim=16, text_embed_dim=16, num_layers=4,
        sample_width=2 * w, sample_height=2 * h, sample_frames=4 * (frames - 1) + 1,
        patch_size_t=depth, max_text_seq_length=5, patch_bias=depth is None,
        use_rotary_positional_embeddings=form != "sincos",
        use_learned_positional_embeddings=form == "learned",
    )  # fmt: skip
    given = {
        "hidden_states": normal(2, frames, 4, 2 * h, 2 * w),
        "encoder_hidden_states": normal(2, 5, 16),
        "timestep": torch.tensor([5, 700]),
    }
    if form != "sincos":
        angle = normal(t * h * w, 8).repeat_interleave(2, 1)
        given["image_rotary_emb"] = (angle.cos(), angle.sin())
    return model, given


def ltx(grid, conditions=0):
    model = seeded(
        diffusers.LTXVideoTransformer3DModel, in_channels=4, out_channels=4,
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=4,
        caption_channels=16,
    )  # fmt: skip
    t, h, w = grid
    tokens = t * h * w + conditions
    given = {
        "hidden_states": normal(2, tokens, 4),
        "encoder_hidden_states": normal(2, 5, 16),
        "timestep": torch.rand(2, tokens) * 999 if conditions else torch.tensor([5, 700]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "num_frames": t, "height": h, "width": w,
    }  # fmt: skip
    if conditions:
        given["video_coords"] = torch.rand(2, 3, tokens)
    return model, given


def ltx2(grid, keyframes=0, form="2.0"):
    newer = form != "2.0"
    model = seeded(
        diffusers.LTX2VideoTransformer3DModel, in_channels=4, out_channels=4,
        num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, audio_in_channels=3,
        audio_out_channels=3, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=4, caption_channels=16,
        rope_type="split" if newer else "interleaved", gated_attn=newer, audio_gated_attn=newer,
        perturbed_attn=newer, use_keyframes_abs_pos_embedding=keyframes > 0,
    )  # fmt: skip
    t, h, w = grid
    tokens = t * h * w + keyframes
    given = {
        "hidden_states": normal(2, tokens, 4),
        "audio_hidden_states": normal(2, 7, 3),
        "encoder_hidden_states": normal(2, 5, 16),
        "audio_encoder_hidden_states": normal(2, 5, 16),
        "timestep": torch.rand(2, tokens).double() * 999,
        "audio_timestep": torch.tensor([5.0, 700.0]).double(),
        "sigma": torch.tensor([5.0, 700.0]).double(),
        "audio_num_frames": 7, "num_frames": t, "height": h, "width": w,
    }  # fmt: skip
    if newer:
        given |= {
            "spatio_temporal_guidance_blocks": [2],
            "perturbation_mask": torch.tensor([0.0, 1.0]).double(),
        }
    if keyframes:
        given["video_coords"] = torch.rand(2, 3, tokens, 2).double()
        given["video_keyframes_mask"] = (torch.arange(tokens) >= t * h * w).double()[None, :, None]
    return model, given


def animate(grid):
    t, h, w = grid
    model, given = wan(
        grid, "WanAnimateTransformer3DModel", channels=12, latent_channels=4, image=8,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16,
        face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    given["pose_hidden_states"] = normal(2, 4, t - 1, 2 * h, 2 * w)
    given["face_pixel_values"] = normal(2, 3, 4 * (t - 2) + 1, 16, 16)
    return model, given


CASES = {
    "wan": wan,
    "wan image": lambda grid: wan(grid, channels=8, image=8),
    "wan time": lambda grid: wan(grid, tokens_time=True),
    "vace": vace,
    "hunyuan": hunyuan,
    "hunyuan concat": lambda grid: hunyuan(grid, "latent_concat"),
    "hunyuan replace": lambda grid: hunyuan(grid, "token_replace"),
    "hunyuan 1.5": hunyuan_15,
    "hunyuan 1.5 image": lambda grid: hunyuan_15(grid, True),
    "cogvideox": cogvideox,
    "cogvideox sincos": lambda grid: cogvideox(grid, "sincos"),
    "cogvideox learned": lambda grid: cogvideox(grid, "learned"),
    "cogvideox 1.5": lambda grid: cogvideox(grid, "1.5"),
    "ltx": ltx,
    "ltx conditions": lambda grid: ltx(grid, 3),
    "ltx2": ltx2,
    "ltx2 split": lambda grid: ltx2(grid, form="2.3"),
    "ltx2 keyframes": lambda grid: ltx2(grid, 4),
    "animate": animate,
}
KINDS = ("dense", "single", "group", "single")


# The oracle: the untouched model, with a mask of all pairs in its self-attention.


def owner(kind, pattern, ratio, grid, token):
    """The sub-sequence of a token, by the words of the papers."""
    _, h, w = grid
    if kind == "dense":
        return 0
    if pattern == "1d":
        return token % ratio if kind == "single" else token // ratio % ratio
    y, x = token // w % h, token % w
    if kind == "group":
        y, x = y // ratio, x // ratio
    return y % ratio, x % ratio


def pairs(kind, pattern, ratio, grid, others, first):
    N = grid[0] * grid[1] * grid[2]
    owners = [owner(kind, pattern, ratio, grid, token) for token in range(N)]
    alone = [None] * others
    owners = alone + owners if first else owners + alone
    return torch.tensor([[a is None or b is None or a == b for b in owners] for a in owners])


def masked(attention, mask):
    """Every attention that the module calls with so many tokens has that mask, and its own."""
    module = sys.modules[type(attention.processor).__module__]
    functional = getattr(module, "F", None)

    def with_mask(q, k, v, attn_mask=None, **more):
        both = mask if attn_mask is None else mask & attn_mask
        return dispatch_attention_fn(q, k, v, attn_mask=both)

    class Functional:
        @staticmethod
        def scaled_dot_product_attention(q, k, v, **more):
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def before(*_):
        if hasattr(module, "dispatch_attention_fn"):
            module.dispatch_attention_fn = with_mask
        else:
            module.F = Functional

    def after(*_):
        if hasattr(module, "dispatch_attention_fn"):
            module.dispatch_attention_fn = dispatch_attention_fn
        else:
            module.F = functional

    return attention.register_forward_pre_hook(before), attention.register_forward_hook(after)


def expected(model, given, kinds, pattern, ratio, grid):
    family = family_of(model)
    first = family.others == "first"
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    others = 0 if family.others is None else sum(given[n].shape[1] for n in names if n in given)
    if "num_frames" in given:
        others = given["hidden_states"].shape[1] - grid[0] * grid[1] * grid[2]
    handles = []
    for kind, alike in zip(kinds, family.depths, strict=True):
        for attention in alike:
            handles += masked(attention, pairs(kind, pattern, ratio, grid, others, first))
    out = run(model, given)
    for handle in handles:
        handle.remove()
    return out


def run(model, given):
    """The output, and the gradients of all weights and of the latents."""
    given = given | {"hidden_states": given["hidden_states"].clone().requires_grad_()}
    out = model(**given, return_dict=False)[0]
    model.zero_grad()
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    (out * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads | {"": given["hidden_states"].grad}


def far(a, b):
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()


def agree(found, wanted, out=1e-14, grad=2e-13):
    assert far(found[0], wanted[0]) <= out
    assert found[1].keys() == wanted[1].keys()
    largest = max(g.abs().max() for g in wanted[1].values())
    for name, g in wanted[1].items():
        error = (found[1][name] - g).abs().max()
        assert error <= grad * max(g.abs().max(), 1e-3 * largest), name


@pytest.fixture
def double(monkeypatch):
    """Models have islands of fp32, which are fp64 here."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.mark.parametrize("grid", [EVEN, RAGGED], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_exact_to_masks(case, grid, double):
    model, given = CASES[case](grid)
    before = run(model, given)
    wanted = expected(model, given, KINDS, "2d", 2, grid)
    assert far(before[0], wanted[0]) > 1e-3  # it is another function
    made = retrofit(model, kinds=KINDS)
    agree(run(model, given), wanted)
    made.undo()
    after = run(model, given)
    assert torch.equal(before[0], after[0])
