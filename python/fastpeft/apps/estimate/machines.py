"""Rates of this CPU, measured, and of GPUs, from their data sheets; the time of a step by them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..training.errors import UserError

CUDA_BYTES = 600_000_000  # a CUDA context and the libraries' workspaces; not measured here


@dataclass(frozen=True)
class Card:
    """A GPU. memory: bytes; gflops: dense products of 16 bits with float32 sums by its data sheet, 0 where unknown."""

    name: str
    memory: int
    gflops: float = 0.0


CARDS = {
    "t4": Card("T4", 16 * 10**9, 65e3),
    "l4": Card("L4", 24 * 10**9, 121e3),
    "a10": Card("A10", 24 * 10**9, 125e3),
    "rtx3090": Card("RTX 3090", 24 * 10**9, 71e3),
    "rtx4090": Card("RTX 4090", 24 * 10**9, 165e3),
    "a100-40gb": Card("A100 40 GB", 40 * 10**9, 312e3),
    "a100-80gb": Card("A100 80 GB", 80 * 10**9, 312e3),
    "h100": Card("H100", 80 * 10**9, 989e3),
}


def card(text: str, size: Callable[[str], int]) -> Card:
    """A GPU by its name in `CARDS`, or one of that much memory. size: reads "24GB". Raises UserError."""
    known = CARDS.get(text.lower().replace(" ", ""))
    if known is not None:
        return known
    try:
        return Card(f"a GPU of {text}", size(text))
    except UserError:
        raise UserError(f"gpu: expected a size as 24GB or one of {', '.join(CARDS)}, got {text!r}",
                        "give its memory") from None  # fmt: skip


@cache
def cpu_gflops(dtype: torch.dtype) -> float:
    """The best of several products of 1536 x 1536 on this machine now, in GFLOP/s."""
    a = torch.randn(1536, 1536).to(dtype)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - started) / 1e9)
    return best


def step_seconds(found: dict[str, Any], gpu: Card | None, dtype: torch.dtype) -> dict[str, Any]:
    """``at_least``: seconds of a step whose products run at the machine's peak (None where that is not known)."""
    rate = cpu_gflops(dtype) if gpu is None else gpu.gflops
    how = "the best product measured on this CPU" if gpu is None else "a lower bound by the data sheet"
    return {"at_least": found["step_flops"] / 1e9 / rate if rate else None, "gflops": rate, "how": how}
