"""The whole model: a training step and decoding of one sequence, ours beside PEFT's, and a step beside its bound.

Modes, each a process (worker.py), in turns:
  ours-*      fastpeft on its NF4 layers; `-own` with fastpeft's training loss instead of the model's;
              `-fast` with fastpeft.families.switch on top, else transformers' model code as it is
  bnb-*       PEFT on bitsandbytes NF4 with double quantisation: in train mode for the step, in eval mode for decoding
  dense-*     PEFT on torch's dense layers
  *-ckpt      with gradient checkpointing of each decoder layer
bf16 and f32 are the dtypes of the model and of the computing; adapters are float32 in all of them, r = 16 on all seven
projections. The loss is over every token, the optimizer torch's fused AdamW, which Trainer takes as well.

The bound of a step is its FLOPs (bounds.py) at the peak of products that the mode's own process measures before each
step. Parts (`--only`): step, products (a table of the step's products, products.py), decode; and, where they are named,
those of training.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import machine
from ..measure import Stats
from ..pipes import Process
from ..results import Claim, Limit, Row


@dataclass(frozen=True)
class WholeModel:
    """A row of a suite that whole models are timed for, a process a mode. more: fields of the worker's task."""

    title: str
    what: str
    modes: list[str]
    more: dict[str, int] = field(default_factory=dict)


STEP = WholeModel("step, 4 x 128 tokens", "step", ["ours-bf16-own", "ours-bf16", "ours-f32-own", "bnb-bf16", "bnb-f32",
                                                   "dense-bf16", "dense-f32"])  # fmt: skip
DECODE = WholeModel("decode, a token", "decode", ["ours-bf16-fast", "ours-f32-fast", "ours-bf16", "ours-f32",
                                                  "bnb-bf16", "bnb-f32", "dense-f32"])  # fmt: skip
WHOLE_MODELS = [STEP, DECODE]


OF_BOUND = ["bound_s", "of the bound", "peak_gflops"]
STEP_EXTRAS = [*OF_BOUND, "peak_mib", "cpu_s", "forward", "backward", "loss"]


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


def step_row(args: argparse.Namespace) -> Row:
    modes = [m for m in args.modes or STEP.modes if not m.endswith("-fast")]
    stats, last = measure(STEP.what, modes, 3 if args.quick else args.step_rounds, args)
    ours = [m for m in modes if m.startswith("ours")]
    claims = [
        Claim("bf16 compute", ours, ["bnb-bf16"], 2.0),
        Claim("its fastest", ours, ["bnb-bf16", "bnb-f32"], 1.2),
        Claim("dense", ours, ["dense-bf16", "dense-f32"]),
        Claim("same loss code, bf16", ["ours-bf16"], ["bnb-bf16"]),
    ]
    case = {"suite": "qlora", "what": "step", "tokens": 512, "dropout": args.dropout, "r": 16}
    row = Row(
        STEP.title,
        case,
        stats,
        claims,
        extra=extras(last, STEP_EXTRAS),
    )
    limit_memory(row)
    return row


def limit_memory(row: Row) -> None:
    """Peak memory is to be never above theirs."""
    peaks = row.extra.get("peak_mib", {})
    for mode, peak in peaks.items():
        kind, dtype = mode.split("-")[:2]
        theirs = peaks.get(f"bnb-{dtype}")
        if kind == "ours" and theirs is not None:
            row.limits.append(Limit("peak MiB, as PEFT's", mode, peak, theirs))


def decode_row(args: argparse.Namespace) -> Row:
    modes = [m for m in args.modes or DECODE.modes if not m.endswith("-own")]
    stats, last = measure(DECODE.what, modes, 3 if args.quick else args.step_rounds, args)
    ours = [m for m in modes if m.startswith("ours")]
    theirs = ["bnb-bf16", "bnb-f32"]
    claims = [
        Claim("its fastest", ours, theirs, 2.0),
        Claim("its fastest, plain generate()", [m for m in ours if not m.endswith("-fast")], theirs),
        Claim("dense", ours, ["dense-f32"]),
    ]
    row = Row(DECODE.title, {"suite": "qlora", "what": "decode", "r": 16}, stats, claims,
              extra=extras(last, ["peak_mib", "cpu_s"]))  # fmt: skip
    row.extra["tokens/s"] = {m: round(1 / s.median, 1) for m, s in stats.items()}
    for name in ("ours-f32-fast", "ours-bf16-fast"):
        plain = name.removesuffix("-fast")
        if name in last and plain in last:
            same = sum(a == b for a, b in zip(last[name]["ids"], last[plain]["ids"], strict=True))
            row.notes.append(f"decode: {same} of {last[plain]['tokens']} tokens of {name} are those of {plain}")
    limit_memory(row)
    return row


def rows(args: argparse.Namespace) -> Iterator[Row]:
    from . import training

    if "step" in args.only:
        yield step_row(args)
    yield from training.rows(args)
    if "decode" in args.only:
        yield decode_row(args)
