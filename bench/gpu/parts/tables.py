"""Rows for peft_kernels/tuned that the other parts ask for, and where one of our ways overtakes another."""

from __future__ import annotations

from typing import Any

from .. import answers
from ..device import Device

LIMIT_S = 60


def rows(device: Device) -> list[dict[str, Any]]:
    return [row for part in answers.PARTS for row in device.rows_of(part).values()]


def titles(device: Device) -> list[str]:
    return [f"tables of {len(rows(device))} rows"]  # more rows, in a later call, are another answer


def row(title: str, device: Device) -> dict[str, Any]:
    measured = rows(device)
    overtaken = [answers.in_words(one) for one in answers.crossovers(measured)]
    return {**answers.proposed(measured, device.wrong), "overtaken": overtaken}
