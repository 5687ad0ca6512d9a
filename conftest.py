"""`bench/` is a package under another name, skiparse.bench: pytest collects it, not imports it."""

from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


def pytest_collect_directory(path, parent):
    if path == BENCH or BENCH in path.parents:
        return pytest.Dir.from_parent(parent, path=path)
    return None
