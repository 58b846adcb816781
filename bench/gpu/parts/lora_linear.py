"""lora_linear, forward and backward each alone: our backends, Triton with and without panels, cuBLAS on a dense weight,
bitsandbytes' product and its decoding before cuBLAS, and the reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from peft_kernels.ops.lora_linear import backward_op, forward_op

from ..device import Device
from ..operands import Layer, bnb_dense, bnb_product, layer, no_grad, plus_lora
from ..rows import CHECKED, RANK, SCALING, Row, normal, place, titled

LIMIT_S = 90
OP = "lora_linear"


def titles(device: Device) -> list[str]:
    return titled(device, ("forward", "backward"))


def row(title: str, device: Device) -> dict[str, Any]:
    what, m, k, n = place(title)
    return (forward if what == "forward" else backward)(device, layer(device, n, k), m)


def arguments(of: Layer, x: Tensor, weight: Any) -> tuple[Any, ...]:
    """Of the forward's operator."""
    return (x, *weight, of.n, *of.adapter, SCALING, None, 0.0, None)


def forward(device: Device, of: Layer, m: int) -> dict[str, Any]:
    n, k = of.n, of.k
    x = normal(device, m, k)
    row = Row(device, OP, "forward", m, f"{k}x{n}", 2.0 * m * (n * k + RANK * (n + k)), of.nbytes(m),
              {"weight": "nf4", "r": RANK})  # fmt: skip
    flat = [arguments(of, x, q.flatten()) for q in of.quants]
    row.ours([partial(forward_op, *args) for args in flat], panels=True)
    row.base("dense F.linear", [partial(linear, x, w) for w in of.dense])
    row.add("dense F.linear + LoRA", plus_lora(linear, x, of, of.dense))
    row.optional("bnb matmul_4bit + LoRA", "bitsandbytes", lambda: plus_lora(bnb_product, x, of, of.bnb))
    row.optional("bnb decode + F.linear + LoRA", "bitsandbytes",
                 lambda: plus_lora(lambda x, w: linear(x, bnb_dense(w)), x, of, of.bnb))  # fmt: skip
    row.eager([partial(forward_op, *args) for args in flat])
    return row.measure(of.result(x), forward_op.choose(flat[0]).name)


def gradients(dy: Tensor, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB in plain torch and x's dtype."""
    ds = SCALING * (dy @ b)
    return torch.addmm(dy @ w, ds, a), ds.t() @ x, SCALING * dy.t() @ (x @ a.t())


def backward(device: Device, of: Layer, m: int) -> dict[str, Any]:
    n, k = of.n, of.k
    x, dy = normal(device, m, k), normal(device, m, n, seed=4)
    a, b = of.adapter
    small = a.to(x.dtype), b.to(x.dtype)
    row = Row(device, OP, "backward", m, f"{k}x{n}", 2.0 * m * (n * k + 2 * RANK * (n + k)),
              of.nbytes(m) + 2.0 * m * k, {"weight": "nf4", "r": RANK})  # fmt: skip
    s = x.float() @ a.t()
    flat = [(dy, x, *q.flatten(), a, b, s, SCALING, 0.0, None, True, True) for q in of.quants]
    row.ours([partial(backward_op, *args) for args in flat], panels=True)
    row.base("dense dy @ W", no_grad(lambda w: dy @ w, of.dense))
    row.add("dense dy @ W + LoRA", no_grad(lambda w: gradients(dy, x, w, *small), of.dense))
    row.optional("bnb decode + dy @ W + LoRA", "bitsandbytes",
                 lambda: no_grad(lambda w: gradients(dy, x, bnb_dense(w), *small), of.bnb))  # fmt: skip
    row.eager([partial(backward_op, *args) for args in flat])
    some = dy[:CHECKED].float()
    return row.measure(some @ of.exact + SCALING * some @ b @ a, backward_op.choose(flat[0]).name)
