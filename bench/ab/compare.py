"""`python -m bench --suite SUITE --against CHECKOUT`: is a row slower here (B) than in another checkout (A)?

Of each row only this project's candidates run, each checkout with its own bench and library, in turns: A, A', B, where
A' is A once more. A line passes where B's median is at most A's times 1 + 5 % + the difference of A and A'. Lines that
fail are measured once more by new processes with 15 samples, and that counts.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import machine, results
from ..measure import Stats
from ..pipes import Process
from ..suites import whole
from . import checkouts

ROUNDS_AGAIN = 15
SAMPLE_S = 0.03  # longer than a suite's own: processes that slept start with cold caches
SLACK, SLACK_MIXED = 0.05, 0.10  # as the issue allows; the second for batches of 64 adapters at 576
THEIRS = ("PEFT", "bnb", "torch", "dense")
ALONE = ("frozen", "base")  # a layer without adapters: ours in NF4, torch's in float32
# the parts of each suite whose rows are layers, as --only names them; whole models are in its WHOLE_MODELS
LAYERS: dict[str, list[str]] = {"layers": ["forward", "train"], "dora": ["forward", "train"], "multi": ["forward"],
                                "methods": ["train"], "ortho": ["train"]}  # fmt: skip
A2 = checkouts.SIDES[1]
SUITES = ("layers", "qlora", "methods", "dora", "multi", "multi-train", "ortho")


@dataclass
class Line:
    """A candidate of a row on the three sides. case: what is run."""

    row: str
    candidate: str
    case: dict[str, Any]
    stats: dict[str, Stats]
    again: bool = False

    def of_a(self, side: str) -> float:
        """The ratio of a side's median to A's."""
        return self.stats[side].median / self.stats["A"].median

    @property
    def slack(self) -> float:
        mixed = self.case.get("suite") == "multi" and self.case.get("K") == 576
        return SLACK_MIXED if mixed and self.candidate.split()[-1] == "64" else SLACK

    @property
    def allowed(self) -> float:
        return 1 + self.slack + abs(self.of_a(A2) - 1)

    @property
    def noisy(self) -> bool:
        """A differs from itself by more than B may from A: the line says little."""
        return abs(self.of_a(A2) - 1) > self.slack

    @property
    def passed(self) -> bool:
        return self.of_a("B") <= self.allowed

    def as_dict(self) -> dict[str, Any]:
        medians = {f"{side}_median_s": self.stats[side].median for side in checkouts.SIDES}
        samples = {f"{side}_samples_s": self.stats[side].samples for side in checkouts.SIDES}
        return {"row": self.row, **self.case, "candidate": self.candidate, **medians, **samples,
                "b_of_a": self.of_a("B"), "a2_of_a": self.of_a(A2), "allowed": self.allowed, "again": self.again,
                "passed": self.passed}  # fmt: skip


def is_ours(candidate: str, case: dict[str, Any]) -> bool:
    if candidate in ALONE:
        return case.get("base") == "NF4"
    return not candidate.startswith(THEIRS)


class Comparison:
    """Rows of one suite in two checkouts, A and B."""

    def __init__(self, args: argparse.Namespace, only: list[str] | None, a: Path, b: Path) -> None:
        self.args, self.only, self.a, self.b = args, only, a, b

    def layer_parts(self) -> list[str]:
        parts = LAYERS.get(self.args.suite, [])
        return [part for part in parts if self.only is None or part in self.only]

    def lines(self) -> Iterator[Line]:
        """Every line of the suite once."""
        if parts := self.layer_parts():
            yield from self.layers(self.argv(parts, self.args.shapes, self.args.m, self.args.methods), self.args.rounds)
        for row in self.whole_models():
            for mode in row.modes:
                yield self.model(row, mode, self.args.rounds)

    def once_more(self, line: Line) -> list[Line]:
        """The line, and others of its row that come with it, measured by new processes with more samples."""
        for row in self.whole_models():
            if row.title == line.row:
                return [replace(self.model(row, line.candidate, ROUNDS_AGAIN), again=True)]
        case, parts = line.case, self.layer_parts()
        if len(parts) > 1:
            parts = ["forward" if case["what"] == "forward" else "train"]
        shapes = [(case["K"], case["N"])] if "K" in case else self.args.shapes
        methods = [case["method"].split()[0]] if "method" in case else None
        argv = self.argv(parts, shapes, [case["M"]] if "M" in case else None, methods)
        return [replace(each, again=True) for each in self.layers(argv, ROUNDS_AGAIN, line.row)]

    def argv(
        self, parts: list[str], shapes: list[tuple[int, int]] | None, m: list[int] | None, methods: list[str] | None
    ) -> list[str]:
        """The command line of a side: options that the bench of every checkout has."""
        argv = ["--suite", self.args.suite, "--only", *parts]
        argv += ["--quick"] if self.args.quick else []
        argv += ["--shapes", *(f"{k}x{n}" for k, n in shapes)] if shapes else []
        argv += ["--m", *map(str, m)] if m else []
        return argv + (["--methods", *methods] if methods else [])

    def layers(self, argv: list[str], rounds: int, title: str | None = None) -> Iterator[Line]:
        """Lines of the suite's layers, or of the row `title` alone."""
        task = {"argv": argv, "threads": self.args.threads}

        def start(side: str, checkout: Path) -> Process:
            return Process(side, checkout, [str(checkouts.SIDE)], task)

        with checkouts.sides(start, self.a, self.b) as running:
            while True:
                row = checkouts.same_replies("the next row", checkouts.ask_all(running, "next"))
                if row.get("end"):
                    return
                names = [name for name in row["copies"] if is_ours(name, row["case"])]
                if not names or (title is not None and row["title"] != title):
                    continue
                ready = checkouts.ask_each(running, "prepare", names, SAMPLE_S)
                calls = {name: max(reply["calls"][name] for reply in ready.values()) for name in names}

                def sample(side: str, name: str, calls: dict[str, int] = calls) -> float:
                    (reply,) = checkouts.ask_each({side: running[side]}, "sample", name, calls[name]).values()
                    return float(reply["s"])

                stats = checkouts.in_turns(names, sample, rounds, self.args.budget_s * len(names))
                yield from (Line(row["title"], name, row["case"], stats[name]) for name in names)
                if title is not None:
                    return

    def whole_models(self) -> list[whole.WholeModel]:
        """The suite's rows of whole models, with our modes alone."""
        module = importlib.import_module(f"bench.suites.{self.args.suite.replace('-', '_')}")
        found = []
        for row in getattr(module, "WHOLE_MODELS", []):
            part = "decode" if row.what.startswith("decode") else "step"
            modes = [m for m in row.modes if m.startswith("ours") and (not self.args.modes or m in self.args.modes)]
            tokens = row.more.get("length")
            if (self.only is None or part in self.only) and (tokens is None or tokens in (self.args.m or [tokens])):
                found.append(whole.WholeModel(row.title, row.what, modes, row.more))
        return found

    def model(self, row: whole.WholeModel, mode: str, rounds: int) -> Line:
        folder = whole.model_folder(self.args)

        def start(side: str, checkout: Path) -> whole.Worker:
            return whole.Worker(mode, row.what, folder, self.args, checkout, **row.more)

        with checkouts.sides(start, self.a, self.b) as running:
            for worker in running.values():
                worker.receive()
            stats = checkouts.in_turns([mode], lambda side, _: float(running[side].run()["s"]), rounds,
                                       self.args.budget_s * 10)  # fmt: skip
        return Line(row.title, mode, {"suite": self.args.suite, "what": row.what, **row.more}, stats[mode])


