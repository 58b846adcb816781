"""The CUDA backend of butterfly_rotate.

Factors act one after another in float32, while a tile is in shared memory. In 16 bit, where they reach a multiple of 16
features, they are first made into one block of that size (they turn an identity) and x goes through tensor cores. The
gradient of that block is one product over the rows of x and dy; it goes back through the factors as identities do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...cuda_rt import backend, parts, queue

MOST = 256  # features that factors may reach: PK_REACH of csrc/cuda/butterfly.cuh
_ROWS = 16  # below, one tile of the tensor cores is not full
_PART, _WINDOW = 64, 64  # rows of a part of the gradient, at least; features of a block: csrc/cuda/butterfly_blocks.cu


def _reach(blocks: Tensor) -> int:
    return int(blocks.shape[2]) << (int(blocks.shape[0]) - 1)


def _shared(blocks: Tensor, d: int) -> bool:
    return int(blocks.shape[1]) * int(blocks.shape[2]) != d


def _turn(x: Tensor | None, blocks: Tensor, d: int, transposed: bool, every: bool = False) -> Tensor:
    """x through the factors, one after another; without x an identity for each group. every: [m, rows, d], of each."""
    (m, _, b), like = blocks.shape[:3], blocks if x is None else x
    rows = _reach(blocks) if x is None else x.shape[0]
    y = torch.empty((m, rows, d) if every else (rows, d), dtype=like.dtype, device=like.device)
    queue(
        "pk_cuda_butterfly_rotate", like, None if x is None else x.data_ptr(), blocks.data_ptr(),
        native.DTYPES[like.dtype], rows, d, b, m, _shared(blocks, d), transposed, every, y.data_ptr(),
    )  # fmt: skip
    return y


def _rotate(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    (rows, d), m, reach = x.shape, blocks.shape[0], _reach(blocks)
    if x.dtype == torch.float32 or rows < _ROWS or reach % 16 or x.data_ptr() % 8:
        return _turn(x, blocks, d, transposed)
    shared = _shared(blocks, d)
    if m == 1:
        matrices, group = blocks, reach * reach
        row, column = (1, reach) if transposed else (reach, 1)
    else:
        width = reach if shared else d
        matrices, group, row, column = _turn(None, blocks, width, transposed), reach, width, 1
    y = torch.empty_like(x)
    queue(
        "pk_cuda_block_product", x, x.data_ptr(), matrices.data_ptr(), native.DTYPES[x.dtype], rows, d, reach,
        0 if shared else group, row, column, y.data_ptr(),
    )  # fmt: skip
    return y


def _gradient(x: Tensor, dy: Tensor, reach: int, group: int, row: int) -> Tensor:
    """x^T dy of each group of `reach` features, reach * d numbers; parts of the rows are added in their order."""
    rows, d = x.shape
    count = parts(-(-rows // _PART), -(-d // _WINDOW) * max(1, reach // _WINDOW))
    out = torch.empty((count, reach * d), dtype=torch.float32, device=x.device)
    queue(
        "pk_cuda_block_gradient", x, x.data_ptr(), dy.data_ptr(), native.DTYPES[x.dtype], rows, d, reach, group, row,
        out.data_ptr(), count,
    )  # fmt: skip
    return out[0] if count == 1 else out.sum(0)


def _through(last: Tensor, factors: Tensor, d: int, transposed: bool) -> Tensor:
    """The gradient [m, d / b, b, b] of the factors from that of what they make of identities, last [reach, d]."""
    m, _, b = factors.shape[:3]
    inputs = _turn(None, factors, d, transposed, every=True)
    back = _turn(last, factors, d, not transposed, every=True)
    out = torch.empty((m, d // b, b, b), dtype=torch.float32, device=last.device)
    queue("pk_cuda_butterfly_gradient", last, inputs.data_ptr(), back.data_ptr(), last.data_ptr(), d, b, m, transposed,
          out.data_ptr())  # fmt: skip
    return out


def forward(x: Tensor, blocks: Tensor, transposed: bool) -> Tensor:
    """y."""
    return _rotate(x.contiguous(), blocks.to(torch.float32).contiguous(), transposed)


def backward(
    dy: Tensor, x: Tensor, blocks: Tensor, transposed: bool, need_dx: bool, need_dblocks: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dblocks)."""
    dy, x, factors = dy.contiguous(), x.contiguous(), blocks.to(torch.float32).contiguous()
    dx = _rotate(dy, factors, not transposed) if need_dx else x.new_empty((0,))
    if not need_dblocks:
        return dx, blocks.new_empty((0,))
    d, m, reach = x.shape[1], factors.shape[0], _reach(factors)
    if m == 1:  # of the transposed block it is dy^T x
        left, right = (dy, x) if transposed else (x, dy)
        each = _gradient(left, right, reach, reach * reach, reach).view(1, d // reach, reach, reach)
    else:
        last = _gradient(x, dy, reach, reach, d).view(reach, d)
        if _shared(factors, d) and d != reach:  # the same factors in every group
            last, d = last.view(reach, d // reach, reach).sum(1), reach
        each = _through(last, factors, d, transposed)
    return dx, each.sum_to_size(blocks.shape).to(blocks.dtype)


def _refusal(*args: Any) -> str | None:
    blocks = args[1] if args[1].dim() == 4 else args[2]
    reach = _reach(blocks)
    return f"factors reach {reach} features, above {MOST}" if reach > MOST else None


BACKENDS = {
    "butterfly_rotate": backend(forward, when=_refusal),
    "butterfly_rotate_backward": backend(backward, when=_refusal),
}
