"""Copies of layers that have run: what was kept for speed belongs to the layer that kept it."""

from __future__ import annotations

import copy
import io
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig
from torch import nn

from peft_kernels.testing import assert_same_bits

tools = runpy.run_path(str(Path(__file__).with_name("layer_tools.py")))
lora_layer = tools["lora_layer"]
BASES = {"dense": lambda: nn.Linear(64, 96), **tools["QUANTISED"]}


def by_torch_save(module: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def by_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("clone", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_a_copy_of_a_layer_that_ran_follows_its_own_tensors(
    base: str, options: dict[str, Any], clone: Callable[[Any], Any]
) -> None:
    layer = lora_layer(BASES[base](), **options)
    x = torch.randn(3, 64)
    with torch.no_grad():
        y = layer(x)
        twin = clone(layer)
        assert twin._plan is None
        assert_same_bits(twin(x), y)
        # A weight of its own: what the original keeps of W (|W|^2, decoded facts, plans) must not serve the copy.
        w, b = twin.base.read()
        twin.base.write(w.detach() * 3, b)
        other = twin(x)
        assert not torch.equal(other, y)
        assert_same_bits(twin(x), other)
        assert_same_bits(layer(x), y)
        fresh = lora_layer(twin.base_layer, **options)
        for name, container in twin.containers():
            fresh._modules[name].load_state_dict(container.state_dict())
        assert_same_bits(fresh(x), other)


def test_state_dicts_of_4bit_layers_load_with_weights_only() -> None:
    layer = lora_layer(BASES["nf4"]())
    x = torch.randn(3, 64)
    y = layer(x).detach()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    again = lora_layer(BASES["nf4"]())
    assert not torch.equal(again(x), y)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(again(x).detach(), y)


def test_a_copy_of_a_compiled_layer_is_compiled_for_itself() -> None:
    torch._dynamo.reset()
    layer = lora_layer(BASES["nf4"]())
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x).detach()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.lora_B["a"].weight.add_(1.0)
    other = torch.compile(twin, backend="aot_eager", fullgraph=True)(x).detach()
    assert_same_bits(other, twin(x).detach())
    assert not torch.equal(other, y)
    assert_same_bits(compiled(x).detach(), y)
    torch._dynamo.reset()


def test_configurations_copy_and_pickle() -> None:
    config = LoraConfig(r=4, target_modules=["q", "v"], use_dora=True)
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        twin.target_modules.add("k") if isinstance(twin.target_modules, set) else twin.target_modules.append("k")
        assert twin != config
