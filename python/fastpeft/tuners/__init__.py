"""`peft.tuners`: the names that scripts import from there, from where they live here."""

from ..methods.lora import LoraConfig
from ..tuner import BaseTuner
from .lora import LoraLayer, LoraModel

__all__ = ["BaseTuner", "LoraConfig", "LoraLayer", "LoraModel"]
