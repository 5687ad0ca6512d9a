"""What a run's order promises: it follows from the seed, and from nothing else, at any size."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")

from skiparse.models.data.buckets import Rule, assign  # noqa: E402  # after the checks
from skiparse.models.data.draws import Place  # noqa: E402
from skiparse.models.data.manifest import Manifest  # noqa: E402
from skiparse.models.data.sampler import BucketBatchSampler, token_batches  # noqa: E402

BUCKETS = st.lists(st.integers(-1, 3), min_size=1, max_size=120).filter(lambda rows: max(rows) >= 0)
SPLIT = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
LEFTOVER = st.sampled_from(["merge", "drop"])


def array(bucket: list[int]) -> np.ndarray:
    return np.array(bucket, np.int16)


def sampler(bucket: list[int], batch: int, **more: Any) -> BucketBatchSampler | None:
    """None if there is no global batch."""
    size = batch * more.get("world", 1) * more.get("accumulate", 1)
    counts = Counter(number for number in bucket if number >= 0)
    if more.get("leftover") == "drop" and max(counts.values()) < size:
        with pytest.raises(ValueError, match="fill no global batch"):
            BucketBatchSampler(array(bucket), batch, **more)
        return None
    return BucketBatchSampler(array(bucket), batch, **more)


def global_batches(bucket: list[int], split: tuple[int, int, int], **more: Any) -> Any:
    """Places of each step, over all ranks and micro-batches, in order; None if there are none."""
    batch, world, accumulate = split
    ranks = [
        sampler(bucket, batch, world=world, rank=rank, accumulate=accumulate, **more)
        for rank in range(world)
    ]
    if ranks[0] is None:
        return None
    steps = []
    each = [list(rank) for rank in ranks if rank is not None]
    assert {len(micro) for micro in each} == {len(ranks[0])}
    for at in range(0, len(each[0]), accumulate):
        parts = [rank[micro] for micro in range(at, at + accumulate) for rank in each]
        assert {len(part) for part in parts} == {batch}
        steps.append([place for part in parts for place in part])
    return steps


@settings(max_examples=150, deadline=None)
@given(BUCKETS, SPLIT, LEFTOVER, st.integers(0, 5), st.integers(0, 20))
def test_a_batch_is_of_one_bucket_on_all_ranks(
    bucket: list[int], split: tuple[int, int, int], leftover: str, seed: int, start: int
) -> None:
    more = {"seed": seed, "leftover": leftover, "start": start, "stop": start + 9}
    for step, places in enumerate(global_batches(bucket, split, **more) or [], start):
        assert len({bucket[place.row] for place in places}) == 1
        assert bucket[places[0].row] >= 0
        assert {place.step for place in places} == {step}
        assert [place.index for place in places] == list(range(np.prod(split)))


@settings(max_examples=100, deadline=None)
@given(BUCKETS, st.sampled_from([1, 2, 4, 6, 12]), LEFTOVER, st.integers(0, 5))
def test_a_global_batch_does_not_depend_on_how_it_is_split(
    bucket: list[int], size: int, leftover: str, seed: int
) -> None:
    splits = [
        (batch, world, size // batch // world)
        for batch, world in itertools.product(range(1, size + 1), repeat=2)
        if size % (batch * world) == 0
    ]
    assert len(splits) >= (1 if size == 1 else 3)
    runs = [global_batches(bucket, s, seed=seed, leftover=leftover, stop=5) for s in splits]
    assert all(run == runs[0] for run in runs)


@settings(max_examples=150, deadline=None)
@given(BUCKETS, SPLIT, LEFTOVER, st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_each_sample_once(
    bucket: list[int], split: tuple[int, int, int], leftover: str, seed: int, epoch: int
) -> None:
    size = int(np.prod(split))
    one = sampler(bucket, size, leftover=leftover)
    if one is None:
        assert leftover == "drop"
        return
    steps = one.steps_per_epoch
    more = {"leftover": leftover, "start": epoch * steps, "stop": (epoch + 1) * steps}
    seen: Counter[int] = Counter()
    for places in global_batches(bucket, split, seed=seed, **more):
        seen.update(place.row for place in places)
    for number in range(4):
        rows = [row for row, its in enumerate(bucket) if its == number]
        times = [seen.pop(row, 0) for row in rows]
        if leftover == "drop":
            assert sum(times) == len(rows) // size * size
            assert set(times) <= {0, 1}
        elif rows:
            assert sum(times) == -(-len(rows) // size) * size
            assert 1 <= min(times) <= max(times) <= min(times) + 1
    assert not seen  # none that is dropped


@settings(max_examples=100, deadline=None)
@given(BUCKETS, SPLIT, LEFTOVER, st.integers(0, 5), st.integers(0, 40))
def test_a_run_that_starts_late_is_the_rest_of_the_whole_run(
    bucket: list[int], split: tuple[int, int, int], leftover: str, seed: int, start: int
) -> None:
    more = {"seed": seed, "leftover": leftover, "stop": 45}
    whole = global_batches(bucket, split, **more)
    late = global_batches(bucket, split, start=start, **more)
    assert late == (None if whole is None else whole[start:])
    assert whole is None or len(whole) == 45


def order(seed: int = 0, **more: Any) -> list[int]:
    places = BucketBatchSampler(array([0] * 30 + [1] * 30), 3, seed=seed, **more)
    return [place.row for part in places for place in part]


def test_seeds_and_epochs_differ() -> None:
    assert order(stop=20) == order(stop=20)
    runs = [order(stop=20), order(1, stop=20), order(start=20, stop=40)]
    assert all(sorted(run) == list(range(60)) for run in runs)
    assert runs[0] != runs[1] != runs[2] != runs[0]
    buckets = [[row >= 30 for row in run[::3]] for run in runs]
    assert buckets[0] != buckets[1] != buckets[2] != buckets[0]
    batches = [{frozenset(run[i : i + 3]) for i in range(0, 60, 3)} for run in runs]
    assert batches[0] != batches[1] != batches[2] != batches[0]
    for groups in batches:  # and so do buckets of as many samples
        first = {group for group in groups if min(group) < 30}
        assert first != {frozenset(row - 30 for row in group) for group in groups - first}


def test_the_filling_of_a_batch_repeats_none_of_it() -> None:
    for seed in range(20):
        for part in BucketBatchSampler(array([0] * 9), 6, seed=seed, stop=2):
            assert len(set(part)) == len({place.row for place in part}) == 6


def test_it_goes_on_without_end() -> None:
    endless = BucketBatchSampler(array([0, 0, 1]), 1)
    seen = list(itertools.islice(endless, 300))
    assert [part[0].step for part in seen] == list(range(300))
    with pytest.raises(TypeError, match="no length"):
        len(endless)
    assert next(iter(endless)) == seen[0]


def test_a_batch_for_each_bucket() -> None:
    bucket = [0] * 8 + [1] * 8
    steps: dict[int, set[int]] = {0: set(), 1: set()}
    for part in BucketBatchSampler(array(bucket), [4, 2], accumulate=2, stop=3):
        assert all(isinstance(place, Place) for place in part)
        number = bucket[part[0].row]
        assert len(part) == [4, 2][number]
        steps[number].add(part[0].step)
    assert (len(steps[0]), len(steps[1])) == (1, 2)


def test_batches_by_a_budget_of_tokens() -> None:
    shapes = [(1, 256, 256), (1, 144, 256), (33, 256, 256), (121, 576, 1024)]
    assert token_batches(shapes, 2560) == [10, 17, 2, 1]
    assert token_batches([(17, 64, 64)], 100, patch=(8, 32, 32)) == [100 // (3 * 4)]
    assert token_batches([(8, 16, 16), (16, 16, 16)], 6) == [6, 3]
    with pytest.raises(ValueError, match="budget must be at least 1 token, got 0"):
        token_batches(shapes, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"world": 0}, "world and accumulate must be at least 1, got 0 and 1"),
        ({"accumulate": 0}, "got 1 and 0"),
        ({"world": 2, "rank": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"start": -1}, "start must be in"),
        ({"start": 3, "stop": 2}, "got 3 and 2"),
        ({"leftover": "keep"}, "leftover must be merge or drop, got 'keep'"),
        ({"batch": 0}, "batch must be at least 1 for each of 2 buckets"),
        ({"batch": [1]}, r"for each of 2 buckets, got \[1\]"),
        ({"batch": 4, "leftover": "drop"}, "4 samples fill no global batch; lower batch"),
        ({"bucket": [-1, -1]}, "0 samples fill no global batch"),
    ],
)
def test_arguments_that_make_no_sense(more: dict[str, Any], message: str) -> None:
    bucket, batch = more.pop("bucket", [0, 0, 1, 1, -1]), more.pop("batch", 1)
    with pytest.raises(ValueError, match=message):
        BucketBatchSampler(array(bucket), batch, **more)


@pytest.mark.parametrize(
    ("rows", "seconds"), [(10**6, 3), pytest.param(10**7, 30, marks=pytest.mark.full)]
)
def test_ten_million_rows(tmp_path: Path, rows: int, seconds: float) -> None:
    """Seconds from a mapped file to the first batch of a late step; no Python object for a row."""
    generator = np.random.default_rng(0)
    numbers = {
        "height": generator.integers(200, 1100, rows, np.int32),
        "width": generator.integers(200, 2000, rows, np.int32),
        "frames": generator.integers(1, 600, rows, np.int32),
        "fps": generator.choice([0.0, 23.976, 24.0, 30.0, 60.0], rows),
        **dict.fromkeys(("start", "top", "left", "root"), np.zeros(rows, np.int32)),
    }
    numbers["is_video"] = (numbers["fps"] > 0).astype(np.uint8)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pa.table(numbers)
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    mapped = pa.ipc.open_file(pa.memory_map(str(tmp_path / "a.arrow"))).read_all()
    begin = time.process_time()
    about = {"roots": ["."], "dropped": {}, "fingerprint": ""}
    manifest = Manifest(mapped, pa.table({}), about)
    buckets = assign(manifest, Rule(frames=121, max_pixels=147456, drop_short=0.5), 0)
    start = 10 * rows
    run = BucketBatchSampler(buckets.bucket, 8, world=8, start=start, stop=start + 1)
    (part,) = run
    assert time.process_time() - begin < seconds
    assert [place.step for place in part] == [start] * 8
    assert len({int(buckets.bucket[place.row]) for place in part}) == 1
    assert np.count_nonzero(buckets.bucket < 0) == sum(buckets.dropped.values())
    assert len(buckets.shapes) > 50
