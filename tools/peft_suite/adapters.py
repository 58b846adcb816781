"""Repositories of the Hub that hold adapters. `peft` writes them, whichever it is: the format is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from models import TINY_OPT, VOCABULARY, register, tokenizer

_HOME = "peft-internal-testing"
_HEADS = {"modules_to_save": ["embed_tokens", "lm_head"]}


def _write(folder: Path, base: str, auto: str, config: Any, size: int | None = None) -> None:
    """An adapter of `config` over the model `base` of the class `auto`, whose vocabulary is resized to `size`."""
    import hub
    import peft
    import torch
    import transformers

    model = getattr(transformers, auto).from_pretrained(hub.folder_of(base))
    if size:
        model.resize_token_embeddings(size)
    torch.manual_seed(1)
    peft.get_peft_model(model, config).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


def _lora(task: str | None = "CAUSAL_LM", **fields: Any) -> Any:
    import peft

    return peft.LoraConfig(task_type=task, **fields)


def _row(name: str, base: str, auto: str, task: str | None = "CAUSAL_LM", inner: str = "", **fields: Any) -> None:
    @register(*(f"{_HOME}/{one}" for one in name.split()))
    def _(folder: Path) -> None:
        (folder / inner).mkdir(exist_ok=True)
        _write(folder / inner, base, auto, _lora(task, **fields))


_RANDOM = {"init_lora_weights": False}
_CAUSAL = "AutoModelForCausalLM"
_row("tiny-OPTForCausalLM-lora", TINY_OPT, _CAUSAL, **_RANDOM)
_row("tiny_OPTForSequenceClassification-lora", TINY_OPT, "AutoModelForSequenceClassification", "SEQ_CLS", **_RANDOM)
_row("tiny_OPTForQuestionAnswering-lora", TINY_OPT, "AutoModelForQuestionAnswering", "QUESTION_ANS", **_RANDOM)
_row("tiny_OPTForFeatureExtraction-lora", TINY_OPT, "AutoModel", "FEATURE_EXTRACTION", **_RANDOM)
_row("tiny_GPT2ForTokenClassification-lora", f"{_HOME}/tiny-random-gpt2", "AutoModelForTokenClassification",
     "TOKEN_CLS", **_RANDOM)  # fmt: skip
_row("tiny_T5ForSeq2SeqLM-lora", f"{_HOME}/tiny-random-t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", **_RANDOM)
_row("tiny_WhisperForConditionalGeneration-lora", f"{_HOME}/_tiny-whisper", "WhisperForConditionalGeneration", None,
     target_modules=["q_proj", "v_proj"])  # fmt: skip
_row("gpt2-lora-random", "gpt2", _CAUSAL, **_RANDOM)
_row("opt-125m-dummy-lora", f"{_HOME}/opt-125m", _CAUSAL, **_RANDOM)
_row("test-lora-subfolder", TINY_OPT, _CAUSAL, inner="test", **_RANDOM)
_row("tiny-opt-lora-revision@main", TINY_OPT, _CAUSAL, **_RANDOM)
_row("tiny-opt-lora-revision@test", TINY_OPT, _CAUSAL, r=16)
_row("tiny-random-BertModel-lora@main tiny-random-BertModel-lora@v1.2.3", "hf-internal-testing/tiny-random-BertModel",
     _CAUSAL, **_RANDOM)  # fmt: skip


@register("ybelkada/test-st-lora")
def _(folder: Path) -> None:
    _write(folder, TINY_OPT, _CAUSAL, _lora(**_RANDOM))


@register(f"{_HOME}/boft-tiny-opt-peft-v0.12")
def _(folder: Path) -> None:
    import peft

    targets = ["q_proj", "v_proj"]
    _write(folder, TINY_OPT, _CAUSAL, peft.BOFTConfig(
        task_type="CAUSAL_LM", target_modules=targets, boft_block_size=4, init_weights=False
    ))  # fmt: skip


def _with_tokens(folder: Path, more: int, size: int | None = None, **fields: Any) -> None:
    """An adapter beside a tokenizer with `more` tokens than its base model's."""
    words = tokenizer()
    words.add_tokens([f"<new{i}>" for i in range(more)])
    _write(folder, TINY_OPT, _CAUSAL, _lora(**fields), size and len(words))
    words.save_pretrained(folder)


@register(f"{_HOME}/opt-tokenizer-revision@main")
def _(folder: Path) -> None:
    _with_tokens(folder, 0, **_RANDOM)


@register(f"{_HOME}/opt-tokenizer-revision@my-revision")
def _(folder: Path) -> None:
    _with_tokens(folder, 40, 1, **_HEADS)


@register(f"{_HOME}/tiny-random-OPTForCausalLM-extended-vocab")
def _(folder: Path) -> None:
    _with_tokens(folder, VOCABULARY - len(tokenizer()), **_HEADS)  # fits the base's embeddings, which stay as they are
