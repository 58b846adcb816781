"""Limits on the rows of the static report, from `budgets.json`.

A rule: `why`; `where`, the rows that it holds for, by field (a value, or a list of values; launch options, such as BM,
as `config.BM`); `most` and `least`, numbers for fields; `is`, what fields must be (a value, or a list of values). A
number that is not known exceeds every limit. `but`: exceptions to a rule, such as under one Triton: each a `why`, a
`where` and the limits that hold there instead; the first that fits counts.
"""

from __future__ import annotations

import json
import operator
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


def of(**known: str) -> list[dict[str, Any]]:
    """The rules that may hold for rows of which some fields are known: `of(arch="sm_90", triton="3.6.0")`."""
    return [rule for rule in rules() if all(v in listed(rule["where"].get(k, v)) for k, v in known.items())]


def value(row: Row, name: str) -> Any:
    if name.startswith("config."):
        return row.config.get(name.removeprefix("config."))
    return getattr(row, name)


def holds(rule: dict[str, Any], row: Row) -> bool:
    """True if `rule` is about `row`."""
    return all(value(row, k) in listed(v) for k, v in rule["where"].items())


def check(rows: Sequence[Row]) -> list[str]:
    """A sentence for each limit that a row exceeds."""
    found = []
    for row in rows:
        what = f"{row.kernel} ({row.backend}, {row.arch}, {row.title}, {_tile(row)})"
        for rule in rules():
            if not holds(rule, row):
                continue
            rule = next((other for other in rule.get("but", ()) if holds(other, row)), rule)
            for side, beyond in (("most", operator.gt), ("least", operator.lt)):
                for name, limit in rule.get(side, {}).items():
                    have = value(row, name)
                    if have is None or beyond(have, limit):
                        text = "not known" if have is None else f"{have:.3g}"
                        found.append(f"{what}: {name} is {text}, at {side} {limit:g}: {rule['why']}")
            for name, wanted in rule.get("is", {}).items():
                if value(row, name) not in listed(wanted):
                    found.append(f"{what}: {name} is {value(row, name)}, not {wanted}: {rule['why']}")
    return found


def unused(rows: Sequence[Row], some: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the rules `some` that are about none of `rows`: a limit that holds for nothing proves nothing."""
    return [rule for rule in some if not any(holds(rule, row) for row in rows)]


def listed(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _tile(row: Row) -> str:
    return "x".join(str(row.config[k]) for k in ("BM", "BN", "BC", "BK") if k in row.config)
