"""`bench/` is a package under another name, skiparse.bench: pytest collects it, not imports it."""

import pytest


def pytest_collect_directory(path, parent):
    if path.name == "bench":
        return pytest.Dir.from_parent(parent, path=path)
    return None
