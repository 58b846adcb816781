"""Which description a module of transformers has, by its class. A family's file is found by being there."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from weakref import WeakKeyDictionary

from torch import nn

from ..weights.nf4_experts import is_experts
from . import known
from .description import Family, Part
from .experts import EXPERTS

MODELS = "transformers.models."


def families() -> list[str]:
    """Names of the families that are described, which are names of folders of transformers' models."""
    return sorted(module.name for module in pkgutil.iter_modules(known.__path__))


@functools.cache
def parts(name: str) -> Family:
    """The classes of a family, by name; none of a family without a description."""
    module = f"{known.__name__}.{name}"
    if importlib.util.find_spec(module) is None:
        return {}
    found: Family = importlib.import_module(module).PARTS
    return found


_parts: WeakKeyDictionary[type, Part | None] = WeakKeyDictionary()  # parametrizations make a class for each module


def part_of(cls: type) -> Part | None:
    """The description of a class of transformers; None of one that has none."""
    if cls not in _parts:
        _parts[cls] = _described(cls)
    return _parts[cls]


def own_class(cls: type) -> type:
    """The class that a module had before FSDP2's `fully_shard` made one of it."""
    made = len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule"
    return cls.__bases__[1] if made else cls


def _described(cls: type) -> Part | None:
    cls = own_class(cls)
    if cls in (nn.LayerNorm, nn.RMSNorm):
        return None
    module, usual = cls.__module__, EXPERTS if is_experts(cls) else None
    if not module.startswith(MODELS):
        return usual
    folder = module.removeprefix(MODELS).split(".")[0]
    return parts(folder).get(cls.__name__, usual)
