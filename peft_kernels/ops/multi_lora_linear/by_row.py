"""lora_linear_by_row: `multi_lora_linear` in training, of several layers of one x, with each adapter where it lies.

Packing adapters into a stack with differentiable operations costs more than the products at few tokens. Here layers
that read one x are one autograd node. On a CPU nothing is packed: the kernel finds each adapter and its gradients
through pointers. For other backends the node packs them, and its backward gives each adapter its part of the stack's
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ... import philox
from ...dispatch import arg_error, forced_backends, forward_mode
from ...formats import FlatWeight, QuantWeight
from ..lora_linear import flat_weight
from . import backward_op, forward_op
from . import native as by_pointer


@dataclass
class RowPlan:
    """Which adapter each row has, and what calls with it found; made once for a layer and a batch's rows.

    adapters: for each entry of x's first dimension, the place among `RowProjection.a`; -1: the base alone.
    """

    adapters: Sequence[int]
    _tables: _Tables | None = field(default=None, repr=False)


class RowProjection(NamedTuple):
    """One linear layer with adapters of its own for the rows of x. a[i]: [r_i, K]; b[i]: [N, r_i]."""

    weight: Tensor | QuantWeight
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scaling: Sequence[float]
    plan: RowPlan
    bias: Tensor | None = None
    dropout_p: float = 0.0


@dataclass
class _Tables:
    """A plan for one shape of x and of its adapters, on their device, and which kernels serve it: what seldom changes
    between steps."""

    key: tuple[Any, ...]
    forced: dict[str, str]
    sizes: list[int]  # of its parts, by adapter
    adapters: Tensor  # [tokens] int64, the place of each in the stack; -1: the base
    starts: Tensor
    ranks: Tensor
    scaling: Tensor
    max_rank: int
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    by_pointer: bool | None = None  # whether the adapters may stay where they are


class _Job(NamedTuple):
    """One layer of a node."""

    weight: FlatWeight
    n: int
    tables: _Tables
    bias: Tensor | None
    dropout: float
    seed: Tensor | None


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
    tokens, jobs, factors = x.numel() // max(1, x.shape[-1]), [], []
    for layer in layers:
        job = _job(layer, x, tokens)
        if job is None:
            return None
        jobs.append(job)
        factors += [*layer.a, *layer.b]
    rows = x.reshape(tokens, x.shape[-1]).contiguous()
    node = _ByPointer if _by_pointer(rows, jobs, factors) else _Packed
    ys = node.apply(rows, jobs, *factors)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], job.n) for y, job in zip(ys, jobs, strict=True)]


def _job(layer: RowProjection, x: Tensor, tokens: int) -> _Job | None:
    flat, n, k = flat_weight("lora_linear_by_row", layer.weight)
    a, b, bias, p = layer.a, layer.b, layer.bias, layer.dropout_p
    if len(layer.plan.adapters) != x.shape[0]:
        raise arg_error("lora_linear_by_row", "plan", f"of {x.shape[0]} rows like x", len(layer.plan.adapters))
    if k != x.shape[-1] or not a or flat[0].requires_grad or (bias is not None and bias.requires_grad):
        return None
    if any(t.dtype is not a[0].dtype for t in a) or any(t.dtype is not b[0].dtype for t in b):
        return None
    key = (tokens, x.device, x.dtype, a[0].dtype, b[0].dtype, bias is None, p > 0.0, *layer.scaling,
           *[t.shape[0] for t in a])  # fmt: skip
    tables = layer.plan._tables
    if tables is None or tables.key != key or tables.forced is not forced_backends():
        tables = layer.plan._tables = _tables(layer, tokens, x.device, key)
    return _Job(flat, n, tables, bias, p, philox.draw_seed(x.device) if p > 0.0 else None)


def _tables(layer: RowProjection, tokens: int, device: torch.device, key: tuple[Any, ...]) -> _Tables:
    def tensor(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    ranks = [t.shape[0] for t in layer.a]
    each_row = tensor(layer.plan.adapters).repeat_interleave(tokens // max(1, len(layer.plan.adapters)))
    return _Tables(key, forced_backends(), ranks, each_row, tensor([sum(ranks[:i]) for i in range(len(ranks))]),
                   tensor(ranks), tensor(layer.scaling, torch.float32), max(ranks))  # fmt: skip


def _by_job(
    jobs: Sequence[_Job], factors: Sequence[Tensor]
) -> Iterator[tuple[_Job, Sequence[Tensor], Sequence[Tensor]]]:
    """Each job with its As and its Bs."""
    at = 0
    for job in jobs:
        count = len(job.tables.sizes)
        yield job, factors[at : at + count], factors[at + count : at + 2 * count]
        at += 2 * count


def _layers(jobs: Sequence[_Job], factors: Sequence[Tensor]) -> list[by_pointer.Layer]:
    """The jobs with their As and Bs as the native library takes them."""
    return [
        by_pointer.Layer(weight, n, a, b, t.adapters, t.ranks, t.scaling, t.max_rank, bias, dropout, seed)
        for (weight, n, t, bias, dropout, seed), a, b in _by_job(jobs, factors)
    ]


def _by_pointer(x: Tensor, jobs: Sequence[_Job], factors: Sequence[Tensor]) -> bool:
    given = (t for job in jobs for t in (*job.weight, job.bias) if isinstance(t, Tensor))
    if not (all(map(Tensor.is_contiguous, factors)) and all(map(Tensor.is_contiguous, given))):
        return False
    if any(job.tables.by_pointer is None for job in jobs):
        for job, layer in zip(jobs, _layers(jobs, factors), strict=True):
            job.tables.by_pointer = by_pointer.serves_layers(x, layer)
    return all(job.tables.by_pointer for job in jobs) and len(jobs) <= by_pointer.MOST


class _ByPointer(torch.autograd.Function):
    """As `_Packed`, where nothing needs to be packed: one native call each way for all jobs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, jobs: list[_Job], *factors: Tensor) -> tuple[Tensor, ...]:
        ys, ss, ctx.packed = by_pointer.forward_layers(x, _layers(jobs, factors))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *factors, *ss)
        ctx.jobs = jobs
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, *saved = ctx.saved_tensors
        need_dx, _, *need = ctx.needs_input_grad
        count = len(saved) - len(dys)
        used, wanted, at = [], [], 0
        for i, (layer, dy) in enumerate(zip(_layers(ctx.jobs, saved[:count]), dys, strict=True)):
            asked = need[at : at + 2 * len(layer.a)]
            at += len(asked)
            wanted.append(asked)
            if dy is not None:
                used.append((i, dy.contiguous(), layer, saved[count + i], ctx.packed[i]))
        dx: Tensor | None = None
        grads: list[list[Tensor | None]] = [[None] * len(asked) for asked in wanted]
        if used:
            places, some, layers, ss, packed = zip(*used, strict=True)
            dx, found = by_pointer.backward_layers(some, x, layers, ss, packed, need_dx, [wanted[i] for i in places])
            for i, own in zip(places, found, strict=True):
                grads[i] = own
        return dx, None, *(grad for own in grads for grad in own)


