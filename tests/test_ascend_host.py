"""The host side of the AscendC kernels builds as far as a machine without CANN can tell.

The torch operators are compiled against the real headers and library of torch_npu, which
`make test` unzips into build/. They are never imported: without CANN that fails. A script stands
in for CANN's compiler.
"""

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

import built
import pytest
import torch
from fake_torch_npu import BACKWARD, BACKWARD_V3, FORWARD, FORWARD_V3

from csrc import build
from csrc.twin import launch
from skiparse import SkipPattern, list_backends
from skiparse.backends import Inputs, Outputs, ascendc
from skiparse.testing import check, make_problem, run

ROOT = Path(__file__).parents[1]
NPU = ROOT / "build" / "torch_npu" / "unzipped"
HOST = ROOT / "csrc" / "host"

# Takes the command line of CANN's compiler, keeps it beside itself, and makes what is asked for,
# with the functions of csrc/host/launch.h and nothing in them.
BISHENG = """#!/bin/sh
printf '%s\\n' "$@" > "$0.arguments"
how=-shared
for argument; do
    case "$argument" in -c) how=-c;; esac
    if [ "$previous" = -o ]; then out="$argument"; fi
    previous="$argument"
done
g++ -x c++ - $how -fPIC -o "$out" << 'end'
extern "C" {
int skiparse_ascend_cores() { return 1; }
void skiparse_attention_fwd() {}
void skiparse_attention_bwd() {}
}
end
"""
PLACES = (
    "bin",
    "compiler/ccec_compiler/bin",
    "tools/ccec_compiler/bin",
    "x86_64-linux/ccec_compiler/bin",
    "aarch64-linux/ccec_compiler/bin",
)
FLAGS = {"--npu-arch=dav-2201", "-std=c++17", "-O2", "--cce-auto-sync=off"}


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
def tools():
    built.require_tools()


def install_bisheng(folder):
    """A stand-in for CANN's compiler in ``folder``; where it writes its arguments."""
    compiler = folder / "bisheng"
    folder.mkdir(parents=True, exist_ok=True)
    compiler.write_text(BISHENG)
    compiler.chmod(0o755)
    return folder / "bisheng.arguments"


@pytest.fixture(scope="module")
def cann(tools, tmp_path_factory):
    """A folder with nothing in it but a stand-in for bisheng."""
    folder = tmp_path_factory.mktemp("cann")
    install_bisheng(folder / "bin")
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


def test_asked_for_without_cann_the_build_fails_at_once_and_says_what_is_missing(tools, tmp_path):
    start = time.monotonic()
    done = pip(["install", "--target"], tmp_path / "here", HOME=str(tmp_path))
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    assert "ASCEND_HOME_PATH" in done.stderr
    assert "https://www.hiascend.com/cann" in done.stderr
    assert "Unset the variable" in done.stderr
    assert not (tmp_path / "here").exists()


def test_without_cmake_the_build_says_so(tmp_path):
    """In an environment whose Python has no cmake of its own, and none on PATH."""
    code = (
        "import sysconfig, runpy; sysconfig.get_path = lambda *_: '/nowhere'\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "SKIPARSE_BUILD_ASCEND": "1"},
    )
    assert done.returncode != 0
    assert "cmake is missing; pip install cmake" in done.stderr
    assert "Unset the variable" in done.stderr


@pytest.fixture
def quiet(tools, tmp_path, monkeypatch):
    """No CANN to be seen: neither named, nor in the usual places, nor on PATH."""
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return tmp_path / "cann"


def build_kernels(tmp_path):
    return build.build(tmp_path / "build", "skiparse_ascend", SKIPARSE_ASCEND=True)


@pytest.mark.parametrize("place", PLACES)
def test_the_compiler_is_found_wherever_a_toolkit_has_it(quiet, tmp_path, monkeypatch, place):
    arguments = install_bisheng(quiet / place)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(quiet))
    said = build_kernels(tmp_path)
    assert f"compiler: {quiet / place / 'bisheng'}" in said
    given = arguments.read_text().splitlines()
    assert {"-xasc", "-fPIC", "-shared"} | FLAGS <= set(given)
    assert str(HOST / "launch.cpp") in given
    assert f"-I{quiet}/include" in given
    assert (tmp_path / "build" / "libskiparse_ascend.so").exists()


