"""x (W + S)^T for a frozen W and a sparse S of fixed positions and trained values, at the cost of S's entries.

The gradient of the values is a sampled product, 2 * tokens * entries FLOPs against 2 * tokens * in * out of the layer.
For few tokens S is applied to x as a CSR matrix, in as many FLOPs again for each direction. For many, where that moves
more memory than W has, the layer's own product reads W + S, made a few rows at a time and never kept.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from ...weights.base import wide

if TYPE_CHECKING:
    from ..method import Inner

_LAYOUTS: Any = WeakIdKeyDictionary()  # by tensor of positions: its version and the layouts of S and of S^T
TILE_ELEMENTS = 1 << 22  # of W, that are copied at a time


@dataclass(frozen=True)
class Layout:
    """A CSR structure. order: the entries' places in `values`, None if they are in order; flat: in a dense matrix."""

    order: Tensor | None
    starts: Tensor
    columns: Tensor
    flat: Tensor
    width: int
    starts_here: list[int]  # on the CPU

    def sorted(self, values: Tensor) -> Tensor:
        return values if self.order is None else values[self.order]

    def matrix(self, values: Tensor) -> Tensor:
        """With values in the structure's order."""
        _quiet()
        shape = (len(self.starts) - 1, self.width)
        return torch.sparse_csr_tensor(self.starts, self.columns, values, shape, check_invariants=False)


def layouts(indices: Tensor, shape: tuple[int, int]) -> tuple[Layout, Layout]:
    """The CSR structure of S and of S^T. indices: [2, entries] of rows and columns, or [entries] of flat positions."""
    found = _LAYOUTS.get(indices)
    if found is None or found[0] != indices._version:
        at, (height, width) = flat(indices, shape), shape
        rows, columns = at // width, at % width
        found = (indices._version, _layout(rows, columns, height, width), _layout(columns, rows, width, height))
        _LAYOUTS[indices] = found
    return found[1], found[2]


def flat(indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """Positions in the flattened matrix, as int64."""
    indices = indices.long()
    return indices[0] * shape[1] + indices[1] if indices.dim() == 2 else indices


def _layout(rows: Tensor, columns: Tensor, height: int, width: int) -> Layout:
    order: Tensor | None = None
    if bool((rows.diff() < 0).any()):
        order = torch.argsort(rows, stable=True)
        rows, columns = rows[order], columns[order]
    starts = torch.zeros(height + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=height), 0, out=starts[1:])
    # Products with 32-bit positions take half the time.
    return Layout(order, starts.int(), columns.int(), rows * width + columns, width, starts.tolist())


