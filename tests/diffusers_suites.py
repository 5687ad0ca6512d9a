"""Diffusers' own tests for our classes, and for Wan's beside them, which show what a machine lacks.

To be copied into a checkout of diffusers as ``tests/test_skiparse.py``, and run there, with the
folder of our tests on PYTHONPATH (``docs/suv.md``). Their mixins stay theirs; here is what each
asks for: a class, its arguments and its inputs. Tests that want an accelerator run on the CPU.
"""

from __future__ import annotations

import functools
import tempfile
from typing import ClassVar

import diffusers.pipelines
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from test_text import tiny_encoders

from skiparse.models.pipeline import SUVPipeline
from skiparse.models.suv.model import SUV
from skiparse.models.wfvae.model import WFVAE

from . import testing_utils

for _name in ("require_accelerator", "require_torch_accelerator"):  # before mixins take them
    setattr(testing_utils, _name, lambda case: case)

from .models import testing_utils as models  # noqa: E402
from .models.autoencoders.testing_utils import AutoencoderTesterMixin  # noqa: E402
from .pipelines import testing_utils as pipelines  # noqa: E402

testing_utils.enable_full_determinism()
diffusers.pipelines.SUVPipeline = SUVPipeline  # where they look for the source of a class

TEXT = 32  # channels


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def weighed(model: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Weights in which everything counts; as SUV begins, hardly anything of the text does."""
    with torch.no_grad():
        for x in model.parameters():
            x.normal_(std=std)
    return model


class Denoiser(SUV):
    """With diffusers' default of ``return_dict``, where ours is the bare velocity."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        weighed(self)

    __init__.__wrapped__ = SUV.__init__  # whose signature is looked at

    @functools.wraps(SUV.forward)
    def forward(self, *args: object, return_dict: bool = True, **options: object) -> object:
        return super().forward(*args, return_dict=return_dict, **options)


class Louder(Denoiser):
    """In which queries and keys count more, for tests of small changes to them."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        weighed(self, 0.3)

    __init__.__wrapped__ = SUV.__init__


class Model(models.BaseModelTesterConfig):
    @property
    def pretrained_model_name_or_path(self) -> str:
        return folder_of(type(self))


@functools.cache
def folder_of(config: type[Model]) -> str:
    asked, folder = config(), tempfile.mkdtemp()
    torch.manual_seed(0)
    asked.model_class(**asked.get_init_dict()).save_pretrained(folder)
    return folder


class OfSUV(Model):
    model_class = Denoiser
    checkpointed = frozenset({"Stage"})
    graphs = 6  # dense; single and group of two, and of four; and the last block
    main_input_name = cache_input_key = "latents"
    output_shape = input_shape = (4, 2, 16, 16)

    def get_init_dict(self) -> dict[str, object]:
        return SUV.presets["tiny"] | {"text_channels": TEXT, "pooled_channels": TEXT}

    def get_dummy_inputs(self, batch_size: int = 1, height: int = 16, width: int = 16) -> dict:
        return {
            "latents": draw(batch_size, 4, 2, height, width, dtype=self.torch_dtype),
            "timestep": torch.full((batch_size,), 500),
            "text": draw(batch_size, 12, TEXT, dtype=self.torch_dtype),
            "pooled": draw(batch_size, TEXT, dtype=self.torch_dtype),
        }


class OfWan(Model):
    model_class = WanTransformer3DModel
    checkpointed = frozenset({"WanTransformer3DModel"})
    graphs = 1
    main_input_name = "hidden_states"
    output_shape = input_shape = (4, 2, 16, 16)

    def get_init_dict(self) -> dict[str, object]:
        return {
            "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": TEXT, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2,
            "rope_max_seq_len": 32,
        }  # fmt: skip

    def get_dummy_inputs(self, batch_size: int = 1, height: int = 16, width: int = 16) -> dict:
        return {
            "hidden_states": draw(batch_size, 4, 2, height, width, dtype=self.torch_dtype),
            "timestep": torch.full((batch_size,), 500),
            "encoder_hidden_states": draw(batch_size, 12, TEXT, dtype=self.torch_dtype),
        }


class OfWFVAE(Model):
    model_class = WFVAE
    main_input_name = "sample"
    checkpointed = frozenset()
    output_shape = (3, 9, 16, 16)

    def get_init_dict(self) -> dict[str, object]:
        return {"base_channels": 8, "latent_channels": 4, "encoder_energy_channels": 8,
                "decoder_energy_channels": 8}  # fmt: skip

    def get_dummy_inputs(self) -> dict:
        return {"sample": draw(2, 3, 9, 16, 16).clamp(-1, 1)}


class OfAutoencoderKLWan(OfWFVAE):
    model_class = AutoencoderKLWan

    def get_init_dict(self) -> dict[str, object]:
        return {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
                "temperal_downsample": [False, True, True]}  # fmt: skip


class Pipeline(pipelines.BasePipelineTesterConfig):
    required_input_params_in_call_signature = frozenset(
        {"prompt", "negative_prompt", "height", "width", "guidance_scale", "prompt_embeds",
         "negative_prompt_embeds"}
    )  # fmt: skip
    batch_input_params = frozenset({"prompt"})
    output_shape = (9, 3, 16, 16)
    optional_input_params = frozenset(
        {"num_inference_steps", "num_videos_per_prompt", "generator", "latents", "output_type",
         "return_dict"}
    )  # fmt: skip

    def get_dummy_inputs(self) -> dict:
        return {
            "prompt": "dance monkey", "negative_prompt": "negative",
            "generator": self.get_generator(0), "num_inference_steps": 2, "guidance_scale": 6.0,
            "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": 16,
            "output_type": "pt",
        }  # fmt: skip


class OfSUVPipeline(Pipeline):
    pipeline_class = SUVPipeline
    lora_rank = lora_alpha = 32  # or too little changes for them to see it
    denoiser_target_modules: ClassVar = {"transformer": ["to_q", "to_k", "to_v", "to_out"]}

    def get_dummy_components(self, num_layers: int = 2) -> dict:
        return self.components_of()

    def one_stage(self, num_layers: int = 2) -> dict:
        """With as many attentions as are asked for."""
        return self.components_of(num_layers=(num_layers,), sparsity=(2,))

    def components_of(self, **changes: object) -> dict:
        names = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
        parts = dict(zip(names, tiny_encoders(), strict=True))
        torch.manual_seed(0)
        return parts | {
            "transformer": weighed(SUV(**SUV.presets["tiny"] | changes), 0.3),
            "vae": WFVAE(**WFVAE.presets["tiny"] | {"latent_channels": 4}),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        }


class OfWanPipeline(Pipeline):
    pipeline_class = WanPipeline

    def get_dummy_components(self, num_layers: int = 2) -> dict:
        tokenizer, encoder, *_ = tiny_encoders()
        torch.manual_seed(0)
        options = OfWan().get_init_dict() | {"num_layers": num_layers, "text_dim": 24}
        options |= {"in_channels": 16, "out_channels": 16}
        return {
            "transformer": WanTransformer3DModel(**options),
            "vae": AutoencoderKLWan(**OfAutoencoderKLWan().get_init_dict()),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
            "transformer_2": None,
        }  # fmt: skip


CACHES = (
    "PyramidAttentionBroadcast",
    "FirstBlockCache",
    "FasterCache",
    "MagCache",
    "TaylorSeerCache",
)
PLACES = ["blocks", "stages"]  # where attention is in a Wan, and in an SUV
CODED = ("Model", "Memory", "Training")
MODELS = (
    *CODED, "Attention", "AttentionBackend", "Lora", *CACHES, "TorchAo", "Quanto", "TorchCompile",
    "LoraHotSwappingForModel", "TorchAoCompile",
)  # fmt: skip
PIPELINES = ("Pipeline", "Memory", "Lora", "LoraMemory", *CACHES)


class Applied:
    """That checkpointing reaches the modules it should."""

    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(set(self.checkpointed))


class Graphs:
    """That a block is compiled once for each way in which its tokens may lie, and no more often."""

    def test_torch_compile_repeated_blocks(self) -> None:
        super().test_torch_compile_repeated_blocks(recompile_limit=self.graphs)


def collected() -> dict[str, type]:
    """A class of tests for each of ours, and of Wan's, and each mixin."""
    found = {}
    tables = (
        (models, MODELS, OfSUV, OfWan),
        (models, CODED, OfWFVAE, OfAutoencoderKLWan),
        (pipelines, PIPELINES, OfSUVPipeline, OfWanPipeline),
    )
    for module, names, *configs in tables:
        for config in configs:
            mixins = {name: (getattr(module, f"{name}TesterMixin"),) for name in names}
            if "Training" in mixins:
                mixins["Training"] = (Applied, *mixins["Training"])
            if "TorchCompile" in mixins:
                mixins["TorchCompile"] = (Graphs, *mixins["TorchCompile"])
            if names == CODED:
                mixins["Autoencoder"] = (AutoencoderTesterMixin,)
            for name, bases in mixins.items():
                label = f"Test{name}{config.__name__}"
                body: dict[str, object] = {"__module__": __name__}
                if name.startswith("TorchAo"):
                    body["torch_dtype"] = torch.bfloat16
                if name == "LoraHotSwappingForModel" and config is OfSUV:
                    body["model_class"] = Louder
                if name == "PyramidAttentionBroadcast":
                    places = bases[0].PAB_CONFIG | {"spatial_attention_block_identifiers": PLACES}
                    body["PAB_CONFIG"] = places
                    if config is OfSUVPipeline:  # their number is counted
                        body["get_dummy_components"] = config.one_stage
                found[label] = type(label, (config, *bases), body)
    return found


globals().update(collected())
