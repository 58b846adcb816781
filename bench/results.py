"""A bench's output: rich tables, JSON lines, an optional picture."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .measure import Candidate, Clock, Stats, interleave, wall_clock

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Claim:
    """One comparison of a row: the fastest of `ours` against the fastest of `against`; target: what the issue asks.

    most: what it asks else, at most so many times bound_s, the seconds that the work takes at least."""

    label: str
    ours: list[str]
    against: list[str]
    target: float | None = None
    most: float | None = None
    bound_s: float = 0.0


@dataclass
class Limit:
    """A limit that an issue sets to a candidate: its value is at most `most`; other: a limit that will do as well."""

    label: str
    candidate: str
    value: float
    most: float
    other: Limit | None = None

    @property
    def met(self) -> bool:
        return self.value <= self.most or (self.other is not None and self.other.met)

    def as_dict(self) -> dict[str, Any]:
        other = {} if self.other is None else {"or": self.other.as_dict()}
        return {"limit": self.label, "value": self.value, "most": self.most, "met": self.met, **other}

    def __str__(self) -> str:
        other = "" if self.other is None else f", or {self.other}"
        return f"{self.label} {self.value:.4g}, at most {self.most:.4g}{other}"


@dataclass
class Row:
    """One row. case: what is run. stats: candidate -> Stats, once measured. flops, nbytes: of one call, for rates."""

    title: str
    case: dict[str, Any]
    stats: dict[str, Stats] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    flops: float = 0.0
    nbytes: float = 0.0
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # name of a value -> candidate -> value
    notes: list[str] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)  # empty where a suite measures by itself
    after: Callable[[], object] | None = None
    refused: str | None = None  # why the row holds no number
    missed: bool = False  # something was wrong, not slow
    in_order: bool = False  # candidates are shown as they were given, else the fastest first
    limits: list[Limit] = field(default_factory=list)

    def refuse(self, why: str) -> Row:
        """The row as a title without numbers: tests of what it measures did not pass."""
        self.refused, self.candidates, self.stats, self.extra, self.notes = why, [], {}, {}, []
        return self

    def measure(self, rounds: int, sample_s: float, budget_s: float, clock: Clock = wall_clock) -> Row:
        """Fill `stats` from `candidates`; does nothing where the suite has measured."""
        if self.candidates:
            try:
                self.stats = interleave(self.candidates, rounds, sample_s, budget_s, clock)
            finally:
                if self.after is not None:
                    self.after()
            self.candidates = []  # their weights are large
        return self

    def best(self, names: Sequence[str]) -> str | None:
        present = [n for n in names if n in self.stats]
        return min(present, key=lambda n: self.stats[n].median) if present else None

    def ratios(self) -> list[dict[str, Any]]:
        """The outcome of each claim; claims whose candidates were not run are left out."""
        found = []
        for claim in self.claims:
            mine, other = self.best(claim.ours), self.best(claim.against)
            if mine is not None and other is not None:
                ratio = self.stats[other].median / self.stats[mine].median
                near = claim.most is not None and self.stats[mine].median <= claim.most * claim.bound_s
                met = None if claim.target is None else ratio >= claim.target or near
                found.append({"claim": claim.label, "ours": mine, "against": other, "ratio": ratio,
                              "target": claim.target, "met": met})  # fmt: skip
                if claim.bound_s:
                    found[-1] |= {"of_bound": self.stats[mine].median / claim.bound_s, "most": claim.most}
        return found


def as_lines(rows: Sequence[Row], header: dict[str, Any], speedups: bool) -> list[dict[str, Any]]:
    """One dictionary per candidate and row. Without `speedups` (failing or skipped checks) none is reported."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        if row.refused is not None:
            lines.append({**header, "row": row.title, **row.case, "no_number": row.refused})
        for name, stats in row.stats.items():
            line: dict[str, Any] = {**header, "row": row.title, **row.case, "candidate": name, **stats.as_dict()}
            if row.flops:
                line["gflops"] = row.flops / stats.median / 1e9
            if row.nbytes:
                line["gbs"] = row.nbytes / stats.median / 1e9
            line.update({k: v[name] for k, v in row.extra.items() if name in v})
            if speedups:
                line["speedups"] = [r for r in row.ratios() if r["ours"] == name]
                limits = [limit.as_dict() for limit in row.limits if limit.candidate == name]
                line |= {"limits": limits} if limits else {}
            lines.append(line)
    return lines


