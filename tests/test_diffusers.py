"""What people who know diffusers may ask of our models: weights that move, adapters, quantizers."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import shutil
import sys
import types
import weakref

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import accelerate
import transformers
from diffusers import (
    AutoencoderKLWan,
    AutoModel,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    GGUFQuantizationConfig,
    PipelineQuantizationConfig,
    QuantoConfig,
    TensorParallelConfig,
    TorchAoConfig,
    UniPCMultistepScheduler,
    hooks,
)
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    group_offloading,
)
from diffusers.training_utils import EMAModel
from diffusers.utils import export_to_gif, export_to_video, export_utils
from test_suv import FORWARD, close, random_inputs, small
from test_text import tiny_encoders
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skiparse.models import flow
from skiparse.models.pipeline import TEMPLATE, SUVPipeline
from skiparse.models.scheduler import FlowScheduler
from skiparse.models.suv.model import SUV
from skiparse.models.suv.sparsity import attention_cost
from skiparse.models.text import PARTS
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


def absent_is_nan(monkeypatch):
    """What no hook of a group has brought over is NaN; which parameters were brought, so far."""
    kept, brought = {}, set()

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
    return brought


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
        right, brought = call(), absent_is_nan(monkeypatch)
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
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=target), name)
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

    @torch.no_grad()
    def test_beside_weights_in_eight_bits(self, tmp_path):
        """One that was there before stays as it is; none comes later, when it would be rounded."""
        model, call = suv()
        added = lora(model, ["to_q"])
        model.save_lora_adapter(tmp_path)
        right = call()
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert {x.dtype for x in added.values()} == {torch.float32}
        off = (call() - right).norm() / right.norm()
        assert 0 < off < 0.01
        before = set(model.state_dict())
        for what, wrong in (
            ("add an adapter", lambda: lora(model, ["to_k"], name="other")),
            ("load an adapter", lambda: model.load_lora_adapter(tmp_path, prefix=None)),
            ("fuse it", model.fuse_lora),
            ("unfuse it", model.unfuse_lora),
        ):
            with pytest.raises(ValueError, match=f"{what} before enable_layerwise_casting"):
                wrong()
        assert set(model.state_dict()) == before
        model.disable_adapters()

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


SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipe():
    """A tiny pipeline with a WFVAE, in which everything counts."""
    torch.manual_seed(0)
    model, _ = suv()
    vae = WFVAE(**WFVAE.presets["tiny"] | {"latent_channels": 4, "scale": (0.5,) * 4}).eval()
    pipeline = SUVPipeline(model, vae, *tiny_encoders())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class TestCalls:
    """What comes out, and what may go in, as of pipelines that people know."""

    def test_frames_of_every_kind_are_the_same_video(self, pipe, tmp_path):
        out = {
            kind: pipe("a cat", **SIZE, output_type=kind, generator=seeded()).frames
            for kind in ("np", "pil", "pt", "uint8")
        }
        array = out["np"]
        assert array.shape == (1, 9, 32, 48, 3)
        assert array.dtype == np.float32
        assert array.min() >= 0
        assert array.max() <= 1
        assert len(np.unique(array)) > 100
        assert np.array_equal(pipe("a cat", **SIZE, generator=seeded()).frames, array)
        assert np.array_equal(out["pt"].movedim(2, -1).numpy(), array)
        levels = np.round(array * np.float32(255)).astype(np.uint8)
        assert np.array_equal(out["uint8"].numpy(), levels)
        assert [image.size for image in out["pil"][0]] == [(48, 32)] * 9
        assert np.array_equal(np.stack([np.asarray(image) for image in out["pil"][0]]), levels[0])
        export_to_gif(out["pil"][0], str(tmp_path / "a.gif"))

    def test_export_to_video_takes_them(self, pipe, tmp_path, monkeypatch):
        """A video of diffusers' is an array of floats, of which it makes 8 bits itself."""
        written = []

        class Writer:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                return None

            def append_data(self, frame):
                written.append(frame)

        fake = types.SimpleNamespace(
            plugins=types.SimpleNamespace(ffmpeg=types.SimpleNamespace(get_exe=lambda: "")),
            get_writer=lambda *_, **__: Writer(),
        )
        monkeypatch.setitem(sys.modules, "imageio", fake)
        monkeypatch.setattr(export_utils, "is_imageio_available", lambda: True)
        out = pipe("a cat", **SIZE, generator=seeded())
        export_to_video(out.frames[0], str(tmp_path / "a.mp4"))
        assert np.array_equal(np.stack(written), (out.frames[0] * 255).astype(np.uint8))

    def test_a_tuple(self, pipe):
        (frames,) = pipe("a cat", **SIZE, return_dict=False, generator=seeded())
        assert np.array_equal(frames, pipe("a cat", **SIZE, generator=seeded()).frames)

    def test_several_videos_of_a_prompt(self, pipe):
        """Each the same as if it were asked for alone, in the order of the prompts."""
        asked = {**SIZE, "output_type": "latent", "negative_prompt": ["grey", "dark"]}
        together = pipe(
            ["a cat", "a dog"], **asked, num_videos_per_prompt=2,
            generator=[seeded(i) for i in range(4)],
        ).frames  # fmt: skip
        assert len(together) == 4
        for i, (prompt, negative) in enumerate([("a cat", "grey")] * 2 + [("a dog", "dark")] * 2):
            one = pipe(prompt, **{**asked, "negative_prompt": negative}, generator=seeded(i)).frames
            close(together[i : i + 1], one, FORWARD)

    def test_encoded_prompts_are_tensors(self, pipe):
        """With the mask that hides their padding; text shorter than the negative one is padded."""
        asked = {**SIZE, "output_type": "latent", "latents": torch.randn(1, 4, 2, 4, 6)}
        right = pipe("a cat", negative_prompt="grey", **asked).frames
        names = (
            "prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask",
            "negative_prompt_embeds", "negative_pooled_prompt_embeds",
            "negative_prompt_attention_mask",
        )  # fmt: skip
        encoded = dict(zip(names, pipe.encode_prompt("a cat", "grey"), strict=True))
        assert torch.equal(pipe(**encoded, **asked).frames, right)
        kept = int(encoded["prompt_attention_mask"].sum())
        short = {
            **encoded,
            "prompt_embeds": encoded["prompt_embeds"][:, :kept],
            "prompt_attention_mask": None,
        }
        close(pipe(**short, **asked).frames, right, FORWARD)
        whole = {**encoded, "prompt_attention_mask": None}  # padding that is not hidden counts
        assert not torch.allclose(pipe(**whole, **asked).frames, right, rtol=1e-3)
        assert all(map(torch.equal, pipe.encode_prompt(**encoded), encoded.values()))
        two = pipe.encode_prompt("a cat", num_videos_per_prompt=2, dtype=torch.bfloat16)
        assert [len(x) for x in two] == [2] * 6
        assert two[0].dtype == two[4].dtype == torch.bfloat16
        shown = {**encoded, "negative_prompt_attention_mask": None}
        assert not torch.allclose(pipe(**shown, **asked).frames, right, rtol=1e-3)
        encoded = pipe.encode_prompt("a cat", do_classifier_free_guidance=False)
        assert encoded[3:] == (None,) * 3
        with pytest.raises(ValueError, match=r"prompt_embeds of tensors need their pooled ones"):
            pipe(prompt_embeds=encoded[0], **asked)
        with pytest.raises(ValueError, match="either negative_prompt or negative_prompt_embeds"):
            pipe("a cat", "grey", negative_prompt_embeds=encoded[0], **asked)
        with pytest.raises(ValueError, match=r"the pooled ones \[B, P\], got .* and \[2, "):
            pipe(prompt_embeds=encoded[0], pooled_prompt_embeds=encoded[1].repeat(2, 1), **asked)
        with pytest.raises(ValueError, match=r"mask of prompt_embeds must be \[1, 512\], got"):
            pipe(
                prompt_embeds=encoded[0], pooled_prompt_embeds=encoded[1],
                prompt_attention_mask=torch.ones(1, 3), **asked,
            )  # fmt: skip

    def test_prompts_are_cut(self, pipe):
        """Of both; what they are padded to matters to nothing."""
        noise = torch.randn(1, 4, 2, 4, 6)
        asked = {**SIZE, "latents": noise, "output_type": "latent", "template": "{prompt}"}
        asked["negative_prompt"] = "grey"
        right = pipe("a cat", **asked).frames
        close(pipe("a cat", **asked, max_sequence_length=16).frames, right, FORWARD)
        cut = pipe("a cat", **asked, max_sequence_length=5).frames
        close(
            pipe("a ca", **asked).frames,
            pipe("a ca", **asked, max_sequence_length=5).frames,
            FORWARD,
        )
        assert not torch.allclose(cut, right, rtol=1e-3)
        assert torch.equal(pipe("a cat", **asked).frames, right)
        assert pipe.encode_prompt("a cat", max_sequence_length=16)[0].shape == (1, 16, 24)
        with pytest.raises(ValueError, match="max_sequence_length must be from 1 to 512"):
            pipe("a cat", **asked, max_sequence_length=1000)

    def test_arguments_by_place(self, pipe):
        noise = torch.randn(1, 4, 2, 4, 6)
        placed = pipe("a cat", "grey", 32, 48, 9, 4, 5.0, latents=noise, output_type="latent")
        named = pipe(
            "a cat", negative_prompt="grey", guidance_scale=5.0, latents=noise, **SIZE,
            output_type="latent",
        )  # fmt: skip
        assert torch.equal(placed.frames, named.frames)

    def test_a_callback_stops_it(self, pipe):
        seen = []

        def stop(pipeline, step, timestep, tensors):
            assert pipeline.num_timesteps == 4
            assert float(pipeline.current_timestep) == float(timestep)
            seen.append(step)
            pipeline._interrupt = step == 1
            return {}

        pipe("a cat", **SIZE, callback_on_step_end=stop)
        assert seen == [0, 1]
        assert pipe.interrupt
        assert pipe.current_timestep is None
        seen.clear()
        pipe("a cat", **SIZE, callback_on_step_end=lambda *_: seen.append(1) or {})
        assert seen == [1] * 4

    def test_guidance_is_cut_off_in_a_callback(self, pipe):
        sizes = []
        pipe.transformer.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
        pipe("a cat", **SIZE, callback_on_step_end=SDCFGCutoffCallback(None, 1))
        assert sizes == [2, 2, 1, 1]
        assert pipe.guidance_scale == 0
        assert not pipe.do_classifier_free_guidance

        branches, found = [], []
        pipe.transformer.register_forward_hook(lambda m, x, out: branches.append(out[0].chunk(2)))

        def weaker(pipeline, step, timestep, tensors):
            pipeline._guidance_scale = 3.0
            found.append(tensors["velocity"])
            return {}

        pipe("a cat", **SIZE, callback_on_step_end=weaker,
             callback_on_step_end_tensor_inputs=["velocity"])  # fmt: skip
        for both, velocity, scale in zip(branches, found, (7.0, 3.0, 3.0, 3.0), strict=True):
            assert torch.equal(velocity, flow.guide(*both, scale=scale, rescale=0.7))

        def begin(pipeline, *_):
            pipeline._guidance_scale = 3.0
            return {}

        with pytest.raises(ValueError, match="the call began without guidance"):
            pipe("a cat", **SIZE, guidance_scale=1.0, callback_on_step_end=begin)

    def test_a_callback_changes_the_prompt(self, pipe):
        asked = {**SIZE, "output_type": "latent", "latents": torch.randn(1, 4, 2, 4, 6)}
        dog = pipe.text.encode("a dog", template=TEMPLATE)
        right = pipe("a dog", **asked).frames

        def become(pipeline, step, timestep, tensors):
            assert tensors["prompt_embeds"].shape == dog.text.shape
            return {"prompt_embeds": dog.text, "pooled_prompt_embeds": dog.pooled}

        changed = pipe(
            "a cat", **asked, callback_on_step_end=become,
            callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"],
        ).frames  # fmt: skip
        assert not torch.equal(changed, pipe("a cat", **asked).frames)
        assert not torch.equal(changed, right)
        texts = []
        pipe.transformer.register_forward_pre_hook(lambda m, x: texts.append(x[2]))
        pipe(
            "a cat", **asked,
            callback_on_step_end=lambda p, i, t, x: {n: y + 1 for n, y in x.items()},
            callback_on_step_end_tensor_inputs=["negative_prompt_embeds"],
        )  # fmt: skip
        (negative, positive), (changed, same) = texts[:2]
        assert torch.equal(changed, negative + 1)
        assert torch.equal(same, positive)
        with pytest.raises(ValueError, match=r"gave prompt_embeds of \[1, 3, 24\]; it must stay"):
            pipe(
                "a cat", **asked,
                callback_on_step_end=lambda *_: {"prompt_embeds": torch.zeros(1, 3, 24)},
            )  # fmt: skip

    def test_the_backend_reaches_the_attention(self, pipe):
        with pytest.raises(ValueError, match="backend"):
            pipe("a cat", **SIZE, backend="nonsense")
        noise = torch.randn(1, 4, 2, 4, 6)
        asked = {**SIZE, "latents": noise, "output_type": "latent"}
        found = pipe("a cat", **asked, backend="reference").frames
        close(found, pipe("a cat", **asked).frames, FORWARD)
        for stage in pipe.transformer.stages:
            for block in stage:
                block.attn.packs = True
        with pytest.raises(ValueError, match="backend"):  # of text inside, without a mask
            pipe("a cat", **asked, backend="nonsense", guidance_scale=1.0)

    def test_a_single_file_is_refused(self):
        for kind in (SUV, WFVAE):
            with pytest.raises(ValueError, match=r"`skiparse convert (suv|vae) IN OUT`"):
                kind.from_single_file("model.safetensors")

    def test_the_model_gives_a_tensor_an_output_or_a_tuple(self):
        model, call = suv()
        inputs = random_inputs(model)
        right = call()
        assert torch.equal(model(*inputs, return_dict=True).sample, right)
        (found,) = model(*inputs, return_dict=False)
        assert torch.equal(found, right)
        with pytest.raises(ValueError, match=r"may have scale, got \['mask'\] too"):
            model(*inputs, attention_kwargs={"mask": 1})

    def test_adapters_of_a_pipeline(self, pipe, tmp_path):
        asked = {**SIZE, "output_type": "latent", "latents": torch.randn(1, 4, 2, 4, 6)}
        plain = pipe("a cat", **asked).frames
        lora(pipe.transformer, ["to_q", "to_v"])
        adapted = pipe("a cat", **asked).frames
        assert not torch.allclose(adapted, plain)
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(pipe.transformer)
        SUVPipeline.save_lora_weights(tmp_path, weights)
        SUVPipeline.save_lora_weights(tmp_path, weights, safe_serialization=False)
        pipe.unload_lora_weights()
        assert torch.equal(pipe("a cat", **asked).frames, plain)
        pipe.load_lora_weights(tmp_path, adapter_name="kite")
        close(pipe("a cat", **asked).frames, adapted, FORWARD)
        close(pipe("a cat", **asked, attention_kwargs={"scale": 0}).frames, plain, FORWARD)
        assert pipe.attention_kwargs == {"scale": 0}
        pipe.set_adapters("kite", 0.0)
        close(pipe("a cat", **asked).frames, plain, FORWARD)
        pipe.set_adapters("kite", 1.0)
        pipe.fuse_lora()
        close(pipe("a cat", **asked).frames, adapted, FORWARD)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        pipe.load_lora_weights(tmp_path / "pytorch_lora_weights.bin")
        close(pipe("a cat", **asked).frames, adapted, FORWARD)
        for wrong, message in (
            ({"transformer.nowhere.lora_A.weight": torch.zeros(2, 2)}, "for no layer of this"),
            ({}, "the adapter has no tensors"),
        ):
            with pytest.raises(ValueError, match=message):
                pipe.load_lora_weights(wrong)


