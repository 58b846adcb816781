"""pair_rotate: pairs of features turned and scaled, `y = x * first + turned(x) * second`.

RoAd: arXiv 2409.00119. Within each group of 2 * half features, feature i is paired with i + half; turned(x) is
-x[i + half] at i, and x[i] at i + half. Elementwise in float32 (float64 for float64), rounded once; keeps x for the
backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike, check_floating, rows_of
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function


def _check(x: Tensor, first: Tensor, second: Tensor, half: int) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise arg_error("pair_rotate", "x", "a floating-point [M, d]", (x.dtype, tuple(x.shape)))
    d = x.shape[1]
    if not 1 <= half < 2**31 or d % (2 * half):
        raise arg_error("pair_rotate", "half", f"half of a group's size, which divides {d}", half)
    for name, t in (("first", first), ("second", second)):
        if tuple(t.shape) != (d,):
            raise arg_error("pair_rotate", name, f"[{d}]", tuple(t.shape))
    check_floating("pair_rotate", first=first, second=second)


def _fake(x: Tensor, first: Tensor, second: Tensor, half: int) -> Tensor:
    return x.new_empty(x.shape)


def _turned(x: Tensor, half: int) -> Tensor:
    a, b = x.view(*x.shape[:-1], x.shape[-1] // (2 * half), 2, half).unbind(-2)
    return torch.stack((-b, a), -2).flatten(-3)


def _swapped(v: Tensor, half: int) -> Tensor:
    return v.view(-1, 2, half).flip(-2).flatten()


def _reference(x: Tensor, first: Tensor, second: Tensor, half: int) -> Tensor:
    h = x.to(acc_dtype(x.dtype))
    return (h * first.to(h.dtype) + _turned(h, half) * second.to(h.dtype)).to(x.dtype)


forward_op = Op(
    name="pair_rotate",
    schema="(Tensor x, Tensor first, Tensor second, SymInt half) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] first[K] second[K] half=L",
)


def _check_backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, half: int, need_dx: bool, need_columns: bool
) -> None:
    _check(x, first, second, half)
    check_alike("pair_rotate_backward", "dy", dy, x)


def _fake_backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, half: int, need_dx: bool, need_columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dfirst, dsecond = (t.new_empty(t.shape if need_columns else (0,)) for t in (first, second))
    return x.new_empty(x.shape if need_dx else (0,)), dfirst, dsecond


def _reference_backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, half: int, need_dx: bool, need_columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dfirst, dsecond = x.new_empty((0,)), first.new_empty((0,)), second.new_empty((0,))
    g = dy.to(acc_dtype(x.dtype))
    if need_dx:  # the transpose: a feature takes from its partner what the partner takes from it
        back = -_swapped(second.to(g.dtype), half)
        dx = (g * first.to(g.dtype) + _turned(g, half) * back).to(x.dtype)
    if need_columns:
        h = x.to(g.dtype)
        dfirst = torch.linalg.vecdot(g, h, dim=0).to(first.dtype)
        dsecond = torch.linalg.vecdot(g, _turned(h, half), dim=0).to(second.dtype)
    return dx, dfirst, dsecond


backward_op = Op(
    name="pair_rotate_backward",
    schema=(
        "(Tensor dy, Tensor x, Tensor first, Tensor second, SymInt half, bool need_dx, bool need_columns) -> "
        "(Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,K] x[M,K] first[K] second[K] half=L",
)


class _PairRotate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, first: Tensor, second: Tensor, half: int) -> Any:
        return forward_op.op(x, first, second, half)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
        x, first, second, ctx.half = inputs
        ctx.save_for_backward(x, first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, first, second = ctx.saved_tensors
        need_dx, need_first, need_second = ctx.needs_input_grad[:3]
        dx, dfirst, dsecond = backward_op.op(dy.contiguous(), x, first, second, ctx.half, need_dx,
                                             need_first or need_second)  # fmt: skip
        return (dx if need_dx else None, dfirst if need_first else None, dsecond if need_second else None, None)


def pair_rotate(x: Tensor, first: Tensor, second: Tensor, half: int) -> Tensor:
    """`x * first + turned(x) * second` over pairs of features; differentiable in x, first and second.

    x: [..., d] float32, bfloat16, float16 (float64 on the reference). first, second: [d], in a dtype of their own; a
    rotation by t has first = cos t and second = sin t at both features of a pair. half: feature i of each group of
    2 * half is paired with i + half. Returns [..., d] in x.dtype. Raises ValueError or TypeError on bad arguments.
    """
    d = x.shape[-1] if x.dim() else 0
    rows = rows_of("pair_rotate", x, d)
    if (torch.is_grad_enabled() and any(t.requires_grad for t in (x, first, second))) or forward_mode():
        y: Tensor = apply_function(_PairRotate, rows, first, second, half)
    else:
        y = forward_op(rows, first, second, half)
    return y if x.dim() == 2 else y.reshape(x.shape)
