"""TRL's trainers with `accelerate(loss=True)` beside the same trainers without: the losses they gave before."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
import transformers

pytestmark = pytest.mark.ecosystem
_tools = runpy.run_path(str(Path(__file__).with_name("ecosystem_tools.py")))
COMMON, LETTERS, llama, tokenizer = (_tools[n] for n in ("COMMON", "LETTERS", "llama", "tokenizer"))
CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
TALK = [{"messages": [{"role": "user", "content": LETTERS[i : i + 4]},
                      {"role": "assistant", "content": LETTERS[i + 4 : i + 9]}]} for i in range(8)]  # fmt: skip
TEXT = [{"text": LETTERS[i : i + 5 + i % 3]} for i in range(16)]
PAIRS = [{"prompt": LETTERS[i : i + 3], "completion": LETTERS[i + 3 : i + 8]} for i in range(8)]
OPTIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "text": (TEXT, {}), "packing": (TEXT, {"packing": True, "max_length": 12}),
    "padding-free": (TEXT, {"padding_free": True, "max_length": None}),
    "smoothing": (TEXT, {"label_smoothing_factor": 0.1}),
    "completion": (PAIRS, {"completion_only_loss": True}), "assistant": (TALK, {"assistant_only_loss": True}),
    "accumulation": (TEXT, {"gradient_accumulation_steps": 2}), "dft": (TEXT, {"loss_type": "dft"}),
    "evaluation": (TEXT, {"eval_strategy": "steps", "eval_steps": 1}),
}  # fmt: skip


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    kept = ("loss", "eval_loss", "entropy", "mean_token_accuracy", "grad_norm", "eval_entropy")
    return [{k: v for k, v in line.items() if k in kept} for line in trainer.state.log_history]


def sft(folder: Path, option: str, chunked: bool) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows, options = OPTIONS[option]
    words, model = tokenizer(), llama()
    words.chat_template = CHAT
    if chunked:
        assert fastpeft.accelerate(model, layers=False, loss=True).losses == 1
    config = SFTConfig(str(folder), max_steps=3, **{**COMMON, "per_device_train_batch_size": 2, **options})
    data = Dataset.from_list(rows)
    return history(SFTTrainer(
        model, args=config, train_dataset=data, eval_dataset=data if "eval_steps" in options else None,
        processing_class=words, peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    ))  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_sft(option: str, tmp_path: Path) -> None:
    theirs, ours = (sft(tmp_path, option, chunked) for chunked in (False, True))
    assert ours == theirs
    assert sum("loss" in line for line in ours) == 3


def test_dpo(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    data = Dataset.from_list([
        {"prompt": LETTERS[i : i + 3], "chosen": LETTERS[i + 3 : i + 7], "rejected": LETTERS[i + 9 : i + 13]}
        for i in range(8)
    ])  # fmt: skip
    found = []
    for chunked in (False, True):
        model = llama()
        if chunked:
            fastpeft.accelerate(model, layers=False, loss=True)
        config = DPOConfig(str(tmp_path), max_steps=2, **COMMON)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        found.append(history(DPOTrainer(model, args=config, train_dataset=data, processing_class=tokenizer(),
                                        peft_config=lora)))  # fmt: skip
    assert found[0] == found[1]


def test_padding_free_collator_with_trainer(tmp_path: Path) -> None:
    """Batches of one row with position ids, as transformers' collator makes them."""
    ids = [[2 + (i + j) % 26 for j in range(4 + i % 5)] for i in range(16)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    losses = []
    for chunked in (False, True):
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        report = fastpeft.accelerate(model, layers=False, loss=True) if chunked else None
        trainer = transformers.Trainer(
            model, transformers.TrainingArguments(str(tmp_path), max_steps=3, **COMMON), train_dataset=rows,
            data_collator=transformers.DataCollatorWithFlattening(),
        )  # fmt: skip
        losses.append([line["loss"] for line in history(trainer) if "loss" in line])
    assert report is not None
    assert report.chunked == 3
    closeness = 2**6 * torch.finfo(torch.float32).eps
    assert all(abs(a - b) <= closeness * abs(b) for a, b in zip(*losses, strict=True))
