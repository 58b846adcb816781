"""The layers that an initialisation looks at before there is an adapter, and the files that keep what it found."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..inject.modules import inside_saved, walk
from ..inject.plan import resolve_targets
from ..methods.method import LayerInfo
from ..methods.registry import method_of
from ..weights.find import weight_of


@dataclass(frozen=True)
class TargetLayer:
    info: LayerInfo
    r: int


def target_layers(model: nn.Module, config: Any) -> dict[str, TargetLayer]:
    """The linear layers that a LoraConfig targets, by name; a config without targets gets the model's default ones."""
    method = method_of(config)
    sites = {site.name: site for site in walk(model) if site.name and not inside_saved(site)}
    resolved, matched = resolve_targets(model, config, method, sites, None)
    config.target_modules = resolved.target_modules
    own = method.layer_config(resolved, matched.names)
    found = {}
    for name in matched.names:
        base = weight_of(sites[name].module)
        if base is not None and base.kind == "linear" and not base.transient:
            found[name] = TargetLayer(base.info(name), own.get(name, resolved).r)
    if not found:
        raise ValueError("The configuration targets no linear layer of the model.")
    return found


def load_tensors(path: str | None, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Tensors of a file that `torch.save` wrote, as PEFT's are; None where there is no file. Nothing in it is run."""
    if path is None or not os.path.exists(path) or os.path.getsize(path) == 0:
        return None
    content = torch.load(path, map_location="cpu", weights_only=True)
    missing = [name for name in names if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} lacks {missing[0]!r}: it was made for another model or configuration")
    return {name: content[name] for name in names}


def save_tensors(path: str | None, tensors: Mapping[str, Tensor]) -> None:
    if path is None:
        return
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    temporary = f"{path}.tmp{os.getpid()}"
    torch.save(dict(tensors), temporary)
    os.replace(temporary, path)
