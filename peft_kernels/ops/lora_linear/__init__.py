"""lora_linear: `y = x W^T + bias + scaling * (drop(x) A^T) B^T`, W dense or 4-bit, forward and backward.

LoRA: arXiv 2106.09685. QLoRA: arXiv 2305.14314. With no adapter it is the plain (4-bit) linear. Everything accumulates
in float32 (float64 for float64 inputs); dropout is recomputed in the backward from a counter (`philox.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, as_autocast, check_floating, rows_of
from ...dispatch import Op, forward_mode
from ...formats import FlatWeight, QuantWeight, check_parts, decode_4bit

WEIGHT = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, "
    "int quant_type, int blocksize, int nested_blocksize"
)
_ADAPTER = "Tensor? a, Tensor? b"


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def dense_weight(
    weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, n: int, k: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """W as [n, k] in `dtype`: what eager code computes with (decoded in float32, then rounded once)."""
    if quant_type == 0:
        return weight.to(dtype)
    shape = (n, k)
    return decode_4bit(
        weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, shape
    ).to(dtype)


def check_weight(
    op: str, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, n: int, k: int,
) -> None:  # fmt: skip
    if quant_type == 0:
        if weight.dim() != 2 or weight.shape[1] != k or weight.shape[0] != n:
            raise arg_error(op, "weight", f"[{n}, {k}]", tuple(weight.shape))
        if not weight.is_floating_point():
            raise arg_error(op, "weight", "a floating-point tensor (pass 4-bit weights as a QuantWeight)", weight.dtype,
                            TypeError)  # fmt: skip
        return
    if not weight.is_contiguous():
        raise arg_error(op, "weight", "contiguous when 4-bit", f"strides {weight.stride()}")
    check_parts(op, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, (n, k),
                "weight")  # fmt: skip


def check_adapter(op: str, n: int, k: int, a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or a.shape[1] != k:
        raise arg_error(op, "a", f"[r, {k}]", tuple(a.shape))
    if b.dim() != 2 or b.shape[0] != n or b.shape[1] != a.shape[0]:
        raise arg_error(op, "b", f"[{n}, {a.shape[0]}]", tuple(b.shape))
    check_floating(op, a=a, b=b)


def check_bias(op: str, n: int, bias: Tensor | None) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (n,):
        raise arg_error(op, "bias", f"[{n}]", tuple(bias.shape))
    check_floating(op, bias=bias)


def check_gain(op: str, gain: Tensor, n: int, x: Tensor) -> None:
    if tuple(gain.shape) != (n,):
        raise arg_error(op, "gain", f"[{n}]", tuple(gain.shape))
    if gain.dtype is not acc_dtype(x.dtype):
        raise arg_error(op, "gain", f"{acc_dtype(x.dtype)} for x in {x.dtype}", gain.dtype, TypeError)


def check_kept(op: str, name: str, got: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """An error unless `got` is as the forward returned it: kernels read so much of it, and as this dtype."""
    if got is None or tuple(got.shape) != shape or got.dtype is not dtype:
        raise arg_error(op, name, f"{shape} in {dtype}, as the forward returned it",
                        "None" if got is None else (tuple(got.shape), got.dtype))  # fmt: skip


def check_dropout(op: str, dropout_p: float, seed: Tensor | None, adapter: bool) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise arg_error(op, "dropout_p", "in [0, 1)", dropout_p)
    if dropout_p > 0.0 and adapter and (seed is None or seed.dtype is not torch.int64 or seed.numel() != 1):
        got_seed = "None" if seed is None else (seed.dtype, tuple(seed.shape))
        raise arg_error(op, "seed", "an int64 tensor of one element when dropout_p > 0", got_seed)


def check_common(
    op: str, x: Tensor, rows: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, n: int,
    a: Tensor | None, b: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    """Of the operators that multiply rows of x by a weight. rows: dy in a backward, x in a forward."""
    if x.dim() != 2:
        raise arg_error(op, "x", "[M, K]", tuple(x.shape))
    check_floating(op, x=x)
    if rows is not x and (tuple(rows.shape) != (x.shape[0], n) or rows.dtype is not x.dtype):
        raise arg_error(op, "dy", f"[{x.shape[0]}, N] in {x.dtype} like x", (tuple(rows.shape), rows.dtype))
    k = x.shape[1]
    check_weight(op, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize, n, k)
    if (a is None) != (b is None):
        raise arg_error(op, "a and b", "given together or not at all", "one of them")
    if a is not None and b is not None:
        check_adapter(op, n, k, a, b)
    check_dropout(op, dropout_p, seed, a is not None)


def columns(dy: Tensor) -> int:
    """N of a backward's dy [M, N]; -1, which fits nothing, of others."""
    return dy.shape[1] if dy.dim() == 2 else -1


