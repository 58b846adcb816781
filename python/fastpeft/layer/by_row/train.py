"""Training with LoRA adapters by row: layers that read one input are one autograd node.

The ordinary way (`routing.py`) packs the adapters with differentiable operations, which cost more than the products at
few tokens. On a CPU nothing is packed here: the kernel finds each adapter and its gradients where they are. For other
backends the node packs them, and its backward pass gives each adapter its part of the stack's gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels import philox
from peft_kernels.dispatch import forced_backends, forward_mode
from peft_kernels.ops.lora_linear import flat_weight
from peft_kernels.ops.multi_lora_linear import backward_op, forward_op
from peft_kernels.ops.multi_lora_linear import native as apart

if TYPE_CHECKING:
    from ..layer import AdapterLayer
    from .mixed import Routed


@dataclass
class Tables:
    """Where the adapters of a layer are in its stack, and which kernels serve it: what seldom changes between steps."""

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
    apart: bool | None = None  # whether the adapters may stay where they are


class _Job(NamedTuple):
    """One layer of a node."""

    weight: tuple[Any, ...]
    n: int
    tables: Tables
    bias: Tensor | None
    dropout: float
    seed: Tensor | None


def linears(x: Tensor, layers: Sequence[AdapterLayer]) -> list[Tensor] | None:
    """``layer(x)`` of layers whose rows were assigned, x [rows, ..., K]; None where it takes the ordinary way.

    It does without gradients, with methods other than LoRA, adapters of several dtypes or dropouts in a layer, trained
    base weights, and under autocast, torch.compile and forward-mode derivatives.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or forward_mode() or x.dtype is torch.float64:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    tokens, jobs, factors = x.numel() // x.shape[-1], [], []
    for layer in layers:
        found = _job(layer, x, tokens)
        if found is None:
            return None
        jobs.append(found[0])
        factors += found[1]
    rows = x.reshape(tokens, x.shape[-1]).contiguous()
    node = _Apart if _apart(rows, jobs, factors) else _Linears
    ys = node.apply(rows, jobs, *factors)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], job.n) for y, job in zip(ys, jobs, strict=True)]


def _job(layer: AdapterLayer, x: Tensor, tokens: int) -> tuple[_Job, list[Tensor]] | None:
    """What the node needs of one layer, and its As and Bs."""
    routed: Routed | None = None if layer._row_stack is not None or layer._rows is None else layer.routed(layer._rows)
    if routed is None or len(x) != len(routed.rows) or layer.merged_adapters or layer.base.transient:
        return None
    names = list(routed._parts)
    if not names or len(names) != len(routed._methods):
        return None
    every = [parts() for parts in routed._parts.values()]
    found = [parts for parts in every if parts is not None]
    if len(found) < len(every):
        return None
    weight, a, b, _, bias, compute, p = found[0]
    if (compute is not None and compute is not x.dtype) or any(f[6] != p for f in found):
        return None
    if any(f[1].dtype is not a.dtype or f[2].dtype is not b.dtype for f in found):
        return None
    flat, n, k = flat_weight("multi_lora_linear", weight)
    if k != x.shape[-1] or flat[0].requires_grad or (bias is not None and bias.requires_grad):
        return None
    given = (tokens, x.device, x.dtype, a.dtype, b.dtype, bias is None, p > 0.0)
    tables = _tables(routed, names, [f[1].shape[0] for f in found], [f[3] for f in found], given)
    seed = philox.draw_seed(x.device) if p > 0.0 else None
    return _Job(flat, n, tables, bias, p, seed), [*(f[1] for f in found), *(f[2] for f in found)]


def _tables(routed: Routed, names: list[str], ranks: list[int], scaling: list[float], given: tuple[Any, ...]) -> Tables:
    key, forced = (*given, *ranks, *scaling), forced_backends()
    tables: Tables | None = routed.tables
    if tables is None or tables.key != key or tables.forced is not forced:
        tokens, device = given[:2]
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        slots = {name: i for i, name in enumerate(names)}
        of_rows = torch.tensor([slots.get(name, -1) for name in routed.rows], dtype=torch.int64, device=device)
        routed.tables = tables = Tables(
            key, forced, ranks, of_rows.repeat_interleave(tokens // len(routed.rows)),
            torch.tensor(starts, dtype=torch.int64, device=device),
            torch.tensor(ranks, dtype=torch.int64, device=device),
            torch.tensor(scaling, dtype=torch.float32, device=device), max(ranks),
        )  # fmt: skip
    return tables


def _by_job(
    jobs: Sequence[_Job], factors: Sequence[Tensor]
) -> Iterator[tuple[_Job, Sequence[Tensor], Sequence[Tensor]]]:
    """Each job with its As and its Bs."""
    at = 0
    for job in jobs:
        count = len(job.tables.sizes)
        yield job, factors[at : at + count], factors[at + count : at + 2 * count]
        at += 2 * count


def _layers(jobs: Sequence[_Job], factors: Sequence[Tensor]) -> list[apart.Layer]:
    """The jobs with their As and Bs as the native library takes them."""
    return [
        apart.Layer(weight, n, a, b, t.adapters, t.ranks, t.scaling, t.max_rank, bias, dropout, seed)
        for (weight, n, t, bias, dropout, seed), a, b in _by_job(jobs, factors)
    ]


def _apart(x: Tensor, jobs: Sequence[_Job], factors: Sequence[Tensor]) -> bool:
    given = (t for job in jobs for t in (*job.weight, job.bias) if isinstance(t, Tensor))
    if not (all(map(Tensor.is_contiguous, factors)) and all(map(Tensor.is_contiguous, given))):
        return False
    if any(job.tables.apart is None for job in jobs):
        for job, layer in zip(jobs, _layers(jobs, factors), strict=True):
            job.tables.apart = apart.serves_layers(x, layer)
    return all(job.tables.apart for job in jobs) and len(jobs) <= apart.MOST


class _Apart(torch.autograd.Function):
    """As `_Linears`, where nothing needs to be packed: one native call each way for all jobs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, jobs: list[_Job], *factors: Tensor) -> tuple[Tensor, ...]:
        ys, ss, ctx.packed = apart.forward_layers(x, _layers(jobs, factors))
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
            dx, found = apart.backward_layers(some, x, layers, ss, packed, need_dx, [wanted[i] for i in places])
            for i, own in zip(places, found, strict=True):
                grads[i] = own
        return dx, None, *(grad for own in grads for grad in own)


class _Linears(torch.autograd.Function):
    """(x [M, K], jobs, As and Bs of the first job, of the second, ...) -> y [M, N] of each job."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, jobs: list[_Job], *factors: Tensor) -> tuple[Tensor, ...]:
        saved, ys = [x], []
        for job, own_a, own_b in _by_job(jobs, factors):
            t, a, b = job.tables, torch.cat([*own_a]), torch.cat([each.t() for each in own_b])
            args = (x, *job.weight, job.n, a, b, t.adapters, t.starts, t.ranks, t.scaling, t.max_rank, job.bias,
                    job.dropout, job.seed)  # fmt: skip
            t.forward = t.forward or forward_op.settle(*args)
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
            t.backward = t.backward or backward_op.settle(*args)
            more, da, db = t.backward(*args)
            if need_dx:
                dx = more if dx is None else dx.add_(more)
            if not any(wanted):
                grads += [None] * len(wanted)
                continue
            parts = [*torch.split(da, t.sizes), *(part.t() for part in torch.split(db, t.sizes))]
            grads += [part if asked else None for part, asked in zip(parts, wanted, strict=True)]
        return dx, None, *grads
