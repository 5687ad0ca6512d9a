"""The comparison with and without a linear branch and experts: what begins alike, and is told."""

import json

import pytest

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import extended
from skiparse.bench.experiments.extended import SIZES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("extended")
    found = extended.run(out, steps=6, seeds=2, size=SIZES["quick"])
    assert found == out / "extended.png"
    Image.open(found).load()
    return out


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "extended.json").read_text())


def test_all_of_a_seed_begin_alike_and_learn(found):
    begin = {name: one["curve"][0]["loss"] for name, one in found["runs"].items()}
    for seed in range(2):
        assert begin[f"linear {seed}"] == begin[f"sparse {seed}"] != begin[f"dense {seed}"]
        assert begin[f"experts {seed}"] == pytest.approx(begin[f"sparse {seed}"], rel=1e-5)
    assert begin["sparse 0"] != begin["sparse 1"]
    for name, one in found["runs"].items():
        assert one["last"] == one["curve"][-1]["loss"] < begin[name]
    for seed in range(2):
        assert len({found["runs"][f"{arm} {seed}"]["last"] for arm in extended.ARMS}) == 4


def test_what_each_has_more(found):
    runs, width, layers = found["runs"], 64, 6
    sparse = runs["sparse 0"]["parameters"]
    assert runs["dense 0"]["parameters"] == sparse
    assert runs["linear 0"]["parameters"] == sparse + layers * width**2
    experts = layers * (3 * 8 * width**2 + 4 * width)  # three more of them, and routers
    assert runs["experts 0"]["parameters"] == sparse + experts
    assert all("imbalance" in point for point in runs["experts 0"]["curve"])
    assert extended.above_sparse(found, "sparse", "last") == [0, 0]
    assert "imbalance of experts" in extended.table(found)


def test_experts_learn_to_be_balanced(found, monkeypatch):
    """Beside a loss without: the weight of it is in the gradient."""
    scenes = extended.toy.scenes_of(bundled_clip(), SIZES["quick"].scenes)
    ends = []
    for weight in (0.0, 10.0):
        monkeypatch.setattr(extended, "BALANCE", weight)
        one = extended.arms_of(scenes, SIZES["quick"], 0)["experts"]
        rate = lambda step: 1e-3  # noqa: E731
        extended.side_by_side({"one": one}, 6, rate=rate, every=6, seed=1)
        ends.append(one.curve[-1]["imbalance"])
    assert ends[1] < ends[0]


@pytest.mark.parametrize("changes", [{"steps": 0}, {"seeds": 0}], ids=str)
def test_nothing_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be at least 1"):
        extended.run(tmp_path, **changes)
