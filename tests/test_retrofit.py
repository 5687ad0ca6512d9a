"""Retrofitted video transformers of diffusers: exact to masks of all pairs, and composed."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from processes import together
from torch._dynamo.testing import CompileCounter

diffusers = pytest.importorskip("diffusers")
from diffusers.models.attention_dispatch import (  # noqa: E402
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)

from skiparse.models.retrofit import Retrofit, Sparsity, choose, retrofit, schedule  # noqa: E402
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


def self_attention(model):
    """That of each layer, and of a block of VACE's control branch that runs at its depth."""
    names = ("blocks", "transformer_blocks", "single_transformer_blocks")
    blocks = [block for name in names for block in getattr(model, name, [])]
    found = [[getattr(block, "attn1", None) or block.attn] for block in blocks]
    control = model.config.get("vace_layers", []), getattr(model, "vace_blocks", [])
    for depth, block in zip(*control, strict=True):
        found[depth].append(block.attn1)
    return found


def expected(model, given, kinds, pattern, ratio, grid):
    first = type(model).__name__.startswith(("CogVideoX", "LTXVideo"))  # so its pipeline has it
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    joint = type(model).__name__.startswith(("CogVideoX", "Hunyuan"))
    others = sum(given[n].shape[1] for n in names if n in given) if joint else 0
    if "num_frames" in given:
        others = given["hidden_states"].shape[1] - grid[0] * grid[1] * grid[2]
    handles = []
    for kind, alike in zip(kinds, self_attention(model), strict=True):
        for attention in alike:
            handles += masked(attention, pairs(kind, pattern, ratio, grid, others, first))
    out = run(model, given)
    for handle in handles:
        handle.remove()
    return out


@pytest.fixture(autouse=True)
def active_backend(monkeypatch):
    """``set_attention_backend`` of one model is that of all others, for good; here of one test."""
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)


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


