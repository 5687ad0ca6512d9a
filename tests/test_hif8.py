"""HiF8 is simulated as OSP-Next does it, to the bit, and put into a Wan and out of it again."""

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from peft import LoraConfig

from skiparse.models import hif8
from skiparse.models.hif8 import HiF8, HiF8Linear
from skiparse.models.retrofit import Retrofit, layers, retrofit

GOLDEN = load_file(Path(__file__).parent / "data" / "osp_next_hif8.safetensors")
KINDS = ["dense", "single", "group", "dense"]
TOPS = {"forward": 15.0, "backward": 224.0}


def same(found, wanted):
    """To the bit, but for which NaN it is."""
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan())


# Numbers


def test_the_quantiser_as_recorded():
    same(hif8.quantise(GOLDEN["quantise.input"]), GOLDEN["quantise.kernel"])


def test_the_format():
    """126 values above 0: a binade from 2^-3 to 2^3 has 8, then 4 and 2, below 2^-15 one."""
    values = GOLDEN["format.values"]
    made = [
        (1 + m / 2**bits) * 2.0**e
        for e in range(-22, 16)
        for bits in [3 - sum(abs(e) > edge for edge in (3, 7, 15))]
        for m in range(2**bits)
    ]
    assert made[:-1] == values.tolist()  # the last one is the code of infinity
    assert made[-1] == 1.5 * 2**15
    for sign in (1, -1):
        same(hif8.quantise(sign * values), sign * values)


def nearest(x, values):
    """By search: the nearest value, of two the larger; from half a step above all, infinity."""
    table = np.concatenate([[0], values, [1.5 * 2**15]]).astype(np.float64)
    middles = (table[1:] + table[:-1]) / 2
    table[-1] = np.inf
    return np.copysign(table[np.searchsorted(middles, np.abs(x), side="right")], x)


def test_it_is_the_nearest_value():
    values = GOLDEN["format.values"].double().numpy()
    rng = np.random.default_rng(0)
    middles = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    exact = np.concatenate([
        rng.choice([-1, 1], 20_000) * 2 ** rng.uniform(-26, 17, 20_000),
        middles, -middles, np.nextafter(middles, np.float32(0)),
        np.nextafter(middles, np.float32(9e9)),
        [2**-23, 40_960, np.nextafter(np.float32(40_960), np.float32(0))],
    ]).astype(np.float32)  # fmt: skip
    found = hif8.quantise(torch.from_numpy(exact)).double().numpy()
    assert (found == nearest(exact.astype(np.float64), values)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    x = GOLDEN["quantise.input"].to(dtype)
    same(hif8.quantise(x), hif8.quantise(x.float()).to(dtype))
    found = hif8.scaled(torch.randn(7, 3, dtype=dtype), 15.0)
    assert (found.dtype, found.shape) == (dtype, (7, 3))


def test_what_is_not_finite():
    bad = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, 0.0, -0.0, 1.0])
    same(hif8.quantise(bad), torch.tensor([*bad[:3].tolist(), torch.inf, 0.0, 0.0, 1.0]))
    for value in (torch.inf, -torch.inf, torch.nan):  # the scale is that of the whole tensor
        assert hif8.scaled(torch.tensor([value, 1.0, 0.0]), 15.0).isnan().all()
    assert not hif8.scaled(torch.zeros(3), 15.0).any()
    assert hif8.scaled(torch.empty(0, 3), 15.0).shape == (0, 3)
    tiny = torch.tensor([1e-9, -1e-12])  # below the least of a largest entry
    assert hif8.scaled(tiny, 15.0).isfinite().all()


@pytest.mark.parametrize("call", [hif8.quantise, lambda x: hif8.scaled(x, 15.0), hif8.operand])
def test_integers_are_refused(call):
    with pytest.raises(TypeError, match=r"floating dtype, got torch\.int64; HiF8 has no integers"):
        call(torch.ones(3, dtype=torch.int64))


def test_a_linear_layer_as_recorded():
    layer = nn.Linear(16, 12)
    layer.__class__ = HiF8Linear
    layer.load_state_dict({name: GOLDEN[f"linear.{name}"] for name in ("weight", "bias")})
    x = GOLDEN["linear.input"].clone().requires_grad_()
    out = layer(x)
    same(out, GOLDEN["linear.output"])
    out.backward(GOLDEN["linear.grad_output"])
    same(x.grad, GOLDEN["linear.grad_input"])
    same(layer.weight.grad, GOLDEN["linear.grad_weight"])
    same(layer.bias.grad, GOLDEN["linear.grad_bias"])


def test_attention_as_recorded():
    q, k, v = (GOLDEN[f"attention.{name}"].clone().requires_grad_() for name in "qkv")
    out = hif8.Rounded(None).dispatch(q, k, v)
    close(out, GOLDEN["attention.output"])
    out.backward(GOLDEN["attention.grad_output"])
    for name, x in zip("qkv", (q, k, v), strict=True):
        found, wanted = x.grad, GOLDEN[f"attention.grad_{name}"]
        close(found, wanted)


