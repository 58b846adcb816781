"""`peft.tuners.lora`. There is one class of adapter layer; whether it holds a LoRA is a question to its instance."""

from typing import Any

from ..layer import AdapterLayer
from ..method import get_method
from ..methods.lora import LoraConfig, LoraRuntimeConfig
from ..tuner import tuner_class


class _HoldsLora(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, AdapterLayer) and hasattr(instance, "lora_A")


class LoraLayer(metaclass=_HoldsLora):
    """`isinstance(module, LoraLayer)`: whether the module is an adapter layer with a LoRA."""


LoraModel = tuner_class(get_method("LORA"))

__all__ = ["LoraConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig"]
