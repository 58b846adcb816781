"""attention: softmax(scores) v without kept scores, with what transformers' families have around it.

Scores are `softcap tanh(scale R(q) R(k)^T / softcap) + bias + slope (key - query)`, of the keys that a query sees; R
turns queries and keys by their positions (RoFormer, arXiv 2104.09864) or nothing; heads of k and v are shared by groups
of heads of q. The backward computes the scores again, as FlashAttention (arXiv 2205.14135) does, from q, k, v, y and
the logs of the softmax's denominators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, as_autocast, check_alike, in_memory
from ...dispatch import Op, forward_mode, servable
from ..lora_linear import acc_dtype, apply_function, check_dropout, check_kept

_NAME = "attention"
_MOST = 1 << 30  # a window of so many keys is none; positions fit 32 bits


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    of_q, of_k, of_v = q.shape, k.shape, v.shape  # once: a token waits for each of torch's attributes
    if not q.is_floating_point():
        raise arg_error(_NAME, "q", "a floating-point tensor", q.dtype, TypeError)
    if len(of_q) != 4 or of_q[2] == 0 or of_q[3] == 0 or of_q[3] % 2:
        raise arg_error(_NAME, "q", "[B, T, H, D] with H at least 1 and D even", tuple(of_q))
    batch, _, heads, d = of_q
    if len(of_k) != 4 or of_k[0] != batch or of_k[3] != d or not of_k[2] or heads % of_k[2]:
        raise arg_error(_NAME, "k", f"[{batch}, S, G, {d}] with {heads} a multiple of G", tuple(of_k))
    if len(of_v) != 4 or of_v[:3] != of_k[:3] or of_v[3] == 0 or of_v[3] % 2:
        raise arg_error(_NAME, "v", f"[{', '.join(map(str, of_k[:3]))}, Dv] with Dv even", tuple(of_v))
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise arg_error(_NAME, name, f"{q.dtype} like q", t.dtype, TypeError)


def _check_angles(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None) -> None:
    batch, tokens, _, d = q.shape
    if sin is None:
        raise arg_error(_NAME, "sin", "a tensor like cos", None, TypeError)
    if k.shape[1] != tokens:
        raise arg_error(_NAME, "cos", f"None where {tokens} queries meet {k.shape[1]} keys (turn q and k before)",
                        tuple(cos.shape))  # fmt: skip
    expected, expected_dtype = cos.shape, cos.dtype
    for name, t in (("cos", cos), ("sin", sin)):
        shape = t.shape
        if not t.is_floating_point():
            raise arg_error(_NAME, name, "a floating-point tensor", t.dtype, TypeError)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] != tokens or shape[2] > d or shape[2] % 2:
            raise arg_error(_NAME, name, f"[{batch} or 1, {tokens}, R] with R even and at most {d}", tuple(shape))
        if t.dtype != expected_dtype or shape != expected:
            raise arg_error(_NAME, name, f"{cos.dtype} {tuple(cos.shape)} like cos", f"{t.dtype} {tuple(shape)}")


def _check_table(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None, text: str) -> None:
    if t.dtype != dtype if dtype is not None else not t.is_floating_point():
        raise arg_error(_NAME, name, text, t.dtype, TypeError)
    if tuple(t.shape) != shape:
        raise arg_error(_NAME, name, str(shape), tuple(t.shape))


def _check(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, spans: Tensor | None, keep: Tensor | None,
    bias: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, scale: float, interleaved: bool, causal: bool,
    window: int, softcap: float, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    _check_shapes(q, k, v)
    check_dropout(_NAME, dropout_p, seed, True)
    batch, tokens, heads, _ = q.shape
    if not -math.inf < scale < math.inf:
        raise arg_error(_NAME, "scale", "finite", scale)
    if not 0.0 <= softcap < math.inf:
        raise arg_error(_NAME, "softcap", "0 (none) or a positive number", softcap)
    if not 0 <= window < _MOST:
        raise arg_error(_NAME, "window", f"0 (none) or a number of keys below {_MOST}", window)
    if cos is not None:
        _check_angles(q, k, cos, sin)
    elif sin is not None:
        raise arg_error(_NAME, "cos", "a tensor like sin", None, TypeError)
    if spans is not None:
        _check_table("spans", spans, (batch, tokens, 2), torch.int32, "int32, the first key and the one after the last")
    if keep is not None:
        _check_table("keep", keep, (batch, tokens, k.shape[1]), torch.bool, "bool, True where a query sees a key")
    if bias is not None:
        _check_table("bias", bias, (batch, heads, tokens, k.shape[1]), None, "a floating-point tensor")
    for name, t in (("slopes", slopes), ("sinks", sinks)):
        if t is not None:
            _check_table(name, t, (heads,), None, "a floating-point tensor")


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _d = q.shape
    lse = q.new_empty((batch, heads, tokens), dtype=acc_dtype(q.dtype))
    return q.new_empty((batch, tokens, heads, v.shape[3])), lse


def _partner(x: Tensor, interleaved: bool) -> Tensor:
    """x with (-b, a) in the place of each pair (a, b) of features."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """[B, heads, T, D] from x [B, T, heads, D], computed in the accumulator's dtype and rounded once."""
    if cos is None or sin is None:
        return x.transpose(1, 2)
    r = cos.shape[2]
    part, of_x, of_y = (t.to(acc_dtype(x.dtype)) for t in (x[..., :r], cos.unsqueeze(2), sin.unsqueeze(2)))
    turned = (part * of_x + _partner(part, interleaved) * of_y).to(x.dtype)
    return torch.cat((turned, x[..., r:]), dim=-1).transpose(1, 2)


