"""lora_linear_by_row: `multi_lora_linear` in training, of several layers of one x, with each adapter where it lies.

Layers that read one x are one autograd node, which packs their adapters and whose backward gives each adapter its part
of the gradients: packing them with differentiable operations costs more than the products at few tokens. Prepared, on a
CPU, nothing is packed: the kernel finds each adapter and its gradients through pointers (`prepared.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...checks import arg_error, check_memory
from ...dispatch import forward_mode
from ...formats import FlatWeight, QuantWeight
from ..lora_linear import check_adapter, check_bias, check_dropout, check_weight, flat_weight
from . import backward_op, forward_op

_NAME = "lora_linear_by_row"

class _Tables(NamedTuple):
    """A plan for so many tokens and its adapters, on their device."""

    adapters: Tensor  # [tokens] int64, the place of each in the stack; -1: the base
    starts: Tensor
    ranks: Tensor
    scaling: Tensor
    max_rank: int


@dataclass
class RowPlan:
    """Which adapter each row has, made once for a layer and a batch's rows.

    adapters: for each entry of x's first dimension, the place among `RowProjection.a`; -1: the base alone.
    """

    adapters: Sequence[int]
    _last: tuple[Any, _Tables] | None = field(default=None, repr=False)

    def tables(self, tokens: int, device: torch.device, ranks: list[int], scaling: Sequence[float]) -> _Tables:
        """Its tensors, made anew where one of these is another."""
        asked = (tokens, device, ranks, [*scaling])
        last = self._last  # whole, as other threads may put theirs there
        if last is None or last[0] != asked:

            def tensor(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
                return torch.tensor(values, dtype=dtype, device=device)

            each_row = tensor(self.adapters).repeat_interleave(tokens // max(1, len(self.adapters)))
            starts = tensor([sum(ranks[:i]) for i in range(len(ranks))])
            made = _Tables(each_row, starts, tensor(ranks), tensor(scaling, torch.float32), max(ranks))
            self._last = last = asked, made
        return last[1]


class RowProjection(NamedTuple):
    """One linear layer with adapters of its own for the rows of x. a[i]: [r_i, K]; b[i]: [N, r_i]."""

    weight: Tensor | QuantWeight
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scaling: Sequence[float]
    plan: RowPlan
    bias: Tensor | None = None
    dropout_p: float = 0.0


def check_layer(
    x: Tensor, weight: FlatWeight, n: int, a: Sequence[Tensor], b: Sequence[Tensor], bias: Tensor | None
) -> None:
    """Raise ValueError or TypeError unless a layer's tensors may be read, as the operators ask it of theirs: a prepared
    call reads each where it is, without an operator."""
    k = x.shape[-1]
    check_weight(_NAME, *weight, n, k)
    check_bias(_NAME, n, bias)
    names = ("weight", "absmax", "nested_absmax", "nested_code", "offset", "bias")
    each = dict(zip(names, (*weight[:5], bias), strict=True))
    for i, (own_a, own_b) in enumerate(zip(a, b, strict=True)):
        check_adapter(_NAME, n, k, own_a, own_b)
        each |= {f"a[{i}]": own_a, f"b[{i}]": own_b}
    for name, t in each.items():
        if t is not None and t.device != x.device:
            raise arg_error(_NAME, name, f"on {x.device} like x", t.device)
    check_memory(_NAME, **each)


class Job(NamedTuple):
    """One layer of a node."""

    weight: FlatWeight
    n: int
    tables: _Tables
    bias: Tensor | None
    dropout: float


def job(layer: RowProjection, x: Tensor) -> Job | None:
    """A layer for x [rows, ..., K]; None where a node does not serve it."""
    flat, n, k = flat_weight(_NAME, layer.weight)
    a, b, bias = layer.a, layer.b, layer.bias
    if len(layer.plan.adapters) != x.shape[0]:
        raise arg_error(_NAME, "plan", f"of {x.shape[0]} rows like x", len(layer.plan.adapters))
    if not len(a) == len(b) == len(layer.scaling):
        raise arg_error(_NAME, "a, b and scaling", "one of each for each adapter", (len(a), len(b), len(layer.scaling)))
    check_layer(x, flat, n, a, b, bias)
    check_dropout(_NAME, layer.dropout_p, None, False)
    if k != x.shape[-1] or not k or not a or flat[0].requires_grad or (bias is not None and bias.requires_grad):
        return None
    if any(t.dtype is not a[0].dtype for t in a) or any(t.dtype is not b[0].dtype for t in b):
        return None
    tokens = x.numel() // max(1, k)
    return Job(flat, n, layer.plan.tables(tokens, x.device, [t.shape[0] for t in a], layer.scaling), bias,
               layer.dropout_p)  # fmt: skip


def lora_linear_by_row(x: Tensor, layers: Sequence[RowProjection]) -> list[Tensor] | None:
    """The outputs of layers that read one x [rows, ..., K], differentiable in x and every a and b; None where it does
    not serve: without gradients, in float64, under autocast, torch.compile and forward-mode derivatives, with a weight
    or a bias that is trained, with adapters of several dtypes in a layer. `multi_lora_linear` does all of these.

    dropout_p: of a layer; its seed is drawn. Raises ValueError where the plan does not fit x.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_mode() or x.dtype is torch.float64:
        return None
    if torch.is_autocast_enabled(x.device.type) or not x.dim():
        return None
    jobs, factors = [], []
    for layer in layers:
        found = job(layer, x)
        if found is None:
            return None
        jobs.append(found)
        factors += [*layer.a, *layer.b]
    rows = x.reshape(-1, x.shape[-1]).contiguous() if x.numel() else x.new_empty((0, x.shape[-1]))
    seeds = [philox.draw_seed(x.device) if found.dropout > 0.0 else None for found in jobs]
    ys = _Packed.apply(rows, jobs, seeds, *factors)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], found.n) for y, found in zip(ys, jobs, strict=True)]


