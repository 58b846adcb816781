"""The CUDA backend of householder_rotate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend, parts, queue

MOST = 64  # reflections: csrc/cuda/householder_rotate.cu
_ROWS, _FEATURES = 32, 128  # of x in a part of the gradients, at least; of a block


def _update(x: Tensor, u: Tensor, v: Tensor, need_y: bool = True) -> tuple[Tensor, Tensor]:
    """(x - s v, s) with s = x u^T."""
    y = torch.empty_like(x) if need_y else x.new_empty((0,))
    s = torch.empty((x.shape[0], u.shape[0]), dtype=torch.float32, device=x.device)
    queue(
        "pk_cuda_householder_rotate", x, x.data_ptr(), u.data_ptr(), v.data_ptr(), native.DTYPES[x.dtype], *x.shape,
        u.shape[0], y.data_ptr() if need_y else None, s.data_ptr(),
    )  # fmt: skip
    return y, s


def _gradient(t: Tensor, x: Tensor) -> Tensor:
    """-t^T x [r, d], float32; parts of the rows are added in their order."""
    (m, d), r = x.shape, t.shape[1]
    count = parts(-(-m // _ROWS), -(-d // _FEATURES) * -(-r // 8))
    out = torch.empty((count, r, d), dtype=torch.float32, device=x.device)
    queue("pk_cuda_householder_gradient", x, t.data_ptr(), x.data_ptr(), native.DTYPES[x.dtype], m, d, r,
          out.data_ptr(), count)  # fmt: skip
    return out[0] if count == 1 else out.sum(0)


def forward(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(y, s)."""
    return _update(x.contiguous(), u.to(torch.float32).contiguous(), v.to(torch.float32).contiguous())


def backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, du, dv)."""
    dx = x.new_empty((0,))
    if not (need_dx or need_duv):
        return dx, u.new_empty((0,)), v.new_empty((0,))
    dy, x, s = dy.contiguous(), x.contiguous(), s.contiguous()
    left, right = u.to(torch.float32).contiguous(), v.to(torch.float32).contiguous()
    dx, t = _update(dy, right, left, need_dx)  # dx = dy - (dy v^T) u
    if not need_duv:
        return dx, u.new_empty((0,)), v.new_empty((0,))
    return dx, _gradient(t, x).to(u.dtype), _gradient(s, dy).to(v.dtype)


def _refusal(*args: Any) -> str | None:
    u = args[1] if len(args) == 3 else args[2]
    return f"more than {MOST} reflections" if u.shape[0] > MOST else None


BACKENDS = {
    "householder_rotate": backend(forward, when=_refusal),
    "householder_rotate_backward": backend(backward, when=_refusal),
}
