"""dora_linear: base, LoRA and DoRA's magnitude in one pass, W dense or 4-bit, forward and backward (arXiv 2402.09353).

With gain = magnitude / norm, S = x a^T:            y = gain * h + bias,  h = x W^T + scaling S b^T.
With dropout d, as PEFT has it (d(x) replaces x in both terms that the gain scales), S = d(x) a^T:
y = (x - d(x)) W^T + bias + gain * h,  h = d(x) W^T + scaling S b^T, where d is drop(x) of `philox.py`, recomputed in
the backward. The gradients are `lora_linear`'s with gain * dy in the place of dy; dgain is the column sum of dy * h.
In training the norm is that of this very call's weight: `dora_linear_normed` takes both in one call on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, as_autocast, check_memory, rows_of
from ...dispatch import Op, forced_backends, forward_mode
from ...formats import FlatWeight, QuantWeight
from .. import lora_linear as base
from ..dora_norm import dora_norm, norm_op


def _check(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int, a: Tensor,
    b: Tensor, gain: Tensor, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None, need_h: bool,
) -> None:  # fmt: skip
    base.check_common("dora_linear", x, x, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                      nested_blocksize, out_features, a, b, dropout_p, seed)  # fmt: skip
    base.check_gain("dora_linear", gain, out_features, x)
    base.check_bias("dora_linear", out_features, bias)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    n, a, need_h = rest[8], rest[9], rest[-1]
    y = x.new_empty((x.shape[0], n))
    h = x.new_empty((x.shape[0], n) if need_h else (0,))
    return y, h, x.new_empty((x.shape[0], a.shape[0]), dtype=base.acc_dtype(x.dtype))


def _reference(
    x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None, nested_code: Tensor | None,
    offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int, out_features: int, a: Tensor,
    b: Tensor, gain: Tensor, scaling: float, bias: Tensor | None, dropout_p: float, seed: Tensor | None, need_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = base.acc_dtype(x.dtype)
    w = base.dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize, nested_blocksize,
                          out_features, x.shape[1], x.dtype)  # fmt: skip
    d = base.dropped(x, dropout_p, seed)
    s = d.to(acc) @ a.to(acc).t()
    h = (d.to(x.dtype) @ w.t()).to(acc) + scaling * (s @ b.to(acc).t())
    y = gain * h
    if dropout_p > 0.0:
        y = y + ((x.to(acc) - d).to(x.dtype) @ w.t()).to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), h.to(x.dtype) if need_h else x.new_empty((0,)), s


def _flops(x: Tensor, *rest: Any) -> int:
    assert base.forward_op.flops is not None
    return base.forward_op.flops(x, *rest) * (1 if rest[14] == 0.0 else 2)


forward_op = Op(
    name="dora_linear",
    schema=(
        f"(Tensor x, {base.WEIGHT}, SymInt out_features, Tensor a, Tensor b, Tensor gain, float scaling, Tensor? bias, "
        "float dropout_p, Tensor? seed, bool need_h) -> (Tensor, Tensor, Tensor)"  # y, h, s
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[M,K] weight[N,K] out_features=N a[R,K] b[N,R] gain[N] bias[N]",
    flops=_flops,
)


def _fake_normed(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    acc = base.acc_dtype(x.dtype)
    return (*_fake(x, *rest), *(x.new_empty((rest[8],), dtype=acc) for _ in range(2)))


def _reference_normed(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *weight, n, a, b, magnitude, scaling = rest[:13]
    norm = _divisor(norm_op.reference(*weight, a, b, scaling, None), base.acc_dtype(x.dtype))
    gain = magnitude / norm
    return (*_reference(x, *weight, n, a, b, gain, scaling, *rest[13:]), gain, norm)


normed_op = Op(
    name="dora_linear_normed",
    schema=(
        f"(Tensor x, {base.WEIGHT}, SymInt out_features, Tensor a, Tensor b, Tensor magnitude, float scaling, "
        "Tensor? bias, float dropout_p, Tensor? seed, bool need_h) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),  # y, h, s, gain = magnitude / norm, norm = |W + scaling b a|, at least the smallest normal number
    check=_check,
    fake=_fake_normed,
    reference=_reference_normed,
    folder=__name__,
    sizes="x[M,K] weight[N,K] out_features=N a[R,K] b[N,R] magnitude[N] bias[N]",
    flops=lambda x, *rest: _flops(x, *rest) + 2 * rest[9].shape[0] * x.shape[1] * rest[8],
)


def _check_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, gain: Tensor, h: Tensor | None, s: Tensor, scaling: float, dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_ab: bool, need_gain: bool,
) -> None:  # fmt: skip
    op = "dora_linear_backward"
    base.check_common(op, x, dy, weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                      nested_blocksize, base.columns(dy), a, b, dropout_p, seed)  # fmt: skip
    base.check_gain(op, gain, dy.shape[1], x)
    base.check_kept(op, "s", s, (x.shape[0], a.shape[0]), base.acc_dtype(x.dtype))
    if need_gain:
        base.check_kept(op, "h", h, tuple(dy.shape), dy.dtype)


def _fake_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (a, b, gain), (need_dx, need_ab, need_gain) = rest[8:11], rest[-3:]
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if need_ab else x.new_empty((0,))
    db = torch.empty_like(b, memory_format=torch.contiguous_format) if need_ab else x.new_empty((0,))
    dgain = torch.empty_like(gain, memory_format=torch.contiguous_format) if need_gain else gain.new_empty((0,))
    return x.new_empty(x.shape if need_dx else (0,)), da, db, dgain


def _reference_backward(
    dy: Tensor, x: Tensor, weight: Tensor, absmax: Tensor | None, nested_absmax: Tensor | None,
    nested_code: Tensor | None, offset: Tensor | None, quant_type: int, blocksize: int, nested_blocksize: int,
    a: Tensor, b: Tensor, gain: Tensor, h: Tensor | None, s: Tensor, scaling: float, dropout_p: float,
    seed: Tensor | None, need_dx: bool, need_ab: bool, need_gain: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = base.acc_dtype(x.dtype)
    dx, da, db, dgain = x.new_empty((0,)), x.new_empty((0,)), x.new_empty((0,)), gain.new_empty((0,))
    dh = gain * dy.to(acc)
    ds = scaling * (dh @ b.to(acc))
    if need_dx:
        w = base.dense_weight(weight, absmax, nested_absmax, nested_code, offset, quant_type, blocksize,
                              nested_blocksize, dy.shape[1], x.shape[1], x.dtype)  # fmt: skip
        dd = (dh.to(x.dtype) @ w).to(acc) + ds @ a.to(acc)
        if dropout_p > 0.0:  # x - d(x) has the gradient dy W
            dr = (dy @ w).to(acc)
            dd = base.dropped(dd - dr, dropout_p, seed) + dr
        dx = dd.to(x.dtype)
    if need_ab:
        da = (ds.t() @ base.dropped(x, dropout_p, seed).to(acc)).to(a.dtype)
        db = (scaling * (dh.t() @ s)).to(b.dtype)
    if need_gain:
        assert h is not None
        dgain = (dy.to(acc) * h.to(acc)).sum(0)
    return dx, da, db, dgain


def _flops_backward(dy: Tensor, x: Tensor, *rest: Any) -> int:
    a, dropout_p, need_dx, need_ab = rest[8], rest[13], rest[-3], rest[-2]
    (m, n), k, r = dy.shape, x.shape[1], a.shape[0]
    products = (1 if dropout_p == 0.0 else 2) * n * k if need_dx else 0
    return 2 * m * (r * n + products + (r * k if need_dx else 0) + (r * (n + k) if need_ab else 0))


backward_op = Op(
    name="dora_linear_backward",
    schema=(
        f"(Tensor dy, Tensor x, {base.WEIGHT}, Tensor a, Tensor b, Tensor gain, Tensor? h, Tensor s, float scaling, "
        "float dropout_p, Tensor? seed, bool need_dx, bool need_ab, bool need_gain) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[M,N] x[M,K] weight[N,K] a[R,K] b[N,R] gain[N] h[M,N] s[M,R]",
    flops=_flops_backward,
)


class _DoraLinear(torch.autograd.Function):
    """(x [M, K], weight..., a, b, magnitude, norm or None, ..., need_h, normed) -> (y [M, N], h, s, ...); all but y are
    outputs to be saved. normed: the norm is the weight's own.

    The gain is a part of it: as operations of their own, its division and the ones back took a tenth of a small layer.
    """

    @staticmethod
    def forward(*args: Any) -> Any:
        magnitude, norm, acc = args[12], args[13], base.acc_dtype(args[0].dtype)
        if args[19]:
            return normed_op(*args[:12], dora_gain(magnitude, None, acc), *args[14:19])
        return forward_op(*args[:12], dora_gain(magnitude, norm, acc), *args[14:19])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, absmax, nested_absmax, nested_code, offset, *ints = inputs[:9]
        a, b, magnitude, norm, scaling, bias, dropout_p, seed, need_h, _ = inputs[10:]
        _, h, s, *own = output  # own: gain, norm
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, absmax, nested_absmax, nested_code, offset, a, b, magnitude, norm,
                              h if need_h else None, s, seed, *own)  # fmt: skip
        ctx.ints, ctx.scaling, ctx.dropout_p = ints, scaling, dropout_p
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 20
        if dy is None:
            return tuple(grads)
        (x, weight, absmax, nested_absmax, nested_code, offset, a, b, magnitude, norm, h, s, seed,
         *own) = ctx.saved_tensors  # fmt: skip
        dy, acc = dy.contiguous(), base.acc_dtype(dy.dtype)
        if own:
            gain, divisor = own
        else:
            divisor = None if norm is None else _divisor(norm, acc)
            gain = dora_gain(magnitude, None, acc)
            gain = gain if divisor is None else gain / divisor
        need = ctx.needs_input_grad
        need_gain = need[12] or need[13]
        if need[0] or need[10] or need[11] or need_gain:
            dx, da, db, dgain = backward_op(
                dy, x, weight, absmax, nested_absmax, nested_code, offset, *ctx.ints, a, b, gain, h, s, ctx.scaling,
                ctx.dropout_p, seed, need[0], need[10] or need[11], need_gain,
            )  # fmt: skip
            for index, grad in ((0, dx), (10, da), (11, db)):
                grads[index] = grad if need[index] else None
            if need_gain:
                by_norm = dgain if divisor is None else dgain / divisor
                if need[12]:
                    same = magnitude.dim() == 1 and magnitude.dtype is acc
                    grads[12] = by_norm if same else by_norm.to(magnitude.dtype).view(magnitude.shape)
                if need[13]:  # what a row of zeros is divided by is not its norm
                    assert norm is not None
                    grads[13] = (-by_norm * gain).masked_fill(norm < torch.finfo(acc).tiny, 0.0).to(norm.dtype)
        if need[1]:
            dh = (dy * gain).to(x.dtype)
            d = base.dropped(x, ctx.dropout_p, seed)
            dw = dh.t() @ d.to(x.dtype)
            if ctx.dropout_p > 0.0:
                dw = dw + dy.t() @ (x - d).to(x.dtype)
            grads[1] = dw.to(weight.dtype)
        if need[15]:
            grads[15] = dy.sum(0, dtype=acc).to(ctx.bias_dtype)
        return tuple(grads)


def dora_linear(
    x: Tensor,
    weight: Tensor | QuantWeight,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norm: Tensor | None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`magnitude / norm * (x W^T + scaling (x a^T) b^T) + bias`, differentiable in all of its tensors.

    x: [..., K] float32, bfloat16, float16 (float64 on the reference). weight: dense [N, K] or a `QuantWeight` of that
    shape. a: [r, K], b: [N, r], in a dtype of their own. magnitude: N elements of any shape. norm: [N], from
    `dora_norm(weight, a, b, scaling)`: a constant of the graph where it records no gradients, as in the paper and in
    PEFT; rows of zeros stay zero; None: magnitude is the gain itself. bias: [N]. dropout_p: with dropout d, PEFT's
    `x W^T + bias + (gain - 1) d(x) W^T + gain scaling (d(x) a^T) b^T`; seed: int64, one element, drawn from torch's
    generator when needed and not given. Returns [..., N] in x.dtype; sums are float32. Under autocast x is cast to
    autocast's dtype. Raises ValueError or TypeError on bad arguments.
    """
    x, flat, n = _arguments(x, weight, magnitude)
    if norm is not None and tuple(norm.shape) != (n,):
        raise arg_error("dora_linear", "norm", f"[{n}]", tuple(norm.shape))
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(x.device)
    return _apply(x, flat, n, a, b, magnitude, norm, scaling, bias, dropout_p, seed, False)


