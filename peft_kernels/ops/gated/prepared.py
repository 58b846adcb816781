"""`gated_mlp` of one layer, call after call, on the native CPU backend (`peft_kernels.PreparedCall`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import in_memory
from ...prepared import Prepared, native_serves, prepares
from ..lora_linear.native import Row
from ..lora_linear.prepared import LoraCall
from ..lora_linear.prepared import inference as single
from ..lora_linear_stacked.native import step, step_backward
from ..lora_linear_stacked.prepared import StackedCall, StackedStep, by_the_operator, training
from ..lora_linear_stacked.prepared import inference as together
from . import FUSED, Activation, activation, backward_op, forward_op, fused_as, parts_of
from .mlp import gated_mlp, pair_of
from .native import backward, forward, row


class MlpCall(Prepared):
    """Without gradients: three native calls, and nothing that Python would look at between them."""

    def __init__(self, x: Tensor, first: StackedCall, last: LoraCall, numbers: Activation, fused: int) -> None:
        super().__init__(x, [*first.tensors, *last.tensors])
        self._first, self._last, self._numbers, self._fused = first, last, numbers, fused
        self._down = Row([last.packed], [(last.n, last.r)], x.element_size())
        # features of h, and where up begins in a row of all that the first products make; gate alone has none
        self._n = last.k
        self._up = 1 if fused == FUSED["pairs"] else last.k if fused or len(first.sizes) > 1 else 0

    def run(self, x: Tensor) -> Tensor:
        if x.numel() == self.k > 0:  # a token
            y = self._down(row(self._first.row(x.contiguous()), self._n, self._up, *self._numbers))
            return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
        ys = self._first.run(x if x.dim() == 2 else x.reshape(-1, self.k))
        gate, up = parts_of(ys[0], self._fused) if self._fused else (ys[0], ys[1] if len(ys) > 1 else None)
        y = self._last.run(forward(gate, up, *self._numbers))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


class MlpStep(Prepared):
    """With gradients: three native calls each way, and the activation once more. Kept is what `gated_mlp` keeps."""

    def __init__(self, x: Tensor, first: StackedStep, last: StackedStep, numbers: Activation, fused: int) -> None:
        def joined(kind: str) -> list[Tensor]:
            return [*getattr(first, kind), *getattr(last, kind)]

        super().__init__(x, joined("tensors"), joined("saved"), joined("frozen"))
        self.first, self.last, self.numbers, self.fused = first, last, numbers, fused
        self.count, self.factors, self.width = len(first.calls), joined("factors"), last.calls[0].n

    def run(self, x: Tensor) -> Tensor:
        rows = (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()
        calls = (*self.first.calls, *self.last.calls)
        y: Tensor = _apply(rows, self, [call.seed(x) if call.dropout_p else None for call in calls], *self.factors)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.width)


class _Step(torch.autograd.Function):
    """(x [M, K] contiguous, the prepared call, a seed or None each, a and b of each with an adapter) -> y [M, N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: MlpStep, seeds: list[Tensor | None], *factors: Tensor) -> Tensor:
        first, last, count = call.first, call.last, call.count
        ys, ss = step(first.packed, x, first.sizes, seeds[:count])
        h = forward(*pair_of(ys, call.fused), *call.numbers)
        (y,), s_down = step(last.packed, h, last.sizes, seeds[count:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *ys, *ss, *s_down, *seeds, *call.saved)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        call: MlpStep = ctx.call
        need_dx, _, _, *need = ctx.needs_input_grad
        if dy is None:
            return (None,) * (3 + len(need))
        count, (x, *rest) = call.count, ctx.saved_tensors  # once: a checkpoint gives them once
        ys, rest = rest[:count], rest[count:]
        ss, seeds, saved = rest[: count + 1], rest[count + 1 : 2 * count + 2], rest[2 * count + 2 :]
        gate, up = pair_of(ys, call.fused)
        of_first, of_last = need[: len(call.first.factors)], need[len(call.first.factors) :]
        upward = need_dx or any(of_first)
        straight = call.holds_backward(dy, x, saved) and all(map(Tensor.is_contiguous, (*ys, *ss)))
        straight = straight and all(map(in_memory, ys))
        h = (forward if straight else forward_op)(gate, up, *call.numbers) if call.last.adapted else gate
        back: Callable[..., Any] = _straight if straight else _by_the_operator
        at = len(call.first.saved)
        dh, down = back(call.last, [dy], h, ss[count:], seeds[count:], saved[at:], upward, of_last)
        if not upward:
            return (None,) * (3 + len(of_first)) + tuple(down)
        del h
        both = (backward if straight else backward_op)(gate, up, dh, *call.numbers, call.fused)
        dx, grads = back(call.first, both[:count], x, ss[:count], seeds[:count], saved[:at], need_dx, of_first)
        return dx, None, None, *grads, *down


# what Function.apply does but for the cases that `dispatch_observed` tells of
_apply = super(torch.autograd.Function, _Step).apply


def _straight(
    of: StackedStep, dys: Sequence[Tensor], x: Tensor, ss: Sequence[Tensor], seeds: Sequence[Tensor | None],
    saved: Sequence[Tensor], need_dx: bool, need: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """(dx, da and db of each with an adapter) of projections of one input."""
    return step_backward(of.packed, dys, x, ss, seeds, of.factors, need_dx, of.wanted(need))


def _by_the_operator(*args: Any) -> tuple[Tensor | None, list[Tensor | None]]:
    dx, _, _, *grads = by_the_operator(*args)
    return dx, grads


def _laid_out(x: Tensor, arguments: tuple[Any, ...], bind: Any) -> tuple[Any, Any, Any, Activation, int] | None:
    """(the call of gate and up, one of h's rows, down, the activation and how gate and up lie) of what was given."""
    gate, up, down, act, fused, alpha, limit, shift = _full(*arguments)
    numbers, joined = activation("gated_mlp", act, alpha, limit, shift), fused_as("gated_mlp", fused, up)
    first = bind(x, (gate,) if up is None else (gate, up))
    if first is None:
        return None
    widths = {n for n, _ in first.sizes}
    if len(widths) > 1 or (joined and first.sizes[0][0] % 2):
        return None
    row = x.detach().new_empty((1, widths.pop()))
    parts = parts_of(row, joined) if joined else (row, None if up is None else row)
    if not native_serves((forward_op, (*parts, *numbers))):
        return None
    h = torch.empty_like(parts[0], memory_format=torch.contiguous_format)
    if bind is training and not native_serves((backward_op, (*parts, h, *numbers, joined))):
        return None
    return first, h, down, numbers, joined


def _inference(x: Tensor, arguments: tuple[Any, ...]) -> MlpCall | None:
    found = _laid_out(x, arguments, together)
    if found is None:
        return None
    first, h, down, numbers, joined = found
    last = None if down.dropout_p else single(h, tuple(down))
    return None if last is None else MlpCall(x, first, last, numbers, joined)


def _training(x: Tensor, arguments: tuple[Any, ...]) -> MlpStep | None:
    found = _laid_out(x, arguments, training)
    if found is None:
        return None
    first, h, down, numbers, joined = found
    last = training(h, (down,))
    return None if last is None or not (first.adapted or last.adapted) else MlpStep(x, first, last, numbers, joined)


def _full(gate: Any, up: Any, down: Any, act: str = "silu", fused: str | None = None, alpha: float | None = None,
          limit: float = 0.0, shift: float = 0.0) -> tuple[Any, ...]:  # fmt: skip
    return gate, up, down, act, fused, alpha, limit, shift


prepares(gated_mlp, _inference, _training)