def close(found, wanted):
    """Within what two kernels of attention differ by in fp32."""
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


# Models


def tiny(**changes):
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        **{
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 24, "freq_dim": 16, "ffn_dim": 32, "num_layers": 4,
            "rope_max_seq_len": 32,
        } | changes
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def sparse(**changes):
    model = tiny(**changes)
    retrofit(model, "2d", ratio=2, kinds=KINDS)
    return model


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 2, 10, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 5, 24, generator=generator, dtype=torch.float64)
    return latents.to(dtype), torch.tensor([500.0]), text.to(dtype)


def velocity(model, **how):
    return model(*inputs(**how), return_dict=False)[0]


def gradients(model):
    model.zero_grad()
    velocity(model).square().mean().backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


def by_hand(x, top):
    """As the fact sheet has it, with the quantiser that is tested above."""
    scale = top / torch.maximum(x.detach().abs().max(), torch.tensor(1e-8))
    return (hif8.quantise(x.detach() * scale) / scale).to(x.dtype)


class Around(torch.autograd.Function):
    """Rounds forward, backward, or both; written apart from the library's."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_too = backward
        return by_hand(x, 15.0) if forward else x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return by_hand(gradient, 224.0) if ctx.backward_too else gradient, None, None


def rounded_by_hand(monkeypatch, model, linears=True, attention=True):
    """A model with the same arithmetic, put in by hooks and patches instead of classes."""
    wide = {id(m.weight): m for m in model.blocks.modules() if isinstance(m, nn.Linear)}
    plain = F.linear

    def linear(x, weight, bias=None):
        if not (linears and id(weight) in wide):
            return plain(x, weight, bias)
        out = plain(Around.apply(x, True, False), Around.apply(weight, True, False), bias)
        return Around.apply(out, False, True)

    def dispatch(real):
        def call(q, k, v, *args, **kwargs):
            if attention:
                q, k, v = (Around.apply(x, True, True) for x in (q, k, v))
            return real(q, k, v, *args, **kwargs)

        return call

    monkeypatch.setattr(F, "linear", linear)
    own = transformer_wan.dispatch_attention_fn
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dispatch(own))
    real = layers.Layer.dispatch

    def sparse_dispatch(self, q, k, v, *args, **kwargs):
        return dispatch(lambda *a, **k: real(self, *a, **k))(q, k, v, *args, **kwargs)

    monkeypatch.setattr(layers.Layer, "dispatch", sparse_dispatch)


@pytest.mark.parametrize("make", [tiny, sparse])
@pytest.mark.parametrize(
    "which", [{}, {"attention": False}, {"linears": False}], ids=["both", "linears", "attention"]
)
def test_it_is_what_a_model_rounded_by_hand_computes(monkeypatch, make, which):
    model, plain = make(), make()
    hif8.apply(model, **which)
    found, learnt = velocity(model), gradients(model)
    untouched = velocity(plain)
    rounded_by_hand(monkeypatch, plain, **which)
    wanted, taught = velocity(plain), gradients(plain)
    same(found, wanted)
    assert (found - untouched).abs().max() > 1e-3 * untouched.abs().max()
    for name, x in taught.items():
        same(learnt[name], x)


def test_all_products_of_the_blocks_and_no_others():
    model = sparse()
    made = hif8.apply(model)
    assert str(made) == (
        "WanTransformer3DModel: 40 linear layers and 8 attentions with operands in HiF8, simulated"
    )
    wide = [name for name, module in model.named_modules() if type(module) is HiF8Linear]
    assert {re.sub(r"\d+", "0", name, count=1) for name in wide} == {
        f"blocks.0.{name}"
        for name in (
            *(f"attn{i}.{part}" for i in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
            "ffn.net.0.proj", "ffn.net.2",
        )
    }  # fmt: skip
    assert isinstance(model.proj_out, nn.Linear)
    assert type(model.proj_out) is nn.Linear


def trace(model):
    """All that a model has: classes, attributes, processors, names, settings."""
    modules = {
        name: (type(m), sorted(vars(m)), sorted(vars(getattr(m, "processor", m))))
        for name, m in model.named_modules()
    }
    layers = [
        type(getattr(m.processor, "skiparse_layer", None))
        for m in model.modules()
        if hasattr(m, "processor")
    ]
    return modules, [*model.state_dict()], dict(model.config), layers


@pytest.mark.parametrize("make", [tiny, sparse])
def test_undo_leaves_no_trace(make):
    model = make()
    before, first = trace(model), velocity(model)
    own = [m.processor for m in model.modules() if hasattr(m, "processor")]
    made = hif8.apply(model)
    assert HiF8.of(model) is made
    assert [*model.state_dict()] == before[1]
    assert not torch.equal(velocity(model), first)
    model.set_attention_backend("native")
    made.undo()
    now = [m.processor for m in model.modules() if hasattr(m, "processor")]
    assert all(x is y for x, y in zip(now, own, strict=True))
    assert all(x._attention_backend is not None for x in now)  # what was told meanwhile stays
    for processor in now:
        processor._attention_backend = None
    same(velocity(model), first)
    for processor in now:
        del processor._attention_backend
    assert trace(model) == before
    with pytest.raises(ValueError, match="hif8 is undone already"):
        made.undo()
    with pytest.raises(ValueError, match="hif8 is not applied to this"):
        HiF8.of(model)
    hif8.apply(model)  # and again


def test_copies_pickles_and_weights(tmp_path):
    model = sparse()
    hif8.apply(model)
    found = velocity(model)
    twin = copy.deepcopy(model)
    same(velocity(twin), found)
    HiF8.of(twin).undo()
    same(velocity(twin), velocity(sparse()))
    same(velocity(model), found)
    same(velocity(pickle.loads(pickle.dumps(model))), found)
    model.save_pretrained(tmp_path)
    again = WanTransformer3DModel.from_pretrained(tmp_path)
    retrofit(again)
    close(velocity(again), velocity(sparse()))  # it is no setting of the model


@pytest.mark.parametrize("whole", [pytest.param(False, marks=pytest.mark.full), True])
def test_compiled_it_is_the_same(whole):
    """A naive replacement would compute without HiF8 there, in silence."""
    model = sparse().eval()
    dense = velocity(model)
    hif8.apply(model)
    eager = velocity(model)
    torch._dynamo.reset()
    if whole:
        model.compile(fullgraph=True, backend="aot_eager")  # it is tracing that could go wrong
    else:
        model.compile_repeated_blocks(fullgraph=True)
    with torch.no_grad():
        found = velocity(model)
    torch._dynamo.reset()
    far = (eager - dense).abs().max()
    assert (
        found - eager
    ).abs().max() < 0.2 * far  # a value near a midpoint may fall to either side


def test_the_compiled_quantiser_is_exact():
    torch._dynamo.reset()
    x = GOLDEN["quantise.input"]
    same(torch.compile(hif8.quantise, fullgraph=True)(x), GOLDEN["quantise.kernel"])
    torch._dynamo.reset()


def test_checkpointing_gives_the_same_bits():
    model = sparse().train()
    hif8.apply(model)
    wanted = gradients(model)
    model.enable_gradient_checkpointing()
    for name, x in gradients(model).items():
        same(x, wanted[name])


def test_autocast_casts_before_it_rounds():
    x, weight = torch.randn(5, 16), torch.randn(12, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = hif8.linear(x, weight)
        q, k, v = torch.randn(3, 1, 6, 2, 16)
        out = hif8.Rounded(None).dispatch(q, k, v)
    same(found, hif8.linear(x.bfloat16(), weight.bfloat16()))
    same(out, hif8.Rounded(None).dispatch(*(y.bfloat16() for y in (q, k, v))))
    model = sparse()
    hif8.apply(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = velocity(model).square().mean()
    loss.backward()
    assert all(x.grad.isfinite().all() for x in model.parameters())


def test_lora_keeps_its_own_numbers():
    for first in ("lora", "hif8"):
        model = sparse()
        config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        if first == "hif8":
            hif8.apply(model)
        model.add_adapter(config)
        if first == "lora":
            hif8.apply(model)
        wide = [name for name, m in model.named_modules() if type(m) is HiF8Linear]
        assert len(wide) == 40
        assert not any("lora_" in name for name in wide)
        assert "blocks.0.attn1.to_q.base_layer" in wide
        velocity(model).square().mean().backward()
        HiF8.of(model).undo()
        assert not any(type(m) is HiF8Linear for m in model.modules())


def test_a_class_made_of_the_known_one_is_known():
    """As FSDP makes one of it."""
    model = tiny()
    model.__class__ = type("FSDPWanTransformer3DModel", (WanTransformer3DModel,), {})
    hif8.apply(model).undo()


def test_what_is_refused():
    model = tiny()
    with pytest.raises(TypeError, match="hif8 knows blocks of a WanTransformer3DModel, got a Lin"):
        hif8.apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="give linears=True, attention=True, or both"):
        hif8.apply(model, linears=False, attention=False)
    made = hif8.apply(model)
    with pytest.raises(ValueError, match="applied to this WanTransformer3DModel already; undo"):
        hif8.apply(model)
    with pytest.raises(ValueError, match=r"put in its place already, as by retrofit or hif8; undo"):
        retrofit(model)
    assert not hasattr(model, "_skiparse")
    made.undo()
    retrofit(model)
    made = hif8.apply(model)
    with pytest.raises(ValueError, match="hif8 was applied to the layers of this retrofit; undo"):
        Retrofit.of(model).undo()
    made.undo()
    Retrofit.of(model).undo()

    fused = tiny()
    fused.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn1 has fused projections; unfuse_qkv_projections"):
        hif8.apply(fused)
    other = tiny()
    other.blocks[1].ffn.net[2].__class__ = type("Other", (nn.Linear,), {})
    before = trace(other)
    with pytest.raises(TypeError, match=r"blocks\.1\.ffn\.net\.2 is a Other, whose product has no"):
        hif8.apply(other)
    assert trace(other) == before