class TestComponents:
    """They may be set and be None, and what is set is what is used."""

    def test_another_text_encoder_is_used(self, pipe):
        first = pipe.text.encode("a cat")
        other = copy.deepcopy(pipe.text_encoder)
        with torch.no_grad():
            for x in other.parameters():
                x.mul_(1.5)
        pipe.text_encoder = other
        assert not torch.equal(pipe.text.encode("a cat").text, first.text)
        assert torch.equal(pipe.text.encode("a cat").pooled, first.pooled)

    def test_what_others_encoded_is_forgotten(self, pipe):
        """Where any of the four is another; where they are the same it is kept."""
        calls = []
        pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        for name in PARTS:
            pipe.text.encode("a cat")
            calls.clear()
            pipe.text.encode("a cat")
            assert not calls
            setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
            pipe.text.encode("a cat")
            assert calls, name

    def test_none_frees_the_memory_and_keeps_what_was_encoded(self, pipe):
        first = pipe.text.encode("a cat")
        gone = weakref.ref(pipe.text_encoder)
        pipe.text_encoder = None
        gc.collect()
        assert gone() is None
        assert torch.equal(pipe.text.encode("a cat").text, first.text)
        clip, pipe.text_encoder_2 = pipe.text_encoder_2, None  # which somebody else still has
        assert torch.equal(pipe.text.encode("a cat").pooled, first.pooled)
        pipe.text_encoder_2 = clip
        with pytest.raises(ValueError, match="'a dog' was not encoded before"):
            pipe.text.encode("a dog")
        pipe.text_encoder = tiny_encoders()[1]
        pipe.text.encode("a dog")

    def test_without_an_autoencoder(self, pipe):
        asked = {**SIZE, "generator": seeded()}
        right = pipe("a cat", **asked, output_type="latent").frames
        pipe.vae = None
        asked = {**SIZE, "generator": seeded()}
        assert torch.equal(pipe("a cat", **asked, output_type="latent").frames, right)
        pipe.transformer.forward = None
        with pytest.raises(ValueError, match=r"this pipeline has no vae; set pipe\.vae before"):
            pipe("a cat", **SIZE)
        pipe.transformer = None
        with pytest.raises(ValueError, match="this pipeline has no transformer"):
            pipe("a cat", **SIZE)
        pipe.encode_prompt("a cat")

    def test_an_autoencoder_of_diffusers(self, pipe):
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True], latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
        )  # fmt: skip
        pipe.vae = vae.eval()
        asked = {**SIZE, "num_frames": 5, "latents": torch.randn(1, 4, 2, 4, 6)}
        latents = pipe("a cat", **asked, output_type="latent").frames
        with torch.no_grad():
            video = vae.decode(latents * 2 + 0.1).sample
        right = video.add(1).div(2).clamp(0, 1).movedim(1, -1).numpy()
        assert np.abs(pipe("a cat", **asked).frames - right).max() < 1e-5

    def test_weights_that_were_brought_go_again(self, pipe, monkeypatch):
        """Else what an offloaded pipeline used last would stay, or what it let go."""
        times = []
        monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: times.append(1))
        latents = pipe("a cat", **SIZE, output_type="latent").frames
        assert len(times) == 1
        list(pipe.frames_of(latents[0]))
        assert len(times) == 2
        pipe.free_text_encoders()
        assert len(times) == 3

    @torch.no_grad()
    def test_all_weights_may_come_and_go(self, pipe):
        """Sequential offload of text encoders too: ids go to where the weights come to."""
        asked = {**SIZE, "output_type": "latent", "latents": torch.randn(1, 4, 2, 4, 6)}
        right = pipe("a cat", **asked).frames
        pipe.text._cache.clear()
        for name in ("transformer", "text_encoder", "text_encoder_2"):
            accelerate.cpu_offload(getattr(pipe, name), execution_device=CPU)
        assert pipe.text_encoder.device.type == "meta"
        assert torch.equal(pipe("a cat", **asked).frames, right)


