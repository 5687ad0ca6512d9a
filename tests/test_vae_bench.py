"""Chunks are checked before they are timed, and what is written is what was measured."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("tqdm")

from skiparse.bench.models import vae
from skiparse.bench.op import tables
from skiparse.bench.rows import RESULTS, read
from skiparse.cli import main
from skiparse.models.wfvae.blocks import CausalConv

TINY = {
    "base_channels": 4,
    "latent_channels": 4,
    "encoder_energy_channels": 4,
    "decoder_energy_channels": 4,
    "encoder_res_blocks": 1,
    "decoder_res_blocks": 1,
}
WAYS = ("wfvae.whole", "wfvae.chunked", "wfvae.streamed")
SIZE = vae.Size(TINY, (9, 16, 16), WAYS, (16, 16), frames=(9,))
ALL = dataclasses.replace(vae.SIZES["cpu"], video=(9, 16, 16))


@pytest.fixture
def here(monkeypatch):
    """Memory is measured, but in this process: starting others takes seconds."""

    class Here:
        def __init__(self, *_args, **_options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            self.result = lambda: function(*arguments)
            return self

    monkeypatch.setattr(vae, "ProcessPoolExecutor", Here)


def test_run_prints_tables_and_writes_rows(here, tmp_path, capsys):
    file = tmp_path / "vae.jsonl"
    rows = vae.run(rounds=3, size=SIZE, results=file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert list(tmp_path.iterdir()) == [file]
    out = capsys.readouterr().out
    cases = [(row["case"], row["backend"]) for row in rows]
    for direction in vae.DIRECTIONS:
        for way in WAYS:
            for what in ("time.9x16x16", "memory.9x16x16"):
                assert cases.count((f"vae.{direction}.{what}", way)) == 1
    assert len(rows) == 12
    for row in rows:
        assert row["peak_extra_mib"] >= 0
        if "time" in row["case"]:
            low, high = row["spread_ms"]
            assert low <= row["median_ms"] <= high
            assert row["rounds"] == 3
            assert f"{row['median_ms']:.1f}" in out
            direction = row["case"].split(".")[1]
            parameters, flop = vae.count(SIZE, direction, row["backend"], SIZE.video)
            assert row["parameters"] == parameters
            assert row["tflops"] == pytest.approx(flop / row["median_ms"] / 1e9, abs=1e-4)
            assert row["published_tflop"] is None
            if row["backend"] == "wfvae.whole":
                assert row["speedup"] == 1
    known = set(read(RESULTS)[-1])
    timed = next(set(row) for row in rows if "time" in row["case"])
    assert known - timed == {"ceiling", "reached"}
    assert tables.benchmark(file) == ""


def test_wrong_chunks_are_not_timed(monkeypatch):
    remember = vae.Stream.remember

    def forgetful(self, who, frames):
        if isinstance(who, CausalConv):
            frames = frames * (1 + 1e-9)
        remember(self, who, frames)

    monkeypatch.setattr(vae.Stream, "remember", forgetful)
    monkeypatch.setattr(vae, "time_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="encode in chunks is off by"):
        vae.run(rounds=1, size=SIZE)


@pytest.mark.parametrize(
    ("direction", "tflop"),
    [("encode", 63.3), pytest.param("decode", 372.9, marks=pytest.mark.full)],
)
def test_the_count_of_the_released_model(direction, tflop):
    """Published as 64 and 387; this counts the frames that each level really has."""
    parameters, flop = vae.count(vae.SIZES["cuda"], direction, "wfvae.chunked", vae.RELEASED)
    assert parameters == 227_035_816 - 192  # Haar taps are no parameters here
    assert round(flop / 1e12, 1) == tflop


def test_flops_of_one_convolution():
    """Two for each product: a convolution of 3x3x3 on 2 x 4 x 5 positions."""
    conv = torch.nn.Conv3d(2, 3, 3, padding=1, device="meta")
    with torch.no_grad(), vae.FlopCounterMode(display=False) as counter:
        conv(torch.empty(1, 2, 2, 4, 5, device="meta"))
    assert counter.get_total_flops() == 2 * 27 * 2 * 3 * 40


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_the_others_take_the_same_video_at_a_like_size(name):
    ours = vae.count(ALL, "encode", "wfvae.whole", ALL.video)[0]
    theirs, flop = vae.count(ALL, "encode", name, ALL.video)
    assert abs(theirs / ours - 1) < 0.05
    assert flop > 0
    model = vae.build(name, ALL, "cpu", torch.float32)
    given = vae.inputs(name, ALL, ALL.video)
    latents = vae.call(name, model, "encode")(given["encode"])
    assert latents.shape == given["decode"].shape
    assert vae.call(name, model, "decode")(given["decode"]).shape == given["encode"].shape


def test_a_model_is_the_same_each_time_and_leaves_the_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = (vae.build("wfvae.whole", SIZE, "cpu", torch.float64) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for x, y in zip(one.parameters(), two.parameters(), strict=True):
        assert x.dtype == torch.float64
        assert torch.equal(x, y)


def test_memory_is_beyond_what_comes_out(monkeypatch):
    """An identity that makes nothing but its output needs nothing beyond it."""
    monkeypatch.setattr(vae, "call", lambda *_: lambda x: x.clone())
    monkeypatch.setattr(vae, "peak_extra_bytes", lambda work, _: work() or 10**6)
    size = dataclasses.replace(SIZE, video=(9, 16, 16))
    output = 3 * 9 * 16 * 16 * 4
    found = vae._peak(size, ("encode", "wfvae.whole", size.video), "cpu", torch.float32)
    assert found == 10**6 - output


@pytest.mark.full
def test_chunks_take_memory_that_does_not_grow_with_the_video():
    size = dataclasses.replace(vae.SIZES["cpu"], memory=(64, 64), frames=(33, 121))
    todo = [("encode", "wfvae.chunked", (n, 64, 64)) for n in size.frames]
    short, long = vae._peaks(size, todo, "cpu", torch.float32).values()
    assert long < 1.5 * short  # where the video is 3.7 times as long


def test_the_command(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(vae, "run", lambda **options: seen.update(options))
    assert main(["bench", "--vae", "--device", "cpu", "--rounds", "2", "--results", ""]) == 0
    assert seen == {"device": "cpu", "dtype": torch.float32, "rounds": 2, "results": None}
    assert main(["bench", "vae", "121x576x1024.k8.single.fwd"]) == 2
    assert main(["bench", "--vae", "--against", "dense"]) == 2
    assert "bench vae: unrecognized arguments: --against dense" in capsys.readouterr().err


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        vae.run(rounds=0, size=SIZE)