@pytest.mark.full
@pytest.mark.parametrize("reorder", [True, False], ids=["skip", "natural"])
@pytest.mark.parametrize(("pattern", "ratio"), [("1d", 2), ("1d", 4), ("1d", 3), ("2d", 3)])
@pytest.mark.parametrize("grid", [EVEN, RAGGED, (2, 9, 18), (3, 6, 4)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_exact_to_masks_for_all_patterns(case, grid, pattern, ratio, reorder, double):
    model, given = CASES[case](grid)
    wanted = expected(model, given, KINDS, pattern, ratio, grid)
    made = retrofit(model, pattern, ratio=ratio, kinds=KINDS, reorder=reorder)
    agree(run(model, given), wanted)
    made.undo()


@pytest.mark.parametrize(("pattern", "ratio"), [("1d", 4), ("1d", 3), ("2d", 3)])
def test_exact_for_other_patterns(pattern, ratio, double):
    model, given = wan((2, 6, 9))
    wanted = expected(model, given, KINDS, pattern, ratio, (2, 6, 9))
    retrofit(model, pattern, ratio=ratio, kinds=KINDS)
    agree(run(model, given), wanted)


# What is kept, and what is left when it is undone.


def small(grid=EVEN, **more):
    """A tiny Wan in fp32, its arguments, and what it says when it is dense."""
    torch.manual_seed(1)
    model, given = wan(grid, **more)
    given = {k: v.float() for k, v in given.items()}
    return model.float(), given


@torch.no_grad()
def said(model, given):
    return model(**given, return_dict=False)[0]


def trace(model):
    """All that a retrofit could leave behind."""
    return {
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        "processors": {
            name: (m.processor, dict(vars(m.processor)))
            for name, m in model.named_modules()
            if hasattr(m, "processor")
        },
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
        "config": dict(model.config),
        "weights": list(model.state_dict()),
    }


@pytest.mark.parametrize("case", CASES)
def test_undo_leaves_no_trace(case):
    model, _ = CASES[case](EVEN)
    before = trace(model)
    made = retrofit(model)
    assert trace(model) != before
    assert list(model.state_dict()) == before["weights"]
    made.undo()
    assert trace(model) == before
    with pytest.raises(ValueError, match="undone already"):
        made.undo()


def test_undo_keeps_what_was_told_meanwhile():
    model, _ = small()
    made = retrofit(model, kinds=KINDS)
    model.set_attention_backend("_native_math")
    made.undo()
    assert {b.attn1.processor._attention_backend for b in model.blocks} == {"_native_math"}
    model.reset_attention_backend()


def test_dense_layers_are_untouched_bit_for_bit():
    model, given = small()
    before = said(model, given)
    for settings in ({"kinds": ["dense"] * 4}, {"ratio": 1, "reorder": False}):
        made = retrofit(model, **settings)
        assert torch.equal(said(model, given), before) or settings.get("ratio") == 1
        assert far(said(model, given), before) < 1e-6
        made.undo()


def test_what_it_says_of_itself():
    model, _ = small(layers=12)
    made = retrofit(model)
    assert made.sparsity == Sparsity("2d", 2, schedule(12))
    assert str(made) == (
        "WanTransformer3DModel, 2d ratio 2, 4 sub-sequences: layers 0 dense, 1-10 single and "
        "group, 11 dense; tokens in skip order where the grid has one"
    )
    made.undo()
    made = retrofit(model, "1d", ratio=3, dense=(0, 11), reorder=False)
    assert str(made) == (
        "WanTransformer3DModel, 1d ratio 3, 3 sub-sequences: layers 0 single, 1-11 dense; tokens "
        "in natural order"
    )


def test_schedule_is_that_of_osp_next():
    kinds = schedule(40)
    assert kinds == schedule(40, (4, 4))
    assert set(kinds[:4] + kinds[-4:]) == {"dense"}
    assert kinds[4:36] == ("single", "group") * 16
    with pytest.raises(ValueError, match=r"40 at most in all; got \(30, 11\)"):
        schedule(40, (30, 11))


def test_sparsity_goes_with_the_weights(tmp_path):
    model, given = small()
    made = retrofit(model, "1d", ratio=4, kinds=KINDS)
    before = said(model, given)
    model.save_pretrained(tmp_path / "model")
    made.save(tmp_path / "lora")
    found = type(model).from_pretrained(tmp_path / "model")
    assert far(said(found, given), before) > 1e-3  # dense, until it is asked for
    again = retrofit(found)
    assert again.sparsity == made.sparsity == Sparsity.load(tmp_path / "lora")
    assert torch.equal(said(found, given), before)
    again.undo()
    assert found.config["skiparse"]["kinds"] == list(KINDS)  # it came with it
    retrofit(found, Sparsity.load(tmp_path / "lora"))
    assert torch.equal(said(found, given), before)


def test_a_pipeline_with_two_transformers():
    class Pipeline:
        def __init__(self):
            (first, _), (second, _) = small(), small()
            self.components = {"transformer": first, "transformer_2": second, "vae": object()}

    pipe = Pipeline()
    made = retrofit(pipe, kinds=KINDS)
    assert len(made.parts) == 2
    assert len(str(made).splitlines()) == 2
    assert made.sparsity.kinds == KINDS
    made.undo()
    one = retrofit(pipe.components["transformer_2"])
    before = trace(pipe.components["transformer"])
    with pytest.raises(ValueError, match="retrofitted already"):
        retrofit(pipe)
    assert trace(pipe.components["transformer"]) == before  # not the first one either
    one.undo()
    pipe.components = {"vae": object()}
    with pytest.raises(TypeError, match="no part of this Pipeline is known"):
        retrofit(pipe)


def test_choose_is_greedy_and_leaves_the_model():
    model, _ = small()
    before = trace(model)
    worth = (0.3, 0.0, 0.5, 0.4)
    calls, picks = [], []

    def loss(model):
        kinds = Retrofit.of(model).sparsity.kinds
        calls.append(kinds)
        dense = [i for i, kind in enumerate(kinds) if kind == "dense"]
        together = 0.4 if {2, 3} <= set(dense) else 0.0  # 3 is worth nothing beside 2
        return 1 - sum(worth[i] for i in dense) + together

    found = choose(model, loss, 2, report=lambda *what: picks.append(what[:2]))
    assert found.kinds == ("dense", "group", "dense", "group")
    assert picks == [(1, 2), (2, 0)]
    assert len(calls) == 4 + 3
    assert trace(model) == before
    with pytest.raises(ValueError, match="budget must be from 0 to 4"):
        choose(model, loss, 5)
    with pytest.raises(ZeroDivisionError):
        choose(model, lambda model: 1 / 0, 1)
    assert trace(model) == before


# What it costs.


def test_cost_is_that_of_the_formula():
    """Wan 1.3B, of four layers."""
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=4)
    cost = retrofit(model, dense=(1, 1)).cost(frames=81, height=720, width=1280)
    N, C, F, T = 21 * 45 * 80, 1536, 8960, 512
    assert cost.tokens == N == 75_600
    assert cost.dense_attention == 4 * 4 * C * N * N
    layer = 2 * N * C * (4 * C + 2 * C + 2 * F) + 2 * T * C * 2 * C + 4 * C * N * T
    rest = cost.dense - 4 * layer - cost.dense_attention
    assert 0 < rest < 0.001 * cost.dense  # patches, time and text
    rows = [23 * 40, 23 * 40, 22 * 40, 22 * 40]  # of a frame, by sub-sequence
    sparse = sum((21 * r) ** 2 for r in rows)
    assert cost.dense - cost.sparse == 2 * 4 * C * (N * N - sparse)
    assert cost.attention == pytest.approx(4 * N * N / (2 * N * N + 2 * sparse))
    assert "75,600 tokens" in str(cost)


@pytest.mark.full
def test_cost_of_wan_14b():
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel()
    cost = retrofit(model).cost(frames=81, height=720, width=1280)
    assert (round(cost.attention, 2), round(cost.model, 2)) == (2.50, 1.76)
    assert round(cost.share, 2) == 0.72


CONFIGS = {
    "HunyuanVideoTransformer3DModel": {"num_layers": 1, "num_single_layers": 1},
    "HunyuanVideo15Transformer3DModel": {"num_layers": 2},
    "CogVideoXTransformer3DModel": {"num_layers": 2, "use_rotary_positional_embeddings": True},
    "LTXVideoTransformer3DModel": {"num_layers": 2},
    "LTX2VideoTransformer3DModel": {"num_layers": 2},
    "WanVACETransformer3DModel": {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 96},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_cost_of_each_family(name):
    """Of a dense and a sparse layer: the sparse one's attention falls to a quarter, less text."""
    with torch.device("meta"):
        model = getattr(diffusers, name)(**CONFIGS[name])
    made = retrofit(model, kinds=["dense", "single"])
    cost = made.cost(frames=97, height=512, width=768)
    depths = 3 if "VACE" in name else 2
    dense = 2 if "VACE" in name else 1
    assert cost.attention == pytest.approx(depths / (dense + 0.25), rel=0.1)
    assert 1 < cost.model < cost.attention
    with pytest.raises(ValueError, match="do not make whole tokens"):
        made.cost(frames=97, height=511, width=768)


# Compiled, copied, in threads.


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LONG = [pytest.param(case, marks=pytest.mark.full) for case in ("hunyuan", "hunyuan 1.5", "ltx2")]


@pytest.mark.parametrize("case", ["wan", "ltx", "cogvideox", *LONG])
def test_compiled_is_eager(case, fresh):
    """A processor that found diffusers' own call again would be dense here, and here alone."""
    model, given = CASES[case](EVEN)
    dense = said(model, given)
    retrofit(model, kinds=KINDS)
    before = said(model, given)
    assert far(before, dense) > 1e-3
    whole = case != "hunyuan 1.5"  # it looks at values, so a whole graph cannot be had
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    assert far(said(compiled, given), before) < 1e-14
    torch._dynamo.reset()
    if case != "cogvideox":  # which does not name its blocks
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert far(said(model, given), before) < 1e-14


def test_compiled_first_and_for_other_grids(fresh):
    counter = CompileCounter()
    model, _ = small()
    retrofit(model, kinds=KINDS)
    plain = copy.deepcopy(model)
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    graphs = []
    for grid in [EVEN, (3, 8, 12), (2, 12, 8), RAGGED, (2, 7, 9), (1, 9, 6), (4, 6, 5)]:
        given = small(grid)[1]
        assert far(said(model, given), said(plain, given)) < 1e-6
        graphs.append(counter.frame_count)
    assert graphs == [3, 6, 6, 8, 8, 8, 8]  # dense, single, group; then sizes are variables


def test_whole_model_compiled_before_it_ever_ran(fresh):
    model, given = small()
    retrofit(model, kinds=KINDS)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert far(said(compiled, given), said(plain, given)) < 1e-6


def test_a_copy_has_its_own_grid():
    model, given = small()
    retrofit(model, kinds=KINDS)
    twin = copy.deepcopy(model)
    before = said(model, given)
    Retrofit.of(twin).parts[0].state.enter((1, 4, 4), torch.device("cpu"))
    assert Retrofit.of(model).parts[0].state.plan.grid == EVEN
    assert torch.equal(said(twin, given), before)
    Retrofit.of(twin).undo()
    assert far(said(twin, given), before) > 1e-3
    assert torch.equal(said(model, given), before)  # it still is
    with pytest.raises(ValueError, match="not retrofitted"):
        Retrofit.of(twin)


def test_pickled():
    for case in ("wan", "hunyuan 1.5", "cogvideox"):
        model, given = CASES[case](EVEN)
        retrofit(model, kinds=KINDS)
        before = said(model, given)
        found = pickle.loads(pickle.dumps(model))
        assert torch.equal(said(found, given), before)
        Retrofit.of(found).undo()
        assert far(said(found, given), before) > 1e-3


def test_two_threads_do_not_mix_layers():
    """Layers of two models, of other kinds, at the same time."""
    models, wanted = [], []
    for kinds in (KINDS, ("group", "dense", "dense", "single")):
        model, given = small()
        retrofit(model, kinds=kinds, reorder=False)
        models.append(model)
        wanted.append(said(model, given))
    wrong = []

    def work(i):
        for _ in range(30):
            if far(said(models[i], given), wanted[i]) > 1e-6:
                wrong.append(i)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong


def test_training_after_inference_mode():
    """What was made for the grid in inference mode serves a backward too."""
    model, given = small()
    retrofit(model, kinds=KINDS)
    with torch.inference_mode():
        before = model(**given, return_dict=False)[0]
    assert torch.equal(run(model, given)[0], before)


# With what else people do to a model.


def test_gradient_checkpointing_is_bit_equal():
    model, given = small()
    retrofit(model, kinds=KINDS)
    before = run(model, given)
    model.train().enable_gradient_checkpointing()
    after = run(model, given)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], g) for name, g in after[1].items())


