"""Every family of models: a training step and a decoded token, with PEFT on bitsandbytes, and ours without and with
`fastpeft.accelerate`.

Random models of one size (families_models.py) in NF4 with double quantisation, experts dense, LoRA r=16 on all linear
layers, lora_dropout 0.05, bfloat16 with float32 adapters; 4 x 128 tokens of which every one is learned, torch's fused
AdamW. A token is one of a sequence by `generate()`, without the prompt.
  bnb-bf16       PEFT + bitsandbytes: in train mode for the step, in eval mode for the token
  ours-bf16      fastpeft on its NF4 layers, in transformers' model code
  ours-bf16-own  the same after `accelerate(model, loss=True)`
A step's bound is its products at the machine's bfloat16 peak, a token's the bytes of its weights at the speed of memory
(bounds.py). The families that are used most have a target (MARKED): so much faster than PEFT, or so near to
the bound. Encoders train on 8 x 128 tokens, ViT and CLIP on 8 images. `--only llama gemma2 step` runs some of it. A
mode is a process (families_worker.py); the processes take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import machine
from ..measure import Stats
from ..pipes import Process
from ..results import Claim, Row
from . import PARTS as ALL_PARTS
from . import families_models as models
from .whole import extras

MODES = ("bnb-bf16", "ours-bf16", "ours-bf16-own")
PARTS = {"step": "step", "decode": "token"}  # as --only names them, and the worker
TARGETS = {"step": (1.5, 1.6), "token": (2.0, 2.0)}  # times PEFT's speed, or times the bound
ROWS, LENGTH, ROWS_OTHERS = 4, 128, 8


class Modes:
    """The modes' processes. One that dies is started again for the next model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.names = list(args.modes or MODES)
        self.task = {"threads": args.threads, "dropout": 0.05, "tokens": 8 if args.quick else 32}
        self.running: dict[str, Process] = {}

    def ask(self, mode: str, **order: Any) -> dict[str, Any]:
        """The mode's reply; with `error` where it fails."""
        if mode not in self.running:
            process = Process(mode, machine.ROOT, ["-m", "bench.suites.families_worker"], {**self.task, "mode": mode})
            process.receive()
            self.running[mode] = process
        try:
            return self.running[mode].ask(json.dumps(order))
        except RuntimeError as error:
            self.running.pop(mode).close()
            return {"error": str(error).strip().splitlines()[-1]}

    def close(self) -> None:
        for process in self.running.values():
            process.close()


class Family:
    """The models of one family, a mode each. found: what the modes said of theirs; notes: which do not run, and why."""

    def __init__(self, modes: Modes, family: str, folder: Path) -> None:
        self.modes, self.family = modes, family
        self.notes: list[str] = []
        self.found: dict[str, dict[str, Any]] = {}
        try:
            model = models.build(family, folder)
        except Exception as error:
            self.notes.append(f"{family}: transformers does not make it: {type(error).__name__}: {error}")
            return
        rows = ROWS if family not in models.OTHERS else ROWS_OTHERS
        for mode in modes.names:
            self._keep(mode, modes.ask(mode, do="load", rows=rows, length=LENGTH, **asdict(model)))
        self._compare()

    def _keep(self, mode: str, reply: dict[str, Any]) -> bool:
        if "error" not in reply:
            self.found.setdefault(mode, reply)
            return True
        self.found.pop(mode, None)
        self.notes.append(f"{self.family}: {mode} does not run: {reply['error']}")
        return False

    def _compare(self) -> None:
        """Note where the modes differ in layers in 4 bits or in numbers to train."""
        for what in ("quantized", "trained"):
            values = {mode: found[what] for mode, found in self.found.items()}
            if len(set(values.values())) > 1:
                self.notes.append(f"{self.family}: not equal in the modes: {what} {values}")
        for mode, found in self.found.items():
            self.notes += [f"{self.family}, {mode}: {why}" for why in found.get("stays", [])]

    def row(self, what: str, rounds: int, bounds: dict[str, Any]) -> Row:
        """A row; modes that fail are left out of it and of the next ones."""
        ready = [m for m in list(self.found) if self._keep(m, self.modes.ask(m, do=what))]
        samples: dict[str, list[float]] = {mode: [] for mode in ready}
        last: dict[str, dict[str, Any]] = {}
        for r in range(rounds):
            for mode in [*ready[r % len(ready) :], *ready[: r % len(ready)]] if ready else []:
                reply = self.modes.ask(mode, do=what)
                if mode in self.found and self._keep(mode, reply):
                    samples[mode].append(reply["s"])
                    last[mode] = reply
        stats = {mode: Stats(found) for mode, found in samples.items() if mode in self.found}
        title = f"{what}, {self.family}"
        case = {"suite": "families", "what": what, "family": self.family, "r": 16, "dropout": 0.05}
        row = Row(title, case, stats, self._claims(what), extra=extras(last, ["loss"]), notes=self.notes)
        self.notes = []
        cost = next((found for found in self.found.values() if "step_flops" in found), None)
        if cost is not None and self.family not in models.OTHERS:
            row.flops = cost["step_flops"] if what == "step" else 0.0
            row.nbytes = cost["token_bytes"] if what == "token" else 0.0
            bound = bound_s(row, bounds)
            row.extra["of the bound"] = {m: round(s.median / bound, 2) for m, s in stats.items()}
            for claim in row.claims[:1]:
                claim.bound_s = bound
        return row

    def _claims(self, what: str) -> list[Claim]:
        theirs, plain, own = ([mode] for mode in MODES)
        other = models.OTHERS.get(self.family)
        target, most = TARGETS[what] if self.family in models.MARKED else (other.target if other else None, None)
        return [Claim("PEFT", own, theirs, target, most=most), Claim("without accelerate", own, plain)]


def bound_s(row: Row, bounds: dict[str, Any]) -> float:
    """Seconds that a row takes at least: its products in bfloat16, or its bytes."""
    peak = bounds.get("gflops_bf16") or bounds["gflops"]
    return float(max(row.flops / 1e9 / peak, row.nbytes / 1e9 / bounds["gbs"]))


def chosen(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The families and the parts that --only names; all where it names none. SystemExit at an unknown name."""
    known = [*models.causal(), *models.OTHERS]
    wanted = list(args.only)
    unknown = [name for name in wanted if name not in known and name not in ALL_PARTS]
    if unknown:
        raise SystemExit(f"error: --only takes {' and '.join(PARTS)} and families: {', '.join(known)}; got {unknown}")
    return ([name for name in wanted if name in known] or known,
            [PARTS[name] for name in wanted if name in PARTS] or list(PARTS.values()))  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[Row]:
    families, parts = chosen(args)
    modes = Modes(args)
    bounds = machine.bounds(args.threads)
    try:
        for name in families:
            with tempfile.TemporaryDirectory() as folder:
                family = Family(modes, name, Path(folder))
            print(f"{name} is ready", file=sys.stderr)
            for what in parts if name not in models.OTHERS else [part for part in parts if part == "step"]:
                yield family.row(what, 3 if args.quick else args.step_rounds, bounds)
    finally:
        modes.close()
