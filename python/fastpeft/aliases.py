"""PEFT's modules that have no file of their own here: their names, from where they live."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


class Alias(ModuleType):
    """A module whose names are those of others."""

    def __init__(self, name: str, homes: str) -> None:
        super().__init__(name, f"`{name.replace('fastpeft', 'peft', 1)}`.")
        self._homes = [f"fastpeft.{home}".rstrip(".") for home in homes.split()]

    def __getattr__(self, name: str) -> Any:
        for home in () if name.startswith("__") else self._homes:
            try:
                value = getattr(importlib.import_module(home), name)
            except AttributeError:
                continue
            setattr(self, name, value)
            return value
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def register(package: str, modules: Mapping[str, str]) -> None:
    """Make `package.<name>` importable for each name, with the names of the modules that its value lists."""
    for name, homes in modules.items():
        alias = Alias(f"{package}.{name}", homes)
        sys.modules[alias.__name__] = alias
        setattr(sys.modules[package], name, alias)