def test_the_compiler_on_path_comes_first(quiet, tmp_path, monkeypatch):
    for place in PLACES:
        install_bisheng(quiet / place)
    install_bisheng(tmp_path / "path")
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(quiet))
    assert f"compiler: {tmp_path / 'path' / 'bisheng'}" in build_kernels(tmp_path)


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("ASCEND_HOME_PATH", "anywhere"),
        ("ASCEND_TOOLKIT_HOME", "anywhere"),
        (None, "home/Ascend/cann"),
        (None, "home/Ascend/ascend-toolkit/latest"),
    ],
)
def test_the_toolkit_is_found(quiet, tmp_path, monkeypatch, variable, folder):
    cann = tmp_path / folder
    install_bisheng(cann / "bin")
    if variable is not None:
        monkeypatch.setenv(variable, str(cann))
    assert f"CANN: {cann}, compiler: {cann}/bin/bisheng" in build_kernels(tmp_path)


def test_without_a_toolkit_the_error_lists_all_places(quiet, tmp_path, monkeypatch):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "nothing"))
    with pytest.raises(build.BuildError) as error:
        build_kernels(tmp_path)
    home = tmp_path / "home" / "Ascend"
    usual = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
    for place in (tmp_path / "nothing", *usual, home / "cann", home / "ascend-toolkit/latest"):
        assert f"\n    {place}\n" in str(error.value)
    assert "https://www.hiascend.com/cann" in str(error.value)


def test_without_a_compiler_the_error_lists_all_places(quiet, tmp_path, monkeypatch):
    quiet.mkdir()
    monkeypatch.setenv("ASCEND_HOME_PATH", str(quiet))
    with pytest.raises(build.BuildError) as error:
        build_kernels(tmp_path)
    for place in ("/usr/bin", "/bin", *(quiet / place for place in PLACES)):
        assert f"\n    {place}\n" in str(error.value)
    assert "set_env.sh" in str(error.value)


# The CMake package ASC as CANN has it, as far as CMake asks for it: a language with its compiler.
ASC = {
    "ASCConfig.cmake": "list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})",
    "CMakeDetermineASCCompiler.cmake": """
set(CMAKE_ASC_SOURCE_FILE_EXTENSIONS asc)
set(CMAKE_ASC_COMPILER_ENV_VAR ASC)
configure_file(${CMAKE_CURRENT_LIST_DIR}/CMakeASCCompiler.cmake.in
    ${CMAKE_PLATFORM_INFO_DIR}/CMakeASCCompiler.cmake @ONLY)
""",
    "CMakeASCCompiler.cmake.in": """
set(CMAKE_ASC_COMPILER "@CMAKE_ASC_COMPILER@")
set(CMAKE_ASC_COMPILER_LOADED 1)
set(CMAKE_ASC_SOURCE_FILE_EXTENSIONS @CMAKE_ASC_SOURCE_FILE_EXTENSIONS@)
set(CMAKE_ASC_OUTPUT_EXTENSION .o)
""",
    "CMakeTestASCCompiler.cmake": "set(CMAKE_ASC_COMPILER_WORKS 1)",
    "CMakeASCInformation.cmake": """
set(CMAKE_ASC_OUTPUT_EXTENSION .o)
set(CMAKE_INCLUDE_FLAG_ASC -I)
set(CMAKE_ASC_COMPILE_OPTIONS_PIC -fPIC)
set(CMAKE_ASC_FLAGS "--npu-arch=${CMAKE_ASC_ARCHITECTURES}")
set(CMAKE_ASC_COMPILE_OBJECT "<CMAKE_ASC_COMPILER> <DEFINES> <INCLUDES> \
-std=c++${CMAKE_ASC_STANDARD} <FLAGS> -o <OBJECT> -c --asc-aicore-lang <SOURCE>")
set(CMAKE_ASC_CREATE_SHARED_LIBRARY "${CMAKE_CXX_COMPILER} -shared -o <TARGET> <OBJECTS>")
set(CMAKE_ASC_INFORMATION_LOADED 1)
""",
}


