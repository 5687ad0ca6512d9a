"""The clipping experiment feeds each run what it says, and its files tell what came of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from skiparse.bench.clip import bundled_clip
from skiparse.bench.experiments import clipping
from skiparse.models import flow

RECORDED = Path(__file__).parent / "data" / "adaptive_clip.safetensors"
QUICK = clipping.SIZES["quick"]
STEPS = 10  # bad: 3 and 7 wrong target, 4 and 6 large, 5 NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    try:
        bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("clipping") / "new" / "out"
    before = torch.get_num_threads()
    picture = clipping.run(folder, steps=STEPS, size=QUICK, recorded=RECORDED)
    assert picture == folder / "clipping.png"
    assert torch.get_num_threads() == before
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "clipping.json").read_text())


def test_the_files_are_whole_and_alone(folder, found):
    assert sorted(path.name for path in folder.iterdir()) == ["clipping.json", "clipping.png"]
    with Image.open(folder / "clipping.png") as picture:
        picture.load()
        assert picture.width > 1000
    assert "Big Buck Bunny" in found["credit"]
    assert found["recipe"]["bad"] == {
        "3": "wrong target",
        "4": "large",
        "5": "nan",
        "6": "large",
        "7": "wrong target",
    }


def test_it_gives_the_same_again(folder, tmp_path):
    torch.manual_seed(77)  # nothing depends on the global generator, nor changes it
    before = torch.get_rng_state()
    clipping.run(tmp_path, steps=STEPS, size=QUICK, recorded=RECORDED)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("clipping.json", "clipping.png"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# The runs


def test_all_start_alike_and_only_bad_batches_tell_the_first_two_apart(found):
    runs = found["runs"]
    assert set(runs) == set(clipping.WAYS)
    assert len({one["curve"][0]["loss"] for one in runs.values()}) == 1
    assert len({one["norm"][0] for one in runs.values()}) == 1
    whole, none = runs["undisturbed"]["norm"], runs["none"]["norm"]
    assert whole[:2] == none[:2]
    assert whole[2] != none[2]
    assert none[3] > 10 * whole[3]
    assert runs["none"]["last"] != runs["undisturbed"]["last"]
    assert runs["undisturbed"]["curve"][-1]["loss"] < runs["undisturbed"]["curve"][0]["loss"]


def test_nothing_and_a_fixed_threshold_clip_as_they_say(found):
    for name in ("undisturbed", "none"):
        assert found["runs"][name]["action"] == ["step"] * STEPS
        assert found["runs"][name]["threshold"] == [None] * STEPS
    fixed = found["runs"]["fixed"]
    assert fixed["threshold"] == [1] * STEPS
    assert fixed["action"] == ["clip" if norm > 1 else "step" for norm in fixed["norm"]]
    assert fixed["action"][3] == "clip"


def test_nan_is_met_and_skipped_by_two(found):
    for name, one in found["runs"].items():
        skipped = [step for step, norm in enumerate(one["norm"], start=1) if norm is None]
        assert skipped == ([5] if name in ("report", "safe") else [])
        assert math.isfinite(one["last"])
        assert all(one["action"][step - 1] == "skip" for step in skipped)


def test_the_original_rule_stops_at_a_large_batch(found):
    one = found["runs"]["osp15"]
    assert one["stopped"] == 4
    assert one["action"][-1] == "stop"
    assert len(one["norm"]) == 4
    assert [point["step"] for point in one["curve"]] == [0, 4]
    for name in ("fixed", "report", "safe"):
        assert found["runs"][name]["stopped"] is None
        assert [point["step"] for point in found["runs"][name]["curve"]] == [0, STEPS]


def test_a_stopped_run_keeps_its_weights(folder):
    scenes = clipping.toy.scenes_of(bundled_clip(), QUICK)
    model = clipping.toy.dense_of(scenes, QUICK, sparsity=QUICK.sparsity)
    run = clipping.Clipped(model, scenes, clipping.WAYS["osp15"], bad={2: "large"})
    sigmas, noise = torch.tensor([0.3, 0.6]), torch.ones((2, *scenes.latents.shape))
    run.step(1, 1e-3, sigmas, noise)
    kept = [x.clone() for x in run.model.parameters()]
    run.step(2, 1e-3, sigmas, noise)
    run.step(3, 1e-3, sigmas, noise)
    assert run.stopped
    assert len(run.decisions) == 2
    changed = [not torch.equal(x, y) for x, y in zip(kept, model.parameters(), strict=True)]
    assert any(changed)
    for x, y in zip(run.model.parameters(), kept, strict=True):
        assert torch.equal(x, y)


def test_the_table_has_a_line_for_each(found):
    head, *lines = clipping.table(found).splitlines()
    assert head.split() == ["loss", "ratio", "step", "clip", "skip"]
    assert [line.split()[0] for line in lines] == list(clipping.WAYS)
    assert lines[0].split()[2:] == ["1.000", "10", "0", "0"]
    assert lines[4].endswith(", stopped at step 4")


def test_bad_batches_are_bad_in_their_way():
    torch.manual_seed(0)
    latents, noise, other = torch.randn(3, 2, 4, 1, 2, 2)
    sigmas = torch.tensor([0.2, 0.7])

    def of(kind):
        return clipping.problem(kind, latents, sigmas, noise, other)

    noisy, velocity = of(None)
    assert torch.equal(noisy, flow.add_noise(latents, noise, sigmas))
    assert torch.equal(velocity, flow.velocity(latents, noise))
    assert torch.equal(of("wrong target")[0], noisy)
    assert torch.equal(of("wrong target")[1], flow.velocity(latents, other))
    assert torch.equal(of("large")[0], flow.add_noise(30 * latents, noise, sigmas))
    assert torch.equal(of("large")[1], flow.velocity(30 * latents, noise))
    assert all(x.isnan().all() for x in of("nan"))


def test_every_size_has_its_bad_batches_apart():
    for steps in (10, 11, 37, clipping.STEPS):
        assert list(clipping.bad_batches(steps).values()) == list(clipping.BAD.values())


# The sequences


def test_the_sequences_do_what_their_names_say():
    norms = clipping.sequences()
    for times in (2, 4, 10):
        before, after = np.split(np.array(norms[f"x{times}"]), 2)
        assert after.mean() / before.mean() == pytest.approx(times, rel=0.05)
    assert np.flatnonzero(np.array(norms["spikes"]) > 1).tolist() == [200, 350, 500]
    assert norms["sinks"][0] / norms["sinks"][-1] == pytest.approx(10, rel=0.5)


def test_safe_follows_the_jumps_and_the_others_do_not(found):
    for name, bound in (("x2", 39), ("x4", 67), ("x10", 96)):
        modes = found["sequences"][name]["modes"]
        missed = [action != "step" for action in modes["safe"]["action"]]
        assert not any(missed[300 + bound :])
        assert missed[300:].count(True) <= bound
    for mode in ("report", "osp15"):
        for name in ("x4", "x10"):
            assert set(found["sequences"][name]["modes"][mode]["action"][300:]) == {"clip"}


def test_recorded_norms_get_the_thresholds_of_the_original(found):
    golden = load_file(RECORDED)
    assert found["sequences"]["recorded"]["norm"] == golden["main.osp15.norm_before"].tolist()
    threshold = found["sequences"]["recorded"]["modes"]["osp15"]["threshold"]
    assert np.abs(threshold - golden["main.osp15.threshold"]).max() <= 2e-5  # fp32 of the original


# Errors


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="steps must be at least 10, for five bad batches, got 9"):
        clipping.run(tmp_path / "out", steps=9)
    with pytest.raises(FileNotFoundError):
        clipping.run(tmp_path / "out", recorded=tmp_path / "none.safetensors")
    assert not (tmp_path / "out").exists()
