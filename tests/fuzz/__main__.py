"""`python -m tests.fuzz --minutes 10 --seed 3`: the fuzzer, for as long as one likes. Exit status 1 if anything broke.

Cases run in child processes, so that a crash is a failure of one case and not the end of the run: a child says each
case's seed before it runs it. A failure's line is a command that runs that case alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("ops", "prepared", "stale")
FAILURES = 20  # after so many it stops: they are most likely one


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--what", choices=KINDS, nargs="+", default=list(KINDS), help="raw operators, prepared calls, "
                        "values that models keep (default: all, one after the other)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=1.0, help="time for each (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="the first case's seed; the next ones count on")
    parser.add_argument("--cases", type=int, default=10**9, help="at most so many of each")
    parser.add_argument("--backend", default="native", help="native, reference, or triton in its interpreter (slow)")
    parser.add_argument("--op", nargs="*", default=[], help="of ops: these alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    given = options()
    if given.child:
        from . import child

        child.run(given)
        return 0
    failures = [f for what in given.what for f in fuzz(what, given)]
    for failure in failures:
        print(failure)
    return 1 if failures else 0


def fuzz(what: str, given: argparse.Namespace) -> list[str]:
    """The failures of one kind of case."""
    deadline, seed, failures = time.monotonic() + 60 * given.minutes, given.seed, []
    end, done = given.seed + given.cases, 0
    while seed < end and time.monotonic() < deadline and len(failures) < FAILURES:
        left = deadline - time.monotonic()
        last, more, status, error = _child(what, given, seed, min(end, seed + 20_000), left)
        failures += more
        if last is None:
            failures.append(f"{what}: no case ran: {error[-3000:]}")
            break
        done += last + 1 - seed
        if status != 0:
            ended = f"the process ended with status {status} {error[-1500:]}"
            failures.append(f"{_command(what, given, last)}\n    {ended}")
        seed = last + 1
    print(f"{what}: {done} cases from seed {given.seed}, {len(failures)} failures", flush=True)
    return failures


def _child(
    what: str, given: argparse.Namespace, seed: int, end: int, seconds: float
) -> tuple[int | None, list[str], int, str]:
    """(the last seed that was begun, failures, the exit status, what it wrote to stderr) of cases in a process."""
    command = [
        sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--child", "--what", what, "--seed", str(seed),
        "--cases", str(end - seed), "--minutes", str(seconds / 60), "--backend", given.backend, "--op", *given.op,
    ]  # fmt: skip
    folders = (ROOT, ROOT / "python", ROOT / "tests" / "tools")
    paths = [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if given.backend == "triton":
        env["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    noise: list[str] = []
    reader = threading.Thread(target=noise.extend, args=(process.stderr,), daemon=True)
    reader.start()
    hung = threading.Timer(seconds + 120, process.kill)
    hung.start()
    last, failures = None, []
    for line in process.stdout:
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "case":
            last = int(rest)
        elif word == "failure":
            failures.append(f"{_command(what, given, int(last or seed))}\n    {rest}")
    status = process.wait()
    hung.cancel()
    reader.join()
    return last, failures, status, "".join(noise)


def _command(what: str, given: argparse.Namespace, seed: int) -> str:
    of = f" --op {' '.join(given.op)}" if given.op else ""
    return f"python -m tests.fuzz --what {what} --seed {seed} --cases 1 --backend {given.backend}{of}"


if __name__ == "__main__":
    sys.exit(main())
