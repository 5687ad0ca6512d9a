"""SUV computes what the original implementation did, in any token order, and loads strictly."""

import copy
import json
import re
import socket

import golden as recording
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from skiparse.models.suv import sparsity
from skiparse.models.suv.blocks import SUVBlock
from skiparse.models.suv.model import SUV
from skiparse.models.suv.plan import NATURAL, Plan
from skiparse.models.wfvae.model import WFVAE
from skiparse.pattern import ceiling, skip_order

FORWARD, GRADIENT = 2e-5, 1e-4  # recorded with the goldens, relative to the largest value


@pytest.fixture(scope="module")
def golden():
    return recording.load("suv_tiny.safetensors")


def our_name(name):
    """The recorded (MindSpeed-MM) name of a parameter in ours; written apart from convert.py."""
    name = re.sub(r"^skip_norm_linear_enc\.", "text_skips.", name)
    name = re.sub(r"^skip_norm_linear\.", "skips.", name)
    name = re.sub(r"(skips\.\d+)\.0\.", r"\1.norm.", name)
    name = re.sub(r"(skips\.\d+)\.1\.", r"\1.linear.", name)
    for theirs, ours in (
        ("patch_embed.proj.", "patch_embed."),
        ("time_text_embed.timestep_embedder.", "timestep_embed."),
        ("time_text_embed.text_embedder.", "pooled_embed."),
        ("caption_projection.", "text_embed."),
        ("transformer_blocks.", "stages."),
        (".norm_enc.", ".text_norm."),
        (".attn1.", ".attn."),
        (".norm_added_proj_", ".text_norm_"),
        (".norm_proj_", ".norm_"),
        (".added_proj_", ".text_to_"),
        (".attn.proj_", ".attn.to_"),
        ("ff.net.0.proj.", "ff.linear_1."),
        ("ff.net.2.", "ff.linear_2."),
        ("ff_enc.net.0.proj.", "text_ff.linear_1."),
        ("ff_enc.net.2.", "text_ff.linear_2."),
    ):
        name = name.replace(theirs, ours)
    return name


def model_of(golden, **changes):
    weights = {our_name(k[2:]): v.float() for k, v in golden.items() if k.startswith("w.")}
    model = SUV(**(SUV.presets["tiny"] | changes)).eval()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def inputs_of(golden):
    names = ("latents", "timestep", "prompt", "pooled", "text_mask", "video_mask")
    found = [golden[f"in.{name}"].clone() for name in names]
    return [*found[:4], *(mask == 1 for mask in found[4:])]


def close(x, right, tolerance, what=""):
    error = (x - right).abs().max().item()
    assert error <= tolerance * right.abs().max().item(), f"{what}: off by {error:.3e}"


VARIANTS = {
    "base": {},
    "no_skip": {"skip_connection": False},
    "dense": {"sparsity": (1, 1, 1, 1, 1)},
}


