"""Layers of classes that a configuration names for types of modules (`LoraConfig._register_custom_module`)."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..config.types import PeftWarning
from ..layer.custom import CustomLayer
from ..layer.layer import AdapterLayer
from ..layer.module_layer import ModuleLayer
from ..layer.parallel import ParallelLayer
from ..weights.base import BaseWeight
from ..weights.dense import LinearWeight
from ..weights.find import weight_of
from ..weights.whole_module import WholeModule
from .modules import Site


def custom_class(config: Any, module: nn.Module) -> type[CustomLayer] | None:
    """The class that a configuration has for modules of this type. TypeError for one that is no such class."""
    classes: dict[type, Any] = getattr(config, "_custom_modules", None) or {}
    own = next((cls for base, cls in classes.items() if isinstance(module, base)), None)
    if own is not None and not (isinstance(own, type) and issubclass(own, CustomLayer)):
        raise TypeError(
            f"_register_custom_module: {own!r} for {type(module).__name__} should be a class that derives from "
            "`fastpeft.tuners.lora.Linear` (or another layer of it), whose forward, say, it replaces."
        )
    return own


def with_weight(site: Site, config: Any) -> Site:
    """A site whose module's type is known by a configuration alone, with the weight that its adapters act on."""
    module = site.module
    if isinstance(module, AdapterLayer) or site.base is not None or custom_class(config, module) is None:
        return site
    if weight_of(module) is not None:
        return site
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"Target module {site.name!r}, a {type(module).__name__}, has no matrix `weight`, which a layer of a class "
            "from _register_custom_module needs: adapters of fastpeft act on a weight and merge into it."
        )
    return replace(site, base=LinearWeight(module))


def new_layer(config: Any, adapter: str, module: nn.Module, name: str, base: BaseWeight) -> AdapterLayer:
    """The layer that goes on a module."""
    own = custom_class(config, module)
    if own is None:
        cls = ModuleLayer if isinstance(base, WholeModule) else ParallelLayer if base.parallel else AdapterLayer
        return cls(module, name, base)
    if weight_of(module) is None:
        text = f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk."
        warnings.warn(text, PeftWarning, stacklevel=2)
    options = {"r": config.r, "lora_alpha": config.lora_alpha, "target_name": name.rpartition(".")[2]}
    layer = own(module, adapter, config=config, **options)
    layer.layer_name = name
    return layer
