"""llama.cpp's names for the layers of a base, and the order in which it has their rows."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..files.gguf_file import GGUFFile, is_gguf, read_gguf
from .gguf_config import ARCHITECTURES, gguf_config, turn_frequencies
from .gguf_layers import Naming
from .load_nf4 import parameters_on_meta
from .quantize_plan import is_conv1d


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
        architecture = next((a for a, families in ARCHITECTURES.items() if config.model_type in families), None)
        if architecture is None:
            known = ", ".join(family for families in ARCHITECTURES.values() for family in families)
            raise ValueError(f"a base of family {config.model_type!r} is not known as a GGUF file; those that are: "
                             f"{known}")  # fmt: skip
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
    """transformers' model of a file, its parameters on the meta device. Raises AdapterFileError as `gguf_config`."""
    model = _empty(gguf_config(file), auto_class, dtype=dtype or torch.float32, **options)
    turn_frequencies(file, model)
    return model


def _empty(config: Any, auto_class: Any = None, **options: Any) -> Any:
    import transformers

    with parameters_on_meta():
        return (auto_class or transformers.AutoModelForCausalLM).from_config(config, **options)
