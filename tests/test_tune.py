"""`auto` goes by what `skiparse tune` measured on a device, for problems like the measured ones."""

import json
from dataclasses import replace

import pytest
import torch

import skiparse
from skiparse import SkipPattern, registry
from skiparse.backends import Inputs
from skiparse.bench.op import tune
from skiparse.testing import make_problem

PASSES = ("forward", "backward")


def inputs_of(p, N=64, T=0, D=16, dtype=torch.float32):
    problem = make_problem(p, N=N, T=T, H=1, D=D, dtype=dtype)
    return Inputs(*problem.inputs, None, None, p, 1.0)


@pytest.fixture
def orders(tmp_path, monkeypatch):
    """Write the rules for this device."""
    monkeypatch.setattr(registry, "ORDERS", tmp_path)
    registry.measured.cache_clear()

    def write(*rules):
        (tmp_path / "cpu.json").write_text(json.dumps({"rules": rules}))
        registry.measured.cache_clear()

    yield write
    registry.measured.cache_clear()


RULE = {
    "pass": "forward", "kind": "single", "text": False, "dtype": "float32", "head_dim": 16,
    "length": 32, "order": ["reference", "sdpa"],
}  # fmt: skip


def first(inputs, *, backward=False):
    return registry.select("auto", inputs, backward=backward).__name__.split(".")[-1]


def test_a_rule_reorders_problems_like_it(orders):
    given = inputs_of(SkipPattern.single(2))
    assert first(given) == "sdpa"
    orders(RULE)
    assert first(given) == "reference"
    assert first(given, backward=True) == "sdpa"
    for other in (
        inputs_of(SkipPattern.group(2)),
        inputs_of(SkipPattern.single(2), T=3),
        inputs_of(SkipPattern.single(2), D=32),
        inputs_of(SkipPattern.single(2), dtype=torch.float64),
        inputs_of(SkipPattern.single(2), N=130),  # more than twice as long
        inputs_of(SkipPattern.single(2), N=0),
    ):
        assert first(other) == "sdpa"
    assert first(inputs_of(SkipPattern.single(2), N=126)) == "reference"


def test_the_nearest_length_decides(orders):
    orders(RULE, RULE | {"length": 50, "order": ["sdpa"]})
    assert first(inputs_of(SkipPattern.single(2), N=64)) == "reference"
    assert first(inputs_of(SkipPattern.single(2), N=90)) == "sdpa"


def test_who_refuses_is_passed_over_and_who_is_not_named_comes_last(orders, monkeypatch):
    orders(RULE | {"order": ["triton", "reference"]})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert first(inputs_of(SkipPattern.single(2))) == "reference"
    first_names = registry.measured_order(inputs_of(SkipPattern.single(2)), backward=False)
    names = [row.name for row in registry.order(first_names)]
    others = ["sdpa", "triton.pingpong", "npu_fusion", "ascendc", "ascendc.half_scores"]
    assert names == ["triton", "reference", *others]


def test_some_are_taken_only_where_a_rule_names_them(orders, monkeypatch):
    rows = [
        replace(row, auto=(), if_measured=("cpu",)) if row.name == "reference" else row
        for row in registry.BACKENDS
    ]
    monkeypatch.setattr(registry, "BACKENDS", rows[::-1])  # the reference would be the first
    given = inputs_of(SkipPattern.single(2))
    assert first(given) == "sdpa"
    orders(RULE | {"order": ["sdpa"]})
    assert first(given) == "sdpa"
    orders(RULE)
    assert first(given) == "reference"
    monkeypatch.setattr(registry, "BACKENDS", [replace(row, if_measured=()) for row in rows])
    assert first(given) == "sdpa"


def test_a_named_backend_is_not_touched(orders):
    orders(RULE)
    chosen = registry.select("sdpa", inputs_of(SkipPattern.single(2)))
    assert chosen.__name__.endswith("sdpa")


@pytest.mark.parametrize(
    ("p", "N", "kind"),
    [
        (SkipPattern.dense(), 64, "dense"),
        (SkipPattern.single(4), 63, "single"),
        (SkipPattern.group(4), 64, "group"),
        (SkipPattern.block(4, 64), 64, "block"),
        (SkipPattern(4, 16), 50, "block"),
        (SkipPattern.group(4), 65, "group"),
    ],
)
def test_kinds(p, N, kind):
    assert registry.problem_like(inputs_of(p, N=N), backward=False)["kind"] == kind


def test_files_are_named_after_devices():
    assert registry.orders_file("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3.json"


def test_every_kept_file_names_its_measurement():
    for path in registry.ORDERS.glob("*.json"):
        kept = json.loads(path.read_text())
        assert {"device", "driver", "versions", "commit", "date", "rules"} <= set(kept)
        for rule in kept["rules"]:
            assert set(rule["order"]) == set(rule["ms"]) <= {row.name for row in registry.BACKENDS}


def test_tune_writes_what_it_measured(orders, tmp_path, capsys):
    path = tune.tune(
        device="cpu", dtype=torch.float32, shape="1x288x512-1h", sparsity=(2,), rounds=1
    )
    assert path == tmp_path / "cpu.json"
    kept = json.loads(path.read_text())
    assert kept["device"] == "cpu"
    assert len(kept["rules"]) == 3 * 2 * 2  # patterns, text or none, passes
    for rule in kept["rules"]:
        assert rule["pass"] in PASSES
        assert rule["order"] == sorted(rule["ms"], key=rule["ms"].get)
        assert set(rule["ms"]) == {"sdpa", "reference"}
        assert rule["length"] == 288
    assert {rule["kind"] for rule in kept["rules"]} == {"single", "group", "block"}
    assert not list(tmp_path.glob(".*.tmp"))
    assert "1x288x512-1h.k2.group.skip.fwdbwd" in capsys.readouterr().out
    # and that is what the next call goes by
    given = inputs_of(SkipPattern.single(2), N=576, D=128)
    fastest = next(
        r["order"][0]
        for r in kept["rules"]
        if (r["pass"], r["kind"], r["text"]) == ("forward", "single", False)
    )
    assert first(given) == fastest
    q = torch.zeros(1, 576, 1, 128)
    assert skiparse.attention(q, q, q, SkipPattern.single(2)).shape == q.shape
