"""Linear branches and experts in a run: begun from weights without, resumed, spread, exported."""

import dataclasses

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

from test_train import (  # noqa: F401  # source is a fixture
    as_yaml,
    assert_same,
    config,
    launch,
    rows,
    rule,
    source,
    tensors,
)

from skiparse.models.data import cache
from skiparse.models.data.manifest import Manifest
from skiparse.models.pipeline import SUVPipeline
from skiparse.models.suv.encoders import Encoders
from skiparse.models.suv.model import SUV
from skiparse.models.suv.recipe import SUVRecipe
from skiparse.models.suv.recipe import SUVStage as Stage
from skiparse.models.train import loop
from skiparse.models.train.config import Lora
from skiparse.models.train.core import train
from skiparse.models.train.export import export

PARTS = {"linear_attention": (False, True, True, True, False), "experts": (1, 1, 3, 1, 1)}
SMALL = rule(1)


def stage(steps=3, **changes):
    return Stage(
        **{"steps": steps, "rule": SMALL, "learning_rate": 2e-3, "global_batch": 4} | changes
    )


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with weights that have neither."""
    folder = tmp_path_factory.mktemp("init")
    torch.manual_seed(0)
    SUV(**SUV.presets["tiny"] | {"num_layers": (1,) * 5}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def given(source, start, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("run")
    stages = {"before": stage(1), "after": stage(2, **PARTS)}
    return config(source, out, init=str(start), stages=stages, balance=0.1, save_every=100)


@pytest.fixture(scope="module")
def whole(given):
    """A run that nothing interrupted."""
    train(given)
    return given.out


def test_a_stage_begins_as_the_one_before_left_it(given, whole, tmp_path):
    """The model's weights to the bit, its average too, and both learn from then on."""
    first = {"before": given.stages["before"]}
    begun = dataclasses.replace(given, out=str(tmp_path), stages=first, balance=None)
    train(begun)
    before = tensors(tmp_path)
    still = dataclasses.replace(given.stages["after"], steps=1, learning_rate=1e-30)
    train(dataclasses.replace(begun, stages=first | {"after": still}))
    after, last = tensors(tmp_path), tensors(whole)
    new = {name for name in after.keys() - before.keys() if name.startswith(("model.", "ema."))}
    assert {name.rpartition("attn.")[2].rpartition("ff.")[2] for name in new} == {
        "linear_to_out.weight",
        "router.weight",
    }
    for name, x in before.items():
        if name.startswith("model."):
            assert (after[name] == x).all(), name  # copies, of what has experts
        elif name.startswith("ema."):
            wanted = x.lerp(before[f"model{name[3:]}"], 0.5)
            torch.testing.assert_close(after[name], wanted.expand_as(after[name]))
    for name in new:
        assert not torch.equal(after[name], last[name]), name
    experts = [x for name, x in last.items() if name.endswith("ff.linear_1.weight") and x.ndim == 3]
    assert len(experts) == 2  # of a block, the model's and its average's
    assert not any(torch.equal(x[0], x[1]) for x in experts)


def test_a_run_goes_on_as_if_nothing_had_happened(given, whole, tmp_path):
    """Stopped within the stage."""
    part = given.stages | {"after": dataclasses.replace(given.stages["after"], steps=1)}
    train(dataclasses.replace(given, out=str(tmp_path), stages=part))
    train(dataclasses.replace(given, out=str(tmp_path)))
    assert_same(whole, tmp_path)


