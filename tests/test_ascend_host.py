"""The host side of the AscendC kernels builds as far as a machine without CANN can tell.

The torch operators are compiled against the real headers and library of torch_npu, which
`make test` unzips into build/. They are never imported: without CANN that fails. A script stands
in for CANN's compiler.
"""

import ctypes
import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_torch_npu import BACKWARD, BACKWARD_V3, FORWARD, FORWARD_V3
from torch.utils import cpp_extension

from csrc.twin import launch
from csrc.twin.launch import FLAGS, TWIN
from skiparse import SkipPattern, list_backends
from skiparse.backends import Inputs, Outputs, ascendc
from skiparse.testing import check, make_problem, run

ROOT = Path(__file__).parents[1]
NPU = ROOT / "build" / "torch_npu" / "unzipped"
HOST = ROOT / "csrc" / "host"

# Takes the command line of CANN's compiler, keeps it, and links nothing into a library that has
# the functions of csrc/host/launch.h.
BISHENG = """#!/bin/sh
printf '%s\\n' "$@" > "$(dirname "$0")/arguments"
for last; do :; done
g++ -x c++ - -shared -fPIC -o "$last" << 'end'
extern "C" {
int skiparse_ascend_cores() { return 1; }
void skiparse_attention_fwd() {}
void skiparse_attention_bwd() {}
}
end
"""


# The three functions of libtorch_npu.so that the operators call. There is no queue and no device:
# work runs at once. The host's memory counts as pinned.
LIBTORCH_NPU = """
#include <functional>
#include <string>

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/Stream.h>

struct Hooks : at::PrivateUse1HooksInterface {
    bool isAvailable() const override { return true; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
    c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
};
static const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

namespace c10_npu {
class NPUStream {
public:
    explicit NPUStream(c10::Stream stream) : stream_(stream) {}
    ~NPUStream() {}
    void* stream(bool drains_the_queue) const;

private:
    c10::Stream stream_;
};
void* NPUStream::stream(bool drains_the_queue) const {
    TORCH_CHECK(!drains_the_queue, "a launch must not wait for the queue that it is in");
    return nullptr;
}
NPUStream getCurrentNPUStream(c10::DeviceIndex) {
    return NPUStream(c10::Stream(c10::Stream::DEFAULT, c10::Device(c10::kCPU)));
}
}  // namespace c10_npu

namespace at_npu::native {
struct OpCommand {
    static void RunOpApiV2(const std::string&, const std::function<int()>&, bool);
};
void OpCommand::RunOpApiV2(const std::string&, const std::function<int()>& work, bool) {
    TORCH_CHECK(work() == 0);
}
}  // namespace at_npu::native
"""

