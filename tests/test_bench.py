"""The benchmark times only what is right, and says what it compared with what."""

import json
import subprocess
import sys

import pytest
import torch

from skiparse import SkipPattern, pattern
from skiparse.bench.op import baselines, cases, run, tables
from skiparse.bench.rows import RESULTS, read
from skiparse.bench.timing import Timing, speedup
from skiparse.testing import WAYS, Answer, make_problem, oracle, within_budget

TINY = cases.Case("1x288x512", 1, 2, "group", False, False, N=64, T=8, D=32)


def variant(**changes):
    return cases.Case(**(TINY.__dict__ | changes))


def assert_answer(tensors, problem, names):
    """Held to the computed budget, like a backend."""
    exact = oracle(problem)._asdict()
    eagers = [oracle(problem, torch.float32, way)._asdict() for way in WAYS]
    found = dict(zip(names, tensors, strict=True))
    within_budget(found, {name: exact[name] for name in names}, eagers, torch.float32)


def test_the_table_of_cases_is_what_the_readme_says():
    ours = 4 * 3 + 1 + 2  # shapes by heads; the headline in a batch; the rehearsal, also in one
    wan = 1 + 3 * 2 + 1, 1 + 3 * 3, 1 + 3 * 2 + 2, 1 + 3 * 3  # in skip order if k*k divides N
    hunyuan = 1 + 3 * 3, 2 * (1 + 3 * 2 + 2)  # the second with one head also, as those of Wan
    grids = 2 * 2 * 2  # ratios, kinds, orders; the four of Wan and a Hunyuan, both with one head
    others = 2 * sum(wan) + sum(hunyuan) + grids * (2 * 4 + 2)
    assert len(cases.CASES) == 2 * (ours * (1 + 3 * 3) + others)
    head = cases.CASES["121x576x1024.k8.single.fwd"]
    assert (head.N, head.T, head.heads, head.D) == (36864, 512, 24, 128)
    assert f"{head.ceiling:.2f}" == "6.66"
    assert cases.CASES["57x288x512-1h.k4.group.skip.fwd"].pattern == SkipPattern.block(4, 4608)
    assert all(name == case.name for name, case in cases.CASES.items())
    for case in cases.CASES.values():
        k = case.k if case.grid is None else case.k**2
        pairs, single = (p.pairs(case.N, case.T) for p in (case.pattern, SkipPattern.single(k)))
        if case.grid is not None:
            assert single <= pairs <= 1.04 * single
        elif case.N % case.k**2 == 0:
            assert pairs == single
        else:  # cut short, so that sub-sequences of group-skip are not equally long
            assert single <= pairs <= 1.01 * single


def test_shapes_that_others_publish():
    """And what one dimension of tokens does at them: no padding, whatever k divides."""
    published = {
        "81x480x832": (32760, 40), "81x720x1280": (75600, 40), "81x576x1024": (48384, 40),
        "117x768x1280": (115200, 24),
    }  # fmt: skip
    for name, (tokens, heads) in published.items():
        case = cases.CASES[f"{name}.k8.group.fwd"]
        assert (case.N, case.heads, case.T, case.D) == (tokens, heads, 0, 128)
        in_skip_order = {k for k in (2, 4, 8) if f"{name}.k{k}.group.skip.fwd" in cases.CASES}
        assert in_skip_order == {k for k in (2, 4, 8) if tokens % k**2 == 0}
        for k in (2, 4, 8):
            p = cases.CASES[f"{name}.k{k}.group.fwd"].pattern
            lengths = [pattern.length_of(s, tokens, p.sparsity, p.run) for s in range(k)]
            assert sum(lengths) == tokens
            assert max(lengths) - min(lengths) <= k
    assert cases.CASES["121x576x1024-b8.k8.group.fwd"].B == 8