@pytest.mark.parametrize(
    "how",
    [
        {"parallel": "fsdp"},
        pytest.param({"parallel": "ddp"}, marks=pytest.mark.full),
        pytest.param({"context_parallel": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_two_processes_equal_one(given, whole, tmp_path, how):
    """Each sample is balanced by itself, so it does not matter who has it, or a part of it."""
    two = dataclasses.replace(given, out=str(tmp_path / "run"), **how)
    file = as_yaml(tmp_path / "config.yaml", two)
    launch(2, file, shared="context_parallel" in how)
    for a, b in zip(rows(whole), rows(two.out), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-4)
        assert a.keys() == b.keys()
        assert a.get("imbalance", 0) == pytest.approx(b.get("imbalance", 0), rel=1e-6)
    assert a["imbalance"] > 0
    one, found = tensors(whole), tensors(two.out)
    assert {name: x.shape for name, x in one.items()} == {n: x.shape for n, x in found.items()}


def test_the_loss_has_the_imbalance(given, monkeypatch, tmp_path):
    """Weighed; the log has it as it is, of all micro-batches."""
    seen, real = [], SUVRecipe.penalised

    def seeing(self, config, net, *batch):
        found = real(self, config, net, *batch)
        seen.append(found[1]["imbalance"].value.item())
        return found

    monkeypatch.setattr(SUVRecipe, "penalised", seeing)
    one = {"after": dataclasses.replace(given.stages["after"], steps=1, accumulate=2)}
    logged = {}
    for weight in (None, 0.0, 1.0):
        out = tmp_path / str(weight)
        train(dataclasses.replace(given, out=str(out), stages=one, balance=weight))
        (logged[weight],) = rows(out)
    assert seen[:2] == seen[2:4] == seen[4:]
    assert seen[0] != seen[1]
    mean = sum(seen[:2]) / 2
    assert 0.9 < mean < 1.5  # of three experts, two taken: 1 if even, 1.5 at most
    for weight, row in logged.items():
        assert row["imbalance"] == pytest.approx(mean)
        wanted = logged[0.0]["loss"] + (0.01 if weight is None else weight) * mean
        assert row["loss"] == pytest.approx(wanted)


def test_from_a_cache_and_exported(given, source, start, tmp_path):  # noqa: F811
    """Features know nothing of the model; a pipeline of it makes a video."""
    encoders = Encoders.from_pretrained(source / "vae", source / "text")
    manifest = Manifest.open(source / "clips", index=tmp_path / "index")
    video = rule(9, minority=1)
    cache.build(tmp_path / "cache", manifest, video, encoders)
    run = dataclasses.replace(
        given, out=str(tmp_path / "run"), stages={"only": stage(2, **PARTS | {"rule": video})},
        source=None, vae=None, text=None, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    train(run)
    export(tmp_path / "run", tmp_path / "made", vae=source / "vae", text=source / "text")
    pipe = SUVPipeline.from_pretrained(tmp_path / "made")
    assert pipe.transformer.config.experts == PARTS["experts"]
    assert pipe.transformer.config.linear_attention == PARTS["linear_attention"]
    learned = tensors(tmp_path / "run")
    for name, x in pipe.transformer.state_dict().items():
        assert torch.equal(x, learned[f"ema.{name}"]), name
    out = pipe(
        "stripes", height=32, width=48, num_frames=9, num_inference_steps=2, output_type="latent"
    )
    assert out.frames.isfinite().all()


def test_a_lora_beside_them(given, source, start, tmp_path):  # noqa: F811
    """Of weights that have both it changes attention alone; to weights without it adds none."""
    more = SUV.extended(SUV.from_pretrained(start), **PARTS)
    more.save_pretrained(tmp_path / "init")
    only = {"only": stage(2)}
    run = dataclasses.replace(
        given, out=str(tmp_path / "run"), init=str(tmp_path / "init"), stages=only,
        lora=Lora(rank=2), balance=None,
    )  # fmt: skip
    train(run)
    assert all("lora_" in name for name in tensors(tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "made", vae=source / "vae", text=source / "text")
    made = SUV.from_pretrained(tmp_path / "made" / "transformer")
    base = more.state_dict()
    moved = {name for name, x in made.state_dict().items() if not torch.equal(x, base[name])}
    assert moved
    assert all(".attn." in name for name in moved)
    assert made.config.experts == PARTS["experts"]
    refused = dataclasses.replace(
        run, out=str(tmp_path / "no"), init=str(start), stages={"only": stage(2, **PARTS)}
    )
    with pytest.raises(ValueError, match=r"stages\.only: with lora .* linear_attention, experts"):
        train(refused)


BAD = {
    "k > E": ({"experts": (1, 1, 3, 1, 1), "experts_per_token": 4}, {},
              r"stages\.only: experts_per_token must be from 2 to .* here 3; got 4"),
    "k alone": ({"experts_per_token": 3}, {}, r"stages\.only: experts_per_token must be"),
    "two alone": ({"experts_per_token": 2}, {}, "experts_per_token=2 is of experts, and there are"),
    "stages": ({"experts": (1, 3)}, {}, r"stages\.only: experts must be 5 whole numbers"),
    "branches": ({"linear_attention": (True,)}, {}, r"stages\.only: linear_attention must be 5"),
    "balance of nothing": ({}, {"balance": 0.1}, "balance=0.1 is of experts, and no stage has"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "settings", "words"), BAD.values(), ids=BAD)
def test_what_cannot_work_is_refused_before_any_work(
    given, monkeypatch, tmp_path, changes, settings, words
):
    monkeypatch.setattr(loop, "data_of", None)
    bad = {"balance": None, "stages": {"only": stage(2, **changes)}} | settings
    with pytest.raises(ValueError, match=words):
        train(dataclasses.replace(given, out=str(tmp_path), **bad))


def test_a_negative_weight_is_none(given):
    with pytest.raises(ValueError, match="balance must be a number from 0 on, got -1"):
        dataclasses.replace(given, balance=-1.0)
