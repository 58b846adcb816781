"""A model small enough to train in a test, with a tokenizer made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_model(folder: Path, *, chat: bool = True, layers: int = 2, hidden: int = 32, tie: bool = True) -> Path:
    """Save a random Llama (hidden 32, a vocabulary of bytes) with a byte-level tokenizer; returns ``folder``."""
    import torch
    import transformers

    tokenizer = make_byte_tokenizer(chat)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_byte_tokenizer(chat: bool = True) -> Any:
    """A tokenizer with one token a byte, ``<|end|>`` as its end, and a chat template if ``chat``."""
    import tokenizers
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    raw = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    raw.add_special_tokens(special)
    make: Any = transformers.PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|pad|>")
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_jsonl(path: Path, count: int = 40) -> Path:
    """``count`` distinct records of prompt and completion with a pattern that a tiny model can begin to learn."""
    words = ("red", "green", "blue", "black", "white")
    records = [{"prompt": f"colour {i}?", "completion": f"It is {words[i % 5]}" + "!" * (i % 7)} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def make_tiny_run(folder: Path, count: int = 40, **model: Any) -> Path:
    """``folder`` with what a run needs: ``model`` of `make_tiny_model`, and ``data.jsonl`` of ``count`` records."""
    make_tiny_model(folder / "model", **model)
    write_jsonl(folder / "data.jsonl", count)
    return folder
