"""lora_linear by Triton's fused kernels and by the vendor's product over decoded panels, both forced, around the rows
where they cross: `from_M` of the tuned tables comes from these."""

from __future__ import annotations

from functools import partial
from typing import Any

from peft_kernels.ops.lora_linear import backward_op, forward_op

from ..device import Device
from ..operands import layer
from ..rows import CHECKED, RANK, SCALING, Row, normal, place, titled

LIMIT_S = 60
NF4 = (512, 1024, 2048, 768, 1536, 256, 4096, 384)
DENSE = (256, 128, 512, 64, 1024)


def titles(device: Device) -> list[str]:
    return [*titled(device, ("forward nf4", "backward nf4"), NF4), *titled(device, ("forward dense",), DENSE)]


def row(title: str, device: Device) -> dict[str, Any]:
    what, m, k, n = place(title)
    direction, weight = what.split()
    of = layer(device, n, k)
    x, (a, b) = normal(device, m, k), of.adapter
    nbytes = of.nbytes(m) if weight == "nf4" else 2.0 * (n * k + m * (n + k))
    shape = f"{k}x{n}" if weight == "nf4" else f"{k}x{n} dense"
    row = Row(device, "lora_linear", direction, m, shape, 2.0 * m * (n * k + RANK * (n + k)), nbytes,
              {"weight": weight, "r": RANK})  # fmt: skip
    weights = [q.flatten() for q in of.quants] if weight == "nf4" else [(w, *(None,) * 4, 0, 64, 256) for w in of.dense]
    if direction == "forward":
        row.ours([partial(forward_op, x, *w, n, a, b, SCALING, None, 0.0, None) for w in weights], panels=True)
        return row.measure(of.result(x))
    dy, s = normal(device, m, n, seed=4), x.float() @ a.t()
    row.ours([partial(backward_op, dy, x, *w, a, b, s, SCALING, 0.0, None, True, True) for w in weights], panels=True)
    some = dy[:CHECKED].float()
    return row.measure(some @ of.exact + SCALING * some @ b @ a)
