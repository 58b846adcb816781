"""A plan for an adapter that mixes others: it goes into the layers that have these, which are in the model already."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..config.limits import check_adapter_name
from ..layer.layer import AdapterLayer
from ..methods.registry import method_of
from .modules import LayerPlan, checked_info, walk
from .place import place
from .plan import InjectionPlan


def plan_mixture(model: nn.Module, config: Any, adapter_name: str) -> InjectionPlan:
    """The plan of an adapter whose method `mixes` others. Raises without having changed anything."""
    check_adapter_name(adapter_name)
    method = method_of(config)
    mixed = method.mixes(config) or {}
    if adapter_name in mixed:
        raise ValueError(f"Adapter {adapter_name!r} would have the name of one that it mixes ({', '.join(mixed)}).")
    layers = [(s, s.module) for s in walk(model) if isinstance(s.module, AdapterLayer)]
    layers = [(site, layer) for site, layer in layers if not mixed.keys().isdisjoint(layer.methods)]
    infos = [checked_info(site) for site, _ in layers]
    for info in infos:
        method.check_layer(config, info)
    shared = method.make_shared(config, infos)
    view = SimpleNamespace(**shared)
    states = [method.make_state(config, info, view) for info in infos]

    def finish() -> None:
        if infos:  # in the model's precision, which is not that of a quantised layer
            floating = (p.dtype for p in model.parameters() if p.is_floating_point())
            place(shared, replace(infos[0], dtype=next(floating, torch.float32)), method.autocast)
        for child in shared.values():
            if isinstance(child, nn.Module):
                child.train(model.training)

    finish()
    plans = [LayerPlan(*pair, state, method) for pair, state in zip(layers, states, strict=True)]
    return InjectionPlan(model, config, adapter_name, method, plans, [], [], shared, {}, {}, [], finish)
