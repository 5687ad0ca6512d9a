"""The comparison at equal steps: three models from one, judged on scenes they have not seen."""

import json

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import sparsity, toy

QUICK = sparsity.SIZES["quick"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        bundled_clip()
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
    runs = found["runs"]
    assert set(runs) == set(sparsity.ARMS)
    begin = {name: one["curve"][0]["loss"] for name, one in runs.items()}
    assert begin["dense"] == begin["converted"] != begin["sparse"]
    for name, one in runs.items():
        last = one["curve"][-1]
        assert one["last"] == last["loss"] < 0.9 * begin[name]
        assert one["trained"] == last["trained"] < one["last"]
        assert one["seconds"] == last["seconds"] > 0


def test_what_each_ends_as(found):
    models = found["runs"]
    assert models["dense"]["sparsity"] == [1] * 5
    assert models["sparse"]["sparsity"] == models["converted"]["sparsity"] == [1, 2, 4, 2, 1]
    assert models["sparse"]["parameters"] == models["converted"]["parameters"]
    assert models["dense"]["parameters"] < models["sparse"]["parameters"]  # skips
    assert models["dense"]["attention_pairs"] > models["sparse"]["attention_pairs"]


def test_until_the_conversion_converted_is_dense(found):
    half = found["recipe"]["steps"] // 2
    curves = (found["runs"][name]["curve"] for name in ("dense", "converted"))
    for dense, converted in zip(*curves, strict=True):
        assert (dense["loss"] == converted["loss"]) == (dense["step"] <= half)


def test_judged_scenes_are_not_trained_on():
    scenes = toy.scenes_of(bundled_clip(), QUICK.scenes)
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
