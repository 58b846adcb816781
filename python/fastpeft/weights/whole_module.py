"""Modules that adapters act on as a whole, an attention or a decoder's block, rather than on a weight of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..files.offloaded import device_of
from .base import BaseWeight, LayerInfo, Saved, Weight


class WholeModule(BaseWeight):
    """A module in the place of a weight: it is called, and nothing is merged into it.

    width: features of what goes through it. model: what the module is in, for methods that read more of it. label: the
    name of PEFT's class of layers around such a module.
    """

    kind = "module"
    names = ("", None)

    def __init__(self, module: nn.Module, width: int, model: nn.Module, label: str) -> None:
        super().__init__(module)
        self.width, self.model, self.label = width, model, label

    def info(self, name: str = "") -> LayerInfo:
        first = self._first
        return LayerInfo(
            name=name, kind=self.kind, shape=self.shape, in_features=self.width, out_features=self.width,
            has_bias=False, dtype=self.dtype, device=torch.device("cpu") if first is None else first[1], base=self,
        )  # fmt: skip

    @property
    def _first(self) -> tuple[torch.dtype, torch.device] | None:
        """dtype and device of the first floating-point parameter: a quantised weight is none, its scales may be."""
        found = ((m, p) for m in self.module.modules() for p in m.parameters(recurse=False) if p.is_floating_point())
        return next(((p.dtype, device_of(m, p)) for m, p in found), None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.width

    @property
    def dtype(self) -> torch.dtype:
        first = self._first
        return torch.float32 if first is None else first[0]

    def read(self) -> Weight:
        raise TypeError(f"a {type(self.module).__name__} has no weight of its own that could be read or merged into")

    def save(self) -> Saved:
        return {}

    def restore(self, saved: Saved) -> None:
        """Nothing is ever changed."""

    def call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.module(x, *args, **kwargs)
