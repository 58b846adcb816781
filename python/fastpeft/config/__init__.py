"""Names and settings: configuration classes, their types, limits, patterns and targets."""

from .base import CONFIG_NAME, PeftConfig, PromptLearningConfig
from .types import PeftType, TaskType

__all__ = ["CONFIG_NAME", "PeftConfig", "PeftType", "PromptLearningConfig", "TaskType"]  # of PEFT's module `config`