@pytest.mark.parametrize("reorder", [True, False], ids=["skip-order", "natural-order"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_of_the_original(golden, variant, reorder):
    """N = 72: k = 2 lives in skip order, k = 4 in natural order."""
    model = model_of(golden, **VARIANTS[variant])
    inputs = inputs_of(golden)
    wanted = {"latents": inputs[0], "prompt": inputs[2], "pooled": inputs[3]}
    for x in wanted.values():
        x.requires_grad_()
    out = model(*inputs, reorder=reorder)
    close(out, golden[f"{variant}.out"], FORWARD)
    (out * golden["in.grad_out"]).sum().backward()
    for name, x in wanted.items():
        close(x.grad, golden[f"{variant}.grad.{name}"], GRADIENT, name)
    parameters = dict(model.named_parameters())
    mark = f"{variant}.gradp."
    recorded = [k for k in golden if k.startswith(mark)]
    assert recorded
    for key in recorded:
        close(parameters[our_name(key[len(mark) :])].grad, golden[key], GRADIENT, key)


def test_every_intermediate_of_the_original(golden):
    model = model_of(golden)
    seen = {}

    def keep(name):
        def hook(module, args, out):
            seen[name] = out

        return hook

    for name in ("patch_embed", "text_embed", "norm_final", "norm_out"):
        getattr(model, name).register_forward_hook(keep(name))
    for s, stage in enumerate(model.stages):
        for b, block in enumerate(stage):
            block.register_forward_hook(keep((s, b)))
    with torch.no_grad():
        model(*inputs_of(golden), trim_text=False, reorder=False)
        condition = model._condition(golden["in.timestep"], golden["in.pooled"])
    patches = seen["patch_embed"].squeeze(-1).transpose(1, 2)
    close(patches, golden["base.mid.patch_embed"], FORWARD)
    close(seen["text_embed"], golden["base.mid.caption"][:, 0], FORWARD)
    close(condition, golden["base.mid.cond"], FORWARD)
    for name in ("norm_final", "norm_out"):
        close(seen[name].transpose(0, 1), golden[f"base.mid.{name}"], FORWARD, name)
    for s in range(5):
        for b in range(2):
            video, text = (x.transpose(0, 1) for x in seen[s, b])
            close(video, golden[f"base.mid.block{s}.{b}.vis"], FORWARD, f"{s}.{b}")
            if (s, b) != (4, 1):  # nothing reads the text of the last block
                close(text, golden[f"base.mid.block{s}.{b}.txt"], FORWARD, f"{s}.{b}")


def test_the_rotary_table_of_the_original(golden):
    model = model_of(golden)
    plan = Plan.of(72, model.config.sparsity)
    cos, sin = model._rotary((3, 4, 6), plan, NATURAL, torch.device("cpu"))
    for table, name in ((cos, "cos"), (sin, "sin")):
        axes = [golden[f"base.mid.rope_{name}_{axis}"][:, 0, 0] for axis in ("t", "y", "x")]
        halves = torch.cat([x[:, : x.shape[1] // 2] for x in axes], -1)
        close(table, halves, FORWARD)


def test_a_shared_feed_forward(golden):
    """The one recording has the original release's rule, text not normalised: take that norm out.

    Ours, MindSpeed-MM's rule, differs in just that norm.
    """
    model = model_of(golden, double_ff=False)
    ours = model(*inputs_of(golden))
    for block in (block for stage in model.stages for block in stage):
        block.norm2.text_norm = None
    latents, *rest = inputs_of(golden)
    out = model(latents.requires_grad_(), *rest)
    close(out, golden["shared_ff_osp15.out"], FORWARD)
    (out * golden["in.grad_out"]).sum().backward()
    close(latents.grad, golden["shared_ff_osp15.grad.latents"], GRADIENT)
    assert (ours - out).abs().max() > 1e-2


def test_parameters_nothing_reads_have_no_gradient(golden):
    model = model_of(golden)
    (model(*inputs_of(golden)) * golden["in.grad_out"]).sum().backward()
    idle = {
        f"stages.4.1.attn.{name}"
        for name in ("text_norm_q.weight", "text_to_q.weight", "text_to_q.bias")
    }
    zero = {name for name, p in model.named_parameters() if not p.grad.abs().max() > 0}
    assert zero == idle
    assert all(p.grad is not None for p in model.parameters())


def random_inputs(model, grid=(2, 8, 8), B=2, L=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    c = model.config
    return [
        torch.randn(B, c.in_channels, *grid, generator=g),
        torch.rand(B, generator=g) * 1000,
        torch.randn(B, L, c.text_channels, generator=g),
        torch.randn(B, c.pooled_channels, generator=g),
    ]


def small(seed=0, **changes):
    torch.manual_seed(seed)
    return SUV(**(SUV.presets["tiny"] | changes)).eval()


PUBLISHED = {
    "double": {},
    "shared": {"double_ff": False},
    "no-skip": {"skip_connection": False},
    "skip-norm": {"skip_zero_init": False},
    "rms": {"norm": "rms_norm"},
    "rms-skip-norm": {"norm": "rms_norm", "skip_zero_init": False},
    "dense": {"sparsity": (1,) * 5},
    "one-stage": {"num_layers": (3,), "sparsity": (4,)},
    "three-stages": {"num_layers": (1, 2, 1), "sparsity": (4, 2, 8)},
    "uneven": {"num_layers": (1, 3, 2, 1, 2), "sparsity": (1, 2, 4, 8, 2)},
}


@pytest.mark.parametrize("changes", PUBLISHED.values(), ids=PUBLISHED)
def test_variants_give_the_same_in_skip_and_natural_order(changes):
    """Skips join stages of different order, too. Every parameter that is read gets a gradient."""
    model = small(**changes)
    inputs = random_inputs(model)
    mask = torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.2
    found = []
    for reorder in (True, False):
        model.zero_grad()
        out = model(*inputs, video_mask=mask, reorder=reorder)
        out.square().sum().backward()
        found.append((out, {n: p.grad for n, p in model.named_parameters()}))
    (out, grads), (natural, natural_grads) = found
    close(out, natural, FORWARD)
    for name, grad in grads.items():
        assert grad is not None, name
        close(grad, natural_grads[name], GRADIENT, name)


def test_tokens_are_permuted_only_where_the_sparsity_changes():
    plan = Plan.of(36864, (1, 2, 4, 8, 4, 2, 1))
    assert plan.orders == (2, 2, 4, 8, 4, 2, 2)
    x = np.arange(36864)
    index = plan.permutation(4, 8)
    assert np.array_equal(x[skip_order(36864, 4)][index], x[skip_order(36864, 8)])
    assert np.array_equal(plan.permutation(NATURAL, 2), skip_order(36864, 2))
    assert np.array_equal(x[skip_order(36864, 2)][plan.permutation(2, NATURAL)], x)
    assert plan.permutation(4, 4) is None
    assert plan.pattern(3, 1).run == 36864 // 8
    assert plan.pattern(3, 0).run == 1
    assert plan.pattern(0, 1).sparsity == 1
    assert Plan.of(72, (1, 2, 4, 2, 1)).orders == (2, 2, 1, 2, 2)
    assert Plan.of(72, (1, 2, 4, 2, 1)).pattern(2, 1).run == 4
    assert Plan.of(64, (1, 2, 1), reorder=False).orders == (1, 1, 1)
    assert Plan.of(64, (1, 1, 1)).orders == (1, 1, 1)


def test_the_model_permutes_four_times(monkeypatch):
    """The hidden states, that is; the ends are permuted as pixels, a few numbers a token."""
    model = small()
    widths = []
    right = torch.Tensor.index_select

    def counted(x, dim, index):
        widths.append(x[0, 0].numel())
        return right(x, dim, index)

    monkeypatch.setattr(torch.Tensor, "index_select", counted)
    model(*random_inputs(model))
    assert widths.count(64) == 2  # 2 -> 4 -> 2
    assert widths.count(16) == 2  # 4 channels of 2x2 pixels, in and out


def test_rotary_tables_are_computed_once_for_a_shape(monkeypatch):
    from skiparse.models.suv import model as module

    calls = []
    right = module.rotary_angles
    monkeypatch.setattr(module, "rotary_angles", lambda *a: calls.append(a) or right(*a))
    model = small()
    for _ in range(2):
        model(*random_inputs(model))
    assert len(calls) == 2  # one for each order
    model(*random_inputs(model, grid=(1, 8, 8)))
    assert len(calls) == 4


def test_published_sizes():
    counts = {"v1.5": 8_504_661_120}
    for name, arguments in SUV.presets.items():
        with torch.device("meta"):
            model = SUV(**arguments)
        total = sum(p.numel() for p in model.parameters())
        assert total == counts.get(name, total)
        if name.endswith("B"):
            assert total // 10**9 == int(name[:-1]), (name, total)
    assert not list(model.buffers())


def test_trimmed_text_changes_nothing(golden):
    """Exact for the video: whatever stands in masked text, no bit of the output hears of it."""
    model = model_of(golden)
    latents, timestep, text, pooled, text_mask, _ = inputs_of(golden)
    text_mask = text_mask.clone()
    text_mask[:, 5:] = 0
    arguments = (latents, timestep, text, pooled, text_mask)
    out = model(*arguments)
    close(out, model(*arguments, trim_text=False), FORWARD)
    other = torch.where(text_mask[..., None] == 1, text, 1e3)
    assert torch.equal(model(latents, timestep, other, pooled, text_mask), out)
    cut = text[:, :5], pooled, text_mask[:, :5]
    assert torch.equal(model(latents, timestep, *cut), out)
    lengths = []
    model.text_embed.register_forward_hook(lambda m, args, out: lengths.append(out.shape[1]))
    model(*arguments)
    model(*arguments, trim_text=False)
    assert lengths == [5, 7]


def test_no_text_at_all():
    model = small()
    latents, timestep, text, pooled = random_inputs(model)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    out = model(latents, timestep, text, pooled, nothing)
    assert out.isfinite().all()
    close(out, model(latents, timestep, text, pooled, nothing, trim_text=False), FORWARD)
    close(out, model(latents, timestep, text[:, :0], pooled), FORWARD)


def test_a_patch_counts_if_any_of_its_pixels_does():
    model = small()
    inputs = random_inputs(model)
    some = torch.zeros(2, 2, 8, 8, dtype=torch.uint8)
    some[:, :, ::2, 1::2] = 1  # one pixel of every patch
    assert torch.equal(model(*inputs, video_mask=some), model(*inputs))
    some[:, 1] = 0
    hidden = model(*inputs, video_mask=some)
    assert not torch.equal(hidden, model(*inputs))
    changed = [inputs[0].clone(), *inputs[1:]]
    changed[0][:, :, 1] = 7.0  # masked as keys: the first frame does not hear of it
    assert torch.equal(model(*changed, video_mask=some)[:, :, 0], hidden[:, :, 0])


def test_from_dense_is_the_sparse_model_without_skips_bit_for_bit():
    dense = small(sparsity=(1,) * 5, skip_connection=False)
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    suv = SUV.from_dense(dense, sparsity=(1, 2, 4, 2, 1))
    assert suv.config.skip_connection
    assert len(suv.skips) == 2
    inputs = random_inputs(dense)
    out = suv(*inputs)
    dense.set_sparsity([1, 2, 4, 2, 1])
    assert torch.equal(out, dense(*inputs))
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())
    out.sum().backward()
    assert suv.skips[0].linear.weight.grad[:, 64:].abs().max() > 0  # skips are not dead
    with pytest.raises(ValueError, match="would drop the skips"):
        SUV.from_dense(suv, sparsity=(1, 1, 1, 1, 1), skip_connection=False)


def test_set_sparsity_changes_the_config_and_no_weight(tmp_path):
    model = small()
    inputs = random_inputs(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    out = model(*inputs)
    model.set_sparsity([1, 4, 8, 4, 1])
    assert model.config.sparsity == (1, 4, 8, 4, 1)
    assert not torch.equal(model(*inputs), out)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = SUV.from_pretrained(tmp_path)
    assert again.config.sparsity == (1, 4, 8, 4, 1)
    assert torch.equal(again(*inputs), model(*inputs))
    for wrong in ([1, 2], [1, 2, 0, 2, 1], [1, 2, True, 2, 1]):
        with pytest.raises(ValueError, match="sparsity"):
            model.set_sparsity(wrong)


def test_saved_and_loaded(tmp_path):
    model = small(skip_zero_init=False, norm="rms_norm")
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = SUV.from_pretrained(tmp_path)
    assert again.config.num_layers == (2, 2, 2, 2, 2)
    assert again.config.patch_size == (1, 2, 2)
    assert not again.training
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    half = SUV.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_loading_is_strict(tmp_path, kind):
    small().save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    state = load_file(path)
    if kind == "missing":
        del state["proj_out.bias"]
    elif kind == "unexpected":
        state["extra.weight"] = torch.zeros(1)
    else:
        state["proj_out.bias"] = torch.zeros(3)
    save_file(state, path, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"proj_out\.bias|extra\.weight"):
        SUV.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", [SUV, WFVAE])
@pytest.mark.parametrize("subfolder", [None, "transformer"])
def test_what_is_not_here_is_not_asked_of_the_network(tmp_path, monkeypatch, kind, subfolder):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("somebody/a-model", "here"):
        with pytest.raises(FileNotFoundError, match=f"{name}.*config.json is not there"):
            kind.from_pretrained(name, subfolder=subfolder)
        with pytest.raises(FileNotFoundError, match=f"{name}.*config.json is not there"):
            kind.load_config(name, subfolder=subfolder)
    assert not asked


def test_unknown_config_keys_are_refused(tmp_path):
    small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"window": 3}))
    with pytest.raises(ValueError, match="window"):
        SUV.from_pretrained(tmp_path)


class SavedBytes:
    """Bytes autograd keeps between forward and backward, by dtype, parameters apart."""

    def __init__(self, model):
        self.own = {p.data_ptr() for p in model.parameters()}
        self.tensors = {}

    def pack(self, x):
        if x.data_ptr() not in self.own:
            self.tensors[x.data_ptr(), x.dtype] = x.numel() * x.element_size()
        return x

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


def test_checkpointing_by_stage_gives_the_same_gradients_from_less():
    model = small().train()
    inputs = random_inputs(model)

    def step():
        model.zero_grad()
        with SavedBytes(model) as saved:
            out = model(*inputs)
        out.square().mean().backward()
        return sum(saved.tensors.values()), {n: p.grad for n, p in model.named_parameters()}

    whole, grads = step()
    model.set_checkpointing(["none", "block", "feed_forward", "block", "none"])
    mixed, mixed_grads = step()
    model.set_checkpointing(["feed_forward"] * 5)
    feed, feed_grads = step()
    model.enable_gradient_checkpointing()
    least, least_grads = step()
    assert least < mixed < whole
    assert least < feed < whole
    for other in (mixed_grads, feed_grads, least_grads):
        assert all(torch.equal(grad, other[name]) for name, grad in grads.items())
    with pytest.raises(ValueError, match="stages must be 5 of"):
        model.set_checkpointing(["none"] * 4)
    with pytest.raises(ValueError, match="stages must be 5 of"):
        model.set_checkpointing(["all"] * 5)


def block_inputs(dtype, N=64, T=5, width=64):
    g = torch.Generator().manual_seed(3)
    video, text = (torch.randn(2, rows, width, generator=g).to(dtype) for rows in (N, T))
    condition = torch.randn(2, 32, generator=g)
    angle = torch.rand(N, 16, generator=g)
    return video, text, condition, (angle.cos(), angle.sin())


def test_no_fp32_copy_of_an_activation_is_kept():
    """In bf16 autograd keeps bf16 activations; fp32 only where there are few numbers."""
    model = small().to(torch.bfloat16)
    block = model.stages[1][1]
    video, text, condition, rotary = block_inputs(torch.bfloat16)
    plan = Plan.of(64, model.config.sparsity)
    with SavedBytes(block) as saved:
        out, _ = block(video.requires_grad_(), text, condition, rotary, plan.pattern(1, 1))
    large = [n for (_, dtype), n in saved.tensors.items() if dtype == torch.float32]
    assert out.dtype == torch.bfloat16
    assert max(large) < video.numel() * 4 / 2


def test_a_block_compiles_whole():
    """fullgraph, and equal to eager; other lengths and patterns of one model fit the cache."""
    from torch._dynamo.testing import CompileCounter

    torch.use_deterministic_algorithms(False)
    model = small()
    counter = CompileCounter()
    torch._dynamo.reset()
    block = model.stages[1][1]
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    plan = Plan.of(64, model.config.sparsity)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            arguments = (*block_inputs(torch.float32), plan.pattern(1, 1))
            for x, y in zip(compiled(*arguments), block(*arguments), strict=True):
                close(x, y, FORWARD)
    assert counter.frame_count == 2


@pytest.mark.full
def test_a_compiled_model_agrees():
    """By Inductor, which needs a C++ compiler: outputs and gradients, all patterns of the model."""
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    model = small()
    inputs = random_inputs(model)
    out = model(*inputs)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    model.compile_repeated_blocks(fullgraph=True)
    fast = model(*inputs)
    close(fast, out, FORWARD)
    fast_grads = torch.autograd.grad(fast.square().sum(), list(model.parameters()))
    for x, y in zip(fast_grads, grads, strict=True):
        close(x, y, GRADIENT)


def plainly_low(monkeypatch):
    """The parts as one would write them in the running dtype: the yardstick of the error."""
    import torch.nn.functional as F

    from skiparse.models.suv import blocks, parts
    from skiparse.models.suv.rope import rotate

    def modulated_norm(x, shift, scale, weight, bias, eps):
        shift, scale = shift.to(x.dtype), scale.to(x.dtype)
        return (
            F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale[:, None]) + shift[:, None]
        )

    def head_norm(x, weight, eps):
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    plain = {
        "modulated_norm": modulated_norm,
        "gated_residual": lambda x, gate, update: x + gate.to(x.dtype)[:, None] * update,
        "head_norm": head_norm,
        "head_norm_rotate": lambda x, weight, cos, sin, eps: rotate(
            head_norm(x, weight, eps), cos.to(x.dtype), sin.to(x.dtype)
        ),
        "fp32_linear": lambda x, weight, bias: F.linear(F.silu(x.to(weight.dtype)), weight, bias),
    }
    for name, function in plain.items():
        monkeypatch.setattr(parts if name == "fp32_linear" else blocks, name, function)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_layer_by_layer(golden, dtype, monkeypatch):
    """Each block, given the fp32 model's input, errs at most twice what plain eager code does."""
    model = model_of(golden)
    calls = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(lambda m, args, out: calls.append((m, args, out)))
    with torch.no_grad():
        model(*inputs_of(golden))
    low = model_of(golden).to(dtype)
    low_blocks = [block for stage in low.stages for block in stage]

    def outputs():
        with torch.no_grad():
            return [
                block(args[0].to(dtype), args[1].to(dtype), *args[2:])
                for block, (_, args, _) in zip(low_blocks, calls, strict=True)
            ]

    ours = outputs()
    with monkeypatch.context() as patch:
        plainly_low(patch)
        plain = outputs()
    for x, eager, (block, _, right) in zip(ours, plain, calls, strict=True):
        for i in range(1 if block.last else 2):
            assert x[i].dtype == dtype
            top = right[i].abs().max()
            error, allowed = ((y[i].float() - right[i]).abs().max() for y in (x, eager))
            assert error <= 2 * allowed + torch.finfo(dtype).eps * top


def test_the_condition_stays_in_fp32(golden):
    """AdaLN's linear layers see fp32 and compute in it, whatever their weights are in."""
    low = model_of(golden).to(torch.bfloat16)
    seen = []
    for stage in low.stages:
        for block in stage:
            for norm in (block.norm1, block.norm2):
                norm.linear.register_forward_hook(lambda m, args, out: seen.extend((*args, *out)))
    inputs = inputs_of(golden)
    out = low(*inputs)
    assert out.dtype == torch.bfloat16
    assert {x.dtype for x in seen} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        seen.clear()
        model_of(golden)(*inputs)
        low(*inputs)
    assert {x.dtype for x in seen} == {torch.float32}


def test_fp16_inference_survives_overflow(golden):
    """Values beyond fp16 are clamped before each norm in eval mode only."""
    low = model_of(golden).to(torch.float16)
    block = low.stages[0][0]
    video, text, condition, rotary = block_inputs(torch.float16)
    video[0, 0, 0], video[0, 1, 1] = float("inf"), float("nan")
    plan = Plan.of(64, low.config.sparsity)
    with torch.no_grad():
        out, _ = block(video, text, condition, rotary, plan.pattern(0, 0))
        assert out.isfinite().all()
        out, _ = block.train()(video, text, condition, rotary, plan.pattern(0, 0))
        assert not out.isfinite().all()


BAD_MODELS = {
    "stages": ({"num_layers": (2, 2)}, "odd number of stages"),
    "empty-stage": ({"num_layers": (2, 0, 2, 2, 2)}, "each with a layer"),
    "sparsity": ({"sparsity": (1, 2)}, "2 entries for 5 stages"),
    "zero": ({"sparsity": (1, 2, 0, 2, 1)}, "sparsity must be in "),
    "head_dim": ({"head_dim": 24}, "multiple of 16"),
    "timestep": ({"timestep_channels": 33}, "must be even"),
    "norm": ({"norm": "batch_norm"}, "norm must be one of"),
    "patch": ({"patch_size": (2, 2, 2)}, "patch_size must be"),
}


@pytest.mark.parametrize(("changes", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_sizes_that_make_no_model(changes, words):
    with pytest.raises(ValueError, match=words):
        SUV(**(SUV.presets["tiny"] | changes))


def test_inputs_that_do_not_fit():
    model = small()
    latents, timestep, text, pooled = random_inputs(model)
    refused = (
        ((latents[0], timestep, text, pooled), r"latents must be \[batch, 4"),
        ((latents[:, :3], timestep, text, pooled), "latents must be"),
        ((latents[..., :7], timestep, text, pooled), r"nearest valid size is \[2, 8, 8\]"),
        ((latents, timestep[:1], text, pooled), r"timestep must have shape \[2\]"),
        ((latents, timestep, text[:1], pooled), "text must have shape"),
        ((latents, timestep, text[0, 0], pooled), "text must have shape"),
        ((latents, timestep, text, pooled[:, :3]), "pooled must have shape"),
        ((latents, timestep, text, pooled, torch.ones(2, 4)), "text_mask must have shape"),
        ((latents, timestep, text, pooled, None, torch.ones(2, 1, 8, 8)), "video_mask must"),
        ((latents, timestep.to("meta"), text, pooled), "timestep is on meta"),
        ((latents, 500.0, text, pooled), "timestep must be a tensor, got 500.0"),
        ((latents, timestep, None, pooled), "text must be a tensor, got None"),
        (
            (latents, timestep, text, pooled, torch.zeros(text.shape[:2])),
            "text_mask must be bool, or int",
        ),
    )

    class NoWork(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            raise AssertionError(f"{func} ran before the inputs were refused")

    for arguments, words in refused:
        with NoWork(), pytest.raises(ValueError, match=words):
            model(*arguments)


def test_the_cost_model_keeps_images_dense():
    """Source of the ratios: table of the specification, attention relative to dense."""
    table = {
        (1, 256, 256): (1.39, 2.25, 4.01),
        (1, 288, 512): (1.08, 1.45, 2.30),
        (57, 288, 512): (0.60, 0.42, 0.36),
        (121, 288, 512): (0.55, 0.34, 0.23),
        (121, 576, 1024): (0.51, 0.27, 0.15),
    }
    for shape, ratios in table.items():
        N = sparsity.tokens(shape)
        dense = sparsity.attention_cost(N, 512, 1, 1)
        for k, ratio in zip((2, 4, 8), ratios, strict=True):
            cost = sparsity.attention_cost(N, 512, k, 1)
            assert cost == pytest.approx(4 * k * (N / k + 512) ** 2)
            assert round(cost / dense, 2) == ratio
    full = (1, 2, 4, 8, 4, 2, 1)
    assert sparsity.choose((1, 288, 512)) == (1,) * 7
    assert sparsity.choose((1, 288, 512), 100) == (1, 2, 4, 8, 4, 2, 1)
    assert sparsity.choose((1, 256, 256), 100) == (1, 2, 2, 2, 2, 2, 1)
    assert sparsity.choose((121, 576, 1024)) == full
    assert sparsity.choose((121, 576, 1024), at_most=(1, 6, 1)) == (1, 6, 1)
    with pytest.raises(ValueError, match=r"nearest: \(121, 576, 1024\)"):
        sparsity.choose((120, 576, 1020))
    with pytest.raises(ValueError, match="text_length"):
        sparsity.choose((1, 256, 256), -1)


def test_attention_is_what_the_ceiling_says(monkeypatch):
    """Counted pairs of the layers the model really runs, against the ratio of the stack."""
    from torch.utils.flop_counter import FlopCounterMode

    model = small(sparsity=(1, 2, 4, 2, 1))
    inputs = random_inputs(model, B=1)
    counts = []
    for k in ((1, 1, 1, 1, 1), (1, 2, 4, 2, 1)):
        model.set_sparsity(k)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*inputs)
        flops = counter.get_flop_counts()["Global"]
        counts.append(sum(v for op, v in flops.items() if "skiparse" in str(op)))
    expected = ceiling([2] * 5, (1, 2, 4, 2, 1), N=2 * 4 * 4, T=9)
    assert counts[0] / counts[1] == pytest.approx(expected)


def test_blocks_know_nothing_of_the_layout():
    """A block is a function of tokens: permuted tokens, table and pattern give permuted tokens."""
    model = small()
    block: SUVBlock = model.stages[1][1]
    video, text, condition, (cos, sin) = block_inputs(torch.float32)
    order = torch.from_numpy(skip_order(64, 2))
    natural, text_out = block(
        video, text, condition, (cos, sin), Plan.of(64, (2,), reorder=False).pattern(0, 1)
    )
    skip, text_skip = block(
        video[:, order], text, condition, (cos[order], sin[order]), Plan.of(64, (2,)).pattern(0, 1)
    )
    close(skip, natural[:, order], FORWARD)
    close(text_skip, text_out, FORWARD)


# What tools around a model ask of it.


def test_masks_that_are_no_flags_are_refused():
    model = small()
    inputs = random_inputs(model)
    image = torch.full((2, 2, 8, 8), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"values from 255 to 255; .* pass video_mask > 0"):
        model(*inputs, video_mask=image)
    ones = torch.ones(2, inputs[2].shape[1], dtype=torch.int64)
    assert torch.equal(model(*inputs, text_mask=ones), model(*inputs))


def test_training_after_inference_mode():
    """Tables kept from it are constants like any others."""
    model = small().train()
    inputs = random_inputs(model)
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).sum().backward()
    assert model.proj_out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["float", "integer"])
def test_timesteps_may_be_integers(kind):
    model = small()
    latents, timestep, *rest = random_inputs(model)
    whole = timestep.round()
    given = whole.long() if kind == "integer" else whole.double()
    assert torch.equal(model(latents, given, *rest), model(latents, whole, *rest))


def test_every_parameter_is_read_in_its_modules_forward():
    """Where weights come to the device and go with their module's forward, none is missing.

    With and without packing of q and k, whose kernel takes the weights of the norms.
    """
    for packs in (False, True):
        model = small().eval()
        for block in model.stages[0]:
            block.attn.packs = packs
        inputs = random_inputs(model)
        right = model(*inputs)
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))

            def bring(module, _, own=own):
                for name, x in own.items():
                    module._parameters[name] = x

            def take(module, _, out, own=own):
                for name, x in own.items():
                    module._parameters[name] = x.to("meta")

            module.register_forward_pre_hook(bring)
            module.register_forward_hook(take)
            take(module, None, None)
        assert torch.equal(model(*inputs), right)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(kind):
    model = small().eval()
    inputs = random_inputs(model)
    right = model(*inputs)
    onloaded = []
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    device = torch.device("cpu")
    model.enable_group_offload(
        onload_device=device, offload_device=device, offload_type=kind, **options
    )
    from diffusers.hooks import group_offloading

    original = group_offloading.ModuleGroup.onload_

    def onload(group):
        onloaded.extend(x for m in group.modules for x in m.parameters())
        onloaded.extend(group.parameters)
        return original(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_offloading.ModuleGroup, "onload_", onload)
        assert torch.equal(model(*inputs), right)
    missing = {n for n, p in model.named_parameters() if not any(p is x for x in onloaded)}
    assert missing == set()


