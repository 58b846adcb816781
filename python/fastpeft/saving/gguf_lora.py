"""LoRA adapters as GGUF files that llama.cpp applies (`llama-cli --lora`)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..files.checks import PREFIX, list_some
from ..files.gguf_report import A_SUFFIX, B_SUFFIX
from ..files.gguf_write import GGUFPart, GGUFValue, write_gguf_file
from ..files.safetensors import check_finite
from ..weights.gguf_names import GGUFNames
from .export import beyond_plain_lora, fold, read_adapter

_A, _B = ".lora_A.weight", ".lora_B.weight"


def export_gguf_lora(
    adapter: Any, base: str | os.PathLike[str], out: str | os.PathLike[str], adapter_name: str = "default"
) -> dict[str, Any]:  # fmt: skip
    """Write a LoRA adapter as a GGUF file in float32; return its architecture, alpha, r and names of tensors.

    adapter: a PeftModel or a folder. base: its base as a GGUF file, or as a folder or Hub id of a family that is read
    from such files; only headers are read. llama.cpp multiplies by alpha / r: rsLoRA and patterns are folded as
    `export_for_serving` does. Rows of B are in the order of the base's file. Raises ValueError for what no such file
    can say (DoRA, other methods, modules_to_save, embeddings) and for layers that the file does not have, and
    WriteError where there is no room; nothing is written then.
    """
    config, state = read_adapter(adapter, adapter_name)
    if reasons := beyond_plain_lora(config, state):
        raise ValueError(f"this adapter has no form for llama.cpp, merge it into the model: {'; '.join(reasons)}")
    folded, plain = fold(config, {key: value.detach().float().cpu() for key, value in state.items()})
    check_finite(folded, f"{os.fspath(out)} is not written")
    alpha = float(plain["lora_alpha"])
    names = GGUFNames.of(base)
    parts: dict[str, GGUFPart] = {}
    lost = []
    for key in sorted(key for key in folded if key.endswith(_A)):
        path = key.removesuffix(_A).removeprefix(PREFIX)
        name = names.name(path)
        if name is None:
            lost.append(path)
            continue
        a, b = folded[key], folded[key.removesuffix(_A) + _B]
        if (found := (len(b), a.shape[1])) != (wanted := names.shape(path)):
            raise ValueError(f"{path}: the adapter is for a layer of {found}, (out, in), and the base has {wanted}")
        if (turned := names.to_file(name, b)) is None:
            raise ValueError(f"{path}: llama.cpp has other values for {name} than transformers, not only another order")
        parts[name + A_SUFFIX], parts[name + B_SUFFIX] = _float32(a), _float32(turned)
    if lost:
        raise ValueError(f"llama.cpp has no tensor of its own for {list_some(lost)} of this base")
    values = {
        "general.type": GGUFValue("adapter", "STRING"),
        "adapter.type": GGUFValue("lora", "STRING"),
        "adapter.lora.alpha": GGUFValue(alpha, "FLOAT32"),
    }
    write_gguf_file(out, names.architecture, values, parts)
    return {"architecture": names.architecture, "alpha": alpha, "r": plain["r"], "tensors": list(parts)}


def _float32(w: Tensor) -> GGUFPart:
    values: Tensor = w.to(torch.float32).contiguous()
    make: Callable[[], Any] = values.numpy
    return GGUFPart("F32", tuple(values.shape), make)