class _Packed(torch.autograd.Function):
    """(x [M, K], jobs, As and Bs of the first job, of the second, ...) -> y [M, N] of each job."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, jobs: list[_Job], *factors: Tensor) -> tuple[Tensor, ...]:
        saved, ys = [x], []
        for job, own_a, own_b in _by_job(jobs, factors):
            t, a, b = job.tables, torch.cat([*own_a]), torch.cat([each.t() for each in own_b])
            args = (x, *job.weight, job.n, a, b, t.adapters, t.starts, t.ranks, t.scaling, t.max_rank, job.bias,
                    job.dropout, job.seed)  # fmt: skip
            t.forward = t.forward or forward_op.resolve(*args)
            y, s = t.forward(*args)
            ys.append(y)
            saved += [a, b, s]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        ctx.jobs = jobs
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, *packed = ctx.saved_tensors
        need_dx, _, *need = ctx.needs_input_grad
        dx: Tensor | None = None
        grads: list[Tensor | None] = []
        for i, (job, dy) in enumerate(zip(ctx.jobs, dys, strict=True)):
            t = job.tables
            wanted = need[len(grads) : len(grads) + 2 * len(t.sizes)]
            if dy is None:
                grads += [None] * len(wanted)
                continue
            a, b, s = packed[3 * i : 3 * i + 3]
            args = (dy.contiguous(), x, *job.weight, a, b, s, t.adapters, t.starts, t.ranks, t.scaling, t.max_rank,
                    job.dropout, job.seed, need_dx, any(wanted))  # fmt: skip
            t.backward = t.backward or backward_op.resolve(*args)
            more, da, db = t.backward(*args)
            if need_dx:
                dx = more if dx is None else dx.add_(more)
            if not any(wanted):
                grads += [None] * len(wanted)
                continue
            parts = [*torch.split(da, t.sizes), *(part.t() for part in torch.split(db, t.sizes))]
            grads += [part if asked else None for part, asked in zip(parts, wanted, strict=True)]
        return dx, None, *grads
