"""The native CPU backend of attention: packs the arguments into one struct and makes one call."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...native import pointer

_ARGS = struct.Struct("=51q3d")  # pk_attention_args of csrc/pk_abi.h
_CODES = {t: native.DTYPES[t] for t in (torch.float32, torch.bfloat16, torch.float16)}
_F32 = torch.float32
_NO_STRIDES = (0,) * 11  # of v, dy, keep and bias


def _dense(t: Tensor) -> Tensor:
    """t with its last dimension dense, as kernels take it by any other strides."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _table(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().to(_F32).contiguous()


def _call(
    entry: Any, dy: Tensor | None, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cos: Tensor | None,
    sin: Tensor | None, spans: Tensor | None, keep: Tensor | None, bias: Tensor | None, slopes: Tensor | None,
    sinks: Tensor | None, grads: tuple[Tensor, ...], scale: float, interleaved: bool, causal: bool, window: int,
    softcap: float, dropout_p: float, seed: Tensor | None,
) -> None:  # fmt: skip
    q, k, v = _dense(q), _dense(k), _dense(v)
    dy = None if dy is None else _dense(dy)
    keep, bias = None if keep is None else _dense(keep), None if bias is None else _dense(bias)
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    spans = None if spans is None else spans.contiguous()
    slopes, sinks = _table(slopes), _table(sinks)
    batch, tokens, heads, d = q.shape
    by_row = 0 if cos is None or cos.shape[0] == 1 else tokens * cos.shape[2]
    args = _ARGS.pack(
        *map(pointer, (q, k, v, dy, cos, sin, spans, keep, bias, slopes, sinks, seed, y, lse)),
        *(map(pointer, grads) if grads else (0, 0, 0)),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *((0, 0, 0) if dy is None else dy.stride()[:3]),
        *((0, 0) if keep is None else keep.stride()[:2]), *((0, 0, 0) if bias is None else bias.stride()[:3]),
        by_row, 2 * tokens,
        _CODES[q.dtype], 0 if cos is None else _CODES[cos.dtype], 0 if bias is None else _CODES[bias.dtype],
        batch, tokens, k.shape[1], heads, k.shape[2], d, v.shape[3], 0 if cos is None else cos.shape[2],
        interleaved, causal, window, torch.get_num_threads(), scale, softcap, dropout_p,
    )  # fmt: skip
    native.check(entry(args))


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, spans: Tensor | None, keep: Tensor | None,
    bias: Tensor | None, slopes: Tensor | None, sinks: Tensor | None, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, lse)."""
    batch, tokens, heads, _ = q.shape
    y, lse = q.new_empty((batch, tokens, heads, v.shape[3])), q.new_empty((batch, heads, tokens), dtype=_F32)
    _call(native.cpu().pk_cpu_attention, None, q, k, v, y, lse, cos, sin, spans, keep, bias, slopes, sinks, (),
          *options)  # fmt: skip
    return y, lse


def token(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None, sinks: Tensor | None, scale: float, causal: bool,
    window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """y of `forward` for one query of each head and row, in less of Python."""
    of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    if not of_q[3] == of_k[3] == of_v[3] == 1:
        q, k, v = _dense(q), _dense(k), _dense(v)
        of_q, of_k, of_v = q.stride(), k.stride(), v.stride()
    (batch, _, heads, d), (_, keys, groups, width) = q.shape, v.shape
    spans, sinks = None if spans is None else spans.contiguous(), _table(sinks)
    y, lse = q.new_empty((batch, 1, heads, width)), q.new_empty((batch, heads), dtype=_F32)
    args = _ARGS.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0, 0, 0, pointer(spans), 0, 0, 0, pointer(sinks), 0, y.data_ptr(),
        lse.data_ptr(), 0, 0, 0, *of_q[:3], *of_k[:3], *of_v[:3], 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, _CODES[q.dtype], 0, 0,
        batch, 1, keys, heads, groups, d, width, 0, 0, causal, window, torch.get_num_threads(), scale, softcap, 0.0,
    )  # fmt: skip
    code = native.cpu().pk_cpu_attention(args)
    if code:
        native.check(code)
    return y


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    tables, options = given[:6], given[6:]
    dq, dk, dv = grads = tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    _call(native.cpu().pk_cpu_attention_backward, dy, q, k, v, y.contiguous(), lse.contiguous(), *tables, None, grads,
          *options)  # fmt: skip
    return dq, dk, dv


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(q [B, T, H, D], k [B, T, G, D]) of `rotary`, contiguous."""
    batch, tokens, heads, d = q.shape
    groups, r = k.shape[2], cos.shape[2]
    q, k, cos, sin = _dense(q), _dense(k), cos.contiguous(), sin.contiguous()
    of_q, of_k = q.new_empty((batch, tokens, heads, d)), q.new_empty((batch, tokens, groups, d))
    args = _ARGS.pack(
        q.data_ptr(), k.data_ptr(), 0, 0, cos.data_ptr(), sin.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0, of_q.data_ptr(),
        of_k.data_ptr(), 0, *q.stride()[:3], *k.stride()[:3], *_NO_STRIDES, 0 if cos.shape[0] == 1 else tokens * r, 0,
        _CODES[q.dtype], _CODES[cos.dtype], 0, batch, tokens, tokens, heads, groups, d, d, r, interleaved, 0, 0,
        torch.get_num_threads(), 1.0, 0.0, 0.0,
    )  # fmt: skip
    code = native.cpu().pk_cpu_rotary(args)
    if code:
        native.check(code)
    return of_q, of_k


@lru_cache(1)
def _mismatch() -> str | None:  # of the built library, which is loaded once
    have = native.attention_args_size()
    if have != _ARGS.size:
        return f"pk_attention_args has {have} bytes, this package packs {_ARGS.size}: rebuild the library"
    return None


def _available() -> str | None:
    return native.available() or _mismatch()


def _refusal(cos: int, bias: int) -> Any:
    """`Backend.when` of an operator in which cos and bias are those arguments."""

    def reason(*args: Any) -> str | None:
        for name, t in (("cos and sin are", args[cos]), ("bias is", args[bias])):
            if t is not None and t.dtype not in _CODES:
                return f"{name} {t.dtype}"
        return None

    return reason


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "attention": Backend("native", forward, _CPU, available=_available, when=_refusal(3, 7)),
    "attention_backward": Backend("native", backward, _CPU, available=_available, when=_refusal(6, 10)),
}
