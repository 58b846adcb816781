"""`peft.tuners.lora.loraga`."""

from ...init.loraga import LoraGAConfig, preprocess_loraga

__all__ = ["LoraGAConfig", "preprocess_loraga"]
