"""ParallelLayer: an adapter layer on a base layer of which each process computes a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .layer import AdapterLayer


class ParallelLayer(AdapterLayer):
    """Base layer and adapters compute with this process's part of the input, between `enter` and `leave` of the base
    weight; so they have one collective in common."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = self.base
        if base.parallel == "megatron" and ("adapter_names" in kwargs or self.rows.given()):
            raise ValueError(f"{self._shown}: LoraParallelLinear does not support mixed_batch_forward yet.")
        return base.leave(super().forward(base.enter(x), *args, **kwargs))
