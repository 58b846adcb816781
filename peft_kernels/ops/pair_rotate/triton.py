"""Triton backend of pair_rotate: the host side. Elementwise: a tile of rows and of pairs a program; bound by memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ...triton_lib import host

SPLIT = 256  # rows of one part of the columns' gradients
_TILE = {"BM": 16, "BN": 64, "num_warps": 4, "num_stages": 1}


def _grid(rows: int, d: int) -> tuple[int, int]:
    return rows, -(-(d // 2) // _TILE["BN"])


def _rotate(x: Tensor, first: Tensor, second: Tensor, half: int, back: bool) -> Tensor:
    from .triton_kernels import pair_kernel

    y, (m, d) = torch.empty_like(x), x.shape
    host.launch(pair_kernel, _grid(-(-m // _TILE["BM"]), d), x, first.contiguous(), second.contiguous(), y, m, d, half,
                BACK=back, **_TILE)  # fmt: skip
    return y


def forward(x: Tensor, first: Tensor, second: Tensor, half: int) -> Tensor:
    """y."""
    return _rotate(x.contiguous(), first, second, half, False)


def backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, half: int, need_dx: bool, need_columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dfirst, dsecond); parts of the rows are added in their order."""
    from .triton_kernels import pair_gradient_kernel

    dy, x = dy.contiguous(), x.contiguous()
    dx = _rotate(dy, first, second, half, True) if need_dx else x.new_empty((0,))
    if not need_columns:
        return dx, first.new_empty((0,)), second.new_empty((0,))
    m, d = x.shape
    parts = max(1, -(-m // SPLIT))
    sums = torch.empty(parts, 2, d, dtype=torch.float32, device=x.device)
    host.launch(pair_gradient_kernel, _grid(parts, d), dy, x, sums, m, d, half, SPLIT=SPLIT, **_TILE)
    dfirst, dsecond = sums.sum(0)
    return dx, dfirst.to(first.dtype), dsecond.to(second.dtype)


BACKENDS = host.backends({"pair_rotate": forward, "pair_rotate_backward": backward})
