"""The rotations of BOFT, OFT, HRA and RoAd, bound by memory but for large blocks, OFT's layer as one call beside two,
and the Cayley maps that make the blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from peft_kernels import QuantWeight, butterfly_linear, butterfly_rotate, cayley, lora_linear

from ...ops.rotations import KINDS
from ..device import Device
from ..operands import layer
from ..rows import BY_WORTH, Row, copies, gradient, normal

LIMIT_S = 60
WIDTHS = (4096, 14336)
CAYLEY = {"cayley b=4 exact": (4, None), "cayley b=32 terms=5": (32, 5)}
LAYER = "OFT b=32 layer"


def titles(device: Device) -> list[str]:
    widths, counts = ((64,), (1, 16)) if device.small else (WIDTHS, BY_WORTH)
    turns = [f"{what} {kind} d={d} M={m}"
             for m in counts for d in widths for kind in KINDS for what in ("forward", "step")]  # fmt: skip
    layers = [f"step {LAYER} d={widths[0]} M={m}" for m in counts]
    return [*(f"step {name} d={d} M=0" for name in CAYLEY for d in widths), *layers, *turns]


def row(title: str, device: Device) -> dict[str, Any]:
    head, rows = title.rsplit(" M=", 1)
    head, width = head.rsplit(" d=", 1)
    what, kind = head.split(" ", 1)
    m, d = int(rows), int(width)
    torch.manual_seed(0)
    if kind in CAYLEY:
        return maps(device, kind, d)
    if kind == LAYER:
        return oft_layer(device, m, d)
    op, make, function, _ = KINDS[kind]
    trains = what == "step"
    parts = [t.to(device.kind).requires_grad_(trains) for t in make(d)]
    # read x, write y; read x and dy, write dx
    row = Row(device, op.name, what, m, f"{kind} d={d}", 0.0, (5 if trains else 2) * 2.0 * m * d)
    xs = [normal(device, m, d, seed=i).requires_grad_(trains) for i in range(copies(device, 4 * m * d, 16))]
    dy = normal(device, m, d, seed=99)
    if trains:
        calls = [gradient(partial(function, x, *parts), [x, *parts], dy) for x in xs]
    else:
        calls = [partial(function, x, *parts) for x in xs]
    row.ours(calls)
    row.eager(calls)
    return row.measure()


def maps(device: Device, kind: str, d: int) -> dict[str, Any]:
    b, terms = CAYLEY[kind]
    q = normal(device, d // b, b, b, scale=0.05, dtype=torch.float32)
    q = (q - q.mT).requires_grad_()
    row = Row(device, "cayley", "step", 0, f"{kind} d={d}", 0.0, 5.0 * q.numel() * 4, dtype="f32")
    call = gradient(lambda: cayley(q, terms), [q], torch.ones_like(q))
    row.ours([call])
    row.eager([call])
    return row.measure()


def oft_layer(device: Device, m: int, d: int) -> dict[str, Any]:
    of = layer(device, d, d)
    q = normal(device, d // 32, 32, 32, scale=0.05, dtype=torch.float32)
    blocks = cayley(q - q.mT)[None].detach().requires_grad_()
    x, dy = normal(device, m, d).requires_grad_(), normal(device, m, d, seed=4)
    row = Row(device, "butterfly_linear", "step", m, f"{d}x{d}", 4.0 * m * d * d, 3 * of.nbytes(m), {"weight": "nf4"})

    def two_calls(w: QuantWeight) -> torch.Tensor:
        return lora_linear(butterfly_rotate(x, blocks), w)

    for suffix, function in (("", lambda w: butterfly_linear(x, w, blocks)), ("two calls", two_calls)):
        row.ours([gradient(partial(function, w), [x, blocks], dy) for w in of.quants], suffix=suffix)
    return row.measure()
