"""A small Llama with adapters of real PEFT, for the tests of `fastpeft.patch`."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastpeft
import peft
import pytest
import torch
from fastpeft.compat.patch.classes import patched
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

close = runpy.run_path(str(Path(__file__).with_name("peft_tools.py")))["close"]

IDS = torch.arange(24).view(2, 12) % 50
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "init_lora_weights": False}, "rslora": {"r": 4, "init_lora_weights": False, "use_rslora": True},
    "dora": {"r": 4, "init_lora_weights": False, "use_dora": True}, "oft": {"oft_block_size": 8, "init_weights": False},
}  # fmt: skip


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """No test leaves a patched layer behind."""
    yield
    fastpeft.unpatch()
    assert not patched


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, tie_word_embeddings=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def in_4bit(model: Any) -> Any:
    """The same with bitsandbytes' layers, as transformers loads it."""
    import bitsandbytes as bnb

    for part in [m for n, m in model.named_modules() if n.endswith(("self_attn", "mlp"))]:
        for name, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear):
                small = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                small.load_state_dict(linear.state_dict())
                setattr(part, name, small.to("cpu"))
    model.is_loaded_in_4bit = True
    return model


def configuration(method: str = "lora", **options: Any) -> Any:
    kind = peft.OFTConfig if method == "oft" else peft.LoraConfig
    return kind(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **METHODS[method], **options})


def model_of(method: str = "lora", base: Any = None, **options: Any) -> Any:
    torch.manual_seed(1)
    return peft.get_peft_model(base or llama(), configuration(method, **options)).eval()


def forward(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(a: Tensor, b: Tensor) -> None:
    close(a, b, times=16)


def tuner_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
