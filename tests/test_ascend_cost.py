"""The cost model of the twin adds up as by hand, and what it leaves out it may leave out.

All cycles are of a model; none was measured.
"""

from dataclasses import replace

import built
import pytest
import torch

from csrc.twin import launch, model
from skiparse import SkipPattern
from skiparse.backends import Inputs
from skiparse.testing import make_problem

built.require_tools(allow_module_level=True)

KERNELS = """
#include "kernel_operator.h"
#include "python.h"
using namespace AscendC;
static GlobalTensor<float> A;
constexpr int N = 1024;

struct Vectors {
    LocalTensor<float> a, b;
    Vectors() {
        LocalMemAllocator<Hardware::UB> ub;
        a = ub.Alloc<TPosition::VECCALC, float>(N);
        b = ub.Alloc<TPosition::VECCALC, float>(N);
    }
};

void copy() { DataCopy(Vectors().a, A, N); }
void two_pipes() { Vectors x; DataCopy(x.a, A, N); Exp(x.b, x.b, N); }
void flag() {
    Vectors x;
    DataCopy(x.a, A, N);
    SetFlag<HardEvent::MTE2_V>(0);
    WaitFlag<HardEvent::MTE2_V>(0);
    Exp(x.a, x.a, N);
}
void side_by_side() { Vectors x; Muls(x.a, x.a, 2.0f, N); Muls(x.b, x.b, 2.0f, N); }
void one_after_another() {
    Vectors x;
    Muls(x.a, x.a, 2.0f, N);
    PipeBarrier<PIPE_V>();
    Muls(x.a, x.a, 2.0f, N);
}
void scalars() { Vectors x; for (int i = 0; i < 5; ++i) x.a.SetValue(i, 1.0f); }
void products(int count) {
    LocalTensor<half> left, right;
    LocalTensor<float> sum;
    left.space = twin::L0A; right.space = twin::L0B; sum.space = twin::L0C;
    left.end = right.end = sum.end = 1 << 16;
    left.chip = twin::machine->self->chips[twin::L0A].get();
    right.chip = twin::machine->self->chips[twin::L0B].get();
    sum.chip = twin::machine->self->chips[twin::L0C].get();
    MmadParams p;
    p.m = 128; p.n = 64; p.k = 100;
    for (int i = 0; i < count; ++i) Mmad(sum, left, right, p);
}
void product() { if ASCEND_IS_AIC products(1); }
void queue() {  // the loads are issued once the eighth of the products has started
    if ASCEND_IS_AIV return;
    products(40);
    LocalTensor<half> l1, l0;
    l1.space = twin::L1; l1.chip = twin::machine->self->chips[twin::L1].get(); l1.end = 1 << 16;
    l0.space = twin::L0B; l0.chip = twin::machine->self->chips[twin::L0B].get(); l0.end = 1 << 16;
    LoadData2DParams p;
    p.repeatTimes = 250;
    for (int i = 0; i < 10; ++i) LoadData(l0, l1, p);
}
void cross() {
    if ASCEND_IS_AIC { CrossCoreWaitFlag(0); products(1); return; }
    if (GetSubBlockIdx() == 1) DataCopy(Vectors().a, A, N);
    CrossCoreSetFlag<2, PIPE_MTE2>(0);
}

pybind11::tuple run(const std::string& kernel, int guess) {
    twin::Machine machine;
    machine.costs_only = true;
    machine.costs.guess = static_cast<twin::Guess>(guess);
    machine.global.emplace_back("A", reinterpret_cast<uint8_t*>(512), N * 4);
    A.SetGlobalBuffer(reinterpret_cast<float*>(512));
    const bool alone = kernel != "product" && kernel != "queue" && kernel != "cross";
    const auto body = kernel == "copy" ? copy : kernel == "two_pipes" ? two_pipes
                      : kernel == "flag" ? flag : kernel == "side_by_side" ? side_by_side
                      : kernel == "one_after_another" ? one_after_another
                      : kernel == "scalars" ? scalars
                      : kernel == "product" ? product : kernel == "queue" ? queue : cross;
    twin::launch(machine, 1, !alone, [body] {
        InitSocState();
        body();
        PipeBarrier<PIPE_ALL>();
    });
    return twin::costs(machine);
}

PYBIND11_MODULE(costs, m) { m.def("run", run); }
"""

