"""rms_norm: `y = weight * x / sqrt(mean(x^2) + eps)` over the last dimension, forward and backward.

RMSNorm: arXiv 1910.07467. Everything is float32 (float64 for float64) and rounded once. Nothing but x is kept for the
backward, which computes the mean again: a row is read from the cache, where it lies anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike, check_floating
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    if not x.is_floating_point():
        raise arg_error("rms_norm", "x", "a floating-point tensor", x.dtype, TypeError)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise arg_error("rms_norm", "x", "[..., N], N at least 1", tuple(x.shape))
    if tuple(weight.shape) != tuple(x.shape[-1:]):
        raise arg_error("rms_norm", "weight", f"[{x.shape[-1]}], one for each feature of x", tuple(weight.shape))
    check_floating("rms_norm", weight=weight)
    if not eps >= 0.0:
        raise arg_error("rms_norm", "eps", "0 or above", eps)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _empty(x)


def _inverse(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [..., 1], for x in the dtype of the computing."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.to(acc_dtype(x.dtype))
    return (h * _inverse(h, eps) * weight.to(h.dtype)).to(x.dtype).contiguous()


forward_op = Op(
    name="rms_norm",
    schema="(Tensor x, Tensor weight, float eps) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="x[T,D] weight[D]",
)


def _check_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    _check(x, weight, eps)
    check_alike("rms_norm_backward", "dy", dy, x)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _empty(x)


def _reference_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.to(acc_dtype(x.dtype))
    g = dy.to(h.dtype) * weight.to(h.dtype)
    inverse = _inverse(h, eps)
    along = (g * h).mean(-1, keepdim=True) * inverse.square()
    return ((g - h * along) * inverse).to(x.dtype).contiguous()


backward_op = Op(
    name="rms_norm_backward",
    schema="(Tensor dy, Tensor x, Tensor weight, float eps) -> Tensor",  # dx
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[T,D] x[T,D] weight[D]",
)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Any:
        return forward_op.op(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = backward_op.op(dy, x, weight.detach(), ctx.eps) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            h = x.to(acc_dtype(x.dtype))
            each = dy.to(h.dtype) * h * _inverse(h, ctx.eps)
            dweight = each.sum_to_size(weight.shape).to(weight.dtype)
        return dx, dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension, differentiable in x and weight.

    x: [..., N] float32, bfloat16, float16 (float64 on the reference). weight: [N], in a dtype of its own. eps: 0 or
    above. Returns [..., N] in x.dtype, contiguous; computed in float32 and rounded once (transformers' Llama rounds
    before weight as well). The kernels are for a weight that is frozen, as under an adapter: its gradient, where it is
    wanted, is plain torch. Raises ValueError or TypeError on bad arguments.
    """
    if (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)) or forward_mode():
        result: Tensor = apply_function(_RmsNorm, x, weight, eps)
        return result
    y: Tensor = forward_op(x, weight, eps)
    return y
