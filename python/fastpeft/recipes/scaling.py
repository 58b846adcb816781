"""Contexts in which a model's adapters act otherwise: with another scaling, without casts of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..inject.modules import adapter_layers
from ..layer.containers import AdapterValues


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this, every adapter that has a scaling acts with `multiplier` times it."""
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers: list[Any] = [m for _, m in adapter_layers(model) if m._scaling]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [layer.scaling for layer in layers]  # who holds on to one finds in it what it held
    try:
        for layer in layers:
            _set_scaling(layer, AdapterValues({name: value * multiplier for name, value in layer.scaling.items()}))
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            there = layer.scaling
            for name in values.keys() - there.keys():  # deleted meanwhile
                del values[name]
            values |= {name: value for name, value in there.items() if name not in values}
            _set_scaling(layer, values)


def _set_scaling(layer: Any, values: AdapterValues) -> None:
    layer.scaling = values
    layer.changed()  # its plan looks scalings up in the dictionary that it was made with


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this, adapters take inputs as they are: something else (layerwise casting) brings the dtypes together."""
    layers = [m for _, m in adapter_layers(model)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
            layer.changed()
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled
            layer.changed()