# Runs the operators of the library that it is given, as for NPU tensors, on those of a CPU.
RUN = """
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

torch.utils.rename_privateuse1_backend("npu")
torch.ops.load_library(sys.argv[1])

from skiparse import SkipPattern
from skiparse.backends import ascendc
from skiparse.testing import check, make_problem, run

keys = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
calls = []


def as_if_on_npu(op):
    def call(*arguments):
        calls.append(op)
        return op.redispatch(keys, *arguments)

    return call


operators = SimpleNamespace(
    attention=as_if_on_npu(torch.ops.skiparse_ascend.attention.default),
    attention_backward=as_if_on_npu(torch.ops.skiparse_ascend.attention_backward.default),
)
ascendc._operators = lambda: operators
ascendc.why_not = lambda *_, **__: None
torch.set_num_threads(1)
for p, dtype, layout in (
    (SkipPattern.group(2), torch.float16, "packed"),
    (SkipPattern(3, 2), torch.bfloat16, "heads_first"),
):
    for T, masked in ((5, True), (0, False)):
        problem = make_problem(
            p, B=2, N=37, T=T, D=64, dtype=dtype, layout=layout, masked=masked
        )
        problem = replace(problem, grad_out=problem.grad_out.mT.contiguous().mT[..., :64])
        check(run(problem, "ascendc"), problem)
problem = make_problem(SkipPattern.single(2), N=37, T=5, D=64, dtype=torch.float16)
exact, rounded = (run(problem, name) for name in ("ascendc", "ascendc.half_scores"))
assert not torch.equal(exact.lse, rounded.lse)
check(rounded, problem)
print(len(calls), "calls")

problem = make_problem(SkipPattern.single(2), N=6, T=2, D=64, dtype=torch.float16)
wrong = {
    "head_dim must be 64 or 128, got 16": [x[..., :16] for x in problem.inputs],
    "q must be fp16 or bf16": [x.float() for x in problem.inputs],
    "k has shape": [problem.q, problem.k[:, :5], *problem.inputs[2:]],
    "text_v must have the dtype": [*problem.inputs[:5], problem.text_v.bfloat16()],
    "v must have last stride 1": [*problem.inputs[:2], problem.v.mT.contiguous().mT,
                                  *problem.inputs[3:]],
}
for message, inputs in wrong.items():
    try:
        operators.attention(*inputs, None, None, 2, 1, 1.0, False)
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
for mask, sparsity in ((torch.ones(1, 6), 2), (torch.ones(1, 5).bool(), 2), (None, 0)):
    try:
        operators.attention(*problem.inputs, mask, None, sparsity, 1, 1.0, False)
    except RuntimeError as error:
        assert "mask must be" in str(error) or "at least 1" in str(error), error
    else:
        raise AssertionError(mask)
try:
    operators.attention(*problem.inputs, None, None, 2, 1, -1.0, True)
except RuntimeError as error:
    assert "half_scores needs a positive scale, not -1" in str(error), error
else:
    raise AssertionError("scale")
"""


@pytest.fixture(scope="module")
def torch_npu():
    if not (NPU / "torch_npu" / "include").is_dir():
        reason = f"{NPU} is missing; `make test` puts torch_npu's wheel there, unzipped"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return NPU


