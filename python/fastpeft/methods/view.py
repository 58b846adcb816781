"""A layer as a method sees it: the adapted layer, what an adapter wraps, and one adapter's tensors by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..files.whole import is_apart, opened
from ..weights.base import BaseWeight, LayerInfo


class AdaptedLayer(Protocol):
    """A layer that holds adapters (`AdapterLayer`). Containers of adapters' tensors are attributes by their names."""

    base_layer: nn.Module
    training: bool
    in_features: int
    out_features: int

    @property
    def version(self) -> int:
        """Rises when the layer's adapters, containers, base or mode change."""

    @property
    def base(self) -> BaseWeight:
        """The base layer's weight."""

    def changed(self) -> None:
        """Forget whatever was made from the layer's adapters, base and mode."""

    def row_values(self, adapter: str) -> Sequence[Any] | None:
        """The values that `Method.row_values` gave for the rows of this call."""

    def __getattr__(self, name: str) -> Any: ...


class Inner(Protocol):
    """The layer that an adapter wraps: the base layer with the adapters before it."""

    @property
    def info(self) -> LayerInfo: ...

    @property
    def bare(self) -> bool:
        """True if it is the base layer itself, without adapters."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def weight(self) -> tuple[Tensor, Tensor | None]:
        """Its dense W and b, in at least float32; costly for quantised layers."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output if the layer had another weight (a convolution with its stride and padding)."""

    def bias(self) -> Tensor | None:
        """Its b alone, without its W. For linear layers."""

    def frozen(self) -> Callable[[], Tensor] | None:
        """A function that gives the W of a frozen base layer (no embedding), for a method that computes with another
        weight in its place (`made_weight.py`); None if the module has to be called (adapters, hooks, training)."""


class AdapterView:
    """One adapter's tensors and values in one layer, by name: `s.lora_A`, `s.scaling`; and the layer's sizes and mode:
    `s.in_features`, `s.training`. Reads through, holds nothing."""

    # No __slots__: torch.compile traces `__getattr__` only of objects that have a `__dict__`.
    def __init__(self, layer: AdaptedLayer, name: str) -> None:
        self._layer = layer
        self._name = name

    @property
    def row_values(self) -> Sequence[Any] | None:
        """The values that `Method.row_values` gave for the rows of this call."""
        return self._layer.row_values(self._name)

    @property
    def layer_shown(self) -> str:
        """The layer in an error."""
        return self._layer.layer_name or "the layer"

    def neighbours(self) -> dict[str, tuple[Any, AdapterView]]:
        """The layer's other adapters, each with its method."""
        layer = self._layer
        return {n: (m, AdapterView(layer, n)) for n, m in layer.methods.items() if n != self._name}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._layer, name)
        if isinstance(found, nn.Module) and "_hf_hook" in found.__dict__:
            found = opened(found)
        try:
            value = found if isinstance(found, int) else found[self._name]
        except KeyError:
            raise AttributeError(f"adapter {self._name!r} has no {name!r} in this layer") from None
        return opened(value) if isinstance(value, nn.Module) and is_apart(value) else value

    def own(self, tensor: Tensor) -> Tensor:
        """One of the adapter's tensors as this process computes with it."""
        return self._layer.base.own(tensor)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An input in the dtype of the adapter's tensors, unless a user turned that off."""
        return x.to(dtype) if self._layer.cast_input_dtype_enabled else x

    def get(self, name: str, default: Any = None) -> Any:
        container = getattr(self._layer, name, None)
        return default if container is None or self._name not in container else getattr(self, name)