def write_lines(lines: Sequence[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        for line in lines:
            f.write(json.dumps(line, sort_keys=True) + "\n")


def default_path(name: str, machine: str) -> Path:
    """`qlora`, `zen5-2threads` -> bench/results/qlora-zen5-2threads.jsonl"""
    return RESULTS / f"{name}-{machine}.jsonl"


def header(machine: dict[str, Any], bounds: dict[str, Any], commit: str, name: str) -> dict[str, Any]:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"bench": name, "time": stamp, "commit": commit, "bnb": machine.get("bnb"), "machine": machine,
            "bounds": bounds}  # fmt: skip


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def products_bound(bounds: dict[str, Any], candidate: str, case: dict[str, Any]) -> float:
    """GFLOP/s that a candidate can reach at best: bfloat16's where it computes in that and the machine has it."""
    bf16 = "bf16" in candidate or case.get("dtype") == "bf16"
    return float((bounds.get("gflops_bf16") if bf16 else None) or bounds.get("gflops") or 0)


def print_rows(rows: Sequence[Row], bounds: dict[str, Any], speedups: bool, title: str, bnb: str | None = None) -> None:
    """Tables: every candidate's median, p20 and p80, and share of the machine's bound; and what was claimed.

    bnb: the version and kernel of the bitsandbytes that rows are beside."""
    from rich.console import Console
    from rich.table import Table

    # A table that goes to a file is not to be folded at 80 columns.
    console = Console() if Console().is_terminal else Console(width=180)
    console.print(title)
    for _, some in itertools.groupby(rows, lambda row: (row.in_order and row.title, tuple(row.extra))):
        console.print(_table(list(some), bounds))
    if bnb is not None:
        console.print(f"bitsandbytes: {bnb}")
    for why in dict.fromkeys(row.refused for row in rows if row.refused is not None):
        console.print(f"no number: {why}")
    for note in (n for row in rows for n in row.notes):
        console.print(note)
    limits = [(row.title, limit) for row in rows for limit in row.limits]
    ratios = [(row.title, r) for row in rows for r in row.ratios()]
    for title_of_row, limit in limits if speedups else ():
        console.print(f"{title_of_row}: {limit.candidate}: {limit}: {'met' if limit.met else 'MISSED'}")
    if not speedups or not ratios:
        return
    beside = "" if bnb is None else f"; bitsandbytes {bnb}"
    claims = Table(title=f"speed-ups (ratio of medians, measured in turns in this run{beside})")
    for name in ("row", "ours", "against", "speed-up", "asked for"):
        claims.add_column(name, justify="right" if name in ("speed-up", "asked for") else "left", no_wrap=True)
    for title_of_row, r in ratios:
        asked = "" if r["target"] is None else f"{r['target']:g}x"
        asked += f" or {r['most']:g} of the bound" if r.get("most") else ""
        asked += "" if r["target"] is None else f" {'met' if r['met'] else 'MISSED'}"
        claims.add_row(title_of_row, r["ours"], f"{r['against']} ({r['claim']})", f"{r['ratio']:.2f}x", asked)
    console.print(claims)


def _table(rows: Sequence[Row], bounds: dict[str, Any]) -> Any:
    """A table of rows whose extra values have the same names; one that is shown in order is a table of its own."""
    from rich.table import Table

    extras = list(dict.fromkeys(k for row in rows for k in row.extra))
    ours = {name for row in rows for claim in row.claims for name in claim.ours}
    rates = any(row.flops for row in rows)
    alone = rows[0].in_order
    table = Table(title=rows[0].title if alone else None)
    for name in ("candidate",) if alone else ("row", "candidate"):
        table.add_column(name, no_wrap=True)
    for name in ("median", "p20 .. p80", *(("GFLOP/s", "GB/s", "of bound") if rates else ()), *extras):
        table.add_column(name, justify="right", no_wrap=True)
    gbs = float(bounds.get("gbs") or 0)
    for row in rows:
        if row.refused is not None:
            table.add_row(row.title, "no number: tests failed")
        found = row.stats.items()
        for i, (name, s) in enumerate(found if alone else sorted(found, key=lambda item: item[1].median)):
            rate, speed = (row.flops or 0.0) / s.median / 1e9, row.nbytes / s.median / 1e9
            gflops = products_bound(bounds, name, row.case)
            share = max(rate / gflops if gflops else 0.0, speed / gbs if gbs else 0.0)
            cells = [] if alone else [row.title if i == 0 else ""]
            cells += [f"[bold]{name}[/bold]" if name in ours else name, duration(s.median),
                      f"{duration(s.at(0.2))} .. {duration(s.at(0.8))}"]  # fmt: skip
            if rates:
                cells += [f"{rate:.1f}", f"{speed:.1f}", f"{share:.0%}"]
            table.add_row(*cells, *(str(row.extra.get(k, {}).get(name, "")) for k in extras))
        table.add_section()
    return table


def plot_rows(rows: Sequence[Row], path: Path, title: str) -> None:
    """Grouped bars of the medians, one group per row, relative to the fastest of theirs (higher is faster)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for row in rows for name in row.stats))
    figure, axes = plt.subplots(figsize=(max(7.0, 0.9 * len(rows) + 3), 4.5))
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        at, heights = [], []
        for k, row in enumerate(rows):
            base = row.best([n for claim in row.claims for n in claim.against]) or next(iter(row.stats))
            if name in row.stats:
                at.append(k + (i - len(names) / 2) * width)
                heights.append(row.stats[base].median / row.stats[name].median)
        axes.bar(at, heights, width, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.title for row in rows], rotation=40, ha="right", fontsize=7)
    axes.set_ylabel("speed; the fastest that it is compared with = 1")
    axes.set_title(title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
