"""Rounding to the 4-bit tables and to the nested 8-bit map, defined once for every backend.

A scaled value goes to the nearest table entry; the midpoints between neighbours are computed in float32 and a value on
a midpoint goes down. FP4 holds zero twice (codes 0 and 8): (-0.0026, 0] becomes code 0 and (0, 0.0026] code 8. A NaN
goes to the largest entry. The nested map rounds on a grid of 65536 points over [-1, 1] (bitsandbytes' CPU code does,
and its bytes are the format), so a value within 1.6e-5 of a midpoint may take the farther of the two; a NaN goes to
code 0.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...checks import moved
from ...formats import TABLES

GRID = 65536


def order(quant_type: int) -> tuple[int, ...]:
    """The 16 codes by ascending value; of two equal values the lower code comes first."""
    values = TABLES[quant_type]
    return tuple(sorted(range(16), key=lambda code: (values[code], code)))


@lru_cache
def midpoints(quant_type: int) -> tuple[float, ...]:
    """The 15 float32 midpoints between neighbouring values, ascending."""
    values = torch.tensor([TABLES[quant_type][code] for code in order(quant_type)], dtype=torch.float32)
    return tuple(((values[:-1] + values[1:]) / 2).tolist())


def on_device(name: str, quant_type: int, device: torch.device) -> Tensor:
    """`midpoints`, `order`, `nested_map` or `nested_rounding` as a tensor on `device` (do not write to it). Copied
    there for each call: a weight is quantised once, and an operator keeps nothing on a device."""
    return moved("quantize_4bit", f"{name} of codes", _on_host(name, quant_type), device)


@lru_cache
def _on_host(name: str, quant_type: int) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        if name == "midpoints":
            return torch.tensor(midpoints(quant_type), dtype=torch.float32)
        if name == "order":
            return torch.tensor(order(quant_type), dtype=torch.uint8)
        return {"nested_map": nested_map, "nested_rounding": nested_rounding}[name]()


def nested_map() -> Tensor:
    """The signed dynamic 8-bit map (arXiv 1511.04561) as bitsandbytes stores it: float32 [256], ascending.

    Decade i of seven holds 2^i values, the middles of equal parts of [0.1, 1] times 10^(i-6), with both signs; to
    those come 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def nested_rounding() -> Tensor:
    """uint8 [65536]: the code of grid point i, which stands for -1 + 2 i / 65535 (computed in float32)."""
    values = nested_map()
    grid = -1.0 + 2.0 * torch.arange(GRID, dtype=torch.float32) / (GRID - 1)
    return torch.bucketize(grid, 0.5 * (values[:-1] + values[1:])).to(torch.uint8)
