"""A model loads from exactly its weights and its config, or not at all."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers import ConfigMixin, ModelMixin


def check_sizes(**sizes: int) -> None:
    """ValueError unless each is a whole number above 0."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {size!r}")


class StrictModelMixin(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' are untyped
    """diffusers' ``ModelMixin`` and ``ConfigMixin``, which by themselves warn and go on.

    Models come from folders alone, unless ``local_files_only=False`` asks for the network.
    """

    @classmethod
    def load_config(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, but from a folder.

        Raises:
            FileNotFoundError: if ``path`` is no folder with a ``config.json``.
            ValueError: if that holds no config.
        """
        local = kwargs.setdefault("local_files_only", True)
        folder = os.path.join(path, kwargs.get("subfolder") or "")
        if local and not os.path.isfile(path) and not os.path.isfile(f"{folder}/config.json"):
            raise FileNotFoundError(
                f"{os.path.normpath(folder)}/config.json is not there; give the folder of a "
                f"{cls.__name__}"
            )
        found = super().load_config(path, *args, **kwargs)
        if not isinstance(found[0] if isinstance(found, tuple) else found, dict):
            raise ValueError(f"{os.path.normpath(folder)}/config.json holds no table of settings")
        return found

    @classmethod
    def from_config(cls, config: Any = None, **kwargs: Any) -> Any:
        """As in diffusers, but unknown keys are refused.

        Raises:
            ValueError: naming the keys that are not arguments of the model.
        """
        if isinstance(config, dict):
            known = set(inspect.signature(cls.__init__).parameters)
            unknown = [k for k in config if not k.startswith("_") and k not in known]
            if unknown:
                raise ValueError(
                    f"the config has keys that {cls.__name__} does not know: {unknown}"
                )
        return super().from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but strict: every weight must be in the files, and nothing else.

        Raises:
            FileNotFoundError: if ``path`` is no folder with a ``config.json``.
            ValueError: with the first ten keys that are missing, unexpected or misshapen, or if
                ``path`` is a file.
        """
        kwargs.setdefault("local_files_only", True)
        if os.path.isfile(path):
            raise ValueError(f"{path} is a file; give the folder of a {cls.__name__} that holds it")
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        _refuse_inexact(path, info)
        return (model, info) if wants_info else model


def loaded(kind: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """A model of diffusers from a folder, with its ``from_pretrained``, but strict.

    Raises:
        ValueError: with the first ten keys that are missing, unexpected or misshapen.
    """
    model, info = kind.from_pretrained(
        path, local_files_only=True, output_loading_info=True, **kwargs
    )
    _refuse_inexact(path, info)
    return model


def _refuse_inexact(path: Any, info: Mapping[str, Iterable[str]]) -> None:
    wrong = [f"{kind}: {list(keys)[:10]}" for kind, keys in info.items() if keys]
    if wrong:
        raise ValueError(f"{path} does not hold exactly this model's weights; " + "; ".join(wrong))
