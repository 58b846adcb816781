"""Mixed batches: each row of x its own of 8 or 64 adapters, over one NF4 weight; PEFT's way of it where it is
installed."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from peft_kernels import AdapterStack, multi_lora_linear

from ...ops.multi_lora_linear import adapter_stack, peft_calls
from ..device import Device
from ..operands import Layer, layer, no_grad
from ..rows import CHECKED, RANK, Row, gradient, normal, place, titled

LIMIT_S = 90
OP = "multi_lora_linear"
ADAPTERS = (8, 64)
MOST_PEFT = 512  # rows that PEFT is asked to mix: it goes through the adapters in Python, and large sums are no news


def titles(device: Device) -> list[str]:
    return titled(device, ("forward", "step"))


def row(title: str, device: Device) -> dict[str, Any]:
    what, m, k, n = place(title)
    of, trains = layer(device, n, k), what == "step"
    x, dy = normal(device, m, k), normal(device, m, n, seed=4)
    count = max(min(ADAPTERS[-1], m), 1)
    passes = 3 if trains else 1
    moved = passes * (of.nbytes(m) + 2.0 * count * RANK * (n + k))
    flops = (2 if trains else 1) * 2.0 * m * n * k + passes * 2.0 * m * RANK * (n + k)
    row = Row(device, OP, what, m, f"{k}x{n}", flops, moved, {"weight": "nf4", "r": RANK, "adapters": count})
    some = of.quants[:8]
    stacks = [adapter_stack(n, k, count, torch.bfloat16, device.kind) for _ in some]
    index = torch.arange(m, device=device.kind) % count
    if trains:
        x.requires_grad_()
        for s in stacks:
            s.a.requires_grad_()
            s.b.requires_grad_()
        calls = [gradient(lambda q=q, s=s: multi_lora_linear(x, q, s, index), (x, s.a, s.b), dy)  # type: ignore[misc]
                 for q, s in zip(some, stacks, strict=True)]  # fmt: skip
    else:
        calls = no_grad(lambda both: multi_lora_linear(x, both[0], both[1], index),
                        list(zip(some, stacks, strict=True)))  # fmt: skip
        row.base("dense F.linear", no_grad(lambda w: linear(x, w), of.dense))
        row.optional("PEFT + bnb", "bitsandbytes", lambda: mixed_by_peft(of, x, index, count))
        row.bases.add("PEFT + bnb")  # its adapters are others
    row.ours(calls)
    row.eager(calls)
    return row.measure(None if trains else exact(of, x, stacks[0], index))


def exact(of: Layer, x: torch.Tensor, stack: AdapterStack, index: torch.Tensor) -> torch.Tensor:
    """The first rows of the result, in float32, an adapter at a time."""
    x, index = x[:CHECKED].float(), index[:CHECKED]
    y = x @ of.exact.t()
    for i in index.unique().tolist():
        rows, mine = index == i, slice(i * RANK, (i + 1) * RANK)
        y[rows] += stack.scaling[i] * (x[rows] @ stack.a[mine].float().t()) @ stack.b[mine].float()
    return y


def mixed_by_peft(of: Layer, x: torch.Tensor, index: torch.Tensor, count: int) -> Any:
    if len(x) > MOST_PEFT:
        raise ValueError(f"left out from {MOST_PEFT + 1} rows on")
    return peft_calls(list(of.quants[:2]), x, index, count)
