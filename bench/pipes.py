"""A process that does one thing after another when told to, over pipes: a JSON object a line each way.

`Process` is the end of the one that tells, `driven` that of the one that is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any


def environment(checkout: Path) -> dict[str, str]:
    """This process's environment, with the packages and the bench of `checkout` before installed ones."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(checkout), str(checkout / "python")])}


class Process:
    """`python <arguments>` in a checkout. Raises RuntimeError with the end of its output when it dies."""

    def __init__(self, name: str, checkout: Path, arguments: list[str], task: dict[str, Any]) -> None:
        self.name = name
        # a file: a pipe that nobody reads would stop a process that warns much
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=checkout, text=True, env=environment(checkout),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        self.send(json.dumps(task))

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise self._ended()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def ask(self, line: str) -> dict[str, Any]:
        self.send(line)
        return self.receive()

    def close(self) -> None:
        """End the process, also one that is in the middle of something or dead."""
        try:
            if self.process.poll() is None:
                self.send("end")
                self.process.wait(timeout=60)
        except (RuntimeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            self.errors.close()

    def _ended(self) -> RuntimeError:
        self.process.wait()
        self.errors.seek(0)
        return RuntimeError(f"{self.name} ended with status {self.process.returncode}: {self.errors.read()[-2000:]}")


def driven() -> tuple[dict[str, Any], Iterator[str], Callable[[Any], None]]:
    """The task of this process, the lines that it is told after it, until "end", and a function that replies.

    Warnings, and what is printed from now on, do not reach the pipe.
    """
    warnings.simplefilter("ignore")
    task = json.loads(sys.stdin.readline())
    replies = sys.stdout
    sys.stdout = sys.stderr  # libraries that print must not break the protocol

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    return task, takewhile(lambda line: line.strip() != "end", sys.stdin), reply
