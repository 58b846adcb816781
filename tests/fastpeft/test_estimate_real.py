"""`fastpeft estimate` beside the peak of real runs: configurations that were drawn, not chosen. A process cannot lower
its peak, so each run is one of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastpeft.apps.training.testing import make_byte_tokenizer
from gguf_tools import write_gguf

pytestmark = [
    pytest.mark.full_form,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems count memory in other ways"),
]
WITHIN = 10  # per cent, as the documentation says
LLAMA: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 10,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 8192,
}  # fmt: skip
WIDE = {"hidden_size": 2048, "intermediate_size": 5632}
GPT2 = {"vocab_size": 50257, "n_embd": 1024, "n_layer": 14, "n_head": 16, "n_positions": 1024}
LORA4 = "lora.r=4 lora.target_modules=[q_proj,v_proj]"
MIXTURE = {"head_dim": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 768}

# type of model, what differs from LLAMA (of GPT-2 and OPT: all of it), settings
DRAWN: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2-lora": ("gpt2", GPT2, "max_length=1024 dtype=float32 lora.r=32"),
    "gpt2-loha": (
        "gpt2", {**GPT2, "n_embd": 768, "n_layer": 12, "n_head": 12},
        "max_length=768 batch_size=2 method=loha quantize=none dtype=float32 adapter.r=8",
    ),
    "qwen2-oft": (
        "qwen2", {"vocab_size": 151936, "tie_word_embeddings": True},
        "max_length=700 batch_size=2 method=oft adapter.oft_block_size=32 dtype=bfloat16",
    ),
    "qwen3-adalora": (
        "qwen3", {"head_dim": 128, "vocab_size": 64000},
        "batch_size=4 method=adalora adapter.total_step=10 dtype=bfloat16 optimizer=adamw_8bit",
    ),
    "gemma-tables": (
        "gemma", {"vocab_size": 256000, "head_dim": 128, "num_hidden_layers": 6},
        "max_length=1024 dtype=bfloat16 quantize_embeddings=true lora.r=64",
    ),
    "gemma3-checkpoints": (
        "gemma3_text", {"vocab_size": 131072, "head_dim": 128, "num_hidden_layers": 12},
        "max_length=1536 dtype=float32 gradient_checkpointing=true",
    ),
    "experts-nf4": (
        "qwen3_moe", {**MIXTURE, "num_hidden_layers": 8}, "max_length=768 dtype=bfloat16 quantize_experts=true",
    ),
    "experts-dense": (
        "mixtral", {"num_local_experts": 4, "intermediate_size": 1024, "num_hidden_layers": 8},
        f"dtype=float32 quantize=none {LORA4}",
    ),
    "ia3-disk": (
        "llama", WIDE,
        "max_length=4096 method=ia3 dtype=bfloat16 gradient_checkpointing=true offload_activations=disk",
    ),
    "some-layers": (
        "llama", {"num_hidden_layers": 16},
        "max_length=1024 batch_size=3 dtype=bfloat16 gradient_checkpointing=true checkpointing_keeps=0.36 lora.r=128",
    ),
    "cached": ("llama", {**WIDE, "num_hidden_layers": 14}, "dtype=bfloat16 cache_quantized=true"),
    "vera": (
        "llama", {"num_hidden_layers": 12, "tie_word_embeddings": True},
        "max_length=300 batch_size=3 method=vera adapter.r=256 dtype=float32 quantize=none optimizer=sgd",
    ),
    "opt-dora": (
        "opt", {"vocab_size": 50272, "hidden_size": 1024, "num_hidden_layers": 12, "ffn_dim": 4096,
                "num_attention_heads": 16, "max_position_embeddings": 2048, "word_embed_proj_dim": 1024},
        "max_length=1024 method=dora dtype=float32 lora.r=8 packing=false",
    ),
    "phi3-prompt": (
        "phi3", {"num_key_value_heads": 16},
        "batch_size=3 method=prompt_tuning adapter.num_virtual_tokens=40 dtype=float32",
    ),
    "mistral-boft": (
        "mistral", {}, "method=boft adapter.boft_block_size=8 dtype=float32 quantize=fp4 optimizer=adafactor",
    ),
    "gguf": ("llama", {"num_hidden_layers": 20}, "max_length=1024 dtype=float32"),
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    """A model of random bfloat16 weights: a folder, or a file of Q4_0."""
    kind, changes, _ = DRAWN[name]
    sizes = changes if kind in ("gpt2", "opt") else {**LLAMA, **changes}
    config = transformers.AutoConfig.for_model(kind, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    some = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() > 1:
                p.view(-1).copy_(some.repeat(p.numel() // len(some) + 1)[: p.numel()])
            else:
                p.fill_("bias" not in key)
    tokenizer = make_byte_tokenizer(False)
    if name == "gguf":
        return write_gguf(model, folder / "model.gguf", types="Q4_0", tokenizer=tokenizer)
    model.save_pretrained(folder / "model", max_shard_size="500MB")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def peak_of(words: list[str]) -> int:
    """Bytes of `ru_maxrss` of a command, which has to succeed."""
    program = """if True:  # a small process between: a child's count begins with that of its parent
        import os, sys
        pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-m", "fastpeft", *sys.argv[1:]])
        _, status, usage = os.wait4(pid, 0)
        print(status, usage.ru_maxrss * 1024)"""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    status, peak = done.stdout.split()[-2:]
    assert status == "0", done.stderr
    return int(peak)


@pytest.mark.parametrize("name", DRAWN)
def test_the_estimate_is_near_the_peak(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, settings = make_model(name, tmp_path), DRAWN[name][2].split()
    line = json.dumps({"prompt": "1", "completion": "abcdefgh" * 1024})
    (tmp_path / "data.jsonl").write_text(f"{line}\n" * 16)
    words = [sys.executable, "-m", "fastpeft", "estimate", str(model), *settings, "--json"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    estimate = json.loads(done.stdout)["peak_bytes"]
    train = ["train", f"model={model}", f"data={tmp_path / 'data.jsonl'}", "max_steps=2", *settings]
    if name == "cached":
        peak_of([*train, f"output={tmp_path / 'first'}"])
    peak = peak_of([*train, f"output={tmp_path / 'run'}"])
    assert abs(estimate - peak) * 100 <= WITHIN * peak, f"{estimate / 1e6:.0f} MB, and it took {peak / 1e6:.0f}"
