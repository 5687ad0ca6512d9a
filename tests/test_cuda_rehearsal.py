"""The tests for a GPU, rehearsed without one: whatever the GPU does, they can pass.

Stand-ins of the libraries compute on the CPU. What needs a device stays out: graphs, waiting,
memory, kernels. The tests must also be able to fail: on answers of another library, for one.
"""

import ast
import importlib.metadata as metadata
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import fake_libraries
import pytest
import ran as recorder
import test_cuda
import torch
import triton
from packaging.requirements import Requirement
from torch.profiler import ProfilerActivity, profile
from triton.compiler.compiler import LazyDict

from skiparse import SkipPattern
from skiparse.backends import sdpa
from skiparse.testing import make_problem, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU; test_cuda.py")

HERE = Path(__file__).parent
FOR_A_GPU = ("test_cuda.py", "test_triton.py", "test_triton_tma.py")  # what bench/gpu.sh runs


@pytest.fixture
def stage(monkeypatch):
    """A machine with all libraries, on which "cuda" is the CPU."""
    monkeypatch.setattr(sdpa, "aten", fake_libraries.Operators())
    monkeypatch.setitem(sys.modules, sdpa.FA3, fake_libraries.fa3_module(2026))
    monkeypatch.setitem(sys.modules, sdpa.FA4, fake_libraries.fa4_module(5))
    monkeypatch.setattr(sdpa, "_is_there", lambda module: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in ("cudnn", "flash"):
        enabled = getattr(torch.backends.cuda, f"{name}_sdp_enabled")

        def can_use(params, debug=False, *, name=name, enabled=enabled):
            refused = name == "cudnn" and torch.get_deterministic_debug_mode() == 2
            return enabled() and not refused

        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", can_use)
    on_cuda = sdpa._package_why_not

    def package_why_not(operands, module, head_dims):
        return on_cuda([_OnCuda(x) for x in operands], module, head_dims)

    monkeypatch.setattr(sdpa, "_package_why_not", package_why_not)
    monkeypatch.setattr(sdpa, "LIBRARIES", tuple(x for x in sdpa.LIBRARIES if x.name != "cpu"))

    def problem_of(p, dtype=torch.bfloat16, **shape):
        return make_problem(p, dtype=dtype, **{"N": 256, "D": 64, **shape})

    monkeypatch.setattr(test_cuda, "problem_of", problem_of)
    torch.use_deterministic_algorithms(True, warn_only=True)  # as test_cuda.py


class _OnCuda:
    """The shape of a tensor, said to be on a device."""

    def __init__(self, x):
        self.shape, self.device = x.shape, torch.device("cuda")


@pytest.fixture
def ran(stage):
    with recorder.recorded() as found:
        yield found


@pytest.mark.parametrize("library", test_cuda.LIBRARIES)
@pytest.mark.parametrize("p", test_cuda.PATTERNS, ids=str)
def test_libraries_give_the_exact_answer(p, library, ran):
    test_cuda.test_libraries_give_the_exact_answer(p, library, torch.bfloat16, ran)


@pytest.mark.parametrize("layout", ["packed", "heads_first", "expanded"])
@pytest.mark.parametrize("library", test_cuda.LIBRARIES)
@pytest.mark.parametrize("B", [1, 2])
def test_libraries_take_any_layout(B, library, layout, ran):
    test_cuda.test_libraries_take_any_layout(B, library, layout, ran)


@pytest.mark.parametrize("library", test_cuda.LIBRARIES)
def test_rows_may_begin_anywhere(library, ran):
    test_cuda.test_rows_may_begin_anywhere(library, ran)


@pytest.mark.parametrize("library", test_cuda.LIBRARIES)
def test_strides_of_the_gradient_may_change_between_calls(library, ran):
    test_cuda.test_strides_of_the_gradient_may_change_between_calls(library, ran)


def test_cudnn_is_refused_where_bits_must_be_the_same(ran):
    test_cuda.test_cudnn_is_refused_where_bits_must_be_the_same(ran)


@pytest.mark.parametrize("library", test_cuda.LIBRARIES[1:])
def test_the_same_bits(library, ran, monkeypatch):
    """Fewer runs of something smaller."""
    monkeypatch.setattr(
        test_cuda, "problem_of", lambda p, **_: make_problem(p, N=41, dtype=torch.bfloat16)
    )
    test_cuda.test_thirty_runs_give_the_same_bits(SkipPattern.single(4), library, ran)


@pytest.mark.parametrize("library", test_cuda.LIBRARIES)
def test_more_heads_or_batch_entries_than_a_grid_has_room_for(library, ran, monkeypatch):
    """A grid of 7, and 8 sub-sequences of 3 tokens."""
    monkeypatch.setattr(sdpa, "GRID", 7)
    monkeypatch.setattr(
        test_cuda, "problem_of", lambda p, **shape: make_problem(p, **{**shape, "N": 24})
    )
    for p, B in ((SkipPattern.single(8), 1), (SkipPattern.block(8, 24), 2)):
        test_cuda.test_more_heads_or_batch_entries_than_a_grid_has_room_for(p, B, library, ran)


@pytest.mark.parametrize("library", test_cuda.LIBRARIES)
def test_headline_shape(library, ran, monkeypatch):
    monkeypatch.setattr(
        test_cuda, "problem_of", lambda p, **_: make_problem(p, N=256, T=16, dtype=torch.bfloat16)
    )
    for kind in ("single", "group"):
        test_cuda.test_headline_shape(kind, library, ran)


# The tests can fail.


def test_the_answer_of_another_library_is_not_enough(ran, monkeypatch):
    """As if cuDNN refused, and torch's switches were all there is to say which one is meant."""
    monkeypatch.setattr(sdpa, "LIBRARIES", sdpa.LIBRARIES[1:])
    monkeypatch.setattr(test_cuda, "only", lambda library: nullcontext("sdpa"))
    with pytest.raises(AssertionError, match=r"ran: \['fa3 .*'fa3 .*\], not \['cudnn .*'cudnn"):
        test_cuda.test_strides_of_the_gradient_may_change_between_calls("cudnn", ran)


def test_a_library_that_refuses_fails_its_test(ran, monkeypatch):
    refusing = tuple(
        x._replace(why_not=lambda operands, backward: "not today" if backward else None)
        for x in sdpa.LIBRARIES
    )
    monkeypatch.setattr(sdpa, "LIBRARIES", refusing)
    with pytest.raises(RuntimeError, match=r"no library takes rows .* flash: not today"):
        test_cuda.test_libraries_take_any_layout(1, "flash", "packed", ran)


def test_every_test_for_a_gpu_asks_what_ran():
    tree = ast.parse((HERE / "test_cuda.py").read_text())
    tests = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name.startswith("test_")]
    assert len(tests) > 10
    for test in tests:
        calls = {ast.unparse(x.func) for x in ast.walk(test) if isinstance(x, ast.Call)}
        assert "ran.only" in calls, f"{test.name} does not say what should have run"