def test_sequential_offload():
    accelerate = pytest.importorskip("accelerate")
    model = small().eval()
    inputs = random_inputs(model)
    right = model(*inputs)
    accelerate.cpu_offload(model, execution_device="cpu")
    with torch.no_grad():
        assert torch.equal(model(*inputs), right)


def test_compiled_blocks_take_other_sizes():
    """One graph for all lengths; patterns share graphs too."""
    torch._dynamo.reset()
    model = SUV(
        **SUV.presets["tiny"] | {"num_layers": (2,) * 7, "sparsity": (1, 2, 4, 8, 4, 2, 1)}
    ).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=0.1)
    eager = {}
    sizes = ((16, 7), (32, 7), (32, 9), (24, 11), (40, 3))
    arguments = {}
    for size, length in sizes:
        generator = torch.Generator().manual_seed(size + length)

        def normal(*shape, generator=generator):
            return torch.randn(shape, generator=generator)

        arguments[size, length] = (
            normal(1, 4, 2, size, size),
            torch.tensor([500.0]),
            normal(1, length, 24),
            normal(1, 20),
        )
        with torch.no_grad():
            eager[size, length] = model(*arguments[size, length])
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    counters = torch._dynamo.utils.counters
    counters.clear()
    for index, key in enumerate(sizes):
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=index > 1):
            close(model(*arguments[key]), eager[key], FORWARD)


