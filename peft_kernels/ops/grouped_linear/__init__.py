"""grouped_linear: `lora_linear` of each group of rows, each with a weight and an adapter: experts of a mixture.

For rows of group e: `y = x W_e^T + bias_e + scaling * (x A_e^T) B_e^T`. Everything accumulates in float32 (float64 for
float64 inputs). Nothing is kept for the backward but the arguments: `x A^T` is computed again, which costs a small part
of a product with a weight.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, as_autocast, check_floating, moved
from ...dispatch import Op, forward_mode
from ...formats import QuantWeight
from ..lora_linear import WEIGHT, acc_dtype, apply_function, columns, dense_weight
from ..lora_linear import check_weight as check_one_weight

_GROUPS = f"{WEIGHT}, Tensor offsets"


def groups_of(offsets: Tensor, m: int) -> Iterator[tuple[int, int, int]]:
    """(group, its first row, the row after its last), of those with rows. ValueError: offsets do not fit m rows."""
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] > m or any(a > b for a, b in itertools.pairwise(ends)):
        raise arg_error("grouped_linear", "offsets", f"rising from 0 to at most {m}, the rows of x", ends)
    return ((e, first, end) for e, (first, end) in enumerate(itertools.pairwise(ends)) if end > first)


def weights_of(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, e: int, n: int, k: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W of all groups as [E, N, K] in `dtype`."""
    w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                     e * n, k, dtype)  # fmt: skip
    return w if quant_type == 0 else w.view(e, n, k)


def _check_common(
    op: str, x: Tensor, rows: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, n: int, a: Tensor | None, b: Tensor | None,
) -> None:  # fmt: skip
    """Of both operators. rows: dy in a backward, x in a forward."""
    if x.dim() != 2:
        raise arg_error(op, "x", "[M, K]", tuple(x.shape))
    check_floating(op, x=x)
    m, k = x.shape
    if rows is not x and (tuple(rows.shape) != (m, n) or rows.dtype is not x.dtype):
        raise arg_error(op, "dy", f"[{m}, N] in {x.dtype} like x", (tuple(rows.shape), rows.dtype))
    if offsets.dim() != 1 or offsets.dtype is not torch.int64 or offsets.shape[0] < 2:
        raise arg_error(op, "offsets", "int64 [E + 1] of a group or more", (offsets.dtype, tuple(offsets.shape)))
    e = offsets.shape[0] - 1
    if quant_type == 0:
        if tuple(weight.shape) != (e, n, k):
            raise arg_error(op, "weight", f"[{e}, {n}, {k}]", tuple(weight.shape))
        check_floating(op, weight=weight)
    else:
        check_one_weight(op, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                         nested_blocksize, e * n, k)  # fmt: skip
    if (a is None) != (b is None):
        raise arg_error(op, "a and b", "given together or not at all", "one of them")
    if a is None or b is None:
        return
    if a.dim() != 3 or a.shape[0] != e or a.shape[2] != k:
        raise arg_error(op, "a", f"[{e}, r, {k}]", tuple(a.shape))
    if tuple(b.shape) != (e, n, a.shape[1]):
        raise arg_error(op, "b", f"[{e}, {n}, {a.shape[1]}]", tuple(b.shape))
    check_floating(op, a=a, b=b)


def _check(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, offsets: Tensor, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None,
) -> None:  # fmt: skip
    _check_common("grouped_linear", x, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                  nested_blocksize, offsets, out_features, a, b)  # fmt: skip
    if bias is not None:
        shape = (offsets.shape[0] - 1, out_features)
        if tuple(bias.shape) != shape:
            raise arg_error("grouped_linear", "bias", f"{[*shape]}", tuple(bias.shape))
        check_floating("grouped_linear", bias=bias)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty((x.shape[0], args[9]))