# Of cost.h, as fast, typical and slow; repeated here so that a change there is meant.
ISSUE, FLAG, CROSS, SCALAR = (2, 8, 20), (0, 10, 30), (400, 600, 1000), (5, 20, 50)
COPY = tuple(20 + 4096 / 69 + latency for latency in (100, 300, 700))
START, EXP = (20, 25, 30), (1, 2, 4)
REPEATS = 4096 / 256
MMAD = 8 + 8 * 4 * 7


@pytest.fixture(scope="module")
def tiny():
    library = built.module("costs", {"costs.cpp": KERNELS})

    def run(name, guess=1):
        return launch.costs(library.run(name, guess))

    return run


@pytest.mark.parametrize("g", range(3), ids=launch.GUESSES)
def test_cycles_by_hand(tiny, g):
    exp, muls = START[g] + REPEATS * EXP[g], START[g] + REPEATS
    by_hand = {
        "copy": ISSUE[g] + COPY[g],
        "two_pipes": max(ISSUE[g] + COPY[g], 2 * ISSUE[g] + exp),
        "flag": ISSUE[g] + COPY[g] + FLAG[g] + exp,
        # The second of two starts when the first has left room, by the share of its start-up.
        "side_by_side": ISSUE[g] + g / 2 * START[g] + REPEATS + muls,
        "one_after_another": ISSUE[g] + 2 * muls,
        # The scalar unit does one thing after the other, and issues the barrier at the end.
        "scalars": 5 * (ISSUE[g] + SCALAR[g]) + ISSUE[g],
        "product": ISSUE[g] + MMAD,
        # Product 40 is issued when product 8 has started, and the loads after it.
        "queue": ISSUE[g] * 2 + 7 * MMAD + 10 * (g / 2 * 28 + 1000) + (1 - g / 2) * 28,
        "cross": ISSUE[g] + COPY[g] + CROSS[g] + ISSUE[g] + MMAD,
    }
    assert {name: tiny(name, g).cycles(0) for name in by_hand} == pytest.approx(by_hand)


def test_busy_and_bytes(tiny):
    found = tiny("flag")
    (lane,) = found.lanes
    assert lane.busy["MTE2"] == pytest.approx(20 + 4096 / 69)
    assert lane.busy["V"] == pytest.approx(12.5 + REPEATS * 2)
    assert found.buffers == {"A": launch.Buffer(4096, 4096, 0, 1)}


@pytest.fixture(scope="module")
def library():
    return built.twin()


def inputs_of(pattern, **sizes):
    p = make_problem(pattern, **sizes, dtype=torch.bfloat16, masked=True)
    return Inputs(*p.inputs, p.mask, p.text_mask, p.pattern, p.q.shape[-1] ** -0.5)


def test_data_checks_and_order_change_no_cycle(library):
    inputs = inputs_of(SkipPattern(3, 2), B=1, N=1301, T=20, H=1, D=64)
    counted = launch.forward_costs(library, inputs, cores=2)
    assert launch.forward_costs(library, inputs, cores=2, last_lane_first=True) == counted
    executed = launch.forward_costs(library, inputs, cores=2, executed=True)
    assert executed.lanes[2:] == counted.lanes[2:]
    assert (executed.buffers, executed.unaligned) == (counted.buffers, counted.unaligned)
    # But for the key biases, which write a key that a mask hides by itself: at most all are.
    assert counted.cycles(0) * 0.5 < executed.cycles(0) < counted.cycles(0)
    alone = launch.forward_costs(library, inputs, cores=2, core=1)
    assert alone.lanes == tuple(lane for lane in counted.lanes if lane.core == 1)


def test_more_work_or_slower_parts_take_longer(library):
    def shape(N, guess):
        inputs = inputs_of(SkipPattern.single(2), N=N, T=20, H=1, D=64)
        return launch.forward_costs(library, inputs, cores=1, guess=guess).cycles(1)

    assert shape(600, "typical") < shape(1200, "typical") < shape(2400, "typical")
    assert shape(1200, "fast") < shape(1200, "typical") < shape(1200, "slow")


@pytest.mark.parametrize("guess", launch.GUESSES)
@pytest.mark.parametrize("pattern", [SkipPattern.group(8), SkipPattern.single(2)], ids=str)
def test_extrapolation_agrees_with_the_whole(library, pattern, guess):
    """Of a smaller shape, all tasks of all cores, text and ragged lengths among them."""
    shape = model.Shape(pattern, N=7000, T=77, H=3)
    few = model.project(library, shape, cores=3, guess=guess)
    whole = launch.forward_costs(library, shape.inputs(), cores=3, guess=guess)
    l2, _, _ = launch.device(library, guess)
    seconds = (whole.cycles(0) + whole.cycles(1)) / model.CLOCK
    assert few.core == pytest.approx(seconds, rel=0.03)
    moved = sum(buffer.moved for buffer in whole.buffers.values())
    assert few.l2 == pytest.approx(moved / l2, rel=0.03)