@pytest.mark.parametrize(
    "place", ["lib64/cmake", "x86_64-linux/lib64/cmake", "lib64/cmake/asc", "of set_env.sh"]
)
def test_the_kernels_are_the_language_asc_where_cann_has_it(quiet, tmp_path, monkeypatch, place):
    arguments = install_bisheng(quiet / PLACES[3])
    if place == "of set_env.sh":
        monkeypatch.setenv("CMAKE_PREFIX_PATH", str(quiet / place))
    (quiet / place).mkdir(parents=True)
    for name, text in ASC.items():
        (quiet / place / name).write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(quiet))
    assert f"Kernels as the language ASC, of {quiet / place}" in build_kernels(tmp_path)
    given = arguments.read_text().splitlines()
    assert {"--asc-aicore-lang", "-fPIC", str(HOST / "launch.cpp")} | FLAGS <= set(given)
    assert f"-I{quiet}/include" in given
    assert (tmp_path / "build" / "libskiparse_ascend.so").exists()


def test_without_torch_npu_the_error_says_how_to_build(quiet, tmp_path, monkeypatch):
    install_bisheng(quiet / "bin")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(quiet))
    with pytest.raises(build.BuildError) as error:
        build.build(tmp_path / "build", "all", SKIPARSE_ASCEND=True, SKIPARSE_TORCH=True)
    said = " ".join(str(error.value).split())
    assert f"no torch_npu for {sys.executable}: pip install torch_npu" in said
    assert "--no-build-isolation" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to build"),
        ({"SKIPARSE_TORCH": True}, "set SKIPARSE_ASCEND to ON too"),
        ({"SKIPARSE_RECORDER": True, "SKIPARSE_SOURCES": "x"}, "set SKIPARSE_TWIN to ON too"),
    ],
)
def test_options_that_do_not_fit_are_refused(tools, tmp_path, options, message):
    with pytest.raises(build.BuildError) as error:
        build.build(tmp_path, "all", **options)
    assert message in " ".join(str(error.value).split())


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
    assert sources | {"csrc/pattern.h", "csrc/build.py", "CMakeLists.txt", "setup.py"} <= names


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


# Clang as if for CUDA knows two sides and who may call whom, and needs nothing of CUDA for that.
# No check of clang-tidy's own is wanted, but one it must have.
AS_IF_FOR_CUDA = (
    "-x", "cuda", "--cuda-gpu-arch=sm_90", "-nocudainc", "-nocudalib", "-std=c++17",
    "-ferror-limit=0", "-Xclang", "-fno-cuda-host-device-constexpr",
)  # fmt: skip