def _reference(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, offsets: Tensor, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    acc = acc_dtype(x.dtype)
    w = weights_of(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                   offsets.shape[0] - 1, out_features, x.shape[1], x.dtype)  # fmt: skip
    y = x.new_zeros((x.shape[0], out_features))
    for e, first, end in groups_of(offsets, x.shape[0]):
        rows = x[first:end]
        own = torch.nn.functional.linear(rows, w[e], None if bias is None else bias[e].to(x.dtype))
        if a is not None and b is not None:
            own = own.to(acc) + scaling * (rows.to(acc) @ a[e].to(acc).t() @ b[e].to(acc).t())
        y[first:end] = own.to(x.dtype)
    return y


def _flops(x: Tensor, *rest: Any) -> int:
    n, a = rest[9], rest[10]
    (m, k), r = x.shape, 0 if a is None else a.shape[1]
    return int(2 * m * (n * k + r * (n + k)))


def _flops_backward(dy: Tensor, x: Tensor, *rest: Any) -> int:
    a, need_dx, need_ab = rest[9], rest[-2], rest[-1]
    (m, n), k, r = dy.shape, x.shape[1], 0 if a is None else a.shape[1]
    # dS from dY and B; then dX from dY and W, and from dS and A; then S again, dA and dB
    return 2 * m * (r * n + (n * k + r * k if need_dx else 0) + (r * (n + 2 * k) if need_ab else 0))


forward_op = Op(
    name="grouped_linear",
    schema=(
        f"(Tensor x, {_GROUPS}, SymInt out_features, Tensor? a, Tensor? b, float scaling, Tensor? bias) -> Tensor"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] offsets[Y] weight[Y,N,K] out_features=N a[Y,R,K] b[Y,N,R] bias[Y,N]",
    flops=_flops,
)


def _check_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, need_dx: bool, need_ab: bool,
) -> None:  # fmt: skip
    op = "grouped_linear_backward"
    _check_common(op, x, dy, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                  nested_blocksize, offsets, columns(dy), a, b)  # fmt: skip
    if need_ab and a is None:
        raise arg_error(op, "a and b", "given when their gradients are asked for", "None")


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    da, db = (
        x.new_empty((0,)) if t is None or not need_ab else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (a, b)
    )
    return x.new_empty(x.shape if need_dx else (0,)), da, db


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    offsets: Tensor, a: Tensor | None, b: Tensor | None, scaling: float, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    dx, da, db = _fake_backward(dy, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                                nested_blocksize, offsets, a, b, scaling, need_dx, need_ab)  # fmt: skip
    for t in (dx, da, db):
        t.zero_()
    w = weights_of(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                   offsets.shape[0] - 1, dy.shape[1], x.shape[1], x.dtype) if need_dx else None  # fmt: skip
    for e, first, end in groups_of(offsets, x.shape[0]):
        own = dy[first:end]
        part = None if w is None else own @ w[e]
        if a is not None and b is not None:
            ds = scaling * (own.to(acc) @ b[e].to(acc))
            if part is not None:
                part = (part.to(acc) + ds @ a[e].to(acc)).to(x.dtype)
            if need_ab:
                rows = x[first:end].to(acc)
                da[e] = (ds.t() @ rows).to(a.dtype)
                db[e] = (scaling * (own.to(acc).t() @ (rows @ a[e].to(acc).t()))).to(b.dtype)
        if part is not None:
            dx[first:end] = part
    return dx, da, db


