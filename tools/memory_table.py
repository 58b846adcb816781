"""Write the tables of docs/memory.md from `fastpeft estimate`: `python tools/memory_table.py [--check]`."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

from made_files import write_or_check

TARGET = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
MARK = "<!-- made by tools/memory_table.py -->\n"
ROOMS = (8, 16, 24, 48, 80)  # GB
SHORT, LONG, MOST = 1024, 2048, 131072  # tokens of the two rows that are traced; what a row may have in the table
# hidden, intermediate, layers, heads, heads of keys and values, vocabulary, whether the head is the embedding
MODELS: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "1B, as Llama 3.2": (2048, 8192, 16, 32, 8, 128256, True),
    "3B, as Llama 3.2": (3072, 8192, 28, 24, 8, 128256, True),
    "7B, as Llama 2": (4096, 11008, 32, 32, 32, 32000, False),
    "8B, as Llama 3.1": (4096, 14336, 32, 32, 8, 128256, False),
    "13B, as Llama 2": (5120, 13824, 40, 40, 40, 32000, False),
    "34B, as Code Llama": (8192, 22016, 48, 64, 8, 32000, False),
    "70B, as Llama 2": (8192, 28672, 80, 64, 8, 32000, False),
}


@cache
def estimated(name: str, length: int) -> dict[str, Any]:
    """The estimate of QLoRA on a GPU: NF4, LoRA r=16 on all linear layers, bfloat16, checkpoints, one row."""
    import torch
    import transformers
    from fastpeft.apps.estimate.machines import CUDA_BYTES
    from fastpeft.apps.estimate.parts import estimate
    from fastpeft.apps.training.config import TrainConfig

    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = MODELS[name]
    base = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    config = TrainConfig(model=name, data="-", max_length=length, gradient_checkpointing=True)
    return estimate(config, base, torch.bfloat16, CUDA_BYTES, both=False, on_gpu=True)


def row(name: str) -> str:
    """A model's line: its parts, its peak for a row of `LONG` tokens, and the longest row that fits each memory."""
    short, long = estimated(name, SHORT), estimated(name, LONG)
    parts, step = long["memory_bytes"], long["step_peak_bytes"]
    a_token = (step - short["step_peak_bytes"]) / (LONG - SHORT)
    trained = parts["adapter"] + parts["gradients"] + parts["optimizer"]
    cells = [name, f"{long['parameters'] / 1e9:.2f}", *(f"{b / 1e9:.2f}" for b in (parts["base"], trained, step))]
    for room in ROOMS:
        tokens = int((room * 1e9 - step) / a_token) + LONG
        cells.append("no" if tokens < SHORT else f"{min(tokens, MOST) // 1024 * 1024:,}")
    return f"| {' | '.join(cells)} |\n"


def table(names: tuple[str, ...] = tuple(MODELS)) -> str:
    rooms = " | ".join(f"{room} GB" for room in ROOMS)
    head = f"| model | parameters, 10^9 | base, GB | adapter, gradients, AdamW, GB | peak, GB | {rooms} |\n"
    return head + "|---" * (5 + len(ROOMS)) + "|\n" + "".join(map(row, names))


def page(made: str) -> str:
    before, _, rest = TARGET.read_text(encoding="utf-8").partition(MARK)
    return before + MARK + made + "\n" + rest.partition("\n\n")[2] if rest else before + MARK + made


if __name__ == "__main__":
    sys.exit(write_or_check({TARGET: page(table())}))
