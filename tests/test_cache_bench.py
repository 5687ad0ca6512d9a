"""Steps from a cache are timed only if they are those of the encoders; rows say what was seen."""

import dataclasses
import json
import re
import time

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("pyarrow")
pytest.importorskip("av")

from skiparse.bench.models import cache
from skiparse.models.data.cache import Cache

SMALL = {"width": 8, "heads": 1, "layers": (1, 1, 1), "text_width": 64, "text_layers": 1}
TINY = (
    cache.Setting("image", frames=1, size=(32, 32), batch=2, clips=2, channels=4, **SMALL),
    cache.Setting("video", frames=9, size=(32, 32), batch=1, clips=2, channels=4, **SMALL),
)


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    """Memory is looked at in this process."""
    monkeypatch.setattr(
        cache, "_peak", lambda setting, folder, way: cache._peak_here(setting, folder, way, 1)
    )


def test_rows_and_tables(tmp_path, capsys, monkeypatch):
    """With encoders that take their time, or busy cores decide which way is the faster."""
    features = cache.Encoders.features

    def slowly(self, clip):
        time.sleep(0.3)
        return features(self, clip)

    monkeypatch.setattr(cache.Encoders, "features", slowly)
    file = tmp_path / "rows.jsonl"
    rows = cache.run(rounds=3, settings=TINY, results=file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert [(row["case"], row["backend"]) for row in rows] == [
        ("cache.image", "encoders"),
        ("cache.image", "cache"),
        ("cache.video", "encoders"),
        ("cache.video", "cache"),
    ]
    shown = capsys.readouterr().out
    for full, cached in (rows[:2], rows[2:]):
        assert full["parts_ms"].keys() == set(cache.PARTS)
        assert all(value > 0 for value in full["parts_ms"].values())
        assert full["speedup"] == 1
        assert cached["speedup"] == pytest.approx(1 / (1 - cached["measured_gain"]), rel=1e-3)
        assert full["median_ms"] > cached["median_ms"]
        assert full["rounds"] == 3
        for row in (full, cached):
            low, high = row["spread_ms"]
            assert low <= row["median_ms"] <= high
            assert f"{row['median_ms']:.1f} ms a step" in shown
    said = re.findall(r"predicted (\S+)%, measured (\S+)%", shown)
    for full, percent in zip(rows[::2], said, strict=True):
        gains = [100 * full["predicted_gain"], 100 * full["measured_gain"]]
        assert [float(x) for x in percent] == pytest.approx(gains, abs=0.06)
    assert "images, 64 a batch" in shown
    assert "37.2%" in shown  # as published


def test_the_prediction_by_hand():
    parts = {"read": [1.0], "text": [2.0], "vae": [3.0], "load": [0.5], "dit": [4.0]}
    steps = {"encoders": [10.0, 20.0, 30.0], "cache": [5.0, 5.0, 27.0]}
    found = cache.Figures(TINY[0], steps, parts, {"encoders": 400, "cache": 300})
    assert found.predicted == pytest.approx(5.5 / 10)
    assert found.measured == pytest.approx(0.5)
    assert "apart 5.0 points, more than 3" in cache.table(found)
    assert "memory saved: 25.0%" in cache.table(found)


def test_another_batch_is_not_timed(monkeypatch):
    def wrong(self, place):
        features = original(self, place)
        return dataclasses.replace(features, mean=features.mean * (1 + 1e-6))

    original = Cache.__getitem__
    monkeypatch.setattr(Cache, "__getitem__", wrong)
    monkeypatch.setattr(cache, "timed_parts", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="latents from the cache are not those of the enc"):
        cache.run(rounds=1, settings=TINY)


def test_encoders_are_the_same_each_time_and_leave_the_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = (cache.build_encoders(TINY[0]).fingerprints() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one == two


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        cache.run(rounds=0)
