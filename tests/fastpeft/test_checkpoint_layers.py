"""Gradient checkpointing of some layers: how many are computed again, and that gradients are the same."""

from __future__ import annotations

import fastpeft
import pytest
import torch
from fastpeft.recipes.checkpointing import checkpoint_layers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels.testing import assert_same_bits


def small(layers: int = 7) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=layers, intermediate_size=64, vocab_size=50,
                                        num_attention_heads=2, num_key_value_heads=1))  # fmt: skip


def again(model: LlamaForCausalLM) -> list[int]:
    return [i for i, layer in enumerate(model.model.layers) if layer.gradient_checkpointing]


def test_layers_that_keep_are_spread() -> None:
    model = small()
    assert checkpoint_layers(model) == 4
    assert again(model) == [0, 2, 4, 6]
    assert checkpoint_layers(model, 0.0) == 7
    assert again(model) == [*range(7)]
    assert checkpoint_layers(model, 1.0) == 0
    assert again(model) == []


def test_gradients_are_those_without() -> None:
    given, found = {"input_ids": torch.arange(24).view(2, 12), "labels": torch.arange(24).view(2, 12)}, []
    for keeps in (None, 0.36, 0.0):
        adapted = fastpeft.get_peft_model(small(), fastpeft.LoraConfig(target_modules=["q_proj", "down_proj"]))
        torch.manual_seed(3)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        if keeps is not None:
            fastpeft.checkpoint_layers(adapted, keeps)
        adapted.train()
        adapted(**given).loss.backward()
        found.append([p.grad for p in adapted.parameters() if p.grad is not None])
    assert found[0]
    for other in found[1:]:
        for mine, right in zip(other, found[0], strict=True):
            assert_same_bits(mine, right)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        checkpoint_layers(small(), 1.5)
