"""Verdicts of the `gpu` tests: for each op, backend, direction, dtype and class of rows, by tests that called it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "verdicts.json"
CLASSES = ((1, 8), (9, 64), (65, 512), (513, 1 << 62))  # rows of x: the kernels' paths

ANY = "any"  # of an op whose first tensor is not x


def class_of(m: int) -> str:
    """The class of rows that m belongs to: "1-8", "9-64", "65-512" or "513-"."""
    low, high = next(c for c in CLASSES if c[0] <= max(1, m) <= c[1])
    return f"{low}-{high if high < 1 << 62 else ''}"


@dataclass
class Verdicts:
    """found: "op backend direction dtype rows" -> {"verdict": "wrong" | "passed" | ..., "why": text, ...}."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> Verdicts:
        """Of a run's folder; empty where its tests have not run."""
        try:
            return Verdicts(json.loads((folder / FILE).read_text()))
        except (OSError, ValueError):
            return Verdicts()

    def wrong(self, op: str, backend: str, direction: str, dtype: str, m: int) -> str | None:
        """Why a kernel was found wrong; None where it was not. Of an op that has no rows of x, m does not matter."""
        for one in ("forward", "backward") if direction == "step" else (direction,):
            for rows in (class_of(m), ANY):
                judged = self.found.get(f"{op} {backend} {one} {dtype} {rows}", {})
                if judged.get("verdict") == "wrong":
                    return str(judged["why"])
        return None
