"""The activation of gate and up, bound by memory, and a whole MLP with LoRA as one call, beside its three layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from peft_kernels import Projection, gated, gated_mlp, lora_linear

from ..device import Device
from ..operands import bnb_product, layer, no_grad, plus_lora
from ..rows import BY_WORTH, RANK, SCALING, Call, Row, copies, gradient, normal

LIMIT_S = 120
OP = "gated"
SIZES = (4096, 14336)
SMALL = (64, 128)


def titles(device: Device) -> list[str]:
    counts = (1, 16) if device.small else BY_WORTH
    return [f"{what} {one} M={m}" for m in counts for one in ("mlp", "activation") for what in ("forward", "step")]


def row(title: str, device: Device) -> dict[str, Any]:
    what, one, rows = title.split(" ")
    return (mlp if one == "mlp" else activation)(device, int(rows.removeprefix("M=")), what)


def activation(device: Device, m: int, what: str) -> dict[str, Any]:
    f, trains = (SMALL if device.small else SIZES)[1], what == "step"
    # read gate and up, write h; read dh, gate and up, write dgate and dup
    row = Row(device, OP, what, m, f"activation {f}", (20.0 if trains else 5.0) * m * f,
              (8 if trains else 3) * 2.0 * m * f)  # fmt: skip
    pairs = [tuple(normal(device, m, f, seed=i).requires_grad_(trains) for i in (2 * j, 2 * j + 1))
             for j in range(copies(device, 4 * m * f, 16))]  # fmt: skip
    dh = normal(device, m, f, seed=99)

    def all_of(function: Any) -> list[Call]:
        if trains:
            return [gradient(lambda p=p: function(*p), p, dh) for p in pairs]  # type: ignore[misc]
        return no_grad(lambda p: function(*p), pairs)

    row.ours(all_of(gated))
    row.add("torch", all_of(lambda gate, up: silu(gate) * up))
    gate, up = (t.detach()[:256].float() for t in pairs[0])
    return row.measure(None if trains else silu(gate) * up)


def mlp(device: Device, m: int, what: str) -> dict[str, Any]:
    (k, f), trains = SMALL if device.small else SIZES, what == "step"
    wide, down = layer(device, f, k), layer(device, k, f)
    passes = 3 if trains else 1
    row = Row(device, OP, what, m, f"mlp {k}x{f}",
              (2 if trains else 1) * 6.0 * m * k * f + passes * 6.0 * m * RANK * (k + f),
              passes * (2 * wide.nbytes(m) + down.nbytes(m)), {"weight": "nf4", "r": RANK})  # fmt: skip
    x, dy = normal(device, m, k).requires_grad_(trains), normal(device, m, k, seed=4)
    a, b = (t.clone().requires_grad_(trains) for t in wide.adapter)
    c, d = (t.clone().requires_grad_(trains) for t in down.adapter)
    quants, count = wide.quants, copies(device, 3 * k * f / 2)
    models = [(Projection(quants[2 * i % len(quants)], a, b, SCALING),
               Projection(quants[(2 * i + 1) % len(quants)], a, b, SCALING),
               Projection(down.quants[i % len(down.quants)], c, d, SCALING)) for i in range(count)]  # fmt: skip

    def by_parts(x: Tensor, gate: Projection, up: Projection, down: Projection) -> Tensor:
        return lora_linear(silu(lora_linear(x, *gate)) * lora_linear(x, *up), *down)

    for suffix, function in (("", gated_mlp), ("by parts", by_parts)):
        if trains:
            leaves = (x, a, b, c, d)
            calls = [gradient(lambda f=function, p=p: f(x, *p), leaves, dy) for p in models]  # type: ignore[misc]
        else:
            calls = no_grad(lambda p, f=function: f(x, *p), models)
        row.ours(calls, suffix=suffix)
    if trains:
        return row.measure()
    half = list(zip(wide.dense, wide.dense[1:] + wide.dense[:1], down.dense * len(wide.dense), strict=False))
    row.base("dense F.linear", no_grad(lambda w: linear(silu(linear(x, w[0])) * linear(x, w[1]), w[2]), half))
    row.optional("bnb matmul_4bit + LoRA, by parts", "bitsandbytes", lambda: bnb_calls(x, wide, down))
    both = wide.result(x).to(x.dtype)
    return row.measure(down.result(silu(both) * both))


def bnb_calls(x: Tensor, wide: Any, down: Any) -> list[Call]:
    """bitsandbytes' three products, each with its adapter in plain torch."""

    def call(gate: Call, up: Call, last: Any) -> Call:
        def run() -> Tensor:
            with torch.no_grad():
                (ending,) = plus_lora(bnb_product, silu(gate()) * up(), down, [last])
                return ending()  # type: ignore[no-any-return]

        return run

    first = plus_lora(bnb_product, x, wide, wide.bnb)
    return [call(first[i], first[(i + 1) % len(first)], down.bnb[i % len(down.bnb)]) for i in range(len(first))]
