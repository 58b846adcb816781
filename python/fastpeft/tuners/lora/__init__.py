"""`peft.tuners.lora`. There is one class of adapter layer; whether it holds a LoRA is a question to its instance."""

from typing import Any

from ...init.corda import CordaConfig
from ...init.eva import EvaConfig, get_eva_state_dict, initialize_lora_eva_weights
from ...init.loftq import LoftQConfig
from ...init.loraga import LoraGAConfig, preprocess_loraga
from ...layer import AdapterLayer
from ...method import get_method
from ...methods.lora import LoraConfig, LoraRuntimeConfig
from ...tuner import tuner_class


class _HoldsLora(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, AdapterLayer) and hasattr(instance, "lora_A")


class LoraLayer(metaclass=_HoldsLora):
    """`isinstance(module, LoraLayer)`: whether the module is an adapter layer with a LoRA."""


LoraModel = tuner_class(get_method("LORA"))

__all__ = [
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "preprocess_loraga",
]
