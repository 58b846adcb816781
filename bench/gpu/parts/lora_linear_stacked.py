"""q, k, v and gate, up of a model as one call, beside the same layers one by one, cuBLAS on one wide dense weight and
bitsandbytes one by one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

from peft_kernels import Projection, lora_linear, lora_linear_stacked

from ..device import Device
from ..operands import bnb_product, layer, no_grad, plus_lora
from ..rows import BY_WORTH, RANK, SCALING, Row, copies, gradient, normal

LIMIT_S = 90
OP = "lora_linear_stacked"
STACKS = {"q,k,v": (4096, (4096, 1024, 1024)), "gate,up": (4096, (14336, 14336))}
SMALL = {"q,k,v": (64, (64, 32, 32))}


def titles(device: Device) -> list[str]:
    stacks, counts = (SMALL, (1, 16)) if device.small else (STACKS, BY_WORTH)
    return [f"{what} {name} M={m}" for m in counts for name in stacks for what in ("forward", "step")]


def row(title: str, device: Device) -> dict[str, Any]:
    what, name, rows = title.split(" ")
    m, trains = int(rows.removeprefix("M=")), what == "step"
    k, features = (SMALL if device.small else STACKS)[name]
    layers = [layer(device, n, k) for n in features]
    n = sum(features)
    passes = 3 if trains else 1
    low = RANK * (n + len(features) * k)
    row = Row(device, OP, what, m, f"{name} {k}x{n}", (2 if trains else 1) * 2.0 * m * n * k + passes * 2.0 * m * low,
              passes * sum(of.nbytes(m) for of in layers), {"weight": "nf4", "r": RANK})  # fmt: skip
    x, dys = normal(device, m, k).requires_grad_(trains), [normal(device, m, size, seed=4) for size in features]
    adapters = [tuple(t.clone().requires_grad_(trains) for t in of.adapter) for of in layers]
    # k and v are alike, and each copy of one is the other's: every layer of a copy is another piece of memory
    starts = [sum(of is before for before in layers[:i]) for i, of in enumerate(layers)]
    count = copies(device, n * k / 2)
    stacks = [[Projection(of.quants[(i + start) % len(of.quants)], a, b, SCALING)
               for of, start, (a, b) in zip(layers, starts, adapters, strict=True)] for i in range(count)]  # fmt: skip

    def one_by_one(parts: list[Projection]) -> list[torch.Tensor]:
        return [lora_linear(x, *p) for p in parts]

    for suffix, function in (("", lambda parts: lora_linear_stacked(x, parts)), ("one by one", one_by_one)):
        if trains:
            leaves = [x, *(t for pair in adapters for t in pair)]
            calls = [gradient(lambda f=function, p=p: f(p), leaves, dys) for p in stacks]  # type: ignore[misc]
        else:
            calls = no_grad(function, stacks)
        row.ours(calls, suffix=suffix)
    if trains:
        return row.measure()
    wide = torch.cat([of.dense[0] for of in layers])
    many = [wide.clone() for _ in range(copies(device, 2 * n * k))]
    row.base("dense F.linear", no_grad(lambda w: linear(x, w), many))
    row.optional("bnb matmul_4bit + LoRA, one by one", "bitsandbytes", lambda: [
        lambda calls=calls: [call() for call in calls]  # type: ignore[misc]
        for calls in zip(*(plus_lora(bnb_product, x, of, of.bnb) for of in layers), strict=False)])  # fmt: skip
    return row.measure(layers[0].result(x))