def dora_linear_normed(
    x: Tensor, weight: Tensor | QuantWeight, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float = 1.0,
    bias: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """`dora_linear` with the norm of this very weight, W + scaling b a, as a constant of the graph; the seed is drawn.

    On a CPU it is one call: at 128 tokens of a small layer, what torch and Python did between two took a tenth of a
    step. A dense weight that is trained sees the norm's gradient.
    """
    forced = forced_backends()
    forced_to = forced.get("dora_linear_normed", forced.get("*", "native"))
    full = isinstance(weight, Tensor) and weight.requires_grad
    if full or x.device.type != "cpu" or forced_to not in ("native", "reference"):
        norm = dora_norm(weight, a.detach(), b.detach(), scaling)
        return dora_linear(x, weight, a, b, magnitude, norm, scaling, bias, dropout_p)
    x, flat, n = _arguments(x, weight, magnitude)
    seed = philox.draw_seed(x.device) if dropout_p > 0.0 else None
    return _apply(x, flat, n, a, b, magnitude, None, scaling, bias, dropout_p, seed, True)


def _arguments(x: Tensor, weight: Tensor | QuantWeight, magnitude: Tensor) -> tuple[Tensor, FlatWeight, int]:
    """(x in autocast's dtype, the weight as operators take it, N)."""
    x = as_autocast("dora_linear", x)
    flat, n, k = base.flat_weight("dora_linear", weight)
    if x.dim() == 0 or x.shape[-1] != k:
        raise arg_error("dora_linear", "x", f"[..., {k}] to fit the weight [{n}, {k}]", tuple(x.shape))
    if magnitude.dim() != 1:  # it is copied where it is not flat
        check_memory("dora_linear", magnitude=magnitude)
    if magnitude.numel() != n:
        raise arg_error("dora_linear", "magnitude", f"of {n} elements", tuple(magnitude.shape))
    return x, flat, n


def _apply(
    x: Tensor, flat: FlatWeight, n: int, a: Tensor, b: Tensor, magnitude: Tensor, norm: Tensor | None, scaling: float,
    bias: Tensor | None, dropout_p: float, seed: Tensor | None, normed: bool,
) -> Tensor:  # fmt: skip
    rows = rows_of("dora_linear", x, x.shape[-1])
    tensors = (magnitude, norm, x, flat[0], a, b, bias)
    graph = torch.is_grad_enabled()
    wanted = graph and any(t is not None and t.requires_grad for t in tensors)
    need_h = graph and any(t is not None and t.requires_grad for t in tensors[:2])
    args = (rows, *flat, n, a, b, magnitude, norm, scaling, bias, dropout_p, seed, need_h, normed)
    if wanted or forward_mode():
        y = base.apply_function(_DoraLinear, *args)[0]
    else:
        y = _DoraLinear.forward(*args)[0]
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], n)


def dora_gain(magnitude: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """magnitude / norm, [N] in `dtype`; a row of zeros stays one. norm None: the magnitude itself."""
    if magnitude.dim() != 1 or magnitude.dtype is not dtype:  # each call is a microsecond of a small layer's 50
        magnitude = magnitude.reshape(-1).to(dtype)
    return magnitude if norm is None else magnitude / _divisor(norm, dtype)


def _divisor(norm: Tensor, dtype: torch.dtype) -> Tensor:
    return (norm if norm.dtype is dtype else norm.to(dtype)).clamp_min(torch.finfo(dtype).tiny)
