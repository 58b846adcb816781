"""A mixture of eight adapters over one NF4 weight: every row of x weighs all of them, or two that its sequence has
chosen; PEFT's X-LoRA layer where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_kernels import lora_linear, lora_mixture

from ...ops.lora_mixture import ADAPTERS, TOKENS, TOP, Layer, peft_calls
from .. import operands
from ..device import Device
from ..operands import no_grad
from ..rows import CHECKED, RANK, SCALING, Call, Row, gradient, normal, place, titled

LIMIT_S = 90
OP = "lora_mixture"
CHOICES = (512, 2048)  # rows of x, of several sequences, that choose


def titles(device: Device) -> list[str]:
    return titled(device, ("forward", "step")) + titled(device, ("top forward", "top step"), CHOICES)


def row(title: str, device: Device) -> dict[str, Any]:
    what, m, k, n = place(title)
    chosen, trains = what.startswith("top "), what.endswith("step")
    of, passes, count = operands.layer(device, n, k), 3 if trains else 1, TOP if chosen else ADAPTERS
    low = RANK * (n + k)
    row = Row(device, OP, "step" if trains else "forward", m, f"{k}x{n}{f' {TOP} of {ADAPTERS}' if chosen else ''}",
              (2 if trains else 1) * 2.0 * m * n * k + passes * 2.0 * m * count * low,
              passes * (of.nbytes(m) + 2.0 * ADAPTERS * low),
              {"weight": "nf4", "r": RANK, "adapters": ADAPTERS, "weights_of_zero": chosen})  # fmt: skip
    x, dy = normal(device, m, k).requires_grad_(trains), normal(device, m, n, seed=4)
    mix = weights(device, m, chosen).requires_grad_(trains)
    layers = [Layer(q, k, n, torch.bfloat16, device.kind) for q in of.quants[:8]]
    ours = [(layer.w, *(t.requires_grad_(trains) for t in layer.joined())) for layer in layers]

    def mixed(w: Any, a: Tensor, b: Tensor) -> Tensor:
        return lora_mixture(x, w, a, b.transpose(0, 1), mix, SCALING, masked=chosen)

    if trains:
        calls = [gradient(lambda one=one: mixed(*one), (x, mix, *one[1:]), dy) for one in ours]  # type: ignore[misc]
        row.optional("PEFT + bnb", "bitsandbytes", lambda: by_peft(layers, x, dy, mix))
    else:
        calls = no_grad(lambda one: mixed(*one), ours)
        row.base("dense F.linear", no_grad(lambda w: linear(x, w), of.dense))
        row.base("lora_linear of one adapter", no_grad(lambda f: lora_linear(x, f.w, f.a[0], f.b[0], SCALING), layers))
        row.optional("PEFT + bnb", "bitsandbytes", lambda: by_peft(layers, x, None, mix))
    row.ours(calls, panels=True)
    row.eager(calls)
    return row.measure(None if trains else exact(of, x, ours[0][1], ours[0][2], mix))


def weights(device: Device, m: int, chosen: bool) -> Tensor:
    """float32 [m, ADAPTERS]; chosen: all but TOP of them zero, which are others in each sequence of TOKENS rows."""
    mix = normal(device, m, ADAPTERS, seed=5, dtype=torch.float32)
    if not chosen:
        return mix.softmax(-1)
    best = mix[::TOKENS].topk(TOP).indices.repeat_interleave(TOKENS, 0)[:m]
    return torch.zeros_like(mix).scatter(1, best, 1 / TOP)


def by_peft(layers: list[Layer], x: Tensor, dy: Tensor | None, mix: Tensor) -> list[Call]:
    """PEFT's layer, whose batch is a row here."""
    calls = peft_calls(layers[:2], x[None], None if dy is None else dy[None], mix[None])
    return [lambda call=call: call()[0] for call in calls]  # type: ignore[misc]


def exact(of: operands.Layer, x: Tensor, a: Tensor, b: Tensor, mix: Tensor) -> Tensor:
    """The first rows of the result, in float32, an adapter at a time. a: [n, r, K]. b: [N, n, r]."""
    x, mix = x[:CHECKED].float(), SCALING * mix[:CHECKED]
    y = x @ of.exact.t()
    for i in range(ADAPTERS):
        y += mix[:, i : i + 1] * (x @ a[i].float().t()) @ b[:, i].float().t()
    return y
