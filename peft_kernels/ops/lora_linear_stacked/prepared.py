"""`lora_linear_stacked` of one group of layers, call after call, on the native CPU backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...prepared import Prepared, native_serves, prepares
from ..lora_linear import prepared as single
from . import Projection, each, forward_op, lora_linear_stacked
from .native import step

_FIELDS = len(Projection._fields)


class StackedCall(Prepared):
    """Without gradients: one native call for all projections."""

    packed: list[tuple[bytes, ...]]
    sizes: list[tuple[int, int]]  # N and r of each

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()
        ys = step(self.packed, rows, self.sizes)
        return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def _inference(x: Tensor, given: tuple[Any, ...]) -> StackedCall | None:
    """given: the projections' fields, one after the other."""
    if not given or len(given) % _FIELDS:
        return None
    projections = [Projection(*given[i : i + _FIELDS]) for i in range(0, len(given), _FIELDS)]
    calls = [None if p.dropout_p else single.inference(x, tuple(p)) for p in projections]
    found = [call for call in calls if call is not None]
    if len(found) < len(projections):
        return None
    lists = [[*call.flat, call.n, call.a, call.b, call.scaling, call.bias, 0.0, None] for call in found]
    row = x.detach().new_empty((1, x.shape[-1]))
    if not native_serves((forward_op, (row, *([*field] for field in each(lists))))):
        return None
    made = StackedCall(x, given, [t for call in found for t in call.tensors])
    made.packed, made.sizes = [call.packed for call in found], [(call.n, call.r) for call in found]
    return made


prepares(lora_linear_stacked, _inference)
