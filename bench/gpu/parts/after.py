"""The device at the end: clocks, power and temperature, beside those of the beginning."""

from __future__ import annotations

from typing import Any

from ..device import Device
from .provenance import smi

LIMIT_S = 60


def titles(device: Device) -> list[str]:
    return ["gpu after"]


def row(title: str, device: Device) -> dict[str, Any]:
    return smi(device)
