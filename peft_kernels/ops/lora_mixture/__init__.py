"""lora_mixture: `lora_linear` with n adapters and a weight of each for every row of x.

`y[m] = x[m] W^T + bias + sum_i mix[m, i] scaling_i (drop(x)[m] A_i^T) B_i^T`, W dense or 4-bit, forward and backward.
X-LoRA (arXiv 2402.07148) and Arrow (arXiv 2405.11157) choose the weights. All A_i are one A and all B_i one B: the sum
is one LoRA of rank n r, whose low-rank activations are multiplied by the weights.

A weight of exactly zero leaves its adapter out, and costs nothing where all rows of a tile have it. Its gradient is
the exact one, for which the adapter's product with x is needed; `masked` says that it is zero (that of a top-k is).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, as_autocast, check_floating, check_memory, rows_of
from ...dispatch import Op, forward_mode
from ...formats import QuantWeight
from ..lora_linear import (
    WEIGHT,
    acc_dtype,
    apply_function,
    check_bias,
    check_common,
    check_dropout,
    check_kept,
    columns,
    dense_weight,
    dropped,
    flat_weight,
)

_ADAPTERS = "Tensor a, Tensor b"
_MIX = "Tensor mix, bool masked"


def _check_mixture(op: str, x: Tensor, n: int, a: Tensor, b: Tensor, mix: Tensor) -> None:
    m, k = x.shape
    if a.dim() != 3 or a.shape[2] != k or not a.shape[0]:
        raise arg_error(op, "a", f"[adapters, r, {k}], one adapter at least", tuple(a.shape))
    if tuple(b.shape) != (n, a.shape[0], a.shape[1]):
        raise arg_error(op, "b", f"[{n}, {a.shape[0]}, {a.shape[1]}]", tuple(b.shape))
    check_floating(op, a=a, b=b)
    if tuple(mix.shape) != (m, a.shape[0]):
        raise arg_error(op, "mix", f"[{m}, {a.shape[0]}], a weight of each adapter per row of x", tuple(mix.shape))
    if mix.dtype is not acc_dtype(x.dtype):
        raise arg_error(op, "mix", f"{acc_dtype(x.dtype)} for x in {x.dtype}", mix.dtype, TypeError)


def _check(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, mix: Tensor, masked: bool, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    op = "lora_mixture"
    check_common(op, x, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                 out_features, None, None, 0.0, None)  # fmt: skip
    _check_mixture(op, x, out_features, a, b, mix)
    check_dropout(op, dropout_p, seed, True)
    check_bias(op, out_features, bias)


def _fake(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, mix: Tensor, masked: bool, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m = x.shape[0]
    return x.new_empty((m, out_features)), x.new_empty((m, *a.shape[:2]), dtype=acc_dtype(x.dtype))


def _mixed(low: Tensor, mix: Tensor) -> Tensor:
    """low [M, n, r] times the weights [M, n], zero where they are, whatever it holds."""
    return torch.where(mix[..., None] == 0, 0.0, low * mix[..., None])


def _reference(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, mix: Tensor, masked: bool, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                     out_features, x.shape[1], x.dtype)  # fmt: skip
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
    acc = acc_dtype(x.dtype)
    s = (dropped(x, dropout_p, seed).to(acc) @ a.flatten(0, 1).to(acc).t()).view(x.shape[0], *a.shape[:2])
    if masked:
        s = torch.where(mix[..., None] == 0, 0.0, s)
    return (y.to(acc) + _mixed(s, mix).flatten(1) @ b.flatten(1).to(acc).t()).to(x.dtype), s


def _flops(x: Tensor, *rest: Any) -> int:
    n, a = rest[8], rest[9]
    (m, k), r = x.shape, a.shape[0] * a.shape[1]
    return 2 * m * (n * k + r * (n + k))  # as if no weight were zero: they are values


def _flops_backward(dy: Tensor, x: Tensor, *rest: Any) -> int:
    a, need_dx, need_ab = rest[8], rest[-3], rest[-2]
    (m, n), k, r = dy.shape, x.shape[1], a.shape[0] * a.shape[1]
    return 2 * m * (r * n + (n * k + r * k if need_dx else 0) + (r * (n + k) if need_ab else 0))


forward_op = Op(
    name="lora_mixture",
    schema=(
        f"(Tensor x, {WEIGHT}, SymInt out_features, {_ADAPTERS}, {_MIX}, Tensor? bias, float dropout_p, Tensor? seed) "
        "-> (Tensor, Tensor)"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] weight[N,K] out_features=N a[I,R,K] b[N,I,R] mix[M,I] bias[N]",
    flops=_flops,
)


def _check_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, mix: Tensor, masked: bool, dropout_p: float, seed: Tensor | None, need_dx: bool,
    need_ab: bool, need_mix: bool,
) -> None:  # fmt: skip
    op = "lora_mixture_backward"
    check_common(op, x, dy, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                 columns(dy), None, None, 0.0, None)  # fmt: skip
    _check_mixture(op, x, dy.shape[1], a, b, mix)
    check_dropout(op, dropout_p, seed, True)
    check_kept(op, "s", s, (x.shape[0], a.shape[0], a.shape[1]), acc_dtype(x.dtype))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, mix: Tensor, masked: bool, dropout_p: float, seed: Tensor | None, need_dx: bool,
    need_ab: bool, need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (x.new_empty(x.shape if need_dx else (0,)), a.new_empty(a.shape if need_ab else (0,)),
            b.new_empty(b.shape if need_ab else (0,)), mix.new_empty(mix.shape if need_mix else (0,)))  # fmt: skip


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, mix: Tensor, masked: bool, dropout_p: float, seed: Tensor | None, need_dx: bool,
    need_ab: bool, need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    dx, da, db, dmix = (x.new_empty((0,)), a.new_empty((0,)), b.new_empty((0,)), mix.new_empty((0,)))
    g = (dy.to(acc) @ b.flatten(1).to(acc)).view(s.shape)
    ds = _mixed(g, mix).flatten(1)
    if need_dx:
        w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                         dy.shape[1], x.shape[1], x.dtype)  # fmt: skip
        low = dropped(ds @ a.flatten(0, 1).to(acc), dropout_p, seed)
        dx = ((dy @ w).to(acc) + low).to(x.dtype)
    if need_ab:
        da = (ds.t() @ dropped(x, dropout_p, seed).to(acc)).to(a.dtype).view(a.shape)
        db = (dy.to(acc).t() @ _mixed(s, mix).flatten(1)).to(b.dtype).view(b.shape)
    if need_mix:
        dmix = (g * s).sum(-1)
        if masked:
            dmix = torch.where(mix == 0, 0.0, dmix)
    return dx, da, db, dmix


backward_op = Op(
    name="lora_mixture_backward",
    schema=(
        f"(Tensor dy, Tensor x, {WEIGHT}, {_ADAPTERS}, Tensor s, {_MIX}, float dropout_p, Tensor? seed, bool need_dx, "
        "bool need_ab, bool need_mix) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,N] x[M,K] weight[N,K] a[I,R,K] b[N,I,R] s[M,I,R] mix[M,I]",
    flops=_flops_backward,
)


class _LoraMixture(torch.autograd.Function):
    """(x [M, K], weight..., n, a, b, mix, ...) -> (y [M, N], s [M, adapters, r]); s so that it can be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, absmax, nested_absmax, nested_code, offset, *ints = inputs[:9]
        a, b, mix, masked, bias, dropout_p, seed = inputs[10:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, absmax, nested_absmax, nested_code, offset, a, b, output[1], mix, seed)
        ctx.ints, ctx.masked, ctx.dropout_p = ints, masked, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _ds: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 17
        if dy is None:
            return tuple(grads)
        x, weight, absmax, nested_absmax, nested_code, offset, a, b, s, mix, seed = ctx.saved_tensors
        dy = dy.contiguous()
        need = ctx.needs_input_grad
        need_dx, need_ab, need_mix = need[0], need[10] or need[11], need[12]
        if need_dx or need_ab or need_mix:
            dx, da, db, dmix = backward_op(
                dy, x, weight, absmax, nested_absmax, nested_code, offset, *ctx.ints, a, b, s, mix, ctx.masked,
                ctx.dropout_p, seed, need_dx, need_ab, need_mix,
            )  # fmt: skip
            grads[0] = dx if need_dx else None
            grads[10] = da if need[10] else None
            grads[11] = db if need[11] else None
            grads[12] = dmix if need_mix else None
        if need[1]:
            grads[1] = (dy.t() @ x).to(weight.dtype)
        if need[14]:
            grads[14] = dy.sum(0, dtype=acc_dtype(dy.dtype)).to(ctx.bias_dtype)
        return tuple(grads)


