"""Rows that whole models are timed for: a process a mode (worker.py), which take turns, and what they say."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import machine
from ..measure import Stats
from ..pipes import Process
from ..results import Limit, Row

OF_BOUND = ["bound_s", "of the bound", "peak_gflops"]
STEP_EXTRAS = [*OF_BOUND, "peak_mib", "cpu_s", "forward", "backward", "loss"]


@dataclass(frozen=True)
class WholeModel:
    """A row of a suite that whole models are timed for, a process a mode. more: fields of the worker's task."""

    title: str
    what: str
    modes: list[str]
    more: dict[str, int] = field(default_factory=dict)


class Worker(Process):
    """A mode in its own process, of this checkout or another."""

    def __init__(
        self, mode: str, what: str, folder: Path, args: argparse.Namespace, checkout: Path = machine.ROOT, **more: Any
    ) -> None:
        self.mode = mode
        task = {"mode": mode, "what": what, "folder": str(folder), "threads": args.threads, "dropout": args.dropout,
                "device": args.device, "rows": 4, "length": 128, "tokens": 16 if args.quick else 48,
                "sample_s": args.sample_s, **more}  # fmt: skip
        library = machine.peak_library() if args.device == "cpu" else None
        if library is not None:
            task["peak"] = str(library)
        super().__init__(mode, checkout, ["-m", "bench.suites.worker"], task)

    def run(self) -> dict[str, Any]:
        return self.ask("run")


def model_folder(args: argparse.Namespace) -> Path:
    from fastpeft.apps.training.models import PACKAGED, resolve

    return Path(resolve(str(args.model) if args.model else PACKAGED).location)


def measure(
    what: str, modes: list[str], rounds: int, args: argparse.Namespace, folder: Path | None = None, **more: Any
) -> tuple[dict[str, Stats], dict[str, dict[str, Any]]]:
    """(times, last replies) of each mode; a reply has also what the mode said first, and `bound_s` the median of all.

    folder: of the model, None: the one that args say. more: fields of the worker's task."""
    folder = folder or model_folder(args)
    workers = []
    stats: dict[str, Stats] = {}
    last: dict[str, dict[str, Any]] = {}
    try:
        for mode in modes:  # one after the other: they would slow each other down only while loading
            workers.append(Worker(mode, what, folder, args, **more))
            last[mode] = workers[-1].receive()
            print(f"{what}: {mode} is ready", file=sys.stderr)
        stats = {mode: Stats() for mode in modes}
        least = {mode: Stats() for mode in modes}
        for r in range(rounds):
            for i in range(len(workers)):
                worker = workers[(i + r) % len(workers)]
                reply = worker.run()
                last[worker.mode].update(reply)
                stats[worker.mode].samples.append(reply["s"])
                least[worker.mode].samples += [reply["bound_s"]] if "bound_s" in reply else []
        for mode, found in least.items():
            if found.samples:
                last[mode]["bound_s"] = found.median
                last[mode]["of the bound"] = stats[mode].median / found.median
    finally:
        for worker in workers:
            worker.close()
    return stats, last


def extras(last: dict[str, dict[str, Any]], keys: list[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key in keys:
        values = {mode: reply[key] for mode, reply in last.items() if reply.get(key) is not None}
        found[key] = {mode: round(v, 4 if v < 1 else 2 if v < 100 else 0) for mode, v in values.items()}
    return {k: v for k, v in found.items() if v}


def limit_memory(row: Row) -> None:
    """Peak memory is to be never above theirs."""
    peaks = row.extra.get("peak_mib", {})
    for mode, peak in peaks.items():
        kind, dtype = mode.split("-")[:2]
        theirs = peaks.get(f"bnb-{dtype}")
        if kind == "ours" and theirs is not None:
            row.limits.append(Limit("peak MiB, as PEFT's", mode, peak, theirs))
