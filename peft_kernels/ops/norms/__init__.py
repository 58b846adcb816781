"""rms_norm and layer_norm over the last dimension, forward and backward.

`y = f x / sqrt(mean(x^2) + eps)` with f = offset + weight (RMSNorm: arXiv 1910.07467), or with x - mean(x) in place of
x, and a bias (arXiv 1607.06450). Everything is float32 (float64 for float64) and rounded once. Nothing but x is kept
for the backward, which computes the means again: a row is read from the cache, where it lies anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike, check_floating
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function


def _check(op: str, x: Tensor, eps: float) -> None:
    if not x.is_floating_point():
        raise arg_error(op, "x", "a floating-point tensor", x.dtype, TypeError)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise arg_error(op, "x", "[..., N], N at least 1", tuple(x.shape))
    if not eps >= 0.0:
        raise arg_error(op, "eps", "0 or above", eps)


def _check_factor(op: str, name: str, t: Tensor | None, x: Tensor) -> None:
    if t is None:
        return
    if t.shape != x.shape[-1:]:
        raise arg_error(op, name, f"[{x.shape[-1]}], one for each feature of x", tuple(t.shape))
    check_floating(op, **{name: t})


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _parts(x: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """(x, or its distance from its mean; 1 / sqrt(mean of its squares + eps) [..., 1]), in the dtype of computing."""
    h = x.to(acc_dtype(x.dtype))
    if centred:
        h = h - h.mean(-1, keepdim=True)
    return h, torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, centred: bool) -> Tensor:
    h, inverse = _parts(x, eps, centred)
    y = h * inverse
    if weight is not None:
        y = y * (weight.to(h.dtype) + offset)
    if bias is not None:
        y = y + bias.to(h.dtype)
    return y.to(x.dtype).contiguous()


def new_gradients(x: Tensor, need_dx: bool, need_sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty (dx, dweight, dbias), the last two in the dtype of sums; of no elements where they are not wanted."""
    n = x.shape[-1] if need_sums else 0
    sums = [x.new_empty(n, dtype=acc_dtype(x.dtype)) for _ in range(2)]
    return _empty(x) if need_dx else x.new_empty(0), sums[0], sums[1]


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, need_dx: bool, need_sums: bool,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h, inverse = _parts(x, eps, centred)
    d = dy.to(h.dtype)
    dx, dweight, dbias = new_gradients(x, need_dx, need_sums)
    if need_dx:
        g = d if weight is None else d * (weight.to(h.dtype) + offset)
        along = (g * h).mean(-1, keepdim=True) * inverse.square()
        if centred:
            g = g - g.mean(-1, keepdim=True)
        dx = ((g - h * along) * inverse).to(x.dtype).contiguous()
    if need_sums:
        dweight, dbias = (t.reshape(-1, t.shape[-1]).sum(0) for t in (d * h * inverse, d))
    return dx, dweight, dbias


# ---- rms_norm -------------------------------------------------------------------------------------------------------
def _check_rms(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> None:
    _check("rms_norm", x, eps)
    _check_factor("rms_norm", "weight", weight, x)
    if not math.isfinite(offset) or (offset and weight is None):
        raise arg_error("rms_norm", "offset", "finite, and 0 without the weight that it is added to", offset)


rms_op = Op(
    name="rms_norm",
    schema="(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    check=_check_rms,
    fake=lambda x, *_: _empty(x),
    reference=lambda x, weight, eps, offset: _norm(x, weight, None, eps, offset, False),
    folder=__name__,
    sizes="x[T,D] weight[D]",
)


def _check_rms_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, need_dx: bool, need_sums: bool
) -> None:
    _check_rms(x, weight, eps, offset)
    check_alike("rms_norm_backward", "dy", dy, x)


rms_backward_op = Op(
    name="rms_norm_backward",
    schema=(  # dx, dweight in the dtype of sums
        "(Tensor dy, Tensor x, Tensor? weight, float eps, float offset, bool need_dx, bool need_sums) "
        "-> (Tensor, Tensor)"
    ),
    check=_check_rms_backward,
    fake=lambda dy, x, weight, eps, offset, *need: new_gradients(x, *need)[:2],
    reference=lambda *args: _gradients(*args, False)[:2],
    folder=__name__,
    sizes="dy[T,D] x[T,D] weight[D]",
)


