"""Tools of the tests of layers: layers with adapters over every base, and the outputs that they must give."""

from __future__ import annotations

import copy
from typing import Any

import torch
from fastpeft import LoraConfig, NF4Linear, quantize_model
from fastpeft.layer.layer import AdapterLayer
from fastpeft.methods.registry import get_method
from fastpeft.testing import add_adapter, make_layer
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse

LORA = get_method("LORA")


def lora_layer(base: str | nn.Module = "linear", names: str = "a", **options: Any) -> AdapterLayer:
    layer = make_layer(base) if isinstance(base, str) else AdapterLayer(base, "layer")
    layer.base_layer.requires_grad_(False)
    for name in names:
        add_adapter(layer, name, LORA, LoraConfig(**{"r": 4, **options}))
    layer.set_adapter(names[0])
    return layer.eval()


def composed(layer: AdapterLayer, x: Tensor) -> Tensor:
    """The output that the layer must give, without its plan: the slow, plain path."""
    names = [n for n in layer.active_adapters if n in layer.methods]
    if layer.disable_adapters or layer.merged:
        names = []
    return layer._compose(x, names, (), {})


def size_of(layer: AdapterLayer, x: Tensor) -> Tensor:
    """The sum of the absolute terms behind each element of the output, which rounding scales with."""
    w, _ = layer.base.read()
    total = w.detach().double().abs()
    for name in layer.active_adapters:
        if isinstance(layer.lora_B.get(name), nn.Linear):
            a, b = layer.lora_A[name].weight.double().abs(), layer.lora_B[name].weight.double().abs()
            total = total + abs(layer.scaling[name]) * (b @ a)
    return nn.functional.linear(x.double().abs(), total).detach()


def assert_as_composed(layer: AdapterLayer, x: Tensor) -> Tensor:
    y = layer(x).detach()
    exact = composed(copy.deepcopy(layer).double(), x.double()).detach()
    assert_no_worse(y, composed(layer, x).detach(), exact, size_of(layer, x))
    return y


# Quantised bases


def _linear4bit(nested: bool = True, quant_type: str = "nf4", compute_dtype: torch.dtype | None = None) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 96, quant_type=quant_type, compress_statistics=nested, compute_dtype=compute_dtype)
    nn.init.normal_(layer.bias)
    return layer.to("cpu")  # quantises


def _linear8bit() -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 96, has_fp16_weights=False)
    nn.init.normal_(layer.bias)
    return layer.to("cpu")


def _nf4() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 96))
    quantize_model(model, "nf4", double_quant=True)
    assert isinstance(model[0], NF4Linear)
    return model[0]


QUANTISED = {
    "nf4": _nf4,
    "bnb-nf4": _linear4bit,
    "bnb-nf4-plain-scales": lambda: _linear4bit(nested=False),
    "bnb-fp4": lambda: _linear4bit(quant_type="fp4"),
    "bnb-int8": _linear8bit,
}
