"""Images, linear branches and experts in one model: with caches, offloading and whole graphs."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from test_diffusers import CPU, absent_is_nan
from test_images import OfSparseWan, inputs, known, randomised, suv

from skiparse.models.suv.model import SUV

LINEAR, MIXED = (False, True, True, True, False), (1, 2, 3, 2, 1)
ONE = {"num_layers": (1,) * 5}


def all_of_it(paradigm="flash"):
    """A tiny SUV with everything, in which everything counts; and what it says to what is given."""
    model = SUV.extended(suv(**ONE), linear_attention=LINEAR, experts=MIXED)
    model.take_images(paradigm)
    randomised(model)
    given, images = inputs(), known(paradigm)

    def said(context="cond", **more):
        with model.cache_context(context):
            return model(*given, images=images, **more)

    return model, said


@torch.no_grad()
@pytest.mark.parametrize("paradigm", ["flash", "mask"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_weights_come_in_groups(monkeypatch, kind, paradigm):
    """What no hook has brought is NaN; all are brought, of guides, branches and experts too."""
    model, said = all_of_it(paradigm)
    right, brought = said(), absent_is_nan(monkeypatch)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(CPU, CPU, offload_type=kind, **options)
    assert torch.equal(said(), right)
    assert brought == set(model.parameters())


@torch.no_grad()
def test_the_first_stage_decides_for_experts_too():
    """Where their stages are left out nothing is told of their imbalance."""
    model, said = all_of_it()
    right = said(return_dict=True)
    computed = []
    for number, stage in enumerate(model.stages):
        stage[0].register_forward_pre_hook(lambda module, args, i=number: computed.append(i))
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for wanted in ([0, 1, 2, 3, 4], [0, 4]):
        computed.clear()
        found = said(return_dict=True)
        assert computed == wanted
        torch.testing.assert_close(found.sample, right.sample, rtol=0, atol=1e-5)
        assert (found.imbalance is None) == (len(wanted) == 2)
    torch.testing.assert_close(said("uncond"), right.sample, rtol=0, atol=0)
    model.disable_cache()
    assert torch.equal(said(), right.sample)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32
        ),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            current_timestep_callback=lambda: 500,
        ),
    ],
    ids=["TaylorSeer", "broadcast"],
)
def test_a_branch_is_a_part_of_attention_that_is_left_out(config):
    """With the rest of it; of inputs that do not change what was said before is right."""
    model, said = all_of_it()
    right, branches, queries = said(), [], []
    attention = model.stages[1][0].attn
    attention.linear_to_out.register_forward_pre_hook(lambda module, args: branches.append(1))
    attention.to_q.register_forward_pre_hook(lambda module, args: queries.append(1))
    model.enable_cache(config)
    for _ in range(4):
        torch.testing.assert_close(said(), right, rtol=0, atol=1e-5)
    assert len(branches) == len(queries) < 4
    model.disable_cache()
    assert torch.equal(said(), right)


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("paradigm", ["flash", "mask"])
def test_it_is_one_graph(paradigm, dtype):
    """Also in fp32, in which a product for each expert depends on the numbers; and exported."""
    near = {"rtol": 0, "atol": 0 if dtype == torch.bfloat16 else 1e-6}  # sums in another order
    torch._dynamo.reset()
    model, _ = all_of_it(paradigm)
    model.to(dtype)
    noisy, times, *text = inputs()
    given, images = (noisy, times, *(x.to(dtype) for x in text)), known(paradigm)
    right = model(*given, images=images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*given, images=images), right, **near)
    exported = torch.export.export(model, given, {"images": images}, strict=False)
    found = exported.module()(*given, images=images)
    torch.testing.assert_close(found, right, **near)


@pytest.mark.full
@torch.no_grad()
@pytest.mark.parametrize("paradigm", ["flash", "mask"])
def test_a_wan_told_of_images_is_one_graph(paradigm):
    torch._dynamo.reset()
    _, told = OfSparseWan.told(paradigm)
    randomised(told)
    given, images = inputs(), known(paradigm)
    right = OfSparseWan.call(told, *given, images)
    compiled = torch.compile(told, fullgraph=True, backend="eager")
    found = OfSparseWan.call(compiled, *given, images)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5 * right.abs().max().item())
