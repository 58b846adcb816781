"""layer_replication: more layers out of the same weights, each with an adapter of its own."""

from __future__ import annotations

import copy
from typing import Any

import fastpeft
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels.testing import assert_no_worse, assert_same_bits

MAP = [[0, 2], [1, 3]]


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(package: Any, model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    config = package.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    return package.get_peft_model(model, config).eval()


def test_layers_share_weights_and_compute_what_pefts_do() -> None:
    base, ids = llama(), torch.arange(12)[None]
    model = adapted(fastpeft, copy.deepcopy(base), layer_replication=MAP)
    theirs = adapted(peft, copy.deepcopy(base), layer_replication=MAP)
    layers = model.base_model.model.model.layers
    assert len(layers) == model.config.num_hidden_layers == 4
    assert layers[1].mlp.down_proj.weight is layers[2].mlp.down_proj.weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]
    theirs.load_state_dict(model.state_dict())
    y, z = model(ids).logits, theirs(ids).logits
    assert_no_worse(y, z, z.double(), (z.abs().max() + 1).expand(z.shape) * 4)
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, theirs.generate(input_ids=ids, max_new_tokens=3, do_sample=False))


def test_files_and_a_second_adapter(tmp_path: Any) -> None:
    base, ids = llama(), torch.arange(12)[None]
    model = adapted(fastpeft, copy.deepcopy(base), layer_replication=MAP)
    y = model(ids).logits
    model.save_pretrained(tmp_path)
    again = fastpeft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_bits(again(ids).logits, y)
    again.load_adapter(tmp_path, adapter_name="second")
    again.set_adapter("second")
    assert_same_bits(again(ids).logits, y)
    with pytest.raises(ValueError, match="replicated as"):
        again.add_adapter("third", fastpeft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2]]))


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, ids = llama(), torch.arange(12)[None]
    y, layers = model(ids).logits, model.model.layers
    for options, message in (
        ({"layer_replication": [[0, 9]]}, "no range"),
        ({"layer_replication": MAP, "exclude_modules": ["q_proj", "up_proj"]}, "No modules|exclude"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted(fastpeft, model, **options)
        assert model.model.layers is layers
        assert model.config.num_hidden_layers == 3
        assert_same_bits(model(ids).logits, y)
    with pytest.raises(ValueError, match="found no list of layers"):
        adapted(fastpeft, nn.Sequential(nn.Linear(4, 4)), layer_replication=MAP)
