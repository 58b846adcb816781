"""The native CPU backend of householder_rotate."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend

_CPU = frozenset({"cpu"})


def _shape(x: Tensor, u: Tensor) -> tuple[int, ...]:
    return native.DTYPES[x.dtype], x.shape[0], x.shape[1], u.shape[0]


def forward(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(y, s)."""
    x, left, right = x.contiguous(), u.to(torch.float32).contiguous(), v.to(torch.float32).contiguous()
    y, s = torch.empty_like(x), x.new_empty((x.shape[0], u.shape[0]), dtype=torch.float32)
    native.check(native.cpu().pk_cpu_householder_rotate(
        x.data_ptr(), left.data_ptr(), right.data_ptr(), *_shape(x, u), y.data_ptr(), s.data_ptr(),
        torch.get_num_threads(),
    ))  # fmt: skip
    return y, s


def backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, du, dv)."""
    dy, x, s = dy.contiguous(), x.contiguous(), s.contiguous()
    left, right = u.to(torch.float32).contiguous(), v.to(torch.float32).contiguous()
    dx = x.new_empty(x.shape if need_dx else (0,))
    du, dv = (t.new_empty(t.shape if need_duv else (0,)) for t in (left, right))
    native.check(native.cpu().pk_cpu_householder_rotate_backward(
        dy.data_ptr(), x.data_ptr(), left.data_ptr(), right.data_ptr(), s.data_ptr(), *_shape(x, u),
        dx.data_ptr() if need_dx else None, *(t.data_ptr() if need_duv else None for t in (du, dv)),
        torch.get_num_threads(),
    ))  # fmt: skip
    return dx, du.to(u.dtype), dv.to(v.dtype)


BACKENDS: dict[str, Backend] = {
    "householder_rotate": Backend("native", forward, _CPU, available=native.available),
    "householder_rotate_backward": Backend("native", backward, _CPU, available=native.available),
}
