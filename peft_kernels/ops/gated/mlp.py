"""gated_mlp: `down(act(gate(x)) * up(x))` with LoRA on any of the three, as one autograd Function.

Kept for the backward: x, the outputs of gate and up, and the adapters' small s = drop(x) A^T [M, r]; the activation is
recomputed. That is what unsloth's LoRA_MLP keeps (X, e, g), but for s, which it computes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, as_autocast, rows_of
from .. import lora_linear as single
from .. import lora_linear_stacked as stacked
from ..lora_linear_stacked import Projection, lists_of
from . import Activation, activation, backward_op, forward_op, fused_as, parts_of


def pair_of(ys: Sequence[Tensor], fused: int) -> tuple[Tensor, Tensor | None]:
    """gate and up of what the first projections gave."""
    if fused:
        return parts_of(ys[0], fused)
    return ys[0], ys[1] if len(ys) > 1 else None


def _mlp(
    rows: Tensor, numbers: Activation, fused: int, first: stacked.Lists, last: stacked.Lists
) -> tuple[Tensor, ...]:
    """(y, what the first projections gave, each one's s, the s of down)."""
    count = len(first[0])
    found = stacked.forward_op.op(rows, *first)
    h = forward_op(*pair_of(found[:count], fused), *numbers)
    y, s_down = single.forward_op.op(h, *(values[0] for values in last))
    return y, *found, s_down


class _GatedMlp(torch.autograd.Function):
    """(x [M, K], the numbers of the activation, fused, how many projections come first, their lists, flat; those of
    down) -> _mlp's; all but y are outputs only to be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        x, numbers, fused, count, *flat = args
        middle = len(flat) // (count + 1) * count
        return _mlp(x, numbers, fused, lists_of(flat[:middle], count), lists_of(flat[middle:], 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.activation, ctx.fused, count, *flat = inputs
        middle = len(flat) // (count + 1) * count
        pair, last = lists_of(flat[:middle], count), lists_of(flat[middle:], 1)
        ys, ss, s_down = output[1 : 1 + count], output[1 + count : -1], output[-1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.x_shape, ctx.numbers = x.shape, (stacked.numbers_of(pair), stacked.numbers_of(last))
        ctx.need_h = stacked.needs_x(last)
        first = stacked.saved_of(x if stacked.needs_x(pair) else None, pair, ss)
        ctx.counts = count, len(first)
        ctx.save_for_backward(*first, *ys, *stacked.saved_of(None, last, (s_down,))[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        (of_x, *_), need, dy = ctx.needs_input_grad, ctx.needs_input_grad[4:], dys[0]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        count, saved = ctx.counts[0], ctx.saved_tensors
        x, *of_pair = saved[: ctx.counts[1]]
        kept, of_last = saved[ctx.counts[1] :], saved[ctx.counts[1] + count :]
        gate, up = pair_of(kept[:count], ctx.fused)
        middle = len(need) // (count + 1) * count
        upward = of_x or any(need[:middle])
        h = forward_op(gate, up, *ctx.activation) if ctx.need_h else gate
        dh, of_down = stacked.gradients(h, [dy], of_last, ctx.numbers[1], upward, need[middle:])
        if not upward:
            return (None,) * (4 + middle) + tuple(of_down)
        del h
        grads = backward_op(gate, up, dh, *ctx.activation, ctx.fused)
        rows = x if x is not None else dy.new_empty(ctx.x_shape)
        dx, of_first = stacked.gradients(rows, grads[:count], of_pair, ctx.numbers[0], of_x, need[:middle])
        return dx, None, None, None, *of_first, *of_down


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection | None,
    down: Projection,
    act: str = "silu",
    fused: str | None = None,
    alpha: float | None = None,
    limit: float = 0.0,
    shift: float = 0.0,
) -> Tensor:
    """`down(gated(gate(x), up(x), act))`, differentiable in x and in each a, b, bias and dense weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). gate and up: K to F features, down: F to N; their
    fields as in `lora_linear`, each with its own dropout. up None: `down(act(gate(x)))`, or with fused ("halves",
    "pairs") gate gives both, K to 2 F features. act, fused, alpha, limit, shift as in `gated`. Returns [..., N] in
    x.dtype; gate's and up's outputs are rounded to it, the activation is computed from them in float32 and rounded
    once. Under autocast x is cast to its dtype. Raises ValueError or TypeError on bad arguments.
    """
    if x.dim() == 0:
        raise arg_error("gated_mlp", "x", "[..., K]", tuple(x.shape))
    numbers, joined = activation("gated_mlp", act, alpha, limit, shift), fused_as("gated_mlp", fused, up)
    first = (gate,) if up is None else (gate, up)
    pair = stacked.flat_projections("gated_mlp", x, first, ("gate", "up")[: len(first)], x.shape[-1])
    features: int = gate.weight.shape[0]
    if up is not None and up.weight.shape[0] != features:
        raise arg_error("gated_mlp", "up", f"a projection to {features} features like gate", up.weight.shape[0])
    if joined and features % 2:
        raise arg_error("gated_mlp", "gate", "a projection to 2 F features where it gives both", features)
    features //= 2 if joined else 1
    last = stacked.flat_projections("gated_mlp", x, (down,), ("down",), features)
    rows = rows_of("gated_mlp", as_autocast("gated_mlp", x), x.shape[-1])
    y: Tensor
    if stacked.wants_gradients(rows, (*pair, *last)):
        y = single.apply_function(_GatedMlp, rows, numbers, joined, len(first), *pair, *last)[0]
    else:
        y = _mlp(rows, numbers, joined, lists_of(pair, len(first)), lists_of(last, 1))[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])
