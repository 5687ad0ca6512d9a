"""Another model, by a recipe of its own: a part of it is frozen, captions have other names."""

import dataclasses
import json
from typing import Literal

import pytest
import torch
from torch import nn

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

from skiparse import cli
from skiparse.models.data import cache
from skiparse.models.data.buckets import Rule
from skiparse.models.data.features import Features, fingerprint
from skiparse.models.data.manifest import Manifest
from skiparse.models.train.checkpoint import Checkpoints
from skiparse.models.train.config import Config, Stage, load
from skiparse.models.train.core import train
from skiparse.models.train.ema import EMA
from skiparse.models.train.recipe import RECIPES, Recipe
from skiparse.models.writer import write_video

WIDTH = 3


class Model(nn.Module):
    """A frozen layer, and one of low rank beside it that is trained."""

    def __init__(self, base: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(base)
            self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
            torch.manual_seed(0)
            self.down, self.up = nn.Linear(WIDTH, 1), nn.Linear(1, WIDTH)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x, words, kept):
        self.count += 1
        x = x.movedim(1, -1)
        with torch.autocast("cpu", enabled=False):
            frozen = self.base(x.to(self.base.weight.dtype)).float()
        told = (words * kept[..., None]).sum(1)[:, None, None, None]
        return (frozen + self.up(self.down(x)) + told).movedim(-1, 1)


