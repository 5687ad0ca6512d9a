"""Gradients are clipped to the run's own level, in each mode as its rule says, on one rank or many.

`tests/data/README.md` tells where the recorded values come from.
"""

import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from skiparse.models.train import AdaptiveGradClipper, clip

MODES = ("safe", "report", "osp15", "osp_next")
DATA = Path(__file__).parent / "data"
GOLDEN = load_file(DATA / "adaptive_clip.safetensors")
OSP_NEXT = load_file(DATA / "osp_next_clip.safetensors")
FP32 = 2e-5  # absolute: what fp32 of the original allows at norms of 1
BOUNDS = {2: 39, 4: 67, 10: 96, 100: 160}  # that the class promises


def told(clipper, norms):
    """What each norm is answered."""
    return [clipper.decide(norm).action for norm in norms]


def settled(level=1.0, spread=0.0, steps=400, **how):
    """A clipper that has seen log-normal norms."""
    clipper = AdaptiveGradClipper(**how)
    norms = level * np.exp(spread * np.random.default_rng(0).standard_normal(steps))
    for norm in norms.tolist():
        clipper.decide(norm)
    return clipper


def parameter(*gradient):
    x = nn.Parameter(torch.zeros(len(gradient)))
    x.grad = torch.tensor(gradient)
    return x


# By hand


def trace(mode, norms):
    clipper = AdaptiveGradClipper(decay=0.5, mode=mode)
    for norm in norms:
        decision = clipper.decide(norm)
        assert decision.norm == norm
        yield decision, clipper.mean, clipper.variance


ROOT = math.sqrt(0.005)
THIRD = 0.5 + 3 * ROOT


@pytest.mark.parametrize(
    ("mode", "expected"),
    [  # of 0.2, 0.4, 1, 6: action, threshold, scale; the averages after it
        (
            "report",
            [
                ("step", 1, 1, 0.6, 0),
                ("step", 0.6, 1, 0.5, 0.005),
                ("clip", THIRD, THIRD, 0.5, 0.005),
                ("clip", THIRD, THIRD / 6, 0.5, 0.005),
            ],
        ),
        (
            "osp15",
            [
                ("step", 1, 1, 0.6, 0),
                ("step", 0.6, 1, 0.5, 0.005),
                ("clip", THIRD, 1 / (1 / THIRD + 1e-6), 0.5, 0.005),
                ("stop", THIRD, 1, 0.5, 0.005),
            ],
        ),
        (
            "osp_next",
            [
                ("step", 0.6, 1, 0.4, 0.02),
                ("step", 0.4 + 3 * math.sqrt(0.02), 1, 0.4, 0.01),
                ("clip", 0.7, 0.7 / (1 + 1e-6), 0.4, 0.01),
                ("clip", 0.7, 0.7 / (6 + 1e-6), 0.4, 0.01),
            ],
        ),
        (
            "safe",
            [
                ("step", 1, 1, 0.6, 0),
                ("step", 0.6 + 3 * 0.06, 1, 0.5, 0.005),  # sigma is a tenth of the mean
                ("clip", THIRD, THIRD, 0.5 + 1.5 * ROOT, 0.008125),
                ("skip", 0.5 + 1.5 * ROOT + 3 * math.sqrt(0.008125), 1, None, None),
            ],
        ),
    ],
)
def test_four_steps_by_hand(mode, expected):
    for (decision, mean, variance), (action, threshold, scale, *after) in zip(
        trace(mode, (0.2, 0.4, 1.0, 6.0)), expected, strict=True
    ):
        assert decision.action == action
        assert decision.threshold == pytest.approx(threshold, rel=1e-12)
        assert decision.scale == pytest.approx(scale, rel=1e-12)
        if after[0] is not None:
            assert (mean, variance) == pytest.approx(after, rel=1e-12)


def test_the_first_norm():
    assert told(AdaptiveGradClipper(), [1.0]) == ["step"]
    for mode, action in (("safe", "clip"), ("report", "step"), ("osp15", "step")):
        clipper = AdaptiveGradClipper(mode=mode)
        assert clipper.threshold == 1
        assert told(clipper, [20.0]) == [action]
        assert clipper.mean == 1
        assert AdaptiveGradClipper(mode=mode).decide(20.0).scale == (0.05 if mode == "safe" else 1)
    clipper = AdaptiveGradClipper(mode="osp_next")
    decision = clipper.decide(20.0)
    assert (decision.threshold, decision.scale) == (1, 1 / (20 + 1e-6))
    assert clipper.state_dict()["mean"] == 1
    assert clipper.state_dict()["fed"] == 0


