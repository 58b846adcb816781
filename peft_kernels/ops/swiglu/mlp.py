"""swiglu_mlp: `down(silu(gate(x)) * up(x))` with LoRA on any of the three, as one autograd Function.

Kept for the backward: x, the outputs of gate and up, and the adapters' small s = drop(x) A^T [M, r]; the activation is
recomputed. That is what unsloth's LoRA_MLP keeps (X, e, g), but for s, which it computes again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, as_autocast, rows_of
from .. import lora_linear as single
from .. import lora_linear_stacked as stacked
from ..lora_linear_stacked import Projection, lists_of
from . import backward_op, forward_op


def _mlp(rows: Tensor, pair: stacked.Lists, last: stacked.Lists) -> tuple[Tensor, ...]:
    """(y, gate, up, s of gate, of up, of down)."""
    gate, up, s_gate, s_up = stacked.forward_op.op(rows, *pair)
    y, s_down = single.forward_op.op(forward_op.op(gate, up), *(values[0] for values in last))
    return y, gate, up, s_gate, s_up, s_down


class _SwigluMlp(torch.autograd.Function):
    """(x [M, K], the lists of gate and up, flat; those of down) -> _mlp's; all but y are outputs only to be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        x, *flat = args
        middle = len(flat) // 3 * 2
        return _mlp(x, lists_of(flat[:middle], 2), lists_of(flat[middle:], 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *flat = inputs
        middle = len(flat) // 3 * 2
        pair, last = lists_of(flat[:middle], 2), lists_of(flat[middle:], 1)
        _, gate, up, s_gate, s_up, s_down = output
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.x_shape, ctx.numbers = x.shape, (stacked.numbers_of(pair), stacked.numbers_of(last))
        ctx.need_h = stacked.needs_x(last)
        first = stacked.saved_of(x if stacked.needs_x(pair) else None, pair, (s_gate, s_up))
        ctx.count = len(first)
        ctx.save_for_backward(*first, gate, up, *stacked.saved_of(None, last, (s_down,))[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        need, dy = ctx.needs_input_grad, dys[0]
        if dy is None:
            return (None,) * len(need)
        saved = ctx.saved_tensors
        x, *of_pair = saved[: ctx.count]
        gate, up, *of_last = saved[ctx.count :]
        middle = (len(need) - 1) // 3 * 2
        upward = need[0] or any(need[1 : 1 + middle])
        h = forward_op.op(gate, up) if ctx.need_h else gate
        dh, of_down = stacked.gradients(h, [dy], of_last, ctx.numbers[1], upward, need[1 + middle :])
        if not upward:
            return (None,) * (1 + middle) + tuple(of_down)
        del h
        dgate, dup = backward_op.op(gate, up, dh)
        rows = x if x is not None else dy.new_empty(ctx.x_shape)
        dx, of_first = stacked.gradients(rows, [dgate, dup], of_pair, ctx.numbers[0], need[0], need[1 : 1 + middle])
        return dx, *of_first, *of_down


def swiglu_mlp(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
    """`down(silu(gate(x)) * up(x))`, differentiable in x and in each a, b, bias and dense weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). gate and up: K to F features, down: F to N; their
    fields as in `lora_linear`, each with its own dropout. Returns [..., N] in x.dtype; gate's and up's outputs are
    rounded to it, the activation is computed from them in float32 and rounded once. Under autocast x is cast to its
    dtype. Raises ValueError or TypeError on bad arguments.
    """
    if x.dim() == 0:
        raise arg_error("swiglu_mlp", "x", "[..., K]", tuple(x.shape))
    pair = stacked.flat_projections("swiglu_mlp", x, (gate, up), ("gate", "up"), x.shape[-1])
    features = gate.weight.shape[0]
    if up.weight.shape[0] != features:
        raise arg_error("swiglu_mlp", "up", f"a projection to {features} features like gate", up.weight.shape[0])
    last = stacked.flat_projections("swiglu_mlp", x, (down,), ("down",), features)
    rows = rows_of("swiglu_mlp", as_autocast("swiglu_mlp", x), x.shape[-1])
    y: Tensor
    if stacked.wants_gradients(rows, (*pair, *last)):
        y = single.apply_function(_SwigluMlp, rows, *pair, *last)[0]
    else:
        y = _mlp(rows, lists_of(pair, 2), lists_of(last, 1))[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[1])
