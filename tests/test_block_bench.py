"""The three ways to spell a block agree, and what is written about them is what was measured."""

import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skiparse.bench.models import block
from skiparse.bench.op import tables
from skiparse.bench.rows import RESULTS, read
from skiparse.cli import main

SIZE = block.Size(heads=2, head_dim=32, grid=(2, 4, 8), text=5, condition=16)
NAMES = [
    "modulated_norm", "qkv", "qk_norm_rope", "attention.k1", "attention.k8", "out_projection",
    "gated_residual", "feed_forward", "whole.k1", "whole.k8", "packing.k8.single",
    "packing.k8.group", "packing.k8.blocks",
]  # fmt: skip
WHOLE = {name for name in NAMES if name.startswith(("whole", "packing"))}
SPELLED_TWICE = {"modulated_norm", "qk_norm_rope", "gated_residual", *WHOLE}


def parts(rounded=torch.float32, dtype=None):
    return block.parts_of(SIZE, "cpu", rounded, dtype)


@pytest.fixture(autouse=True)
def forget_compilations():
    """The compiler's limit is for each function, over all tests."""
    torch.compiler.reset()


@pytest.fixture
def only(monkeypatch):
    """Run with these parts alone."""
    every = block.parts_of

    def choose(*names):
        monkeypatch.setattr(
            block, "parts_of", lambda *given: [p for p in every(*given) if p.name in names]
        )

    return choose


def grads(part):
    return block._grads(part, "cpu")


def named(name):
    return next(part for part in parts() if part.name == name)


@pytest.mark.parametrize("name", NAMES)
def test_the_ways_agree_with_the_naive_one(name):
    """Through the tracer, forward and backward; the kernels it makes are in the full matrix."""
    part = named(name)
    ways = block.ways_of(part, "aot_eager")
    eager = name in SPELLED_TWICE or "attention" in name
    assert list(ways) == ["naive"] + ["eager"] * eager + ["compiled"] * ("attention" not in name)
    block.check(part, part, ways, grads(part))
    block.check(part, part, ways, None)


@pytest.mark.full
@pytest.mark.skipif(block.why_not_compiled("cpu") is not None, reason="no C++ compiler")
@pytest.mark.parametrize("name", [name for name in NAMES if "attention" not in name])
def test_compiled_kernels_agree_too(name):
    part = named(name)
    block.check(part, part, block.ways_of(part, "inductor"), grads(part))


def test_bf16_is_held_to_twice_the_error_of_the_naive_way():
    for part, right in zip(
        parts(torch.bfloat16), parts(torch.bfloat16, torch.float32), strict=True
    ):
        block.check(part, right, {"naive": part.naive, "ours": part.ours}, None)


@pytest.mark.parametrize(("dtype", "slip"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-1)])
def test_a_wrong_way_is_not_timed(only, dtype, slip, monkeypatch):
    right = block.gated_residual
    monkeypatch.setattr(block, "gated_residual", lambda x, gate, y: right(x, gate * (1 + slip), y))
    only("gated_residual")
    monkeypatch.setattr(block, "time_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="gated_residual, eager: tensor 0 is off by"):
        block.run(dtype=dtype, rounds=1, size=SIZE, compiler="aot_eager")


def test_a_wrong_gradient_is_seen():
    part = named("gated_residual")

    def detached(x, gate, update):
        return block.naive_gated_residual(x, gate.detach() + 0 * gate, update)

    block.check(part, part, {"detached": detached}, None)
    with pytest.raises(AssertionError, match="detached: tensor 2"):
        block.check(part, part, {"detached": detached}, grads(part))


@pytest.mark.parametrize("name", ["modulated_norm", "qk_norm_rope", "gated_residual"])
def test_ours_keeps_its_inputs_for_backward_and_nothing_else(name):
    part = next(part for part in parts(torch.bfloat16) if part.name == name)
    needed = [x for x in part.inputs if isinstance(x, torch.Tensor)]
    if name == "gated_residual":
        needed = needed[1:]  # the gradient of a sum does not depend on its first term
    given = sum(x.nbytes for x in needed)
    assert block.kept_bytes(part.ours, part) == given
    assert block.kept_bytes(part.naive, part) > 1.9 * given


@pytest.mark.parametrize("name", ["whole.k1", "whole.k8"])
def test_a_whole_block_keeps_less_than_the_naive_one(name):
    part = next(part for part in parts(torch.bfloat16) if part.name == name)
    assert block.kept_bytes(part.ours, part) < block.kept_bytes(part.naive, part)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("packing")])
