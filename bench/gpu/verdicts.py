"""Verdicts of the tests: for each op, backend, direction, dtype and class of rows, by the tests that called it.

A test often calls several kernels, and when it fails one of them is wrong. Tests that fail with one kernel alone name
it. Of the others the kernel is named that fails in the largest share of its tests; where several do, that of which the
tests of all dtypes and classes of rows fail most often; where that does not tell them apart, all of them. The rest of
those tests' kernels are suspect: they keep their numbers, and the answer sheet names them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files

PART = "tests"
# What the plugin pytest_verdicts.py is told: the folder, as every process of a run is, the seconds of a test, and which
# tests are left out, one list for all of xdist's workers, also for those that come late.
ENV, LIMIT_ENV, DONE = "PEFT_KERNELS_GPU_RUN", "PEFT_KERNELS_GPU_RUN_LIMIT", "tests-done.txt"
GRACE_S = 20.0  # after the limit of a test, for a process in which no thread of Python runs
CLASSES = ((1, 8), (9, 64), (65, 512), (513, 1 << 62))  # rows of x: the kernels' paths
ANY = "any"  # of an op whose first tensor is not x, or whose tensors have no one dtype
WITHOUT_ROWS = {"quantize_4bit", "dequantize_4bit", "squared_row_norms", "dora_norm", "cayley"}
DTYPES = {"torch.float32": "f32", "torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float64": "f64"}


def class_of(m: int) -> str:
    """The class of rows that m belongs to: "1-8", "9-64", "65-512" or "513-"."""
    low, high = next(c for c in CLASSES if c[0] <= max(1, m) <= c[1])
    return f"{low}-{high if high < 1 << 62 else ''}"


def split(op: str) -> tuple[str, str]:
    """`lora_linear_backward` -> ("lora_linear", "backward")."""
    return (op.removesuffix("_backward"), "backward") if op.endswith("_backward") else (op, "forward")


def key_of(op: str, backend: str, args: tuple[Any, ...]) -> str:
    """`op backend direction dtype rows` of a call, `op` as the dispatcher names it."""
    name, direction = split(op)
    first = args[0]
    # dequantize_4bit is told which; told by its name, for this file knows no torch
    named = [a for a in args if type(a).__name__ == "dtype"]
    dtype = DTYPES.get(str(named[0] if named else first.dtype), ANY)
    rows = ANY if name in WITHOUT_ROWS else class_of(first.numel() // max(1, first.shape[-1]))
    return f"{name} {backend} {direction} {dtype} {rows}"


@dataclass
class Verdicts:
    """found: "op backend direction dtype rows" -> {"verdict": "wrong", "suspect" or "passed", "why": text, "passed":
    tests, "failed": tests}. loose: failing tests that called no kernel, title -> reason."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    loose: dict[str, str] = field(default_factory=dict)

    @staticmethod
    def read(folder: Path) -> Verdicts:
        """Of a run's folder; empty where its tests have not run."""
        return judge(files.lines(folder / f"{PART}.jsonl"), files.settings(folder).get("digest"))

    def wrong(self, op: str, backend: str, direction: str, dtype: str, m: int) -> str | None:
        """Why a kernel was found wrong; None where it was not. Of an op that has no rows of x, m does not matter."""
        for one in ("forward", "backward") if direction == "step" else (direction,):
            for kind in (dtype, ANY):
                for rows in (class_of(m), ANY):
                    judged = self.found.get(f"{op} {backend} {one} {kind} {rows}", {})
                    if judged.get("verdict") == "wrong":
                        return f"wrong by its tests: {judged['why']}"
        return None

    def of(self, verdict: str) -> list[str]:
        return sorted(key for key, judged in self.found.items() if judged["verdict"] == verdict)


def judge(lines: Iterable[dict[str, Any]], digest: str | None = None) -> Verdicts:
    """Verdicts from the lines of OUT/tests.jsonl."""
    tests: dict[str, dict[str, Any]] = {}
    called: dict[str, set[str]] = defaultdict(set)
    for line in lines:
        if digest not in (None, line.get("digest")):
            continue
        if "key" in line:
            called[line["test"]].add(line["key"])
        elif "title" in line and "begin" not in line and line.get("outcome") != "skipped":
            tests[line["title"]] = line
    passed, failing = defaultdict(int), dict[str, set[str]]()
    for title, line in tests.items():
        keys = set(line.get("keys") or called[title])
        if line.get("outcome") == "passed":
            for key in keys:
                passed[key] += 1
        else:
            failing[title] = keys
    wrong = blamed(failing, passed)
    verdicts = Verdicts(loose={title: _why(tests[title]) for title, keys in failing.items()
                               if not keys and "absent" not in tests[title]})  # fmt: skip
    for key in sorted({*passed, *(key for keys in failing.values() for key in keys)}):
        titles = sorted(title for title, keys in failing.items() if key in keys)
        verdict = "wrong" if key in wrong else "suspect" if titles else "passed"
        verdicts.found[key] = {"verdict": verdict, "passed": passed[key], "failed": len(titles)}
        if titles:
            verdicts.found[key]["why"] = f"{titles[0]}: {_why(tests[titles[0]])}"
    return verdicts


def _why(line: dict[str, Any]) -> str:
    return str(line.get("absent") or line.get("why") or "no reason")


def blamed(failing: dict[str, set[str]], passed: dict[str, int]) -> set[str]:
    """The kernels that explain all failing tests."""
    wrong = {next(iter(keys)) for keys in failing.values() if len(keys) == 1}
    overall = shares(failing.values(), passed, kernel)
    while left := [keys for keys in failing.values() if keys and not keys & wrong]:
        share = shares(left, passed, str)
        rank = {key: (value, overall[kernel(key)]) for key, value in share.items()}
        wrong |= {key for key, value in rank.items() if value == max(rank.values())}
    return wrong


def kernel(key: str) -> str:
    """A key without dtype and rows."""
    return " ".join(key.split(" ")[:3])


def shares(failing: Iterable[set[str]], passed: dict[str, int], name: Callable[[str], str]) -> dict[str, float]:
    """name(key) -> of the tests that called it, the share that failed."""
    fails, passes = defaultdict(int), defaultdict(int)
    for keys in failing:
        for one in {name(key) for key in keys}:
            fails[one] += 1
    for key, count in passed.items():
        passes[name(key)] += count
    return {one: count / (count + passes[one]) for one, count in fails.items()}
