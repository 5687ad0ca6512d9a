"""What every test runs under: an interpreter for Triton without a GPU, and NaN in fresh memory."""

import os

# For threads and processes that tests start: torch.set_num_threads holds for the thread that calls
# it, and a convolution in a new one takes as many OpenMP threads as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
# Where a test asks for two threads after all: on busy cores they sleep while they wait, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import smoke
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before any import

torch.set_num_threads(1)  # the problems are tiny; more threads only wait for each other


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """`torch.empty` gives NaN, so that a row nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=hasattr(os, "sched_getscheduler"))
def stays_out_of_real_time():
    """A library (SVT-AV1 does, for root) may make this process real-time, and all it starts.

    Two threads of that kind which wait for each other leave no core to anything else.
    """
    before = os.sched_getscheduler(0)
    yield
    after = os.sched_getscheduler(0)
    if after != before:
        os.sched_setscheduler(0, before, os.sched_param(0))
    assert after == before, f"this test changed the process's scheduling: {before} to {after}"


SWITCHES = ("cudnn", "flash", "math", "mem_efficient")


@pytest.fixture(autouse=True)
def leaves_the_switches_of_torch():
    """Which attention kernels torch may take: of the process, and two threads undo each other's."""
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHES}
    yield
    after = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHES}
    for name in SWITCHES:
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(before[name])
    assert after == before, f"this test changed torch's switches: {before} to {after}"


def pytest_ignore_collect(collection_path, config):
    """Of `-m smoke` alone, files without any are not imported: that would take half of its time."""
    alone = config.option.markexpr == "smoke" and collection_path.name.startswith("test_")
    return True if alone and collection_path.name not in smoke.FILES else None


def pytest_collection_modifyitems(config, items):
    found = {name for item in items for name in smoke.named(item.path, item.name)}
    for item in items:
        if smoke.named(item.path, item.name):
            item.add_marker(pytest.mark.smoke)
    everything = config.args_source is not pytest.Config.ArgsSource.ARGS
    if everything and config.option.markexpr == "smoke" and smoke.NAMES - found:
        raise pytest.UsageError(f"no such tests, in tests/smoke.py: {sorted(smoke.NAMES - found)}")
