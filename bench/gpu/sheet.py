"""The answer sheet of a run: which kernels are wrong, where which is the fastest, what share of the bounds they reach,
which rows the tables would get, and what could not be measured, and why. OUT/sheet.md, and OUT/sheet.json for programs.

It is made from the files of the run alone and holds no clock of its own: the same rows give the same sheet.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, plan
from .verdicts import PART as TESTS
from .verdicts import Verdicts

FILES = ("sheet.md", "sheet.json")
CLOCKS = ("graph_s", "eager_s")  # the first that a row has counts
OURS = ("cuda", "triton", "native")
Rows = dict[str, dict[str, dict[str, Any]]]  # part -> title -> row


@dataclass
class Sheet:
    data: dict[str, Any]
    text: str


def write(out: Path) -> Sheet:
    """Make the sheet of what is there, and leave it in the folder."""
    settings = files.settings(out)
    digest = settings.get("digest")
    rows = {part: files.rows(out / f"{part}.jsonl", digest) for part in plan.parts()}
    data = answer(rows, Verdicts.read(out), left(out, digest), settings)
    found = Sheet(data, text(data))
    files.replace(out / FILES[0], found.text)
    files.replace(out / FILES[1], json.dumps(data, indent=1, sort_keys=True) + "\n")
    return found


def left(out: Path, digest: str | None) -> dict[str, str]:
    """part -> why rows of it are missing, of the parts that did not come to their end."""
    ended = {x["part"]: x for x in files.lines(out / "run.jsonl") if x.get("digest") == digest}
    found = {}
    for part in plan.parts():
        state = ended.get(part, {"state": "not begun", "why": ""})
        if state["state"] != "done":
            found[part] = f"{state['state']}{': ' if state['why'] else ''}{state['why']}"
    return found


def answer(rows: Rows, verdicts: Verdicts, unfinished: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    times = [row for part, found in rows.items() if part != TESTS for row in found.values() if row.get("times")]
    groups = grouped(times)
    return {
        "fake": bool(settings.get("fake")), "digest": settings.get("digest"), "commit": settings.get("commit"),
        "machine": {title: plain(row) for title, row in rows.get("provenance", {}).items()},
        "wrong": {key: verdicts.found[key] for key in verdicts.of("wrong")},
        "suspect": {key: verdicts.found[key] for key in verdicts.of("suspect")},
        "judged": len(verdicts.found), "loose": verdicts.loose,
        "sanitizer": {t: row["words"] for t, row in rows.get("sanitizer", {}).items() if row.get("findings")},
        "failed": absences(rows, True), "absent": absences(rows, False),
        "refused": refusals(times), "unfinished": unfinished,
        "crossovers": {group: crossovers(found) for group, found in groups.items()},
        "shares": {group: shares(found) for group, found in groups.items()},
        "tables": next((plain(row) for row in reversed(rows.get("tables", {}).values()) if "absent" not in row), {}),
    }  # fmt: skip


def absences(rows: Rows, failed: bool) -> dict[str, str]:
    """Why rows came to nothing: by a failure, or for what the machine does not have."""
    every = ((part, title, row) for part, found in rows.items() for title, row in found.items() if "absent" in row)
    return {f"{part}: {title}": row["absent"] for part, title, row in every if bool(row.get("failed")) is failed}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("digest", "session", "seconds", "fake", "title")}


def refusals(times: Iterable[dict[str, Any]]) -> dict[str, list[str]]:
    """`candidate: reason` -> the rows that lack it."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in times:
        for candidate, why in (row.get("refused") or {}).items():
            found[f"{candidate}: {why}"].append(row["title"])
    return dict(found)


