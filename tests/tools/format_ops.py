"""Operators as calls with a weight of any format, held to float64: for the tests of every backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import AdapterStack, Projection, QuantWeight, dequantize_4bit, use_backend
from peft_kernels.formats import FORMATS
from peft_kernels.testing import assert_no_worse

IN_GROUPS = sorted(name for name, known in FORMATS.items() if known.number > 2)
N, K, E = 40, 512, 2
Weight = QuantWeight | Tensor


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


A, B, BIAS = some(4, K, seed=1).abs(), some(N, 4, seed=2).abs(), some(N, seed=3)


def parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B, bias) where x is."""
    return A.to(x.device), B.to(x.device), BIAS.to(x.device)


def linear(x: Tensor, w: Weight) -> Tensor:
    a, b, bias = parts(x)
    return pk.lora_linear(x, w, a, b, 0.5, bias)


def stacked(x: Tensor, w: Weight) -> Tensor:
    a, b, _ = parts(x)
    dense = some(24, K, seed=9).abs().to(x)
    return torch.cat(pk.lora_linear_stacked(x, [Projection(w, a, b), Projection(dense), Projection(w)]), -1)


def multi(x: Tensor, w: Weight) -> Tensor:
    a, b, _ = parts(x)
    stack = AdapterStack.pack([(a, b, 0.5), (a[:2], b[:, :2], 1.0)])
    return pk.multi_lora_linear(x, w, stack, torch.arange(len(x), device=x.device) % 3 - 1)


def mixture(x: Tensor, w: Weight) -> Tensor:
    a, b, _ = parts(x)
    return pk.lora_mixture(x, w, [a, a], [b, b], some(len(x), 2).abs().to(x.device))


def grouped(x: Tensor, w: Weight) -> Tensor:
    a, b, _ = parts(x)
    offsets = torch.tensor([0, len(x) // 2, len(x)], device=x.device)
    return pk.grouped_linear(x, w, offsets, a.expand(E, 4, K), b[: N // E].expand(E, N // E, 4))


def dora(x: Tensor, w: Weight) -> Tensor:
    a, b, bias = parts(x)
    return pk.dora_linear(x, w, a, b, bias.abs() + 1, None, 0.5, bias, 0.2, torch.tensor([3], device=x.device))


def turned(x: Tensor, w: Weight) -> Tensor:
    blocks = torch.eye(32, device=x.device).expand(1, K // 32, 32, 32) * 0.9
    return pk.butterfly_linear(x, w, blocks, BIAS.to(x.device))


CALLS: dict[str, Callable[[Tensor, Weight], Tensor]] = {
    "lora_linear": linear,
    "lora_linear_stacked": stacked,
    "multi_lora_linear": multi,
    "lora_mixture": mixture,
    "dora_linear": dora,
    "butterfly_linear": turned,
    "grouped_linear": grouped,
}


def both(
    call: Callable[[Tensor, Weight], Tensor], x: Tensor, w: Weight, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """(y, dx); positive: of a dy without signs"""
    x = x.clone().requires_grad_()
    y = call(x, w)
    dy = some(*y.shape, seed=7).to(y)
    (dx,) = torch.autograd.grad(y, x, dy.abs() if positive else dy)
    return y.detach(), dx


def hold(call: Callable[[Tensor, Weight], Tensor], x: Tensor, w: QuantWeight, backend: str) -> None:
    """y and dx of a call on this backend, each no worse than the reference in x's dtype."""
    with use_backend("reference"):
        eager = both(call, x, w)
        dense = dequantize_4bit(w, torch.float64)
        if w.shape == (N, K) and call is grouped:
            dense = dense.view(E, N // E, K)
        exact = both(call, x.double(), dense)
        size = both(call, x.double().abs(), dense.abs(), True)
    with use_backend(backend):
        got = both(call, x, w)
    for actual, plain, want, magnitude in zip(got, eager, exact, size, strict=True):
        assert_no_worse(actual, plain, want, magnitude.abs() + want.abs())