# Against the original


@pytest.mark.parametrize(
    ("mode", "prefix", "after", "tolerance"),
    [
        ("osp15", "main.osp15", "grad_norm_actual", FP32),
        ("report", "main.report_rule", "norm_after", 1e-14),
    ],
)
def test_golden(mode, prefix, after, tolerance):
    clipper = AdaptiveGradClipper(mode=mode)
    found = {"threshold": [], "ema": [], "var": [], after: []}
    stopped = []
    for norm in GOLDEN["main.osp15.norm_before"].tolist():
        decision = clipper.decide(norm)
        stopped.append(decision.action == "stop")
        now = (decision.threshold, clipper.mean, clipper.variance, norm * decision.scale)
        for name, value in zip(found, now, strict=True):
            found[name].append(value)
    for name, values in found.items():
        assert np.abs(np.array(values) - GOLDEN[f"{prefix}.{name}"]).max() <= tolerance, name
    assert clipper.counts["clip"] >= 3
    if mode == "osp15":  # the original would have ended at the first
        assert stopped == GOLDEN["main.osp15.extreme"].astype(bool).tolist()
        assert sum(stopped) == 2


@pytest.mark.parametrize("run", ["settles", "begins_high", "spike_and_new_level"])
def test_osp_next_as_recorded(run):
    """The last two bits of a threshold are free: the original takes a root as a power."""
    clipper = AdaptiveGradClipper(mode="osp_next")
    rows = {key.partition(".")[2]: x.tolist() for key, x in OSP_NEXT.items() if key.startswith(run)}
    for i, norm in enumerate(rows["norm"]):
        decision = clipper.decide(norm)
        assert (decision.action == "step") == bool(rows["fed"][i])
        assert decision.threshold == pytest.approx(rows["threshold"][i], rel=2**-51, abs=0)
        assert (decision.scale, clipper.mean, clipper.variance) == (
            rows["scale"][i], rows["mean"][i], rows["variance"][i],
        )  # fmt: skip


def test_osp_next_is_told_apart():
    """Other rules are not within those recordings."""
    for mode in ("safe", "report", "osp15"):
        clipper = AdaptiveGradClipper(mode=mode)
        for norm in OSP_NEXT["settles.norm"].tolist():
            clipper.decide(norm)
        assert clipper.mean != OSP_NEXT["settles.mean"][-1]


def test_the_original_without_scaling_decides_alike():
    for name in ("norm_before", "threshold", "clip_coef", "ema", "var", "extreme", "nan"):
        assert (GOLDEN[f"main.mm21.{name}"] == GOLDEN[f"main.osp15.{name}"]).all()


# Shifts


def climb(clipper, factor):
    """Steps that are not taken whole, of norms that stay at a multiple of the mean."""
    level = factor * clipper.mean
    for count in range(1000):
        if clipper.decide(level).action == "step":
            return count
    raise AssertionError(f"{level} was never followed")


