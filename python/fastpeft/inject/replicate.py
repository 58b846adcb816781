"""Layer replication: a deeper model out of the same layers, which share their weights and differ by their adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

# Where transformer models keep their layers, below any `.model` and `.bert`.
LAYER_LISTS = ("layers", "encoder.layer", "h")


def replicate_layers(model: nn.Module, layer_map: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Replace a model's layers by those of the ranges [start, end) in `layer_map`, one after another.

    [[0, 4], [2, 5]] makes layers 0 1 2 3 2 3 4. Copies share parameters and buffers with what they are copies of.
    Returns a function that undoes it. A model that was replicated so already stays as it is. Raises ValueError for a
    model without a list of layers, and for ranges that it does not have.
    """
    parent, name, layers, core = _find(model)
    wanted = [tuple(pair) for pair in layer_map]
    if (before := getattr(layers, "replicated_as", None)) == wanted:
        return lambda: None
    if before is not None:
        raise ValueError(f"layer_replication={wanted}: the model's layers were replicated as {before} already")
    for pair in wanted:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] <= len(layers):
            raise ValueError(f"layer_replication: {list(pair)} is no range of the model's {len(layers)} layers")
    indices = [i for start, end in wanted for i in range(start, end)]
    new = nn.ModuleList([_clone(layers[i], at) for at, i in enumerate(indices)])
    new.train(layers.training)
    new.replicated_as = wanted  # type: ignore[assignment]
    config: Any = getattr(core, "config", None)
    count: Any = getattr(config, "num_hidden_layers", None)

    def put(held: nn.ModuleList, number: int) -> None:
        parent._modules[name] = held
        if count is not None:
            config.num_hidden_layers = number

    put(new, len(new))
    return lambda: put(layers, count)


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList, nn.Module]:
    core: Any = model
    while isinstance(getattr(core, "model", None), nn.Module):
        core = core.model
    core = getattr(core, "bert", core)
    for path in LAYER_LISTS:
        where, _, name = path.rpartition(".")
        parent = getattr(core, where, None) if where else core
        layers = getattr(parent, name, None)
        if isinstance(parent, nn.Module) and isinstance(layers, nn.ModuleList):
            return parent, name, layers, core
    looked = f"it looks for {', '.join(LAYER_LISTS)} (Llama, Bert and Falcon have one of these)"
    raise ValueError(f"layer_replication: found no list of layers in {type(model).__name__}; {looked}")


def _clone(layer: nn.Module, index: int) -> nn.Module:
    shared: dict[int, Any] = {id(t): t for t in [*layer.parameters(), *layer.buffers()]}
    clone = copy.deepcopy(layer, shared)
    for module in clone.modules():
        if hasattr(module, "layer_idx"):
            vars(module)["layer_idx"] = index  # by it an attention finds its cache
    return clone
