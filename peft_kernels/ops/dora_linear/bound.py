"""`lora_linear` and `dora_linear.trained` of one layer, step after step, on the native CPU backend.

A kernel leaves little of Python in the caches, so that each object that a step touches beside it costs a miss: checks,
choices and 20 arguments of an autograd.Function took a fifth of a step of a small layer. What is the same in the
next step is looked at once here, and so is packed for the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...dispatch import FLOATS, PLAIN, BackendUnavailable, forced_backends, watched
from ...formats import QuantWeight
from .. import lora_linear as base
from ..lora_linear.native import fields, pack
from . import backward_op, normed_op, trained
from .native import addresses, parts_of, places, step, step_backward

_F32 = torch.float32


class Training:
    """`lora_linear`, or with a magnitude `trained`, of one layer.

    What the last call found holds for as long as its arguments beside x are the same objects, their memory is where it
    was, x has one dtype and one K, and no other backend is forced. Whatever is not plain goes the usual way: without
    gradients, under autocast, a transform, a compiler, a mode or a profiler, with a trained weight or bias, on another
    backend.
    """

    def __init__(self) -> None:
        self._bound: _Bound | None = None

    def __call__(
        self, x: Tensor, weight: Tensor | QuantWeight, a: Tensor, b: Tensor, magnitude: Tensor | None, scaling: float,
        bias: Tensor | None, dropout_p: float,
    ) -> Tensor:  # fmt: skip
        if (
            torch.is_grad_enabled() and not watched() and type(x) in PLAIN and x.is_cpu
            and not torch.is_autocast_enabled("cpu")
        ):  # fmt: skip
            bound = self._bound
            if bound is None or not (
                bound.weight is weight and bound.a is a and bound.b is b and bound.magnitude is magnitude
                and bound.scaling is scaling and bound.bias is bias and bound.dropout_p is dropout_p
                and bound.forced is forced_backends() and bound.dtype is x.dtype and bound.k == x.shape[-1]
                and bound.places == places(bound.tensors) and not bound.flat[0].requires_grad
                and (bias is None or not bias.requires_grad)
            ):  # fmt: skip
                self._bound = bound = _bind(x, weight, a, b, magnitude, scaling, bias, dropout_p)
            if bound is not None:
                rows = (x if x.dim() == 2 else x.reshape(-1, x.shape[-1])).contiguous()
                seed = philox.draw_seed(x.device) if dropout_p > 0.0 else None
                y: Tensor = _apply(rows, a, b, magnitude, seed, bound)
                return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])
        if magnitude is None:
            return base.lora_linear(x, weight, a, b, scaling, bias, dropout_p)
        return trained(x, weight, a, b, magnitude, scaling, bias, dropout_p)


class _Bound(NamedTuple):
    weight: Tensor | QuantWeight
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    scaling: float
    bias: Tensor | None
    dropout_p: float
    forced: dict[str, str]
    dtype: torch.dtype  # of x
    n: int
    k: int
    flat: tuple[Any, ...]  # the weight as operators take it
    tensors: list[Tensor]  # which the kernel reads
    places: list[tuple[Any, ...]]
    saved: list[Tensor]  # of these, what the backward reads
    addresses: list[int]
    packed: tuple[bytes, ...]


def _bind(
    x: Tensor, weight: Tensor | QuantWeight, a: Tensor, b: Tensor, magnitude: Tensor | None, scaling: float,
    bias: Tensor | None, dropout_p: float,
) -> _Bound | None:  # fmt: skip
    """None where the kernel cannot take the arguments as they are; errors of arguments come from the usual way."""
    flat, n, k = base.flat_weight("lora_linear" if magnitude is None else "dora_linear", weight)
    kept = [t for t in (*flat[:5], a, b, magnitude) if t is not None]
    tensors = kept if bias is None else [*kept, bias]
    if not (
        x.dtype in FLOATS and x.dim() and x.shape[-1] == k and PLAIN.issuperset(map(type, tensors)) and n
        and a.dim() == 2 and a.shape[0]
        and all(t.is_contiguous() and t.is_leaf for t in tensors)  # not what a graph made: that would live on with it
        and not flat[0].requires_grad and (bias is None or not bias.requires_grad)
    ):  # fmt: skip
        return None
    if magnitude is not None and (magnitude.shape != (n,) or magnitude.dtype is not _F32):
        return None
    row, s, seed = x.detach().new_empty((1, k)), x.new_empty((1, a.shape[0]), dtype=_F32), None
    if dropout_p > 0.0:
        seed = torch.empty(1, dtype=torch.int64, device=x.device)
    with torch.no_grad():
        if magnitude is None:
            forward_op, back_op, own = base.forward_op, base.backward_op, ()
        else:
            forward_op, back_op, own = normed_op, backward_op, (magnitude,)
        rest = (row, *flat, n, a, b, *own, scaling, bias, dropout_p, seed)
        forward = rest if magnitude is None else (*rest, True)
        dy = row.new_empty((1, n))
        past, needs = ((s,), (True, True)) if magnitude is None else ((magnitude, dy, s), (True, True, True))
        backward = (dy, row, *flat, a, b, *past, scaling, dropout_p, seed, *needs)
        try:
            forward_op.check(*forward)
            if any(op.choose(args).name != "native" for op, args in ((forward_op, forward), (back_op, backward))):
                return None
        except (BackendUnavailable, TypeError, ValueError):  # the usual way says so, each direction when it comes to it
            return None
        packed = fields(pack(0, row, *flat, n, a, b, scaling, bias, dropout_p, None))
    return _Bound(weight, a, b, magnitude, scaling, bias, dropout_p, forced_backends(), x.dtype, n, k, flat, tensors,
                  places(tensors), kept, addresses(kept), packed)  # fmt: skip


class _Step(torch.autograd.Function):
    """(x [M, K] contiguous, a, b, magnitude or None, seed or None, bound) -> y [M, N].

    What the forward leaves for the backward is one float32 tensor (`native.parts_of`), and h [M, N] where the magnitude
    is trained.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, seed: Tensor | None, bound: _Bound
    ) -> Tensor:
        y, left, h = step(bound.packed, x, bound.n, a.shape[0], magnitude, seed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, left, h, seed, *bound.saved)
        ctx.bound = bound
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        bound: _Bound = ctx.bound
        if dy is None:
            return (None,) * 6
        given = ctx.saved_tensors  # hooks may have put others in their places, and a checkpoint gives them once
        x, left, h, seed, *saved = given
        if (
            type(dy) is not Tensor or watched() or bound.forced is not forced_backends()
            or addresses(saved) != bound.addresses
            or not (x.is_contiguous() and left.is_contiguous() and (h is None or h.is_contiguous()))
            or x.dtype is not bound.dtype
        ):  # fmt: skip
            return _usual(ctx, dy, given)
        need = ctx.needs_input_grad
        return *step_backward(bound.packed, dy, x, left, h, seed, bound.a, bound.b, bound.magnitude, need), None, None


# what Function.apply does but for the cases that `watched` tells of
_apply = super(torch.autograd.Function, _Step).apply


def _usual(ctx: Any, dy: Tensor, given: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The backward through the operators, on what the hooks of saved tensors made of them."""
    x, left, h, seed, *saved = given
    bound: _Bound = ctx.bound
    each = iter(saved)
    flat = [None if t is None else next(each) for t in bound.flat[:5]]
    a, b = next(each), next(each)
    s, gain, norm = parts_of(left, x.shape[0], a.shape[0], bound.n)
    need = ctx.needs_input_grad
    need_ab = need[1] or need[2]
    weight, last, dm = (*flat, *bound.flat[5:]), (bound.scaling, bound.dropout_p, seed, need[0], need_ab), None
    dy = dy.contiguous()
    if bound.magnitude is None:
        dx, da, db = base.backward_op(dy, x, *weight, a, b, s, *last)
    else:
        assert gain is not None
        dx, da, db, dm = backward_op(dy, x, *weight, a, b, gain, h, s, *last, need[3])
        dm = dm / norm if need[3] else None
    return dx if need[0] else None, da if need[1] else None, db if need[2] else None, dm, None, None
