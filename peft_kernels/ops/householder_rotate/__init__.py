"""householder_rotate: `x H_1 ... H_r` with reflections H_i = I - 2 u_i u_i^T, as one update of rank r.

HRA: arXiv 2405.17484. In compact WY form (Schreiber, Van Loan 1989) H_1 ... H_r = I - U K U^T with unit columns U and
K^-1 = I / 2 + (U^T U above the diagonal); of orthonormal columns K = 2 I. So the operator is x - (x u) v^T, and costs
4 M d r operations for M rows. Sums are float32 (float64 for float64); the backward keeps x and s = x u [M, r].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike, check_floating, check_memory, rows_of
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function, check_kept


def _check(x: Tensor, u: Tensor, v: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise arg_error("householder_rotate", "x", "a floating-point [M, d]", (x.dtype, tuple(x.shape)))
    for name, t in (("u", u), ("v", v)):
        if t.dim() != 2 or t.shape[1] != x.shape[1] or t.shape[0] != u.shape[0]:
            raise arg_error("householder_rotate", name, f"[r, {x.shape[1]}], both alike", tuple(t.shape))
    check_floating("householder_rotate", u=u, v=v)


def _fake(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], u.shape[0]), dtype=acc_dtype(x.dtype))


def _reference(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    h = x.to(acc_dtype(x.dtype))
    s = h @ u.to(h.dtype).t()
    return (h - s @ v.to(h.dtype)).to(x.dtype), s


def _flops(x: Tensor, u: Tensor, v: Tensor) -> int:
    return 4 * x.numel() * u.shape[0]


forward_op = Op(
    name="householder_rotate",
    schema="(Tensor x, Tensor u, Tensor v) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] u[R,K] v[R,K]",
    flops=_flops,
)


def _check_backward(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool) -> None:
    _check(x, u, v)
    check_alike("householder_rotate_backward", "dy", dy, x)
    check_kept("householder_rotate_backward", "s", s, (x.shape[0], u.shape[0]), acc_dtype(x.dtype))


def _fake_backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    du, dv = (t.new_empty(t.shape if need_duv else (0,)) for t in (u, v))
    return x.new_empty(x.shape if need_dx else (0,)), du, dv


def _reference_backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g = dy.to(acc_dtype(x.dtype))
    t = g @ v.to(g.dtype).t()
    dx = (g - t @ u.to(g.dtype)).to(x.dtype) if need_dx else x.new_empty((0,))
    if not need_duv:
        return dx, u.new_empty((0,)), v.new_empty((0,))
    return dx, -(t.t() @ x.to(g.dtype)).to(u.dtype), -(s.t() @ g).to(v.dtype)


def _flops_backward(dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool) -> int:
    return 2 * x.numel() * u.shape[0] * (1 + need_dx + 2 * need_duv)


backward_op = Op(
    name="householder_rotate_backward",
    schema=(
        "(Tensor dy, Tensor x, Tensor u, Tensor v, Tensor s, bool need_dx, bool need_duv) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,K] x[M,K] u[R,K] v[R,K] s[M,R]",
    flops=_flops_backward,
)


class _HouseholderRotate(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, u: Tensor, v: Tensor) -> Any:
        return forward_op.op(x, u, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _ds: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None
        x, u, v, s = ctx.saved_tensors
        need_dx, need_du, need_dv = ctx.needs_input_grad
        dx, du, dv = backward_op.op(dy.contiguous(), x, u, v, s, need_dx, need_du or need_dv)
        return dx if need_dx else None, du if need_du else None, dv if need_dv else None


def compact_wy(u: Tensor, orthonormal: bool = False, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """(u, v), both [r, d], with x H_1 ... H_r = x - (x u^T) v for the reflections along the columns of u [d, r].

    orthonormal: the columns are orthonormal, or zero where there is no reflection; otherwise they are normalised here.
    transposed: of x H_r ... H_1. At least float32; differentiable in u.
    """
    if u.dim() != 2:
        raise arg_error("householder_rotate", "u", "[d, r]", tuple(u.shape))
    check_memory("householder_rotate", u=u)
    rows = u.to(torch.promote_types(u.dtype, torch.float32)).t().contiguous()
    if orthonormal:
        return rows, 2 * rows
    rows = rows / rows.norm(dim=1, keepdim=True)
    eye = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    inverse = (rows @ rows.t()).triu(1) + eye / 2
    return rows, torch.linalg.solve_triangular(inverse.t() if transposed else inverse, rows, upper=not transposed)


def householder_rotate(x: Tensor, u: Tensor, orthonormal: bool = False, transposed: bool = False) -> Tensor:
    """`x H_1 ... H_r`, or `x H_r ... H_1` (transposed), reflected along the columns of u; differentiable in both.

    x: [..., d] float32, bfloat16, float16 (float64 on the reference). u: [d, r], in a dtype of its own; columns of any
    length but zero, or orthonormal=True: orthonormal ones, where zero ones reflect nothing. Returns [..., d], x.dtype.
    Raises ValueError or TypeError on bad arguments.
    """
    if x.dim() == 0 or u.dim() != 2 or x.shape[-1] != u.shape[0]:
        raise arg_error("householder_rotate", "u", f"[d, r] for x {tuple(x.shape)}", tuple(u.shape))
    rows = rows_of("householder_rotate", x, x.shape[-1])
    left, right = compact_wy(u, orthonormal, transposed)
    if (torch.is_grad_enabled() and (x.requires_grad or u.requires_grad)) or forward_mode():
        y: Tensor = apply_function(_HouseholderRotate, rows, left, right)[0]
    else:
        y = forward_op.op(rows, left, right)[0]
    return y if x.dim() == 2 else y.reshape(x.shape)
