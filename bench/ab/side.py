"""One checkout's rows of a suite in a process of its own, driven over pipes by checkouts.py.

Run by its path in another checkout, whose packages and bench it imports: of this one it takes this file and pipes.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != HERE]  # Python puts it before the checkout

import gc  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import time  # noqa: E402
from typing import Any  # noqa: E402

from bench import __main__ as cli  # noqa: E402


class Side:
    """Rows of a suite, one at a time, and samples of their candidates."""

    def __init__(self, task: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(task["threads"])
        args = cli.parser().parse_args(task["argv"])
        args.threads = task["threads"]
        module = importlib.import_module(f"bench.suites.{args.suite.replace('-', '_')}")
        self.rows = module.rows(args)
        self.candidates: dict[str, Any] = {}
        self.position: dict[str, int] = {}

    def next(self) -> dict[str, Any]:
        """Build the next row: its title, case and candidates with their numbers of copies; `end` after the last."""
        self.candidates = {}  # their weights are large
        gc.collect()
        gc.enable()
        row = next(self.rows, None)
        if row is None:
            return {"end": True}
        self.candidates = {c.name: c for c in row.candidates}
        copies = {c.name: len(c.calls) for c in row.candidates}
        return {"title": row.title, "case": row.case, "copies": copies}

    def prepare(self, names: list[str], sample_s: float) -> dict[str, Any]:
        """Keep the candidates `names` alone, warmed; how many calls of each last about `sample_s`."""
        self.candidates = {name: self.candidates[name] for name in names}
        self.position = dict.fromkeys(names, 0)
        gc.collect()
        gc.disable()
        calls = {}
        for name in names:
            self.run(name, 1)
            once = min(self.run(name, 1) for _ in range(2))
            calls[name] = max(1, min(4096, round(sample_s / max(once, 1e-7))))
        return {"calls": calls}

    def sample(self, name: str, calls: int) -> dict[str, Any]:
        """Seconds per call. Calls before it, untimed, wake the threads that slept while the others were at work."""
        if calls > 1:
            self.run(name, max(1, calls // 10))
        return {"s": self.run(name, calls) / calls}

    def run(self, name: str, calls: int) -> float:
        candidate = self.candidates[name]
        if candidate.enter is not None:
            candidate.enter()
        every = candidate.calls
        count, i = len(every), self.position[name]
        start = time.perf_counter()
        for _ in range(calls):
            every[i]()
            i += 1
            if i == count:
                i = 0
        took = time.perf_counter() - start
        self.position[name] = i
        return took


def main() -> None:
    spec = importlib.util.spec_from_file_location("pipes_of_this_checkout", HERE.parent / "pipes.py")
    assert spec is not None
    assert spec.loader is not None
    pipes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pipes)
    task, told, reply = pipes.driven()
    side = Side(task)
    for line in told:
        what, *arguments = json.loads(line)
        reply(getattr(side, what)(*arguments))


if __name__ == "__main__":
    main()
