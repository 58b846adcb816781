"""Dropout that gives both d(x) and x - d(x), and keeps one byte for each element of x for the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def split(x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
    """d(x), x - d(x) and which elements were kept."""
    parts: tuple[Tensor, Tensor, Tensor] = _Split.apply(x, p)  # type: ignore[no-untyped-call]
    return parts


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor]:
        keep = torch.empty_like(x).bernoulli_(1 - p).bool()  # the numbers that torch's dropout draws
        dropped = _dropped(x, keep, p)
        ctx.save_for_backward(keep)
        ctx.p = p
        ctx.mark_non_differentiable(keep)
        return dropped, x - dropped, keep

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[1] + _dropped(grads[0] - grads[1], ctx.saved_tensors[0], ctx.p), None


def _dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    return x * keep * (1 / (1 - p))


def made_again(x: Tensor, dropped: Tensor, keep: Tensor, p: float) -> AbstractContextManager[Any]:
    """Within this, a graph that needs d(x) in its backward keeps x and `keep`, which are there anyway."""
    if torch.compiler.is_compiling():
        return nullcontext()
    x = x.detach()

    def pack(t: Tensor) -> Any:
        same = t.data_ptr() == dropped.data_ptr() and t.numel() == dropped.numel()
        return t.shape if same else t

    def unpack(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else _dropped(x, keep, p).reshape(kept)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