class TestSchedulers:
    def test_ours_is_euler_to_the_bit(self, pipe):
        assert type(pipe.scheduler) is FlowScheduler
        noise = torch.randn(1, 4, 2, 4, 6)
        asked = {**SIZE, "output_type": "latent", "latents": noise, "guidance_scale": 1.0}
        text, x = pipe.text.encode("a cat", template=TEMPLATE), noise
        sigmas = flow.inference_sigmas(4)
        with torch.no_grad():
            for before, after in itertools.pairwise(sigmas):
                v = pipe.transformer(
                    x, 1000 * before[None], text.text, text.pooled, text_mask=text.text_mask
                )
                x = x + (after - before) * v
        assert torch.equal(pipe("a cat", **asked).frames, x)
        ours = FlowMatchEulerDiscreteScheduler(shift=1.0)
        set_timesteps = ours.set_timesteps
        ours.set_timesteps = lambda n, device: set_timesteps(sigmas=sigmas[:-1], device=device)
        pipe.scheduler = ours
        assert torch.equal(pipe("a cat", **asked).frames, x)

    @pytest.mark.parametrize(
        "kind",
        [
            UniPCMultistepScheduler,
            DPMSolverMultistepScheduler,
            FlowMatchEulerDiscreteScheduler,
            FlowMatchHeunDiscreteScheduler,
        ],
    )
    def test_others_come_to_the_same_end(self, pipe, kind):
        """With many steps all of them go where ours does; set by its config, saved and loaded."""
        noise = torch.randn(1, 4, 2, 4, 6, generator=seeded())
        asked = {**SIZE, "latents": noise, "output_type": "latent", "guidance_scale": 1.0}
        asked["num_inference_steps"] = 60
        with torch.no_grad():
            for x in pipe.transformer.parameters():
                x.mul_(0.7)  # a field that is smooth
        right = pipe("a cat", **asked).frames
        middle = float(pipe.scheduler.timesteps[30])  # 875, by the shift
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        assert pipe.config["scheduler"][1] == kind.__name__
        found = pipe("a cat", **asked).frames
        times = pipe.scheduler.timesteps
        assert abs(float(times[len(times) // 2]) - middle) < 10
        moved = (right - noise).norm()
        assert 0 < (found - right).norm() < 0.05 * moved
        assert pipe.num_timesteps == len(times)  # Heun's method calls the model twice a step
        for name, value in (("shift", 3.0), ("schedule", "linear")):
            wrong = f"{name}={value!r} is a setting of our own.*{kind.__name__}"
            with pytest.raises(ValueError, match=wrong):
                pipe("a cat", **asked, **{name: value})
        with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
            pipe("a cat", **asked | {"num_inference_steps": 0})

    def test_the_bar_counts_steps(self, pipe, capsys):
        """Not calls of the model, of which Heun's method makes two a step."""
        pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=False)
        pipe("a cat", **SIZE, output_type="latent", guidance_scale=1.0)
        assert "4/4" in capsys.readouterr().err.rsplit("\r", 1)[-1]

    def test_one_that_draws_noise_draws_it_from_the_generator(self, pipe):
        asked = {**SIZE, "output_type": "latent", "guidance_scale": 1.0}
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
        )
        first, again = (pipe("a cat", **asked, generator=seeded()).frames for _ in range(2))
        assert torch.equal(first, again)

    def test_one_that_does_not_flow_is_refused(self, pipe):
        pipe.transformer.forward = None
        for wrong in (
            {},
            {"use_flow_sigmas": True, "prediction_type": "epsilon"},
            {"prediction_type": "flow_prediction"},
        ):
            pipe.scheduler = UniPCMultistepScheduler(**wrong)
            with pytest.raises(
                ValueError, match=r"UniPCMultistepScheduler is not set to flow matching"
            ):
                pipe("a cat", **SIZE)

    def test_settings_of_ours(self, pipe):
        noise = torch.randn(1, 4, 2, 4, 6)
        asked = {**SIZE, "latents": noise, "output_type": "latent"}
        by_call = pipe("a cat", **asked, shift=3.0).frames
        pipe.scheduler = FlowScheduler(shift=3.0)
        assert torch.equal(pipe("a cat", **asked).frames, by_call)
        again = FlowScheduler.from_config(FlowScheduler().config, shift=3.0)
        assert (again.config.shift, again.config.flow_shift) == (3.0, 3.0)
        again.set_timesteps(4, schedule="linear_quadratic")  # which takes no shift
        assert torch.equal(again.sigmas, flow.inference_sigmas(4, schedule="linear_quadratic"))
        (after,) = again.step(noise, again.timesteps[0], noise, return_dict=False)
        again.set_timesteps(4, schedule="linear_quadratic")
        assert torch.equal(again.step(noise, again.timesteps[0], noise).prev_sample, after)
        with pytest.raises(ValueError, match=r"timestep 7\.0 is not the next"):
            pipe.scheduler.step(noise, torch.tensor(7.0), noise)


class TestLoading:
    """From the folder of a saved pipeline, by every way there is."""

    @pytest.fixture
    def folder(self, pipe, tmp_path):
        pipe.save_pretrained(tmp_path / "pipe")
        return tmp_path / "pipe"

    def test_by_diffusers_own_names(self, pipe, folder):
        asked = {**SIZE, "latents": torch.randn(1, 4, 2, 4, 6), "output_type": "latent"}
        right = pipe("a cat", **asked).frames
        found = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        assert type(found) is SUVPipeline
        assert torch.equal(found("a cat", **asked).frames, right)
        again = SUVPipeline.from_pretrained(folder)
        assert torch.equal(again("a cat", **asked).frames, right)
        model = AutoModel.from_pretrained(str(folder), subfolder="transformer")
        assert type(model) is SUV
        for part, kind in (("transformer", SUV), ("vae", WFVAE)):
            model = AutoModel.from_pretrained(str(folder / part), trust_remote_code=True)
            assert type(model) is kind
        own = {name for name in model.config if not name.startswith("_")}
        assert own == set(model.arguments)  # nothing that would make it another one

    def test_another_scheduler_and_none(self, folder):
        other = UniPCMultistepScheduler.from_config(FlowScheduler().config)
        found = SUVPipeline.from_pretrained(folder, scheduler=other, text_encoder=None, vae=None)
        assert found.scheduler is other
        assert found.text_encoder is found.vae is None
        found.save_pretrained(folder.parent / "again")
        again = SUVPipeline.from_pretrained(folder.parent / "again")
        assert type(again.scheduler) is UniPCMultistepScheduler
        assert again.text_encoder is again.vae is None
        for wrong in ("torchdtype", "revision"):
            with pytest.raises(ValueError, match=f"{wrong}: nothing that loading a folder takes"):
                SUVPipeline.from_pretrained(folder, **{wrong: None})

    def test_a_folder_from_before_there_was_a_scheduler(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        del index["scheduler"]
        index["_class_name"] = "SUVPipeline"
        (folder / "model_index.json").write_text(json.dumps(index))
        shutil.rmtree(folder / "scheduler")
        assert type(SUVPipeline.from_pretrained(folder).scheduler) is FlowScheduler

    def test_a_variant(self, pipe, folder, tmp_path):
        pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
        found = SUVPipeline.from_pretrained(tmp_path / "half", variant="fp16", dtype=torch.float16)
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            a, b = getattr(pipe, name).state_dict(), getattr(found, name).state_dict()
            assert all(torch.equal(a[key], b[key]) for key in a)
        with pytest.raises(ValueError, match="to load the model files of the `variant=fp16`"):
            SUVPipeline.from_pretrained(folder, variant="fp16")

    def test_a_device_for_all(self, folder, monkeypatch):
        """Text encoders are told where to be, too, when they are loaded, behind a look at them."""
        asked = {}
        texts = transformers.T5EncoderModel, transformers.CLIPTextModelWithProjection
        for kind in (SUV, WFVAE, *texts):

            def told(path, *arguments, real=kind.from_pretrained, name=kind.__name__, **options):
                asked.setdefault(name, []).append(options.get("device_map"))
                return real(path, *arguments, **options)

            monkeypatch.setattr(kind, "from_pretrained", told)
        found = SUVPipeline.from_pretrained(folder, device_map="cpu")
        assert found.text_encoder.device == found.transformer.device == CPU
        places = [places[-1] for places in asked.values()]
        assert len(places) == 4
        assert all(place in ("cpu", {"": "cpu"}, {"": CPU}) for place in places)

    def test_eight_bits_for_parts(self, folder):
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig

        config = PipelineQuantizationConfig(
            quant_mapping={
                "transformer": TorchAoConfig(Int8WeightOnlyConfig()),
                "text_encoder": transformers.TorchAoConfig(Int8WeightOnlyConfig()),
            }
        )
        found = SUVPipeline.from_pretrained(folder, quantization_config=config)
        assert "Int8" in type(found.transformer.stages[0][0].attn.to_q.weight).__name__
        layer = found.text_encoder.encoder.block[0].layer[0].SelfAttention.q
        assert "Int8" in type(layer.weight).__name__
        found.set_progress_bar_config(disable=True)
        assert np.isfinite(found("a cat", **SIZE).frames).all()

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["torchao", "quanto"])
    def test_a_quantized_model_saved_and_loaded(self, tmp_path, kind):
        model, call = suv()
        right = call()
        model.save_pretrained(tmp_path / "plain")
        if kind == "torchao":
            pytest.importorskip("torchao")
            from torchao.quantization import Int8WeightOnlyConfig

            config = TorchAoConfig(Int8WeightOnlyConfig())
        else:
            pytest.importorskip("optimum.quanto")
            config = QuantoConfig(weights_dtype="float8")
        found = SUV.from_pretrained(tmp_path / "plain", quantization_config=config)
        out = found(*random_inputs(model))
        assert 0 < (out - right).norm() / right.norm() < 0.2
        found.save_pretrained(tmp_path / "small", safe_serialization=kind == "quanto")
        again = SUV.from_pretrained(tmp_path / "small")
        assert torch.equal(again(*random_inputs(model)), out)

    def test_gguf_is_refused(self, tmp_path):
        model, _ = suv()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"not read from GGUF, .* take a TorchAoConfig"):
            SUV.from_pretrained(tmp_path, quantization_config=GGUFQuantizationConfig())

    def test_an_average_is_loaded(self, tmp_path):
        model, _ = suv()
        average = EMAModel(model.parameters(), decay=0.5, model_cls=SUV, model_config=model.config)
        average.step(model.parameters())
        average.save_pretrained(tmp_path)
        again = EMAModel.from_pretrained(tmp_path, SUV)
        assert again.optimization_step == 1
        assert again.decay == 0.5
        for a, b in zip(again.shadow_params, average.shadow_params, strict=True):
            assert torch.equal(a, b)

    def test_what_is_refused_changes_nothing(self, tmp_path):
        model, _ = suv()
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for wrong in ({"depth": 3}, {"num_heads": 0}):
            (tmp_path / "config.json").write_text(json.dumps(config | wrong))
            with pytest.raises(ValueError, match=r"does not know: \['depth'\]|num_heads must be"):
                SUV.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
            assert torch.get_default_dtype() == torch.float32


