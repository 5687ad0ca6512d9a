"""An SUV gets a linear branch and experts, which begin without effect and compute what they say."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skiparse.models.suv.blocks import FeedForward
from skiparse.models.suv.convert import to_released
from skiparse.models.suv.experts import Experts, GroupedLinear, imbalance
from skiparse.models.suv.model import SUV
from skiparse.models.suv.parts import linear_attention, linear_state
from skiparse.testing import within_budget

LINEAR, MIXED = (False, True, True, True, False), (1, 2, 4, 3, 1)
NEW = ("linear_to_out.weight", "router.weight")


def small(**changes):
    torch.manual_seed(0)
    made = SUV(**(SUV.presets["tiny"] | changes)).eval()
    with torch.no_grad():
        for x in made.parameters():
            x.add_(torch.randn_like(x) * 0.05)
    return made


def inputs(dtype=torch.float32):
    made = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=made, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(2, 4, 2, 8, 8), torch.tensor([300.0, 700.0]), draw(2, 5, 24), draw(2, 20)


def mask(chance, seed=1):
    return torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) < chance


@pytest.fixture
def exact(monkeypatch):
    """The islands of fp32 are of fp64, so that nothing but the order of sums is rounded."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def far(x, right):
    return ((x - right).abs().max() / right.abs().max()).item()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_branch_is_attention_with_other_weights(masked):
    """All pairs of tokens written out, and their gradients."""
    q, k, v = torch.randn(3, 2, 7, 3, 16, dtype=torch.float64).unbind(0)
    keys = torch.rand(2, 7) < 0.6 if masked else None
    for x in (q, k, v):
        x.requires_grad_()
    found = linear_attention(q, linear_state(k, v, keys))
    weights = torch.einsum("bnhd,bmhd->bhnm", q.softmax(-1), k.softmax(-1))
    if masked:
        weights = weights * keys[:, None, None]
    right = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)
    assert far(found, right) < 1e-13
    wanted = torch.autograd.grad(right.square().sum(), (q, k, v))
    for x, its in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), wanted, strict=True):
        assert far(x, its) < 1e-12


def test_without_keys_the_branch_is_zero():
    q = torch.randn(1, 4, 2, 16)
    assert not linear_attention(q, linear_state(q, q, torch.zeros(1, 4) > 0)).any()


@pytest.mark.parametrize("packs", [False, True], ids=["apart", "packed"])
def test_a_branch_begins_without_effect(packs):
    """To the bit, whatever becomes of the text; and then it learns."""
    model = small()
    more = SUV.extended(model, linear_attention=LINEAR)
    for stage in (*model.stages, *more.stages):
        for block in stage:
            block.attn.packs = packs
    before, after = model.state_dict(), more.state_dict()
    assert after.keys() - before.keys() == {
        f"stages.{stage}.{i}.attn.linear_to_out.weight" for stage in (1, 2, 3) for i in range(2)
    }
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert not any(after[name].any() for name in after.keys() - before.keys())
    assert not any(a.data_ptr() == after[n].data_ptr() for n, a in before.items())
    out = more(*inputs())
    assert torch.equal(out, model(*inputs()))
    out.square().sum().backward()
    for stage in more.stages[1:4]:
        for block in stage:
            assert block.attn.linear_to_out.weight.grad.any()


def perturbed(model):
    with torch.no_grad():
        for name, x in model.named_parameters():
            if name.endswith(NEW):
                x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return model


@pytest.mark.usefixtures("exact")
def test_the_branch_sees_all_tokens_and_no_order():
    """In skip order or not; where sparse attention does not reach, it does; no masked ones."""
    model = perturbed(SUV.extended(small().double(), linear_attention=LINEAR))
    given = inputs(torch.float64)
    out = model(*given)
    assert far(model(*given, reorder=False), out) < 1e-12
    plain = small().double()
    assert far(plain(*given), out) > 1e-3
    hidden = mask(0.7)
    hidden[..., :2, :2] = False  # a whole patch
    noisy = given[0].clone()
    noisy[..., :2, :2] += 1
    found = [model(x, *given[1:], video_mask=hidden) for x in (given[0], noisy)]
    assert torch.equal(*(x[..., 2:] for x in found))
    shown = [model(x, *given[1:])[..., 2:] for x in (given[0], noisy)]
    assert far(*shown) > 1e-4


