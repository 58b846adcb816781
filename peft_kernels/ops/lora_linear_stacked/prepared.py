"""`lora_linear_stacked` of one group of layers, call after call, on the native CPU backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...prepared import Prepared, native_serves, prepares
from ..lora_linear import prepared as single
from ..lora_linear.native import Row
from . import A, B, backward_op, each, forward_op, gradients, lora_linear_stacked, numbers_of, saved_of
from .native import infer, step, step_backward


class StackedCall(Prepared):
    """Without gradients: one native call for all projections."""

    def __init__(self, x: Tensor, calls: Sequence[single.LoraCall]) -> None:
        def joined(kind: str) -> list[Tensor]:
            return [t for call in calls for t in getattr(call, kind)]

        super().__init__(x, joined("tensors"), joined("saved"), joined("frozen"))
        self.calls, self.packed = calls, [call.packed for call in calls]
        self.sizes, self.widths = [(call.n, call.r) for call in calls], [call.n for call in calls]
        self.row = Row(self.packed, self.sizes, x.element_size())

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        rows = (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()
        ys = self.compute(x, rows)
        return tuple(ys) if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)

    def joined(self, row: Tensor) -> Tensor:
        """Every y of one row x [1, K], one after the other, [1, N] with N the sum of all."""
        return self.row(row.contiguous())

    def compute(self, x: Tensor, rows: Tensor) -> Sequence[Tensor]:
        if rows.shape[0] == 1:  # outputs lie one after the other: decoding waits for each allocation
            y = self.row(rows)
            return y.split(self.widths, 1) if len(self.widths) > 1 else (y,)
        return infer(self.packed, rows, self.sizes)


class StackedStep(StackedCall):
    """With gradients: one native call each way."""

    calls: Sequence[single.LoraStep]

    def __init__(self, x: Tensor, calls: Sequence[single.LoraStep]) -> None:
        super().__init__(x, calls)
        self.adapted = [i for i, call in enumerate(calls) if call.a is not None]
        self.factors = [t for i in self.adapted for t in (calls[i].a, calls[i].b)]

    def wanted(self, need: Sequence[bool]) -> list[Any]:
        """Of every projection whether a and b want gradients; need: of `factors`."""
        wanted: list[Any] = [(False, False)] * len(self.calls)
        for place, i in enumerate(self.adapted):
            wanted[i] = need[2 * place : 2 * place + 2]
        return wanted

    def compute(self, x: Tensor, rows: Tensor) -> Sequence[Tensor]:
        seeds = [call.seed(x) if call.dropout_p else None for call in self.calls]
        ys: Sequence[Tensor] = _apply(rows, self, seeds, *self.factors)
        return ys


class _Step(torch.autograd.Function):
    """(x [M, K] contiguous, the prepared call, a seed or None each, a and b of each with an adapter) -> every y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: StackedStep, seeds: list[Tensor | None], *factors: Tensor) -> Any:
        ys, ss = step(call.packed, x, call.sizes, seeds)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *ss, *seeds, *call.saved)
        ctx.call = call
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        call: StackedStep = ctx.call
        need_dx, _, _, *need = ctx.needs_input_grad
        if all(dy is None for dy in dys):
            return (None,) * (3 + len(need))
        n = len(dys)
        x, *rest = ctx.saved_tensors
        ss, seeds, saved = rest[:n], rest[n : 2 * n], rest[2 * n :]
        given = [dy for dy in dys if type(dy) is Tensor]
        if len(given) == n and call.holds_backward(given[0], x, saved) and all(map(Tensor.is_contiguous, ss)):
            dx, grads = step_backward(call.packed, given, x, ss, seeds, call.factors, need_dx, call.wanted(need))
            return dx, None, None, *grads
        return by_the_operator(call, dys, x, ss, seeds, saved, need_dx, need)


# what Function.apply does but for the cases that `dispatch_observed` tells of
_apply = super(torch.autograd.Function, _Step).apply


def by_the_operator(
    call: StackedStep, dys: Sequence[Tensor | None], x: Tensor, ss: Sequence[Tensor], seeds: Sequence[Tensor | None],
    saved: Sequence[Tensor], need_dx: bool, need: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The backward where an output was not used, or where hooks may have changed what was saved."""
    at, fields, n = 0, [], len(dys)
    for one, seed in zip(call.calls, seeds, strict=True):
        own: list[Any] = list(saved[at : at + len(one.saved)])
        at += len(own)
        *flat, a, b = single.unsaved(one.flat, own if one.r else [*own, None, None])
        fields.append((*flat, one.n, a, b, one.scaling, one.bias, one.dropout_p, seed))
    lists = tuple([*values] for values in each(fields))
    wanted = [False] * sum(map(len, lists))
    places = [j * n + i for i in call.adapted for j in (A, B)]
    for place, needed in zip(places, need, strict=True):
        wanted[place] = needed
    dx, grads = gradients(x, dys, saved_of(None, lists, ss)[1:], numbers_of(lists), need_dx, wanted)
    return dx, None, None, *(grads[place] for place in places)


def _calls(x: Tensor, projections: tuple[Any, ...], bind: Any) -> list[Any] | None:
    """A prepared call of each, if the native library serves them together."""
    found = []
    for projection in projections:
        call = bind(x, tuple(projection))
        if call is None:
            return None
        found.append(call)
    lists = [[*c.flat, c.n, c.a, c.b, c.scaling, c.bias, c.dropout_p, single.a_seed(c.dropout_p)] for c in found]
    row = x.detach().new_empty((1, x.shape[-1]))
    serves = bool(found) and native_serves((forward_op, (row, *([*field] for field in each(lists)))))
    return found if serves else None


def inference(x: Tensor, projections: tuple[Any, ...]) -> StackedCall | None:
    if any(p[5] for p in projections):
        return None
    calls = _calls(x, projections, single.inference)
    return None if calls is None else StackedCall(x, calls)


def training(x: Tensor, projections: tuple[Any, ...]) -> StackedStep | None:
    """A step's call; without any adapter, too, which of itself is no reason to prepare one."""
    calls = _calls(x, projections, single.training)
    if calls is None:
        return None
    row = x.detach().new_empty((1, x.shape[-1]))
    fields = []
    for c in calls:
        s = None if c.a is None else row.new_empty((1, c.r), dtype=torch.float32)
        fields.append((row.new_empty((1, c.n)), *c.flat, c.a, c.b, s, c.scaling, c.dropout_p,
                       single.a_seed(c.dropout_p), c.a is not None))  # fmt: skip
    *lists, need_ab = ([*values] for values in each(fields))
    return StackedStep(x, calls) if native_serves((backward_op, (row, *lists, True, need_ab))) else None


def _training(x: Tensor, projections: tuple[Any, ...]) -> StackedStep | None:
    call = training(x, projections)
    return call if call is not None and call.adapted else None


prepares(lora_linear_stacked, inference, _training)
