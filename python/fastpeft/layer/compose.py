"""One call of an adapter layer: the base layer, and the adapters that wrap it one after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.method import AdaptedLayer
from ..weights.base import LayerInfo, Weight
from .by_row.call import part


class Composed:
    """A layer with the first `depth` of its adapters `names` (None: with all): `method.Inner` at each depth."""

    __slots__ = ("_args", "_depth", "_kwargs", "_layer", "_names", "_root", "_weight", "dtype")

    def __init__(
        self,
        layer: AdaptedLayer,
        names: Sequence[str],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        root: Composed | None = None,
        depth: int | None = None,
    ) -> None:
        self._layer, self._names, self._args, self._kwargs = layer, names, args, kwargs or {}
        self._depth = len(names) if depth is None else depth
        self._root = root or self
        self._weight: Weight | None = None
        self.dtype: torch.dtype | None = None

    @property
    def info(self) -> LayerInfo:
        info: LayerInfo = self._layer.info
        return info

    @property
    def bare(self) -> bool:
        return self._depth == 0

    def __call__(self, x: Tensor) -> Tensor:
        layer = self._layer
        if self._depth == 0:
            y: Tensor = layer.base.call(x, *self._args, **self._kwargs)
            self._root.dtype = y.dtype
            return y
        name = self._names[self._depth - 1]
        inner = Composed(layer, self._names, self._args, self._kwargs, self._root, self._depth - 1)
        view = layer.view(name)
        above: Tensor = layer.methods[name].forward(view, view, x, inner)
        return above

    def weight(self) -> Weight:
        if self._weight is None:
            self._weight = self._layer.merged_weight(self._names[: self._depth])
        assert self._weight is not None
        return self._weight

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._layer.base.apply(x, weight, bias)

    def bias(self) -> Tensor | None:
        if self.bare:
            return self._layer.base.bias
        zeros = torch.zeros(self.info.in_features, dtype=self.info.dtype, device=self.info.device)
        with part(self._layer, None):  # this is no row of the batch
            return self(zeros[None])[0]

    def frozen(self) -> Callable[[], Tensor] | None:
        bare = self.bare and not self._args and not self._kwargs
        return self._layer.base.frozen() if bare else None
