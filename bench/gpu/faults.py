"""Faults of a fake device: what goes wrong on machines with a GPU, planted at a row.

`FAULT=PART/TEXT` comes at the first row of PART whose title contains TEXT, and again if that row is done again; where
TEXT is in `TITLE with CANDIDATE` alone, it comes when the row tries that candidate:

    crash    the process ends by a signal          hang    it does nothing more, and does not listen
    oom      the device is out of memory           sticky  every later call of the process fails, too
    disk     the next line does not fit on the disk, once in a run
    fail     of the part tests: the test fails
`wrong=OP/BACKEND` makes a kernel return wrong numbers. `limit=SECONDS` is the limit of a row in a fake run, and
`tests=PATH` a file of tests in place of those that a fake run has.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import files

AT_ROWS = ("crash", "hang", "oom", "sticky", "disk", "fail")


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's, by which the worker knows it."""


@dataclass
class Faults:
    """at: (fault, part, text); wrong: (op, backend); limit: seconds of a row, None where the part's own counts; tests:
    files, none where the part's own count."""

    at: list[tuple[str, str, str]] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    limit: float | None = None
    tests: list[str] = field(default_factory=list)

    @staticmethod
    def parse(text: str) -> Faults:
        """`crash=rows/M=16,limit=2`. ValueError where it is not of this form."""
        found = Faults()
        for item in filter(None, (one.strip() for one in text.split(","))):
            name, _, value = item.partition("=")
            first, _, rest = value.partition("/")
            if name == "limit" and value:
                found.limit = float(value)
            elif name == "tests" and value:
                found.tests.append(value)
            elif name == "wrong" and rest:
                found.wrong.append((first, rest))
            elif name in AT_ROWS and rest:
                found.at.append((name, first, rest))
            else:
                form = ", ".join(f"{fault}=PART/TEXT" for fault in AT_ROWS)
                form += ", wrong=OP/BACKEND, limit=SECONDS or tests=PATH"
                raise ValueError(f"--fake: expected {form}, got {item!r}")
        return found

    def of(self, out: Path, part: str, title: str) -> str | None:
        """The fault that comes at this row. OUT/faults.jsonl has the rows at which they came."""
        for number, (fault, where, text) in enumerate(self.at):
            if where != part or text not in title:
                continue
            came = [x["at"] for x in files.lines(out / "faults.jsonl") if x["fault"] == number]
            if not came or (came[0] == title and fault != "disk"):
                files.append(out / "faults.jsonl", {"fault": number, "at": title}, sync=False)
                return fault
        return None


def come(fault: str | None, path: Path, device: Any) -> None:
    """Let a fault happen, here and now. path: the file of the part's lines; device: has `broken`."""
    if fault == "crash":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(3600)
    elif fault == "oom":
        raise OutOfMemoryError("CUDA out of memory (planted)")
    elif fault == "sticky":
        device.broken = "CUDA error: an illegal memory access was encountered (planted)"
        raise RuntimeError(device.broken)
    elif fault == "disk":
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
