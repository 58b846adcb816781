"""cayley: skew-symmetric blocks -> rotations, (I + Q) (I - Q)^-1, or the truncated series of it.

Cayley transform as in OFT (arXiv 2306.07280); the series (Cayley-Neumann): arXiv 2506.19847, with PEFT's weights: every
power counts twice but the first (I) and the last, which count once. In float32 at least. The backward keeps Q and R and
no power of Q: of the exact form dQ = (R + I)^T dR (R + I)^T / 2, of the series the powers are computed again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike
from ...dispatch import Op, forward_mode
from ..lora_linear import apply_function


def series(terms: int) -> list[float]:
    """The weights of I, Q, Q^2, ... in PEFT's truncation after `terms` terms."""
    if terms <= 2:
        return [1.0, 2.0][:terms]
    last = max(terms - 1, 3)  # PEFT has no two-term tail: three terms are computed as four
    return [1.0] + [2.0] * (last - 1) + [1.0]


def _check(q: Tensor, terms: int) -> None:
    if q.dim() != 3 or q.shape[-1] != q.shape[-2]:
        raise arg_error("cayley", "q", "[D, b, b]", tuple(q.shape))
    if q.dtype not in (torch.float32, torch.float64):
        raise arg_error("cayley", "q", "float32 or float64", q.dtype, TypeError)
    if not 0 <= terms <= 100:
        raise arg_error("cayley", "terms", "1..100, or 0 for the exact form", terms)


def _fake(q: Tensor, terms: int) -> Tensor:
    return q.new_empty(q.shape)


def _eye(q: Tensor) -> Tensor:
    return torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)


def _horner(q: Tensor, weights: list[float]) -> list[Tensor]:
    """[P_0, P_1, ...] with P_k = w_k I + Q P_{k + 1}: P_0 is the series."""
    eye = _eye(q)
    done = [(weights[-1] * eye).expand_as(q)]
    for w in reversed(weights[:-1]):
        done.append(w * eye + q @ done[-1])
    return done[::-1]


def _reference(q: Tensor, terms: int) -> Tensor:
    if terms:
        return _horner(q, series(terms))[0].clone()
    eye = _eye(q)
    solved: Tensor = torch.linalg.solve(eye - q, eye + q, left=False)
    return solved.contiguous()


def _flops(q: Tensor, terms: int) -> int:
    return 2 * q.numel() * q.shape[-1] * max(1, len(series(terms)) - 2 if terms else 2)


forward_op = Op(
    name="cayley",
    schema="(Tensor q, int terms) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="q[G,B,B]",
    flops=_flops,
)


def _check_backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> None:
    _check(q, terms)
    for name, t in (("dr", dr), ("r", r)):
        check_alike("cayley_backward", name, t, q, "q")


def _fake_backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> Tensor:
    return q.new_empty(q.shape)


def _reference_backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> Tensor:
    if not terms:
        side = (r + _eye(q)).mT
        return (side @ dr @ side) / 2
    g, dq = dr, torch.zeros_like(q)
    for p in _horner(q, series(terms))[1:]:
        dq += g @ p.mT
        g = q.mT @ g
    return dq


def _flops_backward(dr: Tensor, q: Tensor, r: Tensor, terms: int) -> int:
    return 2 * q.numel() * q.shape[-1] * (3 * max(0, len(series(terms)) - 1) if terms else 2)


backward_op = Op(
    name="cayley_backward",
    schema="(Tensor dr, Tensor q, Tensor r, int terms) -> Tensor",  # dq
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dr[G,B,B] q[G,B,B] r[G,B,B]",
    flops=_flops_backward,
)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, terms: int) -> Any:
        return forward_op.op(q, terms)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        q, ctx.terms = inputs
        ctx.save_for_backward(q, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dr: Tensor) -> tuple[Tensor | None, ...]:
        q, r = ctx.saved_tensors
        return backward_op.op(dr.contiguous(), q, r, ctx.terms), None


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """(I + Q) (I - Q)^-1 of each block of q [..., b, b], orthogonal where Q is skew-symmetric; differentiable in q.

    terms: the first terms of I + 2 (Q + Q^2 + ...) instead, as PEFT's `num_cayley_neumann_terms`: cheap, and orthogonal
    up to the size of what is left out; None is exact. Computed and returned in float64 for a float64 q, else float32.
    Raises ValueError or TypeError on bad arguments.
    """
    if terms is not None and terms < 1:
        raise arg_error("cayley", "terms", "None or 1..100", terms)
    if q.dim() < 2:
        raise arg_error("cayley", "q", "[..., b, b]", tuple(q.shape))
    blocks = q.to(torch.promote_types(q.dtype, torch.float32)).reshape(-1, *q.shape[-2:]).contiguous()
    if (torch.is_grad_enabled() and q.requires_grad) or forward_mode():
        r: Tensor = apply_function(_Cayley, blocks, terms or 0)
    else:
        r = forward_op.op(blocks, terms or 0)
    return r.view(q.shape)
