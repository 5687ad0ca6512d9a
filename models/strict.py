"""A model loads from exactly its weights and its config, or not at all."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from skiparse.models.data.atomic import replacing

Made = TypeVar("Made", bound=nn.Module)

# What diffusers writes into configs: of quantized models, of averages, and where code is.
WRITTEN_BY_DIFFUSERS = frozenset(
    {
        "quantization_config",
        "decay",
        "inv_gamma",
        "min_decay",
        "optimization_step",
        "power",
        "update_after_step",
        "use_ema_warmup",
        "auto_map",
    }
)


def check_sizes(**sizes: int) -> None:
    """ValueError unless each is a whole number above 0."""
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number above 0, got {size!r}")


def write_import(folder: str | os.PathLike[str], module: str, kind: type) -> None:
    """``module.py`` in ``folder``, of one import: where diffusers looks for others' classes.

    It is run if somebody passes ``trust_remote_code=True``.
    """
    os.makedirs(folder, exist_ok=True)
    line = f"from {kind.__module__} import {kind.__name__}  # noqa: F401\n"
    with replacing(Path(folder) / f"{module}.py") as temporary:
        temporary.write_text(line, encoding="utf-8")


def filled(made: Made, model: nn.Module, new: Mapping[str, Tensor]) -> Made:
    """A model on the meta device, with copies of the tensors of another, and with ``new`` ones.

    Args:
        made: has tensors of the same names, and those of ``new``. One with a dimension more, in
            front, has a copy in each entry of it.
        model: whole.
        new: by name.

    Returns:
        ``made``.
    """
    shapes = made.state_dict()
    state = {
        name: x.detach().expand(shapes[name].shape).clone()
        for name, x in (model.state_dict() | dict(new)).items()
    }
    made.load_state_dict(state, strict=True, assign=True)
    return made


class StrictModelMixin(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' are untyped
    """diffusers' ``ModelMixin`` and ``ConfigMixin``, which by themselves warn and go on.

    Models come from folders alone, unless ``local_files_only=False`` asks for the network.
    """

    converted_by: ClassVar[str]  # its command in `skiparse convert`

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, but from a folder.

        Raises:
            FileNotFoundError: if the path is no folder with a ``config.json``.
            ValueError: if that holds no config.
        """
        path = pretrained_model_name_or_path
        local = kwargs["local_files_only"] = kwargs.get("local_files_only") is not False
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
            ValueError: naming the keys that are not arguments of the model, nor written by
                diffusers.
        """
        if isinstance(config, dict):
            known = cls._arguments() | WRITTEN_BY_DIFFUSERS
            unknown = [k for k in config if not k.startswith("_") and k not in known]
            if unknown:
                raise ValueError(
                    f"the config has keys that {cls.__name__} does not know: {unknown}"
                )
            noted = WRITTEN_BY_DIFFUSERS - {"quantization_config"}  # of a folder, not of a model
            config = {name: value for name, value in config.items() if name not in noted}
        return super().from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As in diffusers, but strict: every weight must be in the files, and nothing else.

        Raises:
            FileNotFoundError: if the path is no folder with a ``config.json``.
            ValueError: with the first ten keys that are missing, unexpected or misshapen, if the
                path is a file, or for quantization by GGUF, of which there are no such folders.
                torch's default dtype is then what it was.
        """
        path = pretrained_model_name_or_path
        kwargs["local_files_only"] = kwargs.get("local_files_only") is not False
        if os.path.isfile(path):
            raise ValueError(f"{path} is a file; give the folder of a {cls.__name__} that holds it")
        if getattr(kwargs.get("quantization_config"), "quant_method", None) == "gguf":
            raise ValueError(
                f"quantization_config: a {cls.__name__} is not read from GGUF, which holds weights "
                "that were quantized before; take a TorchAoConfig, a QuantoConfig or a "
                "BitsAndBytesConfig of diffusers, which quantize as they load"
            )
        wants_info = kwargs.pop("output_loading_info", False)
        default = torch.get_default_dtype()
        try:
            model, info = super().from_pretrained(path, output_loading_info=True, **kwargs)
        finally:
            torch.set_default_dtype(default)  # which diffusers changes on the way
        _refuse_inexact(path, info)
        return (model, info) if wants_info else model

    @classmethod
    def from_single_file(cls, *_: Any, **__: Any) -> Any:
        """diffusers' way to load a released checkpoint, for which there is a command here.

        Raises:
            ValueError: always, naming it.
        """
        raise ValueError(
            f"a {cls.__name__} is not loaded from a single file; `skiparse convert "
            f"{cls.converted_by} IN OUT` makes a folder of it, for from_pretrained"
        )

    def _instead(self) -> str:
        """What to do, for whom diffusers' ways to choose an attention are refused."""
        return "leave it out"

    def set_attention_backend(self, backend: str) -> None:
        """diffusers' way to choose an attention kernel, which would be that of the whole process.

        Raises:
            ValueError: always, as this model has no attention of diffusers', with what to do.
        """
        raise ValueError(
            f"a {type(self).__name__} has no attention of diffusers' that {backend!r} could "
            f"compute; {self._instead()}"
        )

    def set_use_npu_flash_attention(self, valid: bool, *_: Any, **__: Any) -> None:
        """What enabling and disabling that call; as :meth:`set_attention_backend`.

        Raises:
            ValueError: unless it is to be disabled.
        """
        if valid:
            self.set_attention_backend("npu")

    def set_use_xla_flash_attention(self, valid: bool, *_: Any, **__: Any) -> None:
        """What enabling and disabling that call; as :meth:`set_attention_backend`.

        Raises:
            ValueError: unless it is to be disabled.
        """
        if valid:
            self.set_attention_backend("xla")

    def set_use_memory_efficient_attention_xformers(self, valid: bool, *_: Any, **__: Any) -> None:
        """What enabling and disabling that call; as :meth:`set_attention_backend`.

        Raises:
            ValueError: unless it is to be disabled.
        """
        if valid:
            self.set_attention_backend("xformers")

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in diffusers; beside it ``model.py``, which imports this class for ``AutoModel``."""
        write_import(save_directory, "model", type(self))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The config, with where ``AutoModel`` finds the class."""
        config = json.loads(super().to_json_string())
        config["auto_map"] = {"AutoModel": f"model.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def _arguments(cls) -> set[str]:
        return set(inspect.signature(cls.__init__).parameters)

    @property
    def arguments(self) -> dict[str, Any]:
        """What of the config makes another model of its kind."""
        return {name: value for name, value in self.config.items() if name in self._arguments()}


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