def test_attention_backends_of_diffusers_are_refused():
    with pytest.raises(ValueError, match=r"'native' could compute; pass backend= to its forward"):
        small().set_attention_backend("native")
    with pytest.raises(ValueError, match="xformers"):
        small().enable_xformers_memory_efficient_attention()


def test_forward_mode_of_a_whole_model():
    """Against reverse mode: what one direction of a side's says of a direction of the other's."""
    model = small()
    latents, timestep, text, pooled = random_inputs(model)
    generator = torch.Generator().manual_seed(3)
    tangent, weights = (torch.randn(latents.shape, generator=generator) for _ in range(2))

    def velocity(x):
        return model(x, timestep, text, pooled)

    out, forward = torch.func.jvp(velocity, (latents,), (tangent,))
    assert torch.equal(out, velocity(latents))
    (back,) = torch.func.vjp(velocity, latents)[1](weights)
    close((forward * weights).sum(), (back * tangent).sum(), GRADIENT)
    grad = torch.func.grad(lambda x: velocity(x).square().sum())(latents)
    leaf = latents.clone().requires_grad_()
    velocity(leaf).square().sum().backward()
    close(grad, leaf.grad, GRADIENT)


@pytest.mark.parametrize("target", [r".*norm1\.linear", "patch_embed", r"norm_out\.linear"])
def test_a_low_rank_adapter_is_the_sum_of_weights(target):
    """Written out: the tool for it is not installed. A linear layer is called with one tensor."""
    import re

    model = small().eval()
    inputs = random_inputs(model)
    chosen = [m for name, m in model.named_modules() if re.fullmatch(target, name)]
    assert chosen
    for module in chosen:
        low = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(1)) / 50
        inner = module.forward

        def adapted(x, inner=inner, module=module, low=low):
            more = copy.copy(module)
            more._parameters = {"weight": low, "bias": torch.zeros_like(module.bias)}
            return inner(x) + type(module).forward(more, x)

        module.forward = adapted
        module.low = low
    out = model(*inputs)
    for module in chosen:
        del module.forward
        with torch.no_grad():
            module.weight += module.low
    close(model(*inputs), out, FORWARD)


