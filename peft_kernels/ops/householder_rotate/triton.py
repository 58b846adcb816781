"""Triton backend of householder_rotate: the host side. Rows are read twice, from the cache the second time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...triton_lib import host

MOST = 64  # reflections: s of a tile of rows lies in registers
SPLIT = 1024  # rows of one part of the gradients of u and v
# Of s v, on tensor cores where y has 16 bits: TF32 has two more than bfloat16, and those of float16, which takes three.
PRECISION = {torch.float32: "ieee", torch.bfloat16: "tf32", torch.float16: "tf32x3"}


def _ranks(r: int) -> dict[str, int]:
    """Ranks of a tile, and warps that hold it without spilling."""
    ranks = max(16, 1 << (max(r, 1) - 1).bit_length())
    return {"BR": ranks, "num_warps": 4 if ranks <= 32 else 8, "num_stages": 2}


def _update(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from .triton_kernels import update_kernel

    (m, d), r = x.shape, u.shape[0]
    y, s = torch.empty_like(x), torch.empty(m, r, dtype=torch.float32, device=x.device)
    rows = 32 if m > 16 else 16
    host.launch(update_kernel, (-(-m // rows),), x, u, v, y, s, m, d, r, BM=rows, BN=64, PRECISION=PRECISION[x.dtype],
                **_ranks(r))  # fmt: skip
    return y, s


def _gradient(t: Tensor, x: Tensor) -> Tensor:
    """[r, d] float32: -t^T x; parts of the rows are added in their order."""
    from .triton_kernels import gradient_kernel

    (m, d), r = x.shape, t.shape[1]
    parts = max(1, -(-m // SPLIT))
    out = torch.empty(parts, r, d, dtype=torch.float32, device=x.device)
    ranks = _ranks(r)
    c = tuning.choose("reflect_gradient", tuning.arch_of(x.device), tuning.Shape(m, d, d, r, x.element_size() * 8))
    rows = 16 if m <= 16 else c.BM if ranks["BR"] <= 32 else 32
    host.launch(gradient_kernel, (parts, -(-d // c.BN)), t, x, out, m, d, r, SPLIT=SPLIT, BM=rows, BN=c.BN, **ranks)
    return out[0] if parts == 1 else out.sum(0)


def forward(x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(y, s)."""
    return _update(x.contiguous(), u.contiguous(), v.contiguous())


def backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor, s: Tensor, need_dx: bool, need_duv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, du, dv)."""
    dy, x, s = dy.contiguous(), x.contiguous(), s.contiguous()
    if not (need_dx or need_duv):
        return x.new_empty((0,)), u.new_empty((0,)), v.new_empty((0,))
    dx, t = _update(dy, v.contiguous(), u.contiguous())  # dx = dy - (dy v^T) u
    dx = dx if need_dx else x.new_empty((0,))
    if not need_duv:
        return dx, u.new_empty((0,)), v.new_empty((0,))
    return dx, _gradient(t, x).to(u.dtype), _gradient(s, dy).to(v.dtype)


def _refusal(*args: Any) -> str | None:
    u = args[1] if len(args) == 3 else args[2]
    return f"more than {MOST} reflections" if u.shape[0] > MOST else host.wrong_mode(args[0])


BACKENDS = host.backends({"householder_rotate": forward, "householder_rotate_backward": backward}, _refusal)