class TestAutoencoder:
    """By the names of AutoencoderKLWan."""

    @torch.no_grad()
    def test_names(self):
        vae, _ = wfvae()
        latents = vae.encode(x=VIDEO).latent_dist
        right = vae.decode(z=latents.mode()).sample
        assert torch.equal(vae(VIDEO).sample, right)
        (coded,) = vae.encode(VIDEO, return_dict=False)
        assert torch.equal(coded.mode(), latents.mode())
        for (video,) in (
            vae(sample=VIDEO, return_dict=False),
            vae.decode(latents.mode(), return_dict=False),
        ):
            assert torch.equal(video, right)
        drawn = vae(VIDEO, sample_posterior=True, generator=seeded()).sample
        assert torch.equal(drawn, vae.decode(latents.sample(seeded())).sample)
        assert not torch.equal(drawn, right)
        assert (vae.spatial_compression_ratio, vae.temporal_compression_ratio) == (8, 8)

    def test_numbers_of_the_config(self):
        vae = WFVAE(
            base_channels=4, latent_channels=2, encoder_energy_channels=4,
            decoder_energy_channels=4, shift=(0.5, -1.0), scale=(0.25, 2.0), temporal_factor=4,
        )  # fmt: skip
        config = vae.config
        assert (config.z_dim, config.scale_factor_spatial, config.scale_factor_temporal) == (
            2,
            8,
            4,
        )
        mean, std = (
            torch.tensor(x)[:, None, None, None] for x in (config.latents_mean, config.latents_std)
        )
        latents = torch.randn(1, 2, 1, 2, 2)
        assert torch.equal(vae.normalize(latents), (latents - mean) / std)
        assert "latents_mean" not in config  # so it is in no file, and no fingerprint
        plain = WFVAE(
            base_channels=4, latent_channels=2, encoder_energy_channels=4, decoder_energy_channels=4
        ).config
        assert (plain.latents_mean, plain.latents_std) == ((0.0, 0.0), (1.0, 1.0))

    @torch.no_grad()
    def test_in_pieces_slices_and_tiles(self):
        torch.manual_seed(0)
        vae = WFVAE(
            base_channels=4, latent_channels=2, encoder_energy_channels=4, decoder_energy_channels=4
        )  # fmt: skip
        vae.double().eval()
        video = torch.rand(2, 3, 9, 8, 640, dtype=torch.float64) * 2 - 1
        moments = vae.encode(video).latent_dist.parameters
        frames = vae.decode(moments[:, :2]).sample
        seen, coded = [], []
        vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape)))
        vae.encoder.register_forward_pre_hook(lambda m, args: coded.append(tuple(args[0].shape)))

        def same():
            seen.clear()
            coded.clear()
            close(vae.encode(video).latent_dist.parameters, moments, 1e-12)
            close(vae.decode(moments[:, :2]).sample, frames, 1e-12)

        vae.use_framewise_decoding = vae.use_framewise_encoding = True
        same()
        assert {shape[2] for shape in seen} == {1}
        assert {shape[2] for shape in coded} == {1, 8}
        vae.use_framewise_decoding = False
        same()
        assert {shape[2] for shape in seen} == {2}
        vae.use_framewise_encoding = False
        vae.enable_slicing()
        same()
        assert {shape[0] for shape in seen} == {shape[0] for shape in coded} == {1}
        vae.disable_slicing()
        vae.enable_tiling()
        same()
        assert len(seen) > 2
        assert len(coded) > 2
        vae.enable_tiling(512, 512, 256, 256)
        same()
        assert max(shape[4] for shape in coded) == 512
        vae.disable_tiling()
        same()
        assert len(seen) == len(coded) == 1
        for wrong, message in (
            ((250,), "the same multiple of 8"),
            ((256, 512), "the same multiple of 8"),
            ((512, 512, 128, 128), "overlap must be from 0 to half of the tile"),
        ):
            with pytest.raises(ValueError, match=message):
                vae.enable_tiling(*wrong)

    @torch.no_grad()
    def test_a_pipeline_decodes_a_latent_at_a_time(self, pipe):
        seen = []
        pipe.vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[2]))
        latents = pipe("a cat", **SIZE, num_videos_per_prompt=2, output_type="latent").frames
        frames = pipe._decode(latents, "uint8")
        assert seen == [1] * 4
        assert torch.equal(torch.cat(list(pipe.frames_of(latents[1]))), frames[1])
        whole = pipe.vae.decode(pipe.vae.denormalize(latents)).sample
        levels = whole.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1)
        assert (levels.int() - frames.int()).abs().max() <= 1
        assert (levels == frames).float().mean() > 0.999
        seen.clear()
        pipe.vae.enable_tiling()
        pipe._decode(latents, "uint8")
        assert seen == [1] * 4

    @torch.no_grad()
    def test_tiles_with_weights_that_move(self, monkeypatch):
        vae, _ = wfvae()
        video = torch.rand(1, 3, 9, 16, 320) * 2 - 1
        vae.enable_tiling(192, 192, 96, 96)
        right = vae.encode(video).latent_dist.mode()
        frames = vae.decode(right).sample
        absent_is_nan(monkeypatch)
        vae.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
        assert torch.equal(vae.encode(video).latent_dist.mode(), right)
        assert torch.equal(vae.decode(right).sample, frames)