@pytest.mark.parametrize("factor", BOUNDS)
@pytest.mark.parametrize("level", [0.01, 0.3, 1.0, 100.0])
def test_a_shift_is_followed_within_its_bound(level, factor):
    counts = [
        climb(settled(level, spread, steps), factor)
        for spread in (0.0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
        for steps in (1, 2, 3, 10, 30, 98, 99, 100, 101, 300, 2000)
    ]
    assert max(counts) <= BOUNDS[factor]
    assert climb(settled(level, 0.0, 4000), factor) == BOUNDS[factor]


def test_less_variance_or_a_longer_run_takes_longer():
    def steps(variance, fed, factor):
        clipper = AdaptiveGradClipper()
        clipper.load_state_dict(
            clipper.state_dict() | {"mean": 1.0, "variance": variance, "fed": fed}
        )
        return climb(clipper, factor)

    variances, lengths = (0, *np.geomspace(1e-6, 10, 30).tolist()), (1, 2, 5, 20, 60, 99, 100, 500)
    for factor, bound in BOUNDS.items():
        table = np.array([[steps(v, fed, factor) for fed in lengths] for v in variances])
        assert (np.diff(table, axis=0) <= 0).all()
        assert (np.diff(table, axis=1) >= 0).all()
        assert table.max() == bound


def test_a_shift_beyond_the_extreme_is_skipped_and_below_it_clipped():
    high, low = settled(1.0, steps=4000), settled(0.01, steps=4000)
    assert climb(high, 10) == climb(low, 10) == 96
    assert high.counts["skip"] > 80
    assert low.counts["skip"] == 0
    assert low.counts["clip"] == 96
    assert high.counts["clip"] == 96 - high.counts["skip"]


def test_the_other_modes_never_follow():
    for mode in ("report", "osp15", "osp_next"):
        assert set(told(settled(0.1, mode=mode), [0.2] * 2000)) == {"clip"}


@pytest.mark.parametrize(("level", "clipped"), [(10.0, 13), (100.0, 29), (1000.0, 57)])
def test_the_warm_up_clips_and_never_skips(level, clipped):
    clipper = AdaptiveGradClipper()
    assert told(clipper, [level] * 100) == ["clip"] * clipped + ["step"] * (100 - clipped)


def test_the_warm_up_has_one_over_one_minus_decay_norms():
    for decay, length in ((0.0, 1), (0.9, 10), (0.99, 100)):
        for seen, action in ((length - 1, "clip"), (length, "skip")):
            clipper = AdaptiveGradClipper(decay=decay)
            told(clipper, [0.5] * seen)
            assert told(clipper, [1e6]) == [action]


def test_the_warm_up_averages_plainly():
    clipper, norms = AdaptiveGradClipper(), [0.2, 0.5, 0.4, 0.6, 0.3]
    assert set(told(clipper, norms)) == {"step"}
    assert clipper.mean == pytest.approx(np.mean([0.6, *norms[1:]]))


def test_a_decay_of_the_norms_is_followed_down():
    clipper = settled(1.0, 0.1)
    assert set(told(clipper, (10 ** -np.linspace(0, 1, 2000)).tolist())) == {"step"}
    assert 0.1 < clipper.threshold < 0.2


# Accidents


@pytest.mark.parametrize(("level", "action"), [(0.01, "skip"), (0.001, "clip"), (1.0, "skip")])
def test_one_spike_barely_moves_the_averages(level, action):
    clipper = settled(level, 0.1)
    mean, threshold = clipper.mean, clipper.threshold
    assert told(clipper, [1000 * level]) == [action]
    assert mean < clipper.mean < 1.005 * mean
    assert threshold < clipper.threshold < 1.02 * threshold


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_leaves_the_averages_alone(mode, bad):
    action = "stop" if mode in ("osp15", "osp_next") else "skip"
    for seen in (0, 1, 200):
        clipper = settled(1.0, 0.1, seen, mode=mode)
        before = clipper.state_dict()
        decision = clipper.decide(bad)
        assert (decision.action, decision.scale) == (action, 1)
        after = clipper.state_dict()
        assert {name for name in before if before[name] != after[name]} == {
            "nonfinite_in_a_row",
            "counts",
        }
        assert clipper.counts["nonfinite"] == clipper.counts[action] == 1
        assert clipper.decide(0.5).action == "step"


@pytest.mark.parametrize("mode", ["safe", "report"])
def test_fifty_in_a_row_stop(mode):
    clipper = AdaptiveGradClipper(mode=mode)
    assert told(clipper, [math.nan] * 49 + [0.0] + [math.inf] * 49) == (
        ["skip"] * 49 + ["step"] + ["skip"] * 49
    )
    assert told(clipper, [math.nan]) == ["stop"]
    assert clipper.counts["nonfinite"] == 99


@pytest.mark.parametrize("mode", MODES)
def test_no_gradient_is_a_step_that_teaches_nothing(mode):
    clipper = AdaptiveGradClipper(mode=mode)
    assert told(clipper, [0.0]) == ["step"]
    assert clipper.mean is None
    told(clipper, [0.3, 0.4])
    before = clipper.mean, clipper.variance
    assert told(clipper, [0.0]) == ["step"]
    assert (clipper.mean, clipper.variance) == before


# State


NORMS = st.floats(min_value=0, width=32) | st.just(math.nan) | st.floats(0.01, 10)


@given(st.sampled_from(MODES), st.lists(NORMS, max_size=60), st.data())
def test_a_run_goes_on_bit_for_bit_from_json(mode, norms, data):
    cut = data.draw(st.integers(0, len(norms)))
    through, first, second = (AdaptiveGradClipper(decay=0.9, mode=mode) for _ in range(3))
    expected = [through.decide(norm) for norm in norms]
    found = [first.decide(norm) for norm in norms[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    found += [second.decide(norm) for norm in norms[cut:]]
    assert repr(found) == repr(expected)  # NaN is not equal to itself
    assert second.state_dict() == through.state_dict()


@given(st.lists(NORMS, max_size=300))
def test_safe_applies_no_more_than_its_threshold(norms):
    clipper = AdaptiveGradClipper(decay=0.9)
    for norm in norms:
        decision = clipper.decide(norm)
        assert 0 < decision.threshold < math.inf
        if decision.action in ("step", "clip"):
            assert norm * decision.scale <= decision.threshold * (1 + 1e-15)


def test_a_saved_state_stays_as_it_was():
    clipper = settled(1.0)
    saved = clipper.state_dict()
    before = json.dumps(saved)
    other = AdaptiveGradClipper()
    other.load_state_dict(saved)
    other.decide(7.0)
    clipper.decide(7.0)
    assert json.dumps(saved) == before


def test_reset_forgets_the_level_and_keeps_the_counts():
    clipper = settled(1.0, 0.1)
    told(clipper, [math.nan] * 49)
    counts = dict(clipper.counts)
    clipper.reset()
    assert clipper.counts == counts
    fresh = AdaptiveGradClipper()
    assert clipper.state_dict() == fresh.state_dict() | {"counts": counts}
    assert told(clipper, [math.nan]) == ["skip"]
    assert told(clipper, [100.0]) == ["clip"]


# In place


@pytest.mark.parametrize("mode", MODES)
def test_it_clips_as_torch_does(mode):
    torch.manual_seed(0)
    mine, theirs = (
        [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), ())] for _ in "ab"
    )
    for x, y in zip(mine, theirs, strict=True):
        x.grad = torch.randn(x.shape)
        y.grad = x.grad.clone()
    clipper = AdaptiveGradClipper(mode=mode)
    clipper.load_state_dict(clipper.state_dict() | {"mean": 0.5, "variance": 0.01, "fed": 500})
    norm = clip_grad_norm_(theirs, 0.8)
    decision = clipper.clip_(mine)
    assert decision.action == "clip"
    assert decision.norm == norm.item()
    assert decision.threshold == pytest.approx(0.8)
    assert decision.norm < 5
    eps = 1e-6 + torch.finfo(torch.float32).eps  # each adds 1e-6 to another denominator
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=2 * eps, atol=0)


