"""`dora_linear` and `dora_linear_normed` of one layer, call after call, on the native CPU backend.

What DoRA adds to `lora_linear`'s prepared calls: the gain in evaluation; in training the magnitude and the norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...prepared import native_serves, prepares
from ..lora_linear.native import step as gained
from ..lora_linear.prepared import LoraCall, parts, unsaved
from . import backward_op, dora_linear, dora_linear_normed, forward_op, normed_op
from .native import parts_of, step, step_backward

_F32 = torch.float32


class DoraCall(LoraCall):
    """Without gradients, by a gain that is known."""

    gain: Tensor

    def run(self, x: Tensor) -> Tensor:
        y = gained(self.packed, self.rows(x), self.n, self.r, None, self.gain)[0]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.n)


def _inference(x: Tensor, arguments: tuple[Any, ...]) -> DoraCall | None:
    weight, a, b, gain, norm, scaling, bias, dropout_p, _ = (*arguments, *(1.0, None, 0.0, None)[len(arguments) - 5 :])
    as_lora = (weight, a, b, scaling, bias, dropout_p)
    found = parts(x, as_lora, "dora_linear")
    if found is None or norm is not None or dropout_p or not _plain_column(gain, found[1]):
        return None
    flat, n, tensors, saved = found
    args = (x.detach().new_empty((1, x.shape[-1])), *flat, n, a, b, gain, scaling, bias, 0.0, None, False)
    if not native_serves((forward_op, args)):
        return None
    call = DoraCall(x, as_lora, flat, n, tensors, saved, (), (gain,))
    call.gain = gain
    return call


class DoraStep(LoraCall):
    """With gradients, by the norm of this very weight."""

    magnitude: Tensor

    def run(self, x: Tensor) -> Tensor:
        seed = self.seed(x) if self.dropout_p else None
        y: Tensor = _apply(self.rows(x), self.a, self.b, self.magnitude, seed, self)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.n)


class _Step(torch.autograd.Function):
    """(x [M, K] contiguous, a, b, magnitude, seed or None, the prepared call) -> y [M, N].

    What the forward leaves for the backward is one float32 tensor (`native.parts_of`), and h [M, N] where the magnitude
    is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor, seed: Tensor | None, call: DoraStep
    ) -> Tensor:
        y, left, h = step(call.packed, x, call.n, call.r, magnitude, seed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, left, h, seed, *call.saved)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        call: DoraStep = ctx.call
        x, left, h, seed, *saved = ctx.saved_tensors
        need = ctx.needs_input_grad
        same = left.is_contiguous() and (h is None or h.is_contiguous())
        if same and call.holds_backward(dy, x, saved):
            grads = step_backward(call.packed, dy, x, left, h, seed, call.a, call.b, call.magnitude, need)
            return *grads, None, None
        *flat, a, b, _ = unsaved(call.flat, saved)
        s, gain, norm = parts_of(left, x.shape[0], a.shape[0], call.n)
        dx, da, db, dm = backward_op(
            dy.contiguous(), x, *flat, a, b, gain, h, s, call.scaling, call.dropout_p, seed, need[0],
            need[1] or need[2], need[3],
        )  # fmt: skip
        given = dx if need[0] else None, da if need[1] else None, db if need[2] else None
        return *given, dm / norm if need[3] else None, None, None


_apply = super(torch.autograd.Function, _Step).apply


def _training(x: Tensor, arguments: tuple[Any, ...]) -> DoraStep | None:
    weight, a, b, magnitude, scaling, bias, dropout_p = (*arguments, *(1.0, None, 0.0)[len(arguments) - 4 :])
    as_lora = (weight, a, b, scaling, bias, dropout_p)
    found = parts(x, as_lora, "dora_linear")
    if found is None or a.dim() != 2 or not a.shape[0] or not _plain_column(magnitude, found[1]):
        return None
    flat, n, tensors, saved = found
    if flat[0].requires_grad or (bias is not None and bias.requires_grad):
        return None
    row, s = x.detach().new_empty((1, x.shape[-1])), x.new_empty((1, a.shape[0]), dtype=_F32)
    dy, seed = row.new_empty((1, n)), torch.empty(1, dtype=torch.int64) if dropout_p > 0.0 else None
    forward = (row, *flat, n, a, b, magnitude, scaling, bias, dropout_p, seed, True)
    backward = (dy, row, *flat, a, b, magnitude, dy, s, scaling, dropout_p, seed, True, True, True)
    if not native_serves((normed_op, forward), (backward_op, backward)):
        return None
    call = DoraStep(x, as_lora, flat, n, tensors, [*saved, magnitude], (flat[0], bias), (magnitude,))
    call.magnitude = magnitude
    return call


def _plain_column(t: Tensor, n: int) -> bool:
    """True if a magnitude or a gain is as the kernel reads it."""
    return t.shape == (n,) and t.dtype is _F32 and t.is_contiguous() and t.is_leaf and t.is_cpu


prepares(dora_linear, _inference)
prepares(dora_linear_normed, None, _training)
