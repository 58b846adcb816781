"""Adapters in several processes: FSDP2 with rules for what is sharded, and FSDP1's policy. See docs/distributed.md.

torch.distributed is imported on use only.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..files.checks import list_some
from ..layer.layer import AdapterLayer
from ..layer.shared_tensors import SharedDict
from ..weights.nf4_store import NF4Store

Blocks = Iterable["str | type[nn.Module]"]


def fully_shard_model(
    model: nn.Module, mesh: Any = None, *, blocks: Blocks | None = None, shard_quantized: bool = True, **options: Any
) -> nn.Module:
    """Shard a model with adapters by FSDP2 (`torch.distributed.fsdp.fully_shard`), in place; returns it.

    mesh: a DeviceMesh (None: all processes). blocks: classes of the modules, by name or themselves, that are gathered
    one at a time; None: those that the model names (`_no_split_modules`), else the elements of its ModuleLists.
    shard_quantized: shard the bytes and scales of NF4Linear layers and of experts too; False keeps them whole in every
    process.
    options: of `fully_shard` (reshard_after_forward, mp_policy, offload_policy, ignored_params).

    A block is a group with its adapters and its base weights. The root group has everything else, and what adapters
    share across blocks. bitsandbytes' quantised weights stay whole in every process (`from_bitsandbytes` before the
    adapters are added makes them NF4Linear). Call it after adapters were added, loaded and made active and before the
    optimizer is made. Raises ValueError for merged adapters, for blocks that are not in the model, and for trained
    parameters of two dtypes in one group, which FSDP2 cannot reduce together.
    """
    from torch.distributed.fsdp import fully_shard

    merged = [m.layer_name for m in model.modules() if isinstance(m, AdapterLayer) and m.merged_adapters]
    if merged:
        raise ValueError(f"fully_shard_model: adapters are merged in {list_some(merged)}; call unmerge_adapter() first")
    units = _units(model, blocks)
    ignored = set(options.pop("ignored_params", None) or ())
    for parameter in model.parameters():  # bitsandbytes' have a state beside them, which a shard would lose
        if any(c.__name__ in ("Params4bit", "Int8Params") for c in type(parameter).__mro__):
            ignored.add(parameter)
    across = _shared_by_all(model)
    outside = model.named_modules(memo=set(units))  # the modules that are in no block, or not only in one
    reached = {id(p) for _, m in outside for p in m._parameters.values() if p is not None}
    lost = [n for n, p in model.named_parameters() if p in across and p.requires_grad and id(p) not in reached]
    if lost:
        raise ValueError(f"fully_shard_model: several blocks train {list_some(lost)}, which nothing outside them holds")
    left = {n: p for n, p in model.named_parameters() if p not in ignored}
    for unit in units:
        inside = {p for p in unit.parameters() if p not in across}
        _check_dtypes(type(unit).__name__, {n: p for n, p in left.items() if p in inside})
        left = {n: p for n, p in left.items() if p not in inside}
    _check_dtypes("what is outside of its blocks", left)
    for module in model.modules():
        if isinstance(module, NF4Store) and shard_quantized:
            module.share_parameters()
        if isinstance(module, AdapterLayer):
            module.changed()  # it may hold the buffers that are parameters now
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=ignored | across, **options)
    fully_shard(model, mesh=mesh, ignored_params=ignored, **options)
    return model


def _units(model: nn.Module, blocks: Blocks | None) -> list[nn.Module]:
    """The modules that are gathered one at a time, none within another, in the model's order."""
    if blocks is None:
        blocks = getattr(model, "_no_split_modules", None)
    if blocks is None:
        found = [m for owner in model.modules() if type(owner) is nn.ModuleList for m in owner]
    else:
        wanted = [blocks] if isinstance(blocks, (str, type)) else list(blocks)
        classes = dict.fromkeys(type(m) for m in model.modules())
        for block in wanted:
            if not any(_is_named(c, block) for c in classes):
                raise ValueError(f"fully_shard_model: no module of {type(model).__name__} is a {block!r} (blocks)")
        found = [m for m in model.modules() if any(_is_named(type(m), block) for block in wanted)]
    inner = {id(m) for unit in found for m in unit.modules() if m is not unit}
    return [m for m in dict.fromkeys(found) if id(m) not in inner and m is not model]


def _is_named(cls: type[Any], block: str | type[nn.Module]) -> bool:
    return cls.__name__ == block if isinstance(block, str) else issubclass(cls, block)


def _shared_by_all(model: nn.Module) -> set[nn.Parameter]:
    """Parameters that layers of different blocks hold, such as a bank of vectors, or a tied weight."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():  # each module once
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + (2 if isinstance(module, SharedDict) else 1)
    return {parameter for parameter, count in owners.items() if count > 1}


def _check_dtypes(where: str, named: Mapping[str, nn.Parameter]) -> None:
    trained: dict[torch.dtype, list[str]] = {}
    for name, parameter in named.items():
        if parameter.requires_grad:
            trained.setdefault(parameter.dtype, []).append(name)
    if len(trained) > 1:
        listed = "; ".join(f"{dtype}: {list_some(names)}" for dtype, names in trained.items())
        raise ValueError(
            f"fully_shard_model: {where} trains parameters of several dtypes ({listed}), which FSDP2 cannot reduce "
            "together. Give them one dtype (`fastpeft.cast_mixed_precision_params` makes them float32)."
        )


def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """PEFT's wrapping policy for the older `FullyShardedDataParallel`: the model's blocks and every trained leaf
    module, so that no group mixes what is trained with what is not. Blocks: the classes that the environment names
    (FSDP_TRANSFORMER_CLS_TO_WRAP), else `_no_split_modules`.

    Raises ValueError for a class that is not in the model, and where modules train the same tensors, which only
    one unit can have: wrap such a model as one unit, without a policy, or use `fully_shard_model`.
    """
    from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

    listed = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    names = [n.strip() for n in listed.split(",")] if listed else list(getattr(model, "_no_split_modules", None) or ())
    classes = {type(m).__name__: type(m) for m in model.modules()}
    for name in names:
        if name not in classes:
            raise ValueError(f"Could not find the transformer layer class to wrap in the model: {name!r}")
    places = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False) if p.requires_grad)
    if shared := [name for name, p in model.named_parameters() if places[id(p)] > 1]:
        raise ValueError(
            f"FullyShardedDataParallel cannot wrap modules that train the same tensors, {list_some(shared)}: wrap the "
            "model as one unit, without auto_wrap_policy, or shard it by FSDP2 (fastpeft.fully_shard_model)."
        )

    def trains(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not list(module.named_children()) and weight is not None and bool(weight.requires_grad)

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=trains),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[name] for name in names}),
    ]
    return functools.partial(_or_policy, policies=policies)
