"""rms_norm with a frozen weight beside torch's and transformers': bound by memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_kernels import rms_norm

from ..device import Device
from ..operands import no_grad
from ..rows import BY_WORTH, Call, Row, copies, gradient, normal

LIMIT_S = 60
OP = "rms_norm"
WIDTHS = (4096, 8192)
EPS = 1e-5


def titles(device: Device) -> list[str]:
    widths, counts = ((64,), (1, 16)) if device.small else (WIDTHS, BY_WORTH)
    return [f"{what} {n} M={m}" for m in counts for n in widths for what in ("forward", "step")]


def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' LlamaRMSNorm."""
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def in_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def row(title: str, device: Device) -> dict[str, Any]:
    what, width, rows = title.split(" ")
    n, m, trains = int(width), int(rows.removeprefix("M=")), what == "step"
    # read x, write y; read dy and x, write dx
    row = Row(device, OP, what, m, width, (12.0 if trains else 4.0) * m * n, (5 if trains else 2) * 2.0 * m * n)
    xs = [normal(device, m, n, seed=i).requires_grad_(trains) for i in range(copies(device, 4 * m * n, 16))]
    weight, dy = 1 + 0.1 * normal(device, n, seed=98), normal(device, m, n, seed=99)

    def all_of(norm: Any) -> list[Call]:
        if trains:
            return [gradient(lambda x=x: norm(x, weight, EPS), [x], dy) for x in xs]  # type: ignore[misc]
        return no_grad(lambda x: norm(x, weight, EPS), xs)

    row.ours(all_of(rms_norm))
    row.add("torch", all_of(in_torch))
    row.add("transformers", all_of(llama))
    return row.measure(None if trains else llama(xs[0][:256].float(), weight.float(), EPS))
