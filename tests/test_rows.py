"""Rows of measurements have one vocabulary, in every file that there is."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from skiparse.bench import rows

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "bench").rglob("*.jsonl"))
KINDS = {  # of what is no number from 0
    "case": str, "backend": str, "kind": str, "device": str, "driver": str | None, "dtype": str,
    "versions": dict, "commit": str | None, "date": str, "spread_ms": list, "parts_ms": dict,
    "shape": str, "dense": str, "ptxas": str | None, "threads": int | None, "rounds": int,
    "parameters": int,
}  # fmt: skip
UNKNOWN = {"peak_extra_mib", "kept_mib", "published_tflop", "speedup"}  # may be null: not known


def could_be(name, value):
    if name in KINDS or name not in rows.VOCABULARY:
        return isinstance(value, KINDS.get(name, object))
    if value is None:
        return name in UNKNOWN
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def wrong(row):
    """What is not as the vocabulary says, in words."""
    found = [f"no {name}" for name in rows.ALWAYS if name not in row]
    if row.keys() & rows.TIMES.keys() and not row.keys() >= rows.TIMES.keys():
        found.append("some of the times only")
    found += [f"{name} means nothing" for name in row if name not in rows.VOCABULARY]
    found += [f"{name} is {value!r}" for name, value in row.items() if not could_be(name, value)]
    if found:
        return found
    if "median_ms" in row:
        low, high = row["spread_ms"]
        if not low <= row["median_ms"] <= high or row["rounds"] < 1:
            found.append("its times are no median of rounds")
    if row["kind"] not in ("hardware", "model"):
        found.append(f"kind is {row['kind']}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["date"]):
        found.append(f"date is {row['date']}")
    return found


def test_all_committed_rows_are_of_the_vocabulary():
    assert {file.name for file in FILES} >= {
        "results.jsonl", "block.jsonl", "vae.jsonl", "cache.jsonl"
    }  # fmt: skip
    for file in FILES:
        for number, row in enumerate(rows.read(file), 1):
            assert not wrong(row), f"{file.relative_to(ROOT)}:{number}: {wrong(row)}"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peak_mib": 1.0}, "peak_mib means nothing"),
        ({"median_ms": -1.0}, "median_ms is -1.0"),
        ({"median_ms": 9e9}, "its times are no median of rounds"),
        ({"tflops": math.nan}, "tflops is nan"),
        ({"date": "yesterday"}, "date is yesterday"),
        ({"kind": "guess"}, "kind is guess"),
        ({"device": None}, "device is None"),
    ],
)
def test_a_row_that_is_not_is_seen(change, told):
    row = rows.read(rows.RESULTS)[-1]
    assert not wrong(row)
    assert wrong(row | change) == [told]
    assert wrong({name: row[name] for name in row if name != "dtype"}) == ["no dtype"]


def test_a_row_is_made_of_what_was_measured(tmp_path):
    seconds = [0.003, 0.001, 0.002]
    given = {"device": "cpu", "dtype": torch.bfloat16}
    row = rows.row("copy", "torch", seconds=seconds, gb_s=2.5, **given)
    assert not wrong(row)
    assert (row["median_ms"], row["spread_ms"], row["rounds"]) == (2.0, [1.0, 3.0], 3)
    assert (row["dtype"], row["kind"], row["gb_s"]) == ("bfloat16", "hardware", 2.5)
    assert row["threads"] == torch.get_num_threads()
    without = rows.row("memory", "torch", peak_extra_mib=rows.mib(3 * 2**19), **given)
    assert without["peak_extra_mib"] == 1.5
    assert not rows.TIMES.keys() & without.keys()
    with pytest.raises(ValueError, match="rows know no peak_mib; take a name of FIGURES"):
        rows.row("copy", "torch", peak_mib=1.0, **given)
    file = tmp_path / "new.jsonl"
    assert rows.read(file) == []
    for _ in range(2):
        rows.append(file, [row])
    assert rows.read(file) == [row, row] == [json.loads(x) for x in file.read_text().splitlines()]
    assert list(tmp_path.iterdir()) == [file]
