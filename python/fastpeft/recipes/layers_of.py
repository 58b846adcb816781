"""The layers that an initialisation measures before there is an adapter, the measuring, and files of its results."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..files.atomic import atomic_file
from ..inject.modules import inside_saved, walk
from ..inject.plan import resolve_targets
from ..methods.method import LayerInfo
from ..methods.registry import method_of
from ..weights.find import weight_of


class TargetLayer(NamedTuple):
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
        raise ValueError("No supported layers found: the configuration targets no linear layer of the model.")
    return found


def means_over_passes(
    model: nn.Module, layers: Mapping[str, TargetLayer], run: Callable[[], None], training: bool, hook: Any
) -> dict[str, Tensor]:
    """The mean, by layer, of what `hook` adds while `run` runs the model, in training or evaluation mode.

    hook(layer, x, output, add) is called in each layer's forward with its inputs [rows, in]; add(tensor) adds one. It
    may return another output.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def watch(name: str, layer: TargetLayer) -> Any:
        def add(value: Tensor) -> None:
            sums[name] = sums[name] + value if name in sums else value
            counts[name] += 1

        return layer.info.module.register_forward_hook(
            lambda module, args, output: hook(layer, args[0].detach().flatten(0, -2), output, add)
        )

    handles = [watch(name, layer) for name, layer in layers.items()]
    was_training = model.training
    try:
        model.train(training)
        run()
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return {name: total / counts[name] for name, total in sums.items()}


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
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        torch.save(dict(tensors), file)
