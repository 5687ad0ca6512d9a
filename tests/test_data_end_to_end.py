"""From shards, as people have them, to a sample: import, score, filter, cache, train, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("av")
pytest.importorskip("diffusers")
pytest.importorskip("jsonargparse")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

import torch  # after the checks
from test_data_import import about, image, shard, table
from test_data_score import Bright, Difference, Even, Red, film, scene, written
from test_data_score import save as save_network
from test_export import VAE
from test_text import save, tiny_encoders

from skiparse.cli import main
from skiparse.models.data.manifest import Manifest
from skiparse.models.data.video import probe
from skiparse.models.wfvae.model import WFVAE

CONFIG = """
preset: tiny
device: cpu
ema: 0.5
stages:
  video:
    steps: 3
    learning_rate: 1.0e-3
    global_batch: 2
    sparsity: [1, 2, 4, 2, 1]
    rule: {frames: 9, fps: 24, size: [32, 64], longest: 100, min_aspect: 0.3, minority: 0}
"""


def shards(folder: Path) -> None:
    """Two, of five videos and an image, and their metadata; one is dark, one a duplicate."""
    films = {
        1: film(scene(1, 24, level=0.6)),
        2: film(scene(2, 12, level=0.5), scene(3, 13, level=0.85)),
        3: film(written(scene(4, 24, level=0.6))),
        4: film(scene(5, 24, level=0.2)),
        5: film(scene(1, 24, level=0.6)),
    }
    for number, keys in enumerate(((1, 2, 3), (4, 5))):
        files = {}
        for key in keys:
            files |= {f"{key:05}.mkv": films[key], f"{key:05}.json": about(key % 4)}
        files |= {"9.png": image(9, (48, 96)), "9.json": about(9)} if number else {}
        shard(folder / f"{number:05}.tar", files)


def test_from_shards_to_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: object) -> list[str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out.splitlines()

    shards(tmp_path / "shards")
    rows = [{"url": f"http://host/{n}", "text": f"The video shows stripe {n}"} for n in range(4)]
    listed = table(tmp_path / "list.parquet", rows)
    networks = {"motion": Difference(), "text": Red(), "aesthetic": Bright(), "technical": Even()}
    options = []
    for name, network in networks.items():
        options += [f"--{name}", save_network(tmp_path / f"{name}.pt", network)]
    torch.manual_seed(0)
    WFVAE(**VAE).save_pretrained(tmp_path / "vae")
    save(tmp_path / "text", tiny_encoders())
    encoders = ["--vae", tmp_path / "vae", "--text", tmp_path / "text"]
    (tmp_path / "run.yaml").write_text(CONFIG)

    clips = tmp_path / "clips" / "data.txt"
    mapped = ["--columns", "width=,height="]
    out = run(
        "data", "import", "coyo", listed, clips.parent, "--files", tmp_path / "shards", *mapped
    )
    assert out[-2] == f"{listed}: used 4 of 4; nothing dropped"
    run("data", "score", clips, tmp_path / "scores", "--device", "cpu", *options)
    out = run("data", "filter", tmp_path / "scores", tmp_path / "kept")
    assert out[-3] == f"{tmp_path / 'scores'}: used 4 of 5; dropped 1: 1 aesthetic too low"
    kept = Manifest.open(tmp_path / "kept" / "data.txt")
    records = [kept.record(row) for row in range(len(kept))]
    assert [(r.captions, r.start, r.frames) for r in records] == [
        (("Stripe 1",), 0, 24),
        (("Stripe 2",), 0, 12),
        (("A high-aesthetic scene, Stripe 2",), 12, 13),
        (("Stripe 3",), 0, 24),
    ]
    assert [r.crop for r in records] == [None, None, None, (0, 0, 41, 96)]

    source = tmp_path / "kept" / "data.txt"
    place = ["--out", tmp_path / "run"]
    run("cache", "build", tmp_path / "run.yaml", "video", tmp_path / "cache", *place, "--source",
        source, *encoders)  # fmt: skip
    run("cache", "verify", tmp_path / "cache", "--full")
    run("train", tmp_path / "run.yaml", *place, "--stages.video.cache", tmp_path / "cache")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1, 2]
    run("export", tmp_path / "run", tmp_path / "model", *encoders)
    sizes = ["--height", 32, "--width", 64, "--frames", 9, "--steps", 2, "--device", "cpu"]
    video = tmp_path / "x.mp4"
    run("sample", "--model", tmp_path / "model", "--prompt", "stripe 2", "--out", video, *sizes)
    assert probe(video).frames == 9
