"""Megatron's parallel linear layers: a part of W in each process, and collectives of their own in their forward."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .base import BaseWeight, has_base

COLUMN, ROW = "ColumnParallelLinear", "RowParallelLinear"


class MegatronWeight(BaseWeight):
    """ColumnParallelLinear (rows of W, its outputs, are split) and RowParallelLinear (columns). Their forward returns
    (output, bias): the bias for whoever adds it later, or None. `info` tells the whole's sizes."""

    label = "ParallelLinear"
    parallel = "megatron"

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        return any(has_base(module, name, "megatron") for name in (COLUMN, ROW))

    def check(self) -> None:
        if self.module.weight is None:
            raise ValueError(f"this {type(self.module).__name__} gets its weight in each call (shared embeddings)")

    @property
    def split_dim(self) -> int:
        """The dimension of W that is split."""
        return 0 if has_base(self.module, COLUMN, "megatron") else 1

    @property
    def group(self) -> Any:
        """The processes that share the layer."""
        group = getattr(self.module, "tp_group", None)  # since megatron-core 0.13
        return group or sys.modules["megatron.core.parallel_state"].get_tensor_model_parallel_group()

    def features(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return int(self.module.output_size), int(self.module.input_size)

    def call(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(x, *args, **kwargs)[0]  # type: ignore[no-any-return]

    def leave(self, y: Tensor) -> Any:
        return y, self.module.bias if self.module.skip_bias_add else None
