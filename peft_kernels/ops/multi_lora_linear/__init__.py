"""multi_lora_linear: `lora_linear` where every row of x has an adapter of its own, out of a stack.

`y[m] = x[m] W^T + bias + scaling[i] * (drop(x)[m] A_i^T) B_i^T` with `i = adapters[m]`; -1 is the base alone. W is
dense or 4-bit. LoRA in batches: Punica (arXiv 2310.18547), S-LoRA (arXiv 2311.03285). Backends group the rows by
adapter, so that an adapter's weights are read once per batch. Ranks may differ; `formats.AdapterStack` is the storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, as_autocast, capturing, check_floating, check_memory, rows_of
from ...dispatch import Op, forward_mode
from ...formats import AdapterStack, QuantWeight
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

_STACK = "Tensor a, Tensor b"
MAX_RANK = 1 << 16
_PLAN = "Tensor adapters, Tensor starts, Tensor ranks, Tensor scaling, SymInt max_rank"


def _check_stack(
    op: str, x: Tensor, n: int, a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor,
    max_rank: int,
) -> None:  # fmt: skip
    """Shapes and dtypes; the values are looked at where that costs no synchronisation (`check_values`)."""
    m, k = x.shape
    if a.dim() != 2 or a.shape[1] != k:
        raise arg_error(op, "a", f"[P, {k}]", tuple(a.shape))
    if tuple(b.shape) != (a.shape[0], n):
        raise arg_error(op, "b", f"[{a.shape[0]}, {n}] (lora_B transposed)", tuple(b.shape))
    check_floating(op, a=a, b=b)
    for name, t, dtype in (("adapters", adapters, torch.int64), ("starts", starts, torch.int64),
                           ("ranks", ranks, torch.int64), ("scaling", scaling, torch.float32)):  # fmt: skip
        if t.dtype is not dtype:
            raise arg_error(op, name, f"{dtype}", t.dtype, TypeError)
    if tuple(adapters.shape) != (m,):
        raise arg_error(op, "adapters", f"[{m}], one index per row of x", tuple(adapters.shape))
    if starts.dim() != 1 or not starts.shape == ranks.shape == scaling.shape:
        raise arg_error(op, "starts, ranks and scaling", "[S] each",
                        (tuple(starts.shape), tuple(ranks.shape), tuple(scaling.shape)))  # fmt: skip
    if max_rank < 0:
        raise arg_error(op, "max_rank", "at least 0", max_rank)
    if max_rank > MAX_RANK:
        why = f"at most {MAX_RANK}: for each row of x as many values are computed between A and B"
        raise arg_error(op, "max_rank", why, max_rank)


def check_values(
    op: str, p: int, adapters: Tensor, starts: Tensor, ranks: Tensor, max_rank: int, disjoint: bool = False
) -> None:
    """Raise ValueError on an index or range of rows that is not there; disjoint: also on rows that two in use share."""
    s = starts.numel()
    wrong = adapters[(adapters < -1) | (adapters >= s)]
    if wrong.numel():
        raise arg_error(op, "adapters", f"-1 (the base) or an index below {s}", int(wrong[0]))
    used = [i for i in adapters.unique().tolist() if i >= 0]
    spans = sorted((int(starts[i]), int(ranks[i]), i) for i in used)
    for start, rank, i in spans:
        if not 0 <= rank <= max_rank:
            raise arg_error(op, f"ranks[{i}]", f"between 0 and max_rank = {max_rank}", rank)
        if rank and not 0 <= start <= p - rank:
            raise arg_error(op, f"starts[{i}]", f"such that {rank} rows are among the {p} of a and b", start)
    owned = [span for span in spans if span[1]]
    for (start, rank, i), (after, _, j) in pairwise(owned):
        if disjoint and start + rank > after:
            raise arg_error(op, "starts", "such that adapters share no rows", f"{start} and {after} of {i} and {j}")


def _groups(
    op: str, p: int, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int, backward: bool
) -> Iterator[tuple[Tensor, slice, float]]:
    """(rows of x, rows of a and b, scaling) of each adapter in use. On a GPU what does not exist acts as the base."""
    if adapters.device.type == "cpu":
        check_values(op, p, adapters, starts, ranks, max_rank, backward)
    if capturing():
        raise RuntimeError(
            f"{op}: the reference reads which adapters there are, which a CUDA graph cannot hold: let a kernel serve "
            f"(peft_kernels.explain({op!r}, ...) says why none does; one call before the capture lets it be checked)"
        )
    first, count, scale = starts.tolist(), ranks.tolist(), scaling.tolist()
    for i in adapters.unique().tolist():
        if 0 <= i < len(first) and 0 < count[i] <= max_rank and 0 <= first[i] <= p - count[i]:
            yield (adapters == i).nonzero()[:, 0], slice(first[i], first[i] + count[i]), scale[i]


def _check(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    op = "multi_lora_linear"
    check_common(op, x, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                 out_features, None, None, 0.0, None)  # fmt: skip
    _check_stack(op, x, out_features, a, b, adapters, starts, ranks, scaling, max_rank)
    check_dropout(op, dropout_p, seed, True)
    check_bias(op, out_features, bias)


def _fake(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    m = x.shape[0]
    return x.new_empty((m, out_features)), x.new_empty((m, max_rank), dtype=acc_dtype(x.dtype))


def _reference(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor, b: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                     out_features, x.shape[1], x.dtype)  # fmt: skip
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
    acc = acc_dtype(x.dtype)
    wide, given = y.to(acc), dropped(x, dropout_p, seed).to(acc)
    s = x.new_zeros((x.shape[0], max_rank), dtype=acc)
    for rows, own, scale in _groups("multi_lora_linear", a.shape[0], adapters, starts, ranks, scaling, max_rank, False):
        low = given[rows] @ a[own].to(acc).t()
        s[rows, : low.shape[1]] = low
        wide[rows] += scale * (low @ b[own].to(acc))
    return wide.to(x.dtype), s


def _flops(x: Tensor, *rest: Any) -> int:
    n, r = rest[8], rest[15]  # max_rank: the ranks themselves are values
    (m, k) = x.shape
    return 2 * m * (n * k + r * (n + k))


def _flops_backward(dy: Tensor, x: Tensor, *rest: Any) -> int:
    r, need_dx, need_ab = rest[15], rest[-2], rest[-1]
    (m, n), k = dy.shape, x.shape[1]
    return 2 * m * (r * n + (n * k + r * k if need_dx else 0) + (r * (n + k) if need_ab else 0))


forward_op = Op(
    name="multi_lora_linear",
    schema=(
        f"(Tensor x, {WEIGHT}, SymInt out_features, {_STACK}, {_PLAN}, Tensor? bias, float dropout_p, Tensor? seed) "
        "-> (Tensor, Tensor)"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes=(
        "x[M,K] weight[N,K] out_features=N a[P,K] b[P,N] adapters[M] starts[S] ranks[S] scaling[S] "
        "max_rank=R bias[N]"
    ),
    flops=_flops,
)


def _check_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> None:  # fmt: skip
    op = "multi_lora_linear_backward"
    check_common(op, x, dy, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                 columns(dy), None, None, 0.0, None)  # fmt: skip
    _check_stack(op, x, dy.shape[1], a, b, adapters, starts, ranks, scaling, max_rank)
    check_dropout(op, dropout_p, seed, True)
    check_kept(op, "s", s, (x.shape[0], max_rank), acc_dtype(x.dtype))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = x.new_empty(x.shape if need_dx else (0,))
    da = a.new_empty(a.shape if need_ab else (0,))
    db = b.new_empty(b.shape if need_ab else (0,))
    return dx, da, db


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, s: Tensor, adapters: Tensor, starts: Tensor, ranks: Tensor, scaling: Tensor, max_rank: int,
    dropout_p: float, seed: Tensor | None, need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    given, wide = dropped(x, dropout_p, seed).to(acc), dy.to(acc)
    da = a.new_zeros(a.shape if need_ab else (0,))
    db = b.new_zeros(b.shape if need_ab else (0,))
    low = x.new_zeros(x.shape, dtype=acc)
    name = "multi_lora_linear_backward"
    for rows, own, scale in _groups(name, a.shape[0], adapters, starts, ranks, scaling, max_rank, True):
        ds = scale * (wide[rows] @ b[own].to(acc).t())
        low[rows] = ds @ a[own].to(acc)
        if need_ab:
            da[own] = (ds.t() @ given[rows]).to(a.dtype)
            db[own] = (scale * (s[rows, : ds.shape[1]].t() @ wide[rows])).to(b.dtype)
    if not need_dx:
        return x.new_empty((0,)), da, db
    w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                     dy.shape[1], x.shape[1], x.dtype)  # fmt: skip
    return ((dy @ w).to(acc) + dropped(low, dropout_p, seed)).to(x.dtype), da, db


backward_op = Op(
    name="multi_lora_linear_backward",
    schema=(
        f"(Tensor dy, Tensor x, {WEIGHT}, {_STACK}, Tensor s, {_PLAN}, float dropout_p, Tensor? seed, bool need_dx, "
        "bool need_ab) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,N] x[M,K] weight[N,K] a[P,K] b[P,N] s[M,R] adapters[M] starts[S] ranks[S] scaling[S] max_rank=R",
    flops=_flops_backward,
)


class _MultiLoraLinear(torch.autograd.Function):
    """(x [M, K], weight..., n, a, b, plan..., ...) -> (y [M, N], s [M, max_rank]); s so that it can be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return forward_op.op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, absmax, nested_absmax, nested_code, offset, *ints = inputs[:9]
        a, b, adapters, starts, ranks, scaling, max_rank, bias, dropout_p, seed = inputs[10:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, absmax, nested_absmax, nested_code, offset, a, b, output[1], adapters, starts,
                              ranks, scaling, seed)  # fmt: skip
        ctx.ints, ctx.max_rank, ctx.dropout_p = ints, max_rank, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _ds: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 20
        if dy is None:
            return tuple(grads)
        x, weight, absmax, nested_absmax, nested_code, offset, a, b, s, adapters, *plan, seed = ctx.saved_tensors
        dy = dy.contiguous()
        need = ctx.needs_input_grad
        need_dx, need_ab = need[0], need[10] or need[11]
        if need_dx or need_ab:
            dx, da, db = backward_op.op(
                dy, x, weight.detach(), absmax, nested_absmax, nested_code, offset, *ctx.ints, a.detach(), b.detach(),
                s, adapters, *plan, ctx.max_rank, ctx.dropout_p, seed, need_dx, need_ab,
            )  # fmt: skip
            grads[0] = dx if need_dx else None
            grads[10] = da if need[10] else None
            grads[11] = db if need[11] else None
        if need[1]:
            grads[1] = (dy.t() @ x).to(weight.dtype)
        if need[17]:
            grads[17] = dy.sum(0, dtype=acc_dtype(dy.dtype)).to(ctx.bias_dtype)
        return tuple(grads)


