"""Configuration classes by the `peft_type` of their method, and how the methods' files, which fill this, are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CLASSES: dict[str, type[Any]] = {}
_loaders: list[Callable[[], None]] = []


def loaded_by(load: Callable[[], None]) -> None:
    """Let `load` import whatever defines configuration classes. The package says so, which stands above this file."""
    _loaders.append(load)


def class_of(peft_type: str) -> type[Any]:
    """The configuration class of a method. NotImplementedError for a type that PEFT has and this version does not."""
    for load in _loaders:
        load()
    found = CLASSES.get(peft_type)
    if found is None:
        have = ", ".join(sorted(CLASSES))
        raise NotImplementedError(f"The method {peft_type} is not there yet; this version has: {have}.")
    return found