def _by_job(
    jobs: Sequence[Job], factors: Sequence[Tensor]
) -> Iterator[tuple[Job, Sequence[Tensor], Sequence[Tensor]]]:
    """Each job with its As and its Bs."""
    at = 0
    for each in jobs:
        count = len(each.tables.ranks)
        yield each, factors[at : at + count], factors[at + count : at + 2 * count]
        at += 2 * count


class _Packed(torch.autograd.Function):
    """(x [M, K], jobs, a seed or None each, As and Bs of the first job, of the second, ...) -> y [M, N] of each job."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, jobs: list[Job], seeds: list[Tensor | None], *factors: Tensor
    ) -> tuple[Tensor, ...]:
        saved, ys, ctx.sizes = [x], [], []
        for (each, own_a, own_b), seed in zip(_by_job(jobs, factors), seeds, strict=True):
            a, b = torch.cat([*own_a]), torch.cat([t.t() for t in own_b])
            y, s = forward_op.op(x, *each.weight, each.n, a, b, *each.tables, each.bias, each.dropout, seed)
            ys.append(y)
            saved += [a, b, s]
            ctx.sizes.append([t.shape[0] for t in own_a])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.jobs, ctx.seeds = jobs, seeds
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, *packed = ctx.saved_tensors
        need_dx, _, _, *need = ctx.needs_input_grad
        dx: Tensor | None = None
        grads: list[Tensor | None] = []
        for i, (each, seed, sizes, dy) in enumerate(zip(ctx.jobs, ctx.seeds, ctx.sizes, dys, strict=True)):
            wanted = need[len(grads) : len(grads) + 2 * len(sizes)]
            if dy is None:
                grads += [None] * len(wanted)
                continue
            a, b, s = packed[3 * i : 3 * i + 3]
            more, da, db = backward_op.op(dy.contiguous(), x, *each.weight, a, b, s, *each.tables, each.dropout, seed,
                                          need_dx, any(wanted))  # fmt: skip
            if need_dx:
                dx = more if dx is None else dx.add_(more)
            if not any(wanted):
                grads += [None] * len(wanted)
                continue
            parts = [*torch.split(da, sizes), *(part.t() for part in torch.split(db, sizes))]
            grads += [part if asked else None for part, asked in zip(parts, wanted, strict=True)]
        return dx, None, None, *grads
