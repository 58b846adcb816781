"""CustomLayer: the base of layer classes that a user writes for modules of some type."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..weights.dense import LinearWeight
from ..weights.find import weight_of
from .layer import AdapterLayer


class CustomLayer(AdapterLayer):
    """An adapter layer that is made with the arguments of PEFT's layers, for `LoraConfig._register_custom_module`.

    base_layer: a module of a known type, or one with a matrix `weight` [out_features, in_features] and maybe a `bias`,
    which its forward applies as a linear layer does. adapter_name, config, options: for subclasses; adapters come by
    `add`.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str = "", config: Any = None, **options: Any) -> None:
        super().__init__(base_layer, base=None if weight_of(base_layer) is not None else LinearWeight(base_layer))
