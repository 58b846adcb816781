"""Classes of PEFT's methods of prompt learning, which are not there yet: others import them to ask `isinstance`."""

from __future__ import annotations

from typing import Any, ClassVar

from ..config.base import PeftConfig


class PromptLearningConfig(PeftConfig):
    """A configuration of prompt learning. NotImplementedError on making one."""

    is_prompt_learning: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: prompt learning is not there yet. Use another method (LoraConfig), or PEFT."
        )


class PrefixTuningConfig(PromptLearningConfig):
    """See PromptLearningConfig."""
