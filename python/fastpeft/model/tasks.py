"""PeftModel for each task: which head is trained along."""

from __future__ import annotations

from typing import Any

from ..config.types import TaskType
from .peft_model import PeftModel as PeftModel
from .peft_model import class_for as class_for


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    pass


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    def generate(self, **kwargs: Any) -> Any:
        """The base model's `generate`, with arguments by name alone, as in PEFT."""
        return super().generate(**kwargs)


class PeftModelForSequenceClassification(PeftModel, task=TaskType.SEQ_CLS):
    head_names = ("classifier", "score")


class PeftModelForTokenClassification(PeftModel, task=TaskType.TOKEN_CLS):
    head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(PeftModel, task=TaskType.QUESTION_ANS):
    head_names = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    pass


class PeftMixedModel(PeftModel):
    """PEFT's class for adapters of several methods; here every PeftModel takes them."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = PeftModel.by_task