def hooked(model):
    """The names of what has hooks of diffusers'."""
    modules = dict(model.named_modules())
    return {
        n for n, m in modules.items() if hasattr(m, "_diffusers_hook") and m._diffusers_hook.hooks
    }


class TestCaches:
    def test_attention_of_the_step_before(self, pipe):
        noise = torch.randn(1, 4, 2, 4, 6, generator=seeded())
        asked = {**SIZE, "latents": noise, "output_type": "latent", "num_inference_steps": 6}
        right = pipe("a cat", **asked).frames
        calls = []
        for stage in pipe.transformer.stages:
            for block in stage:
                block.attn.to_out.register_forward_pre_hook(lambda m, x: calls.append(m))
        pipe("a cat", **asked)
        every = len(calls)
        pipe.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 1001),
                current_timestep_callback=lambda: pipe.current_timestep,
            )
        )
        for _ in range(2):  # the second call begins anew
            calls.clear()
            found = pipe("a cat", **asked).frames
            assert len(calls) == every / 2
        assert 0 < (found - right).norm() < 0.5 * (right - noise).norm()
        with pytest.raises(ValueError, match="sequential_cfg=True calls the transformer for two"):
            pipe("a cat", **asked, sequential_cfg=True)
        pipe.transformer.disable_cache()
        assert torch.equal(pipe("a cat", **asked).frames, right)

    @pytest.mark.parametrize("sequential", [False, True])
    @pytest.mark.parametrize("lite", [False, True])
    def test_attention_that_goes_on(self, pipe, lite, sequential):
        noise = torch.randn(1, 4, 2, 4, 6, generator=seeded())
        asked = {**SIZE, "latents": noise, "output_type": "latent", "num_inference_steps": 8}
        asked["sequential_cfg"] = sequential
        right = pipe("a cat", **asked).frames
        calls = []
        pipe.transformer.stages[0][0].attn.to_q.register_forward_pre_hook(
            lambda m, x: calls.append(m)
        )
        config = TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=3, use_lite_mode=lite,
            taylor_factors_dtype=torch.float32,
        )  # fmt: skip
        pipe.transformer.enable_cache(config)
        found = pipe("a cat", **asked).frames
        assert len(calls) == (1 + sequential) * 5  # steps 0 to 2, 4 and 6 of 8
        assert 0 < (found - right).norm() < 0.5 * (right - noise).norm()
        with pytest.raises(ValueError, match="by a TaylorSeerCacheConfig; call disable_cache"):
            pipe.transformer.enable_cache(config)
        pipe.transformer.disable_cache()
        assert torch.equal(pipe("a cat", **asked).frames, right)

    def test_names_choose_the_attention(self):
        model, _ = suv()
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_identifiers=(r"stages\.[12]",),
            current_timestep_callback=lambda: 500,
        )
        model.enable_cache(config)
        assert hooked(model) == {f"stages.{i}.{j}.attn" for i in (1, 2) for j in (0, 1)}

    @torch.no_grad()
    def test_the_first_stage_decides_for_those_between(self):
        """A step like the one before adds what they added then; the last stage is computed."""
        model, _ = suv()
        inputs = random_inputs(model)
        other = [inputs[0] + 0.1 * torch.randn(inputs[0].shape, generator=seeded()), *inputs[1:]]
        right, changed = model(*inputs), model(*other)
        computed = []
        for i, stage in enumerate(model.stages):
            stage[0].register_forward_pre_hook(lambda m, x, i=i: computed.append(i))

        def called(*inputs, context="cond"):
            computed.clear()
            with model.cache_context(context):
                return model(*inputs)

        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        assert torch.equal(called(*inputs), right)
        assert computed == [0, 1, 2, 3, 4]
        close(called(*inputs), right, FORWARD)
        assert computed == [0, 4]
        assert 0 < (called(*other) - changed).norm() < 0.2 * changed.norm()
        assert torch.equal(called(*other, context="uncond"), changed)
        assert computed == [0, 1, 2, 3, 4]
        model._reset_stateful_cache()
        called(*inputs)
        assert computed == [0, 1, 2, 3, 4]
        model.disable_cache()
        model.enable_cache(FirstBlockCacheConfig(threshold=1e-3))
        called(*inputs)
        assert torch.equal(called(*other), changed)
        assert computed == [0, 1, 2, 3, 4]
        model.disable_cache()
        assert torch.equal(model(*inputs), right)

        model.set_sparsity((2, 1, 4, 1, 2))  # orders 2, 2, 4, 4, 2
        model.enable_cache(FirstBlockCacheConfig())
        with pytest.raises(ValueError, match="give the second stage and the last but one the same"):
            called(*inputs)
        with pytest.raises(
            ValueError, match="between the first stage and the last; this model has"
        ):
            suv(num_layers=(1,), sparsity=(1,))[0].enable_cache(FirstBlockCacheConfig())

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (MagCacheConfig(calibrate=True), "MagCacheConfig does not fit a SUV, whose stages"),
            (PyramidAttentionBroadcastConfig(), "current_timestep_callback is needed"),
            (
                PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=3),
                "cross_attention_block_skip_range concerns nothing here",
            ),
            (
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_identifiers=("transformer_blocks",),
                    current_timestep_callback=lambda: 500,
                ),
                "no attention here has such a name",
            ),
            (
                TaylorSeerCacheConfig(use_lite_mode=True, cache_identifiers=["x"]),
                "leave identifiers out",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, config, message):
        model, _ = suv()
        with pytest.raises(ValueError, match=message):
            model.enable_cache(config)
        assert not model.is_cache_enabled

    def test_functions_that_would_find_nothing_are_refused(self):
        """Those of diffusers, which look for its own names and classes, and then say nothing.

        All there are, so that a new one is looked at.
        """
        model, call = suv()
        pickle.dumps(model)
        keys, right = set(model.state_dict()), call()
        refused = {
            "first_block_cache": [FirstBlockCacheConfig()],
            "mag_cache": [MagCacheConfig(calibrate=True)],
            "sea_cache": [hooks.SeaCacheConfig(threshold=0.1)],
            "text_kv_cache": [hooks.TextKVCacheConfig()],
            "taylorseer_cache": [
                TaylorSeerCacheConfig(),
                TaylorSeerCacheConfig(use_lite_mode=True),
            ],
            "pyramid_attention_broadcast": [
                PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500),
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_skip_range=2,
                    spatial_attention_block_identifiers=("stages",),
                    current_timestep_callback=lambda: 500,
                ),
            ],
            "faster_cache": [FasterCacheConfig(spatial_attention_block_skip_range=2)],
            "layer_skip": [LayerSkipConfig(indices=[0])],
        }
        others = {"group_offloading", "layerwise_casting", "layerwise_casting_hook"}  # they work
        others |= {"context_parallel", "tensor_parallel"}  # go by a plan that is given to them
        there = {name.removeprefix("apply_") for name in dir(hooks) if name.startswith("apply_")}
        assert there == refused.keys() | others
        for name, configs in refused.items():
            for config in configs:
                with pytest.raises(ValueError, match="call enable_cache of the model, with a Py"):
                    getattr(hooks, f"apply_{name}")(model, config)
        assert set(model.state_dict()) == keys
        assert torch.equal(call(), right)
        assert not any(hooked(model))

    def test_every_config_of_a_cache_works_or_is_refused(self):
        model, _ = suv()
        works = {"PyramidAttentionBroadcast", "TaylorSeerCache", "FirstBlockCache"}
        no_caches = {"LayerSkip", "SmoothedEnergyGuidance"}
        there = {name.removesuffix("Config") for name in dir(hooks) if name.endswith("Config")}
        assert works | no_caches < there
        for name in there - works - no_caches:
            kind = getattr(hooks, f"{name}Config")
            asked = {"MagCache": {"calibrate": True}, "SeaCache": {"threshold": 0.1}}
            with pytest.raises(ValueError, match=f"{name}Config does not fit a SUV, whose stages"):
                model.enable_cache(kind(**asked.get(name, {})))
            assert not model.is_cache_enabled
            assert not any(hooked(model))


