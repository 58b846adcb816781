"""Base layers of other quantisers with the packages themselves: small layers, quantised in the test."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig, PeftWarning, get_peft_model
from fastpeft.weights.find import weight_of
from torch import nn

from peft_kernels import QuantWeight
from peft_kernels.testing import assert_no_worse, assert_same_bits

pytestmark = pytest.mark.ecosystem
tools = runpy.run_path(str(Path(__file__).with_name("owners_tools.py")))
LAYERS, K, torchao, hqq = (tools[name] for name in ("LAYERS", "K", "torchao", "hqq"))
CODED = ("hqq", "hqq-8bit", "gptq", "gptq-8bit", "gptq-act-order", "awq", "torchao-int8", "bnb-int8")
MERGING = [name for name in LAYERS if name.startswith(("hqq", "torchao", "bnb"))]


def adapted(base: nn.Module) -> Any:
    config = LoraConfig(target_modules=["0"], init_lora_weights=False, r=4)
    return get_peft_model(nn.Sequential(base), config).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_with_the_weight_that_their_package_decodes(name: str) -> None:
    module, wanted = LAYERS[name]()
    base = weight_of(module)
    assert base is not None
    found = base.read()[0]
    wide = wanted.double()
    # a layer that is read by its forward answers in its dtype: gptqmodel's own decoding, in float16, is the eager side
    own = module.dequantize_weight().t() if name in ("gptq-2bit", "gptq-3bit") else wanted
    assert_no_worse(found, own.float(), wide, wide.abs().max().expand_as(wide))
    layer = adapted(module).base_model.model[0]
    x = torch.randn(3, K)
    w, b = layer.merged_weight(["default"])
    exact = nn.functional.linear(x.double(), w.double(), None if b is None else b.double()).detach()
    eager = nn.functional.linear(x, w.to(x.dtype), None if b is None else b.to(x.dtype)).detach()
    size = nn.functional.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    assert_no_worse(layer(x).detach(), eager, exact, size.detach())
    assert isinstance((layer.base.fast() or (lambda: None))(), QuantWeight) is (name in CODED)


@pytest.mark.parametrize("name", MERGING)
def test_merging_requantises_by_the_package(name: str) -> None:
    layer = adapted(LAYERS[name]()[0]).base_model.model[0]
    x = torch.randn(3, K)
    before = layer(x).detach()
    error = layer.merge()
    assert error is not None
    assert error > 0
    layer.unmerge()
    assert_same_bits(layer(x).detach(), before)


def test_a_torchao_tensor_that_cannot_be_made_again_refuses_a_merge() -> None:
    model = adapted(torchao("intx")[0])
    before = model.base_model.model[0].base_layer.weight
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert model.base_model.model[0].base_layer.weight is before


@pytest.mark.parametrize("name", ["gptq", "gptq-2bit", "awq", "aqlm"])
def test_merging_is_refused_before_anything_changes(name: str) -> None:
    model = adapted(LAYERS[name]()[0])
    before = [t.clone() for t in model.base_model.model[0].base_layer.state_dict().values()]
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    after = model.base_model.model[0].base_layer.state_dict().values()
    for a, b in zip(before, after, strict=True):
        assert_same_bits(a, b)


def test_a_merged_model_of_hqq_is_one_of_hqq() -> None:
    model = adapted(hqq()[0])
    with pytest.warns(PeftWarning, match="requantising"):
        merged = model.merge_and_unload()
    assert type(merged[0]).__name__ == "HQQLinear"


@pytest.mark.parametrize("name", ["hqq", "gptq", "gptq-2bit", "awq", "torchao-int8", "torchao-float8", "aqlm",
                                  "bnb-int8"])  # fmt: skip
def test_training_moves_the_loss(name: str) -> None:
    model = adapted(LAYERS[name]()[0]).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x, losses = torch.randn(16, K), []
    for _ in range(3):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
