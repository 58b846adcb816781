"""DoRA: the forward with the norm at hand, a whole step with the norm computed anew, and the norm alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from peft_kernels import dora_linear, dora_linear_normed, dora_norm, use_backend

from ... import subjects
from ..device import Device
from ..operands import Layer, layer, no_grad
from ..rows import BY_WORTH, CHECKED, RANK, SCALING, SHAPES, Row, gradient, normal, place, titled

LIMIT_S = 90
OP = "dora_linear"


def titles(device: Device) -> list[str]:
    shapes = ((64, 128),) if device.small else SHAPES
    return [*(f"norm {k}x{n} M=0" for k, n in shapes), *titled(device, ("step", "forward"), BY_WORTH)]


def row(title: str, device: Device) -> dict[str, Any]:
    what, m, k, n = place(title)
    of = layer(device, n, k)
    return norm(device, of) if what == "norm" else product(device, of, m, what)


def norm(device: Device, of: Layer) -> dict[str, Any]:
    n, k, (a, b) = of.n, of.k, of.adapter
    row = Row(device, "dora_norm", "forward", 0, f"{k}x{n}", 2.0 * n * k * (RANK + 1), n * k * (0.5 + 1 / 64),
              {"weight": "nf4", "r": RANK})  # fmt: skip
    row.ours([partial(dora_norm, q, a, b, SCALING) for q in of.quants])
    row.add("dense W + sBA", no_grad(lambda w: torch.linalg.vector_norm(w + SCALING * (b @ a), dim=1), of.dense))
    row.eager([partial(dora_norm, q, a, b, SCALING) for q in of.quants])
    return row.measure(torch.linalg.vector_norm(of.exact + SCALING * (b @ a), dim=1))


def product(device: Device, of: Layer, m: int, what: str) -> dict[str, Any]:
    n, k = of.n, of.k
    trains, times = what == "step", 3 if what == "step" else 1
    x, dy = normal(device, m, k), normal(device, m, n, seed=4)
    low = RANK * (n + k)
    flops = 2.0 * m * (n * k + low) + (2.0 * m * (n * k + 2 * low) + 2.0 * n * k * RANK if trains else 0)
    row = Row(device, OP, what, m, f"{k}x{n}", flops, times * of.nbytes(m), {"weight": "nf4", "r": RANK})
    with use_backend("reference"):
        norms = dora_norm(of.quants[0], *of.adapter, SCALING)
    a, b = (t.clone().requires_grad_(trains) for t in of.adapter)
    magnitude, x = (norms * 1.1).requires_grad_(trains), x.requires_grad_(trains)
    exact = None
    if trains:
        calls = [gradient(partial(dora_linear_normed, x, q, a, b, magnitude, SCALING), (x, a, b, magnitude), dy)
                 for q in of.quants]  # fmt: skip
        row.optional("PEFT + bnb", "peft", lambda: [subjects.step_call(one, x.detach(), dy)
                                                   for one in peft_layers(of, trains)])  # fmt: skip
    else:
        exact = 1.1 * of.result(x)
        calls = no_grad(lambda q: dora_linear(x, q, a, b, magnitude, norms, SCALING), of.quants)
        row.base("dense F.linear", no_grad(lambda w: linear(x, w), of.dense))
        row.optional("PEFT + bnb", "peft", lambda: no_grad(lambda one: one(x), peft_layers(of, trains)))
        row.bases.add("PEFT + bnb")  # its magnitudes are the norms
    row.ours(calls)
    row.eager(calls)
    return row.measure(exact if exact is None else exact[:CHECKED])


def peft_layers(of: Layer, trains: bool) -> list[Any]:
    """PEFT's DoRA over bitsandbytes' layers, adapters on the device."""
    import peft

    made = [subjects.bnb_layer(q, torch.bfloat16) for q in of.quants[:4]]
    wrapped = subjects.with_adapter(peft, made, RANK, 0.0, trains, use_dora=True)
    return [one.to(of.device.kind) for one in wrapped]
