"""One dataclass tells a run all: files and arguments fill it; what means nothing is refused."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
import yaml

pytest.importorskip("jsonargparse")

from skiparse.models.data.buckets import Rule
from skiparse.models.suv.model import SUV
from skiparse.models.suv.recipe import SUVConfig as Config
from skiparse.models.suv.recipe import SUVStage as Stage
from skiparse.models.train.checks import settings_of
from skiparse.models.train.config import CHAINS, Clip, Optimizer, Samples, load

GIVEN = ["--out=runs/x", "--vae=vae", "--text=text", "--source=clips"]


def stage(**changes):
    return Stage(
        **{"steps": 10, "learning_rate": 1e-4, "global_batch": 4, "rule": Rule(size=(32, 32))}
        | changes
    )


def test_the_chain_of_the_report():
    chain = load("v1.5", GIVEN)
    found = [
        (name, s.steps, s.learning_rate, s.global_batch, s.rule.frames, s.rule.fps, s.rule.size)
        for name, s in chain.stages.items()
    ]
    image, small, large = (288, 512), (288, 512), (576, 1024)
    assert found == [
        ("I1", 225_000, 1e-4, 8192, 1, 24, None),
        ("I2", 150_000, 1e-4, 6144, 1, 24, None),
        ("I3", 110_000, 1e-4, 4096, 1, 24, image),
        ("I4", 160_000, 1e-4, 4096, 1, 24, image),
        ("V1", 40_000, 6e-5, 1024, 57, 24, small),
        ("V2", 45_000, 6e-5, 1024, 57, 12, small),
        ("V3", 25_000, 4e-5, 1024, 121, 24, small),
        ("V4", 25_000, 2e-5, 512, 121, 24, large),
        ("V5", 5_000, 1e-5, 512, 121, 24, large),
    ]
    dense = [s.sparsity == (1,) * 7 and not s.skip_connection for s in chain.stages.values()]
    assert dense == [True] * 3 + [False] * 6
    assert chain.optimizer == Optimizer(betas=(0.9, 0.999), eps=1e-15, weight_decay=1e-4)
    assert (chain.ema, chain.clip.decay, chain.drop, chain.preset) == (0.9999, 0.99, 0.1, "v1.5")
    shared = {name: chain.context_of(s) for name, s in chain.stages.items() if name[0] == "V"}
    assert shared == {"V1": 2, "V2": 2, "V3": 4, "V4": 4, "V5": 4}
    assert {chain.context_of(s) for name, s in chain.stages.items() if name[0] == "I"} == {1}
    V4 = chain.stages["V4"]
    assert [V4.rate(step) for step in (0, 15_999, 16_000, 24_999)] == [2e-5, 2e-5, 1e-5, 1e-5]


@pytest.mark.parametrize("name", sorted(CHAINS.keys() - {"wfvae"}))
def test_every_chain_fits_its_model(name):
    chain = load(name, GIVEN)
    layers = (SUV.presets[chain.preset] | chain.model)["num_layers"]
    for one in chain.stages.values():
        assert one.sparsity is None or len(one.sparsity) == len(layers)


def test_warm_up():
    one = stage(warmup=4, then={8: 1e-5})
    rates = [one.rate(step) for step in range(10)]
    assert rates[:5] == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert rates[5:] == pytest.approx([1e-4] * 3 + [1e-5] * 2)
    twice = stage(then={3: 1e-5, 6: 1e-6})
    assert [twice.rate(step) for step in (2, 3, 5, 6, 9)] == [1e-4, 1e-5, 1e-5, 1e-6, 1e-6]


def test_arguments_go_before_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    table = yaml.safe_load(CHAINS["mini"].read_text())
    file.write_text(yaml.safe_dump(table | {"seed": 3}))
    chain = load(file, [*GIVEN, "--stages.video.rule.frames=17", "--stages.image.steps", "7"])
    assert (chain.seed, chain.out) == (3, "runs/x")
    assert chain.stages["video"].rule.frames == 17
    assert chain.stages["image"].steps == 7
    assert chain.stages["longer"] == load("mini", GIVEN).stages["longer"]
    assert load(file, [*GIVEN, "--seed=4"]).seed == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, "sede"),
        ({"clip": {"mode": "safe", "sigma": 2}}, r"clip\.sigma"),
        ({"stages": {"image": {"rule": {"fraems": 9}}}}, r"stages\.image\.rule\.fraems"),
        ({"stages": {"image": {"step": 9}}}, r"stages\.image\.step"),
        ({"ema": "much"}, "ema"),
        ({"preset": "v9"}, "preset must be one of"),
        ({"drop": 1.5}, "drop must be in"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"stages": {"image": {"steps": 0}}}, "steps must be at least 1"),
        ({"stages": {"image": {"learning_rate": -1.0}}}, "learning_rate must be above 0"),
        ({"stages": {"image": {"checkpointing": "all"}}}, "checkpointing must be one of"),
        ({"stages": {"suv": {"skip_connection": False}, "image": {"skip_connection": True}}},
         "skip_connection"),
        ({"samples": {"every": 5}}, "samples.prompts is empty"),
        ({"init": "weights"}, "model has no effect with init"),
        ({"model": {"depth": 9}}, "model has no depth"),
        ({"model": {"num_heads": "many"}}, r"model\.num_heads"),
        ({"model": {"num_layers": [1, 2.5, 1]}}, r"model\.num_layers"),
        *(
            (change, rf"run.yaml has null for {path}; give a value, or leave it out")
            for change, path in (
                ({"stages": {"image": {"then": None}}}, r"stages\.image\.then"),
                ({"stages": {"image": {"rule": None}}}, r"stages\.image\.rule"),
                ({"stages": {"image": {"rule": {"fps": None}}}}, r"stages\.image\.rule\.fps"),
                ({"stages": {"image": None}}, r"stages\.image"),
                ({"stages": None}, "stages"),
                ({"optimizer": None}, "optimizer"),
                ({"clip": {"mode": None}, "model": None}, r"clip\.mode, model"),
                ({"keep": None}, "keep"),
                ({"seed": None}, "seed"),
            )
        ),
        ({"seed": -1}, "seed must be at least 0 and below"),
        ({"seed": 2**63}, "seed must be at least 0 and below"),
        ({"ema": 1.5}, r"ema must be in \[0, 1\]"),
        ({"ema": float("nan")}, r"ema must be in \[0, 1\]"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"optimizer": {"eps": -1.0}}, r"optimizer\.eps must be at least 0"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, r"optimizer\.betas must be in"),
        ({"samples": {"every": -1}}, r"samples\.every must be at least 0"),
        ({"stages": {"image": {"learning_rate": float("inf")}}}, "learning_rate must be above 0"),
        ({"stages": {"image": {"then": {-1: 1e-4}}}}, "then must begin at steps"),
        ({"stages": {"image": {"rule": {"fps": float("inf")}}}}, "fps must be above 0"),
        ({"stages": {"image": {"rule": {"fps": 5000}}}}, "fps must be above 0 and at most 1000"),
        ({"samples": {"guidance": 0.5}}, r"samples\.guidance must be at least 1, got 0\.5"),
        ({"samples": {"prompts": ["a", "\u732b"]}}, "cleaning leaves nothing of prompt"),
        ({"stages": {"image": {"source": ""}}}, "source is empty"),
        ({"stages": {"image": {"cache": ""}}}, "cache is empty"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(tmp_path, change, message):
    table = yaml.safe_load(CHAINS["mini"].read_text())
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(_merged(table, change)))
    with pytest.raises(ValueError, match=message):
        load(file, GIVEN)


def _merged(table, change):
    if not isinstance(change, dict) or not isinstance(table, dict):
        return change
    return table | {key: _merged(table.get(key), value) for key, value in change.items()}


@pytest.mark.parametrize("text", ["- a", "a: [", "\xff\xfe"])
def test_what_is_no_table_is_refused(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=str(file)):
        load(file, GIVEN)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("stages.image.then", r"the arguments have null for stages\.image\.then"),
        ("optimizer", 'optimizer".*null'),
        ("clip.decay", r"clip\.decay.*\n.*Got value: None"),
        ("keep", r"keep.*\n.*Got value: None"),
    ],
)
def test_null_arguments_are_refused(setting, told):
    with pytest.raises(ValueError, match=told):
        load("mini", [*GIVEN, f"--{setting}", "null"])
    assert load("mini", [*GIVEN, "--device", "null"]).device is None


def config(**changes):
    return dataclasses.replace(load("mini", GIVEN), **changes)


@pytest.mark.parametrize("kind", [config, stage, Optimizer, Clip, Samples])
def test_none_in_python_is_refused(kind):
    """Of each field whose type has none."""
    hints = get_type_hints(type(kind()))
    names = [name for name, hint in hints.items() if type(None) not in get_args(hint)]
    assert names
    for name in names:
        with pytest.raises(ValueError, match=f"^{name} is null; give a value, or leave it out"):
            kind(**{name: None})


@pytest.mark.parametrize(
    ("more", "key", "line"),
    [
        ("stages: {}\n", "stages", None),
        ("seed: 3\nseed: 3\n", "seed", None),
        ("samples: {every: 1,\n every: 2}\n", "every", 2),
    ],
)
def test_a_key_that_is_there_twice_is_refused(tmp_path, more, key, line):
    file = tmp_path / "run.yaml"
    base = CHAINS["mini"].read_text()
    file.write_text(base + more)
    at = base.count("\n") + (line or more.count("\n"))
    with pytest.raises(ValueError, match=rf"(?s){key!r} is there twice; leave one.*line {at}"):
        load(file, GIVEN)


def test_the_same_stage_twice_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    table = yaml.safe_load(CHAINS["mini"].read_text())
    stages = yaml.safe_dump(table.pop("stages"))
    doubled = "".join(f"  {line}\n" for line in (stages + stages).splitlines())
    file.write_text(yaml.safe_dump(table) + "stages:\n" + doubled)
    with pytest.raises(ValueError, match=r"run.yaml is no YAML: 'image' is there twice"):
        load(file, GIVEN)


@pytest.mark.parametrize("name", ["out", "init", "vae", "text", "source", "cache"])
def test_no_path_is_not_this_folder(name):
    with pytest.raises(ValueError, match=f"{name} is empty; give a path, or leave it out"):
        load("mini", [*GIVEN, f"--{name}", ""])


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "a/b", "/a", "a\\b", "a.b", "a b", "x\n", "\0", "-a", "n" * 65,
     1, True, None],
)  # fmt: skip
def test_names_of_stages_are_names_of_files(tmp_path, name):
    """And of settings on the command line, where a point would lead further."""
    table = yaml.safe_load(CHAINS["mini"].read_text())
    table["stages"] = {name: table["stages"]["image"]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(table))
    with pytest.raises(ValueError, match=r"stages: .* cannot be the name of one"):
        load(file, GIVEN)
    table["stages"] = {"V1_b-2é": next(iter(table["stages"].values()))}
    file.write_text(yaml.safe_dump(table))
    assert list(load(file, GIVEN).stages) == ["V1_b-2é"]


@pytest.mark.parametrize("text", ["stages: [1, 2]", "stages: image", "stages: 3", "[1, 2]: 3"])
def test_tables_that_are_none_are_refused(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"stages|is no YAML"):
        load(file, GIVEN)


def test_there_is_no_such_file():
    with pytest.raises(FileNotFoundError, match=r"neither a file nor a chain.*mini, v1\.5"):
        load("midi", GIVEN)


def test_arguments_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"clip\.sigma"):
        load("mini", [*GIVEN, "--clip.sigma=2"])


def test_a_source_or_a_cache():
    online = {"stages": {"a": stage()}, "out": "x", "vae": "v", "text": "t"}
    with pytest.raises(ValueError, match=r"stages\.a needs a source or a cache"):
        Config(**online)
    config = Config(**online, source="s", cache="c")
    assert (config.source_of(stage()), config.cache_of(stage())) == (None, "c")
    own = stage(source="mine")
    assert (config.source_of(own), config.cache_of(own)) == ("mine", None)
    assert not dataclasses.replace(config, vae=None, text=None).needs_encoders
    with pytest.raises(ValueError, match="vae and text are needed"):
        dataclasses.replace(config, vae=None, cache=None)


def test_what_decides_a_run_is_what_it_was():
    """By the names under which checkpoints of the first version have it: they go on."""
    given = {"out": "x", "vae": "v", "text": "t", "source": "s"}
    found = settings_of(Config(**given, stages={"a": stage(steps=3), "b": stage()}), "b")
    of_a_stage = {"learning_rate", "then", "warmup", "global_batch", "rule", "sparsity"}
    of_a_stage |= {"skip_connection"}
    of_the_run = {"preset", "model", "init", "posterior", "drop", "optimizer", "clip", "ema"}
    later = {"lora", "images", "balance"}
    parts = ("linear_attention", "experts", "experts_per_token")
    later |= {f"stages.{name}.{key}" for name in "ab" for key in parts}
    assert {found.pop(name) for name in later} == {None}  # as in a checkpoint without such entries
    assert found.keys() == {
        *of_the_run,
        "dtype",
        "seed",
        "stages.a",
        "stages.b",
        "stages.a.steps",
    } | {f"stages.{name}.{key}" for name in "ab" for key in of_a_stage}
    assert found["stages.a.rule"].keys() == {
        "frames", "fps", "size", "max_pixels", "min_pixels", "five_ratios", "stride", "min_aspect",
        "max_aspect", "min_frames", "drop_short", "longest", "temporal_factor",
        "sequence_parallel", "minority",
    }  # fmt: skip
    assert (
        "every"
        in settings_of(
            Config(**given, stages={"a": stage(rule=Rule(size=(32, 32), every=2))}), "a"
        )["stages.a.rule"]
    )


def test_settings_may_be_written_with_dashes(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "{out: o, source: s, vae: v, text: t, stages: {a-b: {steps: 1, learning_rate: 1.0, "
        "global_batch: 4, rule: {size: [32, 32]}}}}"
    )
    found = load(file, ["--context-parallel", "2", "--stages.a-b.global-batch=8", "--save-every=3"])
    assert (found.context_parallel, found.save_every) == (2, 3)
    assert found.stages["a-b"].global_batch == 8
    with pytest.raises(ValueError, match="timeout must be seconds above 0, got 0"):
        load(file, ["--timeout", "0"])
    with pytest.raises(ValueError, match="context_parallel must be at least 1, got 0"):
        load(file, ["--stages.a-b.context-parallel", "0"])
