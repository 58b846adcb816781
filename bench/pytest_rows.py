"""A bench's rows as pytest-benchmark's parameters: the quick rows of an op, a parameter per candidate."""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import Any

import pytest

from .__main__ import parser
from .measure import Candidate

__all__ = ["Candidate", "benchmarked", "candidates"]


def candidates(module: ModuleType) -> list[Any]:
    """Every candidate of the quick rows of `module`, as a pytest parameter with a readable id."""
    args = parser().parse_args(["--op", module.OP, "--quick"])
    return [pytest.param(c, id=f"{row.title}-{c.name}".replace(" ", "-")) for row in module.rows(args)
            for c in row.candidates]  # fmt: skip


def benchmarked(candidate: Candidate, benchmark: Any) -> None:
    """Time one candidate, over all copies of its weights in turn."""
    calls = itertools.cycle(candidate.calls)
    benchmark(lambda: next(calls)())
