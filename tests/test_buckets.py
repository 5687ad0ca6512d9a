"""What min-max token buckets promise: the shapes of the report, nothing enlarged, all counted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")

from skiparse.models.data.buckets import (  # noqa: E402  # after the checks
    RATIOS,
    Buckets,
    Rule,
    assign,
    without_minority,
)
from skiparse.models.data.manifest import DataError, Manifest  # noqa: E402

Row = tuple[int, int, int, float]  # height, width, frames, fps; fps 0 is an image


def manifest(rows: Sequence[Row]) -> Manifest:
    height, width, frames, fps = (np.array(column) for column in zip(*rows, strict=True))
    zero = np.zeros(len(rows), np.int32)
    numbers = {
        "height": height.astype(np.int32),
        "width": width.astype(np.int32),
        "frames": frames.astype(np.int32),
        "fps": fps.astype(np.float64),
        "is_video": (fps > 0).astype(np.uint8),
        **dict.fromkeys(("start", "top", "left", "root"), zero),
    }
    about = {"roots": ["."], "dropped": {}, "fingerprint": ""}
    return Manifest(pa.table(numbers), pa.table({}), about)


def shapes(rows: Sequence[Row], rule: Rule, seed: int = 0) -> list[tuple[int, int, int] | None]:
    """The shape that each row gets, None if it is dropped."""
    found = assign(manifest(rows), rule, seed)
    return [found.shapes[number] if number >= 0 else None for number in found.bucket]


def shape(row: Row, rule: Rule) -> tuple[int, int, int] | str:
    """The shape that a row gets, or why it is dropped; beside one that is always taken."""
    other = (rule.size or (1024, 1024)) + ((rule.frames, rule.fps))
    found = assign(manifest([row, other]), rule, 0)
    if found.bucket[0] < 0:
        assert list(found.dropped.values()) == [1]
        return next(iter(found.dropped))
    assert not found.dropped
    return found.shapes[found.bucket[0]]


# Heights and widths.


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (65536, [(144, 256), (192, 256), (256, 256), (256, 192), (256, 144)]),
        (147456, [(288, 512), (288, 384), (384, 384), (384, 288), (512, 288)]),
        (589824, [(576, 1024), (624, 832), (768, 768), (832, 624), (1024, 576)]),
    ],
)
def test_the_five_shapes_of_large_sources(most: int, expected: list[tuple[int, int]]) -> None:
    """Those that the data pipeline of Open-Sora Plan v1.5 makes."""
    rows = [(high * 800, wide * 800, 1, 0.0) for high, wide in RATIOS]
    got = shapes(rows, Rule(max_pixels=most, min_pixels=36864))
    assert got == [(1, *size) for size in expected]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((230, 230), (224, 224)),
        ((215, 223), (208, 208)),
        ((400, 400), (256, 256)),
        ((720, 1280), (144, 256)),
        ((480, 640), (192, 256)),
        ((420, 1000), "aspect out of range"),  # 0.42
        ((500, 1000), (144, 256)),  # 1:2 is nearest to 9:16
        ((191, 260), "too small"),  # 3:4 in it is 144 x 192
    ],
)
def test_the_shape_follows_the_source(source: tuple[int, int], expected: Any) -> None:
    got = shape((*source, 1, 0.0), Rule(max_pixels=65536, min_pixels=36864))
    assert got == (expected if isinstance(expected, str) else (1, *expected))


def test_an_aspect_is_height_by_width() -> None:
    rule = Rule(max_pixels=65536, min_aspect=1.0, max_aspect=1.8)
    assert shape((480, 270, 1, 0.0), rule) == (1, 256, 144)
    assert shape((270, 480, 1, 0.0), rule) == "aspect out of range"


def test_min_pixels_is_a_quarter_if_not_given() -> None:
    rule = Rule(max_pixels=65536, five_ratios=False)
    assert shape((128, 128, 1, 0.0), rule) == (1, 128, 128)
    assert shape((112, 144, 1, 0.0), rule) == "too small"  # 16128


def test_a_source_below_the_smallest_multiple_of_its_ratio() -> None:
    """108 x 192 is 9:16, but the smallest multiple of 16 with it is 144 x 256."""
    assert shape((108, 192, 1, 0.0), Rule(max_pixels=65536)) == (1, 96, 192)


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(16, 3000),
    width=st.integers(16, 3000),
    most=st.integers(1024, 2_000_000),
    stride=st.sampled_from([8, 16, 32]),
    five_ratios=st.booleans(),
)
def test_nothing_is_enlarged_and_nothing_wasted(
    height: int, width: int, most: int, stride: int, five_ratios: bool
) -> None:
    """The shape is found here by trying one size after the other, in fractions."""
    rule = Rule(
        max_pixels=most,
        min_pixels=1,
        stride=stride,
        five_ratios=five_ratios,
        min_aspect=0.001,
        max_aspect=1000,
    )
    aspect = Fraction(height, width)
    ratio = min((Fraction(*r) for r in RATIOS), key=lambda r: abs(r - aspect))
    ratio = ratio if five_ratios else aspect

    def largest(unit: Fraction | int, high: Fraction | int, wide: Fraction | int) -> int:
        """How many times the unit, while (high, wide) times as many fits."""
        times = 0
        while True:
            h, w = high * unit * (times + 1), wide * unit * (times + 1)
            if h > height or w > width or h * w > most:
                return times
            times += 1

    exact = largest(stride, ratio.numerator, ratio.denominator) if five_ratios else 0
    if exact:
        expected = ratio.numerator * stride * exact, ratio.denominator * stride * exact
    else:
        expected = largest(stride, 1, 1 / ratio) * stride, largest(stride, ratio, 1) * stride
    got = shapes([(height, width, 1, 0.0), (4096, 4096, 1, 0.0)], rule)[0]
    assert got == ((1, *expected) if min(expected) else None)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((576, 1024), (1, 576, 1024)),
        ((1080, 1920), (1, 576, 1024)),
        ((720, 1024), (1, 576, 1024)),
        ((575, 1024), "too small"),
        ((900, 1000), "too small"),  # more pixels, but the cut would be enlarged
    ],
)
def test_one_size_for_all(source: tuple[int, int], expected: Any) -> None:
    assert shape((*source, 1, 0.0), Rule(size=(576, 1024))) == expected


def test_sizes_beyond_what_is_coded_are_dropped_not_mixed_up() -> None:
    rule = Rule(max_pixels=2**40, five_ratios=False, min_pixels=1, stride=1)
    assert shape((2**20, 2**19, 1, 0.0), rule) == "too large"
    assert shape((2**19, 2**20, 1, 0.0), rule) == "too large"


# Frames.

F = Rule(frames=121, fps=24.0, size=(256, 256), min_frames=29, drop_short=0.0)


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (121, 24.0, 121),
        (600, 24.0, 121),
        (605, 24.0, 121),
        (606, 24.0, "too long"),
        (120, 24.0, 113),
        (33, 24.0, 33),
        (32, 24.0, "too few frames"),  # 25
        (121, 23.976, 121),  # as it is
        (121, 24.05, 121),
        (200, 23.8, "fps too low"),
        (242, 48.0, 121),
        (241, 48.0, 121),
        (240, 48.0, 113),
        (151, 30.0, 121),  # 0, 1.25, ..., 150
        (150, 30.0, 113),
        (756, 30.0, 121),
        (757, 30.0, "too long"),
    ],
)
def test_lengths(frames: int, fps: float, expected: int | str) -> None:
    got = shape((256, 256, frames, fps), F)
    assert got == (expected if isinstance(expected, str) else (expected, 256, 256))


def test_short_clips_are_dropped_by_default() -> None:
    rule = Rule(frames=121, size=(256, 256))
    assert shape((256, 256, 121, 24.0), rule) == (121, 256, 256)
    assert shape((256, 256, 120, 24.0), rule) == "too short"


def test_a_share_of_the_short_clips_stays_the_same_whatever_is_added() -> None:
    rule = Rule(frames=121, size=(256, 256), drop_short=0.25)
    rows: list[Row] = [(256, 256, 113, 24.0)] * 4000
    first = shapes(rows, rule, 7)
    assert 800 < first.count(None) < 1200
    assert shapes(rows * 2, rule, 7)[:4000] == first
    assert shapes(rows, rule, 8) != first


def test_images_are_of_one_frame_whatever_is_asked() -> None:
    assert shape((256, 256, 1, 0.0), F) == (1, 256, 256)


def test_latent_frames_divide_among_the_processes_of_a_clip() -> None:
    """(y - 1) / 8 + 1 is a multiple of 4."""
    rule = Rule(frames=121, size=(256, 256), drop_short=0.0, sequence_parallel=4)
    got = [shape((256, 256, frames, 24.0), rule) for frames in (121, 120, 89, 57, 25, 24)]
    assert got == [*((y, 256, 256) for y in (121, 89, 89, 57, 25)), "too few frames"]
    assert shape((256, 256, 1, 0.0), rule) == "too few frames"


# Rules.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of size and max_pixels must be given"),
        ({"size": (64, 64), "max_pixels": 4096}, "one of size and max_pixels"),
        ({"size": (64, 65)}, r"size must be of multiples of 16, got \(64, 65\)"),
        ({"size": (0, 64)}, "size must be of multiples"),
        ({"size": (64, 64), "min_pixels": 5}, "min_pixels has no effect with size"),
        ({"max_pixels": 255}, "max_pixels=255 must be at least 256"),
        ({"max_pixels": 1000, "min_pixels": 1001}, "must be at least 1001"),
        ({"max_pixels": 1000, "min_pixels": 0}, "min_pixels at least 1"),
        ({"frames": 120}, "frames=120 .* try 113 or 121"),
        ({"frames": 4}, "try 1 or 9"),
        ({"frames": 1, "sequence_parallel": 2}, "multiples of 2; try 9"),
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"frames": 9, "min_frames": 10}, "min_frames=10 must be at most frames=9"),
        ({"fps": 0}, "fps must be above 0"),
        ({"fps": math.nan}, "fps must be above 0"),
        ({"fps": math.inf}, "fps must be above 0 and at most 1000, got inf"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"drop_short": 1.5}, r"drop_short must be in \[0, 1\], got 1.5"),
        ({"min_aspect": 2.0, "max_aspect": 1.0}, "min_aspect must be above 0 and at most"),
        ({"longest": 0.5}, "longest must be at least 1"),
        ({"minority": -1}, "minority must be at least 0"),
    ],
)
def test_rules_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    sized = {"size": (64, 64)} if given and not {"size", "max_pixels"} & set(given) else {}
    with pytest.raises(ValueError, match=message):
        Rule(**given, **sized)


def test_a_rule_survives_json() -> None:
    rule = Rule(frames=33, size=(96, 160), drop_short=0.5)
    assert Rule(**json.loads(json.dumps(asdict(rule)))) == rule


# Buckets.


def test_what_is_dropped_is_counted_once() -> None:
    rows = [
        (256, 256, 121, 24.0),
        (100, 400, 121, 10.0),  # for two reasons
        (256, 256, 121, 10.0),
        (100, 100, 121, 24.0),
        (256, 256, 9999, 24.0),
    ]
    found = assign(manifest(rows), F, 0)
    assert found.bucket.tolist() == [0, -1, -1, -1, -1]
    assert found.bucket.dtype == np.int16
    assert found.dropped == {
        "aspect out of range": 1,
        "too small": 1,
        "fps too low": 1,
        "too long": 1,
    }


def test_no_clip_left() -> None:
    with pytest.raises(DataError, match=r"no clip is left: 2 too small; change the rule"):
        assign(manifest([(64, 64, 121, 24.0)] * 2), F, 0)


def test_a_clip_is_in_the_bucket_of_its_shape_in_every_part_of_a_large_manifest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(0)
    rows = [
        (int(h), int(w), int(n), float(fps))
        for h, w, n, fps in zip(
            generator.integers(100, 400, 500),
            generator.integers(100, 400, 500),
            generator.integers(1, 200, 500),
            generator.choice([0.0, 24.0, 30.0], 500),
            strict=True,
        )
    ]
    rule = Rule(frames=33, max_pixels=65536, drop_short=0.5)
    whole = assign(manifest(rows), rule, 3)
    monkeypatch.setattr("skiparse.models.data.buckets._ROWS", 7)
    parts = assign(manifest(rows), rule, 3)
    assert parts.shapes == whole.shapes == tuple(sorted(set(whole.shapes)))
    assert np.array_equal(parts.bucket, whole.bucket)
    assert parts.dropped == whole.dropped
    assert parts.examples == whole.examples
    assert max(map(max, whole.examples.values())) > 20
    assert len(whole.shapes) > 10


def test_too_many_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skiparse.models.data.buckets._MOST_SHAPES", 2)
    rows = [(h, 256, 1, 0.0) for h in (200, 220, 240)]
    with pytest.raises(DataError, match=r"3 shapes are too many.*five_ratios=True"):
        assign(manifest(rows), Rule(max_pixels=2**20, min_pixels=1, five_ratios=False), 0)


def test_rare_shapes_go() -> None:
    given = Buckets(
        ((1, 64, 64), (9, 64, 64), (17, 64, 64)),
        np.array([0, 1, 1, 1, -1, 2, 2, 2, 2], np.int16),
        {"too small": 1},
    )
    rule = Rule(size=(64, 64), minority=2)
    found = without_minority(given, 2, rule)
    assert found.shapes == ((17, 64, 64),)
    assert found.bucket.tolist() == [-1, -1, -1, -1, -1, 0, 0, 0, 0]
    assert found.bucket.dtype == np.int16
    assert found.dropped == {"too small": 1, "of a rare shape": 4}
    assert without_minority(given, [9, 1, 9], rule).shapes == ((9, 64, 64),)
    same = without_minority(given, 2, Rule(size=(64, 64), minority=0))
    assert same.shapes == given.shapes
    assert same.bucket.tolist() == given.bucket.tolist()
    assert same.dropped == given.dropped
    with pytest.raises(DataError, match="the largest has 4 samples; lower minority or the batch"):
        without_minority(given, 3, rule)


def test_an_index_on_disk_gives_the_same_buckets(tmp_path: Path) -> None:
    lines = [
        {
            "path": f"{i}.mp4",
            "cap": "a",
            "resolution": {"height": 240 + 16 * i, "width": 400},
            "num_frames": 40,
        }
        for i in range(8)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = Manifest.open(tmp_path / "a.jsonl", index=tmp_path / "index")
    rule = Rule(frames=33, max_pixels=147456)
    found = assign(read, rule, 0)
    rows = [(240 + 16 * i, 400, 40, 24.0) for i in range(8)]
    assert [found.shapes[i] for i in found.bucket] == shapes(rows, rule)
