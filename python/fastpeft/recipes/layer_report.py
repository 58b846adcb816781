"""Which parts of a model's decoder layers run on which operator now, and why the others do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from ..weights.base import innermost, is_listened_to
from .decoder_layers import MLP, QKV, is_switched, place_of, switched_as
from .projections import refusal
from .ways import PARTS, Ways, known_ways

_NAMES = {"norm": "norms", "stack": "q, k and v", "attention": "attention", "mlp": "MLPs"}
Table = Counter[tuple[str, str]]


def look(model: nn.Module) -> tuple[Table, Table]:
    """(served, stays): (part, operators with their backends) -> how often; (part, why not) -> how often.

    As the model is now: of adapters, hooks and modes that change, the next look tells.
    """
    served, stays = Table(), Table()
    for module in model.modules():
        kind = switched_as(module) if is_switched(module) else None
        if kind == "norm":
            _note(served, stays, "norm", known_ways(*place_of(module)), _of_norm(module))
        elif kind == "layer":
            _layer(served, stays, module)
    return served, stays


def _note(served: Table, stays: Table, part: str, ways: Ways, why: str | None) -> None:
    why = ways.reasons.get(part, why)
    if why is not None:
        stays[_NAMES[part], why] += 1
        return
    by = ", ".join(f"{op} ({ways.by[op] or 'forced'})" for op in PARTS[part])
    served[_NAMES[part], by] += 1


def _layer(served: Table, stays: Table, layer: Any) -> None:
    device, dtype = place_of(layer)
    ways, attention, mlp = known_ways(device, dtype), innermost(layer.self_attn), layer.mlp
    _note(served, stays, "attention", ways, _of_attention(attention, dtype))
    _note(served, stays, "stack", ways, _of_linears(attention, QKV, dtype))
    act = None if mlp.config.hidden_act == "silu" else f"the activation is {mlp.config.hidden_act}"
    act = "hooks listen to the activation" if is_listened_to(mlp.act_fn) else act
    _note(served, stays, "mlp", ways, act or _of_linears(mlp, MLP, dtype))


def _of_norm(module: Any) -> str | None:
    if module.weight.requires_grad:
        return "its weight trains"
    return "it is in float64" if module.weight.dtype is torch.float64 else None


def _of_attention(module: Any, dtype: torch.dtype) -> str | None:
    if module.config._attn_implementation != "sdpa":
        return f"the model asks for {module.config._attn_implementation}"
    if module.attention_dropout and module.training:
        return "its probabilities have dropout"
    return "it is in float64" if dtype is torch.float64 else None


def _of_linears(module: Any, names: tuple[str, ...], dtype: torch.dtype) -> str | None:
    """The first layer that is called as a module, and why."""
    for name in names:
        why = refusal(getattr(module, name), dtype)
        if why is not None:
            return f"{name}: {why}"
    return None
