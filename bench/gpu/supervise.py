"""A part in processes of its own: started, watched, ended, and started again without the row that took it down.

What a process did is read from its file. It is ended when it has written nothing for as long as a row may take, and
when the time of the call is over; with the part's share of the time it ends itself, after the row at which it is. A row
that had begun when its process ended becomes a line that says why; of a run that was killed from outside, and of one
whose time was over, such a row is begun again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files
from .verdicts import ENV
from .worker import DISK, LATE, MOST_LOST, NO_DEVICE

ROOT = Path(__file__).resolve().parent.parent.parent
START_S = 180.0  # until the first line: imports, and the first context on a device
GRACE_S = 5.0  # for what the process still writes once it was told
MOST_STARTS = 60
MOST_BEGINS = 6  # of a row that takes the whole run down, or that was ended with it by chance


@dataclass
class Ended:
    """How a part came out. state: "done"; "gave up", for good; "share used" of its time; "late": the call's time is
    over; "disk"; "no device". seconds: that it took."""

    state: str
    why: str = ""
    seconds: float = 0.0


def environment(out: Path) -> dict[str, str]:
    """Of every process of a run: this tree first, caches in the run's folder, no network, no verdict but the tests'."""
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = out / "cache"
    return {
        "TRITON_CACHE_DIR": str(cache / "triton"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **os.environ,
        # the part `tune` writes its tables beside it: rows are of the frozen ones, also after it
        ENV: str(out), "PYTHONPATH": path, "PEFT_KERNELS_CACHE": str(cache / "untuned"), "PEFT_KERNELS_VERIFY": "0",
    }  # fmt: skip


def end_leftovers(out: Path) -> None:
    """End what a run in this folder has started and, itself killed, could not end: tests and profilers would go on with
    the device. They are known by their environment."""
    mark = f"{ENV}={out}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        number = int(path.parent.name)
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if number != os.getpid() and mark in path.read_bytes().split(b"\0"):
                os.kill(number, signal.SIGKILL)


class Part:
    def __init__(self, name: str, out: Path, deadline: float, say: Callable[[str], None], digest: str) -> None:
        self.name, self.out, self.deadline, self.say, self.digest = name, out, deadline, say, digest
        self.path, self.log = out / f"{name}.jsonl", out / "logs" / f"{name}.log"
        self.limit = START_S

    def write(self, line: dict[str, Any]) -> None:
        files.append(self.path, {**line, **files.marks(files.settings(self.out))})

    def run(self, share_s: float) -> Ended:
        """Until all rows are done, or the part has used up its share, or one of the other ends."""
        start = time.monotonic()
        over = min(self.deadline, time.time() + share_s)  # when no row is begun any more
        strikes = 0
        ended = Ended("gave up", f"was started {MOST_STARTS} times")
        for _ in range(MOST_STARTS):
            self.leave_out_what_never_ends()
            size = self.size()
            code, why = self.process(over)
            begun = self.begun(size)
            if code == NO_DEVICE:
                ended = Ended("no device", last_line(self.log))
                break
            if code == DISK:
                ended = Ended("disk", "the disk is full")
                break
            if why == "late" or code == LATE:
                state = "late" if why == "late" or over == self.deadline else "share used"
                ended = Ended(state, f"{len(self.left())} rows are left")
                break
            for title in begun:
                self.without_the_culprit(title, why or told(code, self.log))
            if code == 0:
                ended = Ended("done")
                break
            rows = [line for line in files.lines(self.path, size) if "begin" in line]
            strikes = 0 if rows else strikes + 1
            if strikes == 2:
                ended = Ended("gave up", why or told(code, self.log))
                break
        ended.seconds = round(time.monotonic() - start, 1)
        return ended

    # ---- what its file says ----
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def begun(self, start: int) -> list[str]:
        """Rows that began after byte `start` of the file, and did not end; without those of which a candidate is known
        with which the process was lost."""
        open_rows: dict[str, None] = {}
        for line in files.lines(self.path, start):
            if "begin" in line:
                open_rows[line["title"]] = None
            elif "title" in line:
                open_rows.pop(line["title"], None)
            elif "lost" in line:
                open_rows.pop(line["row"], None)
        return list(open_rows)

    def without_the_culprit(self, title: str, why: str) -> None:
        """Of a row with which its process ended: the candidate that it named last is left out when it is done again;
        a row that named none, or lost too many, is given up."""
        tried = [x["trying"] for x in files.lines(self.path.with_suffix(".trying")) if x["row"] == title]
        lost = [x for x in files.lines(self.path) if x.get("row") == title and "lost" in x and self.mine(x)]
        if tried and len(lost) < MOST_LOST:
            self.path.with_suffix(".trying").unlink()  # what is lost before the next is named is laid to none
            self.write({"lost": tried[-1], "row": title, "why": why})
            self.say(f"{self.name}: {title}: {tried[-1]}: {why}")
        else:
            self.write({"title": title, "absent": why, "failed": True})
            self.say(f"{self.name}: {title}: {why}")

    def leave_out_what_never_ends(self) -> None:
        """A row at which whole runs were ended from outside, again and again, is not begun once more."""
        begins = Counter(line["title"] for line in files.lines(self.path) if self.mine(line) and "begin" in line)
        begins -= Counter(line["row"] for line in files.lines(self.path) if self.mine(line) and "lost" in line)
        done = files.rows(self.path, self.digest)
        for title, count in begins.items():
            if count >= MOST_BEGINS and title not in done:
                why = f"began {count} times, and each time the whole run was ended"
                self.write({"title": title, "absent": why, "failed": True})

    def mine(self, line: dict[str, Any]) -> bool:
        return line.get("digest") == self.digest

    def left(self) -> list[str]:
        titles = next((x["titles"] for x in reversed(list(files.lines(self.path))) if "titles" in x), [])
        done = files.rows(self.path, self.digest)
        return [title for title in titles if title not in done]

    # ---- its process ----
    def process(self, over: float) -> tuple[int, str | None]:
        """Run the worker to its end. (exit status, why it was ended: "late", or that it was silent, or None)"""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bench.gpu.worker", self.name, str(self.out), repr(over), str(os.getpid())]
        with self.log.open("ab") as log:
            child = subprocess.Popen(command, cwd=ROOT, env=environment(self.out), stdout=log, stderr=log,
                                     stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
            try:
                return self.watch(child)
            finally:
                end(child)

    def watch(self, child: subprocess.Popen[bytes]) -> tuple[int, str | None]:
        position, spoke, limit, pause = self.size(), time.monotonic(), START_S, 0.01
        while True:
            code = child.poll()
            if self.size() > position:
                new = list(files.lines(self.path, position))
                position, spoke = self.size(), time.monotonic()
                limit = next((float(x["limit_s"]) for x in new if "limit_s" in x), limit)
                for line in new:
                    quiet = "begin" in line or line.get("outcome") in ("passed", "skipped")
                    if "title" in line and not quiet:
                        self.say(f"{self.name}: {line['title']}: {line.get('absent') or line.get('outcome', 'done')}")
            if code is not None:
                return code, None
            if time.monotonic() - spoke > limit:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGUSR1)  # the log then says where it stood
                time.sleep(0.3)
                return -signal.SIGKILL, f"did not finish in {limit:g} s"
            if time.time() > self.deadline + GRACE_S:
                return -signal.SIGKILL, "late"
            time.sleep(pause)
            pause = min(0.2, pause * 1.2)


def end(child: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(20)  # one that waits for a lost driver cannot be ended; the run goes on


def told(code: int, log: Path) -> str:
    """Why a process ended, by its status and the last line of its log."""
    if code == 0:
        return f"a process ended with it: logs/{log.name}"
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        if number in set(signal.Signals):
            return f"the process was ended by {signal.Signals(number).name}"
    return f"the process ended with status {code}: {last_line(log)[:300]}"


def last_line(log: Path) -> str:
    try:
        text = [line for line in log.read_bytes()[-4000:].decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        text = []
    return (text or ["it said nothing"])[-1]
