"""A child process of the fuzzer: case after case, each announced before it runs."""

from __future__ import annotations

import argparse
import resource
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

MEMORY = 6 << 30  # bytes that cases may take, beside what the process has: a hostile size is an error, not a swap


def run(given: argparse.Namespace) -> None:
    """Cases from --seed on, until --cases of them or --minutes are over."""
    case = _case(given)
    torch.set_num_threads(2)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    deadline = time.monotonic() + 60 * given.minutes
    for seed in range(given.seed, given.seed + given.cases):
        print("case", seed, flush=True)
        try:
            why = case(seed)
        except Exception as e:  # of the fuzzer, or where none is expected
            traceback.print_exc()
            why = repr(e)
        if why:
            print("failure", why.replace("\n", " "), flush=True)
        if time.monotonic() > deadline:
            break


def _case(given: argparse.Namespace) -> Callable[[int], str | None]:
    (what,) = given.what
    if what == "ops":
        from . import operands

        if operands.missing():
            raise SystemExit(f"tests/fuzz/operands.py makes no calls of {operands.missing()}: add makers")
        return partial(_operator, backend=given.backend, only=tuple(given.op))
    if what == "prepared":
        from . import prepared_calls

        return prepared_calls.case
    from . import stale

    return stale.case


def _operator(seed: int, backend: str, only: tuple[str, ...]) -> str | None:
    from . import cases
    from .memory import Guarded

    place = Guarded()
    made = cases.make(seed, place, backend, only)
    why = cases.run(made)
    said = f"{why} ({made.what})" if why else None
    del made
    place.close()
    return said
