"""Which layers of a model a pool serves, and what a configuration selects among them."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import nn

from ..inject.modules import Site, base_of, inside_saved, set_child, walk
from ..inject.plan import resolve_targets
from ..layer.layer import AdapterLayer
from ..methods.lora.lora import LoraConfig
from ..methods.method import LayerInfo
from ..methods.registry import method_of


class Selector:
    """Modules of a model that configurations select. Answers are kept: thousands of adapters ask the same."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = {site.name: site for site in walk(model) if site.name and not inside_saved(site)}
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, ...]] = {}

    def names(self, config: LoraConfig) -> tuple[str, ...]:
        """The modules that a configuration targets, in the model's order. Raises ValueError if it cannot be told."""
        fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "task_type")
        key = repr([sorted(v) if isinstance(v, set) else v for v in (getattr(config, f) for f in fields)])
        with self._lock:  # one at a time: a hostile expression costs half a second once, not once a thread
            if key not in self._known:
                if len(self._known) >= 4096:
                    self._known.clear()
                matched = resolve_targets(self.model, config, method_of(config), self.sites, None)[1]
                self._known[key] = tuple(matched.names)
            return self._known[key]

    def why_not(self, name: str) -> str | None:
        """Why a module cannot be one of the pool's layers; None if it can."""
        site = self.sites[name]
        base = base_of(site)
        what = f"{name!r}, a {type(site.module).__name__}"
        if base is None or base.kind != "linear" or isinstance(site.parent, nn.MultiheadAttention):
            return f"{what}, is no linear layer"
        if isinstance(site.module, AdapterLayer):
            return f"{what}, holds adapters already: give the pool the plain base model"
        if base.fast() is None:
            return f"{what}, has no weight that multi_lora_linear takes (dense as nn.Linear stores it, or 4-bit)"
        return None


def wrap(selector: Selector, infos: Mapping[str, LayerInfo]) -> dict[str, AdapterLayer]:
    """Put an AdapterLayer without adapters in the place of each of these modules."""
    layers = {}
    for name in infos:
        site = selector.sites[name]
        layers[name] = layer = AdapterLayer(site.module, name, site.base)
        layer.train(site.module.training)
        set_child(site, layer)
    return layers


def unwrap(sites: Mapping[str, Site], layers: Mapping[str, AdapterLayer]) -> None:
    """Take the layers that `wrap` made out again."""
    for name, layer in layers.items():
        set_child(sites[name], layer.base_layer)
