"""A bitsandbytes checkpoint with cut parts, which bitsandbytes itself loads: our layers refuse it and read no heap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig, NF4Linear, get_peft_model
from torch import Tensor, nn

CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nested_absmax": lambda t: t[:0],
    "nested_quant_map": lambda t: t[:10],
    "absmax": lambda t: t[:-1],
}


def cut_layer(part: str) -> nn.Module:
    """A layer that `from_prequantized` makes of a state with a part cut."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    state = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4").to("cpu").state_dict()
    name = f"weight.{part}"
    state[name] = CUTS[part](state[name]).clone()
    stats = {k: v for k, v in state.items() if k != "weight"}
    layer: nn.Module = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    return layer


def _run(layer: nn.Module, config: LoraConfig) -> Tensor:
    y: Tensor = get_peft_model(nn.Sequential(layer), config)(torch.randn(3, 64))
    return y


@pytest.mark.parametrize("part", CUTS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_cut_checkpoint_is_refused(part: str, use_dora: bool) -> None:
    field = {"nested_quant_map": "nested_code"}.get(part, part)
    with pytest.raises(ValueError, match=f"QuantWeight: {field} must be "):
        _run(cut_layer(part), LoraConfig(r=2, target_modules=["0"], use_dora=use_dora))
    with pytest.raises(ValueError, match=f"QuantWeight: {field} must be "):
        NF4Linear.from_bnb(cut_layer(part))
