"""What people who know diffusers may ask of our models: weights that move, adapters, quantizers."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers")

import accelerate
from diffusers.hooks import group_offloading
from test_suv import FORWARD, close, random_inputs, small
from torch import nn

from skiparse.models.suv.model import SUV
from skiparse.models.wfvae.model import WFVAE

CPU = torch.device("cpu")
VIDEO = torch.rand(1, 3, 9, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def suv(**changes):
    """A tiny SUV in which everything counts, and what it computes of its inputs."""
    model = small(**changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=0.1, generator=generator)
    inputs = random_inputs(model)
    return model, lambda: model(*inputs)


def wfvae():
    """A tiny WFVAE, and what it makes of a video, in pieces."""
    torch.manual_seed(0)
    vae = WFVAE(**WFVAE.presets["tiny"]).eval()

    def there_and_back():
        latents = vae.encode(VIDEO, chunk_frames=8).latent_dist.mode()
        return vae.decode(latents, chunk_latents=1).sample

    return vae, there_and_back


@pytest.fixture(params=[suv, wfvae], ids=["SUV", "WFVAE"])
def model_and_call(request):
    return request.param()


class TestWeightsThatMove:
    """Layers are called and nobody reads the weights of another, so hooks know what is needed."""

    @torch.no_grad()
    def test_on_the_cpu_and_back(self, model_and_call):
        model, call = model_and_call
        right = call()
        accelerate.cpu_offload(model, execution_device=CPU)
        assert any(x.is_meta for x in model.parameters())
        assert torch.equal(call(), right)

    @torch.no_grad()
    def test_on_disk(self, model_and_call, tmp_path):
        model, call = model_and_call
        right = call()
        accelerate.disk_offload(model, tmp_path, execution_device=CPU)
        assert torch.equal(call(), right)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
    def test_in_groups(self, model_and_call, kind, monkeypatch):
        """What no hook has brought over is NaN here, as it would be on another device there."""
        model, call = model_and_call
        right, kept, brought = call(), {}, set()

        def tensors(group):
            found = [x for m in group.modules for x in m.parameters()]
            return [*found, *group.parameters]

        def onload(group):
            for x in tensors(group):
                x.data.copy_(kept[x])
                brought.add(x)

        def offload(group):
            for x in tensors(group):
                kept.setdefault(x, x.detach().clone())
                x.data.fill_(float("nan"))

        monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)
        monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
        options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        model.enable_group_offload(CPU, CPU, offload_type=kind, **options)
        assert torch.equal(call(), right)
        assert brought == set(model.parameters())

    def test_a_group_is_of_blocks(self, monkeypatch):
        """Not of stages, of which one may be half of the model."""
        model, _ = suv(num_layers=(3, 1, 3), sparsity=(1, 2, 1))
        made = []
        real = group_offloading.ModuleGroup.__init__

        def init(group, modules, *args, **options):
            made.append(modules)
            real(group, modules, *args, **options)

        monkeypatch.setattr(group_offloading.ModuleGroup, "__init__", init)
        model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=2)
        blocks = [block for stage in model.stages for block in stage]
        sizes = [len(modules) for modules in made if modules[0] in blocks]
        assert sizes == [2, 1, 1, 2, 1]

    @torch.no_grad()
    def test_layers_in_eight_bits_between_calls(self, model_and_call):
        model, call = model_and_call
        right, before = call(), copy.deepcopy(model.state_dict())
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        eight = {n for n, x in model.named_parameters() if x.dtype == torch.float8_e4m3fn}
        assert model.dtype == torch.float32
        rounded = {n: x.to(torch.float8_e4m3fn).float() for n, x in before.items() if n in eight}
        out = call()
        reference = copy.deepcopy(before) | rounded
        plain, _ = (suv if isinstance(model, SUV) else wfvae)()
        plain.load_state_dict(reference)
        if isinstance(model, SUV):
            assert torch.equal(out, plain(*random_inputs(plain)))
            kept = ("_embed", "skips", "norm", "proj_out")
            assert eight == {n for n in before if not any(word in n for word in kept)}
        else:
            assert out.isfinite().all()
        assert not torch.equal(out, right)

    @torch.no_grad()
    def test_a_patch_embedding_in_eight_bits(self):
        """Patterns of one's own may leave it to the hooks; nobody asks for its dtype."""
        model, call = suv()
        model.bfloat16()._skip_layerwise_casting_patterns = None
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16, ("norm",))
        assert model.patch_embed.weight.dtype == torch.float8_e4m3fn
        assert call().dtype == torch.bfloat16

    def test_layers_are_called_as_those_of_torch_are(self, model_and_call):
        """With one tensor: whatever takes the place of a layer gets nothing else."""
        model, call = model_and_call
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):

                def alone(module, args, kwargs):
                    assert len(args) == 1
                    assert not kwargs

                module.register_forward_pre_hook(alone, with_kwargs=True)
        call()


