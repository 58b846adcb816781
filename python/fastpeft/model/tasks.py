"""PeftModel for each task: which head is trained along, and which arguments a forward names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from ..config.base import PeftConfig, TargetConfig
from ..config.types import TaskType
from .peft_model import PeftModel as PeftModel
from .peft_model import class_for as class_for


class _WithHead(PeftModel):
    """A task whose head is new: it is trained in full and saved with the adapter."""

    head_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @contextmanager
    def _preparing(cls, peft_config: PeftConfig) -> Iterator[None]:
        if not isinstance(peft_config, TargetConfig):
            yield
            return
        before = peft_config.modules_to_save
        present = list(before or ())
        peft_config.modules_to_save = [*present, *(name for name in cls.head_names if name not in present)]
        try:
            yield
        except Exception:
            peft_config.modules_to_save = before
            raise


class PeftModelForCausalLM(PeftModel, task=TaskType.CAUSAL_LM):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForSeq2SeqLM(PeftModel, task=TaskType.SEQ_2_SEQ_LM):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForSequenceClassification(_WithHead, task=TaskType.SEQ_CLS):
    head_names = ("classifier", "score")


class PeftModelForTokenClassification(_WithHead, task=TaskType.TOKEN_CLS):
    head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(_WithHead, task=TaskType.QUESTION_ANS):
    head_names = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel, task=TaskType.FEATURE_EXTRACTION):
    pass


class PeftMixedModel(PeftModel):
    """PEFT's class for adapters of several methods; here every PeftModel takes them."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING = PeftModel.by_task
