"""Tools of the tests of whole models: a small model here and in PEFT, and comparisons of the two."""

from __future__ import annotations

import copy
from typing import Any

import torch
from fastpeft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels.testing import assert_no_worse

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
X = torch.arange(12).view(3, 4)


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1, **options)).eval()


def config(**options: Any) -> dict[str, Any]:
    return {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM",
            **options}  # fmt: skip


def pair(make: Any = llama, **options: Any) -> tuple[Any, Any]:
    import peft  # not at the top: a bare GPU machine lacks it, and runs the pool's tests

    torch.manual_seed(1)
    ours = get_peft_model(make(), LoraConfig(**config(**options)))
    torch.manual_seed(1)
    return ours.eval(), peft.get_peft_model(make(), peft.LoraConfig(**config(**options))).eval()


def add_both(ours: Any, theirs: Any, name: str, **options: Any) -> None:
    import peft

    torch.manual_seed(2)
    ours.add_adapter(name, LoraConfig(**config(**options)))
    torch.manual_seed(2)
    theirs.add_adapter(name, peft.LoraConfig(**config(**options)))


def assert_same_outputs(ours: Any, theirs: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        a, b = ours(X, **kwargs).logits, theirs(X, **kwargs).logits
        exact = copy.deepcopy(theirs).double()(X, **kwargs).logits
    # What rounding does in one layer goes through all that follow.
    assert_no_worse(a, b, exact, 8 * (exact.abs() + exact.abs().mean()))
    return a


def assert_same_state(ours: Any, theirs: Any) -> None:
    for mine, other in zip(ours.get_layer_status(), theirs.get_layer_status(), strict=True):
        a, b = vars(mine), vars(other)
        # PEFT lists a wrapped head's status by another class name and leaves out buffers' devices.
        assert a == b
    assert vars(ours.get_model_status()) == vars(theirs.get_model_status())
    assert ours.active_adapters == theirs.active_adapters
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs)]
    assert trainable[0] == trainable[1]
