"""Which modules of a model run on which operators now, and why the others do not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from ..weights.base import acts_in_calls, innermost
from . import attention, experts, norms
from .description import Attention, Experts, Mlp, Norm, Part, Together
from .mlp import act_in, attribute
from .projections import refusal
from .registry import MODELS, own_class, part_of
from .switch import is_switched, switched_as
from .ways import BY_CHOICE, PARTS, Ways, known_ways

_NAMES = {"norm": "norms", "stack": "q, k and v", "attention": "attention", "mlp": "MLPs", "experts": "experts"}
# The end of a class's name in transformers -> what it is, of classes that no description has.
_LIKE = {"Attention": "attention", "MLP": "MLPs", "Norm": "norms", "Experts": "experts", "Mixer": "mixers",
         "DeltaNet": "mixers", "ShortConv": "mixers"}  # fmt: skip
Table = Counter[tuple[str, str]]


def look(model: nn.Module) -> tuple[Table, Table]:
    """(served, stays): (part, operators with their backends) -> how often; (part, why not) -> how often.

    As the model is now: of adapters, hooks and modes that change, the next look tells.
    """
    served, stays = Table(), Table()
    dtype = _dtype(model)
    for module in model.modules():
        if is_switched(module) and switched_as(module) != "head":
            _switched(served, stays, module, known_ways(_device(module), dtype), dtype)
        elif type(module) is nn.LayerNorm:
            stays["norms", BY_CHOICE["layer_norm"]] += 1
        elif own_class(type(module)).__module__.startswith(MODELS):
            cls: Any = own_class(type(module))
            like, part = _like(cls), part_of(cls)
            why = experts.why_not(module, part) if isinstance(part, Experts) else None
            if like is not None and not any(map(is_switched, module.modules())):  # what holds such a part is none
                stays[like, why or f"{cls.__name__} is not described"] += 1
    return served, stays


def _like(cls: type) -> str | None:
    return next((part for end, part in _LIKE.items() if cls.__name__.endswith(end)), None)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which the layers compute: that of the norms; weights of linear layers may be quantised."""
    weights = (getattr(m, "weight", None) for m in model.modules() if "Norm" in type(m).__name__)
    found = next((w.dtype for w in weights if isinstance(w, torch.Tensor)), None)
    return found or next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _device(module: nn.Module) -> torch.device:
    tensor = next(iter((*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _switched(served: Table, stays: Table, module: Any, ways: Ways, dtype: torch.dtype) -> None:
    part: Part = module._fastpeft.part
    if isinstance(part, Norm):
        _note(served, stays, "norm", ways, norms.why_not(module, part, dtype))
    elif isinstance(part, Mlp):
        act = attribute(module, part.act)
        why = None if act_in(module, part) else f"the activation is {type(act).__name__}"
        why = "hooks listen to the activation" if act is not None and acts_in_calls(act) else why
        _note(served, stays, "mlp", ways, why or _of_linears(module, (*part.up, part.down), dtype))
    elif isinstance(part, Attention):
        _note(served, stays, "attention", ways, attention.why_not(module, part, dtype))
        _note(served, stays, "stack", ways, _of_linears(innermost(module), part.qkv, dtype))
    elif isinstance(part, Experts):
        _note(served, stays, "experts", ways, experts.why_not(module, part))
    elif isinstance(part, Together):
        _together(served, stays, module, part, ways, dtype)


def _together(served: Table, stays: Table, module: Any, part: Together, ways: Ways, dtype: torch.dtype) -> None:
    base = module._fastpeft.base
    if part.attends:
        why = attention.why_not(module, part, dtype)
        _note(served, stays, "attention", ways, why, f" in {base.__name__}'s own code")
    else:
        stays[_like(base) or "other layers", f"{base.__name__} computes it itself"] += 1
    names = tuple(name for name in part.names if getattr(module, name, None) is not None)
    if len(names) > 1:
        why, label = _of_linears(module, names, dtype), _NAMES["stack"] if part.attends else "projections of one input"
        _note(served, stays, "stack", ways, why, label=label)


def _note(
    served: Table, stays: Table, part: str, ways: Ways, why: str | None, more: str = "", label: str = ""
) -> None:
    label, why = label or _NAMES[part], ways.reasons.get(part, why)
    if why is not None:
        stays[label, why] += 1
        return
    by = ", ".join(f"{op} ({ways.by[op] or 'forced'})" for op in PARTS[part])
    served[label, by + more] += 1


def _of_linears(module: Any, names: tuple[str, ...], dtype: torch.dtype) -> str | None:
    """The first layer that is called as a module, and why."""
    for name in names:
        why = refusal(attribute(module, name), dtype)
        if why is not None:
            return f"{name}: {why}"
    return None