def dense(values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """S itself."""
    return values.new_zeros(shape[0] * shape[1]).index_add(0, flat(indices, shape), values).view(shape)


def sparse_update(x: Tensor, inner: Inner, values: Tensor, indices: Tensor) -> Tensor:
    """The layer `inner` with S added to its weight."""
    info = inner.info
    shape = (info.out_features, info.in_features)
    tokens = x.numel() // max(shape[1], 1)
    frozen = inner.frozen() if info.quantized is None and tokens * len(values) > 2 * shape[0] * shape[1] else None
    autocast = torch.is_autocast_enabled(x.device.type)
    if frozen is None or autocast or x.dtype is not info.dtype or torch.compiler.is_compiling():
        return inner(x) + sparse_linear(x, values, indices, shape)
    y: Tensor = _SparseInWeight.apply(x, values, indices, shape, frozen)  # type: ignore[no-untyped-call]
    bias = inner.bias()
    return y if bias is None else y.add_(bias)


def sparse_linear(x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
    """x S^T, in x's dtype. shape: of S, [out_features, in_features]."""
    return _SparseLinear.apply(x, values, indices, shape)  # type: ignore[no-any-return, no-untyped-call]


def _product(layout: Layout, values: Tensor, rows: Tensor) -> Tensor:
    """(S rows^T)^T of [tokens, width] rows, in their dtype under autocast too, which has no sparse products."""
    with torch.autocast(rows.device.type, enabled=False):
        product: Tensor = torch.sparse.mm(layout.matrix(layout.sorted(values)), rows.t().contiguous())
    return product.t()


@functools.cache
def _quiet() -> None:
    """torch says once that its CSR support is young."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


# Both directions are opaque to torch.compile: layouts are found once from the positions and are no part of a graph.


def _forward(x: Tensor, values: Tensor, indices: Tensor, out_features: int, in_features: int) -> Tensor:
    rows = x.reshape(-1, in_features).to(wide(x.dtype))
    y = _product(layouts(indices, (out_features, in_features))[0], values.to(rows.dtype), rows)
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features).contiguous()


def _backward(dy: Tensor, x: Tensor, values: Tensor, indices: Tensor, need_dx: bool, need_dvalues: bool) -> Any:
    shape = (dy.shape[-1], x.shape[-1])
    straight, transposed = layouts(indices, shape)
    dy = dy.reshape(-1, shape[0]).to(wide(x.dtype))
    dx = _product(transposed, values.to(dy.dtype), dy).to(x.dtype).reshape(x.shape).contiguous() if need_dx else None
    dvalues = _value_gradient(dy, x, values, straight) if need_dvalues else None
    return x.new_empty(0) if dx is None else dx, values.new_empty(0) if dvalues is None else dvalues


def _fake_backward(dy: Tensor, x: Tensor, values: Tensor, indices: Tensor, need_dx: bool, need_dvalues: bool) -> Any:
    return x.new_empty(x.shape if need_dx else (0,)), values.new_empty(values.shape if need_dvalues else (0,))


_ops: Any = torch.library.Library("fastpeft", "DEF")  # type: ignore[no-untyped-call]
_ops.define("sparse_linear(Tensor x, Tensor values, Tensor indices, SymInt out_features, SymInt in_features) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
_ops.define("sparse_linear_backward(Tensor dy, Tensor x, Tensor values, Tensor indices, bool need_dx, "
            "bool need_dvalues) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))  # fmt: skip
_ops.impl("sparse_linear", _forward, "CompositeExplicitAutograd")
_ops.impl("sparse_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fastpeft::sparse_linear", lambda x, v, i, n, k: x.new_empty((*x.shape[:-1], n)), lib=_ops)
torch.library.register_fake("fastpeft::sparse_linear_backward", _fake_backward, lib=_ops)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        return torch.ops.fastpeft.sparse_linear(x, values, indices, *shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        need_dx, need_dvalues = ctx.needs_input_grad[:2]
        dx, dvalues = torch.ops.fastpeft.sparse_linear_backward(grads[0], *ctx.saved_tensors, need_dx, need_dvalues)
        return dx if need_dx else None, dvalues if need_dvalues else None, None, None


def _value_gradient(dy: Tensor, x: Tensor, values: Tensor, layout: Layout) -> Tensor:
    """dy^T x at the positions of S."""
    empty = torch.zeros_like(values, dtype=dy.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dy.dtype)
    found: Tensor = torch.sparse.sampled_addmm(layout.matrix(empty), dy.t(), rows).values()
    if layout.order is not None:
        found = empty.index_copy_(0, layout.order, found)
    return found.to(values.dtype)


class _SparseInWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int], frozen: Any) -> Tensor:
        ctx.save_for_backward(x, values, indices)
        ctx.shape, ctx.frozen = shape, frozen
        flat = x.reshape(-1, shape[1])
        y = x.new_empty(*x.shape[:-1], shape[0])
        rows = y.view(-1, shape[0])
        for i, j, w in _tiles(frozen(), values, layouts(indices, shape)[0]):
            torch.mm(flat, w.t(), out=rows[:, i:j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        layout, dy = layouts(indices, ctx.shape)[0], grads[0].reshape(-1, ctx.shape[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x.reshape(-1, ctx.shape[1]))
            for i, j, w in _tiles(ctx.frozen(), values, layout):
                torch.addmm(dx, dy[:, i:j], w, beta=min(i, 1), out=dx)  # the first tile overwrites
            dx = dx.view(x.shape)
        dvalues = _value_gradient(dy.to(wide(x.dtype)), x, values, layout) if ctx.needs_input_grad[1] else None
        return dx, dvalues, None, None, None


def _tiles(w: Tensor, values: Tensor, layout: Layout) -> Iterator[tuple[int, int, Tensor]]:
    """(i, j, rows i to j of W + S)."""
    out, into = w.shape
    step = min(max(TILE_ELEMENTS // max(into, 1), 1), out)
    buffer, added = w.new_empty(step, into), layout.sorted(values).to(w.dtype)
    for i, j in itertools.pairwise([*range(0, out, step), out]):
        a, b = layout.starts_here[i], layout.starts_here[j]
        tile = buffer[: j - i].copy_(w[i:j])
        at = layout.flat[a:b]
        tile.view(-1).index_add_(0, at - i * into if i else at, added[a:b])
        yield i, j, tile