def _check(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    check_common("lora_linear", x, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                 nested_blocksize, out_features, a, b, dropout_p, seed)  # fmt: skip
    check_bias("lora_linear", out_features, bias)


def _fake(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_empty((x.shape[0], out_features))
    s = x.new_empty((0,) if a is None else (x.shape[0], a.shape[0]), dtype=acc_dtype(x.dtype))
    return y, s


def _reference(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int,
    a: Tensor | None, b: Tensor | None, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                     out_features, x.shape[1], x.dtype)  # fmt: skip
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype))
    if a is None or b is None:
        return y, x.new_empty((0,), dtype=acc_dtype(x.dtype))
    acc = acc_dtype(x.dtype)
    s = dropped(x, dropout_p, seed).to(acc) @ a.to(acc).t()
    return (y.to(acc) + scaling * (s @ b.to(acc).t())).to(x.dtype), s


def dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0.0:
        return x
    assert seed is not None
    return philox.dropout(x.to(acc_dtype(x.dtype)), dropout_p, seed)


def _flops(x: Tensor, *rest: Any) -> int:
    n, a = rest[8], rest[9]
    (m, k), r = x.shape, 0 if a is None else a.shape[0]
    return 2 * m * (n * k + r * (n + k))


def _flops_backward(dy: Tensor, x: Tensor, *rest: Any) -> int:
    a, need_dx, need_ab = rest[8], rest[-2], rest[-1]
    (m, n), k, r = dy.shape, x.shape[1], 0 if a is None else a.shape[0]
    # dS from dY and B; then dX from dY and W, and from dS and A; then dA and dB
    return 2 * m * (r * n + (n * k + r * k if need_dx else 0) + (r * (n + k) if need_ab else 0))


forward_op = Op(
    name="lora_linear",
    schema=(
        f"(Tensor x, {WEIGHT}, SymInt out_features, {_ADAPTER}, float scaling, Tensor? bias, float dropout_p, "
        "Tensor? seed) -> (Tensor, Tensor)"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] weight[N,K] out_features=N a[R,K] b[N,R] bias[N]",
    flops=_flops,
)


def _check_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> None:  # fmt: skip
    op = "lora_linear_backward"
    check_common(op, x, dy, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                 columns(dy), a, b, dropout_p, seed)  # fmt: skip
    if need_ab and a is None:
        raise arg_error(op, "a and b", "given when their gradients are asked for", "None")
    if a is not None:
        check_kept(op, "s", s, (x.shape[0], a.shape[0]), acc_dtype(x.dtype))


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = x.new_empty((0,))
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_ab and a is not None else none
    db = torch.empty_like(b, memory_format=torch.contiguous_format) if need_ab and b is not None else x.new_empty((0,))
    dx = x.new_empty(x.shape) if need_dx else x.new_empty((0,))
    return dx, da, db


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor | None, b: Tensor | None, s: Tensor | None, scaling: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_ab: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    dx, da, db = x.new_empty((0,)), x.new_empty((0,)), x.new_empty((0,))
    if need_dx:
        w = dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                         dy.shape[1], x.shape[1], x.dtype)  # fmt: skip
        dx = dy @ w
    if a is not None and b is not None:
        ds = scaling * (dy.to(acc) @ b.to(acc))
        if need_dx:
            dx = (dx.to(acc) + dropped(ds @ a.to(acc), dropout_p, seed)).to(x.dtype)
        if need_ab:
            assert s is not None
            da = (ds.t() @ dropped(x, dropout_p, seed).to(acc)).to(a.dtype)
            db = (scaling * (dy.to(acc).t() @ s)).to(b.dtype)
    return dx, da, db


