"""`python -m bench.gpu.worker PART OUT UNTIL RUNNER`: the rows of one part, in a process that the runner starts for it.
No row is begun that would not end until that time. It ends with the process RUNNER.

It leaves out what OUT/PART.jsonl has of this tree, and writes a line before a row begins and one when it ends: a row
that takes the process with it is known by the line that is missing.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from . import device, faults, files

# exit statuses: all rows; there is no device; no room; the device is lost; no time for the next row
DONE, NO_DEVICE, DISK, STICKY, LATE = 0, 73, 74, 75, 76
PR_SET_PDEATHSIG = 1
MOST_LOST = 4  # candidates that a row may lose before it is given up
SHORTEST_S = 5.0  # a row is not begun with less time than this, or than the longest took


def end_with(runner: int) -> None:
    """A process whose runner was killed would go on using the device, and writing beside the next one."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != runner:  # it was killed before
        os._exit(1)


class Worker:
    def __init__(self, part: str, out: Path, until: float) -> None:
        self.part, self.out, self.path, self.until = part, out, out / f"{part}.jsonl", until
        self.settings = files.settings(out)
        self.fake, self.digest = bool(self.settings.get("fake")), self.settings.get("digest")
        self.faults = faults.Faults.parse(self.settings.get("faults") or "")
        self.marks = files.marks(self.settings)

    def write(self, line: dict[str, Any], sync: bool = True) -> None:
        files.append(self.path, {**line, **self.marks}, sync)

    def run(self) -> int:
        module = importlib.import_module(f"bench.gpu.parts.{self.part}")
        found = device.find(self.out, self.fake)
        limit = module.LIMIT_S if self.faults.limit is None else self.faults.limit
        if hasattr(module, "run"):
            return int(module.run(found, self.settings, limit))
        titles = module.titles(found)
        if len(set(titles)) != len(titles):
            raise ValueError(f"{self.part}: a title is given twice: {titles}")
        self.write({"titles": titles, "limit_s": limit})
        done = files.rows(self.path, self.digest)
        longest = SHORTEST_S
        for title in titles:
            if title in done:
                continue
            if time.time() + longest > self.until:
                return LATE
            self.write({"title": title, "begin": files.now()}, sync=False)
            begin = time.monotonic()
            row, sticky = self.row(module, title, found)
            took = time.monotonic() - begin
            if sticky and found.tried is not None and len(found.lost) < MOST_LOST:
                # the row stays open, and the next process does it without this candidate
                self.write({"lost": found.tried, "row": title, "why": row["absent"]})
            else:
                self.write({"title": title, "seconds": round(took, 2), **row})
            if sticky:
                return STICKY
            longest = max(longest, took)
        return DONE

    def row(self, module: ModuleType, title: str, found: device.Device) -> tuple[dict[str, Any], bool]:
        """The row, with `absent` where it came to nothing; and that the device serves this process no more."""
        lost = {x["lost"]: x["why"] for x in files.lines(self.path)
                if x.get("row") == title and "lost" in x and x.get("digest") == self.digest}  # fmt: skip

        def trying(candidate: str) -> None:
            files.tell(self.path.with_suffix(".trying"), {"row": title, "trying": candidate})
            faults.come(self.faults.of(self.out, self.part, f"{title} with {candidate}"), self.path, found)

        self.path.with_suffix(".trying").unlink(missing_ok=True)
        found.begin(title, lost, trying)
        row: dict[str, Any]
        try:
            faults.come(self.faults.of(self.out, self.part, title), self.path, found)
            row = dict(module.row(title, found))
            if lost:
                row["refused"] = {**row.get("refused", {}), **lost}
            json.dumps(row, allow_nan=False)
        except Exception as e:
            found.tried = getattr(e, "candidate", found.tried)  # by the name that the part gives
            row = {"absent": reason(e), "failed": True}
            if type(e).__name__ == "OutOfMemoryError":
                row["absent"] = f"out of memory: {reason(e)}"
        free()
        try:
            found.synchronize()
        except Exception as e:
            return {"absent": f"the device was lost: {row.get('absent') or reason(e)}", "failed": True}, True
        return withheld(row, found), False


def reason(e: BaseException) -> str:
    """An exception in a line."""
    return f"{type(e).__name__}: {(str(e).strip() or 'no message').splitlines()[0]}"


def free() -> None:
    """Give back what a row, or an exception of it, has held."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except Exception:
            return  # a lost device: the caller asks it next, and keeps the reason


def withheld(row: dict[str, Any], found: device.Device) -> dict[str, Any]:
    """The row without times of kernels that the tests found wrong."""
    fields = [row.get(name) for name in ("op", "direction", "dtype", "m")]
    if None in fields or not row.get("times"):
        return row
    op, direction, dtype, m = fields
    why = {name: found.wrong(op, name.split(" ")[0], direction, dtype, m) for name in row["times"]}
    refused = {name: text for name, text in why.items() if text is not None}
    if not refused:
        return row
    times = {name: value for name, value in row["times"].items() if name not in refused}
    return {**row, "times": times, "refused": {**row.get("refused", {}), **refused}}


def main(argv: list[str]) -> int:
    part, out, until, runner = argv
    end_with(int(runner))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the runner asks before it ends a silent process
    try:
        return Worker(part, Path(out), float(until)).run()
    except device.NoDevice as e:
        print(e)
        return NO_DEVICE
    except OSError as e:
        if e.errno not in files.FULL:
            raise
        return DISK


if __name__ == "__main__":
    code = main(sys.argv[1:])
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        pass  # a full disk, of which the status tells
    os._exit(code)  # a lost device, or a thread that waits for it, must not keep the process