@pytest.fixture(scope="module")
def cann(tmp_path_factory):
    """A folder with nothing in it but a stand-in for bisheng."""
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    folder = tmp_path_factory.mktemp("cann")
    compiler = folder / "bin" / "bisheng"
    compiler.parent.mkdir()
    compiler.write_text(BISHENG)
    compiler.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def extension(torch_npu, cann, tmp_path_factory):
    """The folder of the two libraries in the wheel that is built with them, unpacked."""
    folder = tmp_path_factory.mktemp("extension")
    done = pip(
        ["wheel", "-w"],
        folder,
        ASCEND_HOME_PATH=str(cann),
        PYTHONPATH=str(torch_npu),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    assert "none-any" not in wheel.name
    zipfile.ZipFile(wheel).extractall(folder)
    return folder / "skiparse" / "backends"


def pip(command, folder, **environment):
    arguments = ["--disable-pip-version-check", "--no-deps", "--no-build-isolation", str(ROOT)]
    return subprocess.run(
        [sys.executable, "-m", "pip", *command, str(folder), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SKIPARSE_BUILD_ASCEND": "1", "ASCEND_HOME_PATH": "", **environment},
    )


def test_asked_for_without_cann_the_build_fails_at_once_and_says_what_is_missing(tmp_path):
    start = time.monotonic()
    done = pip(["install", "--target"], tmp_path / "here")
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    assert "ASCEND_HOME_PATH" in done.stderr
    assert "https://www.hiascend.com/cann" in done.stderr
    assert "Unset the variable" in done.stderr
    assert not (tmp_path / "here").exists()


def test_a_cann_without_its_compiler_is_named(tmp_path):
    done = pip(["wheel", "-w"], tmp_path / "wheel", ASCEND_HOME_PATH=str(tmp_path))
    assert f"CANN's compiler bisheng in {tmp_path}" in done.stderr
    assert not list(tmp_path.rglob("*.whl"))


def test_the_source_distribution_has_what_the_build_needs(tmp_path):
    code = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, cwd=ROOT, capture_output=True
    )
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{p.relative_to(ROOT / 'csrc')}" for p in (ROOT / "csrc").rglob("*.cpp")}
    assert len(sources) > 5
    assert sources | {"csrc/pattern.h", "csrc/CMakeLists.txt", "setup.py"} <= names


def test_the_extension_compiles_and_links_against_torch_npu(extension):
    """The wheel has both libraries, and torch's operators need nothing that is not there."""
    shim = extension / f"_ascendc{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    assert {x.name for x in extension.glob("*.so")} == {shim.name, "libskiparse_ascend.so"}
    undefined = subprocess.run(
        ["nm", "-DC", "--undefined-only", shim], capture_output=True, text=True, check=True
    ).stdout
    for name in (
        "skiparse_attention_fwd",
        "skiparse_attention_bwd",
        "NPUStream::stream(bool)",
        "OpCommand::RunOpApiV2",
    ):
        assert name in undefined


def test_the_compiler_of_cann_is_asked_for_the_right_thing(extension, cann):
    arguments = (cann / "bin" / "arguments").read_text().splitlines()
    assert {"-xasc", "--npu-arch=dav-2201", "-std=c++17", "-fPIC", "-shared"} <= set(arguments)
    assert str(HOST / "launch.cpp") in arguments
    assert f"-I{cann}/include" in arguments
    assert Path(arguments[-1]).name == "libskiparse_ascend.so"


def test_cmake_says_what_is_missing(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    for place, reason in (("", "source CANN's set_env.sh"), (str(tmp_path), "no bisheng in")):
        done = subprocess.run(
            ["cmake", "-S", ROOT / "csrc", "-B", tmp_path / "build"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "ASCEND_HOME_PATH": place},
        )
        assert done.returncode != 0
        assert reason in " ".join(done.stderr.split())


# All of the launcher but `<<<>>>`: what it launches takes what it is given, by the twin's kernels,
# and is counted instead. Two functions stand in for CANN's.
LAUNCHER = """
#include <cstdint>

extern "C" {
int launches = 0, last_error = 0, limits[2] = {24, 48};
uint32_t blocks_of[8];
}
#define SKIPARSE_LAUNCH(kernel, blocks, stream) \\
    blocks_of[launches++] = blocks, (void)(stream), \\
    [](auto... a) { if (launches < 0) kernel(a...); }
#include "launch.cpp"

extern "C" aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type,
                                           uint32_t* value) {
    *value = limits[type];
    return limits[type] > 0 ? 0 : 507000;
}
extern "C" aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return last_error; }
"""


@pytest.fixture(scope="module")
def launcher(torch_npu, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("launcher")
    (folder / "launcher.cpp").write_text(LAUNCHER)
    headers = torch_npu / "torch_npu" / "include" / "third_party" / "acl" / "inc"
    includes = [f"-I{path}" for path in (HOST, TWIN, headers)]
    command = ["g++", *FLAGS, "-O0", *includes, "-shared", "launcher.cpp", "-o", "launcher.so"]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "launcher.so"))


class Cores(ctypes.Structure):
    _fields_ = (("cube", ctypes.c_int64), ("vector", ctypes.c_int64))


def test_a_stream_that_is_given_few_cores_gets_no_more_blocks(launcher):
    """A mixed kernel waits for vector cores that a block of it must have."""
    limits, cores = (ctypes.c_int * 2).in_dll(launcher, "limits"), Cores()
    for cube, vector, blocks in ((24, 48, 24), (20, 40, 20), (24, 10, 5), (3, 48, 3), (4, 1, 0)):
        limits[:] = cube, vector
        assert launcher.skiparse_ascend_cores(None, ctypes.byref(cores)) == 0
        assert (cores.cube, cores.vector) == (blocks, vector)
    limits[:] = 0, 48
    assert launcher.skiparse_ascend_cores(None, ctypes.byref(cores)) == 507000


def test_a_launch_that_fails_is_reported(launcher):
    tiling = launch._Tiling(batch=1, tokens=64, text=0, heads=1, head_dim=64, sparsity=1, run=1)
    backward = launch._BackwardTiling(forward=tiling, most_in_part=1)
    pointers, scratch = launch._BackwardPointers(), (ctypes.c_void_p * 8)()
    error, launches = (ctypes.c_int.in_dll(launcher, x) for x in ("last_error", "launches"))
    blocks = (ctypes.c_uint32 * 8).in_dll(launcher, "blocks_of")
    rest = (ctypes.byref(pointers), scratch)
    cores = ctypes.byref(Cores(5, 11))
    for expected in (0, 507035):
        error.value = expected
        launches.value = 0
        given = (None, cores, ctypes.byref(tiling), 1, 0, *rest)
        assert launcher.skiparse_attention_fwd(*given) == expected
        assert blocks[: launches.value] == [11, 5]
        launches.value = 0
        given = (None, cores, ctypes.byref(backward), 1, *rest)
        assert launcher.skiparse_attention_bwd(*given) == expected
        assert blocks[: launches.value] == [11, 11, 5, 11]
    empty = launch._Tiling(batch=0, tokens=64, text=0, heads=1, head_dim=64, sparsity=1, run=1)
    assert launcher.skiparse_attention_fwd(None, cores, ctypes.byref(empty), 1, 0, *rest) == 0


def test_the_interface_needs_neither_torch_nor_cann():
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{HOST}"]
    source = '#include "launch.h"\n'
    subprocess.run([*command, "-x", "c++", "-"], input=source, text=True, check=True)


def test_the_fake_has_the_schemas_of_the_real_library(torch_npu):
    binary = (torch_npu / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    for schema in (FORWARD, BACKWARD, FORWARD_V3, BACKWARD_V3):
        assert schema.encode() + b"\0" in binary


def test_the_torch_of_the_pin_is_the_one_installed():
    pins = dict(re.findall(r"^(torch|torch_npu)==([\d.]+)", constraints(), re.MULTILINE))
    assert pins["torch"] == pins["torch_npu"] == torch.__version__.split("+")[0]


def constraints():
    return (ROOT / "constraints.txt").read_text()


def test_without_the_extension_it_says_how_to_build_it():
    reason = list_backends()["ascendc"]
    assert "without its AscendC extension" in reason
    assert "SKIPARSE_BUILD_ASCEND=1 pip install --no-build-isolation ." in reason


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels on the twin, behind the C interface of libskiparse_ascend.so too."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    path = tmp_path_factory.mktemp("kernels") / "libskiparse_ascend.so"
    command = ["g++", *FLAGS, f"-I{TWIN}", f'-DKERNELS="{TWIN / "kernels.h"}"', "-shared"]
    subprocess.run([*command, TWIN / "device.cpp", "-o", path], check=True)
    return path


def test_the_operators_of_torch_run_the_kernels_on_the_twin(extension, library, tmp_path):
    """Compiled for the device, with stand-ins for libtorch_npu.so and the kernels' library."""
    here = tmp_path / "here"
    here.mkdir()
    shim = extension / f"_ascendc{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    for path in (shim, library):
        shutil.copy(path, here)
    (tmp_path / "npu.cpp").write_text(LIBTORCH_NPU)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", *includes, tmp_path / "npu.cpp",
         "-o", here / "libtorch_npu.so"],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, here / shim.name],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LD_LIBRARY_PATH": str(here)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "12 calls"