@pytest.mark.parametrize("masked", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_whole_model_compiles_and_exports(masked):
    """In one graph, with a mask of the text too: it is then kept as it is, whatever is in it."""
    torch._dynamo.reset()
    model = small().eval()
    inputs = random_inputs(model)
    length = inputs[2].shape[1]
    masks = {"text_mask": (torch.arange(length) < length - 2).expand(2, -1)} if masked else {}
    with torch.no_grad():
        right = model(*inputs, **masks)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(*inputs, **masks), right, FORWARD)
        exported = torch.export.export(model, tuple(inputs), masks, strict=False)
        close(exported.module()(*inputs, **masks), right, FORWARD)


def for_any_size(model, reorder=False):
    """A graph of ``model`` for any size of video and length of text, whose mask it takes."""
    inputs, (t, h, w) = random_inputs(model), torch.export.dims("t", "h", "w")
    length = torch.export.Dim("length")
    mask = torch.ones(2, inputs[2].shape[1], dtype=torch.bool)
    shapes = {
        "latents": {2: t, 3: 2 * h, 4: 2 * w},
        "timestep": None,
        "text": {1: length},
        "pooled": None,
        "text_mask": {1: length},
        "reorder": None,
    }
    options = {"text_mask": mask, "reorder": reorder}
    with torch.no_grad():
        return torch.export.export(model, tuple(inputs), options, dynamic_shapes=shapes)


