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
        stored = (m for m in self.module.modules() for _ in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        first: Any = next(stored, nn.Identity())
        tensors = (*first.parameters(recurse=False), *first.buffers(recurse=False))
        return LayerInfo(
            name=name, kind=self.kind, shape=self.shape, in_features=self.width, out_features=self.width,
            has_bias=False, dtype=self.dtype, base=self,
            device=device_of(first, tensors[0]) if tensors else torch.device("cpu"),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.width

    @property
    def dtype(self) -> torch.dtype:
        """The first floating-point parameter's; float32 where all is quantised."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.float32)

    def read(self) -> Weight:
        raise TypeError(f"a {type(self.module).__name__} has no weight of its own that could be read or merged into")

    def save(self) -> Saved:
        return {}

    def restore(self, saved: Saved) -> None:
        """Nothing is ever changed."""

    def call(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.module(x, *args, **kwargs)
