"""A tiny Wan is made sparse and tuned beside the dense one, and the report tells what came of it.

Its scenes are so small here that its learning says nothing.
"""

import json
import math

import pytest

pytest.importorskip("av")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from PIL import Image  # comes with matplotlib
from test_demo import Page

from skiparse.bench.clip import bundled_clip
from skiparse.bench.demo import retrofitting
from skiparse.bench.experiments import retrofit, toy
from skiparse.bench.experiments.retrofit import ARMS, BEFORE

STEPS, TINY = 16, {"tiny": (2, 64, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("retrofit")
    with toy.one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrofit, "WANS", TINY)
        picture = retrofit.run(out, steps=STEPS, size=retrofit.SIZES["quick"])
    assert picture == out / "retrofit.png"
    Image.open(picture).load()
    return out


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "retrofit.json").read_text())


def test_all_go_on_from_one(found):
    """What comes from the retrofit is the dense model's weights, attended to otherwise."""
    begun = {name: one["curve"][0] for name, one in found["runs"].items()}
    dense = found["runs"][BEFORE]
    assert dense["curve"][-1] == begun["dense"] == {"step": STEPS, "loss": dense["last"]}
    assert dense["last"] < dense["curve"][0]["loss"]
    for pattern in ("1-D", "2-D"):
        assert begun[f"{pattern} in full"] == begun[f"{pattern}, LoRA"] != begun["dense"]
    assert begun["1-D in full"] != begun["2-D in full"]


def test_they_learn_and_differ(found):
    last = {name: found["runs"][name]["last"] for name in ARMS}
    assert len(set(last.values())) == len(ARMS)
    for name in ARMS:
        curve = found["runs"][name]["curve"]
        assert [point["step"] for point in curve] == [STEPS + i for i in range(7)]
        assert curve[-1]["loss"] < curve[0]["loss"]
        assert retrofit.above_dense(found, name)[1] == last[name] - last["dense"]


def test_a_lora_trains_its_own_weights(found):
    trained = {name: found["runs"][name]["trained"] for name in ARMS}
    width, layers, projections = 24, 2, 8
    assert trained["1-D, LoRA"] == trained["2-D, LoRA"] == layers * projections * 2 * 8 * width
    assert trained["dense"] == trained["1-D in full"] == trained["2-D in full"]


def test_scenes_share_no_frame_and_are_large_enough():
    for name, size in retrofit.SIZES.items():
        scenes = size.scenes
        assert scenes.stride >= scenes.frames
        steps = 1 + (scenes.frames - 1) // 8
        tokens = steps * (scenes.height // 32) * (scenes.width // 32)
        assert tokens > (2000 if name == "full" else 0)
        assert not math.gcd(scenes.height, scenes.width) % 32


def test_the_costs_are_those_of_a_retrofit(found):
    assert [(one["model_of"], one["clip"]) for one in found["costs"]] == [
        ("tiny", "480P"), ("tiny", "720P")
    ]  # fmt: skip
    assert [one["tokens"] for one in found["costs"]] == [32_760, 75_600]
    assert all(3.9 < one["attention"] <= 4 for one in found["costs"])  # no layer of two is dense
    assert all(1 < one["model"] < one["attention"] for one in found["costs"])


def test_the_report_has_the_plot_and_both_tables(folder, found):
    page = retrofitting.section(folder / "retrofit.png")
    parsed = Page(page)
    (image,) = parsed.images
    assert all(f"{name} {found['runs'][name]['last']:.3f}" in image["alt"] for name in ARMS)
    assert all(load.startswith("data:image/png") for load in parsed.loads)
    losses, costs = parsed.rows[1 : 1 + len(ARMS)], parsed.rows[2 + len(ARMS) :]
    assert [row[0] for row in losses] == list(ARMS)
    assert [row[0] for row in costs] == ["Wan tiny, 480P", "Wan tiny, 720P"]
    assert "<h3>What is not shown</h3>" in page
    assert retrofit.table(found).count("\n") == 1 + len(ARMS) + 2


@pytest.mark.parametrize(
    ("shift", "told"),
    [(0.1, "None ends as low"), (-0.1, "As low as the dense one at the same step ended: 1-D in")],
)
def test_the_verdict_follows_from_the_numbers(found, shift, told):
    changed = json.loads(json.dumps(found))
    dense = changed["runs"]["dense"]["curve"][-1]["loss"]
    for name in ARMS:
        if name != "dense":
            changed["runs"][name]["curve"][-1]["loss"] = dense + shift
    assert told in retrofitting.verdict(changed)


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 3"):
        retrofit.run(tmp_path, steps=2)
