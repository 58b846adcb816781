"""dora_norm: `|W + scaling * b a|` of each row, and squared_row_norms: `|W|^2` of each row; W dense or 4-bit.

DoRA: arXiv 2402.09353. A backend adds up the rows of W + s b a a tile at a time, or uses
`|W|^2 + 2 s b . U + s^2 b . (b G)` with U = W a^T, G = a a^T and |W|^2 as known (`base_sq`). Where the three terms
cancel (a result below 1e-2 |W|^2) their sum has lost its digits, in float64 too, since U has: such rows are added up
directly. Sums are float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error
from ...dispatch import Op, forward_mode
from ...formats import QuantWeight
from .. import lora_linear as base

CANCELLED = 1e-2  # of |W|^2: below, the identity above has lost too much
TILE = 256  # rows of the reference's temporary


def _out_dtype(weight: Tensor, *others: Tensor) -> torch.dtype:
    double = torch.float64 in (weight.dtype, *(t.dtype for t in others))
    return torch.float64 if double else torch.float32


def _check_squares(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, n: int, k: int,
) -> None:  # fmt: skip
    base.check_weight("squared_row_norms", weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                      nested_blocksize, n, k)  # fmt: skip


def _fake_squares(weight: Tensor, *rest: Any) -> Tensor:
    return weight.new_empty((rest[-2],), dtype=torch.float64)


def _reference_squares(weight: Tensor, *rest: Any) -> Tensor:
    *flat, n, k = rest
    w = weight if flat[4] == 0 else base.dense_weight(weight, *flat, n, k, _out_dtype(weight))
    tiles = [w[i : i + TILE].double().square().sum(1) for i in range(0, n, TILE)]
    return torch.cat(tiles) if tiles else w.new_empty((0,), dtype=torch.float64)


squares_op = Op(
    name="squared_row_norms",
    schema=f"({base.WEIGHT}, SymInt n, SymInt k) -> Tensor",
    check=_check_squares,
    fake=_fake_squares,
    reference=_reference_squares,
    folder=__name__,
    sizes="weight[N,K] n=N k=K",
)


def squared_row_norms(weight: Tensor | QuantWeight) -> Tensor:
    """`|W|^2` of each row, [N] float64, with no [N, K] temporary; no gradients.

    weight: dense [N, K] or a `QuantWeight` of that shape. Raises ValueError or TypeError on bad arguments.
    """
    flat, n, k = base.flat_weight("squared_row_norms", weight)
    with torch.no_grad():
        squares: Tensor = squares_op.op(flat[0].detach(), *flat[1:], n, k)
    return squares


def _check(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, a: Tensor, b: Tensor, scaling: float,
    base_sq: Tensor | None,
) -> None:  # fmt: skip
    if a.dim() != 2 or b.dim() != 2:
        raise arg_error("dora_norm", "a and b", "[r, K] and [N, r]", (tuple(a.shape), tuple(b.shape)))
    n, k = b.shape[0], a.shape[1]
    base.check_weight("dora_norm", weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                      nested_blocksize, n, k)  # fmt: skip
    base.check_adapter("dora_norm", n, k, a, b)
    if base_sq is not None and (tuple(base_sq.shape) != (n,) or not base_sq.is_floating_point()):
        raise arg_error("dora_norm", "base_sq", f"floating-point [{n}]", (base_sq.dtype, tuple(base_sq.shape)))


def _fake(weight: Tensor, *rest: Any) -> Tensor:
    a, b = rest[7:9]
    return b.new_empty((b.shape[0],), dtype=_out_dtype(weight, a, b))


def updated(w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * b a; 0 times an infinity is NaN, as in a merged weight (`addmm` leaves a product by 0 out)."""
    return w + scaling * (b @ a)