# ---- layer_norm -----------------------------------------------------------------------------------------------------
def _check_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    _check("layer_norm", x, eps)
    _check_factor("layer_norm", "weight", weight, x)
    _check_factor("layer_norm", "bias", bias, x)


layer_op = Op(
    name="layer_norm",
    schema="(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    check=_check_layer,
    fake=lambda x, *_: _empty(x),
    reference=lambda x, weight, bias, eps: _norm(x, weight, bias, eps, 0.0, True),
    folder=__name__,
    sizes="x[T,D] weight[D] bias[D]",
)


def _check_layer_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, need_dx: bool, need_sums: bool
) -> None:
    _check_layer(x, weight, None, eps)
    check_alike("layer_norm_backward", "dy", dy, x)


layer_backward_op = Op(
    name="layer_norm_backward",
    schema=(  # dx, dweight and dbias in the dtype of sums
        "(Tensor dy, Tensor x, Tensor? weight, float eps, bool need_dx, bool need_sums) -> (Tensor, Tensor, Tensor)"
    ),
    check=_check_layer_backward,
    fake=lambda dy, x, weight, eps, *need: new_gradients(x, *need),
    reference=lambda dy, x, weight, eps, *need: _gradients(dy, x, weight, eps, 0.0, *need, True),
    folder=__name__,
    sizes="dy[T,D] x[T,D] weight[D]",
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Any:
        return rms_op(x, weight, eps, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *ctx.numbers = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), need = ctx.saved_tensors, ctx.needs_input_grad[:2]
        frozen = None if weight is None else weight.detach()
        dx, dweight = rms_backward_op(dy, x, frozen, *ctx.numbers, *need)
        return dx if need[0] else None, dweight.to(weight.dtype) if need[1] else None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        return layer_op(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.eps = inputs
        ctx.bias = None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), need = ctx.saved_tensors, ctx.needs_input_grad[:3]
        frozen = None if weight is None else weight.detach()
        dx, dweight, dbias = layer_backward_op(dy, x, frozen, ctx.eps, need[0], need[1] or need[2])
        return (dx if need[0] else None, dweight.to(weight.dtype) if need[1] else None,
                dbias.to(ctx.bias) if need[2] else None, None)  # fmt: skip


def _recorded(*tensors: Tensor | None) -> bool:
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return wanted or forward_mode()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`(offset + weight) * x / sqrt(mean(x^2) + eps)` over the last dimension, differentiable in x and weight.

    x: [..., N] float32, bfloat16, float16 (float64 on the reference), also a slice of the features of a wider tensor
    (heads of q in a fused projection), which is read as it lies. weight: [N], in a dtype of its own, or None for none
    (Llama 4's norm of q and k). eps: 0 or above. offset: 1 for Gemma's. Returns [..., N] in x.dtype, contiguous;
    computed in float32 and rounded once (transformers' Llama rounds before weight as well). Raises ValueError or
    TypeError on bad arguments.
    """
    if _recorded(x, weight):
        result: Tensor = apply_function(_RmsNorm, x, weight, eps, offset)
        return result
    y: Tensor = rms_op(x, weight, eps, offset)
    return y


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`weight * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) + bias` over the last dimension, differentiable in
    x, weight and bias.

    x: [..., N] float32, bfloat16, float16 (float64 on the reference), also a slice of the features of a wider tensor.
    weight, bias: [N], in dtypes of their own, or None for none. eps: 0 or above. Returns [..., N] in x.dtype,
    contiguous; computed in float32 and rounded once. Raises ValueError or TypeError on bad arguments.
    """
    if _recorded(x, weight, bias):
        result: Tensor = apply_function(_LayerNorm, x, weight, bias, eps)
        return result
    y: Tensor = layer_op(x, weight, bias, eps)
    return y
