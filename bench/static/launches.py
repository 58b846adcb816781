"""The work of a recorded Triton launch: its products, its bytes, its tiles. Read from the launch's own arguments."""

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
    flat = [t for v in arguments.values() for t in _all(v)]
    seen = {id(t): t for t in flat if isinstance(t, Tensor)}
    return float(sum(t.numel() * t.element_size() for t in seen.values()))


def _all(value: Any) -> tuple[Any, ...]:
    """A launch of a stack has a tuple where one of a single layer has a value."""
    return value if isinstance(value, tuple) else (value,)


def options(launch: Compiled) -> dict[str, Any]:
    """The launch's constants, those of a stack whose layers are alike as those of one layer."""
    return {k: v[0] if isinstance(v, tuple) and len(set(v)) == 1 else v for k, v in launch.options.items()}


def work(launch: Compiled) -> Work:
    """`Work` of a launch, by the names of its arguments and constants; see `peft_kernels/ops/*/triton_kernels.py`."""
    a, o = launch.arguments, options(launch)
    blocks = math.prod(launch.grid)
    first = next(t for t in a.values() if isinstance(t, Tensor))
    name = launch.name.removeprefix("stacked_").removeprefix("multi_")
    size = first.element_size()
    common: dict[str, Any] = {"bytes": nbytes(a), "blocks": blocks, "wide": False}
    products: dict[str, Any] = {**common, "wide": size == 2}
    decodes = o.get("MODE", 0) != 0
    if "BY_ROWS" in o:  # products of groups of rows, each with its own weight
        m, d, columns, bn, bk = first.shape[0], a["D"], a["C"], o["BN"], o["BK"]
        return Work(weights=bn * bk if decodes else 0, tile=(o["BM"], bn, bk), fmas=m * columns * (d + a["r"]),
                    passes=_cdiv(d, bk), loop_bytes=bn * bk * (0.5 if decodes else size) + o["BM"] * bk * size,
                    **products)  # fmt: skip
    if "MODE" in o and "BM" in o:  # a product with a weight
        m, k, ns, rs = a["M"], a["K"], _all(a["N"]), _all(a["r"])
        n = sum(ns)
        bm, bn, bk = o["BM"], o["BN"], o["BK"]
        forward = name.startswith("forward")
        sums, step = (k, bk) if forward else (n, bn)
        low = sum(m * r * (features if forward else k) for features, r in zip(ns, rs, strict=True))
        scales = bn * bk / o["BLOCKSIZE"] * (1 if o["NESTED"] else 4)
        tile = bn * bk / 2 + scales if decodes else bn * bk * size
        started = a["steps"] > 0
        turn = max(16, o["TURN"]) if o.get("TURN") else 0  # of x's tile by its blocks, two addends each, beside W's
        return Work(
            weights=bn * bk if decodes else 0, tile=None if turn else (bm, bn, bk),
            fmas=(m * n * k if started else 0) + low + 2 * m * k * turn * _cdiv(n, bn),
            passes=min(a["steps"], _cdiv(sums, step)),
            loop_bytes=tile + bm * step * size, **products,
        )  # fmt: skip
    if name.startswith("norm") and "ADAPTER" in o:  # of the rows of a weight
        weights = o["BN"] * o["BK"] if decodes else 0
        passes = min(a["steps"], _cdiv(a["K"], o["BK"]))
        common["wide"] = o["ADAPTER"]  # three products of TF32 are one of float32
        return Work(weights=weights, passes=passes, fmas=3 * a["N"] * a["K"] * a["r"], **common)
    if "MODE" in o:  # a panel of a weight, decoded
        return Work(weights=o["BN"] * o["BK"] if decodes else 0, straight=True, passes=1, **common)
    if name.startswith("dequantize"):
        return Work(weights=2 * o["BYTES"], straight=True, passes=1, **common)
    if name.startswith("project"):
        return Work(fmas=a["M"] * a["K"] * a["r"], passes=min(a["steps"], _cdiv(a["K"], o["BK"])), **products)
    if name.startswith("shrink"):
        fmas = a["M"] * a["K"] * a["r"] * o["COUNT"]
        return Work(fmas=fmas, passes=min(a["steps"], _cdiv(a["K"], o["BK"])), **products)
    if name.startswith("expand"):
        return Work(fmas=a["M"] * sum(_all(a["widths"])) * a["r"], passes=_cdiv(a["r"], o["BR"]), **products)
    if name.startswith("outer"):
        fmas = a["M"] * a["C"] * a["r"] * (2 if o["WITH_DS"] else 1)
        passes = _cdiv(a["M"], o["BM"])  # of multi_lora_linear, over the groups of rows and their parts
        return Work(fmas=fmas, passes=min(a["steps"], passes) if "steps" in a else passes / launch.grid[2], **products)
    if "BD" in o:  # attention over half of the square of T: products of each pass
        each = {"forward_kernel": 2, "queries_kernel": 3, "keys_kernel": 4}[name]
        pairs = first.shape[0] * a["H"] * a["T"] * a["S"] * (0.5 if o["CAUSAL"] else 1)
        return Work(fmas=each * pairs * a["D"], **products)
    if "SEVERAL" in o:  # blocks of features, each multiplied by its own
        return Work(fmas=a["M"] * a["d"] * o["SIZE"], **products)
    if name in ("update_kernel", "gradient_kernel"):  # reflections
        x = a["p_x"]
        fmas = a["M"] * a["d"] * a["r"] * (2 if name == "update_kernel" else 1)
        return Work(fmas=fmas, **{**common, "wide": x.element_size() == 2})
    return Work(**common)