def test_backward_projection_is_that_of_the_busiest_core(library):
    shape = model.Shape(SkipPattern.group(2), N=1600, T=77, H=2, D=64)
    last = model.project_backward(library, shape, cores=3)
    whole = launch.backward_costs(library, shape.inputs(), shape.outputs(), cores=3)
    seconds = sum(whole.cycles(i) for i in range(4)) / model.CLOCK
    assert last.core == pytest.approx(seconds, rel=0.03)
    moved = sum(buffer.moved for buffer in whole.buffers.values())
    assert last.l2 == pytest.approx(moved / launch.device(library, "typical")[0], rel=0.05)
    assert last.flops == 5 / 2 * shape.flops()


@pytest.mark.parametrize(
    ("pattern", "instructions"),
    [
        (SkipPattern.dense(), 1),
        (SkipPattern.single(2), 1),
        (SkipPattern.single(4), 1),
        (SkipPattern.single(8), 1),  # in pairs of elements, for 73,728 is no field of 16 bits
        (SkipPattern.group(2), 1),
        (SkipPattern.group(4), 32),  # one a run
        (SkipPattern.group(8), 16),
    ],
    ids=str,
)
def test_instructions_that_gather_a_tile_of_a_fused_projection(library, pattern, instructions):
    """Of 128 keys, where q, k and v are views of one tensor at the headline shape."""
    shape = model.Shape(pattern, T=0, N=36864)
    qkv = torch.empty(1, shape.N, 3, shape.H, shape.D, dtype=torch.bfloat16, device="meta")
    q, k, v = qkv.unbind(2)
    inputs = replace(shape.inputs(), q=q, k=k, v=v)
    tasks = shape.tasks()
    costs = launch.forward_costs(library, inputs, cores=tasks, core=0)
    assert costs.buffers["k"].copies == instructions * shape.N / pattern.sparsity / 128


def test_places_of_scratch_memory(library):
    """All of the forward kernel are multiples of 512 bytes, but for odd panels of weights."""
    costs = launch.forward_costs(
        library, model.Shape(SkipPattern.single(8)).inputs(), cores=500, core=3
    )
    found = [
        (x.line.partition(":")[0], x.instruction) for x in costs.unaligned if "work" in x.buffer
    ]
    assert found == [("attention_fwd.cpp", "DataCopy")]
    outputs = {x.buffer for x in costs.unaligned} - {"workspace"}
    assert outputs <= {"out", "text_out", "lse", "text_lse"}  # rows of a head, and single numbers


def test_half_scores_move_fewer_bytes(library):
    shape = model.Shape(SkipPattern.single(8))
    exact, half = (model.project(library, shape, half_scores=x) for x in (False, True))
    queries, keys = 8 * shape.keys(), shape.keys()
    saved = shape.H * queries * keys * 2 * 2  # two bytes less, written and read
    l2, _, _ = launch.device(library, "typical")
    assert exact.l2 - half.l2 == pytest.approx(saved / l2, rel=0.01)


def test_rearranging_copies_and_attends(library):
    dense, sparse = (model.Shape(p) for p in (SkipPattern.dense(), SkipPattern.group(8)))
    _, hbm, _ = launch.device(library, "typical")
    attention = sparse.flops() / 150.8e12
    copies = 24 * 128 * 2 * (8 * 36864 + 4 * 9 * 512) / hbm
    assert model.rearranging(library, sparse) == pytest.approx(attention + copies)
    text = 24 * 128 * 2 * 4 * 2 * 512 / hbm
    assert model.rearranging(library, dense) == pytest.approx(dense.flops() / 150.8e12 + text)


def test_projection_takes_the_slowest_resource():
    one = model.Projection(core=2.0, l2=1.0, hbm=0.5, busy={"a": 1.0, "b": 1.5}, flops=4 * 10**12)
    assert (one.seconds, one.limit, one.tflops) == (2.0, "b", 2.0)
    assert replace(one, l2=4.0).limit == "L2"
    assert replace(one, hbm=4.0).limit == "HBM"
