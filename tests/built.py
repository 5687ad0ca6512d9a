"""The C++ that tests need, built by CMake in build/tests: the twin, and what tests write for it."""

from pathlib import Path

import pytest

from csrc import build

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "tests"
SOURCES = FOLDER / "sources"
OPTIONS = {"SKIPARSE_TWIN": True, "SKIPARSE_SOURCES": SOURCES}


def require_tools(*, modules=True, **where):
    """Skips where the C++ of the tests cannot be built; ``modules`` of Python need pybind11."""
    reason = build.why_not(modules=modules)
    if reason is not None:
        pytest.skip(reason, **where)


def write(files):
    """Puts ``files``, paths below SOURCES and their texts, where CMake looks for them.

    Those of an earlier time in the same folders are removed, and what is the same stays untouched.
    """
    for folder in {(SOURCES / name).parent for name in files}:
        for path in folder.glob("*.cpp"):
            if str(path.relative_to(SOURCES)) not in files:
                path.unlink()
    for name, text in files.items():
        path = SOURCES / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def target(name):
    """Builds one of CMakeLists.txt, with SKIPARSE_SOURCES. Raises `csrc.build.BuildError`."""
    build.build(FOLDER, name, **OPTIONS)


def module(name, files=None):
    """The module ``name`` of Python: of CMakeLists.txt, or of the ``files`` of a test."""
    write({f"modules/{name}/{file}": text for file, text in (files or {}).items()})
    target(name)
    return build.load(name, FOLDER / f"{name}.so")


def twin():
    """The kernels as they are: what `csrc.twin.launch` calls."""
    return module("twin")


def altered(name, files):
    """Altered kernels, likewise: several files that are compiled side by side."""
    write({f"kernels/{name}/{file}": text for file, text in files.items()})
    target(name)
    return build.load("twin", FOLDER / f"{name}.so")
