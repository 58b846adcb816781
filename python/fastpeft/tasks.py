"""PeftModel for each task: which head is trained along, and which arguments a forward names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from .config import PeftConfig, TargetConfig, TaskType
from .model import PeftModel


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


class PeftModelForCausalLM(PeftModel):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForSeq2SeqLM(PeftModel):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]


class PeftModelForSequenceClassification(_WithHead):
    head_names = ("classifier", "score")


class PeftModelForTokenClassification(_WithHead):
    head_names = ("classifier", "score")


class PeftModelForQuestionAnswering(_WithHead):
    head_names = ("qa_outputs",)


class PeftModelForFeatureExtraction(PeftModel):
    pass


class PeftMixedModel(PeftModel):
    """PEFT's class for adapters of several methods; here every PeftModel takes them."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}
