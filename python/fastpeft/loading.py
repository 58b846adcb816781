"""Filling an adapter from a file. Whatever the file holds is checked before the model is touched."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint import IncompatibleKeys, load_adapter_file, set_peft_model_state_dict
from .checks import PREFIX, KeyMismatchError, list_some
from .config import PeftConfig
from .fits import make_room, unpacked
from .layer import AdapterLayer
from .sites import adapter_modules, iter_adapter_tensors


class Loaded:
    """An adapter file's content, checked against the base model."""

    def __init__(self, where: str, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
        self.where, self.config, self.tensors = where, config, tensors


def read_adapter(
    model_id: str | os.PathLike[str],
    model: nn.Module,
    config: PeftConfig | None,
    key_mapping: Mapping[str, str] | None,
    is_trainable: bool,
    options: Mapping[str, Any],
) -> Loaded:
    """Read an adapter and check it against the base model. config: use this in place of the file's."""
    passed = ("subfolder", "revision", "allow_pickle", "token", "cache_dir", "local_files_only", "force_download",
              "ignore_mismatched_sizes")  # fmt: skip
    content, tensors = load_adapter_file(
        model_id, model=None if key_mapping else model, **{k: options[k] for k in passed if k in options}
    )
    if config is None:
        content.pop("runtime_config", None)
        config = PeftConfig.from_dict(content, model_id)
        config.inference_mode = not is_trainable
    if key_mapping:
        tensors = {_renamed(key, key_mapping): value for key, value in tensors.items()}
    return Loaded(os.fspath(model_id), config, tensors)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> dict[str, torch.Tensor]:
    """The checked tensors of an adapter folder or Hub repository, by their keys in the file.

    device: where to put them; the accelerator by default, if there is one. key_mapping: expressions for keys without
    `base_model.model.`, and what takes the place of what they match. hub: as `PeftModel.from_pretrained`.
    """
    from .utils import infer_device

    tensors = load_adapter_file(model_id, **hub)[1]
    return {_renamed(k, key_mapping): t.to(device or infer_device()) for k, t in tensors.items()}


def _renamed(key: str, key_mapping: Mapping[str, str] | None) -> str:
    prefix = PREFIX if key.startswith(PREFIX) else ""
    key = key.removeprefix(prefix)
    for old, new in (key_mapping or {}).items():
        key = re.sub(old, new, key)
    return prefix + key


def fill_adapter(
    model: nn.Module,
    adapter_name: str,
    loaded: Loaded,
    is_trainable: bool,
    options: Mapping[str, Any],
) -> IncompatibleKeys:
    """Put a file's tensors into an adapter that is there. Raises before the first is put where they do not fit; with
    the option ignore_mismatched_sizes, tensors of another size stay as they were made, with a warning."""
    lenient = bool(options.get("ignore_mismatched_sizes", False))
    tensors = unpacked(model, loaded.config, loaded.tensors)
    make_room(model, adapter_name, tensors)
    own = {file: tensor for _, file, tensor in iter_adapter_tensors(model, adapter_name)}
    there = {id(tensor) for key, tensor in own.items() if key in tensors}
    missing = [key for key, tensor in own.items() if id(tensor) not in there]
    if missing:
        raise KeyMismatchError(f"{loaded.where} lacks tensors of the adapter: {list_some(missing)}")
    for key, tensor in own.items():
        value = tensors.get(key)
        # The adapter's dtype was decided by its layer; a tensor that is taken over rather than copied must have it too.
        if value is not None and value.is_floating_point():
            tensors[key] = value.to(tensor.dtype)
    for name, module in adapter_modules(model):
        if isinstance(module, AdapterLayer) and adapter_name in module.methods:
            keys = [file for _, file, _ in module.adapter_state(adapter_name)]
            values = {key: tensors[f"{name}.{key}"] for key in keys if f"{name}.{key}" in tensors}
            if lenient and any(value.shape != own[f"{name}.{key}"].shape for key, value in values.items()):
                continue
            try:
                module.methods[adapter_name].check_tensors(module.info, values)
            except ValueError as error:
                raise KeyMismatchError(f"{loaded.where}, {name}: {error}") from None
    meta = any(tensor.is_meta for tensor in own.values())
    result = set_peft_model_state_dict(
        model, tensors, adapter_name, ignore_mismatched_sizes=lenient, low_cpu_mem_usage=meta
    )
    if result.unexpected_keys:
        raise KeyMismatchError(
            f"{loaded.where} holds tensors that the adapter has no place for: {list_some(result.unexpected_keys)}"
        )
    if not is_trainable:
        model.eval()
    return result
