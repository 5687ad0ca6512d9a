"""Estimates of training on many devices are the arithmetic that they say, of figures that hold."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skiparse.cli import main
from skiparse.models import SUV
from skiparse.models.cluster import (
    Cluster,
    Estimate,
    Kept,
    Model,
    Setting,
    SUVModel,
    WanModel,
    _cell,
    kept_by,
)
from skiparse.models.planning import Context
from skiparse.models.retrofit.model import schedule
from skiparse.models.retrofit.shared import _route

FIGURES = {
    "memory": 64, "flops": 2.0e14, "devices_per_machine": 8, "inside": 1.0e11, "between": 1.0e10
}  # fmt: skip
CLUSTER = Cluster(**FIGURES)


class Toy(Model):
    """Ten numbers of everything, so that it can be computed by hand."""

    tokens, parameters, block, layers = 16, 1_000_000_000, 200_000_000, 4
    head_dim, text, out, moves_again = 8, 6, 3, True

    def route(self, processes):
        return Context.of("tiny", (1, 64, 64), processes).route

    def flop(self, processes):
        return 10**12 // processes

    def flop_again(self, processes, checkpointing):
        return self.flop(processes) if checkpointing == "block" else 0

    def kept(self, tokens, checkpointing):
        return Kept(2**20 if checkpointing == "block" else 2**30, 2**29)

    def between(self, tokens):
        return 0


def estimate(memory=64, **changes):
    given = {"devices": 16, "batch": 64, "accumulate": 2, "context": 2, "checkpointing": "none"}
    return Estimate("toy", Toy(), Setting(**given | changes), replace(CLUSTER, memory=memory))


def test_a_step_by_hand():
    found = estimate()
    assert found.setting.micro_batch == 64 // (16 // 2 * 2) == 4
    assert found.computing == 2 * 4 * 3 * 0.5e12 / 2e14
    made = Context.of("tiny", (1, 64, 64), 2).route
    numbers = made.sent * 8 + 16 * 3 * 1 + 2 * 1 * 6 * 4  # 16 tokens; text in each of 4 layers
    assert Toy().sent(2) == numbers * 2 / 2
    both = 2 * numbers - 2 * 1 * 6  # nothing reads the text of the last layer
    assert found.sharing == 2 * 4 * both / 1e11  # in one machine
    assert found.weights == 5 * 15 / 16 * 4e9 / 1e10  # over two machines
    assert found.seconds == found.computing + found.sharing + found.weights
    again = estimate(checkpointing="block", devices=8, accumulate=4)
    assert again.computing == pytest.approx(2 * found.computing * 4 / 3)
    more = made.sent * 8 + 2 * 1 * 6 * 4
    assert again.sharing == 4 * 4 * (both + more) / 1e11
    assert again.weights == 9 * 7 / 8 * 4e9 / 1e11
    assert estimate(context=1).sharing == 0
    numbers = Context.of("tiny", (1, 64, 64), 16).route.sent * 8 + 16 * 3 * 15 + 2 * 15 * 6 * 4
    assert Toy().sent(16) == numbers * 2 / 16
    many = Toy().sent(16) + Toy().sent_back(16, "none")
    assert estimate(context=16, accumulate=1).sharing == 64 * many / 1e10


def test_the_14b_is_shared_as_a_retrofitted_one_is():
    found, grid = WanModel((9, 96, 160)), (3, 6, 10)
    kinds = schedule(40, (4, 4))
    for processes in (2, 4):
        assert found.route(processes) == _route(grid, "2d", 2, kinds, 40, processes)
    assert found.tokens == math.prod(grid)


def test_memory_by_hand():
    found = estimate()
    assert found.state == 20 * 1e9 / 16
    assert found.gathered == (3 * 2e8 + 2e8) * 4
    assert found.activations == 4 * (4 + 1) * 2**30 + 5 * 2**29
    assert found.bytes == found.state + found.gathered + found.activations
    assert found.fits == (found.bytes <= 64 * 2**30) is True


def test_what_does_not_fit_is_named_with_its_remedy():
    full = estimate(batch=640)
    assert not full.fits
    assert "toy on 16 devices" in full.complaint()
    assert "activations of 40 samples" in full.complaint()
    for given, words in (
        ({"batch": 640}, "checkpointing: block"),  # 40 samples of five blocks' 1 GiB become 40 GiB
        ({"batch": 4096}, "accumulate: 64"),  # 256 samples of one block's do not fit; 8 of five do
        ({"batch": 512, "accumulate": 64, "memory": 6}, "devices with more memory"),
    ):
        one = estimate(**given)
        assert not one.fits
        assert one.remedy() == words
    assert not estimate(devices=3, batch=4).fits  # no groups of two


class Wide(Toy):
    """Many parameters, few activations."""

    parameters, block = 60_000_000_000, 10**6

    @property
    def rest(self):
        return 0


def test_shards_are_the_remedy_for_many_parameters():
    found = Estimate("wide", Wide(), Setting(8, 64, 1, 1, "block"), CLUSTER)
    assert not found.fits
    assert found.remedy() == "32 devices, which are more shards"


def test_a_cell_of_the_table():
    found = estimate()
    cell = _cell(found)
    assert cell == f"{found.seconds:.3g} s {found.bytes / 2**30:,.0f} GiB"
    assert _cell(estimate(batch=640)).endswith(" GiB!")
    for given in ({"devices": 3, "batch": 4}, {"batch": 60}):  # groups of two, samples among them
        assert _cell(estimate(**given)) == "-"


def test_operations_are_those_that_run():
    for changes in (
        {},
        {"skip_connection": False, "sparsity": (1, 1, 1, 1, 1)},
        {"double_ff": False, "num_layers": (1, 2, 4, 2, 3)},
    ):
        sizes = SUV.presets["tiny"] | changes
        skips = sizes.pop("skip_connection", True)
        model = SUV(**sizes, skip_connection=skips)
        counted = SUVModel(sizes, 2 * 8 * 8, None, skips)
        inputs = (
            torch.zeros(1, 4, 2, 16, 16), torch.zeros(1), torch.zeros(1, 512, 24),
            torch.zeros(1, 20),
        )  # fmt: skip
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(*inputs, trim_text=False)
        assert counted.flop(1) == flops.get_total_flops()
        assert counted.parameters == sum(x.numel() for x in model.parameters())
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            for block in model.stages[1]:
                block.ff(torch.zeros(1, 128, 64))
                block.ff(torch.zeros(1, 512, 64))
        layers, last = sum(sizes["num_layers"]), 16 * 64 * 64 * 512
        whole = flops.get_total_flops() // len(model.stages[1]) * layers - last
        assert counted.flop_again(1, "feed_forward") == whole
        assert counted.flop_again(2, "block") == counted.flop(2) < counted.flop(1)


def test_what_is_kept_by_hand():
    def call(module, batch):
        x = torch.zeros(batch, 7, 16, dtype=torch.bfloat16, requires_grad=True)
        return module(x).square()

    found = kept_by(lambda: nn.Linear(16, 32), call)
    # The input, and the output for its square, in two bytes each; the weight's copy.
    assert found.sample == 2 * 7 * (16 + 32)
    assert found.always == 2 * 16 * 32


def test_less_is_kept_where_more_is_computed_again():
    model = SUVModel(SUV.presets["tiny"], 128, None, True)
    none, half, block = (model.kept(128, how) for how in ("none", "feed_forward", "block"))
    assert none.sample > half.sample > block.sample == (128 + 512) * 64 * 2
    assert model.kept(256, "block").sample - block.sample == 128 * 64 * 2


def test_figures_that_make_no_sense_are_refused(tmp_path, capsys):
    file = tmp_path / "cluster.yaml"
    for text, words in (
        ("memory: 64", "must have the figures between, devices_per_machine, flops"),
        ("- 1", "must have the figures"),
        ("{", "is no YAML"),
        (str(FIGURES | {"flops": 0}), "flops must be a number above 0, got 0"),
        (str(FIGURES | {"inside": "fast"}), "inside must be a number above 0, got 'fast'"),
        (str(FIGURES | {"devices_per_machine": 1.5}), "must be a whole number, got 1.5"),
    ):
        file.write_text(text)
        assert main(["plan", "--cluster", str(file)]) == 2
        assert words in capsys.readouterr().err
    for arguments, words in (
        (["--cluster", str(tmp_path / "none")], "is not there; give a file of figures"),
        ([], "give --context-parallel PROCESSES or --cluster FILE, and one alone"),
        (["--cluster", "x", "--context-parallel", "2"], "and one alone"),
        (["--cluster", "x", "--preset", "v1.5"], "--preset and --shape go with"),
    ):
        assert main(["plan", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_the_table(tmp_path, capsys):
    file = tmp_path / "cluster.yaml"
    file.write_text("\n".join(f"{name}: {value}" for name, value in FIGURES.items()))
    assert main(["plan", "--cluster", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("ESTIMATES, none of them measured")
    _, lines, _ = said.split("\n\n")
    rows = {line.split()[0]: line for line in lines.splitlines()[1:]}
    assert [*rows] == ["I1", "I2", "I3", "I4", "V1", "V2", "V3", "V4", "V5", "14B"]
    assert "512 devices" in said
    assert "first that does not fit: I1 on 8 devices" in said
    assert "Remedy: " in said
    shared = {name: line.split()[3] for name, line in rows.items()}
    assert [shared[f"I{i}"] for i in range(1, 5)] == ["1"] * 4
    assert [shared[f"V{i}"] for i in range(1, 6)] == ["2", "2", "4", "4", "4"]
    samples = {name: line.split()[2] for name, line in rows.items()}
    assert samples["I1"] == "8,192"
    assert samples["14B"] == "128"  # one for each four of 512 devices
    for line in rows.values():
        assert math.isfinite(float(line.split(" s ")[0].split()[-1]))