def masked_inputs(model, **changes):
    inputs = random_inputs(model, **changes)
    length = inputs[2].shape[1]
    return inputs, {"text_mask": (torch.arange(length) < length - 2).expand(2, -1)}


def test_a_graph_for_any_size():
    model = small(num_layers=(1, 2, 1), sparsity=(1, 2, 1))
    graph = for_any_size(model).module()
    for grid in ((3, 4, 6), (1, 8, 4), (2, 6, 10)):
        inputs, mask = masked_inputs(model, grid=grid)
        with torch.no_grad():
            close(graph(*inputs, **mask, reorder=False), model(*inputs, **mask), FORWARD)
    with pytest.raises(ValueError, match="pass reorder=False to export a model for videos of any"):
        for_any_size(model, reorder=True)


@pytest.mark.full
def test_a_library_for_any_size(tmp_path):
    """Compiled ahead of time, by Inductor."""
    model = small(num_layers=(1, 2, 1), sparsity=(1, 2, 1))
    path = str(tmp_path / "suv.pt2")
    torch._inductor.aoti_compile_and_package(for_any_size(model), package_path=path)
    library = torch._inductor.aoti_load_package(path)
    for grid in ((3, 4, 6), (2, 6, 10)):
        inputs, mask = masked_inputs(model, grid=grid)
        with torch.no_grad():
            close(library(*inputs, **mask, reorder=False), model(*inputs, **mask), FORWARD)