class TestCheckpointing:
    def test_blocks_go_through_the_function_that_was_given(self):
        model, call = suv()
        right = torch.autograd.grad(call().square().sum(), list(model.parameters()))
        seen = []

        def again(block, *args):
            seen.append(block)
            return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

        model.enable_gradient_checkpointing(again)
        assert model.is_gradient_checkpointing
        found = torch.autograd.grad(call().square().sum(), list(model.parameters()))
        assert all(map(torch.equal, found, right))
        assert seen == [block for stage in model.stages for block in stage]
        seen.clear()
        with torch.no_grad():
            call()
        model.disable_gradient_checkpointing()
        call()
        assert not seen


def lora(model, target, rank=2, name="default"):
    """A low-rank adapter that is not zero."""
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=rank, target_modules=target), name)
    generator = torch.Generator().manual_seed(2)
    added = {n: x for n, x in model.named_parameters() if "lora_" in n and f".{name}." in n}
    assert added
    with torch.no_grad():
        for x in added.values():
            x.normal_(std=0.1, generator=generator)
    return added


class TestAdapters:
    """LoRA by diffusers' own methods, on any layer."""

    @pytest.mark.parametrize(
        "target",
        ["all-linear", ["to_q", "to_v"], ["norm1.linear", "norm_out.linear"], ["patch_embed"]],
        ids=["all", "attention", "modulation", "patches"],
    )
    def test_added_fused_and_taken_away(self, target, tmp_path):
        model, call = suv()
        plain = call().detach()
        every = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        added = lora(model, target)
        if target == "all-linear":
            assert len(added) >= 2 * (len(every) - 1)
        out = call()
        assert not torch.allclose(out, plain)
        gradients = torch.autograd.grad(out.square().sum(), list(added.values()), allow_unused=True)
        assert sum(g is not None and bool(g.any()) for g in gradients) > len(added) / 2
        model.save_lora_adapter(tmp_path)

        model.fuse_lora()
        close(call(), out, FORWARD)
        model.unfuse_lora()
        close(call(), out, FORWARD)
        model.disable_adapters()
        close(call(), plain, FORWARD)
        model.unload_lora()
        close(call(), plain, FORWARD)

        model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
        close(call(), out, FORWARD)

    def test_two_are_weighed(self):
        model, call = suv()
        plain = call().detach()
        lora(model, ["to_q"], name="a")
        lora(model, ["ff.linear_1"], name="b")
        model.set_adapters(["a", "b"], [0.0, 0.0])
        close(call(), plain, FORWARD)
        model.set_adapters("a", 1.0)
        one = call().detach()
        model.set_adapters("a", 0.5)
        half = call().detach()
        assert not torch.allclose(one, plain)
        assert not torch.allclose(half, one)

    def test_with_blocks_computed_again(self):
        """The gradients of the adapter alone, and to the bit."""
        model, call = suv()
        model.train()
        added = lora(model, ["to_k", "text_ff.linear_2"])
        assert {n for n, x in model.named_parameters() if x.requires_grad} == set(added)
        right = torch.autograd.grad(call().square().sum(), list(added.values()))
        model.enable_gradient_checkpointing()
        found = torch.autograd.grad(call().square().sum(), list(added.values()))
        assert all(map(torch.equal, found, right))


class TestQuantizers:
    """Those that replace a layer, and those that replace its weight."""

    @torch.no_grad()
    @pytest.mark.parametrize("weights", ["qfloat8", "qint8"])
    def test_layers_are_replaced(self, model_and_call, weights):
        quanto = pytest.importorskip("optimum.quanto")
        model, call = model_and_call
        right = call()
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        replaced = [m for m in model.modules() if isinstance(m, quanto.nn.QModuleMixin)]
        assert len(replaced) > 10
        off = (call() - right).norm() / right.norm()
        assert 0 < off < 0.2

    @torch.no_grad()
    def test_weights_are_replaced(self):
        torchao = pytest.importorskip("torchao")
        model, call = suv()
        right = call()
        torchao.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())
        off = (call() - right).norm() / right.norm()
        assert 0 < off < 0.05
