"""Ceilings that this GPU reaches: copying memory, reading it, and cuBLAS' largest product. Rows give their shares of
these; the maker's data sheet stands beside."""

from __future__ import annotations

from typing import Any

import torch

from ...measure import Candidate
from ..clock import measure
from ..device import Device
from ..rows import data_sheet, normal
from .provenance import smi

LIMIT_S = 90
BYTES = 1 << 30  # twenty times the largest L2 cache
SIZE = 8192


def titles(device: Device) -> list[str]:
    return ["copy", "gemm", "read", "clocks under load"]


def row(title: str, device: Device) -> dict[str, Any]:
    if title == "clocks under load":
        return clocks(device)
    return product(device) if title == "gemm" else memory(title, device)


def _seconds(device: Device, name: str, call: Any) -> dict[str, Any]:
    """The fastest sample of the eager clock: of calls this long Python is hidden."""
    found = measure([Candidate(name, [call])], device, rounds=15)
    if found.failed:
        return {"absent": found.failed[name]}
    return {"seconds": found.eager[name].at(0.0), "spread": found.eager[name].as_dict()}


def memory(title: str, device: Device) -> dict[str, Any]:
    """GB/s of a copy, counting what is read and what is written; or of reading for a sum."""
    data = torch.ones((1 << 20 if device.small else BYTES) // 4, dtype=torch.float32, device=device.kind)
    other = torch.empty_like(data) if title == "copy" else data
    found = _seconds(device, title, (lambda: other.copy_(data)) if title == "copy" else data.sum)
    sheet = data_sheet(device.name)
    if "seconds" in found:
        found["gbs"] = data.nbytes * (2 if title == "copy" else 1) / found["seconds"] / 1e9
    return {**found, "nbytes": data.nbytes, "data_sheet_gbs": None if sheet is None else sheet.gbs}


def _operands(device: Device) -> tuple[torch.Tensor, torch.Tensor]:
    size = 128 if device.small else SIZE
    return normal(device, size, size), normal(device, size, size, seed=4)


def product(device: Device) -> dict[str, Any]:
    """TFLOP/s of a square product in bfloat16, of normally distributed numbers: zeros would draw less power."""
    a, b = _operands(device)
    found = _seconds(device, "gemm", lambda: a @ b.t())
    sheet = data_sheet(device.name)
    if "seconds" in found:
        found["tflops"] = 2 * len(a) ** 3 / found["seconds"] / 1e12
    return {**found, "size": len(a), "data_sheet_tflops": None if sheet is None else sheet.tflops}


def bounds(device: Device) -> dict[str, Any]:
    """Bounds that `python -m bench --device cuda` gives shares of: as `bench.machine.bounds`, of this GPU. Products of
    float32 have none here, and rows of them a share of bandwidth alone."""
    copied, multiplied = memory("copy", device), product(device)
    found = {"gbs": copied.get("gbs"), "gflops_bf16": 1e3 * multiplied["tflops"] if "tflops" in multiplied else None}
    return {k: v for k, v in found.items() if v is not None} | {"how": "a copy, and the vendor's largest product"}


def clocks(device: Device) -> dict[str, Any]:
    """Clocks and power by nvidia-smi while about two seconds of products are queued."""
    a, b = _operands(device)
    for _ in range(1 if device.small else 1500):
        a @ b.t()
    found = smi(device)
    device.synchronize()
    return found
