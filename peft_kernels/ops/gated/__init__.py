"""gated: `h = act(gate) * up`, or `act(gate)` alone; and `gated_mlp` (mlp.py): a whole MLP with LoRA.

GLU variants: arXiv 2002.05202. The activation is computed in float32 (float64 for float64) and rounded once; the
backward recomputes it from gate and up, so nothing but those is kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function

SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)  # pk_act
FUSED = {None: 0, "halves": 1, "pairs": 2}  # how gate and up lie in one tensor


class Activation(NamedTuple):
    """The numbers of an activation in the operators: `h = act(min(gate, limit)) * (up within +-limit + shift)`.

    act: SILU to RELU2; alpha: of SILU alone; limit: 0 for none.
    """

    act: int = SILU
    alpha: float = 1.0
    limit: float = 0.0
    shift: float = 0.0


# Activations by the names of transformers' configurations. Several are one function there, computed in another order.
ACTS: dict[str, Activation] = {
    "silu": Activation(SILU),
    "swish": Activation(SILU),
    "quick_gelu": Activation(SILU, alpha=1.702),
    "gelu": Activation(GELU),
    "gelu_python": Activation(GELU),
    **dict.fromkeys(
        ("gelu_tanh", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        Activation(GELU_TANH),
    ),
    "relu": Activation(RELU),
    "relu2": Activation(RELU2),
}


def activation(op: str, act: str, alpha: float | None, limit: float, shift: float) -> Activation:
    """The numbers of an activation by its name; errors name `op`."""
    if act not in ACTS:
        raise arg_error(op, "act", f"one of {sorted(ACTS)}", repr(act))
    usual = ACTS[act]
    if alpha is not None and usual.act != SILU:
        raise arg_error(op, "alpha", f"None with act {act!r}: it is silu's factor", alpha)
    if alpha is None and not limit and not shift:  # as a model calls it: nothing is made
        return usual
    return Activation(usual.act, usual.alpha if alpha is None else alpha, limit, shift)


def _check(gate: Tensor, up: Tensor | None, act: int, alpha: float, limit: float, shift: float) -> None:
    if not gate.is_floating_point():
        raise arg_error("gated", "gate", "a floating-point tensor", gate.dtype, TypeError)
    if up is not None and up.dtype != gate.dtype:
        raise arg_error("gated", "up", f"{gate.dtype} like gate", up.dtype, TypeError)
    if up is not None and up.shape != gate.shape:
        raise arg_error("gated", "up", f"{tuple(gate.shape)} like gate", tuple(up.shape))
    if not SILU <= act <= RELU2:
        raise arg_error("gated", "act", f"{SILU} to {RELU2}", act)
    if not limit >= 0.0:
        raise arg_error("gated", "limit", "0 (none) or above", limit)
    if not (math.isfinite(alpha) and math.isfinite(shift)):
        raise arg_error("gated", "alpha and shift", "finite", (alpha, shift))
    if shift and up is None:
        raise arg_error("gated", "shift", "0 without up, to which it is added", shift)


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _fake(gate: Tensor, up: Tensor | None, act: int, alpha: float, limit: float, shift: float) -> Tensor:
    return _empty(gate)


def _activate(g: Tensor, act: int, alpha: float) -> tuple[Tensor, Tensor]:
    """(act(g), act'(g))."""
    if act == RELU:
        positive = g.clamp(min=0.0)
        return positive, torch.where(positive > 0, torch.ones_like(g), positive)
    if act == RELU2:
        positive = g.clamp(min=0.0)
        return positive.square(), 2 * positive
    if act == GELU:
        normal = 0.5 * torch.erfc(g * -math.sqrt(0.5))  # the distribution; erfc loses nothing at its small end
        density = torch.exp(-0.5 * g.square()) * math.sqrt(0.5 / math.pi)
        return g * normal, normal + g * density
    slope: float | Tensor = alpha
    if act == GELU_TANH:  # 0.5 (1 + tanh u) is the sigmoid of 2 u
        c, k = math.sqrt(8 / math.pi), 0.044715
        slope, z = c * (1 + 3 * k * g.square()), c * (g + k * g * g.square())
    else:
        z = alpha * g
    s = torch.sigmoid(z)
    # 1 - s of a large z is a difference of equals
    return g * s, s + g * s * torch.sigmoid(-z) * slope


def _reference(gate: Tensor, up: Tensor | None, act: int, alpha: float, limit: float, shift: float) -> Tensor:
    wide = acc_dtype(gate.dtype)
    most = limit or math.inf
    h, _ = _activate(gate.to(wide).clamp(max=most), act, alpha)
    if up is not None:
        h = h * (up.to(wide).clamp(-most, most) + shift)
    return h.to(gate.dtype).contiguous()


_NUMBERS = "int act, float alpha, float limit, float shift"
forward_op = Op(
    name="gated",
    schema=f"(Tensor gate, Tensor? up, {_NUMBERS}) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="gate[T,K] up[T,K]",
)


def _check_backward(
    gate: Tensor, up: Tensor | None, dh: Tensor, act: int, alpha: float, limit: float, shift: float, fused: int
) -> None:
    _check(gate, up, act, alpha, limit, shift)
    check_alike("gated_backward", "dh", dh, gate, "gate")
    if fused not in FUSED.values() or (fused and (up is None or not gate.dim())):
        raise arg_error("gated_backward", "fused", "0, or 1 or 2 with up", fused)


def new_gradients(gate: Tensor, up: Tensor | None, fused: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(the two results of the backward, and dgate and dup where they lie in them).

    Where gate and up are one tensor so are their gradients, the first result; what is not there is empty.
    """
    if fused:
        both = gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1]))
        return both, gate.new_empty(0), *parts_of(both, fused)
    dgate, dup = _empty(gate), gate.new_empty(0) if up is None else _empty(gate)
    return dgate, dup, dgate, None if up is None else dup


def parts_of(both: Tensor, fused: int) -> tuple[Tensor, Tensor]:
    """The views of gate and of up in a tensor that holds both."""
    if fused == FUSED["pairs"]:
        return both[..., ::2], both[..., 1::2]
    half = both.shape[-1] // 2
    return both[..., :half], both[..., half:]


def _fake_backward(
    gate: Tensor, up: Tensor | None, dh: Tensor, act: int, alpha: float, limit: float, shift: float, fused: int
) -> tuple[Tensor, Tensor]:
    return new_gradients(gate, up, fused)[:2]


def _reference_backward(
    gate: Tensor, up: Tensor | None, dh: Tensor, act: int, alpha: float, limit: float, shift: float, fused: int
) -> tuple[Tensor, Tensor]:
    wide = acc_dtype(gate.dtype)
    g, d, most = gate.to(wide), dh.to(wide), limit or math.inf
    f, slope = _activate(g.clamp(max=most), act, alpha)
    along = d
    first, second, dgate, dup = new_gradients(gate, up, fused)
    if up is not None and dup is not None:
        u = up.to(wide)
        along = d * (u.clamp(-most, most) + shift)
        dup.copy_(torch.where(u.abs() > most, torch.zeros_like(d), d * f))  # nothing comes back from what was cut
    dgate.copy_(torch.where(g > most, torch.zeros_like(d), along * slope))
    return first, second


backward_op = Op(
    name="gated_backward",
    schema=f"(Tensor gate, Tensor? up, Tensor dh, {_NUMBERS}, int fused) -> (Tensor, Tensor)",  # dgate, dup
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="gate[T,K] up[T,K] dh[T,K]",
)


class _Gated(torch.autograd.Function):
    """(gate, up, the numbers of the activation, fused): with fused, gate holds both."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor | None, numbers: Activation, fused: int) -> Any:
        pair = parts_of(gate, fused) if fused else (gate, up)
        return forward_op(*pair, *numbers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.numbers, ctx.fused = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dh: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        pair = parts_of(gate, ctx.fused) if ctx.fused else (gate, up)
        dgate, dup = backward_op(*pair, dh[0], *ctx.numbers, ctx.fused)
        need = ctx.needs_input_grad
        return dgate if need[0] else None, dup if need[1] else None, None, None


def fused_as(op: str, fused: str | None, up: object) -> int:
    """The number of a way in which gate and up are one; errors name `op`."""
    if fused not in FUSED:
        raise arg_error(op, "fused", "None, 'halves' or 'pairs'", repr(fused))
    if fused is not None and up is not None:
        raise arg_error(op, "up", f"None where gate holds both ({fused})", "both")
    return FUSED[fused]


def gated(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    *,
    fused: str | None = None,
    alpha: float | None = None,
    limit: float = 0.0,
    shift: float = 0.0,
) -> Tensor:
    """`act(gate) * up`, or `act(gate)` without up; differentiable in both.

    gate, up: of one shape, dtype (float32, bfloat16, float16; float64 on the reference) and device; slices of the
    features of a wider tensor are read as they lie. fused: gate [..., 2 F] holds both, "halves" side by side (gate
    first) or "pairs" alternating; their gradient is then one tensor, too. act: a name of transformers: silu, gelu
    (with erf), gelu_tanh and its other names, quick_gelu (silu with alpha = 1.702), relu, relu2 (squared).
    alpha: silu(g) = g / (1 + exp(-alpha g)); None for what the name means. limit: gate is cut above at it, up on both
    sides, before; 0: neither. shift: added to up. GPT-OSS: gated(gate_up, fused="pairs", alpha=1.702, limit=7.0,
    shift=1.0). Returns [..., F], contiguous; computed in float32 and rounded once. Raises ValueError or TypeError on
    bad arguments.
    """
    numbers, joined = activation("gated", act, alpha, limit, shift), fused_as("gated", fused, up)
    if joined and (not gate.dim() or gate.shape[-1] % 2):
        raise arg_error("gated", "gate", "[..., 2 F] where it holds both", tuple(gate.shape))
    wanted = gate.requires_grad or (up is not None and up.requires_grad)
    if (torch.is_grad_enabled() and wanted) or forward_mode():
        result: Tensor = apply_function(_Gated, gate, up, numbers, joined)
        return result
    h: Tensor = forward_op(*(parts_of(gate, joined) if joined else (gate, up)), *numbers)
    return h
