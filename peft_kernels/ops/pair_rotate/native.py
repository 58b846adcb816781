"""The native CPU backend of pair_rotate."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend

_CPU = frozenset({"cpu"})


def forward(x: Tensor, first: Tensor, second: Tensor, half: int) -> Tensor:
    """y."""
    x, f, s = x.contiguous(), first.to(torch.float32).contiguous(), second.to(torch.float32).contiguous()
    y = torch.empty_like(x)
    native.check(native.cpu().pk_cpu_pair_rotate(
        x.data_ptr(), f.data_ptr(), s.data_ptr(), native.DTYPES[x.dtype], *x.shape, half, y.data_ptr(),
        torch.get_num_threads(),
    ))  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, first: Tensor, second: Tensor, half: int, need_dx: bool, need_columns: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dfirst, dsecond)."""
    dy, x, f, s = dy.contiguous(), x.contiguous(), first.to(torch.float32).contiguous(), second.float().contiguous()
    dx = x.new_empty(x.shape if need_dx else (0,))
    df, ds = (t.new_empty(t.shape if need_columns else (0,)) for t in (f, s))
    native.check(native.cpu().pk_cpu_pair_rotate_backward(
        dy.data_ptr(), x.data_ptr(), f.data_ptr(), s.data_ptr(), native.DTYPES[x.dtype], *x.shape, half,
        dx.data_ptr() if need_dx else None, *(t.data_ptr() if need_columns else None for t in (df, ds)),
        torch.get_num_threads(),
    ))  # fmt: skip
    return dx, df.to(first.dtype), ds.to(second.dtype)


BACKENDS: dict[str, Backend] = {
    "pair_rotate": Backend("native", forward, _CPU, available=native.available),
    "pair_rotate_backward": Backend("native", backward, _CPU, available=native.available),
}
