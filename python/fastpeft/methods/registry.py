"""The registry of methods, by PEFT's types. A method's file registers it by being there; no list has them. Prompts,
which act on no layer, are in a room of their own (`prompts/`), which the package has loaded (`config.base.loaders`).

`register` is for a method from outside of this package.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import TypeVar

from ..config.base import CLASSES, PeftConfig, check_is_config, class_of, loaders
from ..config.types import PeftType
from ..config.types import peft_type as known_type
from .method import METHODS, Method

Own = TypeVar("Own", bound=Method)


def register(cls: type[Own]) -> type[Own]:
    """Class decorator for a method of your own: from now on its type means it, also where this package has another.

    cls: `class X(Method, config=XConfig)` with `class XConfig(TargetConfig, own_type=...)`. The type is one of PEFT's
    (`PeftType`), as files name it. Raises TypeError for a class without such a configuration.
    """
    if "config_class" not in vars(cls) or cls.config_class.own_type is None:
        expected = "a class X(Method, config=XConfig), where XConfig has an own_type"
        raise TypeError(f"register: {cls.__name__} must be {expected}")
    load_all()  # imported later, this package's method of the type would take it back
    METHODS[cls.peft_type], CLASSES[cls.peft_type.value] = cls(), cls.config_class
    return cls


def registry() -> Mapping[PeftType, Method]:
    """Every method that acts on layers."""
    load_all()
    return {kind: method for kind, method in METHODS.items() if not method.prompts}


def every_method() -> Mapping[PeftType, Method]:
    """Every method there is, prompts too."""
    for load in loaders:
        load()
    return METHODS


def get_method(peft_type: PeftType | str | None) -> Method:
    """The method of a PEFT type; a clear error for a type that has none."""
    return METHODS[class_of(known_type(peft_type).value).own_type]


def method_of(config: PeftConfig) -> Method:
    """The method that a configuration object asks for."""
    check_is_config(config)
    if config.peft_type is None:
        raise ValueError(f"{type(config).__name__} names no method (peft_type is None)")
    return get_method(config.peft_type).variant(config)


def load_all() -> None:
    """Import every method of a layer, which registers it."""
    load_room(__name__.rpartition(".")[0])


@functools.cache
def load_room(name: str) -> None:
    """Import every method of a room."""
    room = importlib.import_module(name)
    for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        importlib.import_module(module.name)
