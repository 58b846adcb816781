"""The registry of methods, by PEFT's types. A method's file registers it by being there; no list has them."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from ..config.base import PeftConfig, class_of
from ..config.types import PeftType
from ..config.types import peft_type as known_type
from ..weights.base import LayerInfo as LayerInfo
from .method import Method

_REGISTRY: dict[PeftType, Method] = {}


def register(cls: type[Method]) -> type[Method]:
    """Class decorator: the method becomes what its `peft_type` means."""
    _REGISTRY[cls.peft_type] = cls()
    return cls


def registry() -> Mapping[PeftType, Method]:
    """Every method there is."""
    load_all()
    return _REGISTRY


def get_method(peft_type: PeftType | str | None) -> Method:
    """The method of a PEFT type; a clear error for types that PEFT has and this version does not."""
    return _REGISTRY[class_of(known_type(peft_type).value).own_type]


def method_of(config: PeftConfig) -> Method:
    """The method that a configuration object asks for."""
    if config.peft_type is None:
        raise ValueError(f"{type(config).__name__} names no method (peft_type is None)")
    return get_method(config.peft_type).variant(config)


@functools.cache
def load_all() -> None:
    """Import every method, which registers it."""
    room = importlib.import_module(__name__.rpartition(".")[0])
    for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        importlib.import_module(module.name)
