"""dequantize_4bit and quantize_4bit of a whole weight, bound by memory, beside bitsandbytes'."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from peft_kernels import dequantize_4bit, quantize_4bit

from ..device import Device
from ..operands import bnb_dense, layer
from ..rows import SHAPES, Row, copies, normal

LIMIT_S = 60


def titles(device: Device) -> list[str]:
    shapes = ((64, 128),) if device.small else SHAPES
    return [f"{what} {k}x{n}" for what in ("dequantize_4bit", "quantize_4bit") for k, n in shapes]


def row(title: str, device: Device) -> dict[str, Any]:
    op, shape = title.split(" ")
    k, n = (int(v) for v in shape.split("x"))
    row = Row(device, op, "forward", 0, shape, 0.0, n * k * (2.5 + 1 / 64), {"weight": "nf4, double quantisation"})
    of = layer(device, n, k)
    if op == "dequantize_4bit":
        row.ours([partial(dequantize_4bit, q, torch.bfloat16) for q in of.quants])
        row.optional("bnb dequantize_4bit", "bitsandbytes", lambda: [partial(bnb_dense, one) for one in of.bnb])
        row.eager([partial(dequantize_4bit, q, torch.bfloat16) for q in of.quants[:2]])
        return row.measure(of.exact[:256])
    dense = [normal(device, n, k, scale=0.02, seed=i) for i in range(copies(device, 2 * n * k))]
    row.ours([partial(quantize_4bit, w, "nf4", nested=True) for w in dense])
    row.optional("bnb quantize_4bit", "bitsandbytes", lambda: [partial(bnb_quantize, w) for w in dense])
    row.eager([partial(quantize_4bit, w, "nf4", nested=True) for w in dense])
    return row.measure()


def bnb_quantize(w: torch.Tensor) -> Any:
    import bitsandbytes.functional as bnb

    return bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
