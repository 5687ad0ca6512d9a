"""Imports run one way, and `import skiparse` stays light, with or without what is optional."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom: each layer may import those before it. "backends/x" is every single backend;
# they never import each other.
LAYERS = (
    "command", "shell", "pattern", "layout", "_version", "backends", "backends/x", "testing",
    "registry", "after_import", "derivatives", "forward_mode", "ops", "functional", "pack",
    "parallel", "skiparse", "info", "models", "bench", "cli",
)  # fmt: skip
ONLY = {
    "command": set(),
    "shell": {"command"},
    "pattern": set(),
    "layout": {"pattern"},
    "backends": {"pattern"},
    "backends/x": {"pattern", "backends"},
    "registry": {"pattern", "backends"},
    "testing": {"pattern"},
    "after_import": set(),
    "derivatives": set(),
    "forward_mode": {"pattern", "backends"},
    "ops": {"pattern", "backends", "registry", "after_import", "derivatives", "forward_mode"},
    "functional": {"pattern", "ops", "registry"},
    "pack": {"pattern", "backends", "registry", "derivatives", "ops", "functional"},
    "parallel": {"pattern", "layout", "ops", "functional"},
    "models": {"skiparse", "pattern", "layout", "parallel", "command"},
}


def layer_of(module):
    """The layer of a dotted module name under `skiparse`, and the backend's name if it is one."""
    parts = module.split(".")[1:]
    if not parts:
        return "skiparse", None
    if parts[0] == "backends" and len(parts) > 1:
        return "backends/x", parts[1]
    return parts[0], None


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "skiparse" else ("skiparse", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, source=None):
    """Modules of this project that a file imports, with the line."""
    public = {"SkipPattern", "attention", "attention_with_lse", "joint_attention", "list_backends"}
    for node in ast.walk(ast.parse(source or path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "skiparse":
                    yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "skiparse":
            for name in node.names:
                direct = f"{node.module}.{name.name}"
                package = ROOT / node.module.replace("skiparse.bench", "bench").replace(
                    "skiparse.models", "models"
                ).replace(".", "/")
                is_module = (package / f"{name.name}.py").exists() or (package / name.name).is_dir()
                is_module = is_module and name.name not in public
                yield node.lineno, direct if is_module else node.module


def backward_arrows(path, source=None):
    here, backend = layer_of(module_of(path))
    found = []
    for line, module in imports(path, source):
        there, other = layer_of(module)
        same = here == there and (backend == other)
        allowed = there in ONLY[here] if here in ONLY else LAYERS.index(there) <= LAYERS.index(here)
        if not same and not allowed:
            found.append(f"{path.relative_to(ROOT)}:{line} {here} -> {there}")
    return found


# Within bench/: what rooms share imports no room, and a room those that are named here.
ROOMS = {
    "": set(),
    "op": set(),
    "models": set(),
    "experiments": set(),
    "demo": {"experiments"},
    "gpu": {"op"},
}


def room_of(module):
    """The room of a module of bench/, "" for what they share, None elsewhere."""
    parts = module.split(".")
    if parts[:2] != ["skiparse", "bench"]:
        return None
    return parts[2] if parts[2:] and parts[2] in ROOMS else ""


def arrows_between_rooms(path, source=None):
    here = room_of(module_of(path))
    return [
        f"{path.relative_to(ROOT)}:{line} {here} -> {there}"
        for line, module in imports(path, source)
        if (there := room_of(module)) and there not in {here, *ROOMS[here]}
    ]


FILES = [p for folder in ("skiparse", "models", "bench") for p in (ROOT / folder).rglob("*.py")]


def test_arrows_run_one_way():
    assert len(FILES) > 15
    wrong = [arrow for path in FILES for arrow in backward_arrows(path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("skiparse/pattern.py", "import skiparse.ops"),
        ("skiparse/layout.py", "from skiparse import parallel"),
        ("skiparse/backends/sdpa.py", "from skiparse.backends import reference"),
        ("skiparse/backends/sdpa.py", "from skiparse.backends.reference import forward"),
        ("skiparse/testing.py", "from skiparse import ops"),
        ("skiparse/functional.py", "from skiparse.backends import sdpa"),
        ("models/__init__.py", "from skiparse import ops"),
        ("models/__init__.py", "import skiparse.testing"),
        ("models/commands.py", "from skiparse.cli import COMMANDS"),
        ("models/commands.py", "from skiparse import shell"),
        ("models/train/commands.py", "from skiparse.bench.op import run"),
        ("skiparse/command.py", "from skiparse import shell"),
    ],
)
def test_a_backward_arrow_is_seen(file, line):
    assert backward_arrows(ROOT / file, line)


def test_arrows_between_rooms_run_one_way():
    files = list((ROOT / "bench").rglob("*.py"))
    assert {room_of(module_of(path)) for path in files} == set(ROOMS)
    wrong = [arrow for path in files for arrow in arrows_between_rooms(path)]
    assert not wrong, "\n".join(wrong)
    for file, line in (
        ("bench/rows.py", "from skiparse.bench.op import run"),
        ("bench/models/vae.py", "from skiparse.bench.op.run import table"),
        ("bench/experiments/toy.py", "from skiparse.bench.demo import attention"),
    ):
        assert arrows_between_rooms(ROOT / file, line)


def test_index_maths_only_in_pattern():
    """Nobody else spells a formula: no remainder of a run width or a sparsity elsewhere."""
    for path in FILES:
        if path.name == "pattern.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                assert not names & {"sparsity", "run", "w", "token", "tokens"}, (
                    f"{path.relative_to(ROOT)}:{node.lineno}"
                )


def python(code, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


HEAVY = ("triton", "diffusers", "transformers", "av", "matplotlib", "torchvision", "torch._dynamo")


def test_import_is_light():
    heavy = python(f"import sys, skiparse; print([m for m in {HEAVY} if m in sys.modules])")
    torch_only = python(f"import sys, torch; print([m for m in {HEAVY} if m in sys.modules])")
    assert heavy == torch_only
    assert "triton" not in heavy
    loaded = python("import sys, skiparse; print(*[m for m in sys.modules if 'skiparse.' in m])")
    for name in ("sdpa", "triton", "reference"):
        assert f"skiparse.backends.{name}" not in loaded


WORKS = (
    "import torch, skiparse\n"
    "x = torch.ones(1, 8, 1, 16)\n"
    "print(skiparse.attention(x, x, x, skiparse.SkipPattern.single(2)).sum().item())\n"
    "print(skiparse.list_backends())\n"
)


def test_works_without_triton():
    out = python("import sys; sys.modules['triton'] = None\n" + WORKS)
    assert out.startswith("128.0")


def test_says_how_to_get_triton(tmp_path):
    """As if it were not installed: no finder finds it."""
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'triton' else real(name, *a)\n"
        "import skiparse; print(skiparse.list_backends()['triton'])"
    )
    assert "pip install" in python(code)


def test_works_beside_a_broken_torchvision(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    assert python(WORKS, PYTHONPATH=str(tmp_path)).startswith("128.0")


@pytest.mark.parametrize("name", ["models", "bench"])
def test_folders_refuse_to_be_imported_by_their_own_name(name):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport {name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"import skiparse.{name}" in done.stderr
    python(f"import skiparse.{name}")
