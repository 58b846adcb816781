"""The native CPU backend of butterfly_rotate."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...dispatch import Backend

_CPU = frozenset({"cpu"})


def _shape(x: Tensor, blocks: Tensor, transposed: bool) -> tuple[int, ...]:
    m, count, b = blocks.shape[:3]
    return native.DTYPES[x.dtype], x.shape[0], x.shape[1], b, m, int(count * b != x.shape[1]), int(transposed)


def forward(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    """y."""
    x, factors = x.contiguous(), blocks.to(torch.float32).contiguous()
    y = torch.empty_like(x)
    native.check(native.cpu().pk_cpu_butterfly_rotate(
        x.data_ptr(), factors.data_ptr(), *_shape(x, factors, transposed), y.data_ptr(), torch.get_num_threads()
    ))  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dblocks)."""
    none = blocks.new_empty((0,))
    if not need_dblocks:  # the gradient of a rotation is the rotation back
        return (forward(dy, blocks, not transposed) if need_dx else x.new_empty((0,))), none
    dy, x, factors = dy.contiguous(), x.contiguous(), blocks.to(torch.float32).contiguous()
    dx, dblocks = x.new_empty(x.shape if need_dx else (0,)), torch.empty_like(factors)
    native.check(native.cpu().pk_cpu_butterfly_rotate_backward(
        dy.data_ptr(), x.data_ptr(), factors.data_ptr(), *_shape(x, factors, transposed),
        dx.data_ptr() if need_dx else None, dblocks.data_ptr(), torch.get_num_threads(),
    ))  # fmt: skip
    return dx, dblocks.to(blocks.dtype)


BACKENDS: dict[str, Backend] = {
    "butterfly_rotate": Backend("native", forward, _CPU, available=native.available),
    "butterfly_rotate_backward": Backend("native", backward, _CPU, available=native.available),
}
