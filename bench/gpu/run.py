"""`python tools/gpu_run.py --out DIR`: all that a machine with a GPU can tell about these kernels, part by part.

Needs Python, torch and pytest, and where the CUDA library is to be built nvcc, cmake and ninja; no make, no pip, no git
and no network. Every row is on the disk before the next begins, so a run can be ended at any time, and
`--resume` goes on with it: calls of a few minutes each do as well as one of an hour. Last comes an answer sheet.

Exit status: 0 all is done and nothing was found wrong, 1 all is done, and the sheet names what is wrong, 2 the call is
not understood or there is no GPU, 3 the time is over: call it again with --resume, 4 the disk is full.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import checks
from . import faults, files, plan, sheet, supervise

RUN = "run.jsonl"  # how each part ended
LAST = ("done", "gave up", "share used")  # states of a part after which the run goes on with the next one


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("gpu_run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    p.add_argument("--minutes", type=float, help="of this call; what is left then, --resume does (default: no limit)")
    p.add_argument("--budget", type=float, metavar="MINUTES",
                   help=f"of the whole run, of which each part has a share (default: {plan.MINUTES:g}; no limit with "
                   "--fake)")  # fmt: skip
    p.add_argument("--parts", nargs="+", choices=plan.parts(), metavar="PART",
                   help=f"only these of {', '.join(plan.parts())}")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    p.add_argument("--commit", help="the commit of this tree, where there is no git to ask")
    p.add_argument("--fake", nargs="?", const="", metavar="FAULTS",
                   help="a fake device on the CPU, with faults: crash=example/M=16 (bench/gpu/faults.py)")  # fmt: skip
    return p


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        self.digest = checks.digest_of_tree()
        self.budget = args.budget or (plan.MINUTES if args.fake is None else float("inf"))
        self.deadline = time.time() + 60 * args.minutes if args.minutes else float("inf")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def begin(self) -> None:
        settings = {
            "digest": self.digest, "commit": self.args.commit, "fake": self.args.fake is not None,
            "faults": self.args.fake, "session": secrets.token_hex(4), "begun": files.now(),
        }  # fmt: skip
        files.replace(self.out / files.SETTINGS, json.dumps(settings, indent=1) + "\n")

    def ended(self) -> dict[str, dict[str, object]]:
        """part -> its last line, with the seconds of all."""
        found: dict[str, dict[str, object]] = {}
        for line in files.lines(self.out / RUN):
            if line.get("digest") == self.digest:
                before = found.get(line["part"], {}).get("all_seconds", 0.0)
                found[line["part"]] = {**line, "all_seconds": float(line["seconds"]) + float(str(before))}
        return found

    def parts(self) -> str:
        """Go through the parts. The state in which the call ends: "done", "late" or "disk". SystemExit where there is
        no device to run them on."""
        for part in self.args.parts or plan.parts():
            last = self.ended().get(part, {})
            share = plan.share_s(part, self.budget) - float(str(last.get("all_seconds", 0)))
            if part in plan.AGAIN:
                share = plan.PLAN[part]
            elif last.get("state") in ("done", "gave up") or (last.get("state") == "share used" and share < 1):
                continue
            if time.time() >= self.deadline:
                return "late"
            self.say(f"== {part}")
            one = supervise.Part(part, self.out, self.deadline, self.say, self.digest)
            ended = one.run(max(share, 1.0))
            self.say(f"== {part}: {ended.state}{f', {ended.why}' if ended.why else ''} ({ended.seconds:g} s)")
            if ended.state == "no device":
                print(f"error: {ended.why}. `python -m bench --static` reports on the kernels' machine code without "
                      "one, and --fake makes a run of made-up numbers.", file=sys.stderr)  # fmt: skip
                raise SystemExit(2)
            files.append(self.out / RUN, {"part": part, "digest": self.digest, "state": ended.state, "why": ended.why,
                                          "seconds": ended.seconds, "time": files.now()})  # fmt: skip
            if ended.state not in LAST:
                return ended.state
        return "done"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Two runs in one folder would take each other's rows."""
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"error: another run is at work in {out}") from None
        yield


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    try:
        faults.Faults.parse(args.fake or "")
    except ValueError as e:
        p.error(str(e))
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / files.SETTINGS).exists():
        if not args.resume:
            p.error(f"{args.out} has a run already: --resume goes on with it, another --out begins a new one")
        if files.settings(args.out).get("fake") is not (args.fake is not None):
            p.error(f"{args.out} has a run {'on a fake device' if args.fake is None else 'on a GPU'}: made-up and "
                    "measured numbers do not go together")  # fmt: skip
    try:
        with alone(args.out):
            run = Run(args)
            supervise.end_leftovers(run.out)
            run.begin()
            state = run.parts()
            found = sheet.write(run.out)
    except OSError as e:
        if e.errno not in files.FULL:
            raise
        state = "disk"
    if state == "disk":
        print(f"error: there is no room left in {args.out}: make some, then go on with --resume", file=sys.stderr)
        return 4
    print(found.text)
    if state == "late":
        print(f"the time is over: go on with --resume --out {args.out}")
        return 3
    return 1 if found.data["wrong"] or found.data["loose"] or found.data["sanitizer"] else 0


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
