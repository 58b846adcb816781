"""Makers of calls of multi_lora_linear and the law that every backend is held to, for several test files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lora_tools import F32, Case, make, on_tensor_cores
from torch import Tensor

from peft_kernels import AdapterStack
from peft_kernels.ops import multi_lora_linear as op
from peft_kernels.ops.lora_linear import dense_weight
from peft_kernels.testing import assert_no_worse


@dataclass
class MultiCase:
    """One call: x, dy, weight, bias and dropout of `base` (which has no adapter), a stack, and each row's adapter."""

    base: Case
    stack: AdapterStack
    adapters: Tensor

    @property
    def plan(self) -> tuple[Any, ...]:
        return self.adapters, self.stack.starts, self.stack.ranks, self.stack.scaling, self.stack.max_rank

    def forward(self, fn: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        c = self.base
        return fn(c.x, *c.weight, c.n, self.stack.a, self.stack.b, *self.plan, c.bias, c.p, c.seed)

    def backward(
        self, fn: Callable[..., Any], s: Tensor, need_dx: bool = True, need_ab: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.base
        return fn(c.dy, c.x, *c.weight, self.stack.a, self.stack.b, s, *self.plan, c.p, c.seed, need_dx, need_ab)

    def double(self) -> MultiCase:
        stack = replace(self.stack, a=self.stack.a.double(), b=self.stack.b.double())
        return MultiCase(self.base.double(), stack, self.adapters)

    def magnitudes(self) -> MultiCase:
        """The same call of absolute values, in float64: its results are what rounding scales with."""
        e = self.double()
        c = e.base
        w = dense_weight(*c.weight, c.n, c.x.shape[1], torch.float64).abs()
        base = Case(c.x.abs(), c.dy.abs(), (w, None, None, None, None, 0, 64, 256), c.n, None, None,
                    None if c.bias is None else c.bias.abs(), c.scaling, c.p, c.seed)  # fmt: skip
        stack = replace(e.stack, a=e.stack.a.abs(), b=e.stack.b.abs(), scaling=e.stack.scaling.abs())
        return MultiCase(base, stack, self.adapters)

    def to(self, device: str) -> MultiCase:
        moved = {f.name: getattr(self.stack, f.name) for f in fields(self.stack)}
        stack = AdapterStack(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})
        return MultiCase(self.base.to(device), stack, self.adapters.to(device))


def make_stack(
    n: int, k: int, ranks: Sequence[int], ab: torch.dtype = F32, seed: int = 0, max_rank: int | None = None
) -> AdapterStack:
    """Adapters of these ranks in a drawn order with a row of NaN, which nobody owns, before each and at the end."""
    g = torch.Generator().manual_seed(seed)
    p = sum(ranks) + len(ranks) + 1
    a, b = torch.full((p, k), float("nan"), dtype=ab), torch.full((p, n), float("nan"), dtype=ab)
    starts, at = [0] * len(ranks), 1
    for i in torch.randperm(len(ranks), generator=g).tolist():
        starts[i], r = at, ranks[i]
        a[at : at + r] = torch.randn(r, k, generator=g, dtype=torch.float64).to(ab)
        b[at : at + r] = torch.randn(r, n, generator=g, dtype=torch.float64).mul(0.1).to(ab)
        at += r + 1
    scaling = torch.rand(len(ranks), generator=g) + 0.5
    most = max(ranks, default=0) if max_rank is None else max_rank
    return AdapterStack(a, b, torch.tensor(starts, dtype=torch.int64), torch.tensor(ranks, dtype=torch.int64), scaling,
                        most)  # fmt: skip


def make_multi(
    m: int, n: int, k: int, ranks: Sequence[int], *, adapters: Sequence[int] | None = None, ab: torch.dtype = F32,
    max_rank: int | None = None, seed: int = 0, **options: Any,
) -> MultiCase:  # fmt: skip
    """adapters: of each row; drawn, with -1 among them, where not given. options: of `lora_tools.make`."""
    g = torch.Generator().manual_seed(seed + 1)
    rows = torch.randint(-1, len(ranks), (m,), generator=g) if adapters is None else torch.tensor(adapters)
    return MultiCase(make(m, n, k, seed=seed, **options), make_stack(n, k, ranks, ab, seed, max_rank),
                     rows.to(torch.int64))  # fmt: skip


def check_multi(
    c: MultiCase, forward: Callable[..., Any] = op.forward_op.op, backward: Callable[..., Any] = op.backward_op.op
) -> None:
    """Forward and backward, of the forced backend by default, are no worse than eager code in the same dtype."""
    exact, size = c.double(), c.magnitudes()
    found, eager = c.forward(forward), c.forward(op.forward_op.reference)
    want, sizes = exact.forward(op.forward_op.reference), size.forward(op.forward_op.reference)
    x, dy = c.base.x, c.base.dy
    terms = (0, on_tensor_cores(x, x.shape[1]))
    for part in zip(found, eager, want, sizes, terms, strict=True):
        assert_no_worse(*part)
    grads = c.backward(backward, found[1])
    grads_eager = c.backward(op.backward_op.reference, eager[1])
    grads_want = exact.backward(op.backward_op.reference, want[1])
    grad_sizes = size.backward(op.backward_op.reference, sizes[1])
    terms = (0, on_tensor_cores(x, *dy.shape), on_tensor_cores(x, *x.shape))
    for part in zip(grads, grads_eager, grads_want, grad_sizes, terms, strict=True):
        assert_no_worse(*part)
