"""swiglu: `h = silu(gate) * up`; and `swiglu_mlp` (mlp.py): a whole MLP with LoRA, `down(silu(gate(x)) * up(x))`.

SwiGLU: arXiv 2002.05202. The activation is computed in float32 (float64 for float64) and rounded once; the backward
recomputes it from gate and up, so nothing but those is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike
from ...dispatch import Op, forward_mode
from ..lora_linear import apply_function


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _check(gate: Tensor, up: Tensor) -> None:
    if not gate.is_floating_point():
        raise arg_error("swiglu", "gate", "a floating-point tensor", gate.dtype, TypeError)
    if up.dtype != gate.dtype:
        raise arg_error("swiglu", "up", f"{gate.dtype} like gate", up.dtype, TypeError)
    if up.shape != gate.shape:
        raise arg_error("swiglu", "up", f"{tuple(gate.shape)} like gate", tuple(up.shape))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return _empty(gate)


def _reference(gate: Tensor, up: Tensor) -> Tensor:
    wide = _wide(gate)
    h: Tensor = torch.nn.functional.silu(gate.to(wide)) * up.to(wide)
    return h.to(gate.dtype).contiguous()


forward_op = Op(
    name="swiglu",
    schema="(Tensor gate, Tensor up) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="gate[T,K] up[T,K]",
)


def _check_backward(gate: Tensor, up: Tensor, dh: Tensor) -> None:
    _check(gate, up)
    check_alike("swiglu_backward", "dh", dh, gate, "gate")


def _fake_backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    return _empty(gate), _empty(gate)


def _reference_backward(gate: Tensor, up: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    g, u, d = (t.to(_wide(gate)) for t in (gate, up, dh))
    s = torch.sigmoid(g)
    silu = g * s
    dgate, dup = (t.to(gate.dtype).contiguous() for t in (d * u * (s + silu * (1 - s)), d * silu))
    return dgate, dup


backward_op = Op(
    name="swiglu_backward",
    schema="(Tensor gate, Tensor up, Tensor dh) -> (Tensor, Tensor)",  # dgate, dup
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="gate[T,K] up[T,K] dh[T,K]",
)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Any:
        return forward_op.op(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dh: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        dgate, dup = backward_op.op(gate, up, dh[0])
        return dgate if ctx.needs_input_grad[0] else None, dup if ctx.needs_input_grad[1] else None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, differentiable in both; silu(g) = g / (1 + exp(-g)).

    gate, up: of one shape, dtype (float32, bfloat16, float16; float64 on the reference) and device. Returns the same,
    contiguous; computed in float32 and rounded once. Raises ValueError or TypeError on bad arguments.
    """
    if (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)) or forward_mode():
        result: Tensor = apply_function(_Swiglu, gate, up)
        return result
    h: Tensor = forward_op.op(gate, up)
    return h
