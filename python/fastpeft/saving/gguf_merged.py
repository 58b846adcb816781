"""Merged models as GGUF files: the base's file with the tensors that a merge changed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.base import PeftConfig
from ..files.checks import PREFIX, list_some
from ..files.gguf_file import GGUFFile, gguf_package, read_gguf
from ..files.gguf_write import GGUFPart, GGUFValue, values_of, write_gguf_file
from ..inject.modules import adapter_modules
from ..layer.layer import AdapterLayer
from ..weights.gguf_layers import Naming, check_places, dense
from ..weights.gguf_names import GGUFNames
from ..weights.quantize_plan import is_conv1d

MERGED_GGUF_TYPES = {"F16": 1, "Q4_0": 2, "Q8_0": 7}  # llama.cpp's `general.file_type` of a file in such a type


def save_merged_gguf(
    model: Any, base: str | os.PathLike[str], out: str | os.PathLike[str], quant: str
) -> dict[str, Any]:  # fmt: skip
    """Write a merged model of a GGUF file as a GGUF file; return how many tensors changed, and of how many.

    model: a PeftModel on `load_gguf_model(base)`, which is merged on the way, a tensor at a time, and stays as it is;
    or transformers' own, float32, as `merge_and_unload` gives it. base: the file that it is of, whose keys and
    tokenizer are copied. quant: Q8_0, Q4_0 or F16, of the matrices that have an adapter, or differ from the base's;
    vectors that do are float32, and all else is copied byte for byte. Raises ValueError for what the file has no place
    for, and WriteError where there is no room; nothing is written then.
    """
    if quant not in MERGED_GGUF_TYPES:
        raise ValueError(f"gguf: expected one of {', '.join(MERGED_GGUF_TYPES)}, got {quant!r}")
    file = read_gguf(base)
    names = GGUFNames.of(file)
    check_places(file, names.naming)
    if is_adapted(model):
        parts, kept = _by_layers(names, file, model, quant)
    else:
        parts, kept = _by_parameters(names, file, model, quant)
    values = {**values_of(file), "general.file_type": GGUFValue(MERGED_GGUF_TYPES[quant], "UINT32")}
    write_gguf_file(out, names.architecture, values, parts)
    file.check_unchanged()
    return {"changed": len(parts) - kept, "tensors": len(parts)}


def is_adapted(model: Any) -> bool:
    """True of a model with adapters, which are not merged into it."""
    return bool(getattr(model, "peft_config", None)) and any(True for _ in adapter_modules(model))


def needs_dense_merge(model: Any) -> str | None:
    """The reason why adapters cannot be merged a tensor at a time, but on a dense base alone; None where they can.

    model: with the adapters, or the configuration of one, which says less: of what kind its layers are a model knows.
    """
    for config in [model] if isinstance(model, PeftConfig) else model.peft_config.values():
        if whole := getattr(config, "modules_to_save", None):
            return f"{list_some(whole)} is trained in full"
        if config.is_prompt_learning:
            return "prompts are trained"
        if getattr(config, "bias", "none") != "none" or getattr(config, "lora_bias", False):
            return "biases are trained"
    for path, layer in [] if isinstance(model, PeftConfig) else adapter_modules(model):
        if not isinstance(layer, AdapterLayer):
            return f"{path} is trained in full"
        if layer.merged_adapters:
            return f"{path} is merged already"
        if layer.info.kind != "linear" or layer.info.transient:
            return f"{path} is no linear layer"
    return None


def _by_layers(names: GGUFNames, file: GGUFFile, model: Any, quant: str) -> tuple[dict[str, GGUFPart], int]:
    """The tensors to write, which are made one by one, and how many stay as they are."""
    if (reason := needs_dense_merge(model)) is not None:
        raise ValueError(f"{reason}: merge on a dense base")
    layers: dict[str, Any] = {f"{path.removeprefix(PREFIX)}.weight": layer for path, layer in adapter_modules(model)
                              if layer.acting}  # fmt: skip
    parts: dict[str, GGUFPart] = {}
    kept = 0
    for name, found in file.tensors.items():
        key = names.naming.names.get(name, "")
        layer = layers.pop(key, None)
        if layer is None:
            parts[name] = GGUFPart(found.quant, found.shape, _bytes(file, name))
            kept += 1
        else:
            parts[name] = GGUFPart(quant, found.shape, _merged(names, file, name, key, layer, quant))
    if layers:
        raise file.wrong(f"it has no place for {list_some(layers)} of the merged model")
    return parts, kept


def _merged(
    names: GGUFNames, file: GGUFFile, name: str, key: str, layer: Any, quant: str
) -> Callable[[], Any]:  # fmt: skip
    """A function that merges one layer when it is asked for its bytes."""
    shape = file.tensors[name].shape
    if names.naming.rows(name, shape[0]) is None or tuple(layer.info.shape) != shape:
        raise file.wrong(f"it has other values for {key} than transformers, not only another order")

    def make() -> Any:
        with torch.no_grad():
            w = layer.merged_apart()[0].float().cpu().contiguous()
        turned = names.to_file(name, w)
        assert turned is not None
        return _quantised(file, key, turned, quant)

    return make


def _by_parameters(names: GGUFNames, file: GGUFFile, model: Any, quant: str) -> tuple[dict[str, GGUFPart], int]:
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
    return parts, kept


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
    kept, chosen = turned, quant if turned.dim() == 2 else "F32"
    return GGUFPart(chosen, tuple(kept.shape), lambda: _quantised(file, key, kept, chosen))


def _quantised(file: GGUFFile, key: str, w: Tensor, quant: str) -> Any:
    gguf = gguf_package()
    made = gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType[quant])
    if made.dtype == np.float16 and not np.isfinite(made).all():
        raise file.wrong(f"{key} of the merged model has values beyond float16's: choose Q8_0")
    return made
