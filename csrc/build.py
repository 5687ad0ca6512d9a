"""Builds C++ of the project by CMake and Ninja, for setup.py and for the tests: CMakeLists.txt."""

from __future__ import annotations

import fcntl
import importlib.machinery
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


class BuildError(RuntimeError):
    """A configuration or compilation failed; the text is what CMake and the compiler said."""


def why_not(*, modules: bool = True) -> str | None:
    """What is missing to build anything, or None. ``modules`` of Python need pybind11 besides."""
    for tool in ("cmake", "ninja"):
        if find(tool) is None:
            return f"{tool} is missing; pip install {tool}"
    if find(os.environ.get("CXX", "c++")) is None:
        return "a C++ compiler is missing; install g++"
    if modules and importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing; pip install pybind11"
    return None


def build(folder: Path, *targets: str, **options: bool | str | Path) -> str:
    """Brings ``targets`` of CMakeLists.txt up to date in ``folder``, and returns what was said.

    ``options`` are its settings; others than the last time configure it again. Processes that build
    in one folder take turns.

    Raises:
        BuildError: with all that CMake, Ninja and the compilers said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cmake = find("cmake")
    if cmake is None or find("ninja") is None:
        raise BuildError("cmake and ninja build the C++ of skiparse; pip install cmake ninja")
    arguments = [
        f"-DCMAKE_MAKE_PROGRAM={find('ninja')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *(f"-D{name}={_text(value)}" for name, value in sorted(options.items())),
    ]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configured = folder / "arguments.json"
        said = ""
        if not configured.exists() or json.loads(configured.read_text()) != arguments:
            configured.unlink(missing_ok=True)
            said = _run([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *arguments])
            configured.write_text(json.dumps(arguments))
        return said + _run([cmake, "--build", str(folder), "--target", *targets, "--", "-k", "0"])


def install(folder: Path, prefix: Path) -> None:
    """Puts the libraries of the extension, built in ``folder``, below ``prefix``."""
    _run([str(find("cmake")), "--install", str(folder), "--prefix", str(prefix)])


def load(name: str, path: Path) -> ModuleType:
    """The module ``name`` of Python in the library ``path``; another one for each path."""
    unique = f"{path.with_suffix('')}.{name}"  # pybind11 gives the first of a name for all others
    loader = importlib.machinery.ExtensionFileLoader(unique, str(path))
    spec = importlib.util.spec_from_file_location(unique, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def find(tool: str) -> str | None:
    """Where a program is: beside this Python, which need not be on PATH, or on it."""
    places = (sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath))
    return shutil.which(tool, path=os.pathsep.join(places))


def _text(value: bool | str | Path) -> str:
    return {True: "ON", False: "OFF"}[value] if isinstance(value, bool) else str(value)


def _run(command: list[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout
