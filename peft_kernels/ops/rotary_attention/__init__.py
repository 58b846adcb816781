"""rotary_attention: causal or masked self-attention with rotary embeddings, as Llama's layers have it.

`y = softmax(scale R(q) R(k)^T) v` over the keys that a query sees, where `R(x) = x cos + rotate_half(x) sin` (RoFormer,
arXiv 2104.09864; the halves of a head are the pairs). Heads of k and v are shared by groups of heads of q. No scores
are kept: the backward computes them again, as FlashAttention (arXiv 2205.14135) does, from q, k, v and the logs of the
softmax's denominators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import arg_error, check_alike
from ...dispatch import Op, forward_mode
from ..lora_linear import acc_dtype, apply_function, check_kept

_NAME = "rotary_attention"


def _check(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, scale: float) -> None:
    if not q.is_floating_point():
        raise arg_error(_NAME, "q", "a floating-point tensor", q.dtype, TypeError)
    if q.dim() != 4 or q.shape[2] == 0 or q.shape[3] == 0 or q.shape[3] % 2:
        raise arg_error(_NAME, "q", "[B, T, H, D] with H at least 1 and D even", tuple(q.shape))
    if not -math.inf < scale < math.inf:
        raise arg_error(_NAME, "scale", "finite", scale)
    batch, tokens, heads, d = q.shape
    if k.dim() != 4 or (*k.shape[:2], k.shape[3]) != (batch, tokens, d) or not k.shape[2] or heads % k.shape[2]:
        raise arg_error(_NAME, "k", f"[{batch}, {tokens}, G, {d}] with {heads} a multiple of G", tuple(k.shape))
    if k.dtype != q.dtype:
        raise arg_error(_NAME, "k", f"{q.dtype} like q", k.dtype, TypeError)
    check_alike(_NAME, "v", v, k, "k")
    for name, t in (("cos", cos), ("sin", sin)):
        if not t.is_floating_point():
            raise arg_error(_NAME, name, "a floating-point tensor", t.dtype, TypeError)
        if t.dim() != 3 or t.shape[0] not in (1, batch) or tuple(t.shape[1:]) != (tokens, d):
            raise arg_error(_NAME, name, f"[{batch} or 1, {tokens}, {d}]", tuple(t.shape))
        if t.dtype != cos.dtype or t.shape != cos.shape:
            raise arg_error(_NAME, name, f"{cos.dtype} {tuple(cos.shape)} like cos", f"{t.dtype} {tuple(t.shape)}")
    if keep is not None:
        if keep.dtype is not torch.bool:
            raise arg_error(_NAME, "keep", "bool, True where a query sees a key", keep.dtype, TypeError)
        if keep.dim() != 3 or keep.shape[0] not in (1, batch) or tuple(keep.shape[1:]) != (tokens, tokens):
            raise arg_error(_NAME, "keep", f"[{batch} or 1, {tokens}, {tokens}]", tuple(keep.shape))


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return _empty(q), q.new_empty((batch, heads, tokens), dtype=acc_dtype(q.dtype))


def _turned(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, heads, T, D] from x [B, T, heads, D], computed in the accumulator's dtype and rounded once."""
    x, cos, sin = (t.to(acc_dtype(dtype)) for t in (x, cos.unsqueeze(2), sin.unsqueeze(2)))
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(dtype).transpose(1, 2)


def _turned_back(dx: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x [B, T, heads, D] from that of its turned [B, heads, T, D]."""
    dx, cos, sin = (t.to(acc_dtype(dtype)) for t in (dx.transpose(1, 2), cos.unsqueeze(2), sin.unsqueeze(2)))
    first, second = (dx * sin).chunk(2, dim=-1)
    return (dx * cos + torch.cat((second, -first), dim=-1)).to(dtype).contiguous()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, G, H / G, T, D] from [B, H, T, D]."""
    return x.unflatten(1, (groups, -1))


def _scores(q: Tensor, k: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(scores [B, G, H / G, T, T] in the accumulator's dtype, -inf where unseen; which are seen) of turned q and k."""
    tokens = q.shape[-2]
    if keep is None:
        keep = torch.ones(1, tokens, tokens, dtype=torch.bool, device=q.device).tril()
    seen = keep[:, None, None]
    scores = (q @ k.transpose(-1, -2)).to(acc_dtype(q.dtype)) * scale
    return scores.masked_fill(~seen, -torch.inf), seen


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    groups = k.shape[2]
    turned_q, turned_k = _grouped(_turned(q, cos, sin, q.dtype), groups), _turned(k, cos, sin, q.dtype).unsqueeze(2)
    scores, seen = _scores(turned_q, turned_k, keep, scale)
    none = ~seen.any(-1, keepdim=True)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True).masked_fill(none, torch.inf)
    p = torch.exp(scores - lse)
    y = p.to(q.dtype) @ v.transpose(1, 2).unsqueeze(2)
    return y.flatten(1, 2).transpose(1, 2).contiguous(), lse.squeeze(-1).flatten(1, 2).contiguous()


forward_op = Op(
    name=_NAME,
    schema="(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? keep, float scale) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes="q[Z,T,H,D] k[Z,T,U,D] v[Z,T,U,D] cos[C,T,D] sin[C,T,D] keep[E,T,T]",
)


def _check_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, lse: Tensor,
    scale: float,
) -> None:  # fmt: skip
    _check(q, k, v, cos, sin, keep, scale)
    check_alike(f"{_NAME}_backward", "dy", dy, q, "q")
    batch, tokens, heads, _ = q.shape
    check_kept(f"{_NAME}_backward", "lse", lse, (batch, heads, tokens), acc_dtype(q.dtype))


def _fake_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(q), _empty(k), _empty(v)


def _reference_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups = k.shape[2]
    turned_q, turned_k = _grouped(_turned(q, cos, sin, q.dtype), groups), _turned(k, cos, sin, q.dtype).unsqueeze(2)
    scores, _ = _scores(turned_q, turned_k, keep, scale)
    p = torch.exp(scores - _grouped(lse.unsqueeze(-1), groups))
    grad, values = _grouped(dy.transpose(1, 2), groups), v.transpose(1, 2).unsqueeze(2)
    dp = (grad @ values.transpose(-1, -2)).to(p.dtype)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
    # the sum over the heads of a group is that over their queries
    dv = p.to(q.dtype).flatten(2, 3).transpose(-1, -2) @ grad.flatten(2, 3)
    dk = ds.flatten(2, 3).transpose(-1, -2) @ turned_q.flatten(2, 3)
    dq = (ds @ turned_k).flatten(1, 2)
    return (
        _turned_back(dq, cos, sin, q.dtype),
        _turned_back(dk, cos, sin, q.dtype),
        dv.transpose(1, 2).contiguous(),
    )


backward_op = Op(
    name=f"{_NAME}_backward",
    schema=(
        "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? keep, Tensor lse, float scale) "
        "-> (Tensor, Tensor, Tensor)"  # dq, dk, dv
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes="dy[Z,T,H,D] q[Z,T,H,D] k[Z,T,U,D] v[Z,T,U,D] cos[C,T,D] sin[C,T,D] keep[E,T,T] lse[Z,H,T]",
)


class _RotaryAttention(torch.autograd.Function):
    """(y, lse); lse is an output only so that it can be saved."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, scale: float) -> Any:
        return forward_op.op(q, k, v, cos, sin, keep, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if dys[0] is None or not any(ctx.needs_input_grad[:3]):
            return (None,) * 7
        q, k, v, *rest = ctx.saved_tensors
        grads = backward_op.op(dys[0], q, k, v, *rest, ctx.scale)
        wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


def rotary_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None = None, *, scale: float
) -> Tensor:
    """Self-attention of [B, T] tokens with rotary embeddings, differentiable in q, k and v.

    q: [B, T, H, D], D even; k, v: [B, T, G, D] with H a multiple of G, as linear layers leave them; float32, bfloat16,
    float16 (float64 on the reference), of one dtype. cos, sin: [B or 1, T, D] of any floating dtype, without gradients.
    keep: bool [B or 1, T, T], True where a query (dimension 1) sees a key; None: each sees those up to its own. A
    query that sees nothing gets zeros. scale: factor of the scores, usually D**-0.5.
    Returns [B, T, H, D] in q.dtype, contiguous. Turned q and k, and probabilities, are rounded to q.dtype (float32 on
    the CPU's levels without bfloat16 products); all sums and the softmax are float32. Raises ValueError or TypeError on
    bad arguments.
    """
    cos, sin = cos.detach(), sin.detach()
    if (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))) or forward_mode():
        result: Tensor = apply_function(_RotaryAttention, q, k, v, cos, sin, keep, scale)[0]
        return result
    y: Tensor = forward_op.op(q, k, v, cos, sin, keep, scale)[0]
    return y
