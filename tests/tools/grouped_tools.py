"""Calls of grouped_linear, and what every backend is held to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lora_tools import F32
from torch import Tensor

from peft_kernels.ops import grouped_linear as op
from peft_kernels.testing import assert_no_worse, assert_same_bits, random_quant_weight


def normal(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


class Case:
    """One call: x of 3 rows more than the groups have, and what belongs to it."""

    def __init__(
        self, ends: Sequence[int], n: int, k: int, *, dtype: torch.dtype = F32, weight: str = "dense",
        w_dtype: torch.dtype = F32, r: int = 4, ab: torch.dtype = F32, bias: bool = True, rest: int = 3,
    ) -> None:  # fmt: skip
        e = len(ends) - 1
        self.offsets, self.n = torch.tensor(ends), n
        self.x, self.dy = normal(ends[-1] + rest, k, dtype=dtype), normal(ends[-1] + rest, n, dtype=dtype)
        self.weight: list[Any]
        if weight == "dense":
            self.weight = [normal(e, n, k, dtype=w_dtype, scale=k**-0.5), None, None, None, None, 0, 64, 256]
        elif weight == "turned":
            dense = normal(e, k, n, dtype=w_dtype, scale=k**-0.5).mT
            self.weight = [dense, None, None, None, None, 0, 64, 256]
        else:
            quantised = random_quant_weight(e * n, k, quant_type="nf4", nested=weight == "nested")
            self.weight = [*quantised.flatten()]
        self.a = normal(e, r, k, dtype=ab, scale=k**-0.5) if r else None
        self.b = normal(e, n, r, dtype=ab) if r else None
        self.bias = normal(e, n, dtype=ab) if bias else None

    def forward(self, fn: Any) -> Tensor:
        y: Tensor = fn(self.x, *self.weight, self.offsets, self.n, self.a, self.b, 0.5, self.bias)
        return y

    def backward(self, fn: Any, need_dx: bool = True, need_ab: bool = True) -> list[Tensor]:
        need_ab = need_ab and self.a is not None
        return [*fn(self.dy, self.x, *self.weight, self.offsets, self.a, self.b, 0.5, need_dx, need_ab)]

    def double(self) -> Case:
        other = object.__new__(Case)
        for name, value in vars(self).items():
            wide = isinstance(value, Tensor) and value.is_floating_point()
            setattr(other, name, value.double() if wide else value)
        weight, *parts = self.weight
        other.weight = [weight.double() if parts[4] == 0 else weight, *parts]
        return other

    def to(self, device: str) -> Case:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.weight = [value.to(device) if isinstance(value, Tensor) else value for value in self.weight]
        return self

    def size(self) -> Case:
        """Of the absolute values, in float64: whose results are the sums of absolute terms."""
        other = self.double()
        w = op.weights_of(*other.weight, len(self.offsets) - 1, self.n, self.x.shape[1], torch.float64)
        other.weight = [w, None, None, None, None, 0, 64, 256]
        for name, value in vars(other).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.abs())
        other.weight[0] = w.abs()
        return other


def check(c: Case, same_bits: bool = True) -> None:
    """Forward and backward are no worse than eager. same_bits: what is not asked for changes nothing of the rest."""
    exact, size = c.double(), c.size()
    forward, backward = op.forward_op, op.backward_op
    y = c.forward(forward.op)
    assert_no_worse(y, c.forward(forward.reference), exact.forward(forward.reference),
                    size.forward(forward.reference))
    end = int(c.offsets[-1])
    assert not y[end:].any()
    got, eager = c.backward(backward.op), c.backward(backward.reference)
    want, sizes = exact.backward(backward.reference), size.backward(backward.reference)
    assert not got[0][end:].any()
    for mine, theirs, right, terms in zip(got, eager, want, sizes, strict=True):
        assert_no_worse(mine, theirs, right, terms)
    for need in ((True, False), (False, True)):
        parts = c.backward(backward.op, *need)
        for whole, part, theirs, right, terms in zip(got, parts, eager, want, sizes, strict=True):
            if not part.numel():
                continue
            if same_bits:
                assert_same_bits(part, whole)
            assert_no_worse(part, theirs, right, terms)
