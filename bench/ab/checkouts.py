"""The three sides of a comparison, A, A' and B, as processes, and samples of them in turns."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ..measure import Stats
from ..pipes import Process, environment

SIDE = Path(__file__).resolve().parent / "side.py"
SIDES = ("A", "A'", "B")
LEAST_ROUNDS = 5
# Every order of the sides in turn: in a rotation alone, each would always run after the same other one.
ORDERS = list(itertools.permutations(SIDES))
_LOOK = """
import json, fastpeft, peft_kernels
from bench import machine
print(json.dumps([[m.__file__ for m in (fastpeft, peft_kernels, machine)], machine.level(), machine.commit()]))
"""

P = TypeVar("P", bound=Process)


def commit_of(checkout: Path) -> str:
    """The commit of a checkout that imports its own packages and has a native library. Raises SystemExit otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOK], cwd=checkout, env=environment(checkout), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: {checkout} is no checkout of this project that runs: {done.stderr.strip()[-500:]}")
    files, level, commit = json.loads(done.stdout.splitlines()[-1])
    foreign = [f for f in files if not Path(f).resolve().is_relative_to(checkout)]
    if foreign:
        raise SystemExit(f"error: expected the packages of {checkout}, Python imports {', '.join(foreign)}")
    if level.startswith("no native library"):
        raise SystemExit(f"error: {checkout} has {level}; run `make native` there")
    return str(commit)


@contextmanager
def sides(start: Callable[[str, Path], P], a: Path, b: Path) -> Iterator[dict[str, P]]:
    """A process for each side: `start(name, checkout)`. They end with the block, however it ends."""
    running: dict[str, P] = {}
    try:
        for side, checkout in zip(SIDES, (a, a, b), strict=True):
            running[side] = start(side, checkout)
        yield running
    finally:
        for process in running.values():
            process.close()


def in_turns(
    names: Sequence[str], sample: Callable[[str, str], float], rounds: int, budget_s: float
) -> dict[str, dict[str, Stats]]:
    """name -> side -> Stats of `sample(side, name)`, side by side for each name, in every order of the sides in turn.

    budget_s: stop after this many seconds in all, but never with fewer than five rounds."""
    stats = {name: {side: Stats() for side in SIDES} for name in names}
    begin = time.perf_counter()
    for r in range(rounds):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            for side in ORDERS[r % len(ORDERS)]:
                stats[name][side].samples.append(sample(side, name))
        if r + 1 >= LEAST_ROUNDS and time.perf_counter() - begin > budget_s:
            break
    return stats


def same_replies(what: str, replies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The one reply of all sides. Raises ValueError where the checkouts measure different things."""
    first = replies["A"]
    for side, reply in replies.items():
        if reply != first:
            raise ValueError(f"{what}: expected the same work in both checkouts, A has {first}, {side} has {reply}")
    return first


def ask_all(running: dict[str, Process], *request: Any) -> dict[str, dict[str, Any]]:
    """Replies to one request by side, which all sides work on at once: not for what is timed."""
    for process in running.values():
        process.send(json.dumps(request))
    return {side: process.receive() for side, process in running.items()}


def ask_each(running: dict[str, Process], *request: Any) -> dict[str, dict[str, Any]]:
    """Replies to one request by side, one side at work at a time."""
    return {side: process.ask(json.dumps(request)) for side, process in running.items()}