def _joined(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """(a [pieces, r, K], b [N, pieces, r], pieces of each adapter).

    Adapters of different ranks are cut into pieces of the greatest common divisor, each with its adapter's weight.
    """
    op = "lora_mixture"
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        check_memory(op, a=a, b=b)
        if a.dim() != 3 or b.dim() != 3:
            raise arg_error(op, "a and b", "[n, r, K] and [n, N, r]", (tuple(a.shape), tuple(b.shape)))
        return a, b.transpose(0, 1), [1] * len(a)
    if isinstance(a, Tensor) or isinstance(b, Tensor) or len(a) != len(b) or not a:
        got = tuple("a tensor" if isinstance(t, Tensor) else len(t) for t in (a, b))
        raise arg_error(op, "a and b", "two tensors, or as many tensors each, one at least", got)
    for i, (p, q) in enumerate(zip(a, b, strict=True)):
        check_memory(op, **{f"a[{i}]": p, f"b[{i}]": q})
        if p.dim() != 2 or p.shape[1] != a[0].shape[-1]:
            raise arg_error(op, f"a[{i}]", "[r, K]" if i == 0 else f"[r, {a[0].shape[-1]}] like a[0]", tuple(p.shape))
        if q.dim() != 2 or q.shape[1] != p.shape[0] or q.shape[0] != b[0].shape[0]:
            raise arg_error(op, f"b[{i}]", f"[{'N' if i == 0 else b[0].shape[0]}, {p.shape[0]}]", tuple(q.shape))
    ranks = [p.shape[0] for p in a]
    r = gcd(*ranks)
    if not r:  # all of rank 0
        return a[0][None].expand(len(a), -1, -1), b[0][:, None].expand(-1, len(a), -1), [1] * len(a)
    if any(p.dtype != a[0].dtype for p in a) or any(q.dtype != b[0].dtype for q in b):
        raise arg_error(op, "a and b", "of one dtype each", ([p.dtype for p in a], [q.dtype for q in b]), TypeError)
    whole_a, whole_b = torch.cat(tuple(a)), torch.cat(tuple(b), 1)
    return whole_a.view(-1, r, whole_a.shape[1]), whole_b.view(whole_b.shape[0], -1, r), [rank // r for rank in ranks]


def _weights(mix: Tensor, scaling: float | Sequence[float] | Tensor, x: Tensor, pieces: list[int]) -> Tensor:
    """mix [..., n] times scaling as [M, pieces], in the dtype of sums."""
    op, n = "lora_mixture", len(pieces)
    check_floating(op, mix=mix)
    check_memory(op, mix=mix)
    if mix.dim() == 0 or mix.shape[-1] != n:
        raise arg_error(op, "mix", f"[..., {n}], a weight of each adapter", tuple(mix.shape))
    mix = mix.to(acc_dtype(x.dtype))
    if isinstance(scaling, Tensor) or not isinstance(scaling, Sequence):
        if isinstance(scaling, Tensor) and scaling.numel() != 1 and tuple(scaling.shape) != (n,):
            raise arg_error(op, "scaling", f"a number or {n} of them", tuple(scaling.shape))
    elif len(scaling) != n:
        raise arg_error(op, "scaling", f"a number or {n} of them", len(scaling))
    else:
        scaling = float(scaling[0]) if len({*scaling}) == 1 else mix.new_tensor(scaling)
    if isinstance(scaling, Tensor) or scaling != 1.0:
        mix = (mix * scaling).to(mix.dtype)
    if max(pieces) > 1 or min(pieces) < 1:
        mix = torch.cat([mix[..., i : i + 1].expand(*mix.shape[:-1], count) for i, count in enumerate(pieces)], -1)
    shape = (*x.shape[:-1], mix.shape[-1])
    try:
        return mix.expand(shape).reshape(-1, mix.shape[-1])
    except RuntimeError:
        expected = f"{(*shape[:-1], n)}, or with leading dimensions that expand to x's"
        raise arg_error(op, "mix", expected, (*mix.shape[:-1], n)) from None


def lora_mixture(
    x: Tensor,
    weight: Tensor | QuantWeight,
    a: Tensor | Sequence[Tensor],
    b: Tensor | Sequence[Tensor],
    mix: Tensor,
    scaling: float | Sequence[float] | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    masked: bool = False,
) -> Tensor:
    """`x W^T + bias + sum_i mix_i scaling_i (drop(x) A_i^T) B_i^T`; differentiable in all tensors but a 4-bit weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). weight: dense [N, K] or a `QuantWeight`.
    a: n tensors [r_i, K] of one dtype, or [n, r, K]; b: n tensors [N, r_i] of one, or [n, N, r]; each call joins them,
    unless a is one and b one, a view of contiguous [N, n, r]. mix: [..., n], a weight of each adapter, any floating
    dtype; its leading dimensions expand to x's ([batch, 1, n] is one per sequence). scaling: a number, or n of them; as
    a tensor [n] on x's device it is not copied there. masked: gradients of weights of exactly zero are zero, as behind
    a top-k; else they are the exact ones, and cost as others do.
    dropout_p, seed: as of `lora_linear`; the adapters share a mask. Returns [..., N] in x.dtype; sums are float32.
    Under autocast x is cast to autocast's dtype. Raises ValueError or TypeError on bad arguments.
    """
    x = as_autocast("lora_mixture", x)
    flat, n, k = flat_weight("lora_mixture", weight)
    if x.dim() == 0 or x.shape[-1] != k:
        raise arg_error("lora_mixture", "x", f"[..., {k}] to fit the weight [{n}, {k}]", tuple(x.shape))
    joined_a, joined_b, pieces = _joined(a, b)
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(x.device)
    weights = _weights(mix, scaling, x, pieces)
    graded = torch.is_grad_enabled()
    skip = masked or not (graded and weights.requires_grad)
    args = (rows_of("lora_mixture", x, k), *flat, n, joined_a, joined_b, weights, skip, bias, dropout_p, seed)
    wanted = graded and any(
        t is not None and t.requires_grad for t in (x, flat[0], joined_a, joined_b, weights, bias)
    )
    y = apply_function(_LoraMixture, *args)[0] if wanted or forward_mode() else forward_op.op(*args)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)