def _reference(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, a: Tensor, b: Tensor, scaling: float,
    base_sq: Tensor | None,
) -> Tensor:  # fmt: skip
    n, k, dtype = b.shape[0], a.shape[1], _out_dtype(weight, a, b)
    w = weight
    if quant_type != 0:
        w = base.dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                              nested_blocksize, n, k, dtype)  # fmt: skip
    a, b = a.to(dtype), b.to(dtype)
    tiles = [
        updated(w[i : i + TILE].to(dtype), a, b[i : i + TILE], scaling).double().square().sum(1)
        for i in range(0, n, TILE)
    ]
    return torch.cat(tiles).sqrt().to(dtype) if tiles else b.new_empty((0,))


def _flops(weight: Tensor, *rest: Any) -> int:
    a, b = rest[7:9]
    return 2 * a.shape[0] * a.shape[1] * b.shape[0]


norm_op = Op(
    name="dora_norm",
    schema=f"({base.WEIGHT}, Tensor a, Tensor b, float scaling, Tensor? base_sq) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="weight[N,K] a[R,K] b[N,R] base_sq[N]",
    flops=_flops,
)


class _DoraNorm(torch.autograd.Function):
    """(weight..., a, b, scaling, base_sq) -> norms [N]. d|v| = v . dv / |v| with v = W + s b a."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return norm_op.op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *weight, a, b, scaling, _ = inputs
        ctx.save_for_backward(*weight[:5], a, b, output)
        ctx.ints, ctx.scaling = weight[5:], scaling

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnorm: Tensor) -> tuple[Tensor | None, ...]:
        *weight, a, b, norm = ctx.saved_tensors
        need, scaling = ctx.needs_input_grad, ctx.scaling
        flat = (weight[0].detach(), *weight[1:], *ctx.ints)
        dtype, n = norm.dtype, norm.shape[0]
        wide_a, wide_b = a.detach().to(dtype), b.detach().to(dtype)
        # a row of zeros has no direction: no gradient, as torch's norm has it
        c = torch.where(norm > 0, dnorm / norm, torch.zeros_like(norm))[:, None]
        grads: list[Tensor | None] = [None] * 12
        if need[9]:  # c v a^T = c (W a^T + s b (a a^T))
            u = base.forward_op.op(wide_a, *flat, n, None, None, 1.0, None, 0.0, None)[0].t()
            grads[9] = (scaling * c * (u + scaling * (wide_b @ (wide_a @ wide_a.t())))).to(b.dtype)
        if need[8]:  # (c b)^T (W + s b a)
            left = (c * wide_b).t().contiguous()
            dx = base.backward_op.op(left, wide_a, *flat, None, None, None, 1.0, 0.0, None, True, False)[0]
            grads[8] = (scaling * (dx + scaling * (left @ wide_b) @ wide_a)).to(a.dtype)
        if need[0]:
            w = weight[0]
            grads[0] = (c * updated(w.to(dtype), wide_a, wide_b, scaling)).to(w.dtype)
        return tuple(grads)


def dora_norm(
    weight: Tensor | QuantWeight, a: Tensor, b: Tensor, scaling: float = 1.0, base_sq: Tensor | None = None
) -> Tensor:
    """`|W + scaling * b a|` of each row: [N] float32 (float64 where weight, a or b is), with no [N, K] temporary.

    weight: dense [N, K] or a `QuantWeight` of that shape. a: [r, K], b: [N, r], any float dtype. base_sq: what
    `squared_row_norms(weight)` gave, for backends that use it; it must belong to this very weight. Differentiable in a,
    b and a dense weight (pass detached tensors where the norm is a constant, as in the paper); a row of zeros has
    gradient zero. Not affected by autocast. Raises ValueError or TypeError on bad arguments.
    """
    flat, n, k = base.flat_weight("dora_norm", weight)
    if a.dim() != 2 or a.shape[1] != k:
        raise arg_error("dora_norm", "a", f"[r, {k}] to fit the weight [{n}, {k}]", tuple(a.shape))
    args = (*flat, a, b, scaling, base_sq)
    if (torch.is_grad_enabled() and any(t.requires_grad for t in (flat[0], a, b))) or forward_mode():
        norm: Tensor = base.apply_function(_DoraNorm, *args)
    else:
        norm = norm_op(*args)
    return norm
