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
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_torch_npu import BACKWARD, FORWARD

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


@pytest.fixture(scope="module")
def torch_npu():
    if not (NPU / "torch_npu" / "include").is_dir():
        reason = f"{NPU} is missing; `make test` puts torch_npu's wheel there, unzipped"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return NPU


@pytest.fixture
def cann(tmp_path):
    """A folder with nothing in it but a stand-in for bisheng."""
    if shutil.which("g++") is None or shutil.which("cmake") is None:
        pytest.skip("needs g++ and cmake")
    compiler = tmp_path / "cann" / "bin" / "bisheng"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(BISHENG)
    compiler.chmod(0o755)
    return tmp_path / "cann"


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


def test_the_extension_compiles_and_links_against_torch_npu(torch_npu, cann, tmp_path):
    """The wheel has both libraries, and torch's operators need nothing that is not there."""
    done = pip(
        ["wheel", "-w"],
        tmp_path / "wheel",
        ASCEND_HOME_PATH=str(cann),
        PYTHONPATH=str(torch_npu),
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    assert "none-any" not in wheel.name
    libraries = {n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")}
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    assert libraries == {
        f"skiparse/backends/_ascendc{suffix}",
        "skiparse/backends/libskiparse_ascend.so",
    }
    zipfile.ZipFile(wheel).extractall(tmp_path / "unpacked")
    shim = tmp_path / "unpacked" / "skiparse" / "backends" / f"_ascendc{suffix}"
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


def test_the_launcher_compiles_against_the_twin(torch_npu):
    """All but `<<<>>>`: what it launches takes what it is given, by the twin's kernels."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    headers = torch_npu / "torch_npu" / "include" / "third_party" / "acl" / "inc"
    command = ["g++", *FLAGS, f"-I{TWIN}", f"-I{headers}", "-fsyntax-only"]
    launch = "-DSKIPARSE_LAUNCH(kernel, blocks, stream)=(void)(blocks), (void)(stream), kernel"
    subprocess.run([*command, launch, HOST / "launch.cpp"], check=True)


def test_the_interface_needs_neither_torch_nor_cann():
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{HOST}"]
    source = '#include "launch.h"\n'
    subprocess.run([*command, "-x", "c++", "-"], input=source, text=True, check=True)


def test_the_fake_has_the_schemas_of_the_real_library(torch_npu):
    binary = (torch_npu / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    for schema in (FORWARD, BACKWARD):
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
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return launch.build(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def operators(library, monkeypatch):
    """`torch.ops.skiparse_ascend` as the backend calls it, by the kernels on the twin."""

    def inputs_of(*arguments):
        *tensors, sparsity, run, scale = arguments
        assert all(x.shape[-1] in (64, 128) for x in tensors[:6])
        assert all(x is None or x.is_contiguous() for x in tensors[6:])
        return Inputs(*tensors, SkipPattern(sparsity, run), scale)

    def attention(*arguments):
        return launch.forward(library, inputs_of(*arguments))

    def attention_backward(grad_out, grad_text_out, *arguments):
        tensors, outputs, settings = arguments[:8], arguments[8:12], arguments[12:]
        assert all(x.is_contiguous() for x in outputs)
        inputs = inputs_of(*tensors, *settings)
        return launch.backward(library, inputs, Outputs(*outputs), grad_out, grad_text_out)

    found = SimpleNamespace(attention=attention, attention_backward=attention_backward)
    monkeypatch.setattr(ascendc, "_operators", lambda: found)
    monkeypatch.setattr(ascendc, "why_not", lambda *_, **__: None)


@pytest.mark.parametrize("D", [40, 64, 72])
def test_the_backend_hands_over_what_the_kernels_take(operators, D):
    problem = make_problem(
        SkipPattern.group(2), B=2, N=37, T=5, D=D, dtype=torch.float16, masked=True
    )
    problem = replace(problem, mask=problem.mask.t().contiguous().t())
    check(run(problem, "ascendc"), problem)


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
