"""A tiny SUV is told of first frames in an experiment; scenes so small that it says little."""

import json
import statistics

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import images
from skiparse.bench.experiments.images import ARMS, BEFORE, run_of

STEPS, SEEDS = 8, (0, 5)


@pytest.fixture(scope="module")
def clip():
    try:
        return bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def found(clip, tmp_path_factory):
    out = tmp_path_factory.mktemp("images")
    picture = images.run(out, steps=STEPS, size=images.SIZES["quick"], seeds=SEEDS)
    Image.open(picture).load()
    assert {path.name for path in out.iterdir()} == {"images.png", "images.json"}
    return json.loads((out / "images.json").read_text())


def test_all_begin_as_the_model_of_text(found):
    for seed in SEEDS:
        before = found["runs"][run_of(BEFORE, seed)]["curve"]
        begun = {found["runs"][run_of(arm, seed)]["curve"][0]["loss"] for arm in ARMS}
        assert begun == {before[-1]["loss"]}
        last = {found["runs"][run_of(arm, seed)]["curve"][-1]["loss"] for arm in ARMS}
        assert len(last) == 3
        assert max(last) < before[0]["loss"]


def test_the_table_has_what_was_found(found):
    lines = images.table(found).splitlines()
    for which in ("learnt", "set aside"):
        for arm in ARMS:
            each = [found["runs"][run_of(arm, seed)]["psnr"][which] for seed in SEEDS]
            first = statistics.median(frames[0] for frames in each)
            line = next(x for x in lines if x.startswith(which) and f" {arm} " in x)
            assert f"{first:.1f}" in line
            assert all(len(frames) == 3 for frames in each)


def test_a_perfect_sample_has_no_error_and_a_held_frame_is_right_at_first(clip):
    scenes = images.scenes_of(clip, images.SIZES["quick"])
    assert images.psnr(scenes.latents, scenes.latents, scenes) == [pytest.approx(100.0)] * 3
    first, *later = images.psnr(images.still(scenes.latents), scenes.latents, scenes)
    assert first == pytest.approx(100.0)
    assert max(later) < 60
    assert torch.equal(scenes.text[0], scenes.text[1])
    parts = images.parted(scenes)
    assert [len(parts[name].latents) for name in ("learnt", "set aside")] == [2, 1]
    assert torch.equal(parts["set aside"].latents[0], scenes.latents[1])


def test_only_the_first_frame_is_told(clip):
    scenes = images.scenes_of(clip, images.SIZES["quick"])
    known = images.first_of(scenes.latents)
    assert known.known.tolist() == [[True, False, False]] * 3
    assert torch.equal(known.latents[:, :, 0], scenes.latents[:, :, 0])
    assert not known.latents[:, :, 1:].any()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        images.run(steps=0)


@torch.no_grad()
def test_a_model_that_knows_the_frame_is_given_it(clip):
    """An oracle of first frames has them at once, and nothing of the others."""
    scenes = images.scenes_of(clip, images.SIZES["quick"])

    class Oracle:
        def __call__(self, noisy, times, text, pooled, images=None):
            sigma = times.view(-1, 1, 1, 1, 1) / 1000
            wanted = torch.zeros_like(noisy) if images is None else images.latents
            return (noisy - wanted) / sigma

    told, untold = (images.sample(Oracle(), scenes, x, 0) for x in (True, False))
    first, *_ = images.psnr(told, scenes.latents, scenes)
    assert first > 60
    assert not untold.abs().max() > 1e-4
