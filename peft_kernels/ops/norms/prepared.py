"""`rms_norm` and `layer_norm` of one layer, call after call, on the native CPU backend without gradients
(`peft_kernels.PreparedCall`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...prepared import Prepared, native_serves, plain, prepares
from . import layer_norm, layer_op, rms_norm, rms_op
from .native import fields, step


class NormCall(Prepared):
    """Without gradients, for x of any rows that follow each other."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool
    ) -> None:
        super().__init__(x, [t for t in (weight, bias) if t is not None])
        self._packed, self._numbers = fields(x, weight, bias), (centred, eps, offset)

    def run(self, x: Tensor) -> Tensor | None:
        return step(x, self.k, self._packed, self._numbers) if x.is_contiguous() else None


def _rms(x: Tensor, arguments: tuple[Any, ...]) -> NormCall | None:
    weight, eps, offset = (*arguments, 0.0)[:3]
    row = x.detach().new_empty((1, x.shape[-1]))
    if plain(weight) is None or not native_serves((rms_op, (row, weight, eps, offset))):
        return None
    return NormCall(x, weight, None, eps, offset, False)


def _layer(x: Tensor, arguments: tuple[Any, ...]) -> NormCall | None:
    weight, bias, eps = arguments
    row = x.detach().new_empty((1, x.shape[-1]))
    if plain(weight, bias) is None or not native_serves((layer_op, (row, weight, bias, eps))):
        return None
    return NormCall(x, weight, bias, eps, 0.0, True)


prepares(rms_norm, _rms)
prepares(layer_norm, _layer)
