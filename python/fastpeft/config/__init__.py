"""Names and settings: configuration classes, their types, limits, patterns and targets."""

from .base import CONFIG_NAME, PeftConfig
from .types import PeftType, TaskType

__all__ = ["CONFIG_NAME", "PeftConfig", "PeftType", "TaskType"]  # of PEFT's module `config`
