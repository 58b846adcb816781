"""A layer with one adapter as one call of a kernel: what `Method.fused` gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from peft_kernels import Projection, QuantWeight

from ..weights.lookups import Lookups

Fused = Callable[[Tensor], "Tensor | None"]


class LowRank(NamedTuple):
    """An adapter as the kernels take it."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout_p: float


class FusedProjection:
    """A `Fused` that is one projection, for callers that take several, or several adapters, in a call of a kernel.

    weight(): of the frozen base layer; None while no kernel may read it. adapter(): None while no kernel may act for
    it. parameters: of the base layer. compute: the dtype that x is cast to first, where the layer has one. note: notes
    what the first two look at.
    """

    def __init__(
        self, run: Fused, weight: Callable[[], Tensor | QuantWeight | None], adapter: Callable[[], LowRank | None],
        parameters: Mapping[str, Tensor | None], compute: torch.dtype | None, note: Callable[[Lookups], None],
    ) -> None:  # fmt: skip
        self.run, self.weight, self.adapter, self.parameters, self.compute = run, weight, adapter, parameters, compute
        self._note = note

    def __call__(self, x: Tensor) -> Tensor | None:
        return self.run(x)

    def note(self, lookups: Lookups) -> None:
        """Note what `projection` looks at."""
        self._note(lookups)
        lookups.entries(self.parameters, "bias")

    def projection(self) -> Projection | None:
        """All of it as it is now; None while no kernel may act."""
        found = self.adapter()
        weight = None if found is None else self.weight()
        if found is None or weight is None:
            return None
        return Projection(weight, found.a, found.b, found.scaling, self.parameters.get("bias"), found.dropout_p)
