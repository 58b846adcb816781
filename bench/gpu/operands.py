"""Weights and adapters of a shape, made once a process and on the device: no row waits for them again.

Copies hold the same numbers in memory of their own (see bench/measure.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, dequantize_4bit, quantize_4bit, use_backend

from .. import subjects
from .device import Device
from .rows import CHECKED, RANK, SCALING, Call, copies, normal


@dataclass
class Layer:
    """A linear layer [n, k] with NF4 weights of double quantisation and a float32 adapter, as QLoRA has it."""

    device: Device
    n: int
    k: int

    @cached_property
    def exact(self) -> Tensor:
        """The weight, float32, as the codes have it."""
        with use_backend("reference"):
            return dequantize_4bit(self.quants[0], torch.float32)

    @cached_property
    def quants(self) -> list[QuantWeight]:
        # quantised by plain torch: what a row is measured on does not rest on what is measured
        with use_backend("reference"):
            q = quantize_4bit(normal(self.device, self.n, self.k, seed=0, scale=0.02), "nf4", nested=True)

        def own(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.clone()

        return [replace(q, packed=q.packed.clone(), absmax=q.absmax.clone(), nested_absmax=own(q.nested_absmax))
                for _ in range(copies(self.device, self.n * self.k / 2))]  # fmt: skip

    @cached_property
    def dense(self) -> list[Tensor]:
        w = self.exact.to(torch.bfloat16)
        return [w.clone() for _ in range(copies(self.device, 2 * self.n * self.k))]

    @cached_property
    def bnb(self) -> list[nn.Module]:
        """bitsandbytes' layers over the same bytes."""
        return [subjects.bnb_layer(q, torch.bfloat16) for q in self.quants]

    @cached_property
    def adapter(self) -> tuple[Tensor, Tensor]:
        """A [r, K] and B [N, r], float32 as PEFT keeps them."""
        a, b = normal(self.device, RANK, self.k, seed=1, scale=0.02), normal(self.device, self.n, RANK, seed=2)
        return a.float(), b.float() * 0.02

    def low(self, x: Tensor) -> Tensor:
        """scaling x A^T B^T by plain torch in x's dtype."""
        a, b = self.adapter
        return SCALING * (x @ a.to(x.dtype).t()) @ b.to(x.dtype).t()

    def result(self, x: Tensor) -> Tensor:
        """The first rows of y, in float32."""
        x = x[:CHECKED].float()
        return x @ self.exact.t() + self.low(x)

    def nbytes(self, m: int, passes: int = 1) -> float:
        """Codes, scales, x and y; passes: how often rows of x and of y are read or written in bfloat16."""
        return self.n * self.k * (0.5 + 1 / 64) + passes * 2.0 * m * (self.n + self.k)


_layers: dict[tuple[int, int], Layer] = {}


def layer(device: Device, n: int, k: int) -> Layer:
    """The layer of a shape on the process's device."""
    found = _layers.get((n, k))
    if found is None or found.device is not device:
        found = _layers[n, k] = Layer(device, n, k)
    return found


def plus_lora(linear: Callable[[Tensor, Any], Tensor], x: Tensor, of: Layer, weights: Sequence[Any]) -> list[Call]:
    """A product of others, and the adapter's two in plain torch and x's dtype: what their users run."""
    a, b = (t.to(x.dtype) for t in of.adapter)

    def call(w: Any) -> Call:
        def run() -> Tensor:
            with torch.no_grad():
                return torch.addmm(linear(x, w), x @ a.t(), b.t(), alpha=SCALING)

        return run

    return [call(w) for w in weights]


def no_grad(function: Callable[[Any], Any], each: Sequence[Any]) -> list[Call]:
    """A call of `function` for each, which records no gradients."""

    def call(one: Any) -> Call:
        def run() -> Any:
            with torch.no_grad():
                return function(one)

        return run

    return [call(one) for one in each]


def bnb_product(x: Tensor, module: Any) -> Tensor:
    """bitsandbytes' own 4-bit product: fused for one row, decoding for more."""
    import bitsandbytes as bnb

    return bnb.matmul_4bit(x, module.weight.data.t(), quant_state=module.weight.quant_state)  # type: ignore[no-any-return]


def bnb_dense(module: Any) -> Tensor:
    """W [N, K] decoded by bitsandbytes."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[no-any-return]
