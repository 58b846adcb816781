"""A linear layer with a weight that is made when it is needed and never kept: y = x W'(p)^T + b.

For updates that are no product of thin matrices, such as W * (B A). W' is made a few rows at a time, in the forward and
once more in the backward, so that what is saved is x and the small tensors p.

Products of the size of the layer, T tokens by W, are one in the forward and two in the backward (towards x and towards
W'). No formula has fewer: a gradient towards p goes through that of W', and W' reads W in every element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..method import Inner

# rows(W, i, j, *p): rows i to j of W', in a precision of its own choice.
Rows = Callable[..., Tensor]
Frozen = Callable[[], "Tensor | None"]
TILE_ELEMENTS = 1 << 20


class _WeightSide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, step: int, frozen: Frozen, rows: Rows, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, *params)
        ctx.step, ctx.frozen, ctx.rows = step, frozen, rows
        flat, base = x.reshape(-1, x.shape[-1]), frozen()
        y = x.new_empty(*x.shape[:-1], n)
        out = y.view(-1, n)
        with torch.autocast(x.device.type, enabled=False):
            for i, j in _tiles(n, step):
                out[:, i:j] = flat @ rows(base, i, j, *params).to(x.dtype).t()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        n, base = dy.shape[-1], ctx.frozen()
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, n)
        wanted = [k for k in range(len(params)) if ctx.needs_input_grad[5 + k]]
        dx = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        sums = {k: torch.zeros_like(params[k]) for k in wanted}
        with torch.autocast(x.device.type, enabled=False):
            for i, j in _tiles(n, ctx.step):
                with torch.enable_grad():
                    leaves = [p.detach().requires_grad_(k in wanted) for k, p in enumerate(params)]
                    w = ctx.rows(base, i, j, *leaves)
                if dx is not None:
                    torch.addmm(dx, dy[:, i:j], w.detach().to(x.dtype), out=dx)
                if wanted:
                    dw = (dy[:, i:j].t() @ flat).to(w.dtype)
                    for k, grad in zip(wanted, torch.autograd.grad(w, [leaves[k] for k in wanted], dw), strict=True):
                        sums[k] += grad
        return (None if dx is None else dx.view(x.shape), None, None, None, None, *map(sums.get, range(len(params))))


def _tiles(n: int, step: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + step, n)) for i in range(0, n, step))


def weight_side(
    x: Tensor, n: int, frozen: Frozen, rows: Rows, *params: Tensor, bias: Tensor | None = None, align: int = 1
) -> Tensor:
    """x W'^T + bias for n output features, differentiable in x, params and bias.

    frozen: gives W, once for each direction; a quantised weight is decoded there. align: what i is a multiple of.
    """
    y: Tensor
    if torch.is_autocast_enabled(x.device.type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.compiler.is_compiling():  # the same in terms that the compiler knows

        def whole(x: Tensor, *params: Tensor) -> Tensor:
            return F.linear(x, rows(frozen(), 0, n, *params).to(x.dtype), None if bias is None else bias.to(x.dtype))

        return checkpoint(whole, x, *params, use_reentrant=False)  # type: ignore[no-any-return]
    step = max(TILE_ELEMENTS // max(x.shape[-1], 1) // align, 1) * align
    y = _WeightSide.apply(x, n, step, frozen, rows, *params)  # type: ignore[no-untyped-call]
    return y if bias is None else y.add_(bias.to(y.dtype))


def with_weight(inner: Inner, x: Tensor, frozen: Callable[[], Tensor], change: Callable[[Tensor], Tensor]) -> Tensor:
    """A frozen base layer with the weight change(W) in the place of W, which is made again in the backward, not kept.
    For convolutions, whose weight is small beside their activations."""
    bias = inner.bias()

    def run(x: Tensor) -> Tensor:
        return inner.apply(x, change(frozen()).to(x.dtype), bias)

    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


def as_it_is(w: Tensor, i: int, j: int) -> Tensor:
    """Rows of W itself, for products with it that leave nothing of its size behind, however it is stored."""
    return w[i:j]


def one_token(x: Tensor) -> bool:
    """Then W * (B A) costs no less than the r products with W that take its place, and makes it as a matrix."""
    return x.numel() == x.shape[-1]
