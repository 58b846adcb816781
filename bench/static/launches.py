"""What a recorded Triton launch does: its products, its bytes, its tiles. Read from the launch's own arguments."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from peft_kernels.triton_lib.host import Compiled

from .metrics import Work


def _cdiv(a: float, b: float) -> int:
    return math.ceil(a / b)


def nbytes(arguments: dict[str, Any]) -> float:
    """Every tensor of the launch once. Pointers that a kernel does not use repeat one that it does."""
    seen = {id(t): t for t in arguments.values() if isinstance(t, Tensor)}
    return float(sum(t.numel() * t.element_size() for t in seen.values()))


def work(launch: Compiled) -> Work:
    """`Work` of a launch, by the names of its arguments and constants; see `peft_kernels/ops/*/triton_kernels.py`."""
    a, o = launch.arguments, launch.options
    blocks = math.prod(launch.grid)
    first = next(t for t in a.values() if isinstance(t, Tensor))
    size = first.element_size()
    common: dict[str, Any] = {"bytes": nbytes(a), "blocks": blocks, "wide": False}
    products: dict[str, Any] = {**common, "wide": size == 2}
    decodes = o.get("MODE", 0) != 0
    if "MODE" in o and "BM" in o:  # a product with a weight
        m, n, k, r = (a[name] for name in ("M", "N", "K", "r"))
        bm, bn, bk = o["BM"], o["BN"], o["BK"]
        sums, step, columns = (k, bk, n) if launch.name.startswith("forward") else (n, bn, k)
        scales = bn * bk / o["BLOCKSIZE"] * (1 if o["NESTED"] else 4)
        tile = bn * bk / 2 + scales if decodes else bn * bk * size
        started = a["steps"] > 0
        return Work(
            weights=bn * bk if decodes else 0, tile=(bm, bn, bk),
            fmas=(m * n * k if started else 0) + m * r * columns, passes=min(a["steps"], _cdiv(sums, step)),
            loop_bytes=tile + bm * step * size, **products,
        )  # fmt: skip
    if "MODE" in o:  # a panel of a weight, decoded
        return Work(weights=o["BN"] * o["BK"] if decodes else 0, straight=True, passes=1, **common)
    if launch.name.startswith("dequantize"):
        return Work(weights=2 * o["BYTES"], straight=True, passes=1, **common)
    if launch.name.startswith("project"):
        return Work(fmas=a["M"] * a["K"] * a["r"], passes=min(a["steps"], _cdiv(a["K"], o["BK"])), **products)
    if launch.name.startswith("outer"):
        fmas = a["M"] * a["C"] * a["r"] * (2 if o["WITH_DS"] else 1)
        return Work(fmas=fmas, passes=min(a["steps"], _cdiv(a["M"], o["BM"])), **products)
    return Work(**common)
