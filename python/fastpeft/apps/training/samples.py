"""Answers to a few prompts, taken while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import checkpoints
from .config import TrainConfig


class Samples:
    """The prompts of a run, answered by the model as it is: the likeliest token each time."""

    def __init__(self, prompts: Sequence[str], tokens: int, tokenizer: Any, template: str) -> None:
        self.prompts, self.tokens = prompts, tokens
        self._tokenizer, self._template = tokenizer, template

    @classmethod
    def of(cls, config: TrainConfig, tokenizer: Any) -> Samples | None:
        """The samples that the settings ask for, if they do."""
        if not config.sample_prompts:
            return None
        return cls(config.sample_prompts, config.sample_tokens, tokenizer, config.template)

    def take(self, model: Any) -> list[dict[str, str]]:
        """The prompts and the active adapter's answers. The random state is what it was."""
        from .inference import Answerer

        state, was_training = checkpoints.random_state(), model.training
        model.eval()
        try:
            answers = Answerer(model, self._tokenizer, self._template).answer(self.prompts, self.tokens)
        finally:
            model.train(was_training)
            checkpoints.set_random_state(state)
        return [{"prompt": p, "answer": a.text} for p, a in zip(self.prompts, answers, strict=True)]
