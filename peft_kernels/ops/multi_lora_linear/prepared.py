"""`multi_lora_linear` of one layer and one batch's adapters, call after call, on the native CPU backend; in training
`lora_linear_by_row`, whose adapters stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import check_memory
from ...formats import AdapterStack
from ...native import addresses
from ...prepared import Prepared, native_serves, plain, prepares
from ..lora_linear.native import fields, pack
from ..lora_linear.prepared import parts
from . import forward_op, multi_lora_linear
from .by_row import RowProjection, check_layer, job, lora_linear_by_row
from .native import MOST, Layer, backward_layers, forward_layers, pack_layer, serves_layer, step


class MultiLoraCall(Prepared):
    """Without gradients, for x with as many rows as there are adapters."""

    packed: tuple[bytes, ...]
    plan: tuple[Any, ...]
    n: int

    def holds(self, x: Tensor, given: tuple[Any, ...]) -> bool:
        return x.numel() == len(self.plan[0]) * self.k and super().holds(x, given)

    def run(self, x: Tensor) -> Tensor:
        rows = (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()
        y = step(self.packed, rows, self.n, self.stack[0], self.plan)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.n)


def _inference(x: Tensor, arguments: tuple[Any, ...]) -> MultiLoraCall | None:
    stack: AdapterStack
    weight, stack, adapters, bias, dropout_p, _ = (*arguments, *(None, 0.0, None)[len(arguments) - 3 :])
    found = parts(x, (weight, None, None, 1.0, bias), "multi_lora_linear")
    held = plain(stack.a, stack.b, adapters, stack.starts, stack.ranks, stack.scaling)
    if found is None or held is None or dropout_p or x.numel() != adapters.numel() * x.shape[-1]:
        return None
    flat, n, tensors, _ = found
    plan = (adapters, stack.starts, stack.ranks, stack.scaling, stack.max_rank)
    rows = x.detach().new_empty((adapters.numel(), x.shape[-1]))
    if not native_serves((forward_op, (rows, *flat, n, stack.a, stack.b, *plan, bias, 0.0, None))):
        return None
    call = MultiLoraCall(x, tensors, stack=held)
    call.packed = fields(pack(0, rows, *flat, n, stack.a, stack.b, 1.0, bias, 0.0, None, plan=plan))
    call.plan, call.n = plan, n
    return call


class RowsStep(Prepared):
    """A step of layers that read one x, for x of as many rows."""

    def __init__(
        self, x: Tensor, layers: Sequence[Layer], tensors: Sequence[Tensor], factors: Sequence[Tensor]
    ) -> None:
        frozen = [t for layer in layers for t in (layer.weight[0], layer.bias)]
        super().__init__(x, [*tensors, *factors], factors, frozen)
        self.rows, self.tokens, self.layers = x.shape[0], x.numel(), layers
        # the backward reads the weights, too, but they are not saved for it
        self.weights = [t for layer in layers for t in layer.weight[:5] if t is not None]
        self.weights_at = addresses(self.weights)
        self.packed = [pack_layer(x.detach().new_empty((1, self.k)), layer) for layer in layers]

    def holds(self, x: Tensor, given: tuple[Any, ...]) -> bool:
        return x.dim() > 0 and x.shape[0] == self.rows and x.numel() == self.tokens and super().holds(x, given)

    def run(self, x: Tensor) -> list[Tensor]:
        seeds = [philox.draw_seed(x.device) if layer.dropout_p > 0.0 else None for layer in self.layers]
        rows = (x if x.dim() == 2 else x.reshape(-1, self.k)).contiguous()
        ys: Sequence[Tensor] = _apply(rows, self, seeds, *self.saved)
        return [*ys] if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[1]) for y in ys]


class _Step(torch.autograd.Function):
    """(x [M, K] contiguous, the prepared call, a seed or None each, As and Bs of each layer) -> y [M, N] of each."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: RowsStep, seeds: list[Tensor | None], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        ys, ss = forward_layers(x, call.packed, seeds)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *ss, *seeds, *factors)
        ctx.call = call
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        call: RowsStep = ctx.call
        need_dx, _, _, *need = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(need)
        used = [(i, dy) for i, dy in enumerate(dys) if dy is not None]
        if not used:
            return None, None, None, *grads
        n = len(dys)
        x, *rest = ctx.saved_tensors
        ss, seeds, factors = rest[:n], rest[n : 2 * n], rest[2 * n :]
        same = call.holds_backward(used[0][1], x, factors) and addresses(call.weights) == call.weights_at
        layers, packed, own, places, at = call.layers, [], [], [], 0
        for layer in layers:
            count = 2 * len(layer.a)
            places.append(slice(at, at + count))
            at += count
        for i, _ in used:
            own.append([t.contiguous() for t in factors[places[i]]])
            half = len(own[-1]) // 2
            if same:
                packed.append(call.packed[i])
                continue
            layer = layers[i]._replace(a=own[-1][:half], b=own[-1][half:])
            check_layer(x, layer.weight, layer.n, layer.a, layer.b, None)
            packed.append(pack_layer(x, layer))
        if not same:
            check_memory("lora_linear_by_row", x=x, **{f"dy[{i}]": dy for i, dy in used})
        dx, found = backward_layers(
            [dy.contiguous() for _, dy in used], x.contiguous(), packed, own, [ss[i].contiguous() for i, _ in used],
            [seeds[i] for i, _ in used], need_dx, [need[places[i]] for i, _ in used],
        )  # fmt: skip
        for (i, _), mine in zip(used, found, strict=True):
            grads[places[i]] = mine
        return dx, None, None, *grads


# what Function.apply does but for the cases that `dispatch_observed` tells of
_apply = super(torch.autograd.Function, _Step).apply


def _training(x: Tensor, projections: tuple[RowProjection, ...]) -> RowsStep | None:
    if x.dtype is torch.float64 or not x.dim() or not x.numel() or not 0 < len(projections) <= MOST:
        return None
    layers, tensors, factors = [], [], []
    for projection in projections:
        found = job(projection, x)
        held = None if found is None else plain(*found.weight[:5], found.bias)
        own = plain(*projection.a, *projection.b)
        if found is None or held is None or own is None:
            return None
        t = found.tables
        layer = Layer(found.weight, found.n, projection.a, projection.b, t.adapters, t.ranks, t.scaling, t.max_rank,
                      found.bias, found.dropout)  # fmt: skip
        if not serves_layer(x.detach().reshape(-1, x.shape[-1]), layer):
            return None
        layers.append(layer)
        tensors += held
        factors += own
    return RowsStep(x, layers, tensors, factors)


prepares(multi_lora_linear, _inference)
prepares(lora_linear_by_row, None, _training)
