"""PEFT's classes of the layers that an adapter layer stands for: one here, several hundred there."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import ModuleType

from torch import nn

from ..config.seen_as_peft import class_of_peft, module_of_peft


def layer_classes(peft_types: Iterable[str], label: str, quantised: str | None = None) -> tuple[type, ...]:
    """`BaseTunerLayer`, and of each method the class of all its layers and the one of layers of this label:
    `lora.LoraLayer` and `lora.Linear4bit`. quantised: the quantiser, which PEFT has a file of layers for."""
    base = class_of_peft("peft.tuners.tuners_utils", "BaseTunerLayer")
    if base is None:
        return ()
    files = ("layer", "layers", "bnb", *([quantised] if quantised else ()))
    paths = (f"peft.tuners.{kind.lower()}.{file}" for kind in dict.fromkeys(peft_types) for file in files)
    return _classes(base, tuple(m for m in map(module_of_peft, paths) if m is not None), label)


@functools.cache
def _classes(base: type, modules: tuple[ModuleType, ...], label: str) -> tuple[type, ...]:
    found = [base]
    for module in modules:
        for name, cls in vars(module).items():
            there = isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == module.__name__
            # A few of PEFT's layers are an nn.Linear, which an adapter layer is not: its weight is its base layer's.
            if there and name.endswith((label, "Layer", "SVDQuantLinear")) and not issubclass(cls, nn.Linear):
                found.append(cls)
    return tuple(cls for cls in found if not any(cls is not other and issubclass(other, cls) for other in found))
