"""AutoPeftModel: the base model and the adapter from the adapter's folder alone."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from ..config.base import PeftConfig
from ..config.types import TaskType
from ..files.hub import HUB_OPTIONS, find_adapter_file
from .tasks import PeftModel, class_for

# transformers' classes that build a base model for a task: `AutoModelForCausalLM` beside `PeftModelForCausalLM`.
AUTO_CLASSES = {task: cls.__name__.replace("Peft", "Auto") for task, cls in PeftModel.by_task.items()}
AUTO_CLASSES[TaskType.FEATURE_EXTRACTION.value] = "AutoModel"


class AutoPeftModel:
    """`AutoPeftModel.from_pretrained(adapter)` loads the base model that the adapter's configuration names."""

    task_type: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], adapter_name: str = "default",
        is_trainable: bool = False, config: PeftConfig | None = None, revision: str | None = None, **kwargs: Any,
    ) -> PeftModel:  # fmt: skip
        """The adapter over its base model. Further arguments go to the base model's `from_pretrained`, those of the Hub
        (but for revision and subfolder) to both.

        Where a tokenizer that lies with the adapter has more tokens than the base model, the embeddings are enlarged.
        """
        allow_bin = bool(kwargs.pop("allow_bin", False))  # of the adapter; the base model is transformers' to read
        hub = {name: kwargs[name] for name in (*HUB_OPTIONS, "subfolder") if name in kwargs}
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **hub)
        if cls.task_type is not None and peft_config.task_type not in (None, cls.task_type):
            raise ValueError(f"{cls.__name__} is for {cls.task_type.value}, the adapter for {peft_config.task_type}")
        if peft_config.base_model_name_or_path is None:
            raise ValueError(f"{pretrained_model_name_or_path} does not name its base model (base_model_name_or_path)")
        options = {"revision": peft_config.revision or "main"} | {k: v for k, v in kwargs.items() if k != "subfolder"}
        model = cls._base_class(peft_config).from_pretrained(peft_config.base_model_name_or_path, **options)
        trusted = bool(kwargs.get("trust_remote_code", False))
        _make_room(model, pretrained_model_name_or_path, trusted, {"revision": revision} | hub)
        return class_for(peft_config).from_pretrained(
            model, pretrained_model_name_or_path, adapter_name, is_trainable=is_trainable, config=config,
            revision=revision, allow_bin=allow_bin, **hub,
        )  # fmt: skip

    @classmethod
    def _base_class(cls, config: PeftConfig) -> Any:
        import transformers

        library = str((config.auto_mapping or {}).get("parent_library", "transformers"))
        if config.task_type is None and library.partition(".")[0] != "transformers":
            raise ValueError(
                f"The auto mapping wants to import {library!r} which is not in the import allowlist: a base model is "
                "made of transformers' classes alone. Load it yourself, for PeftModel.from_pretrained(model, adapter)."
            )
        task = cls.task_type or config.task_type
        if task is not None:
            return getattr(transformers, AUTO_CLASSES[str(getattr(task, "value", task))])
        # A configuration names a class and its module. Nothing that a file names is imported: only a model class that
        # transformers itself offers is taken.
        name = str((config.auto_mapping or {}).get("base_model_class", ""))
        found = getattr(transformers, name, None) if name.isidentifier() else None
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ValueError(
                f"The adapter has no task type and its base class {name!r} is no model of transformers: load the base "
                "model yourself and call PeftModel.from_pretrained(model, adapter)."
            )
        return found


def _make_room(model: Any, adapter: str | os.PathLike[str], trusted: bool, hub: dict[str, Any]) -> None:
    """Enlarge a model's embeddings to the tokenizer that lies with an adapter, if one does and is larger."""
    try:
        find_adapter_file(adapter, "tokenizer_config.json", **hub)
    except ValueError:
        return
    if not hasattr(model, "get_input_embeddings"):
        return
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(adapter, trust_remote_code=trusted, **hub))
    if tokens > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel):
    task_type = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    task_type = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    task_type = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    task_type = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    task_type = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    task_type = TaskType.FEATURE_EXTRACTION