@pytest.fixture
def operators(library, monkeypatch):
    """`torch.ops.skiparse_ascend` as the backend calls it, by the kernels on the twin."""

    library = ctypes.CDLL(str(library))

    def inputs_of(*arguments):
        *tensors, sparsity, run, scale = arguments
        assert all(x.shape[-1] in (64, 128) for x in tensors[:6])
        assert all(x is None or x.is_contiguous() for x in tensors[6:])
        return Inputs(*tensors, SkipPattern(sparsity, run), scale)

    def attention(*arguments):
        *inputs, half_scores = arguments
        calls.append(inputs[:6])
        return launch.forward(library, inputs_of(*inputs), half_scores=half_scores)

    def attention_backward(grad_out, grad_text_out, *arguments):
        tensors, outputs, settings = arguments[:8], arguments[8:12], arguments[12:]
        assert all(x.is_contiguous() for x in outputs)
        inputs = inputs_of(*tensors, *settings)
        calls.append([*tensors[:6], grad_out])
        return launch.backward(library, inputs, Outputs(*outputs), grad_out, grad_text_out)

    calls = []
    found = SimpleNamespace(attention=attention, attention_backward=attention_backward)
    monkeypatch.setattr(ascendc, "_operators", lambda: found)
    monkeypatch.setattr(ascendc, "why_not", lambda *_, **__: None)
    return calls