def _turned_back(dx: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """The gradient of x [B, T, heads, D] from that of its turned [B, heads, T, D]."""
    dx = dx.transpose(1, 2)
    if cos is None or sin is None:
        return dx.contiguous()
    r = cos.shape[2]
    part, of_x, of_y = (t.to(acc_dtype(dx.dtype)) for t in (dx[..., :r], cos.unsqueeze(2), sin.unsqueeze(2)))
    turned = (part * of_x - _partner(part * of_y, interleaved)).to(dx.dtype)
    return torch.cat((turned, dx[..., r:]), dim=-1).contiguous()


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, G, H / G, T, D] from [B, H, T, D]."""
    return x.unflatten(1, (groups, -1))


def _seen(
    tokens: int, keys: int, spans: Tensor | None, keep: Tensor | None, causal: bool, window: int, device: torch.device
) -> Tensor:
    """bool [B or 1, 1, 1, T, S]: which queries see which keys."""
    key = torch.arange(keys, device=device)
    behind = (torch.arange(tokens, device=device) + (keys - tokens))[:, None] - key  # so many places is a key
    seen = (behind >= 0 if causal else behind == behind)[None]
    if window:
        seen = seen & (behind.abs() < window)
    if spans is not None:
        seen = seen & (key >= spans[..., :1]) & (key < spans[..., 1:])
    return (seen if keep is None else seen & keep)[:, None, None]


def _scores(
    q: Tensor, k: Tensor, seen: Tensor, bias: Tensor | None, slopes: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor | float]:
    """(scores [B, G, H / G, T, S] in the accumulator's dtype, -inf where unseen; their derivatives by the products) of
    turned q [B, G, H / G, T, D] and k [B, G, 1, S, D]."""
    scores = (q @ k.transpose(-1, -2)).to(acc_dtype(q.dtype)) * scale
    slope: Tensor | float = scale
    if softcap:
        scores = torch.tanh(scores / softcap)
        slope = (1 - scores.square()) * scale
        scores = scores * softcap
    if bias is not None:
        scores = scores + _grouped(bias, q.shape[1])
    if slopes is not None:
        tokens, keys = scores.shape[-2:]
        key = torch.arange(keys, device=q.device)
        behind = key - (torch.arange(tokens, device=q.device) + (keys - tokens))[:, None]
        scores = scores + slopes.to(scores.dtype).view(q.shape[1], -1, 1, 1) * behind
    return scores.to(acc_dtype(q.dtype)).masked_fill(~seen, -torch.inf), slope


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """x [B, G, H / G, T, S] where dropout keeps it: probabilities, or their gradients."""
    if dropout_p == 0.0:
        return x
    assert seed is not None
    return philox.dropout(x.flatten(0, 3), dropout_p, seed).view(x.shape)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, spans: Tensor | None, keep: Tensor | None,
    bias: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, scale: float, interleaved: bool, causal: bool,
    window: int, softcap: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    groups = k.shape[2]
    turned_q, turned_k = _grouped(_turned(q, cos, sin, interleaved), groups), _turned(k, cos, sin, interleaved)
    seen = _seen(q.shape[1], k.shape[1], spans, keep, causal, window, q.device)
    scores, _ = _scores(turned_q, turned_k.unsqueeze(2), seen, bias, slopes, scale, softcap)
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).view(groups, -1, 1, 1))
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    p = _dropped(torch.exp(scores - lse), dropout_p, seed)
    y = p.to(q.dtype) @ v.transpose(1, 2).unsqueeze(2)
    return y.flatten(1, 2).transpose(1, 2).contiguous(), lse.squeeze(-1).flatten(1, 2).contiguous()


_OPTIONS = "float scale, bool interleaved, bool causal, int window, float softcap, float dropout_p, Tensor? seed"
_TABLES = "cos[C,T,X] sin[C,T,X] spans[Z,T,Q] keep[Z,T,J] bias[Z,H,T,J] slopes[H]"
forward_op = Op(
    name=_NAME,
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor? spans, Tensor? keep, Tensor? bias, "
        f"Tensor? slopes, Tensor? sinks, {_OPTIONS}) -> (Tensor, Tensor)"
    ),
    check=_check,
    fake=_fake,
    reference=_reference,
    folder=__name__,
    sizes=f"q[Z,T,H,D] k[Z,J,U,D] v[Z,J,U,V] {_TABLES} sinks[H]",
)


def _check_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cos: Tensor | None, sin: Tensor | None,
    spans: Tensor | None, keep: Tensor | None, bias: Tensor | None, slopes: Tensor | None, scale: float,
    interleaved: bool, causal: bool, window: int, softcap: float, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    _check(q, k, v, cos, sin, spans, keep, bias, slopes, None, scale, interleaved, causal, window, softcap, dropout_p,
           seed)  # fmt: skip
    batch, tokens, heads, _ = q.shape
    check_kept(f"{_NAME}_backward", "y", y, (batch, tokens, heads, v.shape[3]), q.dtype)
    check_alike(f"{_NAME}_backward", "dy", dy, y, "y")
    check_kept(f"{_NAME}_backward", "lse", lse, (batch, heads, tokens), acc_dtype(q.dtype))


def _fake_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


def _reference_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cos: Tensor | None, sin: Tensor | None,
    spans: Tensor | None, keep: Tensor | None, bias: Tensor | None, slopes: Tensor | None, scale: float,
    interleaved: bool, causal: bool, window: int, softcap: float, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups, acc = k.shape[2], acc_dtype(q.dtype)
    turned_q = _grouped(_turned(q, cos, sin, interleaved), groups)
    turned_k = _turned(k, cos, sin, interleaved).unsqueeze(2)
    seen = _seen(q.shape[1], k.shape[1], spans, keep, causal, window, q.device)
    scores, slope = _scores(turned_q, turned_k, seen, bias, slopes, scale, softcap)
    p = torch.exp(scores - _grouped(lse.unsqueeze(-1), groups))
    grad, values = _grouped(dy.transpose(1, 2), groups), v.transpose(1, 2).unsqueeze(2)
    along = _grouped((dy.to(acc) * y.to(acc)).sum(-1, keepdim=True).transpose(1, 2), groups)
    dp = _dropped((grad @ values.transpose(-1, -2)).to(acc), dropout_p, seed)
    ds = (p * (dp - along) * slope).masked_fill(~seen, 0.0).to(q.dtype)
    # the sum over the heads of a group is that over their queries
    dv = _dropped(p, dropout_p, seed).to(q.dtype).flatten(2, 3).transpose(-1, -2) @ grad.flatten(2, 3)
    dk = ds.flatten(2, 3).transpose(-1, -2) @ turned_q.flatten(2, 3)
    dq = (ds @ turned_k).flatten(1, 2)
    return (
        _turned_back(dq, cos, sin, interleaved),
        _turned_back(dk, cos, sin, interleaved),
        dv.transpose(1, 2).contiguous(),
    )


backward_op = Op(
    name=f"{_NAME}_backward",
    schema=(
        "(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor? cos, Tensor? sin, Tensor? spans, "
        f"Tensor? keep, Tensor? bias, Tensor? slopes, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"  # dq, dk, dv
    ),
    check=_check_backward,
    fake=_fake_backward,
    reference=_reference_backward,
    folder=__name__,
    sizes=f"dy[Z,T,H,V] q[Z,T,H,D] k[Z,J,U,D] v[Z,J,U,V] y[Z,T,H,V] lse[Z,H,T] {_TABLES}",
)


def _sinks_gradient(dy: Tensor, y: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """-exp(sink - lse) of each query takes from its scores what it has along y."""
    acc = lse.dtype
    along = (dy.to(acc) * y.to(acc)).sum(-1).transpose(1, 2)
    return -(torch.exp(sinks.to(acc)[:, None] - lse) * along).sum((0, 2)).to(sinks.dtype)


class _Attention(torch.autograd.Function):
    """(y, lse); lse is an output only so that it can be saved."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return forward_op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.options = inputs[10:-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10], inputs[-1], *output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, need = dys[0], ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 17
        if dy is None:
            return tuple(grads)
        q, k, v, *tables, sinks, seed, y, lse = ctx.saved_tensors
        if any(need[:3]):
            found = backward_op(dy, q, k, v, y, lse, *tables, *ctx.options, seed)
            grads[:3] = (g if wanted else None for g, wanted in zip(found, need, strict=False))
        if need[9]:
            grads[9] = _sinks_gradient(dy, y, lse, sinks)
        return tuple(grads)


def _frozen(name: str, t: Tensor | None) -> None:
    if t is not None and t.requires_grad and torch.is_grad_enabled():
        raise arg_error(_NAME, name, "without gradients (kernels keep no scores, which they are sums of)",
                        "one that wants them: pass detach(), or attend in torch")  # fmt: skip


_dtype_of: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]


