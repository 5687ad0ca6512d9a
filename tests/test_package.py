"""`pip install .` gives the op: a pure wheel, nothing compiled, three requirements."""

import os
import subprocess
import sys
import tarfile
import time
import zipfile
from email import message_from_string
from importlib.metadata import distribution
from pathlib import Path

import pytest
from books import BOOKS, REFERENCE

ROOT = Path(__file__).parents[1]


def make_wheel(folder, **environment):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check",
         "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        check=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return make_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_is_pure_python_and_small(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < 1_000_000
    listed = zipfile.ZipFile(wheel).infolist()
    large = [x.filename for x in listed if x.file_size > 50_000]  # no file of code is
    assert not large
    names = [x.filename for x in listed]
    assert not [n for n in names if n.endswith((".so", ".cpp", ".md", ".mp4", ".safetensors"))]
    for wanted in ("skiparse/py.typed", "skiparse/backends/triton/__init__.py",
                   "skiparse/models/data/video.py", "skiparse/bench/op/cases.py"):  # fmt: skip
        assert wanted in names
    assert not [n for n in names if n.startswith(("models/", "bench/", "tests/"))]


def test_it_has_nothing_of_an_earlier_build(wheel, tmp_path):
    """A file that has moved since would be in the wheel twice."""
    moved = ROOT / "build" / "lib" / "skiparse" / "moved.py"
    moved.parent.mkdir(parents=True, exist_ok=True)
    moved.touch()
    again = make_wheel(tmp_path)
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_it_needs_no_compiler_and_only_seconds(wheel, tmp_path):
    """With nothing on PATH, and compilers that fail if one is called by its variable."""
    begin = time.monotonic()
    again = make_wheel(tmp_path, PATH=str(tmp_path), CC="/nowhere/cc", CXX="/nowhere/c++")
    assert time.monotonic() - begin < 30  # 2 alone on two cores
    assert again.name == wheel.name
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_it_requires_torch_numpy_and_einops_only(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("METADATA"))
    metadata = message_from_string(archive.read(name).decode())
    required = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert required == ["torch>=2.10", "numpy", "einops"]
    assert metadata["Requires-Python"] == ">=3.11"


def test_the_unpacked_wheel_runs_by_itself(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, skiparse, skiparse.bench, skiparse.models\n"
        f"assert skiparse.__file__.startswith({str(tmp_path)!r}), skiparse.__file__\n"
        "x = torch.ones(1, 8, 1, 16)\n"
        "print(skiparse.attention(x, x, x, skiparse.SkipPattern.group(2)).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "128.0"


def test_the_source_archive_has_what_the_documentation_is_made_of(tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*BOOKS, *REFERENCE, "docs/conf.py"} <= names


def test_nothing_we_test_with_pulls_in_torchvision():
    with pytest.raises(ImportError):
        distribution("torchvision")