# What our classes have of diffusers', in words of its own. These do something, and are tested,
# here or where models are trained, loaded and saved.
DO = [
    "add_adapter", "cache_context", "compile_repeated_blocks", "cuda", "delete_adapters",
    "dequantize", "disable_adapters", "disable_cache", "disable_gradient_checkpointing",
    "disable_lora", "enable_adapters", "enable_gradient_checkpointing",
    "enable_group_offload", "enable_layerwise_casting", "enable_lora",
    "enable_lora_hotswap", "enable_model_cpu_offload", "enable_sequential_cpu_offload",
    "float", "from_pipe", "fuse_lora", "half", "load_lora_adapter",
    "load_lora_into_transformer", "maybe_free_model_hooks", "push_to_hub",
    "register_to_config", "remove_all_hooks", "reset_device_map", "save_config",
    "save_lora_adapter", "save_lora_weights", "save_pretrained", "set_adapter",
    "set_adapters", "set_lora_device", "set_progress_bar_config", "to", "unfuse_lora",
    "unload_lora", "unload_lora_weights",
]  # fmt: skip
TELL = [
    "active_adapters", "download", "extract_init_dict", "from_config", "from_pretrained",
    "get_active_adapters", "get_config_dict", "get_list_adapters", "get_memory_footprint",
    "load_config", "lora_state_dict", "num_parameters", "numpy_to_pil", "pack_weights",
    "progress_bar", "register_for_auto_class", "register_modules", "to_json_file",
    "to_json_string", "write_lora_layers",
]  # fmt: skip
REFUSED = [
    "enable_attention_slicing", "enable_npu_flash_attention", "enable_parallelism",
    "enable_xformers_memory_efficient_attention", "enable_xla_flash_attention",
]  # fmt: skip
NOTHING = [*(name.replace("enable", "disable") for name in REFUSED), "reset_attention_backend"]


