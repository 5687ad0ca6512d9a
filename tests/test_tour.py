"""The whole demo in one report, which grows part by part."""

import pytest

pytest.importorskip("av")
pytest.importorskip("jsonargparse")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

from test_demo import Page

from skiparse.bench.clip import bundled_clip
from skiparse.bench.demo import attention, generate, report, tour
from skiparse.bench.experiments import reconstruct, retrofit


def test_every_part_is_in_the_report(tmp_path, monkeypatch):
    try:
        bundled_clip()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    results = []
    real = report.write

    def remembering(path, result):
        results.append(result)
        return real(path, result)

    monkeypatch.setattr(report, "write", remembering)
    monkeypatch.setattr(generate, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(retrofit, "WANS", {"tiny": (2, 64, 2)})
    path = tour.run(tmp_path / "out", quick=True)
    assert [len(result.sections) for result in results] == [0, 1, 2, 3]
    text = path.read_text(encoding="utf-8")
    names = ("Speed", "What a tiny WF-VAE", "From the clip", "A Wan made sparse")
    parts = [text.index(f"<h2>{name}") for name in names]
    assert parts == sorted(parts)
    assert all(load.startswith("data:") for load in Page(text).loads)
    assert text.count("<video") == 2 * len(generate.SCENES)
    assert (tmp_path / "out" / "vae" / reconstruct.RECIPE).is_file()

    def again(*_):
        pytest.fail("attention was measured although its figures are there")

    monkeypatch.setattr(attention, "_timed", again)
    monkeypatch.setattr(attention, "_checked", again)
    kept = attention.measured(quick=True, kept=tmp_path / "out" / "attention.json")
    assert [row.median for row in kept.rows] == [row.median for row in results[0].rows]
    monkeypatch.setattr(attention.platform, "machine", lambda: "another")
    with pytest.raises(pytest.fail.Exception, match="measured although"):
        attention.measured(quick=True, kept=tmp_path / "out" / "attention.json")
