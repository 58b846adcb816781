"""Does a file's adapter fit this model? Answered from configuration and header, before anything is allocated."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .safety import AdapterFileError, TensorInfo, list_some

PREFIX = "base_model.model."


class KeyMismatchError(AdapterFileError, RuntimeError):
    """Tensors that do not fit the model: missing, unexpected or of another size. The message lists them."""


def check_fits(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], model: nn.Module, where: object = "the adapter"
) -> None:
    """Raise unless the tensors of a file are exactly those that `config` asks for on `model`, in names and shapes.

    model: the base model, with or without other adapters in it; it is not changed. The adapter is laid out on the meta
    device, so that a rank of any size costs nothing. Raises KeyMismatchError that lists what is missing, unexpected or
    of another size, and whatever a configuration that cannot be used raises.
    """
    expected = expected_shapes(config, model)
    plain = _plain_shapes(config, model)
    missing = [key for key in expected if key not in tensors]
    unexpected, mismatched, wrong = [], [], []
    for key, info in tensors.items():
        shape = expected.get(key, plain.get(key.replace(".base_layer.", ".")))
        if shape is None:
            unexpected.append(key)
        elif shape != info.shape:
            mismatched.append(f"{key} {list(info.shape)}, expected {list(shape)}")
        elif key in expected and not info.dtype.is_floating_point and _is_lora(config):
            wrong.append(f"{key} {info.dtype}")
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "size mismatch for": mismatched,
        "not floating-point": wrong,
    }
    problems = [f"{label}: {list_some(keys)}" for label, keys in found.items() if keys]
    if problems:
        raise KeyMismatchError(f"{where} does not fit the model. " + ". ".join(problems))


def _is_lora(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type")).upper() == "LORA"


def expected_shapes(config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file of this configuration holds for this model, by its key in the file."""
    from .config import PeftConfig
    from .inject import plan_injection

    with warnings.catch_warnings():
        # The warnings come again, for the user, when the adapter is put in.
        warnings.simplefilter("ignore")
        settings = PeftConfig.from_dict(config)
        plan = plan_injection(model, settings, "default", low_cpu_mem_usage=True, loading=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in plan.layers:
        for name in plan.method.tensors:
            for suffix, tensor in _entries(layer.state.get(name)):
                key = plan.method.file_key(name + suffix)
                shapes[f"{PREFIX}{layer.site.name}.{key}"] = tuple(tensor.shape)
    for saved in plan.saved:
        for key, tensor in saved.module.state_dict().items():
            shapes[f"{PREFIX}{saved.site.name}.{key}"] = tuple(tensor.shape)
    return shapes


def _entries(value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        return [(f".{key}", tensor) for key, tensor in value.state_dict().items()]
    return [("", value)] if isinstance(value, Tensor) else []


def _plain_shapes(config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensors of the base model that a file may bring along: biases that were trained, and embeddings."""
    found: dict[str, tuple[int, ...]] = {}
    bias = config.get("bias", "none")
    for name, parameter in model.named_parameters():
        if bias not in (None, "none", False) and name.endswith("bias"):
            found[PREFIX + name.replace(".base_layer.", ".")] = tuple(parameter.shape)
    for name, tensor in embedding_tensors(model).items():
        found[PREFIX + name.replace(".base_layer.", ".")] = tuple(tensor.shape)
    return found


def embedding_tensors(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """The base weights of a transformers model's input and output embeddings, by their keys in memory."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    layers = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter: Any = getattr(model, name, None)
        try:
            layers.append(getter() if getter is not None else None)
        except (AttributeError, NotImplementedError):  # a model without such a layer
            continue
    bases = [getattr(layer, "base_layer", layer) for layer in layers if isinstance(layer, nn.Module)]
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if any(module is base for base in bases)
        for key, tensor in module.named_parameters(recurse=False)
    }