def _per_row(adapters: Tensor, m: int, batch: int) -> Tensor:
    """adapters as [m]: given so, or one per entry of x's first dimension."""
    if adapters.dim() == 1 and adapters.shape[0] == m:
        return adapters
    if adapters.dim() != 1 or adapters.shape[0] != batch:
        expected = f"[{m}], one index per row of x, or [{batch}], one per entry of its first dimension"
        raise arg_error("multi_lora_linear", "adapters", expected, tuple(adapters.shape))
    check_memory("multi_lora_linear", adapters=adapters)
    return adapters[:, None].expand(batch, m // batch).reshape(-1)


def multi_lora_linear(
    x: Tensor,
    weight: Tensor | QuantWeight,
    stack: AdapterStack,
    adapters: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`lora_linear` with a choice of adapter per row; differentiable in x, stack.a, stack.b, bias and a dense weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). weight: dense [N, K] or a `QuantWeight`.
    adapters: int64 on x's device, one per row of x flattened to [M, K], or [x.shape[0]]; -1 and free slots are the base
    alone. bias, dropout_p, seed: as in `lora_linear`, whose dropout mask it is. Returns [..., N] in x.dtype; sums are
    float32. Gradients of rows of a and b that no row of x uses are zero. Raises ValueError or TypeError on bad
    arguments; indices out of range raise on a CPU, and act as -1 on a GPU, where looking would wait for it.
    """
    x = as_autocast("multi_lora_linear", x)
    flat, n, k = flat_weight("multi_lora_linear", weight)
    if x.dim() == 0 or x.shape[-1] != k:
        raise arg_error("multi_lora_linear", "x", f"[..., {k}] to fit the weight [{n}, {k}]", tuple(x.shape))
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(x.device)
    rows = rows_of("multi_lora_linear", x, k)
    args = (rows, *flat, n, stack.a, stack.b, _per_row(adapters, rows.shape[0], x.shape[0]), stack.starts, stack.ranks,
            stack.scaling, stack.max_rank, bias, dropout_p, seed)  # fmt: skip
    wanted = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, flat[0], stack.a, stack.b, bias)
    )
    if wanted or forward_mode():
        y = apply_function(_MultiLoraLinear, *args)[0]
    else:
        y = forward_op.op(*args)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)