class Coder:
    """Every eighth pixel, and the letters of a caption."""

    def __init__(self):
        self.null = {"letters": torch.zeros(1, WIDTH)}

    def features(self, clip):
        mean = clip.frames[::8, ::8, ::8].movedim(-1, 0).float() / 255
        texts = tuple(
            {"letters": torch.tensor([float(ord(c)) for c in text])[:, None].expand(-1, WIDTH) / 99}
            for text in clip.captions
        )
        return Features(mean, torch.full_like(mean, 0.1), texts, self.null, clip.key, clip.place)

    def fingerprints(self):
        return {"letters": "1"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    recipe: Literal["toy"] = "toy"
    stages: dict[str, Stage]
    base: int = 1


class Toy(Recipe):
    config, blocks, offset = ToyConfig, ("Linear",), 0

    def check(self, config, coder):
        if config.base < 0:
            raise ValueError("base must be at least 0")

    def initial(self, config, stage):
        return Model(config.base + Toy.offset)

    def remade(self, config, about):
        return Model(config.base + Toy.offset)

    def about(self, model):
        return {}

    def prepare(self, model, config, stage):
        pass

    def coder(self, config, device):
        return Coder()

    def shift(self, shape):
        return 1.0

    def velocity(self, net, noisy, levels, batch):
        return net(noisy, batch.captions["letters"], batch.captions["letters_mask"])

    def pipeline(self, model, coder):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def by_name(monkeypatch):
    monkeypatch.setitem(RECIPES, "toy", "test_recipe:Toy")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for i in range(4):
        frames = torch.randint(256, (9, 16, 16, 3), dtype=torch.uint8)
        write_video(folder / f"{i}.mp4", frames)
        (folder / f"{i}.txt").write_text("a" * (i + 1))
    return folder


def config(source, out, steps=3, **changes):
    stage = Stage(
        steps=steps,
        learning_rate=1e-2,
        global_batch=2,
        rule=Rule(frames=9, size=(16, 16), longest=100.0, minority=0),
    )
    given = {"out": str(out), "stages": {"only": stage}, "source": str(source), "device": "cpu"}
    return ToyConfig(**given | {"ema": 0.5, "dtype": "bfloat16"} | changes)


def last(out):
    return Checkpoints(out / "checkpoints").latest()


def test_only_what_is_trained_is_averaged_and_saved(source, tmp_path):
    train(config(source, tmp_path, steps=1))
    found = last(tmp_path)
    trained = {f"{layer}.{kind}" for layer in ("down", "up") for kind in ("weight", "bias")}
    names = set(found.read(""))
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert names == (
        {f"{model}.{name}" for model in ("model", "ema") for name in {*trained, "count"}}
        | {f"optimizer.{name}.{kind}" for name in trained for kind in kinds}
    )
    before, after, average = Model(1), found.read("model."), found.read("ema.")
    for name in trained:
        begin = before.state_dict()[name]
        assert not torch.equal(after[name], begin), name
        assert torch.equal(average[name], begin.lerp(after[name], 0.5)), name
    base = {name: x.bfloat16() for name, x in before.base.named_parameters(prefix="base")}
    assert found.about["frozen"] == cache.digest(base)  # in bf16
    assert found.about["recipe"] == "toy"


def test_it_goes_on_bit_for_bit_around_the_same_base_alone(source, tmp_path, monkeypatch):
    train(config(source, tmp_path / "whole"))
    train(config(source, tmp_path / "parts", steps=2))
    monkeypatch.setattr(Toy, "offset", 5)
    with pytest.raises(ValueError, match="was trained around other weights, which are not in it"):
        train(config(source, tmp_path / "parts"))
    monkeypatch.setattr(Toy, "offset", 0)
    train(config(source, tmp_path / "parts"))
    ours, theirs = last(tmp_path / "whole").read(""), last(tmp_path / "parts").read("")
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        assert torch.equal(x, theirs[name]), name
    with pytest.raises(ValueError, match="trained with other settings: base"):
        train(config(source, tmp_path / "parts", steps=4, base=2))


def test_the_average_shares_what_is_frozen():
    model = Model(1)
    model.base.bfloat16()
    ema = EMA(model, decay=0.5)
    assert ema.model.base.weight is model.base.weight
    assert ema.model.up.weight is not model.up.weight
    assert model.up.weight.requires_grad
    before = model.up.weight.detach().clone()
    nn.init.zeros_(model.up.weight)
    ema.update(model)
    assert torch.equal(ema.model.up.weight, before / 2)


def test_captions_of_other_names_go_through_a_cache(source, tmp_path):
    online = config(source, tmp_path / "online", steps=2)
    train(online)
    rule = online.stages["only"].rule
    cache.build(tmp_path / "cache", Manifest.open(source), rule, Coder())
    assert cache.verify(tmp_path / "cache") == []
    train(dataclasses.replace(online, out=str(tmp_path / "held"), source=None,
                              cache=str(tmp_path / "cache")))  # fmt: skip
    for name, x in last(tmp_path / "online").read("").items():
        assert torch.equal(x, last(tmp_path / "held").read("")[name]), name


def test_a_recipe_is_found_by_name_and_adds_fields(source, tmp_path):
    table = json.loads(json.dumps(dataclasses.asdict(config(source, tmp_path))))
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(table))
    assert load(file, ["--base=7"]) == config(source, tmp_path, base=7)
    file.write_text(json.dumps(table | {"preset": "v1.5"}))  # of an SUV
    with pytest.raises(ValueError, match="keys that mean nothing: preset"):
        load(file)
    file.write_text(json.dumps(table | {"recipe": "soup"}))
    with pytest.raises(ValueError, match="recipe must be one of suv, wan, wfvae, toy, got 'soup'"):
        load(file)
    with pytest.raises(ValueError, match="base must be at least 0"):
        train(config(source, tmp_path / "out", base=-1))


def test_a_run_is_not_continued_by_another_recipe(source, tmp_path, monkeypatch):
    train(config(source, tmp_path, steps=1))
    monkeypatch.setitem(RECIPES, "stew", "test_recipe:Toy")
    stew = config(source, tmp_path, steps=2)
    object.__setattr__(stew, "recipe", "stew")
    with pytest.raises(ValueError, match="is of a run with recipe toy, not stew"):
        train(stew)


def test_a_fingerprint_is_of_weights_and_config():
    assert fingerprint(Model(1), {"a": 1}) != fingerprint(Model(2), {"a": 1})
    assert fingerprint(Model(1), {"a": 1, "_b": 1}) == fingerprint(Model(1), {"a": 1})


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["cache", "build", "wfvae", "I", "cache", "--out", "run", "--source", "."], "a cache is"),
        (["data", "check", ".", "--config", "wfvae"], "have no rule to check"),
        (
            ["cache", "build", "mini", "image", "cache", "--out", "run", "--source", "."],
            "vae and text are needed",
        ),
    ],
)
def test_what_is_of_no_denoiser_is_told(command, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
