"""Which parameters of a model are the A and B of one LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ...inject.modules import adapter_layers


class LoraPair(NamedTuple):
    """A [r, in] and B [out, r] of one adapter in one linear layer; `name` of what both are in, without either."""

    name: str
    a: nn.Parameter
    b: nn.Parameter
    scaling: float


def lora_pairs(model: nn.Module) -> Iterator[LoraPair]:
    for name, layer in adapter_layers(model):
        containers: Any = dict(layer.containers())
        if "lora_A" not in containers or "lora_B" not in containers:
            continue
        for adapter in layer.methods:
            a, b = (getattr(containers[c].get(adapter), "weight", None) for c in ("lora_A", "lora_B"))
            scaling = getattr(layer, "scaling", {}).get(adapter, 1.0)
            if isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and a.ndim == b.ndim == 2:
                yield LoraPair(f"{name}.{adapter}", a, b, scaling)
