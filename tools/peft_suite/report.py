"""Results of PEFT's tests: counts by file, groups of failures, and docs/compatibility.md."""

from __future__ import annotations

import importlib.metadata
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
REASONS = {
    "private": "the test reaches into private parts of PEFT",
    "wrong": "PEFT is wrong, and our tests hold what is right",
}
# What differs from case to case in a message; names in quotes stay.
_NOISE = {
    r"tensor\(.*": "tensor", r"(?<!\w)/\S+": "PATH", r"0x[0-9a-f]+|\d+(?:\.\d+)?(?:e[-+]\d+)?": "N",
    r"'[^'\w]*[^']{40,}'|\"[^\"]{40,}\"": "'...'", r"\s+": " ",
}  # fmt: skip


@dataclass
class File:
    """A file's cases and their outcomes. failed and skipped: why, by the case's name."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def results_of(suite: Path, package: str) -> Path:
    return suite / "results" / package


def read(path: Path) -> File:
    """The cases of one run, from pytest's XML; a run that wrote none has failed as a whole."""
    found = File()
    if not path.exists():
        found.failed[f"{path.stem}.py"] = "the run wrote no results (see its log)"
        return found
    for case in ET.parse(path).iter("testcase"):
        place = case.get("classname", "").removeprefix("tests.").split(".")
        name = "::".join([f"{place[0]}.py" if place[0] else f"{path.stem}.py", *place[1:], case.get("name", "")])
        problem = next((case.find(what) for what in ("failure", "error") if case.find(what) is not None), None)
        skip = case.find("skipped")
        if problem is not None:
            found.failed[name] = problem.get("message") or "?"
        elif skip is not None:
            found.skipped[name] = skip.get("message") or "?"
        elif name not in found.failed:  # an error while it was taken down has a second entry
            found.passed.append(name)
    return found


def counts(file: File) -> str:
    return f"{len(file.passed)} passed, {len(file.failed)} failed, {len(file.skipped)} skipped"


def not_meant(path: Path = HERE / "not_meant.txt") -> dict[str, tuple[str, str]]:
    """By a case's name, why it is not meant to pass: one of REASONS and a sentence.

    The file has a line `# private: sentence` or `# wrong: sentence`, then the cases it is true of, one a line."""
    found: dict[str, tuple[str, str]] = {}
    reason = ("", "")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("# "):
            sort, _, sentence = line[2:].partition(": ")
            if sort not in REASONS or not sentence:
                raise SystemExit(f"{path.name}:{number}: expected `# {' or '.join(REASONS)}: a reason`, got {line!r}")
            reason = (sort, sentence)
        elif line.strip():
            if not reason[0] or line in found:
                raise SystemExit(f"{path.name}:{number}: {line} is listed twice, or before any reason")
            found[line] = reason
    return found


def group_of(message: str) -> str:
    """The first line of a failure without what differs from case to case."""
    text = message.strip().splitlines()[0] if message.strip() else "?"
    for pattern, instead in _NOISE.items():
        text = re.sub(pattern, instead, text)
    return text[:140].replace("|", "/")


def show(results: Path, names: list[str], every: list[str], root: Path | None) -> int:
    """Print the total of the files that ran and the groups of what failed, and write the document of all files that
    have results, below `root`. Returns the exit code."""
    files = {name: read(results / f"{name}.xml") for name in names}
    listed = not_meant()
    failed = {case: why for file in files.values() for case, why in file.failed.items() if case not in listed}
    groups = Counter(map(group_of, failed.values()))
    for text, count in groups.most_common(30):
        print(f"{count:6} {text}")
    passed = sum(len(file.passed) for file in files.values())
    back = sorted(case for file in files.values() for case in file.passed if case in listed)
    print(f"total: {passed} passed, {sum(len(f.failed) for f in files.values())} failed, "
          f"{sum(len(f.skipped) for f in files.values())} skipped; "
          f"{len(failed)} of the failed are not in not_meant.txt")  # fmt: skip
    for case in back:
        print(f"passes, but is in not_meant.txt: {case}")
    if root is not None:
        have = {name: results / f"{name}.xml" for name in every}
        text = document({name: read(path) for name, path in have.items() if path.exists()}, every, listed)
        (root / "docs" / "compatibility.md").write_text(text, encoding="utf-8")
    return int(bool(failed or back))


def document(files: dict[str, File], every: list[str], listed: dict[str, tuple[str, str]]) -> str:
    """docs/compatibility.md."""
    rows, total = [], Counter[str]()
    failing: dict[str, list[str]] = defaultdict(list)
    for name in every:
        if (file := files.get(name)) is None:
            rows.append(f"| `{name}` | not run | | | |")
            continue
        meant = {case: why for case, why in file.failed.items() if case not in listed}
        numbers = [len(file.passed), len(meant), len(file.failed) - len(meant), len(file.skipped)]
        rows.append(f"| `{name}` | {' | '.join(map(str, numbers))} |")
        total.update(dict(zip(("passed", "failed", "not meant", "skipped"), numbers, strict=True)))
        for case, why in meant.items():
            failing[group_of(why)].append(case)
    reasons = Counter(listed.values())
    packages = ("torch", "transformers")
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    kinds = {sort: [(text, n) for (which, text), n in reasons.items() if which == sort] for sort in REASONS}
    lines = [
        "# Compatibility with PEFT", "",
        "`make peft-suite [FILES=...]` writes this file: PEFT 0.21.2's own tests, run with fastpeft in PEFT's place",
        f"(`tools/peft_suite/`), with {versions}, without a GPU.", "",
        "| file | passed | failed | not meant to pass | skipped |", "|---|---|---|---|---|", *rows,
        f"| all | {total['passed']} | {total['failed']} | {total['not meant']} | {total['skipped']} |", "",
        "Skipped are what PEFT's tests skip themselves: what needs a GPU, a package that is not installed, or what a",
        "method does not have. PEFT itself passes 32,423, fails 40 and skips 4,914 there.", "",
        "## Not meant to pass", "",
        "Case by case in `tools/peft_suite/not_meant.txt`, with reasons of two kinds.", "",
    ]  # fmt: skip
    for sort, meaning in REASONS.items():
        lines += [f"**{meaning[0].upper()}{meaning[1:]}:**", ""]
        lines += [part for text, n in kinds[sort] for part in _item(f"{text} ({n})")] or ["- none"]
        lines.append("")
    lines += ["## Failing", ""]
    for text, cases in sorted(failing.items(), key=lambda item: -len(item[1])):
        lines += _item(f"{len(cases)}: `{text.replace('`', '')}`, as in `{cases[0].split('[')[0]}`")
    return "\n".join(lines if failing else [*lines, "Nothing."]) + "\n"


def _item(text: str) -> list[str]:
    """An item of a list, wrapped."""
    import textwrap

    return textwrap.wrap(text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
