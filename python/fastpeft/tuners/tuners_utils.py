"""`peft.tuners.tuners_utils`: the classes of tuners and layers, and functions over the adapters of any model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..adapters import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad
from ..layer import AdapterLayer as BaseTunerLayer
from ..mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from ..replicate import replicate_layers
from ..targets import match_targets
from ..tuner import BaseTuner
from ..utils.constants import *  # noqa: F403 (its __all__)

__all__ = [
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "cast_adapter_dtype",
    "check_target_module_exists",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
]


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a configuration adapts the module of this name."""
    return bool(match_targets(config, [key]).names)


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of a tuner's modules, "matched" and "unmatched" by the configuration of an adapter."""
    names = [name for name, _ in tuner.model.named_modules()]
    matched = match_targets(tuner.peft_config[adapter_name], [name for name in names if name]).names  # type: ignore[arg-type]
    found = set(matched)
    return {"matched": matched, "unmatched": [name for name in names if name not in found]}


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name of a module in a model, "" if it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """accelerate's map of devices by module, or the one device that a model without it is on."""
    found: dict[str, Any] = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}
    return found
