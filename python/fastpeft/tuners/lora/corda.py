"""`peft.tuners.lora.corda`."""

from ...init.corda import CordaConfig, CordaEigens, preprocess_corda

__all__ = ["CordaConfig", "CordaEigens", "preprocess_corda"]
