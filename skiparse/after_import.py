"""What is handed over to another package when somebody imports it, and not before.

``import skiparse`` is light: it must not bring in ``torch.utils.flop_counter``, which imports
Triton, nor ``torch.distributed``. So what they are to know of our operators waits for them.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Call ``then(module)`` each time module ``name`` has been executed, or now if it was."""
    if name in sys.modules:
        then(sys.modules[name])
    sys.meta_path.insert(0, _Finder(name, then))


class _Finder:
    """Finds one module as Python does, and has its loader call ``then`` at the end.

    It stays, and does nothing but answer: to ask whether a module is there does not import it.
    """

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # only this spec's
        return spec
