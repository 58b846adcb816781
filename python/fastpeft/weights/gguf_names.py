"""llama.cpp's names for the layers of a base, and the order in which it has their rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.gguf_file import GGUFFile, is_gguf, read_gguf
from .gguf_layers import Naming
from .load_nf4 import parameters_on_meta
from .quantize_plan import is_conv1d

# Families of folders whose layers llama.cpp has as transformers' tables say, by their name in transformers.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


class GGUFNames:
    """A base's layers by their paths in transformers' model. architecture: llama.cpp's name of the family."""

    def __init__(self, architecture: str, naming: Naming, model: Any, file: GGUFFile | None) -> None:
        self.architecture, self.naming, self.model, self.file = architecture, naming, model, file
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        self._names = {key: name for name, key in naming.names.items()
                       if (name in file.tensors if file is not None else key not in tied)}  # fmt: skip

    @classmethod
    def of(cls, base: GGUFFile | str | os.PathLike[str]) -> GGUFNames:
        """base: a GGUF file, read or not, or a folder or Hub id of a configuration. Reads no weight. Raises ValueError
        for a family whose files are not known to be as transformers' tables say."""
        if isinstance(base, GGUFFile) or is_gguf(base):
            file = base if isinstance(base, GGUFFile) else read_gguf(base)
            model = empty_model(file)
            return cls(str(file.values["general.architecture"]), Naming.of(file, model), model, file)
        import transformers

        config: Any = transformers.AutoConfig.from_pretrained(base)
        if config.model_type not in _ARCHITECTURES:
            raise ValueError(f"a base of family {config.model_type!r} is known by its GGUF file alone: give that file")
        architecture = _ARCHITECTURES[config.model_type]
        model = _empty(config)
        return cls(architecture, Naming.made(architecture, model), model, None)

    def name(self, path: str) -> str | None:
        """llama.cpp's name of a layer's weight; None where it has none, as a tied head."""
        return self._names.get(f"{path}.weight")

    def shape(self, path: str) -> tuple[int, int]:
        """(out, in) of a layer."""
        module = self.model.get_submodule(path)
        rows, columns = module.weight.shape
        return (columns, rows) if is_conv1d(module) else (rows, columns)

    def to_file(self, name: str, w: Tensor) -> Tensor | None:
        """Rows of w, in transformers' order, in llama.cpp's; None where the two differ by more than the order."""
        order = self.naming.rows(name, len(w))
        if order is None or not len(order):
            return None if order is None else w
        made = torch.empty_like(w)
        made[order] = w
        return made


def empty_model(file: GGUFFile, auto_class: Any = None, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """transformers' model of a file, its parameters on the meta device. Raises AdapterFileError where transformers
    cannot read its configuration."""
    import transformers

    root = Path(file.path).absolute()
    try:
        config: Any = transformers.AutoConfig.from_pretrained(str(root.parent), gguf_file=root.name)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise file.wrong(f"transformers cannot read its configuration: {' '.join(str(error).split())[:200]}") from error
    return _empty(config, auto_class, dtype=dtype or torch.float32, **options)


def _empty(config: Any, auto_class: Any = None, **options: Any) -> Any:
    import transformers

    with parameters_on_meta():
        return (auto_class or transformers.AutoModelForCausalLM).from_config(config, **options)