def test_only_a_clip_changes_the_gradients():
    for norm, action in ((0.5, "step"), (5e3, "skip"), (math.nan, "skip")):
        x, clipper = parameter(norm, 0.0), settled(0.5)
        assert clipper.clip_([x]).action == action
        torch.testing.assert_close(
            x.grad, torch.tensor([norm, 0.0]), rtol=0, atol=0, equal_nan=True
        )


def test_all_kinds_of_gradients_at_once():
    half, double = nn.Parameter(torch.zeros(2).bfloat16()), nn.Parameter(torch.zeros(2).double())
    half.grad, double.grad = torch.tensor([0, 4.0]).bfloat16(), torch.tensor([0, 4.0]).double()
    single, empty = parameter(7.0), parameter()
    without = nn.Parameter(torch.zeros(3))
    decision = AdaptiveGradClipper().clip_(iter([without, half, single, double, empty]))
    assert decision.norm == 9
    assert decision.scale == 1 / 9
    assert without.grad is None
    assert half.grad.tolist() == [0, torch.tensor(4 / 9).bfloat16()]
    assert double.grad.tolist() == [0, pytest.approx(4 / 9, rel=1e-15)]


def test_the_host_waits_once():
    x = [parameter(1.0, 2.0) for _ in range(5)]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        assert AdaptiveGradClipper().clip_(x).action == "clip"
    names = [event.name for event in found.events()]
    assert names.count("aten::_local_scalar_dense") == 1


def test_the_example_runs():
    found = doctest.testmod(clip)
    assert found.attempted >= 4
    assert found.failed == 0
    example = doctest.DocTestFinder().find(AdaptiveGradClipper, globs={})[0].examples
    assert sum(one.source.count("\n") for one in example) == 11


# Many ranks


