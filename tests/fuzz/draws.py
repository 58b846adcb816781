"""Draws of a case: sizes, numbers, and tensors of any values, layout and place."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .memory import Guarded

T = TypeVar("T")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLOATS = (F32, BF16, F16)
SPECIAL = (float("inf"), float("-inf"), float("nan"), 0.0, -0.0)
LARGE = {F16: 60.0}  # of most: products of two are finite
TINY = {F16: 1e-7, BF16: 1e-37}  # subnormal, as 1e-40 is of float32; products of bfloat16 take subnormals as 0


class Draw:
    """A case's source of everything, by its seed. place: guarded memory, or None for torch's own alone."""

    def __init__(self, seed: int, place: Guarded | None = None, calm: bool = False) -> None:
        self.random, self.place, self.calm = random.Random(seed), place, calm
        self.generator = torch.Generator().manual_seed(seed)

    def one(self, choices: Sequence[T]) -> T:
        return self.random.choice(choices)

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self, most: int = 70, least: int = 0) -> int:
        """A size: mostly small, often beside a power of two, now and then the least."""
        if self.maybe(0.06):
            return least
        if self.maybe(0.3):
            return max(least, min(most, 2 ** self.random.randint(0, 7) + self.random.randint(-1, 1)))
        return self.random.randint(max(least, 1), max(least, 1, most if self.maybe(0.4) else min(most, 20)))

    def number(self) -> float:
        """A factor."""
        return self.one((1.0, 0.5, 2.0, -1.5, 0.0, 1e-3))

    def dropout(self) -> tuple[float, Tensor | None]:
        """Its probability, mostly none, and its seed."""
        if self.maybe(0.7):
            return 0.0, None
        return self.one((0.1, 0.5, 0.75)), torch.tensor([self.random.randrange(2**62)])

    def values(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Floating-point values: normal ones, with zeros, subnormals, large ones, infinities and NaNs at times."""
        t = torch.randn(shape, generator=self.generator, dtype=F64)
        if not self.calm and self.maybe(0.35):
            flavour = self.random.randrange(5)
            if flavour == 0:
                t *= TINY.get(dtype, 1e-40)
            elif flavour == 1:
                t *= LARGE.get(dtype, 1e12)
            elif flavour == 2:
                t.zero_()
            elif t.numel():
                for _ in range(self.random.randint(1, 3)):
                    t.view(-1)[self.random.randrange(t.numel())] = self.one(SPECIAL)
        return t.to(dtype)

    def laid(self, t: Tensor) -> Tensor:
        """The same values in another layout and place, which a kernel may take as they are."""
        shape, place = [*t.shape], None
        strides, at, dense = [0] * len(shape), 1, True
        order = [*reversed(range(len(shape)))]
        offset = 0
        if self.maybe(0.5):
            offset = self.random.randint(0, 5)
            if self.maybe(0.3):
                self.random.shuffle(order)
            dense = self.maybe(0.5)
        if self.place is not None and self.maybe(0.6):
            place = self.place
        for i in order:
            strides[i] = at
            at *= max(1, shape[i])
            if not dense:
                at += self.random.randint(0, 3)
        if self.maybe(0.05) and t.numel() and len(shape) > 1:  # expanded: all the same along a dimension
            i = self.random.randrange(len(shape))
            t, strides[i] = t.narrow(i, 0, 1).expand(shape), 0
        last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if t.numel() else -1
        span = last + 1 + (offset if t.numel() else 0)
        offset = span - last - 1
        buffer = torch.empty(span, dtype=t.dtype) if place is None else place.empty(span, t.dtype, self.maybe(0.7))
        buffer.fill_(float("nan") if t.is_floating_point() else 113 if t.dtype is not torch.bool else True)
        view = buffer.as_strided(shape, strides, offset)
        if t.numel():
            narrowed = [1 if stride == 0 else n for n, stride in zip(shape, strides, strict=True)]
            buffer.as_strided(narrowed, strides, offset).copy_(t[tuple(slice(n) for n in narrowed)])
        return view

    def tensor(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return self.laid(self.values(*shape, dtype=dtype))

    def integers(self, values: Any) -> Tensor:
        return self.laid(torch.tensor(values, dtype=torch.int64))
