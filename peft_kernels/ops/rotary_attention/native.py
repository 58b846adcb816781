"""The native CPU backend of rotary_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend
from ...native import pointer

_CODES = {t: native.DTYPES[t] for t in (torch.float32, torch.bfloat16, torch.float16)}


def _shape(q: Tensor, k: Tensor, cos: Tensor, keep: Tensor | None) -> tuple[int, ...]:
    """From the dtypes to the number of masks, as the library takes them."""
    masks = 1 if keep is None else keep.shape[0]
    return (_CODES[q.dtype], _CODES[cos.dtype], *q.shape[:3], k.shape[2], q.shape[3], cos.shape[0], masks)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, lse)."""
    q, k, v, cos, sin = (t.contiguous() for t in (q, k, v, cos, sin))
    keep = None if keep is None else keep.contiguous()
    y, lse = torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    native.check(native.cpu().pk_cpu_rotary_attention(
        *map(pointer, (q, k, v, cos, sin, keep)), *_shape(q, k, cos, keep), scale, y.data_ptr(), lse.data_ptr(),
        torch.get_num_threads(),
    ))  # fmt: skip
    return y, lse


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keep: Tensor | None, lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    dy, q, k, v, cos, sin, lse = (t.contiguous() for t in (dy, q, k, v, cos, sin, lse))
    keep = None if keep is None else keep.contiguous()
    grads = tuple(map(torch.empty_like, (q, k, v)))
    native.check(native.cpu().pk_cpu_rotary_attention_backward(
        *map(pointer, (dy, q, k, v, cos, sin, keep, lse)), *_shape(q, k, cos, keep), scale, *map(pointer, grads),
        torch.get_num_threads(),
    ))  # fmt: skip
    return grads[0], grads[1], grads[2]


def _refusal(*args: Any) -> str | None:
    cos = next(t for t in args if t.dim() == 3)
    return None if cos.dtype in _CODES else f"cos and sin are {cos.dtype}"


_CPU = frozenset({"cpu"})
BACKENDS: dict[str, Backend] = {
    "rotary_attention": Backend("native", forward, _CPU, available=native.available, when=_refusal),
    "rotary_attention_backward": Backend("native", backward, _CPU, available=native.available, when=_refusal),
}
