"""x -> x S^T for a sparse S of fixed positions and trained values, at the cost of its entries.

Both directions are products of a CSR matrix with x^T, where an entry is one multiple of a row, and the gradient of the
values is a sampled product: 2 * tokens * entries FLOPs each, against 2 * tokens * in * out of the dense layer, and no
dense matrix of S's size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Per tensor of positions: its version and (CSR order, row starts, columns) of S and of S^T.
_LAYOUTS: Any = WeakIdKeyDictionary()
Layout = tuple[Tensor, Tensor, Tensor]


def layouts(indices: Tensor, shape: tuple[int, int]) -> tuple[Layout, Layout]:
    """The CSR structure of S and of S^T. indices: [2, entries] of rows and columns, or [entries] of flat positions."""
    found = _LAYOUTS.get(indices)
    if found is None or found[0] != indices._version:
        rows, columns = row_column(indices, shape)
        found = (indices._version, _layout(rows, columns, shape[0]), _layout(columns, rows, shape[1]))
        _LAYOUTS[indices] = found
    return found[1], found[2]


def row_column(indices: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of positions, as int64."""
    indices = indices.long()
    return (indices[0], indices[1]) if indices.dim() == 2 else (indices // shape[1], indices % shape[1])


def _layout(rows: Tensor, columns: Tensor, count: int) -> Layout:
    order = torch.argsort(rows, stable=True)
    starts = torch.zeros(count + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=count), 0, out=starts[1:])
    return order, starts.int(), columns[order].int()  # products with 32-bit positions take half the time


def dense(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """S itself."""
    flat = torch.zeros(shape[0] * shape[1], dtype=values.dtype, device=values.device)
    rows, columns = row_column(indices, shape)
    return flat.index_add(0, rows * shape[1] + columns, values).view(shape)


def sparse_linear(x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """x S^T, in x's dtype. shape: of S, [out_features, in_features]."""
    return _SparseLinear.apply(x, values, indices, shape)  # type: ignore[no-any-return, no-untyped-call]


def _product(layout: Layout, values: Tensor, rows: Tensor, width: int) -> Tensor:
    """(S rows^T)^T of [tokens, width] rows."""
    order, starts, columns = layout
    matrix = torch.sparse_csr_tensor(starts, columns, values[order], (len(starts) - 1, width))
    return torch.sparse.mm(matrix, rows.t().contiguous()).t()


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.shape = shape
        rows = x.reshape(-1, shape[1]).to(_wide(x))
        y = _product(layouts(indices, shape)[0], values.to(rows.dtype), rows, shape[1])
        return y.to(x.dtype).reshape(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        shape, (grad,) = ctx.shape, grads
        straight, transposed = layouts(indices, shape)
        dy = grad.reshape(-1, shape[0]).to(_wide(x))
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = _product(transposed, values.to(dy.dtype), dy, shape[0]).to(x.dtype).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            order, starts, columns = straight
            empty = dy.new_zeros(len(columns))
            sampled = torch.sparse.sampled_addmm(
                torch.sparse_csr_tensor(starts, columns, empty, shape), dy.t(), x.reshape(-1, shape[1]).to(dy.dtype)
            )
            dvalues = torch.empty_like(empty).index_copy_(0, order, sampled.values()).to(values.dtype)
        return dx, dvalues, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
