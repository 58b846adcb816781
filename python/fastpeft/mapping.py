"""PEFT's tables from a method's type to its classes, read from the registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .config import PeftConfig, PeftType
from .method import Method, get_method, registry
from .model import get_peft_model, inject_adapter_in_model
from .tuner import BaseTuner, tuner_class

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "get_peft_model",
    "inject_adapter_in_model",
]


class _Table(Mapping[PeftType, Any]):
    """A view of the registry, so that nothing stands twice."""

    def __init__(self, entry: Callable[[Method], Any]) -> None:
        self._entry = entry

    def __getitem__(self, key: PeftType | str) -> Any:
        method = registry().get(PeftType(key)) if key in list(PeftType) else None
        if method is None:
            raise KeyError(key)
        return self._entry(method)

    def __iter__(self) -> Iterator[PeftType]:
        return iter(registry())

    def __len__(self) -> int:
        return len(registry())


def _tuner(method: Method) -> type[BaseTuner]:
    return tuner_class(method)


PEFT_TYPE_TO_CONFIG_MAPPING = _Table(lambda method: method.config_class)
PEFT_TYPE_TO_TUNER_MAPPING = _Table(_tuner)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _Table(_tuner)
PEFT_TYPE_TO_PREFIX_MAPPING = _Table(lambda method: method.prefix)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration object that a dictionary with `peft_type` describes."""
    return get_method(config_dict.get("peft_type")).config_class(**config_dict)