def test_grids_of_models():
    """Rows and columns are those of the latents' patches; the orders are those that there are."""
    for video, about in cases.VIDEOS.items():
        if about.grid is not None:
            frames, height, width = map(int, video.split("x"))
            assert about.grid == ((frames - 1) // 4 + 1, height // 16, width // 16)
    names = {
        "81x480x832-1h.p2.group.skip.fwd": "skip", "81x480x832-1h.p4.group.sorted.fwd": "group",
        "81x720x1280-1h.p2.single.sorted.fwd": "single", "129x720x1280.p2.single.fwd": "natural",
    }  # fmt: skip
    for name, order in names.items():
        assert cases.CASES[name].pattern.order == order


@pytest.mark.parametrize("kind", ["single", "group"])
def test_flex_computes_the_same_on_grids(kind):
    case = variant(grid=(2, 5, 7), N=70, T=4, kind=kind)
    problem = make_problem(case.pattern, N=70, T=4, D=32, H=1)
    work = baselines.flex(case, problem, compiled=False).work
    assert_answer(work(), problem, ("out", "text_out"))
    assert baselines.original(case, problem).why_not == "it knows no grids"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kind", ["single", "group"])
@pytest.mark.parametrize("N", [64, 70])
def test_the_contenders_compute_the_same(N, kind, backward):
    case = variant(kind=kind, backward=backward, N=N)
    problem = make_problem(case.pattern, N=N, T=8, H=1, D=32)
    names = Answer._fields[4:] if backward else Answer._fields[:2]
    makers = [baselines.original(case, problem), baselines.skiparse_backend(case, problem, "sdpa")]
    for contender in makers:
        assert_answer(contender.work(), problem, names)


def test_dense_is_dense():
    case = variant(kind="dense", k=1, backward=False)
    problem = make_problem(case.pattern, N=64, T=8, H=1, D=32)
    (contender,) = baselines.dense(case, problem)
    (rows,) = contender.work()
    assert_answer(rows.transpose(1, 2).split([64, 8], 1), problem, Answer._fields[:2])


@pytest.mark.full
def test_flex_computes_the_same():
    for kind in ("single", "group"):
        case = variant(kind=kind)
        problem = make_problem(case.pattern, N=64, T=8, H=1, D=32)
        assert_answer(baselines.flex(case, problem).work(), problem, Answer._fields[:2])


def test_a_wrong_backend_is_not_timed(monkeypatch):
    from skiparse.backends import sdpa

    right = sdpa._attend
    monkeypatch.setattr(
        sdpa, "_attend", lambda q, k, v, bias, scale: right(q, k, v, bias, scale * 1.01)
    )
    monkeypatch.setattr(run, "time_of", lambda *_: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="off by"):
        run.run([TINY], rounds=1, backends=["sdpa"], others=["dense"])


def test_run_prints_the_ceiling_and_writes_rows(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    for _ in range(2):
        rows = run.run(
            [TINY], rounds=3, backends=["sdpa", "triton"], others=["original", "natten"],
            results=results,
        )  # fmt: skip
    out = capsys.readouterr().out
    assert f"{TINY.ceiling:.2f}x" in out
    assert "skiparse.triton" in out
    assert "not run: " in out
    kept = [json.loads(line) for line in results.read_text().splitlines()]
    assert kept[-len(rows) :] == rows
    assert len(kept) == 2 * len(rows)
    assert [r["backend"] for r in rows] == ["dense.flash", "skiparse.sdpa", "original"]
    mine = rows[1]
    low, high = mine["spread_ms"]
    assert low <= mine["median_ms"] <= high
    assert mine["rounds"] == 3
    assert mine["ceiling"] == round(TINY.ceiling, 4)
    assert mine["reached"] == pytest.approx(mine["speedup"] / mine["ceiling"], abs=1e-3)
    assert mine["kind"] == "hardware"
    assert {"case", "device", "driver", "versions", "commit", "dtype", "date"} <= set(mine)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_command_runs_in_a_process_of_its_own():
    """Where nothing else has asked for the operators before."""
    code = "from skiparse.cli import main; main(['bench', '1x128x128.k2.group.fwd', *{}])"
    options = ["--backends", "sdpa", "--against", "dense", "--rounds", "1", "--results", ""]
    command = [sys.executable, "-c", code.format(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "skiparse.sdpa" in done.stdout


def test_speedup_is_the_median_of_the_rounds_own_ratios():
    dense = Timing("dense", (2.0, 20.0, 2.2))  # a slow moment slows both
    fast = Timing("fast", (1.0, 10.0, 1.0))
    assert speedup(fast, dense) == 2.0


def test_recorded_results_are_of_known_cases():
    rows = read(RESULTS)
    assert rows
    for row in rows:
        assert row["case"] in cases.CASES
        assert row["ceiling"] == round(cases.CASES[row["case"]].ceiling, 4)
        assert row["kind"] in ("hardware", "model")


def test_the_tables_keep_the_latest_row_only(tmp_path):
    rows = read(RESULTS)
    row = next(r for r in rows if r["backend"] == "skiparse.sdpa")
    newer = row | {"median_ms": 123456.0}
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(newer) + "\n")
    text = tables.benchmark(file)
    assert "123,456 ms" in text
    assert text.count(row["case"]) == 1