@pytest.mark.parametrize("grid", [EVEN, RAGGED], ids=str)
@pytest.mark.parametrize("pattern", ["1d", "2d"])
@pytest.mark.parametrize("case", ["wan", "hunyuan", "ltx conditions", "hunyuan 1.5"])
def test_a_backend_of_diffusers_gets_sub_sequences(case, pattern, grid, monkeypatch):
    from skiparse.models.retrofit import layers

    model, given = CASES[case](grid)
    retrofit(model, pattern, kinds=("single", "group", "single", "group"))
    before = run(model, given)
    model.set_attention_backend("_native_math")
    called = []

    def watched(query, key, *more, **settings):
        called.append((settings["backend"], query.shape[1]))
        return dispatch_attention_fn(query, key, *more, **settings)

    monkeypatch.setattr(layers, "dispatch_attention_fn", watched)
    monkeypatch.setattr(layers.skiparse, "attention", None)  # it is not ours that is called
    monkeypatch.setattr(layers.skiparse, "joint_attention", None)
    try:
        after = run(model, given)
    finally:
        model.reset_attention_backend()
    tokens = grid[0] * grid[1] * grid[2]
    assert {str(backend) for backend, _ in called} <= {
        "_native_math", "AttentionBackendName._NATIVE_MATH",
    }  # fmt: skip
    assert max(queries for _, queries in called) < 0.6 * tokens + 10
    assert far(after[0], before[0]) < 1e-12
    largest = max(g.abs().max() for g in before[1].values())
    assert all((after[1][name] - g).abs().max() < 1e-11 * largest for name, g in before[1].items())


