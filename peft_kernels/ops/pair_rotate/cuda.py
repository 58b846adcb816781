"""The CUDA backend of pair_rotate."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend, parts, queue

_ROWS, _FEATURES = 32, 256  # of x that a block takes at least, and at most: csrc/cuda/pair_rotate.cu


def forward(x: Tensor, first: Tensor, second: Tensor, half: int) -> Tensor:
    """y."""
    x, f, s = x.contiguous(), first.to(torch.float32).contiguous(), second.to(torch.float32).contiguous()
    y = torch.empty_like(x)
    queue("pk_cuda_pair_rotate", x, x.data_ptr(), f.data_ptr(), s.data_ptr(), native.DTYPES[x.dtype], *x.shape, half,
          y.data_ptr())  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, half: int, need_dx: bool, need_columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dfirst, dsecond); parts of the rows are added in their order."""
    dy, x, f, s = dy.contiguous(), x.contiguous(), first.to(torch.float32).contiguous(), second.float().contiguous()
    (m, d), count = x.shape, parts(-(-x.shape[0] // _ROWS), -(-x.shape[1] // _FEATURES))
    dx = x.new_empty(x.shape if need_dx else (0,))
    sums = f.new_empty((count, 2, d) if need_columns else (0,))
    queue(
        "pk_cuda_pair_rotate_backward", dy, dy.data_ptr(), x.data_ptr(), f.data_ptr(), s.data_ptr(),
        native.DTYPES[x.dtype], m, d, half, dx.data_ptr() if need_dx else None,
        sums.data_ptr() if need_columns else None, count,
    )  # fmt: skip
    if not need_columns:
        return dx, first.new_empty((0,)), second.new_empty((0,))
    dfirst, dsecond = sums[0] if count == 1 else sums.sum(0)
    return dx, dfirst.to(first.dtype), dsecond.to(second.dtype)


BACKENDS = {"pair_rotate": backend(forward), "pair_rotate_backward": backend(backward)}
