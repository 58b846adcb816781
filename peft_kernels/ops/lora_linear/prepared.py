"""`lora_linear` of one layer, call after call, on the native CPU backend (`peft_kernels.PreparedCall`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...dispatch import FLOATS
from ...prepared import Prepared, native_serves, plain, prepares
from . import backward_op, flat_weight, forward_op, lora_linear
from .native import fields, pack, step, step_backward


class LoraCall(Prepared):
    """Without gradients: one native call for x of any number of rows."""

    def __init__(
        self, x: Tensor, arguments: tuple[Any, ...], flat: tuple[Any, ...], n: int, tensors: list[Tensor],
        saved: list[Tensor], frozen: tuple[Tensor | None, ...] = (), more: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__(x, [*tensors, *more], saved, frozen)
        _, self.a, self.b, self.scaling, self.bias, self.dropout_p = arguments[:6]
        self.flat, self.n, self.r = flat, n, 0 if self.a is None else self.a.shape[0]
        row = x.detach().new_empty((1, self.k))
        self.packed = fields(pack(0, row, *flat, n, self.a, self.b, self.scaling, self.bias, self.dropout_p, None))

    def seed(self, x: Tensor) -> Tensor | None:
        return philox.draw_seed(x.device) if self.dropout_p > 0.0 and self.a is not None else None

    def rows(self, x: Tensor) -> Tensor:
        return (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()

    def run(self, x: Tensor) -> Tensor:
        seed = self.seed(x) if self.dropout_p else None
        if x.dim() == 2:
            return step(self.packed, x.contiguous(), self.n, self.r, seed)[0]
        y = step(self.packed, self.rows(x), self.n, self.r, seed)[0]
        return y.view(*x.shape[:-1], self.n)


class LoraStep(LoraCall):
    """With gradients."""

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = _apply(self.rows(x), self.a, self.b, self.seed(x) if self.dropout_p else None, self)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.n)


class _Step(torch.autograd.Function):
    """(x [M, K] contiguous, a, b, seed or None, the prepared call) -> y [M, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, call: LoraStep) -> Tensor:
        y, s = step(call.packed, x, call.n, call.r, seed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, s, seed, *call.saved)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 5
        call: LoraStep = ctx.call
        x, s, seed, *saved = ctx.saved_tensors  # once: a checkpoint gives them once
        need = ctx.needs_input_grad
        if call.holds_backward(dy, x, saved) and s.is_contiguous():
            return *step_backward(call.packed, dy, x, s, seed, call.a, call.b, need), None, None
        *flat, a, b = unsaved(call.flat, saved)
        dx, da, db = backward_op(
            dy.contiguous(), x, *flat, a, b, s, call.scaling, call.dropout_p, seed, need[0], need[1] or need[2]
        )
        return dx if need[0] else None, da if need[1] else None, db if need[2] else None, None, None


# what Function.apply does but for the cases that `dispatch_observed` tells of
_apply = super(torch.autograd.Function, _Step).apply


def unsaved(flat: tuple[Any, ...], saved: list[Tensor]) -> tuple[Any, ...]:
    """The weight as operators take it and what was saved after it, where hooks may have changed the tensors."""
    each = iter(saved)
    return *(None if t is None else next(each) for t in flat[:5]), *flat[5:], *each


def parts(
    x: Tensor, arguments: tuple[Any, ...], op: str
) -> tuple[tuple[Any, ...], int, list[Tensor], list[Tensor]] | None:
    """(the weight as operators take it, N, what the kernel reads, the same without the bias) of x, (weight, a, b,
    scaling, bias, dropout_p, ...); None where the kernel cannot read it in place."""
    weight, a, b, _, bias, *_ = arguments
    flat, n, k = flat_weight(op, weight)
    if x.dtype not in FLOATS or not x.dim() or x.shape[-1] != k or not n or (a is None) != (b is None):
        return None
    saved, tensors = plain(*flat[:5], a, b), plain(*flat[:5], a, b, bias)
    return None if saved is None or tensors is None else (flat, n, tensors, saved)


def _full(weight: Any, a: Any = None, b: Any = None, scaling: float = 1.0, bias: Any = None, dropout_p: float = 0.0,
          seed: Any = None) -> tuple[Any, ...]:  # fmt: skip
    return weight, a, b, scaling, bias, dropout_p, seed


def inference(x: Tensor, arguments: tuple[Any, ...]) -> LoraCall | None:
    full = _full(*arguments)
    found = parts(x, full, "lora_linear")
    if found is None or full[6] is not None:
        return None
    flat, n, tensors, saved = found
    args = (x.detach().new_empty((1, x.shape[-1])), *flat, n, *full[1:6], a_seed(full[5]))
    return LoraCall(x, full, flat, n, tensors, saved) if native_serves((forward_op, args)) else None


def training(x: Tensor, arguments: tuple[Any, ...]) -> LoraStep | None:
    """A step's call; for a layer without an adapter, too, which of itself is no reason to prepare one."""
    full = _full(*arguments)
    found = parts(x, full, "lora_linear")
    _, a, b, scaling, bias, dropout_p, seed = full
    if found is None or seed is not None or (a is not None and (a.dim() != 2 or not a.shape[0])):
        return None
    flat, n, tensors, saved = found
    if flat[0].requires_grad or (bias is not None and bias.requires_grad):
        return None
    row, seed = x.detach().new_empty((1, x.shape[-1])), a_seed(dropout_p)
    s = None if a is None else x.new_empty((1, a.shape[0]), dtype=torch.float32)
    forward = (row, *flat, n, a, b, scaling, bias, dropout_p, seed)
    backward = (row.new_empty((1, n)), row, *flat, a, b, s, scaling, dropout_p, seed, True, a is not None)
    if not native_serves((forward_op, forward), (backward_op, backward)):
        return None
    return LoraStep(x, full, flat, n, tensors, saved, (flat[0], bias))


def a_seed(dropout_p: float) -> Tensor | None:
    return torch.empty(1, dtype=torch.int64) if dropout_p > 0.0 else None


def _training(x: Tensor, arguments: tuple[Any, ...]) -> LoraStep | None:
    call = training(x, arguments)
    return None if call is None or call.a is None else call


prepares(lora_linear, inference, _training)