def test_one_sparse_layer_reaches_every_token():
    """Of one layer with sparsity 4 a query has a gradient from its sub-sequence; now from all."""
    model = small(num_layers=(1,), sparsity=(4,), double_ff=False)
    more = perturbed(SUV.extended(model, linear_attention=(True,)))
    reached = []
    for its in (model, more):
        latents, *rest = inputs()
        latents.requires_grad_()
        its(latents, *rest)[0, :, 0, 0, 0].sum().backward()
        patches = F.avg_pool3d(latents.grad[0].abs(), (1, 2, 2)).sum(0)
        reached.append(int((patches > 0).sum()))
    assert reached == [8, 32]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("double_ff", [True, False], ids=["own-text", "shared-text"])
def test_experts_begin_as_the_feed_forward(double_ff):
    """Whatever the routers say: weights of a token's experts sum to one."""
    model = small(double_ff=double_ff).double()
    more = SUV.extended(model, experts=MIXED)
    before, after = model.state_dict(), more.state_dict()
    assert after.keys() - before.keys() == {
        f"stages.{stage}.{i}.ff.router.weight" for stage in (1, 2, 3) for i in range(2)
    }
    for name, x in before.items():
        number = MIXED[int(name.split(".")[1])] if ".ff.linear" in name else 1
        assert after[name].shape == ((number, *x.shape) if number > 1 else x.shape), name
        assert (after[name] == x).all(), name
    wanted = model(*inputs(torch.float64))
    assert far(more(*inputs(torch.float64)), wanted) < 1e-13
    assert far(perturbed(more)(*inputs(torch.float64)), wanted) < 1e-13
    with torch.no_grad():
        for stage in more.stages[1:4]:
            stage[0].ff.linear_2.weight[0] *= 1.5
    assert far(more(*inputs(torch.float64)), wanted) > 1e-4


def mixture(taken, experts=4, width=16):
    torch.manual_seed(1)
    made = Experts(width, experts, taken).double()
    for x in made.parameters():
        nn.init.normal_(x, std=0.3)
    return made


def written_out(made, x, taken):
    """Token by token and expert by expert; no sorting, no groups."""
    chances = (x @ made.router.weight.T).softmax(-1)
    out, counts = [], torch.zeros(x.shape[0], len(made.router.weight), dtype=x.dtype)
    for sample, its in enumerate(x):
        rows = []
        for token, chance in zip(its, chances[sample], strict=True):
            best = sorted(range(len(chance)), key=lambda e: -chance[e])[:taken]
            each = []
            for e in best:
                counts[sample, e] += 1
                ff = FeedForward(x.shape[-1]).double()
                answer = F.gelu(made.linear_1.weight[e] @ token, approximate="tanh")
                assert ff.linear_2.weight.shape == made.linear_2.weight[e].shape
                each.append(chance[e] * (made.linear_2.weight[e] @ answer))
            rows.append(sum(each) / sum(chance[e] for e in best))
        out.append(torch.stack(rows))
    return torch.stack(out), torch.stack([counts, chances.sum(1)], 1)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("taken", [2, 3, 4])
@pytest.mark.parametrize("skewed", [False, True], ids=["spread", "skewed"])
def test_experts_are_what_is_written_out(taken, skewed):
    """Also if all tokens want the same ones: nobody is left out. Gradients too."""
    made = mixture(taken)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    if skewed:
        x[..., 0] = 5
        with torch.no_grad():
            made.router.weight.mul_(0.1)[:, 0] = torch.tensor([4.0, 3.0, 2.0, -4.0])
    x.requires_grad_()
    found, load = made(x)
    right, wanted = written_out(made, x, taken)
    if skewed:
        assert wanted[:, 0, :taken].eq(9).all()
        assert wanted[:, 0, taken:].eq(0).all()
    assert far(found, right) < 1e-13
    assert far(load, wanted) < 1e-13
    named = {"x": x, **dict(made.named_parameters())}
    losses = [out.square().sum() + its[:, 1].square().sum() for out, its in
              ((found, load), (right, wanted))]  # fmt: skip
    a, b = (torch.autograd.grad(loss, list(named.values())) for loss in losses)
    for name, one, two in zip(named, a, b, strict=True):
        assert far(one, two) < 1e-12, name


