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


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    if not x.is_floating_point():
        raise arg_error(op, "x", "a floating-point tensor", x.dtype, TypeError)
    n = x.shape[-1] if x.dim() else 0
    if n == 0:
        raise arg_error(op, "x", "[..., N], N at least 1", tuple(x.shape))
    if weight is not None:
        _check_factor(op, "weight", weight, n)
    if bias is not None:
        _check_factor(op, "bias", bias, n)
    if not eps >= 0.0:
        raise arg_error(op, "eps", "0 or above", eps)


def _check_factor(op: str, name: str, t: Tensor, n: int) -> None:
    if t.dim() != 1 or t.numel() != n:
        raise arg_error(op, name, f"[{n}], one for each feature of x", tuple(t.shape))
    if not t.is_floating_point():
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


def new_gradients(x: Tensor, need_dx: bool, need_sums: bool, centred: bool) -> tuple[Tensor, ...]:
    """Empty (dx, dweight), and dbias where centred, those in the dtype of sums; of no elements where not wanted."""
    dx = _empty(x) if need_dx else x.new_empty(0)
    if need_sums:
        return dx, *(x.new_empty(x.shape[-1], dtype=acc_dtype(x.dtype)) for _ in range(1 + centred))
    return (dx, x.new_empty(0), x.new_empty(0)) if centred else (dx, x.new_empty(0))


def _gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float, need_dx: bool, need_sums: bool,
    centred: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    h, inverse = _parts(x, eps, centred)
    d = dy.to(h.dtype)
    dx, *sums = new_gradients(x, need_dx, need_sums, centred)
    if need_dx:
        g = d if weight is None else d * (weight.to(h.dtype) + offset)
        along = (g * h).mean(-1, keepdim=True) * inverse.square()
        if centred:
            g = g - g.mean(-1, keepdim=True)
        dx = ((g - h * along) * inverse).to(x.dtype).contiguous()
    if need_sums:
        sums = [t.reshape(-1, t.shape[-1]).sum(0) for t in (d * h * inverse, d)[: len(sums)]]
    return dx, *sums


# ---- rms_norm -------------------------------------------------------------------------------------------------------
def _check_rms(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> None:
    _check("rms_norm", x, weight, None, eps)
    if offset and (weight is None or not math.isfinite(offset)):
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
    fake=lambda dy, x, weight, eps, offset, *need: new_gradients(x, *need, False),
    reference=lambda *args: _gradients(*args, False),
    folder=__name__,
    sizes="dy[T,D] x[T,D] weight[D]",
)


# ---- layer_norm -----------------------------------------------------------------------------------------------------
def _check_layer(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    _check("layer_norm", x, weight, bias, eps)


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
    fake=lambda dy, x, weight, eps, *need: new_gradients(x, *need, True),
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
        x, weight, ctx.eps, ctx.offset = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (need_dx, trained, _, _) = ctx.saved_tensors, ctx.needs_input_grad
        frozen = weight.detach() if trained else weight
        dx, dweight = rms_backward_op(dy, x, frozen, ctx.eps, ctx.offset, need_dx, trained)
        return dx if need_dx else None, dweight.to(weight.dtype) if trained else None, None, None


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
        frozen = weight.detach() if need[1] else weight
        dx, dweight, dbias = layer_backward_op(dy, x, frozen, ctx.eps, need[0], need[1] or need[2])
        return (dx if need[0] else None, dweight.to(weight.dtype) if need[1] else None,
                dbias.to(ctx.bias) if need[2] else None, None)  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`(offset + weight) * x / sqrt(mean(x^2) + eps)` over the last dimension, differentiable in x and weight.

    x: [..., N] float32, bfloat16, float16 (float64 on the reference), also a slice of the features of a wider tensor
    (heads of q in a fused projection), which is read as it lies. weight: [N], in a dtype of its own, or None for none
    (Llama 4's norm of q and k). eps: 0 or above. offset: 1 for Gemma's. Returns [..., N] in x.dtype, contiguous;
    computed in float32 and rounded once (transformers' Llama rounds before weight as well). Raises ValueError or
    TypeError on bad arguments.
    """
    wanted = x.requires_grad or (weight is not None and weight.requires_grad)
    if (wanted and torch.is_grad_enabled()) or forward_mode():
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
    wanted = x.requires_grad or any(t is not None and t.requires_grad for t in (weight, bias))
    if (wanted and torch.is_grad_enabled()) or forward_mode():
        result: Tensor = apply_function(_LayerNorm, x, weight, bias, eps)
        return result
    y: Tensor = layer_op(x, weight, bias, eps)
    return y
