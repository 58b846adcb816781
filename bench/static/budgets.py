"""Limits on the rows of the static report, from `budgets.json`.

A rule: `why`; `where`, the rows that it holds for, by field (a value, a list of values; launch options such as `BM` as
`config.BM`); `most`, fields that may not exceed a number; `is`, fields that must have a value (or one of a list).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .metrics import Row

FILE = Path(__file__).parent / "budgets.json"


@cache
def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(FILE.read_text())["rules"]
    return found


def value(row: Row, name: str) -> Any:
    if name.startswith("config."):
        return row.config.get(name.removeprefix("config."))
    return getattr(row, name)


def holds(rule: dict[str, Any], row: Row) -> bool:
    """Whether `rule` is about `row`."""
    return all(value(row, k) in (v if isinstance(v, list) else [v]) for k, v in rule["where"].items())


def check(rows: Sequence[Row]) -> list[str]:
    """A sentence for each limit that a row exceeds."""
    found = []
    for row in rows:
        what = f"{row.kernel} ({row.backend}, {row.arch}, {row.title})"
        for rule in rules():
            if not holds(rule, row):
                continue
            for name, most in rule.get("most", {}).items():
                have = value(row, name)
                if have is None or have > most:
                    text = "not known" if have is None else f"{have:.3g}"
                    found.append(f"{what}: {name} is {text}, the budget is {most:g}: {rule['why']}")
            for name, wanted in rule.get("is", {}).items():
                have = value(row, name)
                if have not in (wanted if isinstance(wanted, list) else [wanted]):
                    found.append(f"{what}: {name} is {have}, it must be {wanted}: {rule['why']}")
    return found