def test_grouped_products_in_bf16_are_as_exact_as_single_ones():
    """Of torch's own operator, and its gradients; an expert without a row has none."""
    torch.manual_seed(2)
    layer = GroupedLinear(4, 32, 48)
    nn.init.normal_(layer.weight)
    layer = layer.to(torch.bfloat16)
    x, sizes = torch.randn(20, 32).bfloat16(), [7, 0, 12, 1]
    ends = torch.tensor(sizes).cumsum(0).int()

    def both(layer, x, grouped):
        x = x.detach().requires_grad_()
        weight = layer.weight.detach().to(x.dtype).requires_grad_()
        if grouped:
            own = torch.func.functional_call(layer, {"weight": weight}, (x, ends))
        else:
            parts = zip(x.split(sizes), weight, strict=True)
            own = torch.cat([F.linear(part, its) for part, its in parts])
        dx, dw = torch.autograd.grad((own * torch.cos(torch.arange(48.0))).sum(), (x, weight))
        return {"out": own.detach(), "x": dx, "weight": dw}

    exact = both(layer, x.double(), False)
    found, eager = both(layer, x, True), both(layer, x, False)
    assert found["out"].dtype == torch.bfloat16
    assert not found["weight"][1].any()
    within_budget(found, exact, [eager], torch.bfloat16)


def test_autocast_decides_the_dtype_of_experts(monkeypatch):
    made, seen, real = mixture(2).float(), [], F.grouped_mm

    def seeing(x, weight, offs):
        seen.append((x.dtype, weight.dtype))
        return real(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", seeing)
    with torch.autocast("cpu", torch.bfloat16):
        out, load = made(torch.randn(1, 5, 16))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2
    assert (out.dtype, load.dtype) == (torch.bfloat16, torch.float32)
    (out.float().sum() + load.sum()).backward()
    assert all(x.grad.dtype == torch.float32 for x in made.parameters())
    made(torch.randn(1, 5, 16))
    assert len(seen) == 2


@pytest.mark.full
def test_experts_in_fp32_are_one_graph():
    """Forward and backward, whatever the tokens are, though each product's size is a number."""
    torch._dynamo.reset()
    made = mixture(2).float()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for tokens in (7, 9, 5):
        x, found = torch.randn(2, tokens, 16), []
        for its in (made, compiled):
            given = x.clone().requires_grad_()
            out, load = its(given)
            (out.square().sum() + load.square().sum()).backward()
            found.append([out, given.grad, *(p.grad.clone() for p in made.parameters())])
            made.zero_grad()
        for one, its in zip(*found, strict=True):
            torch.testing.assert_close(one, its)


def test_how_unevenly():
    """1 if all are taken alike; E / k if always the same k; between samples nothing is shared."""
    even = torch.tensor([[10.0] * 4, [5.0] * 4])
    same = torch.tensor([[20.0, 20.0, 0.0, 0.0], [10.0, 10.0, 0.0, 0.0]])
    assert imbalance(torch.stack([even, same]), 20, 2).tolist() == [1.0, 2.0]


def test_a_model_tells_it_and_learns_from_it():
    model = SUV.extended(small(), experts=MIXED)
    plain = model(*inputs(), return_dict=True)
    assert torch.equal(plain.sample, model(*inputs()))
    assert plain.imbalance.shape == (2,)
    alone = [x[:1] for x in inputs()]
    torch.testing.assert_close(model(*alone, return_dict=True).imbalance, plain.imbalance[:1])
    plain.imbalance.mean().backward()
    moved = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.any()}
    assert {f"stages.{s}.{i}.ff.router.weight" for s in (1, 2, 3) for i in range(2)} <= moved
    assert small()(*inputs(), return_dict=True).imbalance is None
    told = []
    for stage in model.stages:
        for block in stage:
            block.register_forward_hook(lambda module, args, out: told.extend(out[2:]))
    again = model(*inputs(), return_dict=True)
    assert len(told) == 6
    torch.testing.assert_close(again.imbalance, torch.stack(told).mean(0))