def test_hunyuan_15_has_no_mask_of_all_pairs():
    """Nor in dense layers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.bool:
                self.found = max(self.found, out.numel())
            return out

    model, given = hunyuan_15((2, 16, 16))
    tokens = 2 * 16 * 16 + 13
    with Largest() as before:
        wanted = said(model, given)
    assert before.found == 2 * tokens * tokens
    retrofit(model, kinds=["dense"] * 4)
    with Largest() as after:
        found = said(model, given)
    assert after.found <= 2 * tokens
    assert far(found, wanted) < 1e-14


def test_group_offload_and_layerwise_casting():
    model, given = small()
    retrofit(model, kinds=KINDS)
    before = said(model, given)
    for first in (True, False):
        for level in ({"offload_type": "block_level", "num_blocks_per_group": 1},
                      {"offload_type": "leaf_level"}):  # fmt: skip
            other, _ = small()
            steps = [
                lambda other=other: retrofit(other, kinds=KINDS),
                lambda other=other, level=level: other.enable_group_offload(
                    onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **level
                ),
            ]
            for step in steps if first else steps[::-1]:
                step()
            assert torch.equal(said(other, given), before)
    casts = []
    for first in (True, False):
        other, _ = small()
        if first:
            retrofit(other, kinds=KINDS)
        other.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        if not first:
            retrofit(other, kinds=KINDS)
        casts.append(said(other, given))
    assert torch.equal(*casts)
    assert far(casts[0], before) > 1e-4


def test_first_block_cache():
    found = []
    for first in (True, False):
        model, given = small()
        steps = [
            lambda model=model: retrofit(model, kinds=("single", "group", "single", "group")),
            lambda model=model: model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.5)),
        ]
        for step in steps if first else steps[::-1]:
            step()
        calls = []
        model.blocks[2].attn1.to_q.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with model.cache_context("cond"):
            outs = [said(model, given | {"timestep": given["timestep"] - i}) for i in range(3)]
        assert len(calls) < 3  # it skips blocks
        found.append(torch.stack(outs))
    assert torch.equal(*found)


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model, given = small()
    retrofit(model, kinds=KINDS)
    before = said(model, given)
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model.add_adapter(config)
    assert torch.equal(said(model, given), before)  # a new one changes nothing
    _, grads = run(model, given)
    assert {name.split("_", 1)[0] for name in grads if name} == {"blocks.0.attn1.to"} or all(
        "lora" in name for name in grads if name
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    tuned = said(model, given)
    assert far(tuned, before) > 1e-3
    model.save_lora_adapter(tmp_path)
    Retrofit.of(model).save(tmp_path)
    other, _ = small()
    other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    retrofit(other, Sparsity.load(tmp_path))
    assert torch.equal(said(other, given), tuned)
    other.fuse_lora()
    assert far(said(other, given), tuned) < 1e-5
    other.unfuse_lora()
    other.delete_adapters("default_0")
    assert far(said(other, given), before) < 1e-5


def test_fused_projections():
    model, given = small()
    retrofit(model, kinds=KINDS)
    before = said(model, given)
    model.fuse_qkv_projections()
    assert far(said(model, given), before) < 1e-6


# What is refused, with nothing half changed.


def refused(model, error, match, **settings):
    before = trace(model)
    with pytest.raises(error, match=match):
        retrofit(model, **settings)
    assert trace(model) == before


def test_refuses_what_does_not_fit():
    model, _ = small()
    refused(model, ValueError, "kinds has 3 layers, but WanTransf.* has 4", kinds=KINDS[:3])
    refused(model, ValueError, "kinds must be of", kinds=("dens",) * 4)
    refused(model, ValueError, "pattern must be one of", pattern="3d")
    refused(model, ValueError, "ratio must be a whole number above 0, got 0", ratio=0)
    refused(model, ValueError, r"dense must be two numbers >= 0, 4 at most", dense=(3, 2))
    refused(model, ValueError, "not both", dense=(1, 1), kinds=KINDS)
    both = {"pattern": Sparsity("2d", 2, KINDS), "ratio": 2}
    refused(model, ValueError, "a Sparsity says it all", **both)
    model.register_to_config(skiparse={"pattern": "2d"})
    refused(model, ValueError, "told by pattern, ratio and kinds")


def test_refuses_a_model_it_does_not_know():
    with pytest.raises(TypeError, match=r"Linear is not known .* WanTransformer3DModel.*family="):
        retrofit(torch.nn.Linear(2, 2))


def test_takes_a_family_that_somebody_describes():
    class Other(diffusers.WanTransformer3DModel):
        pass

    model, given = small()
    family = family_of(model)
    wanted = copy.deepcopy(model)
    retrofit(wanted, kinds=KINDS)
    retrofit(model, kinds=KINDS, family=family)
    assert torch.equal(said(model, given), said(wanted, given))


def test_refuses_a_second_retrofit():
    model, _ = small()
    retrofit(model)
    refused(model, ValueError, r"retrofitted already; undo\(\) that first")


def test_refuses_after_parallelism():
    model, _ = small()
    model._parallel_config = object()
    refused(model, ValueError, "comes before enable_parallelism")
    model._parallel_config = None
    made = retrofit(model)
    model._parallel_config = object()
    before = trace(model)
    with pytest.raises(ValueError, match="comes before enable_parallelism"):
        made.undo()
    assert trace(model) == before


def test_refuses_a_processor_that_does_not_call_it():
    class Fused:
        def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb):
            return hidden_states

    model, _ = small()
    model.blocks[3].attn1.set_processor(Fused())
    refused(model, TypeError, "Fused of this diffusers does not call", kinds=KINDS)


def test_refuses_processors_that_came_later():
    """The fused one of CogVideoX would be dense, in silence."""
    model, given = cogvideox(EVEN)
    retrofit(model, kinds=KINDS)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="has got a FusedCogVideoXAttnProcessor2_0 since"):
        said(model, given)


def test_refuses_an_unknown_grid():
    model, given = ltx(EVEN, 3)
    retrofit(model, kinds=KINDS)
    del given["num_frames"]
    with pytest.raises(ValueError, match=r"unknown: num_frames not given"):
        said(model, given)


def test_refuses_tokens_that_are_not_of_the_grid():
    model, given = ltx(EVEN)
    retrofit(model, kinds=KINDS)
    with pytest.raises(ValueError, match=r"128 tokens, but the grid .* has 160"):
        said(model, given | {"height": 10, "video_coords": torch.rand(2, 3, 128)})


def test_refuses_a_mask_over_pairs_of_video_tokens():
    model, given = ltx2(EVEN)
    made = retrofit(model, kinds=KINDS)
    given["video_self_attention_mask"] = torch.ones(2, 128, 128).double()
    with pytest.raises(ValueError, match="over pairs of video tokens has no sparse form"):
        said(model, given)
    made.undo()
    said(model, given)


@pytest.mark.full
def test_two_processes_are_one():
    """Diffusers' context parallelism after a retrofit, and FSDP2 before and after one."""
    done = together(2, "retrofit_parallel.py")
    assert done.returncode == 0, done.stderr
    found = [row.split() for row in done.stdout.splitlines() if row[:5] in ("paral", "FSDP2")]
    assert len(found) == 6
    for row in found:
        errors = [float(word) for word in row if "e-" in word or "e+" in word]
        assert errors
        assert max(errors) < 1e-13, row