def grouped(times: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that differ in their number of rows of x alone, fewest first."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in times:
        if isinstance(row.get("m"), int):
            found[" ".join(str(row.get(name)) for name in ("op", "direction", "dtype", "shape"))].append(row)
    return {group: sorted(rows, key=lambda row: row["m"]) for group, rows in found.items()}


def seconds(row: dict[str, Any]) -> dict[str, float]:
    """candidate -> seconds by the first clock that all candidates of the row have, so that one is compared by one."""
    for clock in CLOCKS:
        found = {name: t[clock] for name, t in row["times"].items() if t.get(clock)}
        if len(found) == len(row["times"]):
            return found
    return found


def ours(name: str) -> bool:
    return name.split(" ")[0] in OURS


def crossovers(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """`all` and `ours`: from which m on which candidate is the fastest, as "1 cuda", "512 triton panels"."""
    found: dict[str, list[str]] = {"all": [], "ours": []}
    for row in rows:
        for who, steps in found.items():
            left = {name: s for name, s in seconds(row).items() if who == "all" or ours(name)}
            if left:
                best = min(left, key=lambda name: (left[name], name))
                if not steps or steps[-1].split(" ", 1)[1] != best:
                    steps.append(f"{row['m']} {best}")
    return found


def shares(rows: list[dict[str, Any]]) -> dict[str, str]:
    """m -> the fastest of ours, its time, and what share of the bound it reaches."""
    found = {}
    for row in rows:
        left = {name: s for name, s in seconds(row).items() if ours(name)}
        if left:
            best = min(left, key=lambda name: (left[name], name))
            share = f", {row['bound_s'] / left[best]:.0%} of the bound" if row.get("bound_s") else ""
            found[str(row["m"])] = f"{best} {left[best] * 1e6:.4g} us{share}"
    return found


# ---- in words --------------------------------------------------------------------------------------------------------
def text(data: dict[str, Any]) -> str:
    """The sheet as a page. What is to be done something about comes first."""
    out = ["# Answer sheet", ""]
    if data["fake"]:
        out += ["**A fake device: no number here was measured.**", ""]
    out += [f"tree {data['digest']}, commit {data['commit'] or 'unknown'}", ""]
    for title, row in data["machine"].items():
        out.append(f"- {title}: {', '.join(f'{k} {v}' for k, v in row.items())}")
    nothing = f"none of {data['judged']} judged" if data["judged"] else "nothing is known: no test has run"
    out += section("Wrong kernels", [verdict(*item) for item in data["wrong"].items()], nothing)
    out += section("Suspect: called by failing tests that a wrong kernel explains",
                   [verdict(*item) for item in data["suspect"].items()])  # fmt: skip
    out += section("Failing tests that called no kernel", pairs(data["loose"]))
    out += section("Sanitizer", [f"{tool}: {line}" for tool, words in data["sanitizer"].items() for line in words])
    out += section("Rows that failed", pairs(data["failed"]))
    out += section("Rows that this machine cannot have", pairs(data["absent"]))
    out += section("Candidates that rows lack", [f"{why} ({few(titles)})" for why, titles in data["refused"].items()])
    out += section("Parts that did not come to their end", pairs(data["unfinished"]))
    out += section("Crossovers: from this number of rows on",
                   [f"{group}: {'; '.join(x['ours'])}. Of all: {'; '.join(x['all'])}"
                    for group, x in data["crossovers"].items()])  # fmt: skip
    out += section("Where one of our ways overtakes another", data["tables"].get("overtaken", []))
    out += section("The fastest of ours, and its share of the bound",
                   [f"{group}: {'; '.join(f'M={m} {t}' for m, t in found.items())}"
                    for group, found in data["shares"].items()])  # fmt: skip
    out += section("Proposed for the tables (tools/freeze_tuned.py writes them)", proposals(data["tables"]))
    return "\n".join(out) + "\n"


def proposals(tables: dict[str, Any]) -> list[str]:
    """Rows that peft_kernels/tuned would get, and what has no row, and why."""
    kernels = [f"{name}: {json.dumps(row, sort_keys=True)}" for name, rows in tables.get("kernels", {}).items()
               for row in rows]  # fmt: skip
    limits = [f"panels: {json.dumps(tables['panels'], sort_keys=True)}"] if tables.get("panels") else []
    return kernels + limits + [f"no row: {why}" for why in tables.get("refused", [])]


def section(title: str, lines: list[str], empty: str = "none") -> list[str]:
    return ["", f"## {title}", "", *([f"- {line}" for line in lines] or [empty])]


def pairs(found: dict[str, str]) -> list[str]:
    return [f"{name}: {why}" for name, why in found.items()]


def verdict(key: str, judged: dict[str, Any]) -> str:
    return f"{key}: {judged['failed']} tests failed, {judged['passed']} passed. {judged['why']}"


def few(titles: list[str]) -> str:
    return ", ".join(titles[:3]) + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")