# What is recorded is what ran.


def test_the_profiler_saw_the_same():
    problem = make_problem(SkipPattern.group(2), N=16, T=3)
    operator = "aten::_scaled_dot_product_flash_attention_for_cpu"
    with recorder.recorded() as seen, profile(activities=[ProfilerActivity.CPU]) as profiler:
        run(problem, "sdpa")
    seen.only("cpu forward", "cpu backward")
    assert {operator, f"{operator}_backward"} <= {event.key for event in profiler.key_averages()}


def test_a_kernel_is_recorded_when_it_is_launched():
    """By the hook that Triton's launcher calls."""
    launched = triton.knobs.runtime.launch_enter_hook
    with recorder.recorded() as seen:
        launched(LazyDict({"name": "skiparse_forward"}))
        launched(LazyDict({"name": "skiparse_dq"}))
    seen.only("skiparse_forward", "skiparse_dq")
    launched(LazyDict({"name": "skiparse_dq"}))
    seen.only()
    with pytest.raises(AssertionError, match=r"ran: \[\], not \['skiparse_dq'\]"):
        seen.only("skiparse_dq")


# The machine with the GPU has little installed.

THERE = ("torch", "triton", "numpy", "einops", "tqdm", "pytest", "pytest-xdist")


def names_of(distributions):
    """Those distributions and what they require, as far as it is installed."""
    found, todo = set(), [name.lower() for name in distributions]
    while todo:
        name = todo.pop().replace("_", "-")
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            wanted = (Requirement(x) for x in required)
            todo += [x.name.lower() for x in wanted if not x.marker or x.marker.evaluate()]
    return found


def test_they_need_no_more_than_is_there():
    there = names_of(THERE) | {"skiparse"}
    missing = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {owner.lower().replace("_", "-") for owner in owners} & there
    }
    assert {"diffusers", "transformers", "safetensors", "av"} <= missing
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(missing)}))\n"
        "import pytest, skiparse.bench.gpu\n"
        f"files = {[str(HERE / name) for name in FOR_A_GPU]}\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *files]))\n"
    )
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # those are missing too
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout + done.stderr