@pytest.fixture(scope="module")
def sides(torch_npu):
    """The errors of one side in the kernels and their launches, of the C++ in a folder."""
    tidy = build.find("clang-tidy")
    if tidy is None:
        reason = "clang-tidy is missing, which tells host and device apart; pip install clang-tidy"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    acl = torch_npu / "torch_npu" / "include" / "third_party" / "acl" / "inc"

    def errors(csrc, side):
        command = [
            *(tidy, "--checks=-*,bugprone-inaccurate-erase", csrc / "host" / "launch.cpp", "--"),
            *(*AS_IF_FOR_CUDA, f"--cuda-{side}-only", f"-I{csrc / 'twin' / 'sides'}", f"-I{acl}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "launch.cpp" in done.stdout + done.stderr  # it was looked at
        lines = re.findall(r"^(\S+?):(\d+):\d+: error: (.*) \[", done.stdout, re.MULTILINE)
        found = set()
        for path, line, message in lines:
            # The twin is on both sides by force, and what it calls of C++ is the host's.
            place = Path(path).resolve()
            if "'device' and 'global' attributes are not compatible" in message:
                continue  # a kernel of CUDA has the one, and one of CANN both
            if place.is_relative_to(csrc) and not place.is_relative_to(csrc / "twin"):
                found.add(f"{place.name}:{line}: {message}")
        return found

    return errors


# All of the launcher but `<<<>>>`: what it launches takes what it is given, by the twin's kernels,
# and is counted instead. Two functions stand in for CANN's.
LAUNCHER = """
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

static std::vector<uint32_t> blocks_of;
#define SKIPARSE_LAUNCH(kernel, blocks, stream) \\
    blocks_of.push_back(blocks), (void)(stream), \\
    [](auto... a) { if (blocks_of.empty()) kernel(a...); }
#include "../host/launch.cpp"

static int last_error = 0, limits[2];
extern "C" aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type,
                                           uint32_t* value) {
    *value = limits[type];
    return limits[type] > 0 ? 0 : 507000;
}
extern "C" aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return last_error; }

PYBIND11_MODULE(launcher, m) {
    m.def("cores", [](int cube, int vector) {
        limits[0] = cube;
        limits[1] = vector;
        SkiparseCores cores;
        const int error = skiparse_ascend_cores(nullptr, &cores);
        return std::make_tuple(error, cores.cube, cores.vector);
    });
    m.def("launch", [](bool backward, int64_t batch, int64_t cube, int64_t vector, int error) {
        last_error = error;
        blocks_of.clear();
        const SkiparseCores cores{cube, vector};
        skiparse::BackwardTiling b{};
        b.forward.batch = batch;
        b.forward.tokens = b.forward.head_dim = 64;
        b.forward.heads = b.forward.sparsity = b.forward.run = b.most_in_part = 1;
        const skiparse::ForwardPointers p{};
        const skiparse::ForwardScratch scratch{};
        const skiparse::BackwardPointers bp{};
        const skiparse::BackwardScratch bs{};
        const int found =
            backward ? skiparse_attention_bwd(nullptr, &cores, &b, 1, &bp, &bs)
                     : skiparse_attention_fwd(nullptr, &cores, &b.forward, 1, 0, &p, &scratch);
        return std::make_tuple(found, blocks_of);
    });
}
"""


@pytest.fixture(scope="module")
def launcher(torch_npu):
    folder = built.SOURCES / "modules" / "launcher"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "acl").unlink(missing_ok=True)
    acl = torch_npu / "torch_npu" / "include" / "third_party" / "acl" / "inc" / "acl"
    (folder / "acl").symlink_to(acl)
    return built.module("launcher", {"launcher.cpp": LAUNCHER})


def test_a_stream_that_is_given_few_cores_gets_no_more_blocks(launcher):
    """A mixed kernel waits for vector cores that a block of it must have."""
    for cube, vector, blocks in ((24, 48, 24), (20, 40, 20), (24, 10, 5), (3, 48, 3), (4, 1, 0)):
        assert launcher.cores(cube, vector) == (0, blocks, vector)
    assert launcher.cores(0, 48)[0] == 507000


def test_a_launch_that_fails_is_reported(launcher):
    for error in (0, 507035):
        assert launcher.launch(False, 1, 5, 11, error) == (error, [11, 5])
        assert launcher.launch(True, 1, 5, 11, error) == (error, [11, 11, 5, 11])
        assert launcher.launch(False, 0, 5, 11, error) == (0, [])


@pytest.mark.parametrize("side", ["host", "device"])
def test_host_and_device_call_what_is_theirs(sides, side):
    """What CANN's compiler would refuse, `<<<>>>` and its arguments among it."""
    assert sides(ROOT / "csrc", side) == set()


@pytest.mark.parametrize(
    ("side", "file", "old", "new", "error"),
    [
        (
            *("host", "pattern.h", "BOTH __host_aicore__", "BOTH __aicore__"),
            r"launch.cpp:\d+: reference to __device__ function 'tasks' in __host__ function",
        ),
        (
            *("host", "pattern.h", "BOTH __host_aicore__", "BOTH __aicore__"),
            r"launch.h:\d+: no matching function for call to 'most_stacks'",
        ),
        (
            *("device", "pattern.h", "BOTH __host_aicore__", "BOTH"),
            r"rows.h:\d+: no matching function for call to 'runs_at'",
        ),
        (
            *("device", "ascend/products.h", "__aicore__ __inline__", "__inline__"),
            r"attention_fwd.cpp:\d+: reference to __host__ function 'GiveLeft' in __device__",
        ),
        (
            *("host", "host/launch.cpp", "nullptr, stream>>>", "stream, nullptr, 1>>>"),
            r"launch.cpp:\d+: too many execution configuration arguments",
        ),
    ],
)
def test_planted_calls_across_are_found(sides, tmp_path, side, file, old, new, error):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found = sides(tmp_path / "csrc", side)
    assert [x for x in found if re.match(error, x)], found


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


def test_the_operators_of_torch_run_the_kernels_on_the_twin(extension, tmp_path):
    """Compiled for the device, with stand-ins for libtorch_npu.so and the kernels' library."""
    built.write({"torch_npu.cpp": LIBTORCH_NPU})
    built.target("device")
    built.target("torch_npu")
    here = tmp_path / "here"
    here.mkdir()
    shim = extension / f"_ascendc{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    for path in (shim, *(built.FOLDER / "device").glob("*.so")):
        shutil.copy(path, here)
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
def operators(tools, monkeypatch):
    """`torch.ops.skiparse_ascend` as the backend calls it, by the kernels on the twin."""

    library = built.twin()

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
