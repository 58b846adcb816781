"""A layer with adapters as methods see it: the members that methods use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from ..weights.base import BaseWeight


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
