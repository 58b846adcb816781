"""Pairs of parameters of a model that are the A and B of one LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ...inject.modules import adapter_layers


class LoraPair(NamedTuple):
    """A [r, in] and B [out, r] of one adapter in one linear layer."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


def lora_pairs(model: nn.Module) -> Iterator[LoraPair]:
    for _, layer in adapter_layers(model):
        containers: dict[str, Any] = dict(layer.containers())
        for adapter in layer.methods:
            a, b = (getattr(containers.get(c, {}).get(adapter), "weight", None) for c in ("lora_A", "lora_B"))
            if isinstance(a, nn.Parameter) and isinstance(b, nn.Parameter) and a.ndim == b.ndim == 2:
                yield LoraPair(a, b, getattr(layer, "scaling", {}).get(adapter, 1.0))