def directly(*tensors: Tensor) -> bool:
    """True where the native library computes with these as they come, and the dispatcher would add its time alone."""
    if not servable(*tensors) or forward_op.forced not in (None, "native"):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    backend = forward_op.load("native")
    return not isinstance(backend, str) and backend.dtypes.issuperset(map(_dtype_of, tensors)) and (
        backend.available is None or backend.available() is None
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, cos: Tensor | None = None, sin: Tensor | None = None,
    interleaved: bool = False, causal: bool = True, window: int = 0, spans: Tensor | None = None,
    keep: Tensor | None = None, bias: Tensor | None = None, slopes: Tensor | None = None, softcap: float = 0.0,
    sinks: Tensor | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of T queries over S keys, differentiable in q, k, v and sinks: [B, T, H, Dv] in q.dtype, contiguous.

    q: [B, T, H, D]; k: [B, S, G, D]; v: [B, S, G, Dv] with H a multiple of G, D and Dv even; float32, bfloat16, float16
    (float64 on the reference), of one dtype, by any strides (features dense: others are copied). Query i has the
    position p = S - T + i: the last T of S. scale: factor of the products, usually D**-0.5.
    cos, sin: [B or 1, T, R] of any floating dtype, T = S and R <= D even: the first R features of q and k are turned by
    them, x cos + x' sin, whose x' has (-b, a) of each pair (a, b): features i and R / 2 + i, or with `interleaved` 2 i
    and 2 i + 1. Without them nothing is turned: with a cache q and the keys come turned.
    Seen are the keys j that all of these allow: causal: j <= p. window: |p - j| < window, 0: any; on both sides where
    it is not causal. spans: int32 [B or 1, T, 2]: spans[.., 0] <= j < spans[.., 1] (documents of a packed row, padding
    on either side, a cache that is not full); keys that no query of a block sees cost nothing. keep: bool [B or 1, T or
    1, S]. A query that sees nothing gets zeros.
    softcap: c > 0: c tanh(s / c) of the scaled scores. bias: [B or 1, H or 1, T or 1, S], added then, -inf where
    nothing is seen. slopes: [H], slope (j - p) added (ALiBi). sinks: [H]: exp(sink) more in the softmax's denominator.
    bias and slopes are without gradients.
    dropout_p: probability that a probability is dropped, after the softmax; the others are multiplied by
    1 / (1 - dropout_p). seed: int64, one element; drawn from torch's generator when it is needed and not given.
    Turned q and k, and probabilities, are rounded to q.dtype (float32 on the CPU's levels without bfloat16 products,
    and for one query); all sums and the softmax are float32. Under autocast q, k and v are cast to its dtype. Raises
    ValueError or TypeError on bad arguments.
    """
    plain = bias is None and slopes is None and keep is None and cos is None and sin is None and dropout_p == 0.0
    if plain and q.dim() == 4 and q.shape[1] == 1 and directly(*((q, k, v) if sinks is None else (q, k, v, sinks))):
        # a token, which waits for Python
        spans = _of_each(spans, q)
        _check(q, k, v, None, None, spans, None, None, None, sinks, scale, False, causal, window, softcap, 0.0, None)
        if spans is None or (type(spans) is Tensor and spans.is_cpu and in_memory(spans)):
            from .native import token

            return token(q, k, v, spans, sinks, scale, causal, window, softcap)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = as_autocast(_NAME, q), as_autocast(_NAME, k), as_autocast(_NAME, v)
    if cos is not None and sin is not None:
        cos, sin = cos.detach(), sin.detach()
    spans = _of_each(spans, q)
    if keep is not None and keep.dim() == 3 and k.dim() == 4 and q.dim() == 4:
        keep = _expanded("keep", keep, (q.shape[0], q.shape[1], k.shape[1]))
    if bias is not None and bias.dim() == 4 and k.dim() == 4 and q.dim() == 4:
        _frozen("bias", bias)
        bias = _expanded("bias", bias, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]))
    _frozen("slopes", slopes)
    if dropout_p > 0.0 and seed is None:
        seed = philox.draw_seed(q.device)
    args = (q, k, v, cos, sin, spans, keep, bias, slopes, sinks, scale, interleaved, causal, window, softcap,
            dropout_p, seed)  # fmt: skip
    wanted = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )
    if wanted or forward_mode():
        result: Tensor = apply_function(_Attention, *args)[0]
        return result
    y: Tensor = forward_op(*args)[0]
    return y


def _of_each(spans: Tensor | None, q: Tensor) -> Tensor | None:
    """Spans of each row of the batch."""
    return spans.expand(len(q), -1, -1) if spans is not None and spans.dim() == 3 and len(spans) == 1 else spans


def _expanded(name: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    if t.shape[-1] != shape[-1] or any(have not in (1, want) for have, want in zip(t.shape, shape, strict=True)):
        raise arg_error(_NAME, name, f"{shape}, or 1 in any place but the last", tuple(t.shape))
    return t.expand(shape)
