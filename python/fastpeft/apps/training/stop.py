"""Ctrl-C and SIGTERM: a run ends after the step it is in, with a checkpoint; asked twice, it ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_AT_ONCE = "run it again; `--resume` goes on from the newest checkpoint, if there is one"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. ``problem`` and ``fix`` are for the user, ``exit_code`` is the one that a shell gives to it."""

    exit_code = 130

    def __init__(self, problem: str = "interrupted", fix: str = _AT_ONCE) -> None:
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}; {fix}")


class Terminated(SystemExit):
    """SIGTERM, as an exception: what is open is closed, and temporary files go."""

    exit_code = 143

    def __init__(self, problem: str = "terminated", fix: str = _AT_ONCE) -> None:
        self.problem, self.fix = problem, fix
        super().__init__(self.exit_code)


def terminate(number: int, frame: FrameType | None) -> None:
    """Handler of SIGTERM: end in order, where Python would end at once and leave what it was writing."""
    raise Terminated


@contextmanager
def handled(number: int, handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Within this, a signal goes to ``handler``, unless somebody else handles or ignores it already.

    Does nothing outside of the main thread, which alone gets signals.
    """
    ours = (signal.SIG_DFL, signal.default_int_handler, terminate)
    before = signal.getsignal(number)
    if threading.current_thread() is not threading.main_thread() or before not in ours:
        yield
        return
    signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


class Stops:
    """A keeper of the first SIGINT or SIGTERM while it is `watching`; a second one ends at once.

    tell: called with a sentence for the user, from the signal's handler.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._asked: int | None = None

    @property
    def asked(self) -> bool:
        """The run was asked to end."""
        return self._asked is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        with handled(signal.SIGINT, self._handle), handled(signal.SIGTERM, self._handle):
            yield

    def error(self, problem: str, fix: str) -> BaseException:
        """The exception that the signal stands for, with what the user is to know."""
        return (Terminated if self._asked == signal.SIGTERM else Interrupted)(problem, fix)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise Terminated if number == signal.SIGTERM else Interrupted
        self._asked = number
        self._tell("ending after this step, with a checkpoint; once more ends at once")
