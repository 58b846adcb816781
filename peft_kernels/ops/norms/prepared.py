"""`rms_norm` and `layer_norm` of one layer, call after call, on the native CPU backend
(`peft_kernels.PreparedCall`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...prepared import Prepared, native_serves, plain, prepares
from . import layer_backward_op, layer_norm, layer_op, rms_backward_op, rms_norm, rms_op
from .native import fields, step, step_backward


class NormCall(Prepared):
    """Without gradients, for x of any rows that follow each other."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool,
        frozen: tuple[Tensor | None, ...] = (),
    ) -> None:  # fmt: skip
        own = [t for t in (weight, bias) if t is not None]
        super().__init__(x, own, [] if weight is None else [weight], frozen)
        self.packed, self.numbers = fields(x, weight, bias), (centred, eps, offset)

    def run(self, x: Tensor) -> Tensor | None:
        return step(x, self.k, self.packed, self.numbers) if x.is_contiguous() else None


class NormStep(NormCall):
    """With gradients for x alone."""

    def run(self, x: Tensor) -> Tensor | None:
        return _apply(x, self) if x.is_contiguous() else None


class _Step(torch.autograd.Function):
    """(x contiguous, the prepared call) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: NormStep) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *call.saved)
        ctx.call = call
        return step(x, call.k, call.packed, call.numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, None]:
        if dy is None:
            return None, None
        call: NormStep = ctx.call
        x, *saved = ctx.saved_tensors
        if call.holds_backward(dy, x, saved):
            return step_backward(dy, x, call.k, call.packed, call.numbers), None
        (centred, *numbers), weight = call.numbers, saved[0] if saved else None
        op = layer_backward_op if centred else rms_backward_op
        dx, *_ = op(dy, x, weight, *numbers[: 1 if centred else 2], True, False)
        return dx, None


# what Function.apply does but for the cases that `dispatch_observed` tells of
_apply: Any = super(torch.autograd.Function, _Step).apply


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


def _trained(*factors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in factors)


def _rms_step(x: Tensor, arguments: tuple[Any, ...]) -> NormStep | None:
    weight, eps, offset = (*arguments, 0.0)[:3]
    if _trained(weight) or _rms(x, arguments) is None:
        return None
    row = x.detach().new_empty((1, x.shape[-1]))
    serves = native_serves((rms_backward_op, (row, row, weight, eps, offset, True, False)))
    return NormStep(x, weight, None, eps, offset, False, (weight,)) if serves else None


def _layer_step(x: Tensor, arguments: tuple[Any, ...]) -> NormStep | None:
    weight, bias, eps = arguments
    if _trained(weight, bias) or _layer(x, arguments) is None:
        return None
    row = x.detach().new_empty((1, x.shape[-1]))
    serves = native_serves((layer_backward_op, (row, row, weight, eps, True, False)))
    return NormStep(x, weight, bias, eps, 0.0, True, (weight, bias)) if serves else None


prepares(rms_norm, _rms, _rms_step)
prepares(layer_norm, _layer, _layer_step)
