"""The comparison at equal steps: three models from one, judged on scenes they have not seen."""

import json

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.demo import attention
from skiparse.bench.experiments import overfit, sparsity

QUICK = sparsity.SIZES["quick"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        attention.bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("sparsity")
    before = torch.get_num_threads()
    assert sparsity.run(out, steps=24, size=QUICK) == out / "sparsity.png"
    assert torch.get_num_threads() == before
    return out


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "sparsity.json").read_text())


def test_all_begin_alike_and_learn(found):
    first, *_, last = found["curve"]
    assert first["dense"] == first["converted"] != first["sparse"]
    for name in sparsity.ARMS:
        one = found["models"][name]
        assert one["judged"] == last[name] < 0.9 * first[name]
        assert one["trained"] == last[f"{name}, trained"] < one["judged"]
        assert one["seconds"] == pytest.approx(last[f"{name}, seconds"])


def test_what_each_ends_as(found):
    models = found["models"]
    assert models["dense"]["sparsity"] == [1] * 5
    assert models["sparse"]["sparsity"] == models["converted"]["sparsity"] == [1, 2, 4, 2, 1]
    assert models["sparse"]["parameters"] == models["converted"]["parameters"]
    assert models["dense"]["parameters"] < models["sparse"]["parameters"]  # skips
    assert models["dense"]["attention_pairs"] > models["sparse"]["attention_pairs"]


def test_until_the_conversion_converted_is_dense(found):
    half = found["steps"] // 2
    for point in found["curve"]:
        assert (point["dense"] == point["converted"]) == (point["step"] <= half)


def test_judged_scenes_are_not_trained_on():
    scenes = overfit.scenes_of(attention.bundled_clip(), QUICK.scenes)
    size = QUICK.scenes
    assert size.stride >= size.frames  # so scenes do not share a frame
    assert sparsity.SIZES["full"].scenes.stride >= sparsity.SIZES["full"].scenes.frames
    assert len(scenes.latents) - QUICK.judged == 2


def test_the_files_are_whole_and_alone(folder, found):
    assert sorted(path.name for path in folder.iterdir()) == ["sparsity.json", "sparsity.png"]
    Image.open(folder / "sparsity.png").load()
    assert "converted" in sparsity.table(found)


def test_one_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 2"):
        sparsity.run(tmp_path, steps=1)
