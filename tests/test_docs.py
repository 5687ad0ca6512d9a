"""What the books say is so: code runs, commands and paths exist, links lead somewhere.

And the documentation builds without a warning, with every public name in its reference.
"""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys

import pytest
import torch
from books import BOOKS, GUIDES, REFERENCE, ROOT, anchors, blocks, links, prose, quoted, text_of
from sphinx.util.inventory import InventoryFile

import skiparse
from skiparse import models
from skiparse.bench.op import cases, tables
from skiparse.cli import main
from skiparse.models import train
from skiparse.models.cluster import Cluster
from skiparse.models.train.config import load

MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("book", BOOKS)
def test_every_block_is_of_a_kind_that_is_tested(book):
    """And none begins or ends where nobody sees it."""
    if book in GUIDES:
        known = {"python", "bash", "text", "yaml", "{toctree}"}
        assert {language for language, _ in blocks(book)} <= known
    assert "```" not in prose(book)


def run(book):
    """What the Python blocks of a guide leave and print, one after another."""
    names, printed = {}, io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed):
        for language, code in blocks(book):
            if language == "python":
                exec(compile(code, book, "exec"), names)
    return names, printed.getvalue()


WITH_PYTHON = [book for book in GUIDES if any(language == "python" for language, _ in blocks(book))]


