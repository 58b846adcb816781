"""Merged models as GGUF files: the base's file with the tensors that a merge changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files.checks import list_some
from ..files.gguf_file import GGUFFile, gguf_package, read_gguf
from ..files.gguf_write import GGUFPart, GGUFValue, values_of, write_gguf_file
from ..weights.gguf_layers import Naming, check_places, dense
from ..weights.gguf_names import GGUFNames
from ..weights.quantize_plan import is_conv1d

MERGED_GGUF_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}  # llama.cpp's `general.file_type` of a file in such a type


def save_merged_gguf(
    model: Any, base: str | os.PathLike[str], out: str | os.PathLike[str], quant: str
) -> dict[str, Any]:  # fmt: skip
    """Write a merged dense model of a GGUF file as a GGUF file; return how many tensors changed, and of how many.

    model: transformers' own, float32, as `merge_and_unload` gives it. base: the file that it was decoded from, whose
    keys and tokenizer are copied. quant: Q8_0, Q4_0 or F16, of the matrices that differ from the base's; vectors that
    do are float32, and all else is copied byte for byte. Raises ValueError for what the file has no place for, and
    WriteError where there is no room; nothing is written then.
    """
    if quant not in MERGED_GGUF_TYPES:
        raise ValueError(f"gguf: expected one of {', '.join(MERGED_GGUF_TYPES)}, got {quant!r}")
    file = read_gguf(base)
    names = GGUFNames.of(file)
    check_places(file, names.naming)
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    parts: dict[str, GGUFPart] = {}
    kept = 0
    for name, found in file.tensors.items():
        key = names.naming.names.get(name)
        value = None if key is None else state.get(key)
        if key is None or value is None or _same(file, names.naming, name, value):
            parts[name] = GGUFPart(found.quant, found.shape, _bytes(file, name))
            kept += 1
            continue
        parts[name] = _changed(names, name, key, value.detach(), model, quant, file)
    homes = {id(state[key]) for name, key in names.naming.names.items() if name in file.tensors and key in state}
    if lost := [key for key, value in state.items() if id(value) not in homes]:
        raise file.wrong(f"it has no place for {list_some(lost)} of the merged model")
    values = {**values_of(file), "general.file_type": GGUFValue(MERGED_GGUF_TYPES[quant], "UINT32")}
    write_gguf_file(out, names.architecture, values, parts)
    file.check_unchanged()
    return {"changed": len(parts) - kept, "tensors": len(parts)}


def _same(file: GGUFFile, naming: Naming, name: str, value: Tensor) -> bool:
    """True where a model's tensor is what the file's decodes to."""
    own = dense(file, naming, name, tuple(value.shape), torch.float32)
    return own is None or torch.equal(own, value.detach().float().cpu())


def _bytes(file: GGUFFile, name: str) -> Callable[[], Any]:
    return lambda: file.bytes_of(name).numpy()


def _changed(
    names: GGUFNames, name: str, key: str, value: Tensor, model: nn.Module, quant: str, file: GGUFFile
) -> GGUFPart:  # fmt: skip
    module = model.get_submodule(key.rpartition(".")[0])
    w = value.t() if is_conv1d(module) and value.dim() == 2 else value
    turned = names.to_file(name, w.float().cpu().contiguous())
    if turned is None or tuple(turned.shape) != file.tensors[name].shape:
        raise file.wrong(f"it has other values for {key} than transformers, not only another order")
    gguf, kept = gguf_package(), turned
    chosen = quant if kept.dim() == 2 else "F32"

    def make() -> Any:
        made = gguf.quants.quantize(kept.numpy(), gguf.GGMLQuantizationType[chosen])
        if made.dtype == np.float16 and not np.isfinite(made).all():
            raise file.wrong(f"{key} of the merged model has values beyond float16's: choose Q8_0")
        return made

    return GGUFPart(chosen, tuple(kept.shape), make)
