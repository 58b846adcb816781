"""Makers of calls: for each operator of the registry, arguments that it serves, out of a `Draw`.

`MAKERS` names every operator (tests/fuzz/test_fuzz.py); a new one is a new maker, and is then fuzzed as all are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft_kernels import dispatch

from .draws import Draw

Arguments = list[Any]
MAKERS: dict[str, Callable[[Draw], Arguments]] = {}
# Whose results are bits: equal to the reference's, whatever the values are.
EXACT = {"quantize_4bit", "dequantize_4bit"}


def maker(name: str) -> Callable[[Callable[[Draw], Arguments]], Callable[[Draw], Arguments]]:
    def keep(make: Callable[[Draw], Arguments]) -> Callable[[Draw], Arguments]:
        MAKERS[name] = make
        return make

    return keep


def missing() -> list[str]:
    """Operators without a maker."""
    return sorted(set(dispatch.ops()) - set(MAKERS))