@pytest.mark.parametrize("again", ["block", "feed_forward"])
def test_gradients_are_the_same_when_computed_again(again):
    model = perturbed(SUV.extended(small(), linear_attention=LINEAR, experts=MIXED)).train()
    found = []
    for how in ("none", again):
        model.set_checkpointing((how,) * 5)
        model.zero_grad()
        out = model(*inputs(), return_dict=True)
        (out.sample.square().mean() + out.imbalance.mean()).backward()
        found.append([x.grad for x in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_both_are_saved_and_loaded(tmp_path):
    model = perturbed(SUV.extended(small(), linear_attention=LINEAR, experts=MIXED))
    model.save_pretrained(tmp_path)
    again = SUV.from_pretrained(tmp_path)
    assert (again.config.linear_attention, again.config.experts) == (LINEAR, MIXED)
    assert torch.equal(again(*inputs()), model(*inputs()))


def test_a_folder_from_before_loads(tmp_path):
    """Its config does not know of them, and its weights have the same names as ever."""
    model = small()
    assert not any(name.endswith(NEW) for name in model.state_dict())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("linear_attention", "experts", "experts_per_token"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(SUV.from_pretrained(tmp_path)(*inputs()), model(*inputs()))


def test_they_stay_where_a_model_gets_skips():
    dense = small(skip_connection=False, sparsity=(1,) * 5)
    more = SUV.extended(dense, linear_attention=LINEAR, experts=MIXED)
    found = SUV.from_dense(perturbed(more), sparsity=(1, 2, 4, 2, 1))
    assert (found.config.linear_attention, found.config.experts) == (LINEAR, MIXED)
    assert SUV.extended(found).config.experts == MIXED


def test_a_release_has_no_place_for_them():
    for more in ({"linear_attention": LINEAR}, {"experts": MIXED}):
        with pytest.raises(ValueError, match=r"linear_to_out|router"):
            to_released(SUV.extended(small(), **more).state_dict())


BAD = {
    "k > E": ({"experts": (1, 2, 4, 3, 1), "experts_per_token": 3},
              r"experts_per_token must be from 2 to .* here 2; got 3 of experts=\(1, 2, 4, 3, 1\)"),
    "k = 1": ({"experts": (1, 1, 4, 1, 1), "experts_per_token": 1}, "from 2 to .* here 4; got 1"),
    "k without experts": ({"experts_per_token": 3}, "got 3 of experts="),
    "stages": ({"experts": (1, 2)}, r"experts must be 5 whole numbers .* got \(1, 2\)"),
    "no expert": ({"experts": (0, 2, 2, 2, 1)}, "experts must be 5 whole numbers from 1 on"),
    "branches": ({"linear_attention": (True,)}, "linear_attention must be 5 of true or false"),
    "a word": ({"linear_attention": ("yes",) * 5}, "linear_attention must be 5 of true or false"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_what_makes_no_model(changes, words):
    for make in (
        lambda: SUV(**SUV.presets["tiny"] | changes),
        lambda: SUV.extended(small(), **changes),
    ):
        with pytest.raises(ValueError, match=words):
            make()


HAD = {"linear_attention": LINEAR, "experts": (1, 3, 4, 3, 1), "experts_per_token": 3}
LESS = {
    "a branch": ({"linear_attention": (False,) * 5}, "would drop branches of the given model"),
    "fewer": ({"experts": (1, 3, 3, 3, 1)}, "would change how many there are in a stage"),
    "none": ({"experts": (3, 3, 4, 1, 3)}, "would change how many there are in a stage"),
    "for a token": ({"experts_per_token": 2}, "experts_per_token=2 would .* which has 3; keep"),
}


@pytest.mark.parametrize(("changes", "words"), LESS.values(), ids=LESS)
def test_nothing_gets_lost(changes, words):
    model = SUV.extended(small(), **HAD)
    with pytest.raises(ValueError, match=words):
        SUV.extended(model, **changes)
    more = SUV.extended(model, linear_attention=(True,) * 5, experts=(3, 3, 4, 3, 3))
    assert more.config.experts_per_token == 3
    assert torch.equal(more.stages[2][0].ff.router.weight, model.stages[2][0].ff.router.weight)
