"""Makers of calls of lora_mixture, held against float64, for several test files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from lora_tools import Case, make, on_tensor_cores
from torch import Tensor

from peft_kernels.ops import lora_mixture as op
from peft_kernels.ops.lora_linear import dense_weight
from peft_kernels.testing import assert_no_worse


@dataclass
class Mixture:
    """A call: the base, whose a and b are not used, and a [n, r, K], b [N, n, r], mix [M, n]."""

    base: Case
    a: Tensor
    b: Tensor
    mix: Tensor
    masked: bool = False

    def forward(self, fn: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        c = self.base
        return fn(c.x, *c.weight, c.n, self.a, self.b, self.mix, self.masked, c.bias, c.p, c.seed)

    def backward(self, fn: Callable[..., Any], s: Tensor, dx: bool = True, ab: bool = True, mix: bool = True) -> Any:
        c = self.base
        return fn(c.dy, c.x, *c.weight, self.a, self.b, s, self.mix, self.masked, c.p, c.seed, dx, ab, mix)

    def to(self, f: Callable[[Tensor], Tensor], base: Case) -> Mixture:
        return replace(self, base=base, a=f(self.a), b=f(self.b), mix=f(self.mix))

    def double(self) -> Mixture:
        return self.to(lambda t: t.double(), self.base.double())

    def on(self, device: str) -> Mixture:
        return self.to(lambda t: t.to(device), self.base.to(device))


def make_mixture(
    m: int, n: int, k: int, count: int, r: int, *, zeros: str = "", ab: torch.dtype = torch.float32,
    masked: bool = False, **base: Any,
) -> Mixture:  # fmt: skip
    """zeros: weights that are zero: "some"; "top", all but one of each 20 rows; "first", the first adapter's; "all"."""
    g = torch.Generator().manual_seed(m + n + k + count + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    mix = normal(m, count)
    if zeros == "some":
        mix[torch.rand(m, count, generator=g) < 0.5] = 0.0
    elif zeros == "top":
        kept = (torch.arange(m) // 20) % max(count, 1)
        mix[torch.arange(count) != kept[:, None]] = 0.0
    elif zeros:
        mix[:, : 1 if zeros == "first" else count] = 0.0
    return Mixture(make(m, n, k, **base), normal(count, r, k).to(ab), (normal(n, count, r) * 0.1).to(ab), mix, masked)


def assert_same_sums(got: Tensor, want: Tensor) -> None:
    """Equal but for the order of the terms, of which there are some dozens here, each about as large as the result."""
    most = float(want.detach().abs().max()) if want.numel() else 0.0
    assert_no_worse(got.detach(), want.detach(), want.detach(), torch.full_like(want.detach(), 64 * most))


def check_mixture(c: Mixture) -> tuple[Tensor, ...]:
    """Forward and backward of the forced backend are no worse than eager code in the same dtype; all results."""
    exact = c.double()
    e, x = exact.base, c.base.x
    w = dense_weight(*e.weight, e.n, x.shape[1], torch.float64).abs()
    y, s = c.forward(op.forward_op.op)
    (y_eager, s_eager), (y_exact, s_exact) = c.forward(op.forward_op.reference), exact.forward(op.forward_op.reference)
    ones, twos = exact.a.abs().flatten(0, 1), exact.b.abs().flatten(1)
    weights = exact.mix.abs()[..., None]
    s_size = (e.x.abs() @ ones.t() / (1 - e.p)).view(s.shape)
    g_size = (e.dy.abs() @ twos).view(s.shape)
    mixed, ds = (s_size * weights).flatten(1), (g_size * weights).flatten(1)
    size = e.x.abs() @ w.t() + mixed @ twos.t() + (0 if e.bias is None else e.bias.abs())
    assert_no_worse(s, s_eager, s_exact, s_size, on_tensor_cores(x, x.shape[1]))
    assert_no_worse(y, y_eager, y_exact, size)
    got = c.backward(op.backward_op.op, s)
    eager, want = c.backward(op.backward_op.reference, s_eager), exact.backward(op.backward_op.reference, s_exact)
    sizes = (e.dy.abs() @ w + ds @ ones / (1 - e.p), (ds.t() @ e.x.abs() / (1 - e.p)).view(c.a.shape),
             (e.dy.abs().t() @ mixed).view(c.b.shape), (g_size * s_size).sum(-1))  # fmt: skip
    terms = (0, on_tensor_cores(x, *e.dy.shape), on_tensor_cores(x, *x.shape),
             on_tensor_cores(x, x.shape[1] * max(c.a.shape[1], 1), e.n))  # fmt: skip
    for one, two, three, bound, more in zip(got, eager, want, sizes, terms, strict=True):
        assert_no_worse(one, two, three, bound, more)
    return (y, s, *got)