def test_parallelism_over_anything_but_heads_is_refused():
    from types import SimpleNamespace

    model, given = small()
    retrofit(model, kinds=KINDS)
    names = ("ring_degree", "ulysses_degree", "ulysses_anything")
    for settings in ((2, 1, False), (1, 2, True), (1, 3, False)):
        config = dict(zip(names, settings, strict=True))
        parallel = SimpleNamespace(context_parallel_config=SimpleNamespace(**config))
        model.blocks[1].attn1.processor._parallel_config = parallel
        with pytest.raises(ValueError, match="run in parallel over heads, in equal parts"):
            said(model, given)


def test_what_is_saved_is_whole_or_refused(tmp_path):
    sparsity = Sparsity("2d", 2, ("dense", "single"))
    assert Sparsity.load(sparsity.save(tmp_path / "new").parent) == sparsity
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["skiparse.json"]
    with pytest.raises(FileNotFoundError, match=r"skiparse\.json is not there; give a folder"):
        Sparsity.load(tmp_path)
    for text in ("{", "[]", '{"pattern": "2d"}', '{"pattern": "2d", "ratio": 2, "kinds": 3}'):
        (tmp_path / "skiparse.json").write_text(text)
        with pytest.raises(ValueError, match=r"skiparse\.json does not tell what is sparse"):
            Sparsity.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*file is a file"):
        sparsity.save(tmp_path / "file")
