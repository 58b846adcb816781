"""The adapters of any model, with a PeftModel around it or without: which are active, which train, in what dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.types import warn
from ..files.checks import list_some
from ..files.offloaded import keeper
from ..inject.modules import adapter_layers, adapter_modules
from ..inject.place import LOW_PRECISION
from ..layer.base import STILL_MERGED
from ..layer.layer import AdapterLayer


def set_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Make one or several adapters of `model` active, in this order; a merged model is unmerged first, with a warning.

    inference_mode: they do not train. layer_cls: PEFT's; all adapter layers are of one class here.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    modules = [module for _, module in adapter_modules(model)]
    for module in modules:
        module.check_active(names)
    merged = [layer for _, layer in adapter_layers(model) if layer.merged_adapters]
    if merged:
        warn("Adapter cannot be set when the model is merged. Unmerging the model first.", 2)
    for layer in merged:
        layer.unmerge()
    for module in modules:
        module.set_adapter(names, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str | Sequence[str], prefix: str = "", layer_cls: Any = None
) -> list[str] | None:
    """Remove an adapter, or several, from `model` (not from `model.peft_config`), and give the adapters that are active
    now, None if there are none.

    If no active one is left, the first of the others, by name, becomes active. prefix, layer_cls: PEFT's, of no use
    here. Raises ValueError while one of them is merged, and removes none then.
    """
    names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    modules = list(adapter_modules(model))
    if merged := sorted({name for _, module in modules for name in module.merged_adapters}.intersection(names)):
        raise ValueError(STILL_MERGED.format(merged))
    layers_first = sorted(modules, key=lambda item: not isinstance(item[1], AdapterLayer))  # those know only theirs
    active = list(dict.fromkeys(name for _, module in layers_first for name in module.active_adapters))
    left = [name for name in active if name not in names]
    others = sorted({name for _, module in modules for name in module._get_available_adapters()}.difference(names))
    if active and not left and others:
        left = others[:1]
        gone = ", ".join(active)
        warn(f"Adapter {gone} was active which is now deleted. Setting active adapter to {left[0]}.", 2)
    # Chosen once for the model, not by each layer for itself: layers need not have the same adapters.
    if left != active:
        set_adapter(model, left)
    for _, module in modules:
        for name in names:
            module.delete_adapter(name)
    return left or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Turn gradients of adapters on or off without changing which are active."""
    for _, module in adapter_modules(model):
        module.set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Make an adapter's tensors of 16 and 8 bits float32; they are new parameters."""
    for _, layer in adapter_layers(model, adapter_name) if autocast_adapter_dtype else ():
        for container in [c for _, c in layer.containers() if adapter_name in c]:
            entry = container[adapter_name]
            tensors = [entry] if isinstance(entry, Tensor) else [*entry.parameters(), *entry.buffers()]
            if any(tensor.dtype in LOW_PRECISION for tensor in tensors):
                container.to_entry(adapter_name, None, torch.float32)


def check_biases(model: nn.Module, mode: str) -> None:
    """Raise ValueError if an adapter that trains biases would train those that accelerate brings for a forward."""
    if mode in (None, "none", False):
        return
    if lost := [n for n, m in model.named_modules() if keeper(m) is not None and m._parameters.get("bias") is not None]:
        raise ValueError(
            f"bias={mode!r} would train biases that accelerate offloads, {list_some(lost)}: what a hook brings for a "
            "forward has no gradient after it. Load the base model without offloading, or use bias='none'."
        )


def repeats(kwargs: Mapping[str, Any], model: nn.Module) -> int:
    """How often `generate` repeats the rows of its inputs, given its arguments."""
    names = ("num_beams", "num_return_sequences")
    if not any(name in kwargs for name in (*names, "generation_config")):
        return 1
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]  # what the first leaves open
    choices = ((kwargs.get(name), *(getattr(config, name, None) for config in configs)) for name in names)
    return max(next((count for count in some if isinstance(count, int)), 1) for some in choices)