def test_packing_is_compared_with_none(name):
    """Two blocks with the same parameters, and neither is the block the model would run."""
    part = named(name)
    assert part.naive.attn.packs is False
    assert part.ours.attn.packs is True
    with torch.no_grad(), Packs() as count:
        part.naive(*part.inputs)
        assert count.packs == 0
        part.ours(*part.inputs)
        assert count.packs == 1
    for each in (part.naive, part.ours):
        assert list(map(id, each.parameters())) == list(map(id, part.parameters))


class Packs(TorchDispatchMode):
    """Counts how often buffers were packed."""

    packs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.packs += function is torch.ops.skiparse.norm_rope_pack.default
        return function(*args, **kwargs or {})


def test_weights_do_not_count_as_kept():
    part = named("out_projection")
    assert block.kept_bytes(part.ours, part) == part.inputs[0].nbytes
    counted = dataclasses.replace(part, parameters=())
    weight = next(p for p in part.parameters if p.ndim == 2)
    assert block.kept_bytes(part.ours, counted) == part.inputs[0].nbytes + weight.nbytes


def test_run_prints_a_table_and_writes_rows(only, tmp_path, capsys):
    only("modulated_norm", "qkv", "attention.k8")
    file = tmp_path / "block.jsonl"
    rows = block.run(rounds=3, size=SIZE, compiler="aot_eager", results=file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows
    assert len(rows) == 2 * (3 + 2 + 2)
    assert list(tmp_path.iterdir()) == [file]
    out = capsys.readouterr().out
    for row in rows:
        name, way, direction = row["case"].split(".")[1], row["backend"], row["case"].split(".")[-1]
        assert name in out
        assert way in ("naive", "eager", "compiled")
        assert direction in ("fwd", "fwdbwd")
        low, high = row["spread_ms"]
        assert low <= row["median_ms"] <= high
        assert row["rounds"] == 3
        if way == "naive":
            assert row["speedup"] == 1
    known = set(read(RESULTS)[-1])
    assert known - set(rows[0]) == {"tflops", "ceiling", "reached"}  # there is no ceiling here
    assert tables.benchmark(file) == ""  # the README's tables are of attention


def test_below_fp32_a_cpu_runs_forward_only(only):
    only("gated_residual")
    rows = block.run(dtype=torch.bfloat16, rounds=1, size=SIZE, compiler="aot_eager")
    assert [(r["case"], r["backend"]) for r in rows] == [
        ("block.gated_residual.fwd", way) for way in ("naive", "eager", "compiled")
    ]


def test_without_a_compiler_the_reason_is_shown(only, monkeypatch, capsys):
    only("gated_residual")
    monkeypatch.setenv("CXX", "no-such-compiler")
    rows = block.run(rounds=1, size=SIZE)
    assert {r["backend"] for r in rows} == {"naive", "eager"}
    assert "not run: torch.compile needs a C++ compiler, not no-such-compiler" in (
        capsys.readouterr().out
    )


def test_the_command(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(block, "run", lambda **options: seen.update(options))
    assert main(["bench", "--block", "--device", "cpu", "--rounds", "2", "--results", ""]) == 0
    assert seen == {"device": "cpu", "dtype": torch.float32, "rounds": 2, "results": None}
    assert main(["bench", "block", "121x576x1024.k8.single.fwd"]) == 2
    assert main(["bench", "--block", "--against", "dense"]) == 2
    assert "bench block: unrecognized arguments: --against dense" in capsys.readouterr().err


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        block.run(rounds=0, size=SIZE)