def joined(rank, store):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        check_dtensors(rank)
        check_fully_sharded(rank)
    finally:
        distributed.destroy_process_group()


def sharded(whole, mesh, *placements):
    x = distribute_tensor(whole, mesh, placements)
    parameter = nn.Parameter(torch.zeros_like(x))
    parameter.grad = x
    return parameter


def check_dtensors(rank):
    torch.manual_seed(0)
    wholes = [torch.randn(5, 3), torch.randn(1, 4), torch.randn(7), torch.randn(6, 2)]
    line, flat = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    partial = nn.Parameter(distribute_tensor(torch.zeros(6, 2), line, [Replicate()]))
    partial.grad = DTensor.from_local(wholes[3] * (0.25, 0.75)[rank], line, [Partial()])
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.ones(2)
    parameters = [
        plain,
        sharded(wholes[0], line, Shard(0)),  # 3 rows and 2
        sharded(wholes[1], line, Shard(0)),  # 1 row and none
        sharded(wholes[2], line, Replicate()),
        partial,
        sharded(wholes[0], flat, Replicate(), Shard(0)),
    ]
    expected = [torch.ones(2), *(x.clone() for x in wholes), wholes[0].clone()]
    norm = torch.cat([x.flatten() for x in expected]).norm().item()
    decision = AdaptiveGradClipper().clip_(parameters)
    assert decision.norm == pytest.approx(norm, rel=1e-6)
    assert decision.action == "clip"
    norms = [torch.zeros(1, dtype=torch.double) for _ in range(2)]
    distributed.all_gather(norms, torch.tensor([decision.norm], dtype=torch.double))
    assert norms[0] == norms[1]
    for x, whole in zip(parameters, expected, strict=True):
        grad = x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad
        torch.testing.assert_close(grad, whole / norm)


def model_and_loss(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 1))
    return model, lambda: 100 * model(torch.randn(8, 3)).square().mean()


def check_fully_sharded(rank):
    whole, loss = model_and_loss(0)
    loss().backward()
    divided, loss = model_and_loss(0)
    for layer in (divided[0], divided[2], divided):
        fully_shard(layer)
    loss().backward()
    expected = AdaptiveGradClipper().clip_(whole.parameters())
    with CommDebugMode() as counted:
        decision = AdaptiveGradClipper().clip_(divided.parameters())
    assert counted.get_total_counts() == 1
    assert decision.action == expected.action == "clip"
    assert decision.norm == pytest.approx(expected.norm, rel=1e-6)
    for x, y in zip(divided.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), y.grad)


def test_sharded_gradients_have_the_norm_of_whole_ones(tmp_path):
    torch.multiprocessing.start_processes(
        joined, (f"file://{tmp_path / 'store'}",), nprocs=2, start_method="forkserver"
    )


# Errors


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, math.nan])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1, got"):
        AdaptiveGradClipper(decay=decay)


@pytest.mark.parametrize("sigmas", [0, -1, math.inf, math.nan])
def test_sigmas_out_of_range(sigmas):
    with pytest.raises(ValueError, match="sigmas must be a finite number above 0, got"):
        AdaptiveGradClipper(sigmas=sigmas)


def test_an_unknown_mode():
    with pytest.raises(
        ValueError, match="mode must be one of safe, report, osp15, osp_next, got 'fixed'"
    ):
        AdaptiveGradClipper(mode="fixed")


def test_a_negative_norm():
    clipper = AdaptiveGradClipper()
    for norm in (-1.0, -math.inf):
        with pytest.raises(ValueError, match="norm must not be negative, got -"):
            clipper.decide(norm)
    assert clipper.state_dict() == AdaptiveGradClipper().state_dict()


def test_no_parameter_has_a_gradient():
    with pytest.raises(ValueError, match=r"call backward\(\) before clip_\(\)"):
        AdaptiveGradClipper().clip_([nn.Parameter(torch.zeros(2))])


def test_a_state_of_something_else():
    clipper = settled(1.0)
    before = clipper.state_dict()
    short = {name: value for name, value in before.items() if name != "fed"}
    for state, what in (
        (short, "state must have the entries"),
        (before | {"step": 3}, "state must have the entries"),
        (before | {"counts": {"step": 1}}, "counts must have the entries"),
    ):
        with pytest.raises(ValueError, match=what):
            clipper.load_state_dict(state)
    assert clipper.state_dict() == before