backward_op = Op(
    name="grouped_linear_backward",
    schema=(
        f"(Tensor dy, Tensor x, {_GROUPS}, Tensor? a, Tensor? b, float scaling, bool need_dx, bool need_ab) -> "
        "(Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,N] x[M,K] offsets[Y] weight[Y,N,K] a[Y,R,K] b[Y,N,R]",
    flops=_flops_backward,
)


def _weight_gradient(dy: Tensor, x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Of dense weights, which are trained whole: a product of torch's for each group, of as many elements as W has."""
    dw = torch.zeros_like(weight)
    for e, first, end in groups_of(offsets, x.shape[0]):
        dw[e] = (dy[first:end].t() @ x[first:end]).to(weight.dtype)
    return dw


def _bias_gradient(dy: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """[E, N]: sums over the rows of each group."""
    ends = torch.cat((offsets, offsets.new_tensor([dy.shape[0]])))  # the last: rows of no group
    sums = torch.segment_reduce(dy.to(acc_dtype(dy.dtype)), "sum", lengths=ends.diff(), axis=0, initial=0)
    return sums[:-1].to(dtype)


def _product(
    x: Tensor, flat: tuple[Any, ...], offsets: Tensor, n: int, a: Tensor | None, b: Tensor | None, scaling: float,
    bias: Tensor | None, transposed: bool,
) -> Tensor:  # fmt: skip
    """y of n columns. transposed: of a 4-bit weight whose matrices are W_e^T: the product that gives a dx otherwise,
    with B^T and A^T as the adapter."""
    if not transposed:
        return forward_op(x, *flat, offsets, n, a, b, scaling, bias)  # type: ignore[no-any-return]
    a, b = _turned(a, b)
    y: Tensor = backward_op(x, x.new_empty((x.shape[0], n)), *flat, offsets, a, b, scaling, True, False)[0]
    return y if bias is None else y + _of_rows(bias, offsets, y.shape[0]).to(y.dtype)


def _turned(a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if b is None else b.mT, None if a is None else a.mT


def _of_rows(bias: Tensor, offsets: Tensor, m: int) -> Tensor:
    """[M, N]: the bias of each row's group, zeros for rows of no group."""
    groups = torch.searchsorted(offsets, torch.arange(m, device=offsets.device), right=True) - 1
    return torch.cat((bias, bias.new_zeros((1, bias.shape[1])))).index_select(0, groups)


class _GroupedLinear(torch.autograd.Function):
    """`_product` with the weight's eight parts one by one: autograd sees arguments, not what lies in them."""

    @staticmethod
    def forward(x: Tensor, *args: Any) -> Any:
        return _product(x, args[:8], *args[8:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, absmax, nested_absmax, nested_code, offset, *ints = inputs[:9]
        offsets, _, a, b, scaling, bias, transposed = inputs[9:]
        # a frozen weight without an adapter needs x in its backward for its shape only
        need_x = a is not None or weight.requires_grad
        ctx.x_shape, ctx.ints, ctx.scaling, ctx.transposed = x.shape, ints, scaling, transposed
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if need_x else None, weight, absmax, nested_absmax, nested_code, offset, offsets, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 16
        if dys[0] is None:
            return tuple(grads)
        x, *parts, offsets, a, b = ctx.saved_tensors
        dy, need, flat = dys[0].contiguous(), ctx.needs_input_grad, (*parts, *ctx.ints)
        rows = x if x is not None else dy.new_empty(ctx.x_shape)
        need_dx, need_ab = need[0], need[11] or need[12]
        if ctx.transposed:
            a, b = _turned(a, b)
            if need_dx:
                grads[0] = forward_op(dy, *flat, offsets, rows.shape[1], a, b, ctx.scaling, None)
            if need_ab:
                _, da, db = backward_op(rows, dy, *flat, offsets, a, b, ctx.scaling, False, True)
                grads[11], grads[12] = _turned(da, db)
        elif need_dx or need_ab:
            dx, da, db = backward_op(dy, rows, *flat, offsets, a, b, ctx.scaling, need_dx, need_ab)
            grads[0] = dx if need_dx else None
            grads[11], grads[12] = da if need[11] else None, db if need[12] else None
        if need[1]:
            grads[1] = _weight_gradient(dy, rows, offsets, parts[0])
        if need[14]:
            grads[14] = _bias_gradient(dy, offsets, ctx.bias_dtype)
        return tuple(grads)


def grouped_linear(
    x: Tensor,
    weight: Tensor | QuantWeight,
    offsets: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """`x W_e^T + bias_e + scaling * (x A_e^T) B_e^T` for the rows of each group e; differentiable in x, a, b, bias and
    a dense weight.

    x: [M, K] float32, bfloat16, float16 (float64 on the reference), the rows of group e at offsets[e] to
    offsets[e + 1]; rows from offsets[E] on give zeros. offsets: int64 [E + 1], rising from 0, on any device (one that
    is not x's is copied there). weight: [E, N, K], dense or a `QuantWeight` of this shape or of [E * N, K]; transposed:
    it is kept as [E, K, N] (a `QuantWeight` of this shape or of [E * K, N]), and not copied. The last dimension of a
    dense one, or its last but one, is dense. a: [E, r, K], b: [E, N, r], in a dtype of their own. bias: [E, N].
    Returns [M, N] in x.dtype; sums are float32. Under autocast x is cast to autocast's dtype. On a GPU nothing reads
    offsets, which must be right; the gradient of a dense weight waits for them. Raises ValueError or TypeError on bad
    arguments.
    """
    op = "grouped_linear"
    x = as_autocast(op, x)
    if x.dim() != 2:
        raise arg_error(op, "x", "[M, K]", tuple(x.shape))
    if offsets.dim() != 1 or offsets.shape[0] < 2:
        raise arg_error(op, "offsets", "int64 [E + 1] of a group or more", (offsets.dtype, tuple(offsets.shape)))
    e = offsets.shape[0] - 1
    turned = False
    if isinstance(weight, QuantWeight):
        shape, turned = weight.shape, transposed
        if len(shape) == 2 and shape[0] % e == 0:
            shape = (e, shape[0] // e, shape[1])
        if len(shape) != 3 or shape[0] != e:
            rows = "K, N" if turned else "N, K"
            raise arg_error(op, "weight", f"a QuantWeight of shape (E * {rows}) for {e} groups, or (E, {rows})",
                            weight.shape)  # fmt: skip
        flat, n = weight.flatten(), shape[2 if turned else 1]
        if turned:
            _check_turned(x, shape, a, b, bias)
    else:
        if weight.dim() != 3:
            raise arg_error(op, "weight", "[E, K, N]" if transposed else "[E, N, K]", tuple(weight.shape))
        weight = weight.mT if transposed else weight
        flat, n = (weight, None, None, None, None, 0, 64, 256), weight.shape[1]
    offsets = offsets if offsets.device == x.device else moved(op, "offsets", offsets, x.device)
    rest = (offsets, n, a, b, scaling, bias, turned)
    x = x.contiguous()
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, flat[0], a, b, bias))
    if wanted or forward_mode():
        y: Tensor = apply_function(_GroupedLinear, x, *flat, *rest)
        return y
    return _product(x, flat, *rest)


def _check_turned(
    x: Tensor, shape: tuple[int, ...], a: Tensor | None, b: Tensor | None, bias: Tensor | None
) -> None:  # fmt: skip
    """Of a transposed 4-bit weight, whose operator sees x as a dy, and A and B in each other's places."""
    op, (e, k, n) = "grouped_linear", shape
    if x.shape[1] != k:
        raise arg_error(op, "x", f"[M, {k}]", tuple(x.shape))
    if (a is None) != (b is None):
        raise arg_error(op, "a and b", "given together or not at all", "one of them")
    if a is not None and (a.dim() != 3 or a.shape[0] != e or a.shape[2] != k):
        raise arg_error(op, "a", f"[{e}, r, {k}]", tuple(a.shape))
    if a is not None and b is not None and tuple(b.shape) != (e, n, a.shape[1]):
        raise arg_error(op, "b", f"[{e}, {n}, {a.shape[1]}]", tuple(b.shape))
    if bias is not None and tuple(bias.shape) != (e, n):
        raise arg_error(op, "bias", f"[{e}, {n}]", tuple(bias.shape))