@pytest.mark.parametrize("book", WITH_PYTHON)
def test_the_python_blocks_run_one_after_another(book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names, printed = run(book)
    assert names
    if book in ("README.md", "docs/operator.md"):
        assert names["out"].shape == names["q"].shape
        assert names["text_out"].shape == names["text_q"].shape
        assert names["q"].grad.isfinite().all()
    if book == "README.md":
        assert "whole model 2.02x at most" in printed
    if book == "docs/suv.md":
        assert names["velocity"].shape == (1, 4, 2, 8, 8)
    if book == "docs/measuring.md":
        assert printed.startswith("2.547")
    if book == "docs/wfvae.md":
        assert printed.count("torch.Size") == 3
        assert names["again"].shape == names["video"].shape
    if book == "docs/training.md":
        assert names["decision"].action in ("step", "clip")


CONFIGS = [(book, code) for book in GUIDES for language, code in blocks(book) if language == "yaml"]


@pytest.mark.parametrize(("book", "code"), CONFIGS)
def test_the_configs_are_such_as_a_run_takes(book, code, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(code)
    if book == "docs/parallel.md":
        assert Cluster.load(file).devices_per_machine == 8
    else:
        assert load(file, ["--out=runs/x", "--source=clips"]).stages


def test_every_guide_with_a_promise_has_code():
    wanted = {"operator", "suv", "wfvae", "training", "measuring"}
    assert {f"docs/{name}.md" for name in wanted} | {"README.md"} <= set(WITH_PYTHON)


def test_the_shell_lines_are_commands_we_have():
    found = [
        line
        for book in GUIDES
        for language, code in blocks(book)
        if language == "bash"
        for line in code.splitlines()
    ]
    assert len(found) >= 6
    for line in found:
        words = shlex.split(line, comments=True)
        if words[:2] == ["skiparse", "bench"] and "--list" not in words:
            assert cases.select(words[2])
        elif words[0] == "skiparse":
            assert main(words[1:]) == 0
        else:
            assert words[:2] == ["pip", "install"]
            extra = re.fullmatch(r"\.(\[(\w+)\])?", words[2])
            assert extra
            assert extra[2] is None or f"\n{extra[2]} = [" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("book", [book for book in BOOKS if book != "CHANGELOG.md"])
def test_what_is_to_be_made_is_in_the_makefile(book):
    said = [*quoted(book), *(line for _, code in blocks(book) for line in code.splitlines())]
    targets = {t for each in said for t in re.findall(r"^\s*make ([\w-]+)", each)}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in targets), targets
    if book == "README.md":
        assert {"demo", "test", "docs"} <= targets


def test_ci_runs_the_readme_test_command():
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "exec make test"


@pytest.mark.parametrize("book", ["README.md", "docs/measuring.md"])
def test_the_generated_tables_are_fresh(book):
    assert tables.render(text_of(book)) == text_of(book), "run `make readme`"


def test_what_is_told_in_short_is_told_at_length():
    short = tables.benchmark(wanted=tables.in_short).splitlines()
    assert 0 < len(short) < len(tables.benchmark().splitlines())
    assert set(short) <= set(text_of("docs/measuring.md").splitlines())


@pytest.mark.parametrize("text", ["no table", "<!-- backends -->\nno end"])
def test_tables_must_be_marked(text):
    with pytest.raises(ValueError, match="add"):
        tables.render(text)


def test_the_readme_stays_short():
    assert len(text_of("README.md").splitlines()) <= 143


# Links.


@pytest.mark.parametrize("book", [*BOOKS, *REFERENCE])
def test_links_lead_somewhere(book):
    for target in links(book):
        path, _, anchor = target.partition("#")
        there = ((ROOT / book).parent / path).resolve() if path else ROOT / book
        assert there.exists(), f"{book}: {target}"
        if anchor:
            assert anchor in anchors(there.relative_to(ROOT)), f"{book}: {target}"


# Paths.

SUFFIX = r"\.(?:py|md|h|cpp|sh|txt|toml|yaml|json|jsonl)"
PATH = re.compile(rf"(?:[\w.-]+/)+(?:[\w.*-]+(?:{SUFFIX})?)?|[\w-]+{SUFFIX}")
MADE = ("build/", "bench/local/", "demo_out/", "runs/", "gpu_out/")  # by commands, and in no commit


def named(book):
    """Every path in backticks of a book, with the folder in which it is to be looked for first."""
    return [each for each in quoted(book) if PATH.fullmatch(each) and not each.startswith(MADE)]


def is_there(path, *folders):
    return any(any(folder.glob(path.rstrip("/"))) for folder in folders)


# In folders of data, runs and models.
OF_USERS = {
    "data.txt",
    "errors.txt",
    "statistics.json",
    "scan.json",
    "sampling.json",
    "skiparse.json",
}


@pytest.mark.parametrize("book", [*GUIDES, "CONTRIBUTING.md", "tests/ptx/README.md"])
def test_every_path_that_is_named_exists(book):
    """From the root, or from where the book lies; a bare name may be that of files in several."""
    for path in set(named(book)) - OF_USERS:
        below = [ROOT / each for each in ("skiparse", "models", "bench") if "/" not in path]
        found = is_there(path, ROOT, (ROOT / book).parent) or is_there(f"**/{path}", *below)
        assert found, f"{book}: {path}"


def lists_of_files():
    """The blocks of CONTRIBUTING that tell of files: a path, and after it what is in it."""
    for language, code in blocks("CONTRIBUTING.md"):
        if language == "text":
            here = ROOT
            for line in code.splitlines():
                first, _, told = line.partition(" ")
                here = ROOT / first if first else here
                yield here, bool(first), told.strip()


def test_the_lists_of_files_are_those_of_the_folders():
    count = 0
    for here, _, told in lists_of_files():
        assert here.exists(), here
        folder = here if here.is_dir() else here.parent
        for name in re.findall(rf"[\w/.]+{SUFFIX}", told):
            count += 1
            assert is_there(name, folder, folder.parent, ROOT, ROOT / "models"), f"{here}: {name}"
    assert count > 60


def defined(path):
    """The names of a file, those of a class behind its own; of C++ every word."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\w+", text))
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if name := getattr(node, "name", None):
            found |= {name, *(f"{name}.{each.name}" for each in getattr(node, "body", ())
                              if isinstance(each, ast.FunctionDef))}  # fmt: skip
    return found


def test_the_ways_through_the_code_name_what_is_there():
    """What does the work is named before a colon."""
    count = 0
    for here, first, told in lists_of_files():
        name = re.match(r"([\w.]+): ", told)
        if first and name and here.is_file():
            count += 1
            assert name[1] in defined(here), f"{here}: {name[1]}"
    assert count >= 33


# The reference.


def public(path):
    """The public functions and classes of a file, told by their docstrings or not."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    body = ast.parse(path.read_text()).body
    return [n.name for n in body if isinstance(n, kinds) and not n.name.startswith("_")]


def modules():
    """The modules of models/ that can be used from Python, with their files."""
    for path in sorted((ROOT / "models").rglob("*.py")):
        if path.stem not in ("__init__", "commands"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(("skiparse", *parts)), path


@pytest.fixture(scope="module")
def inventory(tmp_path_factory):
    """What is in the reference, by full name; building it must not warn."""
    out = tmp_path_factory.mktemp("docs")
    options = "-m sphinx -q -W -E --keep-going -c docs ."
    assert options in MAKEFILE, "`make docs` builds it as this does"
    line = [sys.executable, *options.split(), str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = InventoryFile.loads((out / "objects.inv").read_bytes(), uri="")
    return {
        name: item.uri for kind, items in found.data.items() if kind[:3] == "py:"
        for name, item in items.items()
    }  # fmt: skip


def test_the_documentation_builds_and_has_every_public_name(inventory):
    wanted = {f"skiparse.{name}" for name in skiparse.__all__}
    pattern = ("skiparse.pattern", ROOT / "skiparse" / "pattern.py")
    for name, path in (pattern, *modules()):
        wanted |= {name, *(f"{name}.{each}" for each in public(path))}
    missing = wanted - set(inventory)
    assert not missing, sorted(missing)


def test_what_packages_offer_is_what_is_told_of(inventory):
    for package in (models, train):
        for name in package.__all__:
            thing = getattr(package, name)
            assert f"{thing.__module__}.{thing.__qualname__}" in inventory
