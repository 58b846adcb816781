"""Cells and captions of the tables that tools/benchmarks_table.py makes: times with their spread, ratios, machines."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

WIDTH = 120

Line = dict[str, Any]  # one candidate of one row, as bench/results.py writes it
Cases = dict[str, dict[str, Line]]  # row -> candidate -> its line
Column = tuple[str, Callable[[dict[str, Line]], str]]


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds * 1e6)} us"


def digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def spread(line: Line | None) -> str:
    """The median in its unit, and p20 and p80 in the same one."""
    if line is None:
        return ""
    text = duration(line["median_s"])
    number, unit = text.split()
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    return f"{number} {unit} ({digits(line['p20_s'] * scale)} to {digits(line['p80_s'] * scale)})"


def time_of(candidate: str) -> Callable[[dict[str, Line]], str]:
    return lambda case: spread(case.get(candidate))


def fastest(case: dict[str, Line], names: Iterable[str]) -> Line | None:
    return min((case[n] for n in names if n in case), key=lambda line: line["median_s"], default=None)


def times(mine: Line, other: Line) -> str:
    """How many times faster mine is; bench/results.py leaves `speedups` out where tests failed or were skipped."""
    return f"{other['median_s'] / mine['median_s']:.2f}" if "speedups" in mine else ""


def ratio_of(ours: Iterable[str], theirs: Iterable[str]) -> Callable[[dict[str, Line]], str]:
    """The fastest of theirs over the fastest of ours, as medians; empty where one of the two was not run."""

    def cell(case: dict[str, Line]) -> str:
        mine, other = fastest(case, ours), fastest(case, theirs)
        return "" if mine is None or other is None else times(mine, other)

    return cell


def field_of(candidate: str, key: str) -> Callable[[dict[str, Line]], str]:
    return lambda case: str(case.get(candidate, {}).get(key, ""))


def asked_of(candidate: str) -> Callable[[dict[str, Line]], str]:
    """`met` or `missed`: what its issue asks of a candidate; empty where nothing is asked, or tests failed."""

    def cell(case: dict[str, Line]) -> str:
        found = [each["met"] for each in case.get(candidate, {}).get("speedups", []) if each["target"] is not None]
        return "" if not found else "met" if all(found) else "missed"

    return cell


def limits_of(line: Line) -> str:
    """Limits that its issue sets to a candidate, each met or missed; empty as of `asked_of`."""
    said = []
    for limit in line.get("limits", []):
        both = [limit, limit["or"]] if "or" in limit else [limit]
        asked = " or ".join(f"{digits(each['value'])} {each['limit']} of {digits(each['most'])}" for each in both)
        said.append(f"{asked}: {'met' if limit['met'] else 'missed'}")
    return "; ".join(said)


def read(folder: Path, suites: Iterable[str]) -> tuple[dict[str, dict[str, list[Line]]], list[str]]:
    """Suite -> machine -> lines, by the names SUITE-MACHINE.jsonl, and the names of files that are called otherwise."""
    longest_first = sorted(suites, key=len, reverse=True)
    found: dict[str, dict[str, list[Line]]] = {}
    others = []
    for path in sorted(folder.glob("*.jsonl")):
        suite = next((s for s in longest_first if path.stem.startswith(s + "-")), None)
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        if suite is None or any(line.get("bench") != suite for line in lines):
            others.append(path.name)
            continue
        found.setdefault(suite, {})[path.stem.removeprefix(suite + "-")] = lines
    return found, others


def newest(lines: list[Line], row: str) -> list[Line]:
    """The lines of the newest run that has rows of this name. All lines of a run carry one time and commit."""
    mine = [line for line in lines if line["row"].startswith(row) and "median_s" in line]
    last = max(((line["time"], line["commit"]) for line in mine), default=None)
    return [line for line in mine if (line["time"], line["commit"]) == last]


def newest_of_each(lines: list[Line], row: str) -> list[Line]:
    """The same for each row by itself: of a suite whose rows take so long that runs have some of them."""
    names = dict.fromkeys(line["row"] for line in lines if line["row"].startswith(row))
    return [line for name in sorted(names) for line in newest([of for of in lines if of["row"] == name], name)]


def cases_of(lines: list[Line]) -> Cases:
    cases: Cases = {}
    for line in lines:
        cases.setdefault(line["row"], {})[line["candidate"]] = line
    return cases


def machine(line: Line, name: str) -> str:
    m = line["machine"]
    gpu = m.get("gpu") or "no GPU"
    name = name.removesuffix(f"-{m['threads']}threads")
    return f"{m['cpu']} ({name}), {m['threads']} of {m['cores']} cores, level {m['level']}, {gpu}"


def versions(line: Line) -> str:
    m = line["machine"]
    packages = [f"{p} {m[p]}" for p in ("torch", "transformers", "peft") if m.get(p)]
    if m.get("bitsandbytes"):
        packages.append(f"bitsandbytes {m['bitsandbytes']} with {kernel_of(line)}")
    return ", ".join(packages)


def kernel_of(line: Line) -> str:
    """The CPU kernel that bitsandbytes ran in evaluation; runs before the field `bnb` had the one in its wheel."""
    found = line["machine"].get("bnb") or line.get("bnb")
    if not found:
        return "the wheel's kernel"
    text = " ".join(str(v) for v in found.values() if v) if isinstance(found, dict) else str(found)
    return text.removeprefix(f"{line['machine'].get('bitsandbytes')}, ")


def commit(*lines: Line) -> str:
    texts = [f"{text[:-1]} with changes" if text.endswith("+") else text
             for text in dict.fromkeys(str(line["commit"]) for line in lines)]  # fmt: skip
    return " and ".join(texts)


def command(line: Line) -> str:
    return str(line.get("command") or f"python -m bench --suite {line['bench']}")


def samples(lines: list[Line]) -> str:
    counts = sorted({line["samples"] for line in lines})
    return f"{counts[0]} samples" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} samples"


def grid(head: list[str], rows: list[list[str]]) -> str:
    used = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [[head[i] for i in used], *([row[i] for i in used] for row in rows)]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(used) + "|", *text[1:]])


def wrapped(text: str, width: int = WIDTH) -> str:
    """Lines of at most so many characters; what stands in backquotes stays on one of them."""
    whole = "`".join(t.replace(" ", "\0") if i % 2 else t for i, t in enumerate(text.split("`")))
    lines = textwrap.wrap(whole, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")