@pytest.mark.parametrize("D", [40, 64, 72])
def test_the_backend_hands_over_what_the_kernels_take(operators, D):
    problem = make_problem(
        SkipPattern.group(2), B=2, N=37, T=5, D=D, dtype=torch.float16, masked=True
    )
    problem = replace(problem, mask=problem.mask.t().contiguous().t())
    check(run(problem, "ascendc"), problem)


def test_scores_in_half_are_an_option_by_name(operators):
    problem = make_problem(SkipPattern.group(2), N=37, T=5, D=64, dtype=torch.float16)
    exact, rounded = (run(problem, name) for name in ("ascendc", "ascendc.half_scores"))
    assert not torch.equal(exact.lse, rounded.lse)
    check(rounded, problem)
    with pytest.raises(RuntimeError, match="need a positive scale, not -1"):
        run(replace(problem, scale=-1.0), "ascendc.half_scores")


@pytest.mark.parametrize(
    ("apart", "copied"), [(65535, False), (70000, False), (70001, True), (140000, True)]
)
def test_rows_beyond_the_reach_of_an_instruction_are_copied_first(operators, apart, copied):
    """Single-skip of 2: every second token. The kernel would copy them row by row."""
    problem = make_problem(SkipPattern.single(2), N=6, T=2, H=1, D=64, dtype=torch.float16)
    step = apart // 2 if apart % 2 == 0 else apart  # an odd one is that of a dense problem
    if apart % 2:
        problem = replace(problem, pattern=SkipPattern.dense())
    names = ("q", "k", "v", "grad_out")
    room = {name: torch.zeros(6 * step, dtype=torch.float16) for name in names}
    spread = {
        name: x.as_strided((1, 6, 1, 64), (0, step, 64, 1)).copy_(getattr(problem, name))
        for name, x in room.items()
    }
    problem = replace(problem, **spread)
    check(run(problem, "ascendc"), problem)
    forward, backward = operators
    seen = [*forward[:3], *backward[:3], backward[-1]]
    assert {x.stride(1) for x in seen} == {64 if copied else step}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.bfloat16, "D": 128}, None),
        ({"dtype": torch.float32}, "fp16 and bf16, not torch.float32"),
        ({"dtype": torch.float16, "D": 129}, "up to 128, not 129"),
    ],
)
def test_limits(monkeypatch, arguments, reason):
    monkeypatch.setattr(ascendc, "_extension", lambda: Path("_ascendc.so"))
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    problem = make_problem(SkipPattern.single(2), N=4, **arguments)
    device = SimpleNamespace(type="npu")
    q = SimpleNamespace(device=device, dtype=problem.q.dtype, shape=problem.q.shape)
    inputs = Inputs(q, *problem.inputs[1:], None, None, problem.pattern, 1.0)
    found = ascendc.why_not(inputs)
    assert found is None if reason is None else reason in found
    assert 'not "cpu"' in ascendc.why_not(replace(inputs, q=problem.q))


def test_built_but_without_an_npu_it_says_so(monkeypatch):
    if hasattr(torch, "npu"):
        pytest.skip("torch_npu is installed")
    monkeypatch.setattr(ascendc, "_extension", lambda: Path("_ascendc.so"))
    assert "npu-smi info" in ascendc.why_not()
