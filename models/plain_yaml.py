"""YAML that says what it seems to: a key that is there twice is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Once(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is untyped
    """YAML in which no key is there twice: by itself the last one would win, without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """As in PyYAML; a YAMLError with line and column for a key that was there before."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is there twice; leave one", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """What a file holds.

    Raises:
        ValueError: if it is no YAML, or has a key twice.
        OSError: if it cannot be read.
    """
    try:
        return yaml.load(file.read_text("utf-8"), _Once)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