def refuses(thing, name):
    arguments = {"enable_parallelism": {"config": TensorParallelConfig(tp_degree=1)}}
    words = "could compute|SUV is parallel|nothing that SUV has|tensor parallel|_tp_plan"
    with pytest.raises((ValueError, NotImplementedError), match=words):
        getattr(thing, name)(**arguments.get(name, {}))


def test_every_method_of_diffusers_does_something_or_is_refused(pipe):
    """All that our classes inherit, so that a new one is looked at."""
    for thing in (pipe, pipe.transformer, pipe.vae, pipe.scheduler):
        for name in dir(type(thing)):
            owner = next(kind for kind in type(thing).__mro__ if name in vars(kind))
            its = owner.__module__.startswith("diffusers.") and callable(getattr(owner, name))
            if not its or name.startswith("_"):
                continue
            if name.startswith("set_use_") or name in REFUSED:
                continue
            assert name in (*DO, *TELL, *NOTHING), f"{type(thing).__name__}.{name}"
            if name in NOTHING:
                getattr(thing, name)()
        for name in REFUSED:
            if hasattr(thing, name):
                refuses(thing, name)


class TestGraphs:
    def test_without_memory(self):
        """Shapes and FLOPs of models that are too large to be made."""
        with torch.device("meta"):
            model, vae = SUV(**SUV.presets["tiny"]), WFVAE(**WFVAE.presets["tiny"])
            inputs = [x.to("meta") for x in random_inputs(model)]
            mask = torch.ones(2, 9, dtype=torch.bool)
            with torch.no_grad(), FlopCounterMode(display=False) as flops:
                out = model(*inputs, text_mask=mask)
            assert out.shape == inputs[0].shape
            assert flops.get_total_flops() > 0
            with torch.no_grad():
                moments = vae.encode(VIDEO.to("meta")).latent_dist.parameters
                assert vae.decode(moments.chunk(2, 1)[0]).sample.shape == VIDEO.shape

    @torch.no_grad()
    def test_the_published_size_without_memory(self):
        """Of a video of 121x576x1024: what is known of it from counting, by hand, is what it tells.

        Biases, norms and additions count nothing.
        """
        latents, text = (1, 32, 16, 72, 128), 300
        with torch.device("meta"), FlopCounterMode(display=False) as flops:
            model = SUV(**SUV.presets["v1.5"]).bfloat16()
            config = model.config
            out = model(
                torch.empty(latents, dtype=torch.bfloat16),
                torch.empty(1),
                torch.empty(1, text, config.text_channels, dtype=torch.bfloat16),
                torch.empty(1, config.pooled_channels, dtype=torch.bfloat16),
            )
        assert out.shape == (1, config.out_channels, *latents[2:])
        tokens, width = 16 * 36 * 64, config.num_heads * config.head_dim
        attention = sum(
            attention_cost(tokens, text, k, width) * number
            for k, number in zip(config.sparsity, config.num_layers, strict=True)
        )
        products = 0
        for name, x in model.named_parameters():
            if x.ndim > 1:
                rows = text if "text_" in name else tokens
                if "timestep_embed" in name or "pooled_embed" in name or ".linear." in name:
                    rows = tokens if name.startswith("skips") else 1
                if name.startswith("text_skips"):
                    rows = text
                products += 2 * rows * x.numel()
        assert flops.get_total_flops() == attention + products

    @torch.no_grad()
    def test_an_autoencoder_in_one_graph(self):
        torch._dynamo.reset()
        vae, _ = wfvae()
        latents = vae.encode(VIDEO).latent_dist.mode()
        right = vae.decode(latents).sample
        compiled = torch.compile(vae.decode, fullgraph=True, backend="aot_eager")
        close(compiled(latents).sample, right, FORWARD)
        exported = torch.export.export(vae, (VIDEO,), strict=False)
        close(exported.module()(VIDEO).sample, right, FORWARD)