def print_lines(lines: list[Line], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console() if Console().is_terminal else Console(width=150)
    table = Table(title=title)
    for name in ("row", "candidate", "A", "A'", "B", "B/A", "A'/A", "allowed", ""):
        table.add_column(name, justify="left" if name in ("row", "candidate", "") else "right", no_wrap=True)
    last = None
    for line in lines:
        verdict = ("passed" if line.passed else "SLOWER") + (" (again)" if line.again else "")
        table.add_row("" if line.row == last else line.row, line.candidate,
                      *(results.duration(line.stats[side].median) for side in checkouts.SIDES),
                      f"{line.of_a('B'):.3f}", f"{line.of_a(A2):.3f}", f"{line.allowed:.3f}", verdict)  # fmt: skip
        last = line.row
    console.print(table)


def main(args: argparse.Namespace, only: list[str] | None) -> int:
    if args.suite not in SUITES:
        raise SystemExit(f"error: --against compares the suites {', '.join(SUITES)}, got {args.suite or args.op}")
    a, b = args.against.resolve(), machine.ROOT
    commits = {"A": checkouts.commit_of(a), "B": checkouts.commit_of(b)}
    info = machine.describe(args.threads)
    print(machine.line(info))
    comparison = Comparison(args, only, a, b)
    lines = []
    for line in comparison.lines():
        lines.append(line)
        print(f"{line.row}, {line.candidate}: B/A {line.of_a('B'):.3f} of {line.allowed:.3f}", file=sys.stderr)
    first = list(lines)
    for i, line in enumerate(first):
        if not line.passed and not lines[i].again:
            for found in comparison.once_more(line):
                at = next(j for j, old in enumerate(first) if (old.row, old.candidate) == (found.row, found.candidate))
                if not first[at].passed:
                    lines[at] = found
                    print(f"again: {found.row}, {found.candidate}: B/A {found.of_a('B'):.3f}", file=sys.stderr)
    print_lines(lines, f"{args.suite}: A {commits['A']}, B {commits['B']}, {machine.name(args.threads)}")
    slower = [line for line in lines if not line.passed]
    print(f"{len(lines)} rows, {sum(line.again for line in lines)} measured again, {len(slower)} slower than allowed")
    if noisy := sum(line.noisy for line in lines):
        print(f"{noisy} rows differ between A and A' by more than they may between A and B: was the machine busy?")
    if args.json:
        default = results.default_path(f"ab-{args.suite}", machine.name(args.threads))
        path = default if args.json == Path("-") else args.json
        header = {**results.header(info, {}, commits["B"], f"ab {args.suite}"), "commits": commits}
        replaced = [line for line in first if not line.passed]
        found = [{**header, **line.as_dict(), "counts": False} for line in replaced]
        results.write_lines(found + [{**header, **line.as_dict(), "counts": True} for line in lines], path)
        print(f"{path}: {len(lines)} rows, and {len(replaced)} that were measured again")
    return int(bool(slower))
