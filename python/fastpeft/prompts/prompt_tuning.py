"""Prompt tuning: trained vectors before the embeddings of the input (arXiv 2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..config.base import PromptLearningConfig
from .encoder import BasePromptEncoder, first_tokens, rows_of, size_of
from .method import PromptMethod


class PromptTuningInit(str, enum.Enum):
    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig, own_type="PROMPT_TUNING"):
    """prompt_tuning_init: start from the embeddings of a text (TEXT), of random tokens (SAMPLE_VOCAB), or from random
    numbers (RANDOM). prompt_tuning_init_text, tokenizer_name_or_path, tokenizer_kwargs: the text and its tokenizer,
    which runs no code of a repository's.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        from_text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text") if from_text else ():
            value = getattr(self, name)
            if value is None or (name == "tokenizer_name_or_path" and not value):
                raise ValueError(f"When prompt_tuning_init='TEXT', {name} can't be {value}.")
        if self.tokenizer_kwargs and not from_text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT'.")


class PromptEmbedding(BasePromptEncoder):
    """The prompt [tokens * submodules, token_dim], as an embedding."""

    def __init__(self, config: Any, word_embeddings: Any) -> None:
        super().__init__()
        total = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(total, config.token_dim)
        if config.inference_mode or word_embeddings is None or self.embedding.weight.is_meta:
            return
        if config.prompt_tuning_init == "SAMPLE_VOCAB":
            ids = torch.randint(0, size_of(word_embeddings)[0], (total,))
        elif config.prompt_tuning_init == "TEXT":
            ids = torch.tensor(first_tokens(_tokens(config), total))
            if ids.max() >= (tokens := size_of(word_embeddings)[0]):
                raise ValueError(
                    f"the tokenizer {config.tokenizer_name_or_path!r} gives token {int(ids.max())}, and the model has "
                    f"{tokens}: it is the tokenizer of another model"
                )
        else:
            return
        self.embedding.weight = nn.Parameter(rows_of(word_embeddings, ids))


def _tokens(config: Any) -> list[int]:
    from transformers import AutoTokenizer

    # A file must not let a repository's code run.
    options = {k: v for k, v in (config.tokenizer_kwargs or {}).items() if k != "trust_remote_code"}
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
    return list(tokenizer(config.prompt_tuning_init_text)["input_ids"])


class PromptTuning(PromptMethod, config=PromptTuningConfig):
    encoder_class = PromptEmbedding
    needs_words = True
    starts: ClassVar[type[enum.Enum]] = PromptTuningInit

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        starts = [start.value for start in self.starts]
        if getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init) not in starts:
            raise ValueError(f"`prompt_tuning_init` should be one of {starts}, got {config.prompt_tuning_init!r}")