backward_op = Op(
    name="lora_linear_backward",
    schema=(
        f"(Tensor dy, Tensor x, {WEIGHT}, {_ADAPTER}, Tensor? s, float scaling, float dropout_p, Tensor? seed, "
        "bool need_dx, bool need_ab) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,N] x[M,K] weight[N,K] a[R,K] b[N,R] s[M,R]",
    flops=_flops_backward,
)


class _LoraLinear(torch.autograd.Function):
    """(x [M, K], weight..., a, b, ...) -> (y [M, N], s [M, r]); s is an output only so that it can be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, absmax, nested_absmax, nested_code, offset, *ints = inputs[:9]
        _, a, b, scaling, bias, dropout_p, seed = inputs[9:]
        s = output[1]
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        # a frozen layer without an adapter needs x in its backward for its shape only
        need_x = a is not None or weight.requires_grad
        ctx.x_shape = x.shape
        ctx.save_for_backward(x if need_x else None, weight, absmax, nested_absmax, nested_code, offset, a, b,
                              s if a is not None else None, seed)  # fmt: skip
        ctx.ints, ctx.scaling, ctx.dropout_p = ints, scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _ds: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 16
        if dy is None:
            return tuple(grads)
        x, weight, absmax, nested_absmax, nested_code, offset, a, b, s, seed = ctx.saved_tensors
        dy = dy.contiguous()
        need = ctx.needs_input_grad
        need_dx, need_dw, need_ab, need_bias = need[0], need[1], need[10] or need[11], need[13]
        if need_dx or need_ab:
            rows = x if x is not None else dy.new_empty(ctx.x_shape)
            dx, da, db = backward_op(
                dy, rows, weight, absmax, nested_absmax, nested_code, offset, *ctx.ints, a, b, s, ctx.scaling,
                ctx.dropout_p, seed, need_dx, need_ab,
            )  # fmt: skip
            grads[0] = dx if need_dx else None
            grads[10] = da if need[10] else None
            grads[11] = db if need[11] else None
        if need_dw:
            grads[1] = (dy.t() @ x).to(weight.dtype)
        if need_bias:
            grads[13] = dy.sum(0, dtype=acc_dtype(dy.dtype)).to(ctx.bias_dtype)
        return tuple(grads)


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply(*args)`, quicker."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    # Function.apply binds the arguments to forward's signature at each call, found anew by inspect: half of its time
    return super(torch.autograd.Function, function).apply(*args)


def flat_weight(op: str, weight: Tensor | QuantWeight) -> tuple[FlatWeight, int, int]:
    """(a weight as the operators take it, N, K)."""
    if isinstance(weight, QuantWeight):
        if len(weight.shape) != 2:
            raise arg_error(op, "weight", "a QuantWeight of shape (N, K)", weight.shape)
        return weight.flatten(), *weight.shape
    if weight.dim() != 2:
        raise arg_error(op, "weight", "[N, K]", tuple(weight.shape))
    return (weight, None, None, None, None, 0, 64, 256), *weight.shape


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantWeight,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias + scaling * (drop(x) A^T) B^T`, differentiable in x, a, b, bias and a dense weight.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). weight: dense [N, K] or a `QuantWeight` of that
    shape. a: [r, K], b: [N, r], in a dtype of their own (PEFT keeps float32 adapters on bfloat16 bases). bias: [N].
    scaling: a plain factor (LoRA: alpha / r). dropout_p: probability that an element of the adapter's input is dropped;
    seed: int64, one element; drawn from torch's generator when it is needed and not given. Returns [..., N] in x.dtype;
    sums are float32. Under autocast x is cast to autocast's dtype. Raises ValueError or TypeError on bad arguments.
    """
    x = as_autocast("lora_linear", x)
    flat, n, k = flat_weight("lora_linear", weight)
    if x.dim() == 0 or x.shape[-1] != k:
        raise arg_error("lora_linear", "x", f"[..., {k}] to fit the weight [{n}, {k}]", tuple(x.shape))
    if dropout_p > 0.0 and seed is None and a is not None:
        seed = philox.draw_seed(x.device)
    rows = rows_of("lora_linear", x, k)
    args = (rows, *flat, n, a, b, scaling, bias, dropout_p, seed)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, flat[0], a, b, bias))
    if wanted or forward_mode():
        y = apply_function(_LoraLinear, *args)[0]
    else:
        y = forward_op.op(*args)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)
