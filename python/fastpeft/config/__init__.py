"""Names and settings: configuration classes, their types, limits, patterns and targets."""

__version__ = "0.21.2"  # of PEFT: the one whose file format is written

from .base import CONFIG_NAME, PeftConfig, PromptLearningConfig
from .types import PeftType, TaskType
from .version import commit_of as _get_commit_hash  # noqa: F401 (as PEFT calls it)

__all__ = ["CONFIG_NAME", "PeftConfig", "PeftType", "PromptLearningConfig", "TaskType"]  # of PEFT's module `config`
